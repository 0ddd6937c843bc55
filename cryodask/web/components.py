"""The space of components of a variability analysis: density of the particles, what is in a region of it, and maps at its points."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cryodask.edits.regions import Region, chosen
from cryodask.errors import InputError, StoreError
from cryodask.stages.variability import LEAST_AGREEMENT, says
from cryodask.store.generation import Generation
from cryodask.store.identity import row_runs
from cryodask.store.lines import Record
from cryodask.store.project import Project
from cryodask.store.sets import SetReader
from cryodask.store.state import ProductRef
from cryodask.web.aside import computed
from cryodask.web.exposure import number, numbers
from cryodask.web.maps import level_of, png, surface_at
from cryodask.web.pictures import Cache

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
LONGEST_VOXELS = 96
MOST_IMAGES = 24
MOST_EXPOSURES = 100
_SAMPLE = 20_000
_MODULE = "cryodask.web.component_maps"


@dataclass(frozen=True)
class Analysis:
    """A finished analysis of variability: its step, where its results are, and the particles of the step."""

    project: Project
    label: str
    generation: Generation
    record: Record
    ref: ProductRef

    @property
    def place(self) -> str:
        """``STAGE/KEY``."""
        return f"{self.generation.path.parent.name}/{self.generation.path.name}"

    @property
    def voxels(self) -> int:
        """Voxels per side of its maps."""
        return int(self.generation.result_reader("component_map").shape[1])

    @property
    def pixel_size_angstrom(self) -> float:
        """Of its maps."""
        return float(self.generation.read(self.record, "map_pixel_size_angstrom"))

    def name(self, *more: Any) -> str:
        """A name for what is made from it."""
        shards = sorted(self.record["shards"].items())
        said = json.dumps([str(self.generation.path), shards, self.ref.model_dump(), *more], sort_keys=True, default=str)
        return hashlib.blake2b(said.encode(), digest_size=12).hexdigest()


def analysis(project: Project, label: str) -> Analysis:
    """The analysis of a step.

    Raises
    ------
    InputError
        If the step is none, or is not finished.
    """
    generation = project.generation(label) if label in project else None
    record = generation.committed().get(0) if generation is not None and not generation.meta["per_item"] else None
    ref = project.step(label).product("particles") if label in project else None
    if generation is None or ref is None or record is None or "component_map" not in record["shards"]:
        raise InputError(f"There is no step {label} with components.", "", "choose one from the list of the page")
    return Analysis(project, label, generation, record, ref)


# --- particles ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Particles:
    """Particles of an analysis: ``ids`` `(n,)`, ``coordinates`` `(component, n)` float32, ``half`` `(n,)` int8 (0 or 1, -1 if unknown)."""

    ids: np.ndarray
    coordinates: np.ndarray
    half: np.ndarray


def particles(cache: Cache, one: Analysis) -> Particles:
    """The particles; not in memory but mapped from the cache, because there may be millions of them."""
    kept = {kind: cache.path(f"{one.name()}-{kind}.npy", partial(_column, one, kind)) for kind in ("ids", "coordinates", "half")}
    return Particles(**{kind: _loaded(path) for kind, path in kept.items()})


def _column(one: Analysis, kind: str) -> bytes:
    # a reader of its own: that of the project would keep all columns of a million particles in memory
    sets = SetReader(one.project)
    ids = sets.ids(one.ref)
    if kind == "ids":
        return _array_bytes(ids)
    if kind == "half":
        parts = sets.known(one.ref).get("half_set")
        found = sets.columns(one.ref, ids, parts).get("half_set") if parts else None
        return _array_bytes(np.full(len(ids), -1, np.int8) if found is None else found.astype(np.int8))
    columns = sets.columns(one.ref, ids, ["components"])
    count = one.generation.result_reader("component_map").shape[0]
    return _array_bytes(np.stack([columns[f"component{j + 1}"].astype(np.float32) for j in range(count)]))


def _array_bytes(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def _loaded(path: Path | bytes) -> np.ndarray:
    return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False) if not isinstance(path, bytes) else np.load(io.BytesIO(path)))


def described(cache: Cache, one: Analysis) -> dict[str, Any]:
    """What the page says of an analysis: whether its components are noise, and where its particles are, as JSON."""
    found = particles(cache, one)
    agreement, strength = (np.asarray(one.generation.read(one.record, f"component_{name}")) for name in ("agreement", "strength"))
    unknown = ~np.isfinite(found.coordinates).all(0)
    return {
        "step": one.label,
        "of": one.place,
        "says": says({"component_agreement": agreement}),
        "noise": not (agreement >= LEAST_AGREEMENT).any(),
        "components": [
            {
                "number": j + 1,
                "agreement": number(agreement[j]),
                "noise": not agreement[j] >= LEAST_AGREEMENT,
                "strength": number(strength[j]),
                "quantiles": numbers(_quantiles(values, QUANTILES)),
            }
            for j, values in enumerate(found.coordinates)
        ],
        "particles": len(found.ids),
        "unknown": int(unknown.sum()),
        "voxels": one.voxels,
        "pixel_size_angstrom": one.pixel_size_angstrom,
    }


def _quantiles(values: np.ndarray, shares: Sequence[float]) -> np.ndarray:
    """Quantiles of evenly spaced particles, at most ``_SAMPLE`` of them; 0 if none has a value."""
    some = values[:: max(1, len(values) // _SAMPLE)]
    some = some[np.isfinite(some)]
    return np.quantile(some, shares) if len(some) else np.zeros(len(shares))


def _extent(values: np.ndarray) -> tuple[float, float]:
    """Where values are; at most half as far again on each side as 99 % of them, so that one outlier does not take the whole picture."""
    first, last = _quantiles(values, (0.005, 0.995))
    room = max(float(last - first), 1e-6)
    known = np.isfinite(values)
    low = max(float(np.min(values, initial=np.inf, where=known)), first - 0.5 * room)
    high = min(float(np.max(values, initial=-np.inf, where=known)), last + 0.5 * room)
    return (low - 0.02 * room, high + 0.02 * room) if low <= high else (-1.0, 1.0)


def density(cache: Cache, one: Analysis, x: int, y: int, across: int, down: int) -> bytes:
    """Particles by cell of the plane of two components; for ``y`` 0 by interval of one.

    A little-endian u4, the length of the JSON head that follows (``x``, ``y``: ranges; ``across``, ``down``; ``outside``: particles beyond
    the picture), padded so that the counts begin at a multiple of 4 bytes; the counts, u4, rows from the top.
    """
    found = particles(cache, one)
    for wanted in (x, y or x):
        if not 1 <= wanted <= len(found.coordinates):
            raise InputError(f"There is no component {wanted}: there are {len(found.coordinates)}.", "", "reload the page")
    columns = [(found.coordinates[x - 1], across), *([(found.coordinates[y - 1], down)] if y else [])]
    inside, cells = np.ones(len(found.ids), bool), np.zeros(len(found.ids), np.int32)
    ranges: list[list[float]] = []
    for values, count in reversed(columns):
        low, high = _extent(values)
        ranges.insert(0, [low, high])
        scaled = (values - np.float32(low)) * np.float32(count / (high - low))
        with np.errstate(invalid="ignore"):
            inside &= (scaled >= 0) & (scaled < count)
            cells = cells * count + scaled.astype(np.int32)
    shape = (down, across) if y else (1, across)
    counts = np.bincount(cells[inside], minlength=shape[0] * shape[1]).reshape(shape)[::-1]
    head = {"x": ranges[0], "y": ranges[1] if y else None, "across": across, "down": shape[0], "outside": int((~inside).sum())}
    text = json.dumps(head).encode()
    text += b" " * (-(len(text) + 4) % 4)
    return struct.pack("<I", len(text)) + text + counts.astype("<u4").tobytes()


def region_figures(cache: Cache, one: Analysis, regions: Sequence[Region], pictured: set[int]) -> dict[str, Any]:
    """What is in some regions: particles by half-set, and the exposures that have most of them, as JSON.

    ``exposures``: row, name, particles in the regions, all its particles, whether it has a page. ``expected``: share of all particles.
    """
    found = particles(cache, one)
    inside = chosen(regions, found.coordinates)
    rows, counts = row_runs(found.ids)
    starts = np.cumsum(counts) - counts
    here = np.add.reduceat(inside.astype(np.int64), starts) if len(starts) else np.zeros(0, np.int64)
    # the particles of an exposure are one run per picking run
    unique, which = np.unique(rows, return_inverse=True)
    total, kept = (np.bincount(which, weights, len(unique)).astype(np.int64) for weights in (counts, here))
    order = np.lexsort((unique, -kept))
    order = order[kept[order] > 0]
    names = {item.row: item.name for item in one.project.items()}
    halves = [[int((found.half[inside] == half).sum()), int((found.half == half).sum())] for half in (0, 1)]
    return {
        "particles": int(inside.sum()),
        "of": len(found.ids),
        "halves": halves if any(all_of_it for _, all_of_it in halves) else None,
        "in_exposures": len(order),
        "exposures": [
            [row, names.get(row, f"row {row}"), int(kept[at]), int(total[at]), row in pictured]
            for at, row in ((at, int(unique[at])) for at in order[:MOST_EXPOSURES].tolist())
        ],
        "images": "image" in one.ref.parts,
    }


def counted(cache: Cache, one: Analysis, regions: Sequence[Region]) -> int:
    """Number of particles in any of some regions; kept, because a page asks for that of every region whenever one is added."""

    def count() -> bytes:
        return str(int(chosen(regions, particles(cache, one).coordinates).sum())).encode()

    return int(cache.get(f"{one.name([region.model_dump() for region in regions])}-count", count)) if regions else 0


def images(cache: Cache, one: Analysis, regions: Sequence[Region]) -> bytes:
    """PNG of the images of some particles in the regions, evenly spaced among them.

    Raises
    ------
    InputError
        If there are none.
    """
    found = particles(cache, one)
    inside = np.flatnonzero(chosen(regions, found.coordinates))
    if not len(inside) or "image" not in one.ref.parts:
        raise InputError("There are no particle images in this region.", "", "choose a larger region")
    some = inside[np.unique(np.linspace(0, len(inside) - 1, MOST_IMAGES).round().astype(int))]
    job = {"do": "images", "project": str(one.project.path), "step": one.label, "ids": found.ids[some].tolist()}
    return cache.get(f"{one.name(job)}-images.png", partial(computed, _MODULE, job, "The picture of the particles"))


# --- maps --------------------------------------------------------------------------------------------------------------------------
def coarse_maps(cache: Cache, one: Analysis) -> np.ndarray:
    """Mean map and components on the grid of a page, `(1 + component, z, y, x)` float32; made once."""
    size = min(LONGEST_VOXELS, one.voxels)
    job = {"do": "coarse", "generation": str(one.generation.path), "pixel": one.pixel_size_angstrom, "size": size}
    return _loaded(cache.path(f"{one.name()}-coarse{size}.npy", partial(computed, _MODULE, job, "The map")))


def map_at(cache: Cache, one: Analysis, point: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """The map at a point of the space of components on the grid of a page, and the mean map.

    Raises
    ------
    InputError
        If the point has more coordinates than there are components.
    """
    maps = coarse_maps(cache, one)
    if len(point) >= len(maps):
        raise InputError(f"The point has {len(point)} coordinates, but there are {len(maps) - 1} components.", "", "reload the page")
    out = np.array(maps[0])
    for z, component in zip(point, maps[1:]):
        out += np.float32(z) * component
    return out, maps[0]


def surface(cache: Cache, one: Analysis, point: Sequence[float], sigmas: float) -> bytes:
    """Isosurface of the map at a point, at one density for all points: some standard deviations above the mean of the mean map."""
    volume, mean = map_at(cache, one, point)
    return surface_at(volume, level_of(mean, sigmas))


def section(cache: Cache, one: Analysis, point: Sequence[float], axis: int, share: float) -> bytes:
    """PNG of a section through the map at a point, `share` (0 to 1) of the way along an axis; grey values mean the same at all points."""
    volume, mean = map_at(cache, one, point)
    low, high = np.percentile(mean, (0.5, 99.9))
    at = min(volume.shape[axis] - 1, max(0, round(share * (volume.shape[axis] - 1))))
    grey = (np.take(volume, at, axis) - low) * (255 / max(float(high - low), 1e-12))
    return png(np.clip(np.nan_to_num(grey), 0, 255).astype(np.uint8))


def write_map(cache: Cache, one: Analysis, point: Sequence[float]) -> Path:
    """An MRC file of the map at a point with all its voxels; whoever asks for it removes it.

    Raises
    ------
    StoreError
        If the disk of the cache is full.
    """
    try:
        cache.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.NamedTemporaryFile(dir=cache.folder, suffix=".mrc", delete=False) as file:
            path = Path(file.name)
    except OSError:
        raise StoreError(
            "The map cannot be prepared: the cache of the server takes no files.", "its disk is full", "make room there"
        ) from None
    job = {"do": "map", "generation": str(one.generation.path), "pixel": one.pixel_size_angstrom, "point": list(point), "file": str(path)}
    try:
        computed(_MODULE, job, "The map")
    except StoreError:
        path.unlink(missing_ok=True)
        raise
    return path
