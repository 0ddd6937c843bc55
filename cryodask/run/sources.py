"""Sources of exposures: movies of a pattern, micrographs or particles of a STAR file, identified by content rather than path."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections import Counter
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from cryodask.errors import CryodaskError, InputError, MovieError
from cryodask.formats.compressed import stem_of
from cryodask.formats.presence import show_name
from cryodask.formats.star import stem
from cryodask.parameters import marked_fields
from cryodask.run.content import IMAGES, content_id, stamp
from cryodask.run.headers import check_places
from cryodask.run.imports import PicksImport, TableImport
from cryodask.run.project_import import ProjectImport
from cryodask.run.recipe import Plan, Step, list_movies
from cryodask.stage import MapFileMark, SourceFileMark
from cryodask.store.away import Ledger
from cryodask.store.layouts import Grid
from cryodask.store.listing import unknown_content
from cryodask.store.project import Arrival, Item, Project
from cryodask.store.state import ProjectState
from cryodask.vocabulary import SLOTS, VARIABLES

_PROBED = 5
_CHECKED = 50


# --- exposures ---------------------------------------------------------------------------------------------------------------
def list_exposures(plan: Plan, project: Project | None) -> list[Arrival]:
    """All exposures currently in the inputs, in order.

    Raises
    ------
    InputError
        If there are none, or two would share a name.
    """
    files = Files(plan, project)
    out: list[Arrival] = []
    for step in plan.steps:
        kind = step.stage.name
        if kind == "ingest":
            for name in plan.data_sets:
                # all movies of a project may have been archived
                needed = project is None or not any(i.data_set == name for i in project.items())
                listed = [files.arrival("movie_path", path, step.label, name) for path in list_movies(plan, name, needed=needed)]
                out += [*listed, *files.away(name, {str(a.inputs["movie_path"]) for a in listed})]
        elif kind == "import_micrographs":
            out += _micrographs(plan, step, files)
        elif kind == "import_particles" and ("exposures", "exposures") in step.outputs:
            out = _with_source(out, _particles(plan, project, step), step.label)
        elif kind == "import_project":
            out = _joined(out, ProjectImport(step, None).exposures(), step.label)
    if not out and any(step.stage.shape == "map" for step in plan.steps) and not (project is not None and project.items()):
        raise InputError(
            "The inputs contain nothing to process.", "a table is empty, or a pattern matches no file", "check inputs in the project file"
        )
    return _distinct(out)


def _with_source(arrivals: list[Arrival], more: list[Arrival], label: str) -> list[Arrival]:
    """Add the exposures of a further table: a micrograph whose images are in the same stack is one exposure with two sources."""
    place = {(a.name, a.inputs.get("stack_path")): i for i, a in enumerate(arrivals) if "stack_path" in a.inputs}
    out = list(arrivals)
    for arrival in more:
        at = place.get((arrival.name, arrival.inputs.get("stack_path")))
        if at is None:
            out.append(arrival)
        else:
            old = out[at]
            out[at] = Arrival(old.name, old.content, {**old.inputs, "source": f"{old.inputs['source']}|{label}"})
    return out


def _joined(arrivals: list[Arrival], items: list[Item], label: str) -> list[Arrival]:
    """Add exposures of another project: the same content is one exposure, different content gets a distinct name."""
    by_content = {a.content: i for i, a in enumerate(arrivals)}
    out = list(arrivals)
    names = {a.name for a in arrivals}
    for item in items:
        if item.content in by_content:
            old = out[by_content[item.content]]
            out[by_content[item.content]] = Arrival(old.name, old.content, {**old.inputs, "source": f"{old.inputs['source']}|{label}"})
            continue
        name = item.name if item.name not in names else f"{label}_{item.name}"
        names.add(name)
        out.append(Arrival(name, item.content, {"source": label}))
    return out


def _distinct(arrivals: list[Arrival]) -> list[Arrival]:
    """Return the arrivals; raise if two share a name, because one would be lost."""
    seen: dict[str, Arrival] = {}
    for arrival in arrivals:
        if arrival.name in seen:
            raise _twice(seen[arrival.name], arrival)
        seen[arrival.name] = arrival
    return arrivals


def _twice(first: Arrival, second: Arrival) -> InputError:
    """Error for two inputs of one name: the same file given twice, a copy of it, or another file."""
    two = (first.inputs, second.inputs)
    files = [str(i.get("micrograph_name") or next((v for k, v in i.items() if k.endswith("_path")), first.name)) for i in two]
    steps, sets = ([str(i.get(key, "")) for i in two] for key in ("source", "data_set"))
    where = f"{steps[0]} and {steps[1]}" if steps[0] != steps[1] else f"the data sets {sets[0]} and {sets[1]}" if sets[0] != sets[1] else ""
    if files[0] == files[1] and not where:
        return InputError(f"{files[0]} is listed twice.", "a table was joined with itself", "remove one of its rows")
    if files[0] == files[1] and first.content == second.content:
        return InputError(f"{files[0]} is an input of both {where}.", "their tables or patterns overlap", "leave it out of one of them")
    if steps[0] != steps[1]:
        files = [f"{name} of {step}" for name, step in zip(files, steps)]
    same = f"Two inputs have the same name {first.name}: {files[0]} and {files[1]}"
    if first.content == second.content:
        return InputError(f"{same}, which are the same image.", "one is a link to the other, or a copy of it", "leave out one of them")
    return InputError(
        f"{same}.",
        "files with the same name are in several folders, or differ only in their extension",
        "rename one of them, or make a separate project for each folder",
    )


class Files:
    """Files as exposures; the content of a file with the same path, size, times and inode is not read again.

    A file that was archived and removed on purpose (see store/away.py), or that a table lists although it has gone, is an exposure as
    before.
    """

    def __init__(self, plan: Plan, project: Project | None) -> None:
        self._plan = plan
        self._away = away_originals(project) if project is not None else {}
        self._known = {
            (str(v), item.inputs.get("size"), tuple(item.inputs.get("stat", ()))): item.content
            for item in (project.items() if project is not None else ())
            for k, v in item.inputs.items()
            if k.endswith("_path")
        }
        items = project.items() if project is not None else []
        self.is_first = not items
        paths = ((str(item.inputs[name]), item) for item in items for name in IMAGES if name in item.inputs)
        self._former = {path: item for path, item in paths if item.there and "stat" in item.inputs}

    def arrival(self, variable: str, path: str | Path, source: str, data_set: str = "") -> Arrival:
        """A file as an exposure: its content, path, size and time."""
        relative, name = show_name(self._plan.relative(path)), show_name(stem_of(path))
        inputs: dict[str, Any] = {variable: relative, "source": source, **({"data_set": data_set} if data_set else {})}
        try:
            stat = os.stat(path)
        except OSError:
            former = self._away.get(relative) or self._former.get(relative)
            if former is not None:
                return Arrival(name, former.content, {**former.inputs, **inputs})
            # gone since it was listed, or a name that no file can have: its stage reports that, and the others are processed
            return Arrival(name, unknown_content(name), inputs)
        inputs |= {"size": stat.st_size, "stat": stamp(stat)}
        content = self._known.get((relative, stat.st_size, tuple(inputs["stat"])))
        return Arrival(name, content or content_id(Path(path), stat.st_size), inputs)

    def away(self, data_set: str, listed: Container[str]) -> list[Arrival]:
        """Movies of a data set that are away, other than those ``listed``."""
        mine = [item for path, item in self._away.items() if item.inputs.get("movie_path") == path and path not in listed]
        return [Arrival(item.name, item.content, item.inputs) for item in mine if item.data_set == data_set]


def away_originals(project: Project) -> dict[str, Item]:
    """Exposures whose movie or micrograph was removed on purpose, by its path in the registry."""
    absent = Ledger(project.path).absent()
    if not absent:
        return {}
    paths = ((str(item.inputs[name]), item) for item in project.items() for name in IMAGES if name in item.inputs)
    return {path: item for path, item in paths if f"inputs:{path}" in absent}


def _micrographs(plan: Plan, step: Step, files: Files) -> list[Arrival]:
    from cryodask.formats.star import find_beside, read_micrographs

    star = Path(step.params.star)
    columns = read_micrographs(star)
    names = [str(n) for n in columns["micrograph_name"]]
    if not names:
        raise _empty(star)
    keep = [n for n, v in columns.items() if n in VARIABLES and not VARIABLES[n].dims and VARIABLES[n].dtype != "U"]
    folders = [Path(s.params.folder) for s in plan.steps if s.stage.name == "import_picks"]
    picks = PicksImport(folders[0]).among(Path(name).stem for name in names) if folders else {}
    out = []
    for i, name in enumerate(names):
        path = find_beside(name, star)
        made = files.arrival("micrograph_path", path or star.absolute().parent / name, step.label)
        values: dict[str, Any] = {n: float(columns[n][i]) for n in keep if np.isfinite(columns[n][i])}
        if "relion_optics" in columns:
            values["relion_optics"] = str(columns["relion_optics"][i])
        if made.name in picks:
            values["coordinates_path"] = plan.relative(picks[made.name])
        out.append(Arrival(made.name, made.content, {**made.inputs, **values}))
    if files.is_first and not any("stat" in arrival.inputs for arrival in out):
        raise InputError(
            f"None of the {len(out):,} micrographs of {star} exists; the first is {names[0]}.",
            "their disk is not mounted, or the file was moved without them",
            "mount it, or put the file back beside them: names are relative to its folder, or to one above",
        )
    return out


def _empty(star: Path) -> InputError:
    return InputError(f"{star} lists nothing.", "its table is empty", "rewrite it, or give another file")


def _particles(plan: Plan, project: Project | None, step: Step) -> list[Arrival]:
    """The micrographs that a particle table names, each with its particles, in any order of the file."""
    found = TableImport(step)
    if not len(found.table):
        raise _empty(Path(step.params.star))
    path = source_name(plan, project.state if project is not None else None, step.params.star)
    known = _known_names(project, path)
    listed = set(found.table.micrographs)
    out = []
    for code, name in enumerate(found.table.micrographs):
        inputs: dict[str, Any] = {"particles_path": plan.relative(step.params.star), "micrograph_name": name, "source": step.label}
        stack = found.stack_of(code)
        if stack is not None:
            inputs["stack_path"] = plan.relative(stack)
        former, its_stack = known.get(Path(name).name, (name, None))
        if former not in listed and (stack is None or its_stack in (None, inputs["stack_path"])):
            inputs["micrograph_name"] = former
        out.append(Arrival(stem(name), f"table:{path}:{inputs['micrograph_name']}", inputs))
    return out


def _known_names(project: Project | None, path: str) -> dict[str, tuple[str, str | None]]:
    """Former names of a table's micrographs, and the stack of each, by name without folder.

    The folder only says where another program keeps the micrograph; another stack means other particles.
    """
    out: dict[str, tuple[str, str | None]] = {}
    for item in project.registered().values() if project is not None else ():
        name = str(item.inputs.get("micrograph_name", ""))
        if name and item.content == f"table:{path}:{name}":
            out[Path(name).name] = name, item.inputs.get("stack_path")
    return out


# --- files -------------------------------------------------------------------------------------------------------------------
def read_content_hash(path: str | Path) -> str:
    """Hash of a file's content."""
    digest = hashlib.blake2b(digest_size=8)
    try:
        with open(path, "rb") as file:
            while data := file.read(1 << 22):
                digest.update(data)
    except OSError as error:
        raise InputError(
            f"{path} cannot be read: {error.strerror}.", "the path is wrong, or the disk is not mounted", "check the path"
        ) from None
    return digest.hexdigest()


