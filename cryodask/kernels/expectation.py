"""Expectation step against a map: poses of particles by a likelihood search over all views, in-plane angles and shifts.

Gaussian likelihood with noise power sigma2 per ring. For a particle X with CTF C, a slice a and a shift phase e:

    log L = sum over the half plane of [2 Re(conj(a) C X e) - C^2 |a|^2] / sigma2      (gain over an empty image)

Both terms are evaluated on polar rings (:mod:`cryodask.kernels.polar`), so that all in-plane angles come from one small FFT. The search
refines a coarse grid of views level by level; the coarsest level is always the whole asymmetric unit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cryodask.kernels import polar
from cryodask.kernels.ctf import ctf
from cryodask.kernels.fourier import soft_sphere
from cryodask.kernels.orientations import euler_to_matrix, healpix_angles, in_plane_rotations
from cryodask.kernels.projection import FourierVolume, half_plane, image_transforms, pixels_within, shift_phases, slices
from cryodask.kernels.subpixel import top_between
from cryodask.vocabulary import CTF_COLUMNS, OPTICS

_MOST_TOGETHER = 16
_SCORES_TOGETHER = 2**20
"""Bytes of scores per chunk: 4 MB, so that passes over them stay in the cache (a chunk of 16 MB takes twice the time)."""
_BANK_LIMIT = 600e6
"""Bytes of a reference bank above which views are sliced on demand."""


@dataclass(frozen=True)
class Particles:
    """Particle images ready for scoring (polar) and for insertion (half plane).

    ``index`` `(n,)` numpy int64, index in the set; ``polar_images`` `(n, ring, half angle)` complex64 of masked images;
    ``polar_ctf`` the CTF there; ``transforms`` `(n, pixel)` complex64 of whole images on ``half_plane(radius)``; ``plane_ctf`` the CTF
    there; ``shell_power`` `(n, radius + 1)`, sums of |X|^2 over the shells; ``half`` their half-set.
    """

    index: np.ndarray
    grid: polar.PolarGrid
    polar_images: Tensor
    polar_ctf: Tensor
    radius: int
    transforms: Tensor
    plane_ctf: Tensor
    shell_power: Tensor
    half: int = 0

    @property
    def box(self) -> int:
        """Box size of the images, pixels."""
        return self.grid.box


_OF_THE_CTF = (*CTF_COLUMNS, *OPTICS)


def ctf_values(columns: Mapping[str, np.ndarray], ky: Tensor, kx: Tensor, length_angstrom: float) -> Tensor:
    """CTF `(n, ...)` of particles at frequencies `(...)` in cycles per box of ``length_angstrom``; columns as in the vocabulary."""
    u, v, angle, phase, kv, cs, contrast = (
        torch.as_tensor(np.asarray(columns[name], np.float64), device=ky.device).reshape(-1, *[1] * ky.dim()) for name in _OF_THE_CTF
    )
    # the phase grows to hundreds of radians: frequencies in float64 until the sine is taken
    return ctf(
        ky.double() / length_angstrom,
        kx.double() / length_angstrom,
        defocus_u_angstrom=u,
        defocus_v_angstrom=v,
        defocus_angle_rad=torch.deg2rad(angle),
        voltage_kv=kv,
        spherical_aberration_mm=cs,
        amplitude_contrast=contrast,
        phase_shift_rad=torch.deg2rad(phase),
    ).float()


def load_particles(
    images: np.ndarray,
    columns: Mapping[str, np.ndarray],
    index: np.ndarray,
    *,
    pixel_size_angstrom: float,
    radius: int,
    mask_radius_angstrom: float,
    edge_angstrom: float = 15.0,
    half: int = 0,
    device: str = "cpu",
) -> Particles:
    """Transform particle images `(n, y, x)` for the search.

    ``radius`` is the highest frequency needed, cycles per box. Scoring sees the images through a soft disk, insertion
    sees all of them (a mask would convolve the slices).
    """
    box = images.shape[-1]
    length = box * pixel_size_angstrom
    mask = soft_sphere(box, pixel_size_angstrom, mask_radius_angstrom, edge_angstrom, dims=2, device=device)
    grid = polar.polar_grid(box, radius, None, device)
    plane = half_plane(radius, device)
    parts: list[tuple[Tensor, ...]] = []
    for start in range(0, len(images), 256):
        lot = slice(start, start + 256)
        x = torch.as_tensor(np.ascontiguousarray(images[lot], dtype=np.float32), device=device)
        some = {name: columns[name][lot] for name in _OF_THE_CTF}
        transform = image_transforms(x, radius)
        power = torch.zeros(len(x), radius + 1, device=device).index_add_(1, plane.shell.clamp(max=radius), transform.abs() ** 2)
        parts.append((
            polar.polar_transforms(x * mask, grid), ctf_values(some, grid.ky, grid.kx, length),
            transform, ctf_values(some, plane.ky, plane.kx, length), power,
        ))  # fmt: skip
    polar_images, polar_ctf, transforms, plane_ctf, power = (torch.cat(p) for p in zip(*parts))
    return Particles(np.asarray(index), grid, polar_images, polar_ctf, radius, transforms, plane_ctf, power, half)


def shift_grid(step_px: float, radius_px: float, device: str = "cpu") -> Tensor:
    """Offsets `(shift, 2)` (y, x), pixels, on a square grid within a disk; at least 3 x 3."""
    reach = max(1, int(radius_px / step_px + 1e-6))
    o = torch.arange(-reach, reach + 1, device=device) * step_px
    y, x = torch.meshgrid(o, o, indexing="ij")
    inside = y * y + x * x <= max(radius_px, 1.5 * step_px) ** 2 + 1e-6
    return torch.stack([y[inside], x[inside]], -1).float()


def _thinned(half: Tensor, rings: int) -> Tensor:
    """The first rings, with only as many angles as their modes need."""
    count = half.shape[-1]
    need = polar.mode_limit(rings) + 1
    stride = max(s for s in range(1, count + 1) if count % s == 0 and count // s >= need)
    return half[..., :rings, ::stride]


def image_modes(
    data: Particles, rows: Tensor, centres_px: Tensor, offsets_px: Tensor, rings: int, noise_power: Tensor
) -> tuple[Tensor, Tensor]:
    """Weighted modes of shifted images `(n, mode, shift, ring)` and of CTF^2 `(n, mode, 1, ring)`.

    Particle i is moved by ``centres_px[i] + offsets_px[s]`` `(y, x)`. Scored against references the first gives the cross term of the
    log-likelihood, the second the norm term. ``noise_power`` `(>= rings + 1,)` is indexed by ring.
    """
    grid, limit = data.grid, polar.mode_limit(rings)
    ky, kx = (_thinned(k, rings) for k in (grid.ky, grid.kx))
    contrast = _thinned(data.polar_ctf[rows], rings)
    ringwise = (rings, ky.shape[-1])
    at_centre = shift_phases(centres_px, ky.reshape(-1), kx.reshape(-1), grid.box).reshape(-1, *ringwise)
    moved = shift_phases(offsets_px, ky.reshape(-1), kx.reshape(-1), grid.box).reshape(-1, *ringwise)
    centred = _thinned(data.polar_images[rows], rings) * contrast * at_centre
    weight = polar.ring_weights(noise_power[1 : rings + 1])
    cross = polar.angular_modes(centred[:, None] * moved[None], limit) * weight
    norm = polar.angular_modes_real(contrast**2, limit) * (0.5 * weight)
    return cross.transpose(1, 2).contiguous(), norm[:, :, None]


def reference_modes(volume: FourierVolume, rotations: Tensor, grid: polar.PolarGrid, rings: int) -> Tensor:
    """Conjugated modes of slices and, after them, of their squared amplitudes: `(view, mode, 2 ring)` complex64."""
    limit = polar.mode_limit(rings)
    ky, kx = (_thinned(k, rings) for k in (grid.ky, grid.kx))
    out = torch.empty(len(rotations), limit + 1, 2 * rings, dtype=torch.complex64, device=rotations.device)
    for lot in torch.arange(len(rotations)).split(128):
        half = slices(volume, rotations[lot], ky.reshape(-1), kx.reshape(-1)).reshape(len(lot), rings, -1)
        out[lot, :, :rings] = polar.angular_modes(half, limit).conj()
        out[lot, :, rings:] = polar.angular_modes_real(half.abs() ** 2, limit).conj()
    return out


@dataclass(frozen=True)
class Level:
    """One level of the search: HEALPix order, highest ring, grid of shifts in pixels, views kept for the next level (0 = last)."""

    order: int
    rings: int
    step_px: float
    reach_px: float
    keep: int


@dataclass(frozen=True)
class Bank:
    """Views of one level: ``place`` maps nested pixels to rows of ``rotations`` and ``table``.

    ``table`` `(view, mode, 2 ring)` is that of :func:`reference_modes`, None if it would be too large.
    """

    level: Level
    rotations: Tensor
    place: Tensor
    table: Tensor | None


def make_bank(volume: FourierVolume, level: Level, pixels: np.ndarray, turn: Tensor, grid: polar.PolarGrid, device: str) -> Bank:
    """Reference modes of the ``pixels`` of a level, the whole grid turned by ``turn`` `(3, 3)`."""
    rot, tilt = (torch.from_numpy(a).to(device) for a in healpix_angles(level.order, pixels))
    rotations = (euler_to_matrix(rot, tilt, torch.zeros_like(rot)) @ turn.double().to(device)).float()
    place = torch.full((12 * 4**level.order,), -1, dtype=torch.int64, device=device)
    place[torch.from_numpy(pixels).to(device)] = torch.arange(len(pixels), device=device)
    size = 16.0 * len(pixels) * (polar.mode_limit(level.rings) + 1) * level.rings
    if size > _BANK_LIMIT:
        return Bank(level, rotations, place, None)
    return Bank(level, rotations, place, reference_modes(volume, rotations, grid, level.rings))


def _look_up(bank: Bank, rows: Tensor, volume: FourierVolume, grid: polar.PolarGrid) -> Tensor:
    """Modes of the views ``rows`` `(n, view)`: `(n, mode, 2 ring, view)`."""
    if bank.table is not None:
        found = bank.table[rows]
    else:
        unique, back = torch.unique(rows, return_inverse=True)
        found = reference_modes(volume, bank.rotations[unique], grid, bank.level.rings)[back]
    return found.permute(0, 2, 3, 1)


def psi_count(rings: int) -> int:
    """Number of in-plane angles scored up to a ring limit."""
    return polar.fast_even(2 * polar.mode_limit(rings) + 2)


@dataclass(frozen=True)
class Poses:
    """Weighted poses of a few particles.

    ``rotations`` `(n, pose, 3, 3)`; ``weights`` `(n, pose)`, sum 1, zero = unused; ``shift_weights`` `(n, pose, shift)`, sum over
    shifts = weight; shift s of particle i is ``centres_px[i] + offsets_px[s]`` (y, x); ``best_px`` `(n, 2)` the shift of pose 0,
    ``top_px`` the same between the points of the search's grid;
    ``log_likelihood`` `(n,)` of the sum over all poses, gain over an empty image.
    """

    rotations: Tensor
    weights: Tensor
    shift_weights: Tensor
    centres_px: Tensor
    offsets_px: Tensor
    best_px: Tensor
    top_px: Tensor
    log_likelihood: Tensor


def shift_log_prior(centres_px: Tensor, offsets_px: Tensor, sigma_px: float) -> Tensor:
    """Gaussian prior of the shifts about zero, `(n, shift)`."""
    total = centres_px[:, None] + offsets_px[None]
    return total.square().sum(-1) * (-0.5 / sigma_px**2)


def chunks(count: int, bank: Bank, shifts: int, device: str = "cpu") -> list[Tensor]:
    """Rows of particles that are scored together against all views of a bank.

    Depends on the level only, not on machine or worker: products of other shapes would round otherwise.
    """
    each = shifts * len(bank.rotations) * psi_count(bank.level.rings)
    return list(torch.arange(count, device=device).split(max(1, min(_MOST_TOGETHER, _SCORES_TOGETHER // each))))


def whole_table(bank: Bank) -> Tensor:
    """Table of all views of a coarse bank for :func:`log_likelihoods`, `(mode, 2 ring, view)`."""
    if bank.table is None:
        raise ValueError("the coarsest level of the search is too large for a table")
    return bank.table.permute(1, 2, 0).contiguous()


def log_likelihoods(
    data: Particles, rows: Tensor, centres_px: Tensor, offsets_px: Tensor, table: Tensor, rings: int, noise_power: Tensor,
    prior: Tensor | None = None, scale: float = 1.0,
) -> Tensor:  # fmt: skip
    """Log-likelihood gains `(n, shift, view, psi)`, float32.

    Parameters
    ----------
    table : Tensor, `(mode, 2 ring, view)` or `(n, mode, 2 ring, view)`, complex64
        Conjugated modes of the views and of their squares: cross and norm term come out of one product.
    prior : Tensor, `(n, shift)`, optional
        Added to every view; it enters through mode 0.
    scale : float
        Inverse temperature.
    """
    cross, norm = image_modes(data, rows, centres_px, offsets_px, rings, noise_power)
    both = torch.cat([cross, -norm.expand_as(cross)], -1)
    if scale != 1.0:
        both *= scale
    return polar.rotation_scores(both, table, psi_count(rings), prior)


def draw_poses(scores: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw (shift, view, psi index), each `(n, draw)`, from the posterior of log-likelihoods `(n, shift, view, psi)`.

    Also returns the log-likelihood summed over all poses, `(n,)`. ``uniforms`` `(n, draw)` are numbers in [0, 1).
    """
    n, _, views, angles = scores.shape
    top = scores.reshape(n, -1).amax(1)
    p = torch.exp(scores - top[:, None, None, None]).reshape(n, -1, angles)
    groups = p.sum(-1).double().cumsum(1)
    total = groups[:, -1:]
    target = uniforms.to(groups) * total
    group = torch.searchsorted(groups, target).clamp(max=groups.shape[1] - 1)
    before = torch.where(group > 0, groups.gather(1, (group - 1).clamp(min=0)), torch.zeros_like(target))
    inside = p.gather(1, group[..., None].expand(-1, -1, angles)).double().cumsum(-1)
    angle = torch.searchsorted(inside, (target - before)[..., None])[..., 0].clamp(max=angles - 1)
    return group // views, group % views, angle, top + torch.log(total[:, 0]).float()


