"""What a cluster file (YAML) may say, and its checks."""

from __future__ import annotations

import difflib
import os
import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, cast

import yaml
from dask.utils import parse_bytes
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    model_validator,
)

from cryodask.errors import ProjectFileError
from cryodask.plugins import Plugins

if TYPE_CHECKING:
    from distributed.deploy.cluster import Cluster

_NETWORK = {"nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb3", "afs", "glusterfs", "pvfs2", "wekafs", "panfs", "9p"}
_NETWORK_FUSE = ("fuse.ceph", "fuse.gluster", "fuse.sshfs", "fuse.juicefs")


def _memory(text: str) -> str:
    try:
        fits = parse_bytes(text) >= 2**20
    except ValueError:
        fits = False
    if not fits:
        raise ValueError("memory is a number with a unit: 64GiB, 4000MB")
    return text


def _walltime(given: object) -> object:
    # YAML reads an unquoted 12:00:00 as the number 43200, which Slurm would take for minutes
    said = str(given)
    if not isinstance(given, (int, float)) and re.fullmatch(r"\d+:\d\d", said):
        raise ValueError(f'Slurm takes two numbers for minutes and seconds: write "{said}:00" if these are hours, "0:{said}" if not')
    if isinstance(given, (int, float)) or not re.fullmatch(r"\d+-\d+:\d\d(:\d\d)?|\d+:\d\d:\d\d", said):
        raise ValueError('write it in quotes, as "hours:minutes:seconds" or "days-hours:minutes:seconds"')
    return given


def _one_line(text: str) -> str:
    if "\n" in text:
        raise ValueError("one line, please")
    return text


# lines of a cluster file come after ours, and the last one counts
_OUR_DIRECTIVES = {
    "comment": "by it a job is found in the queue and told from those of others",
    "job-name": "the log of a job is found by it",
    "output": "it is the log in which a job that fails says why; logs: of the cluster file sets its folder",
    "error": "it would take away from the log why a job failed",
    "open-mode": "it would let a job empty a log that is written already",
    "array": "each job has names of its own; count: says how many there are",
    "requeue": "a job that is lost is replaced at once, under a new name",
    "no-requeue": "a job that is lost is replaced at once, under a new name",
    "export": "jobs need the environment in which they were submitted; environment: adds to it",
    "wrap": "a job has a script already",
}
_SHORT = {"-J": "job-name", "-o": "output", "-e": "error", "-a": "array"}


def _directive(line: str) -> str:
    for word in shlex.split(_one_line(line)):
        long = word.removeprefix("--").partition("=")[0] if word.startswith("--") else ""
        # sbatch knows a long option by its beginning
        ours = next((name for name in _OUR_DIRECTIVES if long and name.startswith(long)), None) or _SHORT.get(word[:2])
        if ours:
            raise ValueError(f"leave --{ours} to cryodask: {_OUR_DIRECTIVES[ours]}")
    return line


Memory = Annotated[str, AfterValidator(_memory)]
Directive = Annotated[str, AfterValidator(_directive)]
Walltime = Annotated[str, BeforeValidator(_walltime)]
Line = Annotated[str, AfterValidator(_one_line)]
PoolName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
ServiceName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Sharing(_Section):
    """How lanes share the workers (see ``FairShareScheduler``)."""

    lanes: dict[str, float | dict[str, Any]] = {}
    strict: tuple[str, ...] = ()
    reserve: dict[str, int] = {}
    default_lane: str = "default"
    memory_share: dict[str, Annotated[float, Field(gt=0, le=1)]] = {}

    @model_validator(mode="after")
    def _lanes_exist(self) -> Self:
        unknown = [n for n in (*self.strict, *self.reserve, *self.memory_share) if n not in self.lanes]
        if unknown:
            raise ValueError(f"strict, reserve and memory_share name {unknown}, which lanes does not{_nearest(unknown[0], self.lanes)}")
        return self

    def sharing(self) -> dict[str, Any]:
        """The parameters of ``FairShareScheduler`` besides those of Dask's own."""
        return self.model_dump(include=set(_Sharing.model_fields))


