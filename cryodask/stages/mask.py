"""Stage ``mask``: a soft mask from the half-maps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from cryodask.errors import InputError
from cryodask.stage import Context, Params, Picture, Resources, Sizes, stage

if TYPE_CHECKING:
    import xarray as xr


class MaskParams(Params):
    """Parameters of stage ``mask``."""

    low_pass_angstrom: float = Field(15.0, description="the mean of the half-maps is low-passed to this resolution first, Angstrom", gt=0)
    threshold: float | None = Field(None, description="density above which a voxel is molecule; found from the map if left out")
    extend_angstrom: float = Field(7.0, description="distance by which the thresholded region grows, Angstrom", ge=0)
    edge_angstrom: float = Field(12.0, description="width of the soft edge outside it, Angstrom", ge=0)


def _memory(params: MaskParams, sizes: Sizes) -> float:
    return 40.0 * sizes["z"] * sizes["y"] * sizes["x"]


@stage(version=1, shape="whole", needs=["half_map", "map_pixel_size_angstrom"], gives=["solvent_mask"], resources=Resources(memory=_memory))
def mask(params: MaskParams, *, half_map: np.ndarray, map_pixel_size_angstrom: float, context: Context) -> dict[str, Any]:
    """Make a soft mask round the molecule from the mean of the half-maps.

    The mean map is low-passed and thresholded (by default at 30 % of the density inside the molecule, or 4 standard deviations of the
    solvent where that is more), regions under 5 % of the largest are left out, the rest grows by ``extend_angstrom`` and falls to zero
    over ``edge_angstrom`` as a raised cosine.
    """
    import torch

    from cryodask.kernels.masking import density_threshold, low_pass, soft_mask

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
            f"no voxel of the map low-passed to {params.low_pass_angstrom:g} A exceeds {threshold:.4g} (its largest is {smooth.max():.4g})",
            "the threshold was meant for a map of another scale, or the map holds no molecule",
            "leave mask.threshold out, or take it from the map low-passed to the same resolution",
        )
    return {"solvent_mask": soft}


def check_half_maps(half_map: np.ndarray) -> None:
    """Refuse half-maps that are not two cubes of numbers.

    Raises
    ------
    InputError
        Wrong number or shape, NaN, or a map of zeros.
    """
    if half_map.ndim != 4 or half_map.shape[0] != 2 or len(set(half_map.shape[1:])) != 1:
        raise InputError(
            f"half-maps of shape {half_map.shape}, not two equal cubes", "other maps were given", "give both half-maps of one run"
        )
    for number, volume in enumerate(half_map, 1):
        if not np.isfinite(volume).all():
            raise InputError(f"half-map {number} holds NaN or infinite voxels", "the refinement that made it failed", "look at its report")
        if not volume.any():
            raise InputError(f"half-map {number} is zero everywhere", "no particle reached this half", "look at the half-sets")


@mask.figures
def draw(ds: xr.Dataset) -> Iterator[Picture]:
    """Central sections of the mask."""
    from matplotlib.figure import Figure

    volume = ds["solvent_mask"].values
    n = volume.shape[0]
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for axes, section, name in zip(figure.subplots(1, 3), (volume[n // 2], volume[:, n // 2], volume[:, :, n // 2]), ("z", "y", "x")):
        axes.imshow(section, cmap="gray", vmin=0, vmax=1, origin="lower")
        axes.set_title(f"section across {name}", fontsize=9)
        axes.set_axis_off()
    share = 100.0 * float(volume.mean())
    yield Picture(
        "Mask", f"Central sections of the soft mask, made from the mean of both half-maps. It fills {share:.1f} % of the box.", figure
    )
