"""Central slices of a map, their insertion into a Fourier grid, and the way back to a map.

Units: a slice is the two-dimensional transform, divided by the box size n, of the plain sum of voxels along the view; white noise of
variance s2 per pixel then has E|N_k|^2 = s2. Fourier frequencies are integers k (cycles per box), so maps of any box that span the same
length give the same slices: a map with an edge of b voxels contains all of a map of n voxels below k = b/2.

Maps are zero-padded before their transform (factor 2: trilinear slices within 3 % of the exact transform) and divided by the
transform of the trilinear kernel. Conventions were checked against relion_project 3.1.3.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from cryodask.kernels.symmetry import symmetrise_grid

PADDING = 2


@dataclass(frozen=True)
class HalfPlane:
    """Integer frequencies 0 < |k| <= radius of half an image's transform, row by row (neighbours in memory stay neighbours).

    ``ky, kx, shell`` are int64 `(pixel,)`; the other half follows from X(-k) = conj X(k).
    """

    radius: int
    ky: Tensor
    kx: Tensor
    shell: Tensor


@lru_cache(maxsize=64)
def half_plane(radius: int, device: str = "cpu") -> HalfPlane:
    """The half plane {kx > 0} or {kx = 0, ky > 0} within ``radius``."""
    k = torch.arange(-radius, radius + 1)
    ky, kx = torch.meshgrid(k, torch.arange(radius + 1), indexing="ij")
    length = torch.sqrt((ky * ky + kx * kx).double())
    inside = (length <= radius) & ((kx > 0) | (ky > 0))
    return HalfPlane(radius, *(t[inside].to(device) for t in (ky, kx, torch.round(length).long())))


@lru_cache(maxsize=64)
def pixels_within(radius: int, smaller: int, device: str = "cpu") -> Tensor:
    """Where the pixels of ``half_plane(smaller)`` lie in ``half_plane(radius)``, in the same order."""
    plane = half_plane(radius)
    return torch.nonzero(plane.ky**2 + plane.kx**2 <= smaller * smaller)[:, 0].to(device)


def image_transforms(images: Tensor, radius: int) -> Tensor:
    """Transforms of images `(n, y, x)` (origin n // 2) on ``half_plane(radius)``: `(n, pixel)` complex64, DFT / box."""
    box = images.shape[-1]
    plane = half_plane(radius, str(images.device))
    spectrum = torch.fft.rfft2(torch.fft.ifftshift(images, dim=(-2, -1))) / box
    return spectrum[:, plane.ky % box, plane.kx]


def shift_phases(origin_px: Tensor, ky: Tensor, kx: Tensor, box: int) -> Tensor:
    """``exp(-2 pi i k.t / box)``, `(n, pixel)` complex64: moves images by ``origin_px`` `(n, 2)` (y, x)."""
    turns = (origin_px[:, :1] * ky + origin_px[:, 1:] * kx) * (-2.0 * np.pi / box)
    return torch.polar(torch.ones_like(turns), turns)


@dataclass(frozen=True)
class FourierVolume:
    """Padded transform of a map on the odd grid -half .. half: ``values`` `(voxel, 2)` (real, imaginary), x fastest."""

    values: Tensor
    half: int

    @property
    def side(self) -> int:
        """Number of points per edge."""
        return 2 * self.half + 1


def gridding_correction(box: int, device: torch.device | str = "cpu") -> Tensor:
    """Transform of the trilinear kernel over the map's box, `(z, y, x)`: sinc^2 along each axis."""
    x = (torch.arange(box, device=device) - box // 2).float() / (box * PADDING)
    s = torch.sinc(x) ** 2
    return s[:, None, None] * s[None, :, None] * s[None, None, :]


def grid_half(radius: int) -> int:
    """Half-width of the padded grid that serves frequencies up to ``radius``."""
    return radius * PADDING + 1


def fourier_volume(volume: Tensor, radius: int, image_box: int | None = None) -> FourierVolume:
    """Prepare a map for :func:`slices` up to ``radius``.

    Parameters
    ----------
    volume : Tensor, `(z, y, x)`, float32
        Even box b >= 2 (radius + 1), origin b // 2.
    image_box : int, optional
        Box n of the images whose grey values the slices shall have, spanning the same length as the map; by default b.
    """
    b = volume.shape[-1]
    n = image_box or b
    wide = torch.zeros((b * PADDING,) * 3, dtype=torch.float32, device=volume.device)
    start = b * PADDING // 2 - b // 2
    wide[start : start + b, start : start + b, start : start + b] = volume / gridding_correction(b, volume.device)
    spectrum = torch.fft.rfftn(torch.fft.ifftshift(wide)) * (n * n / b**3)
    half = min(grid_half(radius), b * PADDING // 2 - 1)
    k = torch.arange(-half, half + 1, device=volume.device) % (b * PADDING)
    right = spectrum[k][:, k][:, :, : half + 1]
    left = torch.flip(right[:, :, 1:], (0, 1, 2)).conj()
    grid = torch.cat([left, right], dim=2).to(torch.complex64)
    return FourierVolume(torch.view_as_real(grid).reshape(-1, 2).contiguous(), half)


def _corners(rotations: Tensor, ky: Tensor, kx: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """Flat index of the lower corner `(n * pixel,)` and the fractions `(3, n * pixel)` (x, y, z) of the slices' sample points."""
    plane = torch.stack([kx, ky]).float() * PADDING
    points = torch.einsum("kji,jp->ikp", rotations[:, :2, :].float(), plane).reshape(3, -1)
    floor = torch.floor(points)
    fraction = points - floor
    x, y, z = floor.long() + half
    side = 2 * half + 1
    return (z * side + y) * side + x, fraction


def slices(volume: FourierVolume, rotations: Tensor, ky: Tensor, kx: Tensor) -> Tensor:
    """Trilinear central slices `(n, pixel)` complex64 at rotations `(n, 3, 3)` and image frequencies ``ky, kx`` `(pixel,)`."""
    base, (x, y, z) = _corners(rotations, ky, kx, volume.half)
    side = volume.side
    out = torch.zeros(base.shape[0], 2, device=base.device)
    for dz in (0, 1):
        for dy in (0, 1):
            row = (z if dz else 1 - z) * (y if dy else 1 - y)
            for dx in (0, 1):
                weight = row * (x if dx else 1 - x)
                out += volume.values.index_select(0, base + ((dz * side + dy) * side + dx)) * weight[:, None]
    return torch.view_as_complex(out).reshape(rotations.shape[0], ky.shape[0])


def empty_accumulator(radius: int, device: torch.device | str = "cpu") -> Tensor:
    """Zeros `(3, voxel)`: real and imaginary part of the numerator, weight; flat odd grid for frequencies up to ``radius``."""
    return torch.zeros(3, (2 * grid_half(radius) + 1) ** 3, dtype=torch.float32, device=device)


def insert_slices(
    accumulator: Tensor, rotations: Tensor, ky: Tensor, kx: Tensor, numerator: Tensor, weight: Tensor, chunk: int = 64
) -> None:
    """Add slices to an accumulator, in place, spread over the eight grid points around each sample.

    Parameters
    ----------
    accumulator : Tensor, `(3, voxel)`
        Of :func:`empty_accumulator`.
    rotations : Tensor, `(n, 3, 3)`
    ky, kx : Tensor, `(pixel,)`
    numerator : Tensor, `(n, pixel)`, complex64
        CTF x transform / noise power, particle moved to the origin.
    weight : Tensor, `(n, pixel)`, float32
        CTF^2 / noise power.
    """
    side = round(accumulator.shape[1] ** (1 / 3))
    for a, num, den in zip(rotations.split(chunk), numerator.split(chunk), weight.split(chunk)):
        base, (x, y, z) = _corners(a, ky, kx, (side - 1) // 2)
        values = (num.real.reshape(-1), num.imag.reshape(-1), den.reshape(-1))
        for dz in (0, 1):
            for dy in (0, 1):
                row = (z if dz else 1 - z) * (y if dy else 1 - y)
                for dx in (0, 1):
                    share = row * (x if dx else 1 - x)
                    place = base + ((dz * side + dy) * side + dx)
                    for channel, value in zip(accumulator, values):
                        channel.index_add_(0, place, value * share)


def fold_accumulator(accumulator: Tensor) -> Tensor:
    """Add the Hermitian mates and drop the redundant half: `(3, voxel // 2 + 1)`, half the bytes to move."""
    mates = torch.flip(accumulator, (1,))
    mates[1] *= -1.0
    return (accumulator + mates)[:, : accumulator.shape[1] // 2 + 1].contiguous()


def unfold_accumulator(folded: Tensor, operators: np.ndarray) -> tuple[Tensor, Tensor]:
    """Whole symmetrised grids of a folded accumulator: numerator (complex64) and weight (float32), each `(z, y, x)`."""
    mates = torch.flip(folded[:, :-1], (1,))
    mates[1] *= -1.0
    flat = torch.cat([folded, mates], 1)
    side = round(flat.shape[1] ** (1 / 3))
    grid = symmetrise_grid(flat.reshape(3, side, side, side), operators)
    return torch.complex(grid[0].contiguous(), grid[1].contiguous()), grid[2].contiguous()


def grid_shells(side: int, device: torch.device | str = "cpu") -> Tensor:
    """Shell number (rounded |k|) of each point of an odd padded grid, int64 `(z, y, x)`."""
    k = (torch.arange(side, device=device) - side // 2).float() / PADDING
    return torch.round(torch.sqrt(k[:, None, None] ** 2 + k[None, :, None] ** 2 + k[None, None, :] ** 2)).long()


def reconstruct(numerator: Tensor, weight: Tensor, radius: int, map_box: int, *, image_box: int, ssnr: Tensor | None = None) -> Tensor:
    """Map from symmetrised accumulators: numerator / (weight + prior), back to real space, gridding corrected.

    Parameters
    ----------
    numerator, weight : Tensor, `(z, y, x)`
        Of :func:`unfold_accumulator`.
    radius : int
        Frequencies beyond it are zero.
    map_box : int
        Even box of the result, at least 2 (radius + 1); it spans the same length as the images.
    image_box : int
        Box of the images that were inserted (their grey scale).
    ssnr : Tensor, `(>= radius + 1,)`, optional
        Spectral signal-to-noise ratio of the map per shell: the prior adds mean(weight) / ssnr (Wiener filter). Without it a ridge of
        a thousandth of the shell's mean weight guards empty voxels.

    Returns
    -------
    Tensor, `(z, y, x)`, float32
    """
    side = numerator.shape[0]
    shells = grid_shells(side, numerator.device)
    inside = shells <= radius
    count = radius + 2
    clipped = shells.clamp(max=radius + 1)
    mean = torch.bincount(clipped.reshape(-1), weight.reshape(-1).double(), count)
    mean = (mean / torch.bincount(clipped.reshape(-1), minlength=count).clamp(min=1)).float()
    if ssnr is None:
        prior = 1e-3 * mean
    else:
        limited = torch.full((count,), 1e-4, device=mean.device)
        limited[: radius + 1] = ssnr[: radius + 1].to(mean.device).float().clamp(min=1e-4)
        prior = mean / limited
    values = torch.where(inside, numerator / (weight + prior[clipped] + 1e-12), torch.zeros_like(numerator))
    half, wide = side // 2, map_box * PADDING
    half = min(half, wide // 2 - 1)
    middle = side // 2
    window = slice(middle - half, middle + half + 1)
    values = values[window, window, window]
    spectrum = torch.zeros(wide, wide, wide // 2 + 1, dtype=torch.complex64, device=values.device)
    k = torch.arange(-half, half + 1, device=values.device) % wide
    spectrum[k[:, None, None], k[None, :, None], torch.arange(half + 1, device=values.device)[None, None, :]] = values[:, :, half:]
    real = torch.fft.fftshift(torch.fft.irfftn(spectrum, s=(wide,) * 3)) * (map_box**3 / (image_box * image_box))
    start = wide // 2 - map_box // 2
    cut = slice(start, start + map_box)
    return real[cut, cut, cut] / gridding_correction(map_box, real.device)


def cut_map(volume: Tensor, radius: float) -> Tensor:
    """Set a map's transform to exactly zero beyond ``radius`` (cycles per box)."""
    box = volume.shape[-1]
    k = torch.fft.fftfreq(box, d=1.0 / box, device=volume.device)
    kx = torch.arange(box // 2 + 1, device=volume.device)
    keep = k[:, None, None] ** 2 + k[None, :, None] ** 2 + kx**2 <= radius * radius
    return torch.fft.irfftn(torch.fft.rfftn(volume) * keep, s=volume.shape)
