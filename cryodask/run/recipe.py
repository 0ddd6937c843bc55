"""The project file: reading, checking against the stages' parameter models, and making a plan, before any expensive work."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, field_validator, model_validator

from cryodask.documents import StrictModel, expand, read_yaml
from cryodask.errors import ProjectFileError
from cryodask.formats.fractions import Fractions, is_eer
from cryodask.parameters import marked_fields
from cryodask.run.graph import Graph, Step, point_group, resolve
from cryodask.run.graph.chain import Draft
from cryodask.run.graph.pins import Pins
from cryodask.run.wrong_names import nearest, problems
from cryodask.stage import InputFileMark, Params, SourceFileMark, Stage, load_stages
from cryodask.vocabulary import LIMITS

__all__ = ["Plan", "ProjectFile", "Step", "make_plan", "position", "read_project_file"]


def _not_empty(path: str) -> str:
    if not path.strip():
        raise ValueError("the path is empty; leave the line out, or name a file")
    return path


SomePath = Annotated[str, AfterValidator(_not_empty), AfterValidator(expand)]


class Movies(StrictModel):
    """Movies of one data set, and the gain of their camera."""

    movies: SomePath | None = Field(None, description="pattern of movie files, for example movies/*.tif")
    gain: SomePath | None = Field(None, description="gain reference that multiplies the counts (MRC, TIFF), or `estimate`: from the movies")
    gain_rotate: Literal[0, 90, 180, 270] = Field(0, description="clockwise rotation of the gain, degrees")
    gain_flip: Literal["none", "up-down", "left-right"] = Field("none", description="flip of the gain, after the rotation")
    gain_divides: bool | None = Field(
        None, description="whether the counts are divided by the gain; by default only by an MRC gain of EER movies, as in RELION 3.1"
    )
    defects: SomePath | None = Field(None, description="SerialEM's list of the camera's defects (text); they count as pixels of gain 0")


class Inputs(Movies):
    """Where a project starts: movies, or another program's results (at most one of the first four)."""

    micrographs: SomePath | None = Field(None, description="short form of a first step import_micrographs: {star: ...}")
    particles: SomePath | None = Field(None, description="short form of a first step import_particles: {star: ...}")
    half_maps: tuple[SomePath, SomePath] | None = Field(None, description="short form of a first step import_map: {half_maps: [...]}")
    coordinates: SomePath | None = Field(None, description="short form of a step import_picks: {folder: ...} after the micrographs")

    @model_validator(mode="after")
    def _one_start(self) -> Inputs:
        starts = [k for k in ("movies", "micrographs", "particles", "half_maps") if getattr(self, k) is not None]
        if len(starts) != 1:
            raise ValueError(f"give exactly one of movies, micrographs, particles, half_maps (given: {', '.join(starts) or 'none'})")
        if self.coordinates is not None and self.micrographs is None:
            raise ValueError("coordinates need micrographs; with movies, write a step  import_picks: {folder: ...}")
        return self


def _within(name: str, description: str, default: Any = ..., *, above: bool = False) -> Any:
    """A field with the limits of a quantity; ``above``: the lower limit itself is excluded."""
    least: Any = {"gt" if above else "ge": LIMITS[name].least}
    return Field(default, le=LIMITS[name].most, description=description, **least)


class Microscope(StrictModel):
    """Optics and exposure, the same for all movies of the project."""

    voltage_kv: float = _within("voltage_kv", "acceleration voltage, kV")
    spherical_aberration_mm: float = _within("spherical_aberration_mm", "Cs, mm")
    amplitude_contrast: float = _within("amplitude_contrast", "amplitude contrast, as a fraction", 0.1)
    pixel_size_angstrom: float = _within(
        "pixel_size_angstrom", "pixel size of the micrographs, Angstrom: that of the movies unless motion bins them"
    )
    dose_per_frame: float = _within(
        "dose_per_frame",
        "exposure per frame (of EER movies: per camera frame, by default that of their metadata), electrons per square Angstrom",
        1.0,
        above=True,
    )
    pre_exposure: float = _within("pre_exposure", "exposure before the first frame, electrons per square Angstrom", 0.0)


