"""Three-dimensional classification, at known poses or with alignment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import Field

from cryodask.products import Product
from cryodask.stage import AddedMark, Output, Params, Picture, port, stage
from cryodask.stages._symmetry import PointGroup

if TYPE_CHECKING:
    import xarray as xr

LEAST_GAIN_Z = 7.0
_ALIKE = 0.35
"""Classes that are expected to exchange more than this share of their particles are reported as alike."""
_EMPTY = 0.01
"""Share below which a class counts as empty."""


class Classify3DParams(Params):
    """Parameters of ``classify3d``."""

    classes: int = Field(3, ge=2, le=50, description="number of classes; with `align`, those beyond the given maps start as decoys")
    align: Annotated[bool, AddedMark] = Field(
        False, description="align every particle to the map of every class, instead of comparing them at fixed poses"
    )
    symmetry: PointGroup | None = Field(None, description="point group: C1, C4, D2, T, O, I ...; by default that of the map")
    resolution_angstrom: float = Field(10.0, gt=3, description="finest resolution used to compare particles with the classes, Angstrom")
    mask_diameter_angstrom: float | None = Field(
        None, gt=0, description="diameter of the soft spherical mask, Angstrom; by default 0.75 of the box"
    )
    lowpass_angstrom: Annotated[float | None, AddedMark] = Field(
        None,
        gt=0,
        description="with `align`: low-pass of the given maps, Angstrom; by default 28, or what the maps have if that is coarser",
    )
    shift_range_angstrom: Annotated[float | None, AddedMark] = Field(
        None, gt=0, description="with `align`: largest shift of a particle from its pick, Angstrom; by default 0.17 of the mask diameter"
    )
    iterations: int = Field(30, ge=1, description="maximum number of iterations per start; with `align`, of passes over the particles")
    restarts: int = Field(
        4, ge=1, le=20, description="maximum number of starts, each from a different clustering of the particles; the likeliest wins"
    )
    seed: int = Field(0, description="random seed of the starts")


def outputs(params: Any) -> tuple[Output, ...]:
    """All particles with their class, and for each class its particles and its map; with alignment, their poses, in a frame per class."""
    parts, frame = (("class3d", "pose"), "new") if params.align else (("class3d",), "same")
    found = [Output("particles", "particles", parts, on="particles", partition=True, frame="new" if params.align else "")]
    for k in range(1, int(params.classes) + 1):
        found.append(Output(f"class{k}", "particles", on="particles", subset=True))
        found.append(Output(f"class{k}", "map", ("final", "half_maps"), frame=frame))
    return tuple(found)


def check(params: Any, inputs: dict[str, list[Product]]) -> Iterator[str]:
    """Maps and masks that do not suit the way of classifying."""
    maps = inputs.get("maps", [])
    if not params.align:
        if maps:
            yield "a list of maps needs alignment: set align: true, or give one map (from: {map: ...}) with the poses that belong to it."
        return
    if len(maps) == 1:
        yield f"one map is not a list: write from: {{map: {maps[0].ref}}}; the other classes start as decoys."
    if len(maps) > params.classes:
        yield f"{len(maps)} maps are given for {params.classes} classes. Set classes: {len(maps)}, or more for decoys."
    if inputs.get("mask"):
        yield "a mask needs fixed poses. Leave out the mask, or classify the particles of one class with align: false afterwards."
    if any(p.copies > 1 for p in inputs.get("particles", [])):
        yield "the symmetry copies of a particle must keep their poses. Set align: false, or put contract before this step."


@stage(
    version=1,
    shape="blocks",
    needs=["particle_image", "final_map", "map_pixel_size_angstrom"],
    optional=["solvent_mask", "maps_final_map", "maps_map_pixel_size_angstrom"],
    ports=[
        "exposures[ctf, optics, aberrations?]",
        port("particles[image, pose, ctf?]", copies=True, subtracted=True, parts_without={"pose": "align"}),
        port("map[final]", instead="maps"),
        "maps*?:map[final]",
        "mask?!:mask[mask]",
    ],
    outputs=outputs,
    check=check,
    gives=[
        "class3d_number", "class3d_probability", "class_map", "class_half_map", "map_pixel_size_angstrom", "class3d_share",
        "class3d_resolution_angstrom", "class3d_separation", "class3d_confusion", "iteration_class_share", "iteration_changed_share",
        "start_score", "class_gain", "class_gain_z", "rot_deg", "tilt_deg", "psi_deg", "centre_y_angstrom", "centre_x_angstrom",
        "log_likelihood",
    ],
    params=Classify3DParams,
    functions="cryodask.stages._classify3d_ways",
)  # fmt: skip
class classify3d:
    """Sort particles into three-dimensional classes, at fixed poses or with alignment.

    Expectation maximisation over classes with Gaussian noise per Fourier ring; the map of each class is filtered by the FSC of its
    own half-maps (Scheres 2012, J. Mol. Biol. 415, 406). It starts from clusters (k-means) of the particles in the space of their
    principal components (Tipping and Bishop 1999, J. R. Stat. Soc. B 61, 611): from a random start, a missing domain is found,
    but a domain that moves is not.

    A mask (``from: {mask: STEP}``) focuses the classification: outside it all classes share the consensus map, which has the same effect
    as signal subtraction. Small differences are only found with a mask around the part that differs.

    Poses are kept fixed, so they must be accurate enough to resolve the difference. For one asymmetric unit of a symmetric molecule,
    put ``expand`` first and mask the unit; copies of a particle stay in its half-set. Classes are sorted by size. Whether they are
    real is tested with the particles of the other half-set: do the classes explain them better than one map does? How many particles are
    expected to be in the wrong class follows from the distance between the maps in units of the noise.

    With ``align``, particles need no poses: each is aligned to the map of every class (``from: {maps: [STEP, STEP.class2]}``, or one map),
    and its evidence for a class is the likelihood summed over all poses and shifts (Scheres et al. 2007, Nat. Methods 4, 27). Classes
    beyond the given maps start as decoys, a ball and maps with random phases, which collect junk. Classes stay in the order of the maps,
    decoys last, each in the frame of its own map. The search begins at ``lowpass_angstrom`` and gets finer with the half-maps of the
    classes; first no map may take the particles of another, then shares are free. Whether the classes are real is tested with the maps of
    the other half-set, against one map of all particles; from these maps also follows how classes are confused.
    """


@classify3d.sentence  # type: ignore[attr-defined]  # mypy does not see what class decorators return
def says(result: Mapping[str, Any]) -> str:
    """Shares of the classes, and whether they are real."""
    shares, confusion = np.asarray(result["class3d_share"]), np.asarray(result["class3d_confusion"])
    there = np.nonzero(shares >= _EMPTY)[0]
    if len(there) < 2:
        return "all particles are in one class; the others emptied"
    text = f"{len(there)} classes of {', '.join(f'{100 * s:.0f} %' for s in shares[there])}"
    z = float(result["class_gain_z"])
    if float(result["class_gain"]) <= 0 or z < LEAST_GAIN_Z:
        return f"{text}; the data do not support them: the classes of one half-set explain the other half no better than a single map"
    right = float((shares * np.diag(confusion)).sum())
    text += f"; about {100 * right:.0f} % of the particles are expected to be in the right one"
    alike = [f"{a + 1} and {b + 1}" for a in there for b in there if a < b and min(confusion[a, b], confusion[b, a]) > _ALIKE]
    if alike:
        text += f"; classes {', '.join(alike)} are alike"
    if len(there) < len(shares):
        text += f"; {len(shares) - len(there)} became empty: ask for fewer"
    return text


@classify3d.figures  # type: ignore[attr-defined]  # mypy does not see what class decorators return
def draw(ds: xr.Dataset) -> Iterator[Picture]:
    """The maps of the classes, their sizes over the iterations, and the expected confusion."""
    from cryodask.stages._class_pictures import draw_aligned_classes, draw_class_maps, draw_confusion, draw_course

    aligned = "rot_deg" in ds
    if "class_map" in ds:
        yield (draw_aligned_classes if aligned else draw_class_maps)(
            ds["class_map"].values, ds["class3d_share"].values, ds["class3d_resolution_angstrom"].values,
            float(ds["map_pixel_size_angstrom"]), says({name: ds[name].values for name in _SAID}),
        )  # fmt: skip
    if "iteration_class_share" in ds:
        yield draw_course(ds["iteration_class_share"].values, ds["iteration_changed_share"].values)
        yield draw_confusion(ds["class3d_confusion"].values, ds["class3d_separation"].values, aligned=aligned)


_SAID = ("class3d_share", "class3d_confusion", "class_gain", "class_gain_z")
