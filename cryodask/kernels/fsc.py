"""Fourier shell correlation of half-maps, and its correction for the mask by phase randomisation.

Shells are integer radii of the Fourier transform of a cubic map, rounded; curves run from shell 0 to Nyquist, `(n // 2 + 1,)`.
Shell s of a box of n voxels of p Angstrom lies at n p / s Angstrom.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from cryodask.kernels.compiled import compiled

_END_OF_STRONG_SHELLS = 0.4
"""Unmasked FSC below which shells are no longer strong."""


class FscCurves(NamedTuple):
    """FSC curves `(shell,)` float64, and the first shell whose phases were randomised."""

    unmasked: Tensor
    masked: Tensor
    randomised: Tensor
    corrected: Tensor
    randomised_from: int


def half_radius(n: int, device: torch.device | str = "cpu") -> Tensor:
    """Length of the integer frequency vector at each point of the real FFT of a cubic map, `(n, n, n // 2 + 1)`."""
    k = torch.fft.fftfreq(n, 1.0 / n, device=device)
    kx = torch.fft.rfftfreq(n, 1.0 / n, device=device)
    return torch.sqrt((k * k)[:, None, None] + (k * k)[None, :, None] + kx * kx)


def half_shells(n: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Shell `(n, n, n // 2 + 1)` int64 of each point of a real FFT, and its multiplicity `(n // 2 + 1,)`: two off the edges."""
    shells = half_radius(n, device).round().long()
    weight = torch.full((n // 2 + 1,), 2.0, device=device)
    weight[0] = 1.0
    if n % 2 == 0:
        weight[-1] = 1.0
    return shells, weight


def shell_sum(values: Tensor, shells: Tensor, weight: Tensor) -> Tensor:
    """Sum of real ``values`` of a real FFT over each shell up to Nyquist, float64 `(n // 2 + 1,)`."""
    count = weight.shape[0]
    # shells beyond Nyquist (the corners) share one bin that is dropped
    bins = shells.clamp(max=count).reshape(-1)
    return torch.bincount(bins, (values * weight).double().reshape(-1), minlength=count + 1)[:count]


def fsc(first: Tensor, second: Tensor) -> Tensor:
    """Correlation of two cubic maps `(z, y, x)` in each Fourier shell, float64 `(shell,)`; 0 for a shell without power."""
    return fsc_of_transforms(torch.fft.rfftn(first), torch.fft.rfftn(second))


def fsc_of_transforms(a: Tensor, b: Tensor) -> Tensor:
    """The same of the real FFTs of two maps."""
    n = a.shape[0]
    if (kernels := compiled("grids", a.device)) and a.dtype == b.dtype == torch.complex64:
        sums = torch.zeros(3, n // 2 + 1, dtype=torch.float64)
        kernels.correlation_sums(a.contiguous().numpy(), b.contiguous().numpy(), sums.numpy())
        cross, power_a, power_b = sums
    else:
        shells, weight = half_shells(n, a.device)
        cross = shell_sum(a.real * b.real + a.imag * b.imag, shells, weight)
        power_a = shell_sum(a.real**2 + a.imag**2, shells, weight)
        power_b = shell_sum(b.real**2 + b.imag**2, shells, weight)
    return torch.where(power_a * power_b > 0, cross / torch.sqrt(power_a * power_b).clamp(min=1e-300), 0.0)


def randomise_phases(transform: Tensor, radius: Tensor, first: float, generator: torch.Generator) -> Tensor:
    """Give a real FFT `(z, y, x)` random phases where ``radius`` is ``first`` or more, amplitudes kept.

    The phases are those of white noise, so that the map stays real.
    """
    n = transform.shape[0]
    noise = torch.randn((n, n, n), generator=generator, dtype=torch.float32).to(transform.device)
    phase = torch.fft.rfftn(noise)
    phase = phase / phase.abs().clamp(min=1e-20)
    return torch.where(radius >= first, transform.abs() * phase, transform)


def corrected_fsc(
    first: Tensor, second: Tensor, mask: Tensor, *, seed: int = 0, randomise_below_fsc: float = 0.8, repeats: int = 3, margin: int = 2
) -> FscCurves:
    """FSC of masked half-maps, corrected for the contribution of the mask.

    The phases of both maps are randomised, independently, from the first shell on where the unmasked FSC is below
    ``randomise_below_fsc``; what FSC_n is left after masking comes from the mask. From ``margin`` shells further out on,
    FSC_true = (FSC_masked - FSC_n) / (1 - FSC_n); nearer the centre it is the masked FSC.

    Parameters
    ----------
    first, second : Tensor, `(z, y, x)`
        Unmasked, unfiltered half-maps.
    mask : Tensor, `(z, y, x)`
        From 0 to 1.
    repeats : int
        Number of phase randomisations whose FSC_n are averaged: a small mask leaves few independent coefficients in a shell.

    Notes
    -----
    Chen et al. (2013), with the margin of two shells of relion_postprocess, which draws once.
    """
    transforms = torch.fft.rfftn(first), torch.fft.rfftn(second)
    unmasked = fsc_of_transforms(*transforms)
    masked = fsc(first * mask, second * mask)
    low = torch.nonzero(unmasked[1:] < randomise_below_fsc)
    start = int(low[0]) + 1 if len(low) else len(unmasked)
    generator = torch.Generator().manual_seed(seed)
    radius = half_radius(first.shape[-1], first.device)
    draws = []
    for _ in range(repeats):
        noisy = [torch.fft.irfftn(randomise_phases(t, radius, start, generator), s=first.shape) * mask for t in transforms]
        draws.append(fsc(*noisy))
    randomised = torch.stack(draws).mean(0)
    freed = (masked - randomised) / (1.0 - randomised).clamp(min=1e-6)
    corrected = torch.where(torch.arange(len(masked), device=masked.device) < start + margin, masked, freed)
    return FscCurves(unmasked, masked, randomised, corrected, start)


def shell_resolutions(n: int, pixel_size_angstrom: float) -> Tensor:
    """Resolution of each shell, Angstrom, float64 `(n // 2 + 1,)`; shell 0 is infinite."""
    return n * pixel_size_angstrom / torch.arange(n // 2 + 1, dtype=torch.float64)


def resolution_at(curve: Tensor, threshold: float, n: int, pixel_size_angstrom: float) -> float:
    """Resolution, Angstrom, at which an FSC curve first falls below ``threshold``.

    Interpolated linearly in spatial frequency between the last shell above and the first below. Shell 0, whose FSC says only
    whether the mean densities have the same sign, counts as 1. A curve that never falls gives Nyquist.
    """
    values = [1.0, *curve[1:].tolist()]
    below = next((s for s, value in enumerate(values) if value < threshold), None)
    if below is None:
        return n * pixel_size_angstrom / (len(values) - 1)
    last = values[below - 1]
    return n * pixel_size_angstrom / (below - 1 + (last - threshold) / (last - values[below]))


def noise_redundancy(unmasked: Tensor) -> float:
    """Number of points of a shell per independent coefficient, from the roughness of an unmasked FSC curve; at least 1.

    The correlation F of a shell of r points' radius scatters by (1 - F^2) / sqrt(4 pi r^2 / redundancy). Point groups multiply the
    redundancy by their order, empty space about the particle by what it leaves of the box: neither is known of maps from elsewhere.
    """
    r = torch.arange(1, len(unmasked) - 1, dtype=torch.float64)
    f = unmasked.double().cpu()
    bend = (f[1:-1] - 0.5 * (f[:-2] + f[2:])) / math.sqrt(1.5)
    scatter = bend * torch.sqrt(4.0 * math.pi * r**2) / (1.0 - f[1:-1] ** 2).clamp(min=1e-6)
    # where the curve is close to 1 its bends are those of the signal
    rough = scatter[(f[1:-1].abs() < 0.8) & (r > 2)].abs()
    return max(1.0, float((1.4826 * rough.median()) ** 2)) if len(rough) >= 5 else 1.0


def last_significant_shell(unmasked: Tensor, *, deviations: float = 3.0, window: float = 0.85) -> int:
    """Last shell up to which an unmasked FSC exceeds noise without a gap, at least 1.

    A shell r exceeds noise when the mean of the curve from ``window`` r to r, weighted by the size of the shells, exceeds ``deviations``
    standard deviations of that of noise. One shell alone would be too weak a test for a small symmetric molecule in a large box,
    whose unmasked FSC is a hundredth where the masked one is 0.143.
    """
    f = unmasked.double().cpu()
    points = 4.0 * math.pi * torch.arange(len(f), dtype=torch.float64) ** 2
    redundancy = noise_redundancy(f)
    last = 1
    for r in range(1, len(f)):
        some = slice(max(1, math.ceil(window * r)), r + 1)
        size = points[some].sum()
        # the innermost shells of a high point group have hardly one coefficient: require no more than 0.9 of them
        least = min(0.9, deviations * math.sqrt(redundancy / float(size)))
        if float((points[some] * f[some]).sum() / size) < least and r > 2:
            break
        last = r
    return last


def supported_resolution(
    first: Tensor, second: Tensor, mask: Tensor, curves: FscCurves, threshold: float, pixel_size_angstrom: float, *, seed: int = 0
) -> float:
    """Resolution, Angstrom, of half-maps `(z, y, x)` under a mask: where the corrected FSC first falls below ``threshold``.

    There are two restrictions beyond the corrected curve. Nothing counts beyond :func:`last_significant_shell` of
    the unmasked curve: a mask made from the maps themselves selects regions where their noise agrees, and phase randomisation does not
    remove that. And the crossing must persist when phases are randomised from the end of the strong shells on, without a margin: where
    signal ends abruptly, the mask smears the last strong shell into the next ones, which an earlier start cannot show.
    """
    n = first.shape[-1]
    late = corrected_fsc(first, second, mask, seed=seed, randomise_below_fsc=_END_OF_STRONG_SHELLS, margin=0)
    crossings = (resolution_at(c.corrected, threshold, n, pixel_size_angstrom) for c in (curves, late))
    return max(*crossings, n * pixel_size_angstrom / last_significant_shell(curves.unmasked))