class JobSettings(_Section):
    """A Slurm job without workers: that of a service's scheduler, or of a driver. ``partition``, ``account`` and ``qos`` as of a pool."""

    partition: Line | None = None
    account: Line | None = None
    qos: Line | None = None
    cores: PositiveInt = 1
    memory: Memory = "4GiB"
    walltime: Walltime | None = None
    environment: tuple[Line, ...] = ()
    python: Line | None = None
    directives: tuple[Directive, ...] = ()

    @property
    def memory_bytes(self) -> int:
        """Bytes of the job."""
        return int(parse_bytes(self.memory))


class ServiceSettings(JobSettings):
    """Where the scheduler of a shared cluster lives: a ``process`` of its own on this machine, or its own job on ``slurm``.

    ``certificates`` asks for TLS on the loopback interface, too, for machines that several people use. ``address_file`` is where those who
    are invited find the present address, if not in the account's own state folder; it holds no secret.
    """

    where: Literal["process", "slurm"] = "process"
    name: ServiceName | None = None
    certificates: bool = False
    address_file: Line | None = None


class LocalSettings(_Sharing):
    """Worker processes on this machine, with one thread each; so many of them as it has ``gpus`` have one each, bound to it."""

    kind: Literal["local"] = "local"
    workers: PositiveInt | None = None
    gpus: NonNegativeInt = 0
    memory: str | int | None = None
    scratch: str | None = None
    service: ServiceSettings | None = None

    @model_validator(mode="after")
    def _a_worker_for_each_gpu(self) -> Self:
        if self.workers is not None and self.gpus > self.workers:
            raise ValueError(f"each of the {self.gpus} gpus has a worker of its own: {self.workers} workers are too few")
        return self

    @model_validator(mode="after")
    def _service_is_here(self) -> Self:
        if self.service and (self.service.where == "slurm" or self.service.certificates):
            raise ValueError("workers of kind local live with their scheduler, in one account: leave service.where and certificates out")
        return self


class AddressSettings(_Section):
    """A scheduler that somebody else runs: its address, its scheduler file, or an invitation to a cluster (a file ``.invite``)."""

    kind: Literal["address"]
    address: str | None = None
    scheduler_file: str | None = None
    invitation: Annotated[str, Field(pattern=r"\.invite$")] | None = None

    @model_validator(mode="after")
    def _one_of_three(self) -> AddressSettings:
        if sum(given is not None for given in (self.address, self.scheduler_file, self.invitation)) != 1:
            raise ValueError("give address: tcp://host:port, or scheduler_file: a path, or invitation: the path of a file .invite")
        return self


class PoolSettings(_Section):
    """Jobs of one kind. ``cores``, ``memory`` and ``gpus`` are those of ONE job; ``resources`` those of one worker process.

    A job with ``gpus`` has a worker process for each of them, bound to it. ``memory`` is what Slurm is asked for: the workers' own limits
    stay a tenth below, since Slurm kills whole jobs.
    """

    partition: Line | None = None
    account: Line | None = None
    qos: Line | None = None
    count: int | None = Field(None, ge=0)
    minimum: int = Field(0, ge=0)
    maximum: int | None = Field(None, ge=0)
    cores: PositiveInt = 1
    processes: PositiveInt = 1
    gpus: int = Field(0, ge=0)
    memory: Memory
    walltime: Walltime | None = None
    resources: dict[str, float] = {}
    interface: Line | None = None
    scratch: Line = "${TMPDIR:-/tmp}"
    network_scratch: bool = False
    environment: tuple[Line, ...] = ()
    image: Line | None = None
    python: Line | None = None
    directives: tuple[Directive, ...] = ()

    @property
    def wanted(self) -> int:
        """Jobs at the start."""
        return self.minimum if self.count is None else self.count

    @property
    def workers_per_job(self) -> int:
        """Worker processes of one job."""
        return self.gpus or self.processes

    @property
    def memory_bytes(self) -> int:
        """Bytes of one job."""
        return int(parse_bytes(self.memory))

    @property
    def limit_bytes(self) -> int:
        """Bytes that the workers of one job may fill together: Slurm kills the whole job where it asks for more than it was given."""
        return int(0.9 * self.memory_bytes)

    @property
    def worker_bytes(self) -> int:
        """Memory limit of one worker process, bytes."""
        return self.limit_bytes // self.workers_per_job

    @model_validator(mode="after")
    def _fits(self) -> PoolSettings:
        if self.count is not None and (self.minimum or self.maximum is not None):
            raise ValueError("give count, or minimum and maximum")
        if self.maximum is not None and self.maximum < self.minimum:
            raise ValueError(f"maximum {self.maximum} is below minimum {self.minimum}")
        if self.gpus and self.processes not in (1, self.gpus):
            raise ValueError("a job has one process for each of its gpus: leave processes out")
        if self.cores < self.workers_per_job:
            raise ValueError(f"{self.workers_per_job} processes need as many cores, not {self.cores}")
        if not self.network_scratch and (kind := network_file_system(self.scratch)):
            raise ValueError(
                f"scratch {self.scratch} lies on a network file system ({kind}), which spilling workers bring to its knees;"
                " name a disk of the node, or set network_scratch: true"
            )
        return self


