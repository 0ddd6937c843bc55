"""What the picker shows of an exposure: the same JSON for pages and notebooks."""

from __future__ import annotations

import math
from typing import Any

from cryodask.edits.board import Board
from cryodask.edits.frozen import latest
from cryodask.edits.picks import Pick
from cryodask.edits.pictures import steps_of

_DIAMETER_ANGSTROM = 150.0


def about_picks(board: Board, row: int) -> dict[str, Any]:
    """Picks of an exposure as people have edited them, in pixels of the micrograph, whose rows run upwards.

    Each of ``picks`` is a list: id, y, x, score (null if a person added it), whether accepted, whether removed, last author.

    Raises
    ------
    InputError
        If there is no such exposure, or it has no micrograph yet.
    """
    exposure = board.exposure(row)
    board.picks.look()
    version = board.picks.version
    picks = board.edited(row)
    frozen = latest(board.picks)
    return {
        "row": row,
        "name": exposure.name,
        "shape": list(exposure.shape),
        "pixel_size_angstrom": exposure.pixel_size_angstrom,
        "diameter_angstrom": board.diameter_angstrom() or _DIAMETER_ANGSTROM,
        "steps": steps_of(exposure.shape),
        "crc": f"{exposure.crc:08x}",
        "picks": [_listed(pick) for pick in picks],
        "highest": board.picks.highest,
        "version": version,
        "frozen": {**({"who": frozen.who, "time": frozen.time} if frozen is not None else {}), "used": board.is_used()},
    }


def _listed(pick: Pick) -> list[Any]:
    score = None if math.isnan(pick.score) else pick.score
    return [pick.pick, round(pick.y, 2), round(pick.x, 2), score, pick.accepted, pick.removed, pick.who]