def check_files(plan: Plan) -> None:
    """Refuse invalid half-maps and other maps of the project file before anything runs."""
    from cryodask.formats.mrc import open_mrc, read_map

    for step in plan.steps:
        maps = marked_fields(type(step.params), MapFileMark)
        for name, path in ((n, p) for n, paths in plan.input_files(step).items() for p in paths):
            if name not in maps and Path(path).suffix.lower() not in (".mrc", ".map"):
                continue
            try:
                data = read_map(path)[0]
            except InputError as error:
                raise InputError(f"{step.label}.{name}: {error.what}", error.usual_reason, error.way_out) from None
            if name in maps and len(set(data.shape)) > 1:
                raise InputError(
                    f"{path}, given as {step.label}.{name}, is {' x '.join(map(str, data.shape))} voxels, not a cube.",
                    "it is a movie, an image or a cropped map",
                    "give a map, padded to a cube",
                )
            if data.min() == data.max():
                raise InputError(
                    f"{path}, given as {step.label}.{name}, is not a valid map: all {data.size} voxels are {data.flat[0]:g}.",
                    "the program that wrote it failed, or the file is damaged",
                    "check the map, and give another",
                )
    for step in plan.steps:
        if step.stage.name == "import_map" and step.params.half_maps:
            _check_half_maps([open_mrc(path) for path in step.params.half_maps])
            first, second = (read_map(path)[0] for path in step.params.half_maps)
            if np.array_equal(first, second):
                raise InputError(
                    f"The half-maps of {step.label} are the same map: {' and '.join(step.params.half_maps)}.",
                    "one file was given twice, or copied under another name",
                    "give the two half-maps of one refinement",
                )
    check_places(plan)


