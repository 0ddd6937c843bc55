"""Masks that people choose by eye: what the edits of a map amount to, as the parameters of stage ``draw_mask``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from cryodask.documents import StrictModel
from cryodask.store.lines import Record

MOST_POINTS = 200
Threshold = float | Literal["auto", "none"]
NUMBERS: dict[str, Threshold] = {"threshold": "auto", "lowpass_angstrom": 15.0, "extend_angstrom": 7.0, "edge_angstrom": 12.0}
"""What can be set, and what it is before anybody sets it."""

Place = tuple[Annotated[float, Field(ge=-1e5, le=1e5)], Annotated[float, Field(ge=-1e5, le=1e5)], Annotated[float, Field(ge=-1e5, le=1e5)]]


class Stroke(StrictModel):
    """Something drawn into a mask: all places near a line of points."""

    points: Annotated[tuple[Place, ...], Field(min_length=1, max_length=MOST_POINTS)] = Field(
        description="places (z, y, x) in Angstrom from the centre of the map; a single one is a ball"
    )
    radius_angstrom: float = Field(gt=0, le=1e4, description="radius of the brush, Angstrom")
    erase: bool = Field(False, description="whether it is taken out of the mask")


class MaskNumber(StrictModel):
    """A number of a mask, within its limits."""

    name: Literal["threshold", "lowpass_angstrom", "extend_angstrom", "edge_angstrom"]
    value: Threshold

    @model_validator(mode="after")
    def _fits(self) -> MaskNumber:
        if self.name == "threshold":
            return self
        if isinstance(self.value, str):
            raise ValueError(f"{self.name} is a number of Angstrom")
        if self.value < 0 or self.value > 1000 or (self.name == "lowpass_angstrom" and self.value == 0):
            raise ValueError(f"{self.name} is between 0 and 1000 Angstrom")
        return self


def recipe(operations: Iterable[Record], of: str) -> dict[str, Any]:
    """Parameters of ``draw_mask`` after all operations on the map ``of``, given each once and in order of (counter, id).

    Strokes are in the order in which they were drawn: what is erased can be drawn again.
    """
    operations = [one for one in operations if one["of"] == of]
    numbers: dict[str, Any] = {**NUMBERS, **{one["name"]: one["value"] for one in operations if one["do"] == "set"}}
    return {**numbers, "strokes": list(standing(operations, of).values())}


def standing(operations: Iterable[Record], of: str, what: str = "stroke") -> dict[str, Any]:
    """What was drawn on a result (``what`` of each operation) by the id of its operation, in order, leaving out what was since undone."""
    found: dict[str, Any] = {}
    taken: dict[str, bool] = {}
    for one in (one for one in operations if one["of"] == of):
        if one["do"] == "draw":
            found[one["id"]] = one[what]
        elif one["do"] != "set":
            taken[one["drawn"]] = one["do"] == "remove"
    return {name: value for name, value in found.items() if not taken.get(name)}


def drawn(operations: Iterable[Record], of: str) -> set[str]:
    """Ids of all that was drawn on a result, including what was since undone."""
    return {one["id"] for one in operations if one["of"] == of and one["do"] == "draw"}
