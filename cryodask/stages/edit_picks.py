"""Stage ``edit_picks``: picks that a person adds, moves and removes."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from pydantic import Field

from cryodask.errors import InputError, MicrographError
from cryodask.stage import Output, Params, SourceFile, stage
from cryodask.store.identity import parse_id

REASONS = {1: "it was removed by hand"}
"""Meaning of the numbers in ``left_out_reason``."""


class EditPicksParams(Params):
    """Parameters of ``edit_picks``."""

    file: SourceFile | None = Field(
        None, description="CSV with the columns micrograph, action (add, move, remove), y, x (pixels), particle_id; none: all picks pass"
    )


@stage(
    version=1,
    needs=["particle_id", "position_y_angstrom", "position_x_angstrom", "half_set", "pixel_size_angstrom"],
    optional=["pick_score", "pick_edits"],
    gives=["pick_y", "pick_x", "pick_score", "natural_key", "left_out_id", "left_out_reason"],
    ports=["exposures[micrograph, optics]", "particles[position, score?]"],
    outputs=[Output("particles", "particles", ("position",), on="particles", births=True)],
    reasons=REASONS,
)
def edit_picks(
    params: EditPicksParams,
    *,
    particle_id: np.ndarray,
    position_y_angstrom: np.ndarray,
    position_x_angstrom: np.ndarray,
    half_set: np.ndarray,
    pixel_size_angstrom: float,
    pick_score: np.ndarray | None = None,
    pick_edits: list[dict[str, str]] | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Applies the edits of a person to the picks of an exposure.

    A pick that is moved keeps its id, one that is removed is stored with that reason, and one that is added is born here: it is known again
    by its place, and counts once where it is listed twice.
    """
    pixel = float(pixel_size_angstrom)
    ids = np.asarray(particle_id, np.int64)
    places = np.stack([np.asarray(position_y_angstrom, float), np.asarray(position_x_angstrom, float)], -1).reshape(-1, 2) / pixel
    score = np.nan_to_num(np.asarray(pick_score, np.float32)) if pick_score is not None else np.zeros(len(ids), np.float32)
    row_of = {int(one): i for i, one in enumerate(ids.tolist())}
    kept = np.ones(len(ids), bool)
    added: list[tuple[float, float]] = []
    for edit in pick_edits or ():
        action = edit["action"].strip()
        if action == "add":
            added.append(_place(edit))
            continue
        known = row_of.get(_particle(edit))
        if known is None:
            continue  # of another birth, or not accepted any more: there is nothing to move or remove
        if action == "move":
            places[known] = _place(edit)
        elif action == "remove":
            kept[known] = False
        else:
            raise MicrographError(f"{action!r} is not an edit of picks.", "a typo in the table", "write add, move or remove")
    new = np.array(added, float).reshape(-1, 2)
    keys = [int.from_bytes(hashlib.blake2b(f"{y:.2f} {x:.2f}".encode(), digest_size=8).digest(), "little") >> 1 for y, x in new]
    every = np.concatenate([places[kept], new])
    return {
        "particle_id": np.concatenate([ids[kept], np.zeros(len(new), np.int64)]),
        "natural_key": np.concatenate([ids[kept], np.array(keys, np.int64)]),
        "half_set": np.concatenate([np.asarray(half_set, np.int8)[kept], np.full(len(new), -1, np.int8)]),
        "pick_y": every[:, 0].astype(np.float32),
        "pick_x": every[:, 1].astype(np.float32),
        "pick_score": np.concatenate([score[kept], np.zeros(len(new), np.float32)]),
        "left_out_id": ids[~kept],
        "left_out_reason": np.ones(int((~kept).sum()), np.int8),
    }


def _place(edit: dict[str, str]) -> tuple[float, float]:
    try:
        return float(edit["y"]), float(edit["x"])
    except (KeyError, TypeError, ValueError):
        raise MicrographError(f"An edit of picks has no place: {edit}.", "a row is cut short", "give y and x in pixels") from None


def _particle(edit: dict[str, str]) -> int:
    try:
        return parse_id((edit.get("particle_id") or "").strip())
    except InputError as error:
        raise MicrographError(error.what, "a row is cut short", error.way_out) from error
