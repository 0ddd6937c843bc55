"""What counts as a number in a STAR file, and the limits of quantities.

Only ASCII digits with an optional sign, point and exponent are a number. ``nan`` and ``inf``, as failed fits are written, are a missing
value.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cryodask.errors import StarError
from cryodask.formats.star.names import COLUMNS, OPTICS
from cryodask.vocabulary import LIMITS

_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_INTEGER = re.compile(r"[+-]?[0-9]+")
_MISSING = re.compile(r"[+-]?(?:nan|inf|infinity)|<na>", re.IGNORECASE)
_MOST = 1 << 63
_LEAST_DEFOCUS = 20.0
"""Defoci below this, but for 0, are no defoci in Angstrom if the others are not near focus either."""
_NEAR_FOCUS = 1000.0


def whole(texts: Sequence[str]) -> np.ndarray | None:
    """Integers as int64, exactly; None if one is not an integer, or does not fit."""
    if not all(_INTEGER.fullmatch(t) for t in texts):
        return None
    numbers = [int(t) for t in texts]
    return np.array(numbers, np.int64) if all(-_MOST <= n < _MOST for n in numbers) else None


def floats(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Numbers as float64, NaN where one is missing or too large; and the places of the texts that are neither."""
    out = np.full(len(texts), np.nan)
    bad = []
    for i, text in enumerate(texts):
        if _NUMBER.fullmatch(text):
            out[i] = float(text)
        elif not _MISSING.fullmatch(text):
            bad.append(i)
    out[~np.isfinite(out)] = np.nan
    return out, np.array(bad, np.int64)


def check_limits(path: Path, columns: Mapping[str, Any], of: str, number: Callable[[int], int], *, needed: bool = False) -> None:
    """Refuse quantities outside their limits.

    Parameters
    ----------
    columns : mapping
        Columns under the vocabulary's names; texts are ignored.
    of, number
        What an element belongs to ("row"), and its number there, for messages.
    needed : bool
        Refuse missing numbers too.

    Raises
    ------
    StarError
        With the column, the value and the limits.
    """
    for name, values in columns.items():
        limits = LIMITS.get(name)
        if not isinstance(values, np.ndarray) or values.dtype.kind != "f":
            continue
        missing = np.isnan(values)
        outside = np.flatnonzero(~missing & ~limits.hold(values)) if limits is not None else np.zeros(0, np.int64)
        relion = next(c.relion for c in (*COLUMNS, *OPTICS) if c.name == name)
        if needed and missing.any():
            at = number(int(np.flatnonzero(missing)[0]))
            raise StarError(
                f"{path}: {relion} of {of} {at} is not a number", "the program that wrote it did not have this value", "add it there"
            )
        if len(outside):
            at = number(int(outside[0]))
            raise StarError(
                f"{path}: {relion} of {of} {at} is {values[outside[0]]:g}, which is not {limits}.",
                "it is in another unit, or the columns are shifted relative to the header",
                "correct it there",
            )
        known = values[~missing & (values != 0)]
        if name in ("defocus_u_angstrom", "defocus_v_angstrom") and len(known) and in_micrometres(known).all():
            most = np.abs(known).max()
            raise StarError(f"{path}: {relion} is at most {most:g} A in all rows.", "it is in micrometres", "write it in Angstrom")


def in_micrometres(defocus_angstrom: np.ndarray) -> np.ndarray:
    """Which of some defoci that belong together cannot be in Angstrom: all are too small, or some while half of them are far from focus."""
    size = np.abs(np.asarray(defocus_angstrom, np.float64))
    small = (size > 0) & (size < _LEAST_DEFOCUS)
    known = size[size > 0]
    return small if small.any() and (small[size > 0].all() or np.median(known) > _NEAR_FOCUS) else np.zeros(len(size), bool)
