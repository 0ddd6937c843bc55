"""Faults that show in the map itself: Fourier space that no view has filled, a mask that cuts it, density darker than the solvent."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from cryodask.kernels.fourier import soft_sphere
from cryodask.kernels.half_grid import shells_of_slab
from cryodask.kernels.projection import cut_map

_REACHED = 0.1
"""Weight of a voxel, over the mean of its shell, that counts half as reached by the views."""


def fourier_coverage(grid: Tensor, radius: int) -> Tensor:
    """Share of each shell that the views reach, `(radius + 1,)` float64 from 0 to 1, of a folded grid `(z, y, x, 3)`.

    A voxel with weight w, over the mean of its shell, counts as w / (w + 0.1), so that an even shell counts as 1. Weights are averaged
    over 1.5 voxels of the images' transform, since a particle is smaller than its box.
    """
    mean = _over_shells(grid, radius, lambda w, _: w).clamp(min=1e-30)
    reached = _over_shells(grid, radius, lambda w, shell: w / (w + _REACHED * mean[shell]))
    return (reached * (1.0 + _REACHED)).clamp(max=1.0)[: radius + 1]


def covered(correlation: Tensor, coverage: Tensor) -> Tensor:
    """Correlation of half-maps `(shell,)`, lowered to what it would be if noise filled the part that no view has reached.

    The squared correlation of the whole map with the truth is 2 F / (1 + F) within the part that is reached, and nothing elsewhere.
    """
    with_truth = coverage.to(correlation) * 2.0 * correlation / (1.0 + correlation).clamp(min=1e-6)
    return with_truth / (2.0 - with_truth)


def _over_shells(grid: Tensor, radius: int, function: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Mean over each shell of a function of weights and shell numbers, `(radius + 2,)` float64; plane by plane."""
    sums, counts = (torch.zeros(radius + 2, dtype=torch.float64, device=grid.device) for _ in range(2))
    half = grid.shape[2] - 1
    twice = torch.full((2 * half + 1, half + 1), 2.0, dtype=torch.float64, device=grid.device)
    twice[:, 0] = 1.0
    for z, weights in _smooth_planes(grid):
        shell = shells_of_slab(half, z - half, grid.device).clamp(max=radius + 1)
        sums.index_add_(0, shell.reshape(-1), (function(weights, shell) * twice).reshape(-1))
        counts.index_add_(0, shell.reshape(-1), twice.reshape(-1))
    return sums / counts.clamp(min=1.0)


def _smooth_planes(grid: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Planes of the weights, float64, averaged over three grid points along each axis."""
    last = grid.shape[0] - 1
    flat = [avg_pool2d(grid[z, :, :, 2][None].double(), 3, 1, 1, count_include_pad=False)[0] for z in (0, 1)]
    yield 0, (flat[0] + flat[1]) / 2.0
    for z in range(1, last):
        flat.append(avg_pool2d(grid[z + 1, :, :, 2][None].double(), 3, 1, 1, count_include_pad=False)[0])
        yield z, (flat[0] + flat[1] + flat[2]) / 3.0
        flat.pop(0)
    yield last, (flat[0] + flat[1]) / 2.0


def cut_share(halves: Tensor, pixel_size_angstrom: float, diameter_angstrom: float, rings: int) -> float:
    """Share of the power that two half-maps `(2, z, y, x)` have in common which lies outside the spherical mask, up to ``rings``.

    Only the ball inscribed in the box counts. Noise of independent halves is not common.
    """
    first, second = (cut_map(half, rings) for half in halves)
    box = halves.shape[-1]
    ball = soft_sphere(box, pixel_size_angstrom, box * pixel_size_angstrom / 2, pixel_size_angstrom, device=halves.device)
    common = (first * second * ball).double()
    outside = 1.0 - soft_sphere(box, pixel_size_angstrom, diameter_angstrom / 2, pixel_size_angstrom, device=halves.device)
    return float((common * outside).sum() / common.sum().clamp(min=1e-30))


def density_skewness(volume: Tensor) -> float:
    """Skewness of the density of a whole box `(z, y, x)`: positive if a molecule lies in a solvent that is less dense."""
    off = (volume - volume.mean()).double()
    return float((off**3).mean() / (off**2).mean().clamp(min=1e-30) ** 1.5)
