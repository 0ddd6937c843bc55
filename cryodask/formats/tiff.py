"""TIFF movies and gains. Page row r is row ``height - 1 - r`` in MRC order: rows are flipped on reading and on writing.

RELION, IMOD, SerialEM and MotionCor2 do the same; in a program that does not, the gain is upside down.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from cryodask.errors import CryodaskError, InputError

_RESOLUTION_UNIT_ANGSTROM = {2: 2.54e8, 3: 1.0e8}  # inch, centimetre


@dataclass(frozen=True)
class TiffStack:
    """The pages of a TIFF file, decoded on access; it keeps no file open and can be pickled."""

    path: str
    shape: tuple[int, int, int]
    dtype: np.dtype
    pixel_size_angstrom: float | None
    error: type[CryodaskError]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> np.ndarray:
        """Page ``index``, `(y, x)`, in MRC row order."""
        n = self.shape[0]
        at = index + n if index < 0 else index
        if not 0 <= at < n:
            raise IndexError(index)
        try:
            with tifffile.TiffFile(self.path) as tiff:
                page = tiff.pages[at].asarray(maxworkers=1)
        except (ValueError, RuntimeError, EOFError, IndexError, tifffile.TiffFileError) as cause:
            raise self.error(
                f"{self.path}: page {at + 1} of {n} cannot be decoded ({cause})",
                "the transfer was interrupted, or the disk damaged the file",
                "copy it again, or remove it from the folder",
            ) from cause
        if page.shape != self.shape[1:]:
            raise self.error(
                f"{self.path}: page {at + 1} is {page.shape[0]} x {page.shape[1:]}, the first {self.shape[1]} x {self.shape[2]}",
                "it is not a movie, or has a thumbnail among the frames",
                "write the movie with frames of equal size",
            )
        return np.ascontiguousarray(page[::-1])


def open_tiff(path: str | Path, error: type[CryodaskError] = InputError) -> TiffStack:
    """Read the directory of a TIFF file and check that the file contains all pages.

    Parameters
    ----------
    path : str or Path
    error : type
        Class of the error to raise.

    Returns
    -------
    TiffStack
        Shape `(page, y, x)`. ``pixel_size_angstrom`` is from the resolution tags if they have a plausible scale, else None.
    """
    path = str(path)
    pages = count_pages(path, error)
    try:
        with tifffile.TiffFile(path) as tiff:
            first = tiff.pages.first
            last = tiff.pages[pages - 1]
            ends = [int(o) + int(b) for o, b in zip(last.dataoffsets, last.databytecounts)]
            shape, dtype, tags = first.shape, first.dtype, first.tags
            scale = _pixel_size(tags)
    except (ValueError, RuntimeError, IndexError, KeyError, struct.error, tifffile.TiffFileError) as cause:
        raise error(
            f"{path} cannot be read as TIFF ({cause})", "it is damaged, or not a TIFF file", "copy it again, or remove it"
        ) from cause
    if len(shape) != 2 or dtype is None:
        raise error(
            f"{path} is a colour image ({' x '.join(map(str, shape))}), not a movie",
            "a screenshot or a preview is among the movies",
            "remove it from the folder, or narrow the pattern of the movies",
        )
    if ends and max(ends) > os.path.getsize(path):
        raise error(
            f"{path} is truncated: its last page ends at byte {max(ends)}, the file at {os.path.getsize(path)}",
            "the transfer was interrupted, or is not finished yet",
            "copy it again, or remove it from the folder",
        )
    return TiffStack(path, (pages, *shape), np.dtype(dtype), scale, error)


def count_pages(path: str, error: type[CryodaskError] = InputError) -> int:
    """Number of pages, from following the chain of page directories; raises an error if it leads out of the file.

    tifffile stops silently at a broken link, so that a truncated movie would be taken for a shorter one.
    """
    try:
        size = os.path.getsize(path)
        file = open(path, "rb")  # noqa: SIM115
    except FileNotFoundError:
        raise error(f"{path} does not exist", "it was moved or renamed", "check the path") from None
    except IsADirectoryError:
        raise error(f"{path} is a folder, not a TIFF file", "", "give the path of the file") from None
    if size == 0:
        file.close()
        raise error(f"{path} is empty (0 bytes)", "the transfer has not started, or the disk was full", "copy it again")
    with file:
        head = file.read(16)
        order = {b"II": "<", b"MM": ">"}.get(head[:2])
        version = struct.unpack(order + "H", head[2:4])[0] if order and len(head) >= 8 else 0
        if order is None or version not in (42, 43) or (version == 43 and len(head) < 16):
            raise error(f"{path} is not a TIFF file", "it has another format in spite of its extension", "check the file")
        big = version == 43
        count_format, entry, link_format = (order + "Q", 20, order + "Q") if big else (order + "H", 12, order + "I")
        count_bytes, link_bytes = struct.calcsize(count_format), struct.calcsize(link_format)
        link = struct.unpack(link_format, head[8:16] if big else head[4:8])[0]
        pages, seen = 0, set()
        while link:
            file.seek(link)
            raw = file.read(count_bytes)
            end = link + count_bytes + (struct.unpack(count_format, raw)[0] * entry if len(raw) == count_bytes else 0)
            if len(raw) < count_bytes or end + link_bytes > size or link in seen:
                raise error(
                    f"{path} is truncated: page {pages + 1} should begin at byte {link}, the file has {size} bytes",
                    "the transfer was interrupted, or is not finished yet",
                    "copy it again, or remove it from the folder",
                )
            seen.add(link)
            file.seek(end)
            link = struct.unpack(link_format, file.read(link_bytes))[0]
            pages += 1
    if not pages:
        raise error(f"{path} has no pages", "writing it was interrupted", "copy it again, or remove it")
    return pages


def _pixel_size(tags: tifffile.TiffTags) -> float | None:
    """Pixel size from the resolution tags, Angstrom; None unless it is plausible for electron microscopy."""
    resolution, unit = tags.get("XResolution"), tags.get("ResolutionUnit")
    if resolution is None or unit is None or not resolution.value[0]:
        return None
    size = _RESOLUTION_UNIT_ANGSTROM.get(int(unit.value), 0.0) * resolution.value[1] / resolution.value[0]
    return size if 0.05 < size < 50.0 else None


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
