"""Continuous variability of particles at known poses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from cryodask.stage import Output, Params, Picture, port, stage
from cryodask.stages._symmetry import PointGroup

if TYPE_CHECKING:
    import xarray as xr

MOST = 6
LEAST_AGREEMENT = 0.4
"""Canonical correlation of the components of the half-sets below which they count as noise."""


class VariabilityParams(Params):
    """Parameters of ``variability``."""

    components: int = Field(2, ge=1, le=MOST, description="number of components")
    symmetry: PointGroup | None = Field(None, description="point group: C1, C4, D2, T, O, I ...; by default that of the map")
    resolution_angstrom: float = Field(14.0, gt=3, description="finest resolution of the components, Angstrom")
    mask_diameter_angstrom: float | None = Field(
        None, gt=0, description="diameter of the soft spherical mask, Angstrom; by default 0.75 of the box"
    )
    iterations: int = Field(20, ge=1, description="number of iterations")
    seed: int = Field(0, description="random seed of the start")


@stage(
    version=1,
    shape="blocks",
    needs=["particle_image", "final_map", "map_pixel_size_angstrom"],
    optional=["solvent_mask"],
    ports=[
        "exposures[ctf, optics, aberrations?]",
        port("particles[image, pose, ctf?]", copies=True, subtracted=True, whole=True),
        "map[final]",
        "mask?!:mask[mask]",
    ],
    outputs=[Output("particles", "particles", ("components",), on="particles")],
    gives=[
        *(f"component{j}" for j in range(1, MOST + 1)), "component_map", "component_series", "component_strength", "component_agreement",
        "component_gain", "map_pixel_size_angstrom",
    ],
    params=VariabilityParams,
    functions="cryodask.stages._variability",
)  # fmt: skip
class variability:
    """Find how particles differ continuously, as coordinates along principal components of the map.

    Probabilistic principal component analysis at fixed poses by expectation maximisation (Tipping and Bishop 1999, J. R. Stat. Soc. B 61,
    611; Tagare et al. 2015, J. Struct. Biol. 191, 245). Each particle is modelled as the mean map plus the components times its
    coordinates (``component1``, ``component2``, ..., in standard deviations); the report shows maps from -2 to 2 along each. A linear
    component describes a small motion; a large one shows as density that vanishes in one place and appears in another.

    The mask (``from: {mask: STEP}``) decides what can be found, because components also fit the noise inside it: put it around the part
    that moves. Components that the half-sets do not find independently are reported as noise. ``select`` selects particles by coordinate.
    """


@variability.sentence  # type: ignore[attr-defined]  # mypy does not see what class decorators return
def says(result: Mapping[str, Any]) -> str:
    """How many components both half-sets find."""
    found = np.asarray(result["component_agreement"])
    real = int((found >= LEAST_AGREEMENT).sum())
    text = ", ".join(f"{value:.2f}" for value in found)
    if not real:
        return f"the components are noise: those of the half-sets do not agree (correlation {text})"
    noise = f"; {len(found) - real} of {len(found)} are noise" if real < len(found) else ""
    return f"{real} component{'s' if real > 1 else ''} found by both half-sets (correlation {text}){noise}"


@variability.figures  # type: ignore[attr-defined]  # mypy does not see what class decorators return
def draw(ds: xr.Dataset) -> Iterator[Picture]:
    """Maps along the components, and the coordinates of the particles."""
    from cryodask.stages._class_pictures import draw_coordinates, draw_series

    if "component_series" in ds:
        sentence = says({"component_agreement": ds["component_agreement"].values})
        yield draw_series(ds["component_series"].values, ds["component_strength"].values, sentence)
    names = [f"component{j}" for j in range(1, MOST + 1) if f"component{j}" in ds]
    if names:
        yield draw_coordinates(np.stack([ds[name].values for name in names], 1))
