"""Motion correction compared with RELION 3.1.3 on one large movie of known motion.

``python benchmarks/motion.py [--seed 2] [--fresh]``: a 3838 x 3710 x 32 movie by peers/make_movie.py (not of our own simulator),
RELION's own motion correction (5 x 5 patches, one thread) and ours, both from the TIFF file, decoding and sums included.
The movie and RELION's result stay in benchmarks/out/motion_seed<N>; --fresh makes both anew, which a quoted CPU ratio needs
(same load for both).
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT.parent / "shared" / "peers"
MODEL = ROOT.parent / "shared" / "data" / "models" / "5a1a.cif.gz"
PIXEL, DOSE = 0.885, 1.2
STAR = """
data_optics

loop_
_rlnOpticsGroupName #1
_rlnOpticsGroup #2
_rlnMicrographOriginalPixelSize #3
_rlnVoltage #4
_rlnSphericalAberration #5
_rlnAmplitudeContrast #6
group1 1 0.885 300 2.7 0.1

data_movies

loop_
_rlnMicrographMovieName #1
_rlnOpticsGroup #2
movie.tif 1

"""
OURS = """
import sys
import numpy as np
import torch
torch.set_num_threads(1)
from cryodask.formats.movies import open_movie, read_gain
from cryodask.formats.mrc import write_mrc
from cryodask.stages.motion import MotionParams, motion
out = motion.process(
    MotionParams(), movie=open_movie("movie.tif"), gain=read_gain("movie_gain.mrc"), pixel_size_angstrom=0.885,
    dose_per_frame=1.2, pre_exposure=0.0, voltage_kv=300.0,
)
write_mrc("ours_sum.mrc", out.pop("micrograph_sum"), 0.885)
write_mrc("ours_dw.mrc", out.pop("micrograph_dw"), 0.885)
np.savez("ours.npz", **out)
"""


def timed(command: list[str], folder: Path, log: str) -> tuple[float, int]:
    """CPU seconds (user + system) and peak resident bytes of a command."""
    with open(folder / log, "w", encoding="utf-8") as file:
        done = subprocess.run(["/usr/bin/time", "-v", *command], cwd=folder, stdout=file, stderr=subprocess.STDOUT)
    text = (folder / log).read_text()
    if done.returncode:
        sys.exit(f"{command[0]} failed:\n{text[-3000:]}")

    def number(label: str) -> float:
        found = re.search(label + r".*?: ([\d.]+)", text)
        assert found is not None
        return float(found[1])

    return number("User time") + number("System time"), int(number("Maximum resident set size")) * 1024


def make_movie(folder: Path, seed: int) -> None:
    subprocess.run([sys.executable, PEERS / "make_movie.py", MODEL, "movie", "--seed", str(seed)], cwd=folder, check=True)
    (folder / "movie_clean.mrc").unlink()


def run_relion(folder: Path) -> None:
    (folder / "movie.star").write_text(STAR)
    shutil.rmtree(folder / "relion", ignore_errors=True)
    (folder / "relion").mkdir()
    options = "--use_own --dose_per_frame 1.2 --preexposure 0 --patch_x 5 --patch_y 5 --bfactor 150 --dose_weighting --save_noDW --j 1"
    command = ["relion_run_motioncorr", "--i", "movie.star", "--o", "relion/", "--gainref", "movie_gain.mrc", *options.split()]
    cpu, peak = timed(command, folder, "relion.log")
    (folder / "relion.json").write_text(json.dumps({"cpu": cpu, "peak": peak}))


def relion_path(folder: Path, truth: dict[str, np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """RELION's displacement of the specimen at the truth's positions, `(place, frame, 2)` pixels, (y, x)."""
    import starfile

    from cryodask.kernels.motion_model import evaluate_relion_polynomial

    star = starfile.read(folder / "relion" / "movie.star", always_dict=True)
    whole = star["global_shift"][["rlnMicrographShiftY", "rlnMicrographShiftX"]].to_numpy()
    coefficients = star["local_motion_model"]["rlnMotionModelCoeff"].to_numpy()
    local = evaluate_relion_polynomial(coefficients, truth["pos"].T[:, ::-1], len(whole), shape)
    return -(whole[None] + local)


def our_path(folder: Path, truth: dict[str, np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """Our displacement at the truth's positions, interpolated as the correction does, `(place, frame, 2)` pixels."""
    import torch

    from cryodask.kernels.warp import upsample_field

    with np.load(folder / "ours.npz") as out:
        shift = out["patch_shift"] / PIXEL
    x, y = truth["pos"]
    nodes = torch.from_numpy(shift).permute(1, 2, 0).reshape(-1, 9, 9)
    rows, columns = (torch.from_numpy(v / (n - 1)).float() for v, n in ((y, shape[0]), (x, shape[1])))
    at = torch.diagonal(upsample_field(nodes, rows, columns), dim1=1, dim2=2)
    return at.reshape(shift.shape[1], 2, -1).permute(2, 0, 1).numpy()


