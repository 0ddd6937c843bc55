"""Power spectrum of a micrograph by Welch's method: mean over windowed, overlapping tiles."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Spectrum(NamedTuple):
    """Half plane of a power spectrum, `(2 h, h + 1)`: rows 0 .. h-1, -h .. -1, columns 0 .. h, in steps of ``step`` 1/Angstrom."""

    power: Tensor
    step: float
    tiles: int

    @property
    def largest_frequency(self) -> float:
        """Of the axes, 1/Angstrom."""
        return (self.power.shape[1] - 1) * self.step


def fast_even_size(size: float) -> int:
    """Smallest even number from ``size`` on whose only prime factors are 2, 3 and 5."""
    n = max(2, math.ceil(size))
    while True:
        rest = n
        for p in (2, 3, 5):
            while rest % p == 0:
                rest //= p
        if rest == 1 and n % 2 == 0:
            return n
        n += 1


def power_spectrum(image: Tensor, *, pixel_size_angstrom: float, tile_angstrom: float, finest_angstrom: float) -> Spectrum:
    """Mean power of half-overlapping tiles under a sine window.

    Parameters
    ----------
    image : Tensor, `(y, x)`, float32
    tile_angstrom : float
        Edge of a tile; frequencies come in steps of its inverse. Limited by the size of the image.
    finest_angstrom : float
        The spectrum is cut at this resolution, or at Nyquist.

    Returns
    -------
    Spectrum
        Square of the modulus of the DFT of a windowed tile of mean zero; the zero frequency is at [0, 0].
    """
    height, width = image.shape
    side = min(height, width)
    n = fast_even_size(tile_angstrom / pixel_size_angstrom)
    if side < 3 * n:
        # a few tiles of a small image would omit its borders, a large fraction, from the mean: use one large tile with a steep edge
        n = next(m for m in range(side, 0, -1) if fast_even_size(m) == m)
        ramp = n / 10.0
    else:
        ramp = n / 2.0
    position = torch.arange(n, device=image.device) + 0.5
    window = torch.sin(0.5 * math.pi * (torch.minimum(position, n - position) / ramp).clamp(max=1.0))
    window = window[:, None] * window[None]
    half = min(n // 2, round(n * pixel_size_angstrom / finest_angstrom))
    rows, columns = _starts(height, n), _starts(width, n)
    power = torch.zeros(2 * half, half + 1, device=image.device)
    for y in rows:
        # one row of tiles at a time: memory stays at a few tiles, the FFTs still come in batches
        strip = image[y : y + n].unfold(1, n, 1)[:, columns].transpose(0, 1)
        tiles = (strip - strip.mean(dim=(1, 2), keepdim=True)) * window
        transform = torch.fft.rfft2(tiles)[:, :, : half + 1]
        for part, rows_of in ((transform[:, :half], slice(0, half)), (transform[:, n - half :], slice(half, None))):
            power[rows_of] += (part.real**2 + part.imag**2).sum(0)
    count = len(rows) * len(columns)
    return Spectrum(power / count, 1.0 / (n * pixel_size_angstrom), count)


def cropped(spectrum: Spectrum, finest_angstrom: float) -> Spectrum:
    """The same spectrum up to ``finest_angstrom``, as `power_spectrum` would have cut it."""
    old = spectrum.power.shape[1] - 1
    half = min(old, round(1.0 / (spectrum.step * finest_angstrom)))
    if half == old:
        return spectrum
    rows = torch.cat([spectrum.power[:half], spectrum.power[2 * old - half :]])
    return spectrum._replace(power=rows[:, : half + 1].contiguous())


def _starts(length: int, tile: int) -> list[int]:
    """First pixels of tiles that overlap by half or a little more and reach both edges."""
    count = max(1, math.ceil((length - tile) / (tile / 2)) + 1) if length > tile else 1
    if count == 1:
        return [0]
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def spectrum_of_amplitudes(amplitude: Tensor, step: float) -> Spectrum:
    """Half plane of the power of a full square amplitude spectrum `(n, n)` with zero frequency at n // 2, ``step`` 1/Angstrom per pixel."""
    n = amplitude.shape[0]
    half = n // 2
    power = torch.fft.ifftshift(amplitude).float() ** 2
    return Spectrum(power[:, : half + 1].contiguous(), step, 1)


def log_power_image(spectrum: Spectrum, size: int, largest_k: float) -> Tensor:
    """Full plane of the log power `(size, size)` for display, zero frequency at size // 2, ``largest_k`` (1/Angstrom) at the edge.

    The mean over directions, smoothed over a tenth of the range, is subtracted, and everything within 1/60 A of the centre is set to 0.
    """
    half = spectrum.power.shape[1] - 1
    log_power = torch.log(spectrum.power.clamp(min=1e-30)).float()
    full = torch.empty(2 * half, 2 * half, device=log_power.device)
    full[:, half:] = torch.roll(log_power, half, 0)[:, :half]
    # P(-k) = P(k)
    full[:, :half] = torch.roll(torch.roll(log_power, half, 0).flip(0), 1, 0)[:, 1:].flip(1)
    index = torch.arange(2 * half, device=full.device) - half
    radius = torch.sqrt((index[:, None] ** 2 + index[None] ** 2).float())
    ring = radius.round().long().clamp(max=half)
    count = torch.bincount(ring.reshape(-1), minlength=half + 1)
    mean = torch.bincount(ring.reshape(-1), full.reshape(-1), minlength=half + 1) / count
    width = max(3, half // 10 * 2 + 1)
    smooth = torch.nn.functional.avg_pool1d(mean[None, None], width, 1, width // 2, count_include_pad=False)[0, 0]
    flat = torch.where(radius * spectrum.step < 1 / 60.0, 0.0, full - smooth[ring])
    shrink = max(1, round(2 * half * min(1.0, largest_k / spectrum.largest_frequency) / size))
    blur = 2 * shrink + 1
    if blur < 2 * half:
        flat = torch.nn.functional.avg_pool2d(flat[None, None], blur, 1, blur // 2, count_include_pad=False)[0, 0]
    # pixel of the image -> pixel of the plane, in the units of grid_sample with aligned corners
    k = (torch.arange(size, device=full.device) - size // 2) / (size // 2) * largest_k / spectrum.step
    place = (k + half) / (2 * half - 1) * 2.0 - 1.0
    grid = torch.stack(torch.meshgrid(place, place, indexing="ij")[::-1], -1)
    return torch.nn.functional.grid_sample(flat[None, None], grid[None], align_corners=True, padding_mode="border")[0, 0]
