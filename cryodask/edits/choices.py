"""Chosen classes, excluded exposures, ratings, tags and notes: the last value of each name counts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from cryodask.edits.log import rank
from cryodask.store.lines import Record


@dataclass(frozen=True)
class Value:
    """A value that a person set, and who."""

    value: str
    who: str


def current(operations: Iterable[Record]) -> dict[tuple[str, int, str], Value]:
    """Values that are set after all operations, by (classification, row, name); their order and repetitions do not matter."""
    last: dict[tuple[str, int, str], Record] = {}
    for one in operations:
        key = (str(one.get("of", "")), int(one["row"]), str(one["name"]))
        if key not in last or rank(last[key]) < rank(one):
            last[key] = one
    return {key: Value(one["value"], one.get("who", "")) for key, one in sorted(last.items()) if one["do"] == "set"}
