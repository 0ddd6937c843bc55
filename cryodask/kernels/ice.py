"""Crystalline ice: rings in the power spectrum at the spacings of its strongest reflections."""

from __future__ import annotations

import math

import torch

from cryodask.kernels.spectrum import Spectrum

REFLECTIONS_ANGSTROM = (3.90, 3.66)
"""Hexagonal ice (100) and (002), the latter also cubic (111) (Dubochet et al. 1988, Q Rev Biophys 21, 129)."""
FINEST_ANGSTROM = 3.15
_COARSEST_ANGSTROM = 4.6
_HALF_WIDTH = 0.004
"""1/Angstrom: a ring is looked for within 1.5 % of its place, as pixel sizes may be wrong by as much."""
_OTHERS = ((1 / 4.02, 1 / 3.55), (1 / 3.48, 1 / 3.40))
"""Frequencies that are not background: both rings, and that of hexagonal (101) at 3.44 A."""
_RING = 0.001


def ice_ring_excess(spectrum: Spectrum) -> float:
    """Mean power within 0.004 1/A of the stronger of two reflections of crystalline ice, over the smooth background, minus 1.

    Parameters
    ----------
    spectrum : Spectrum
        Up to at least 3.15 A.

    Returns
    -------
    float
        0 without rings; NaN if the spectrum ends before. The background is a parabola through the logarithm of the mean power by
        ring, from 4.6 to 3.15 A without the rings. Vitreous ice has a wide maximum about 3.7 A, most of which the parabola takes.
    """
    if spectrum.largest_frequency < 1.0 / FINEST_ANGSTROM:
        return math.nan
    power = spectrum.power.double()
    half = power.shape[1] - 1
    ky = torch.fft.fftfreq(2 * half, 1.0 / (2 * half), dtype=torch.float64, device=power.device)[:, None] * spectrum.step
    kx = torch.arange(half + 1, dtype=torch.float64, device=power.device)[None] * spectrum.step
    k = torch.sqrt(ky * ky + kx * kx)
    use = (k > 1.0 / _COARSEST_ANGSTROM) & (k < 1.0 / FINEST_ANGSTROM)
    width = max(_RING, spectrum.step)
    ring = (k[use] / width).long()
    first = int(ring.min())
    count = torch.bincount(ring - first).double()
    mean = torch.bincount(ring - first, power[use]) / count.clamp(min=1.0)
    middle = (torch.arange(len(count), dtype=torch.float64, device=power.device) + first + 0.5) * width
    filled = (count > 0) & (mean > 0)
    count, level, middle = count[filled], torch.log(mean[filled]), middle[filled]
    free = torch.ones_like(middle, dtype=torch.bool)
    for low, high in _OTHERS:
        free &= (middle < low) | (middle > high)
    place = (middle - 0.267) / 0.05
    design = torch.stack([torch.ones_like(place), place, place**2], 1)
    root = torch.sqrt(count)[:, None]
    if int(free.sum()) < 8:
        return math.nan
    fit = torch.linalg.lstsq((design * root)[free], (level[:, None] * root)[free]).solution[:, 0]
    excess = torch.exp(level - design @ fit) - 1.0
    found = []
    for spacing in REFLECTIONS_ANGSTROM:
        near = (middle - 1.0 / spacing).abs() < _HALF_WIDTH
        found.append(float((excess * count)[near].sum() / count[near].sum().clamp(min=1.0)))
    return max(found)
