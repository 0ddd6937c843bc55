"""Pictures of exposures for pages: previews that were written with the results, or made once and kept in a cache on the local disk.

Rows of a micrograph run upwards, as in MRC files: :func:`upright` is the one place that turns them for a screen.
"""

from __future__ import annotations

import hashlib
import io
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from cryodask.kernels.preview import preview, spectrum_of
from cryodask.store.files import write_atomically
from cryodask.store.shards import ShardReader
from cryodask.vocabulary import VARIABLES
from cryodask.web.follow import Follower

THUMBNAIL_PX = 192
_CACHE_BYTES = 2 << 30
_FILES_BETWEEN_SWEEPS = 500


def upright(rows: np.ndarray) -> np.ndarray:
    """A picture whose first row is the lowest, as rows from the top, which is what screens and image files take."""
    return rows[::-1]


class Cache:
    """Files that can be made again at any time; the oldest go when there are too many."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._written = 0
        self._lock = threading.Lock()

    def get(self, name: str, make: Callable[[], bytes]) -> bytes:
        """The content of a file, made if it is not there; a disk that takes nothing makes pages slower, and nothing else."""
        path = self.folder / name[:2] / name
        try:
            return path.read_bytes()
        except OSError:
            made = make()
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_atomically(path, made)
            with self._lock:
                self._written += 1
                if self._written % _FILES_BETWEEN_SWEEPS == 0:
                    self._sweep()
        return made

    def path(self, name: str, make: Callable[[], bytes]) -> Path | bytes:
        """Like :meth:`get`, but the path of the file, to map it into memory; its content where the disk takes nothing."""
        path = self.folder / name[:2] / name
        if path.exists():
            return path
        made = self.get(name, make)
        return path if path.exists() else made

    def _sweep(self) -> None:
        files = [(f.stat().st_mtime, f.stat().st_size, f) for f in self.folder.glob("*/*")]
        total = sum(size for _, size, _ in files)
        for _, size, file in sorted(files):
            if total <= _CACHE_BYTES:
                return
            file.unlink(missing_ok=True)
            total -= size


class Pictures:
    """Makes and caches the pictures of a server."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        # two micrographs of 100 MB at a time, however many pages ask
        self._reading = threading.BoundedSemaphore(2)

    def preview(self, follower: Follower, row: int) -> np.ndarray | None:
        """Preview of an exposure, `(2, y, x)` uint8 (see :func:`cryodask.kernels.preview.preview`); None before it is committed."""
        for name in ("micrograph_preview", "micrograph_sum", "micrograph_dw"):
            found = follower.record(row, name)
            if found is None or name not in found[1]["shards"]:
                continue
            generation, record = found
            reader = generation.bulk_reader(record, name)
            if name == "micrograph_preview":
                with self._reading:
                    return reader.read()
            raw = self.cache.get(_name(follower, record["shards"][name], "preview.npy"), partial(self._made, reader))
            return np.asarray(np.load(io.BytesIO(raw), allow_pickle=False))
        return None

    def _made(self, reader: ShardReader) -> bytes:
        file = io.BytesIO()
        with self._reading:
            np.save(file, preview(reader.read()))
        return file.getvalue()

    def thumbnail(self, follower: Follower, row: int) -> bytes | None:
        """A small JPEG of an exposure."""
        found = follower.record(row, "micrograph_preview") or follower.record(row, "micrograph_sum")
        if found is None:
            return None
        crc = next(iter(found[1]["shards"].values()), 0)

        def make() -> bytes:
            whole = self.preview(follower, row)
            return b"" if whole is None else jpeg(_smaller(whole[0], THUMBNAIL_PX))

        return self.cache.get(_name(follower, crc, f"{row}.jpg"), make) or None

    def spectrum(self, follower: Follower, row: int) -> np.ndarray | None:
        """Power spectrum of an exposure, `(y, x)` uint8: that of the CTF fit, its background removed, else that of the preview."""
        found = follower.record(row, "spectrum_image")
        if found is not None and "spectrum_image" in found[1]["shards"]:
            values = found[0].bulk_reader(found[1], "spectrum_image").read().astype(np.float32)
            low, high = np.percentile(values, (1, 99.7))
            scaled = (values - low) * (255 / max(float(high - low), 1e-12))
            return np.asarray(np.nan_to_num(np.clip(scaled, 0, 255)), dtype=np.uint8)
        whole = self.preview(follower, row)
        return None if whole is None else spectrum_of(whole)


def shape_of(follower: Follower, row: int) -> tuple[int, ...] | None:
    """Rows and columns of the micrograph of an exposure."""
    for name in ("micrograph_dw", "micrograph_sum"):
        found = follower.record(row, name)
        if found is not None:
            return found[0].layout(VARIABLES[name], found[1]).shape
    return None


def jpeg(picture: np.ndarray, quality: int = 78) -> bytes:
    """A JPEG file of a picture `(y, x)` uint8 whose first row is the lowest."""
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(upright(picture))).save(file, "JPEG", quality=quality)
    return file.getvalue()


def _smaller(picture: np.ndarray, longest_px: int) -> np.ndarray:
    step = max(1, max(picture.shape) // longest_px)
    height, width = (n // step for n in picture.shape)
    blocks = picture[: height * step, : width * step].reshape(height, step, width, step)
    means = blocks.mean((1, 3), dtype=np.float32)
    # averaging has taken most of the noise away, and with it the contrast
    deviation = max(float(means.std()), 1e-6)
    return np.asarray(np.clip(128 + (means - means.mean()) * (42 / deviation), 0, 255), dtype=np.uint8)


def _name(follower: Follower, crc: int, end: str) -> str:
    return f"{hashlib.blake2b(f'{follower.path}|{crc}'.encode(), digest_size=8).hexdigest()}-{end}"
