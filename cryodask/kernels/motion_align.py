"""Whole-frame motion: found by correlation, then measured by maximum likelihood.

A displacement is that of the specimen, in pixels of the movie, (y, x): content that lies at p in the reference is at p + d in the
frame; multiplying the frame's transform by exp(2 pi i f d) brings it back. Means over frames are zero.

For an unknown common signal in white noise the gradient of the likelihood in a frame's shift is that of its correlation with the
sum of all frames, weighted by W = [n r / (1 + n r)] / noise, r = signal power over noise power of one frame; its curvature gives
the variance n / h of every shift. The frame's own share in the sum has no gradient, so nothing must be left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from cryodask.kernels.fourier import real_ifft2
from cryodask.kernels.motion_frames import MovieTransform, crop_transform
from cryodask.kernels.motion_model import drift_priors, fit_field
from cryodask.kernels.motion_still import LOWEST_ANGSTROM, StillPattern, phase_factors, still_pattern, sum_of_factors

_LOWEST_ANGSTROM = 400.0
"""Coarsest resolution used; beyond it there is illumination rather than specimen."""
_SIGNIFICANT_PEAK = 6.0


def aligned_sum(transform: MovieTransform, shift: Tensor) -> Tensor:
    """Sum of the aligned frames' transforms, `(row, column)`; frame by frame, as all at once would double the memory."""
    along_y, along_x = phase_factors(shift, transform)
    total = torch.zeros_like(transform.values[0])
    for f in range(len(shift)):
        total += transform.values[f] * along_y[f] * along_x[f]
    return total


@dataclass(frozen=True)
class Spectrum:
    """Signal and noise of one frame by ring: ``ratio`` r = signal / noise power, ``noise`` power, ring width 1/Angstrom."""

    ratio: Tensor
    noise: Tensor
    width: float

    def on(self, k: Tensor) -> tuple[Tensor, Tensor]:
        """Ratio and noise at frequencies ``k`` (1/Angstrom)."""
        index = (k / self.width).long().clamp(max=len(self.ratio) - 1)
        return self.ratio[index], self.noise[index]


