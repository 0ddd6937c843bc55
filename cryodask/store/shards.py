"""Shard files: one item of one variable, written chunk by chunk here, readable by any Zarr v3 library.

zarr-python keeps the whole shard in memory and never calls fsync; here a movie is streamed frame by frame, and the shard appears under
its name only when all of it is on disk.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
from numcodecs import Blosc, blosc

from cryodask.errors import DiskError
from cryodask.store.away import explained
from cryodask.store.files import fsync_folder, write_all

_NO_CHUNK = np.iinfo(np.uint64).max
_REPAIR = "invalidate the damaged results with  cryodask verify --repair PROJECT  and rerun the project"
_RECOMPUTED = "remove {} and rerun the project: it is recomputed"
_BLOCK = 1 << 16
"""Bytes read at a time for a checksum: small enough to reuse the same memory."""


@dataclass(frozen=True)
class Layout:
    """Shape of one item of a bulk variable and of its inner chunks.

    Counts compress well (blosc zstd-1 with bitshuffle: 3.4 times at 1.25 e/px, 400 Mpx/s per core), and so do ``rounded`` floats, whose
    last bits are zero (3.2 times, 180 Mpx/s); others do not and are not compressed.
    """

    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    dtype: str
    rounded: bool = False

    @classmethod
    def of(cls, shape: tuple[int, ...], chunk_hint: tuple[int, ...], dtype: str, *, rounded: bool = False) -> Layout:
        """A layout from a chunk hint, in which 0 (or nothing) means the whole axis."""
        hint = tuple(chunk_hint) or (0,) * len(shape)
        return cls(tuple(shape), tuple(min(h, n) if h else n for h, n in zip(hint, shape)), dtype, rounded)

    @classmethod
    def of_array(cls, folder: Path) -> Layout:
        """The layout of a single-shard array of values that are not rounded, from the ``zarr.json`` in its folder.

        Raises
        ------
        DiskError
            If that file is missing or damaged, or describes a form that is not written here.
        """
        path = folder / "zarr.json"
        try:
            meta = json.loads(path.read_text())
            (sharding,) = meta["codecs"]
            inner = sharding["configuration"]
            made = cls(tuple(meta["shape"]), tuple(inner["chunk_shape"]), str(np.dtype(meta["data_type"])))
            codecs = ["bytes", "blosc"] if made.compressed else ["bytes"]
            fits = (
                tuple(meta["chunk_grid"]["configuration"]["chunk_shape"]) == made.padded and [c["name"] for c in inner["codecs"]] == codecs
            )
        except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
            raise _damage(
                path, f"it does not describe how the array is stored ({type(error).__name__})", _RECOMPUTED.format(folder.parent)
            ) from error
        if not fits:
            raise _damage(path, "it describes a form of array that cryodask does not write", _RECOMPUTED.format(folder.parent))
        return made

    @property
    def padded(self) -> tuple[int, ...]:
        """The shape rounded up to whole chunks, so that no write is ever a read-modify-write."""
        return tuple(-(-n // c) * c for n, c in zip(self.shape, self.chunk))

    @property
    def grid(self) -> tuple[int, ...]:
        """Chunks along each axis."""
        return tuple(-(-n // c) for n, c in zip(self.shape, self.chunk))

    @property
    def compressed(self) -> bool:
        """Whether the chunks go through the codec."""
        return self.rounded or np.dtype(self.dtype).kind in "iub"

    def codec(self) -> Any:
        """The inner codec, or None."""
        # with threads, blocks are placed in the order in which they finish: the same pixels would give different bytes each time
        blosc.use_threads = False
        return Blosc(cname="zstd", clevel=1, shuffle=Blosc.BITSHUFFLE) if self.compressed else None

    def zarr_codecs(self) -> list[Any]:
        """The inner codec as zarr's ``compressors``."""
        from zarr.codecs import BloscCodec

        if not self.compressed:
            return []
        return [BloscCodec(cname="zstd", clevel=1, shuffle="bitshuffle", typesize=np.dtype(self.dtype).itemsize)]


class ShardFile(NamedTuple):
    """A written shard: crc32c of the whole file, its size in bytes, and its time (ns since 1970)."""

    crc: int
    size: int
    mtime_ns: int


