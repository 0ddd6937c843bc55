"""Point groups as parameters; a wrong name is refused when the project file is read, without loading torch."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator

_GROUP = re.compile(r"(C[1-9]\d?|D[1-9]\d?|T|O|I[1-4]?)")


def point_group(name: str) -> str:
    """Normalise the name of a point group to capitals.

    Raises
    ------
    ValueError
    """
    given = name.strip().upper()
    if not _GROUP.fullmatch(given):
        raise ValueError(f"{name!r} is not a point group. Known: C1, C2, ..., D2, ..., T, O, I, I1 to I4")
    return given


def order_of(group: str | None) -> int:
    """Number of rotations of a point group; 1 for an unknown one."""
    match = re.fullmatch(r"([CD])(\d{1,3})|([TOI])\d?", (group or "C1").strip().upper())
    if match is None:
        return 1
    if match[3]:
        return {"T": 12, "O": 24, "I": 60}[match[3]]
    return max(int(match[2]), 1) * (2 if match[1] == "D" else 1)


PointGroup = Annotated[str, AfterValidator(point_group)]
