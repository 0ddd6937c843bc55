"""Particle picking: a radial profile is learnt from each micrograph, starting from the diameter alone, or templates are given.

A disk and a ring of the given diameter, bright and dark, are correlated with the band-passed, locally normalised image; the mean of the
best patches, averaged over directions, is the next template. Of the four families the one with the most positive skew of its score map
is kept: particles make a heavy positive tail, the gaps between them a negative one, so that the sign of the contrast is found too.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from cryodask.kernels.acceptance import is_clear, threshold
from cryodask.kernels.contamination import unusual_regions
from cryodask.kernels.fourier import blur
from cryodask.kernels.spectrum import fast_even_size
from cryodask.kernels.subpixel import vertex
from cryodask.kernels.template_matching import Templates, extremes, matched_filters, turned, whitened, with_ctf

DIAMETER_PX = 16.0
"""Diameter of a particle in the downscaled image that is used throughout, pixels."""
SUPPORT = 0.9
"""Radius of the template, diameters; the vocabulary says the same, for figures that are drawn without torch."""
SPACING = 0.75
"""Smallest distance between two picks, diameters."""
MARGIN = 0.4
"""Picks closer than this to the border, diameters, are dropped."""
_MEDIAN_PIXELS = 1_000_000


class Picks(NamedTuple):
    """Peaks in descending order of score: positions `(peak,)` in pixels of the input image, scores, and how they were found.

    ``profile`` `(radius,)` runs from 0 to SUPPORT diameters, positive = brighter than the surroundings; ``threshold`` is the automatic
    one; ``skew`` is the third moment of the score map, ``null_skew`` that of an image of noise with the same power spectrum, which has
    ``null_count`` peaks, the highest of them ``chance``. ``mask`` `(row, column)`, bool, shows the regions without particles, over the
    whole image; half a diameter around them is left out, too, with ``left_out`` peaks that are above the threshold.
    """

    y: Tensor
    x: Tensor
    score: Tensor
    threshold: float
    profile: Tensor
    skew: float
    null_skew: float
    chance: float
    null_count: int
    mask: Tensor
    left_out: int


class _Field(NamedTuple):
    """Downscaled, normalised image with a mirrored border, and what is needed to correlate with it; lengths in its pixels.

    ``inner`` is the part without the border, ``free`` the part of it where particles can be; ``origin, scale`` (rows, columns) convert
    back to pixels of the input image.
    """

    image: Tensor
    transform: Tensor
    diameter: float
    radius: Tensor
    support: Tensor
    inner: tuple[slice, slice]
    free: Tensor
    origin: tuple[float, float]
    scale: tuple[float, float]


def pick_particles(
    image: Tensor,
    diameter_px: float,
    *,
    rounds: int = 3,
    profile_points: int = 32,
    seed: int = 0,
    pixel_size_angstrom: float | None = None,
    exclude_regions: bool = True,
    templates: Templates | None = None,
) -> Picks:
    """All peaks of the learnt template, or of given ones, in a micrograph, with scores, and a threshold for them.

    Parameters
    ----------
    image : Tensor, `(y, x)`, float32
        Either contrast.
    diameter_px : float
        Particle diameter, pixels; accurate to about 20 %.
    rounds : int
        Number of times the profile is relearnt.
    seed : int
        Seed for the phases of the noise image, which sets the chance level.
    pixel_size_angstrom : float, optional
        If given, regions without particles (contamination, carbon; see :mod:`cryodask.kernels.contamination`) can be left out.
    exclude_regions : bool
        Whether they are.
    templates : Templates, optional
        Look for these, at all in-plane rotations and in either contrast (see :mod:`cryodask.kernels.template_matching`).

    Returns
    -------
    Picks
        Scores are in standard deviations of the score map. The threshold separates the scores of the peaks into two groups, unless they
        are one (see :func:`cryodask.kernels.acceptance.threshold`). As a control, the same procedure runs on noise with the same power
        spectrum, and unless the score map is clearly more skewed than that of the noise, the threshold is above all peaks of the noise.
    """
    reduced = _reduced(image, diameter_px)
    mask = torch.zeros_like(reduced.image[reduced.inner], dtype=torch.bool)
    if pixel_size_angstrom is not None and exclude_regions:
        mask = unusual_regions(reduced.image[reduced.inner], reduced.diameter, diameter_px * pixel_size_angstrom)
    field = _field(reduced, mask)
    if templates is None:
        found, null = (_by_profile(one, rounds) for one in (field, _random_phases(field, seed)))
    else:
        assert pixel_size_angstrom is not None
        found, null = _by_templates(field, reduced.image, mask, templates, diameter_px * pixel_size_angstrom, seed)
    y, x, score = _peaks(field, found.scores)
    others = _peaks(field, null.scores)[2]
    chance = float(others.max()) if len(others) else 0.0
    places = torch.linspace(0.0, SUPPORT * field.diameter, profile_points)
    limit = threshold(score.cpu().numpy(), chance, is_clear(found.skew - null.skew, len(others)))
    return Picks(
        y * field.scale[0] + field.origin[0],
        x * field.scale[1] + field.origin[1],
        score,
        limit,
        _interpolate(found.profile, places),
        found.skew,
        null.skew,
        chance,
        len(others),
        mask,
        _left_out(field, found.scores, limit),
    )


def _left_out(field: _Field, scores: Tensor, limit: float) -> int:
    """Number of peaks above the threshold where there can be no particles."""
    if bool(field.free[field.inner].all()):
        return 0
    anywhere = _inside(field.image, field.inner)
    y, x, score = _peaks(field._replace(free=anywhere), scores)
    return int(((score > limit) & ~field.free[y.round().long(), x.round().long()]).sum())


class _Reduced(NamedTuple):
    """Downscaled image with a mirrored border, before it is band-passed; the other members are those of :class:`_Field`."""

    image: Tensor
    diameter: float
    inner: tuple[slice, slice]
    origin: tuple[float, float]
    scale: tuple[float, float]


def _reduced(image: Tensor, diameter_px: float) -> _Reduced:
    """Downscale until a particle is DIAMETER_PX wide.

    A border of 1.5 diameters is mirrored, so that a gradient over the image makes no step at the periodic boundary of the Fourier
    transform.
    """
    some = image.reshape(-1)[:: _stride(image.numel())]
    middle = some.median()
    spread = 1.4826 * (some - middle).abs().median().clamp(min=1e-12)
    image = (image - middle).clamp_(-8.0 * spread, 8.0 * spread)
    pool = max(1, int(diameter_px / (2.0 * DIAMETER_PX)))
    pooled = torch.nn.functional.avg_pool2d(image[None, None], pool) if pool > 1 else image[None, None]
    border = min(int(1.5 * diameter_px / pool), min(pooled.shape[-2:]) - 1)
    padded = torch.nn.functional.pad(pooled, (border,) * 4, mode="reflect")[0, 0]
    shrink = min(1.0, DIAMETER_PX * pool / diameter_px)
    height, width = (fast_even_size(n * shrink) if shrink < 1.0 else n for n in padded.shape)
    reduced = _crop(torch.fft.rfft2(padded), height, width)
    steps = padded.shape[0] / height, padded.shape[1] / width
    diameter = diameter_px / pool / (0.5 * (steps[0] + steps[1]))
    inner = [slice(math.ceil(border / s), math.floor((border + n - 1) / s) + 1) for s, n in zip(steps, pooled.shape[-2:])]
    origin = 0.5 * (pool - 1) - border * pool
    return _Reduced(reduced, diameter, (inner[0], inner[1]), (origin, origin), (steps[0] * pool, steps[1] * pool))


def _field(reduced: _Reduced, mask: Tensor) -> _Field:
    """Band-pass (0.05 to 1 diameter) and divide by the local standard deviation."""
    diameter = reduced.diameter
    band = blur(reduced.image, 0.05 * diameter) - blur(reduced.image, diameter)
    normal = band / torch.sqrt(blur(band * band, 1.5 * diameter).clamp(min=1e-12 * float(band.var()) + 1e-30))
    free = _inside(normal, reduced.inner)
    if mask.any():
        distance = distance_transform_edt(~mask.cpu().numpy())
        free[reduced.inner] = torch.from_numpy(distance > 0.5 * diameter).to(free.device)
    return _with_geometry(normal, diameter, reduced.inner, free, reduced.origin, reduced.scale)


def _inside(image: Tensor, inner: tuple[slice, slice]) -> Tensor:
    out = torch.zeros_like(image, dtype=torch.bool)
    out[inner] = True
    return out


def _stride(pixels: int) -> int:
    """Step between the pixels of which a median is taken: about a million, not all in a few columns."""
    return max(1, pixels // _MEDIAN_PIXELS) | 1


def _with_geometry(
    normal: Tensor, diameter: float, inner: tuple[slice, slice], free: Tensor, origin: tuple[float, float], scale: tuple[float, float]
) -> _Field:
    y, x = (torch.minimum(i, n - i).float() for n in normal.shape for i in [torch.arange(n, device=normal.device)])
    radius = torch.sqrt(y[:, None] ** 2 + x[None] ** 2)
    support = (radius <= SUPPORT * diameter).float()
    return _Field(normal, torch.fft.rfft2(normal), diameter, radius, support, inner, free, origin, scale)


def _crop(transform: Tensor, height: int, width: int) -> Tensor:
    """Image `(height, width)` from the low frequencies of a real FFT."""
    if transform.shape[0] == height:
        return torch.fft.irfft2(transform[:, : width // 2 + 1], s=(height, width))
    half = height // 2
    low = torch.cat([transform[:half], transform[-half:]])[:, : width // 2 + 1]
    return torch.fft.irfft2(low, s=(height, width))


def _random_phases(field: _Field, seed: int) -> _Field:
    """Gaussian noise with the power spectrum of the image."""
    noise = torch.randn(field.image.shape, generator=torch.Generator().manual_seed(seed)).to(field.image.device)
    phase = torch.fft.rfft2(noise)
    image = torch.fft.irfft2(field.transform.abs() * phase / phase.abs().clamp(min=1e-12), s=field.image.shape)
    return _with_geometry(image, field.diameter, field.inner, field.free, field.origin, field.scale)


# --- learning


def _starts(field: _Field) -> list[Tensor]:
    """Profiles, one value per pixel of radius, of a disk and a ring, bright and dark."""
    r = torch.arange(math.ceil(SUPPORT * field.diameter) + 3, device=field.image.device).float()

    def inside(radius: float) -> Tensor:
        return torch.sigmoid((radius - r) / (0.04 * field.diameter))

    disk = inside(0.5 * field.diameter)
    ring = disk - inside(0.32 * field.diameter)
    return [disk, -disk, ring, -ring]


class _Found(NamedTuple):
    """Score map in its standard deviations, its skew, and the mean profile of the best peaks."""

    skew: float
    profile: Tensor
    scores: Tensor


def _by_profile(field: _Field, rounds: int) -> _Found:
    """The family of learnt profiles whose score map is most skewed."""
    return max((_learn(field, start, rounds) for start in _starts(field)), key=lambda r: r.skew)


def _learn(field: _Field, profile: Tensor, rounds: int) -> _Found:
    """``rounds`` of picking and averaging."""
    for _ in range(rounds):
        learnt = _profile_of_best(field, _scores(field, profile), len(profile))
        if learnt is None:
            break
        profile = learnt
    scores = _scores(field, profile)
    return _Found(_mean(scores[field.free] ** 3), profile, scores)


def _profile_of_best(field: _Field, scores: Tensor, length: int) -> Tensor | None:
    """Mean profile of the best peaks; None if there are none away from the border."""
    y, x, _ = _peaks(field, scores)
    reach = math.ceil(SUPPORT * field.diameter) + 1
    height, width = field.image.shape
    best = max(10, int(0.15 * int(field.free.sum()) / field.diameter**2))
    rows, columns = y[:best].round().long(), x[:best].round().long()
    whole = (rows >= reach) & (rows < height - reach) & (columns >= reach) & (columns < width - reach)
    return _mean_profile(field, rows[whole], columns[whole], length) if bool(whole.any()) else None


def _by_templates(
    field: _Field, image: Tensor, mask: Tensor, templates: Templates, diameter_angstrom: float, seed: int
) -> tuple[_Found, _Found]:
    """The best score of all templates at each place, in the contrast that has the more skewed map; and the same of noise."""
    clean = torch.ones_like(field.free)
    clean[field.inner] = ~mask
    pixel = diameter_angstrom / field.diameter
    seen = with_ctf(turned(templates.images, templates.pixel_angstrom, diameter_angstrom, pixel), templates.lens, pixel)
    white = whitened(image, clean, field.diameter)
    filters = matched_filters(seen, white.amplitude)
    flat = field._replace(image=white.image, transform=torch.fft.rfft2(white.image))
    found = max(_standardised(field, extremes(white.image, filters)), key=lambda r: r.skew)
    both = _standardised(field, extremes(_random_phases(flat, seed).image, filters))
    # one picture of noise has few peaks: the highest of either contrast is a steadier limit
    null = _Found(max(one.skew for one in both), found.profile, torch.maximum(both[0].scores, both[1].scores))
    length = math.ceil(SUPPORT * field.diameter) + 3
    profile = _profile_of_best(field, found.scores, length)
    return found._replace(profile=field.image.new_zeros(length) if profile is None else profile), null


def _standardised(field: _Field, extreme: tuple[Tensor, Tensor]) -> list[_Found]:
    """Score maps of either contrast with mean 0 and standard deviation 1, from the highest and the lowest scores of filters."""
    out = []
    for scores in (extreme[0], -extreme[1]):
        free = scores[field.free]
        scores = (scores - _mean(free)) / max(_mean((free - _mean(free)) ** 2) ** 0.5, 1e-30)
        out.append(_Found(_mean(scores[field.free] ** 3), field.image.new_zeros(0), scores))
    return out


def _mean_profile(field: _Field, rows: Tensor, columns: Tensor, length: int) -> Tensor:
    reach = math.ceil(SUPPORT * field.diameter) + 1
    offset = torch.arange(-reach, reach + 1, device=field.image.device)
    mean = field.image[(rows[:, None] + offset)[:, :, None], (columns[:, None] + offset)[:, None, :]].mean(0)
    ring = torch.sqrt((offset[:, None] ** 2 + offset[None] ** 2).float()).round().long().clamp(max=length - 1).reshape(-1)
    return torch.bincount(ring, mean.reshape(-1), minlength=length) / torch.bincount(ring, minlength=length).clamp(min=1)


def _scores(field: _Field, profile: Tensor) -> Tensor:
    """Correlation of every position with the template, in standard deviations of the map."""
    template = _interpolate(profile, field.radius)
    template = (template - _mean(template * field.support) / _mean(field.support)) * field.support
    scores = torch.fft.irfft2(field.transform * torch.fft.rfft2(template).conj(), s=field.image.shape)
    inner = scores[field.free]
    return scores / max(_mean((inner - _mean(inner)) ** 2) ** 0.5, 1e-30)


def _mean(values: Tensor) -> float:
    """Mean in double precision, by numpy: sums of torch depend on the number of threads."""
    return float(values.cpu().numpy().mean(dtype=np.float64)) if values.numel() else 0.0


def _interpolate(profile: Tensor, radius: Tensor) -> Tensor:
    r = radius.clamp(max=len(profile) - 1.001)
    low = r.floor().long()
    share = r - low
    return profile[low] * (1.0 - share) + profile[low + 1] * share


# --- peaks


def _peaks(field: _Field, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, columns (to a fraction of a pixel) and heights of the positive peaks, highest first, no two closer than SPACING."""
    reach = max(1, int(0.5 * SPACING * field.diameter))
    size = 2 * reach + 1
    along_y = torch.nn.functional.max_pool2d(scores[None, None], (size, 1), 1, (reach, 0))
    highest = torch.nn.functional.max_pool2d(along_y, (1, size), 1, (0, reach))[0, 0]
    edge = max(1, math.floor(MARGIN * field.diameter))
    inside = torch.zeros_like(scores, dtype=torch.bool)
    rows_in, columns_in = field.inner
    inside[rows_in.start + edge : rows_in.stop - edge, columns_in.start + edge : columns_in.stop - edge] = True
    rows, columns = torch.nonzero((scores == highest) & inside & field.free & (scores > 0)).unbind(1)
    height = scores[rows, columns]
    order = torch.argsort(height, descending=True, stable=True)
    rows, columns, height = rows[order], columns[order], height[order]
    y = rows + vertex(scores[rows - 1, columns], height, scores[rows + 1, columns])
    x = columns + vertex(scores[rows, columns - 1], height, scores[rows, columns + 1])
    keep = _apart(y, x, SPACING * field.diameter)
    return y[keep], x[keep], height[keep]


def _apart(y: Tensor, x: Tensor, distance: float) -> Tensor:
    """Indices that remain when each point, best first, removes all others closer than ``distance``."""
    near = torch.triu((y[:, None] - y[None]) ** 2 + (x[:, None] - x[None]) ** 2 < distance**2, 1)
    alive = [True] * len(y)
    # most are alone, because each is the highest in its surroundings
    for i, j in torch.nonzero(near).tolist():
        alive[j] &= not alive[i]
    return torch.nonzero(torch.tensor(alive, device=y.device, dtype=torch.bool))[:, 0]
