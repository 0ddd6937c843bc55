"""The mask of a map as it is being chosen: a coarse one, computed from the edits in less than a second as stage ``draw_mask`` does."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import struct
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cryodask.errors import InputError, StoreError
from cryodask.web.aside import computed
from cryodask.web.maps import MapStep, level_of, surface_at
from cryodask.web.pictures import Cache

LONGEST_VOXELS = 96
"""Voxels per side of a coarse map; a mask has no finer detail than some voxels of it."""
_computed = partial(computed, "cryodask.web.masking", what="The mask")


@dataclass(frozen=True)
class Coarse:
    """A map on the grid of a page, band-limited: the file of a `(z, y, x)` float32 array with ``size`` voxels per side.

    ``voxels``, ``pixel_size_angstrom``: those of the map itself, which has the same first voxel.
    """

    file: Path
    size: int
    voxels: int
    pixel_size_angstrom: float

    def lowpass_angstrom(self, recipe: dict[str, Any]) -> float:
        """Resolution to which it is filtered: what the recipe says, as far as this grid holds that."""
        return max(float(recipe["lowpass_angstrom"]), 2.2 * self.pixel_size_angstrom * self.voxels / self.size)


def coarse_map(cache: Cache, step: MapStep) -> Coarse:
    """The coarse map of a step; made once.

    Raises
    ------
    InputError
        If the map is not a cube.
    """
    shape = step.shape
    if len(set(shape)) != 1:
        raise InputError(f"The map of {step.label} is {' x '.join(map(str, shape))} voxels, not a cube.", "", "pad it to a cube")
    pixel, size = float(step.generation.read(step.record, "map_pixel_size_angstrom")), min(LONGEST_VOXELS, shape[0])
    job = {
        "do": "coarse",
        "generation": str(step.generation.path),
        "variable": step.variable,
        "pixel": pixel,
        "size": size,
        "number": step.number,
    }
    path = cache.path(f"{_name(step, '')}-coarse{size}.npy", partial(_computed, job))
    if isinstance(path, bytes):
        raise StoreError("The map cannot be prepared: the cache of the server takes no files.", "its disk is full", "make room there")
    return Coarse(path, size, shape[0], pixel)


def about(cache: Cache, step: MapStep, recipe: dict[str, Any]) -> dict[str, Any]:
    """Size and densities of a map for the controls of the page, as JSON."""
    coarse = coarse_map(cache, step)
    head, _ = mask_of(cache, step, recipe)
    return {
        "voxels": coarse.voxels,
        "pixel_size_angstrom": coarse.pixel_size_angstrom,
        "highest": head["highest"],
        "auto": head["auto"],
        "shown_lowpass_angstrom": coarse.lowpass_angstrom(recipe),
    }


def mask_bytes(cache: Cache, step: MapStep, recipe: dict[str, Any]) -> bytes:
    """The coarse mask as :mod:`cryodask.web.masking` writes it, compressed with gzip."""
    return gzip.compress(_raw(cache, step, recipe), 1)


def mask_of(cache: Cache, step: MapStep, recipe: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray]:
    """What is known of the coarse mask, and the mask, `(z, y, x)` uint8, 255 for 1."""
    raw = _raw(cache, step, recipe)
    length = struct.unpack_from("<I", raw)[0]
    head = json.loads(raw[4 : 4 + length])
    return head, np.frombuffer(raw, np.uint8, offset=4 + length).reshape((head["size"],) * 3)


def surfaces(cache: Cache, step: MapStep, recipe: dict[str, Any] | None, sigmas: float) -> bytes:
    """Surface of the map, or of its mask at one half if there is a recipe; on the same grid (see :func:`~cryodask.web.maps.surface_at`)."""
    if recipe is not None:
        return surface_at(mask_of(cache, step, recipe)[1].astype(np.float32), 127.5)
    small = np.load(io.BytesIO(coarse_map(cache, step).file.read_bytes()), allow_pickle=False)
    return surface_at(small, level_of(small, sigmas))


def _raw(cache: Cache, step: MapStep, recipe: dict[str, Any]) -> bytes:
    coarse = coarse_map(cache, step)
    job = {"do": "mask", "coarse": str(coarse.file), "pixel": coarse.pixel_size_angstrom, "voxels": coarse.voxels, "recipe": recipe}
    job["lowpass"] = coarse.lowpass_angstrom(recipe)
    return cache.get(f"{_name(step, json.dumps(recipe, sort_keys=True))}-mask", partial(_computed, job))


def _name(step: MapStep, more: str) -> str:
    said = f"{step.content}|{more}"
    return hashlib.blake2b(said.encode(), digest_size=12).hexdigest()
