"""A facility in one file: its cluster with lanes, its folders, its people, and the sessions that run on it.

A blueprint (``configs/blueprints``) may have ``profiles``: their values replace those of the blueprint, key by key; null removes a key.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from cryodask.cluster.fields import Line
from cryodask.cluster.settings import SlurmSettings, parse_settings
from cryodask.cluster.shared_folders import Folder, differences, find_group, make_folder, striping
from cryodask.documents import StrictModel, expand, read_yaml
from cryodask.errors import ClusterError, ProjectFileError, StoreError

if TYPE_CHECKING:
    from cryodask.cluster.service.batch import SubmittedRun
    from cryodask.cluster.service.service import Service

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]


class Scratch(StrictModel):
    """Where workers spill: a node-local disk. A network file system is refused unless ``network`` is set."""

    path: Line = "${TMPDIR:-/tmp}"
    network: bool = False


class Storage(StrictModel):
    """``raw``: what the microscopes write, one folder per session. ``projects``: project files and results."""

    raw: Folder
    projects: Folder
    scratch: Scratch = Scratch()


class Simulated(StrictModel):
    """What is made before a session starts, for trying a blueprint: movies or particles, as ``cryodask.simulate`` makes them."""

    movies: dict[str, Any] | None = None
    particles: dict[str, Any] | None = None


class Watch(StrictModel):
    """When a watched session ends, apart from a file ``stop`` in its results."""

    movies: int | None = Field(None, ge=1)
    idle_minutes: float | None = Field(None, gt=0)


class Session(StrictModel):
    """What runs as a separate job on the cluster: a project (``inputs``, ``microscope``, ``pipeline`` of a project file), or a command.

    In every string, ``{raw}`` and ``{projects}`` stand for the folders and ``{name}`` for the session.
    """

    lane: str
    project: dict[str, Any] | None = None
    watch: Watch | None = None
    command: str | None = None
    simulate: Simulated = Simulated()

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.project is None) == (self.command is None):
            raise ValueError("give either a project or a command")
        return self


class Blueprint(StrictModel):
    """A blueprint as stored on disk, with its profile applied. ``people``: the lanes that each person may use."""

    name: Name
    about: str = ""
    cluster: Any
    storage: Storage
    people: dict[Name, list[str]] = Field(default_factory=dict)
    sessions: dict[Name, Session] = Field(default_factory=dict)

    @field_validator("cluster")
    @classmethod
    def _pools(cls, given: Any) -> SlurmSettings:
        settings = parse_settings(given, "cluster")
        if not isinstance(settings, SlurmSettings) or settings.single_allocation:
            raise ValueError("a blueprint describes pools of Slurm jobs: kind: slurm, without single_allocation")
        return settings

    @model_validator(mode="after")
    def _lanes_exist(self) -> Self:
        lanes = self.cluster.lanes
        asked = {f"sessions.{n}": [s.lane] for n, s in self.sessions.items()} | {f"people.{n}": p for n, p in self.people.items()}
        for where, wanted in asked.items():
            if unknown := [lane for lane in wanted if lane not in lanes]:
                raise ValueError(f"{where} names the lane {unknown[0]!r}; there are {', '.join(lanes)}")
        return self


def _absolute(given: str, folder: str | Path, file: str | Path) -> str:
    try:
        return str((Path(folder) / expand(given)).absolute())
    except ValueError as error:
        raise ProjectFileError(f"{file}: {given!r}: {error}.", "", "write the path in full") from None


@dataclass(frozen=True)
class Started:
    """What :func:`start` started; ``invitations`` holds the new ones, for people who had none."""

    service: Service
    runs: dict[str, SubmittedRun | str]
    invitations: dict[str, Path]


# --- reading ---------------------------------------------------------------------------------------------------------------------
def read_blueprint(path: str | Path, profile: str | None = None, folder: str | Path = ".") -> Blueprint:
    """Read and check a blueprint. Relative folders are resolved against ``folder``.

    Raises
    ------
    ProjectFileError
    """
    content = read_yaml(path, "blueprint")
    if not isinstance(content, dict) or "cluster" not in content or "storage" not in content:
        raise ProjectFileError(
            f"{path} is not a blueprint: it has no cluster or no storage.", "it is another kind of file", "see configs/blueprints"
        )
    profiles = content.pop("profiles", {})
    if profile is not None:
        if profile not in profiles:
            raise ProjectFileError(f"{path} has no profile {profile!r}.", "", f"it has {', '.join(profiles) or 'none'}")
        content = _merged(content, profiles[profile])
    storage = content["storage"]
    for name in ("raw", "projects"):
        if isinstance(storage.get(name), dict) and "path" in storage[name]:
            storage[name]["path"] = _absolute(storage[name]["path"], folder, path)
    scratch = storage.get("scratch") or {}
    for pool in (content["cluster"].get("pools") or {}).values():
        pool.setdefault("scratch", scratch.get("path", "${TMPDIR:-/tmp}"))
        pool.setdefault("network_scratch", scratch.get("network", False))
    if "logs" in content["cluster"]:
        content["cluster"]["logs"] = _absolute(content["cluster"]["logs"], folder, path)
    try:
        return Blueprint.model_validate(content)
    except ValidationError as error:
        said = "; ".join(
            ": ".join(filter(None, (".".join(map(str, p["loc"])), p["msg"].removeprefix("Value error, ")))) for p in error.errors()
        )
        raise ProjectFileError(f"{path}: {said}", "", "see the blueprints in configs/blueprints") from None


def _merged(below: Any, above: Any) -> Any:
    """Merge ``above`` into ``below``: mappings key by key, everything else as a whole; null removes a key."""
    if not isinstance(below, Mapping) or not isinstance(above, Mapping):
        return copy.deepcopy(above)
    out = dict(copy.deepcopy(below))
    for name, value in above.items():
        if value is None:
            out.pop(name, None)
        else:
            out[name] = _merged(out.get(name), value)
    return out


# --- sessions --------------------------------------------------------------------------------------------------------------------
def _placed(value: Any, words: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        for name, text in words.items():
            value = value.replace("{" + name + "}", text)
        return value
    if isinstance(value, Mapping):
        return {k: _placed(v, words) for k, v in value.items()}
    return [_placed(v, words) for v in value] if isinstance(value, (list, tuple)) else value


def _words(blueprint: Blueprint, name: str) -> dict[str, str]:
    return {"raw": blueprint.storage.raw.path, "projects": blueprint.storage.projects.path, "name": name}


def write_project_file(blueprint: Blueprint, name: str, folder: Path) -> Path:
    """The project file of a session, in ``folder``; results go where the blueprint says."""
    session = blueprint.sessions[name]
    content = _placed(session.project, _words(blueprint, name))
    path = folder / f"{name}.yaml"
    where = {"name": name, "folder": f"{blueprint.storage.projects.path}/{name}"}
    path.write_text(yaml.safe_dump(where | content, sort_keys=False, default_flow_style=None, width=140))
    return path


def command_of(blueprint: Blueprint, name: str, project_file: Path) -> list[str]:
    """Words of a session's command; the job substitutes ``{cluster}`` and ``{lane}``."""
    session = blueprint.sessions[name]
    if session.command is not None:
        return ["bash", "-c", _placed(session.command, _words(blueprint, name))]
    python = blueprint.cluster.driver.python or sys.executable
    words = [python, "-m", "cryodask.cli", "run", str(project_file), "--cluster", "{cluster}", "--lane", "{lane}"]
    if session.watch is not None:
        words += ["--watch"]
        words += ["--until-movies", str(session.watch.movies)] if session.watch.movies else []
        words += ["--until-idle", f"{session.watch.idle_minutes:g}"] if session.watch.idle_minutes else []
    return words


