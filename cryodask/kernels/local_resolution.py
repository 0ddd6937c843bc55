"""Local resolution of half-maps, and filters based on it; agreement of half-maps by direction.

Both half-maps are cut into bands of Fourier shells; in each band they are correlated in a Gaussian window about every voxel. The local
resolution is where that correlation first falls below a threshold. A few FFTs per band suffice, at a cost independent of the window
(that of Cardone et al. 2013, J. Struct. Biol. 184, 226, here by convolution). Windows of 30 Angstrom blur changes of resolution: near
boundaries the better-resolved part leaks 10 to 15 Angstrom into the poorer one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cryodask.kernels.fsc import half_radius
from cryodask.kernels.orientations import directions, healpix_angles

_BAND_SD_SHELLS = 2.0
_BAND_STEP = 2
_FIRST_SHELL = 4
_WAVELENGTHS = 2.5


@dataclass(frozen=True)
class Bands:
    """Bands of shells: their centres, and the Fourier radius of each point of a real FFT."""

    box: int
    voxel_angstrom: float
    shells: tuple[int, ...]
    radius: Tensor

    @classmethod
    def of(cls, volume: Tensor, voxel_angstrom: float) -> Bands:
        """Every second shell from the fourth to Nyquist."""
        box = volume.shape[-1]
        return cls(box, voxel_angstrom, tuple(range(_FIRST_SHELL, box // 2, _BAND_STEP)), half_radius(box, volume.device))

    def window(self, shell: int, least_angstrom: float) -> Tensor:
        """Transform of the Gaussian window of a band, whose full width at half maximum is at least 2.5 wavelengths."""
        width = max(least_angstrom, _WAVELENGTHS * self.box * self.voxel_angstrom / shell) / 2.355 / self.voxel_angstrom
        return torch.exp(-2.0 * (math.pi * width * self.radius / self.box) ** 2)

    def band(self, shell: int) -> Tensor:
        """Weight of a band at each point of the FFT."""
        return torch.exp(-0.5 * ((self.radius - shell) / _BAND_SD_SHELLS) ** 2)


def _blurred(volume: Tensor, window: Tensor) -> Tensor:
    return torch.fft.irfftn(torch.fft.rfftn(volume) * window, s=volume.shape)


def local_correlations(first: Tensor, second: Tensor, bands: Bands, window_angstrom: float) -> Iterator[tuple[int, Tensor]]:
    """Correlation of two half-maps `(z, y, x)` in the window about each voxel, band by band."""
    transforms = torch.fft.rfftn(first), torch.fft.rfftn(second)
    for shell in bands.shells:
        a, b = (torch.fft.irfftn(t * bands.band(shell), s=first.shape) for t in transforms)
        window = bands.window(shell, window_angstrom)
        power = _blurred(a * a, window).clamp(min=0.0) * _blurred(b * b, window).clamp(min=0.0)
        yield shell, _blurred(a * b, window) / power.sqrt().clamp(min=1e-20)


def local_resolution(
    first: Tensor, second: Tensor, voxel_angstrom: float, *, window_angstrom: float = 30.0, threshold: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Resolution at each voxel, Angstrom, and the mean of the half-maps filtered accordingly, both `(z, y, x)` float32.

    Parameters
    ----------
    first, second : Tensor, `(z, y, x)`
        Unmasked, unfiltered half-maps.
    window_angstrom : float
        Full width at half maximum of the window, at least 2.5 wavelengths of each band.
    threshold : float
        Correlation below which a band is not resolved.

    Notes
    -----
    The filter weights each band by sqrt(2 c / (1 + c)), c the local correlation, and by zero beyond the local resolution.
    """
    bands = Bands.of(first, voxel_angstrom)
    length = bands.box * voxel_angstrom
    resolution = torch.zeros_like(first)
    resolved = torch.ones_like(first, dtype=torch.bool)
    before = torch.ones_like(first)
    mean = torch.fft.rfftn(0.5 * (first + second))
    total = sum((bands.band(shell) for shell in bands.shells), torch.zeros_like(bands.radius))
    # everything below the first band is kept
    filtered = torch.fft.irfftn(mean * (bands.radius < _FIRST_SHELL) * 1.0, s=first.shape)
    share = torch.where(bands.radius >= _FIRST_SHELL, 1.0 / total.clamp(min=1e-6), 0.0)
    for shell, correlation in local_correlations(first, second, bands, window_angstrom):
        fallen = resolved & (correlation < threshold)
        part = ((before - threshold) / (before - correlation).clamp(min=1e-6)).clamp(0.0, 1.0)
        at = shell - _BAND_STEP * (1.0 - part) if shell > _FIRST_SHELL else torch.full_like(part, float(shell))
        resolution = torch.where(fallen, length / at, resolution)
        resolved &= ~fallen
        before = correlation
        weight = torch.where(resolved, torch.sqrt(2.0 * correlation.clamp(0.0, 1.0) / (1.0 + correlation.clamp(0.0, 1.0))), 0.0)
        filtered += weight * torch.fft.irfftn(mean * bands.band(shell) * share, s=first.shape)
    return torch.where(resolved, torch.full_like(first, length / bands.shells[-1]), resolution), filtered


