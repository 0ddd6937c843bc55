"""Damaged MRC and TIFF files: each is read by cryodask and by a second reader (mrcfile, libtiff), which must agree.

By hand, 5,000 files of each:  python tests/_mutated.py 5000
"""

from __future__ import annotations

import io
import struct
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import imagecodecs
import mrcfile
import numpy as np
import tifffile

from cryodask.errors import CryodaskError
from cryodask.formats.movies import open_movie
from cryodask.formats.mrc import read_map, read_mrc, write_mrc

WORDS = (-1, 0, 1, 2, 3, 4, 6, 7, 8, 12, 16, 64, 101, 127, 128, 255, 256, 1024, 65535, 2**31 - 1, -(2**31), 1146047817)


def mrc_originals(folder: Path) -> list[bytes]:
    """A movie, micrograph, stack and map, of all modes and both byte orders."""
    rng, out = np.random.default_rng(0), []
    for kind, shape, is_stack in (
        ("i1", (5, 24, 20), True), ("i2", (3, 16, 18), True), ("f4", (12, 12, 12), False), ("u2", (4, 20, 24), True),
        ("f2", (30, 26), False),
    ):  # fmt: skip
        write_mrc(folder / "o.mrc", rng.poisson(30, shape).astype(kind), 1.5, stack=is_stack)
        raw = (folder / "o.mrc").read_bytes()
        out.append(raw)
        item = np.dtype(kind).itemsize
        header = bytearray(np.frombuffer(raw[:1024], "<i4").astype(">i4").tobytes())
        header[208:216], header[224:1024] = b"MAP \x11\x11\0\0", raw[224:1024]
        body = np.frombuffer(raw[1024:], f"<i{item}").astype(f">i{item}").tobytes()
        out.append(bytes(header) + body)
        extended = bytearray(raw[:1024] + b"extended header " * 8 + raw[1024:])
        extended[92:96] = struct.pack("<i", 128)
        out.append(bytes(extended))
    return out


def tiff_originals() -> list[bytes]:
    """Movies of several types, compressions and layouts."""
    rng, out = np.random.default_rng(1), []
    options: list[tuple[str, dict[str, Any]]] = [
        ("u1", {"compression": "lzw", "rowsperstrip": 8}), ("u1", {}), ("u2", {"compression": "zlib", "predictor": True}),
        ("u2", {"rowsperstrip": 5}), ("i2", {"compression": "zstd"}), ("f4", {"compression": "lzw"}), ("f4", {"tile": (16, 16)}),
        ("u1", {"compression": "packbits", "tile": (32, 16)}), ("u1", {"compression": "lzw", "rowsperstrip": 64}),
    ]  # fmt: skip
    for kind, how in options:
        for big, order in ((False, "<"), (True, "<"), (False, ">")):
            file = io.BytesIO()
            with tifffile.TiffWriter(file, bigtiff=big, byteorder=order) as tiff:
                for frame in rng.poisson(6, (4, 24, 28)).astype(kind):
                    tiff.write(frame, contiguous=False, photometric="minisblack", metadata=None, **how)
            out.append(file.getvalue())
    return out


def mutated(
    originals: list[bytes], count: int, *, seed: int, places: Callable[[bytes], list[int]], order: Callable[[bytes], str]
) -> Iterator[bytes]:
    """Files with a changed word, flipped bits, an end cut off, or bytes appended, removed or inserted; some with two changes.

    ``places``: offsets of the words that describe a file; most changes hit them.
    """
    rng = np.random.default_rng(seed)
    for _ in range(count):
        raw = originals[rng.integers(len(originals))]
        data, words = bytearray(raw), places(raw)
        for _ in range(1 + (rng.random() < 0.2)):
            at = min(int(rng.choice(words)), len(data) - 8)
            match int(rng.integers(8)):
                case 0 | 1:
                    struct.pack_into(order(raw) + "i", data, at, int(rng.choice(WORDS)))
                case 2:
                    struct.pack_into(order(raw) + "h", data, at, int(rng.integers(-5, 400)))
                case 3:
                    data[at + rng.integers(4)] ^= 1 << int(rng.integers(8))
                case 4:
                    del data[int(rng.integers(len(data))) :]
                case 5:
                    data += (
                        bytes(rng.integers(0, 256, rng.integers(1, 4000), dtype="u1"))
                        if rng.random() < 0.7
                        else bytes(rng.integers(1, 900))
                    )
                case 6:
                    at = int(rng.integers(len(data)))
                    data[at : at + int(rng.integers(0, 40))] = bytes(rng.integers(0, 256, rng.integers(0, 40), dtype="u1"))
                case _:
                    data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
            if len(data) < 16:
                break
        yield bytes(data)