class DataSet(Movies):
    """One of several data sets in a project: its movies, gain and microscope."""

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9_-]+$", description="name of the data set")
    movies: SomePath = Field(description="pattern of movie files, for example day1/*.tif")
    microscope: Microscope | None = Field(None, description="its optics and exposure; by default those of the project")


class ProjectFile(StrictModel):
    """A project file as stored on disk."""

    name: str = Field(min_length=1, description="name of the project, and of the folder with its results")
    inputs: Inputs | list[DataSet] | None = Field(
        None, description="source of the data, or a list of data sets; omitted if the pipeline begins with import steps"
    )
    microscope: Microscope | None = Field(None, description="optics and exposure")
    pipeline: list[Any] = Field(min_length=1, description="the steps: `stage`, `stage: {parameter: value}`, `stage as name: {...}`")
    cluster: SomePath = Field("local", description="local, the name of a cluster, a cluster file, or the address of a Dask scheduler")
    workers: int | None = Field(None, ge=1, description="number of local workers; by default one per core")
    item_limit_seconds: float | None = Field(3600, gt=0, description="an exposure that takes longer is quarantined; null for no limit")
    folder: SomePath | None = Field(None, description="folder for the results; default: one with the project's name, beside this file")

    @field_validator("name")
    @classmethod
    def _names_a_folder(cls, name: str) -> str:
        odd = "/" in name or "$" in name or not name.isprintable() or name.strip() != name
        if odd or set(name) == {"."} or name.startswith("~"):
            raise ValueError("must be the name of a folder: without / and $, without spaces at its ends, and not beginning with ~")
        if len(os.fsencode(name)) > 200:
            raise ValueError("is longer than a file system allows: give at most 200 characters")
        return name

    @model_validator(mode="after")
    def _different_names(self) -> ProjectFile:
        names = [d.name for d in self.inputs] if isinstance(self.inputs, list) else []
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ValueError(f"two data sets are called {twice[0]!r}")
        if isinstance(self.inputs, list) and not self.inputs:
            raise ValueError("inputs is an empty list: give at least one data set")
        return self


@dataclass(frozen=True)
class Plan:
    """A checked project file: steps in order with their sources, and the folder for the results."""

    path: Path
    file: ProjectFile
    folder: Path
    graph: Graph

    @property
    def steps(self) -> tuple[Step, ...]:
        """Steps in order."""
        return self.graph.steps

    @property
    def single(self) -> Inputs | None:
        """The section ``inputs``, if it is not a list."""
        return self.file.inputs if isinstance(self.file.inputs, Inputs) else None

    @property
    def data_sets(self) -> dict[str, Movies]:
        """Data sets by name; a single unnamed one is called ""."""
        if isinstance(self.file.inputs, list):
            return {d.name: d for d in self.file.inputs}
        return {"": self.file.inputs} if self.file.inputs is not None and self.file.inputs.movies else {}

    @property
    def constants(self) -> dict[str, dict[str, Any]]:
        """Optics and exposure by data set."""
        own = self.file.microscope
        if isinstance(self.file.inputs, list):
            return {d.name: _constants(d.microscope or own, d) for d in self.file.inputs}
        return {"": _constants(own, self.single)}

    @property
    def has_movies(self) -> bool:
        """Whether the project starts from movies."""
        return bool(self.data_sets)

    @property
    def cluster(self) -> str:
        """``local``, an address, the name of a running cluster, or the path of a cluster file."""
        name = self.file.cluster
        is_word = re.fullmatch(r"[A-Za-z0-9_-]+", name) is not None and not Path(self.resolve(name)).is_file()
        return name if is_word or "://" in name else self.resolve(name)

    def resolve(self, name: str) -> str:
        """Resolve a path of the project file against the folder of that file."""
        return str((self.path.parent / name).resolve()) if name else name

    def relative(self, path: str | Path) -> str:
        """A path as the project stores it: relative to the project file's folder if inside it, else absolute."""
        full, home = os.path.abspath(path), f"{self._home}{os.sep}"
        return full[len(home) :] if full.startswith(home) else full

    @cached_property
    def _home(self) -> str:
        return str(self.path.parent.resolve())

    def input_files(self, step: Step) -> dict[str, list[str]]:
        """Parameters of a step that name files whose content enters the key, if given."""
        found = {n: getattr(step.params, n) for n in marked_fields(type(step.params), InputFileMark)}
        return {n: list(v) if isinstance(v, tuple | list) else [v] for n, v in found.items() if v}


