"""EER movies: decoded bit by bit like other decoders, CPU time per camera frame, memory, and a gain like RELION's.

``python benchmarks/eer.py [--quick]``: frames of 4096 x 4096 with 0.05 electrons per pixel, and empty and full ones, in strips of even
and odd length, are compared with tifffile, imagecodecs and RELION's ``relion_convert_to_tiff`` (in whose TIFF rows are flipped) at 1x
and 2x.
CPU time and memory are of 600 camera frames as 15 fractions, read as ``ingest`` does, in a process of its own: memory is the high-water
mark above that process after its imports. The gain row compares the corrected sum of a movie without motion and a ``.gain`` file with that
of ``relion_run_motioncorr``, in means of 64 x 64 pixels.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import tifffile

from cryodask.formats.fractions import Fractions
from cryodask.formats.movies import open_movie, read_gain
from cryodask.formats.mrc import read_mrc
from cryodask.simulate.eer import Events, encode_frame, metadata_xml, render, write_eer

OUT = Path(__file__).parent / "out" / "eer"
SHAPE = (4096, 4096)
PIXELS = SHAPE[0] * SHAPE[1]
RATE, FRACTIONS = 0.05, 15
STAR = (
    "\ndata_optics\n\nloop_\n_rlnOpticsGroupName\n_rlnOpticsGroup\n_rlnMicrographOriginalPixelSize\n_rlnVoltage\n"
    "_rlnSphericalAberration\n_rlnAmplitudeContrast\ng 1 0.8 300 2.7 0.1\n\ndata_movies\n\nloop_\n_rlnMicrographMovieName\n"
    "_rlnOpticsGroup\ngained.eer 1\n\n"
)


def events_at(pixel: np.ndarray, rng: np.random.Generator) -> Events:
    return Events(pixel, rng.integers(0, 4, len(pixel), np.uint8), rng.integers(0, 4, len(pixel), np.uint8))


def random_events(rng: np.random.Generator, rate: Any = RATE) -> Events:
    return events_at(np.flatnonzero(rng.random(PIXELS, np.float32) < rate), rng)


def written(path: Path, streams: list[bytes]) -> Path:
    items = {"numberOfFrames": (len(streams), ""), "sensorPixelSize.height": ("8e-11", "m")}
    write_eer(path, streams, SHAPE, metadata=metadata_xml(items))
    return path


def by_relion(path: Path, group: int, upsampling: int) -> tuple[np.ndarray, float]:
    """Fractions `(fraction, y, x)` of another decoder, and its CPU seconds."""
    folder = path.with_suffix(f".{upsampling}x")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    command = ["relion_convert_to_tiff", "--i", path.name, "--o", folder.name, "--eer_grouping", str(group), "--compression", "none"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([*command, "--eer_upsampling", str(upsampling)], cwd=path.parent, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    stack = tifffile.imread(folder / f"{path.stem}.tif").reshape(-1, SHAPE[0] * upsampling, SHAPE[1] * upsampling)[:, ::-1]
    return stack, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def comparisons(rng: np.random.Generator) -> Iterator[tuple[str, bool]]:
    """Each frame, resolution and other decoder: whether ours has the same bits."""
    frames = {
        "0.05 e/px": random_events(rng),
        "0.004 e/px": random_events(rng, 0.004),
        "empty": events_at(np.zeros(0, np.int64), rng),
        "full": events_at(np.arange(PIXELS), rng),
        "last pixel": events_at(np.array([PIXELS - 1]), rng),
        "an escape at the end": events_at(np.array([PIXELS - 128]), rng),
    }
    encoded = {name: encode_frame(events, PIXELS) for name, events in frames.items()}
    streams = {f"{name}, {end}": s + bytes(more) for name, s in encoded.items() for end, more in parities(s)}
    path = written(OUT / "frames.eer", [*streams.values(), encoded["empty"]])  # by single frames RELION 3.1.3 leaves out the last
    for upsampling in (1, 2):
        movie = open_movie(path, Fractions(frames=1, upsampling=upsampling, camera_dose_e_a2=1.0))
        relion = by_relion(path, 1, upsampling)[0] if shutil.which("relion_convert_to_tiff") else None
        with tifffile.TiffFile(path, superres=upsampling - 1) as tiff:
            for i, (name, stream) in enumerate(streams.items()):
                ours, what = movie[i], f"{upsampling}x, {name}"
                yield f"{what}: what was encoded", np.array_equal(ours, render(frames[name.split(", ")[0]], SHAPE, upsampling))
                padded = stream + bytes(4 + len(stream) % 2)
                theirs = imagecodecs.eer_decode(padded, ours.shape, 7, 2, 2, superres=upsampling - 1)
                yield f"{what}: imagecodecs", np.array_equal(ours, theirs)
                if len(stream) % 2 == 0:  # tifffile hands odd strips to imagecodecs as they are, which refuses them
                    yield f"{what}: tifffile", np.array_equal(ours, tiff.pages[i].asarray())
                if relion is not None:
                    yield f"{what}: RELION", np.array_equal(ours, relion[i])


def parities(stream: bytes) -> list[tuple[str, int]]:
    """Zero bytes after a stream that make its length even, with at least two to spare, and odd."""
    even = 2 + len(stream) % 2
    return [("even", even), ("odd", even + 1)]


def reading(path: Path, upsampling: int) -> dict[str, float]:
    """CPU milliseconds per camera frame, and growth of peak memory since the imports, of a process that reads a movie in fractions."""
    code = (
        "import json, re, sys, time\n"
        "from cryodask.formats.fractions import Fractions\n"
        "from cryodask.formats.movies import open_movie\n"
        "def mark(name): return int(re.search(name + r':\\s+(\\d+)', open('/proc/self/status').read())[1]) / 1024\n"
        "open('/proc/self/clear_refs', 'w').write('5')\n"
        "idle, began = mark('VmRSS'), time.process_time()\n"
        "movie = open_movie(sys.argv[1], Fractions(frames=int(sys.argv[2]), upsampling=int(sys.argv[3]), camera_dose_e_a2=1.0))\n"
        "events = sum(int(movie[i][::64].sum()) for i in range(len(movie)))\n"
        "spent, n = time.process_time() - began, len(movie) * movie.frames_per_fraction\n"
        "print(json.dumps({'ms': 1e3 * spent / n, 'mb': mark('VmHWM') - idle}))\n"
    )
    group = len(open_movie(path)) // FRACTIONS
    command = [sys.executable, "-c", code, str(path), str(group), str(upsampling)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def gain_difference(rng: np.random.Generator) -> float | None:
    """Largest relative difference of block means of our corrected sum and RELION's; None without RELION."""
    if shutil.which("relion_run_motioncorr") is None:
        return None
    # many events a frame, so that no pixel is hot to RELION; equal fractions (of which it wants three), so that it finds no motion
    y, x = np.mgrid[0:4096, 0:4096] / 4096.0
    scene = (0.45 + 0.1 * np.sin(9.0 * y + 2.0) * np.cos(5.0 * x) + 0.1 * y * x).astype(np.float32)
    tifffile.imwrite(OUT / "gain.gain", rng.uniform(0.8, 1.2, SHAPE).astype(np.float32))
    path = written(OUT / "gained.eer", [encode_frame(random_events(rng, scene.ravel()), PIXELS) for _ in range(4)] * 3)
    (OUT / "m.star").write_text(STAR)
    shutil.rmtree(OUT / "corrected", ignore_errors=True)  # it may fail without saying so
    options = "--use_own --eer_grouping 4 --patch_x 1 --patch_y 1 --bfactor 150 --dose_per_frame 1 --j 1"
    command = ["relion_run_motioncorr", "--i", "m.star", "--o", "corrected/", "--gainref", "gain.gain", *options.split()]
    subprocess.run(command, cwd=OUT, check=True, capture_output=True)
    theirs = read_mrc(OUT / "corrected" / "gained.mrc")[0].astype(np.float64)
    movie = open_movie(path, Fractions(frames=4, camera_dose_e_a2=1.0))
    ours = sum(movie[i].astype(np.float64) for i in range(len(movie))) * read_gain(OUT / "gain.gain", eer=True)
    a, b = (image.reshape(64, 64, 64, 64).mean((1, 3)) for image in (np.asarray(ours), theirs))
    return float(np.abs(b / a - 1.0).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="60 camera frames, not 600")
    asked = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(1)
    found = list(comparisons(rng))
    for what, equal in found:
        if not equal:
            print(f"DIFFERENT  {what}")
    recorded = 60 if asked.quick else 600
    path = written(OUT / "long.eer", [encode_frame(random_events(rng), PIXELS) for _ in range(20)] * (recorded // 20))
    ours = {upsampling: reading(path, upsampling) for upsampling in (1, 2)}
    relion = {}
    if shutil.which("relion_convert_to_tiff"):
        short = written(OUT / "short.eer", [encode_frame(random_events(rng), PIXELS) for _ in range(20)] * 3)
        relion = {upsampling: 1e3 * by_relion(short, 20, upsampling)[1] / 60 for upsampling in (1, 2)}
    difference = gain_difference(rng)
    print(f"{'':22}{'1x':>10}{'2x':>10}")
    equal = [sum(same for what, same in found if what.startswith(f"{u}x")) for u in (1, 2)]
    print(f"{'equal':22}{equal[0]:>10}{equal[1]:>10}   of {len(found) // 2} each")
    print(f"{'ms per camera frame':22}{ours[1]['ms']:>10.2f}{ours[2]['ms']:>10.2f}   {recorded} frames of 0.05 e/px")
    print(f"{'RELION, with writing':22}" + "".join(f"{relion[u]:>10.2f}" for u in relion))
    print(f"{'memory above idle, MB':22}{ours[1]['mb']:>10.0f}{ours[2]['mb']:>10.0f}")
    if difference is not None:
        print(f"gain: block means differ from RELION's by {difference:.1e} at most")
    plot(ours, relion)
    line = {"equal": sum(equal for _, equal in found), "of": len(found), "ms_per_raw_frame": round(ours[1]["ms"], 2)}
    line |= {"peak_mb": round(ours[1]["mb"]), "ms_per_raw_frame_2x": round(ours[2]["ms"], 2), "peak_mb_2x": round(ours[2]["mb"])}
    line |= {"relion_ms_per_raw_frame": round(relion[1], 2) if relion else None, "gain_difference": difference}
    print(json.dumps(line))


def plot(ours: dict[int, dict[str, float]], relion: dict[int, float]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    axes.bar([0, 1], [ours[u]["ms"] for u in (1, 2)], 0.35, label="cryodask")
    if relion:
        axes.bar([0.4, 1.4], [relion[u] for u in (1, 2)], 0.35, label="RELION (with writing)")
    axes.set(xticks=[0.2, 1.2], xticklabels=["1x", "2x"], ylabel="CPU ms per camera frame")
    axes.legend(frameon=False)
    figure.savefig(OUT / "eer.png", dpi=120)


if __name__ == "__main__":
    main()
