"""The files of the microscope as archives describe them: folder, format, type of the counts, size."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np

from cryodask.store.layouts import Grid
from cryodask.store.project import Item, Project


@dataclass(frozen=True)
class ImageSet:
    """Movies (or micrographs) of one folder, format and size.

    ``suffix`` in capitals without a dot; ``dtype`` as numpy's, empty if unknown.
    """

    folder: str
    suffix: str
    count: int
    frames: int
    height: int
    width: int
    dtype: str
    pixel_size_angstrom: float | None
    multiframe: bool


def image_sets(project: Project) -> list[ImageSet]:
    """Originals of a project, grouped; sizes are those that the project knows, also of files that are away."""
    sizes = _sizes(project)
    found: Counter[tuple[str, str, str, bool]] = Counter()
    for item in project.items():
        path = _path(item)
        if path:
            where = PurePosixPath(path)
            found[str(where.parent), where.suffix.lstrip(".").upper(), item.data_set, "movie_path" in item.inputs] += 1
    out = []
    for (folder, suffix, data_set, movie), count in sorted(found.items()):
        grid = sizes.get(data_set) or sizes.get("") or Grid({}, {})
        pixel = project.state.constants.get(data_set, {}).get("pixel_size_angstrom")
        frames = grid.sizes.get("frame", 0) if movie else 1
        y, x = grid.sizes.get("y", 0), grid.sizes.get("x", 0)
        dtype = np.dtype(grid.dtypes["movie"]).str.lstrip("<>|=") if "movie" in grid.dtypes else ("" if movie else "f4")
        out.append(ImageSet(folder, suffix, count, frames, y, x, dtype, None if pixel is None else float(pixel), movie))
    return out


def _path(item: Item) -> str:
    path = str(item.inputs.get("movie_path") or item.inputs.get("micrograph_path") or "")
    return os.path.normpath(path) if path else ""


def _sizes(project: Project) -> dict[str, Grid]:
    """Sizes by data set, from the step that brought the images."""
    for label in project.stages:
        generation = project.generation(label)
        if generation.meta["per_item"] and generation.meta["stage"] in ("ingest", "import_micrographs"):
            return dict(generation.grids)
    return {}
