"""Stage ``select_region``: particles in a region of the space of components that a person has chosen."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import Field

from cryodask.edits.regions import MOST_COMPONENTS, Region, chosen
from cryodask.stage import Output, Params, SetView, port, stage
from cryodask.stages._sets import kept_and_dropped

REASONS = {1: "it is outside the chosen regions", 2: "it has no coordinates"}
"""Meaning of the numbers in ``removal_reason``."""


class SelectRegionParams(Params):
    """Parameters of ``select_region``."""

    regions: tuple[Region, ...] = Field(
        (),
        description="particles in any of these are kept: mappings with components (the numbers of two, or of a single one) and points (the "
        "corners [a, b] of a polygon in their plane, or both ends [a], [b] of a range), in standard deviations; without any the step waits",
    )


@stage(
    version=1,
    shape="set",
    needs=[],
    gives=[],
    ports=[port("particles[components]", copies=True, subtracted=True, whole=True)],
    outputs=[Output("particles", "particles", on="particles", subset=True)],
    person=True,
    reasons=REASONS,
)
def select_region(params: SelectRegionParams, inputs: dict[str, list[SetView]]) -> dict[str, Any]:
    """Keep the particles in regions of the space of components, as a person has chosen them on the page of the components.

    Without regions the step waits for **Use this set** on that page (``cryodask dashboard``); other branches of the run go on. The regions
    belong to one analysis of variability: when it is recomputed, the step waits again. Regions in the project file decide instead of the
    page. A particle is kept if it is in any of them; the ends of a range belong to it.
    """
    view = inputs["particles"][0]
    columns = view.read(["components"])
    coordinates = [columns[name] for name in (f"component{j}" for j in range(1, MOST_COMPONENTS + 1)) if name in columns]
    kept = chosen(params.regions, coordinates)
    unknown = np.logical_or.reduce([~np.isfinite(values) for values in coordinates])
    return kept_and_dropped(
        view.ids,
        np.where(kept, 0, np.where(unknown, 2, 1)).astype(np.int8),
        stage="select_region",
        usual_reason="the regions were chosen from another analysis, whose components have other directions",
        way_out="choose the regions on the page of the components",
    )
