"""Decoys: maps that look like no molecule, for classes that collect what fits no reference.

They must have the power of the reference that they stand beside: a weaker one would lose every particle, a stronger one would fit noise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cryodask.kernels.fourier import radius
from cryodask.kernels.fsc import half_radius, half_shells, randomise_phases, shell_sum


def scrambled(volume: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
    """A map `(z, y, x)` with random phases in a ``mask``, and in each shell the power of ``volume``."""
    box = volume.shape[-1]
    transform = torch.fft.rfftn(volume)
    random = torch.fft.irfftn(randomise_phases(transform, half_radius(box, volume.device), 0.5, generator), s=volume.shape) * mask
    return _with_power_of(random, transform)


def featureless(volume: Tensor) -> Tensor:
    """The spherical average of a map `(z, y, x)` about its centre: a ball with the density profile of the molecule."""
    box = volume.shape[-1]
    shells = torch.fft.fftshift(radius(tuple(volume.shape), volume.device)).round().long().clamp(max=box // 2).reshape(-1)
    total, count = (torch.zeros(box // 2 + 1, dtype=torch.float64, device=volume.device) for _ in range(2))
    total.index_add_(0, shells, volume.reshape(-1).double())
    count.index_add_(0, shells, torch.ones(len(shells), dtype=torch.float64, device=volume.device))
    return (total / count.clamp(min=1.0))[shells].reshape(volume.shape).to(volume)


def _with_power_of(volume: Tensor, wanted: Tensor) -> Tensor:
    """A map whose transform has the power of ``wanted``, a real FFT, in each shell."""
    transform = torch.fft.rfftn(volume)
    shells, weight = half_shells(volume.shape[-1], volume.device)
    has, should = (shell_sum(t.abs().double() ** 2, shells, weight) for t in (transform, wanted))
    factor = torch.sqrt(should / has.clamp(min=1e-30))
    factor[has < 1e-12 * has.max()] = 0.0
    padded = torch.cat([factor, torch.zeros(int(shells.max()) + 1 - len(factor), dtype=factor.dtype, device=factor.device)])
    return torch.fft.irfftn(transform * padded[shells].to(volume), s=volume.shape)
