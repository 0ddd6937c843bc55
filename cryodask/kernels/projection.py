"""Central slices of a map, and the units and conventions of everything between images and maps.

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

from cryodask.kernels.compiled import compiled

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
    if kernels := compiled("grids", rotations.device):
        found = torch.empty(len(rotations), len(kx), dtype=torch.complex64)
        kernels.sliced(
            volume.values.reshape(-1).numpy(), volume.half, rotations.float().contiguous().numpy(),
            *(k.float().contiguous().numpy() for k in (ky, kx)), torch.view_as_real(found).reshape(len(rotations), -1).numpy(),
        )  # fmt: skip
        return found
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


def cut_map(volume: Tensor, radius: float) -> Tensor:
    """Set a map's transform to exactly zero beyond ``radius`` (cycles per box)."""
    box = volume.shape[-1]
    k = torch.fft.fftfreq(box, d=1.0 / box, device=volume.device)
    kx = torch.arange(box // 2 + 1, device=volume.device)
    keep = k[:, None, None] ** 2 + k[None, :, None] ** 2 + kx**2 <= radius * radius
    return torch.fft.irfftn(torch.fft.rfftn(volume) * keep, s=volume.shape)
