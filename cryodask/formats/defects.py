"""Defects of a camera as SerialEM writes them: lines of a name and whole numbers, read by the rules of IMOD.

Row 0 of the file is the top of the image, which is the last row in MRC order.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cryodask.errors import GainError
from cryodask.formats.presence import check_file

_MOST_BYTES = 1 << 24
_LARGEST_EDGE = 1 << 17
_IGNORED = ("RotationAndFlip", "K2Type", "FalconType", "NumToAvgSuperRes")
"""How the list was made, and neighbours that IMOD also repairs in Falcon super-resolution frames; pixels do not depend on them here."""
_VALUES = {
    "CameraSizeX": 1, "CameraSizeY": 1, "WasScaled": 1, "UsableArea": 4, "PartialBadColumn": 4, "PartialBadRow": 4,
    "BadColumns": 0, "BadRows": 0, "BadPixels": 0, **dict.fromkeys(_IGNORED, 1),
}  # fmt: skip
"""Number of values of a line; 0 if it has any number of them."""


@dataclass(frozen=True)
class Rectangle:
    """Defect pixels: first row and column, last row and column (included), as in the file."""

    top: int
    left: int
    bottom: int
    right: int


def read_defects(path: str | Path, *, eer: bool = False) -> np.ndarray:
    """Defects of a camera, `(y, x)` bool in MRC row order: rows are flipped, unless it is for EER movies.

    Raises
    ------
    GainError
        If the file is not a list of defects with the size of the camera, has a line that is not understood (with its number), or lists
        pixels that the camera does not have, or all of them.
    """
    path = str(path)
    check_file(path, GainError, "text")
    with open(path, "rb") as file:
        raw = file.read(_MOST_BYTES + 1)
    if len(raw) > _MOST_BYTES or b"\0" in raw:
        raise GainError(f"{path} is not a list of defects.", "it is an image", "give the text file that SerialEM wrote")
    lines = list(_lines(path, raw.decode("utf-8", "replace")))
    found = {name: values for name, values, _ in lines if _VALUES[name] == 1}
    columns, rows = (found.get(name, [0])[0] for name in ("CameraSizeX", "CameraSizeY"))
    if not (0 < columns <= _LARGEST_EDGE and 0 < rows <= _LARGEST_EDGE):
        raise GainError(f"{path} does not give the size of the camera (CameraSizeX, CameraSizeY).", "", "add these lines")
    scaled = found.get("WasScaled", [0])[0]
    mask = np.zeros((rows, columns), bool)
    for name, values, number in lines:
        for area in _areas(name, values, rows, columns, 1 if scaled <= 0 else 2 if scaled == 1 else 4):
            if not (0 <= area.top <= area.bottom < rows and 0 <= area.left <= area.right < columns):
                raise GainError(
                    f"{path}, line {number}: {name} names pixels that a camera of {columns} x {rows} pixels does not have.",
                    "the list is of another camera, or was edited",
                    "correct the line, or give the list of this camera",
                )
            mask[area.top : area.bottom + 1, area.left : area.right + 1] = True
    if mask.all():
        raise GainError(f"{path} says that all pixels of the camera are defects.", "", "check the file")
    return mask if eer else np.ascontiguousarray(mask[::-1])


def _lines(path: str, text: str) -> Iterator[tuple[str, list[int], int]]:
    """Name, values and number of each line."""
    for number, line in enumerate(text.splitlines(), 1):
        name, *words = re.split(r"[\s,]+", line.strip())
        if not name or name.startswith("#"):
            continue
        if name not in _VALUES:
            raise GainError(
                f"{path}, line {number}: {name[:40]!r} is not a kind of defect ({', '.join(_VALUES)}).",
                "it is another kind of file, or of a newer SerialEM",
                "remove the line, or give the list of defects that SerialEM wrote",
            )
        number_form = r"-?[0-9]{1,6}" if _VALUES[name] == 1 else r"[0-9]{1,6}"
        if not words or not all(re.fullmatch(number_form, word) for word in words):
            raise GainError(f"{path}, line {number}: {name} needs whole numbers from 0 on.", "the file was edited", "correct the line")
        needed, pairs = _VALUES[name], name == "BadPixels"
        if (needed and len(words) < needed) or (pairs and len(words) % 2):
            raise GainError(
                f"{path}, line {number}: {name} has {len(words)} values, {'pairs' if pairs else needed} are needed.",
                "the file is truncated, or was edited",
                "correct the line",
            )
        yield name, [int(word) for word in words], number


def _areas(name: str, values: list[int], rows: int, columns: int, pixel: int) -> Iterator[Rectangle]:
    """Areas of a line; a bad pixel of a list that was scaled up covers ``pixel`` rows and columns."""
    if name == "BadPixels":
        for x, y in zip(values[::2], values[1::2]):
            yield Rectangle(y, x, y + pixel - 1, x + pixel - 1)
    elif name == "BadColumns":
        yield from (Rectangle(0, x, rows - 1, x) for x in values)
    elif name == "BadRows":
        yield from (Rectangle(y, 0, y, columns - 1) for y in values)
    elif name == "PartialBadColumn":
        first, width, top, bottom = values[:4]
        yield Rectangle(top, first, bottom, first + width - 1)
    elif name == "PartialBadRow":
        first, height, left, right = values[:4]
        yield Rectangle(first, left, first + height - 1, right)
    elif name == "UsableArea" and any(values):  # all 0: not set
        top, left, bottom, right = values[:4]
        outside = (
            (0, 0, top - 1, columns - 1),
            (bottom + 1, 0, rows - 1, columns - 1),
            (0, 0, rows - 1, left - 1),
            (0, right + 1, rows - 1, columns - 1),
        )
        yield from (Rectangle(*edges) for edges in outside if edges[0] <= edges[2] and edges[1] <= edges[3])


def apply_defects(gain: np.ndarray | None, defects: np.ndarray, name: str = "the list of defects") -> np.ndarray:
    """A gain `(y, x)` float32 that is 0 at defects `(y, x)`; 1 elsewhere if there is no gain. Either may be of super-resolution pixels.

    Raises
    ------
    GainError
        If they are of different cameras.
    """
    if gain is None:
        return np.where(defects, np.float32(0.0), np.float32(1.0))
    if gain.shape == (2 * defects.shape[0], 2 * defects.shape[1]):
        defects = np.repeat(np.repeat(defects, 2, 0), 2, 1)
    elif (2 * gain.shape[0], 2 * gain.shape[1]) == defects.shape:
        gain = np.repeat(np.repeat(gain, 2, 0), 2, 1)
    if gain.shape != defects.shape:
        raise GainError(
            f"{name} is of a camera of {defects.shape[0]} x {defects.shape[1]} pixels (rows, columns), the gain of one of"
            f" {gain.shape[0]} x {gain.shape[1]}.",
            "one of them is of another camera, or the frames were rotated when they were saved",
            "give both of this camera; gain_rotate turns the gain only",
        )
    return np.where(defects, np.float32(0.0), gain).astype(np.float32)
