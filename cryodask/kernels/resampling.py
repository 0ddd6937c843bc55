"""Resampling a map of any box and voxel size onto the grid of another."""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from cryodask.kernels.projection import cut_map


def resample_map(volume: Tensor, voxel_angstrom: float, box: int, target_voxel_angstrom: float, *, cut_angstrom: float) -> Tensor:
    """Resample a map to ``box`` voxels of ``target_voxel_angstrom``, with aligned origins n // 2, zero outside the input.

    Parameters
    ----------
    volume : Tensor, `(z, y, x)`, float32, cubic
    cut_angstrom : float
        Resolution to which the map is low-pass filtered first, so that cubic interpolation neither aliases nor blurs; at least
        2.2 voxels of either grid.
    """
    size = volume.shape[-1]
    if abs(voxel_angstrom / target_voxel_angstrom - 1.0) < 1e-3:
        return _crop_or_pad(volume, box)
    finest = max(cut_angstrom, 2.2 * voxel_angstrom, 2.2 * target_voxel_angstrom)
    # an odd box has no lone Nyquist row; either parity is cut in the same way
    smooth = cut_map(volume, size * voxel_angstrom / finest).numpy()
    ratio = target_voxel_angstrom / voxel_angstrom
    offset = size // 2 - ratio * (box // 2)
    out = ndimage.affine_transform(smooth, np.full(3, ratio), np.full(3, offset), output_shape=(box,) * 3, order=3, mode="constant")
    return torch.from_numpy(np.ascontiguousarray(out, np.float32))


def _crop_or_pad(volume: Tensor, box: int) -> Tensor:
    """The same voxels in another box, origins n // 2 on one another."""
    size = volume.shape[-1]
    out = torch.zeros((box,) * 3, dtype=volume.dtype)
    shared = min(size, box)
    here, there = (slice(n // 2 - shared // 2, n // 2 - shared // 2 + shared) for n in (size, box))
    out[there, there, there] = volume[here, here, here]
    return out
