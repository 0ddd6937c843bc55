"""Stage ``reslog``: resolution against the number of particles."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from cryodask.stage import Params, Picture, port, stage
from cryodask.stages._map_pictures import resolution_axis
from cryodask.stages._symmetry import PointGroup
from cryodask.vocabulary import Var, register

if TYPE_CHECKING:
    import xarray as xr

register(
    [
        Var("subset_count", ("subset",), "i8", "1", "number of particles of each subset, the whole set first"),
        Var("subset_resolution_angstrom", ("subset",), "f8", "angstrom", "resolution of the half-maps of each subset, NaN without one"),
        Var("subset_fsc", ("subset", "shell"), "f8", "1", "corrected FSC of the half-maps of each subset"),
        Var("reslog_b_factor_angstrom2", (), "f8", "angstrom^2", "B-factor of the line through 1/d^2 over ln N, NaN without a fit"),
        Var("reslog_intercept", (), "f8", "1/angstrom^2", "1/d^2 of the line at one particle"),
    ]
)


class ReslogParams(Params):
    """Parameters of ``reslog``."""

    fewest: int = Field(100, ge=20, description="particles of the smallest subset, at least")
    symmetry: PointGroup | None = Field(None, description="point group: C1, C4, D2, T, O, I ...; by default that of the map")
    mask_diameter_angstrom: float | None = Field(
        None, gt=0, description="diameter of the soft spherical mask, Angstrom; by default 0.75 of the box"
    )
    seed: int = Field(0, description="random seed of the subsets", ge=0)

    @property
    def resolution_angstrom(self) -> float:
        """Resolution to which particles at their poses are compared with the map that they belong to."""
        return 15.0


@stage(
    version=1,
    shape="blocks",
    needs=["particle_image", "final_map", "map_pixel_size_angstrom"],
    optional=["solvent_mask"],
    ports=[
        "exposures[ctf, optics, aberrations?]",
        port("particles[image, pose, ctf?]", copies=True, subtracted=True),
        "map[final]",
        port("mask?:mask[mask]", default="related"),
    ],
    outputs=[],
    gives=["subset_count", "subset_resolution_angstrom", "subset_fsc", "reslog_b_factor_angstrom2", "reslog_intercept",
           "map_pixel_size_angstrom"],
    params=ReslogParams,
    functions="cryodask.stages._reslog",
)  # fmt: skip
class reslog:
    """Measure how the resolution grows with the number of particles, and what twice as many would give.

    Half-maps are reconstructed from all particles, from half of them, a quarter and so on (ResLog; Stagg et al. 2014), and their FSC is
    corrected for the mask as in ``postprocess``. The number of particles needed for a resolution d grows as exp(B / (2 d^2)) (Rosenthal &
    Henderson 2003): the slope of 1/d^2 over ln N gives a B-factor for everything that weakens fine detail, from beam-induced motion and
    the camera to errors of the poses and differences between the molecules.

    All subsets keep the poses that were found with all particles. The figure says what averaging gains, not what a refinement of
    fewer particles would have reached. Smaller subsets are parts of the larger ones, so the points are not independent. The resolution is
    where the corrected FSC crosses 0.143, without the tests for doubtful maps that ``postprocess`` makes.
    """


def _resolution(square: float) -> str:
    return f"{square**-0.5:.2f} A"


@reslog.sentence  # type: ignore[attr-defined]  # mypy does not see what class decorators return
def says(result: Mapping[str, Any]) -> str:
    """The B-factor, and what twice as many particles would give."""
    counts, b_factor = np.asarray(result["subset_count"]), float(result["reslog_b_factor_angstrom2"])
    if np.isnan(b_factor):
        return (
            "no B-factor: fewer than three subsets have a resolution that is not limited by the pixel size, or it does not grow with them"
        )
    now = float(result["reslog_intercept"]) + 2.0 / b_factor * np.log(counts[0])
    return f"B-factor {b_factor:.0f} A^2; twice as many particles: {_resolution(now)} to {_resolution(now + 2.0 / b_factor * np.log(2.0))}"


@reslog.figures  # type: ignore[attr-defined]  # mypy does not see what class decorators return
def draw(ds: xr.Dataset) -> Iterator[Picture]:
    """1/d^2 over the number of particles with the line; FSC of the subsets."""
    from matplotlib.figure import Figure

    counts, resolution = ds["subset_count"].values, ds["subset_resolution_angstrom"].values
    b_factor, intercept = float(ds["reslog_b_factor_angstrom2"]), float(ds["reslog_intercept"])
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(counts, resolution**-2.0, "o", color="#1f77b4", label="half-maps of a subset")
    if np.isfinite(b_factor):
        more = np.geomspace(counts.min(), 4 * counts.max(), 50)
        left.plot(more, intercept + 2.0 / b_factor * np.log(more), color="black", lw=1.0, label="fit")
    left.set(xscale="log", xlabel="number of particles", ylabel="1/d², 1/Å²")
    left.legend(frameon=False)
    ticks = [tick for tick in left.get_yticks() if tick > 0]
    beside = left.secondary_yaxis("right")
    beside.set_yticks(ticks, [f"{tick**-0.5:.1f} Å" for tick in ticks])
    curves = ds["subset_fsc"].values
    pixel = float(ds["map_pixel_size_angstrom"])
    frequency = np.arange(curves.shape[1]) / (2.0 * pixel * (curves.shape[1] - 1))
    for number, (count, curve) in enumerate(zip(counts, curves)):
        right.plot(frequency, curve, color=str(0.75 * number / max(1, len(counts) - 1)), lw=1.2, label=f"{count:,}")
    right.axhline(0.143, color="black", lw=0.6, ls=":")
    right.set(ylabel="corrected FSC", ylim=(-0.1, 1.03))
    resolution_axis(right, float(frequency[-1]))
    right.legend(frameon=False, fontsize=7, title="particles", title_fontsize=7)
    sentence = says({str(name): ds[name].values for name in ds.data_vars})
    caption = (
        f"{sentence[0].upper()}{sentence[1:]}. All subsets keep the poses of the whole set, and smaller ones are parts of larger ones."
    )
    yield Picture("Resolution and number of particles", caption, figure)
