"""Defocus and astigmatism from the rings of a power spectrum.

The logarithm of the power is modelled band by band, bands of equal width in k^2: a parabola for the background plus a strength, which
may change linearly within the band, times sin^2 of the CTF's argument. The score of a defocus is the sum of squares that the rings
explain, counted negative in bands where their strength comes out negative. All bands count alike, low and high: a fit that has slipped
by one ring agrees in a few bands and is wrong in the others, and loses.

The spectrum enters as a table of cells, sectors of equal angle by rings one step wide, which holds all that a smooth CTF can tell.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from cryodask.kernels.ctf import electron_wavelength_angstrom
from cryodask.kernels.spectrum import Spectrum

SECTORS = 36
SEARCH_SECTORS = 12
RING_STEP = 1.0 / 900.0
"""Least width of a ring of the table, 1/Angstrom."""
_RIDGE = 1e-9


class Lens(NamedTuple):
    """Argument of the CTF's sine = ``quadratic`` z k^2 + ``quartic`` k^4 + ``offset`` (kernels/ctf.py), for z in Angstrom."""

    quadratic: float
    quartic: float
    offset: float
    wavelength_angstrom: float


class Cells(NamedTuple):
    """Cells of the polar table that hold pixels, `(cell,)` float64.

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


def lens_of(voltage_kv: float, spherical_aberration_mm: float, amplitude_contrast: float, phase_shift_rad: float = 0.0) -> Lens:
    """Constants of the CTF's argument."""
    lam = float(electron_wavelength_angstrom(voltage_kv))
    quartic = -0.5 * math.pi * spherical_aberration_mm * 1e7 * lam**3
    return Lens(math.pi * lam, quartic, phase_shift_rad + math.asin(amplitude_contrast), lam)


def fit_ctf(
    spectrum: Spectrum,
    lens: Lens,
    *,
    coarsest_angstrom: float = 30.0,
    refine_from_angstrom: float = 12.0,
    finest_angstrom: float = 3.5,
    least_defocus_angstrom: float = 3000.0,
    largest_defocus_angstrom: float = 50000.0,
    largest_astigmatism_angstrom: float = 2000.0,
    expected_astigmatism_angstrom: float = 300.0,
    shells: int = 192,
) -> CtfFit:
    """Fit defocus and astigmatism to a power spectrum.

    Every mean defocus of the range is searched with every astigmatism up to the largest; the three best distinct maxima are refined,
    and the best of them wins. It is refined once more without the range coarser than ``refine_from_angstrom``, where the form factor
    of the particles looks like rings, if enough rings remain.

    Parameters
    ----------
    coarsest_angstrom, refine_from_angstrom, finest_angstrom : float
        Limits of the ranges that are fitted, Angstrom.
    least_defocus_angstrom, largest_defocus_angstrom : float
        Range of the mean defocus; underfocus is positive.

    Returns
    -------
    CtfFit
        ``alternative_score`` is the score of the best maximum at least 300 A away, over that of the winner: a value near 1 is a warning.
    """
    finest_k = min(1.0 / finest_angstrom, spectrum.largest_frequency)
    cells = polar_cells(spectrum, 1.0 / coarsest_angstrom, finest_k)
    candidates = _search(cells, lens, least_defocus_angstrom, largest_defocus_angstrom, largest_astigmatism_angstrom, expected_astigmatism_angstrom)
    refined = sorted((_refine(cells, lens, c, expected_astigmatism_angstrom) for c in candidates), key=lambda r: -r[0])
    score, best = refined[0]
    others = [(s, p) for s, p in refined[1:] if abs(float(p[0] - best[0])) >= 300.0]
    alternative = (float(others[0][1][0]), max(0.0, others[0][0] / score)) if others and score > 0 else (float(best[0]), 0.0)
    best = _refine_far(cells, lens, best, refine_from_angstrom, expected_astigmatism_angstrom)
    mean, along, across = best.tolist()
    half = 0.5 * math.hypot(along, across)
    curves = equiphase_curves(cells, lens, best, shells)
    resolution, merit = agreement(cells, lens, best)
    return CtfFit(
        mean + half, mean - half, 0.5 * math.atan2(across, along), resolution, merit, *alternative, *curves
    )


# --- the data


