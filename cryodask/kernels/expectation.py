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
from cryodask.kernels.ctf import ctf_phase
from cryodask.kernels.fourier import soft_sphere
from cryodask.kernels.orientations import euler_to_matrix, healpix_angles, in_plane_rotations
from cryodask.kernels.projection import FourierVolume, shift_phases, slices
from cryodask.vocabulary import CTF_COLUMNS, OPTICS

_MOST_TOGETHER = 16
_SCORES_TOGETHER = 2**20
"""Bytes of scores per chunk: 4 MB, so that passes over them stay in the cache (a chunk of 16 MB takes twice the time)."""


@dataclass(frozen=True)
class Particles:
    """Particle images on polar rings, ready for scoring.

    ``index`` `(n,)` numpy int64, index in the set; ``polar_images`` `(n, ring, half angle)` complex64 of masked images;
    ``polar_ctf`` the CTF there, float16; ``contrast`` `(n,)` a factor on it; ``group`` `(n,)` int64, the row of noise power spectra that
    holds for a particle.
    """

    index: np.ndarray
    grid: polar.PolarGrid
    polar_images: Tensor
    polar_ctf: Tensor
    contrast: Tensor
    group: Tensor

    @property
    def box(self) -> int:
        """Box size of the images, pixels."""
        return self.grid.box


_OF_THE_CTF = (*CTF_COLUMNS, *OPTICS)
_TETRAFOIL = ("tetrafoil_x_angstrom4", "tetrafoil_y_angstrom4")


def ctf_values(columns: Mapping[str, np.ndarray], ky: Tensor, kx: Tensor, length_angstrom: float) -> Tensor:
    """CTF `(n, ...)` of particles at frequencies `(...)` in cycles per box of ``length_angstrom``; columns as in the vocabulary."""
    u, v, angle, phase, kv, cs, contrast = (
        torch.as_tensor(np.asarray(columns[name], np.float64), device=ky.device).reshape(-1, *[1] * ky.dim()) for name in _OF_THE_CTF
    )
    # the phase grows to hundreds of radians: frequencies in float64 until the sine is taken
    y, x = ky.double() / length_angstrom, kx.double() / length_angstrom
    argument = ctf_phase(
        y,
        x,
        defocus_u_angstrom=u,
        defocus_v_angstrom=v,
        defocus_angle_rad=torch.deg2rad(angle),
        voltage_kv=kv,
        spherical_aberration_mm=cs,
        amplitude_contrast=contrast,
        phase_shift_rad=torch.deg2rad(phase),
    )
    if "tetrafoil_x_angstrom4" in columns:
        fourfold = (x * x - y * y) ** 2 - (2.0 * x * y) ** 2, 4.0 * (x * x - y * y) * x * y
        for axis, basis in zip("xy", fourfold):
            own = torch.as_tensor(np.asarray(columns[f"tetrafoil_{axis}_angstrom4"], np.float64), device=ky.device)
            argument = argument + own.reshape(-1, *[1] * ky.dim()) * basis
    return torch.sin(argument).float()