def _check_half_maps(halves: list[Any]) -> None:
    from cryodask.formats.mrc_header import is_same_size

    for half in halves:
        if len(set(half.shape)) > 1:
            raise InputError(
                f"{half.path} is {' x '.join(map(str, half.shape))} voxels, not a cube.",
                "an image or a cropped map was given",
                "give the two half-maps of one refinement",
            )
    first, second = halves
    if first.shape != second.shape or not is_same_size(first.pixel_size_angstrom or 0.0, second.pixel_size_angstrom or 0.0):
        text = " and ".join(f"{h.path}: {' x '.join(map(str, h.shape))} voxels of {h.pixel_size_angstrom} A" for h in halves)
        raise InputError(f"The half-maps differ ({text}).", "they come from different runs", "give the two half-maps of one refinement")


def check_readable(plan: Plan, arrivals: list[Arrival], project: Project) -> None:
    """Raise if none of the first items can be read (a wrong folder, another format), before workers are started.

    Files that are away are not tried; whether they are needed is decided when their step is reached. Nor is anything tried where an
    earlier run has registered some of them: its results may be all that is needed.
    """
    if not plan.steps or plan.steps[0].stage.shape != "map" or plan.steps[0].inputs:
        return
    step = plan.steps[0]
    away = {item.content for item in away_originals(project).values()}
    mine = [a for a in arrivals if a.inputs.get("source") == step.label and a.content not in away]
    if {a.content for a in mine} & {item.content for item in project.items()}:
        return
    failure: CryodaskError | None = None
    for arrival in mine[:_CHECKED]:
        try:
            processed(step, input_values(plan, arrival.inputs))
        except CryodaskError as error:
            failure = failure or error
            continue
        return
    if failure is not None and len(mine) <= _CHECKED:
        raise InputError(
            f"None of the {len(mine)} inputs can be read. The first: {failure.what}", failure.usual_reason, failure.way_out
        ) from failure


