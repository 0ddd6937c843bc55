"""Slurm: job scripts as text, submission, and queries of the queue. The only module that uses dask-jobqueue."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import os
import re
import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dask
import psutil
from distributed.deploy.spec import ProcessInterface

from cryodask.cluster.access import tls
from cryodask.cluster.environment import ALLOCATOR, ONE_THREAD, SETTINGS
from cryodask.cluster.settings import JobSettings, PoolSettings, SlurmSettings
from cryodask.errors import ClusterError

COMMENT = "cryodask"
_ALIVE = {"PENDING", "RUNNING", "CONFIGURING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING", "REQUEUED", "REQUEUE_HOLD", "RESV_DEL_HOLD"}
# messages when the controller is down or overloaded; any other message of sbatch is a permanent refusal
_AWAY = re.compile(
    r"unable to contact|connect(ion)? failure|timed out|zero bytes were transmitted|temporarily un(able|available)|connection refused", re.I
)
# names as in `stat` of coreutils, which has one name for all user-space file systems, including local ones
_NETWORK = "nfs*|lustre|gpfs|fhgfs|beegfs|ceph*|cifs|smb*|afs|k-afs|panfs|pvfs2|wekafs|glusterfs|v9fs|9p|snfs|acfs|ibrix|coda"

# also bounds the import time of a worker, which can be a minute on a busy file system
DEATH_SECONDS = 180
# a worker that finds no scheduler ends after that: with its imports, a job that starts after its cluster is gone has ended within a minute
_CONTACT_SECONDS = 45


def load_jobqueue() -> Any:
    """Import dask_jobqueue and restore the Ctrl-C handler, which its import replaces (``dask_jobqueue/runner.py`` of 0.9.0).

    Raises
    ------
    ClusterError
        Outside the main thread, where that import fails.
    """
    if "dask_jobqueue" not in sys.modules:
        if threading.current_thread() is not threading.main_thread():
            raise ClusterError(
                "Slurm pools cannot be opened in a thread before dask-jobqueue is imported.",
                "dask-jobqueue must be imported in the main thread",
                "call  cryodask.cluster.slurm.slurm.load_jobqueue()  at the start of the program",
            )
        handler = signal.getsignal(signal.SIGINT)
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            import dask_jobqueue
        finally:
            signal.signal(signal.SIGINT, handler)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    else:
        import dask_jobqueue
    # a separate section, so that nothing from a user's jobqueue.yaml leaks into the scripts
    shebang = {"shebang": "#!/usr/bin/env bash", "worker-command": "distributed.cli.dask_worker"}
    names = (
        "name cores memory processes python interface death-timeout local-directory extra worker-extra-args job-extra job-extra-directives"
        " env-extra job-script-prologue log-directory queue account walltime job-cpu job-mem"
    )
    dask.config.set({f"jobqueue.{COMMENT}": {**dict.fromkeys(names.split()), **shebang}})
    return dask_jobqueue


# --- one job ---------------------------------------------------------------------------------------------------------------------
@functools.cache
def pool_job_class() -> type[Any]:
    """``PoolJob``: a Slurm job with workers of one pool, as an entry of a ``SpecCluster``."""
    base = load_jobqueue().slurm.SLURMJob

    class PoolJob(base):  # type: ignore[valid-type, misc]
        """``refused``: Slurm's words if it refuses such a job; ``full``: if it accepts no more for now.

        ``unsure``: it is unknown whether Slurm accepted the job.
        """

        def __init__(
            self, scheduler: str, name: str, *, pool: str, settings: SlurmSettings, cluster_id: str, certificates: Path | None = None
        ) -> None:
            self.pool, self.refused, self.full, self.unsure = pool, "", "", False
            self.logs = logs_of(settings)
            chosen = settings.pools[pool]
            devices = chosen.gpus > 1
            super().__init__(
                scheduler=scheduler,
                name=f"{name}-$i" if devices else name,
                config_name=COMMENT,
                queue=chosen.partition,
                account=chosen.account,
                walltime=chosen.walltime,
                job_name=f"{COMMENT}-{pool}",
                job_cpu=chosen.cores,
                job_directives_skip=["--mem="],  # written below
                cores=chosen.cores // chosen.gpus if devices else chosen.cores,
                processes=1 if devices else chosen.processes,
                memory=chosen.worker_bytes if devices else chosen.limit_bytes,
                python=python_of(chosen) if devices else f"exec {python_of(chosen)}",
                job_extra_directives=[
                    *memory_directive(chosen, chosen.cores),
                    *directives_of(chosen, self.logs),
                    *licence_directive(chosen),
                    f"--comment={COMMENT}:{cluster_id}:{name}",
                    *chosen.directives,
                ],
                job_script_prologue=prologue_of(chosen, certificates, people=settings.people_on_workers),
                worker_extra_args=worker_options_of(pool, chosen, certificates),
                local_directory=f'"{chosen.scratch}"',
                death_timeout=DEATH_SECONDS,
                interface=chosen.interface or settings.interface,
                protocol="tls://" if certificates else None,
            )
            self.name = name
            if devices:
                self._command_template: str = (
                    'IFS=, read -ra devices <<< "$CUDA_VISIBLE_DEVICES"\n'
                    'for i in "${!devices[@]}"; do\n'
                    f"    CUDA_VISIBLE_DEVICES=${{devices[$i]}} {self._command_template} &\n"
                    "done\nwait"
                )

        async def start(self) -> None:
            try:
                self.logs.mkdir(parents=True, exist_ok=True)
                await super().start()
            except (RuntimeError, OSError, ValueError) as error:
                said = str(error) if isinstance(error, OSError) else sbatch_message(str(error))
                self.unsure = bool(_AWAY.search(said))
                if is_full(said):
                    self.full = said
                elif not self.unsure:
                    self.refused = said
                await ProcessInterface.start(self)  # an error raised here would be lost in a callback

        @staticmethod
        async def _call(cmd: list[str], **kwargs: Any) -> str:
            # a new session, because Ctrl-C in a terminal goes to all its processes and must not kill a submission half-way
            said: str = await base._call(cmd, start_new_session=True, **kwargs)
            return said

        async def close(self) -> None:
            if self.status.name != "closed":
                await super().close()
                await ProcessInterface.close(self)  # the base class does not set the status that SpecCluster asserts

        def last_words(self) -> str:
            try:
                lines = (self.logs / f"{self.job_name}-{self.job_id}.log").read_text(errors="replace").splitlines()
            except OSError:
                return "nothing readable"
            return " / ".join(line.strip() for line in lines if line.strip())[-300:] or "nothing"

    return PoolJob


def dry_run(settings: SlurmSettings) -> dict[str, str]:
    """The job script of every pool as it would be submitted, except for the scheduler's address and the certificates."""
    return {name: job_script(settings, name, scheduler="SCHEDULER", name=f"{name}-0", cluster_id="CLUSTER") for name in settings.pools}


