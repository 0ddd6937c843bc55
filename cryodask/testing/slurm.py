"""A real Slurm in a temporary folder: munged, slurmctld and several slurmd on the loopback address, ready in one to two seconds.

A separate process owns the daemons and stops them when its standard input closes, so that nothing is left when the tests are killed.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "scontrol", "sinfo")

_CPUS, _MEMORY_MIB, _GPUS = 16, 64000, 4
_NODES = {"c0": "", "c1": "", "g0": f" Gres=gpu:{_GPUS}", "p0": ""}
_START_SECONDS = 60.0

# proctrack/pgid rather than linuxproc, which loses the children of a batch shell that dies of SIGTERM, so that workers never end
_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={dir}/munge/munge.socket
CredType=cred/munge
StateSaveLocation={dir}/state
SlurmdSpoolDir={dir}/spool/%n
SlurmctldPidFile={dir}/run/slurmctld.pid
SlurmdPidFile={dir}/run/slurmd-%n.pid
SlurmctldLogFile={dir}/log/slurmctld.log
SlurmdLogFile={dir}/log/slurmd-%n.log
PlugStackConfig={dir}/plugstack.conf
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={dir}/log/jobcomp.log
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=100
GresTypes=gpu
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=0,sched_min_interval=0
MinJobAge=30
KillWait=2
SlurmctldTimeout=30
SlurmdTimeout=30
MessageTimeout=10
TCPTimeout=2
{nodes}
PartitionName=cpu Nodes=c0,c1 Default=YES DefaultTime=30 MaxTime=1-0 PriorityTier=10
PartitionName=gpu Nodes=g0 MaxTime=1-0 PriorityTier=10
PartitionName=preempt Nodes=p0 MaxTime=1-0 PriorityTier=1 PreemptMode=REQUEUE GraceTime=0
PartitionName=urgent Nodes=p0 MaxTime=1-0 PriorityTier=100 PreemptMode=OFF
"""


def missing_programs() -> list[str]:
    """Slurm programs that are missing on this machine."""
    return [name for name in PROGRAMS if _program(name) is None]


def slurm_for_tests() -> Iterator[TinySlurm]:
    """Make a session fixture with ``slurm = pytest.fixture(scope="session")(slurm_for_tests)``. Warns and skips if Slurm is missing."""
    import pytest

    if missing := missing_programs():
        warnings.warn(f"Slurm is absent ({', '.join(missing)}): the tests marked slurm are SKIPPED", stacklevel=1)
        pytest.skip("needs Debian's slurm-wlm and munge")
    with TinySlurm() as started:
        yield started