def psi_rotation(index: Tensor, count: int) -> Tensor:
    """In-plane rotation matrices of psi indices of :func:`polar.rotation_scores`."""
    return in_plane_rotations(index.float() * (-2.0 * math.pi / count))


def sample_poses(
    data: Particles, rows: Tensor, centres_px: Tensor, offsets_px: Tensor, bank: Bank, table: Tensor, noise_power: Tensor,
    sigma_px: float, uniforms: Tensor, inverse_temperature: float = 1.0,
) -> Poses:  # fmt: skip
    """Draw poses with equal weights from the whole posterior of the coarsest level: no selection, hence no bias towards the map.

    ``uniforms`` `(n, draw)` in [0, 1); ``inverse_temperature`` multiplies the log-likelihood (below 1: flatter).
    """
    prior = shift_log_prior(centres_px, offsets_px, sigma_px)
    scores = log_likelihoods(data, rows, centres_px, offsets_px, table, bank.level.rings, noise_power, prior, inverse_temperature)
    shift, view, angle, total = draw_poses(scores, uniforms)
    n, draws = shift.shape
    weights = torch.full((n, draws), 1.0 / draws, device=scores.device)
    shift_weights = torch.zeros(n, draws, len(offsets_px), device=scores.device).scatter_(2, shift[..., None], 1.0 / draws)
    rotations = psi_rotation(angle, scores.shape[-1]) @ bank.rotations[view]
    best = centres_px + offsets_px[shift[:, 0]]
    return Poses(rotations, weights, shift_weights, centres_px, offsets_px, best, best, total)


