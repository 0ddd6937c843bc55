"""Stage ``local_resolution``: resolution at each voxel, and a map filtered and sharpened accordingly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from cryodask.errors import InputError
from cryodask.stage import Context, Output, Params, Picture, Resources, Sizes, port, stage
from cryodask.stages._half_maps import check_half_maps, check_independent
from cryodask.stages._map_pictures import resolution_colours, surface_seen, without_specks

if TYPE_CHECKING:
    import xarray as xr

_PERCENTILES = (5, 25, 50, 75, 95)
_LEAST_MASK_SHARE = 1e-4
_LEAST_VOXELS, _MOST_VOXELS = 128, 256


class LocalResolutionParams(Params):
    """Parameters of ``local_resolution``."""

    window_angstrom: float = Field(
        30.0, gt=0, description="full width at half maximum of the window, Angstrom; widened to at least 2.5 wavelengths of each band"
    )
    threshold: float = Field(0.5, gt=0, lt=1, description="local correlation of the half-maps below which a band is not resolved")
    sharpen: bool = Field(
        False, description="bring the amplitudes of each band of the filtered map to the same level throughout the molecule"
    )


def _memory(params: LocalResolutionParams, sizes: Sizes) -> float:
    return 110.0 * sizes["z"] * sizes["y"] * sizes["x"]


@stage(
    version=1,
    shape="whole",
    needs=["half_map", "map_pixel_size_angstrom"],
    optional=["solvent_mask"],
    ports=["map[final, half_maps]", replace(port("mask[mask]", default="related"), optional=True)],
    outputs=[Output("map", "map", ("view",), frame="same")],
    gives=["sharpened_map", "b_factor_angstrom2", "local_resolution_angstrom", "local_resolution_percentile"],
    resources=Resources(memory=_memory),
)
def local_resolution(
    params: LocalResolutionParams,
    *,
    half_map: np.ndarray,
    map_pixel_size_angstrom: float,
    solvent_mask: np.ndarray | None = None,
    context: Context,
) -> dict[str, Any]:
    """Measure the resolution at each voxel, and filter the map accordingly.

    Half-maps are cut into bands of Fourier shells and correlated in a Gaussian window about each voxel; the resolution is where the
    correlation first falls below ``threshold``. The filtered map weights each band by sqrt(2 c / (1 + c)) of its local correlation c, and
    leaves out bands beyond the local resolution; with ``sharpen`` each band gets the same amplitude throughout the molecule. The window
    blurs boundaries: within 15 A of a better-resolved region, a poorer one appears up to 1 A better than it is.
    """
    import torch

    from cryodask.kernels.local_resolution import local_resolution as measure
    from cryodask.kernels.local_resolution import locally_sharpened
    from cryodask.kernels.masking import own_solvent_mask

    check_half_maps(half_map)
    check_independent(half_map)
    voxel = float(map_pixel_size_angstrom)
    halves = torch.from_numpy(np.asarray(half_map, np.float32)).to(context.device)
    if solvent_mask is None:
        mask = own_solvent_mask(halves.mean(0), voxel, halves.shape[-1] // 2 - 1)
    else:
        mask = torch.from_numpy(np.asarray(solvent_mask, np.float32)).to(context.device)
        if mask.shape != halves.shape[1:]:
            raise InputError(
                "the mask and the half-maps differ in size", "the mask was made for another box", "make a mask from these half-maps"
            )
    if float((mask > 0.5).float().mean()) < _LEAST_MASK_SHARE:
        raise InputError("the mask is empty", "its threshold is too high, or it lies outside the map", "make another mask")
    resolution, filtered = measure(halves[0], halves[1], voxel, window_angstrom=params.window_angstrom, threshold=params.threshold)
    view = locally_sharpened(filtered, voxel, mask, params.window_angstrom) if params.sharpen else filtered
    inside = resolution[mask > 0.5].cpu().numpy()
    return {
        "sharpened_map": view.cpu().numpy(),
        "b_factor_angstrom2": 0.0,
        "local_resolution_angstrom": resolution.cpu().numpy(),
        "local_resolution_percentile": np.percentile(inside, _PERCENTILES),
    }


@local_resolution.sentence
def says(result: Mapping[str, Any]) -> str:
    """Range of local resolution within the mask."""
    best, _, middle, _, worst = (float(v) for v in np.asarray(result["local_resolution_percentile"]))
    return f"median {middle:.1f} A within the mask, from {best:.1f} A (best 5 %) to {worst:.1f} A (worst 5 %)"


@local_resolution.figures
def draw(ds: xr.Dataset) -> Iterator[Picture]:
    """Surface and sections of the map, coloured by local resolution."""
    from matplotlib.figure import Figure

    view, resolution = ds["sharpened_map"].values, ds["local_resolution_angstrom"].values
    percentiles = ds["local_resolution_percentile"].values
    scale = resolution_colours(float(percentiles[0]), float(percentiles[-1]))
    figure = Figure(figsize=(9, 6.0), layout="constrained")
    panels = figure.subplots(2, 3)
    fine_view, fine_resolution = without_specks(_at_picture_size(view)), _at_picture_size(resolution)
    low, high = np.percentile(view, (60, 99.9))
    for axis, name in enumerate("zyx"):
        brightness, place = surface_seen(fine_view, axis)
        local = np.take_along_axis(np.moveaxis(fine_resolution, axis, 0), np.maximum(place, 0)[None], 0)[0]
        lit = scale.to_rgba(local)[..., :3] * (0.25 + 0.75 * brightness)[..., None]
        panels[0, axis].imshow(np.where(place[..., None] >= 0, lit, 1.0), origin="lower")
        panels[0, axis].set_title(f"surface along {name}", fontsize=9)
        section = np.take(view, view.shape[axis] // 2, axis)
        shade = np.clip((section - low) / max(high - low, 1e-12), 0.0, 1.0)[..., None]
        ink = scale.to_rgba(np.take(resolution, view.shape[axis] // 2, axis))[..., :3]
        panels[1, axis].imshow(1.0 - shade * (1.0 - ink), origin="lower")
        panels[1, axis].set_title(f"section across {name}", fontsize=9)
    for panel in panels.flat:
        panel.set_axis_off()
    bar = figure.colorbar(scale, ax=panels, label="local resolution, Å", extend="both", shrink=0.8)
    bar.ax.invert_yaxis()
    yield Picture(
        "Local resolution",
        f"The locally filtered map, coloured by its local resolution: {says({'local_resolution_percentile': percentiles})}. The surface "
        "encloses the densest voxels: those above a quarter of the 99.9th percentile.",
        figure,
    )


def _at_picture_size(volume: np.ndarray) -> np.ndarray:
    """A map with enough voxels for a smooth surface, and no more than needed."""
    from scipy.ndimage import zoom

    from cryodask.kernels.isosurface import reduced

    small = reduced(volume, _MOST_VOXELS)
    times = -(-_LEAST_VOXELS // max(small.shape))
    return small if times == 1 else np.asarray(zoom(small, times, order=1, grid_mode=True, mode="nearest"))
