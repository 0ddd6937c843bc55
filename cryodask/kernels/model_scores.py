"""How well a density made from a model agrees with a map: about each place, and by shells."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from cryodask.kernels.fsc import half_radius


def local_correlation(first: Tensor, second: Tensor, voxel_angstrom: float, *, sd_angstrom: float = 3.0) -> Tensor:
    """Correlation of two maps `(z, y, x)` in a Gaussian window about each voxel, means subtracted."""
    box = first.shape[-1]
    window = torch.exp(-2.0 * (math.pi * sd_angstrom / voxel_angstrom * half_radius(box, first.device) / box) ** 2)

    def blurred(volume: Tensor) -> Tensor:
        return torch.fft.irfftn(torch.fft.rfftn(volume) * window, s=volume.shape)

    a, b = first / first.std().clamp(min=1e-20), second / second.std().clamp(min=1e-20)
    mean_a, mean_b = blurred(a), blurred(b)
    power = (blurred(a * a) - mean_a**2).clamp(min=1e-9) * (blurred(b * b) - mean_b**2).clamp(min=1e-9)
    return (blurred(a * b) - mean_a * mean_b) / power.sqrt()


def mask_about(
    places_px: np.ndarray, box: int, voxel_angstrom: float, *, radius_angstrom: float = 5.0, edge_angstrom: float = 8.0
) -> Tensor:
    """Soft mask `(z, y, x)`: 1 within a radius of points `(n, 3)` (x, y, z), voxels, and a raised cosine beyond."""
    empty = np.ones((box,) * 3, bool)
    near = np.round(places_px).astype(int)
    near = near[((near >= 0) & (near < box)).all(1)]
    empty[near[:, 2], near[:, 1], near[:, 0]] = False
    distance = ndimage.distance_transform_edt(empty) * voxel_angstrom
    ramp = np.clip((distance - radius_angstrom) / edge_angstrom, 0.0, 1.0)
    return torch.from_numpy((0.5 + 0.5 * np.cos(np.pi * ramp)).astype(np.float32))


def at_places(volume: Tensor, places_px: np.ndarray) -> np.ndarray:
    """Values of a map at points `(n, 3)` (x, y, z), voxels, trilinear; NaN outside the map."""
    inside = ((places_px >= 0) & (places_px <= volume.shape[-1] - 1)).all(1)
    values = ndimage.map_coordinates(volume.cpu().numpy(), places_px[:, ::-1].T, order=1, mode="nearest")
    return np.where(inside, values, np.nan)


def with_amplitudes_of(volume: Tensor, model: Tensor, mask: Tensor, voxel_angstrom: float, resolution_angstrom: float) -> Tensor:
    """The density of a model `(z, y, x)` with the mean amplitude that a map has in each shell, both under a mask; zero beyond a resolution.

    It is what a map of the same sharpening and resolution would show if it agreed with the model everywhere.
    """
    box = volume.shape[-1]
    radius = half_radius(box, volume.device)
    shell = radius.round().long().clamp(max=box // 2).flatten()
    powers = [torch.fft.rfftn(v * mask).abs().double().square().flatten() for v in (volume, model)]
    wanted, given = (torch.bincount(shell, power, box // 2 + 1) for power in powers)
    scale = torch.sqrt(wanted / given.clamp(min=1e-30)).float()
    keep = radius <= box * voxel_angstrom / resolution_angstrom
    return torch.fft.irfftn(torch.fft.rfftn(model) * scale[shell].reshape(radius.shape) * keep, s=volume.shape)
