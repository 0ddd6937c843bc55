"""Processes that outlive the command that starts them, local or as jobs without workers: services, and drivers of batch runs."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from getpass import getuser
from pathlib import Path

import psutil

from cryodask.cluster.access import tls
from cryodask.cluster.environment import ONE_THREAD
from cryodask.cluster.service.whereabouts import encrypted, in_thread, state_folder
from cryodask.cluster.settings import JobSettings, LocalSettings, ServiceSettings, SlurmSettings
from cryodask.cluster.slurm import slurm
from cryodask.cluster.slurm.allocation import allocation_script
from cryodask.errors import ClusterError

# a job that submits jobs must not pass its own resources on to them
_FORGET_OWN_SHAPE = 'for v in ${!SLURM_@}; do case $v in SLURM_CONF|SLURM_JOB_ID|SLURM_JOB_END_TIME) ;; *) unset "$v" ;; esac; done'


# --- jobs without workers --------------------------------------------------------------------------------------------------------
def job_script(job: JobSettings, command: str, *, name: str, log: str, comment: str, signal: str = "") -> str:
    """The script of a job that runs one shell command."""
    asked = [f"-J {name}", *(f"-{k} {v}" for k, v in (("p", job.partition), ("A", job.account), ("t", job.walltime)) if v)]
    asked += [f"-n 1 --cpus-per-task={job.cores}", *slurm.memory_directive(job, job.cores)]
    asked += ["--no-requeue", "--open-mode=append", f"--output={shlex.quote(log)}", f"--comment={comment}"]
    asked += [*([f"--qos={job.qos}"] if job.qos else []), *([f"--signal={signal}"] if signal else []), *job.directives]
    exports = [f"export {key}={value}" for key, value in ONE_THREAD.items()]
    return "\n".join(["#!/usr/bin/env bash", *(f"#SBATCH {a}" for a in asked), *job.environment, *exports, _FORGET_OWN_SHAPE, command, ""])


def sbatch(script: str) -> str:
    """Submit a script; returns the id of its job.

    Raises
    ------
    ClusterError
        If Slurm refuses the job, with its words.
    """
    if shutil.which("sbatch") is None:
        raise ClusterError(
            "Slurm is not available: sbatch is not on the PATH.",
            "this machine is not a login node of a cluster, or a module must be loaded",
            "use a login node; without Slurm use a cluster file of kind local",
        )
    done = subprocess.run(["sbatch", "--parsable"], input=script, capture_output=True, text=True, start_new_session=True)
    said = slurm.sbatch_message(done.stderr) if done.returncode else ""
    if slurm.is_full(said):
        raise ClusterError(
            f"Slurm accepts no more jobs for now: {said}.",
            "your account has reached its limit of queued jobs",
            "try again when some have ended; check with  squeue --me",
        )
    if done.returncode:
        raise ClusterError(
            f"Slurm refuses this job: {said}.",
            "the partition, account, memory or walltime does not exist on this cluster",
            "compare the cluster file with  sinfo",
        )
    return done.stdout.strip().split(";")[0]


def last_words(log: Path) -> str:
    """The last lines of a log, joined."""
    try:
        lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    except OSError:
        return "it has no log"
    return " / ".join(lines[-3:])[-400:] or "its log is empty"


# --- the process of a service ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Launched:
    """A starting service process: a process id on this machine, or a Slurm job."""

    log: Path
    pid: int | None = None
    started: float | None = None
    job: str | None = None

    @property
    def short(self) -> str:
        """Process or job id, without querying the queue."""
        return f"process {self.pid}" if self.job is None else f"Slurm job {self.job}"

    def __str__(self) -> str:
        if self.job is None:
            return self.short
        shown = next((j for j in in_thread(slurm.squeue()) or [] if j.job_id == self.job), None)
        state = (
            f"{shown.state.lower()}, reason {shown.reason}" if shown and shown.state == "PENDING" else shown.state.lower() if shown else ""
        )
        return self.short + (f" is {state}" if state else "")

    @classmethod
    def read(cls, folder: Path) -> Launched | None:
        """Read what :meth:`write` stored."""
        try:
            content = json.loads((folder / "launched.json").read_text())
        except (OSError, ValueError):
            return None
        return cls(**{**content, "log": Path(content["log"])})

    def write(self, folder: Path) -> None:
        """Store it in the service's folder."""
        tls.write_secret(folder / "launched.json", json.dumps({**asdict(self), "log": str(self.log)}))

    def ended(self) -> bool:
        """Whether it has ended; False if the queue does not answer."""
        if self.job is not None:
            queue = in_thread(slurm.squeue())
            return queue is not None and not any(j.job_id == self.job and j.alive for j in queue)
        try:
            process = psutil.Process(self.pid)
            return process.status() == psutil.STATUS_ZOMBIE or abs(process.create_time() - (self.started or 0.0)) > 3
        except psutil.NoSuchProcess:
            return True

    def end(self) -> None:
        """Cancel or terminate it."""
        if self.job is not None:
            in_thread(slurm.scancel([self.job]))
        elif self.pid is not None and not self.ended():
            with suppress(psutil.NoSuchProcess):
                psutil.Process(self.pid).terminate()