def measure_spectrum(transform: MovieTransform, total: Tensor, power: Tensor, still: Tensor | None = None) -> Spectrum:
    """Signal and noise from the sum of aligned frames and the sum of their powers, both `(row, column)`.

    ``still`` is what a still pattern is expected to add to the power of the sum, if there is one. The ratio is zero below three standard
    deviations and beyond the first gap.
    """
    frames = transform.values.shape[0]
    limit = float(transform.k[:, 0].max())
    rings = max(8, min(200, transform.size[0] // 2))
    width = limit / rings * (1.0 + 1e-6)
    index = (transform.k / width).long().clamp(max=rings).flatten()
    count = torch.bincount(index, minlength=rings + 1)[:rings].clamp(min=1)

    def ring_mean(values: Tensor) -> Tensor:
        return torch.bincount(index, values.flatten().double(), rings + 1)[:rings] / count

    single = ring_mean(power) / frames
    signal = (ring_mean(total.abs() ** 2 if still is None else total.abs() ** 2 - still) - frames * single) / (frames * (frames - 1))
    noise = (single - signal).clamp(min=1e-3 * float(single.max()) + 1e-30)
    ratio = _smooth(signal / noise, 5)
    ratio = torch.where(ratio > 3.0 / (frames * torch.sqrt(5.0 * count)), ratio, torch.zeros((), dtype=ratio.dtype, device=ratio.device))
    gap = (_smooth((ratio > 0).double(), 15) < 0.4).nonzero()
    if len(gap):
        ratio[int(gap[0]) :] = 0.0
    return Spectrum(ratio.float(), noise.float(), width)


def _smooth(values: Tensor, length: int) -> Tensor:
    padded = torch.nn.functional.pad(values[None, None], (length // 2, length // 2), mode="replicate")
    return torch.nn.functional.avg_pool1d(padded, length, 1)[0, 0]


@dataclass(frozen=True)
class GlobalMotion:
    """Motion of the whole frame: ``shift`` `(frame, 2)` pixels; ``spectrum`` None where there is no signal to align.

    ``still`` is the pattern that does not move with the specimen, None if there is none.
    """

    shift: np.ndarray
    spectrum: Spectrum | None
    deviation: tuple[float, float]
    still: StillPattern | None = None


def align_frames(
    transform: MovieTransform, mean_count: np.ndarray, exposure: np.ndarray, pixel_size_angstrom: float, rounds: int = 4
) -> GlobalMotion:
    """Drift of the whole frame.

    Parameters
    ----------
    transform : MovieTransform
    mean_count : `(frame,)`
        Per frame; empty frames must not count as "did not move".
    exposure : `(frame,)`
        At mid-frame, e/A^2.

    Notes
    -----
    Where the unaligned frames share fine detail that is not the specimen, or where the track is too short to tell, they are aligned
    again, as if it were a pattern that stands still. If the track found so shows that it is one, that track is the result.
    """
    whole = _align(transform, mean_count, exposure, pixel_size_angstrom, rounds, None)
    still = still_pattern(transform)
    if not still.possible:
        return whole
    beside = _beside(transform, whole)
    if beside.separable and not beside.found:
        return whole
    for pattern in (beside if beside.found else still, None):
        other = _align(transform, mean_count, exposure, pixel_size_angstrom, rounds, pattern or beside)
        beside = _beside(transform, other)
        if not beside.found:
            return whole
    return replace(other, still=beside)


def _beside(transform: MovieTransform, motion: GlobalMotion) -> StillPattern:
    return still_pattern(transform, torch.from_numpy(motion.shift).float().to(transform.values.device))


def _align(
    transform: MovieTransform,
    mean_count: np.ndarray,
    exposure: np.ndarray,
    pixel_size_angstrom: float,
    rounds: int,
    still: StillPattern | None,
) -> GlobalMotion:
    frames = len(mean_count)
    share = np.clip(mean_count / max(float(np.median(mean_count)), 1e-12), 1e-3, None)
    device = transform.values.device
    shift = _coarse(transform, pixel_size_angstrom, still)
    power = torch.zeros_like(transform.k)
    for f in range(frames):
        power += transform.values[f].real ** 2 + transform.values[f].imag ** 2
    spectrum, deviation = None, (math.inf, math.inf)
    priors = drift_priors(exposure)
    for _ in range(rounds):
        total = aligned_sum(transform, shift)
        held = None if still is None else still.power * sum_of_factors(shift, transform)
        spectrum = measure_spectrum(
            transform, total, power, None if held is None or still is None else held.abs() ** 2 / still.power - frames * still.power
        )
        gradient, curvature = _likelihood(transform, shift, total, spectrum, held)
        if min(curvature) <= 0.0:
            spectrum = None
            break
        deviation = (math.sqrt(frames / curvature[0]), math.sqrt(frames / curvature[1]))
        step = gradient / np.array(curvature) / np.maximum(share, 0.05)[:, None]
        measured = (shift.cpu().numpy() + step) * pixel_size_angstrom
        variance = tuple((d * pixel_size_angstrom) ** 2 for d in deviation)
        here = np.zeros((1, 2))
        field = fit_field(measured[None], (variance[0], variance[1]), np.ones(1), 1.0 / share, here, [1.0], priors)
        smooth = field.at(here)[0] / pixel_size_angstrom
        moved = float(np.abs(smooth - shift.cpu().numpy()).max())
        shift = torch.from_numpy(smooth).float().to(device)
        if moved < 0.05:
            break
    return GlobalMotion(shift.double().cpu().numpy(), spectrum, deviation, still)


def _likelihood(
    transform: MovieTransform, shift: Tensor, total: Tensor, spectrum: Spectrum, held: Tensor | None
) -> tuple[np.ndarray, tuple[float, float]]:
    """Gradient `(frame, 2)` of the log-likelihood in the shifts (1/pixel), and its mean curvature (y, x).

    ``held``: power of a still pattern times the sum of the frames' phase factors.
    """
    frames = len(shift)
    ratio, noise = spectrum.on(transform.k)
    twice = torch.full_like(transform.k, 2.0)
    twice[:, 0] = 1.0
    weight = frames * ratio / (1.0 + frames * ratio) / noise * twice * (transform.k > 1.0 / _lowest(held is not None))
    wy, wx = 2.0 * math.pi * transform.fy, 2.0 * math.pi * transform.fx
    information = weight * (frames * ratio * noise)
    curvature = (float((information * wy**2).sum(dtype=torch.float64)), float((information * wx**2).sum(dtype=torch.float64)))
    reference = torch.conj(total) * weight
    expected = None if held is None else torch.conj(held) * weight
    along_y, along_x = phase_factors(shift, transform)
    gradient = np.zeros((frames, 2))
    for f in range(frames):
        columns = torch.stack([along_x[f, 0], along_x[f, 0] * wx[0]], 1)
        product = reference * transform.values[f]
        rows = (product if expected is None else product - expected) @ columns  # (row, 2)
        rows = rows * along_y[f]
        gradient[f, 0] = -float((rows[:, 0].imag * wy[:, 0]).sum())
        gradient[f, 1] = -float(rows[:, 1].imag.sum())
    return gradient, curvature


def _lowest(still: bool) -> float:
    return LOWEST_ANGSTROM if still else _LOWEST_ANGSTROM


def _coarse(transform: MovieTransform, pixel_size_angstrom: float, still: StillPattern | None) -> Tensor:
    """Shifts `(frame, 2)` to about a pixel, from peaks of the correlation of each frame with the sum of the others.

    If peaks do not exceed the noise, neighbouring frames are summed first; shifts that are never found are interpolated.
    """
    frames = transform.values.shape[0]
    shift = torch.zeros(frames, 2, device=transform.values.device)
    for resolution in (25.0, 12.0):
        small = crop_transform(transform, resolution, pixel_size_angstrom)
        weight = torch.exp(-2.0 * (0.6 * resolution * small.k) ** 2) * (small.k > 1.0 / _lowest(still is not None))
        group = 1
        while True:
            found, sure = _peak_rounds(small, weight, shift, group, still)
            if sure.mean() >= 0.7 or frames // (2 * group) < 4:
                break
            group *= 2
        if not sure.any():
            continue
        centres = np.minimum(np.arange(len(sure)) * group + 0.5 * (group - 1), frames - 1.0)
        update = np.stack([np.interp(np.arange(frames), centres[sure], found[sure, a]) for a in (0, 1)], 1)
        shift = shift + torch.from_numpy(update).float().to(shift.device)
        shift -= shift.mean(0)
    return shift


def _peak_rounds(
    transform: MovieTransform, weight: Tensor, shift: Tensor, group: int, still: StillPattern | None
) -> tuple[np.ndarray, np.ndarray]:
    """Shifts of groups of frames on top of ``shift``, `(group, 2)` pixels, and whether their peaks are significant."""
    along_y, along_x = phase_factors(shift, transform)
    aligned = _in_groups(transform.values * along_y * along_x, group)
    held = None if still is None else _in_groups(along_y * along_x, group)
    grouped = MovieTransform(aligned, transform.fy, transform.fx, transform.k, transform.extent, transform.size)
    found = torch.zeros(len(aligned), 2, device=shift.device)
    sure = np.zeros(len(aligned), bool)
    moved = torch.empty_like(aligned)
    for _ in range(6):
        along_y, along_x = phase_factors(found, grouped)
        torch.mul(aligned, along_y, out=moved)
        moved *= along_x
        total = moved.sum(0)
        # one at a time: the correlations of all frames are the peak of the stage's memory
        peaks = []
        for g, one in enumerate(moved):
            product = torch.conj(total - one) * one
            if held is not None and still is not None:
                alone = held[g] * along_y[g] * along_x[g]
                product -= still.power * torch.conj((held * along_y * along_x).sum(0) - alone) * alone
            peaks.append(_peak(real_ifft2(product * weight, transform.size), transform))
        update, sure = torch.stack([place for place, _ in peaks]), np.array([clear for _, clear in peaks])
        update[~torch.from_numpy(sure)] = 0.0
        found = found + update.to(found.device)
        found -= found.mean(0)
        if float(update.abs().max()) < 0.25 * transform.extent[0] / transform.size[0]:
            break
    return found.double().cpu().numpy(), sure


def _in_groups(frames: Tensor, group: int) -> Tensor:
    """Sums of ``group`` neighbours, the last with what remains."""
    if group == 1:
        return frames
    count = frames.shape[0] // group
    return torch.stack([frames[g * group : (g + 1) * group if g < count - 1 else None].sum(0) for g in range(count)])


def _peak(correlation: Tensor, transform: MovieTransform) -> tuple[Tensor, bool]:
    """Displacement `(2,)` at the maximum of a correlation `(y, x)` by parabolas, pixels of the movie, and whether it is significant."""
    rows, columns = correlation.shape
    height, index = correlation.flatten().max(0)
    sure = bool(height > _SIGNIFICANT_PEAK * correlation.std())
    y, x = int(index) // columns, int(index) % columns

    def vertex(before: Tensor, after: Tensor) -> Tensor:
        return ((after - before) / (2.0 * (2.0 * height - before - after).clamp(min=1e-30))).clamp(-0.5, 0.5)

    py = y + vertex(correlation[(y - 1) % rows, x], correlation[(y + 1) % rows, x])
    px = x + vertex(correlation[y, (x - 1) % columns], correlation[y, (x + 1) % columns])
    py = (py + rows / 2) % rows - rows / 2
    px = (px + columns / 2) % columns - columns / 2
    scale = torch.tensor([transform.extent[0] / rows, transform.extent[1] / columns])
    return torch.stack([py, px]).cpu() * scale, sure
