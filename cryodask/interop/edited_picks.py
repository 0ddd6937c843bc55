"""Picks as people have edited them, as coordinate STAR files, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cryodask.edits.board import Board
from cryodask.edits.operations import MOST_AT_ONCE, new_id
from cryodask.edits.picks import Pick
from cryodask.errors import InputError
from cryodask.formats.star import read_coordinates, write_coordinates
from cryodask.store.claims import SAME_PLACE_PX
from cryodask.store.files import disk_errors


def export_picks(board: Board, folder: str | Path) -> list[Path]:
    """Write the edited picks of every exposure that has any as ``NAME.star``, in pixels of the micrograph.

    Parameters
    ----------
    board : Board
    folder : path
        Made if it does not exist.

    Returns
    -------
    list of Path
        The files written.
    """
    out, written = Path(folder), []
    names = {item.row: item.name for item in board.project().items()}
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        for row in board.rows():
            picks = [pick for pick in board.edited(row) if pick.on]
            if picks:
                y, x, score = (np.array([getattr(p, name) for p in picks]) for name in ("y", "x", "score"))
                written.append(out / f"{names[row]}.star")
                write_coordinates(written[-1], y, x, np.nan_to_num(score))
    return written


def import_edits(board: Board, folder: str | Path, who: str) -> dict[str, int]:
    """Edit the picks of exposures until they are those of coordinate STAR files called ``NAME.star``.

    A pick within a pixel of a row of the file stays what it is. All others are removed, and what is only in the file is added. Exposures
    without a file stay as they are.

    Parameters
    ----------
    board : Board
    folder : path
    who : str
        Author of the edits.

    Returns
    -------
    dict
        Number of edits by exposure.

    Raises
    ------
    InputError
        If no file belongs to an exposure, or a file cannot be read.
    """
    rows = {item.name: item.row for item in board.project().items()}
    files = {path.stem: path for path in sorted(Path(folder).glob("*.star")) if path.stem in rows}
    if not files:
        raise InputError(
            f"No STAR file in {folder} is called after an exposure of {board.project().name}.",
            "the files belong to another session",
            "name them NAME.star, as cryodask edits export does",
        )
    wanted = {name: read_coordinates(path) for name, path in files.items()}
    counts = {}
    for name, columns in wanted.items():
        places = np.stack([np.asarray(columns["particle_y"], float), np.asarray(columns["particle_x"], float)], -1).reshape(-1, 2)
        ops = _differences(board.edited(rows[name]), places)
        first = board.picks.highest + 1
        ops = [{"id": new_id(), "n": first + k, "row": rows[name], **op} for k, op in enumerate(ops)]
        for start in range(0, len(ops), MOST_AT_ONCE):
            board.take("picks", ops[start : start + MOST_AT_ONCE], who)
        counts[name] = len(ops)
    return counts


def _differences(picks: list[Pick], places: np.ndarray) -> list[dict[str, Any]]:
    """Edits that turn picks into those at `places`, `(n, 2)`."""
    out: list[dict[str, Any]] = []
    missing = np.ones(len(places), bool)
    for pick in sorted((p for p in picks if p.accepted), key=lambda p: p.removed):
        distance = np.where(missing, np.hypot(places[:, 0] - pick.y, places[:, 1] - pick.x), np.inf)
        at = int(distance.argmin()) if len(distance) else -1
        if at >= 0 and distance[at] <= SAME_PLACE_PX:
            missing[at] = False
            out += [{"do": "restore", "pick": pick.pick}] if pick.removed else []
        elif not pick.removed:
            out.append({"do": "remove", "pick": pick.pick, "y": pick.y, "x": pick.x})
    return [*out, *({"do": "add", "y": float(y), "x": float(x)} for y, x in places[missing])]