def _simulate(blueprint: Blueprint, name: str) -> None:
    made, folder = blueprint.sessions[name].simulate, Path(blueprint.storage.raw.path) / name
    if folder.exists() and any(folder.iterdir()):
        return  # the movies must not change under a running session
    if made.movies is not None:
        from cryodask.simulate import SessionParams, simulate_session

        simulate_session(folder, SessionParams(**made.movies))
    if made.particles is not None:
        from cryodask.simulate import simulate_particles

        simulate_particles(folder, **made.particles)


# --- what users call -------------------------------------------------------------------------------------------------------------
def check(blueprint: Blueprint) -> Iterator[str]:
    """What :func:`start` would do, as sentences and job scripts; nothing is created.

    Raises
    ------
    CryodaskError
        What is wrong with the blueprint, its projects included.
    """
    from cryodask.cluster.service import batch
    from cryodask.cluster.service.whereabouts import encrypted, folder_of
    from cryodask.cluster.slurm import slurm
    from cryodask.run.recipe import make_plan

    for folder in (blueprint.storage.raw, blueprint.storage.projects):
        new = not Path(folder.path).exists()
        there = "would be created" if new else "exists"
        yield f"folder {folder.path} {there}, mode {folder.mode}" + (f", group {folder.group}" if folder.group else "")
        try:
            if folder.group:
                find_group(folder.group)
            if not new and (different := differences(folder)):
                yield f"  left as it is: {different}"
        except StoreError as error:
            yield f"  {error.what} {error.way_out}"
        if folder.stripe and new:
            command = striping(folder)
            yield "  " + (" ".join(command) if command else "striping unchanged: not on Lustre, or lfs is not installed")
    lanes = {n: lane["weight"] if isinstance(lane, dict) else lane for n, lane in blueprint.cluster.lanes.items()}
    yield f"cluster {blueprint.name} with the lanes {', '.join(f'{n} {w:g}' for n, w in lanes.items())}"
    for person, allowed in blueprint.people.items():
        yield f"  {person} may use {', '.join(allowed)}" + ("" if encrypted(blueprint.cluster) else " (not enforced: no certificates)")
    for name, session in blueprint.sessions.items():
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / f"{name}.yaml"
            if session.project is not None:
                steps = [s.label for s in make_plan(write_project_file(blueprint, name, Path(scratch)), ahead=True).steps]
                yield f"session {name} in lane {session.lane}: {' > '.join(steps)}"
            else:
                yield f"session {name} in lane {session.lane}: a command"
            file = Path(blueprint.storage.projects.path) / file.name
            yield "  " + " ".join(command_of(blueprint, name, file))
    if blueprint.cluster.service and blueprint.cluster.service.where == "slurm":
        yield f"\n--- the scheduler\n{batch.service_script(folder_of(blueprint.name), blueprint.cluster.service)}"
    for name, session in blueprint.sessions.items():
        command = command_of(blueprint, name, Path(blueprint.storage.projects.path) / f"{name}.yaml")
        called = f"{blueprint.name}-{name}"
        log = slurm.logs_of(blueprint.cluster) / f"cryodask-{called}-%j.log"
        script = batch.driver_script(blueprint.cluster.driver, command, blueprint.name, lane=session.lane, name=called, log=log)
        yield f"\n--- the job of session {name}\n{script}"
    for pool, script in slurm.dry_run(blueprint.cluster).items():
        yield f"\n--- a job of pool {pool}\n{script}"


