"""Checks before any work: cluster file and lanes, disk space, movie headers; what workers must have is in offers.py."""

from __future__ import annotations

import difflib
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryodask.cluster.service import service
from cryodask.cluster.service.whereabouts import folder_of, settings_of
from cryodask.cluster.settings import AddressSettings, LocalSettings, PluginSettings, Settings, read_cluster_file
from cryodask.errors import CryodaskError, ProgramMissingError
from cryodask.formats.movies import CheckedMovie
from cryodask.run.headers import is_other_size, other_pixel_sizes
from cryodask.run.known import movie_header
from cryodask.run.offers import beyond_offers, offers_of
from cryodask.run.recipe import Plan
from cryodask.store.project import Arrival, Project

_STORED_SHARE = 0.5
"""A chunked movie takes at least this fraction of its file size, because well-packed TIFF files are compressed already."""
_OTHER_DOSE = 0.2
"""Metadata of EER movies and the project file may differ by this fraction; the beam is not the same at all times."""
_SUM_BYTES = 8.0
"""Two sums in float32 for each pixel of a movie."""


@dataclass(frozen=True)
class Asked:
    """Command-line overrides of the project file; ``lane`` only if one was given."""

    cluster: str | None = None
    workers: int | None = None
    lane: str | None = None


@dataclass
class Ahead:
    """Problems, warnings, and the shape (frame, y, x) of the first movie if it can be read."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    movie: tuple[int, int, int] | None = None


def look_ahead(plan: Plan, project: Project | None, listing: list[Arrival], asked: Asked | None = None) -> Ahead:
    """Problems and warnings found in the files; nothing is written."""
    asked, out = asked or Asked(), Ahead()
    where = asked.cluster or plan.cluster
    try:
        settings = _settings(where)
    except CryodaskError as error:
        out.problems.append(error.problem)
        settings = None
    out.warnings += _wrong_lane(settings, where, asked.lane)
    out.problems += _unknown_exposures(plan, project, listing)
    out.problems += _missing_programs(plan, project)
    found = movie_header(plan, listing)
    if found is not None:
        first, movie = found
        constants = plan.constants.get(str(first.inputs.get("data_set", "")), {})
        out.movie, pixel, stated = movie.shape, movie.pixel_size_angstrom, constants.get("pixel_size_angstrom")
        out.warnings += _exposure_of_fractions(first.name, movie, "eer_dose_per_frame" in constants)
        binning = _binning(plan)
        if pixel is not None and is_other_size(binning * pixel, stated):
            binned = f", {binning * pixel:.3f} A after binning" if binning > 1 else ""
            out.warnings.append(
                f"The header of {first.name} gives a pixel size of {pixel:.3f} A{binned}, the project file {stated:g} A. Check "
                "microscope.pixel_size_angstrom (a super-resolution movie has half the physical pixel size; motion: {binning: 2} "
                "sums it at the physical one)."
            )
        known = {item.content for item in project.items()} if project is not None else set()
        _check_disk(plan, [a for a in listing if a.content not in known], out.movie, out.problems)
    out.warnings += other_pixel_sizes(plan, listing)
    large = _larger_than_micrographs(plan, out.movie)
    out.problems += large.values()
    if settings is not None:
        offers = offers_of(_with_workers(settings, asked.workers or plan.file.workers), where)
        out.problems += beyond_offers(plan, project, [s for s in plan.steps if s.label not in large], out.movie, offers)
    return out


def _exposure_of_fractions(name: str, movie: CheckedMovie, stated: bool) -> Iterator[str]:
    """What EER movies are summed to where the project file leaves it to their metadata, or contradicts them."""
    if math.isnan(movie.dose_per_fraction):
        return
    told, used = movie.metadata_dose, movie.dose_per_fraction / movie.frames_per_fraction
    if not stated:
        yield (
            f"The project file gives no dose_per_frame: by the metadata of {name} a camera frame has {used:.4g} e/A^2, and"
            f" {movie.frames_per_fraction} of them make a fraction of {movie.dose_per_fraction:.3g} e/A^2."
        )
    elif told is not None and abs(used / told - 1.0) > _OTHER_DOSE:
        yield (
            f"The metadata of {name} give an exposure of {told:.4g} e/A^2 per camera frame, the project file {used:.4g}. Check"
            " microscope.dose_per_frame, which for EER movies is that of one camera frame."
        )


def _unknown_exposures(plan: Plan, project: Project | None, listing: list[Arrival]) -> Iterator[str]:
    """Exposures named in parameters that the run will not know by that name."""
    named = {step.label: step.stage.exposures_named(step.params) for step in plan.steps}
    if not any(named.values()):
        return
    known, forgotten = {a.name for a in listing}, set[str]()
    former: dict[str, str] = {}
    if project is not None:
        after = Project(project.path)  # a copy, because the listing must not be applied to the original
        if listing:
            after.foresee_exposures(listing)
        names = {item.row: item.name for item in after.items()}
        known, forgotten = set(names.values()), after.forgotten()
        former = {name: names[row] for name, row in after.former_names().items() if row in names}
    for step in plan.steps:
        reads = step.stage.shape == "map"  # it reads a separate file, which may use former names
        unknown = [name for name in named[step.label] if name not in known and not (reads and name in former)]
        if not unknown or not known:
            continue
        first, stem = unknown[0], Path(unknown[0]).stem
        near = [stem] if stem in known else difflib.get_close_matches(first, known, 1, 0.5)
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        if first in forgotten:
            yield (
                f"{step.label} names the exposure {first!r}{more}, which was forgotten and is excluded anyway. Remove the name, or "
                "include the exposure again with cryodask forget --undo."
            )
        elif first in former:
            yield f"{step.label} names the exposure {first!r}{more}, which is now called {former[first]!r}. Use that name."
        else:
            yield (
                f"{step.label} names the exposure {first!r}{more}, which is not among the inputs."
                + (f" Did you mean {near[0]!r}?" if near else "")
            )


def _missing_programs(plan: Plan, project: Project | None) -> Iterator[str]:
    """Missing programs of steps; a finished step over a set no longer needs its program."""
    for step in plan.steps:
        before = project.state.steps.get(step.label) if project is not None else None
        over_set = before is not None and before.stage == step.stage.name and step.stage.shape != "map"
        if over_set and project is not None and before is not None and project.generation_at(before.place).committed():
            continue
        try:
            step.stage.program_versions()
        except ProgramMissingError as error:
            yield f"{step.label}: {error.what} What to do: {error.way_out}."


# --- the cluster ---------------------------------------------------------------------------------------------------------------
def _settings(where: str) -> Settings | None:
    """Settings of a cluster, before connecting; None for an external scheduler.

    Raises
    ------
    CryodaskError
        If there is no such file or name, so that a run would be refused.
    """
    if where == "local":
        return LocalSettings()
    if "://" in where or where.endswith(".json"):
        return None
    if where.endswith(".invite") or service.is_name(where):
        if not service.is_known(where):
            service.find(where)  # raises the same error as the run
        folder = folder_of(where)
        return settings_of(folder) if (folder / "settings.json").is_file() else None
    settings = read_cluster_file(where)
    return None if isinstance(settings, PluginSettings) else settings


def _with_workers(settings: Settings, workers: int | None) -> Settings:
    return settings.model_copy(update={"workers": workers}) if workers and isinstance(settings, LocalSettings) else settings


def _wrong_lane(settings: Settings | None, where: str, lane: str | None) -> Iterator[str]:
    """Problem of an unknown lane, which the scheduler would silently treat as its default lane."""
    if settings is None or isinstance(settings, AddressSettings | PluginSettings) or lane is None or not settings.lanes:
        return
    if lane not in (*settings.lanes, settings.default_lane):
        yield (
            f"{where} has no lane {lane!r}: the work would be charged to {settings.default_lane!r}. "
            f"Its lanes are {', '.join(settings.lanes)}."
        )


# --- room ------------------------------------------------------------------------------------------------------------------------
def _check_disk(plan: Plan, fresh: list[Arrival], shape: tuple[int, ...], problems: list[str]) -> None:
    """Check that there is space for at least the movies and sums of new exposures."""
    steps = {s.stage.name: s for s in plan.steps}
    chunked = "ingest" in steps and getattr(steps["ingest"].params, "storage", "") == "chunked"
    movies = sum(float(a.inputs.get("size", 0)) for a in fresh) * _STORED_SHARE if chunked else 0.0
    sums = (
        _SUM_BYTES * shape[-1] * shape[-2] / _binning(plan) ** 2 * len(fresh)
        if any(s.stage.shape == "map" and "y" in _dims(s) for s in plan.steps)
        else 0.0
    )
    folder = next(p for p in (plan.folder, *plan.folder.parents) if p.exists())
    free = shutil.disk_usage(folder).free
    if movies + sums > free:
        problems.append(
            f"{folder} has {free / 1e9:.1f} GB left, and the results of {len(fresh)} new exposures take at least "
            f"{(movies + sums) / 1e9:.1f} GB. Free some space, set another `folder`, or read movies in place: "
            "ingest: {storage: in_place}."
        )


def _binning(plan: Plan) -> int:
    """Pixels of the movies per pixel of the micrographs."""
    return max((int(getattr(step.params, "binning", 1)) for step in plan.steps if step.stage.name == "motion"), default=1)


def _larger_than_micrographs(plan: Plan, movie: tuple[int, int, int] | None) -> dict[str, str]:
    """Steps whose boxes do not fit into the micrographs of the only data set, with the problem of each."""
    if movie is None or len(plan.data_sets) != 1 or any(s.stage.name == "import_micrographs" for s in plan.steps):
        return {}
    height, width = (edge // _binning(plan) for edge in movie[1:])
    found = {}
    for step in plan.steps:
        pixels = {size for p in step.inputs.get("exposures", ()) for size in p.pixel_sizes}
        made = step.outputs.get(("particles", "particles"))
        if made is None or made.image is None or made.parts.get("image") != made.ref or step.stage.shape != "map" or len(pixels) != 1:
            continue
        if made.image.box is not None and made.image.box > min(height, width):
            found[step.label] = (
                f"{step.label}: a box of {made.image.box:g} pixels is larger than the micrographs ({height} x {width} pixels), so no "
                "particle would be left. Check the box and the pixel size."
            )
    return found


def _dims(step: Any) -> set[str]:
    return {d for v in step.stage.gives_variables() if v.kind == "bulk" for d in v.dims}
