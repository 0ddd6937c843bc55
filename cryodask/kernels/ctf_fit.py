"""Defocus and astigmatism from the rings of a power spectrum: search over everything, then refine.

For the search the logarithm of the power is modelled band by band, bands of equal width in k^2: a parabola for the background plus a
strength, which may change linearly within the band, times sin^2 of the CTF's argument. The score of a defocus is the sum of squares that
the rings explain, counted negative in bands where their strength comes out negative. All bands count alike, low and high: a fit that has
slipped by one ring agrees in a few bands and is wrong in the others, and loses. Among the best maxima the likelihood of the whole
spectrum decides (kernels/ctf_likelihood.py), because scores in different bands cannot be compared; it also refines the winner.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from cryodask.kernels.ctf_bands import Banded, band_count, banded, bands_of, ring_strengths
from cryodask.kernels.ctf_cells import SEARCH_SECTORS, Cells, Lens, argument, argument_gradient, polar_cells
from cryodask.kernels.ctf_likelihood import log_likelihood, refine_by_likelihood
from cryodask.kernels.ctf_quality import agreement, equiphase_curves
from cryodask.kernels.descent import descend
from cryodask.kernels.spectrum import Spectrum

_UNIT = 100.0  # Angstrom: of defocus and astigmatism in the search for a maximum


class CtfFit(NamedTuple):
    """Result of :func:`fit_ctf`, Angstrom and radians. Curves are `(shell,)`, see :func:`equiphase_curves`."""

    defocus_u_angstrom: float
    defocus_v_angstrom: float
    defocus_angle_rad: float
    resolution_angstrom: float
    figure_of_merit: float
    alternative_defocus_angstrom: float
    alternative_score: float
    frequency: Tensor
    average: Tensor
    fitted: Tensor


def fit_ctf(
    spectrum: Spectrum,
    lens: Lens,
    *,
    coarsest_angstrom: float = 30.0,
    finest_angstrom: float = 3.5,
    least_defocus_angstrom: float = 3000.0,
    largest_defocus_angstrom: float = 50000.0,
    largest_astigmatism_angstrom: float = 2000.0,
    expected_astigmatism_angstrom: float = 300.0,
    ring_step: float = 1.0 / 900.0,
    shells: int = 192,
) -> CtfFit:
    """Fit defocus and astigmatism to a power spectrum.

    Every mean defocus of the range is searched with every astigmatism up to the largest; the five best distinct maxima are refined,
    the likeliest of them wins, and is refined once more by its likelihood. No fit has more astigmatism than the largest.

    Parameters
    ----------
    coarsest_angstrom, finest_angstrom : float
        Limits of the range that is fitted, Angstrom.
    least_defocus_angstrom, largest_defocus_angstrom : float
        Range of the mean defocus; underfocus is positive.
    expected_astigmatism_angstrom : float
        Standard deviation of a prior on the astigmatism, which matters only where noise hides it.
    ring_step : float
        Width of the rings in which the spectrum is averaged, 1/Angstrom.

    Returns
    -------
    CtfFit
        ``alternative_score`` is the score of the best maximum at least 300 A away, over that of the winner: near 1 is a warning.
    """
    finest_k = min(1.0 / finest_angstrom, spectrum.largest_frequency)
    cells = polar_cells(spectrum, 1.0 / coarsest_angstrom, finest_k, ring_step)
    candidates = _search(
        cells, lens, least_defocus_angstrom, largest_defocus_angstrom, largest_astigmatism_angstrom, expected_astigmatism_angstrom
    )
    refined = [_refine(cells, lens, c, expected_astigmatism_angstrom) for c in candidates]
    # drop maxima that the refinement has moved out of the range
    slack = 100.0
    inside = [p for p in refined if least_defocus_angstrom - slack <= float(p[0]) <= largest_defocus_angstrom + slack] or refined
    inside = [_within(p, largest_astigmatism_angstrom) for p in inside]
    inside.sort(key=lambda p: -log_likelihood(cells, lens, p, expected_astigmatism_angstrom))
    best = inside[0]
    other = next((p for p in inside[1:] if abs(float(p[0] - best[0])) >= 300.0), None)
    alternative = (float(best[0]), 0.0)
    if other is not None:
        first, second = (_own_score(cells, lens, p, expected_astigmatism_angstrom) for p in (best, other))
        alternative = (float(other[0]), max(0.0, second / first) if first > 0 else 1.0)
    last = _within(refine_by_likelihood(cells, lens, best, expected_astigmatism_angstrom), largest_astigmatism_angstrom)
    half_ring = 0.5 / (lens.wavelength_angstrom * float(cells.k2.max()))
    if abs(float(last[0] - best[0])) < max(half_ring, 300.0):
        best = last
    mean, along, across = best.tolist()
    half = 0.5 * math.hypot(along, across)
    curves = equiphase_curves(cells, lens, best, shells)
    resolution, merit = agreement(cells, lens, best)
    return CtfFit(mean + half, mean - half, 0.5 * math.atan2(across, along), resolution, merit, *alternative, *curves)


def _within(parameters: Tensor, largest_astigmatism_angstrom: float) -> Tensor:
    """The same mean defocus and direction, with no more astigmatism than the largest."""
    amount = float(torch.hypot(parameters[1], parameters[2]))
    if amount <= largest_astigmatism_angstrom:
        return parameters
    return torch.cat([parameters[:1], parameters[1:] * (largest_astigmatism_angstrom / amount)])


# --- the search


def _search(cells: Cells, lens: Lens, least: float, largest: float, astigmatism: float, expected: float, count: int = 5) -> list[Tensor]:
    """The best distinct maxima over mean defocus and astigmatism, as tensors (z0, u, v): see :func:`argument`."""
    step = 25.0 if largest <= 20000.0 else 50.0
    grid = torch.arange(least, largest + step, step, dtype=torch.float64)
    table = _sector_table(cells, lens, grid)
    theta = (torch.arange(SEARCH_SECTORS, dtype=torch.float64) + 0.5) / SEARCH_SECTORS * math.pi - 0.5 * math.pi
    side = torch.arange(-astigmatism, astigmatism + 1.0, 200.0, dtype=torch.float64)
    u, v = (t.reshape(-1) for t in torch.meshgrid(side, side, indexing="ij"))
    inside = torch.hypot(u, v) <= astigmatism
    u, v = u[inside], v[inside]
    offset = ((u[:, None] * torch.cos(2 * theta) + v[:, None] * torch.sin(2 * theta)) / (2 * step)).round().long()
    reach = int(offset.abs().max())
    padded = torch.nn.functional.pad(table[None], (reach, reach), mode="replicate")[0]
    total = torch.zeros(len(u), len(grid), dtype=padded.dtype)
    for s in range(SEARCH_SECTORS):
        total += padded[s].unfold(0, len(grid), 1)[offset[:, s] + reach]
    total -= (cells.noise * (u * u + v * v) / expected**2)[:, None]
    best, which = total.max(0)
    reach = round(150.0 / step)
    peak = best == torch.nn.functional.max_pool1d(best[None, None], 2 * reach + 1, 1, reach)[0, 0]
    chosen: list[int] = []
    for i in torch.argsort(best, descending=True).tolist():
        if peak[i] and all(abs(i - j) * step > 300.0 for j in chosen):
            chosen.append(i)
        if len(chosen) == count:
            break
    return [torch.stack([grid[i], u[which[i]], v[which[i]]]) for i in chosen]


def _sector_table(cells: Cells, lens: Lens, grid: Tensor, bands: int = 8) -> Tensor:
    """Score of each defocus of ``grid`` in each sector, `(SEARCH_SECTORS, grid)` float32: signed squared covariance over bands."""
    rings = int(cells.ring.max()) + 1
    index = cells.sector * rings + cells.ring
    size = SEARCH_SECTORS * rings
    weight = torch.bincount(index, cells.weight, minlength=size).reshape(SEARCH_SECTORS, rings)
    y = torch.bincount(index, cells.weight * cells.log_power, minlength=size).reshape(SEARCH_SECTORS, rings) / weight.clamp(min=1)
    ring_weight = torch.bincount(cells.ring, cells.weight, minlength=rings)
    k2 = torch.bincount(cells.ring, cells.weight * cells.k2, minlength=rings) / ring_weight.clamp(min=1)
    used = torch.nonzero(ring_weight > 0)[:, 0]
    y, weight, k2 = y[:, used].float(), weight[:, used].float(), k2[used]
    square = torch.sin(lens.quadratic * grid[:, None] * k2 + lens.quartic * k2**2 + lens.offset).square().float()
    band = bands_of(k2, bands)[0]
    table = torch.zeros(SEARCH_SECTORS, len(grid))
    for b in range(bands):
        inside = band == b
        w, c = weight[:, inside], square[:, inside]
        n = w.sum(1, keepdim=True).clamp(min=1e-6)
        deviation = w * (y[:, inside] - (w * y[:, inside]).sum(1, keepdim=True) / n)
        covariance = deviation @ c.T / n
        variance = w @ (c * c).T / n - (w @ c.T / n) ** 2
        table += n * covariance.abs() * covariance / (variance + 2e-3)
    return table


# --- the refinement


def _score(data: Banded, lens: Lens, parameters: Tensor, expected: float) -> tuple[float, Tensor]:
    """Score, and its derivatives by (z0, u, v)."""
    phase = argument(data.cells, lens, parameters)
    rings = ring_strengths(data, torch.sin(phase) ** 2)
    sign = torch.sign(rings.strength)
    prior = data.cells.noise / expected**2
    gradient = argument_gradient(data.cells, lens, sign[data.band] * rings.derivative * torch.sin(2.0 * phase))
    gradient[1:] -= 2.0 * prior * parameters[1:]
    return float((rings.explained * sign).sum() - prior * (parameters[1:] ** 2).sum()), gradient


def _own_score(cells: Cells, lens: Lens, parameters: Tensor, expected: float) -> float:
    """Score in the bands that suit this defocus."""
    return _score(banded(cells, band_count(cells, lens, float(parameters[0]))), lens, parameters, expected)[0]


def _refine(cells: Cells, lens: Lens, start: Tensor, expected: float) -> Tensor:
    """Parameters (z0, u, v) of the local maximum at ``start``."""
    data = banded(cells, band_count(cells, lens, float(start[0])))
    size = abs(_score(data, lens, start, expected)[0]) + 1e-12

    def loss(x: Tensor) -> tuple[float, Tensor]:
        score, gradient = _score(data, lens, start + _UNIT * x, expected)
        return -score / size, -_UNIT / size * gradient

    return start + _UNIT * descend(loss, torch.zeros(3, dtype=torch.float64))
