"""Stage ``edit_picks``: picks that people added, moved and removed, in the browser or in a table."""

from __future__ import annotations

import csv
import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, model_validator

from cryodask.errors import InputError
from cryodask.products import Product
from cryodask.stage import Context, EffortMark, Output, Params, SourceFile, stage
from cryodask.store.births import natural_keys
from cryodask.store.claims import SAME_PLACE_PX
from cryodask.store.identity import parse_id

REASONS = {1: "it was removed by hand"}
"""Meaning of the numbers in ``left_out_reason``."""


class EditPicksParams(Params):
    """Parameters of ``edit_picks``."""

    file: SourceFile | None = Field(
        None,
        description="CSV with the columns micrograph, action (add, move, remove), y, x (pixels), particle_id; "
        "by default the edits that were frozen in the browser, if any",
    )
    wait: Annotated[bool, EffortMark] = Field(False, description="whether the step waits until edits are frozen; not with a file")

    @model_validator(mode="after")
    def _one_source(self) -> EditPicksParams:
        if self.wait and self.file is not None:
            raise ValueError("with a file there is nothing to wait for: leave out file or wait")
        return self


ACTIONS = ("add", "move", "remove")
Edit = dict[str, Any]
"""``action``, ``place`` (y, x in pixels; for a removal optionally the particle's position), ``id`` (for move and remove), and for an added
pick optionally a ``name`` by which it is recognised wherever it is moved."""


def read_edits(path: str | Path) -> dict[str, list[Edit]]:
    """Edits by exposure name, in the order of the table.

    Raises
    ------
    InputError
        If the table cannot be parsed, with the line: ignoring an edit would keep an unwanted particle.
    """
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        columns = [c or "" for c in reader.fieldnames or ()]
        if not {"micrograph", "action"} <= set(columns):
            raise InputError(
                f"{path} has the columns {', '.join(columns) or 'of an empty file'}.",
                "it has no header, or is not separated by commas",
                "name its columns micrograph, action, y, x, particle_id",
            )
        out: dict[str, list[Edit]] = {}
        for row in reader:
            name = Path((row["micrograph"] or "").strip()).stem
            try:
                out.setdefault(name, []).append(_edit({k: (v or "").strip() for k, v in row.items() if isinstance(k, str) and k}))
            except InputError as error:
                raise InputError(f"{path}, line {reader.line_num}: {error.what}", "the row is truncated", error.way_out) from error
    return out


def _edit(row: dict[str, str]) -> Edit:
    action = row["action"]
    if action not in ACTIONS:
        near = difflib.get_close_matches(action, ACTIONS, 1, 0.5)
        raise InputError(f"{action!r} is not an edit of picks.", "", f"write {near[0]}" if near else "write add, move or remove")
    edit: Edit = {"action": action}
    if action != "remove" or (row.get("y") and row.get("x")):
        edit["place"] = _place(row)
    if action != "add":
        if not row.get("particle_id"):
            raise InputError(f"{action} names no particle.", "", "give its particle_id, from project.particles(STEP)")
        edit["id"] = parse_id(row["particle_id"])
    return edit


def _place(row: dict[str, str]) -> tuple[float, float]:
    try:
        y, x = float(row["y"]), float(row["x"])
    except (KeyError, ValueError):
        raise InputError(f"{row['action']} has no position.", "", "give y and x in pixels of the exposure") from None
    if not (0 <= y < np.inf and 0 <= x < np.inf):
        raise InputError(f"y {y:g}, x {x:g} is outside any exposure.", "", "give y and x in pixels, from 0")
    return y, x


def _check(params: EditPicksParams, inputs: dict[str, list[Product]]) -> Iterator[str]:
    if params.file is not None and Path(params.file).is_file():
        try:
            read_edits(params.file)
        except InputError as error:
            yield f"{error.what} {error.way_out[:1].upper()}{error.way_out[1:]}."


@stage(
    version=1,
    needs=["particle_id", "position_y_angstrom", "position_x_angstrom", "half_set", "pixel_size_angstrom"],
    optional=["pick_score", "pick_edits"],
    gives=["pick_y", "pick_x", "pick_score", "natural_key", "left_out_id", "left_out_reason"],
    ports=["exposures[micrograph, optics]", "particles[position, score?]"],
    outputs=[Output("particles", "particles", ("position",), on="particles", births=True)],
    check=_check,
    exposures_named=lambda params: list(read_edits(params.file)) if params.file else [],
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
    pick_edits: list[Edit] | None = None,
    context: Context,
) -> dict[str, Any]:
    """Apply manual edits to the picks of an exposure.

    Edits come from the browser, once they are frozen (``cryodask dashboard``, ``cryodask edits``), or from a table. A moved pick keeps its
    id, a removed one is stored with that reason, and an added one gets an id of this step: an added row of a table is identified by its
    position, and counts once if listed twice. A removal with a position also applies to what another picking run finds there. The run
    reports how many edits name a particle that does not exist. Only exposures with new edits are processed again.
    """
    pixel = float(pixel_size_angstrom)
    ids = np.asarray(particle_id, np.int64)
    places = np.stack([np.asarray(position_y_angstrom, float), np.asarray(position_x_angstrom, float)], -1).reshape(-1, 2) / pixel
    score = np.nan_to_num(np.asarray(pick_score, np.float32)) if pick_score is not None else np.zeros(len(ids), np.float32)
    row_of = {int(one): i for i, one in enumerate(ids.tolist())}
    kept = np.ones(len(ids), bool)
    added: list[tuple[float, float]] = []
    names: list[str] = []
    unmatched = 0
    for edit in pick_edits or ():
        if edit["action"] == "add":
            added.append(edit["place"])
            names.append(edit.get("name") or f"{edit['place'][0]:.2f} {edit['place'][1]:.2f}")
            continue
        known = row_of.get(edit["id"])
        if known is None and edit["action"] == "remove" and "place" in edit:
            known = _at(places, edit["place"])
        if known is None or not kept[known]:
            unmatched += 1  # of another birth, or no longer accepted: nothing to move or remove
            continue
        if edit["action"] == "move":
            places[known] = edit["place"]
        else:
            kept[known] = False
    new = np.array(added, float).reshape(-1, 2)
    every = np.concatenate([places[kept], new])
    return {
        "particle_id": np.concatenate([ids[kept], np.zeros(len(new), np.int64)]),
        "natural_key": np.concatenate([ids[kept], natural_keys(names)]),
        "half_set": np.concatenate([np.asarray(half_set, np.int8)[kept], np.full(len(new), -1, np.int8)]),
        "pick_y": every[:, 0].astype(np.float32),
        "pick_x": every[:, 1].astype(np.float32),
        "pick_score": np.concatenate([score[kept], np.zeros(len(new), np.float32)]),
        "left_out_id": ids[~kept],
        "left_out_reason": np.ones(int((~kept).sum()), np.int8),
        "unmatched": unmatched,
    }


def _at(places: np.ndarray, place: tuple[float, float]) -> int | None:
    """Index of the particle at a position."""
    distance = np.hypot(*(places - np.asarray(place)).T)
    return int(distance.argmin()) if len(places) and distance.min() <= SAME_PLACE_PX else None
