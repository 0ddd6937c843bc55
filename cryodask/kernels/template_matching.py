"""Matched filters for picking: templates at all in-plane rotations, with the CTF of the micrograph, against its own noise.

The score of a template T at a place is sum_k conj(T CTF) X / N, over sqrt(sum_k |T CTF|^2 / N): the best linear detector of T in noise of
power N (North 1963; in cryo-EM Sigworth 2004). A turned template is nearly a combination of few images, so all rotations of
all templates are reduced to the strongest singular vectors of the whole bank (as steerable filters are, Perona 1995): the micrograph is
correlated with some tens of them, and the hundreds of scores of a pixel follow from one small matrix product.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cryodask.kernels.ctf import ctf
from cryodask.kernels.fourier import blur, resize_images, soft_sphere
from cryodask.kernels.orientations import euler_to_matrix
from cryodask.kernels.projection import fourier_volume, half_plane, slices

ROTATIONS = 24
"""In-plane rotations of a template: steps of 15 degrees move the rim of a particle 16 pixels wide by 1 pixel to either side."""
_KEPT = 0.97
"""Share of the bank's power that the singular vectors hold."""
_BOX = 2.0
"""Edge of a template with its CTF, diameters."""
_RINGS = 128
_BLOCK = 8192
_TILE = 448
_WHITENING = 0.5
"""Exponent of the micrograph's power that counts as that of its noise. With 1 the particles of a crowded micrograph, which are much of its
power, are suppressed: F1 of crowded simulated ones 0.94 instead of 0.96 with 0 or 0.5."""


class Lens(NamedTuple):
    """What the CTF of a micrograph depends on; angles in degrees."""

    defocus_u_angstrom: float
    defocus_v_angstrom: float
    defocus_angle_deg: float
    phase_shift_deg: float
    voltage_kv: float
    spherical_aberration_mm: float
    amplitude_contrast: float


class Templates(NamedTuple):
    """Images `(n, y, x)`, white protein, free of the CTF; their pixel size; and the CTF of the micrograph in which they are looked for."""

    images: Tensor
    pixel_angstrom: float
    lens: Lens


class Whitened(NamedTuple):
    """A micrograph with flatter noise, `(y, x)`, and the noise amplitudes by which it was divided, on _RINGS rings up to Nyquist."""

    image: Tensor
    amplitude: Tensor


