"""Slurm: job scripts as text, submission, and what the queue says. The one place that uses dask-jobqueue."""

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dask
import psutil
from distributed.deploy.spec import ProcessInterface

from cryodask.cluster.access import tls
from cryodask.cluster.environment import ALLOCATOR, ONE_THREAD, SETTINGS
from cryodask.cluster.settings import PoolSettings, SlurmSettings
from cryodask.errors import ClusterError

COMMENT = "cryodask"
_ALIVE = {"PENDING", "RUNNING", "CONFIGURING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING", "REQUEUED", "REQUEUE_HOLD", "RESV_DEL_HOLD"}
# what commands say when the controller is away or overworked; anything else that sbatch says is a refusal, which does not heal
_AWAY = re.compile(
    r"unable to contact|connect(ion)? failure|timed out|zero bytes were transmitted|temporarily un(able|available)|connection refused", re.I
)
# as `stat` of coreutils names them; it calls all file systems in user space alike, local ones too
_NETWORK = "nfs*|lustre|gpfs|fhgfs|beegfs|ceph*|cifs|smb*|afs|k-afs|panfs|pvfs2|wekafs|glusterfs|v9fs|9p|snfs|acfs|ibrix|coda"

# it also bounds how long a worker may take to import, which on a busy file system is a minute
DEATH_SECONDS = 180