def search_poses(
    data: Particles, rows: Tensor, centres_px: Tensor, banks: list[Bank], table: Tensor, pixels: Tensor, volume: FourierVolume,
    noise_power: Tensor, sigma_px: float, *, poses: int, threshold: float,
) -> Poses:  # fmt: skip
    """Best poses and their posterior weights, by a search from the coarsest level to the finest.

    Parameters
    ----------
    banks : list of Bank
        Coarse to fine; orders rise by one.
    table : Tensor
        :func:`whole_table` of the coarsest.
    pixels : Tensor, `(view,)`
        Nested pixels of the coarsest bank, in its order.
    poses, threshold
        At most ``poses`` (view, psi) are kept per particle, and only those above ``threshold`` times the best.
    """
    first = banks[0]
    device = noise_power.device
    n = len(rows)
    offsets = shift_grid(first.level.step_px, first.level.reach_px, str(device))
    prior = shift_log_prior(centres_px, offsets, sigma_px)
    scores = log_likelihoods(data, rows, centres_px, offsets, table, first.level.rings, noise_power, prior)
    best, at = scores.amax(-1).max(1)
    winner = best.argmax(1)
    kept = pixels[best.topk(min(first.level.keep, best.shape[1]), 1).indices]
    centres = centres_px + offsets[at[torch.arange(n, device=device), winner]]
    for bank in banks[1:]:
        level = bank.level
        offsets = shift_grid(level.step_px, level.reach_px, str(device))
        children = (kept[:, :, None] * 4 + torch.arange(4, device=device)).reshape(n, -1)
        view = bank.place[children]
        prior = shift_log_prior(centres, offsets, sigma_px)
        views = _look_up(bank, view, volume, data.grid)
        full = log_likelihoods(data, rows, centres, offsets, views, level.rings, noise_power, prior)
        count = full.shape[-1]
        if level.keep:
            best, at = full.amax(-1).max(1)
            chosen = best.topk(min(level.keep, best.shape[1]), 1).indices
            kept = children.gather(1, chosen)
            centres = centres + offsets[at.gather(1, chosen)[:, 0]]
    # the last level: posterior over (view, psi), shifts summed out
    joint = torch.logsumexp(full, 1).reshape(n, -1)
    total = torch.logsumexp(joint, 1)
    top, place = joint.topk(poses, 1)
    weights = torch.exp(top - top[:, :1])
    weights = weights * (weights > threshold)
    weights = weights / weights.sum(1, keepdim=True)
    by_shift = full.permute(0, 2, 3, 1).reshape(n, -1, len(offsets))
    of_poses = by_shift.gather(1, place[..., None].expand(-1, -1, len(offsets)))
    shift_weights = torch.softmax(of_poses, -1) * weights[..., None]
    rotations = psi_rotation(place % count, count) @ bank.rotations[view.gather(1, place // count)]
    best_px = centres + offsets[shift_weights[:, 0].argmax(-1)]
    top_px = centres + top_between(of_poses[:, 0], offsets)
    return Poses(rotations, weights, shift_weights, centres, offsets, best_px, top_px, total)


def weighted_slices(data: Particles, rows: Tensor, found: Poses, radius: int, noise_power: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Contribution of a chunk to the accumulator: rotations `(k, 3, 3)`, numerators and weights `(k, pixel)` on ``half_plane(radius)``."""
    device = str(noise_power.device)
    plane = half_plane(radius, device)
    select = pixels_within(data.radius, radius, device)
    inverse = 1.0 / noise_power[plane.shell]
    transform, contrast = data.transforms[rows][:, select], data.plane_ctf[rows][:, select]
    centred = transform * contrast * inverse * shift_phases(found.centres_px, plane.ky, plane.kx, data.box)
    i, k = torch.nonzero(found.weights > 0, as_tuple=True)
    moves = shift_phases(found.offsets_px, plane.ky, plane.kx, data.box)
    numerator = centred[i] * (found.shift_weights[i, k].to(torch.complex64) @ moves)
    weight = (contrast**2 * inverse)[i] * found.weights[i, k][:, None]
    return found.rotations[i, k], numerator, weight


def residual_power(data: Particles, rows: Tensor, found: Poses, volume: FourierVolume, rings: int) -> Tensor:
    """Sums over shells of |X - model|^2 at the first pose, `(radius + 1,)` float64; beyond ``rings`` the model is zero."""
    device = str(data.transforms.device)
    plane = half_plane(rings, device)
    select = pixels_within(data.radius, rings, device)
    model = slices(volume, found.rotations[:, 0], plane.ky, plane.kx) * data.plane_ctf[rows][:, select]
    model *= shift_phases(-found.best_px, plane.ky, plane.kx, data.box)
    change = model.abs() ** 2 - 2.0 * (model.conj() * data.transforms[rows][:, select]).real
    total = data.shell_power[rows].sum(0, dtype=torch.float64)
    return total.index_add_(0, plane.shell.clamp(max=data.radius), change.sum(0, dtype=torch.float64))