def polar_cells(spectrum: Spectrum, least_k: float, largest_k: float) -> Cells:
    """Table of the log power between two frequencies, 1/Angstrom; pixels near the axes, where readout leaves lines, are left out."""
    power, step = spectrum.power.double(), spectrum.step
    wide = max(step, RING_STEP)
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
    # neighbours in a ring differ by noise alone
    same = (where[1:] // SECTORS) == (where[:-1] // SECTORS)
    noise = float(((log_power[1:] - log_power[:-1]) ** 2 / (1 / n[1:] + 1 / n[:-1]))[same].mean())
    return Cells(log_power, n, k2_mean, cos2 / length, sin2 / length, search_sector, where // SECTORS, noise)


def _polynomial(x: Tensor, y: Tensor, weight: Tensor, degree: int) -> Tensor:
    t = 2 * (x - x.min()) / (x.max() - x.min()) - 1
    powers = torch.stack([t**i for i in range(degree + 1)], 1)
    root = torch.sqrt(weight)[:, None]
    return powers @ torch.linalg.lstsq(powers * root, y[:, None] * root).solution[:, 0]


# --- the search


def _search(cells: Cells, lens: Lens, least: float, largest: float, astigmatism: float, expected: float, count: int = 3) -> list[Tensor]:
    """The best distinct maxima over (mean defocus, astigmatism): list of tensors (z0, u, v), z = z0 + (u cos 2 theta + v sin 2 theta) / 2."""
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
    band = _bands(k2, bands)[0]
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


def _bands(k2: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Band of each value, bands of equal width in k^2, and the place within it from -1 to 1."""
    low, high = k2.min(), k2.max()
    place = (k2 - low) / (high - low) * count
    band = place.long().clamp(max=count - 1)
    return band, 2.0 * (place - band) - 1.0


class _Banded(NamedTuple):
    """Data made ready for :func:`_score`: orthonormal background of every band, and the log power free of it."""

    cells: Cells
    band: Tensor
    count: int
    place: Tensor
    background: Tensor
    residual: Tensor


def _band(cells: Cells, lens: Lens, defocus: float) -> _Banded:
    """Bands of about two rings at this defocus, 3 to 16."""
    rings = lens.wavelength_angstrom * defocus * float(cells.k2.max() - cells.k2.min())
    count = int(min(16, max(3, rings / 2)))
    band, place = _bands(cells.k2, count)
    columns: list[Tensor] = []
    for power in range(3):
        column = place**power
        for _ in range(2):  # Gram-Schmidt, twice for accuracy
            for earlier in columns:
                column = column - earlier * _sum(cells.weight * earlier * column, band, count)[band]
        norm = torch.sqrt(_sum(cells.weight * column**2, band, count))
        columns.append(column / norm.clamp(min=1e-12)[band])
    background = torch.stack(columns, 1)
    ready = _Banded(cells, band, count, place, background, cells.log_power)
    return ready._replace(residual=_free_of_background(ready, cells.log_power))


def _sum(values: Tensor, band: Tensor, count: int) -> Tensor:
    return torch.zeros(count, *values.shape[1:], dtype=values.dtype).index_add(0, band, values)


def _free_of_background(data: _Banded, values: Tensor) -> Tensor:
    share = _sum(data.background * (data.cells.weight * values)[:, None], data.band, data.count)
    return values - (data.background * share[data.band]).sum(1)


def _sine_square(cells: Cells, lens: Lens, parameters: Tensor) -> Tensor:
    defocus = parameters[0] + 0.5 * (parameters[1] * cells.cos2 + parameters[2] * cells.sin2)
    return torch.sin(lens.quadratic * defocus * cells.k2 + lens.quartic * cells.k2**2 + lens.offset) ** 2


def _strengths(data: _Banded, rings: Tensor) -> tuple[Tensor, Tensor]:
    """Explained sum of squares and mean ring strength of each band."""
    first = _free_of_background(data, rings)
    second = _free_of_background(data, rings * data.place)
    w, y = data.cells.weight, data.residual
    products = torch.stack([first * first, first * second, second * second, first * y, second * y], 1) * w[:, None]
    aa, ab, bb, ay, by = _sum(products, data.band, data.count).unbind(1)
    aa, bb = aa + _RIDGE, bb + _RIDGE
    determinant = aa * bb - ab * ab
    strength, change = (bb * ay - ab * by) / determinant, (aa * by - ab * ay) / determinant
    return strength * ay + change * by, strength


def _score(data: _Banded, lens: Lens, parameters: Tensor, expected: float) -> Tensor:
    explained, strength = _strengths(data, _sine_square(data.cells, lens, parameters))
    return (explained * torch.sign(strength)).sum() - data.cells.noise * (parameters[1:] ** 2).sum() / expected**2


def _refine(cells: Cells, lens: Lens, start: Tensor, expected: float) -> tuple[float, Tensor]:
    """Score and parameters (z0, u, v) of the local maximum at ``start``, by L-BFGS."""
    data = _band(cells, lens, float(start[0]))
    unit = torch.tensor([100.0, 100.0, 100.0], dtype=torch.float64)
    with torch.enable_grad():
        x = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        size = abs(float(_score(data, lens, start, expected))) + 1e-12
        search = torch.optim.LBFGS([x], max_iter=25, max_eval=35, tolerance_change=1e-4, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            search.zero_grad()
            value = -_score(data, lens, start + x * unit, expected) / size
            value.backward()
            return value

        search.step(loss)
    found = (start + x * unit).detach()
    return float(_score(data, lens, found, expected)), found


def _refine_far(cells: Cells, lens: Lens, best: Tensor, from_angstrom: float, expected: float, least_rings: float = 6.0) -> Tensor:
    """Refine without the coarse range; the old parameters stay if too few rings remain or the defocus moves by half a ring."""
    far = cells.k2 >= from_angstrom**-2
    if not far.any():
        return best
    span = float(cells.k2.max()) - from_angstrom**-2
    if lens.wavelength_angstrom * float(best[0]) * span < least_rings:
        return best
    part = Cells(*(column[far] for column in cells[:-1]), cells.noise)
    _, found = _refine(part, lens, best, expected)
    half_ring = 0.5 / (lens.wavelength_angstrom * float(cells.k2.max()))
    return found if abs(float(found[0] - best[0])) < max(half_ring, 100.0) else best


# --- what the fit is worth


def agreement(cells: Cells, lens: Lens, parameters: Tensor, bins: int = 12, threshold: float = 0.5) -> tuple[float, float]:
    """Resolution to which rings and fit agree, Angstrom, and their correlation over the whole range.

    The spectrum is averaged along the fitted ellipses, ``bins`` to a ring, and correlated with the fit in a window of 1.5 rings; the
    resolution is where two successive windows first fall below ``threshold``.
    """
    data = _band(cells, lens, float(parameters[0]))
    defocus = parameters[0] + 0.5 * (parameters[1] * cells.cos2 + parameters[2] * cells.sin2)
    phase = (lens.quadratic * defocus * cells.k2 + lens.quartic * cells.k2**2 + lens.offset) / math.pi
    fitted = _free_of_background(data, torch.sin(math.pi * phase) ** 2)
    y, w = data.residual, cells.weight
    merit = float((w * y * fitted).sum() / torch.sqrt((w * y * y).sum() * (w * fitted * fitted).sum()).clamp(min=1e-30))
    index = ((phase - phase.min()) * bins).long()
    count = torch.bincount(index, w).clamp(min=1e-9)
    ys, cs = torch.bincount(index, w * y) / count, torch.bincount(index, w * fitted) / count
    k = torch.sqrt(torch.bincount(index, w * cells.k2) / count)
    filled = count > 0.5
    ys, cs, k = ys[filled], cs[filled], k[filled]
    window = 3 * bins // 2
    if len(ys) < window:
        return float(1.0 / k[-1]), merit
    a, b = ys.unfold(0, window, 3), cs.unfold(0, window, 3)
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    correlation = (a * b).sum(1) / torch.sqrt((a * a).sum(1) * (b * b).sum(1)).clamp(min=1e-30)
    centre = k.unfold(0, window, 3)[:, window // 2]
    low = correlation < threshold
    both = torch.nonzero(low[:-1] & low[1:])[:, 0] if len(low) > 1 else torch.nonzero(low)[:, 0]
    return float(1.0 / centre[int(both[0])] if len(both) else 1.0 / k[-1]), merit


def equiphase_curves(cells: Cells, lens: Lens, parameters: Tensor, shells: int) -> tuple[Tensor, Tensor, Tensor]:
    """Frequencies (1/Angstrom), spectrum averaged along the fitted ellipses and fit, each `(shells,)` float64.

    A cell counts at the frequency at which the CTF without astigmatism has its phase. ``average`` is the log power free of the
    background of its band, ``fitted`` is sin^2 of the CTF's argument at the mean defocus.
    """
    data = _band(cells, lens, float(parameters[0]))
    _, strength = _strengths(data, _sine_square(cells, lens, parameters))
    rings = _free_of_background(data, _sine_square(cells, lens, parameters))
    # the background of the fit, not of the bare data: rings are put back where the parabola had taken part of them
    y = data.residual + strength[data.band] * (_sine_square(cells, lens, parameters) - rings)
    mean = parameters[0]
    defocus = mean + 0.5 * (parameters[1] * cells.cos2 + parameters[2] * cells.sin2)
    argument = lens.quadratic * defocus * cells.k2 + lens.quartic * cells.k2**2
    # lens.quartic q^2 + lens.quadratic mean q = argument, for q = k^2 of equal phase; the root that tends to argument / quadratic
    root = torch.sqrt(((lens.quadratic * mean) ** 2 + 4.0 * lens.quartic * argument).clamp(min=0.0))
    k2 = 2.0 * argument / (lens.quadratic * mean + root)
    edges = torch.linspace(float(cells.k2.min().sqrt()), float(cells.k2.max().sqrt()), shells + 1, dtype=torch.float64)
    frequency = 0.5 * (edges[1:] + edges[:-1])
    index = torch.bucketize(torch.sqrt(k2.clamp(min=0.0)), edges) - 1
    inside = (index >= 0) & (index < shells)
    weight = torch.bincount(index[inside], cells.weight[inside], minlength=shells)
    total = torch.bincount(index[inside], (cells.weight * y)[inside], minlength=shells)
    average = torch.where(weight > 0, total / weight.clamp(min=1e-9), 0.0)
    fitted = torch.sin(lens.quadratic * mean * frequency**2 + lens.quartic * frequency**4 + lens.offset) ** 2
    return frequency, average, fitted
