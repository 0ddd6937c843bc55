"""Stage ``orientation``: whether views and resolution are isotropic."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from cryodask.stage import Context, Params, Picture, Resources, Sizes, stage
from cryodask.stages._half_maps import check_half_maps
from cryodask.stages._map_pictures import resolution_axis, resolution_colours
from cryodask.stages._symmetry import PointGroup

if TYPE_CHECKING:
    import xarray as xr

_FIRST_SHELL = 5
LEAST_SAMPLING, MOST_UNREACHED, LEAST_RATIO = 0.5, 0.02, 0.5
"""Limits beyond which orientations are reported as biased (simulated: 70 % top views 0.45, 0, 0.59; only top views 0.04, 0.54, 0.38)."""


class OrientationParams(Params):
    """Parameters of ``orientation``."""

    symmetry: PointGroup | None = Field(None, description="point group of the poses; by default that of the map")
    mask_diameter_angstrom: float | None = Field(None, gt=0, description="diameter of a soft sphere, Angstrom; by default 0.85 of the box")


def _memory(params: OrientationParams, sizes: Sizes) -> float:
    return 120.0 * sizes["z"] * sizes["y"] * sizes["x"]


@stage(
    version=1,
    shape="whole",
    needs=["half_map", "map_pixel_size_angstrom"],
    optional=["rot_deg", "tilt_deg", "psi_deg"],
    ports=["map[final, half_maps]", "particles?:particles[pose]"],
    outputs=[],
    gives=[
        "cone_axis", "cone_fsc", "cone_resolution_angstrom", "cone_frequency", "cone_area_ratio", "view_sampling", "unreached_share",
    ],
    resources=Resources(memory=_memory),
)  # fmt: skip
def orientation(
    params: OrientationParams,
    *,
    half_map: np.ndarray,
    map_pixel_size_angstrom: float,
    rot_deg: np.ndarray | None = None,
    tilt_deg: np.ndarray | None = None,
    psi_deg: np.ndarray | None = None,
    context: Context,
) -> dict[str, Any]:
    """Compare directions: the FSC of the half-maps in cones, and how evenly the poses sample Fourier space.

    Two measures, because each misses something. The ratio of the areas under the conical FSC curves (cFAR) depends on noise as well as on
    views, but the mask fills empty cones with correlated signal. The sampling by the poses (its harmonic mean over directions, and the
    share of directions that no view reaches) depends on the views only. A warning is given if the sampling is below 0.5, if more than
    2 % of the directions are empty, or if the ratio is below 0.5.
    """
    import torch

    from cryodask.kernels.fourier import soft_sphere
    from cryodask.kernels.local_resolution import cone_area_ratio, cone_axes, cone_fsc, cone_resolutions, sampling
    from cryodask.kernels.orientations import euler_to_matrix
    from cryodask.kernels.symmetry import symmetry_operators

    check_half_maps(half_map)
    voxel, box = float(map_pixel_size_angstrom), half_map.shape[-1]
    halves = torch.from_numpy(np.asarray(half_map, np.float32)).to(context.device)
    sphere = soft_sphere(box, voxel, (params.mask_diameter_angstrom or 0.85 * box * voxel) / 2, 10.0, device=context.device)
    curves = cone_fsc(halves[0] * sphere, halves[1] * sphere)
    even, empty = float("nan"), float("nan")
    if rot_deg is not None and tilt_deg is not None and psi_deg is not None:
        angles = (torch.deg2rad(torch.from_numpy(np.asarray(a, np.float64))) for a in (rot_deg, tilt_deg, psi_deg))
        poses = euler_to_matrix(*angles).numpy()
        even, empty = sampling(np.concatenate([poses @ g for g in symmetry_operators(params.symmetry or "C1")]))
    return {
        "cone_axis": cone_axes(),
        "cone_fsc": curves,
        "cone_resolution_angstrom": cone_resolutions(curves, box * voxel),
        "cone_frequency": np.arange(box // 2 + 1) / (box * voxel),
        "cone_area_ratio": cone_area_ratio(curves),
        "view_sampling": even,
        "unreached_share": empty,
    }


def warnings(result: Mapping[str, Any]) -> list[str]:
    """Warnings of orientation bias, in words."""
    even, empty, ratio = (float(result[name]) for name in ("view_sampling", "unreached_share", "cone_area_ratio"))
    out = [f"views sample Fourier space unevenly ({even:.2f})"] if even < LEAST_SAMPLING else []
    out += [f"no view reaches {100 * empty:.0f} % of the directions"] if empty > MOST_UNREACHED else []
    return out + ([f"half-maps agree far less in some directions ({ratio:.2f})"] if ratio < LEAST_RATIO else [])


@orientation.sentence
def says(result: Mapping[str, Any]) -> str:
    """Best and worst direction, and the warnings."""
    cones = np.asarray(result["cone_resolution_angstrom"])
    said = warnings(result)
    if said:
        verdict = f"; orientation bias: {', '.join(said)}"
    else:
        verdict = (
            ", no bias" if np.isfinite(float(result["view_sampling"])) else "; how evenly the views sample them is unknown without poses"
        )
    return f"{cones.min():.1f} to {cones.max():.1f} A by direction{verdict}"


@orientation.figures
def draw(ds: xr.Dataset) -> Iterator[Picture]:
    """FSC of the cones, and their resolution over the sphere."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    # the first shells have too few points in a cone
    frequency, curves = ds["cone_frequency"].values[_FIRST_SHELL:], ds["cone_fsc"].values[:, _FIRST_SHELL:]
    left.fill_between(frequency, curves.min(0), curves.max(0), color="#bbccdd", label="lowest to highest cone")
    left.plot(frequency, np.median(curves, 0), color="black", label="median cone")
    left.axhline(0.143, color="black", lw=0.6, ls=":")
    left.set(ylabel="FSC", ylim=(-0.1, 1.03))
    resolution_axis(left, float(frequency[-1]))
    left.legend(frameon=False)
    x, y, z = ds["cone_axis"].values.T
    radius = np.sqrt(np.clip(1.0 - z, 0.0, None))
    flat = np.hypot(x, y).clip(1e-9)
    cones = ds["cone_resolution_angstrom"].values
    scale = resolution_colours(float(cones.min()), float(cones.max()))
    right.scatter(radius * x / flat, radius * y / flat, c=scale.to_rgba(cones), s=60)
    right.set(aspect="equal", xticks=[], yticks=[])
    right.set_title("directions, seen along z (equal area)", fontsize=9)
    figure.colorbar(scale, ax=right, label="resolution, Å").ax.invert_yaxis()
    caption = (
        "FSC of the half-maps in cones with a half-angle of 20 degrees. "
        + says({str(name): ds[name].values for name in ds.data_vars})
        + "."
    )
    yield Picture("Resolution by direction", caption, figure)