def _constants(microscope: Microscope | None, movies: Movies | None) -> dict[str, Any]:
    """Optics and exposure of a data set; that of EER movies counts at reading, and their files know it if the project file does not."""
    if microscope is None:
        return {}
    stated = movies is not None and is_eer(movies.movies or "") and "dose_per_frame" in microscope.model_fields_set
    return {**microscope.model_dump(), **({"eer_dose_per_frame": microscope.dose_per_frame} if stated else {})}


def project_folder(path: str | Path) -> Path:
    """The results folder, from the folder itself or from the project file."""
    given = Path(path)
    if given.is_file():
        file = read_project_file(given)
        return _folder(given, file)
    return given


def _folder(path: Path, file: ProjectFile) -> Path:
    home, folder = path.parent.resolve(), (path.parent / (file.folder or file.name)).resolve()
    if home.is_relative_to(folder):
        raise ProjectFileError(
            f"The results of {path} would be written into {folder}, among your files.",
            f"its name or folder is {file.folder or file.name!r}",
            "set a separate folder:  folder: results",
        )
    return folder


def read_project_file(path: str | Path) -> ProjectFile:
    """Read and check the form of a project file.

    Raises
    ------
    ProjectFileError
        With every problem found, and the nearest known name for each unknown one.
    """
    path = Path(path)
    content = read_yaml(path, "project file")
    if not isinstance(content, dict):
        raise ProjectFileError(
            f"{path} is not a project file: it has no keys.",
            "it is empty, or another kind of file",
            "see docs/project-file.md for an example",
        )
    try:
        return ProjectFile.model_validate(content)
    except ValidationError as error:
        raise ProjectFileError(f"{path}: " + problems(error, ProjectFile), "", "see docs/project-file.md for all keys") from None


def make_plan(path: str | Path, *, ahead: bool = False) -> Plan:
    """Read a project file and resolve its pipeline; reports every error that can be found without running.

    ``ahead``: files named in steps need not exist yet.

    Raises
    ------
    ProjectFileError
        With the first problem; :func:`draft_plan` gives all of them.
    """
    plan = draft_plan(path, ahead=ahead)
    if plan.graph.problems:
        raise ProjectFileError(
            f"{plan.path}: " + "\n".join(plan.graph.problems),
            "a step takes something that no earlier step gives, or the name of a step, parameter or file is wrong",
            "see what each step takes with  cryodask run --dry-run",
        )
    return plan


def draft_plan(path: str | Path, *, ahead: bool = False) -> Plan:
    """Like :func:`make_plan`, but problems of the pipeline stay in ``plan.graph.problems``."""
    path = Path(path)
    file = read_project_file(path)
    stages = load_stages()
    entries = _with_short_forms(file, stages)

    def params_of(stage: Stage, label: str, values: dict[str, Any]) -> Params:
        return _make_params(path, stage, label, values, ahead=ahead)

    plan = Plan(path, file, _folder(path, file), Graph((), (), ()))
    pixels = frozenset(float(c["pixel_size_angstrom"]) for c in plan.constants.values() if "pixel_size_angstrom" in c)
    graph = resolve(entries, stages, make_params=params_of, pixel_sizes={"ingest": pixels}, pinned=Pins(plan.folder))
    problems, warnings = list(graph.problems), list(graph.warnings)
    for entry in entries:
        values = next(iter(entry.values()), None) if isinstance(entry, dict) and len(entry) == 1 else None
        if isinstance(values, dict) and "live" in values:
            warnings.append(f"{next(iter(entry))}: live previews are not supported yet; the step runs once, when the session is over.")
    if not problems and plan.has_movies and any(not values for values in plan.constants.values()):
        problems.append(
            "The movies have no optics: the section `microscope` was left out. Add  microscope: {voltage_kv: 300, "
            "spherical_aberration_mm: 2.7, pixel_size_angstrom: ...}."
        )
    warnings += [sentence for step in graph.steps for sentence in _unknown_group(graph, step)]
    steps = tuple(map(_with_symmetry, graph.steps))
    return Plan(path, file, plan.folder, replace(graph, steps=steps, problems=tuple(problems), warnings=tuple(warnings)))


