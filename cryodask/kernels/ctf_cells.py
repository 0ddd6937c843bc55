"""A power spectrum as a table of cells, sectors of equal angle by rings one step wide: compact, yet complete for a smooth CTF."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from cryodask.kernels.ctf import electron_wavelength_angstrom
from cryodask.kernels.spectrum import Spectrum

SECTORS = 36
SEARCH_SECTORS = 12


class Lens(NamedTuple):
    """Argument of the CTF's sine = ``quadratic`` z k^2 + ``quartic`` k^4 + ``offset`` (kernels/ctf.py), for z in Angstrom."""

    quadratic: float
    quartic: float
    offset: float
    wavelength_angstrom: float


class Cells(NamedTuple):
    """Non-empty cells of the polar table, `(cell,)` float64.

    ``log_power`` is free of a polynomial over all rings, ``weight`` is the number of pixels, ``k2`` their mean k^2 (1/Angstrom^2),
    ``cos2, sin2`` of twice their direction; ``sector`` (of SEARCH_SECTORS) and ``ring`` are indices; ``noise`` is the variance of the
    log power of a pixel.
    """

    log_power: Tensor
    weight: Tensor
    k2: Tensor
    cos2: Tensor
    sin2: Tensor
    sector: Tensor
    ring: Tensor
    noise: float = 0.0


def lens_of(voltage_kv: float, spherical_aberration_mm: float, amplitude_contrast: float, phase_shift_rad: float = 0.0) -> Lens:
    """Constants of the CTF's argument."""
    lam = float(electron_wavelength_angstrom(voltage_kv))
    quartic = -0.5 * math.pi * spherical_aberration_mm * 1e7 * lam**3
    return Lens(math.pi * lam, quartic, phase_shift_rad + math.asin(amplitude_contrast), lam)


def polar_cells(spectrum: Spectrum, least_k: float, largest_k: float, ring_step: float = 1.0 / 900.0) -> Cells:
    """Table of the log power between two frequencies, 1/Angstrom, in rings at least ``ring_step`` wide.

    Pixels near the axes, where readout leaves lines, are left out.
    """
    power, step = spectrum.power.double(), spectrum.step
    wide = max(step, ring_step)
    half = power.shape[1] - 1
    ky = torch.fft.fftfreq(2 * half, 1.0 / (2 * half), dtype=torch.float64, device=power.device)[:, None] * step
    kx = torch.arange(half + 1, dtype=torch.float64, device=power.device)[None] * step
    k2 = kx * kx + ky * ky
    use = (k2 > least_k**2) & (k2 < largest_k**2) & (ky.abs() > 1.5 * wide) & (kx > 1.5 * wide)
    ky, kx, k2, p = (ky + 0 * kx)[use], (kx + 0 * ky)[use], k2[use], power[use]
    ring = (torch.sqrt(k2) / wide).round().long()
    sector = ((torch.atan2(ky, kx) / math.pi + 0.5) * SECTORS).long().clamp(0, SECTORS - 1)
    index = ring * SECTORS + sector
    size = int(index.max()) + 1

    def total(values: Tensor) -> Tensor:
        return torch.bincount(index, values, minlength=size)

    weight = torch.bincount(index, minlength=size).double()
    filled = weight > 0
    n = weight[filled]
    log_power = torch.log((total(p)[filled] / n).clamp(min=1e-300))
    k2_mean = total(k2)[filled] / n
    cos2, sin2 = total((kx * kx - ky * ky) / k2)[filled], total(2 * kx * ky / k2)[filled]
    length = torch.hypot(cos2, sin2)
    where = torch.nonzero(filled)[:, 0]
    log_power = log_power - _polynomial(torch.sqrt(k2_mean), log_power, n, degree=5)
    search_sector = (where % SECTORS) * SEARCH_SECTORS // SECTORS
    # neighbours in a ring differ only by noise
    same = (where[1:] // SECTORS) == (where[:-1] // SECTORS)
    noise = float(((log_power[1:] - log_power[:-1]) ** 2 / (1 / n[1:] + 1 / n[:-1]))[same].mean())
    return Cells(log_power, n, k2_mean, cos2 / length, sin2 / length, search_sector, where // SECTORS, noise)


def _polynomial(x: Tensor, y: Tensor, weight: Tensor, degree: int) -> Tensor:
    """Weighted least-squares polynomial through y(x), at x; by Gram-Schmidt, whose sums have the same bits in every run."""
    t = 2 * (x - x.min()) / (x.max() - x.min()) - 1
    columns: list[Tensor] = []
    fit = torch.zeros_like(y)
    for power in range(degree + 1):
        column = t**power
        for _ in range(2):
            for earlier in columns:
                column = column - earlier * (weight * earlier * column).sum()
        column = column / torch.sqrt((weight * column**2).sum())
        columns.append(column)
        fit = fit + column * (weight * column * y).sum()
    return fit


def argument(cells: Cells, lens: Lens, parameters: Tensor) -> Tensor:
    """Argument of the CTF's sine in every cell, for (z0, u, v): z = z0 + (u cos 2 theta + v sin 2 theta) / 2, Angstrom."""
    return lens.quadratic * defocus_of(cells, parameters) * cells.k2 + lens.quartic * cells.k2**2 + lens.offset


def sine_square(cells: Cells, lens: Lens, parameters: Tensor) -> Tensor:
    """sin^2 of the CTF's argument in every cell, for the parameters of :func:`argument`."""
    return torch.sin(argument(cells, lens, parameters)) ** 2


def argument_gradient(cells: Cells, lens: Lens, weight: Tensor) -> Tensor:
    """Derivatives `(3,)` by (z0, u, v) of a sum over the cells, of which ``weight`` `(cell,)` are those by their arguments."""
    along = lens.quadratic * cells.k2 * weight
    return torch.stack([along.sum(), 0.5 * (along * cells.cos2).sum(), 0.5 * (along * cells.sin2).sum()])


def defocus_of(cells: Cells, parameters: Tensor) -> Tensor:
    """Defocus in the direction of every cell, Angstrom."""
    return parameters[0] + 0.5 * (parameters[1] * cells.cos2 + parameters[2] * cells.sin2)
