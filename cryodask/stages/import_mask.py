"""Stage ``import_mask``: a mask made in another program."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import Field

from cryodask.errors import InputError
from cryodask.formats.mrc import read_map
from cryodask.stage import Context, MapFile, Output, Params, stage

_TOLERANCE = 0.01


class ImportMaskParams(Params):
    """Parameters of ``import_mask``."""

    file: MapFile = Field(description="soft mask, MRC, on the grid of the map")


@stage(
    version=1,
    shape="whole",
    needs=["final_map", "map_pixel_size_angstrom"],
    gives=["solvent_mask"],
    outputs=[Output("mask", "mask", ("mask",), frame="same")],
)
def import_mask(params: ImportMaskParams, *, final_map: np.ndarray, map_pixel_size_angstrom: float, context: Context) -> dict[str, Any]:
    """Read a soft mask on the grid of a map: the same box and voxel size, values from 0 to 1."""
    data, voxel = read_map(params.file)
    mask, pixel = np.array(data, np.float32), float(map_pixel_size_angstrom)
    if mask.shape != np.shape(final_map):
        raise InputError(
            f"{params.file} is {' x '.join(map(str, mask.shape))} voxels, the map {' x '.join(map(str, np.shape(final_map)))}.",
            "it was made for a map with another box",
            "make it for this map, or resample it",
        )
    if voxel and abs(voxel / pixel - 1.0) > _TOLERANCE:
        raise InputError(
            f"{params.file} has voxels of {voxel:.3f} A, the map of {pixel:.3f} A.", "it was made for another map", "make it for this map"
        )
    if mask.min() < -_TOLERANCE or mask.max() > 1.0 + _TOLERANCE or mask.max() <= 0.0:
        raise InputError(
            f"{params.file} has values from {mask.min():.3g} to {mask.max():.3g}.",
            "it is a map, not a mask",
            "give a mask with values from 0 to 1",
        )
    return {"solvent_mask": np.clip(mask, 0.0, 1.0)}
