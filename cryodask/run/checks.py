"""What can be known before any work: the cluster file, room on the disk, memory of the workers, and what a movie says of itself."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import psutil

from cryodask.errors import CryodaskError
from cryodask.run.recipe import Plan
from cryodask.store.project import Arrival, Project
from cryodask.vocabulary import SLOTS

_STORED_SHARE = 0.5
"""A chunked movie takes at least this share of its file: counts of good TIFF files are compressed already."""
_SUM_BYTES = 8.0
"""Two sums in float32 for each pixel of a movie."""
_PIXEL_TOLERANCE = 0.02


def look_ahead(plan: Plan, project: Project | None, listing: list[Arrival], *, cluster: str | None = None) -> tuple[list[str], list[str]]:
    """Problems and warnings that the files themselves tell of; nothing is written."""
    problems: list[str] = []
    warnings: list[str] = []
    memory = _worker_memory(plan, cluster or plan.cluster, problems)
    known = {item.content for item in project.items()} if project is not None else set()
    fresh = [a for a in listing if a.content not in known]
    first = next((a for a in listing if "movie_path" in a.inputs), None)
    if first is None:
        return problems, warnings
    found = _header(plan, first)
    if found is None:
        return problems, warnings
    shape, pixel = found
    stated = plan.constants.get(str(first.inputs.get("data_set", "")), {}).get("pixel_size_angstrom")
    if pixel and stated and abs(pixel / stated - 1.0) > _PIXEL_TOLERANCE:
        warnings.append(
            f"{first.name} says that its pixels are {pixel:.3f} A, the project file says {stated:g} A. Check "
            "microscope.pixel_size_angstrom (a super-resolution movie has half the physical pixel size)."
        )
    _check_disk(plan, fresh, shape, problems)
    _check_memory(plan, shape, memory, problems)
    return problems, warnings


def _header(plan: Plan, arrival: Arrival) -> tuple[tuple[int, ...], float | None] | None:
    from cryodask.formats.movies import open_movie

    try:
        movie = open_movie(os.path.join(plan.path.parent.resolve(), str(arrival.inputs["movie_path"])))
    except (CryodaskError, OSError):
        return None  # its stage says what is wrong with it
    return tuple(movie.shape), movie.pixel_size_angstrom


def _check_disk(plan: Plan, fresh: list[Arrival], shape: tuple[int, ...], problems: list[str]) -> None:
    """Room for the movies and sums of new exposures, at the least."""
    steps = {s.stage.name: s for s in plan.steps}
    chunked = "ingest" in steps and getattr(steps["ingest"].params, "storage", "") == "chunked"
    movies = sum(float(a.inputs.get("size", 0)) for a in fresh) * _STORED_SHARE if chunked else 0.0
    sums = _SUM_BYTES * shape[-1] * shape[-2] * len(fresh) if any(s.stage.shape == "map" and "y" in _dims(s) for s in plan.steps) else 0.0
    folder = next(p for p in (plan.folder, *plan.folder.parents) if p.exists())
    free = shutil.disk_usage(folder).free
    if movies + sums > free:
        problems.append(
            f"{folder} has {free / 1e9:.1f} GB left, and the results of {len(fresh)} new exposures take at least "
            f"{(movies + sums) / 1e9:.1f} GB. Free some room, give another `folder`, or read movies in place: "
            "ingest: {storage: in_place}."
        )


def _dims(step: Any) -> set[str]:
    return {d for v in step.stage.gives_variables() if v.kind == "bulk" for d in v.dims}


def _check_memory(plan: Plan, shape: tuple[int, ...], memory: float | None, problems: list[str]) -> None:
    """What the per-exposure stages state against what a worker has."""
    if memory is None:
        return
    sizes = {"frame": shape[0], "y": shape[-2], "x": shape[-1], "slot": SLOTS // 4}
    for step in plan.steps:
        if step.stage.shape != "map":
            continue
        try:
            needed = float(step.stage.memory(step.params, sizes))
        except KeyError:  # it speaks of sizes that no movie has
            continue
        if needed > memory:
            problems.append(
                f"{step.label} needs about {needed / 1e9:.1f} GB for an exposure of {' x '.join(map(str, shape))}, and each worker has "
                f"{memory / 1e9:.1f} GB. Take fewer workers (workers: N in the project file), or workers with more memory."
            )


def _worker_memory(plan: Plan, cluster: str, problems: list[str]) -> float | None:
    """Memory of a local worker in bytes; None where that is not known before workers start."""
    from cryodask.cluster.settings import LocalSettings, read_cluster_file

    settings: Any = LocalSettings()
    if cluster != "local":
        if not cluster.endswith((".yaml", ".yml")):
            return None
        try:
            settings = read_cluster_file(Path(cluster))
        except CryodaskError as error:
            problems.append(f"{error.what} {error.way_out}".strip())
            return None
    if not isinstance(settings, LocalSettings):
        return None
    from dask.utils import parse_bytes

    workers = plan.file.workers or settings.workers or os.cpu_count() or 1
    return float(parse_bytes(settings.memory)) if settings.memory else psutil.virtual_memory().total / workers