def start(blueprint: Blueprint) -> Started:
    """Make the folders, start the cluster (or find it if it is running), invite its people, and submit each session as a separate job.

    Sessions that are pending or running are left alone, and so are existing invitations.

    Raises
    ------
    CryodaskError
    """
    from cryodask.cluster.service import service
    from cryodask.cluster.service.whereabouts import encrypted, in_thread
    from cryodask.cluster.slurm import slurm

    for folder in (blueprint.storage.raw, blueprint.storage.projects):
        make_folder(folder)
    projects = Path(blueprint.storage.projects.path)
    for name, session in blueprint.sessions.items():
        if session.project is not None:
            (Path(blueprint.storage.raw.path) / name).mkdir(exist_ok=True)
        _simulate(blueprint, name)
    try:
        running = service.find(blueprint.name)
    except ClusterError:
        running = service.start(blueprint.cluster, blueprint.name)
    invitations = invite_people(blueprint) if encrypted(blueprint.cluster) else {}
    runs: dict[str, SubmittedRun | str] = {}
    queue = in_thread(slurm.squeue())
    if queue is None:
        raise ClusterError(
            "Slurm does not answer, so it is unknown which sessions are running already.",
            "its controller is down or overloaded",
            "try again when  squeue --me  answers: what was created stays, and no session is submitted twice",
        )
    there = {job.name: job.job_id for job in queue if job.cluster_id == "run" and job.alive}
    for name, session in blueprint.sessions.items():
        called = f"{blueprint.name}-{name}"
        if called in there:
            runs[name] = f"already running as Slurm job {there[called]}"
            continue
        file = write_project_file(blueprint, name, projects) if session.project is not None else projects / name
        command = command_of(blueprint, name, file)
        runs[name] = service.submit(command, blueprint.name, lane=session.lane, name=called, job=blueprint.cluster.driver)
    return Started(running, runs, invitations)


def invite_people(blueprint: Blueprint) -> dict[str, Path]:
    """Invite those of a blueprint's people who have no valid invitation to its cluster.

    A new invitation would invalidate the old one, so for everybody else only the lanes are updated. The owner needs none.

    Raises
    ------
    ClusterError
    """
    from cryodask.cluster.service import service
    from cryodask.cluster.service.whereabouts import folder_of, owner_of

    authority, made = service.authority_of(blueprint.name), {}
    owner, invited = owner_of(folder_of(blueprint.name)), authority.people()
    for person, lanes in blueprint.people.items():
        if person == owner:
            continue
        if person not in invited or datetime.fromisoformat(invited[person]["expires"]) < datetime.now(UTC):
            made[person] = service.invite(blueprint.name, person, lanes)
        elif invited[person]["lanes"] != lanes:
            authority.set_lanes(person, lanes)
    return made