def load_particles(
    images: np.ndarray,
    columns: Mapping[str, np.ndarray],
    index: np.ndarray,
    *,
    pixel_size_angstrom: float,
    rings: int,
    mask_radius_angstrom: float,
    edge_angstrom: float = 15.0,
    group: Tensor | None = None,
    device: str = "cpu",
) -> Particles:
    """Sample the transforms of particle images `(n, y, x)` on ``rings`` rings, as seen through a soft disk.

    By default all are of one noise ``group``.
    """
    box = images.shape[-1]
    mask = soft_sphere(box, pixel_size_angstrom, mask_radius_angstrom, edge_angstrom, dims=2, device=device)
    grid = polar.polar_grid(box, rings, None, device)
    parts: list[tuple[Tensor, ...]] = []
    for start in range(0, len(images), 256):
        lot = slice(start, start + 256)
        x = torch.as_tensor(np.ascontiguousarray(images[lot], dtype=np.float32), device=device)
        some = {name: columns[name][lot] for name in (*_OF_THE_CTF, *_TETRAFOIL) if name in columns}
        parts.append((polar.polar_transforms(x * mask, grid), ctf_values(some, grid.ky, grid.kx, box * pixel_size_angstrom).half()))
    polar_images, polar_ctf = (torch.cat(p) for p in zip(*parts))
    group = torch.zeros(len(index), dtype=torch.int64, device=device) if group is None else group
    return Particles(np.asarray(index), grid, polar_images, polar_ctf, torch.ones(len(index), device=device), group)


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

    Particle i is moved by ``centres_px[i] + offsets_px[s]`` `(y, x)`; offsets `(n, shift, 2)` are those of each particle. Scored
    against references the first gives the cross term of the log-likelihood, the second the norm term. ``noise_power``
    `(group, >= rings + 1)`, or of a single group, is indexed by ring.
    """
    grid, limit = data.grid, polar.mode_limit(rings)
    ky, kx = (_thinned(k, rings) for k in (grid.ky, grid.kx))
    contrast = _thinned(data.polar_ctf[rows], rings).float() * data.contrast[rows, None, None]
    ringwise = (rings, ky.shape[-1])
    at_centre = shift_phases(centres_px, ky.reshape(-1), kx.reshape(-1), grid.box).reshape(-1, *ringwise)
    moved = shift_phases(offsets_px.reshape(-1, 2), ky.reshape(-1), kx.reshape(-1), grid.box).reshape(*offsets_px.shape[:-1], *ringwise)
    centred = _thinned(data.polar_images[rows], rings) * contrast * at_centre
    weight = polar.ring_weights(torch.atleast_2d(noise_power)[:, 1 : rings + 1])[data.group[rows]]
    cross = polar.angular_modes(centred[:, None] * moved, limit) * weight[:, None, None]
    norm = polar.angular_modes_real(contrast**2, limit) * (0.5 * weight[:, None])
    return cross.transpose(1, 2).contiguous(), norm[:, :, None]


def reference_modes(volume: FourierVolume, rotations: Tensor, grid: polar.PolarGrid, rings: int) -> Tensor:
    """Conjugated modes of slices and, after them, the even ones of their squared amplitudes: `(view, mode, 2 ring)` float32.

    Even modes come first (:func:`polar.even_first`), real parts before imaginary ones.
    """
    limit = polar.mode_limit(rings)
    ky, kx = (_thinned(k, rings) for k in (grid.ky, grid.kx))
    out = torch.empty(len(rotations), limit + 1 + limit // 2 + 1, 2, rings, device=rotations.device)
    for lot in torch.arange(len(rotations)).split(128):
        half = slices(volume, rotations[lot], ky.reshape(-1), kx.reshape(-1)).reshape(len(lot), rings, -1)
        out[lot, : limit + 1] = polar.half_circle_modes(half, limit).permute(2, 0, 1, 3)
        out[lot, limit + 1 :] = polar.half_circle_modes_real(half.abs() ** 2, limit).permute(2, 0, 1, 3)
    out[:, :, 1].neg_()
    return out.flatten(2)


@dataclass(frozen=True)
class Level:
    """A grid of poses: HEALPix order, highest ring, step and reach of the shifts in pixels."""

    order: int
    rings: int
    step_px: float
    reach_px: float


@dataclass(frozen=True)
class Bank:
    """Views of one level: ``place`` maps nested pixels to rows of ``rotations`` and ``table``.

    ``table`` `(view, mode, 2 ring)` is that of :func:`reference_modes`; ``phases`` `(shift, ring, half angle)` complex64 move images by
    the shifts of the level.
    """

    level: Level
    rotations: Tensor
    place: Tensor
    table: Tensor
    phases: Tensor


def make_bank(volume: FourierVolume, level: Level, pixels: np.ndarray, turn: Tensor, grid: polar.PolarGrid, device: str) -> Bank:
    """Reference modes of the ``pixels`` of a level, the whole grid turned by ``turn`` `(3, 3)`."""
    rot, tilt = (torch.from_numpy(a).to(device) for a in healpix_angles(level.order, pixels))
    rotations = (euler_to_matrix(rot, tilt, torch.zeros_like(rot)) @ turn.double().to(device)).float()
    place = torch.full((12 * 4**level.order,), -1, dtype=torch.int64, device=device)
    place[torch.from_numpy(pixels).to(device)] = torch.arange(len(pixels), device=device)
    phases = _phases(shift_grid(level.step_px, level.reach_px, device), grid, level.rings)
    return Bank(level, rotations, place, reference_modes(volume, rotations, grid, level.rings), phases)


def _phases(shifts_px: Tensor, grid: polar.PolarGrid, rings: int) -> Tensor:
    """Phases of shifts `(n, 2)` on the rings, `(n, ring, half angle)` complex64."""
    ky, kx = (_thinned(k, rings) for k in (grid.ky, grid.kx))
    return shift_phases(shifts_px, ky.reshape(-1), kx.reshape(-1), grid.box).reshape(-1, *ky.shape)


def psi_count(rings: int) -> int:
    """Number of in-plane angles scored up to a ring limit."""
    return polar.fast_even(2 * polar.mode_limit(rings) + 2)


def shift_log_prior(centres_px: Tensor, offsets_px: Tensor, sigma_px: float) -> Tensor:
    """Gaussian prior of the shifts about zero, `(n, shift)`; offsets `(shift, 2)` or `(n, shift, 2)`."""
    total = centres_px[:, None] + offsets_px
    return total.square().sum(-1) * (-0.5 / sigma_px**2)


def chunks(count: int, bank: Bank, shifts: int, device: str = "cpu") -> list[Tensor]:
    """Rows of particles that are scored together against all views of a bank.

    Depends on the level only, not on machine or worker: products of other shapes would round otherwise.
    """
    each = shifts * len(bank.rotations) * psi_count(bank.level.rings)
    return list(torch.arange(count, device=device).split(max(1, min(_MOST_TOGETHER, _SCORES_TOGETHER // each))))


def whole_table(bank: Bank) -> Tensor:
    """Table of all views of a coarse bank for :func:`log_likelihoods`, `(mode, 2 ring, view)`."""
    return bank.table.permute(1, 2, 0).contiguous()


def cross_products(
    data: Particles, rows: Tensor, centres_px: Tensor | None, phases: Tensor, table: Tensor, rings: int, noise_power: Tensor,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Cross term `(mode, part, n, shift, view)` and norm term `(even mode, part, n, 1, view)` of the log-likelihood gain, as modes.

    Parameters as those of :func:`log_likelihoods`.
    """
    limit = polar.mode_limit(rings)
    contrast = _thinned(data.polar_ctf[rows], rings).float() * data.contrast[rows, None, None]
    weight = scale * polar.ring_weights(torch.atleast_2d(noise_power)[:, 1 : rings + 1])[data.group[rows]][..., None]
    centred = _thinned(data.polar_images[rows], rings) * (contrast * weight)
    if centres_px is not None:
        centred *= _phases(centres_px, data.grid, rings)
    cross = polar.half_circle_modes(centred[:, None] * phases, limit)
    norm = polar.half_circle_modes_real(contrast * contrast * (0.5 * weight), limit)[:, :, :, None]
    return polar.mode_products(cross, table[..., : limit + 1, :, :]), polar.mode_products(norm, table[..., limit + 1 :, :, :])


