"""EER movies: events of an electron counting camera as run-length codes in a BigTIFF file (the format is in `formats.eer_stream`)."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np

from cryodask.formats.eer_stream import CODINGS, Coding

_METADATA = 65001


@dataclass(frozen=True)
class Events:
    """Events of one camera frame: distinct pixels in ascending order, and their place within the pixel in quarters, `(event,)` each."""

    pixel: np.ndarray
    quarter_y: np.ndarray
    quarter_x: np.ndarray


def encode_frame(events: Events, pixels: int, coding: Coding = CODINGS[65001], *, long_escapes: bool = False) -> bytes:
    """The bit stream of a frame.

    Parameters
    ----------
    pixels : int
        Number of pixels of the frame.
    coding : Coding
        Places within a pixel are in units of its bits: quarters if there are two.
    long_escapes : bool
        Codes of runs without an event also have bits for its place, as RELION 3.1.3 expects in 8-bit streams.
    """
    width = coding.run_bits + coding.column_bits + coding.row_bits
    runs = np.diff(events.pixel, prepend=-1, append=pixels) - 1
    escapes, rest = runs // coding.longest_run, runs % coding.longest_run
    x, y = events.quarter_x.astype(np.int64), events.quarter_y.astype(np.int64)
    within = (x ^ 1 << coding.column_bits - 1) | (y ^ 1 << coding.row_bits - 1) << coding.column_bits
    rest[:-1] |= within << coding.run_bits
    last = np.cumsum(escapes + 1) - 1
    codes = np.full(int(last[-1]) + 1, coding.longest_run, np.int64)
    bits = np.full(len(codes), width if long_escapes else coding.run_bits, np.int64)
    codes[last], bits[last] = rest, width
    bits[-1] = coding.run_bits
    if runs[-1] and runs[-1] % coding.longest_run == 0:  # the end is reached without the last code
        codes, bits = codes[:-1], bits[:-1]
    end = np.cumsum(bits)
    start = end - bits
    # codes overlap in no bit, so that sums of words are their unions
    words = np.zeros(int(end[-1]) // 16 + 2)
    shifted = codes << (start & 15)
    for i in range(2):
        words += np.bincount((start >> 4) + i, shifted >> (16 * i) & 0xFFFF, len(words))
    return words.astype("<u2").tobytes()[: (int(end[-1]) + 7) // 8]


def spread_events(rng: np.random.Generator, counts: np.ndarray, camera_frames: int) -> Iterator[Events]:
    """Counts of one fraction as events of its camera frames, each pixel at most once per frame.

    Parameters
    ----------
    counts : `(y, x)` uint8
        Counts beyond the number of camera frames are lost, as in a camera.
    """
    counted = np.minimum(counts.ravel(), camera_frames).astype(np.int64)
    pixel = np.repeat(np.arange(counted.size), counted)
    count = counted[pixel]
    order = np.arange(len(pixel)) - (np.cumsum(counted) - counted)[pixel]
    # each event has a part of the frames to itself, so that no two are in one frame
    first, after = order * camera_frames // np.maximum(count, 1), (order + 1) * camera_frames // np.maximum(count, 1)
    frame = first + (rng.random(len(pixel)) * (after - first)).astype(np.int64)
    places = rng.integers(0, 16, len(pixel), dtype=np.uint8)
    by_frame = np.argsort(frame.astype(np.uint16), kind="stable")
    ends = np.cumsum(np.bincount(frame, minlength=camera_frames))
    for begin, end in zip([0, *ends[:-1]], ends):
        chosen = by_frame[begin:end]
        yield Events(pixel[chosen], places[chosen] >> 2, places[chosen] & 3)


def render(events: Events, shape: tuple[int, int], upsampling: int = 1) -> np.ndarray:
    """Counts `(upsampling * y, upsampling * x)` uint8 of a frame."""
    out = np.zeros((shape[0] * upsampling, shape[1] * upsampling), np.uint8)
    y = events.pixel // shape[1] * upsampling + (events.quarter_y.astype(np.int64) * upsampling >> 2)
    x = events.pixel % shape[1] * upsampling + (events.quarter_x.astype(np.int64) * upsampling >> 2)
    out[y, x] = 1
    return out


def metadata_xml(items: dict[str, tuple[object, str]]) -> bytes:
    """Metadata of a movie as cameras write them: values and units (empty if there is none) by name."""
    lines = [
        f'<item name="{escape(name)}"{f" unit={chr(34)}{escape(unit)}{chr(34)}" if unit else ""}>{escape(str(value))}</item>'
        for name, (value, unit) in items.items()
    ]
    return "\n".join(["<metadata>", *lines, "</metadata>"]).encode()


def write_eer(
    path: str | Path,
    streams: Iterable[bytes],
    shape: tuple[int, int],
    *,
    compression: int = 65001,
    metadata: bytes | None = None,
    coding: Coding | None = None,
) -> None:
    """Write encoded frames of `(y, x)` pixels as an EER file: one page and one strip per frame. It appears when it is complete.

    ``metadata`` is the XML of the first page; ``coding`` is stored if the compression is 65002.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with open(part, "wb") as file:
        file.write(struct.pack("<2sHHHQ", b"II", 43, 8, 0, 0))
        link = 8
        for number, stream in enumerate(streams):
            strip = file.tell()
            file.write(stream)
            tags = [
                (256, 4, 1, shape[1]), (257, 4, 1, shape[0]), (258, 3, 1, 1), (259, 3, 1, compression), (262, 3, 1, 1),
                (273, 16, 1, strip), (277, 3, 1, 1), (278, 4, 1, shape[0]), (279, 16, 1, len(stream)),
            ]  # fmt: skip
            if number == 0 and metadata is not None:
                file.write(bytes(-file.tell() % 8))
                tags.append((_METADATA, 7, len(metadata), file.tell()))
                file.write(metadata)
            if coding is not None:
                tags += [(65007, 3, 1, coding.run_bits), (65008, 3, 1, coding.column_bits), (65009, 3, 1, coding.row_bits)]
            file.write(bytes(-file.tell() % 8))
            directory = file.tell()
            file.write(struct.pack("<Q", len(tags)) + b"".join(struct.pack("<HHQQ", *tag) for tag in sorted(tags)) + bytes(8))
            end = file.tell()
            file.seek(link)
            file.write(struct.pack("<Q", directory))
            file.seek(end)
            link = end - 8
    os.replace(part, path)
