"""Bands of equal width in k^2 with a parabola for the background and rings of linearly changing strength."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cryodask.kernels.ctf_cells import Cells, Lens

_RIDGE = 1e-9


def bands_of(k2: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Band of each value, bands of equal width in k^2, and the place within it from -1 to 1."""
    low, high = k2.min(), k2.max()
    place = (k2 - low) / (high - low) * count
    band = place.long().clamp(max=count - 1)
    return band, 2.0 * (place - band) - 1.0


class Banded(NamedTuple):
    """Cells with the band of each, the position within it, an orthonormal background `(cell, 3)` and the log power without it."""

    cells: Cells
    band: Tensor
    bands: int
    place: Tensor
    background: Tensor
    residual: Tensor


def band_count(cells: Cells, lens: Lens, defocus: float) -> int:
    """Number of bands, about two rings wide at this defocus, 3 to 16."""
    rings = lens.wavelength_angstrom * defocus * float(cells.k2.max() - cells.k2.min())
    return int(min(16, max(3, rings / 2)))


def banded(cells: Cells, count: int) -> Banded:
    """Divide the cells into ``count`` bands."""
    band, place = bands_of(cells.k2, count)
    columns: list[Tensor] = []
    for power in range(3):
        column = place**power
        for _ in range(2):  # Gram-Schmidt, twice for accuracy
            for earlier in columns:
                column = column - earlier * _sum(cells.weight * earlier * column, band, count)[band]
        norm = torch.sqrt(_sum(cells.weight * column**2, band, count))
        columns.append(column / norm.clamp(min=1e-12)[band])
    background = torch.stack(columns, 1)
    ready = Banded(cells, band, count, place, background, cells.log_power)
    return ready._replace(residual=free_of_background(ready, cells.log_power))


def _sum(values: Tensor, band: Tensor, count: int) -> Tensor:
    return torch.zeros(count, *values.shape[1:], dtype=values.dtype).index_add(0, band, values)


def free_of_background(data: Banded, values: Tensor) -> Tensor:
    """Residual of ``values`` `(cell,)` after removing the parabolas of the bands."""
    share = _sum(data.background * (data.cells.weight * values)[:, None], data.band, data.bands)
    return values - (data.background * share[data.band]).sum(1)


class Rings(NamedTuple):
    """Explained sum of squares and mean ring strength, `(band,)`, and the derivative of the explained sums by the ring of each cell."""

    explained: Tensor
    strength: Tensor
    derivative: Tensor


def ring_strengths(data: Banded, rings: Tensor) -> Rings:
    """Fit ``rings`` `(cell,)`, of a strength that changes linearly within each band, to the log power."""
    first = free_of_background(data, rings)
    second = free_of_background(data, rings * data.place)
    w, y = data.cells.weight, data.residual
    products = torch.stack([first * first, first * second, second * second, first * y, second * y], 1) * w[:, None]
    aa, ab, bb, ay, by = _sum(products, data.band, data.bands).unbind(1)
    aa, bb = aa + _RIDGE, bb + _RIDGE
    determinant = aa * bb - ab * ab
    strength, change = (bb * ay - ab * by) / determinant, (aa * by - ab * ay) / determinant
    # strengths and background are at their optimum, so that they count as constants
    here, slope = strength[data.band], change[data.band]
    derivative = 2.0 * w * (y - here * first - slope * second) * (here + slope * data.place)
    return Rings(strength * ay + change * by, strength, derivative)
