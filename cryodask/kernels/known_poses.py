"""Particles at known poses: how well maps explain them, and their weighted insertion.

Classification and linear heterogeneity at fixed poses rest on these two operations alone, compiled or in torch like the local search.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cryodask.kernels import local_search
from cryodask.kernels.half_grid import empty_half_grid
from cryodask.kernels.rows import ImageRows

_EVERY_WEIGHT = -1e30
"""Least weight of a slice that is inserted: weights may be negative here, and none is left out."""


@dataclass(frozen=True)
class Posed:
    """Images with one known pose each: ``rotations`` `(n, 3, 3)` float32, ``shifts_px`` `(n, 2)` (y, x), which centre the particle."""

    images: ImageRows
    rotations: Tensor
    shifts_px: Tensor

    def __len__(self) -> int:
        return len(self.rotations)

    @property
    def rows(self) -> Tensor:
        """All rows of the images."""
        return torch.arange(len(self), device=self.rotations.device)

    def with_contrast(self, contrast: Tensor) -> Posed:
        """The same particles, whose signal is expected to be ``contrast`` `(n,)` times that of an average particle."""
        return replace(self, images=self.images.with_contrast(contrast))

    def terms(self, volume: Tensor, ring: int, radius: int, rows: Tensor | None = None) -> Tensor:
        """Sums over shells of |image|^2, Re(conj(model) image), |model|^2, `(n, 3, radius + 1)`; the model ends at ``ring``."""
        rows = self.rows if rows is None else rows
        return local_search.shell_terms(self.images, rows, volume, self.rotations[rows], self.shifts_px[rows], ring, radius)

    def weighed(self, terms: Tensor, noise_power: Tensor, ring: int, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Cross and norm `(n,)` float64 of :meth:`terms`: the log-likelihood gain of the map over an empty image is 2 cross - norm."""
        group = self.images.group if rows is None else self.images.group[rows]
        weight = 1.0 / noise_power[group, 1 : ring + 1].double()
        return (terms[:, 1, 1 : ring + 1] * weight).sum(1), (terms[:, 2, 1 : ring + 1] * weight).sum(1)

    def agreement(self, volume: Tensor, noise_power: Tensor, ring: int, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Cross and norm of a map, up to ``ring``; ``volume`` of :func:`cryodask.kernels.half_grid.half_volume`."""
        return self.weighed(self.terms(volume, ring, ring, rows), noise_power, ring, rows)

    def gain(self, volume: Tensor, noise_power: Tensor, ring: int) -> Tensor:
        """Log-likelihood gain `(n,)` float64 of a map over an empty image."""
        cross, norm = self.agreement(volume, noise_power, ring)
        return 2.0 * cross - norm

    def grid(self, weight: Tensor, noise_power: Tensor, radius: int) -> Tensor:
        """Half grid, not folded, of all slices up to ``radius`` times ``weight`` `(n,)`, which may be negative."""
        grid = empty_half_grid(radius, str(self.rotations.device))
        shares = weight.float()[:, None]
        poses = self.rotations[:, None], self.shifts_px[:, None], shares
        local_search.insert(self.images, self.rows, grid, radius, noise_power, *poses, least=_EVERY_WEIGHT)
        return grid