def job_script(settings: SlurmSettings, pool: str, *, scheduler: str, name: str, cluster_id: str, certificates: Path | None = None) -> str:
    """The job script of a pool."""
    job = pool_job_class()(scheduler, name, pool=pool, settings=settings, cluster_id=cluster_id, certificates=certificates)
    return _tidy(job.job_script())


def _tidy(script: str) -> str:
    return re.sub(r"\n{3,}", "\n\n", script.strip()) + "\n"


def logs_of(settings: SlurmSettings) -> Path:
    """Folder of the job logs."""
    return Path(settings.logs)


def python_of(pool: PoolSettings) -> str:
    """Shell words that start the Python interpreter of a pool's workers."""
    if pool.image is None:
        return shlex.quote(pool.python or sys.executable)
    nvidia = "--nv " if pool.gpus else ""
    return f'apptainer exec {nvidia}--bind "{pool.scratch}" {shlex.quote(pool.image)} {shlex.quote(pool.python or "python3")}'


def memory_directive(job: PoolSettings | JobSettings, cores: int, *, tasks: int = 1) -> list[str]:
    """How a job asks for its memory: sites accept ``--mem`` or ``--mem-per-cpu``, or hand out memory by themselves."""
    if job.memory_option == "none":
        return []
    if job.memory_option == "mem" and tasks == 1:
        return [f"--mem={math.ceil(job.memory_bytes / 2**20)}M"]
    return [f"--mem-per-cpu={math.ceil(job.memory_bytes / 2**20 / cores)}M"]


def directives_of(pool: PoolSettings, logs: Path) -> list[str]:
    """Directives for sbatch that dask-jobqueue has no option for."""
    # requeued jobs would wait for two minutes and keep their names: the pool replaces them at once under new ones
    lines = ["--no-requeue", "--open-mode=append", f"--output={shlex.quote(str(logs))}/%x-%j.log"]
    return lines + ([f"--qos={pool.qos}"] if pool.qos else []) + ([f"--gres=gpu:{pool.gpus}"] if pool.gpus else [])


