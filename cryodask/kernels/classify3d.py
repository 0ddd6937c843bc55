"""Classes of particles at known poses: starting clusters, maps of the classes, and how well they can be told apart.

Whole-particle expectation maximisation from a random start finds a missing domain but not one that moves; inside a mask and from
the clusters of the particles' principal components it finds both. No signal subtraction is needed: all classes share the consensus
outside the mask.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from cryodask.kernels.fsc import fsc
from cryodask.kernels.half_grid import reconstruct_half

_LLOYD_ROUNDS = 100
_SAME_START = 0.95
"""Starts that agree on this share of the particles count as the same."""
_LEAST_FSC, _MOST_FSC = 1e-3, 0.999


def clusters(points: np.ndarray, count: int, seeds: list[int]) -> list[np.ndarray]:
    """Centres `(cluster, dimension)` of k-means on points `(n, dimension)`, one result per seed, without duplicates."""
    found: list[tuple[np.ndarray, np.ndarray]] = []
    for seed in seeds:
        centres = _lloyd(points, _spread_centres(points, count, np.random.default_rng(seed)))
        labels = nearest_centre(points, centres)
        if all(agreement_of_labels(labels, other, count) < _SAME_START for _, other in found):
            found.append((centres, labels))
    return [centres for centres, _ in found]


def nearest_centre(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Index of the nearest centre of each point `(n,)` int64."""
    return np.asarray(np.square(points[:, None] - centres[None]).sum(2).argmin(1))


def _spread_centres(points: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """First centres far from each other: k-means++ (Arthur and Vassilvitskii 2007)."""
    centres = [points[rng.integers(len(points))]]
    for _ in range(count - 1):
        distance = np.square(points[:, None] - np.array(centres)[None]).sum(2).min(1)
        total = distance.sum()
        centres.append(points[rng.choice(len(points), p=distance / total)] if total > 0 else points[rng.integers(len(points))])
    return np.array(centres)


def _lloyd(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    for _ in range(_LLOYD_ROUNDS):
        labels = nearest_centre(points, centres)
        new = np.array([points[labels == k].mean(0) if (labels == k).any() else centres[k] for k in range(len(centres))])
        if np.array_equal(new, centres):
            break
        centres = new
    return centres


def agreement_of_labels(first: np.ndarray, second: np.ndarray, count: int) -> float:
    """Share of the particles that two classifications put into corresponding classes, in the best one-to-one correspondence."""
    from scipy.optimize import linear_sum_assignment

    table = np.zeros((count, count))
    np.add.at(table, (first, second), 1)
    rows, columns = linear_sum_assignment(-table)
    return float(table[rows, columns].sum() / max(len(first), 1))


def filtered_halves(grids: list[Tensor], radius: int, map_box: int, image_box: int, mask: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
    """Map of all particles, maps of the halves, each filtered by its signal-to-noise ratio (Wiener) and masked; and their FSC.

    ``grids``: folded half grids of the two half-sets. The prior of a map is the FSC of its own half-maps (Scheres 2012).
    """
    plain = [reconstruct_half(grid, radius, map_box, image_box=image_box) * mask for grid in grids]
    curve = fsc(plain[0], plain[1])[: radius + 1]
    limited = torch.nan_to_num(curve).clamp(_LEAST_FSC, _MOST_FSC)
    ratio = limited / (1.0 - limited)
    halves = [reconstruct_half(grid, radius, map_box, image_box=image_box, ssnr=ratio) * mask for grid in grids]
    whole = reconstruct_half(grids[0] + grids[1], radius, map_box, image_box=image_box, ssnr=2.0 * ratio) * mask
    return whole, halves, curve


def within(volume: Tensor, consensus: Tensor, mask: Tensor | None) -> Tensor:
    """The reference of a class: its own map inside the mask, the consensus outside."""
    return volume if mask is None else consensus * (1.0 - mask) + volume * mask


def confusion(separation: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Expected share of the particles of each class (row) that is assigned to another one (column), from the distance of the maps.

    ``separation`` `(class, class)`: d^2 = sum 2 C^2 |a - b|^2 / noise in an image. The difference of two log-likelihoods is normal with
    mean d^2 / 2 and variance d^2, so that two classes of equal shares are confused with a probability of Phi(-d / 2). Pairs are treated
    independently; the diagonal is the remainder.
    """
    count = len(shares)
    out = np.zeros((count, count))
    for a in range(count):
        for b in range(count):
            if a != b:
                d = math.sqrt(max(float(separation[a, b]), 1e-12))
                bias = math.log(max(float(shares[a]), 1e-9) / max(float(shares[b]), 1e-9))
                out[a, b] = 0.5 * math.erfc((d / 2.0 + bias / d) / math.sqrt(2.0)) if shares[b] > 0 else 0.0
        total = out[a].sum()
        if total > 1.0:
            out[a] /= total
        out[a, a] = 1.0 - out[a].sum()
    return out


def floored(logits: Tensor, least: Tensor, rounds: int = 30) -> Tensor:
    """Posterior over classes `(n, class)` in which the mean of each class is at least ``least`` `(class,)`.

    A bias per class raises those that would get less, so that the order of particles within a class stays. Balancing all classes instead
    would push particles of a common molecule into the class of a rare one.
    """
    bias = torch.zeros(logits.shape[1], dtype=logits.dtype, device=logits.device)
    for _ in range(rounds):
        mean = torch.softmax(logits + bias, 1).mean(0)
        bias = bias + torch.log((least / mean.clamp(min=1e-12)).clamp(min=1.0))
    return torch.softmax(logits + bias, 1)
