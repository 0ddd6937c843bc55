"""Half Fourier grids (x >= 0): the volume that slices are taken from, and the grid that they are inserted into.

The transform of a real map is Hermitian, so the half with x >= 0 contains everything. Grids are padded twice, like those of
:mod:`cryodask.kernels.projection`, whose units and conventions hold here. Axes are ``(z, y, x)``, with z and y from -half to half and x
from 0 to half.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cryodask.kernels.compiled import compiled
from cryodask.kernels.projection import PADDING, grid_half, gridding_correction
from cryodask.kernels.symmetry import coset_representatives, is_signed_permutation, symmetrise_grid

_ROWS_TOGETHER = 8


def half_volume(volume: Tensor, radius: int, image_box: int) -> Tensor:
    """Padded transform of a cubic map `(z, y, x)` of even box b >= 2 (radius + 1): `(2 half + 1, 2 half + 1, half + 1)` complex64.

    ``image_box`` is the box of the images whose grey values the slices shall have; it spans the same length as the map.
    """
    b, wide = volume.shape[-1], volume.shape[-1] * PADDING
    half = min(grid_half(radius), wide // 2 - 1)
    k = torch.arange(-half, half + 1, device=volume.device) % wide
    map_ = volume.float() / gridding_correction(b, volume.device) * (image_box**2 / b**3)
    # some planes at a time: the padded map is never there whole
    planes = torch.empty(b, len(k), half + 1, dtype=torch.complex64, device=volume.device)
    for some in torch.arange(b, device=volume.device).split(_ROWS_TOGETHER):
        planes[some] = torch.fft.rfft2(_padded(_padded(map_[some], 2), 1))[:, k][:, :, : half + 1]
    out = torch.empty(len(k), len(k), half + 1, dtype=torch.complex64, device=volume.device)
    for some in torch.arange(len(k), device=volume.device).split(_ROWS_TOGETHER):
        out[:, some] = torch.fft.fft(_padded(planes[:, some], 0), dim=0)[k]
    return out


def _padded(values: Tensor, dim: int) -> Tensor:
    """Zeros in the middle of an axis, whose origin moves from its middle to its first place."""
    count = values.shape[dim]
    middle, shape = count // 2, list(values.shape)
    shape[dim] = count * (PADDING - 1)
    nothing = torch.zeros(shape, dtype=values.dtype, device=values.device)
    return torch.cat([values.narrow(dim, middle, count - middle), nothing, values.narrow(dim, 0, middle)], dim)


def empty_half_grid(radius: int, device: str = "cpu") -> Tensor:
    """Zeros `(z, y, x, 3)` float32 for frequencies up to ``radius``: real and imaginary part of the numerator, weight."""
    half = grid_half(radius)
    return torch.zeros(2 * half + 1, 2 * half + 1, half + 1, 3, dtype=torch.float32, device=device)


def resized_half_grid(grid: Tensor, radius: int) -> Tensor:
    """A grid cut, or filled with zeros, to hold frequencies up to ``radius``."""
    old, half = grid.shape[2] - 1, grid_half(radius)
    if half <= old:
        return grid[old - half : old + half + 1, old - half : old + half + 1, : half + 1].contiguous()
    out = empty_half_grid(radius, str(grid.device))
    out[half - old : half + old + 1, half - old : half + old + 1, : old + 1] = grid
    return out


def fold_half_grid(grid: Tensor, operators: np.ndarray) -> Tensor:
    """Sum of a grid, its Hermitian mates and its copies under a point group; changes ``grid`` and returns it."""
    plane = grid[:, :, 0]
    mates = torch.flip(plane, (0, 1)).clone()
    mates[..., 1] *= -1.0
    plane += mates
    kernels = compiled("grids", grid.device)
    exact = np.array([g for g in operators if is_signed_permutation(g)])
    if kernels is not None and len(exact) < len(operators):
        once = grid.clone()
        for g in coset_representatives(operators, list(exact))[1:]:
            kernels.add_turned(once.numpy(), g, grid.numpy())
        operators = exact
    if all(np.allclose(np.abs(g), np.eye(3), atol=1e-6) for g in operators):
        # half-turns about the axes: the half grid maps onto itself, or onto its mates
        turns = [g for g in operators if not np.allclose(g, np.eye(3), atol=1e-6)]
        if kernels is not None and turns:
            before = grid.clone().numpy()
            for g in turns:
                kernels.add_half_turn(before, *_half_turn(g), grid.numpy())
            return grid
        turned = []
        for g in turns:
            across_z, across_y, conjugate = _half_turn(g)
            turned.append(torch.flip(grid, [axis for axis, flipped in ((0, across_z), (1, across_y)) if flipped]))
            if conjugate:
                turned[-1][..., 1] *= -1.0
        for other in turned:
            grid += other
        return grid
    for channel in range(3):
        right = grid[..., channel]
        left = torch.flip(right[:, :, 1:], (0, 1, 2))
        whole = torch.cat([-left if channel == 1 else left, right], 2)
        # the imaginary part is odd under the group only together with its mates, so the whole grid is turned
        grid[..., channel] = symmetrise_grid(whole[None], operators)[0, :, :, right.shape[2] - 1 :]
    return grid


def _half_turn(operator: np.ndarray) -> tuple[bool, bool, bool]:
    """How a half grid is read for ``F(g k)``, g = diag(+-1, +-1, +-1): z backwards, y backwards, conjugates (of F(-g k), if g turns x)."""
    turned = np.diag(operator) * np.sign(operator[0, 0])
    return bool(turned[2] < 0), bool(turned[1] < 0), bool(operator[0, 0] < 0)


def shells_of_slab(half: int, z: int, device: torch.device) -> Tensor:
    """Shell number of the points of a plane z, int64 `(y, x)`."""
    y = torch.arange(-half, half + 1, device=device).float() / PADDING
    x = torch.arange(half + 1, device=device).float() / PADDING
    return torch.round(torch.sqrt(y[:, None] ** 2 + x[None] ** 2 + (z / PADDING) ** 2)).long()


def mean_weight(grid: Tensor, radius: int) -> Tensor:
    """Mean weight per shell `(radius + 2,)` float64 of a folded grid, the unstored half counted."""
    half = grid.shape[2] - 1
    sums, counts = (torch.zeros(radius + 2, dtype=torch.float64, device=grid.device) for _ in range(2))
    if kernels := compiled("grids", grid.device):
        kernels.weight_sums(grid.numpy(), radius, sums.numpy(), counts.numpy())
        return sums / counts.clamp(min=1.0)
    twice = torch.full((2 * half + 1, half + 1), 2.0, dtype=torch.float64, device=grid.device)
    twice[:, 0] = 1.0
    for z in range(-half, half + 1):
        shell = shells_of_slab(half, z, grid.device).clamp(max=radius + 1).reshape(-1)
        sums.index_add_(0, shell, (grid[z + half, :, :, 2] * twice).reshape(-1))
        counts.index_add_(0, shell, twice.reshape(-1))
    sums[radius + 1] = 0.0
    return sums / counts.clamp(min=1.0)


def reconstruct_half(
    grid: Tensor, radius: int, map_box: int, *, image_box: int, ssnr: Tensor | None = None, mean: Tensor | None = None
) -> Tensor:
    """Map of a folded grid: numerator / (weight + prior), back to real space, gridding corrected.

    Parameters
    ----------
    grid : Tensor, `(z, y, x, 3)`
        Of :func:`fold_half_grid`.
    radius : int
        Frequencies beyond it are zero.
    map_box : int
        Even box of the result, at least 2 (radius + 1); it spans the same length as the images.
    image_box : int
        Box of the images that were inserted (their grey scale).
    ssnr : Tensor, `(>= radius + 1,)`, optional
        Spectral signal-to-noise ratio of the map per shell: the prior adds mean(weight) / ssnr (Wiener filter). Without it a ridge of
        a thousandth of the shell's mean weight guards empty voxels.
    mean : Tensor, `(radius + 2,)`, optional
        :func:`mean_weight` of the grid, if it is known.

    Returns
    -------
    Tensor, `(z, y, x)`, float32

    Notes
    -----
    Works plane by plane, and crops the padded map axis by axis: neither the grid nor the padded map is ever there whole.
    """
    half, device = grid.shape[2] - 1, grid.device
    mean = mean_weight(grid, radius) if mean is None else mean
    if ssnr is None:
        prior = 1e-3 * mean
    else:
        limited = torch.full((radius + 2,), 1e-4, dtype=torch.float64, device=device)
        limited[: radius + 1] = ssnr[: radius + 1].to(limited).clamp(min=1e-4)
        prior = mean / limited
    prior = prior.float()
    wide = map_box * PADDING
    limit = min(half, wide // 2 - 1)
    k = torch.arange(-limit, limit + 1, device=device)
    # the alternating sign moves the origin to voxel map_box of the padded map
    scale = map_box**3 / image_box**2
    checkered = (1.0 - 2.0 * ((k[:, None] + k[None, limit:]) % 2)).float() * scale
    window = slice(half - limit, half + limit + 1)
    start = wide // 2 - map_box // 2
    cut = slice(start, start + map_box)
    kernels = compiled("grids", device)
    planes = torch.zeros(2 * limit + 1, map_box, limit + 1, dtype=torch.complex64, device=device)
    padded = torch.zeros(wide, limit + 1, dtype=torch.complex64, device=device)
    for z in range(-limit, limit + 1):
        if abs(z) > PADDING * (radius + 1):
            continue
        if kernels is not None:
            kernels.filtered_plane(grid[z + half].numpy(), z, radius, prior.numpy(), np.float32(scale), padded.numpy())
        else:
            shell = shells_of_slab(half, z, device)[window, : limit + 1]
            plane = grid[z + half, window, : limit + 1]
            factor = checkered / (plane[..., 2] + prior[shell.clamp(max=radius + 1)] + 1e-12)
            factor = torch.where(shell <= radius, -factor if z % 2 else factor, torch.zeros_like(factor))
            padded[k % wide] = torch.complex(plane[..., 0] * factor, plane[..., 1] * factor)
        planes[z + limit] = torch.fft.ifft(padded, dim=0)[cut]
    out = torch.empty(map_box, map_box, map_box, device=device)
    for rows in torch.arange(map_box, device=device).split(_ROWS_TOGETHER):
        padded = torch.zeros(wide, len(rows), limit + 1, dtype=torch.complex64, device=device)
        padded[k % wide] = planes[:, rows]
        out[:, rows] = torch.fft.irfft(torch.fft.ifft(padded, dim=0)[cut], n=wide, dim=-1)[..., cut]
    return out / gridding_correction(map_box, device)


def own_ssnr(grid: Tensor, radius: int) -> Tensor:
    """Mean weight times power of the map itself per shell `(radius + 1,)`: a signal-to-noise ratio without half-maps."""
    half = grid.shape[2] - 1
    mean = mean_weight(grid, radius)
    power, counts = (torch.zeros(radius + 2, dtype=torch.float64, device=grid.device) for _ in range(2))
    if kernels := compiled("grids", grid.device):
        kernels.power_sums(grid.numpy(), radius, (0.1 * mean + 1e-20).float().numpy(), power.numpy(), counts.numpy())
        return (mean * power / counts.clamp(min=1.0))[: radius + 1]
    twice = torch.full((2 * half + 1, half + 1), 2.0, dtype=torch.float64, device=grid.device)
    twice[:, 0] = 1.0
    for z in range(-half, half + 1):
        shell = shells_of_slab(half, z, grid.device).clamp(max=radius + 1)
        plane = grid[z + half]
        filled = plane[..., :2].square().sum(-1) / (plane[..., 2] + 0.1 * mean[shell].float() + 1e-20).square()
        power.index_add_(0, shell.reshape(-1), (filled * twice).reshape(-1))
        counts.index_add_(0, shell.reshape(-1), twice.reshape(-1))
    return (mean * power / counts.clamp(min=1.0))[: radius + 1]