class TinySlurm:
    """Slurm with four nodes of 16 cores and 64 GB: a context manager that cleans up completely.

    Partitions: ``cpu`` (nodes c0, c1), ``gpu`` (g0 with four fake GPUs), ``preempt`` and ``urgent`` (both p0; jobs of the second
    preempt those of the first).

    Attributes
    ----------
    folder : Path
    environ : dict
        ``SLURM_CONF``, all that Slurm's commands need to find this cluster.

    Notes
    -----
    Linux only. When the process that started it dies in any way, Slurm stops and every process that has this ``SLURM_CONF`` in the
    environment it was started with is killed.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="cryodask-slurm-"))
        self.folder.chmod(0o755)
        self.environ = {"SLURM_CONF": str(self.folder / "slurm.conf")}
        self._owner: subprocess.Popen[str] | None = None

    def __enter__(self) -> TinySlurm:
        self._owner = subprocess.Popen(
            [sys.executable, "-m", "cryodask.testing.slurm", str(self.folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self._owner.stdout is not None
        if self._owner.stdout.readline().strip() != "ready":
            self.__exit__(None, None, None)
            raise RuntimeError("Slurm did not start; see its output above")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._owner is not None:
            self._owner.communicate()  # ends its standard input
            self._owner = None

    # --- what the tests ask ---------------------------------------------------------------------------------------------------
    def run(self, *command: str, check: bool = True) -> str:
        """Run a Slurm command on this cluster; returns its output."""
        done = subprocess.run(command, env={**os.environ, **self.environ}, capture_output=True, text=True, timeout=60)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout

    def jobs(self) -> dict[str, tuple[str, str, str]]:
        """State, name and node of every job that Slurm shows, by job id."""
        lines = self.run("squeue", "-h", "-o", "%i|%T|%j|%N").splitlines()
        return {words[0]: (words[1], words[2], words[3]) for words in (line.split("|") for line in lines)}

    def processes(self) -> list[int]:
        """Process ids on this machine that run inside jobs of this cluster, or are its daemons."""
        return _processes_of(self.environ["SLURM_CONF"])

    # --- what goes wrong with nodes and controllers -----------------------------------------------------------------------------
    def drain(self, node: str) -> None:
        """Drain a node: it takes no new jobs, running ones continue."""
        self.run("scontrol", "update", f"NodeName={node}", "State=DRAIN", "Reason=test")

    def down(self, node: str) -> None:
        """Lose a node and the jobs on it."""
        self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")

    def resume(self, node: str) -> None:
        """Return a node to service; a no-op if it never left."""
        self.run("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)

    def kill_controller(self) -> None:
        """Kill -9 of slurmctld: jobs run on, every command of Slurm fails."""
        os.kill(int((self.folder / "run" / "slurmctld.pid").read_text()), signal.SIGKILL)

    def start_controller(self) -> None:
        """Start slurmctld again, with the jobs it knew; returns when it answers."""
        assert self._owner is not None
        assert self._owner.stdin is not None
        self._owner.stdin.write("controller\n")
        self._owner.stdin.flush()
        _wait(self._answers, "slurmctld does not answer")

    def reset(self) -> None:
        """Cancel every job and give back every node; returns when all nodes are idle."""
        self.run("scancel", "-f", "-u", _user(), check=False)
        for node in _NODES:
            self.resume(node)
        _wait(lambda: not self.jobs() and self._all_idle(), "jobs are left, or nodes are not idle")

    def _answers(self) -> bool:
        return "UP" in self.run("scontrol", "ping", check=False)

    def _all_idle(self) -> bool:
        return _all_idle(self.run("sinfo", "-h", "-N", "-o", "%N %T", check=False))


def _all_idle(sinfo: str) -> bool:
    states = dict(line.split() for line in sinfo.splitlines())
    return set(states) == set(_NODES) and set(states.values()) == {"idle"}


def _program(name: str) -> str | None:
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


def _user() -> str:
    return pwd.getpwuid(os.getuid()).pw_name


def _wait(ready: Callable[[], bool], otherwise: str, seconds: float = _START_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{otherwise} after {seconds:.0f} s")
        time.sleep(0.05)


def _processes_of(conf: str) -> list[int]:
    mark, found = f"SLURM_CONF={conf}\0".encode(), []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                environ = (entry / "environ").read_bytes()
                if mark in environ:
                    found.append(int(entry.name))
    return found


# --- the process that owns the daemons -------------------------------------------------------------------------------------------
class _Owner:
    def __init__(self, folder: Path) -> None:
        self.folder, self.conf = folder, str(folder / "slurm.conf")
        self.environ = {**os.environ, "SLURM_CONF": self.conf}
        self.daemons: list[subprocess.Popen[bytes]] = []

    def write_files(self) -> None:
        for name in ("munge", "state", "log", "spool", "run", "gpudev"):
            (self.folder / name).mkdir()
        (self.folder / "munge").chmod(0o711)
        key = self.folder / "munge" / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        ports = _free_ports(1 + len(_NODES))
        host = socket.gethostname().split(".")[0]
        shape = f"CPUs={_CPUS} Boards=1 Sockets=1 CoresPerSocket={_CPUS} ThreadsPerCore=1 RealMemory={_MEMORY_MIB}"
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} {shape}{extra}"
            for (name, extra), port in zip(_NODES.items(), ports[1:])
        )
        Path(self.conf).write_text(_CONF.format(dir=self.folder, host=host, user=_user(), port=ports[0], nodes=nodes), encoding="utf-8")
        (self.folder / "plugstack.conf").touch()  # else the machine's own is read
        # Slurm sets CUDA_VISIBLE_DEVICES only for devices that have a device file, each its own
        for i in range(_GPUS):
            (self.folder / "gpudev" / f"gpu{i}").symlink_to("/dev/null")
        devices = f"NodeName=g0 Name=gpu File={self.folder}/gpudev/gpu[0-{_GPUS - 1}]"
        (self.folder / "gres.conf").write_text(f"AutoDetect=off\n{devices}\n")

    def start(self) -> None:
        self.write_files()
        munge = self.folder / "munge"
        files = [f"--{what}-file={munge}/munge.{what}" for what in ("key", "pid", "log", "seed")]
        self.daemon("munged", "-F", "--force", f"--socket={munge}/munge.socket", *files, "--num-threads=2")
        _wait((munge / "munge.socket").exists, "munged does not start")
        self.daemon("slurmctld", "-D", "-c", "-f", self.conf)
        for node in _NODES:
            self.daemon("slurmd", "-D", "-c", "-N", node, "-f", self.conf)
        _wait(lambda: _all_idle(self.output("sinfo", "-h", "-N", "-o", "%N %T")), "the nodes do not become idle")

    def daemon(self, name: str, *options: str) -> None:
        program = _program(name)
        assert program is not None
        with open(self.folder / "log" / "daemons.log", "ab") as log:
            self.daemons.append(
                subprocess.Popen(
                    [program, *options],
                    env=self.environ,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )

    def output(self, *command: str) -> str:
        return subprocess.run(command, env=self.environ, capture_output=True, text=True, timeout=30).stdout

    def stop(self) -> None:
        deadline = time.monotonic() + 10
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            self.output("scancel", "-f", "-u", _user())
            while self.output("squeue", "-h").strip() and time.monotonic() < deadline:
                time.sleep(0.1)
        for daemon in reversed(self.daemons):  # munged last: the others talk through it
            daemon.terminate()
        for daemon in reversed(self.daemons):
            try:
                daemon.wait(5)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for pid in _processes_of(self.conf):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


def _own(folder: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))
    owner = _Owner(folder)
    try:
        owner.start()
        print("ready", flush=True)
        for line in sys.stdin:
            if line.strip() == "controller":
                owner.daemon("slurmctld", "-D", "-f", owner.conf)  # without -c it reads the state it left
    finally:
        owner.stop()


if __name__ == "__main__":
    _own(Path(sys.argv[1]))
