"""The project file: read, checked against the stages' own parameter models, and turned into a plan, before anything expensive."""

from __future__ import annotations

import difflib
import glob
import re
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cryodask.errors import ProjectFileError
from cryodask.stage import InputFileMark, Params, Stage, load_stages
from cryodask.vocabulary import VARIABLES


class Inputs(BaseModel):
    """Where a project starts: movies, or what another program made of them (exactly one of the first four)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    movies: str | None = Field(None, description="pattern of movie files, say movies/*.tif")
    micrographs: str | None = Field(None, description="RELION STAR file of micrographs (motion-corrected, with or without CTF)")
    particles: str | None = Field(None, description="RELION STAR file of extracted particles")
    half_maps: tuple[str, str] | None = Field(None, description="two half-maps (MRC) for mask and postprocess")
    coordinates: str | None = Field(None, description="folder of STAR files with picks, one a micrograph, beside micrographs")
    gain: str | None = Field(None, description="gain reference that multiplies the counts (MRC, TIFF)")
    gain_rotate: Literal[0, 90, 180, 270] = Field(0, description="clockwise turn of the gain, degrees")
    gain_flip: Literal["none", "up-down", "left-right"] = Field("none", description="flip of the gain after the turn")

    @model_validator(mode="after")
    def _one_start(self) -> Inputs:
        starts = [k for k in ("movies", "micrographs", "particles", "half_maps") if getattr(self, k) is not None]
        if len(starts) != 1:
            raise ValueError(f"give exactly one of movies, micrographs, particles, half_maps (given: {starts or 'none'})")
        return self


class Microscope(BaseModel):
    """Optics and exposure, the same for all movies of the project."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    voltage_kv: float = Field(gt=0, le=3000, description="acceleration voltage, kV")
    spherical_aberration_mm: float = Field(ge=0, le=20, description="Cs, mm")
    amplitude_contrast: float = Field(0.1, ge=0, lt=1, description="share of amplitude contrast")
    pixel_size_angstrom: float = Field(gt=0, le=100, description="pixel size of the movies, Angstrom")
    dose_per_frame: float = Field(1.0, gt=0, description="exposure of a frame, electrons per square Angstrom")
    pre_exposure: float = Field(0.0, ge=0, description="exposure before the first frame, electrons per square Angstrom")


class ProjectFile(BaseModel):
    """A project file as it stands on disk."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, pattern=r"^[^/]+$")
    inputs: Inputs
    microscope: Microscope | None = None
    pipeline: list[Any] = Field(min_length=1)
    cluster: str = "local"
    workers: int | None = Field(None, ge=1, description="local workers; all cores if not given")
    item_limit_seconds: float | None = Field(3600, gt=0, description="a movie that takes longer is quarantined; null for no limit")
    folder: str | None = Field(None, description="where results go; a folder with the project's name beside this file if not given")


@dataclass(frozen=True)
class Step:
    """One entry of the pipeline, its needs resolved: ``source`` says which step (or ``inputs``) gives each variable."""

    label: str
    stage: Stage
    params: Params
    source: dict[str, str] = field(default_factory=dict)

    def input_files(self) -> dict[str, str]:
        """Parameters that name a file, where given."""
        return {n: getattr(self.params, n) for n in input_file_fields(type(self.params)) if getattr(self.params, n)}


@dataclass(frozen=True)
class Plan:
    """A checked project file: steps in order, and where the results go."""

    path: Path
    file: ProjectFile
    folder: Path
    steps: tuple[Step, ...]

    @property
    def cluster(self) -> str:
        """``local``, an address, the name of a cluster that runs, or the path of a cluster file."""
        name = self.file.cluster
        is_word = re.fullmatch(r"[A-Za-z0-9_-]+", name) is not None and not Path(self.resolve(name)).is_file()
        return name if is_word or "://" in name else self.resolve(name)

    def resolve(self, name: str) -> str:
        """A path of the project file, relative to where that file lies."""
        return str((self.path.parent / Path(name).expanduser()).resolve()) if name else name


def input_file_fields(model: type[Params]) -> list[str]:
    """Names of the parameters that are files whose content matters."""
    return [n for n, f in model.model_fields.items() if _is_input_file(f)]


def _is_input_file(info: Any) -> bool:
    if any(isinstance(m, InputFileMark) or m is InputFileMark for m in info.metadata):
        return True
    return any(
        isinstance(m, InputFileMark) or m is InputFileMark
        for arg in typing.get_args(info.annotation)
        for m in getattr(arg, "__metadata__", ())
    )


def project_folder(path: str | Path) -> Path:
    """The results' folder from either the folder itself or the project file."""
    given = Path(path)
    if given.is_file():
        file = read_project_file(given)
        return _folder(given, file)
    return given


