"""Picking from the diameter alone, against manual picks of apoferritin and against simulated ground truth.

    python benchmarks/picking.py [--shared ../shared] [--simulated 16]

Three micrographs of apoferritin (EMPIAR-10146 crops, 1240 x 1200 pixels at a nominal 1.5 A), diameter 72 pixels, and the wrong
diameters 60 and 84. A pick counts if it is the partner of a marked particle within 0.4 diameter; 0.4 diameter at the border is left out.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import mrcfile
import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.optimize import linear_sum_assignment

from cryodask.simulate import Optics, simulate_micrograph
from cryodask.stages.pick import PickParams, pick
from cryodask.store.births import accepted


def score(found: np.ndarray, truth: np.ndarray, shape: tuple[int, int], diameter: float) -> tuple[float, float, float]:
    """F1, precision and recall of places `(n, 2)`, one to one."""
    limit, tolerance = np.array(shape) - 0.4 * diameter, 0.4 * diameter
    found, truth = (p[((p > 0.4 * diameter) & (p < limit)).all(1)] for p in (found, truth))
    if not len(found) or not len(truth):
        return 0.0, 0.0, 0.0
    distance = np.hypot(*(found[:, None] - truth[None]).transpose(2, 0, 1))
    rows, columns = linear_sum_assignment(np.where(distance <= tolerance, distance - 1e4, 0.0))
    hits = int((distance[rows, columns] <= tolerance).sum())
    precision, recall = hits / len(found), hits / len(truth)
    return 2 * precision * recall / max(precision + recall, 1e-9), precision, recall


def run(image: np.ndarray, diameter_angstrom: float, pixel: float) -> tuple[np.ndarray, float]:
    """Accepted picks `(n, 2)` and CPU seconds."""
    start = time.process_time()
    out = pick.process(PickParams(diameter_angstrom=diameter_angstrom), micrograph_dw=image, pixel_size_angstrom=pixel)
    seconds = time.process_time() - start
    return np.stack([out["pick_y"], out["pick_x"]], 1)[accepted(out["pick_score"], out["pick_threshold"])], seconds


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, default=Path(__file__).parents[2] / "shared")
    parser.add_argument("--simulated", type=int, default=16)
    args = parser.parse_args()
    right, wrong, seconds = [], [], []
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    panels = figure.subplots(1, 3)
    files = sorted((args.shared / "data" / "micrographs").glob("apoferritin_*.mrc.bz2"))
    for axes, path in zip(panels, files):
        image = mrcfile.read(path).astype(np.float32)
        truth = np.loadtxt(str(path).replace(".mrc.bz2", "_picks.txt"))[:, ::-1]
        for diameter in (72, 60, 84):
            found, cost = run(image, 1.5 * diameter, 1.5)
            f1, precision, recall = score(found, truth, image.shape, 72.0)
            (right if diameter == 72 else wrong).append(f1)
            seconds.append(cost)
            print(f"{path.name[:24]}  diameter {diameter} px: F1 {f1:.3f}  precision {precision:.3f}  recall {recall:.3f}  {cost:.2f} s")
            if diameter == 72:
                axes.imshow(image, cmap="gray", vmin=-60, vmax=60)
                axes.plot(truth[:, 1], truth[:, 0], "o", mfc="none", mec="#ffd700", ms=9, label="by hand")
                axes.plot(found[:, 1], found[:, 0], "+", color="#ff3030", ms=6, label="found")
                axes.set_title(f"{path.name[:24]}: F1 {f1:.3f}", fontsize=9)
                axes.set_axis_off()
    panels[0].legend(fontsize=7)
    rng = np.random.default_rng(0)
    figures = []
    for seed in range(args.simulated):
        defocus = rng.uniform(8000, 20000)
        optics = Optics(pixel_size_angstrom=1.77, defocus_u_angstrom=defocus, defocus_v_angstrom=defocus)
        micrograph = simulate_micrograph(shape=(1024, 1024), optics=optics, particles=40, seed=3000 + seed)
        truth = np.stack([micrograph.particles.y, micrograph.particles.x], 1)
        found, cost = run(micrograph.image, 180.0, 1.77)
        figures.append(score(found, truth, micrograph.image.shape, 180 / 1.77))
        print(
            f"simulated {seed:2d}, {defocus:5.0f} A: F1 {figures[-1][0]:.3f}  precision {figures[-1][1]:.3f}  recall {figures[-1][2]:.3f}"
        )
    if figures:
        worst = np.min(figures, 0)
        print(f"simulated: mean F1 {np.mean(figures, 0)[0]:.3f}, least precision {worst[1]:.3f}, least recall {worst[2]:.3f}")
    out = Path(__file__).parent / "out"
    out.mkdir(exist_ok=True)
    figure.savefig(out / "picking.png", dpi=110)
    print(json.dumps({"f1": [round(f, 3) for f in right], "f1_wrong_diameter": [round(f, 3) for f in wrong]}))


if __name__ == "__main__":
    main()