def launch(folder: Path, settings: LocalSettings | SlurmSettings, *, after: str = "") -> Launched:
    """Start the service process of a folder, detached from this one; ``after``: id of the cluster that it succeeds."""
    service = settings.service or ServiceSettings()
    if service.where == "slurm":
        job = (_taken_before(after) if after else None) or sbatch(service_script(folder, service, after=after))
        return Launched(Path(str(_service_log(folder)).replace("%j", job)), job=job)
    log = folder / "service.log"
    if not after and log.exists():
        log.replace(log.with_suffix(".log.before"))
    os.close(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
    # the shell exits at once, so the service is detached and has no terminal
    detach = 'log=$1; shift; "$@" </dev/null >>"$log" 2>&1 & echo $!'
    words = [service.python or sys.executable, *_service_words(folder, after)]
    done = subprocess.run(
        ["sh", "-c", detach, "sh", str(log), *words],
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        cwd=folder,
    )
    pid = int(done.stdout)
    try:
        started = psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:
        started = None
    return Launched(log, pid=pid, started=started)


def follower_mark(cluster_id: str) -> str:
    """Slurm comment of successor jobs of the service with that cluster id."""
    return f"after-{cluster_id}"


def _taken_before(after: str) -> str | None:
    """A successor's job that Slurm accepted without reporting it, for example when sbatch timed out."""
    mark = follower_mark(after)
    return next((job.job_id for job in in_thread(slurm.squeue()) or [] if job.cluster_id == mark and job.alive), None)


def _service_words(folder: Path, after: str) -> list[str]:
    return ["-m", "cryodask.cluster.service.serving", str(folder), *([after] if after else [])]


def _service_log(folder: Path) -> Path:
    return folder / "service-%j.log"


def service_script(folder: Path, service: ServiceSettings, *, after: str = "") -> str:
    """The job script of a service's scheduler."""
    # Slurm creates the log with the submitter's umask and passes that umask on, so it must not be changed here
    close = f'chmod 600 {shlex.quote(str(folder))}/service-"$SLURM_JOB_ID".log; '
    command = close + "exec " + shlex.join([service.python or sys.executable, *_service_words(folder, after)])
    name, mark = folder.name, follower_mark(after) if after else "service"
    return job_script(
        service, command, name=f"cryodask-{name}", log=str(_service_log(folder)), comment=f"cryodask:{mark}:{name}",
        signal=f"B:USR1@{margin_seconds(service)}",
    )  # fmt: skip


def margin_seconds(service: ServiceSettings) -> int:
    """How long before the end of its walltime a service starts its hand-over, because its successor may be pending for a while."""
    return min(3600, slurm.walltime_seconds(service.walltime) // 4) if service.walltime else 600


# --- batch runs ------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class SubmittedRun:
    """A batch run that Slurm has accepted."""

    job_id: str
    log: Path
    script: str

    def __str__(self) -> str:
        return (
            f"Slurm job {self.job_id}.\n  follow:  tail -F {self.log}\n  state:   squeue -j {self.job_id}\n  cancel:  scancel {self.job_id}"
        )


def submit(
    command: Sequence[str],
    cluster: str | Path,
    *,
    lane: str = "batch",
    name: str = "run",
    job: JobSettings | None = None,
    times: int = 5,
    dry_run: bool = False,
) -> SubmittedRun:
    """Run a command in a separate Slurm job, on the workers of a cluster.

    Parameters
    ----------
    command : sequence of str
        Command and arguments. The words ``{cluster}`` and ``{lane}`` are replaced by their values, for ``connect()``.
    cluster : str or path
        Name of a service, or a cluster file: with pools, which the job opens itself, or with ``single_allocation``, in which case the job
        contains scheduler, workers and driver.
    lane : str
    name : str
        Name of the job and its log.
    job : JobSettings, optional
        What the job needs; by default ``driver`` in the cluster file.
    times : int
        Maximum number of times the command is run if it loses the service.
    dry_run : bool
        Only make the script; ``job_id`` is empty.

    Raises
    ------
    ClusterError, ProjectFileError
        If Slurm is not available or refuses the job, or its jobs cannot reach the cluster.
    """
    from cryodask.cluster.service import service

    shared, settings = service.of_word_or_file(cluster)
    # must be valid in sbatch options, in a comment with colons, and as a file name
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", name)
    if isinstance(settings, LocalSettings):
        raise ClusterError(
            f"The workers of the cluster {cluster} are on one machine and cannot be reached from a batch job.",
            "the cluster file is of kind local, or was not given"
            if shutil.which("sbatch")
            else "Slurm, which runs batch jobs, is not available",
            "run it here with  cryodask run PROJECT.yaml, or submit it with a cluster file of kind slurm",
        )
    slurmed = settings if isinstance(settings, SlurmSettings) else None
    logs = slurm.logs_of(slurmed) if slurmed else state_folder() / "logs"
    log = logs / f"cryodask-{name}-%j.log"
    if slurmed and slurmed.single_allocation:
        with _own_certificates(slurmed, keep=not dry_run) as certificates:
            driver = f"export CRYODASK_LANE={shlex.quote(lane)}; {_in_shell(command)}"
            script = allocation_script(slurmed, driver, certificates=certificates)
        if certificates:
            script = script.replace(str(certificates), str(_batch_authority()))
        log = logs / "cryodask-batch-%j.log"
    else:
        job = job or (slurmed.driver if slurmed else JobSettings())
        if shared is None or str(cluster).endswith(".invite"):
            where = str(Path(cluster).absolute())  # the job does not start in this folder
        else:
            where = str(cluster) if service.is_name(str(cluster)) else shared.name
        script = driver_script(job, command, where, lane=lane, name=name, log=log, times=times if shared else 0)
    if dry_run:
        return SubmittedRun("", log, script)
    logs.mkdir(parents=True, exist_ok=True)
    job_id = sbatch(script)
    return SubmittedRun(job_id, Path(str(log).replace("%j", job_id)), script)


def driver_script(job: JobSettings, command: Sequence[str], cluster: str, *, lane: str, name: str, log: str | Path, times: int = 5) -> str:
    """The job script of a batch run on a cluster of that name or file; ``times`` is 0 if the cluster cannot come back."""
    exports = f"export CRYODASK_CLUSTER={shlex.quote(cluster)} CRYODASK_LANE={shlex.quote(lane)}\n"
    again = f"{shlex.quote(job.python or sys.executable)} -m cryodask.cluster.service.driver {times} " if times else ""
    line = f"{exports}exec {again}{_in_shell(command)}"
    return job_script(job, line, name=f"cryodask-{name}", log=str(log), comment=f"cryodask:run:{name}")


def _in_shell(command: Sequence[str]) -> str:
    placed = {"{cluster}": '"$CRYODASK_CLUSTER"', "{lane}": '"$CRYODASK_LANE"'}
    return " ".join(placed.get(word) or shlex.quote(word) for word in command)


def _batch_authority() -> Path:
    return state_folder() / "certificates" / "batch"


@contextmanager
def _own_certificates(settings: SlurmSettings, *, keep: bool) -> Iterator[Path | None]:
    """The authority of this account for jobs that contain a whole cluster; unless ``keep``, a temporary one."""
    folder = _batch_authority()
    if not encrypted(settings):
        yield None
    elif (folder / "ca.pem").exists():
        yield folder
    elif keep:
        tls.Authority.create(folder, owner=getuser(), cluster="batch")
        yield folder
    else:
        with tempfile.TemporaryDirectory() as passing:
            tls.Authority.create(passing, owner=getuser(), cluster="batch")
            yield Path(passing)
