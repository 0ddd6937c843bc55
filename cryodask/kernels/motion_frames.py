"""From raw counts to the input of motion estimation: defects, binned frames, their transforms at low resolution.

Frames come one by one and are never all held as floating point: binning sums counts, so white noise stays white and no transform
of full size is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.ndimage
import torch
from torch import Tensor

from cryodask.kernels.fourier import real_fft2, smooth_size

HOT_SIGMA = 6.0
_WIDE = 5
_REPAIR_REACH = _WIDE // 2
_FRAMES_TO_COMPARE = 16
_LEAST_OPEN = 0.05
_DEAD_BELOW = 20.0
"""A pixel without counts is dead where at least this many were expected (chance 2e-9)."""
_BAND_ROWS = 512


@dataclass(frozen=True)
class Survey:
    """One pass over a movie: ``total`` `(y, x)` sum of counts, ``binned`` `(group, h, w)` counts, ``mean_count`` `(frame,)`."""

    total: Tensor
    binned: Tensor
    mean_count: np.ndarray


def survey(read: Callable[[int], Tensor], frames: int, shape: tuple[int, int], binning: int, group: int) -> Survey:
    """Sum all frames, and bin them by ``binning`` pixels and ``group`` frames.

    Parameters
    ----------
    read : callable ``index -> (y, x)`` Tensor
        Raw counts of a frame, any real type.
    """
    height, width = shape
    h, w = height // binning, width // binning
    total: Tensor | None = None
    binned: Tensor | None = None
    means = np.zeros(frames)
    for f in range(frames):
        frame = read(f)
        small = frame.dtype in (torch.uint8, torch.int8)
        if total is None or binned is None:
            exact = torch.int32 if small else torch.float32
            total = torch.zeros(shape, dtype=torch.int16 if small and frames <= 128 else exact, device=frame.device)
            short = small and group * binning**2 * 255 < 2**15
            groups = (frames + group - 1) // group
            binned = torch.zeros(groups, h, w, dtype=torch.int16 if short else exact, device=frame.device)
        total += frame.to(total.dtype)  # adding mixed dtypes is three times slower
        rows = frame[0 : h * binning : binning].to(binned.dtype)
        for i in range(1, binning):
            rows += frame[i : h * binning : binning]
        target = binned[f // group]
        before = float(target.float().mean()) if group > 1 else 0.0
        for j in range(binning):
            target += rows[:, j : w * binning : binning]
        means[f] = (float(target.float().mean()) - before) / binning**2
    assert total is not None
    assert binned is not None
    return Survey(total, binned, means)


def find_defects(total: Tensor, gain: Tensor | None) -> Tensor:
    """Mask `(y, x)` of defect pixels: gain 0, hot (6 standard deviations above the mean), or dead.

    ``total`` is the unaligned sum of counts of the movie.
    """

    def corrected(rows: slice) -> Tensor:
        return total[rows].float() if gain is None else total[rows] * gain[rows]

    some = corrected(slice(None, None, 4))
    mean, deviation = _level(some, float("inf"))
    # very hot pixels widen the distribution: repeat without them
    mean, deviation = _level(some, mean + HOT_SIGMA * deviation)
    del some
    mask = torch.empty(total.shape, dtype=torch.bool, device=total.device)
    for rows in _bands(total.shape[0], _BAND_ROWS):  # float copies of a whole super-resolution frame would be the peak of the stage
        part = corrected(rows) > mean + HOT_SIGMA * deviation
        if gain is not None:
            part |= gain[rows] <= 0
        if mean > _DEAD_BELOW:
            part |= total[rows] == 0
        mask[rows] = part
    return mask


def _bands(height: int, rows: int) -> list[slice]:
    return [slice(y, min(height, y + rows)) for y in range(0, height, rows)]


def _level(values: Tensor, limit: float) -> tuple[float, float]:
    """Mean and standard deviation of the values up to ``limit``."""
    kept = values <= limit
    count = max(int(kept.sum()), 1)
    below = torch.where(kept, values, torch.zeros((), device=values.device))
    mean = float(below.sum(dtype=torch.float64)) / count
    centred = below.sub_(mean).masked_fill_(~kept, 0.0)
    return mean, math.sqrt(float(centred.square_().sum(dtype=torch.float64)) / count)


@dataclass(frozen=True)
class Repair:
    """Defects and good pixels that can replace them: flat indices `(defect,)`, candidates `(defect, 24)`, their number."""

    pixels: np.ndarray
    candidates: np.ndarray
    counts: np.ndarray


def plan_repair(mask: np.ndarray) -> Repair:
    """Candidates of every defect: the good pixels within two rows and columns. Defects without any are left unchanged."""
    height, width = mask.shape
    y, x = np.nonzero(mask)
    step = np.array([(a, b) for a in range(-2, 3) for b in range(-2, 3) if a or b])
    cy, cx = y[:, None] + step[:, 0], x[:, None] + step[:, 1]
    good = (cy >= 0) & (cy < height) & (cx >= 0) & (cx < width)
    good[good] = ~mask[cy[good], cx[good]]
    flat = np.where(good, cy * width + cx, 0)
    order = np.argsort(~good, axis=1, kind="stable")
    counts = good.sum(1)
    kept = counts > 0
    return Repair((y * width + x)[kept], np.take_along_axis(flat, order, 1)[kept], counts[kept])


def repair_frame(frame: Tensor, repair: Repair, index: int) -> None:
    """Replace every defect, in place, by the count of a random good neighbour, so that the noise stays Poisson.

    The draw depends on ``index`` only, so a frame read twice is repaired alike.
    """
    if not len(repair.pixels):
        return
    chosen = np.random.Generator(np.random.PCG64([index, 0x0DEF])).random(len(repair.pixels))
    source = repair.candidates[np.arange(len(repair.pixels)), (chosen * repair.counts).astype(int)]
    flat = frame.view(-1)
    flat[torch.from_numpy(repair.pixels).to(frame.device)] = flat[torch.from_numpy(source).to(frame.device)]


def bin_mask(mask: Tensor, binning: int) -> Tensor:
    """Bins that contain a masked pixel."""
    h, w = mask.shape[0] // binning, mask.shape[1] // binning
    return mask[: h * binning, : w * binning].reshape(h, binning, w, binning).any(3).any(1)


def bin_gain(gain: Tensor, mask: Tensor, binning: int) -> Tensor:
    """Gain of binned COUNTS: the bin's pixels over the sum of their sensitivities 1 / gain. Defects count as average."""
    h, w = gain.shape[0] // binning, gain.shape[1] // binning
    out = torch.empty(h, w, device=gain.device)
    one = torch.ones((), device=gain.device)
    for band in _bands(h, max(1, _BAND_ROWS // binning)):
        rows = slice(band.start * binning, band.stop * binning), slice(0, w * binning)
        sensitivity = 1.0 / torch.where(mask[rows] | (gain[rows] <= 0), one, gain[rows])
        out[band] = binning**2 / sensitivity.reshape(-1, binning, w, binning).sum((1, 3))
    return out


@dataclass(frozen=True)
class MovieTransform:
    """Transforms of binned frames, cropped to what alignment can use.

    ``values`` `(frame, row, column)` complex64, half planes, zero frequency first. ``fy`` `(row, 1)`, ``fx`` `(1, column)`:
    frequencies in cycles per PIXEL OF THE MOVIE, so that displacements are in those pixels. ``k`` 1/Angstrom. ``extent`` (y, x): pixels
    of the movie that the transform's period spans. ``size`` (rows, columns) of its real-space image.
    """

    values: Tensor
    fy: Tensor
    fx: Tensor
    k: Tensor
    extent: tuple[float, float]
    size: tuple[int, int]


def transform_frames(
    binned: Tensor, gain: Tensor | None, mask: Tensor, *, binning: int, pixel_size_angstrom: float, resolution_angstrom: float
) -> MovieTransform:
    """Transform binned counts and keep frequencies up to ``resolution_angstrom``.

    Parameters
    ----------
    binned : `(frame, h, w)`
        Counts; bins with defects (``mask``) are replaced by the counts of a neighbour.
    gain : `(h, w)`, optional
        From `bin_gain`.

    Notes
    -----
    The frame is tapered to its mean over 2 % at its border: a sharp border stands still while the specimen moves, and would pull
    every shift to zero. So would the border of a dead strip or a covered region, which no neighbour can replace: they are tapered alike.
    """
    frames, h, w = binned.shape
    device = binned.device
    repair = plan_repair(mask.cpu().numpy())
    rows, columns = smooth_size(h), smooth_size(w)
    extent = (float(rows * binning), float(columns * binning))
    keep = [min(smooth_size(math.ceil(2.0 * e * pixel_size_angstrom / resolution_angstrom)), n) for e, n in zip(extent, (rows, columns))]
    taper = _taper(h, device)[:, None] * _taper(w, device)[None]
    if (window := open_window(mask)) is not None:
        taper = taper * window
    weight = taper if gain is None else taper * gain
    half = keep[0] // 2
    values = torch.zeros(frames, keep[0], keep[1] // 2 + 1, dtype=torch.complex64, device=device)
    padded = torch.zeros(rows, columns, device=device)
    share = float(taper.mean())
    for f in range(frames):
        counts = binned[f]
        repair_frame(counts, repair, f)
        image = counts * weight
        padded[:h, :w] = image.sub_(taper * (float(image.mean(dtype=torch.float64)) / share))
        spectrum = real_fft2(padded)
        values[f, :half] = spectrum[:half, : keep[1] // 2 + 1]
        values[f, half + 1 :] = spectrum[rows - half + 1 :, : keep[1] // 2 + 1]
    values[:, :, -1] = 0.0
    values[:, 0, 0] = 0.0
    fy = torch.fft.fftfreq(keep[0], extent[0] / keep[0], device=device)[:, None]
    fx = torch.fft.rfftfreq(keep[1], extent[1] / keep[1], device=device)[None]
    return MovieTransform(values, fy, fx, torch.sqrt(fy * fy + fx * fx) / pixel_size_angstrom, extent, (keep[0], keep[1]))


def crop_transform(transform: MovieTransform, resolution_angstrom: float, pixel_size_angstrom: float) -> MovieTransform:
    """The same frames with fewer frequencies: those up to ``resolution_angstrom``. Values keep their scale."""
    keep = [
        min(smooth_size(math.ceil(2.0 * e * pixel_size_angstrom / resolution_angstrom)), n)
        for e, n in zip(transform.extent, transform.size)
    ]
    if tuple(keep) == transform.size:
        return transform
    half, columns = keep[0] // 2, keep[1] // 2 + 1
    rows = torch.cat([torch.arange(half), torch.arange(transform.size[0] - half, transform.size[0])]).to(transform.fy.device)
    values = transform.values[:, rows, :columns]
    values[:, half] = 0.0
    values[:, :, -1] = 0.0
    return MovieTransform(
        values, transform.fy[rows], transform.fx[:, :columns], transform.k[rows][:, :columns], transform.extent, (keep[0], keep[1])
    )


def open_window(mask: Tensor) -> Tensor | None:
    """Window `(h, w)` that falls to 0 at masked regions at least 5 bins wide; None if there are none, or nothing else.

    Narrower ones are replaced by the counts of their neighbours.
    """
    core = _core(mask)
    if not bool((core > 0).any()):
        return None
    distance = scipy.ndimage.distance_transform_edt((core == 0).cpu().numpy())
    edge = max(4, round(0.02 * min(mask.shape)))
    beyond = torch.from_numpy(np.clip((distance - _REPAIR_REACH - 0.5) / edge, 0.0, 1.0).astype(np.float32)).to(mask.device)
    window = 0.5 - 0.5 * torch.cos(math.pi * beyond)
    return window if float(window.mean()) > _LEAST_OPEN else None


def still_bins(binned: Tensor) -> Tensor:
    """Mask `(h, w)` of regions at least 5 bins wide that cannot show motion in `(frame, h, w)` counts.

    They have no counts where at least 20 were expected in 5 x 5 bins and all frames, or exactly the same number in each of at least 16.
    """
    total = binned.sum(0, dtype=torch.float32)
    mean = float(total.mean())
    still = (total == 0) & (_WIDE**2 * mean > _DEAD_BELOW)
    if len(binned) >= _FRAMES_TO_COMPARE and mean > 0.0:
        still |= (binned.amin(0) == binned.amax(0)) & (total > 0)
    # opened: a bin counts only within a whole square
    return _widened(_core(still)) > 0


def _core(mask: Tensor) -> Tensor:
    """Middles `(h, w)` of the masked squares of 5 x 5; beyond the border everything counts as masked."""
    return -torch.nn.functional.max_pool2d(-mask.float()[None, None], _WIDE, 1, _WIDE // 2)[0, 0]


def _widened(mask: Tensor) -> Tensor:
    return torch.nn.functional.max_pool2d(mask[None, None], _WIDE, 1, _WIDE // 2)[0, 0]


def _taper(n: int, device: torch.device) -> Tensor:
    edge = max(2, round(0.02 * n))
    distance = torch.minimum(torch.arange(n, device=device), torch.arange(n - 1, -1, -1, device=device)).float() + 0.5
    return 0.5 - 0.5 * torch.cos(math.pi * (distance / edge).clamp(max=1.0))
