"""Stage ``expand``: symmetry expansion, one copy of each particle per operator of a point group."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from pydantic import Field

from cryodask.errors import InputError
from cryodask.products import Product
from cryodask.stage import Output, Params, SetView, stage
from cryodask.stages._symmetry import PointGroup, order_of
from cryodask.store.identity import MOST_COPIES, copy_of

_EULER = ("rot_deg", "tilt_deg", "psi_deg")
_SHARED = ("centre_y_angstrom", "centre_x_angstrom", "log_likelihood")
"""Columns that all copies of a particle share."""


class ExpandParams(Params):
    """Parameters of ``expand``."""

    symmetry: PointGroup | None = Field(None, description="point group: C4, D2, T, O, I ...; by default that of the map")


def _check(params: ExpandParams, inputs: dict[str, list[Product]]) -> Iterator[str]:
    base = inputs["map"][0]
    group = params.symmetry or base.point_group
    if group in (None, "C1"):
        yield "there is nothing to expand in C1. Set symmetry, or use a symmetric map."
    if base.point_group not in (None, group):
        yield f"{group} is not the symmetry of the map of {base.ref} ({base.point_group}); copies would not overlay. Leave symmetry out."
    elif order_of(group) > MOST_COPIES:
        yield f"{group} has {order_of(group)} operators, but a particle can have at most {MOST_COPIES} copies. Expand a subgroup."


@stage(
    version=1,
    shape="set",
    needs=[],
    gives=[*_EULER, *_SHARED],
    ports=["particles[pose]", "map[final]"],
    outputs=[Output("particles", "particles", ("pose",), on="particles", copies="expand", frame="same")],
    check=_check,
)
def expand(params: ExpandParams, inputs: dict[str, list[SetView]]) -> dict[str, Any]:
    """Give every particle one copy per operator of the point group, for work on a single asymmetric unit.

    All copies of a particle share its image, half-set and centre. The orientation of copy k is ``A g_k``, where A is that of the particle
    and g_k the k-th operator (the first is the identity): a map with this symmetry looks the same from all of them, so that every
    asymmetric unit is placed once at the first one. Later steps work without symmetry (C1).
    """
    view = inputs["particles"][0]
    if params.symmetry is None:
        raise InputError("The point group to expand is unknown.", "the map was imported without one", "set expand.symmetry")
    operators = _operators(params.symmetry)
    if copy_of(view.ids).any():
        raise InputError(f"The particles of {view.name} are copies already.", "they were expanded twice", "contract them first")
    if not len(view.ids):
        raise InputError("expand got no particles.", "", "check the step before it")
    count = len(operators)
    pose = view.read(["pose"])
    ids = (view.ids[:, None] | np.arange(1, count + 1, dtype=np.int64)).ravel()
    shared = {name: np.repeat(pose[name], count) for name in _SHARED if name in pose}
    angles = _turned([np.asarray(pose[name], np.float64) for name in _EULER], operators)
    turned = {name: values.astype(np.float32).ravel() for name, values in zip(_EULER, angles)}
    for name in _EULER:  # exactly the particle's own angles, not an equivalent set
        turned[name][::count] = pose[name]
    nobody = {"dropped_id": np.zeros(0, np.int64), "removal_reason": np.zeros(0, np.int8)}
    return {"particle_id": ids, **nobody, **turned, **shared}


def _operators(symmetry: str) -> np.ndarray:
    """Operators `(k, 3, 3)`, the identity first; at least two, and as many as an id can number."""
    from cryodask.kernels.symmetry import symmetry_operators

    operators = symmetry_operators(symmetry)
    if len(operators) == 1:
        raise InputError(f"There is nothing to expand in {symmetry}.", "", "leave out expand, or set the symmetry of the map")
    if len(operators) > MOST_COPIES:
        raise InputError(
            f"{symmetry} has {len(operators)} operators, but a particle can have at most {MOST_COPIES} copies.",
            "",
            "expand a subgroup of it",
        )
    return operators


def _turned(angles_deg: list[np.ndarray], operators: np.ndarray) -> tuple[np.ndarray, ...]:
    """Euler angles (rot, tilt, psi), degrees, each `(particle, operator)`, of the orientations rotated by every operator."""
    import torch

    from cryodask.kernels.orientations import euler_to_matrix, matrix_to_euler

    own = euler_to_matrix(*(torch.deg2rad(torch.from_numpy(a)) for a in angles_deg))
    out = tuple(np.empty((len(angles_deg[0]), len(operators))) for _ in range(3))
    for k, g in enumerate(operators):
        for column, angle in zip(out, matrix_to_euler(own @ torch.from_numpy(np.array(g)))):
            column[:, k] = torch.rad2deg(angle).numpy()
    return out
