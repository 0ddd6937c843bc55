"""Checks of half-maps: that they are two valid cubes, and that they are independent."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cryodask.errors import InputError

if TYPE_CHECKING:
    from cryodask.kernels.independence import Independence

_DOUBTFUL = 0.25
"""Whole independent maps stay below (0.05 in boxes of 48 voxels). A copy with three times the noise has 0.32, moved or not."""


def check_half_maps(half_map: np.ndarray) -> None:
    """Refuse half-maps that are not two valid cubes.

    Raises
    ------
    InputError
        Wrong number or shape, NaN or infinite voxels, or a map of zeros.
    """
    if half_map.ndim != 4 or half_map.shape[0] != 2 or len(set(half_map.shape[1:])) != 1:
        raise InputError(
            f"half-maps have the shape {half_map.shape} and are not two equal cubes", "", "give both half-maps of one refinement"
        )
    for number, volume in enumerate(half_map, 1):
        if not np.isfinite(volume).all():
            raise InputError(f"half-map {number} has NaN or infinite voxels", "the refinement that made it failed", "check its report")
        if not volume.any():
            raise InputError(f"half-map {number} is zero everywhere", "no particle is in this half", "check the half-sets")


def check_independent(half_map: np.ndarray, *, resolution_angstrom: float | None = None, pixel_size_angstrom: float = 1.0) -> Independence:
    """Refuse half-maps `(2, z, y, x)` whose correlation says nothing about resolution; returns the evidence.

    ``resolution_angstrom``: the resolution that would be reported; it must be finer than the shells that were joined on purpose.

    Raises
    ------
    InputError
        Copies of one map, scaled, filtered or with little noise added; maps that share a map; maps joined up to their resolution.
    """
    import torch

    from cryodask.kernels.independence import independence

    found = independence(*(torch.from_numpy(np.asarray(half, np.float32)) for half in half_map))
    way_out = "give the two unmasked half-maps of one refinement, as it wrote them"
    if found.fault:
        raise InputError(f"The half-maps are not independent: {found.fault}.", "one map was given twice, or was mixed into both", way_out)
    box = half_map.shape[-1] * pixel_size_angstrom
    if resolution_angstrom is not None and found.joined and box / resolution_angstrom < found.joined + 2:
        raise InputError(
            f"The half-maps are the same up to {box / found.joined:.1f} A but not beyond, so no resolution can be stated.",
            "one map was mixed into both up to there",
            way_out,
        )
    return found


def doubt(noise_correlation: float) -> str:
    """Why the correlation of half-maps may be too high, judged by the noise of their solvent; empty if it is not."""
    if np.isnan(noise_correlation):
        return "the noise of the half-maps could not be compared, because too few shells or no solvent are left in them"
    if abs(noise_correlation) <= _DOUBTFUL:
        return ""
    return (
        f"the solvent of the half-maps has a correlation of {noise_correlation:.2f}: they share noise, or a low-passed molecule fills "
        "the box, and the resolution may be overestimated"
    )
