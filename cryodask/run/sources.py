"""Where items come from: movies of a pattern, micrographs or particles of a STAR file."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from cryodask.errors import CryodaskError, GainError, InputError, MovieError
from cryodask.run.recipe import Plan, Step, list_movies
from cryodask.vocabulary import SLOTS, VARIABLES

_PROBED = 5
_CHECKED = 50
_GAIN_MOVIES, _GAIN_FRAMES = 3, 24

ItemInputs = tuple[str, dict[str, Any]]


def list_items(plan: Plan) -> list[ItemInputs]:
    """Name and inputs of every item, in order."""
    inputs = plan.file.inputs
    if inputs.movies:
        return _distinct([file_item("movie_path", path) for path in list_movies(plan)], "movie_path")
    if inputs.micrographs:
        return _distinct(_micrograph_items(plan), "micrograph_path")
    if inputs.particles:
        return _distinct(_particle_items(plan), "micrograph_name")
    return []


def _distinct(items: list[ItemInputs], source: str) -> list[ItemInputs]:
    """The same items; raises if there are none, or if two would share a name, for one of them would be lost."""
    if not items:
        raise InputError("The STAR file under inputs lists nothing.", "its table is empty", "write it again, or give another")
    seen: dict[str, str] = {}
    for name, facts in items:
        if name in seen:
            raise InputError(
                f"Two inputs would both be called {name}: {seen[name]} and {facts[source]}.",
                "files of one name lie in several folders, or differ in their ending only",
                "rename one of them, or make a project of each folder",
            )
        seen[name] = str(facts[source])
    return items


def file_item(variable: str, path: Path) -> ItemInputs:
    """Name and inputs of a file: its path, size and time, by which it is known again."""
    try:
        stat = path.stat()
    except FileNotFoundError:  # gone since it was listed: its stage says so, and the others go on
        return path.stem, {variable: str(path)}
    return path.stem, {variable: str(path), "size": stat.st_size, "mtime": round(stat.st_mtime, 3)}


def star_columns(plan: Plan) -> dict[str, np.ndarray]:
    """Columns of the project's STAR file in our words."""
    from cryodask.formats import star

    inputs = plan.file.inputs
    if inputs.micrographs:
        return star.read_micrographs(plan.resolve(inputs.micrographs))
    if inputs.particles:
        return star.read_particles(plan.resolve(inputs.particles))
    return {}


def _micrograph_items(plan: Plan) -> list[ItemInputs]:
    columns = star_columns(plan)
    from cryodask.formats.star import find_beside

    star = Path(plan.resolve(plan.file.inputs.micrographs or ""))
    names = [str(n) for n in columns["micrograph_name"]]
    keep = [n for n, v in columns.items() if n in VARIABLES and not VARIABLES[n].dims and VARIABLES[n].dtype != "U"]
    picks = _picks(plan, [Path(name).stem for name in names])
    items = []
    for i, name in enumerate(names):
        path = find_beside(name, star)
        label, facts = file_item("micrograph_path", path) if path else (Path(name).stem, {"micrograph_path": name})
        facts |= {n: float(columns[n][i]) for n in keep if np.isfinite(columns[n][i])}
        items.append((label, {**facts, **picks.get(label, {})}))
    return items


def _picks(plan: Plan, names: list[str]) -> dict[str, dict[str, Any]]:
    """STAR file of picks of each micrograph: ``NAME.star`` or ``NAME_anything.star``, never that of a longer name."""
    if not plan.file.inputs.coordinates:
        return {}
    folder = Path(plan.resolve(plan.file.inputs.coordinates))
    files = sorted(folder.glob("*.star"), reverse=True)
    if not files:
        raise InputError(f"There is no STAR file in {folder}.", "a typing error in inputs.coordinates", "give the folder with the picks")
    known = set(names)
    out: dict[str, dict[str, Any]] = {}
    for path in files:
        stem = path.stem
        ends = (n for n in range(len(stem), 0, -1) if stem[:n] in known and not stem[n : n + 1].isalnum())
        end = next(ends, None)
        if end is not None:
            out[stem[:end]] = {"coordinates_path": str(path), "coordinates_mtime": round(path.stat().st_mtime, 3)}
    return out


def _particle_items(plan: Plan) -> list[ItemInputs]:
    from cryodask.formats.star import find_beside

    columns = star_columns(plan)
    path = plan.resolve(plan.file.inputs.particles or "")
    names = np.asarray(columns.get("micrograph_name", np.full(len(columns["image_index"]), "particles")), dtype=str)
    items = []
    for name in dict.fromkeys(names.tolist()):
        rows = np.nonzero(names == name)[0]
        digest = hashlib.blake2b(digest_size=8)
        for column in sorted(columns):
            digest.update(np.asarray(columns[column])[rows].astype("U").tobytes())
        label = Path(name).stem if name != "particles" else name
        facts = {"particles_path": path, "micrograph_name": name}
        for stack in dict.fromkeys(columns["image_stack"][rows].tolist()):
            found = find_beside(str(stack), Path(path))
            digest.update(repr(file_item("stack", found)[1] if found else stack).encode())
            if found:
                facts["stack_path"] = str(found)
        facts["rows"] = digest.hexdigest()
        items.append((label, facts))
    return items


