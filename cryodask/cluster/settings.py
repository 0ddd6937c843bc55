"""The settings of a cluster file (YAML), and their checks."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, cast

from dask.utils import parse_bytes
from pydantic import (
    BaseModel,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    model_validator,
)

from cryodask.cluster.directives import unquoted
from cryodask.cluster.fields import (
    GPU,
    BinaryMemory,
    Command,
    Directive,
    FilePath,
    Invitation,
    Licences,
    Memory,
    MemoryOption,
    NodePath,
    PoolName,
    Program,
    ServiceName,
    Walltime,
    Weight,
    Word,
    licence,
    network_file_system,
)
from cryodask.documents import StrictModel, read_yaml
from cryodask.errors import ProjectFileError
from cryodask.plugins import Plugins

if TYPE_CHECKING:
    from distributed.deploy.cluster import Cluster


class _Sharing(StrictModel):
    """How lanes share the workers (see ``FairShareScheduler``)."""

    lanes: dict[str, Weight | dict[str, Any]] = Field(default_factory=dict)
    strict: tuple[str, ...] = ()
    reserve: dict[str, int] = Field(default_factory=dict)
    default_lane: str = "default"
    memory_share: dict[str, Annotated[float, Field(gt=0, le=1)]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _lanes_exist(self) -> Self:
        unknown = [n for n in (*self.strict, *self.reserve, *self.memory_share) if n not in self.lanes]
        if unknown:
            raise ValueError(f"strict, reserve and memory_share name {unknown}, not listed under lanes{_nearest(unknown[0], self.lanes)}")
        return self

    def sharing(self) -> dict[str, Any]:
        """The parameters of ``FairShareScheduler`` beyond those of Dask's scheduler."""
        return self.model_dump(include=set(_Sharing.model_fields))


class JobSettings(StrictModel):
    """A Slurm job without workers: a service's scheduler or a driver. ``partition``, ``account`` and ``qos`` as in a pool."""

    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    cores: PositiveInt = 1
    memory: Memory = "4GiB"
    memory_option: MemoryOption = "mem"
    walltime: Walltime | None = None
    environment: tuple[Command, ...] = ()
    python: Program | None = None
    directives: tuple[Directive, ...] = ()

    @property
    def memory_bytes(self) -> int:
        """Memory of the job, bytes."""
        return int(parse_bytes(self.memory))


class ServiceSettings(JobSettings):
    """Where the scheduler of a shared cluster runs: as a ``process`` on this machine, or as a job on ``slurm``.

    ``certificates`` enables TLS on the loopback interface as well, for machines that several people use. ``address_file`` is where
    invited users find the current address, by default in the account's state folder; it contains no secret.
    """

    where: Literal["process", "slurm"] = "process"
    name: ServiceName | None = None
    certificates: bool = False
    address_file: FilePath | None = None


class LocalSettings(_Sharing):
    """Single-threaded worker processes on this machine.

    The first ``gpus`` of them are bound to one GPU each. ``licences``: how many of each there are; that many workers have one.
    """

    kind: Literal["local"] = "local"
    workers: PositiveInt | None = None
    gpus: NonNegativeInt = 0
    licences: Licences = Field(default_factory=dict)
    memory: BinaryMemory | int | None = None
    scratch: FilePath | None = None
    service: ServiceSettings | None = None

    @model_validator(mode="after")
    def _a_worker_for_each_gpu(self) -> Self:
        if self.workers is not None and self.gpus > self.workers:
            raise ValueError(f"each of the {self.gpus} gpus needs its own worker: {self.workers} workers are too few")
        return self

    @model_validator(mode="after")
    def _service_is_here(self) -> Self:
        if self.service and (self.service.where == "slurm" or self.service.certificates):
            raise ValueError("workers of kind local run beside their scheduler in one account: leave out service.where and certificates")
        return self


class AddressSettings(StrictModel):
    """An existing scheduler: its address, its scheduler file, or an invitation to a cluster (a ``.invite`` file)."""

    kind: Literal["address"]
    address: str | None = None
    scheduler_file: FilePath | None = None
    invitation: Invitation | None = None

    @model_validator(mode="after")
    def _one_of_three(self) -> AddressSettings:
        if sum(given is not None for given in (self.address, self.scheduler_file, self.invitation)) != 1:
            raise ValueError("give one of address: tcp://host:port, scheduler_file: PATH, or invitation: PATH (a .invite file)")
        return self