def turned(images: Tensor, pixel_angstrom: float, diameter_angstrom: float, target_pixel_angstrom: float) -> Tensor:
    """Templates at ROTATIONS in-plane angles on another pixel, inside a soft circle and with zero mean.

    Parameters
    ----------
    images : Tensor, `(n, y, x)`, float32
        Square, origin at index n // 2, white protein.
    pixel_angstrom, target_pixel_angstrom : float

    Returns
    -------
    Tensor, `(n * ROTATIONS, box, box)`
        The angles of a template are consecutive.
    """
    length = images.shape[-1] * pixel_angstrom
    size = min(images.shape[-1], max(2, 2 * round(0.5 * length / target_pixel_angstrom)))
    fine = resize_images(resize_images(images, size), 2 * size)  # no detail beyond the target's, interpolated on half its pixel
    box = 2 * math.ceil(0.5 * _BOX * diameter_angstrom / target_pixel_angstrom)
    step = target_pixel_angstrom * 2 * size / length
    at = (torch.arange(box, device=images.device) - box // 2).float() * step
    angle = torch.arange(ROTATIONS, device=images.device).float()[:, None, None] * (2.0 * math.pi / ROTATIONS)
    y = torch.cos(angle) * at[:, None] - torch.sin(angle) * at[None]
    x = torch.sin(angle) * at[:, None] + torch.cos(angle) * at[None]
    grid = (torch.stack([x, y], -1) + size) * (2.0 / (2 * size - 1)) - 1.0
    out = torch.cat(
        [torch.nn.functional.grid_sample(one.expand(ROTATIONS, 1, -1, -1), grid, mode="bicubic", align_corners=True)[:, 0] for one in fine]
    )
    mask = soft_sphere(box, target_pixel_angstrom, 0.55 * diameter_angstrom, 0.15 * diameter_angstrom, dims=2, device=images.device)
    out = out * mask
    return out - mask * (out.sum((1, 2), keepdim=True) / mask.sum())


def views(volume: Tensor, count: int, resolution_px: float) -> Tensor:
    """Projections `(count, y, x)`, white protein, of a map `(z, y, x)` from directions spread over the sphere (a Fibonacci lattice).

    ``resolution_px``: finest detail, voxels.
    """
    box = volume.shape[-1]
    radius = min(box // 2 - 1, math.ceil(box / resolution_px))
    height = 1.0 - 2.0 * (np.arange(count) + 0.5) / count
    rot = torch.from_numpy(np.pi * (1.0 + 5.0**0.5) * np.arange(count)).float()
    tilt = torch.from_numpy(np.arccos(height)).float()
    plane = half_plane(radius, str(volume.device))
    rotations = euler_to_matrix(rot, tilt, torch.zeros_like(rot)).to(volume.device)
    values = slices(fourier_volume(volume, radius), rotations, plane.ky, plane.kx)
    spectrum = torch.zeros(count, box, box // 2 + 1, dtype=torch.complex64, device=volume.device)
    spectrum[:, plane.ky % box, plane.kx] = values
    alone = plane.kx == 0
    spectrum[:, -plane.ky[alone] % box, 0] = values[:, alone].conj()
    return torch.fft.fftshift(torch.fft.irfft2(spectrum, s=(box, box)), dim=(-2, -1)) * box


def whitened(image: Tensor, free: Tensor, diameter_px: float) -> Whitened:
    """Divide an image `(y, x)`, periodic, by its radially averaged noise amplitudes, then by its local standard deviation.

    What is not ``free`` `(y, x)`, bool, is left out.
    """
    level = (image - blur(image, diameter_px)) * free
    transform = torch.fft.rfft2(level)
    ring = _rings(image.shape, image.device)
    nearest = ring.round().long().clamp(max=_RINGS).reshape(-1).cpu().numpy()
    power = (transform.abs() ** 2).reshape(-1).double().cpu().numpy()
    mean = np.bincount(nearest, power, minlength=_RINGS + 1) / np.maximum(np.bincount(nearest, minlength=_RINGS + 1), 1)
    there = np.flatnonzero(mean[1:]) + 1
    if not len(there):
        return Whitened(torch.zeros_like(image), torch.ones(_RINGS + 1, device=image.device))
    mean = np.interp(np.arange(_RINGS + 1), there, mean[there])
    amplitude = torch.from_numpy((mean / mean[-1]) ** (0.5 * _WHITENING)).float().to(image.device)
    white = torch.fft.irfft2(transform / _between(amplitude, ring), s=image.shape)
    local = blur(white * white, 1.5 * diameter_px) / blur(free.float(), 1.5 * diameter_px).clamp(min=0.1)
    return Whitened(white / torch.sqrt(local.clamp(min=1e-12 * float(white.var()) + 1e-30)), amplitude)


def _rings(shape: torch.Size | tuple[int, int], device: torch.device) -> Tensor:
    """Radius of the points of a real transform, in rings up to Nyquist."""
    ky, kx = torch.fft.fftfreq(shape[0], device=device)[:, None], torch.fft.rfftfreq(shape[1], device=device)[None]
    return torch.sqrt(ky * ky + kx * kx) * (2.0 * _RINGS)


def _between(curve: Tensor, ring: Tensor) -> Tensor:
    """A curve over rings, interpolated; constant beyond Nyquist."""
    r = ring.clamp(max=len(curve) - 1.001)
    low = r.floor().long()
    return curve[low] * (1.0 - (r - low)) + curve[low + 1] * (r - low)


class Filters(NamedTuple):
    """Matched filters: few orthogonal images `(k, y, x)`, and each filter as a combination of them, `(filter, k)` with unit rows."""

    basis: Tensor
    weights: Tensor


def with_ctf(bank: Tensor, lens: Lens, pixel_angstrom: float) -> Tensor:
    """Templates `(filter, y, x)` as they look in a micrograph with this CTF and inverted contrast: protein is white."""
    box = bank.shape[-1]
    transfer = ctf(
        torch.fft.fftfreq(box, pixel_angstrom, device=bank.device)[:, None],
        torch.fft.rfftfreq(box, pixel_angstrom, device=bank.device)[None],
        defocus_u_angstrom=lens.defocus_u_angstrom,
        defocus_v_angstrom=lens.defocus_v_angstrom,
        defocus_angle_rad=math.radians(lens.defocus_angle_deg),
        voltage_kv=lens.voltage_kv,
        spherical_aberration_mm=lens.spherical_aberration_mm,
        amplitude_contrast=lens.amplitude_contrast,
        phase_shift_rad=math.radians(lens.phase_shift_deg),
    )
    return torch.fft.irfft2(torch.fft.rfft2(bank) * transfer, s=(box, box))


def matched_filters(seen: Tensor, noise_amplitude: Tensor) -> Filters:
    """Filters for templates with the CTF `(filter, y, x)`, origin n // 2, in a micrograph with this noise (see :class:`Whitened`)."""
    box = seen.shape[-1]
    gain = 1.0 / _between(noise_amplitude, _rings((box, box), seen.device))
    filters = torch.fft.irfft2(torch.fft.rfft2(torch.fft.ifftshift(seen, dim=(-2, -1))) * gain, s=(box, box))
    rows = filters.reshape(len(seen), -1).double().cpu().numpy()
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)
    power, vectors = np.linalg.eigh(rows.T @ rows) if rows.shape[1] < len(rows) else np.linalg.eigh(rows @ rows.T)
    kept = int(np.searchsorted(np.cumsum(power[::-1]), _KEPT * power.sum())) + 1
    top = vectors[:, ::-1][:, :kept]
    basis = top.T if rows.shape[1] < len(rows) else (top / np.sqrt(power[::-1][:kept])).T @ rows
    weights = rows @ basis.T
    weights /= np.maximum(np.linalg.norm(weights, axis=1, keepdims=True), 1e-30)
    as_tensor = [torch.from_numpy(a.astype(np.float32)).to(seen.device) for a in (basis, weights)]
    return Filters(as_tensor[0].reshape(kept, box, box), as_tensor[1])


def extremes(image: Tensor, filters: Filters) -> tuple[Tensor, Tensor]:
    """Highest and lowest score over all filters at each pixel of a whitened image `(y, x)`, periodic: two maps of its shape."""
    high, low = torch.empty_like(image), torch.empty_like(image)
    pieces = [_pieces(n, filters.basis.shape[-1]) for n in image.shape]
    for rows, inner_rows, out_rows in pieces[0]:
        for columns, inner_columns, out_columns in pieces[1]:
            tile = image[rows.to(image.device)[:, None], columns.to(image.device)[None]]
            for into, found in zip((high, low), _extremes_of_tile(tile, filters)):
                into[out_rows, out_columns] = found[inner_rows, inner_columns]
    return high, low


def _pieces(length: int, margin: int) -> list[tuple[Tensor, slice, slice]]:
    """Pieces of a periodic axis: indices with a margin, the part without it, and where that belongs. A short axis is one piece without."""
    if length <= _TILE:
        return [(torch.arange(length), slice(0, length), slice(0, length))]
    ends = [(first, min(first + _TILE, length)) for first in range(0, length, _TILE)]
    return [
        (torch.arange(first - margin, last + margin) % length, slice(margin, margin + last - first), slice(first, last))
        for first, last in ends
    ]


def _extremes_of_tile(image: Tensor, filters: Filters) -> tuple[Tensor, Tensor]:
    height, width = image.shape
    box = filters.basis.shape[-1]
    transform = torch.fft.rfft2(image)
    wrap = torch.fft.fftfreq(box, d=1.0 / box, device=image.device).long()
    rows, columns = (wrap % height)[:, None].expand(-1, box), (wrap % width)[None].expand(box, -1)
    found = torch.empty(len(filters.basis), height * width, device=image.device)
    for k, one in enumerate(filters.basis):
        wide = torch.zeros_like(image).index_put_((rows, columns), one, accumulate=True)
        found[k] = torch.fft.irfft2(transform * torch.fft.rfft2(wide).conj(), s=image.shape).reshape(-1)
    high, low = torch.empty(height * width, device=image.device), torch.empty(height * width, device=image.device)
    for first in range(0, height * width, _BLOCK):
        scores = filters.weights @ found[:, first : first + _BLOCK]
        high[first : first + _BLOCK], low[first : first + _BLOCK] = scores.amax(0), scores.amin(0)
    return high.reshape(height, width), low.reshape(height, width)
