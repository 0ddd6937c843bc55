"""Maps, class averages and curves of the steps of a project, small enough for a page."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from cryodask.kernels.isosurface import isosurface, reduced
from cryodask.store.generation import Generation
from cryodask.store.lines import Record
from cryodask.store.project import Project
from cryodask.vocabulary import VARIABLES
from cryodask.web.exposure import number, numbers
from cryodask.web.follow import Follower
from cryodask.web.pictures import Cache, upright

LONGEST_SURFACE_VOXELS = 96
MOST_TRIANGLES = 60_000
_VARIABLES = ("sharpened_map", "final_map")
_CURVES = ("fsc_unmasked", "fsc_masked", "fsc_randomised", "fsc_corrected")
_LOCAL = "local_resolution_angstrom"
_ONE_AT_A_TIME = threading.Lock()
"""A map of 400 voxels has 256 MB: several at once would be more than the whole server should have."""


@dataclass(frozen=True)
class MapStep:
    """A map of a finished step; ``label``: that of the step, or ``STEP.class2`` for a class, whose ``number`` is counted from 1."""

    label: str
    generation: Generation
    record: Record
    variable: str
    number: int = 0

    def volume(self) -> np.ndarray:
        """The map, `(z, y, x)`; of classes only its own is read."""
        if self.number:
            return np.asarray(self.generation.result_reader(self.variable)[self.number - 1])
        return np.asarray(self.generation.read(self.record, self.variable))

    @property
    def shape(self) -> tuple[int, ...]:
        """Voxels in z, y and x."""
        return self.generation.result_reader(self.variable).shape[-3:]

    @property
    def place(self) -> str:
        """``STAGE/KEY``, or ``STAGE/KEY.class2``."""
        end = f".class{self.number}" if self.number else ""
        return f"{self.generation.path.parent.name}/{self.generation.path.name}{end}"

    @property
    def content(self) -> str:
        """What tells it from all other maps, and from a former result at its place."""
        return f"{self.generation.path}|{self.record['shards'][self.variable]}|{self.number or ''}"


@dataclass(frozen=True)
class Coloured:
    """Values `(z, y, x)` on the grid of a map, and the scale on which its surface is coloured."""

    values: np.ndarray
    low: float
    high: float
    label: str


def map_steps(project: Project, variables: Sequence[str] = _VARIABLES) -> list[MapStep]:
    """Maps of all finished steps and their classes, in the order of the pipeline; of a step that gives several ``variables`` the first."""
    out = []
    for label in project.stages:
        generation = project.generation(label)
        record = generation.committed().get(0) if not generation.meta["per_item"] else None
        if record is None or not {*variables, "class_map"} & set(generation.meta["gives"]):
            continue
        variable = next((v for v in variables if v in record["shards"]), None)
        if variable is not None:
            out.append(MapStep(label, generation, record, variable))
        elif "class_map" in record["shards"]:
            count = len(generation.result_reader("class_map"))
            out += [MapStep(f"{label}.class{k}", generation, record, "class_map", k) for k in range(1, count + 1)]
    return out


def _unit(name: str) -> str:
    """The unit of a variable as people write it; empty for pure numbers."""
    return VARIABLES[name].units.removeprefix("1").replace("angstrom", "Å").replace("^2", "²")


def described(step: MapStep) -> dict[str, Any]:
    """Size, figures and curves of a map, as JSON."""
    columns = step.record["columns"]
    figures = {
        VARIABLES[name].doc: f"{value:.4g} {_unit(name)}".strip()
        for name, value in columns.items()
        if name in VARIABLES and not VARIABLES[name].dims and isinstance(value, int | float) and not isinstance(value, bool)
    }
    for name in ("class3d_share", "class3d_resolution_angstrom") if step.number else ():
        if name in columns:
            value = np.asarray(step.generation.read(step.record, name))[step.number - 1]
            figures[VARIABLES[name].doc] = f"{value:.4g} {_unit(name)}".strip()
    out: dict[str, Any] = {"step": step.label, "variable": step.variable, "shape": list(step.shape), "figures": figures, "fsc": None}
    gives = set(step.generation.meta["gives"])
    out["mask"] = "map_pixel_size_angstrom" in gives and (step.number > 0 or "final_map" in gives)
    if "fsc_corrected" in columns:
        resolution = np.asarray(step.generation.read(step.record, "shell_resolution_angstrom"), dtype=np.float64)
        with np.errstate(divide="ignore"):
            curves = {name: numbers(step.generation.read(step.record, name)) for name in _CURVES if name in columns}
            out["fsc"] = {"frequency": numbers(1.0 / resolution), **curves}
    return out


def section(cache: Cache, step: MapStep, axis: int, share: float) -> bytes:
    """PNG of a section through a map, `share` (0 to 1) of the way along an axis (0 z, 1 y, 2 x)."""
    grey = _grey(cache, step)
    at = min(grey.shape[axis] - 1, max(0, round(share * (grey.shape[axis] - 1))))
    return png(np.take(grey, at, axis))


def surface(cache: Cache, step: MapStep, sigmas: float) -> bytes:
    """Isosurface of a map at some standard deviations above its mean; see :func:`level_of` and :func:`surface_at`."""
    small = _small(cache, step)
    return surface_at(small, level_of(small, sigmas), _local_resolution(cache, step))


def _local_resolution(cache: Cache, step: MapStep) -> Coloured | None:
    """Local resolution of a map, if its step measured it, between its 5th and 95th percentile in the mask."""
    if _LOCAL not in step.record["shards"]:
        return None
    limits = np.asarray(step.generation.read(step.record, "local_resolution_percentile"), dtype=np.float64)
    return Coloured(_small(cache, replace(step, variable=_LOCAL)), float(limits[0]), float(limits[-1]), "local resolution, Å")


def level_of(volume: np.ndarray, sigmas: float) -> float:
    """Density at some standard deviations above the mean, but never above 90 % of the highest."""
    mean = float(volume.mean())
    return min(mean + sigmas * float(volume.std()), mean + 0.9 * (float(volume.max()) - mean))


def surface_at(small: np.ndarray, level: float, coloured: Coloured | None = None) -> bytes:
    """Isosurface at a density, as a script reads it.

    A little-endian u4, the length of the JSON head (``vertices``, ``triangles``, ``size``) that follows, padded so that the arrays begin at
    a multiple of 4 bytes; then (x, y, z) of the vertices in voxels from the centre of the map (f4), and the triangles (u4). If it is
    coloured, the head has ``low``, ``high`` and ``label``, and the values of the vertices (f4) end the file.
    """
    values = coloured.values if coloured is not None else None
    longest, whole, step = max(small.shape), np.array(small.shape[::-1], np.float32), 1
    while True:
        vertices, triangles = isosurface(small, level)
        if len(triangles) <= MOST_TRIANGLES or longest < 24:
            break
        longest = int(longest * 0.8)
        step *= -(-max(small.shape) // longest)
        small = reduced(small, longest)
        values = reduced(values, longest) if values is not None else None
    # surfaces of the same map fit each other, however many voxels were averaged
    centred = (vertices[:, ::-1] + 0.5) * step - whole / 2
    about: dict[str, Any] = {"vertices": len(vertices), "triangles": len(triangles), "size": int(whole.max())}
    arrays = [centred.astype("<f4").tobytes(), triangles.astype("<u4").tobytes()]
    if coloured is not None and values is not None:
        from scipy.ndimage import map_coordinates  # other pages do without its memory

        about |= {"low": coloured.low, "high": coloured.high, "label": coloured.label}
        arrays.append(map_coordinates(values, vertices.T, order=1, mode="nearest").astype("<f4").tobytes())
    head = json.dumps(about).encode()
    head += b" " * (-(len(head) + 4) % 4)
    return b"".join([struct.pack("<I", len(head)), head, *arrays])


def orientations(step: MapStep) -> dict[str, Any]:
    """How many particles have each viewing direction: counts by tilt (rows, 0 to 180 degrees) and rot (columns, -180 to 180)."""
    names = ("rot_deg", "tilt_deg")
    if not all(name in step.record["columns"] or name in step.record["shards"] for name in names):
        return {"counts": None, "particles": 0}
    rot, tilt = (np.asarray(step.generation.read(step.record, name), dtype=np.float64) for name in names)
    # the same direction may be written with a negative tilt
    rot, tilt = np.where(tilt < 0, rot + 180, rot), np.abs(tilt) % 360
    rot, tilt = np.where(tilt > 180, rot + 180, rot), np.where(tilt > 180, 360 - tilt, tilt)
    seen = np.isfinite(rot) & np.isfinite(tilt)
    counts, _, _ = np.histogram2d(tilt[seen], (rot[seen] + 180) % 360 - 180, bins=(36, 72), range=((0, 180), (-180, 180)))
    return {"counts": counts.astype(int).tolist(), "particles": int(seen.sum())}


def averages(follower: Follower) -> tuple[str, list[dict[str, Any]], np.ndarray] | None:
    """The step of the last classes, what is known of each, and their averages `(class, y, x)`; None before there are any."""
    for label in reversed(follower.project.stages):
        generation = follower.project.generation(label)
        if "class_average" not in generation.meta["gives"]:
            continue
        record = generation.committed().get(0)
        if record is None or "class_average" not in record["shards"]:
            continue
        about: dict[str, Any] = {}
        for name in ("class_share", "class_resolution_angstrom", "class_score"):
            if name in record["columns"] or name in record["shards"]:
                about[name] = [number(v) for v in np.asarray(generation.read(record, name)).ravel()]
        images = np.asarray(generation.read(record, "class_average"))
        rows = [{"number": n + 1, **{k: v[n] for k, v in about.items() if n < len(v)}} for n in range(len(images))]
        return label, rows, images
    return None


def average_png(images: np.ndarray, index: int) -> bytes:
    """PNG of a class average; all classes share one grey scale in units of their own contrast."""
    return png(_greys(images[index], 1.0, 99.8))


def png(picture: np.ndarray) -> bytes:
    """A PNG file of a picture `(y, x)` uint8 whose first row is the lowest."""
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(upright(picture))).save(file, "PNG")
    return file.getvalue()


# --- kept on the local disk ------------------------------------------------------------------------------------------------------
def _grey(cache: Cache, step: MapStep) -> np.ndarray:
    """The map in 8 bits, not in memory but mapped from the cache."""
    return _kept(cache, step, "grey", lambda volume: _greys(volume, 0.5, 99.9))


def _small(cache: Cache, step: MapStep) -> np.ndarray:
    return np.asarray(_kept(cache, step, "small", lambda volume: reduced(volume, LONGEST_SURFACE_VOXELS)))


def _kept(cache: Cache, step: MapStep, kind: str, make: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """What is made from a map once, not in memory but mapped from the cache."""
    name = f"{hashlib.blake2b(step.content.encode(), digest_size=8).hexdigest()}-{kind}.npy"
    with _ONE_AT_A_TIME:
        path = cache.path(name, lambda: _array_bytes(make(step.volume())))
    return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False)) if not isinstance(path, bytes) else np.load(io.BytesIO(path))


def _array_bytes(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def _greys(values: np.ndarray, low: float, high: float) -> np.ndarray:
    bottom, top = np.percentile(values[tuple(slice(None, None, max(1, n // 128)) for n in values.shape)], (low, high))
    scaled = np.subtract(values, np.float32(bottom), dtype=np.float32)
    scaled *= np.float32(255 / max(float(top - bottom), 1e-12))
    np.clip(scaled, 0, 255, out=scaled)
    return np.asarray(np.nan_to_num(scaled, copy=False).astype(np.uint8))