class PoolSettings(StrictModel):
    """Jobs of one kind. ``cores``, ``memory``, ``gpus`` and ``licences`` are per job, ``resources`` per worker process.

    A job with ``gpus`` has one worker process bound to each of them. ``memory`` is requested from Slurm: the workers' own limits
    are a tenth lower, since Slurm kills whole jobs. ``licences`` are requested from Slurm, too, and divided equally among the processes.
    """

    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    count: int | None = Field(None, ge=0)
    minimum: int = Field(0, ge=0)
    maximum: int | None = Field(None, ge=0)
    cores: PositiveInt = 1
    processes: PositiveInt = 1
    gpus: int = Field(0, ge=0)
    memory: Memory
    memory_option: MemoryOption = "mem"
    walltime: Walltime | None = None
    resources: dict[str, float] = Field(default_factory=dict)
    licences: Licences = Field(default_factory=dict)
    interface: Word | None = None
    scratch: NodePath = "${TMPDIR:-/tmp}"
    network_scratch: bool = False
    environment: tuple[Command, ...] = ()
    image: FilePath | None = None
    python: Program | None = None
    directives: tuple[Directive, ...] = ()

    @property
    def wanted(self) -> int:
        """Number of jobs at the start."""
        return self.minimum if self.count is None else self.count

    @property
    def workers_per_job(self) -> int:
        """Number of worker processes per job."""
        return self.gpus or self.processes

    @property
    def worker_resources(self) -> dict[str, float]:
        """Dask resources of one worker process."""
        held = {licence(name): number / self.workers_per_job for name, number in self.licences.items()}
        return {**({GPU: 1.0} if self.gpus else {}), **held, **self.resources}

    @property
    def memory_bytes(self) -> int:
        """Memory of one job, bytes."""
        return int(parse_bytes(self.memory))

    @property
    def limit_bytes(self) -> int:
        """Total memory limit of the workers of one job, bytes: Slurm kills the whole job if it exceeds its memory."""
        return int(0.9 * self.memory_bytes)

    @property
    def worker_bytes(self) -> int:
        """Memory limit of one worker process, bytes."""
        return self.limit_bytes // self.workers_per_job

    @model_validator(mode="after")
    def _fits(self) -> PoolSettings:
        if self.count is not None and (self.minimum or self.maximum is not None):
            raise ValueError("give either count, or minimum and maximum")
        if self.maximum is not None and self.maximum < self.minimum:
            raise ValueError(f"maximum {self.maximum} is below minimum {self.minimum}")
        if self.gpus and self.processes not in (1, self.gpus):
            raise ValueError("a job has one process per GPU: leave out processes")
        if self.cores < self.workers_per_job:
            raise ValueError(f"{self.workers_per_job} processes need as many cores, not {self.cores}")
        for name, number in self.licences.items():
            if number % self.workers_per_job:
                raise ValueError(
                    f"{number} licences {name} cannot be divided equally among {self.workers_per_job} processes: give a multiple of that"
                )
        if self.licences and any(re.search(r"(^|\s)(--licenses|-L)", unquoted(line)) for line in self.directives):
            raise ValueError("licences are requested from Slurm already: leave them out of directives")
        if not self.network_scratch and (kind := network_file_system(self.scratch)):
            raise ValueError(
                f"scratch {self.scratch} is on a network file system ({kind}), which spilling workers would overload;"
                " use a node-local disk, or set network_scratch: true"
            )
        return self


class LimitSettings(StrictModel):
    """What one person may have on a guarded scheduler; see ``cryodask.cluster.access.limits.Limits``."""

    bytes: Memory = "256MiB"
    names: PositiveInt = 10_000
    topics: PositiveInt = 1_000
    clients: PositiveInt = 64
    recorders: PositiveInt = 8
    connections: PositiveInt = 256
    graph_tasks: PositiveInt = 50_000


class SlurmSettings(_Sharing):
    """Pools of Slurm jobs on one scheduler, shared by lanes (see ``FairShareScheduler``).

    ``interface`` and ``port`` are the scheduler's; ``service`` says where it runs if it is shared (``cryodask cluster start``), and
    ``driver`` what the driver job of a batch run needs (``cryodask submit``). With ``single_allocation`` one batch job contains scheduler,
    workers and driver.

    Pools with a ``maximum`` get as many jobs as are needed to do the pending work in ``catch_up_minutes``; a job that was not needed for
    ``idle_minutes`` is released. ``floor`` guarantees a lane a number of threads while it has clients. A guarded scheduler
    refuses graphs above ``max_graph_bytes`` (as sent) or ``max_graph_tasks``; ``limits`` bounds what each person has. With
    ``people_on_workers`` people may connect to workers themselves, which only ``direct=True`` needs; otherwise results go through the
    scheduler.
    """

    kind: Literal["slurm"]
    pools: dict[PoolName, PoolSettings] = Field(min_length=1)
    interface: Word | None = None
    port: int = Field(0, ge=0, le=65535)
    logs: FilePath = Field("~/.local/state/cryodask/logs", validate_default=True)
    poll_seconds: float = Field(10.0, gt=0)
    replacements_per_hour: int = Field(60, ge=0)
    floor: dict[str, int] = Field(default_factory=dict)
    catch_up_minutes: float = Field(10.0, gt=0)
    idle_minutes: float = Field(10.0, ge=0)
    max_graph_bytes: Memory = "256MiB"
    max_graph_tasks: PositiveInt = 2_000_000
    limits: LimitSettings = LimitSettings()
    people_on_workers: bool = False
    single_allocation: bool = False
    service: ServiceSettings | None = None
    driver: JobSettings = JobSettings()

    def graph_limits(self) -> dict[str, Any]:
        """The limits of ``GuardedScheduler``."""
        return self.model_dump(include={"max_graph_bytes", "max_graph_tasks", "limits"})

    @model_validator(mode="after")
    def _floors_have_lanes(self) -> SlurmSettings:
        unknown = [name for name in self.floor if self.lanes and name not in self.lanes]
        if unknown or min(self.floor.values(), default=0) < 0:
            raise ValueError(f"floor maps lanes to numbers of threads; {unknown or self.floor} is not valid")
        return self

    @model_validator(mode="after")
    def _one_allocation(self) -> SlurmSettings:
        if self.single_allocation and (len(self.pools) != 1 or not next(iter(self.pools.values())).wanted):
            raise ValueError("single_allocation needs exactly one pool, with a count")
        if self.single_allocation and self.service:
            raise ValueError("single_allocation has its own scheduler: leave out service")
        return self


