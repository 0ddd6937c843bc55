"""Simulated mixtures with known truth at physical noise (see _molecules.py): states of one molecule, and two proteins with junk."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import gemmi
import numpy as np
import torch
from scipy.ndimage import gaussian_filter

sys.path.insert(0, str(Path(__file__).parent))
from _molecules import (
    MOLECULES,
    REFERENCE_BOX,
    REFERENCE_PIXEL,
    SHIFT_SD_ANGSTROM,
    density,
    project,
    random_columns,
    read_atoms,
    reference_noise,
)

from cryodask.kernels.orientations import euler_to_matrix, matrix_to_euler, random_rotations, small_rotation
from cryodask.kernels.symmetry import rotation_about
from cryodask.stage import ParticleSet

MISSING, MOVED = (627, 736), (1, 217)
"""Residues of beta-galactosidase: domain 4, missing in state 1; domain 1, turned by 12 degrees in state 2."""
_TURN_DEG, _AXIS = 12.0, (0.3, 0.8, 0.5)
_PAIRS = ((1, 1, 1), (-1, -1, 1), (1, -1, -1), (-1, 1, -1))


@dataclass(frozen=True)
class Mixture:
    """Images `(n, y, x)` of unit noise, their set (true poses as columns), true class `(n,)`, true maps on the images' grey scale."""

    images: np.ndarray
    particles: ParticleSet
    labels: np.ndarray
    maps: list[np.ndarray]
    rotations: torch.Tensor
    origins_px: np.ndarray
    mask: np.ndarray | None = None


def simulate(maps: list[np.ndarray], labels: np.ndarray, seed: int) -> Mixture:
    """Particles of 64 pixels of 3.54 A; class ``len(maps)`` and above is empty."""
    n = len(labels)
    rotations = random_rotations(n, torch.Generator().manual_seed(seed))
    origins = np.random.default_rng(seed + 10).normal(0.0, SHIFT_SD_ANGSTROM / REFERENCE_PIXEL, (n, 2))
    columns = random_columns(n, seed + 20)
    images = np.zeros((n, REFERENCE_BOX, REFERENCE_BOX), np.float32)
    for k, one in enumerate(maps):
        rows = np.nonzero(labels == k)[0]
        own = {name: values[rows] for name, values in columns.items()}
        images[rows] = project(one, REFERENCE_PIXEL, rotations[rows], origins[rows], own) / reference_noise()
    images += np.random.default_rng(seed + 30).standard_normal(images.shape, dtype=np.float32)
    particles = posed(ParticleSet(n, REFERENCE_BOX, REFERENCE_PIXEL, columns), rotations, origins)
    return Mixture(images, particles, labels, [m / reference_noise() for m in maps], rotations, origins)


def posed(particles: ParticleSet, rotations: torch.Tensor, origins_px: np.ndarray) -> ParticleSet:
    """The set with these poses as columns."""
    angles = (np.degrees(a.numpy()) for a in matrix_to_euler(rotations.double()))
    poses = dict(zip(("rot_deg", "tilt_deg", "psi_deg"), angles))
    poses |= {f"origin_{axis}_angstrom": origins_px[:, i] * particles.pixel_size_angstrom for i, axis in enumerate("yx")}
    return replace(particles, columns={**particles.columns, **poses})


def jittered(mixture: Mixture, degrees: float, pixels: float, seed: int = 4) -> Mixture:
    """The same particles with poses off by random rotations of that rms angle and shifts of that standard deviation per axis."""
    generator = torch.Generator().manual_seed(seed)
    turns = torch.stack([small_rotation(np.radians(degrees) / 3**0.5, generator) for _ in range(len(mixture.labels))])
    rotations = turns @ mixture.rotations
    origins = mixture.origins_px + np.random.default_rng(seed).normal(0.0, pixels, mixture.origins_px.shape)
    return replace(mixture, particles=posed(mixture.particles, rotations, origins))


