"""Two-dimensional classification in polar coordinates: averages, references, and scores that distinguish protein from junk.

Everything an image needs is a table of angular modes (:mod:`cryodask.kernels.polar`): rotations are phases of modes, so that averages
are sums in mode space. Averages of the two parities of particles are kept apart: their correlation is the resolution of a class.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from cryodask.kernels import polar
from cryodask.kernels.expectation import Particles, image_modes, likelihoods, psi_count
from cryodask.kernels.fourier import soft_sphere
from cryodask.kernels.projection import shift_phases

KEPT_POSES = 4
POSE_THRESHOLD = 0.03
SCORES_TOGETHER = 2**20


def modes_to_half_circle(modes: Tensor, angle_count: int) -> Tensor:
    """Inverse of :func:`polar.angular_modes`: `(..., mode, ring)` to `(..., ring, half angle)`; x(-m) = (-1)^m conj x(m)."""
    limit = modes.shape[-2] - 1
    sign = torch.ones(limit + 1, 1, device=modes.device)
    sign[1::2] = -1.0
    whole = torch.zeros(*modes.shape[:-2], angle_count, modes.shape[-1], dtype=modes.dtype, device=modes.device)
    whole[..., : limit + 1, :] = modes
    whole[..., angle_count - limit :, :] = torch.flip((sign * modes.conj())[..., 1:, :], (-2,))
    return (torch.fft.ifft(whole, dim=-2) * angle_count)[..., : angle_count // 2, :].transpose(-1, -2)


def class_sums(
    data: Particles, rows: Tensor, classes: Tensor, shifts_px: Tensor, angle_rad: Tensor, weights: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """Sums of CTF-weighted images shifted by ``shifts_px`` and rotated by ``angle_rad``, and of CTF^2, in mode space.

    Parameters
    ----------
    rows, classes, angle_rad, weights : Tensor, `(pose,)`
        Row of the particle in ``data``, class, angle phi (mode m is multiplied by exp(i m phi)) and posterior weight.
    shifts_px : Tensor, `(pose, 2)` (y, x)

    Returns
    -------
    numerator, weight : Tensor, `(2, class, mode, ring)`, complex64
        Separate for particles of even and odd index in their set.
    """
    grid = data.grid
    rings = grid.rings
    limit = min(polar.mode_limit(rings), grid.angle_count // 2 - 1)
    parity = torch.from_numpy(data.index % 2).to(rows.device)[rows]
    slot = parity * count + classes
    numerator = torch.zeros(2 * count, limit + 1, rings, dtype=torch.complex64, device=rows.device)
    weight = torch.zeros_like(numerator)
    mode = torch.arange(limit + 1, device=rows.device).float()
    for lot in torch.arange(len(rows), device=rows.device).split(256) if len(rows) else ():
        contrast = data.polar_ctf[rows[lot]].float()
        phase = shift_phases(shifts_px[lot], grid.ky.reshape(-1), grid.kx.reshape(-1), grid.box).reshape(len(lot), rings, grid.ky.shape[-1])
        turn = torch.polar(weights[lot][:, None].expand(-1, limit + 1), angle_rad[lot][:, None] * mode)[..., None]
        numerator.index_add_(0, slot[lot], polar.angular_modes(data.polar_images[rows[lot]] * contrast * phase, limit) * turn)
        weight.index_add_(0, slot[lot], polar.angular_modes_real(contrast**2, limit) * turn)
    return numerator.reshape(2, count, limit + 1, rings), weight.reshape(2, count, limit + 1, rings)


def averages_from_sums(numerator: Tensor, weight: Tensor, noise_power: Tensor, grid: polar.PolarGrid, *, floor: float = 0.02) -> Tensor:
    """Wiener-filtered averages on half circles `(class, ring, half angle)` from mode sums `(class, mode, ring)`.

    The signal-to-noise ratio of a ring is the class's own power over what noise alone would leave, minus 1, at least ``floor``.
    """
    top = modes_to_half_circle(numerator, grid.angle_count)
    den = modes_to_half_circle(weight, grid.angle_count).real.clamp(min=0.0)
    mean = den.mean(-1, keepdim=True)
    plain = top / (den + 0.01 * mean + 1e-9)
    noise = noise_power[1 : grid.rings + 1, None]
    ssnr = (plain.abs().square().mean(-1, keepdim=True) * mean / noise - 1.0).clamp(min=floor)
    return top / (den + mean / ssnr + 1e-9)


def mask_averages(samples: Tensor, grid: polar.PolarGrid, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Real averages `(class, y, x)` under ``mask`` `(y, x)`, and their samples on the half circles."""
    images = polar.polar_to_images(samples, grid) * mask
    return images, polar.polar_transforms(images, grid)


def centres_of_mass(images: Tensor) -> Tensor:
    """Centre of mass `(class, 2)` (y, x) of the positive density of masked averages `(class, y, x)`, pixels from index n // 2.

    RELION centres its classes in the same way (Scheres 2012). An average without positive density has its centre at 0.
    """
    weight = images.double().clamp(min=0.0)
    along = torch.arange(images.shape[-1], device=images.device) - images.shape[-1] // 2
    total = weight.sum((-2, -1)).clamp(min=1e-20)
    return torch.stack([(weight.sum(-1) * along).sum(-1) / total, (weight.sum(-2) * along).sum(-1) / total], -1).float()


