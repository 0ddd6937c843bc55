"""Local motion: the likelihood of `motion_align` in overlapping patches, and a Gaussian process through all of them.

No peak is picked in a patch: each gives a Newton step of known variance around the current model, and a patch without particles is
just a noisy one. So there are no outliers to reject, and weak patches only add their noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cryodask.kernels.fourier import real_fft2, real_ifft2, smooth_size
from cryodask.kernels.motion_align import GlobalMotion, Spectrum
from cryodask.kernels.motion_frames import MovieTransform, crop_transform
from cryodask.kernels.motion_model import FittedField, fit_field, local_priors
from cryodask.kernels.motion_still import LOWEST_ANGSTROM, phase_factors

OVERLAP_VARIANCE = 2.25
"""Patches at half their size share noise: treated as independent, their variance must be this much larger."""
LENGTHS_ANGSTROM = (1500.0, 4000.0, 12000.0)
_COARSE_ANGSTROM = 12.0
_LOWEST_ANGSTROM = 300.0
_INFORMATION_KEPT = 0.95
_FINEST_ANGSTROM = 10.0
"""Patches overlap fourfold, so their cost counts: finer detail improves strong movies by a tenth and doubles it."""
_USEFUL_DEVIATION_ANGSTROM = 4.0
_LEAST_PATCH_ANGSTROM = 250.0


@dataclass(frozen=True)
class Patches:
    """Transforms `(patch, frame, row, column)` of windowed patches of the globally aligned frames; ``centre`` `(patch, 2)` pixels.

    ``power`` `(patch, row, column)` is the sum of the frames' powers.
    """

    values: Tensor
    power: Tensor
    fy: Tensor
    fx: Tensor
    k: Tensor
    centre: np.ndarray
    power_scale: float


def choose_patches(
    most: tuple[int, int], shape: tuple[int, int], motion: GlobalMotion, frames: int, pixel_size_angstrom: float
) -> tuple[int, int] | None:
    """How many patches (down, across) the movie supports, at most ``most``; None if local motion cannot be measured.

    Patches shrink until a shift in one frame would have a deviation of 4 Angstrom: beyond that a step of the likelihood is no
    longer a small one.
    """
    if motion.spectrum is None or frames < 3:
        return None
    whole = max(motion.deviation) * pixel_size_angstrom
    side = [int(n * pixel_size_angstrom / _LEAST_PATCH_ANGSTROM) for n in shape]
    by_noise = int(_USEFUL_DEVIATION_ANGSTROM / max(whole, 1e-9))
    chosen = min(most[0], by_noise, side[0]), min(most[1], by_noise, side[1])
    return chosen if min(chosen) >= 2 else None


def informative_resolution(spectrum: Spectrum, frames: int) -> float:
    """Resolution, Angstrom, below which 95 % of the information on shifts lies, but no finer than 10 Angstrom."""
    ring = torch.arange(len(spectrum.ratio)) + 0.5
    strength = frames * spectrum.ratio.cpu()
    information = torch.cumsum(ring**3 * strength**2 / (1.0 + strength), 0)
    last = int((information < _INFORMATION_KEPT * information[-1]).sum()) + 1
    return max(_FINEST_ANGSTROM, 0.95 / (last * spectrum.width))


def crop_for_patches(transform: MovieTransform, motion: GlobalMotion, pixel_size_angstrom: float) -> MovieTransform:
    """The frames with only the frequencies that are informative about shifts."""
    assert motion.spectrum is not None
    return crop_transform(transform, informative_resolution(motion.spectrum, transform.values.shape[0]), pixel_size_angstrom)


def cut_patches(
    small: MovieTransform, motion: GlobalMotion, count: tuple[int, int], shape: tuple[int, int], pixel_size_angstrom: float
) -> Patches:
    """Cut the globally aligned frames into patches that overlap by half, as many as fit ``count`` side by side.

    The window is a sine, whose squares add up to 1 where patches overlap.
    """
    frames = small.values.shape[0]
    device = small.values.device
    rows, columns = small.size
    pixel = small.extent[0] / rows, small.extent[1] / columns  # pixels of the movie a pixel of the small image
    used = min(rows, math.floor(shape[0] / pixel[0])), min(columns, math.floor(shape[1] / pixel[1]))
    places = 2 * count[0] - 1, 2 * count[1] - 1
    size = tuple(min(smooth_size(math.ceil(u / c)), u - u % 2) for u, c in zip(used, count))
    starts = [np.round(np.linspace(0, u - s, p)).astype(int) for u, s, p in zip(used, size, places)]
    window = torch.sin(math.pi * (torch.arange(size[0], device=device) + 0.5) / size[0])[:, None] * torch.sin(
        math.pi * (torch.arange(size[1], device=device) + 0.5) / size[1]
    )
    along_y, along_x = phase_factors(torch.from_numpy(motion.shift).float().to(device), small)
    values = torch.empty(places[0] * places[1], frames, size[0], size[1] // 2 + 1, dtype=torch.complex64, device=device)
    power = torch.zeros(values.shape[0], *values.shape[2:], device=device)
    for f in range(frames):
        image = real_ifft2(small.values[f] * along_y[f] * along_x[f], small.size)
        cut = torch.stack([image[y : y + size[0], x : x + size[1]] for y in starts[0] for x in starts[1]])
        cut -= cut.mean((1, 2), keepdim=True)
        cut *= window
        spectrum = real_fft2(cut)
        values[:, f] = spectrum
        power += spectrum.real**2
        power += spectrum.imag**2
    fy = torch.fft.fftfreq(size[0], pixel[0], device=device)[:, None]
    fx = torch.fft.rfftfreq(size[1], pixel[1], device=device)[None]
    centre = np.array([(y + 0.5 * size[0], x + 0.5 * size[1]) for y in starts[0] for x in starts[1]])
    # white noise of power p a coefficient of the whole transform leaves irfft2 with variance p / (rows columns)
    scale = float((window**2).sum()) / (rows * columns)
    k = torch.sqrt(fy * fy + fx * fx) / pixel_size_angstrom
    return Patches(values, power, fy, fx, k, centre * np.array(pixel) - 0.5, scale)


def fit_local_motion(
    patches: Patches, motion: GlobalMotion, mean_count: np.ndarray, exposure: np.ndarray, pixel_size_angstrom: float, rounds: int = 3
) -> FittedField | None:
    """Local motion relative to the global one, Angstrom, as a field over positions in Angstrom.

    The first round uses frequencies below 1/12 A only, for its range of capture.

    Returns
    -------
    FittedField or None
        None if there is a still pattern, and the patches show less specimen when aligned along the field than without it.
    """
    assert motion.spectrum is not None
    count, frames = patches.values.shape[:2]
    share = np.clip(mean_count / max(float(np.median(mean_count)), 1e-12), 1e-3, None)
    priors = local_priors(exposure)
    positions = patches.centre * pixel_size_angstrom
    local = np.zeros((count, frames, 2))
    field: FittedField | None = None
    for turn in range(rounds):
        weight, ratio, noise = _patch_weights(patches, motion.spectrum, frames)
        if turn == 0:
            weight = weight * (patches.k < 1.0 / _COARSE_ANGSTROM)
        if motion.still is not None:
            weight = weight * (patches.k > 1.0 / LOWEST_ANGSTROM)
        information = weight * frames * ratio * noise
        slopes = [(2.0 * math.pi * f) ** 2 for f in (patches.fy, patches.fx)]
        curvature = np.array([float((information * slope).sum()) for slope in slopes])
        if curvature.min() <= 0.0:
            continue
        gradient, amount, error = _patch_gradients(patches, local, weight, ratio, noise, motion)
        # the signal powers have measurement errors, which dominate in movies with weak patches
        amount = np.clip(1.0 + (amount - 1.0) / (1.0 + (error / 0.5) ** 2), 0.01, 4.0)
        # a patch with less signal than average is less informative; one without signal must not count as "no motion"
        steady = np.maximum(amount, 0.1)
        place_factor = steady / np.maximum(amount, 0.01) ** 2
        step = gradient / curvature / steady[:, None, None] / np.maximum(share, 0.05)[:, None]
        variance = OVERLAP_VARIANCE * frames / curvature * pixel_size_angstrom**2
        measured = (local + step) * pixel_size_angstrom
        field = fit_field(
            measured, (float(variance[0]), float(variance[1])), place_factor, 1.0 / share, positions, LENGTHS_ANGSTROM, priors
        )
        local = field.at(positions) / pixel_size_angstrom
    assert field is not None
    if motion.still is None:
        return field
    # the pattern is allowed for only in the mean: what remains of a strong one may lead astray
    weight, ratio, noise = _patch_weights(patches, motion.spectrum, frames)
    weight = weight * (patches.k > 1.0 / LOWEST_ANGSTROM)
    with_field, without = (_patch_gradients(patches, at, weight, ratio, noise, motion)[1].sum() for at in (local, np.zeros_like(local)))
    return field if with_field > without else None


def _patch_weights(patches: Patches, spectrum: Spectrum, frames: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, signal-to-noise ratio and noise power of every coefficient of a patch."""
    ratio, noise = spectrum.on(patches.k)
    noise = noise * patches.power_scale
    twice = torch.full_like(patches.k, 2.0)
    twice[:, 0] = 1.0
    strength = frames * ratio
    return strength / (1.0 + strength) / noise * twice * (patches.k > 1.0 / _LOWEST_ANGSTROM), ratio, noise