def _unknown_group(graph: Graph, step: Step) -> Iterator[str]:
    """A warning if C1 is assumed because the point group of the step's map is unknown, and was not assumed when that map was made."""
    if "symmetry" in type(step.params).model_fields and step.params.symmetry is None and step.inputs:
        draft = Draft(step.label, step.stage, step.params, step.inputs)
        if point_group(draft) is None and not _assumed_before(graph, step):
            start = next((p.ref for p in step.inputs.get("map", ())), "its starting map")
            yield f"{step.label}: the point group of {start} is unknown, so C1 is assumed. Set symmetry, even if it is C1."


def _assumed_before(graph: Graph, step: Step) -> bool:
    """Whether the map of a step was made, or refined, by a step that had to assume a point group."""
    while step.inputs.get("map"):
        step = graph.step(step.inputs["map"][0].step)
        if step.inputs and "symmetry" in type(step.params).model_fields:
            return True
    return False


def _with_symmetry(step: Step) -> Step:
    """Fill in an omitted symmetry with that of the step's map, not C1."""
    if "symmetry" not in type(step.params).model_fields or step.params.symmetry is not None or not step.inputs:
        return step
    group = point_group(Draft(step.label, step.stage, step.params, step.inputs)) or "C1"
    return replace(step, params=step.params.model_copy(update={"symmetry": group}))


def _with_short_forms(file: ProjectFile, stages: dict[str, Stage]) -> list[Any]:
    """The pipeline with the steps that the section ``inputs`` stands for."""
    entries = list(file.pipeline)
    names = {_stage_name(e) for e in entries}
    if isinstance(file.inputs, list) or (file.inputs is not None and file.inputs.movies):
        return entries if "ingest" in names else ["ingest", *entries]
    if file.inputs is None:
        return entries
    forms: dict[str, dict[str, Any]] = {
        "import_micrographs": {"star": file.inputs.micrographs},
        "import_particles": {"star": file.inputs.particles},
        "import_map": {"half_maps": list(file.inputs.half_maps or ())},
    }
    head = [{name: values} for name, values in forms.items() if any(values.values())]
    if file.inputs.coordinates:
        head.append({"import_picks": {"folder": file.inputs.coordinates}})
    for step in head:
        name, values = next(iter(step.items()))
        # a step that is listed already, without its file
        bare = next((i for i, e in enumerate(entries) if e == name or (isinstance(e, dict) and list(e) == [name] and not e[name])), None)
        if bare is not None:
            entries[bare] = {name: values}
        elif name not in names:
            entries.insert(head.index(step), step)
    return entries


def _stage_name(entry: Any) -> str:
    name = next(iter(entry), "") if isinstance(entry, dict) else entry
    return str(name).partition(" as ")[0].strip()


def position(plan: Plan, label: str) -> int:
    """Index of a step in the pipeline; raises if none has this label."""
    labels, path = [s.label for s in plan.steps], plan.path
    if label not in labels:
        raise ProjectFileError(f"{path} has no step {label!r}.{nearest(label, labels)}", "", f"its steps are: {', '.join(labels)}")
    return labels.index(label)


