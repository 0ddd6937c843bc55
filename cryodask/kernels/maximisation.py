"""What two half-maps support: shell correlations, their significance, and the resolution limit of the next search.

The rule is strict because it must not be fooled by noise: the halves share the low-resolution starting map, and a soft mask smears its
strong shells into the next ones. A shell counts as supported when the masked correlation, corrected by phase randomisation (Chen et
al. 2013), exceeds 0.143 and three standard deviations of a correlation of noise, AND the unmasked one exceeds three of its own; the
supported range ends at the first shell that fails.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cryodask.kernels.fsc import fsc, fsc_of_transforms, half_radius, randomise_phases
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


@dataclass(frozen=True)
class HalfMaps:
    """Two unregularised half-maps `(z, y, x)`, and what does not depend on a mask.

    Parameters
    ----------
    first, second : Tensor, `(z, y, x)`
        Zero beyond shell ``inserted``.
    inserted : int
        Last shell to which slices were inserted.
    common : int
        Last shell of the map from which both halves started: correlated by construction, so that only 0.143 is required of it and phases
        are randomised only beyond it.
    unmasked : Tensor, `(shell,)`
        Correlations without a mask.
    randomised_from : int
        First shell whose phases are random in ``noisy``.
    noisy : tuple of pairs of `(z, y, x)`
        The maps with random phases, once per draw.
    """

    first: Tensor
    second: Tensor
    inserted: int
    common: int
    unmasked: Tensor
    randomised_from: int
    noisy: tuple[tuple[Tensor, Tensor], ...]

    @classmethod
    def of(cls, first: Tensor, second: Tensor, *, inserted: int, common: int, generator: torch.Generator) -> HalfMaps:
        """Compare two maps without a mask, and randomise their phases."""
        count = inserted + 1
        transforms = torch.fft.rfftn(first), torch.fft.rfftn(second)
        unmasked = fsc_of_transforms(*transforms)[:count]
        weak = torch.nonzero(unmasked[1:] < 0.8)
        start = max(int(weak[0]) + 1 if len(weak) else count, common + 1)
        noisy: list[tuple[Tensor, Tensor]] = []
        if start < count:
            radius = half_radius(first.shape[-1], first.device)
            for _ in range(_RANDOM_DRAWS):
                one, other = (torch.fft.irfftn(randomise_phases(t, radius, start - 0.5, generator), s=first.shape) for t in transforms)
                noisy.append((one, other))
        return cls(first, second, inserted, common, unmasked, start, tuple(noisy))

    def support(self, mask: Tensor, operators: int) -> Support:
        """Apply the rule of this module under a soft mask `(z, y, x)`; ``operators``: order of the point group."""
        count, start = self.inserted + 1, self.randomised_from
        masked = fsc(self.first * mask, self.second * mask)[:count]
        randomised = masked.clone()
        corrected = masked.clone()
        if self.noisy:
            randomised[start:] = torch.stack([fsc(one * mask, other * mask)[:count] for one, other in self.noisy]).mean(0)[start:]
            corrected[start:] = ((masked - randomised) / (1.0 - randomised).clamp(min=0.05))[start:]
        filled = float((mask.double() ** 2).sum() ** 2 / (mask.numel() * (mask.double() ** 4).sum()))
        least_masked = (SIGNIFICANCE * noise_correlation_sd(count, operators, filled)).clamp(0.143, 0.9)
        least_unmasked = SIGNIFICANCE * noise_correlation_sd(count, operators)
        good = (corrected.cpu() >= least_masked) & (self.unmasked.cpu() >= least_unmasked)
        shells = torch.arange(count)
        good = torch.where(shells <= self.common, corrected.cpu() >= 0.143, good) | (shells < 2)
        failed = torch.nonzero(~good)
        last = int(failed[0]) - 1 if len(failed) else self.inserted
        return Support(self.unmasked, masked, randomised, corrected, last)

    def solvent_support(self, mask: Tensor, support: Support, voxel_angstrom: float, operators: int) -> Support:
        """What the maps support within the molecule, for the next search: solvent fills most of a spherical ``mask`` and hides signal.

        The solvent mask is made from both maps, so its correlations are corrected by phase randomisation, and no resolution is reported
        from them. The range ends where they fall below 0.143, and not before that of ``support``, which is that of ``mask``.
        """
        own = own_solvent_mask(0.5 * (self.first + self.second) * mask, voxel_angstrom, support.last)
        found = self.support(mask * own, operators)
        low = torch.nonzero(found.corrected[self.common + 1 :] < 0.143)
        last = self.common + int(low[0]) if len(low) else self.inserted
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
