"""Scores of results against the ground truth of a simulated session."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from cryodask.kernels.fsc import corrected_fsc, resolution_at
from cryodask.kernels.half_grid import reconstruct_half
from cryodask.kernels.local_search import grid_of_poses
from cryodask.kernels.rows import image_rows
from cryodask.kernels.symmetry import symmetry_operators


def match_picks(found: np.ndarray, true: np.ndarray, tolerance_px: float) -> tuple[np.ndarray, np.ndarray]:
    """One-to-one pairs of picks and true positions, most pairs first, then the closest.

    Parameters
    ----------
    found, true : array, `(n, 2)` and `(m, 2)`, pixels
    tolerance_px : float
        Largest distance of a match.

    Returns
    -------
    arrays `(pairs,)`
        Indices into ``found`` and into ``true``.
    """
    if not len(found) or not len(true):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    distance = np.linalg.norm(found[:, None] - true[None], axis=-1)
    cost = np.where(distance <= tolerance_px, distance, 1e6)
    i, j = linear_sum_assignment(cost)
    good = cost[i, j] < 1e6
    return i[good], j[good]


def off_border(positions: np.ndarray, shape: tuple[int, int], border_px: float) -> np.ndarray:
    """Mask of positions at least ``border_px`` inside the image."""
    high = np.array(shape) - 1 - border_px
    return np.all((positions >= border_px) & (positions <= high), axis=-1)


def precision_and_recall(
    found: list[np.ndarray], true: list[np.ndarray], shape: tuple[int, int], diameter_px: float
) -> tuple[float, float]:
    """Precision and recall over micrographs; one-to-one matches within 0.4 diameters; a border of 0.4 diameters is ignored."""
    hits = picks = particles = 0
    for f, t in zip(found, true):
        i, j = match_picks(f, t, 0.4 * diameter_px)
        f_inside, t_inside = (off_border(p, shape, 0.4 * diameter_px) for p in (f, t))
        both = f_inside[i] & t_inside[j]
        hits += int(both.sum())
        # a pick whose partner is across the border line does not count as an error
        picks += int(f_inside.sum()) - int((f_inside[i] & ~t_inside[j]).sum())
        particles += int(t_inside.sum()) - int((t_inside[j] & ~f_inside[i]).sum())
    return hits / max(picks, 1), hits / max(particles, 1)


def relion_displacement(
    frame_shift: np.ndarray, polynomial: np.ndarray, positions: np.ndarray, shape: tuple[int, int], pixel_size_angstrom: float
) -> np.ndarray:
    """Displacement of the specimen from RELION's trajectory and polynomial.

    Parameters
    ----------
    frame_shift : array, `(frame, 2)`, Angstrom
    polynomial : array, `(36,)`, pixels
        X first; for each of 1, x, x^2, y, y^2, xy those of t, t^2, t^3.
    positions : array, `(n, 2)`, pixels
        Rows and columns.

    Returns
    -------
    array, `(n, frame, 2)`, Angstrom
    """
    y, x = positions[:, 0] / shape[0] - 0.5, positions[:, 1] / shape[1] - 0.5
    t = np.arange(len(frame_shift), dtype=float)
    space = np.stack([np.ones_like(x), x, x * x, y, y * y, x * y])
    time = np.stack([t, t**2, t**3])
    local = np.einsum("dst,sp,tf->pfd", np.asarray(polynomial, float).reshape(2, 6, 3), space, time)[..., ::-1]
    return frame_shift[None] - local * pixel_size_angstrom


def rms_motion_error(found: np.ndarray, true: np.ndarray) -> float:
    """RMS length of the error `(..., frame, 2)`, each position's mean over frames removed."""
    error = found - true
    error = error - error.mean(-2, keepdims=True)
    return float(np.sqrt((error**2).sum(-1).mean()))


@dataclass(frozen=True)
class TruePoses:
    """Particles of one half-set or both with their true poses.

    ``images`` `(n, y, x)`; ``rotations`` `(n, 3, 3)`; CTF `(n,)`; ``origin_angstrom`` `(n, 2)` (y, x) moves the particle to the centre.
    """

    images: np.ndarray
    rotations: Tensor
    origin_angstrom: np.ndarray
    ctf: dict[str, np.ndarray]
    half_set: np.ndarray


def half_maps_from_poses(particles: TruePoses, pixel_size_angstrom: float, symmetry: str) -> Tensor:
    """Half-maps `(2, z, y, x)` of particles with known poses, by weighted insertion (white noise)."""
    box = particles.images.shape[-1]
    radius = box // 2 - 1
    columns = {"phase_shift_deg": np.zeros(len(particles.images)), **particles.ctf}
    rows = image_rows(torch.from_numpy(particles.images), columns, radius, pixel_size_angstrom)
    rotations, origins = particles.rotations.float(), torch.from_numpy(particles.origin_angstrom / pixel_size_angstrom).float()
    maps = []
    for half in (0, 1):
        some = torch.from_numpy(np.nonzero(particles.half_set == half)[0])
        grid = grid_of_poses(rows, some, torch.ones(radius + 1), rotations[some], origins[some], radius, symmetry_operators(symmetry))
        maps.append(reconstruct_half(grid, radius, box, image_box=box))
    return torch.stack(maps)


def corrected_resolution(half_maps: Tensor, mask: Tensor, pixel_size_angstrom: float) -> float:
    """Resolution (FSC 0.143, corrected for the mask) of two half-maps, Angstrom."""
    curves = corrected_fsc(half_maps[0], half_maps[1], mask)
    return resolution_at(curves.corrected, 0.143, half_maps.shape[-1], pixel_size_angstrom)