def content_hash(path: str | Path) -> str:
    """Hash of a file's content."""
    digest = hashlib.blake2b(digest_size=8)
    try:
        with open(path, "rb") as file:
            while data := file.read(1 << 22):
                digest.update(data)
    except OSError as error:
        raise InputError(
            f"{path} cannot be read: {error.strerror}.", "a typing error, or the disk is not mounted", "check the path"
        ) from None
    return digest.hexdigest()


def load_gain(plan: Plan) -> np.ndarray | None:
    """The gain reference as the project file turns it, checked for sane values; None if there is none."""
    from cryodask.formats import movies

    inputs = plan.file.inputs
    if not inputs.gain:
        return None
    path = plan.resolve(inputs.gain)
    if not Path(path).is_file():
        raise GainError(f"There is no gain reference {path}.", "a typing error in inputs.gain", "paths are relative to the project file")
    gain = movies.read_gain(path, rotate=inputs.gain_rotate, flip=inputs.gain_flip)
    if not np.isfinite(gain).all() or not (gain > 0).any():
        raise GainError(
            f"{path} holds {int((~np.isfinite(gain)).sum())} values that are no numbers and {int((gain > 0).sum())} positive ones.",
            "it is another file, or it was cut short",
            "give the camera's gain reference (it multiplies the counts)",
        )
    return gain


def check_files(plan: Plan) -> None:
    """Refuse half-maps and other maps of the project file that cannot be what they are given for, before anything runs."""
    from cryodask.formats.mrc import open_mrc, read_mrc

    for step in plan.steps:
        for name, path in step.input_files().items():
            if Path(path).suffix.lower() not in (".mrc", ".map"):
                continue
            data = np.asarray(read_mrc(path)[0])
            if not np.isfinite(data).all() or data.min() == data.max():
                raise InputError(
                    f"{path}, given as {step.label}.{name}, is no map: {int((~np.isfinite(data)).sum())} of {data.size} voxels are no"
                    " numbers, or all are the same.",
                    "the program that wrote it failed, or the file is damaged",
                    "look at the map, and give another",
                )
    halves = [open_mrc(plan.resolve(path)) for path in plan.file.inputs.half_maps or ()]
    for half in halves:
        if len(set(half.shape)) > 1:
            raise InputError(
                f"{half.path} is {' x '.join(map(str, half.shape))} voxels, not a cube.",
                "an image or a cropped map was given",
                "give the two half-maps of one refinement",
            )
    if len({(half.shape, half.pixel_size_angstrom) for half in halves}) > 1:
        text = " and ".join(f"{h.path}: {' x '.join(map(str, h.shape))} voxels of {h.pixel_size_angstrom} A" for h in halves)
        raise InputError(f"The half-maps differ ({text}).", "they come from different runs", "give the two half-maps of one refinement")


def check_readable(plan: Plan, items: list[ItemInputs]) -> None:
    """Raise the reason if none of the first items can be read (a wrong folder, another format): before workers are started."""
    step = plan.steps[0]
    if step.stage.shape != "map" or any(label != "inputs" for label in step.source.values()):
        return
    constants = plan.file.microscope.model_dump() if plan.file.microscope else {}
    failure: CryodaskError | None = None
    for _, facts in items[:_CHECKED]:
        try:
            _processed(step, {**constants, **facts})
        except CryodaskError as error:
            failure = failure or error
            continue
        return
    if failure is not None and len(items) <= _CHECKED:
        raise InputError(
            f"None of the {len(items)} inputs can be read. The first: {failure.what}", failure.usual_reason, failure.way_out
        ) from failure


def _processed(step: Step, values: dict[str, Any]) -> dict[str, Any]:
    return step.stage.process(step.params, **{n: values.get(n) for n in (*step.stage.needs, *step.stage.optional)})


def sum_first_movies(step: Step, values_of: Iterable[dict[str, Any]], shape: tuple[int, int]) -> np.ndarray:
    """Sum of some frames of the first good movies, float64: enough to see the gain's pattern."""
    total = np.zeros(shape)
    used = 0
    for values in values_of:
        try:
            movie = _processed(step, values)["movie"]
        except CryodaskError:
            continue
        if tuple(movie.shape[1:]) != shape:
            continue
        for i in range(min(len(movie), _GAIN_FRAMES)):
            total += movie[i]
        used += 1
        if used == _GAIN_MOVIES:
            break
    return total


def probe(step: Step, values_of: Iterable[dict[str, Any]]) -> tuple[dict[str, int], dict[str, str]]:
    """Sizes and types of what a source stage gives, from the first items that can be read; the commonest shape wins.

    Raises
    ------
    CryodaskError
        The last item's own error if none of the first can be read.
    """
    seen: list[tuple[dict[str, int], dict[str, str]]] = []
    failure: CryodaskError | None = None
    for values in values_of:
        if len(seen) >= _PROBED:
            break
        try:
            given = _processed(step, values)
        except CryodaskError as error:
            failure = error
            continue
        sizes: dict[str, int] = {}
        dtypes: dict[str, str] = {}
        for var in step.stage.gives_variables():
            value = given[var.name]
            if var.dims:
                sizes |= {d: SLOTS if d == "slot" else int(n) for d, n in zip(var.dims, value.shape)}
            if var.dtype == "input":
                dtypes[var.name] = np.dtype(value.dtype).str
        seen.append((sizes, dtypes))
    if not seen:
        raise failure or MovieError("There is nothing to process.", "the folder is empty", "check inputs in the project file")
    text = Counter(json.dumps(s, sort_keys=True) for s in seen).most_common(1)[0][0]
    sizes, dtypes = json.loads(text)
    return sizes, dtypes
