"""How much of the particles' signal a map explains: what a wrong point group, or two molecules in one set, cannot explain.

Half-maps agree on whatever both leave out. The images do not: their power within the particle, beyond that of the noise around it, is
signal, and a right map explains as much of it as the correlation of the half-maps says that it can.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cryodask.kernels._slices_torch import models
from cryodask.kernels.fourier import soft_sphere
from cryodask.kernels.rows import ImageRows, independent, row_shells

_LOT = 64
_EDGE_ANGSTROM = 12.0
_LEAST_AROUND = 0.05
"""Share of an image that must lie around the particle for its noise to be measured."""
_FIRST_SHELL = 3
"""Shells below it hold what is left of the background."""
_AGREEING = 0.5
"""Half-map correlation of the shells that count: where it is lower, noise of the map hides what is missing."""


@dataclass(frozen=True)
class Models:
    """A map, as :func:`cryodask.kernels.half_grid.half_volume`, with poses `(n, 3, 3)` and `(n, 2)` in pixels of some images."""

    volume: Tensor
    rotations: Tensor
    shifts_px: Tensor


def signal_products(
    images: ImageRows, rows: Tensor, other: Models, own: Models, *, radius: int, pixel_size_angstrom: float, mask_diameter_angstrom: float
) -> Tensor:
    """Sums over particles and pixels per shell, float64 `(5, radius + 1)`: image^2, image x other, other^2, other x own, own^2.

    Each within the particle's disk less what the surroundings have on the same area, so that noise cancels. ``other`` is the map of
    the half that the images are not part of.
    """
    device = str(rows.device)
    out = torch.zeros(5, radius + 1, dtype=torch.float64, device=device)
    inside, small = independent(radius, device), 2 * (radius + 1)
    ky, kx = torch.nonzero(inside, as_tuple=True)
    ky = ky - radius
    disk, around = (torch.fft.ifftshift(m) for m in _regions(small, images.box * pixel_size_angstrom, mask_diameter_angstrom, device))
    same_area = float(disk.square().sum() / around.square().sum().clamp(min=1e-9))
    shells = row_shells(radius, device)[inside].clamp(max=radius)

    def seen(values: Tensor, mask: Tensor) -> Tensor:
        spectrum = torch.zeros(len(values), small, radius + 2, dtype=torch.complex64, device=device)
        spectrum[:, ky % small, kx] = values
        line = kx == 0
        spectrum[:, -ky[line] % small, 0] = values[:, line].conj()
        return torch.fft.rfft2(torch.fft.irfft2(spectrum, s=(small, small)) * mask)[:, ky % small, kx]

    for lot in torch.arange(len(rows), device=device).split(_LOT):
        numbers = images.ctf[rows[lot]]
        whole = [images.part(rows[lot], radius)[:, inside]]
        whole += [models(m.volume, numbers, m.rotations[lot], m.shifts_px[lot].float(), images.box, radius) for m in (other, own)]
        for mask, sign in ((disk, 1.0), (around, -same_area)):
            image, b, a = (seen(values, mask) for values in whole)
            for number, (x, y) in enumerate(((image, image), (image, b), (b, b), (b, a), (a, a))):
                out[number].index_add_(0, shells, sign * (x.conj() * y).real.sum(0, dtype=torch.float64))
    return out


def _regions(box: int, length_angstrom: float, diameter_angstrom: float, device: str) -> tuple[Tensor, Tensor]:
    """Soft masks `(box, box)` of the particle's disk and of its surroundings."""
    pixel, radius = length_angstrom / box, diameter_angstrom / 2
    disk = soft_sphere(box, pixel, radius, _EDGE_ANGSTROM, dims=2, device=device)
    return disk, 1.0 - soft_sphere(box, pixel, radius + _EDGE_ANGSTROM / 2, _EDGE_ANGSTROM, dims=2, device=device)


def has_surroundings(length_angstrom: float, diameter_angstrom: float) -> bool:
    """Whether enough of an image lies around the particle to measure its noise."""
    _, around = _regions(64, length_angstrom, diameter_angstrom, "cpu")
    return float(around.mean()) >= _LEAST_AROUND


def explained_share(products: np.ndarray, noise_power: np.ndarray) -> float:
    """Share of the explainable signal that a map explains, NaN if no shell is informative.

    ``products`` as of :func:`signal_products`; ``noise_power`` weights shells. The correlation of the two halves' projections is the
    square of that of one half with the truth: it says how much of a shell's signal the map of one half can explain.
    """
    signal, cross, other, both, own = (np.asarray(row, float) for row in products)
    agreement = both / np.sqrt(np.maximum(other * own, 1e-30))
    count = min(len(signal), len(noise_power))
    low = np.nonzero(agreement[_FIRST_SHELL:count] < _AGREEING)[0]
    used = slice(_FIRST_SHELL, _FIRST_SHELL + int(low[0]) if len(low) else count)
    noise = noise_power[used]
    possible = float((signal[used] * agreement[used] / noise).sum())
    explained = float((cross[used] * np.abs(cross[used]) / np.maximum(other[used], 1e-30) / noise).sum())
    return explained / possible if possible > 0.0 else float("nan")
