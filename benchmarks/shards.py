"""Writing a movie into a shard: cryodask's writer against a bare loop over its codec, and reading it back with plain zarr.

``python benchmarks/shards.py [--quick]``: 3838 x 3710 x 32 uint8 counts (Poisson, one a pixel). Both arms compress each frame with the same
codec and write it, and end with an fsync; the writer also makes the shard's index and its crc32c, renames the file and syncs the folder.
Five alternating pairs of runs, medians of CPU seconds (user + system of this process). The peak of memory is that of a process of its own
that streams the movie from a file, frame by frame, above what it had before, in units of a frame (one of them is the frame itself).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import zarr

from cryodask.store.shards import Layout, write_shard

OUT = Path(__file__).parent / "out" / "shards"


class RawMovie:
    """Frames of a file of plain counts, one read on each access."""

    def __init__(self, path: Path, shape: tuple[int, int, int]) -> None:
        self.path, self.shape, self.dtype = path, shape, np.dtype("u1")

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> np.ndarray:
        pixels = self.shape[1] * self.shape[2]
        return np.fromfile(self.path, np.uint8, pixels, offset=index * pixels).reshape(self.shape[1:])


def bare_loop(path: Path, layout: Layout, movie: np.ndarray) -> None:
    codec = layout.codec()
    with open(path, "wb", buffering=0) as file:
        for frame in movie:
            file.write(codec.encode(frame))
        os.fsync(file.fileno())


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """CPU and wall seconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def peak_of_a_stream(raw: Path, shape: tuple[int, int, int]) -> int:
    """Bytes above what a fresh process had, while it streams the movie into a shard."""
    done = subprocess.run([sys.executable, __file__, "--stream", str(raw), *map(str, shape)], stdout=subprocess.PIPE, check=True)
    return int(done.stdout)


def stream(raw: Path, shape: tuple[int, int, int]) -> None:
    small = Layout.of((2, 8, 8), (1, 0, 0), "uint8")
    write_shard(OUT / "warm", small, np.zeros((2, 8, 8), np.uint8))  # imports and buffers of the codec
    layout = Layout.of(shape, (1, 0, 0), "uint8")
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    write_shard(OUT / "streamed", layout, RawMovie(raw, shape))
    print(_status("VmHWM") - before)


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert found is not None
    return int(found[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a movie of 512 x 480 x 8 and two pairs, as a smoke test")
    parser.add_argument("--stream", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stream:
        raw, *sizes = arguments.stream
        stream(Path(raw), tuple(map(int, sizes)))  # type: ignore[arg-type]
        return
    shape, pairs = ((8, 480, 512), 2) if arguments.quick else ((32, 3710, 3838), 5)
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    try:
        measure(shape, pairs)
    finally:
        shutil.rmtree(OUT, ignore_errors=True)


def measure(shape: tuple[int, int, int], pairs: int) -> None:
    rng = np.random.default_rng(0)
    movie = np.empty(shape, np.uint8)
    for frame in movie:
        frame[...] = rng.poisson(1.0, shape[1:])
    layout = Layout.of(shape, (1, 0, 0), "uint8")
    array = zarr.create_array(
        OUT / "array", shape=(1, *shape), shards=(1, *layout.padded), chunks=(1, *layout.chunk), dtype="uint8",
        compressors=layout.zarr_codecs(), filters=None,
    )  # fmt: skip
    shard = OUT / "array" / "c" / "0" / "0" / "0" / "0"
    rows = []
    for _ in range(pairs):
        bare = seconds(lambda: bare_loop(OUT / "bare", layout, movie))
        ours = seconds(lambda: write_shard(shard, layout, movie))
        rows.append((*bare, *ours))
    for i in range(shape[0]):
        assert np.array_equal(array[0, i], movie[i]), f"frame {i} read by zarr differs"
    movie.tofile(OUT / "raw")
    peak = peak_of_a_stream(OUT / "raw", shape) / (shape[1] * shape[2])

    print(f"movie {shape[2]} x {shape[1]} x {shape[0]} uint8, {movie.nbytes / 1e6:.0f} MB, shard {shard.stat().st_size / 1e6:.0f} MB")
    print(f"{'pair':6}{'bare CPU':>10}{'wall':>8}{'writer CPU':>12}{'wall':>8}{'CPU ratio':>11}")
    for i, (bare_cpu, bare_wall, cpu, wall) in enumerate(rows):
        print(f"{i + 1:<6}{bare_cpu:10.2f}{bare_wall:8.2f}{cpu:12.2f}{wall:8.2f}{cpu / bare_cpu:11.3f}")
    print("read back by plain zarr: equal, frame by frame")
    ratio = statistics.median(r[2] for r in rows) / statistics.median(r[0] for r in rows)
    print(json.dumps({"write_ratio": round(ratio, 3), "peak_frames": round(peak, 2)}))


if __name__ == "__main__":
    main()