def _folder(path: Path, file: ProjectFile) -> Path:
    return (path.parent / (file.folder or file.name)).resolve()


def read_project_file(path: str | Path) -> ProjectFile:
    """Read and check the form of a project file.

    Raises
    ------
    ProjectFileError
        With every problem found, and the nearest known name for each unknown one.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise ProjectFileError(f"There is no project file {path}.", "a typing error in its name", "give the path of a .yaml file") from None
    except OSError as error:
        raise ProjectFileError(
            f"{path} cannot be read: {error.strerror}.", "it is a folder, or belongs to somebody else", "give the path of a .yaml file"
        ) from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ProjectFileError(f"{path} cannot be read: {error}", "wrong indentation or a missing quote", "mend it and try again") from None
    if not isinstance(content, dict):
        raise ProjectFileError(f"{path} is no project file: it holds no keys.", "it is empty, or another kind of file", "see README")
    try:
        return ProjectFile.model_validate(content)
    except ValidationError as error:
        raise ProjectFileError(f"{path}: " + _problems(error, ProjectFile), "a typing error", "see the table of keys in README") from None


def make_plan(path: str | Path) -> Plan:
    """Read a project file and resolve its pipeline; everything that can be found wrong now is found wrong now."""
    path = Path(path)
    file = read_project_file(path)
    stages = load_stages()
    available = dict.fromkeys([*input_variables(file), *star_variables(path, file)], "inputs")
    steps: list[Step] = []
    entries = list(file.pipeline)
    if file.inputs.movies and not any(_entry_name(e)[0] == "ingest" for e in entries):
        entries.insert(0, "ingest")
    for source, stage_name in (("micrographs", "import_micrographs"), ("particles", "import_particles"), ("half_maps", "import_half_maps")):
        if getattr(file.inputs, source) and not any(_entry_name(e)[0] == stage_name for e in entries):
            entries.insert(0, stage_name)
    if file.inputs.coordinates and not any(_entry_name(e)[0] == "import_coordinates" for e in entries):
        entries.insert(1, "import_coordinates")
    for entry in entries:
        stage_name, label, values = _entry_name(entry)
        if stage_name not in stages:
            raise ProjectFileError(
                f"{path}: there is no stage {stage_name!r}.{_nearest(stage_name, stages)}",
                "a typing error, or a package with that stage is not installed",
                "cryodask stages  lists all of them",
            )
        if any(s.label == label for s in steps):
            raise ProjectFileError(
                f"{path}: two steps of the pipeline are called {label!r}.",
                "a stage comes twice",
                f"name one of them:  - {stage_name} as {label}_again: {{...}}",
            )
        stage = stages[stage_name]
        params = _make_params(path, stage, label, values)
        missing = [n for n in stage.needs if n not in available]
        if missing:
            raise ProjectFileError(
                f"{path}: stage {label} needs {', '.join(missing)}, which no earlier step gives.{_who_gives(missing, stages)}",
                "a stage was left out of the pipeline, or stands after the one that needs it",
                "add the stage before it, or give the data under inputs",
            )
        source_of = {n: available[n] for n in (*stage.needs, *stage.optional) if n in available}
        steps.append(Step(label, stage, params, source_of))
        available.update(dict.fromkeys(stage.gives, label))
    return Plan(path, file, _folder(path, file), tuple(steps))


def position(plan: Plan, label: str) -> int:
    """Place of a step in the pipeline; raises if none has this label."""
    labels, path = [s.label for s in plan.steps], plan.path
    if label not in labels:
        raise ProjectFileError(
            f"{path} has no step {label!r}.{_nearest(label, labels)}", "a typing error", f"its steps are: {', '.join(labels)}"
        )
    return labels.index(label)


def input_variables(file: ProjectFile) -> list[str]:
    """Variables that the inputs themselves give, before any stage."""
    given: list[str] = []
    if file.microscope is not None:
        given += list(Microscope.model_fields)
    if file.inputs.movies:
        given.append("movie_path")
    if file.inputs.gain:
        given.append("gain")
    if file.inputs.micrographs:
        given += ["micrograph_path"]
        if file.inputs.coordinates:
            given.append("coordinates_path")
    if file.inputs.particles:
        given += ["particles_path", "micrograph_name"]
    if file.inputs.half_maps:
        given += ["half_map_path"]
    return given


def star_variables(path: Path, file: ProjectFile) -> list[str]:
    """Variables that the micrographs of a STAR file bring along (optics, CTF)."""
    if not file.inputs.micrographs:
        return []
    from cryodask.formats.star import read_micrographs

    columns = read_micrographs(path.parent / Path(file.inputs.micrographs).expanduser())
    return [n for n in columns if n in VARIABLES and not VARIABLES[n].dims and VARIABLES[n].dtype != "U"]


def list_movies(plan: Plan) -> list[Path]:
    """Movie files of the project in order of name."""
    pattern = plan.resolve(plan.file.inputs.movies or "")
    found = sorted(Path(p) for p in glob.glob(pattern, recursive=True) if Path(p).is_file())
    if not found:
        raise ProjectFileError(
            f"No movie matches {pattern}.", "a typing error in inputs.movies, or the data are not mounted", "check the pattern with ls"
        )
    return found


def _entry_name(entry: Any) -> tuple[str, str, dict[str, Any]]:
    """(stage, label, parameters) of a pipeline entry: ``motion``, ``motion: {...}`` or ``motion as other: {...}``."""
    values: Any = {}
    if isinstance(entry, dict):
        if len(entry) != 1:
            raise ProjectFileError(f"A step of the pipeline has {len(entry)} names: {entry}.", "a missing dash", "one dash a stage")
        entry, values = next(iter(entry.items()))
    if not isinstance(entry, str) or not isinstance(values or {}, dict):
        raise ProjectFileError(
            f"This is no step of a pipeline: {entry!r}: {values!r}.", "a missing colon or indentation", "write  - stage: {parameter: value}"
        )
    name, _, label = (part.strip() for part in entry.partition(" as "))
    return name, label or name, values or {}


def _make_params(path: Path, stage: Stage, label: str, values: dict[str, Any]) -> Params:
    values = dict(values)
    for name in input_file_fields(stage.params):
        if isinstance(values.get(name), str):
            file = (path.parent / Path(values[name]).expanduser()).resolve()
            if not file.is_file():
                raise ProjectFileError(
                    f"{path}: {label}.{name}: there is no file {file}.", "a typing error", "paths are relative to the project file"
                )
            values[name] = str(file)
    try:
        return stage.params.model_validate(values)
    except ValidationError as error:
        raise ProjectFileError(
            f"{path}: stage {label}: " + _problems(error, stage.params), "a typing error", f"cryodask stages {stage.name}  explains them"
        ) from None


def _problems(error: ValidationError, model: type[BaseModel]) -> str:
    out = []
    for problem in error.errors():
        where = ".".join(str(x) for x in problem["loc"])
        if problem["type"] == "extra_forbidden":
            out.append(f"unknown name {where!r}.{_nearest(str(problem['loc'][-1]), _field_names(model, problem['loc']))}")
        else:
            got = "" if problem["type"] == "missing" else f" (given: {problem['input']!r})"
            out.append(f"{where + ': ' if where else ''}{problem['msg']}{got}")
    return "; ".join(out)


def _field_names(model: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    for step in location[:-1]:
        info = model.model_fields.get(str(step))
        candidates = [info.annotation, *typing.get_args(info.annotation)] if info is not None else []
        inner = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
        if inner is None:
            return []
        model = inner
    return list(model.model_fields)


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def _who_gives(names: list[str], stages: dict[str, Stage]) -> str:
    givers = {s.name for s in stages.values() for n in names if n in s.gives}
    optics = [n for n in names if n in Microscope.model_fields]
    text = f" Stages that give it: {', '.join(sorted(givers))}." if givers else ""
    return text + (" The section `microscope` gives the optics." if optics else "")
