"""EER movies (Falcon 4 and 4i): events of hundreds of camera frames, summed into fractions as they are read.

Rows are NOT flipped: row r of the camera is row r in MRC order, as in RELION 3.1.3's sums (TIFF movies are flipped).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import IO
from xml.etree import ElementTree

import numpy as np

from cryodask.errors import CryodaskError, MovieError
from cryodask.formats.eer_stream import CODINGS, Coding, StreamError, add_frame
from cryodask.formats.fractions import Fractions
from cryodask.formats.presence import check_file
from cryodask.formats.tiff_pages import Walked, walk_pages

_WIDTH, _HEIGHT, _COMPRESSION, _STRIPS, _STRIP_BYTES, _METADATA = 256, 257, 259, 273, 279, 65001
_RUN_BITS, _COLUMN_BITS, _ROW_BITS = 65007, 65008, 65009
_VARIABLE = 65002
_MOST_PIXELS, _MOST_METADATA, _MOST_BYTES_PER_PIXEL = 1 << 28, 1 << 20, 2
_SMALLEST_PIXEL, _LARGEST_PIXEL = 0.05, 50.0
_SQUARE = 1.01
"""Ratio of height and width up to which pixels count as square, as in TIFF movies."""


@dataclass(frozen=True)
class EerMovie:
    """An EER movie, decoded on access; it keeps no file open and can be pickled.

    ``strips`` `(camera frame, 2)`: first byte and number of bytes. ``camera_shape``: (y, x) pixels of the camera. A frame of the movie is
    the sum of ``frames_per_fraction`` camera frames; those that are left over at the end are not used.
    ``metadata_dose_e_a2``: exposure of one camera frame by the metadata of the file, electrons per square Angstrom; None if it has none.
    ``camera_dose_e_a2``: the one that is used.
    """

    path: str
    strips: np.ndarray
    camera_shape: tuple[int, int]
    coding: Coding
    camera_pixel_size_angstrom: float | None
    metadata_dose_e_a2: float | None
    error: type[CryodaskError]
    frames_per_fraction: int = 1
    upsampling: int = 1
    camera_dose_e_a2: float | None = None

    def __len__(self) -> int:
        return len(self.strips) // self.frames_per_fraction

    @property
    def camera_frames(self) -> int:
        """Number of frames that the camera recorded."""
        return len(self.strips)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(fraction, y, x)."""
        return len(self), self.camera_shape[0] * self.upsampling, self.camera_shape[1] * self.upsampling

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the counts: a pixel has at most one event per camera frame."""
        return np.dtype(np.uint8 if self.frames_per_fraction <= 255 else np.uint16)

    @property
    def pixel_size_angstrom(self) -> float | None:
        """Size of a pixel of the fractions by the metadata; None if they have no plausible value."""
        return None if self.camera_pixel_size_angstrom is None else self.camera_pixel_size_angstrom / self.upsampling

    def fractionated(self, how: Fractions) -> EerMovie:
        """The same movie with other fractions and pixels; a fraction has at most all camera frames.

        Raises
        ------
        error
            If the exposure of a frame is not known, or the file does not record places within a pixel.
        """
        dose = how.camera_dose_e_a2 or self.metadata_dose_e_a2
        if dose is None:
            raise self.error(
                f"The exposure of {self.path} is not known.",
                "its metadata do not give it",
                "give  microscope: {dose_per_frame: ...}  of one camera frame in the project file, electrons per square Angstrom",
            )
        if how.upsampling > self.coding.finest or (how.upsampling > 1 and any(n % 2 for n in self.camera_shape)):
            raise self.error(
                f"{self.path} cannot be read at {how.upsampling} times the resolution of the camera.",
                "it was recorded without places of events within a pixel",
                "set  ingest: {eer_upsampling: 1}",
            )
        frames = how.frames or max(1, round(how.dose_e_a2 / dose))
        return replace(self, frames_per_fraction=min(frames, self.camera_frames), upsampling=how.upsampling, camera_dose_e_a2=dose)

    def __getitem__(self, index: int) -> np.ndarray:
        """Fraction ``index``, `(y, x)`, in MRC row order."""
        n, *shape = self.shape
        at = index + n if index < 0 else index
        if not 0 <= at < n:
            raise IndexError(index)
        out = np.zeros(shape, self.dtype)
        with open(self.path, "rb") as file:
            for frame in range(at * self.frames_per_fraction, (at + 1) * self.frames_per_fraction):
                first, count = (int(v) for v in self.strips[frame])
                file.seek(first)
                try:
                    add_frame(out, file.read(count), self.coding, self.upsampling)
                except StreamError as cause:
                    raise self.error(
                        f"{self.path}: camera frame {frame + 1} of {self.camera_frames} cannot be decoded: {cause}.",
                        "writing or copying the file was interrupted, or the disk damaged it",
                        "copy it again, or remove it from the folder",
                    ) from None
        return out


def open_eer(path: str, error: type[CryodaskError] = MovieError) -> EerMovie:
    """Read the directories of an EER file, and check that it contains all frames that they list; a frame of the camera is a frame.

    Pages without events, such as a finished image, are left out.

    Raises
    ------
    error
        If the file is missing, truncated, has no pages of events, or pages that differ in size or coding.
    """
    check_file(path, error, "EER")
    pages = walk_pages(path, error)
    framed = [page for page in pages if page.values.get(_COMPRESSION) in (*CODINGS, _VARIABLE)]
    if not framed:
        raise error(f"{path} has no frames of events.", "it is a gain reference, or a TIFF file with the extension of EER", "rename it")
    first = framed[0]
    shape, coding = _shape_of(first), _coding_of(first)
    if min(shape) < 4 or shape[0] * shape[1] > _MOST_PIXELS:
        raise error(f"{path} has frames of {shape[1]} x {shape[0]} pixels, which no camera has.", "the file is damaged", "copy it again")
    if not coding.possible:
        bits = f"{coding.run_bits}, {coding.column_bits} and {coding.row_bits} bits"
        raise error(f"{path} has codes of {bits}, which no camera writes.", "the file is damaged", "copy it again")
    strips = np.empty((len(framed), 2), np.int64)
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        for i, page in enumerate(framed):
            where = f"{path}: camera frame {i + 1} of {len(framed)}"
            if _shape_of(page) != shape or _coding_of(page) != coding:
                raise error(f"{where} differs from the first in size or coding.", "the file is damaged", "copy it again, or remove it")
            start, count = _strip_of(page, where, error)
            if start + count > size:
                raise error(
                    f"{where} is truncated: it ends at byte {start + count}, the file at {size}.",
                    "the transfer was interrupted, or is not finished yet",
                    "copy it again, or remove it from the folder",
                )
            strips[i] = start, count
        metadata = _metadata(pages, file, size)
    announced = metadata.get("numberOfFrames", 0.0)
    if announced > len(framed):
        raise error(
            f"{path} has {len(framed)} frames, its metadata announce {announced:.0f}.",
            "writing it was interrupted, or is not finished yet",
            "copy it again, or remove it from the folder",
        )
    pixel_angstrom = _pixel(path, metadata, error)
    return EerMovie(path, strips, shape, coding, pixel_angstrom, _dose(metadata, pixel_angstrom, len(framed)), error)


def _shape_of(page: Walked) -> tuple[int, int]:
    return page.values.get(_HEIGHT, 0), page.values.get(_WIDTH, 0)


def _coding_of(page: Walked) -> Coding:
    known = CODINGS.get(page.values[_COMPRESSION])
    if known is not None:
        return known
    usual = Coding()
    return Coding(
        page.values.get(_RUN_BITS, usual.run_bits),
        page.values.get(_COLUMN_BITS, usual.column_bits),
        page.values.get(_ROW_BITS, usual.row_bits),
    )


def _strip_of(page: Walked, where: str, error: type[CryodaskError]) -> tuple[int, int]:
    """First byte and number of bytes of a frame, which is one strip."""
    strips, count = page.counts.get(_STRIPS, 0), page.values.get(_STRIP_BYTES, 0)
    if strips != 1 or page.counts.get(_STRIP_BYTES) != 1 or page.values[_STRIPS] <= 0 or count <= 0:
        raise error(
            f"{where} has {strips} strips of {count} bytes rather than one with its events.",
            "writing the file was interrupted, or it is damaged",
            "copy it again, or remove it",
        )
    if count > _MOST_BYTES_PER_PIXEL * math.prod(_shape_of(page)) + 64:
        raise error(f"{where} has {count} bytes, more than its pixels can have events.", "the file is damaged", "copy it again")
    return page.values[_STRIPS], count


def _metadata(pages: list[Walked], file: IO[bytes], size: int) -> dict[str, float]:
    """Numbers in the metadata of the acquisition, by name; empty if they are absent or cannot be parsed."""
    page = next((p for p in pages if _METADATA in p.values), None)
    if page is None or not 8 < page.counts[_METADATA] <= _MOST_METADATA or page.values[_METADATA] >= size:
        return {}
    file.seek(page.values[_METADATA])
    text = file.read(page.counts[_METADATA]).rstrip(b"\0 \r\n")
    if b"<!" in text:  # entities have no place in it
        return {}
    try:
        root = ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError, LookupError):
        return {}
    out = {}
    for item in root.iter("item"):
        value = (item.text or "").strip()
        if re.fullmatch(r"[-+]?[0-9]+(\.[0-9]*)?([eE][-+]?[0-9]+)?", value):
            out[item.get("name", "")] = float(value)
    return out


def _pixel(path: str, metadata: dict[str, float], error: type[CryodaskError]) -> float | None:
    """Pixel size by the metadata, Angstrom; None if they have no plausible value."""
    edges = [metadata.get(f"sensorPixelSize.{edge}", math.nan) * 1.0e10 for edge in ("height", "width")]
    known = [edge for edge in edges if _SMALLEST_PIXEL < edge < _LARGEST_PIXEL]
    if known and max(known) > _SQUARE * min(known):
        raise error(
            f"The pixels of {path} are {edges[1]:.4g} x {edges[0]:.4g} A by its metadata, and no step takes pixels that are not square.",
            "the metadata are damaged",
            "copy the file again",
        )
    return known[0] if known else None


def _dose(metadata: dict[str, float], pixel_angstrom: float | None, frames: int) -> float | None:
    """Exposure of a camera frame by ``totalDose`` (electrons per pixel), or ``meanDoseRate`` and ``exposureTime``."""
    total = metadata.get("totalDose") or metadata.get("meanDoseRate", 0.0) * metadata.get("exposureTime", 0.0)
    if pixel_angstrom is None or not 0.0 < total < math.inf:
        return None
    recorded = metadata.get("numberOfFrames") or frames
    return total / recorded / pixel_angstrom**2
