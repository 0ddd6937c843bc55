"""How much of the particles' signal a map explains: what a wrong point group, or two molecules in one set, cannot explain.

Half-maps agree on whatever both leave out. The images do not: their power within the particle, beyond that of the noise around it, is
signal, and a right map explains as much of it as the correlation of the half-maps says that it can.
"""

from __future__ import annotations

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


def signal_products(
    images: ImageRows, rows: Tensor, volume: Tensor, rotations: Tensor, shifts_px: Tensor, *, radius: int,
    pixel_size_angstrom: float, mask_diameter_angstrom: float,
) -> Tensor:  # fmt: skip
    """Sums over particles and pixels per shell, float64 `(3, radius + 1)`: |image|^2, image x model, |model|^2.

    Each within the particle's disk less what the surroundings have on the same area, so that noise cancels. ``rotations`` `(n, 3, 3)` and
    ``shifts_px`` `(n, 2)` are of the ``rows``; ``volume`` is of :func:`cryodask.kernels.half_grid.half_volume`, up to ``radius`` + 1.
    """
    device = str(rows.device)
    out = torch.zeros(3, radius + 1, dtype=torch.float64, device=device)
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
        image = images.part(rows[lot], radius)[:, inside]
        model = models(volume, images.ctf[rows[lot]], rotations[lot], shifts_px[lot].float(), images.box, radius)
        for mask, sign in ((disk, 1.0), (around, -same_area)):
            a, b = seen(image, mask), seen(model, mask)
            for number, product in enumerate((a.abs().square(), (a.conj() * b).real, b.abs().square())):
                out[number].index_add_(0, shells, sign * product.sum(0, dtype=torch.float64))
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


def explained_share(products: np.ndarray, noise_power: np.ndarray, correlation: np.ndarray) -> float:
    """Share of the explicable signal that a map explains, NaN if no shell tells.

    ``products`` as of :func:`signal_products`; ``noise_power`` weights shells; ``correlation`` of the half-maps says how much of a shell's
    signal the other half's map can explain: FSC, the squared correlation of a half-map with the truth is FSC.
    """
    shells = np.arange(products.shape[1])
    count = min(len(shells), len(correlation), len(noise_power))
    first = np.nonzero((correlation[:count] < _AGREEING) & (shells[:count] >= _FIRST_SHELL))[0]
    used = slice(_FIRST_SHELL, int(first[0]) if len(first) else count)
    signal, cross, model = products[:, used] / noise_power[used]
    possible = float((signal * correlation[used]).sum())
    if possible <= 0.0:
        return float("nan")
    return float((cross * np.abs(cross) / np.maximum(model, 1e-12)).sum() / possible)
