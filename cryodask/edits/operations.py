"""The operations of each kind, and their form. Whether they fit a project is checked in board.py."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from cryodask.documents import StrictModel
from cryodask.edits.masks import MaskNumber, Stroke, Threshold
from cryodask.edits.regions import Region
from cryodask.errors import InputError
from cryodask.store.identity import MOST_ROWS
from cryodask.store.lines import Record

MOST_AT_ONCE = 1000
"""Number of operations that are taken together."""
MOST_COUNTED = 1 << 50
"""Counters are exact numbers in every browser."""

PLACE = r"^[A-Za-z_][A-Za-z0-9_.]*/[0-9a-f]+$"
"""STAGE/KEY"""
MAP_PLACE = PLACE.replace("$", r"(\.class[1-9][0-9]*)?$")
"""STAGE/KEY, or STAGE/KEY.class2 for the map of a class"""

OperationId = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Coordinate = Annotated[float, Field(ge=0.0, le=1e6)]


class Operation(StrictModel):
    """What every operation has: its id, and a counter above those of all operations that its author had seen."""

    id: OperationId = Field(description="32 hexadecimal digits, chosen at random")
    n: int = Field(ge=0, le=MOST_COUNTED, description="one above the highest counter that its author has seen")


class PickOperation(Operation):
    """An edit of the picks of an exposure.

    An added pick is called after its operation. Others are called by their id, ``birth.row.number``.
    """

    do: Literal["add", "remove", "restore", "move"]
    row: int = Field(ge=0, lt=MOST_ROWS, description="row of the exposure")
    pick: str | None = Field(None, pattern=r"^([0-9a-f]{32}|[0-9]+\.[0-9]+\.[0-9]+)$", description="the pick; left out to add one")
    y: Coordinate | None = Field(None, description="row in the micrograph, pixels")
    x: Coordinate | None = Field(None, description="column in the micrograph, pixels")

    @model_validator(mode="after")
    def _complete(self) -> PickOperation:
        if (self.do == "add") != (self.pick is None):
            raise ValueError("add names no pick" if self.do == "add" else f"{self.do} names no pick: give its id as `pick`")
        if self.do in ("add", "move") and (self.y is None or self.x is None):
            raise ValueError(f"{self.do} has no position: give y and x in pixels of the micrograph")
        return self


class ClassOperation(Operation):
    """Choose a class, or take the choice back. Class numbers belong to one classification."""

    do: Literal["set", "unset"]
    row: int = Field(ge=1, description="number of the class, from 1")
    of: str = Field(pattern=PLACE, description="the classification: STAGE/KEY")
    name: Literal["keep"] = "keep"
    value: str = Field("", max_length=200, description="the reason")


class ExposureOperation(Operation):
    """Exclude an exposure with a reason, or rate, tag or comment on it; row -1 is the session as a whole."""

    do: Literal["set", "unset"]
    row: int = Field(ge=-1, lt=MOST_ROWS, description="row of the exposure; -1 for the whole session")
    name: str = Field(pattern=r"^(leave_out|rating|note|tag:\S[^\x00-\x1f]{0,39})$", description="leave_out, rating, note, or tag:NAME")
    value: str = Field("", max_length=2000, description="the reason, 1 to 5, or the note")

    @model_validator(mode="after")
    def _fits(self) -> ExposureOperation:
        if self.name == "leave_out" and self.row < 0:
            raise ValueError("leave_out needs the row of an exposure")
        if self.name == "rating" and self.do == "set" and self.value not in {"1", "2", "3", "4", "5"}:
            raise ValueError("a rating is 1, 2, 3, 4 or 5")
        return self


class MaskOperation(Operation):
    """Set a number of the mask of a map, draw into it, or take a drawn stroke back. A mask belongs to one map."""

    do: Literal["set", "draw", "remove", "restore"]
    row: Literal[0] = 0
    of: str = Field(pattern=MAP_PLACE, description="the map: STAGE/KEY, or STAGE/KEY.class2")
    name: str | None = Field(None, description="threshold, lowpass_angstrom, extend_angstrom or edge_angstrom")
    value: Threshold | None = Field(None, description="a number; also auto or none for the threshold")
    stroke: Stroke | None = None
    drawn: OperationId | None = Field(None, description="the operation that drew what is removed or restored")

    @model_validator(mode="after")
    def _complete(self) -> MaskOperation:
        has = {field for field in ("name", "value", "stroke", "drawn") if getattr(self, field) is not None}
        wanted = {"set": {"name", "value"}, "draw": {"stroke"}}.get(self.do, {"drawn"})
        if has != wanted:
            raise ValueError(f"{self.do} needs {' and '.join(sorted(wanted))}, and nothing else")
        if self.do == "set":
            MaskNumber.model_validate({"name": self.name, "value": self.value})
        return self


class RegionOperation(Operation):
    """Choose a region of the space of components, or take a chosen one back. A region belongs to one analysis of variability."""

    do: Literal["draw", "remove", "restore"]
    row: Literal[0] = 0
    of: str = Field(pattern=PLACE, description="the analysis: STAGE/KEY")
    region: Region | None = None
    reason: str = Field("", max_length=200, description="why it was chosen")
    drawn: OperationId | None = Field(None, description="the operation that chose what is removed or restored")

    @model_validator(mode="after")
    def _complete(self) -> RegionOperation:
        has = {field for field in ("region", "drawn") if getattr(self, field) is not None}
        wanted = {"region"} if self.do == "draw" else {"drawn"}
        if has != wanted:
            raise ValueError(f"{self.do} needs {wanted.pop()}, and nothing else")
        return self


KINDS: dict[str, type[Operation]] = {
    "picks": PickOperation,
    "classes": ClassOperation,
    "exposures": ExposureOperation,
    "masks": MaskOperation,
    "regions": RegionOperation,
}


def new_id() -> str:
    """An id for an operation that is made here."""
    return uuid.uuid4().hex


def read_operations(kind: str, given: Any) -> list[Record]:
    """Check the form of operations that somebody sends.

    Parameters
    ----------
    kind : str
        ``picks``, ``classes``, ``exposures``, ``masks`` or ``regions``.
    given : list of dict

    Returns
    -------
    list of dict

    Raises
    ------
    InputError
        If one of them is wrong; nothing of the whole list may then be stored.
    """
    if kind not in KINDS:
        raise InputError(f"{kind!r} cannot be edited.", "", f"the kinds are {', '.join(KINDS)}")
    if not isinstance(given, Sequence) or isinstance(given, str | bytes):
        raise InputError("The edits are not a list.", "", "send a list of operations")
    if len(given) > MOST_AT_ONCE:
        raise InputError(f"{len(given)} edits were sent at once.", "", f"send at most {MOST_AT_ONCE} at a time")
    out = []
    for number, one in enumerate(given):
        try:
            out.append(KINDS[kind].model_validate(one).model_dump(exclude_none=True))
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise InputError(f"Edit {number + 1} is not valid: {where + ': ' if where else ''}{first['msg']}.", "", "correct it") from None
    return out
