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
_GAIN_MOVIES, _GAIN_FRAMES = 3, 24

ItemInputs = tuple[str, dict[str, Any]]


def list_items(plan: Plan) -> list[ItemInputs]:
    """Name and inputs of every item, in order."""
    inputs = plan.file.inputs
    if inputs.movies:
        return [_file_item("movie_path", path) for path in list_movies(plan)]
    if inputs.micrographs:
        return _micrograph_items(plan)
    if inputs.particles:
        return _particle_items(plan)
    return []


def _file_item(variable: str, path: Path) -> ItemInputs:
    stat = path.stat()
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
    items = []
    for i, name in enumerate(names):
        path = find_beside(name, star)
        label, facts = _file_item("micrograph_path", path) if path else (Path(name).stem, {"micrograph_path": name})
        facts |= {n: float(columns[n][i]) for n in keep if np.isfinite(columns[n][i])}
        picks = _picks_of(plan, label)
        items.append((label, {**facts, **picks}))
    return items


def _picks_of(plan: Plan, name: str) -> dict[str, Any]:
    if not plan.file.inputs.coordinates:
        return {}
    folder = Path(plan.resolve(plan.file.inputs.coordinates))
    found = sorted(folder.glob(f"{name}*.star"))
    return {"coordinates_path": str(found[0]), "coordinates_mtime": round(found[0].stat().st_mtime, 3)} if found else {}


def _particle_items(plan: Plan) -> list[ItemInputs]:
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
        facts = {"particles_path": path, "micrograph_name": name, "rows": digest.hexdigest()}
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


def sum_first_movies(step: Step, values_of: Iterable[dict[str, Any]], shape: tuple[int, int]) -> np.ndarray:
    """Sum of some frames of the first good movies, float64: enough to see the gain's pattern."""
    total = np.zeros(shape)
    used = 0
    for values in values_of:
        try:
            movie = step.stage.process(step.params, **{n: values.get(n) for n in (*step.stage.needs, *step.stage.optional)})["movie"]
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
            given = step.stage.process(step.params, **{n: values.get(n) for n in (*step.stage.needs, *step.stage.optional)})
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