def log_likelihoods(
    data: Particles, rows: Tensor, centres_px: Tensor | None, phases: Tensor, table: Tensor, rings: int, noise_power: Tensor,
    prior: Tensor | None = None, scale: float = 1.0,
) -> Tensor:  # fmt: skip
    """Log-likelihood gains `(n, psi, shift, view)`, float32.

    Parameters
    ----------
    centres_px : Tensor, `(n, 2)`, optional
        Particles are moved by these shifts (y, x) first.
    phases : Tensor, `(shift, ring, half angle)` or `(n, shift, ring, half angle)`
        Phases of the shifts, those of a bank or some for each particle.
    table : Tensor, `(mode, 2 ring, view)` or `(n, mode, 2 ring, view)`
        Of :func:`reference_modes`.
    prior : Tensor, `(n, shift)`, optional
        Added to every view; it enters through mode 0.
    scale : float
        Inverse temperature.
    """
    products, norm = cross_products(data, rows, centres_px, phases, table, rings, noise_power, scale)
    products[: len(norm)] -= norm
    if prior is not None:
        products[0, 0] += prior[..., None]
    return polar.angle_scores(products, polar.mode_limit(rings), psi_count(rings))


def likelihoods(scores: Tensor, top: Tensor) -> Tensor:
    """``exp(scores - top)`` in place; what is smaller than e^-80 of the best is e^-80: denormal results take fourteen times as long."""
    return scores.sub_(top).clamp_(min=-80.0).exp_()


def draw_poses(scores: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw (shift, view, psi index), each `(n, draw)`, from the posterior of log-likelihoods `(n, psi, shift, view)`, which are lost.

    Also returns the log-likelihood summed over all poses, `(n,)`. ``uniforms`` `(n, draw)` are numbers in [0, 1).
    """
    angles, views = scores.shape[1], scores.shape[3]
    top = scores.amax((1, 2, 3))
    p = likelihoods(scores, top[:, None, None, None]).flatten(2)
    groups = p.sum(1).double().cumsum(1)
    total = groups[:, -1:]
    target = uniforms.to(groups) * total
    group = torch.searchsorted(groups, target).clamp(max=groups.shape[1] - 1)
    before = torch.where(group > 0, groups.gather(1, (group - 1).clamp(min=0)), torch.zeros_like(target))
    inside = p.gather(2, group[:, None].expand(-1, angles, -1)).transpose(1, 2).double().cumsum(-1)
    angle = torch.searchsorted(inside, (target - before)[..., None])[..., 0].clamp(max=angles - 1)
    return group // views, group % views, angle, top + torch.log(total[:, 0]).float()


def psi_rotation(index: Tensor, count: int) -> Tensor:
    """In-plane rotation matrices of psi indices of :func:`polar.rotation_scores`."""
    return in_plane_rotations(index.float() * (-2.0 * math.pi / count))