class SlurmSettings(_Sharing):
    """Pools of Slurm jobs on one scheduler, shared by lanes (see ``FairShareScheduler``).

    ``interface`` and ``port`` are the scheduler's; ``service`` says where it lives if others share it (``cryodask cluster start``), and
    ``driver`` what a batch run's own job needs (``cryodask submit``). With ``single_allocation`` one batch job holds scheduler, workers
    and driver.

    Pools with a ``maximum`` get as many jobs as would do the waiting work in ``catch_up_minutes``; a job that was not needed for
    ``idle_minutes`` is let go. ``floor`` gives a lane a number of threads that are there while it has clients. A guarded scheduler
    refuses graphs above ``max_graph_bytes`` (as sent) or ``max_graph_tasks``.
    """

    kind: Literal["slurm"]
    pools: dict[PoolName, PoolSettings] = Field(min_length=1)
    interface: Line | None = None
    port: int = Field(0, ge=0, le=65535)
    logs: Line = "~/.local/state/cryodask/logs"
    poll_seconds: float = Field(10.0, gt=0)
    replacements_per_hour: int = Field(60, ge=0)
    floor: dict[str, int] = {}
    catch_up_minutes: float = Field(10.0, gt=0)
    idle_minutes: float = Field(10.0, ge=0)
    max_graph_bytes: Memory = "256MiB"
    max_graph_tasks: PositiveInt = 2_000_000
    single_allocation: bool = False
    service: ServiceSettings | None = None
    driver: JobSettings = JobSettings()

    def graph_limits(self) -> dict[str, Any]:
        """The parameters of ``GuardedScheduler`` for graphs that are too large."""
        return self.model_dump(include={"max_graph_bytes", "max_graph_tasks"})

    @model_validator(mode="after")
    def _floors_have_lanes(self) -> SlurmSettings:
        unknown = [name for name in self.floor if self.lanes and name not in self.lanes]
        if unknown or min(self.floor.values(), default=0) < 0:
            raise ValueError(f"floor gives lanes a number of threads: {unknown or self.floor} is not of that kind")
        return self

    @model_validator(mode="after")
    def _one_allocation(self) -> SlurmSettings:
        if self.single_allocation and (len(self.pools) != 1 or not next(iter(self.pools.values())).wanted):
            raise ValueError("single_allocation takes one pool, with a count")
        if self.single_allocation and self.service:
            raise ValueError("single_allocation holds its own scheduler: leave service out")
        return self


class PluginSettings(_Section):
    """A kind of workers that another package starts (entry points of the group ``cryodask.pool_kinds``, named as ``kind``).

    A subclass has the settings that a cluster file may give, and ``open``.
    """

    kind: str

    def open(self) -> Cluster:
        """Start a scheduler with workers; it is closed with the client that is made on it."""
        raise NotImplementedError


def _refused(name: str, kind: object) -> str:
    """Why a kind of another package cannot be used."""
    if name in _KINDS:
        return f"{name} is a kind of cryodask's own"
    if not (isinstance(kind, type) and issubclass(kind, PluginSettings) and kind.open is not PluginSettings.open):
        return f"it is not a subclass of {PluginSettings.__module__}.PluginSettings with a function open"
    return ""


