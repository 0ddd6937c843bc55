"""Two-dimensional classification of particles."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from cryodask.stage import Params, Picture, stage

if TYPE_CHECKING:
    import xarray as xr


class Classify2DParams(Params):
    """Parameters of ``classify2d``."""

    classes: int | None = Field(None, ge=1, le=200, description="number of classes; by default one per 60 particles, between 6 and 50")
    mask_diameter_angstrom: float | None = Field(
        None, gt=0, description="diameter of the soft circular mask, Angstrom; by default 0.75 of the box"
    )
    resolution_angstrom: float = Field(14.0, gt=4, description="finest resolution used for alignment, Angstrom")
    shift_range_angstrom: float | None = Field(
        None, gt=0, description="largest shift of a particle from its pick, Angstrom; by default 0.1 of the mask diameter"
    )
    iterations: int = Field(18, ge=1, description="iterations")
    seed: int = Field(0, description="seed of the random start")


@stage(
    version=3,
    shape="blocks",
    needs=["particle_image"],
    ports=["exposures[ctf, optics, aberrations?]", "particles[image, ctf?]"],
    gives=[
        "class_number", "class_probability", "class_psi_deg", "class_centre_y_angstrom", "class_centre_x_angstrom", "class_log_likelihood",
        "class_average", "class_share", "class_pixel_size_angstrom", "class_resolution_angstrom", "class_score",
    ],
    params=Classify2DParams,
    functions="cryodask.stages._classify2d",
)  # fmt: skip
class classify2d:
    """Sort particles into two-dimensional classes and average them.

    Expectation maximisation over classes, rotations and shifts with Gaussian noise per Fourier ring, in polar coordinates, where a
    matrix product and one short Fourier transform score all rotations at once. The start is random; resolution and sharpness of
    the posterior increase with the iterations; empty classes take over half of the largest. Class averages are centred on their centre
    of mass, and the particle centres with them. Every class gets a score from 0 (junk) to 1 (sharp average): the correlation of the
    averages of its even and odd particles over Fourier rings, times the compactness of the average, reduced if the average explains its
    particles poorly.
    """


@classify2d.sentence  # type: ignore[attr-defined]  # mypy does not see what class decorators return
def says(result: Mapping[str, Any]) -> str:
    """The most important figure."""
    return f"{len(result['class_share'])} classes"


@classify2d.figures  # type: ignore[attr-defined]  # mypy does not see what class decorators return
def draw(ds: xr.Dataset) -> Iterator[Picture]:
    """The class averages, best first."""
    from cryodask.stages._map_pictures import draw_classes

    if "class_average" in ds:
        yield draw_classes(*(ds[name].values for name in ("class_average", "class_score", "class_share", "class_resolution_angstrom")))