def load_jobqueue() -> Any:
    """The module dask_jobqueue, whose import replaces the handler of Ctrl-C (``dask_jobqueue/runner.py`` of 0.9.0): it is put back.

    Raises
    ------
    ClusterError
        Outside the main thread, where that import fails.
    """
    if "dask_jobqueue" not in sys.modules:
        if threading.current_thread() is not threading.main_thread():
            raise ClusterError(
                "Slurm pools cannot be opened first in a thread.",
                "dask-jobqueue, which submits the jobs, must be imported in the main thread",
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
    # an own section, so that nothing of a user's jobqueue.yaml leaks into our scripts
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
        """``refused`` holds Slurm's words where it takes no such job, ``full`` where it takes no more now.

        ``unsure`` is set where nobody knows whether it took the job.
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
                job_mem=f"{math.ceil(chosen.memory_bytes / 2**20)}M",
                cores=chosen.cores // chosen.gpus if devices else chosen.cores,
                processes=1 if devices else chosen.processes,
                memory=chosen.worker_bytes if devices else chosen.limit_bytes,
                python=python_of(chosen) if devices else f"exec {python_of(chosen)}",
                job_extra_directives=[*directives_of(chosen, self.logs), f"--comment={COMMENT}:{cluster_id}:{name}", *chosen.directives],
                job_script_prologue=prologue_of(chosen, certificates),
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
                said = str(error) if isinstance(error, OSError) else slurms_words(str(error))
                self.unsure = bool(_AWAY.search(said))
                if is_full(said):
                    self.full = said
                elif not self.unsure:
                    self.refused = said
                await ProcessInterface.start(self)  # raised here, it would end in a callback that nobody hears

        @staticmethod
        async def _call(cmd: list[str], **kwargs: Any) -> str:
            # a session of its own: Ctrl-C in a terminal goes to all processes there, and must not kill a submission half-way
            said: str = await base._call(cmd, start_new_session=True, **kwargs)
            return said

        async def close(self) -> None:
            if self.status.name != "closed":
                await super().close()
                await ProcessInterface.close(self)  # the base class forgets the status, and SpecCluster asserts it

        def last_words(self) -> str:
            try:
                lines = (self.logs / f"{self.job_name}-{self.job_id}.log").read_text(errors="replace").splitlines()
            except OSError:
                return "nothing that could be read"
            return " / ".join(line.strip() for line in lines if line.strip())[-300:] or "nothing"

    return PoolJob


def dry_run(settings: SlurmSettings) -> dict[str, str]:
    """The job script of every pool, as it would be submitted but for the scheduler's address and the certificates."""
    return {name: job_script(settings, name, scheduler="SCHEDULER", name=f"{name}-0", cluster_id="CLUSTER") for name in settings.pools}


def job_script(settings: SlurmSettings, pool: str, *, scheduler: str, name: str, cluster_id: str, certificates: Path | None = None) -> str:
    """The text that sbatch gets for a job of a pool."""
    job = pool_job_class()(scheduler, name, pool=pool, settings=settings, cluster_id=cluster_id, certificates=certificates)
    return _tidy(job.job_script())


def _tidy(script: str) -> str:
    return re.sub(r"\n{3,}", "\n\n", script.strip()) + "\n"


def logs_of(settings: SlurmSettings) -> Path:
    """Where the jobs write."""
    return Path(settings.logs).expanduser().absolute()


def python_of(pool: PoolSettings) -> str:
    """The interpreter of a pool's workers, as words of shell."""
    if pool.image is None:
        return shlex.quote(pool.python or sys.executable)
    nvidia = "--nv " if pool.gpus else ""
    return f'apptainer exec {nvidia}--bind "{pool.scratch}" {shlex.quote(pool.image)} {shlex.quote(pool.python or "python3")}'


def directives_of(pool: PoolSettings, logs: Path) -> list[str]:
    """Lines for sbatch that dask-jobqueue has no word for."""
    # requeued jobs wait for two minutes and come back under their old names: the pool replaces them at once under new ones
    lines = ["--no-requeue", "--open-mode=append", f"--output={shlex.quote(str(logs))}/%x-%j.log"]
    return lines + ([f"--qos={pool.qos}"] if pool.qos else []) + ([f"--gres=gpu:{pool.gpus}"] if pool.gpus else [])


def prologue_of(pool: PoolSettings, certificates: Path | None) -> list[str]:
    """Lines of shell before the workers of a pool start."""
    settings = {"DASK_" + k.upper().replace(".", "__").replace("-", "_"): str(v) for k, v in SETTINGS.items()}
    values = {**ONE_THREAD, **ALLOCATOR, "PYTHONDONTWRITEBYTECODE": "", **settings}
    values |= tls.worker_environment(certificates) if certificates else {}
    lines = [*pool.environment, *(f"export {name}={shlex.quote(value)}" for name, value in values.items())]
    lines += [] if pool.network_scratch else [_refuse_network(pool.scratch)]
    return lines + ([': "${CUDA_VISIBLE_DEVICES:?Slurm gave this job no GPU}"'] if pool.gpus else [])


def _refuse_network(scratch: str) -> str:
    """A line of shell that ends the job where its scratch is not on the node: only the node knows what $TMPDIR is there."""
    return (
        f'scratch="{scratch}"; while [ ! -e "$scratch" ]; do scratch=$(dirname "$scratch"); done;'
        f' case $(stat -f -c %T "$scratch") in {_NETWORK})'
        f' echo "The scratch folder {scratch} lies on a network file system, which spilling workers bring to its knees:'
        ' set scratch of the pool to a disk of the node, or network_scratch: true" >&2; exit 1;; esac'
    )


def worker_options_of(name: str, pool: PoolSettings, certificates: Path | None) -> list[str]:
    """Options of Dask's command for a worker of a pool."""
    resources = {**({"GPU": 1.0} if pool.gpus else {}), **pool.resources, f"pool-{name}": 1e9}
    # without the address every worker serves HTTP on all of the node's interfaces
    options = ["--dashboard-address", "127.0.0.1:0", "--no-dashboard"]
    options += ["--preload-nanny", "cryodask.cluster.guard"] if certificates else []
    options += ["--resources", '"' + ",".join(f"{k}={v:g}" for k, v in resources.items()) + '"']
    if pool.walltime:
        margin = leave_seconds(pool)
        options += ["--lifetime", f"{walltime_seconds(pool.walltime) - margin}s", "--lifetime-stagger", f"{margin // 2}s"]
    return options


def refuse_clear_text(settings: SlurmSettings, certificates: object) -> None:
    """Nothing of ours talks over a network without certificates."""
    interfaces = {settings.interface, *(pool.interface or settings.interface for pool in settings.pools.values())}
    if not certificates and interfaces != {"lo"}:
        raise ClusterError(
            "The pools have no certificates, and workers on other machines would talk in clear text.",
            "no certificates were given",
            "give the folder of the cluster's authority, or set  interface: lo  where all is on one machine",
        )


def walltime_seconds(text: str) -> int:
    """``[days-]hours:minutes[:seconds]`` in seconds; without days two numbers are minutes and seconds, as Slurm reads them."""
    days, dash, clock = text.rpartition("-")
    parts = [int(x) for x in clock.split(":")]
    if len(parts) == 2:
        parts = [*parts, 0] if dash else [0, *parts]
    return int(days or 0) * 86400 + parts[0] * 3600 + parts[1] * 60 + parts[2]


def leave_seconds(pool: PoolSettings) -> int:
    """How long before the end of a job's walltime its workers leave by themselves; half of it more or less by chance."""
    return margin_seconds(walltime_seconds(pool.walltime)) if pool.walltime else 0


def margin_seconds(walltime: int) -> int:
    """The same for a walltime in seconds."""
    return min(600, walltime // 6)


def is_full(said: str) -> bool:
    """Whether sbatch took no job because there are too many of this user's already: that passes, as those end.

    Its last words name that limit together with others, which do not pass; newer versions say first which one it was.
    """
    limits = re.findall(r"\b(?:Assoc|QOS)\w*Limit\b", said)
    return any("Submit" in limit for limit in limits) if limits else "job submit limit" in said


def slurms_words(error: str) -> str:
    """What sbatch said, without its name."""
    said = re.findall(r"^sbatch: (?:error: )?(.+)$", error, re.M)
    return "; ".join(dict.fromkeys(line.strip() for line in said)) or " ".join(error.split())[-300:]


# --- the queue -------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class QueuedJob:
    """A job of ours as squeue shows it. ``seconds_left`` until its walltime ends, None if there is no such end."""

    job_id: str
    state: str
    reason: str
    seconds_left: int | None
    node: str
    cluster_id: str
    name: str

    @property
    def alive(self) -> bool:
        """Whether its workers run or may still come; a job that is completing has lost them."""
        return self.state in _ALIVE


async def squeue() -> list[QueuedJob] | None:
    """All of this user's jobs that cryodask submitted, from one call; None when Slurm does not answer, which says nothing of the jobs."""
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
    """Cancel jobs; those that are gone already do no harm."""
    if job_ids:
        await _command("scancel", *job_ids)


async def cancel_of(cluster_id: str) -> list[str]:
    """Cancel all jobs of one cluster; their names."""
    left = [job for job in await squeue() or [] if job.cluster_id == cluster_id]
    await scancel([job.job_id for job in left])
    return [job.name for job in left]


async def cancel_leftovers() -> list[str]:
    """Cancel jobs of clusters whose process on this machine died: pending ones would start only to find no scheduler."""
    left = [job for job in await squeue() or [] if owner_is_dead(job.cluster_id)]
    await scancel([job.job_id for job in left])
    return [job.name for job in left]


async def wait_until_gone(cluster_id: str, seconds: float) -> bool:
    """Cancel what is left of a cluster until Slurm shows nothing of it; False if it did so for too long, or did not answer."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        queue = await squeue()
        left = [job for job in queue or [] if job.cluster_id == cluster_id]
        if queue is not None and not left:
            return True
        await scancel([job.job_id for job in left if job.alive])
        await asyncio.sleep(0.2 if queue is not None else 2.0)
    return False


def new_cluster_id() -> str:
    """Names the process that owns a cluster, so that jobs can be told whose owner has died: ``host.pid.start``."""
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
