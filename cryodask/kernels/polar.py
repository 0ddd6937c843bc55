"""Images on polar rings in Fourier space, and likelihood scores of all in-plane rotations by one small FFT each.

A ring r has ``angle_count`` samples X(r, theta); its angular modes are x(m, r) = mean over theta of X exp(-i m theta). Turning an
image by psi multiplies mode m by exp(-i m psi), so the score of an image against a view at every psi is

    score(psi) = sum_m exp(i m psi) sum_r w_r x(m, r) conj(a(m, r)),

one matrix product over r for each m and one inverse FFT over m (the idea of polar Fourier correlation, e.g. Joyeux & Penczek 2002).
The half circle 0 <= theta < pi is stored: X(theta + pi) = conj X(theta) because images are real.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

_EXACT_BOX = 48
"""Up to this box one matrix product makes exact polar samples; beyond, the matrix outgrows the caches."""
_KERNEL_WIDTH = 5
_GATHER_PADDING = 2


@dataclass(frozen=True)
class PolarGrid:
    """Rings 1 .. ``rings`` of images of ``box`` pixels, ``angle_count`` (even) samples on the whole circle.

    ``ky, kx`` float32 `(ring, half angle)` are the frequencies of the stored half circle, cycles per box.
    """

    box: int
    rings: int
    angle_count: int
    ky: Tensor
    kx: Tensor


def mode_limit(ring: int) -> int:
    """Highest angular mode kept up to a ring: 2.8 r + 3 holds images that fill 0.9 of the box (mode 2 pi r rho at radius rho)."""
    return int(2.8 * ring) + 3


def fast_even(count: int) -> int:
    """Smallest even number >= count with the prime factors 2, 3 and 5 only (FFT lengths)."""
    count += count % 2
    while True:
        rest = count
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return count
        count += 2


def angles_needed(ring: int) -> int:
    """Samples on the circle that hold the modes up to ``mode_limit(ring)``; a multiple of 4."""
    return 2 * fast_even(mode_limit(ring) + 2)


@lru_cache(maxsize=32)
def polar_grid(box: int, rings: int, angle_count: int | None = None, device: str = "cpu") -> PolarGrid:
    """Make the grid; by default with as many angles as the modes of its outermost ring need."""
    count = angle_count or angles_needed(rings)
    theta = torch.arange(count // 2, device=device) * (2.0 * math.pi / count)
    r = torch.arange(1, rings + 1, device=device).float()[:, None]
    return PolarGrid(box, rings, count, r * torch.sin(theta), r * torch.cos(theta))


@lru_cache(maxsize=4)
def _exact_matrix(box: int, rings: int, angle_count: int, device: str) -> Tensor:
    """`(box^2, 2 * sample)`: real and imaginary parts of exp(-2 pi i k.x / box) / box."""
    grid = polar_grid(box, rings, angle_count, device)
    x = (torch.arange(box, device=device) - box // 2).float() * (-2.0 * math.pi / box)
    phase = (grid.ky.reshape(1, 1, -1) * x[:, None, None] + grid.kx.reshape(1, 1, -1) * x[None, :, None]).reshape(box * box, -1)
    return torch.cat([torch.cos(phase), torch.sin(phase)], 1) / box


@lru_cache(maxsize=4)
def _gather(box: int, rings: int, angle_count: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Sparse Kaiser-Bessel matrices (for real and imaginary parts) and the image weights that undo the kernel's transform.

    Beta after Beatty, Nishimura & Pauly (2005), equation 5.
    """
    grid = polar_grid(box, rings, angle_count)
    wide, width = box * _GATHER_PADDING, _KERNEL_WIDTH
    columns = wide // 2 + 1
    beta = math.pi * math.sqrt((width / _GATHER_PADDING) ** 2 * (_GATHER_PADDING - 0.5) ** 2 - 0.8)
    kx, ky = (t.double().numpy().reshape(-1) * _GATHER_PADDING for t in (grid.kx, grid.ky))

    def kernel(u: np.ndarray) -> np.ndarray:
        return np.i0(beta * np.sqrt(np.clip(1.0 - (2.0 * u / width) ** 2, 0.0, None))) * (np.abs(u) <= width / 2)

    first_x, first_y = np.ceil(kx - width / 2).astype(int), np.ceil(ky - width / 2).astype(int)
    step = np.arange(width)
    gx, gy = np.broadcast_arrays((first_x[:, None] + step)[:, None, :], (first_y[:, None] + step)[:, :, None])
    weight = kernel(kx[:, None, None] - gx) * kernel(ky[:, None, None] - gy)
    mirrored = gx < 0  # only kx >= 0 is stored; the mate is the conjugate
    place = (np.where(mirrored, -gy, gy) % wide) * columns + np.abs(gx)
    row = np.repeat(np.arange(kx.size), width * width)
    shape = (kx.size, wide * columns)

    def matrix(values: np.ndarray) -> Tensor:
        m = sparse.csr_matrix((values.reshape(-1).astype(np.float32), (row, place.reshape(-1))), shape=shape)
        rows, within = (torch.from_numpy(a.astype(np.int64)) for a in (m.indptr, m.indices))
        with warnings.catch_warnings():  # torch says at the first use that CSR tensors are in beta
            warnings.simplefilter("ignore", UserWarning)
            return torch.sparse_csr_tensor(rows, within, torch.from_numpy(m.data), size=shape, check_invariants=False).to(device)

    x = math.pi * width * (np.arange(box) - box // 2) / wide
    root = np.sqrt(beta**2 - x**2 + 0j)
    taper = torch.from_numpy((root / (width * np.sinh(root))).real.astype(np.float32)).to(device)
    return matrix(weight), matrix(np.where(mirrored, -weight, weight)), taper[:, None] * taper[None, :]


def polar_transforms(images: Tensor, grid: PolarGrid) -> Tensor:
    """Transforms of images on the half circles of the rings.

    Parameters
    ----------
    images : Tensor, `(n, y, x)`, float32
        Masked beforehand, because regions near the border have more angular modes than are kept.

    Returns
    -------
    Tensor, `(n, ring, half angle)`, complex64, DFT / box
        Exact for boxes up to 48 pixels, else by Kaiser-Bessel interpolation of the padded transform (relative error 6e-5).
    """
    n, box = images.shape[0], grid.box
    key = (box, grid.rings, grid.angle_count, str(images.device))
    if box <= _EXACT_BOX:
        both = images.reshape(n, -1) @ _exact_matrix(*key)
        samples = torch.complex(*both.chunk(2, dim=1))
        return samples.reshape(n, grid.rings, -1)
    real, imaginary, taper = _gather(*key)
    wide = box * _GATHER_PADDING
    start = wide // 2 - box // 2
    out = torch.empty(n, grid.ky.numel(), dtype=torch.complex64, device=images.device)
    for lot in torch.arange(n).split(32):
        padded = torch.zeros(len(lot), wide, wide, device=images.device)
        padded[:, start : start + box, start : start + box] = images[lot] * taper
        spectrum = torch.fft.rfft2(torch.fft.ifftshift(padded, dim=(-2, -1))).reshape(len(lot), -1) / box
        columns = torch.view_as_real(spectrum).permute(2, 1, 0)
        out[lot] = torch.complex(real @ columns[0].contiguous(), imaginary @ columns[1].contiguous()).T
    return out.reshape(n, grid.rings, -1)


def polar_to_images(samples: Tensor, grid: PolarGrid) -> Tensor:
    """Images `(n, box, box)` of half-circle samples `(n, ring, half angle)`: adjoint of :func:`polar_transforms` with ring areas.

    The inverse up to interpolation for functions without a mean (ring 0 is absent). Meant for small boxes: the matrix is dense.
    """
    n, box = samples.shape[0], grid.box
    area = torch.arange(1, grid.rings + 1, device=samples.device).float()[:, None] * (4.0 * math.pi / grid.angle_count)
    weighted = (samples * area).reshape(n, -1)
    both = torch.cat([weighted.real, weighted.imag], 1)
    matrix = _exact_matrix(box, grid.rings, grid.angle_count, str(samples.device))
    return (both @ matrix.T).reshape(n, box, box)


def whole_circle(half: Tensor) -> Tensor:
    """Append the conjugate mates: `(..., half angle)` to `(..., angle)`."""
    return torch.cat([half, half.conj()], -1)


def angular_modes(half: Tensor, limit: int) -> Tensor:
    """Modes 0 .. ``limit`` of half circles `(..., ring, half angle)`: `(..., mode, ring)` complex64.

    The real part has period pi and holds the even modes, the imaginary part holds the odd ones: two transforms of half the length
    do the work of one over the whole circle.
    """
    count = half.shape[-1]
    turn = _odd_turn(count, str(half.device))
    even = torch.fft.rfft(half.real.contiguous())
    odd = torch.fft.fft(half.imag * turn)
    out = torch.empty(*half.shape[:-2], limit + 1, half.shape[-2], dtype=torch.complex64, device=half.device)
    out[..., 0::2, :] = even[..., : limit // 2 + 1].transpose(-1, -2)
    out[..., 1::2, :] = odd[..., : (limit + 1) // 2].transpose(-1, -2)
    return out.div_(count)


@lru_cache(maxsize=32)
def _odd_turn(count: int, device: str) -> Tensor:
    """I exp(-i theta) over the half circle."""
    theta = torch.arange(count, device=device) * (math.pi / count)
    return 1j * torch.polar(torch.ones_like(theta), -theta)


def angular_modes_real(half: Tensor, limit: int) -> Tensor:
    """Modes 0 .. ``limit`` of real functions of period pi `(..., ring, half angle)` such as CTF^2: `(..., mode, ring)`, odd ones 0."""
    out = torch.zeros(*half.shape[:-2], limit + 1, half.shape[-2], dtype=torch.complex64, device=half.device)
    even = torch.fft.rfft(half.contiguous())[..., : limit // 2 + 1] / half.shape[-1]
    out[..., 0::2, :] = even.transpose(-1, -2)
    return out


def rotation_scores(image_modes: Tensor, reference_modes: Tensor, psi_count: int, constant: Tensor | None = None) -> Tensor:
    """Scores of images against views at ``psi_count`` in-plane rotations; index q stands for psi = -2 pi q / psi_count.

    Parameters
    ----------
    image_modes : Tensor, `(n, mode, shift, ring)`, complex64
        With the ring weights multiplied in.
    reference_modes : Tensor, `(mode, ring, view)` or `(n, mode, ring, view)`, complex64
        Conjugated modes of the reference, the same views for all images or some for each.
    constant : Tensor, `(n, shift)`, optional
        Added to the scores of a shift.

    Returns
    -------
    Tensor, `(n, shift, view, psi)`, float32
        ``sum over m (both signs) and rings of image conj(reference) exp(i m psi index)``.
    """
    n, modes, shifts, rings = image_modes.shape
    if reference_modes.dim() == 3:
        rows = image_modes.transpose(0, 1).reshape(modes, n * shifts, rings)
        product = torch.bmm(rows, reference_modes).reshape(modes, n, shifts, -1).permute(1, 2, 3, 0)
    else:
        product = torch.matmul(image_modes, reference_modes).permute(0, 2, 3, 1)
    product = product.contiguous()
    if constant is not None:
        product[..., 0] += constant[:, :, None]
    return torch.fft.irfft(product, n=psi_count, norm="forward")


def even_first(limit: int) -> Tensor:
    """Modes 0 .. ``limit`` in the order of :func:`half_circle_modes`: the even ones first."""
    return torch.cat([torch.arange(0, limit + 1, 2), torch.arange(1, limit + 1, 2)])


@lru_cache(maxsize=32)
def _to_modes(count: int, limit: int, device: str) -> Tensor:
    """Matrix `(mode and part, angle and part)` from ``count`` samples of a half circle to its modes, the even ones first."""
    mode = even_first(limit).double()
    turns = mode[:, None] * torch.arange(count).double() * (math.pi / count)
    out = torch.zeros(limit + 1, 2, count, 2, dtype=torch.float64)
    even = (mode % 2 == 0)[:, None]
    # the real part of a half circle has the even modes, the imaginary part has the odd ones
    out[:, 0, :, 0] = torch.where(even, torch.cos(turns), 0.0)
    out[:, 1, :, 0] = torch.where(even, -torch.sin(turns), 0.0)
    out[:, 0, :, 1] = torch.where(even, 0.0, torch.sin(turns))
    out[:, 1, :, 1] = torch.where(even, 0.0, torch.cos(turns))
    return (out / count).reshape(2 * (limit + 1), 2 * count).float().to(device)


def half_circle_modes(half: Tensor, limit: int) -> Tensor:
    """Like :func:`angular_modes`, but by one real matrix product: `(mode, part, ...)` float32 of half circles `(..., half angle)`.

    Parts are the real and the imaginary one; even modes come first (:func:`even_first`). For the sizes of a search this takes a third of
    the time of many short FFTs.
    """
    count = half.shape[-1]
    samples = torch.view_as_real(half.contiguous()).reshape(-1, 2 * count)
    return (_to_modes(count, limit, str(half.device)) @ samples.T).reshape(limit + 1, 2, *half.shape[:-1])


def half_circle_modes_real(half: Tensor, limit: int) -> Tensor:
    """The even modes of real functions of period pi `(..., half angle)` such as CTF^2: `(even mode, part, ...)`; the odd ones are 0."""
    count, even = half.shape[-1], limit // 2 + 1
    matrix = _to_modes(count, limit, str(half.device))[: 2 * even, ::2]
    return (matrix @ half.reshape(-1, count).T).reshape(even, 2, *half.shape[:-1])


def mode_products(modes: Tensor, table: Tensor) -> Tensor:
    """Products of image modes with references, summed over rings: `(mode, part, n, row, view)` float32.

    Parameters
    ----------
    modes : Tensor, `(mode, part, n, row, ring)`
        As of :func:`half_circle_modes`, with the ring weights multiplied in.
    table : Tensor, `(mode, 2 ring, view)` or `(n, mode, 2 ring, view)`
        Conjugated modes of references, real parts before imaginary ones; the same views for all images or some for each.
    """
    re, im = modes.unbind(1)
    left = torch.stack([torch.cat([re, -im], -1), torch.cat([im, re], -1)], 1)
    count = left.shape[2:4]
    if table.dim() == 3:
        return torch.bmm(left.flatten(1, 3), table).unflatten(1, (2, *count))
    own = torch.matmul(left.permute(2, 0, 1, 3, 4).flatten(2, 3), table)
    return own.unflatten(2, (2, count[1])).permute(1, 2, 0, 3, 4)


@lru_cache(maxsize=32)
def _to_angles(limit: int, psi_count: int, device: str) -> Tensor:
    """Matrix `(psi, mode and part)` from products of modes, the even ones first, to scores at in-plane angles."""
    mode = even_first(limit).double()
    turns = mode[:, None] * torch.arange(psi_count).double() * (2.0 * math.pi / psi_count)
    factor = torch.where(mode > 0, 2.0, 1.0)[:, None]
    return torch.stack([factor * torch.cos(turns), -factor * torch.sin(turns)], 1).reshape(-1, psi_count).T.float().contiguous().to(device)


def angle_scores(products: Tensor, limit: int, psi_count: int) -> Tensor:
    """Scores `(n, psi, row, view)` at ``psi_count`` in-plane rotations, numbered as in :func:`rotation_scores`, of :func:`mode_products`.

    ``products`` are those of all modes up to ``limit``, or of the even ones only.
    """
    modes, _, n, rows, views = products.shape
    scores = _to_angles(limit, psi_count, str(products.device))[:, : 2 * modes] @ products.reshape(2 * modes, -1)
    return scores.reshape(psi_count, n, rows, views).transpose(0, 1)


def ring_weights(noise_power: Tensor) -> Tensor:
    """2 pi r / sigma2(r), `(..., ring)`: the likelihood's weight of a ring in an integral over the half plane; input from ring 1 on."""
    r = torch.arange(1, noise_power.shape[-1] + 1, device=noise_power.device, dtype=noise_power.dtype)
    return 2.0 * math.pi * r / noise_power