def locally_sharpened(filtered: Tensor, voxel_angstrom: float, mask: Tensor, window_angstrom: float = 30.0) -> Tensor:
    """A locally filtered map `(z, y, x)` in which each band has its average amplitude in the mask everywhere.

    Where a band is weaker than the average of the mask it is amplified, four times at most, so that peripheral parts show their detail;
    what the filter removed stays removed (the idea of LocScale, Jakobi et al. 2017, with the map's own average as reference, not a model).
    """
    bands = Bands.of(filtered, voxel_angstrom)
    spectrum = torch.fft.rfftn(filtered)
    total = sum((bands.band(shell) for shell in bands.shells), torch.zeros_like(bands.radius))
    out = torch.fft.irfftn(spectrum * (bands.radius < _FIRST_SHELL) * 1.0, s=filtered.shape)
    share = torch.where(bands.radius >= _FIRST_SHELL, 1.0 / total.clamp(min=1e-6), 0.0)
    for shell in bands.shells:
        band = torch.fft.irfftn(spectrum * bands.band(shell) * share, s=filtered.shape)
        strength = _blurred(band * band, bands.window(shell, window_angstrom)).clamp(min=0.0).sqrt()
        average = float((strength * mask).sum() / mask.sum().clamp(min=1e-6))
        out += band * (average / strength.clamp(min=max(1e-20, 0.25 * average)))
    return out


# --- directions -----------------------------------------------------------------------------------------------------------------
def cone_axes() -> np.ndarray:
    """Unit vectors `(axis, 3)` (x, y, z) over the half sphere, 104 of the 192 HEALPix pixels of order 2."""
    axes = directions(*healpix_angles(2))
    return np.asarray(axes[axes[:, 2] > -1e-9])


def cone_fsc(first: Tensor, second: Tensor, *, half_angle_deg: float = 20.0) -> np.ndarray:
    """FSC of two maps `(z, y, x)` in cones about :func:`cone_axes`, `(axis, shell)` float64 up to Nyquist."""
    box = first.shape[-1]
    a, b = torch.fft.rfftn(first), torch.fft.rfftn(second)
    k = torch.fft.fftfreq(box, 1.0 / box, device=first.device)
    z, y, x = torch.meshgrid(k, k, torch.arange(box // 2 + 1, device=first.device).float(), indexing="ij")
    radius = torch.sqrt(x * x + y * y + z * z)
    keep = (radius > 0.5) & (radius < box // 2 + 0.5)
    unit = torch.stack([x[keep], y[keep], z[keep]], -1) / radius[keep][:, None]
    shell, a, b = radius[keep].round().long(), a[keep], b[keep]
    sums = (a * b.conj()).real.double(), a.abs().double().square(), b.abs().double().square()
    limit, out = math.cos(math.radians(half_angle_deg)), []
    for axis in cone_axes():
        inside = (unit @ torch.from_numpy(axis).to(unit)).abs() > limit
        cross, own, theirs = (torch.bincount(shell[inside], values[inside], box // 2 + 1) for values in sums)
        out.append((cross / torch.sqrt(own * theirs).clamp(min=1e-30)).cpu().numpy())
    return np.array(out)


def cone_resolutions(curves: np.ndarray, length_angstrom: float, *, first_shell: int = 5) -> np.ndarray:
    """Where each cone's FSC first falls below 0.143, Angstrom `(axis,)`; cones have too few points in the first shells."""
    low = curves[:, first_shell:] < 0.143
    last = np.where(low.any(1), low.argmax(1), low.shape[1]) + first_shell - 1
    return np.asarray(length_angstrom / np.maximum(last, first_shell - 1))


def cone_area_ratio(curves: np.ndarray, *, first_shell: int = 5) -> float:
    """Smallest over largest area under the conical FSC curves (cFAR), 1 for agreement that is the same in all directions."""
    low = np.flatnonzero(np.median(curves, 0)[first_shell:] < 0.05)
    last = int(low[0]) + first_shell if len(low) else curves.shape[1]
    area = np.clip(curves[:, first_shell : max(last, first_shell + 3)], 0.0, 1.0).sum(1)
    return float(area.min() / max(area.max(), 1e-9))


def sampling(rotations: np.ndarray) -> tuple[float, float]:
    """How evenly views sample Fourier space: (harmonic mean over directions, share of directions that no view reaches).

    ``rotations`` `(n, 3, 3)`, map to image. A view along v contributes to the directions perpendicular to it; the sampling of a direction
    is 1 on average. The harmonic mean is 1 for uniform views (the idea of the SCF of Baldwin & Lyumkis 2020).
    """
    views = rotations[:, 2]
    axes = directions(*healpix_angles(3))
    width = 1.0 / 16.0
    reached = np.concatenate([(np.abs(some @ views.T) < width).mean(1) for some in np.array_split(axes, 8)]) / width
    return float(1.0 / np.mean(1.0 / np.maximum(reached, 0.02))), float((reached < 0.05).mean())
