"""Final refinement of a CTF: the likelihood of the whole spectrum under one smooth background and rings of flexible strength.

Power = N(k) + S(k) sin^2(argument of the CTF), with N a cubic over the whole range and S a linear spline. The spline's knots stand
closer than the lobes of a particle's form factor at low frequency, where rings are wide, and three rings apart further out, so that S can
follow the particles but never the rings. Between 30 and 12 A, where identical particles have lobes much like rings, the zeros of
the CTF then carry the measurement: there the power must come down to the background whatever the particles do. The variance of the
power is its square (a periodogram), which makes this Whittle's likelihood to second order.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cryodask.kernels.ctf_cells import Cells, Lens, sine_square
from cryodask.kernels.descent import descend, with_gradient

_BACKGROUND_DEGREE = 3
_LOBE = 0.007  # 1/Angstrom: half the period of the form factor of a particle of 70 Angstrom radius
_STIFFNESS = 10.0
_RINGS_A_KNOT = 3.0


def refine_by_likelihood(cells: Cells, lens: Lens, start: Tensor, expected_astigmatism_angstrom: float, rounds: int = 2) -> Tensor:
    """Maximum of the likelihood near ``start``, both as (z0, u, v) in Angstrom, float64.

    Parameters
    ----------
    expected_astigmatism_angstrom : float
        Standard deviation of a Gaussian prior on the astigmatism, which matters only where noise hides it.
    """
    power = torch.exp(cells.log_power)
    k = torch.sqrt(cells.k2)
    background = _background(k)
    wide = _hats(k, _knots(k, lens, float(start[0]), 0.03))
    variance = torch.ones_like(power)
    _, strength = _solve(background, wide, _penalty(background.shape[1], wide.shape[1], 0.0), cells, power, variance, lens, start)
    strength = strength.clamp(min=0.02 * max(float(strength.max()), 1e-6))
    rings = _hats(k, _knots(k, lens, float(start[0]), _LOBE)) * (wide @ strength)[:, None]
    penalty = _penalty(background.shape[1], rings.shape[1], _STIFFNESS)
    found = start.clone()
    for _ in range(rounds):
        model, _ = _solve(background, rings, penalty, cells, power, variance, lens, found)
        variance = model.clamp(min=0.2).square()
        found = _climb(background, rings, penalty, cells, power, variance, lens, found, expected_astigmatism_angstrom)
    return found


def log_likelihood(cells: Cells, lens: Lens, parameters: Tensor, expected_astigmatism_angstrom: float, spacing: float = 0.12) -> float:
    """Log-likelihood of (z0, u, v), up to a common constant, with the same few knots for any defocus.

    Knots of the strength stand ``spacing`` (1/Angstrom) apart whatever the defocus, so that no candidate has more freedom than another;
    a strength below zero, which is how rings of a wrong defocus would come to fit, is set to zero.
    """
    power, weight = torch.exp(cells.log_power), cells.weight / cells.noise
    k = torch.sqrt(cells.k2)
    low, high = float(k.min()), float(k.max()) * (1.0 + 1e-9)
    background, count = _background(k), max(3, math.ceil((high - low) / spacing) + 1)
    rings = _hats(k, torch.linspace(low, high, count, dtype=torch.float64))
    square = sine_square(cells, lens, parameters)
    penalty = _penalty(background.shape[1], count, 0.0)
    strength = _fit(background, rings, penalty, weight, power, square)[1][background.shape[1] :].clamp(min=0.0)
    # the background absorbs the residual of the clamped strengths
    rest = power - rings @ strength * square
    normal = background.T @ (background * weight[:, None])
    smooth = background @ torch.linalg.solve(normal, background.T @ (weight * rest))
    prior = float((parameters[1:] ** 2).sum()) / expected_astigmatism_angstrom**2
    return -0.5 * (float((weight * (rest - smooth) ** 2).sum()) + prior)


def _background(k: Tensor) -> Tensor:
    place = 2.0 * (k - k.min()) / (k.max() - k.min()) - 1.0
    return torch.stack([place**i for i in range(_BACKGROUND_DEGREE + 1)], 1)


def _knots(k: Tensor, lens: Lens, defocus: float, least: float) -> Tensor:
    """Knots ``least`` apart where rings are wider than four times that, else three rings apart."""
    low, high = float(k.min()), float(k.max())
    knots = [low]
    while knots[-1] < high:
        ring = 0.5 / (lens.wavelength_angstrom * abs(defocus) * knots[-1])
        knots.append(knots[-1] + (least if ring > 4.0 * least else max(least, _RINGS_A_KNOT * ring)))
    knots[-1] = high * (1.0 + 1e-9)
    return torch.tensor(knots, dtype=torch.float64)


def _hats(k: Tensor, knots: Tensor) -> Tensor:
    """Linear splines `(cell, knot)`, 1 at their knot and 0 at the others."""
    left = (torch.bucketize(k, knots, right=True) - 1).clamp(0, len(knots) - 2)
    share = ((k - knots[left]) / (knots[left + 1] - knots[left]))[:, None]
    table = torch.zeros(len(k), len(knots), dtype=torch.float64)
    return table.scatter(1, left[:, None], 1.0 - share).scatter(1, left[:, None] + 1, share)


def _penalty(background: int, knots: int, stiffness: float) -> Tensor:
    """Quadratic form on the coefficients: second differences of the strength, and a trace of ridge for empty knots."""
    bend = torch.zeros(max(knots - 2, 0), knots, dtype=torch.float64)
    for row in range(len(bend)):
        bend[row, row : row + 3] = torch.tensor([1.0, -2.0, 1.0], dtype=torch.float64)
    full = torch.zeros(background + knots, background + knots, dtype=torch.float64)
    full[background:, background:] = stiffness * bend.T @ bend + 1e-6 * torch.eye(knots, dtype=torch.float64)
    return full


def _fit(
    background: Tensor, rings: Tensor, penalty: Tensor, weight: Tensor, power: Tensor, square: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted least squares: design, coefficients, and the explained sum of squares."""
    design = torch.cat([background, rings * square[:, None]], 1)
    right = design.T @ (weight * power)
    normal = design.T @ (design * weight[:, None]) + penalty
    # a trace of the diagonal keeps it regular where the data leave a coefficient free
    normal = normal + 1e-10 * torch.diag(normal.diagonal())
    coefficients = torch.linalg.solve(normal, right)
    return design, coefficients, (right * coefficients).sum()


def _solve(
    background: Tensor, rings: Tensor, penalty: Tensor, cells: Cells, power: Tensor, variance: Tensor, lens: Lens, parameters: Tensor
) -> tuple[Tensor, Tensor]:
    """Model `(cell,)` and strengths `(knot,)` at fixed (z0, u, v)."""
    weight = cells.weight / (cells.noise * variance)
    design, coefficients, _ = _fit(background, rings, penalty, weight, power, sine_square(cells, lens, parameters))
    return design @ coefficients, coefficients[background.shape[1] :]


def _climb(
    background: Tensor,
    rings: Tensor,
    penalty: Tensor,
    cells: Cells,
    power: Tensor,
    variance: Tensor,
    lens: Lens,
    start: Tensor,
    expected: float,
) -> Tensor:
    weight = cells.weight / (cells.noise * variance)

    @with_gradient
    def loss(x: Tensor) -> Tensor:
        at = start + 100.0 * x
        explained = _fit(background, rings, penalty, weight, power, sine_square(cells, lens, at))[2]
        return -0.5 * (explained - (at[1:] ** 2).sum() / expected**2)

    return start + 100.0 * descend(loss, torch.zeros(3, dtype=torch.float64))