def licence_directive(pool: PoolSettings, jobs: int = 1) -> list[str]:
    """How jobs ask for their licences."""
    return [f"--licenses={','.join(f'{name}:{jobs * n}' for name, n in pool.licences.items())}"] if pool.licences else []


def prologue_of(pool: PoolSettings, certificates: Path | None, *, people: bool = False) -> list[str]:
    """Shell commands before the workers of a pool start; ``people`` may connect to them."""
    chosen = {**SETTINGS, "distributed.comm.timeouts.connect": f"{_CONTACT_SECONDS}s"}
    settings = {"DASK_" + k.upper().replace(".", "__").replace("-", "_"): str(v) for k, v in chosen.items()}
    values = {**ONE_THREAD, **ALLOCATOR, "PYTHONDONTWRITEBYTECODE": "", **settings}
    values |= tls.worker_environment(certificates) if certificates else {}
    values |= {"DASK_CRYODASK__PEOPLE_ON_WORKERS": "True"} if people else {}
    lines = [*pool.environment, *(f"export {name}={shlex.quote(value)}" for name, value in values.items())]
    lines += [] if pool.network_scratch else [_refuse_network(pool.scratch)]
    return lines + ([': "${CUDA_VISIBLE_DEVICES:?Slurm gave this job no GPU}"'] if pool.gpus else [])


def _refuse_network(scratch: str) -> str:
    """A shell command that ends the job if its scratch is not node-local; only the node knows its $TMPDIR."""
    return (
        f'scratch="{scratch}"; while [ ! -e "$scratch" ]; do scratch=$(dirname "$scratch"); done;'
        f' case $(stat -f -c %T "$scratch") in {_NETWORK})'
        f' echo "The scratch folder {scratch} is on a network file system, which spilling workers would overload:'
        ' set scratch of the pool to a node-local disk, or network_scratch: true" >&2; exit 1;; esac'
    )


def worker_options_of(name: str, pool: PoolSettings, certificates: Path | None) -> list[str]:
    """Command-line options of Dask for a worker of a pool."""
    resources = {**pool.worker_resources, f"pool-{name}": 1e9}
    # without the address every worker would serve HTTP on all interfaces of the node
    options = ["--dashboard-address", "127.0.0.1:0", "--no-dashboard"]
    options += ["--preload-nanny", "cryodask.cluster.guard"] if certificates else ["--preload", "cryodask.cluster.access.versions"]
    options += ["--resources", '"' + ",".join(f"{k}={v:g}" for k, v in resources.items()) + '"']
    if pool.walltime:
        margin = leave_seconds(pool)
        options += ["--lifetime", f"{walltime_seconds(pool.walltime) - margin}s", "--lifetime-stagger", f"{margin // 2}s"]
    return options


def refuse_clear_text(settings: SlurmSettings, certificates: object) -> None:
    """Refuse to communicate over a network without certificates."""
    interfaces = {settings.interface, *(pool.interface or settings.interface for pool in settings.pools.values())}
    if not certificates and interfaces != {"lo"}:
        raise ClusterError(
            "The pools have no certificates, so traffic to workers on other machines would not be encrypted.",
            "no certificates were given",
            "give the folder of the cluster's authority, or set  interface: lo  if everything is on one machine",
        )


def walltime_seconds(text: str) -> int:
    """``[days-]hours:minutes[:seconds]`` in seconds; without days two numbers are minutes and seconds, as in Slurm."""
    days, dash, clock = text.rpartition("-")
    parts = [int(x) for x in clock.split(":")]
    if len(parts) == 2:
        parts = [*parts, 0] if dash else [0, *parts]
    return int(days or 0) * 86400 + parts[0] * 3600 + parts[1] * 60 + parts[2]


def leave_seconds(pool: PoolSettings) -> int:
    """How long before the end of a job's walltime its workers leave, with a random spread of half that time."""
    return margin_seconds(walltime_seconds(pool.walltime)) if pool.walltime else 0


