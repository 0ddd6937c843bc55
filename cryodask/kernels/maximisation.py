"""What two half-maps support: shell correlations, their significance, and the resolution limit of the next search.

The rule is strict because it must not be fooled by noise: the halves share the low-resolution start, and a soft mask smears its strong
shells into the next ones. A shell counts as supported when the masked correlation, corrected by phase randomisation (Chen et al. 2013),
exceeds 0.143 and three standard deviations of a correlation of noise, AND the unmasked one exceeds three of its own; the supported
range ends at the first shell that fails.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cryodask.kernels.fsc import fsc, half_radius, randomise_phases
from cryodask.kernels.masking import own_solvent_mask

SIGNIFICANCE = 3.0
"""Number of standard deviations by which a correlation must exceed noise."""
_RANDOM_DRAWS = 2


@dataclass(frozen=True)
class Support:
    """Correlations `(shell,)` float64 of two half-maps and the last shell of the unbroken supported run."""

    unmasked: Tensor
    masked: Tensor
    randomised: Tensor
    corrected: Tensor
    last: int


def noise_correlation_sd(shells: int, operators: int, filled_fraction: float = 1.0) -> Tensor:
    """Standard deviation `(shell,)` of the FSC of noise: 1 / sqrt(independent coefficients of a shell).

    ``filled_fraction`` is the share of the box a mask leaves, (sum m^2)^2 / (n^3 sum m^4); symmetry divides the coefficients.
    """
    r = torch.arange(shells).double().clamp(min=1.0)
    return 1.0 / torch.sqrt(4.0 * math.pi * r**2 * filled_fraction / operators)


def measure_support(
    half1: Tensor, half2: Tensor, mask: Tensor, *, inserted: int, common: int, operators: int, generator: torch.Generator
) -> Support:
    """Apply the rule of this module to two unregularised half-maps.

    Parameters
    ----------
    half1, half2 : Tensor, `(z, y, x)`
        Zero beyond shell ``inserted``.
    mask : Tensor, `(z, y, x)`
        Soft, not made from the maps.
    inserted : int
        Last shell to which slices were inserted.
    common : int
        Last shell of the map from which both halves started: correlated by construction, so that only 0.143 is required of it and phases
        are randomised only beyond it.
    operators : int
        Order of the point group.
    """
    count = inserted + 1
    unmasked = fsc(half1, half2)[:count]
    masked = fsc(half1 * mask, half2 * mask)[:count]
    weak = torch.nonzero(unmasked[1:] < 0.8)
    first = max(int(weak[0]) + 1 if len(weak) else count, common + 1)
    randomised = masked.clone()
    corrected = masked.clone()
    if first < count:
        radius = half_radius(half1.shape[-1], half1.device)
        transforms = [torch.fft.rfftn(h) for h in (half1, half2)]
        draws = []
        for _ in range(_RANDOM_DRAWS):
            noisy = (torch.fft.irfftn(randomise_phases(t, radius, first - 0.5, generator), s=half1.shape) * mask for t in transforms)
            draws.append(fsc(*noisy)[:count])
        randomised[first:] = torch.stack(draws).mean(0)[first:]
        corrected[first:] = ((masked - randomised) / (1.0 - randomised).clamp(min=0.05))[first:]
    filled = float((mask.double() ** 2).sum() ** 2 / (mask.numel() * (mask.double() ** 4).sum()))
    least_masked = (SIGNIFICANCE * noise_correlation_sd(count, operators, filled)).clamp(0.143, 0.9)
    least_unmasked = SIGNIFICANCE * noise_correlation_sd(count, operators)
    good = (corrected.cpu() >= least_masked) & (unmasked.cpu() >= least_unmasked)
    shells = torch.arange(count)
    good = torch.where(shells <= common, corrected.cpu() >= 0.143, good) | (shells < 2)
    failed = torch.nonzero(~good)
    last = int(failed[0]) - 1 if len(failed) else inserted
    return Support(unmasked, masked, randomised, corrected, last)


def solvent_support(
    half1: Tensor, half2: Tensor, mask: Tensor, support: Support, voxel_angstrom: float, *, inserted: int, common: int, operators: int,
    generator: torch.Generator,
) -> Support:  # fmt: skip
    """What the halves support within the molecule, for the next search: solvent fills most of a spherical ``mask`` and hides signal.

    The solvent mask is made from both maps, so its correlations are corrected by phase randomisation, and no resolution is reported from
    them. The range ends where they fall below 0.143, and not before that of ``support``; other parameters as for :func:`measure_support`.
    """
    own = own_solvent_mask(0.5 * (half1 + half2) * mask, voxel_angstrom, support.last)
    found = measure_support(half1, half2, mask * own, inserted=inserted, common=common, operators=operators, generator=generator)
    low = torch.nonzero(found.corrected[common + 1 :] < 0.143)
    last = common + int(low[0]) if len(low) else inserted
    return replace(found, last=max(support.last, last))


def next_rings(support: Support, *, inserted: int, limit: int, start: int) -> int:
    """Rings of the next search: one guard shell below the supported range, never below the start."""
    guarded = support.last if support.last == inserted == limit else support.last - 1
    return min(max(start, guarded), limit - 1)


def crossing(correlation: Tensor, length_angstrom: float, last: int, threshold: float = 0.143) -> float:
    """Resolution, Angstrom, where the curve falls below ``threshold`` after the supported shell ``last`` (linear in frequency)."""
    shell = float(last)
    if last + 1 < len(correlation):
        here, there = float(correlation[last]), float(correlation[last + 1])
        if here > threshold > there:
            shell += (here - threshold) / (here - there)
    return length_angstrom / max(shell, 1.0)
