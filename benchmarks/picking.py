"""Picking from the diameter alone, against manual picks of apoferritin and against simulated ground truth.

    python benchmarks/picking.py [--shared ../shared] [--simulated 16]

Three micrographs of apoferritin (EMPIAR-10146 crops, 1240 x 1200 pixels at a nominal 1.5 A), diameter 72 pixels, and the wrong
diameters 60 and 84. A pick counts if it is the partner of a marked particle within 0.4 diameter; 0.4 diameter at the border is left out.
Simulated: usual micrographs, eleven crowded ones (particles 0.75 diameters apart), a defocus of 0.3 to 2.5 um, particles 2.2 times as
long as wide, small particles (116 kDa), few electrons (6 and 12 per A^2), and one of 4096 x 4096 pixels for the CPU seconds.
Excluded regions: their largest share of a micrograph of particles, and on a real contaminated one (959 x 927 pixels) their agreement with
the outline of the dark contaminant, for a diameter of 40 pixels. With templates: the same crowded, elongated, small and noisy
micrographs with 12 views of the right molecule, and the CPU seconds with 10 of them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
import torch
from matplotlib.figure import Figure
from scipy import ndimage
from scipy.optimize import linear_sum_assignment

from cryodask.kernels.picking import pick_particles
from cryodask.simulate import Optics, simulate_micrograph
from cryodask.simulate.model import MOLECULES, Molecule, density_map
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


SHARES: list[float] = []
"""Excluded share of each micrograph of particles."""


def run(image: np.ndarray, diameter_angstrom: float, pixel: float, count: int = 12, **given: Any) -> tuple[np.ndarray, float]:
    """Accepted picks `(n, 2)` and CPU seconds; with ``count`` views of a map and a CTF, if ``given``."""
    params = PickParams(diameter_angstrom=diameter_angstrom, template_count=count)
    start = time.process_time()
    out = pick.process(params, micrograph_dw=image, pixel_size_angstrom=pixel, **given)
    seconds = time.process_time() - start
    SHARES.append(out["excluded_share"])
    return np.stack([out["pick_y"], out["pick_x"]], 1)[accepted(out["pick_score"], out["pick_threshold"])], seconds


def contaminant(image: np.ndarray, diameter: float) -> dict[str, float]:
    """Agreement of the excluded regions with the largest dark part of a micrograph."""
    spread = 1.4826 * np.median(np.abs(image - np.median(image)))
    parts, _ = ndimage.label(ndimage.gaussian_filter(image, 3.0) < np.median(image) - 2.5 * spread)
    outline = ndimage.binary_fill_holes(parts == np.bincount(parts.reshape(-1))[1:].argmax() + 1)
    found = pick_particles(torch.from_numpy(image), diameter, pixel_size_angstrom=160.0 / diameter).mask.numpy().astype(np.float32)
    mask = ndimage.zoom(found, np.array(image.shape) / found.shape, order=1) > 0.5
    both, either = (mask & outline).sum(), (mask | outline).sum()
    return {"overlap": both / either, "covered": both / outline.sum(), "false_share": (mask & ~outline).sum() / (~outline).sum()}


def elongated() -> Molecule:
    """Two molecules of beta-galactosidase end to end: 290 x 130 Angstrom."""
    one = MOLECULES["beta-galactosidase"]()
    axis = int(np.argmax(np.ptp(np.concatenate(list(one.positions.values())), axis=0)))
    shift = 55.0 * np.eye(3)[axis]
    return Molecule({e: np.concatenate([p - shift, p + shift]) for e, p in one.positions.items()})


def small() -> Molecule:
    """A quarter of beta-galactosidase, 116 kDa."""
    one = MOLECULES["beta-galactosidase"]().positions
    part = {e: p[(p[:, 0] > 0) & (p[:, 1] > 0)] for e, p in one.items()}
    centre = np.concatenate(list(part.values())).mean(0)
    return Molecule({e: p - centre for e, p in part.items()})


def with_map(molecule: str, optics: Optics) -> dict[str, Any]:
    """What picking with views of a molecule takes: its map, 96 voxels of 3.54 Angstrom, and the CTF."""
    volume = density_map(MOLECULES[molecule](), 96, 3.54)
    names = ("defocus_u_angstrom", "defocus_v_angstrom", "defocus_angle_deg", "voltage_kv", "spherical_aberration_mm", "amplitude_contrast")
    return {"final_map": volume, "map_pixel_size_angstrom": 3.54, "phase_shift_deg": 0.0, **{name: getattr(optics, name) for name in names}}


TEMPLATED: dict[str, list[float]] = {}
"""F1 with templates, by case."""


def simulated(name: str, diameter: float, seeds: Sequence[int], defocus: Sequence[float], templates: int = 0, **scene: Any) -> list[float]:
    """F1 of simulated micrographs, printed; the first ``templates`` of them also with templates."""
    figures = []
    for seed, z in zip(seeds, defocus):
        optics = Optics(pixel_size_angstrom=1.77, defocus_u_angstrom=z, defocus_v_angstrom=z - 100.0)
        micrograph = simulate_micrograph(optics=optics, seed=seed, **{"shape": (1536, 1536), "signal_amplitude": 0.7, **scene})
        truth = np.stack([micrograph.particles.y, micrograph.particles.x], 1)
        found, _ = run(micrograph.image, diameter, 1.77)
        figures.append(score(found, truth, micrograph.image.shape, diameter / 1.77)[0])
        if len(figures) <= templates:
            given = with_map(scene.get("molecule", "beta-galactosidase"), optics)
            found, _ = run(micrograph.image, diameter, 1.77, 12, **given)
            TEMPLATED.setdefault(name, []).append(round(score(found, truth, micrograph.image.shape, diameter / 1.77)[0], 3))
    print(f"{name:40s} F1 {' '.join(f'{f:.3f}' for f in figures)}")
    if templates:
        print(f"{'    with templates':40s} F1 {' '.join(f'{f:.3f}' for f in TEMPLATED[name])}")
    return figures


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
    real = max(SHARES)
    SHARES.clear()
    dirty = contaminant(mrcfile.read(args.shared / "data/micrographs/contaminated_Ucsf_1142.mrc.bz2").astype(np.float32), 40.0)
    print(f"contaminant: {', '.join(f'{name} {value:.3f}' for name, value in dirty.items())}; apoferritin: at most {real:.4f} excluded")
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
    MOLECULES.update({"elongated": elongated, "small": small})
    crowded = simulated("crowded", 180.0, range(50, 61), np.arange(6000, 22500, 1500), 3, particles=400, distance_angstrom=135.0)
    low = simulated("defocus 0.3 to 2.5 um", 180.0, range(100, 106), [3000, 4000, 5500, 8000, 15000, 25000], particles=60)
    long = simulated(
        "elongated", 220.0, range(200, 204), [8000, 12000, 16000, 20000], 2, particles=40, distance_angstrom=300.0, molecule="elongated"
    )
    little = simulated(
        "small", 95.0, range(210, 214), [8000, 12000, 16000, 20000], 2, particles=80, distance_angstrom=130.0, molecule="small"
    )
    noisy = {
        f"{dose:g}": simulated(
            f"{dose:g} electrons/A^2, amplitude 0.5", 180.0, range(110, 113), [12000] * 3, 3, particles=60, dose=dose, signal_amplitude=0.5
        )
        for dose in (6.0, 12.0)
    }
    large = simulate_micrograph(shape=(4096, 4096), optics=Optics(pixel_size_angstrom=0.85), particles=250, signal_amplitude=0.7, seed=5)
    cpu = min(run(large.image, 180.0, 0.85)[1] for _ in range(3))
    ten = with_map("beta-galactosidase", large.optics)
    cpu_templates = min(run(large.image, 180.0, 0.85, 10, **ten)[1] for _ in range(2))
    print(f"4096 x 4096 pixels: {cpu:.2f} CPU s; with ten templates {cpu_templates:.2f}")
    out = Path(__file__).parent / "out"
    out.mkdir(exist_ok=True)
    figure.savefig(out / "picking.png", dpi=110)
    given = {
        "f1": right,
        "f1_wrong_diameter": wrong,
        "f1_crowded": crowded,
        "f1_low_defocus": low,
        "f1_elongated": long,
        "f1_small": little,
    }
    rounded = {name: [round(f, 3) for f in values] for name, values in given.items()}
    print(
        json.dumps(
            {
                **rounded,
                "f1_few_electrons": {n: round(float(np.mean(f)), 3) for n, f in noisy.items()},
                "cpu_seconds_4k": round(cpu, 3),
                "contaminant": {name: round(float(value), 3) for name, value in dirty.items()},
                "f1_templates": TEMPLATED,
                "cpu_seconds_4k_ten_templates": round(cpu_templates, 3),
                "largest_excluded_share_simulated": round(max(SHARES), 4),
            }
        )
    )


if __name__ == "__main__":
    main()
