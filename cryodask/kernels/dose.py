"""Exposure weighting of movie frames (Grant & Grigorieff 2015, eLife 4:e06980), at low rank.

The weights are a smooth matrix of (frame, frequency): four products of a frame's coefficient and a filter reproduce them to
0.4 % of the largest. So each frame is added to four sums in real space, and only the sums are Fourier transformed.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cryodask.kernels.fourier import real_fft2, real_ifft2, smooth_size
from cryodask.kernels.warp import response

RANK = 4
_BAND = 256


def critical_exposure(k: np.ndarray, voltage_kv: float = 300.0) -> np.ndarray:
    """Exposure after which the signal at frequency ``k`` (1/Angstrom) has fallen to 1/e in power, e/A^2.

    Measured at 300 kV; other voltages by 0.8 at 200 kV (Grant & Grigorieff 2015), along the line in 1/v^2 through these two
    (damage goes with the stopping power: 0.59 at 120 kV, 0.51 at 100 kV).
    """
    return _voltage_factor(voltage_kv) * (0.245 * np.maximum(k, 1e-4) ** -1.665 + 2.81)


def _voltage_factor(voltage_kv: float) -> float:
    def inverse_speed_squared(kv: float) -> float:
        gamma = 1.0 + kv / 510.99895
        return 1.0 / (1.0 - 1.0 / gamma**2)

    at_300, at_200 = inverse_speed_squared(300.0), inverse_speed_squared(200.0)
    slope = (1.0 / 0.8 - 1.0) / (at_200 - at_300)
    return 1.0 / (1.0 + slope * (inverse_speed_squared(voltage_kv) - at_300))


def amplitude_after_exposure(k: np.ndarray, exposure: np.ndarray, voltage_kv: float = 300.0) -> np.ndarray:
    """Remaining amplitude, exp(-N / (2 Ne)), `(frame, frequency)`; ``exposure`` `(frame,)` in e/A^2."""
    return np.exp(-0.5 * np.asarray(exposure)[:, None] / critical_exposure(np.asarray(k), voltage_kv)[None])


def dose_weights(k: np.ndarray, frames: int, dose_per_frame: float, pre_exposure: float = 0.0, voltage_kv: float = 300.0) -> np.ndarray:
    """Weights `(frame, frequency)` whose squares sum to 1 over the frames, so that the noise of the sum stays white.

    Each frame counts with its exposure at its END, as in RELION.
    """
    weights = amplitude_after_exposure(k, pre_exposure + (np.arange(frames) + 1) * dose_per_frame, voltage_kv)
    return weights / np.sqrt((weights**2).sum(0, keepdims=True))


def low_rank_weights(
    pixel_size_angstrom: float, frames: int, dose_per_frame: float, pre_exposure: float = 0.0, voltage_kv: float = 300.0, rank: int = RANK
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Factors of `dose_weights`: coefficients `(rank, frame)`, filters `(rank, frequency)` and the frequencies, 1/Angstrom.

    The first coefficients are all 1, so that the first sum is the plain one; the others are the best for the rest.
    """
    k = np.linspace(0.0, 0.7072 / pixel_size_angstrom, 2048)
    weights = dose_weights(k, frames, dose_per_frame, pre_exposure, voltage_kv)
    mean = weights.mean(0)
    u, s, vt = np.linalg.svd(weights - mean, full_matrices=False)
    kept = min(rank - 1, len(s) - 1)  # the rest has one rank less than the frames
    return np.concatenate([np.ones((1, frames)), (u[:, :kept] * s[:kept]).T]), np.concatenate([mean[None], vt[:kept]]), k


def empty_sums(rank: int, shape: tuple[int, int], device: torch.device | str = "cpu") -> list[Tensor]:
    """Zeros `(row, column)` for each sum, large enough for its transform: ``[:y, :x]`` is the image."""
    return [torch.zeros(smooth_size(shape[0]), smooth_size(shape[1]), device=device) for _ in range(rank)]


def filtered_sum(
    sums: list[Tensor], shape: tuple[int, int], filters: np.ndarray, k: np.ndarray, pixel_size_angstrom: float, *, step: int = 1
) -> Tensor:
    """Sum over r of ``sums[r]`` filtered with ``filters[r]``: the dose-weighted image.

    Parameters
    ----------
    sums : list of `(row, column)` float32
        From `empty_sums`. Consumed: each is freed as soon as it is transformed.
    shape : (y, x)
        Of the image in each.
    filters : `(rank, frequency)` at the equally spaced frequencies ``k``, 1/Angstrom
    step : int
        Every ``step``-th pixel of the frames was read: the response of that is divided out.

    Returns
    -------
    Tensor, `(y, x)` float32
    """
    rows, columns = sums[0].shape
    device = sums[0].device
    ky = torch.fft.fftfreq(rows, pixel_size_angstrom, device=device)[:, None]
    kx = torch.fft.rfftfreq(columns, pixel_size_angstrom, device=device)[None]
    scale = float((len(k) - 1) / k[-1])
    table = torch.from_numpy(np.ascontiguousarray(filters, np.float32)).to(device)
    total: Tensor | None = None
    for r in range(len(filters)):
        padded = _padded(sums.pop(0), shape)
        spectrum = real_fft2(padded)
        del padded
        for first in range(0, rows, _BAND):  # an index for all rows would be as large as a sum
            band = slice(first, first + _BAND)
            index = (torch.sqrt(ky[band] ** 2 + kx * kx) * scale).round_().to(torch.int32).clamp_(max=len(k) - 1)
            spectrum[band] *= torch.index_select(table[r], 0, index.view(-1)).view(index.shape)
        total = spectrum if total is None else total.add_(spectrum)
        del spectrum
    assert total is not None
    _divide_response(total, columns, step)
    return real_ifft2(total, (rows, columns), overwrite=True)[: shape[0], : shape[1]].contiguous()


def flattened(sum_: Tensor, shape: tuple[int, int], step: int) -> Tensor:
    """The image `(y, x)` in a sum of `empty_sums`, without the response of reading every ``step``-th pixel; consumes the sum."""
    rows, columns = sum_.shape
    spectrum = real_fft2(_padded(sum_, shape))
    _divide_response(spectrum, columns, step)
    return real_ifft2(spectrum, (rows, columns), overwrite=True)[: shape[0], : shape[1]].contiguous()


def _padded(sum_: Tensor, shape: tuple[int, int]) -> Tensor:
    """A sum whose pixels beyond the image are copies of its border, so that any size with small factors will do."""
    height, width = shape
    sum_[:height, width:] = sum_[:height, width - 1 : width]
    sum_[height:] = sum_[height - 1]
    return sum_


def _divide_response(spectrum: Tensor, columns: int, step: int) -> None:
    if step == 1:
        return
    spectrum /= response(torch.fft.fftfreq(spectrum.shape[0], device=spectrum.device), step)[:, None]
    spectrum /= response(torch.fft.rfftfreq(columns, device=spectrum.device), step)
