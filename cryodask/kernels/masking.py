"""The low-pass filter of maps, and the mask with which a refinement flattens the solvent. Masks themselves: see regions.py."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from cryodask.kernels.fsc import half_radius

_MASK_VOXEL_ANGSTROM = 3.6


def low_pass(volume: Tensor, pixel_size_angstrom: float, resolution_angstrom: float, edge_shells: float = 2.0) -> Tensor:
    """Low-pass filter a cubic map `(z, y, x)` at a resolution, with a raised-cosine edge ``edge_shells`` wide."""
    n = volume.shape[-1]
    factor = low_pass_factor(half_radius(n, volume.device), n * pixel_size_angstrom / resolution_angstrom, edge_shells)
    return torch.fft.irfftn(torch.fft.rfftn(volume) * factor, s=volume.shape)


def low_pass_factor(radius: Tensor, cut_shell: float, edge_shells: float = 2.0) -> Tensor:
    """1 below ``cut_shell``, 0 above, a raised cosine of width ``edge_shells`` between."""
    return 0.5 + 0.5 * torch.cos(math.pi * ((radius - cut_shell + edge_shells / 2) / edge_shells).clamp(0.0, 1.0))


def own_solvent_mask(volume: Tensor, pixel_size_angstrom: float, rings: int) -> Tensor:
    """Soft mask `(z, y, x)` of the molecule in a map, made from this map alone, for solvent flattening between iterations.

    The map is smoothed (18 Angstrom low-pass, Gaussian of 7.1 Angstrom); the molecule is what exceeds a fifth of the mean density of the
    densest 13,300 cubic Angstrom, extended by 8 Angstrom with a soft edge of 8. Half-maps must have a mask each: a common one would
    correlate them.
    """
    n = volume.shape[-1]
    length = n * pixel_size_angstrom
    # nothing finer than 18 Angstrom is left, so a coarse grid holds it
    m = min(n, 2 * math.ceil(length / (2 * _MASK_VOXEL_ANGSTROM)))
    k = torch.arange(-(m // 2) + 1, m // 2, device=volume.device)
    smooth = torch.zeros(m, m, m // 2 + 1, dtype=torch.complex64, device=volume.device)
    kept = torch.fft.rfftn(volume)[k][:, k][:, :, : m // 2]
    radius = half_radius(m, volume.device)
    smooth[k[:, None] % m, k[None] % m, : m // 2] = kept
    smooth *= (radius <= min(rings, int(length / 18.0))) * torch.exp(-2.0 * (math.pi * 7.08 * radius / length) ** 2)
    density = torch.fft.irfftn(smooth, s=(m, m, m))
    densest = max(1, int(13_300 / (length / m) ** 3))
    core = (density > 0.2 * density.reshape(-1).topk(min(densest, density.numel())).values.mean()).cpu().numpy()
    distance = ndimage.distance_transform_edt(~core) * (length / m)
    soft = torch.from_numpy(np.clip(1.0 - (distance - 8.0) / 8.0, 0.0, 1.0).astype(np.float32)).to(volume.device)
    between = _linear_weights(n, m, str(volume.device))
    return torch.einsum("ia,abc->ibc", between, torch.einsum("jb,abc->ajc", between, soft @ between.T))


def _linear_weights(n: int, m: int, device: str) -> Tensor:
    """Matrix `(n, m)` of linear interpolation from a coarser grid that spans the same length with the same origin."""
    place = torch.arange(n, device=device) * (m / n)
    low = place.floor().long()
    weights = torch.zeros(n, m, device=device)
    rows = torch.arange(n, device=device)
    weights[rows, low] = (1.0 - (place - low)).float()
    weights[rows, (low + 1).clamp(max=m - 1)] += (place - low).float()
    return weights