def source_name(plan: Plan, state: ProjectState | None, path: str) -> str:
    """Name by which the project identifies a file or folder of an import: its first path, even if it was moved since."""
    relative = plan.relative(path)
    if state is None:
        return relative
    content = _content(path, os.path.getsize(path), os.path.getmtime(path)) if os.path.isfile(path) else ""
    named = [getattr(s.params, n) for s in plan.steps for n in marked_fields(type(s.params), SourceFileMark)]
    return state.source_name(relative, content, {plan.relative(p) for p in named if p})


@functools.lru_cache(maxsize=64)
def _content(path: str, size: int, mtime: float) -> str:
    return content_id(Path(path), size)


def input_values(plan: Plan, inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs of a source stage for an exposure: optics of its data set, its own values, absolute paths."""
    return {**plan.constants.get(str(inputs.get("data_set", "")), {}), **absolute(plan, inputs)}


def absolute(plan: Plan, inputs: dict[str, Any]) -> dict[str, Any]:
    """Values of an exposure, with absolute paths."""
    return {n: os.path.join(plan.path.parent.resolve(), v) if n.endswith("_path") else v for n, v in inputs.items()}


def processed(step: Step, values: dict[str, Any]) -> dict[str, Any]:
    """Outputs of a source step for one exposure."""
    return step.stage.process(step.params, **{n: values.get(n) for n in (*step.stage.needs, *step.stage.optional)})


def probe(step: Step, values_of: Iterable[dict[str, Any]]) -> Grid:
    """Sizes and types of a source stage's outputs, from the first readable items; the most common shape wins.

    Raises
    ------
    CryodaskError
        The last item's own error if none of the first can be read.
    """
    seen: list[Grid] = []
    failure: CryodaskError | None = None
    for values in values_of:
        if len(seen) >= _PROBED:
            break
        try:
            given = processed(step, values)
        except CryodaskError as error:
            failure = error
            continue
        sizes: dict[str, int] = {}
        dtypes: dict[str, str] = {}
        for var in step.stage.gives_variables():
            value = given[var.name]
            if var.dims:
                found = {d: SLOTS if d == "slot" else int(n) for d, n in zip(var.dims_in(per_item=True), value.shape)}
                # two images of one stage may differ in size: the second is kept under its own name
                sizes |= {(f"{var.name}.{d}" if sizes.get(d, n) != n else d): n for d, n in found.items()}
            if var.dtype == "input":
                dtypes[var.name] = np.dtype(value.dtype).str
        seen.append(Grid(sizes, dtypes))
    if not seen:
        raise failure or MovieError("There is nothing to process.", "the input folder is empty", "check inputs in the project file")
    text = Counter(json.dumps(s, sort_keys=True) for s in seen).most_common(1)[0][0]
    return Grid(*json.loads(text))
