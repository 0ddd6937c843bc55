"""What Q-scores and local correlations tell at each resolution: residues that are out of place, in simulated maps of a nucleosome.

The residues within 35 A of its centre; a map of 144 voxels of 0.75 A that ends at the resolution, amplitudes falling with B = 30 A^2, in
noise of the same spectrum and half the density's standard deviation within the molecule. A tenth of the residues is moved by 1, 2 or 4 A,
each in a direction of its own. The share of pairs of a right and a wrong residue in which the right one has the higher score (the area
under the ROC curve) is printed for both scores, and the CPU time of the Q-scores.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from _molecules import MOLECULES

from cryodask.kernels.fsc import half_radius
from cryodask.kernels.model_scores import at_places, local_correlation
from cryodask.kernels.q_score import q_scores
from cryodask.stages._models import Atoms, atoms_of, density, read_model, structure_of

BOX, VOXEL, REACH_ANGSTROM, B_FACTOR_A2 = 144, 0.75, 35.0, 30.0
RESOLUTIONS = (2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 6.0, 8.0)
STEPS_ANGSTROM = (1.0, 2.0, 4.0)


def core_of(atoms: Atoms) -> Atoms:
    """The residues with an atom near the centre, about the middle of the map."""
    about = atoms.positions - atoms.positions.mean(0)
    near = np.unique(atoms.residue[np.linalg.norm(about, axis=1) < REACH_ANGSTROM])
    kept = np.isin(atoms.residue, near)
    return Atoms(
        about[kept] + BOX // 2 * VOXEL,
        [e for e, k in zip(atoms.elements, kept) if k],
        np.searchsorted(near, atoms.residue[kept]),
        [atoms.residues[i] for i in near],
    )


def noisy_map(spectrum: torch.Tensor, resolution: float) -> torch.Tensor:
    """The map at a resolution, with its noise."""
    frequency = half_radius(BOX) / (BOX * VOXEL)
    filter_ = torch.exp(-0.25 * B_FACTOR_A2 * frequency**2) * (frequency < 1.0 / resolution)
    noise = torch.fft.rfftn(torch.randn((BOX,) * 3, generator=torch.Generator().manual_seed(1)))
    signal, noise = (torch.fft.irfftn(f * filter_, s=(BOX,) * 3) for f in (spectrum, noise))
    return signal + noise * (0.5 * signal[signal.abs() > signal.std()].std() / noise.std())


def main() -> None:
    torch.set_num_threads(1)
    atoms = core_of(atoms_of(structure_of(read_model(str(MOLECULES["9be6"].file)))))
    spectrum = torch.fft.rfftn(torch.from_numpy(density(atoms, atoms.positions - BOX // 2 * VOXEL, BOX, VOXEL, 0.0)))
    rng, count = np.random.default_rng(0), len(atoms.residues)
    wrong = np.zeros(count, bool)
    wrong[rng.choice(count, count // 10, replace=False)] = True
    away = rng.standard_normal((count, 3))
    away *= wrong[:, None] / np.linalg.norm(away, axis=1, keepdims=True)
    print(f"{len(atoms.elements)} atoms, {count} residues, {wrong.sum()} out of place")
    out, spent = {}, []
    for resolution in RESOLUTIONS:
        volume = noisy_map(spectrum, resolution)
        row = []
        for step in STEPS_ANGSTROM:
            places = atoms.positions + step * away[atoms.residue]
            start = time.process_time()
            q = q_scores(volume.numpy(), VOXEL, places)
            spent.append(time.process_time() - start)
            own = torch.from_numpy(density(atoms, places - BOX // 2 * VOXEL, BOX, VOXEL, 100.0))
            correlation = at_places(local_correlation(volume, own, VOXEL), places / VOXEL)
            for scores in (q, correlation):
                mean = np.bincount(atoms.residue, scores) / np.bincount(atoms.residue)
                row.append(float((mean[~wrong][:, None] > mean[wrong][None]).mean()))
        right = q_scores(volume.numpy(), VOXEL, atoms.positions).mean()
        out[str(resolution)] = [round(v, 3) for v in row]
        each = "; ".join(f"{s:g} A: Q {q:.3f}, correlation {c:.3f}" for s, q, c in zip(STEPS_ANGSTROM, row[::2], row[1::2]))
        print(f"{resolution:g} A: mean Q of the right model {right:.2f}; pairs in order, moved by {each}", flush=True)
    print(json.dumps({"cpu_seconds_per_1000_atoms": round(1000 * float(np.mean(spent)) / len(atoms.elements), 3), "pairs_in_order": out}))


if __name__ == "__main__":
    main()
