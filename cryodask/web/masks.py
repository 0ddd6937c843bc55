"""The mask of a map as it is being chosen: a coarse one, computed from the edits in a fraction of a second as stage ``draw_mask`` does."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import struct
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from cryodask.edits.masks import Stroke
from cryodask.errors import InputError
from cryodask.web.maps import MapStep, kept, level_of, shape_of, surface_at
from cryodask.web.pictures import Cache

LONGEST_VOXELS = 96
"""Voxels per side of a coarse map; a mask has no finer detail than some voxels of it."""


@dataclass(frozen=True)
class Coarse:
    """A map on the grid of a page, band-limited: `map`, `(z, y, x)` float32.

    ``voxels``, ``pixel_size_angstrom``: those of the map itself. ``spacing_angstrom``: of the coarse grid, which has the same first voxel.
    """

    map: np.ndarray
    voxels: int
    pixel_size_angstrom: float

    @property
    def spacing_angstrom(self) -> float:
        """Voxel size of the coarse grid."""
        return self.pixel_size_angstrom * self.voxels / len(self.map)


def coarse_map(cache: Cache, step: MapStep) -> Coarse:
    """The coarse map of a step; made once.

    Raises
    ------
    InputError
        If the map is not a cube.
    """
    from cryodask.kernels.regions import low_passed

    shape = shape_of(step)
    if len(set(shape)) != 1:
        raise InputError(f"The map of {step.label} is {' x '.join(map(str, shape))} voxels, not a cube.", "", "pad it to a cube")
    pixel = float(step.generation.read(step.record, "map_pixel_size_angstrom"))
    size = min(LONGEST_VOXELS, shape[0])
    spacing = pixel * shape[0] / size
    small = kept(cache, step, f"coarse{size}", lambda volume: low_passed(volume, pixel, 2.0 * spacing, size))
    return Coarse(np.asarray(small), shape[0], pixel)


def shown_lowpass(coarse: Coarse, recipe: dict[str, Any]) -> float:
    """Resolution to which the coarse map is filtered: what the recipe says, as far as its grid holds that."""
    return max(float(recipe["lowpass_angstrom"]), 2.2 * coarse.spacing_angstrom)


def about(coarse: Coarse, recipe: dict[str, Any]) -> dict[str, Any]:
    """Size and densities of a map for the controls of the page, as JSON."""
    from cryodask.kernels.regions import density_threshold

    smooth = _smooth(coarse, recipe)
    return {
        "voxels": coarse.voxels,
        "pixel_size_angstrom": coarse.pixel_size_angstrom,
        "coarse": len(coarse.map),
        "highest": float(smooth.max()),
        "auto": density_threshold(smooth),
        "shown_lowpass_angstrom": shown_lowpass(coarse, recipe),
    }


def mask_bytes(cache: Cache, step: MapStep, recipe: dict[str, Any]) -> bytes:
    """The coarse mask, compressed with gzip: a little-endian u4, the length of the JSON head (``size``, ``share``), the head, and the mask
    as bytes, 255 for 1; z, then y, then x.
    """
    mask = mask_of(cache, step, recipe)
    head = json.dumps({"size": len(mask), "share": float(mask.mean() / 255)}).encode()
    return gzip.compress(struct.pack("<I", len(head)) + head + mask.tobytes(), 1)


def mask_of(cache: Cache, step: MapStep, recipe: dict[str, Any]) -> np.ndarray:
    """The coarse mask, `(z, y, x)` uint8, 255 for 1."""
    said = f"{step.generation.path}|{step.record['shards'][step.variable]}|{json.dumps(recipe, sort_keys=True)}"
    name = f"{hashlib.blake2b(said.encode(), digest_size=12).hexdigest()}-mask.npy"
    raw = cache.get(name, partial(_made, cache, step, recipe))
    return np.asarray(np.load(io.BytesIO(raw), allow_pickle=False))


def _made(cache: Cache, step: MapStep, recipe: dict[str, Any]) -> bytes:
    from cryodask.kernels.regions import Drawn, density_threshold, soft_mask

    coarse = coarse_map(cache, step)
    smooth, spacing, pixel = _smooth(coarse, recipe), coarse.spacing_angstrom, coarse.pixel_size_angstrom
    wanted = recipe["threshold"]
    strokes = [Stroke.model_validate(one) for one in recipe["strokes"]]
    mask = soft_mask(
        smooth,
        density_threshold(smooth) if wanted == "auto" else np.inf if wanted == "none" else float(wanted),
        pixel_size_angstrom=spacing,
        # the boundary lies half a voxel beyond the centres of the outermost ones
        extend_angstrom=float(recipe["extend_angstrom"]) + (spacing - pixel) / 2,
        edge_angstrom=float(recipe["edge_angstrom"]),
        drawn=[Drawn(one.points, one.radius_angstrom, one.erase) for one in strokes],
        centre=(coarse.voxels // 2) * pixel / spacing,
    )
    file = io.BytesIO()
    np.save(file, np.round(255 * mask).astype(np.uint8))
    return file.getvalue()


def surfaces(cache: Cache, step: MapStep, recipe: dict[str, Any] | None, sigmas: float) -> bytes:
    """Surface of the map, or of its mask at one half if there is a recipe; on the same grid (see :func:`~cryodask.web.maps.surface_at`)."""
    if recipe is not None:
        return surface_at(mask_of(cache, step, recipe).astype(np.float32), 127.5)
    small = coarse_map(cache, step).map
    return surface_at(small, level_of(small, sigmas))


def _smooth(coarse: Coarse, recipe: dict[str, Any]) -> np.ndarray:
    from cryodask.kernels.regions import low_passed

    return low_passed(coarse.map, coarse.spacing_angstrom, shown_lowpass(coarse, recipe))
