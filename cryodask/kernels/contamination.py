"""Where a micrograph shows no particles: contamination, crystals, carbon, and edges of films.

Protein in ice is weak phase contrast, which hardly changes the mean over its own area; whatever absorbs or is thick does. So regions are
judged by their mean, relative to a plane through most of the micrograph, and by the strength of their fine texture. The unit is the spread
of the micrograph itself in the band of the particle, so that neither the scale of the pixel values nor the exposure need be known.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from cryodask.kernels.fourier import blur

REGION = 5.0
"""Least deviation of the mean of a large region, spreads. Real ice varies by up to 4 beyond a plane; a contaminant reaches 30."""
COMPACT = {0.35: 2.7, 0.7: 1.3}
"""Least deviation of a compact feature from its surroundings, spreads, by the width of the blur, diameters. For particles up to
USUAL_ANGSTROM: beta-galactosidase with twice the usual contrast, 3 um from focus, reaches 2.1 and 0.7."""
USUAL_ANGSTROM = 200.0
_STRONGER = 2.2
"""A compact feature is stronger than the usual ones of the micrograph by this factor."""
_USUAL_QUANTILE = 0.8
_AROUND = 2.0
"""Blur that gives the surroundings of compact features, diameters."""
_TEXTURE, _TEXTURE_MEAN = 0.4, 1.5
"""Carbon: a large region with a mean and a logarithm of the fine variance that both deviate by this."""
_GROWTH = 0.5
_LEAST_AREA = 4.0
"""Smallest large region, square diameters."""
_BRIGHT_SHARE = 0.2
"""A larger part that is brighter than the rest is ice, and the rest is carbon: a hole without ice is rarely that large."""
_TRIALS = 300


def unusual_regions(image: Tensor, diameter_px: float, diameter_angstrom: float) -> Tensor:
    """Mask of contamination, crystals, carbon and film edges.

    Parameters
    ----------
    image : Tensor, `(y, x)`, float32
        Micrograph, downscaled until the particle is about 16 pixels wide, in either contrast and with any offset and scale.
    diameter_px, diameter_angstrom : float
        Diameter of the particle, in pixels of this image and in Angstrom. A particle stands out from the noise in proportion to the
        square of its diameter, which is why a limit for the strength of protein needs its length.

    Returns
    -------
    Tensor, `(y, x)`, bool
        True where no particles can be picked.
    """
    cell = min(max(1, round(diameter_px)), *image.shape)
    border = min(math.ceil(2.0 * _AROUND * diameter_px), min(image.shape) - 1)
    rows, columns = (slice(border, border + n) for n in image.shape)

    def smoothed(values: Tensor, diameters: float) -> Tensor:
        mirrored = torch.nn.functional.pad(values[None, None], (border,) * 4, mode="reflect")[0, 0]
        return blur(mirrored, diameters * diameter_px)[rows, columns]

    spread = _spread(smoothed(image, 0.05) - smoothed(image, 1.0))
    if not spread > 0.0:
        return torch.zeros_like(image, dtype=torch.bool)
    level = (image - _plane(image, cell, 0.5 * REGION * spread)) / spread
    mean = smoothed(level, 0.35).cpu().numpy()
    fine = smoothed(level, 0.04) - smoothed(level, 0.1)
    texture = torch.log(smoothed(fine * fine, 1.0).clamp(min=1e-12)).cpu().numpy()
    region = _unlike(mean, texture - np.median(texture))
    bright = region & (mean > 0.0)
    if bright.mean() > _BRIGHT_SHARE:
        middle = float(np.median(mean[bright]))
        level = level - middle
        mean = mean - middle
        region = _unlike(mean, texture - np.median(texture[bright]))
    region = ndimage.binary_fill_holes(_large(region, _LEAST_AREA * diameter_px**2))
    out: np.ndarray = region.copy()
    if not region.all():
        free = torch.from_numpy(~region).to(image)

        def outside(diameters: float) -> Tensor:
            return smoothed(level * free, diameters) / smoothed(free, diameters).clamp(min=0.01)

        around, strength = outside(_AROUND), max(1.0, (diameter_angstrom / USUAL_ANGSTROM) ** 2)
        for diameters, least in COMPACT.items():
            local = (free * (outside(diameters) - around).abs()).cpu().numpy()
            usual = np.quantile(_highest(local, 3 * cell)[_highest(~region, 3 * cell)], _USUAL_QUANTILE, method="lower")
            limit = max(least * strength, _STRONGER * float(usual))
            out |= _grown(local > limit, local > _GROWTH * limit)
    return torch.from_numpy(out).to(image.device)


def _unlike(mean: np.ndarray, texture: np.ndarray) -> np.ndarray:
    """Where the mean deviates much, or mean and texture both deviate."""
    out = _grown(np.abs(mean) > REGION, np.abs(mean) > _GROWTH * REGION)
    out |= (np.abs(texture) > _TEXTURE) & (np.abs(mean) > _TEXTURE_MEAN)
    return out


def _highest(values: np.ndarray, cell: int) -> np.ndarray:
    """Highest value of each whole square cell, flat; of the whole image if it is smaller."""
    cell = min(cell, *values.shape)
    rows, columns = (n // cell for n in values.shape)
    out: np.ndarray = values[: rows * cell, : columns * cell].reshape(rows, cell, columns, cell).max((1, 3)).reshape(-1)
    return out


def _spread(values: Tensor) -> float:
    """Standard deviation of most values, from their median absolute deviation."""
    return 1.4826 * float((values - values.median()).abs().median())


def _plane(image: Tensor, cell: int, close: float) -> Tensor:
    """Plane through most of an image: least median of squares (Rousseeuw 1984), refined by the cells ``close`` to it."""
    cells = torch.nn.functional.avg_pool2d(image[None, None], cell)[0, 0].cpu().numpy()
    y, x = (c.reshape(-1) for c in np.meshgrid(*((np.arange(n) + 0.5) * cell for n in cells.shape), indexing="ij"))
    values = cells.reshape(-1).astype(np.float64)
    terms = np.stack([np.ones(len(y)), y / image.shape[0], x / image.shape[1]], 1)
    best = np.array([np.median(values), 0.0, 0.0])
    lowest = float(np.median(np.abs(values - best[0])))
    rng = np.random.Generator(np.random.SFC64(0))
    for _ in range(_TRIALS):
        three = rng.integers(0, len(values), 3)
        if abs(np.linalg.det(terms[three])) < 0.02:  # nearly on a line
            continue
        plane = np.linalg.solve(terms[three], values[three])
        error = float(np.median(np.abs(values - terms @ plane)))
        if error < lowest:
            best, lowest = plane, error
    for _ in range(3):
        near = np.abs(values - terms @ best) < max(close, 3.0 * lowest)
        best = np.linalg.lstsq(terms[near], values[near], rcond=None)[0]
    height, width = ((torch.arange(n, device=image.device) + 0.5) / n for n in image.shape)
    return (float(best[0]) + float(best[1]) * height[:, None] + float(best[2]) * width[None]).float()


def _grown(seeds: np.ndarray, weak: np.ndarray) -> np.ndarray:
    """Connected parts of ``weak`` that contain a seed."""
    labels, _ = ndimage.label(weak | seeds)
    out: np.ndarray = np.isin(labels, np.unique(labels[seeds])) & (labels > 0)
    return out


def _large(mask: np.ndarray, area: float) -> np.ndarray:
    """Connected parts of at least an area, pixels."""
    labels, count = ndimage.label(mask)
    large = np.bincount(labels.reshape(-1), minlength=count + 1) >= area
    large[0] = False
    out: np.ndarray = large[labels]
    return out
