"""Stage ``draw_mask``: a mask that a person has chosen or drawn by eye."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from cryodask.edits.masks import NUMBERS, Stroke, Threshold
from cryodask.errors import InputError
from cryodask.stage import Context, Output, Params, Picture, Resources, Sizes, stage
from cryodask.stages.mask import sections

if TYPE_CHECKING:
    import xarray as xr


class DrawMaskParams(Params):
    """Parameters of ``draw_mask``."""

    threshold: Threshold | None = Field(
        None,
        description="density above which a voxel of the low-passed map belongs to the mask; 'auto' to estimate it as stage mask does, "
        "'none' for a mask that is only drawn; without any parameter the step waits",
    )
    lowpass_angstrom: float = Field(15.0, gt=0, le=1000, description="resolution to which the map is low-pass filtered first, Angstrom")
    extend_angstrom: float = Field(7.0, ge=0, le=1000, description="distance by which the thresholded region grows, Angstrom")
    edge_angstrom: float = Field(12.0, ge=0, le=1000, description="width of the soft edge, Angstrom")
    strokes: tuple[Stroke, ...] = Field(
        (),
        description="what is then drawn into the mask and erased from it, in this order: mappings with points (a list of [z, y, x] in "
        "Angstrom from the centre of the map; one point is a ball), radius_angstrom, and erase (true or false)",
    )


def _memory(params: DrawMaskParams, sizes: Sizes) -> float:
    return 60.0 * sizes["z"] * sizes["y"] * sizes["x"]


@stage(
    version=1,
    shape="whole",
    needs=["final_map", "map_pixel_size_angstrom"],
    gives=["solvent_mask"],
    outputs=[Output("mask", "mask", ("mask",), frame="same")],
    person=True,
    resources=Resources(memory=_memory),
)
def draw_mask(params: DrawMaskParams, *, final_map: np.ndarray, map_pixel_size_angstrom: float, context: Context) -> dict[str, Any]:
    """Make a soft mask as a person has chosen it on the page of a map: threshold, extension and soft edge, and what was drawn and erased.

    Without parameters the step waits for **Use this mask** on that page (``cryodask dashboard``); other branches of the run go on. What
    is recorded are these numbers and strokes, from which the mask is computed here. They belong to one map: when it is recomputed, the
    step waits again, and the page shows what was chosen before. The map is low-pass filtered and thresholded, regions smaller than 5 % of
    the largest are dropped, and the rest grows by ``extend_angstrom`` and falls to zero over ``edge_angstrom`` as a raised cosine. Drawn
    places are put in and taken out of that; the mask is one half where their boundary was drawn.
    """
    from cryodask.kernels.regions import Drawn, density_threshold, low_passed, soft_mask

    volume, pixel = np.asarray(final_map, np.float32), float(map_pixel_size_angstrom)
    if len(set(volume.shape)) != 1:
        raise InputError(f"The map is {' x '.join(map(str, volume.shape))} voxels, not a cube.", "", "pad it to a cube")
    smooth = low_passed(volume, pixel, max(params.lowpass_angstrom, 2.0 * pixel))
    threshold = NUMBERS["threshold"] if params.threshold is None else params.threshold
    level = density_threshold(smooth) if threshold == "auto" else np.inf if threshold == "none" else float(threshold)
    soft = soft_mask(
        smooth,
        level,
        pixel_size_angstrom=pixel,
        extend_angstrom=params.extend_angstrom,
        edge_angstrom=params.edge_angstrom,
        drawn=[Drawn(stroke.points, stroke.radius_angstrom, stroke.erase) for stroke in params.strokes],
    )
    if not soft.any():
        raise InputError(
            f"The mask is empty: the map filtered to {params.lowpass_angstrom:g} A has at most {smooth.max():.4g}, the threshold is "
            f"{level:.4g}, and nothing is drawn inside the map.",
            "the threshold belongs to a map with another grey scale, or everything was erased",
            "choose another threshold on the page of the map, or draw the mask",
        )
    return {"solvent_mask": soft}


@draw_mask.figures
def draw(ds: xr.Dataset) -> Iterator[Picture]:
    """Central sections of the mask."""
    yield sections(ds, "Central sections of the mask that was chosen by eye.")
