"""Small 8-bit pictures of a micrograph, made while it is in memory: what people look at without reading the micrograph itself."""

from __future__ import annotations

import numpy as np

LONGEST_SIDE_PX = 1024
SPECTRUM_PX = 256
_TILES = 36
"""Number of tiles of which the spectrum is the mean: enough to see the rings of a dim exposure at a hundredth of the cost of the stage."""
_SIGMAS = 4.0


def preview_shape(height: int, width: int) -> tuple[int, int]:
    """Rows and columns of the preview of a micrograph."""
    step = -(-max(height, width) // LONGEST_SIDE_PX)
    return height // step, width // step


def preview(micrograph: np.ndarray) -> np.ndarray:
    """Preview of a micrograph and of its power spectrum.

    Parameters
    ----------
    micrograph : ndarray, `(y, x)`, float32

    Returns
    -------
    ndarray, `(2, preview_y, preview_x)`, uint8
        The micrograph, averaged until its longest side has at most 1024 pixels, from 4 standard deviations below its mean (0) to 4 above
        (255); and in the first `min(256, preview_y, preview_x)` rows and columns of the second picture the logarithm of its power
        spectrum, zero frequency at `n // 2`, from its 1st (0) to its 99.8th percentile (255). The rest is 0.
    """
    height, width = preview_shape(*micrograph.shape)
    step = -(-max(micrograph.shape) // LONGEST_SIDE_PX)
    small = micrograph[: height * step, : width * step]
    if step > 1:
        small = small.reshape(height, step, width * step).sum(1).reshape(height, width, step).sum(2)
    out = np.zeros((2, height, width), np.uint8)
    mean, deviation = float(small.mean()), float(small.std())
    # the last bit is noise that nobody sees, and an eighth of the file
    out[0] = _bytes(small, mean - _SIGMAS * deviation, mean + _SIGMAS * deviation) & 0xFE
    side = min(SPECTRUM_PX, height, width)
    out[1, :side, :side] = _spectrum(micrograph, side)
    return out


def spectrum_of(preview: np.ndarray) -> np.ndarray:
    """The power spectrum `(n, n)` in a preview."""
    side = min(SPECTRUM_PX, *preview.shape[1:])
    return preview[1, :side, :side]


def _spectrum(micrograph: np.ndarray, side: int) -> np.ndarray:
    height, width = micrograph.shape
    down, across = (min(int(_TILES**0.5), n // side) for n in (height, width))
    power = np.zeros((side, side // 2 + 1), np.float32)
    for y in np.linspace(0, height - side, down).astype(int):
        for x in np.linspace(0, width - side, across).astype(int):
            tile = micrograph[y : y + side, x : x + side]
            transform = np.fft.rfft2(tile - tile.mean(dtype=np.float32))
            power += transform.real**2 + transform.imag**2
    power[0, 0] = power[0, 1]
    half = np.fft.fftshift(np.log(power + np.float32(1e-20)), axes=0)
    low, high = np.percentile(half, (1, 99.8))
    picture = _bytes(half, float(low), float(high))
    # the other half is the same by symmetry: (-ky, -kx) has the power of (ky, kx)
    whole = np.empty((side, side), np.uint8)
    middle = side // 2
    whole[:, middle:] = picture[:, : side - middle]
    mirrored = np.roll(picture[::-1], 1 if side % 2 == 0 else 0, axis=0)
    whole[:, :middle] = mirrored[:, middle:0:-1]
    return whole


def _bytes(values: np.ndarray, low: float, high: float) -> np.ndarray:
    scale = np.float32(255.0 / (high - low)) if high > low else np.float32(0.0)
    return np.clip((values - np.float32(low)) * scale, 0, 255).astype(np.uint8)