def states(count: int, seed: int) -> Mixture:
    """Beta-galactosidase (D2): 45 % whole, 33 % without domain 4, 22 % with domain 1 turned by 12 degrees; mask around domain 1."""
    positions, elements = read_atoms(MOLECULES["5a1a"])
    chain, residue = _chains_and_residues()
    whole = density(positions, elements, REFERENCE_BOX, REFERENCE_PIXEL)
    kept = ~((residue >= MISSING[0]) & (residue <= MISSING[1]))
    less = density(positions[kept], [e for e, k in zip(elements, kept) if k], REFERENCE_BOX, REFERENCE_PIXEL)
    in_domain = (residue >= MOVED[0]) & (residue <= MOVED[1])
    moved, first = positions.copy(), positions[chain == "A"].mean(0)
    for name in np.unique(chain):
        here, own = (chain == name) & in_domain, positions[chain == name].mean(0)
        mate = min((np.diag(p) for p in _PAIRS), key=lambda g: float(np.linalg.norm(g @ first - own)))
        turn, centre = rotation_about(mate @ np.array(_AXIS), np.radians(_TURN_DEG)), positions[here].mean(0)
        moved[here] = (positions[here] - centre) @ turn.T + centre
    other = density(moved, elements, REFERENCE_BOX, REFERENCE_PIXEL)
    labels = np.random.default_rng(seed).choice(3, count, p=[0.45, 0.33, 0.22])
    domain = density(positions[in_domain], [e for e, k in zip(elements, in_domain) if k], REFERENCE_BOX, REFERENCE_PIXEL, 400.0)
    mask = np.clip(1.5 * gaussian_filter((domain > 0.06 * domain.max()).astype(np.float32), 1.5), 0.0, 1.0)
    return replace(simulate([whole, less, other], labels, seed), mask=mask)


def two_proteins_and_junk(count: int, seed: int) -> Mixture:
    """45 % beta-galactosidase, 35 % apoferritin, 20 % junk (class 2): a third of it nothing, the rest blobs of a particle's power."""
    maps = [density(*read_atoms(MOLECULES[name]), REFERENCE_BOX, REFERENCE_PIXEL) for name in ("5a1a", "7a4m")]
    labels = np.random.default_rng(seed + 1).choice(3, count, p=[0.45, 0.35, 0.20])
    made, rng = simulate(maps, labels, seed), np.random.default_rng(seed + 3)
    power = float(made.images[labels < 2].var()) - 1.0
    y, x = np.mgrid[:REFERENCE_BOX, :REFERENCE_BOX] - REFERENCE_BOX / 2
    for row in np.nonzero(labels == 2)[0]:
        if rng.random() < 0.67:
            blobs = np.zeros_like(made.images[0])
            for _ in range(rng.integers(2, 9)):
                cy, cx, width = *rng.normal(0.0, 12.0, 2), rng.uniform(2.0, 7.0)
                blobs += rng.normal() * np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / (2.0 * width**2))
            made.images[row] += (blobs - blobs.mean()) / blobs.std() * np.sqrt(power)
    return made


def _chains_and_residues() -> tuple[np.ndarray, np.ndarray]:
    """Chain and residue number of the atoms of :func:`read_atoms` of beta-galactosidase."""
    structure = gemmi.read_structure(str(MOLECULES["5a1a"].file))
    structure.remove_hydrogens()
    structure.remove_waters()
    named = [
        (chain.name, residue.seqid.num) for chain in structure[0] for residue in chain for atom in residue if atom.altloc in ("\0", "A")
    ]
    return np.array([chain for chain, _ in named]), np.array([number for _, number in named])


def euler_rotations(columns: dict[str, np.ndarray]) -> torch.Tensor:
    """Rotations `(n, 3, 3)` of Euler angle columns, degrees."""
    return euler_to_matrix(*(torch.deg2rad(torch.from_numpy(np.asarray(columns[f"{a}_deg"], np.float64))) for a in ("rot", "tilt", "psi")))
