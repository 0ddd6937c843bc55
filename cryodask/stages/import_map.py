"""Stage ``import_map``: a map, or two half-maps, from another program."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import Field, model_validator

from cryodask.errors import InputError
from cryodask.formats.mrc import read_map
from cryodask.formats.mrc_header import is_same_size
from cryodask.stage import Context, MapFile, Output, Params, stage
from cryodask.stages._half_maps import check_half_maps, check_independent
from cryodask.stages._symmetry import PointGroup


class ImportMapParams(Params):
    """Parameters of ``import_map``."""

    file: MapFile | None = Field(None, description="a map, MRC")
    half_maps: tuple[MapFile, MapFile] | None = Field(None, description="two unmasked, unsharpened half-maps of one refinement, MRC")
    symmetry: PointGroup | None = Field(None, description="point group of the map")
    frame_of: str | None = Field(None, description="step whose poses refer to this map, for example import_particles")

    @model_validator(mode="after")
    def _one(self) -> ImportMapParams:
        if (self.file is None) == (self.half_maps is None):
            what = "give a file" if self.file is None else "file and half_maps are both given; keep one"
            raise ValueError(f"{what}: import_map: {{file: map.mrc}} or import_map: {{half_maps: [half1.mrc, half2.mrc]}}")
        return self


def _outputs(params: ImportMapParams) -> tuple[Output, ...]:
    parts = ("final", "half_maps") if params.half_maps else ("final",)
    return (Output("map", "map", parts, frame=f"as:{params.frame_of}" if params.frame_of else "unknown"),)


@stage(version=1, shape="whole", needs=[], outputs=_outputs, gives=["half_map", "final_map", "map_pixel_size_angstrom"])
def import_map(params: ImportMapParams, *, context: Context) -> dict[str, Any]:
    """Read a map, or two unmasked, unsharpened half-maps, for masks, post-processing and refinement.

    The map of two half-maps is their mean.
    """
    paths = params.half_maps or (params.file or "",)
    maps = [read_map(path) for path in paths]
    first, pixel = maps[0]
    for other, voxel in maps[1:]:
        if first.shape != other.shape or not is_same_size(pixel or 0.0, voxel or 0.0):
            raise InputError(
                f"The half-maps differ: {first.shape} at {pixel} A and {other.shape} at {voxel} A.",
                "they come from different refinements",
                "give the two half-maps of one refinement",
            )
    if first.ndim != 3 or len(set(first.shape)) != 1:
        raise InputError(
            f"{paths[0]} has the shape {first.shape} and is not a cube.", "it is an image or a cropped map", "pad it to a cube"
        )
    if not pixel:
        raise InputError(f"{paths[0]} has no voxel size in its header.", "the program that wrote it left it out", "set it in the header")
    stack = np.stack([data for data, _ in maps]).astype(np.float32)
    if params.half_maps:
        check_half_maps(stack)
        check_independent(stack)
    given: dict[str, Any] = {"final_map": stack.mean(0), "map_pixel_size_angstrom": float(pixel)}
    return given | ({"half_map": stack} if params.half_maps else {})
