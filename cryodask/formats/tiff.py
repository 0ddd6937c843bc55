"""TIFF movies and gains. Page row r is row ``height - 1 - r`` in MRC order: rows are flipped on reading and on writing.

RELION, IMOD, SerialEM and MotionCor2 do the same; in a program that does not, the gain is upside down.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from cryodask.errors import CryodaskError, InputError
from cryodask.formats.four_bit import is_super_resolution_packed, unpack
from cryodask.formats.mrc_header import common_size
from cryodask.formats.presence import check_file
from cryodask.formats.tiff_pages import check_pages, walk_pages

_RESOLUTION_UNIT_ANGSTROM = {2: 2.54e8, 3: 1.0e8}  # inch, centimetre
_SQUARE = 0.01
"""Relative difference of the resolutions of square pixels: some programs write few digits."""

# what tifffile logs about a damaged file is told by our own error
logging.getLogger("tifffile").addHandler(logging.NullHandler())


@dataclass(frozen=True)
class TiffStack:
    """The pages of a TIFF file, decoded on access; it keeps no file open and can be pickled."""

    path: str
    shape: tuple[int, int, int]
    dtype: np.dtype
    pixel_size_angstrom: float | None
    error: type[CryodaskError]
    packed: bool = False

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> np.ndarray:
        """Page ``index``, `(y, x)`, in MRC row order."""
        n, rows, columns = self.shape
        at = index + n if index < 0 else index
        if not 0 <= at < n:
            raise IndexError(index)
        with _reading(self.path, self.error, f"page {at + 1} of {n} cannot be decoded"), tifffile.TiffFile(self.path) as tiff:
            page = tiff.pages[at].asarray(maxworkers=1)
        if page.shape != (rows, columns // 2 if self.packed else columns) or page.dtype != self.dtype:
            raise self.error(f"{self.path}: page {at + 1} has changed since the file was opened.", "", "copy it again")
        page = unpack(page, columns) if self.packed else page
        return np.ascontiguousarray(page[::-1])


@contextmanager
def _reading(path: str, error: type[CryodaskError], what: str) -> Iterator[None]:
    """The one place that catches what libraries raise on a damaged file; only failures of the disk pass through."""
    try:
        yield
    except CryodaskError:
        raise
    except Exception as cause:
        if isinstance(cause, OSError) and cause.errno not in (None, errno.EINVAL, errno.EOVERFLOW):
            raise
        told = isinstance(cause, ValueError | RuntimeError | OSError)  # others are about Python, not about the file
        said = " ".join(str(cause).split())[:100] if told else ""
        raise error(
            f"{path}: {what} ({said or type(cause).__name__}).",
            "the transfer was interrupted, or the disk damaged the file",
            "copy it again, or remove it from the folder",
        ) from cause


def open_tiff(path: str | Path, error: type[CryodaskError] = InputError) -> TiffStack:
    """Read all page directories of a TIFF file, compare them with the first, and check that the file contains all pages and no more.

    Parameters
    ----------
    path : str or Path
    error : type
        Class of the error to raise.

    Returns
    -------
    TiffStack
        Shape `(page, y, x)`. ``pixel_size_angstrom`` is from the resolution tags if they have a plausible scale, else None.

    Raises
    ------
    error
        If the file is missing, not a TIFF file, truncated or damaged, holds images that its directory does not list, has colours, pixels
        that are not square, or pages that differ in size, type, compression or meaning.
    """
    path = str(path)
    check_file(path, error, "TIFF")
    with _reading(path, error, "the file cannot be read as TIFF"):
        walked = walk_pages(path, error)
        with tifffile.TiffFile(path) as tiff:
            first = check_pages(path, tiff, walked, error)
            rows, columns = first.shape
            sizes = _pixel_sizes(first.tags)
            try:
                common_size(sizes, _SQUARE)
            except ValueError as different:
                raise error(f"{path} has pixels of {different} A (x, y), which are not square.", "", "resample it") from None
            packed = first.bitspersample == 8 and is_super_resolution_packed(columns, rows)
    dtype = np.dtype(first.dtype)
    return TiffStack(path, (len(walked), rows, 2 * columns if packed else columns), dtype, sizes[1], error, packed)


def _pixel_sizes(tags: tifffile.TiffTags) -> list[float | None]:
    """Pixel size along y and x from the resolution tags, Angstrom; None unless it is plausible for electron microscopy."""
    unit = tag.value if (tag := tags.get("ResolutionUnit")) is not None else None
    sizes: list[float | None] = []
    for name in ("YResolution", "XResolution"):
        resolution = tag.value if (tag := tags.get(name)) is not None else None
        size = 0.0
        if isinstance(resolution, tuple) and len(resolution) == 2 and isinstance(unit, int) and resolution[0]:
            size = _RESOLUTION_UNIT_ANGSTROM.get(int(unit), 0.0) * resolution[1] / resolution[0]
        sizes.append(size if 0.05 < size < 50.0 else None)  # absent, or damaged; the pixels do not depend on it
    return sizes


def write_tiff(path: str | Path, frames: np.ndarray, pixel_size_angstrom: float | None = None) -> None:
    """Write frames `(frame, y, x)` in MRC row order as LZW pages, rows flipped. The file appears when it is complete."""
    path = Path(path)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    tags: dict[str, Any] = {}
    if pixel_size_angstrom is not None:
        # a whole number: older versions of tifffile keep few digits of a fraction
        per_centimetre = round(1.0e8 / pixel_size_angstrom)
        tags = {"resolution": (per_centimetre, per_centimetre), "resolutionunit": "CENTIMETER"}
    with tifffile.TiffWriter(part, bigtiff=frames.nbytes > 2**31) as tiff:
        for frame in frames:
            tiff.write(
                np.ascontiguousarray(frame[::-1]),
                compression="lzw",
                contiguous=False,
                rowsperstrip=64,
                photometric="minisblack",
                metadata=None,
                **tags,
            )
    os.replace(part, path)
