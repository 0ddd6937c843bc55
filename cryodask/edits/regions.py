"""Regions of the space of components that people choose: what the edits amount to, as the parameters of stage ``select_region``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import numpy as np
from pydantic import Field, model_validator

from cryodask.documents import StrictModel
from cryodask.edits.masks import standing
from cryodask.errors import InputError
from cryodask.kernels.polygons import in_polygon
from cryodask.store.lines import Record

MOST_COMPONENTS = 6
MOST_CORNERS = 200
MOST_REGIONS = 50
"""Standing regions of one analysis."""

Component = Annotated[int, Field(ge=1, le=MOST_COMPONENTS)]
Coordinate = Annotated[float, Field(ge=-1e6, le=1e6)]


class Region(StrictModel):
    """A polygon in the plane of two components, or a range of one."""

    components: Annotated[tuple[Component, ...], Field(min_length=1, max_length=2)] = Field(
        description="numbers of the components, from 1: two, or a single one"
    )
    points: Annotated[
        tuple[Annotated[tuple[Coordinate, ...], Field(min_length=1, max_length=2)], ...], Field(min_length=2, max_length=MOST_CORNERS)
    ] = Field(description="corners of the polygon in order, as coordinates along the components; for a single one, both ends of the range")

    @model_validator(mode="after")
    def _fits(self) -> Region:
        count = len(self.components)
        if len(set(self.components)) < count:
            raise ValueError("a region has two different components")
        if any(len(point) != count for point in self.points):
            raise ValueError(f"each point has {count} coordinate{'s' if count > 1 else ''}, one per component")
        if count == 1 and len(self.points) != 2:
            raise ValueError("a range of one component has two points, its ends")
        if count == 2 and len(self.points) < 3:
            raise ValueError("a polygon has at least three points")
        return self


def chosen(regions: Sequence[Region], coordinates: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """Mask `(n,)` of the particles in any of the regions; the ends of a range belong to it.

    Parameters
    ----------
    regions : sequence of Region
    coordinates : sequence of arrays `(n,)`, or `(component, n)`
        Along each component, the first one first; those with NaN are in no region.

    Raises
    ------
    InputError
        If a region is of a component that there is not.
    """
    inside = np.zeros(len(coordinates[0]), bool)
    for region in regions:
        if max(region.components) > len(coordinates):
            raise InputError(
                f"A region is of component {max(region.components)}, but there are {len(coordinates)} components.",
                "it was chosen from an analysis with more components",
                "choose the regions again on the page of the components",
            )
        values = [coordinates[number - 1] for number in region.components]
        if len(values) == 1:
            (low,), (high,) = sorted(region.points)
            inside |= (values[0] >= low) & (values[0] <= high)
        else:
            inside |= in_polygon(np.stack(values, 1), np.array(region.points))
    return inside


def region_set(operations: Iterable[Record], of: str) -> dict[str, Any]:
    """``regions`` of ``select_region`` after all operations on the analysis ``of``, and the reason of each, in their order."""
    operations = list(operations)
    regions, reasons = standing(operations, of, "region"), standing(operations, of, "reason")
    return {"regions": list(regions.values()), "reasons": list(reasons.values())}
