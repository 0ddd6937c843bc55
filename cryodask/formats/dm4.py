"""DM4 files of Gatan's DigitalMicrograph: gain references and movies.

A file is a tree of tags (big-endian structure, usually little-endian values); an image is a group below ``ImageList`` whose
``ImageData`` has ``Data``, ``DataType``, ``Dimensions`` (x first) and ``Calibrations``. Small RGB pictures beside it are thumbnails.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from cryodask.errors import CryodaskError, InputError
from cryodask.formats.presence import check_file

_SIZES = {2: 2, 3: 4, 4: 2, 5: 4, 6: 4, 7: 8, 8: 1, 9: 1, 10: 1, 11: 8, 12: 8}
"""Bytes of the simple types of values."""
_NUMBERS = {2: "i2", 3: "i4", 4: "u2", 5: "u4", 6: "f4", 7: "f8", 8: "u1", 9: "i1", 10: "u1", 11: "i8", 12: "u8"}
_STRUCT, _STRING, _ARRAY = 15, 18, 20
_PIXELS = {1: "i2", 2: "f4", 6: "u1", 7: "i4", 9: "i1", 10: "u2", 11: "u4", 12: "f8"}
"""``DataType`` of images of real numbers."""
_DEEPEST, _MOST_TAGS, _MOST_INFO = 32, 1_000_000, 10_000
_ANGSTROM = {"nm": 10.0, "µm": 1e4, "um": 1e4, "å": 1.0, "a": 1.0, "angstrom": 1.0, "pm": 0.01}


@dataclass(frozen=True)
class Dm4Stack:
    """An image or a stack of images `(z, y, x)`, read one at a time; it keeps no file open and can be pickled."""

    path: str
    shape: tuple[int, int, int]
    stored: str
    offset: int
    pixel_size_angstrom: float | None
    error: type[CryodaskError]

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def dtype(self) -> np.dtype:
        """Native dtype of the pixels."""
        return np.dtype(self.stored).newbyteorder("=")

    def __getitem__(self, index: int) -> np.ndarray:
        """Section ``index``, `(y, x)`: rows from the bottom of the picture to its top, as in MRC files."""
        n, height, width = self.shape
        at = index + n if index < 0 else index
        if not 0 <= at < n:
            raise IndexError(index)
        size = height * width * np.dtype(self.stored).itemsize
        with open(self.path, "rb") as file:
            file.seek(self.offset + at * size)
            data = file.read(size)
        if len(data) < size:
            raise self.error(f"{self.path} ends within section {at + 1} of {n}.", "it is being written, or was cut", "copy it again")
        return np.frombuffer(data, self.stored).reshape(height, width)[::-1].astype(self.dtype)


def open_dm4(path: str | Path, error: type[CryodaskError] = InputError) -> Dm4Stack:
    """Open the image of a DM4 file.

    DigitalMicrograph draws the first row at the top; rows are returned in MRC order, as those of TIFF files are.

    Raises
    ------
    CryodaskError
        Of class ``error``: no DM4 file, damaged, shorter than its image, without an image of real numbers, or with several.
    """
    name = str(path)
    check_file(name, error, "DM4")
    try:
        with open(name, "rb") as file:
            images = _images(file, os.fstat(file.fileno()).st_size)
    except (struct.error, ValueError, OverflowError) as cause:
        raise error(f"{name} is not a valid DM4 file ({cause}).", "it is damaged, or of another version", "copy it again") from None
    found = [image for image in images if image.get("DataType") in _PIXELS and {"data", "x", "y"} <= image.keys()]
    if len(found) != 1:
        has = f"{len(found)} images" if found else "no image of real numbers"
        raise error(
            f"{name} has {has}.", "it is a spectrum, a diffraction pattern or a workspace", "save the one image as DM4, MRC or TIFF"
        )
    return _stack(name, found[0], error)


def _stack(name: str, image: dict[str, float], error: type[CryodaskError]) -> Dm4Stack:
    shape = (int(image.get("z", 1)), int(image["y"]), int(image["x"]))
    kind = np.dtype(("<" if image["little"] else ">") + _PIXELS[int(image["DataType"])])
    needed, there = int(np.prod(shape, dtype=object)) * kind.itemsize, int(image["bytes"])
    if needed != there or min(shape) < 1 or "t" in image:
        raise error(
            f"{name} has an image of {' x '.join(map(str, shape))} pixels of {kind.itemsize} bytes, but {there} bytes of it.",
            "its header is damaged",
            "copy it again",
        )
    pixel = image.get("pixel_angstrom", 0.0)
    return Dm4Stack(name, shape, kind.str, int(image["data"]), pixel if 0.01 <= pixel <= 100.0 else None, error)


# --- the tree of tags -------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Tag:
    """A value: names and numbers of the groups around it and its own, where it begins, its type, and how many of these there are."""

    path: tuple[str, ...]
    offset: int
    kind: int
    count: int


def _images(file: BinaryIO, length: int) -> list[dict[str, float]]:
    version, _, order = struct.unpack(">IQI", _read(file, 16))
    if version != 4 or order not in (0, 1):
        raise ValueError(f"version {version}")
    images: dict[str, dict[str, float]] = {}
    units: dict[str, str] = {}
    mark = "<" if order else ">"
    for tag in _tags(file, length):
        if tag.path[:1] != ("ImageList",) or "ImageData" not in tag.path:
            continue
        image, rest = images.setdefault(tag.path[1], {"little": order}), tag.path[tag.path.index("ImageData") + 1 :]
        if rest == ("Data",):
            image |= {"data": tag.offset, "bytes": tag.count * _SIZES.get(tag.kind, 0)}
        elif rest == ("DataType",):
            image["DataType"] = _number(file, tag, mark)
        elif rest[:1] == ("Dimensions",) and len(rest) == 2:
            image["xyzt"[min(int(rest[1]), 3)]] = _number(file, tag, mark)
        elif rest == ("Calibrations", "Dimension", "0", "Scale"):
            image["scale"] = _number(file, tag, mark)
        elif rest == ("Calibrations", "Dimension", "0", "Units") and 0 < tag.count < 32:
            file.seek(tag.offset)
            units[tag.path[1]] = _read(file, 2 * tag.count).decode("utf-16-le" if order else "utf-16-be", "replace")
    for number, image in images.items():
        factor = _ANGSTROM.get(units.get(number, "").strip().lower())
        if factor is not None and "scale" in image:
            image["pixel_angstrom"] = factor * image["scale"]
    return list(images.values())


def _number(file: BinaryIO, tag: _Tag, mark: str) -> float:
    if tag.count != 1 or tag.kind not in _NUMBERS:
        raise ValueError(f"{tag.path[-1]} is no number")
    file.seek(tag.offset)
    return float(np.frombuffer(_read(file, _SIZES[tag.kind]), mark + _NUMBERS[tag.kind])[0])


def _tags(file: BinaryIO, length: int) -> Iterator[_Tag]:
    """All values of the tree, in the order of the file; groups without names are numbered."""
    left = _MOST_TAGS

    def group(path: tuple[str, ...]) -> Iterator[_Tag]:
        nonlocal left
        _, _, count = struct.unpack(">BBQ", _read(file, 10))
        if len(path) > _DEEPEST or count > left:
            raise ValueError("its tags do not end")
        left -= count
        unnamed = 0
        for _ in range(count):
            what, size = struct.unpack(">BH", _read(file, 3))
            name = _read(file, size).decode("latin-1")
            if not name:
                name, unnamed = str(unnamed), unnamed + 1
            (inside,) = struct.unpack(">Q", _read(file, 8))
            begin = file.tell()
            if begin + inside > length or what not in (20, 21):
                raise ValueError("a tag goes beyond the end" if what in (20, 21) else f"a tag of type {what}")
            if what == 20:
                yield from group((*path, name))
            else:
                yield from _value(file, (*path, name))
            file.seek(begin + inside)

    yield from group(())


def _value(file: BinaryIO, path: tuple[str, ...]) -> Iterator[_Tag]:
    """The value of a tag, if it is a number, a text, or an array of numbers."""
    mark, size = struct.unpack(">4sQ", _read(file, 12))
    if mark != b"%%%%" or not 1 <= size <= _MOST_INFO:
        raise ValueError(f"{path[-1]} has no value")
    info = struct.unpack(f">{size}Q", _read(file, 8 * size))
    kind = info[0]
    if kind in _SIZES:
        yield _Tag(path, file.tell(), kind, 1)
    elif kind == _STRING and size == 2:
        yield _Tag(path, file.tell(), 4, info[1])
    elif kind == _ARRAY and size == 3 and info[1] in _SIZES:
        yield _Tag(path, file.tell(), info[1], info[2])


def _read(file: BinaryIO, size: int) -> bytes:
    data = file.read(size)
    if len(data) < size:
        raise ValueError("it ends too early")
    return data
