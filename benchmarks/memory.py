"""Memory of motion correction through the runner: one worker, a large movie, above an idle worker.

``python benchmarks/memory.py [--quick]``: movies of 3838 x 3710 x 32 counts (Poisson, with drift) as LZW TIFF and as MRC, each through
``run_plan`` (ingest, motion, a gain, all defaults) on a local cluster of one worker, two movies a format one after the other, so that what
the first one leaves behind counts too; and a super-resolution movie of 11520 x 8184 x 48 as TIFF, summed at the physical pixel
(``--formats superres``: 4.5 GB of counts, some minutes). Idle is the resident memory of that worker after a tiny movie went through the
same stages, that is with all its imports done; the peak is VmHWM of the worker process, reset before the large movies (clear_refs 5).
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path

import numpy as np
import scipy.ndimage

from cryodask.cluster.connect import close, connect
from cryodask.formats.movies import write_mrc_movie, write_tiff_movie
from cryodask.formats.mrc import write_mrc
from cryodask.run.recipe import make_plan
from cryodask.run.session import run_plan

OUT = Path(__file__).parent / "out"
PIXEL = 0.885
PROJECT = """name: {name}
inputs:
  movies: {folder}/*.{ending}
  gain: {folder}/gain.mrc
microscope:
  voltage_kv: 300
  spherical_aberration_mm: 2.7
  pixel_size_angstrom: 0.885
  dose_per_frame: 1.2
pipeline: [ingest, motion: {{binning: {binning}}}]
"""
SUPER_RESOLUTION = (48, 8184, 11520)


def make_movie(shape: tuple[int, int, int], gain: np.ndarray, seed: int) -> np.ndarray:
    """Counts of a random scene that drifts, about one a pixel, `(frame, y, x)` uint8."""
    rng = np.random.default_rng(seed)
    frames, height, width = shape
    scene = scipy.ndimage.gaussian_filter(rng.standard_normal((height, width), dtype=np.float32), 3.0, mode="wrap")
    scene *= 0.25 / scene.std()
    rate = np.clip(1.0 + scene, 0.05, None)
    out = np.empty(shape, np.uint8)
    for f in range(frames):
        moved = np.roll(rate, (round(12.0 * np.exp(-f / 6.0)), -round(0.2 * f)), (0, 1))
        if frames > 40:  # a tenth of a count: none or one
            out[f] = rng.random(moved.shape, np.float32) < 0.1 * moved / gain
        else:
            out[f] = np.minimum(rng.poisson(moved / gain), 127)
    return out


def memory_of(pid: int) -> dict[str, int]:
    """Resident memory and its high-water mark of a process, bytes."""
    text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return {name: int(re.search(rf"{name}:\s+(\d+)", text)[1]) * 1024 for name in ("VmRSS", "VmHWM")}  # type: ignore[index]


def run(client: object, folder: Path, ending: str) -> None:
    path = folder / f"{ending}.yaml"
    binning = 2 if ending == "superres" else 1
    kind = "tif" if ending == "superres" else ending
    path.write_text(PROJECT.format(name=f"project_{ending}", folder=folder, ending=kind, binning=binning))
    project = run_plan(make_plan(path), client)  # type: ignore[arg-type]
    assert not project.failures(), project.failures()


def measure(ending: str, shape: tuple[int, int, int], folder: Path, movies: int) -> dict[str, int]:
    """Idle and peak bytes of the worker for movies of one format."""
    tiny, large = folder / "tiny", folder / "large"
    for place, size, count in ((tiny, (4, 256, 256), 1), (large, shape, movies)):
        place.mkdir(parents=True)
        gain = np.random.default_rng(1).uniform(0.9, 1.1, size[1:]).astype(np.float32)
        write_mrc(place / "gain.mrc", gain, PIXEL)
        for number in range(count):
            frames = make_movie(size, gain, seed=number)
            if ending in ("tif", "superres"):
                write_tiff_movie(place / f"movie_{number}.tif", frames, PIXEL)
            else:
                write_mrc_movie(place / f"movie_{number}.mrcs", frames, PIXEL)
            del frames
    client = connect("local", workers=1)
    try:
        pid = next(iter(client.run(_pid).values()))
        run(client, tiny, ending)
        idle = memory_of(pid)["VmRSS"]
        Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="utf-8")
        run(client, large, ending)
        peak = memory_of(pid)["VmHWM"]
        after = memory_of(pid)["VmRSS"]
    finally:
        close(client)
    return {"idle": idle, "peak": peak, "after": after}


def _pid() -> int:
    import os

    return os.getpid()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="movies of 512 x 480 x 8, as a smoke test")
    parser.add_argument("--movies", type=int, default=2, help="movies per format")
    parser.add_argument("--formats", default="tif,mrcs,superres")
    arguments = parser.parse_args()
    shape = (8, 480, 512) if arguments.quick else (32, 3710, 3838)
    folder = OUT / "memory"
    found = {}
    for ending in arguments.formats.split(","):
        shutil.rmtree(folder, ignore_errors=True)
        try:
            large = ending == "superres" and not arguments.quick
            found[ending] = measure(ending, SUPER_RESOLUTION if large else shape, folder, 1 if large else arguments.movies)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    print(f"motion of movies of {shape[2]} x {shape[1]} x {shape[0]} (superres: 11520 x 8184 x 48) through the runner, one worker, GB")
    print(f"{'format':10}{'idle':>8}{'peak':>8}{'above idle':>12}{'after':>8}")
    for ending, v in found.items():
        print(f"{ending:10}{v['idle'] / 1e9:8.3f}{v['peak'] / 1e9:8.3f}{(v['peak'] - v['idle']) / 1e9:12.3f}{v['after'] / 1e9:8.3f}")
    above = {ending: v["peak"] - v["idle"] for ending, v in found.items()}
    result = {"superres_bytes_above_idle": above.pop("superres")} if "superres" in above else {}
    print(json.dumps(({"motion_bytes_above_idle": max(above.values())} if above else {}) | result))


if __name__ == "__main__":
    main()
