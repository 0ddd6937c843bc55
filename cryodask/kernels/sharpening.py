"""Sharpening by a B-factor from the fall of the amplitudes (Rosenthal & Henderson 2003), as relion_postprocess does it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cryodask.kernels.fsc import half_radius, half_shells, shell_sum
from cryodask.kernels.masking import low_pass_factor


class Guinier(NamedTuple):
    """Fall of the amplitudes.

    `(shell,)`: 1/d^2 in 1/Angstrom^2, ln of the weighted mean amplitude, and which shells were fitted; B-factor and intercept of the fit.
    """

    inverse_square: Tensor
    log_amplitude: Tensor
    fitted: Tensor
    b_factor_angstrom2: float
    intercept: float


def reference_weight(corrected: Tensor) -> Tensor:
    """C_ref = sqrt(2 FSC / (1 + FSC)) `(shell,)`: correlation of the mean map with a perfect one; 0 from the first FSC <= 0 on."""
    dead = torch.cumsum((corrected < 1e-4).long(), 0) > 0
    dead[0] = False
    clean = corrected.clamp(0.0, 1.0)
    weight = torch.sqrt(2.0 * clean / (1.0 + clean))
    weight[0] = 1.0
    return torch.where(dead, torch.zeros_like(weight), weight)


def fit_b_factor(volume: Tensor, corrected: Tensor, *, pixel_size_angstrom: float, from_angstrom: float, to_angstrom: float) -> Guinier:
    """B-factor of an unmasked mean map: slope of ln(C_ref mean|F|) against 1/d^2 between two resolutions is B / 4.

    Returns
    -------
    Guinier
        ``b_factor_angstrom2`` is what the map should be multiplied with as exp(-B / 4 d^2): negative sharpens. It is 0 where fewer
        than three shells lie in the range.
    """
    n = volume.shape[-1]
    shells, weight = half_shells(n, volume.device)
    amplitude = shell_sum(torch.fft.rfftn(volume).abs(), shells, weight)
    count = shell_sum(torch.ones(shells.shape, device=volume.device), shells, weight)
    s = torch.arange(n // 2 + 1, dtype=torch.float64) / (n * pixel_size_angstrom)
    level = (amplitude / count).cpu() * reference_weight(corrected).cpu()
    log_amplitude = torch.log(level.clamp(min=1e-300))
    use = (s >= 1.0 / from_angstrom) & (s <= 1.0 / to_angstrom * (1 + 1e-9)) & (level > 0)
    if int(use.sum()) < 3:
        return Guinier(s * s, log_amplitude, torch.zeros_like(use), 0.0, float("nan"))
    x, y = (s * s)[use], log_amplitude[use]
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
    return Guinier(s * s, log_amplitude, use, 4.0 * slope, float(y.mean() - slope * x.mean()))


def sharpen(
    volume: Tensor, corrected: Tensor, *, pixel_size_angstrom: float, b_factor_angstrom2: float, low_pass_angstrom: float
) -> Tensor:
    """Weight a map `(z, y, x)` by C_ref, multiply by exp(-B / 4 d^2) and cut at ``low_pass_angstrom`` with an edge of two shells."""
    n = volume.shape[-1]
    radius = half_radius(n, volume.device)
    curve = reference_weight(corrected).to(volume)
    weight = torch.cat([curve, curve.new_zeros(1)])[radius.round().long().clamp(max=len(curve))]
    decay = torch.exp(-0.25 * b_factor_angstrom2 * (radius / (n * pixel_size_angstrom)) ** 2)
    factor = weight * decay * low_pass_factor(radius, n * pixel_size_angstrom / low_pass_angstrom)
    return torch.fft.irfftn(torch.fft.rfftn(volume) * factor, s=volume.shape)