def move_averages(samples: Tensor, shifts_px: Tensor, grid: polar.PolarGrid) -> Tensor:
    """Averages on half circles `(class, ring, half angle)` shifted by ``shifts_px`` `(class, 2)` (y, x)."""
    return samples * shift_phases(shifts_px, grid.ky.reshape(-1), grid.kx.reshape(-1), grid.box).reshape(samples.shape)


def class_table(samples: Tensor, rings: int) -> Tensor:
    """Table of class averages for the scores, `(mode, 2 ring, class)`: conjugated modes, and those of squared amplitudes."""
    limit = polar.mode_limit(rings)
    half = samples[:, :rings]
    both = torch.cat([polar.angular_modes(half, limit), polar.angular_modes_real(half.abs() ** 2, limit)], -1)
    return both.conj().permute(1, 2, 0).contiguous()


def classify_chunk(
    data: Particles, rows: Tensor, centres_px: Tensor, offsets_px: Tensor, table: Tensor, rings: int, noise_power: Tensor,
    log_prior: Tensor, inverse_temperature: float,
) -> dict[str, Tensor]:  # fmt: skip
    """Posterior of class, rotation and shift of a few particles.

    Returns
    -------
    dict
        ``weight, class, shift, angle`` `(n, pose)` of the best poses (weights sum to 1; shift indexes ``offsets_px``; angle in
        radians), ``class_probability`` `(n, class)`, ``log_likelihood`` `(n,)`.
    """
    cross, norm = image_modes(data, rows, centres_px, offsets_px, rings, noise_power)
    count = psi_count(rings)
    both = torch.cat([cross, -norm.expand_as(cross)], -1) * inverse_temperature
    scores = polar.rotation_scores(both, table, count)
    scores += log_prior[:, None]
    n, shifts, classes, _ = scores.shape
    flat = scores.reshape(n, -1)
    top = flat.amax(1, keepdim=True)
    p = likelihoods(flat, top)
    total = p.sum(1, keepdim=True)
    by_class = (p.reshape(n, shifts, classes, count).sum((1, 3))) / total
    weight, place = p.topk(KEPT_POSES, 1)
    weight = weight * (weight > POSE_THRESHOLD * weight[:, :1])
    weight = weight / weight.sum(1, keepdim=True)
    return {
        "weight": weight,
        "class": place // count % classes,
        "shift": place // (count * classes),
        "angle": (place % count).float() * (2.0 * math.pi / count),
        "class_probability": by_class,
        "log_likelihood": (top + torch.log(total))[:, 0] - math.log(shifts * count),
    }


def residual_power(data: Particles, rows: Tensor, found: dict[str, Tensor], shifts_px: Tensor, samples: Tensor) -> Tensor:
    """Mean |X - C A|^2 of each ring at the best pose, `(n, ring + 1)` float64 (0 for ring 0)."""
    grid = data.grid
    limit = min(polar.mode_limit(grid.rings), grid.angle_count // 2 - 1)
    modes = polar.angular_modes(samples[found["class"][:, 0]], limit)
    turn = torch.polar(torch.ones_like(found["angle"][:, :1]), -found["angle"][:, :1] * torch.arange(limit + 1, device=rows.device))
    model = modes_to_half_circle(modes * turn[..., None], grid.angle_count)
    phase = shift_phases(-shifts_px, grid.ky.reshape(-1), grid.kx.reshape(-1), grid.box).reshape(model.shape)
    difference = data.polar_images[rows] - model * phase * data.polar_ctf[rows].float()
    out = torch.zeros(len(rows), grid.rings + 1, dtype=torch.float64, device=rows.device)
    out[:, 1:] = difference.abs().square().mean(-1).double()
    return out


def ring_correlation(numerator: Tensor, weight: Tensor, grid: polar.PolarGrid, mask: Tensor) -> Tensor:
    """Fourier ring correlation `(class, ring)` of the averages of even and odd particles under a mask; sums `(2, class, mode, ring)`."""
    halves = []
    for num, den in zip(numerator, weight):
        below = modes_to_half_circle(den, grid.angle_count).real.clamp(min=0.0)
        plain = modes_to_half_circle(num, grid.angle_count) / (below + 0.05 * below.mean(-1, keepdim=True) + 1e-9)
        halves.append(mask_averages(plain, grid, mask)[1])
    a, b = halves
    power = torch.sqrt(a.abs().square().sum(-1) * b.abs().square().sum(-1)).clamp(min=1e-20)
    return (a * b.conj()).real.sum(-1) / power


def class_resolution(correlation: Tensor, length_angstrom: float, threshold: float = 0.5) -> np.ndarray:
    """Resolution `(class,)`, Angstrom, where the ring correlation first falls below ``threshold`` (ring 1 at least)."""
    out = []
    for curve in correlation.cpu().numpy():
        below = np.nonzero(curve[1:] < threshold)[0]
        ring = len(curve) if not len(below) else int(below[0]) + 1
        out.append(length_angstrom / ring)
    return np.array(out)


def compactness(images: Tensor, pixel_size_angstrom: float, diameter_angstrom: float) -> Tensor:
    """Fraction `(class,)` of an average's variance within 0.7 of the mask radius: low for off-centre, truncated or empty classes."""
    core = soft_sphere(
        images.shape[-1], pixel_size_angstrom, 0.35 * diameter_angstrom, 0.1 * diameter_angstrom, dims=2, device=images.device
    )
    power = (images - images.mean((-2, -1), keepdim=True)).square()
    return (power * core).sum((-2, -1)) / power.sum((-2, -1)).clamp(min=1e-20)
