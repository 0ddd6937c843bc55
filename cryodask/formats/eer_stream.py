"""The bit stream of one EER camera frame, decoded into a buffer of counts.

Codes follow each other from the lowest bit of the first byte. For each event: the run of empty pixels since the last one, then the place of
the event within its pixel (column, then row, each with its highest bit inverted). A run of all ones is that many empty pixels and no event.
The last run reaches the end of the frame.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import imagecodecs
import numpy as np


class StreamError(ValueError):
    """The bits are not those of one whole frame."""


@dataclass(frozen=True)
class Coding:
    """Bits of a run, and of the column and the row of an event within its pixel."""

    run_bits: int = 7
    column_bits: int = 2
    row_bits: int = 2

    @property
    def possible(self) -> bool:
        """Whether the bits are of numbers that a camera writes: with others a decoder may never come to an end."""
        return 1 <= self.run_bits <= 16 and all(0 <= bits <= 8 for bits in (self.column_bits, self.row_bits))

    @property
    def longest_run(self) -> int:
        """Empty pixels that one code can skip."""
        return (1 << self.run_bits) - 1

    @property
    def finest(self) -> int:
        """Largest factor by which pixels can be divided."""
        return 1 << min(self.column_bits, self.row_bits)


CODINGS = {65000: Coding(8), 65001: Coding(7)}
"""Codings of TIFF compressions; the coding of 65002 is in further tags."""


def add_frame(out: np.ndarray, stream: bytes, coding: Coding, upsampling: int = 1) -> None:
    """Add the events of a frame to counts.

    Parameters
    ----------
    out : `(upsampling * y, upsampling * x)` uint8 or uint16, contiguous
        A pixel has at most one event in a frame. After an error its content is undefined.
    stream : bytes
        The strip as stored: of any length, with any padding.
    upsampling : 1, 2 or 4
        Pixels per camera pixel, along one axis.

    Raises
    ------
    StreamError
        If the stream is truncated, damaged, or of a frame of another size.

    Notes
    -----
    8-bit streams exist with codes of 8 and of 12 bits for runs without an event (imagecodecs reads the former, RELION 3.1.3 the latter).
    Each is tried: a wrong one does not end where the frame ends.
    """
    if not coding.possible:
        raise StreamError(f"codes of {coding.run_bits}, {coding.column_bits} and {coding.row_bits} bits are not of a camera")
    if coding.run_bits == 8:
        frame = np.zeros_like(out)
        try:
            _add_decoded(frame, stream, coding, upsampling)
        except StreamError:
            frame = _with_long_escapes(stream, coding, out.shape, upsampling)
        out += frame.astype(out.dtype, copy=False)
    else:
        _add_decoded(out, stream, coding, upsampling)


@lru_cache(maxsize=1)
def _compiled() -> Any:
    """The compiled decoder, or None without numba."""
    found = importlib.util.find_spec("numba") is not None
    return importlib.import_module("cryodask.formats._eer_numba").add_events if found else None


def _add_decoded(out: np.ndarray, stream: bytes, coding: Coding, upsampling: int) -> None:
    add_events = _compiled()
    if add_events is None:
        _add_by_imagecodecs(out, stream, coding, upsampling)
        return
    words = np.frombuffer(stream + bytes(16 + -len(stream) % 4), "<u4")
    columns, pixels = out.shape[1] // upsampling, out.size // upsampling**2
    bits = coding.run_bits, coding.column_bits, coding.row_bits
    if not add_events(out.reshape(-1), words, 8 * len(stream), columns, pixels, *bits, upsampling):
        raise StreamError(f"its events do not fill a frame of {pixels} pixels")


def _add_by_imagecodecs(out: np.ndarray, stream: bytes, coding: Coding, upsampling: int) -> None:
    end = _end(out, coding, upsampling)
    before = end.copy()
    pixels = out.size // upsampling**2
    try:
        # imagecodecs wants an even number of bytes, and ends silently where the stream does. The ones that follow lead it beyond the
        # frame, unless the stream has led it to the end already
        _decode(out, stream + b"\xff" * (32 + len(stream) % 2), coding, upsampling)
    except imagecodecs.EerError as cause:
        has_last = not np.array_equal(before[-upsampling:, -upsampling:], end[-upsampling:, -upsampling:])
        if not has_last or not _ends_with_event(stream, coding, pixels):
            raise StreamError(f"its events do not fill a frame of {pixels} pixels") from cause
    else:
        if np.array_equal(before, end) and not _ends_with_run(stream, coding, pixels):
            raise StreamError("its events end before the frame does")


def _end(out: np.ndarray, coding: Coding, upsampling: int) -> np.ndarray:
    """View of the last pixels: what follows a stream that is cut off leads to the exact end of a frame only over half a longest run."""
    reach, columns = (coding.longest_run + 1) // 2, out.shape[1] // upsampling
    rows = max(1, reach // columns)
    return out[-rows * upsampling :, -min(reach, columns) * upsampling :]


def _ends_with_event(stream: bytes, coding: Coding, pixels: int) -> bool:
    """Whether the last event of a stream is in the last pixel; a run of no pixels need not follow."""
    frame = np.zeros((1, pixels), np.uint8)
    try:
        _decode(frame, stream + bytes(2 + len(stream) % 2), coding, 1)
    except imagecodecs.EerError:
        return False
    return bool(frame[0, -1])


def _ends_with_run(stream: bytes, coding: Coding, pixels: int) -> bool:
    """Whether a stream that ends with empty pixels reaches the end of the frame: it is too long for frames of one or two pixels less.

    One of them may end where a code does.
    """
    for fewer in (1, 2):
        try:
            _decode(_scratch(pixels)[:, fewer:], stream + bytes(4 + len(stream) % 2), coding, 1)
        except imagecodecs.EerError:
            return True
    return False


@lru_cache(maxsize=1)
def _scratch(pixels: int) -> np.ndarray:
    """A frame whose content does not matter; kept, because new memory takes longer than decoding."""
    return np.empty((1, pixels), np.uint8)


def _decode(out: np.ndarray, stream: bytes, coding: Coding, upsampling: int) -> None:
    bits = coding.run_bits, coding.column_bits, coding.row_bits
    try:
        imagecodecs.eer_decode(stream, out.shape, *bits, superres=upsampling.bit_length() - 1, out=out)
    except ValueError as cause:
        raise StreamError("codes of {}, {} and {} bits can be read with numba only".format(*bits)) from cause


def _with_long_escapes(stream: bytes, coding: Coding, shape: tuple[int, ...], upsampling: int) -> np.ndarray:
    """A frame whose codes all have the same length, 12 bits: two in three bytes."""
    pixels = shape[0] * shape[1] // upsampling**2
    data = np.frombuffer(stream + b"\0" * (-len(stream) % 3 + 3), np.uint8).astype(np.uint16).reshape(-1, 3)
    codes = np.empty(2 * len(data), np.uint16)
    codes[0::2] = data[:, 0] | (data[:, 1] & 15) << 8
    codes[1::2] = data[:, 1] >> 4 | data[:, 2] << 4
    run = codes & coding.longest_run
    is_event = run < coding.longest_run
    after = np.cumsum(run + is_event, dtype=np.int64)  # pixels that are settled after each code
    last = int(np.searchsorted(after, pixels))
    # the last run is followed by no event: what is read as one is padding, and lies just beyond the frame
    excess = int(after[last]) - pixels if last < len(after) else -1
    needed = 12 * last + (12 if excess == 0 and is_event[last] else coding.run_bits)
    if not (excess == 0 or (excess == 1 and is_event[last])) or needed > 8 * len(stream):
        raise StreamError(f"its events do not fill a frame of {pixels} pixels")
    events = np.flatnonzero(is_event[: last + 1] & (after[: last + 1] <= pixels))
    position, within = after[events] - 1, codes[events] >> coding.run_bits
    columns = shape[1] // upsampling
    x = _place(position % columns, within & 3, upsampling)
    y = _place(position // columns, within >> 2 & 3, upsampling)
    frame = np.zeros(shape, np.uint8)
    frame[y, x] = 1
    return frame


def _place(pixel: np.ndarray, within: np.ndarray, upsampling: int) -> np.ndarray:
    """Index on the finer grid of an event in a quarter of a pixel (the highest bit is inverted)."""
    return pixel * upsampling + ((within ^ 2) * upsampling >> 2)