def list_movies(plan: Plan, data_set: str = "", *, needed: bool = True) -> list[str]:
    """Paths of the movie files of a data set, sorted by name; raises if there are none, unless they are no longer ``needed``."""
    # sort by parts, as Path does; making Paths would cost more than the listing
    found = sorted(filter(os.path.isfile, movie_paths(plan, data_set)), key=lambda path: path.split(os.sep))
    if not found and needed:
        raise ProjectFileError(
            f"No movie matches {plan.data_sets[data_set].movies} in {plan.path.parent.resolve()}.",
            "the pattern in inputs.movies is wrong, or the disk is not mounted",
            "check the pattern with ls",
        )
    return found


def fractions_of(plan: Plan, data_set: str) -> Fractions | None:
    """How the EER movies of a data set are summed when they are read; None if no step reads movies."""
    step = next((step for step in plan.steps if step.stage.name == "ingest"), None)
    return None if step is None else step.params.fractions(plan.constants.get(data_set, {}).get("eer_dose_per_frame"))


def broken_links(plan: Plan) -> list[str]:
    """A message for each data set whose pattern matches links to files that do not exist."""
    out = []
    for name, inputs in plan.data_sets.items():
        broken = sorted(os.path.basename(p) for p in movie_paths(plan, name) if os.path.islink(p) and not os.path.exists(p))
        if broken:
            some = f"{len(broken)} link{'s' * (len(broken) > 1)}"
            out.append(f"{some} among the movies {inputs.movies} lead to no file and are left out: {', '.join(broken[:3])}")
    return out


def movie_paths(plan: Plan, data_set: str = "") -> list[str]:
    """What the pattern of a data set matches now, unsorted."""
    return glob.glob(_with_literal_parts(plan.resolve(plan.data_sets[data_set].movies or "")), recursive=True)


def _with_literal_parts(pattern: str) -> str:
    """Escape the leading parts of a pattern that exist as they are written: a folder named ``grid[1]`` is not a pattern."""
    parts = Path(pattern).parts
    done = ""
    for i, part in enumerate(parts):
        is_file_pattern = i == len(parts) - 1 and any(c in part for c in "*?")
        if is_file_pattern or not os.path.lexists(os.path.join(done, part)):
            return os.path.join(glob.escape(done), *parts[i:])
        done = os.path.join(done, part)
    return glob.escape(done)


def _make_params(path: Path, stage: Stage, label: str, values: dict[str, Any], *, ahead: bool) -> Params:
    values = dict(values)
    for mark in (InputFileMark, SourceFileMark):
        for name in marked_fields(stage.params, mark):
            given = values.get(name)
            if isinstance(given, str):
                values[name] = _existing(path, label, name, given, mark, ahead=ahead)
            elif isinstance(given, list | tuple) and all(isinstance(v, str) for v in given):
                values[name] = [_existing(path, label, name, v, mark, ahead=ahead) for v in given]
    missing = [n for n in marked_fields(stage.params, SourceFileMark) if stage.params.model_fields[n].is_required() and n not in values]
    if missing:
        what = "project" if missing[0] == "project" else "file"
        raise ProjectFileError(
            f"{label}: the {what} is missing: {stage.name}: {{{missing[0]}: ...}}.", "", "add it; paths are relative to the project file"
        )
    try:
        return stage.params.model_validate(values)
    except ValidationError as error:
        reason = f"{stage.name} has other parameters"
        what = f"{label}: {problems(error, stage.params)}"
        raise ProjectFileError(what, reason, f"see them with  cryodask stages {stage.name}") from None


def _existing(path: Path, label: str, name: str, given: str, mark: type, *, ahead: bool) -> str:
    """The file or folder that a parameter names, as an absolute path."""
    try:
        file = (path.parent / expand(given)).resolve()
    except ValueError as error:
        raise ProjectFileError(f"{label}.{name}: {given!r}: {error}.", "", "write the path in full") from None
    if not file.exists() and not ahead:
        raise ProjectFileError(f"{label}.{name}: there is no file {file}.", "", "check the path; paths are relative to the project file")
    if file.is_dir() and mark is InputFileMark:
        raise ProjectFileError(f"{label}.{name}: {file} is a folder, not a file.", "", "name the file in it")
    return str(file)
