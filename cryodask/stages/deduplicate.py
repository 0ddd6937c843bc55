"""Stage ``deduplicate``: keeps the best of particles that are too close to each other."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import Field

from cryodask.stage import Output, Params, SetView, stage
from cryodask.stages._sets import exposures_of, kept_and_dropped, places_of

REASONS = {1: "a better particle is within nearer_than_angstrom"}
"""Meaning of the numbers in ``removal_reason``."""


class DeduplicateParams(Params):
    """Parameters of ``deduplicate``."""

    nearer_than_angstrom: float = Field(
        gt=0, description="smallest distance between two particles of an exposure, Angstrom; half the particle diameter is a good value"
    )


@stage(
    version=1,
    shape="set",
    needs=[],
    gives=[],
    ports=["particles[position, score?]"],
    outputs=[Output("particles", "particles", on="particles", subset=True)],
    reasons=REASONS,
)
def deduplicate(params: DeduplicateParams, inputs: dict[str, list[SetView]]) -> dict[str, Any]:
    """Keep one of several particles that are within ``nearer_than_angstrom`` of each other in an exposure.

    Particles are taken in order of picking score, best first. One is dropped if it is too close to a particle already kept. Without
    scores, and on ties, the lower id comes first. Particles with unknown positions are kept.
    """
    view = inputs["particles"][0]
    places = places_of(view)
    score = np.zeros(len(view.ids))
    if "score" in view.parts:
        given = view.read(["score"]).get("pick_score")
        if given is not None:
            score = np.where(np.isnan(given), -np.inf, np.asarray(given, np.float64))
    reason = _too_near(view.ids, places, score, params.nearer_than_angstrom).astype(np.int8)
    return kept_and_dropped(
        view.ids, reason, stage="deduplicate", usual_reason="the set was empty before", way_out="check the step before it"
    )


def _too_near(ids: np.ndarray, places: np.ndarray, score: np.ndarray, limit_angstrom: float) -> np.ndarray:
    """Mask `(n,)` of the particles that are too close to a better one that is kept."""
    from scipy.spatial import cKDTree

    rank = np.empty(len(ids), np.int64)
    rank[np.lexsort((ids, -score))] = np.arange(len(ids))
    found = []
    for _, index in exposures_of(ids, np.isfinite(places).all(1)):
        pairs = cKDTree(places[index]).query_pairs(limit_angstrom, output_type="ndarray")
        if len(pairs):
            pairs = index[pairs]
            found.append(pairs[np.hypot(*(places[pairs[:, 0]] - places[pairs[:, 1]]).T) < limit_angstrom])
    dropped = np.zeros(len(ids), bool)
    if not found:
        return dropped
    pairs = np.concatenate(found)
    swap = rank[pairs[:, 0]] > rank[pairs[:, 1]]
    better, worse = np.where(swap, pairs[:, 1], pairs[:, 0]), np.where(swap, pairs[:, 0], pairs[:, 1])
    # equivalent to going through the particles by rank, but decides all that no undecided one outranks at once
    while len(better):
        outranked = np.zeros(len(ids), bool)
        outranked[worse] = True
        dropped[worse[~outranked[better]]] = True
        open_ = ~(dropped[better] | dropped[worse])
        better, worse = better[open_], worse[open_]
    return dropped
