"""Stage ``ctf_refine``: defocus of particles, astigmatism of micrographs and aberrations of optics groups, from a refined map."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from cryodask.stage import Output, Params, Picture, stage
from cryodask.stages._map_pictures import resolution_axis
from cryodask.stages._symmetry import PointGroup
from cryodask.vocabulary import ABERRATIONS

if TYPE_CHECKING:
    import xarray as xr


class CtfRefineParams(Params):
    """Parameters of ``ctf_refine``."""

    symmetry: PointGroup | None = Field(None, description="point group: C1, C4, D2, T, O, I ...; by default that of the map")
    defocus: bool = Field(True, description="refine the defocus of each particle")
    astigmatism: bool = Field(True, description="refine the astigmatism of each micrograph")
    tilt: bool = Field(True, description="refine the beam tilt of each optics group")
    trefoil: bool = Field(True, description="refine the trefoil of each optics group")
    tetrafoil: bool = Field(False, description="refine the tetrafoil of each optics group")
    magnification: bool = Field(True, description="refine the anisotropic magnification of each optics group")
    rounds: int = Field(3, ge=1, le=10, description="number of rounds; the half-maps are reconstructed before each")
    from_angstrom: float = Field(20.0, gt=0, description="lowest resolution used in the fits, Angstrom")
    least_particles: int = Field(100, ge=2, description="optics groups with fewer particles keep their aberrations")
    mask_diameter_angstrom: float | None = Field(
        None, gt=0, description="diameter of the soft spherical mask, Angstrom, where no mask is given; by default 0.85 of the box"
    )


@stage(
    version=1,
    shape="blocks",
    needs=["particle_image", "final_map", "map_pixel_size_angstrom", "rot_deg", "tilt_deg", "psi_deg"],
    optional=["solvent_mask"],
    ports=["exposures[ctf, optics, aberrations?]", "particles[image, pose, ctf?]", "map[final]", "mask?!:mask[mask]"],
    outputs=[Output("particles", "particles", ("ctf",), on="particles")],
    gives=[
        "particle_defocus_u_angstrom", "particle_defocus_v_angstrom", "particle_defocus_angle_deg", "particle_phase_shift_deg",
        "ctf_b_factor_angstrom2", "ctf_scale_factor", *ABERRATIONS, "aberration_count", "aberration_fitted", "aberration_value",
        "aberration_deviation", "defocus_change_angstrom", "defocus_spread_angstrom", "refinement_frequency", "fsc_before", "fsc_after",
        "resolution_before_angstrom", "resolution_after_angstrom",
    ],
    params=CtfRefineParams,
    functions="cryodask.stages._ctf_refine",
)  # fmt: skip
class ctf_refine:
    """Refine the CTF of particles, micrographs and optics groups, each particle against the half-map that it is not in.

    The half-maps are reconstructed from the particles at their poses. Each particle is compared with the map of the other half, so that
    the fits do not see its own noise, in the range from ``from_angstrom`` to where the half-maps' FSC falls below 0.143. The defocus
    of a particle is the mean of its posterior, whose prior is a Gaussian about the mean of its micrograph; the width of the prior is
    estimated from all particles. Odd aberrations, anisotropic magnification and tetrafoil belong to an optics group (data set and optics)
    and are left unchanged in groups of fewer than ``least_particles`` particles (Zivanov et al. 2018, 2020). Signs are RELION's.

    Later steps correct the images for beam tilt, trefoil and magnification when they read them. The export writes everything for RELION,
    and for cryoSPARC beam tilt and magnification. The FSC of the half-maps before and after shows whether the refinement has helped.
    """


@ctf_refine.sentence  # type: ignore[attr-defined]  # mypy does not see what class decorators return
def says(result: Mapping[str, Any]) -> str:
    """The change of resolution, and which groups were too small."""
    before, after = (float(result[f"resolution_{name}_angstrom"]) for name in ("before", "after"))
    curves = np.asarray(result["fsc_before"]), np.asarray(result["fsc_after"])
    change = float((curves[1] - curves[0])[len(curves[0]) // 4 :].mean())
    helped = "" if change > 0 else "; the half-maps agree no better than before"
    small = np.asarray(result["aberration_count"])[~np.asarray(result["aberration_fitted"], bool)]
    groups = "an optics group" if len(small) == 1 else f"{len(small)} optics groups"
    few = f"; aberrations of {groups} with {', '.join(map(str, small[:5]))} particles not fitted" if len(small) else ""
    return f"half-maps agree to {after:.2f} A (before: {before:.2f} A){helped}{few}"


@ctf_refine.figures  # type: ignore[attr-defined]  # mypy does not see what class decorators return
def draw(ds: xr.Dataset) -> Iterator[Picture]:
    """FSC before and after, changes of defocus, and the phase errors of the optics groups."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    frequency = ds["refinement_frequency"].values
    left.plot(frequency, ds["fsc_before"].values, color="#888888", label="before")
    left.plot(frequency, ds["fsc_after"].values, color="black", label="after")
    left.axhline(0.143, color="black", lw=0.6, ls=":")
    left.set(ylabel="FSC of the half-maps", ylim=(-0.1, 1.03))
    resolution_axis(left, float(frequency[-1]))
    left.legend(frameon=False)
    right.hist(ds["defocus_change_angstrom"].values, bins=60, color="steelblue")
    right.set(xlabel="change of defocus, Å", ylabel="particles")
    right.locator_params(axis="y", integer=True)
    spread = float(ds["defocus_spread_angstrom"])
    yield Picture(
        "CTF refinement",
        "FSC of masked half-maps reconstructed at the same poses before and after, and the change of each particle's defocus. "
        f"The defocus of the particles scatters by {spread:.0f} Å about the mean of their micrograph.",
        figure,
    )
    yield _draw_groups(ds)


def with_deviation(value: float, deviation: float) -> str:
    """A value to the first significant digit of its standard deviation: ``-1.15 ± 0.08``."""
    digits = max(0, -math.floor(math.log10(deviation))) if deviation > 0 else 3
    return f"{value:.{digits}f} ± {deviation:.{digits}f}"


def _draw_groups(ds: xr.Dataset) -> Picture:
    from matplotlib.figure import Figure

    values, deviations = ds["aberration_value"].values, ds["aberration_deviation"].values
    figure = Figure(figsize=(9, 0.6 + 0.35 * (len(values) + 1)), layout="constrained")
    axes = figure.subplots()
    axes.set_axis_off()
    text = [
        [with_deviation(value, deviation) if np.isfinite(deviation) else "not fitted" for value, deviation in zip(*rows)]
        for rows in zip(values, deviations)
    ]
    names = [
        name.replace("_angstrom3", "\nÅ³").replace("_angstrom4", "\nÅ⁴").replace("_mrad", "\nmrad").replace("_", " ")
        for name in ABERRATIONS
    ]
    rows = [f"group {g + 1}: {n}" for g, n in enumerate(ds["aberration_count"].values)]
    table = axes.table(text, colLabels=names, rowLabels=rows, loc="center")
    table.auto_set_font_size(False)
    table.set_fontsize(6)
    table.scale(1.0, 1.6)
    return Picture(
        "Aberrations", "Fitted aberrations of each optics group with their standard deviations, and its number of particles.", figure
    )
