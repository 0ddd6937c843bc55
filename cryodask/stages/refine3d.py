"""Refinement of one map against particles, in two independent halves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from cryodask.stage import MapFile, Output, Params, Picture, port, stage
from cryodask.stages._symmetry import PointGroup

if TYPE_CHECKING:
    import xarray as xr


class Refine3DParams(Params):
    """Parameters of ``refine3d``."""

    symmetry: PointGroup | None = Field(None, description="point group: C1, C4, D2, T, O, I ...; by default that of the starting map")
    reference: MapFile | None = Field(None, description="starting map, an MRC file; by default the map of an earlier step")
    lowpass_angstrom: float | None = Field(
        None, gt=0, description="low-pass of the starting map, Angstrom; by default 28 for the map of an earlier step, 40 for a file"
    )
    mask_diameter_angstrom: float | None = Field(
        None, gt=0, description="diameter of the soft spherical mask, Angstrom; by default 0.75 of the box"
    )
    shift_range_angstrom: float | None = Field(
        None, gt=0, description="largest shift of a particle from its pick, Angstrom; by default 0.17 of the mask diameter"
    )
    iterations: int = Field(
        20, ge=1, description="maximum number of passes over all particles; the refinement ends earlier when nothing improves"
    )
    seed: int = Field(0, description="seed of all random numbers")


@stage(
    version=8,
    shape="blocks",
    needs=["particle_image", "final_map", "map_pixel_size_angstrom"],
    ports=[
        "exposures[ctf, optics, aberrations?]",
        port("particles[image, ctf?]", subtracted=True),
        port("map[final]", unless="reference"),
    ],
    outputs=[
        Output("particles", "particles", ("pose",), on="particles", frame="same"),
        Output("map", "map", ("final", "half_maps", "fsc", "verdict"), frame="same"),
    ],
    gives=[
        "half_map", "final_map", "map_pixel_size_angstrom", "rot_deg", "tilt_deg", "psi_deg", "centre_y_angstrom", "centre_x_angstrom",
        "log_likelihood", "in_map", "resolution_angstrom", "fsc_unmasked", "fsc_masked", "fsc_randomised", "fsc_corrected",
        "shell_resolution_angstrom", "iteration_resolution_angstrom", "succeeded", "pose_certainty", "held_out_gain", "held_out_z",
        "explained_share", "view_coverage", "fourier_coverage", "cut_share", "iteration_log_likelihood", "iteration_certainty",
    ],
    params=Refine3DParams,
    functions="cryodask.stages._refine3d",
)  # fmt: skip
class refine3d:
    """Refine a map against the particles, in two independent halves (gold standard), and judge whether it succeeded.

    Expectation maximisation over orientations, in-plane angles and shifts with Gaussian noise per Fourier ring (Scheres 2012, J. Mol.
    Biol. 415, 406). Poses are first drawn from their whole posterior, which keeps noise from being aligned to the starting map, with a new
    map after every few hundred particles. Then all views are searched: the likeliest of a coarse grid climb to optima of pose and shift
    (Levenberg-Marquardt), and poses are drawn about these by their share of the posterior and its width. Small sets get several maps
    per pass. Finally, each pose is refined from its current value, and the map is made from these optima. The noise is measured per data
    set and optics group, the contrast per micrograph.

    Each half is solvent-flattened with its own mask. Slices are inserted well beyond the scored rings, so that the correlation of
    the half-maps there is unbiased. The correlation within the molecule sets the resolution limit of the next pass; the reported
    resolution is that of the whole sphere.

    The first search over all views covers shifts up to three times their spread; later ones cover shifts about a particle's last one, up
    to 0.9 of the resolution of the search or 0.06 of the mask diameter, whichever is larger. The prior stays centred on zero. For particles
    that are much less likely than the others (two standard deviations), the first local pass searches all views and the whole range of
    shifts once more. What is still three below the mean is left out of the map (``in_map``).

    If detail of the map fails to help at least one particle in eight more than noise explains, these particles are treated as junk and
    left out (``in_map``), and the refinement starts again; if the poses were certain anyway, it continues from the current map.

    Half-maps that agree do not prove that a map is right. The verdict rests on two other figures: how certain the poses are, and
    whether detail of the map makes particles likelier that it has never seen. A map that passes is still refused if it explains too little
    of its particles' signal (wrong point group, two molecules), if the views reach less than half of Fourier space, or if density lies
    outside the mask; the verdict says which. A refinement that has not succeeded reports the low-pass of its starting map, and no
    resolution of its own. Parts of Fourier space that no view reaches count as noise in the resolution.
    """


@refine3d.sentence  # type: ignore[attr-defined]  # mypy does not see what class decorators return
def says(result: Mapping[str, Any]) -> str:
    """The most important figure, and the verdict."""
    from cryodask.kernels.verdict import FIGURES, Evidence

    evidence = Evidence(**{name: float(result[name]) for name in FIGURES if name in result})
    figure = f"{float(result['resolution_angstrom']):.2f} A"
    if evidence.succeeded:
        return f"resolution {figure}, {evidence.sentence()}"
    return f"{evidence.sentence()}; its starting map was cut at {figure}"


@refine3d.figures  # type: ignore[attr-defined]  # mypy does not see what class decorators return
def draw(ds: xr.Dataset) -> Iterator[Picture]:
    """The evidence in one picture with the verdict, the map, and both halves."""
    from cryodask.kernels.verdict import FIGURES
    from cryodask.stages._map_pictures import draw_slices
    from cryodask.stages._verdict_pictures import draw_evidence, draw_halves

    if "fsc_corrected" in ds and "succeeded" in ds:
        yield draw_evidence(ds, says({name: ds[name].values for name in ("resolution_angstrom", *FIGURES) if name in ds}))
    if "final_map" in ds:
        yield draw_slices(
            ds["final_map"].values,
            float(ds["map_pixel_size_angstrom"]),
            "Refined map",
            "Sections and projections of the refined, unsharpened map.",
        )
    if "half_map" in ds:
        yield draw_halves(ds["half_map"].values, float(ds["map_pixel_size_angstrom"]), float(ds["resolution_angstrom"]))