class PluginSettings(StrictModel):
    """A kind of workers from another package (entry points of the group ``cryodask.pool_kinds``, named like ``kind``).

    A subclass defines the settings of the cluster file, and ``open``.
    """

    kind: str

    def open(self) -> Cluster:
        """Start a scheduler with workers; it is closed together with its client."""
        raise NotImplementedError


def _refused(name: str, kind: object) -> str:
    """Why a kind of another package cannot be used; empty if it can."""
    if name in _KINDS:
        return f"the name {name} is used by cryodask itself"
    if not (isinstance(kind, type) and issubclass(kind, PluginSettings) and kind.open is not PluginSettings.open):
        return f"it is not a subclass of {PluginSettings.__module__}.PluginSettings with a function open"
    return ""


OTHERS = Plugins("cryodask.pool_kinds", _refused)
"""Kinds of workers from other packages."""

Settings = LocalSettings | AddressSettings | SlurmSettings | PluginSettings
_KINDS: dict[str, type[LocalSettings] | type[AddressSettings] | type[SlurmSettings]] = {
    "local": LocalSettings,
    "address": AddressSettings,
    "slurm": SlurmSettings,
}


def read_cluster_file(path: str | Path) -> Settings:
    """Read and check a cluster file.

    Raises
    ------
    ProjectFileError
    """
    return parse_settings(read_yaml(path, "cluster file") or {}, str(path), folder=Path(path).parent)


def parse_settings(content: object, where: str = "the cluster settings", *, folder: str | Path = "") -> Settings:
    """Checked settings from the content of a cluster file; its relative paths start in ``folder``.

    Raises
    ------
    ProjectFileError
    """
    if not isinstance(content, Mapping):
        raise ProjectFileError(
            f"{where} is not a mapping of names to values.", "wrong indentation, or another kind of file", "begin with  kind: local"
        )
    kind = content.get("kind", "local")
    kind = kind if isinstance(kind, str) else str(kind)
    kinds: dict[str, Any] = dict(_KINDS) if kind in _KINDS else {**_KINDS, **OTHERS.load()}
    if kind not in kinds:
        raise ProjectFileError(
            f"{where}: there is no kind of cluster {kind!r}{_nearest(str(kind), kinds)}.{OTHERS.hint(str(kind))}",
            "the package that provides this kind is not installed",
            f"use {' or '.join(kinds)}",
        )
    try:
        return cast(Settings, kinds[kind].model_validate(dict(content), context={"folder": folder}))
    except ValidationError as error:
        misspelt = any(p["type"] == "extra_forbidden" for p in error.errors())
        raise ProjectFileError(
            f"{where}: {'; '.join(_problem(p, kind) for p in error.errors())}.",
            "a setting is misspelt, or belongs to another section" if misspelt else "",
            f"correct these lines; see configs/clusters/{kind}.yaml for all settings",
        ) from None


def changed_job(job: JobSettings, **given: str) -> JobSettings:
    """A job's settings with some replaced, for the command line.

    Raises
    ------
    ProjectFileError
    """
    try:
        return JobSettings.model_validate({**job.model_dump(), **given})
    except ValidationError as error:
        raise ProjectFileError(
            f"{'; '.join(_problem(p, 'slurm') for p in error.errors())}.", "", "correct it, or set driver in the cluster file"
        ) from None


def _problem(problem: Any, kind: str) -> str:
    names = [str(step) for step in problem["loc"]]
    if problem["type"] == "extra_forbidden":
        inside: dict[tuple[str, int], type[BaseModel]] = {
            ("pools", 3): PoolSettings,
            ("service", 2): ServiceSettings,
            ("driver", 2): JobSettings,
            ("limits", 2): LimitSettings,
        }
        model = inside.get((names[0], len(names))) or _KINDS.get(kind) or OTHERS.load()[kind]
        return f"unknown name {'.'.join(names)!r}{_nearest(names[-1], model.model_fields)}"
    said = str(problem["msg"]).removeprefix("Value error, ").rstrip(".")
    given = "" if problem["type"] == "missing" or isinstance(problem["input"], (Mapping, BaseModel)) else f" (given: {problem['input']!r})"
    return f"{'.'.join(names) + ': ' if names else ''}{said}{given}"


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
