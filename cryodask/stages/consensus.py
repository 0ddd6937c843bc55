"""Stage ``consensus``: particles on which two refinements agree."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from pydantic import Field

from cryodask.errors import InputError
from cryodask.products import Product
from cryodask.stage import Output, Params, SetView, stage
from cryodask.stages._sets import kept_and_dropped
from cryodask.stages._symmetry import PointGroup
from cryodask.store.identity import place_of

REASONS = {
    1: "it is not in the other set",
    2: "its orientations in the two sets differ",
    3: "its centres in the two sets differ",
    4: "its orientation is unknown in one of the two sets",
}
"""Meaning of the numbers in ``removal_reason``."""

_EULER = ("rot_deg", "tilt_deg", "psi_deg")
_CENTRE = ("centre_y_angstrom", "centre_x_angstrom")
_BATCH = 100_000
"""Particles compared at a time; an icosahedral group needs 60 numbers per particle."""


class ConsensusParams(Params):
    """Parameters of ``consensus``."""

    largest_degrees: float = Field(5.0, gt=0, le=180, description="largest angle between the two orientations of a particle, degrees")
    largest_angstrom: float | None = Field(
        None, gt=0, description="largest distance between its two centres, Angstrom; by default centres are not compared"
    )
    symmetry: PointGroup | None = Field(
        None, description="point group of the map: symmetry-equivalent orientations agree; by default that of the poses"
    )


def _check(params: ConsensusParams, inputs: dict[str, list[Product]]) -> Iterator[str]:
    a, b = inputs["particles"][0], inputs["other"][0]
    if a.ref == b.ref and a.at == b.at:
        yield f"both sets come from {a.ref}."
    if not a.births & b.births:
        yield (
            f"{a.ref} and {b.ref} hold different particles (picked by {', '.join(sorted(a.births))} and by "
            f"{', '.join(sorted(b.births))}). Use `match` to relate them by coordinates."
        )


@stage(
    version=1,
    shape="set",
    needs=[],
    gives=[],
    ports=["particles[pose]", "other!:particles[pose]"],
    outputs=[Output("particles", "particles", on="particles", subset=True)],
    check=_check,
    reasons=REASONS,
)
def consensus(params: ConsensusParams, inputs: dict[str, list[SetView]]) -> dict[str, Any]:
    """Keep the particles whose poses in two refinements agree.

    Orientations agree if the angle between them, the smallest over the point group, is at most ``largest_degrees``; centres agree if
    they are at most ``largest_angstrom`` apart. Both refinements must refer to the same frame. The result has the poses of
    ``particles``.
    """
    own, other = inputs["particles"][0], inputs["other"][0]
    at = place_of(own.ids, other.ids)
    reason = np.where(at >= 0, 0, 1).astype(np.int8)
    shared = np.flatnonzero(at >= 0)
    mine = {name: values[shared] for name, values in own.read(["pose"]).items()}
    theirs = {name: values[at[shared]] for name, values in other.read(["pose"]).items()}
    angles = _angle_deg(mine, theirs, params.symmetry or "C1")
    of_shared = np.where(np.isnan(angles), 4, np.where(angles <= params.largest_degrees, 0, 2)).astype(np.int8)
    if params.largest_angstrom is not None:
        lacking = [view.name for view, given in ((own, mine), (other, theirs)) if any(name not in given for name in _CENTRE)]
        if lacking:
            raise InputError(
                f"largest_angstrom compares centres, but the poses of {' and '.join(lacking)} have none.",
                "they were imported without shifts",
                "leave out largest_angstrom",
            )
        apart = np.hypot(*(np.asarray(mine[name], float) - np.asarray(theirs[name], float) for name in _CENTRE))
        of_shared[(of_shared == 0) & ~(apart <= params.largest_angstrom)] = 3
    reason[shared] = of_shared
    return kept_and_dropped(
        own.ids,
        reason,
        stage="consensus",
        usual_reason="the two refinements have different axes or hands, or the limits are too strict",
        way_out="compare the two maps, or raise largest_degrees or largest_angstrom",
    )


def _angle_deg(a: dict[str, np.ndarray], b: dict[str, np.ndarray], symmetry: str) -> np.ndarray:
    """Smallest angle `(n,)`, degrees, between two orientations of each particle; NaN where one is unknown."""
    import torch

    from cryodask.kernels.orientations import angular_error_deg, euler_to_matrix
    from cryodask.kernels.symmetry import symmetry_operators

    operators = np.array(symmetry_operators(symmetry))
    angles = [[torch.deg2rad(torch.from_numpy(np.array(pose[name], np.float64))) for name in _EULER] for pose in (a, b)]
    out = np.empty(len(angles[0][0]))
    for start in range(0, len(out), _BATCH):
        first, second = (euler_to_matrix(*(angle[start : start + _BATCH] for angle in pose)) for pose in angles)
        out[start : start + _BATCH] = angular_error_deg(first, second, operators).numpy()
    return out
