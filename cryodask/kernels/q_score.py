"""Q-scores of atoms: how much the density about each looks like that of a resolved one (Pintilie et al. 2020, Nat. Methods 17, 328).

Map values on spheres of 0 to 2 A about an atom are correlated with a Gaussian of standard deviation 0.6 A about it. Of each sphere only
points that are nearer to this atom than to any other take part, eight at most. Along a direction d from an atom, the points nearer to it
than to its neighbour at D are those up to |D|^2 / (2 d.D): the smallest over all neighbours is how far the atom's own cell reaches that
way, so one pass over the neighbours decides for all spheres.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

SIGMA_ANGSTROM = 0.6
REACH_ANGSTROM = 2.0
STEP_ANGSTROM = 0.1
POINTS = 8
_DIRECTIONS = 128
_ATOMS_TOGETHER = 1000
COARSEST_ANGSTROM = 4.5
"""Resolution beyond which Q-scores say too little: residues 2 A out of place have a lower one than correct residues in 98 % of the pairs at
3.5 A, 96 % at 4 A, 90 % at 4.5 A, 76 % at 5 A, where local correlations tell more, and 57 % at 8 A (``benchmarks/q_score.py``)."""


def spread_directions(count: int = _DIRECTIONS) -> np.ndarray:
    """Unit vectors `(count, 3)`, ordered so that the first few are already spread over the sphere."""
    i = np.arange(count) + 0.5
    z, turn = 1.0 - 2.0 * i / count, np.pi * (1.0 + np.sqrt(5.0)) * i
    flat = np.sqrt(1.0 - z * z)
    points = np.stack([flat * np.cos(turn), flat * np.sin(turn), z], 1)
    order, nearest = [0], points @ points[0]
    for _ in range(count - 1):
        order.append(int(nearest.argmin()))
        nearest = np.maximum(nearest, points @ points[order[-1]])
    return np.asarray(points[order])


def own_reach(positions: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """How far, Angstrom, the cell of each atom reaches in each direction `(atom, direction)` float32; infinite if nothing limits it.

    ``positions`` `(atom, 3)` in Angstrom. Only atoms that can limit it within 2 A count.
    """
    reach = np.full((len(positions), len(directions)), np.inf, np.float32)
    pairs = cKDTree(positions).query_pairs(2.0 * REACH_ANGSTROM, output_type="ndarray")
    pairs = np.concatenate([pairs, pairs[:, ::-1]])
    pairs = pairs[np.argsort(pairs[:, 0], kind="stable")]
    starts = np.searchsorted(pairs[:, 0], np.arange(0, len(positions) + _ATOMS_TOGETHER, _ATOMS_TOGETHER))
    for first, last in pairwise(starts.tolist()):
        some = pairs[first:last]
        if not len(some):
            continue
        apart = (positions[some[:, 1]] - positions[some[:, 0]]).astype(np.float32)
        towards = apart @ directions.T.astype(np.float32)
        with np.errstate(divide="ignore", invalid="ignore"):
            limit = np.where(towards > 1e-6, (apart * apart).sum(1)[:, None] / (2.0 * towards), np.inf)
        atom, at = np.unique(some[:, 0], return_index=True)
        reach[atom] = np.minimum.reduceat(limit, at, axis=0)
    return reach


def q_scores(volume: np.ndarray, voxel_angstrom: float, positions: np.ndarray) -> np.ndarray:
    """Q-score of each atom `(atom,)` float32: 1 for the density of a well-resolved atom, 0 for none; NaN outside the map.

    Parameters
    ----------
    volume : ndarray, `(z, y, x)`
        Values between voxels are interpolated linearly.
    voxel_angstrom : float
    positions : ndarray, `(atom, 3)`
        (x, y, z) in Angstrom from the centre of voxel 0: all atoms of the model, because each limits the points of its neighbours.
    """
    directions = spread_directions()
    radii = np.arange(1, round(REACH_ANGSTROM / STEP_ANGSTROM) + 1) * STEP_ANGSTROM
    wanted = np.exp(-0.5 * (np.concatenate([[0.0], radii]) / SIGMA_ANGSTROM) ** 2)
    out = np.empty(len(positions), np.float32)
    cells = own_reach(positions, directions)
    data = np.asarray(volume, np.float32)
    for first in range(0, len(positions), _ATOMS_TOGETHER):
        places = positions[first : first + _ATOMS_TOGETHER]
        free = cells[first : first + _ATOMS_TOGETHER, None, :] > radii[:, None]
        # directions are ordered so that the first free ones of a sphere are spread over what is free of it
        atom, sphere, way = np.nonzero(free & (free.cumsum(2, dtype=np.int16) <= POINTS))
        centres = np.repeat(np.arange(len(places)), POINTS)
        points = np.concatenate([places[centres], places[atom] + radii[sphere, None] * directions[way]])
        owner, reference = np.concatenate([centres, atom]), wanted[np.concatenate([np.zeros_like(centres), sphere + 1])]
        values = ndimage.map_coordinates(data, points[:, ::-1].T / voxel_angstrom, order=1, mode="nearest")
        out[first : first + len(places)] = _correlations(values, reference, owner, len(places))
    inside = ((positions >= 0.0) & (positions / voxel_angstrom <= np.array(data.shape[::-1]) - 1)).all(1)
    return np.where(inside, out, np.nan).astype(np.float32)


def _correlations(first: np.ndarray, second: np.ndarray, owner: np.ndarray, count: int) -> np.ndarray:
    """Correlation about the mean of the values of each owner `(count,)`; 0 where they are constant."""
    number = np.bincount(owner, minlength=count)
    a, b = (v - (np.bincount(owner, v, count) / number)[owner] for v in (first.astype(np.float64), second))
    power = np.bincount(owner, a * a, count) * np.bincount(owner, b * b, count)
    return np.asarray(np.bincount(owner, a * b, count) / np.sqrt(np.maximum(power, 1e-30)))
