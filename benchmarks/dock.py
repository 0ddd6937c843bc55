"""Docking of three models into noisy maps of 4, 6, 9 and 15 A, in random places, every other map with the wrong hand.

A case is right if the hand is called rightly and the pose is within 3 degrees and 2 A; at 15 A the hand must be "unknown". Noise: the
half-maps' FSC is 1 / (1 + 6 (k / k0)^6), 0.143 at the resolution k0, and the map is Wiener filtered. `--quick` runs one case of each.
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from _molecules import MOLECULES, density, read_atoms
from _stacks import OUT

from cryodask.kernels.docking import decided_hand, dock_both_hands, mirrored
from cryodask.kernels.fsc import half_radius
from cryodask.kernels.orientations import random_rotations
from cryodask.kernels.symmetry import symmetry_operators

BOX, VOXEL = 64, 3.54
NAMES = ("5a1a", "6bqn", "9be6")
CASES = {4.0: 4, 6.0: 3, 9.0: 3}


def noisy(volume: np.ndarray, resolution: float, seed: int) -> torch.Tensor:
    """A map with noise of its own power spectrum's shape at a resolution, zero beyond 0.8 of it."""
    n = volume.shape[0]
    spectrum = torch.fft.rfftn(torch.from_numpy(volume))
    noise = torch.fft.rfftn(torch.randn(n, n, n, generator=torch.Generator().manual_seed(seed)))
    radius = half_radius(n)
    shell = radius.round().long().clamp(max=n).reshape(-1)
    count = torch.bincount(shell, minlength=n + 1).clamp(min=1)
    own, theirs = (torch.bincount(shell, z.abs().square().double().reshape(-1), n + 1) / count for z in (spectrum, noise))
    cut = n * VOXEL / resolution
    ssnr = 2.0 / (6.0 * (radius.double() / cut) ** 6).clamp(min=1e-3)
    scale = torch.sqrt((own / theirs)[shell].reshape(radius.shape) / ssnr)
    return torch.fft.irfftn((spectrum + noise * scale) * (ssnr / (1 + ssnr)) * (radius < cut / 0.8), s=volume.shape).float()


def main() -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    quick = "--quick" in sys.argv
    rows, spent, right, total = [], [], 0, 0
    unknown: list[str] = []
    for name in NAMES:
        molecule = MOLECULES[name]
        positions, elements = read_atoms(molecule)
        model = torch.from_numpy(density(positions, elements, BOX, VOXEL, 60.0))
        operators = symmetry_operators(molecule.symmetry)
        for resolution, count in {**CASES, 15.0: 1}.items():
            for seed in range(1 if quick else count):
                turn = random_rotations(1, torch.Generator().manual_seed(100 + seed))[0].double().numpy()
                shift = np.random.default_rng(seed).normal(0.0, 6.0, 3)
                target = noisy(density(positions @ turn.T + shift, elements, BOX, VOXEL, 60.0), resolution, seed)
                wrong = seed % 2 == 1
                start = time.process_time()
                own, other = dock_both_hands(mirrored(target) if wrong else target, model, VOXEL, resolution, seed=seed)
                spent.append(time.process_time() - start)
                hand = decided_hand(own.white, other.white, resolution)
                if resolution == 15.0:
                    unknown.append(hand)
                    print(f"{name} {resolution:g} A: hand {hand}; white {own.white:.3f} and {other.white:.3f}", flush=True)
                    continue
                found = other if wrong else own
                degrees = min(
                    math.degrees(math.acos(np.clip((np.trace(found.rotation.numpy() @ turn @ g) - 1) / 2, -1, 1))) for g in operators
                )
                off = float(np.linalg.norm(found.shift_px.numpy() * VOXEL - shift))
                good = hand == ("mirrored" if wrong else "right") and degrees < 3.0 and off < 2.0
                right, total = right + good, total + 1
                rows.append((resolution, degrees, off, max(own.white, other.white), min(own.white, other.white)))
                print(
                    f"{name} {resolution:g} A: {'right' if good else 'WRONG'}, {degrees:.2f} deg, {off:.2f} A; "
                    f"white {rows[-1][3]:.3f}, other hand {rows[-1][4]:.3f}; {spent[-1]:.1f} CPU s",
                    flush=True,
                )
    plot(np.array(rows))
    print(json.dumps({
        "right": right, "of": total, "worst_deg": round(max(r[1] for r in rows), 3), "worst_angstrom": round(max(r[2] for r in rows), 3),
        "cpu_seconds_each": round(float(np.mean(spent)), 2), "unknown_at_15A": unknown.count("unknown"), "cases_at_15A": len(unknown),
    }))  # fmt: skip


def plot(rows: np.ndarray) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.scatter(rows[:, 0], rows[:, 3], label="right hand")
    axes.scatter(rows[:, 0], rows[:, 4], label="wrong hand")
    axes.set(xlabel="resolution, A", ylabel="white correlation", ylim=(0, 1))
    axes.legend()
    figure.savefig(OUT / "dock.png", dpi=120)


if __name__ == "__main__":
    main()
