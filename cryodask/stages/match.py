"""Stage ``match``: finds the particles of one set in another by position."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from pydantic import Field

from cryodask.products import Product
from cryodask.stage import Output, Params, SetView, stage
from cryodask.stages._sets import exposures_of, kept_and_dropped, places_of

REASONS = {
    1: "no particle of the matched set is within nearer_than_angstrom",
    2: "the nearest particle of the matched set has a closer partner",
}
"""Meaning of the numbers in ``removal_reason``."""


class MatchParams(Params):
    """Parameters of ``match``."""

    nearer_than_angstrom: float = Field(
        gt=0, description="two particles closer than this in one exposure are the same, Angstrom; a quarter of the diameter is a good value"
    )


def _check(params: MatchParams, inputs: dict[str, list[Product]]) -> Iterator[str]:
    a, b = inputs["particles"][0], inputs["to"][0]
    if a.ref == b.ref and a.at == b.at:
        yield f"both sets come from {a.ref}."
    if not a.sources & b.sources:
        yield f"{a.ref} and {b.ref} come from different exposures, so coordinates cannot match."


@stage(
    version=1,
    shape="set",
    needs=[],
    gives=["unmatched_count", "half_conflict_count"],
    ports=["particles[position]", "to!:particles[position]"],
    outputs=[Output("particles", "particles", on="to", subset=True)],
    check=_check,
    reasons=REASONS,
)
def match(params: MatchParams, inputs: dict[str, list[SetView]]) -> dict[str, Any]:
    """Transfer a selection of particles to a set that was picked independently.

    Keeps the particles of ``to`` that have a partner in ``particles``: the two are mutual nearest neighbours in the exposure and closer
    than ``nearer_than_angstrom``, so a particle has at most one partner. The kept particles have all values of ``to``,
    including half-sets. ``unmatched_count`` is the number of ``particles`` without a partner, ``half_conflict_count``
    the number of pairs whose two particles are in different half-sets.
    """
    own, to = inputs["particles"][0], inputs["to"][0]
    pairs, near = _partners(own, to, params.nearer_than_angstrom)
    reason = np.where(near, 2, 1).astype(np.int8)
    reason[pairs[:, 1]] = 0
    result = kept_and_dropped(
        to.ids,
        reason,
        stage="match",
        usual_reason="the two sets were picked in different exposures, or their coordinates differ in origin or pixel size",
        way_out="compare the picks of one micrograph, or raise nearer_than_angstrom",
    )
    conflicts = _differing_halves(own, to, pairs)
    return {**result, "unmatched_count": len(own.ids) - len(pairs), "half_conflict_count": conflicts}


def _differing_halves(own: SetView, to: SetView, pairs: np.ndarray) -> int:
    """Number of pairs whose particles are in different half-sets."""
    halves = [view.read(["position"]).get("half_set", np.full(len(view.ids), -1, np.int8)) for view in (own, to)]
    a, b = halves[0][pairs[:, 0]], halves[1][pairs[:, 1]]
    return int(((a >= 0) & (b >= 0) & (a != b)).sum())


def _partners(own: SetView, to: SetView, limit_angstrom: float) -> tuple[np.ndarray, np.ndarray]:
    """Pairs `(pair, 2)` of mutual nearest particles (index in ``own``, index in ``to``), and which of ``to`` are near one of ``own``."""
    from scipy.spatial import cKDTree

    mine, theirs = places_of(own), places_of(to)
    near = np.zeros(len(to.ids), bool)
    in_to = dict(exposures_of(to.ids, np.isfinite(theirs).all(1)))
    pairs = []
    for row, a in exposures_of(own.ids, np.isfinite(mine).all(1)):
        b = in_to.get(row)
        if b is None:
            continue
        _, nearest_b = cKDTree(theirs[b]).query(mine[a])
        distance, nearest_a = cKDTree(mine[a]).query(theirs[b])
        within = distance < limit_angstrom
        near[b] = within
        place = np.flatnonzero(within & (nearest_b[nearest_a] == np.arange(len(b))))
        pairs.append(np.stack([a[nearest_a[place]], b[place]], -1))
    return np.concatenate(pairs) if pairs else np.zeros((0, 2), np.int64), near