def margin_seconds(walltime: int) -> int:
    """Like :func:`leave_seconds`, for a walltime in seconds."""
    return min(600, walltime // 6)


def is_full(said: str) -> bool:
    """Whether sbatch refused a job because this user has too many already, which is temporary.

    The last line of its message names this limit together with permanent ones; newer versions first say which one applied.
    """
    limits = re.findall(r"\b(?:Assoc|QOS)\w*Limit\b", said)
    return any("Submit" in limit for limit in limits) if limits else "job submit limit" in said


def sbatch_message(error: str) -> str:
    """The message of sbatch, without its prefix."""
    said = re.findall(r"^sbatch: (?:error: )?(.+)$", error, re.M)
    return "; ".join(dict.fromkeys(line.strip() for line in said)) or " ".join(error.split())[-300:]


# --- the queue -------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class QueuedJob:
    """One of cryodask's jobs as squeue shows it. ``seconds_left``: until its walltime ends, None without a limit."""

    job_id: str
    state: str
    reason: str
    seconds_left: int | None
    node: str
    cluster_id: str
    name: str

    @property
    def alive(self) -> bool:
        """Whether its workers are running or may still start; a completing job has lost them."""
        return self.state in _ALIVE


async def squeue() -> list[QueuedJob] | None:
    """All of this user's jobs submitted by cryodask, from one call; None if Slurm does not answer."""
    code, out = await _command("squeue", "-h", "--me", "-o", "%i|%T|%L|%r|%N|%k")
    if code:
        return None
    jobs = []
    for line in out.splitlines():
        words = line.split("|", 5)
        comment = words[5].split(":") if len(words) == 6 else []
        if len(comment) == 3 and comment[0] == COMMENT:
            left = (
                walltime_seconds("0:" + words[2] if words[2].count(":") == 0 else words[2]) if re.fullmatch(r"[\d:-]+", words[2]) else None
            )
            jobs.append(QueuedJob(words[0], words[1], words[3], left, words[4], comment[1], comment[2]))
    return jobs


async def scancel(job_ids: list[str]) -> None:
    """Cancel jobs; those that are gone already are ignored."""
    if job_ids:
        await _command("scancel", *job_ids)


async def cancel_of(cluster_id: str) -> list[str]:
    """Cancel all jobs of a cluster; returns their names."""
    left = [job for job in await squeue() or [] if job.cluster_id == cluster_id]
    await scancel([job.job_id for job in left])
    return [job.name for job in left]


async def cancel_leftovers() -> list[str]:
    """Cancel jobs of clusters whose process on this machine died; pending ones would start without a scheduler."""
    left = [job for job in await squeue() or [] if owner_is_dead(job.cluster_id)]
    await scancel([job.job_id for job in left])
    return [job.name for job in left]


async def cancel_until_gone(cluster_id: str, known: Iterable[str], seconds: float) -> list[str]:
    """Cancel the jobs of a cluster until Slurm shows none of them, or the time is over.

    Returns the ids of jobs that may still be there: those ``known`` if Slurm never answered.
    """
    deadline, left = time.monotonic() + seconds, sorted(known)
    while time.monotonic() < deadline:
        queue = await squeue()
        jobs = [job for job in queue or [] if job.cluster_id == cluster_id]
        if queue is not None:
            left = [job.job_id for job in jobs]
            if not left:
                break
        await scancel([job.job_id for job in jobs if job.alive])
        await asyncio.sleep(0.2 if queue is not None else 2.0)
    return left


def new_cluster_id() -> str:
    """Id of a cluster from its owning process, ``host.pid.start``, so that jobs of dead owners can be recognised."""
    own = psutil.Process()
    return f"{socket.gethostname().split('.')[0]}.{own.pid}.{int(own.create_time())}.{os.urandom(3).hex()}"


def owner_is_dead(cluster_id: str) -> bool:
    """Whether the process that owned a cluster was on this machine and has ended."""
    parts = cluster_id.split(".")
    if len(parts) != 4 or parts[0] != socket.gethostname().split(".")[0]:
        return False
    with contextlib.suppress(psutil.NoSuchProcess, ValueError):
        process = psutil.Process(int(parts[1]))
        return process.status() == psutil.STATUS_ZOMBIE or abs(process.create_time() - int(parts[2])) > 3
    return True


async def _command(*words: str, seconds: float = 30.0) -> tuple[int, str]:
    try:
        process = await asyncio.create_subprocess_exec(
            *words, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL, start_new_session=True
        )
    except OSError:
        return 127, ""
    try:
        out, _ = await asyncio.wait_for(process.communicate(), seconds)
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        return 124, ""
    return process.returncode or 0, out.decode(errors="replace")