OTHERS = Plugins("cryodask.pool_kinds", _refused)
"""Kinds of workers of other packages."""

Settings = LocalSettings | AddressSettings | SlurmSettings | PluginSettings
_KINDS: dict[str, type[LocalSettings] | type[AddressSettings] | type[SlurmSettings]] = {
    "local": LocalSettings,
    "address": AddressSettings,
    "slurm": SlurmSettings,
}


def read_cluster_file(path: str | Path) -> Settings:
    """The settings in a cluster file.

    Raises
    ------
    ProjectFileError
    """
    try:
        content = yaml.safe_load(Path(path).read_text())
    except FileNotFoundError:
        raise ProjectFileError(
            f"There is no cluster file {path}.",
            "a typing error in its name",
            "give the path of a .yaml file; configs/clusters has some to copy",
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ProjectFileError(
            f"{path} is no cluster file: {error}", "wrong indentation or another kind of file", "write  kind: local  and what belongs to it"
        ) from None
    return parse_settings(content or {}, str(path))


def parse_settings(content: object, where: str = "the cluster settings") -> Settings:
    """Checked settings from the content of a cluster file.

    Raises
    ------
    ProjectFileError
    """
    if not isinstance(content, Mapping):
        raise ProjectFileError(
            f"{where} is no list of names and values.", "wrong indentation or another kind of file", "begin with  kind: local"
        )
    kind = content.get("kind", "local")
    kinds: dict[str, Any] = dict(_KINDS) if kind in _KINDS else {**_KINDS, **OTHERS.load()}
    if kind not in kinds:
        raise ProjectFileError(
            f"{where}: there is no kind of cluster {kind!r}{_nearest(str(kind), kinds)}.{OTHERS.hint(str(kind))}",
            "a typo, or the package that has this kind is not installed",
            f"use {' or '.join(kinds)}",
        )
    try:
        return cast(Settings, kinds[kind].model_validate(dict(content)))
    except ValidationError as error:
        raise ProjectFileError(
            f"{where}: {'; '.join(_problem(p, kind) for p in error.errors())}.",
            "a typing error, or a setting that belongs to another section",
            f"correct these lines; configs/clusters/{kind}.yaml shows what there is",
        ) from None


def changed_job(job: JobSettings, **given: str) -> JobSettings:
    """A job's settings with some replaced, as from a command line.

    Raises
    ------
    ProjectFileError
    """
    try:
        return JobSettings.model_validate({**job.model_dump(), **given})
    except ValidationError as error:
        raise ProjectFileError(
            f"{'; '.join(_problem(p, 'slurm') for p in error.errors())}.", "a typing error", "correct it, or set driver in the cluster file"
        ) from None


def _problem(problem: Any, kind: str) -> str:
    names = [str(step) for step in problem["loc"]]
    if problem["type"] == "extra_forbidden":
        inside: dict[tuple[str, int], type[BaseModel]] = {
            ("pools", 3): PoolSettings,
            ("service", 2): ServiceSettings,
            ("driver", 2): JobSettings,
        }
        model = inside.get((names[0], len(names))) or _KINDS.get(kind) or OTHERS.load()[kind]
        return f"unknown name {'.'.join(names)!r}{_nearest(names[-1], model.model_fields)}"
    said = str(problem["msg"]).removeprefix("Value error, ").rstrip(".")
    given = "" if problem["type"] == "missing" or isinstance(problem["input"], (Mapping, BaseModel)) else f" (given: {problem['input']!r})"
    return f"{'.'.join(names) + ': ' if names else ''}{said}{given}"


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def network_file_system(path: str) -> str:
    """Kind of the network file system that holds a path on this machine; empty for a local one, and for what only a node can tell."""
    if "$" in path:
        return ""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return ""
    real = os.path.realpath(os.path.expanduser(path))
    above = [(len(point), kind) for point, kind in mounts if real == point or real.startswith(point.rstrip("/") + "/")]
    kind = max(above, default=(0, ""))[1]
    return kind if kind in _NETWORK or kind.startswith(_NETWORK_FUSE) else ""
