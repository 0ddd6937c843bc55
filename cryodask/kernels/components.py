"""Principal components of a map at known poses: probabilistic PCA of the particles by expectation maximisation.

A particle is X = C P(V_0 + sum_j z_j V_j) + noise with z ~ N(0, 1) (Tipping and Bishop 1999, J. R. Stat. Soc. B 61, 611; for cryo-EM
Tagare et al. 2015, J. Struct. Biol. 191, 245). The mean V_0 is known. Given the components, z of a particle is a small linear problem;
given z, every point of the Fourier grid has one. The components also fit the noise inside the mask, so a small mask finds
smaller motions.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations, combinations_with_replacement

import numpy as np
import torch
from torch import Tensor

from cryodask.kernels.half_grid import fold_half_grid, half_volume, mean_weight, reconstruct_half, shells_of_slab
from cryodask.kernels.known_poses import Posed
from cryodask.kernels.rows import shell_counts

RIDGE = 0.015
"""Prior of the components: this share of a shell's mean weight."""
FIRST_NATS = 2.0
"""Log-likelihood per particle that a random component explains at the start: a weaker start never grows, a stronger one stays noise."""
_MEAN_SQUARE_CTF = 0.5
_NO_PRIOR = 1e9


@dataclass(frozen=True)
class Pairs:
    """Padded transforms of the mean and the components (``single``), and of the sums of all pairs of them (``both``)."""

    single: tuple[Tensor, ...]
    both: dict[tuple[int, int], Tensor]

    @classmethod
    def of(cls, mean: Tensor, components: Tensor, ring: int, image_box: int) -> Pairs:
        """Prepare a mean `(z, y, x)` and components `(component, z, y, x)`."""
        single = tuple(half_volume(volume, ring + 1, image_box) for volume in (mean, *components))
        # slices are linear in the map, and pairs of slices are only needed through the norms of their sums
        return cls(single, {(j, k): single[j] + single[k] for j, k in combinations(range(len(single)), 2)})


@dataclass(frozen=True)
class Coordinates:
    """``z`` `(n, component)`, its covariance `(n, component, component)` float64; ``explained``: log-likelihood gain by the components."""

    z: Tensor
    covariance: Tensor
    explained: Tensor


def coordinates(posed: Posed, pairs: Pairs, noise_power: Tensor, ring: int) -> Coordinates:
    """Posterior of the particles' coordinates."""
    count = len(pairs.single) - 1
    found = [posed.agreement(volume, noise_power, ring) for volume in pairs.single]
    cross, norm = (torch.stack(some, 1) for some in zip(*found))
    gram = torch.diag_embed(norm)
    for (j, k), volume in pairs.both.items():
        both = posed.agreement(volume, noise_power, ring)[1]
        gram[:, j, k] = gram[:, k, j] = 0.5 * (both - norm[:, j] - norm[:, k])
    precision = 2.0 * gram[:, 1:, 1:] + torch.eye(count, dtype=gram.dtype, device=gram.device)
    pull = 2.0 * (cross[:, 1:] - gram[:, 0, 1:])
    covariance = torch.linalg.inv(precision)
    z = torch.einsum("njk,nk->nj", covariance, pull)
    return Coordinates(z, covariance, 0.5 * (z * pull).sum(1))


def component_sums(posed: Posed, found: Coordinates, noise_power: Tensor, radius: int) -> dict[str, Tensor]:
    """Sums over the particles of a block: ``grid`` `(component + 1, z, y, x, 3)`, ``pair_weight`` of pairs, moments of z."""
    z = found.z
    second = torch.einsum("nj,nk->njk", z, z) + found.covariance
    ones = torch.ones_like(z[:, :1])
    grids = [posed.grid(weight, noise_power, radius) for weight in torch.cat([ones, z], 1).T]
    cross = [posed.grid(second[:, j, k], noise_power, radius)[..., 2] for j, k in _pairs(z.shape[1])]
    return {"grid": torch.stack(grids), "pair_weight": torch.stack(cross), "second": second.sum(0), "explained": found.explained.sum()}


def _pairs(count: int) -> list[tuple[int, int]]:
    return list(combinations_with_replacement(range(count), 2))