class ShardWriter:
    """Writes one shard: ``put`` chunks in any order, then ``close``; nothing is visible before.

    The file ``NAME.<host>.<pid>.part`` is renamed to NAME after an fsync; then the folder is synced as well.
    """

    def __init__(self, path: str | Path, layout: Layout) -> None:
        self.path, self.layout = Path(path), layout
        self._codec = layout.codec()
        self._index = np.full((*layout.grid, 2), _NO_CHUNK, np.uint64)
        self._position = 0
        self._crc = google_crc32c.Checksum()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._part = self.path.with_name(f"{self.path.name}.{socket.gethostname()}.{os.getpid()}-{threading.get_ident():x}.part")
        self._fd = os.open(self._part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)

    def put(self, coordinate: tuple[int, ...], chunk: np.ndarray) -> None:
        """Append the chunk at ``coordinate`` of the chunk grid; edge chunks are padded with zeros."""
        want = self.layout.chunk
        if chunk.shape != want:
            chunk = np.pad(chunk, [(0, w - n) for w, n in zip(want, chunk.shape)])
        raw = np.ascontiguousarray(chunk, dtype=np.dtype(self.layout.dtype).newbyteorder("<"))
        data = self._codec.encode(raw) if self._codec else raw.tobytes()
        self._write(data)
        self._index[coordinate] = (self._position, len(data))
        self._position += len(data)

    def put_array(self, array: np.ndarray) -> None:
        """Append all chunks of an array; for an array shorter than the layout's first axis the rest is left out (and reads as zero)."""
        counts = [-(-n // c) for n, c in zip(array.shape, self.layout.chunk)]
        for coordinate in np.ndindex(*counts):
            window = tuple(slice(i * c, (i + 1) * c) for i, c in zip(coordinate, self.layout.chunk))
            self.put(coordinate, array[window])

    def _write(self, data: bytes) -> None:
        write_all(self._fd, data)
        self._crc.update(bytes(data) if not isinstance(data, bytes) else data)

    def close(self) -> ShardFile:
        """Finish the shard and make it visible; returns its entry for the commit record."""
        raw = self._index.astype("<u8").tobytes()
        self._write(raw + google_crc32c.value(raw).to_bytes(4, "little"))
        os.fsync(self._fd)
        # of our own open file: another attempt's file may replace it a moment later
        there = os.fstat(self._fd)
        os.close(self._fd)
        self._fd = -1
        os.rename(self._part, self.path)
        fsync_folder(self.path.parent)
        return ShardFile(int.from_bytes(self._crc.digest(), "big"), there.st_size, there.st_mtime_ns)

    def abort(self) -> None:
        """Discard what was written."""
        if self._fd >= 0:
            os.close(self._fd)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._part)


def write_shard(path: str | Path, layout: Layout, data: Any) -> ShardFile:
    """Write an array, or a movie frame by frame, as one shard."""
    writer = ShardWriter(path, layout)
    try:
        if isinstance(data, np.ndarray):
            writer.put_array(data)
        else:
            rest = (0,) * (len(layout.shape) - 1)
            for i in range(len(data)):
                writer.put((i, *rest), data[i][np.newaxis])
        return writer.close()
    except BaseException:
        writer.abort()
        raise


class ShardReader:
    """Reads a shard by chunks along its first axis; for a movie it satisfies the ``Frames`` protocol (inner chunk = one frame).

    ``length`` may shorten the first axis (ragged items).
    """

    def __init__(self, path: str | Path, layout: Layout, length: int | None = None) -> None:
        self.path, self.layout = Path(path), layout
        self.shape = (layout.shape[0] if length is None else length, *layout.shape[1:])
        self.dtype = np.dtype(layout.dtype)
        self._index: np.ndarray | None = None
        self._stamp = (0, 0, 0)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, i: int) -> np.ndarray:
        if not 0 <= i < len(self):
            raise IndexError(i)
        step = self.layout.chunk[0]
        return np.asarray(self.slab(i // step)[i % step])

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[i] for i in range(len(self)))

    def read(self, crc: int | None = None) -> np.ndarray:
        """The whole item as an array; ``crc`` as in :meth:`window`."""
        return self.window(tuple(slice(None) for _ in self.shape), crc)

    def slab(self, k: int) -> np.ndarray:
        """All chunks whose first coordinate is ``k``, joined and cropped to the true shape."""
        step = self.layout.chunk[0]
        return self.window((slice(k * step, (k + 1) * step), *(slice(None) for _ in self.shape[1:])))

    def window(self, window: tuple[slice, ...], crc: int | None = None) -> np.ndarray:
        """A part of the item (slices of step 1), read from ONE opening of the file, so that it never mixes two versions.

        With ``crc``, the checksum of the whole file in its commit record, the file is verified: chunks of floats have
        no checksum of their own, and damage would be read as wrong numbers.
        """
        spans = [range(*s.indices(n)) for s, n in zip(window, self.shape)]
        out = np.zeros([len(span) for span in spans], self.dtype)
        if not out.size:
            return out
        chunk = self.layout.chunk
        with self._opened() as file:
            if crc is not None and _crc_of(file) != crc:
                raise self._damage("its bytes do not match the checksum of its commit")
            index = self._read_index(file)
            for steps in product(*(range(span.start // c, (span.stop - 1) // c + 1) for span, c in zip(spans, chunk))):
                here = [(max(s.start, k * c), min(s.stop, (k + 1) * c)) for s, k, c in zip(spans, steps, chunk)]
                inside = tuple(slice(a - k * c, b - k * c) for (a, b), k, c in zip(here, steps, chunk))
                target = out[tuple(slice(a - s.start, b - s.start) for (a, b), s in zip(here, spans))]
                if target.shape == chunk and target.flags.c_contiguous and self.dtype == self.dtype.newbyteorder("<"):
                    self._chunk(file, index, steps, target)
                else:
                    target[...] = self._chunk(file, index, steps)[inside]
        return out

    def _chunk(self, file: BufferedReader, index: np.ndarray, coordinate: tuple[int, ...], out: np.ndarray | None = None) -> np.ndarray:
        """A whole chunk; directly into ``out`` if given, because allocating memory costs more than reading."""
        out = np.empty(self.layout.chunk, self.dtype.newbyteorder("<")) if out is None else out
        offset, size = (int(v) for v in index[coordinate])
        if offset == int(_NO_CHUNK):
            out[...] = 0
            return out
        file.seek(offset)
        codec = self.layout.codec()
        try:
            if codec:
                data = file.read(size)
                if int.from_bytes(data[4:8], "little") != out.nbytes:  # blosc's header
                    raise ValueError("it has another size")
                codec.decode(data, out)
            elif size != out.nbytes or file.readinto(out.reshape(-1).view(np.uint8).data) != size:
                raise ValueError("it is truncated")
            return out
        except (ValueError, RuntimeError) as error:  # numcodecs raises RuntimeError for an invalid blosc buffer
            raise self._damage(f"chunk {coordinate} cannot be decoded") from error

    def _read_index(self, file: BufferedReader) -> np.ndarray:
        there = os.fstat(file.fileno())
        stamp = (there.st_ino, there.st_size, there.st_mtime_ns)
        if self._index is None or stamp != self._stamp:  # rewritten since: its chunks are elsewhere
            size = 16 * int(np.prod(self.layout.grid))
            file.seek(max(0, there.st_size - size - 4))
            raw = file.read(size)
            crc = int.from_bytes(file.read(4), "little")
            if len(raw) != size or google_crc32c.value(raw) != crc:
                raise self._damage("its chunk index does not match its checksum")
            self._index, self._stamp = np.frombuffer(raw, "<u8").reshape(*self.layout.grid, 2), stamp
        return self._index

    def _opened(self) -> BufferedReader:
        try:
            return open(self.path, "rb")
        except FileNotFoundError as error:
            raise explained(self.path) or self._damage("the file is missing") from error

    def _damage(self, why: str) -> DiskError:
        return _damage(self.path, why)


def _damage(path: Path, why: str, way_out: str = _REPAIR) -> DiskError:
    return DiskError(f"{path} is damaged: {why}.", "the disk lost bytes, or another program changed the project folder", way_out)


def file_crc(path: str | Path) -> int:
    """crc32c of a whole file."""
    with open(path, "rb") as file:
        return _crc_of(file)


def _crc_of(file: BufferedReader) -> int:
    """crc32c of an open file."""
    crc = google_crc32c.Checksum()
    file.seek(0)
    while data := file.read(_BLOCK):
        crc.update(data)
    return int.from_bytes(crc.digest(), "big")