def mrc_places(raw: bytes) -> list[int]:
    """Words of an MRC header, those with sizes, mode and axes more often."""
    return [*range(0, 100, 4), 152, 156, 208, 212, 216, 0, 4, 8, 12, 64, 68, 72, 92]


def tiff_places(raw: bytes) -> list[int]:
    """Words of the header and the directories of a TIFF file."""
    with tifffile.TiffFile(io.BytesIO(raw)) as tiff:
        tags = [tag for page in tiff.pages for tag in page.tags]
        return [4, 8, *(t.offset + i for t in tags for i in (0, 2, 4, 8)), *(t.valueoffset for t in tags)]


def mrc_difference(path: Path) -> str:
    """How cryodask's reading of a file differs from mrcfile's; "" if they agree, "refused: ..." if cryodask refuses it."""
    readers: tuple[Callable[[Path], Any], ...] = (lambda p: open_frames(p), lambda p: read_mrc(p)[0], lambda p: read_map(p)[0])
    said = []
    for read in readers:
        try:
            ours = read(path)
        except CryodaskError as error:
            said.append(f"refused: {error.what}")
            continue
        try:
            with mrcfile.open(path) as file:
                theirs, header = np.asarray(file.data), file.header
                order = [int(header[n]) for n in ("maps", "mapr", "mapc")]
        except Exception as error:
            return f"mrcfile refuses: {error}"
        cube = theirs.reshape(-1, *theirs.shape[-2:])  # an image, or a stack of volumes
        cube = cube.transpose(order.index(3), order.index(2), order.index(1))
        ours = ours.reshape((1,) * (3 - ours.ndim) + ours.shape)
        if ours.dtype == np.uint8 and cube.dtype == np.int8:
            cube = cube.view(np.uint8)
        if ours.shape != cube.shape or not np.array_equal(ours, cube, equal_nan=ours.dtype.kind == "f"):
            return f"differs: {ours.shape} {ours.dtype}, {cube.shape} {cube.dtype}"
    return said[0] if len(said) == len(readers) else ""


def tiff_difference(path: Path) -> str:
    """How cryodask's reading of a movie differs from libtiff's; "" if they agree, "refused: ..." if cryodask refuses it."""
    try:
        ours = open_frames(path)
    except CryodaskError as error:
        return f"refused: {error.what}"
    raw = path.read_bytes()
    for i, frame in enumerate(ours):
        try:
            theirs = imagecodecs.tiff_decode(raw, index=i)
        except Exception as error:
            return f"libtiff refuses: {error}"
        if frame.shape != theirs.shape or frame.dtype != theirs.dtype or frame.tobytes() != theirs[::-1].tobytes():
            return f"differs: page {i} {frame.shape} {frame.dtype}, {theirs.shape} {theirs.dtype}"
    return ""


def open_frames(path: Path) -> np.ndarray:
    """All frames of a movie."""
    movie = open_movie(path)
    return np.stack([movie[i] for i in range(len(movie))])


def differences(kind: str, count: int, folder: Path, seed: int = 0) -> Counter[str]:
    """Outcomes of mutated files: how many are refused, read alike, and (with what differs) read otherwise."""
    path = folder / ("m.mrc" if kind == "mrc" else "m.tif")
    originals = mrc_originals(folder) if kind == "mrc" else tiff_originals()
    places = mrc_places if kind == "mrc" else tiff_places
    order: Callable[[bytes], str] = (
        (lambda raw: ">" if raw[212] == 0x11 else "<") if kind == "mrc" else (lambda raw: ">" if raw[:2] == b"MM" else "<")
    )
    known = {raw: places(raw) for raw in originals}
    outcomes: Counter[str] = Counter()
    for data in mutated(originals, count, seed=seed, places=known.__getitem__, order=order):
        path.write_bytes(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            said = mrc_difference(path) if kind == "mrc" else tiff_difference(path)
        outcomes["refused" if said.startswith("refused") else said or "read alike"] += 1
    return outcomes


if __name__ == "__main__":
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    for what in ("mrc", "tiff"):
        with tempfile.TemporaryDirectory() as made:
            for outcome, number in differences(what, int(sys.argv[1]), Path(made)).most_common():
                print(f"{what:5} {number:6} {outcome}")