def solve_components(grid: Tensor, cross: Tensor, operators: np.ndarray, radius: int, map_box: int, image_box: int) -> Tensor:
    """New components `(component, z, y, x)` from :func:`component_sums`, without a mask.

    The mean is solved for as well, so that it does not leak into the components, but is not returned.
    """
    count = len(grid) - 1
    grids = [fold_half_grid(one.clone(), operators) for one in grid]
    weights = {}
    for (j, k), weight in zip(_pairs(count), cross):
        padded = torch.zeros(*weight.shape, 3, device=weight.device)
        padded[..., 2] = weight
        weights[j + 1, k + 1] = fold_half_grid(padded, operators)[..., 2]
    half = grids[0].shape[2] - 1
    ridge = (RIDGE * mean_weight(grids[0], radius)).clamp(min=1e-20)
    solved = [torch.zeros_like(grids[0]) for _ in range(count)]
    for z in range(-half, half + 1):
        shell = shells_of_slab(half, z, grid.device).clamp(max=radius + 1)
        system = torch.zeros(*shell.shape, count + 1, count + 1, dtype=torch.float64, device=grid.device)
        for k in range(count + 1):
            system[..., 0, k] = system[..., k, 0] = grids[k][z + half, :, :, 2].double()
        for (j, k), weight in weights.items():
            system[..., j, k] = system[..., k, j] = weight[z + half].double()
        system += ridge[shell][..., None, None] * torch.eye(count + 1, dtype=torch.float64, device=grid.device)
        sums = torch.stack([one[z + half, :, :, :2] for one in grids], 2).double()
        values = torch.linalg.solve(system, sums).float()
        for k in range(count):
            solved[k][z + half, :, :, :2] = values[:, :, k + 1]
    for one in solved:
        one[..., 2] = 1.0
    shells = torch.full((radius + 1,), _NO_PRIOR, dtype=torch.float64)
    return torch.stack([reconstruct_half(one, radius, map_box, image_box=image_box, ssnr=shells) for one in solved])


def orthogonal(components: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Orthogonal components for coordinates of unit variance, strongest first, and their standard deviations `(component,)`.

    ``second``: mean of z z^T + covariance over the particles.
    """
    spread = torch.linalg.cholesky(second.double().cpu() + 1e-9 * torch.eye(len(second), dtype=torch.float64))
    flat = (spread.T.to(components) @ components.flatten(1)).double()
    turn, strength, _ = torch.linalg.svd(flat @ flat.T)
    # the sign of a singular vector is arbitrary: that of its largest entry is made positive
    turn = turn * torch.sign(turn.gather(0, turn.abs().argmax(0, keepdim=True)))
    return (turn.T @ flat).float().reshape(components.shape), strength.sqrt()


def random_components(count: int, mask: Tensor, noise_power: Tensor, ring: int, image_box: int, generator: torch.Generator) -> Tensor:
    """Random maps `(component, z, y, x)` in a mask, each of which explains ``FIRST_NATS`` per particle."""
    out = []
    for _ in range(count):
        volume = torch.randn(mask.shape, generator=generator).to(mask) * mask
        out.append(volume * (FIRST_NATS / explained_by(volume, noise_power, ring, image_box)) ** 0.5)
    return torch.stack(out)


def explained_by(volume: Tensor, noise_power: Tensor, ring: int, image_box: int) -> float:
    """Mean signal-to-noise ratio of a map in an image, 2 sum C^2 |a|^2 / noise over the half plane, from its power per shell."""
    grid = half_volume(volume, ring + 1, image_box)
    half = grid.shape[2] - 1
    power, counts = (torch.zeros(ring + 2, dtype=torch.float64, device=volume.device) for _ in range(2))
    for z in range(-half, half + 1):
        shell = shells_of_slab(half, z, volume.device).clamp(max=ring + 1).reshape(-1)
        power.index_add_(0, shell, grid[z + half].abs().square().reshape(-1).double())
        counts.index_add_(0, shell, torch.ones_like(shell, dtype=torch.float64))
    mean = power / counts.clamp(min=1.0)
    pixels = shell_counts(ring, str(volume.device))
    shells = slice(1, ring + 1)
    return float(2.0 * _MEAN_SQUARE_CTF * (pixels * mean[: ring + 1] / noise_power.double().mean(0)[: ring + 1])[shells].sum()) + 1e-30
