"""Quality of a CTF fit: the resolution to which rings and fit agree, and curves for inspection."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cryodask.kernels.ctf_bands import band_count, banded, free_of_background, ring_strengths
from cryodask.kernels.ctf_cells import Cells, Lens, defocus_of, sine_square


def agreement(cells: Cells, lens: Lens, parameters: Tensor, bins: int = 12, threshold: float = 0.5) -> tuple[float, float]:
    """Resolution to which rings and fit agree, Angstrom, and their correlation over the whole range.

    The spectrum is averaged along the fitted ellipses, ``bins`` to a ring, and correlated with the fit in a window of 1.5 rings; the
    resolution is where two successive windows first fall below ``threshold``.
    """
    data = banded(cells, band_count(cells, lens, float(parameters[0])))
    defocus = defocus_of(cells, parameters)
    phase = (lens.quadratic * defocus * cells.k2 + lens.quartic * cells.k2**2 + lens.offset) / math.pi
    fitted = free_of_background(data, torch.sin(math.pi * phase) ** 2)
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
    data = banded(cells, band_count(cells, lens, float(parameters[0])))
    strength = ring_strengths(data, sine_square(cells, lens, parameters)).strength
    rings = free_of_background(data, sine_square(cells, lens, parameters))
    # the background of the fit, not of the bare data: rings are put back where the parabola had taken part of them
    y = data.residual + strength[data.band] * (sine_square(cells, lens, parameters) - rings)
    mean = parameters[0]
    defocus = defocus_of(cells, parameters)
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
