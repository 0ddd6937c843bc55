"""MRC movies compressed as a whole (gzip, bzip2, zstd): decompressed as a stream, section by section, never as a whole."""

from __future__ import annotations

import bz2
import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cryodask.errors import CryodaskError, InputError
from cryodask.formats.mrc import MrcStack
from cryodask.formats.mrc_header import HEADER_BYTES, common_size, parse_header
from cryodask.formats.presence import check_file

COMPRESSIONS = (".gz", ".bz2", ".zst")
_BLOCK = 1 << 22
_MOST_BYTES = 1 << 32


class _Place:
    """An open stream and the section that it has reached. Copies of it, in other processes too, begin at the start."""

    def __init__(self) -> None:
        self.stream: Any = None
        self.at = 0

    def __reduce__(self) -> tuple[type[_Place], tuple[()]]:
        return _Place, ()


@dataclass(frozen=True)
class CompressedMrcStack(MrcStack):
    """A compressed stack, read from its start on: cheap in the order of its sections, while a step back begins again."""

    place: _Place = field(default_factory=_Place, compare=False)

    def _rows(self, s: int, first: int, count: int) -> np.ndarray:
        header, place, total = self.header, self.place, self.header.file_shape[0]
        with _decompressing(self.path, self.error, f"section {s + 1} of {total} cannot be decompressed"):
            if place.stream is None or s < place.at:
                place.stream, place.at = _opened(self.path, self.error), 0
                _skip(place.stream, header.offset)
            _skip(place.stream, (s - place.at) * header.section_bytes)
            place.at = s
            data = _read(place.stream, header.section_bytes)
            place.at = s + 1
            if place.at == total:
                self._check_end(place)
        rows = data.view(header.file_dtype).reshape(header.file_shape[1], -1)[first : first + count]
        return self._pixels(rows)

    def _check_end(self, place: _Place) -> None:
        """Refuse more than padding, less than a section of zeros, after the last section."""
        rest = 0
        while block := place.stream.read(_BLOCK):
            rest += len(block)
            if rest >= self.header.section_bytes or any(block):
                raise self.error(
                    f"{self.path} is longer than its header says: more data follow its {self.header.file_shape[0]} sections.",
                    "the header was not updated when the last sections were written",
                    "correct the header (nx, ny, nz, mode, nsymbt), or copy the file again",
                )
        place.stream.close()
        place.stream, place.at = None, 0


def ending_of(path: str | Path) -> str:
    """Extension of a movie, lower case: with the one before it if the last is that of a compression (``.mrc.gz``)."""
    path = Path(path)
    last = path.suffix.lower()
    return Path(path.stem).suffix.lower() + last if last in COMPRESSIONS else last


def stem_of(path: str | Path) -> str:
    """Name of a movie without its extension."""
    path = Path(path)
    return Path(path.stem).stem if path.suffix.lower() in COMPRESSIONS else path.stem


def open_compressed_mrc(path: str | Path, error: type[CryodaskError] = InputError, *, counts: bool = False) -> CompressedMrcStack:
    """Read the header of a compressed MRC file; its length is checked when its last section is read.

    Raises
    ------
    error
        If the file is missing, damaged, or not one that can be read as a stream: its axes are swapped, or only its length would tell how
        its pixels are packed.
    """
    path = str(path)
    check_file(path, error, "MRC")
    stream = _opened(path, error)
    with _decompressing(path, error, "it cannot be decompressed"), stream:
        raw = bytes(_read(stream, HEADER_BYTES))
    header = parse_header(path, raw, None, error)
    if header.order != (0, 1, 2) or header.section_bytes > _MOST_BYTES:
        what = "other axes than sections, rows and columns" if header.order != (0, 1, 2) else f"sections of {header.section_bytes} bytes"
        raise error(f"{path} has {what}, which cannot be read from a compressed file.", "", "uncompress it")
    try:
        pixel = common_size(header.voxel_size_angstrom[1:])
    except ValueError as sizes:
        raise error(f"{path} has pixels of {sizes} A (x, y), which are not square.", "", "correct the header, or resample it") from None
    return CompressedMrcStack(path, header, pixel, counts, error)


def _opened(path: str, error: type[CryodaskError]) -> Any:
    ending = Path(path).suffix.lower()
    if ending == ".gz":
        return gzip.open(path, "rb")
    if ending == ".bz2":
        return bz2.open(path, "rb")
    try:
        import pyarrow
    except ImportError:
        raise error(f"{path} is compressed with zstd, which needs pyarrow.", "", "pip install pyarrow, or uncompress the file") from None
    return pyarrow.CompressedInputStream(pyarrow.OSFile(path), "zstd")


@contextmanager
def _decompressing(path: str, error: type[CryodaskError], what: str) -> Iterator[None]:
    try:
        yield
    except (EOFError, zlib.error, ValueError, OSError) as cause:
        if isinstance(cause, OSError) and cause.errno is not None:
            raise  # of the disk
        said = " ".join(str(cause).split())[:100]
        raise error(
            f"{path}: {what} ({said or type(cause).__name__}).",
            "the transfer was interrupted, or the disk damaged the file",
            "copy it again, or remove it from the folder",
        ) from cause


def _read(stream: Any, count: int) -> np.ndarray:
    """``count`` bytes; memory is taken as they come, whatever a header announces."""
    out = np.empty(count, np.uint8)
    done = 0
    while done < count:
        block = stream.read(min(_BLOCK, count - done))
        if not block:
            raise EOFError(f"it ends after {done} of {count} bytes")
        out[done : done + len(block)] = np.frombuffer(block, np.uint8)
        done += len(block)
    return out


def _skip(stream: Any, count: int) -> None:
    while count > 0:
        block = stream.read(min(_BLOCK, count))
        if not block:
            raise EOFError("it ends too early")
        count -= len(block)
