"""Picks as people have edited them: the result of all operations on an exposure, whatever their order."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cryodask.edits.log import rank
from cryodask.store.identity import parse_id
from cryodask.store.lines import Record


@dataclass(frozen=True)
class Pick:
    """A pick of an exposure, at `y`, `x` in pixels of the micrograph, row 0 at the bottom.

    ``pick``: ``birth.row.number``, or the id of the operation that added it. ``score``: that of the picker, NaN for an added one.
    ``accepted``: whether its score is above the threshold of its step. ``removed``: whether people took it away. ``who``: the last person
    who edited it, empty for none.
    """

    pick: str
    y: float
    x: float
    score: float = math.nan
    accepted: bool = True
    removed: bool = False
    who: str = ""

    @property
    def on(self) -> bool:
        """Whether later steps use it."""
        return self.accepted and not self.removed

    @property
    def added(self) -> bool:
        """Whether a person added it."""
        return "." not in self.pick


def edited(stored: Iterable[Pick], operations: Sequence[Record]) -> list[Pick]:
    """Picks of an exposure after all operations.

    Parameters
    ----------
    stored : iterable of Pick
        What the picker found.
    operations : sequence of dict
        Of this exposure, in any order, each at least once.

    Returns
    -------
    list of Pick
        Including the removed ones: first the stored ones in their order, then the added ones by id.
    """
    picks = {one.pick: one for one in stored}
    ordered = sorted({one["id"]: one for one in operations}.values(), key=rank)
    for one in sorted((o for o in ordered if o["do"] == "add"), key=lambda o: str(o["id"])):
        picks[one["id"]] = Pick(one["id"], one["y"], one["x"], who=one.get("who", ""))
    for one in ordered:
        pick = picks.get(one.get("pick", ""))
        if pick is None:
            continue
        place = {"y": one["y"], "x": one["x"]} if one["do"] == "move" else {}
        removed = {"remove": True, "restore": False}.get(one["do"], pick.removed)
        picks[pick.pick] = replace(pick, removed=removed, who=one.get("who", ""), **place)
    return list(picks.values())


def edits_of(operations: Sequence[Record]) -> list[dict[str, Any]]:
    """What the operations of an exposure mean for stage ``edit_picks``, in an order that depends on their content only.

    An added pick carries the id of its operation as ``name``, by which it keeps its particle id. A removal carries the position, so that
    it also applies to what another picking run finds there.
    """
    out: list[dict[str, Any]] = []
    touched = {one["pick"] for one in operations if "." in one.get("pick", "")}
    removed_at = {one["pick"]: (one["y"], one["x"]) for one in sorted(operations, key=rank) if one["do"] == "remove" and "y" in one}
    unplaced = [Pick(name, math.nan, math.nan) for name in sorted(touched)]
    for pick in edited(unplaced, operations):
        if pick.added:
            out += [{"action": "add", "name": pick.pick, "place": (pick.y, pick.x)}] if not pick.removed else []
        elif pick.removed:
            at = removed_at.get(pick.pick)
            out.append({"action": "remove", "id": parse_id(pick.pick), **({"place": at} if at is not None else {})})
        elif math.isfinite(pick.y):
            out.append({"action": "move", "id": parse_id(pick.pick), "place": (pick.y, pick.x)})
    return out
