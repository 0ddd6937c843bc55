"""Stage ``deduplicate``: keeps the best of particles that are too close to each other."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import Field

from cryodask.stage import Output, Params, SetView, stage
from cryodask.stages._sets import kept_and_dropped, places_of, too_near

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
    reason = too_near(view.ids, places, score, params.nearer_than_angstrom).astype(np.int8)
    return kept_and_dropped(
        view.ids, reason, stage="deduplicate", usual_reason="the set was empty before", way_out="check the step before it"
    )
