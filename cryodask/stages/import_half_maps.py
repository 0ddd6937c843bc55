"""Stage ``import_half_maps``: half-maps of another program."""

from __future__ import annotations

from typing import Any

import numpy as np

from cryodask.errors import InputError
from cryodask.formats.mrc import read_mrc
from cryodask.stage import Params, stage


class ImportHalfMapsParams(Params):
    """No parameters."""


@stage(version=1, shape="whole", needs=["half_map_path"], gives=["half_map", "map_pixel_size_angstrom"])
def import_half_maps(params: ImportHalfMapsParams, *, half_map_path: list[str], device: str = "cpu") -> dict[str, Any]:
    """Read two unmasked, unsharpened half-maps (MRC) for masks and post-processing."""
    (first, pixel), (second, other) = (read_mrc(path) for path in half_map_path)
    if first.shape != second.shape or (pixel or 0) != (other or 0):
        raise InputError(
            f"The half-maps differ: {first.shape} at {pixel} A and {second.shape} at {other} A.",
            "they come from different runs",
            "give the two half-maps of one refinement",
        )
    if first.ndim != 3 or len(set(first.shape)) != 1:
        raise InputError(
            f"{half_map_path[0]} has the shape {first.shape}, not that of a cube.",
            "an image or a cropped map was given",
            "give the two half-maps of one refinement",
        )
    if not pixel or pixel <= 0:
        raise InputError(f"{half_map_path[0]} does not say its voxel size.", "it was written without one", "set it in the header")
    return {"half_map": np.stack([first, second]).astype(np.float32), "map_pixel_size_angstrom": float(pixel)}