def _patch_gradients(
    patches: Patches, local: np.ndarray, weight: Tensor, ratio: Tensor, noise: Tensor, motion: GlobalMotion
) -> tuple[np.ndarray, np.ndarray, float]:
    """Gradients `(patch, frame, 2)` about the displacements ``local``, each patch's signal power relative to the movie's, and its error."""
    count, frames = patches.values.shape[:2]
    device = patches.values.device
    # only rows and columns that carry weight: in the coarse round a quarter of the numbers or less
    rows = (weight.sum(1) > 0).nonzero()[:, 0]
    columns = int((weight.sum(0) > 0).nonzero()[-1]) + 1
    weight, ratio, noise = (t[rows, :columns].contiguous() for t in (weight, ratio, noise))
    wy, wx = 2.0 * math.pi * patches.fy[rows], 2.0 * math.pi * patches.fx[:, :columns]
    all_rows = len(rows) == patches.values.shape[2]
    one = torch.ones((), device=device)
    shift = torch.from_numpy(local).float().to(device)
    expected = weight * ratio
    expected_total = float((expected * frames * (frames - 1) * ratio * noise).sum(dtype=torch.float64))
    gradient = np.empty((count, frames, 2))
    amount = np.empty(count)
    slopes = torch.stack([torch.ones_like(wx[0]), wx[0]], 1)
    whole = torch.from_numpy(motion.shift).float().to(device)
    still = 0.0 if motion.still is None else motion.still.power * patches.power_scale
    for p in range(count):
        along_y = torch.polar(one, shift[p, :, :1] * wy[:, 0])
        along_x = torch.polar(one, shift[p, :, 1:] * wx[0])
        values = patches.values[p, :, :, :columns] if all_rows else patches.values[p][:, rows, :columns]
        moved = values * along_y[:, :, None]
        moved *= along_x[:, None, :]
        total = moved[0].clone()
        for f in range(1, frames):
            total += moved[f]
        power = patches.power[p][rows, :columns]
        held = None
        if motion.still is not None:
            # a pattern that stands still moves against the frames' alignment
            back = shift[p] + whole
            held = torch.polar(one, back[:, :1] * wy[:, 0])[:, :, None] * torch.polar(one, back[:, 1:] * wx[0])[:, None, :]
            sum_held = held.sum(0)
            power = power + still * (sum_held.abs() ** 2 - frames)
            held *= torch.conj(sum_held) * (weight * still)
        moved *= torch.conj(total) * weight
        if held is not None:
            moved -= held
        projected = moved.imag @ slopes  # (frame, row, 2)
        gradient[p, :, 0] = -(projected[:, :, 0] @ wy[:, 0]).double().cpu().numpy()
        gradient[p, :, 1] = -projected[:, :, 1].sum(1).double().cpu().numpy()
        amount[p] = float((expected * (total.abs() ** 2 - power)).sum()) / max(expected_total, 1e-30)
    spread = float((expected**2 * 2.0 * frames * (frames - 1) * (noise * (1.0 + ratio)) ** 2).sum(dtype=torch.float64))
    return gradient, amount, math.sqrt(spread) / max(expected_total, 1e-30)
