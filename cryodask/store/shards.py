"""Shard files: one item of one variable, written chunk by chunk by us, readable by any Zarr v3 library.

zarr-python holds the whole shard in memory and never calls fsync; a movie is streamed here, frame by frame, and the shard appears under
its name only when all of it is on the disk.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c
import numpy as np
from numcodecs import Blosc

from cryodask.errors import StoreError
from cryodask.store.journal import fsync_folder

_NO_CHUNK = np.iinfo(np.uint64).max


@dataclass(frozen=True)
class Layout:
    """Shape of one item of a bulk variable and of its inner chunks.

    Counts compress well (blosc zstd-1 with bitshuffle: 3.4 times at 1.25 e/px, 400 Mpx/s a core); floats do not and are stored as they are.
    """

    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, shape: tuple[int, ...], chunk_hint: tuple[int, ...], dtype: str) -> Layout:
        """Chunks from a hint in which 0 (or nothing) means the whole axis."""
        hint = tuple(chunk_hint) or (0,) * len(shape)
        return cls(tuple(shape), tuple(min(h, n) if h else n for h, n in zip(hint, shape)), dtype)

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
        return np.dtype(self.dtype).kind in "iub"

    def codec(self) -> Any:
        """The inner codec, or None."""
        return Blosc(cname="zstd", clevel=1, shuffle=Blosc.BITSHUFFLE) if self.compressed else None

    def zarr_codecs(self) -> list[Any]:
        """The same for zarr's ``compressors``."""
        from zarr.codecs import BloscCodec

        if not self.compressed:
            return []
        return [BloscCodec(cname="zstd", clevel=1, shuffle="bitshuffle", typesize=np.dtype(self.dtype).itemsize)]


class ShardWriter:
    """Write one shard: ``put`` chunks in any order, then ``close``; nothing is visible before.

    The file ``NAME.<host>.<pid>.part`` is renamed to NAME after an fsync; then the folder is synced as well.
    """

    def __init__(self, path: str | Path, layout: Layout) -> None:
        self.path, self.layout = Path(path), layout
        self._codec = layout.codec()
        self._index = np.full((*layout.grid, 2), _NO_CHUNK, np.uint64)
        self._position = 0
        self._crc = google_crc32c.Checksum()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._part = self.path.with_name(f"{self.path.name}.{socket.gethostname()}.{os.getpid()}.part")
        self._file = open(self._part, "wb", buffering=0)  # noqa: SIM115  (closed by close() or abort())

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
        """All chunks of an array; chunks of an array shorter than the layout's first axis are left out (they read as zero)."""
        counts = [-(-n // c) for n, c in zip(array.shape, self.layout.chunk)]
        for coordinate in np.ndindex(*counts):
            window = tuple(slice(i * c, (i + 1) * c) for i, c in zip(coordinate, self.layout.chunk))
            self.put(coordinate, array[window])

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while len(view):
            view = view[self._file.write(view) :]
        self._crc.update(bytes(data) if not isinstance(data, bytes) else data)

    def close(self) -> int:
        """Finish the shard and make it visible; returns the crc32c of the whole file, for the commit record."""
        raw = self._index.astype("<u8").tobytes()
        self._write(raw + google_crc32c.value(raw).to_bytes(4, "little"))
        os.fsync(self._file.fileno())
        self._file.close()
        os.rename(self._part, self.path)
        fsync_folder(self.path.parent)
        return int.from_bytes(self._crc.digest(), "big")

    def abort(self) -> None:
        """Drop what was written."""
        self._file.close()
        self._part.unlink(missing_ok=True)


def write_shard(path: str | Path, layout: Layout, data: Any) -> int:
    """Write an array, or a movie frame by frame, as one shard; returns its crc32c."""
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
    """Read a shard by chunks along its first axis; as a movie it meets the ``Frames`` protocol (inner chunk = one frame).

    ``length`` may cut the first axis short (ragged items).
    """

    def __init__(self, path: str | Path, layout: Layout, length: int | None = None) -> None:
        self.path, self.layout = Path(path), layout
        self.shape = (layout.shape[0] if length is None else length, *layout.shape[1:])
        self.dtype = np.dtype(layout.dtype)
        self._index: np.ndarray | None = None

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, i: int) -> np.ndarray:
        if not 0 <= i < len(self):
            raise IndexError(i)
        step = self.layout.chunk[0]
        return self.slab(i // step)[i % step]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[i] for i in range(len(self)))

    def read(self) -> np.ndarray:
        """The whole item as an array."""
        out = np.zeros(self.shape, self.dtype)
        step = self.layout.chunk[0]
        for k in range(-(-len(self) // step)):
            part = out[k * step : (k + 1) * step]
            part[...] = self.slab(k)[: len(part)]
        return out

    def slab(self, k: int) -> np.ndarray:
        """All chunks whose first coordinate is ``k``, joined and cut to the true shape."""
        layout = self.layout
        index = self._read_index()
        out = np.zeros((layout.chunk[0], *layout.padded[1:]), self.dtype)
        codec = layout.codec()
        with self._opened() as file:
            for rest in np.ndindex(*layout.grid[1:]):
                offset, size = (int(v) for v in index[(k, *rest)])
                if offset == int(_NO_CHUNK):
                    continue
                file.seek(offset)
                data = file.read(size)
                try:
                    raw = codec.decode(data) if codec else data
                    chunk = np.frombuffer(raw, np.dtype(layout.dtype).newbyteorder("<")).reshape(layout.chunk)
                except (ValueError, RuntimeError) as error:  # numcodecs raises RuntimeError for a blosc buffer that makes no sense
                    raise self._damage(f"chunk {(k, *rest)} cannot be decoded") from error
                window = tuple(slice(i * c, (i + 1) * c) for i, c in zip(rest, layout.chunk[1:]))
                out[(slice(None), *window)] = chunk
        return out[(slice(None), *(slice(0, n) for n in layout.shape[1:]))]

    def _read_index(self) -> np.ndarray:
        if self._index is None:
            size = 16 * int(np.prod(self.layout.grid))
            with self._opened() as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - size - 4))
                raw = file.read(size)
                crc = int.from_bytes(file.read(4), "little")
            if len(raw) != size or google_crc32c.value(raw) != crc:
                raise self._damage("the index of its chunks does not fit its checksum")
            self._index = np.frombuffer(raw, "<u8").reshape(*self.layout.grid, 2)
        return self._index

    def _opened(self) -> BinaryIO:
        try:
            return open(self.path, "rb")
        except FileNotFoundError as error:
            raise self._damage("the file is missing") from error

    def _damage(self, why: str) -> StoreError:
        return StoreError(
            f"{self.path} is damaged: {why}.",
            "the disk lost bytes, or another program touched the project's folder",
            "cryodask verify --repair PROJECT  takes the commit of what is damaged back; then run again",
        )


def file_crc(path: str | Path, block: int = 1 << 22) -> int:
    """crc32c of a whole file."""
    crc = google_crc32c.Checksum()
    with open(path, "rb") as file:
        while data := file.read(block):
            crc.update(data)
    return int.from_bytes(crc.digest(), "big")
