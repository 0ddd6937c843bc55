"""Everything about one exposure, as JSON for its page."""

from __future__ import annotations

from typing import Any

import numpy as np

from cryodask.store.births import accepted
from cryodask.store.journal import decode_value
from cryodask.store.lines import Record
from cryodask.vocabulary import VARIABLES
from cryodask.web.columns import COLUMNS
from cryodask.web.follow import Follower
from cryodask.web.pictures import shape_of


def described(follower: Follower, row: int) -> dict[str, Any] | None:
    """What pages show of an exposure; None if there is none in this row. Parts that are not computed yet are missing or empty."""
    name = follower.names[row] if 0 <= row < len(follower.names) else ""
    if not name:
        return None
    item = next((item for item in follower.project.items() if item.row == row), None)
    pixel = follower.project.value_of(item, "pixel_size_angstrom") if item is not None else None
    return {
        "row": row,
        "name": name,
        "time": number(follower.time[row]),
        "state": int(follower.state[row]),
        "failure": follower.failures.get(row),
        "numbers": [{"title": c.title, "unit": c.unit, "value": number(follower.columns[c.name][row])} for c in COLUMNS],
        "shape": shape_of(follower, row),
        "pixel_size_angstrom": number(pixel) if pixel is not None else None,
        "picks": picks(follower, row),
        "spectrum": _curves(follower, row, "spectrum_frequency", "spectrum_average", "spectrum_fit"),
        "motion": _curves(follower, row, "frame_shift", "patch_position", "patch_shift"),
        "metadata": _metadata(follower, row),
    }


def picks(follower: Follower, row: int) -> dict[str, Any] | None:
    """Particles of an exposure in pixels of the micrograph, whose rows run upwards; None before they are picked."""
    found = follower.record(row, "pick_x")
    if found is None:
        return None
    columns = found[1]["columns"]
    y, x = (decode_value(columns[name]) for name in ("pick_y", "pick_x"))
    score = decode_value(columns["pick_score"]) if "pick_score" in columns else np.zeros(len(x))
    label, _ = follower.giving("pick_x") or ("", None)
    step = follower.project.step(label)
    product = step.product("particles")
    limit = product.threshold if product is not None else None
    limit = float(columns.get("pick_threshold", -np.inf)) if isinstance(limit, str) else limit
    kept = accepted(score, limit)
    return {
        "x": numbers(x),
        "y": numbers(y),
        "score": numbers(score),
        "accepted": kept.astype(int).tolist(),
        "diameter_angstrom": step.params.get("diameter_angstrom"),
    }


def _curves(follower: Follower, row: int, *names: str) -> dict[str, Any] | None:
    found = follower.record(row, names[0])
    if found is None:
        return None
    return {name: numbers(found[0].read(found[1], name)) for name in names if name in found[1]["columns"]}


def _metadata(follower: Follower, row: int) -> list[dict[str, Any]]:
    """All single values that the steps have given the exposure."""
    out: list[dict[str, Any]] = []
    for label in follower.steps():
        record = follower.record_in(label, row)
        if record is not None:
            out += [
                {"step": label, "name": VARIABLES[n].doc or n, "unit": VARIABLES[n].units, "value": value}
                for n, value in _single(record).items()
            ]
    return out


def _single(record: Record) -> dict[str, Any]:
    values = {name: value for name, value in record["columns"].items() if name in VARIABLES and not VARIABLES[name].dims}
    return {name: value if isinstance(value, str | bool) else number(decode_value(value)) for name, value in values.items()}


def number(value: Any) -> float | None:
    """A number as JSON can hold it: NaN and infinity are null."""
    value = float(value)
    return value if np.isfinite(value) else None


def numbers(values: Any) -> Any:
    """An array as nested lists, rounded to what a screen can show."""
    array = np.asarray(values, dtype=np.float64)
    rounded = np.where(np.isfinite(array), np.round(array, 5), np.nan)
    return _without_nan(rounded.tolist()) if np.isnan(rounded).any() else rounded.tolist()


def _without_nan(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_nan(v) for v in value]
    return None if value != value else value
