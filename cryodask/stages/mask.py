"""Stage ``mask``: a soft mask from the half-maps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from cryodask.errors import InputError
from cryodask.stage import Context, Params, Picture, Resources, Sizes, stage
from cryodask.stages._half_maps import check_half_maps

if TYPE_CHECKING:
    import xarray as xr


class MaskParams(Params):
    """Parameters of stage ``mask``."""

    low_pass_angstrom: float = Field(
        15.0, description="resolution to which the mean of the half-maps is low-pass filtered first, Angstrom", gt=0
    )
    threshold: float | None = Field(
        None, description="density above which a voxel belongs to the molecule; by default estimated from the map"
    )
    extend_angstrom: float = Field(7.0, description="distance by which the thresholded region grows, Angstrom", ge=0)
    edge_angstrom: float = Field(12.0, description="width of the soft edge outside it, Angstrom", ge=0)


def _memory(params: MaskParams, sizes: Sizes) -> float:
    return 40.0 * sizes["z"] * sizes["y"] * sizes["x"]


@stage(version=1, shape="whole", needs=["half_map", "map_pixel_size_angstrom"], gives=["solvent_mask"], resources=Resources(memory=_memory))
def mask(params: MaskParams, *, half_map: np.ndarray, map_pixel_size_angstrom: float, context: Context) -> dict[str, Any]:
    """Make a soft mask around the molecule from the mean of the half-maps.

    The mean map is low-pass filtered and thresholded (by default at 30 % of the density inside the molecule, or at 4 standard deviations of
    the solvent if that is more). Regions smaller than 5 % of the largest are dropped; the rest is extended by ``extend_angstrom`` and falls
    to zero over ``edge_angstrom`` as a raised cosine.
    """
    import torch

    from cryodask.kernels.masking import low_pass
    from cryodask.kernels.regions import density_threshold, soft_mask

    check_half_maps(half_map)
    pixel = float(map_pixel_size_angstrom)
    mean = torch.from_numpy(np.asarray(half_map, np.float32)).to(context.device).mean(0)
    smooth = low_pass(mean, pixel, max(params.low_pass_angstrom, 2.0 * pixel)).cpu().numpy()
    threshold = density_threshold(smooth) if params.threshold is None else params.threshold
    soft = soft_mask(
        smooth, threshold, pixel_size_angstrom=pixel, extend_angstrom=params.extend_angstrom, edge_angstrom=params.edge_angstrom
    )
    if not soft.any():
        raise InputError(
            f"no voxel of the map filtered to {params.low_pass_angstrom:g} A exceeds {threshold:.4g} (its maximum is {smooth.max():.4g})",
            "the threshold belongs to a map with another grey scale, or the map shows no molecule",
            "leave out mask.threshold, or determine it from the map filtered to the same resolution",
        )
    return {"solvent_mask": soft}


@mask.figures
def draw(ds: xr.Dataset) -> Iterator[Picture]:
    """Central sections of the mask."""
    yield sections(ds, "Central sections of the soft mask, made from the mean of both half-maps.")


def sections(ds: xr.Dataset, caption: str) -> Picture:
    """Central sections of a mask, with the share of the box that it fills."""
    from matplotlib.figure import Figure

    volume = ds["solvent_mask"].values
    n = volume.shape[0]
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for axes, section, name in zip(figure.subplots(1, 3), (volume[n // 2], volume[:, n // 2], volume[:, :, n // 2]), ("z", "y", "x")):
        axes.imshow(section, cmap="gray", vmin=0, vmax=1, origin="lower")
        axes.set_title(f"section across {name}", fontsize=9)
        axes.set_axis_off()
    share = 100.0 * float(volume.mean())
    return Picture("Mask", f"{caption} It fills {share:.1f} % of the box.", figure)
