"""Whether two half-maps are independent: the noise of independent maps does not agree, least of all in the solvent."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cryodask.kernels.fsc import fsc, half_shells, shell_sum

_SAME = 0.9999
"""Correlation of a shell from which on both maps have the same values in it."""
_EMPTY = 1e-5
"""Power of a shell, over the strongest shell beyond it or at it, below which rounding decides what it holds."""
_MOST_SMEARED = 1.3
"""Power of the solvent in a shell, over its share of the map's power there, above which it comes from other shells."""
_WEAK_SHARE = 0.4
_FLAT = 1e-6

MOST_NOISE_CORRELATION = 0.3
"""Independent maps have at most 0.12 (real, simulated, half and whole symmetry); maps that share a third of their noise power have more."""


class Independence(NamedTuple):
    """Evidence about a pair of half-maps.

    Parameters
    ----------
    joined : int
        Last shell up to which both maps are the same: 0 if none is, Nyquist if the maps are copies, scaled or filtered.
    noise_correlation : float
        Correlation of the solvent in the finer half of the shells beyond, median; NaN if the solvent is flat or no shell is left.
    """

    joined: int
    noise_correlation: float


def independence(first: Tensor, second: Tensor) -> Independence:
    """Evidence for or against the independence of two half-maps `(z, y, x)` with cubic shape.

    Shells that were joined on purpose are alike from the centre on; what lies beyond counts. Noise is looked for in the solvent: in the
    half of the sphere inside the box in which the mean map, smoothed, is weakest. Maps that were low-passed together have no noise
    beyond, so only shells with power in both count.
    """
    maps = torch.stack([first, second]).double()
    maps = maps - maps.mean((1, 2, 3), keepdim=True)
    whole = fsc(maps[0], maps[1])
    power = torch.minimum(*(_shell_power(m) for m in maps))
    used = power > _EMPTY * torch.flip(torch.cummax(torch.flip(power, (0,)), 0).values, (0,)).clamp(min=1e-300)
    used &= power > _EMPTY**2 * power.max()
    shells = torch.nonzero(used[1:]).flatten() + 1
    different = [int(s) for s in shells if abs(float(whole[s])) < _SAME]
    if not different:
        return Independence(len(whole) - 1, float("nan"))
    joined = different[0] - 1
    weight = _solvent(maps.sum(0))
    if weight is None:
        return Independence(joined, float("nan"))
    inside = [(m - (m * weight).sum() / weight.sum()) * weight for m in maps]
    # where a low-pass filter has left nothing, the edges of the weight smear the shells below
    noise = torch.minimum(*(_shell_power(m) for m in inside))
    beyond = shells[(shells > joined + 1) & (noise[shells] < _MOST_SMEARED * float((weight**2).mean()) * power[shells])]
    beyond = beyond[len(beyond) // 2 :]
    if len(beyond) < 2:
        return Independence(joined, float("nan"))
    return Independence(joined, float(fsc(*inside)[beyond].median()))


def _shell_power(volume: Tensor) -> Tensor:
    shells, weight = half_shells(volume.shape[-1], volume.device)
    transform = torch.fft.rfftn(volume)
    ones = torch.ones_like(transform.real)
    return shell_sum(transform.abs() ** 2, shells, weight) / shell_sum(ones, shells, weight)


def _solvent(total: Tensor) -> Tensor | None:
    """A soft weight `(z, y, x)`: 1 in the weaker half of the sphere inside the box; None if a mask has flattened it."""
    n = total.shape[-1]
    axis = torch.arange(n, dtype=torch.float64, device=total.device) - n // 2
    radius = torch.sqrt(axis[:, None, None] ** 2 + axis[None, :, None] ** 2 + axis**2)
    sphere = radius < 0.46 * n
    steps = torch.stack([(total - total.roll(1, axis)).abs() for axis in range(3)]).sum(0)
    if float((steps[sphere] <= _FLAT * steps[sphere].max()).double().mean()) > 0.2:
        return None
    strength = _smooth(_smooth(total, 1.5) ** 2, 0.06 * n)
    inside = strength[sphere]
    limit = inside.kthvalue(int(_WEAK_SHARE * len(inside))).values
    return _smooth((sphere & (strength < limit)).double(), 1.5)


def _smooth(volume: Tensor, sigma: float) -> Tensor:
    """A Gaussian filter, periodic."""
    n = volume.shape[-1]
    k = torch.fft.fftfreq(n, device=volume.device).double()
    kx = torch.fft.rfftfreq(n, device=volume.device).double()
    square = (k * k)[:, None, None] + (k * k)[None, :, None] + kx * kx
    return torch.fft.irfftn(torch.fft.rfftn(volume) * torch.exp(-2.0 * (torch.pi * sigma) ** 2 * square), s=volume.shape)