def score(path: np.ndarray, truth: np.ndarray) -> float:
    """RMS length of the error over positions and frames, each position's mean removed, as peers/score.py does."""
    error = path - truth
    error = error - error.mean(1, keepdims=True)
    return float(np.sqrt((error**2).sum(-1).mean()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--fresh", action="store_true", help="make the movie and run RELION again")
    arguments = parser.parse_args()
    folder = ROOT / "benchmarks" / "out" / f"motion_seed{arguments.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.fresh or not (folder / "movie_truth.npz").exists():
        make_movie(folder, arguments.seed)
    if arguments.fresh or not (folder / "relion.json").exists():
        run_relion(folder)
    relion = json.loads((folder / "relion.json").read_text())
    (folder / "run_ours.py").write_text(OURS)
    cpu, peak = timed([sys.executable, "run_ours.py"], folder, "ours.log")

    with np.load(folder / "movie_truth.npz") as stored:
        truth = {name: stored[name] for name in stored.files}
    shape = (3710, 3838)
    moved = truth["path"].transpose(1, 2, 0)[..., ::-1]
    theirs, ours = relion_path(folder, truth, shape), our_path(folder, truth, shape)
    rows = [
        ("RELION 3.1.3, 5 x 5, 1 thread", score(theirs, moved), relion["cpu"], relion["peak"]),
        ("cryodask", score(ours, moved), cpu, peak),
    ]
    print(f"movie 3838 x 3710 x 32, {PIXEL} A, {DOSE} e/A2 a frame, seed {arguments.seed}; no correction: {score(0 * moved, moved):.3f} px")
    print(f"{'program':32}{'RMS, px':>10}{'CPU, s':>10}{'peak, GB':>10}")
    for name, error, seconds, size in rows:
        print(f"{name:32}{error:10.3f}{seconds:10.1f}{size / 1e9:10.2f}")
    plot(folder, moved, theirs, ours)
    print(
        json.dumps(
            {
                "rms_ratio_to_relion": round(rows[1][1] / rows[0][1], 4),
                "cpu_ratio_to_relion": round(rows[0][2] / rows[1][2], 3),
                "peak_memory_bytes": peak,
            }
        )
    )


def plot(folder: Path, truth: np.ndarray, theirs: np.ndarray, ours: np.ndarray) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, path, name in ((axes[0], theirs, "RELION 3.1.3"), (axes[1], ours, "cryodask")):
        error = path - truth
        error = error - error.mean(1, keepdims=True)
        for line in error:
            axis.plot(np.linalg.norm(line, axis=1), lw=0.6)
        axis.plot(np.sqrt((error**2).sum(-1).mean(0)), "k", lw=2)
        axis.set(title=f"{name}: {score(path, truth):.3f} px", xlabel="frame", ylabel="error (pixel)", ylim=(0, 2))
    figure.savefig(folder.parent / "motion.png", dpi=90)


if __name__ == "__main__":
    main()
