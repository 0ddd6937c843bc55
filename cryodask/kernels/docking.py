"""Rigid docking of one map in another, over all orientations and positions; and handedness, by docking in the mirror image as well.

``x = A^T y + t`` takes a point y of the moving map to x in the fixed one, both from voxel n // 2: the moved map is ``M(A (x - t))``, its
transform ``F_M(A k) exp(-2 pi i k.t / n)``. The correlation at all positions for one orientation is a small inverse FFT of the fixed map's
transform times the conjugate of the moved one's. The best of a grid of orientations at 30 A are refined by random steps at 30 and 15 A and
at the final resolution. From 15 A on spectra are whitened, so that all Fourier coefficients count alike ("white" correlation): that is what
tells a correct pose, and the correct hand, from a wrong one, because the low shells of all proteins look alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.spatial.transform import Rotation
from torch import Tensor

from cryodask.kernels.half_grid import half_volume
from cryodask.kernels.orientations import euler_to_matrix, healpix_angles, random_rotations, small_rotation
from cryodask.kernels.projection import PADDING

_COARSE_ANGSTROM, _MIDDLE_ANGSTROM = 30.0, 15.0
_KEPT, _APART_DEG, _FINALISTS = 12, 20.0, 3
_TRIES, _SHRINK, _COEFFICIENTS = 24, 0.6, 4000
_TOGETHER = 32
FINEST_ANGSTROM = 7.3
"""Resolution beyond which poses and hands do not improve, Angstrom."""
COARSEST_HAND_ANGSTROM = 12.0
"""Coarsest resolution at which a hand is decided, Angstrom: beyond it a map and its mirror image are nearly the same."""
HAND_RATIO = 2.0
"""A hand is decided if its white correlation is at least this many times that of the other."""
LEAST_CORRELATION = 0.25
"""White correlation below which nothing fits: wrong hands reach 0.15, other molecules 0.2."""


@dataclass(frozen=True)
class Placement:
    """Where a moving map lies in a fixed one: ``rotation`` A `(3, 3)`, ``shift_px`` t `(3,)` (x, y, z) voxels of the fixed map.

    ``white`` is the correlation of the whitened spectra up to the final resolution.
    """

    rotation: Tensor
    shift_px: Tensor
    white: float


@dataclass(frozen=True)
class _Match:
    """Coefficients of a fixed map `(p,)` at points ``k`` `(p, 3)` (x, y, z), and the transform of the moving map.

    ``weight`` `(p,)` multiplies the moving map's power in its norm: 1, or 1 over the mean power of the shell.
    """

    k: Tensor
    fixed: Tensor
    norm: float
    weight: Tensor
    volume: Tensor
    box: int
    white: bool

    def moved(self, rotations: Tensor) -> Tensor:
        """Transform of the moving map at rotated points, `(r, p)`."""
        return _sample(self.volume, torch.einsum("rij,pj->rpi", rotations, self.k))

    def scores(self, rotations: Tensor, shifts: Tensor) -> Tensor:
        """Correlations `(r,)` of poses."""
        moved = self.moved(rotations)
        turns = (shifts @ self.k.T) * (2.0 * math.pi / self.box)
        power = (moved.abs().square() * self.weight).sum(1).sqrt()
        return (self.fixed * moved.conj() * torch.polar(torch.ones_like(turns), turns)).real.sum(1) / (power * self.norm)

    def thinned(self) -> _Match:
        """The same with a random subset of the coefficients, enough for a climb."""
        if len(self.k) <= _COEFFICIENTS:
            return self
        some = torch.randperm(len(self.k), generator=torch.Generator().manual_seed(1))[:_COEFFICIENTS].to(self.k.device)
        fixed = self.fixed[some]
        norm = math.sqrt(len(some)) if self.white else float(fixed.abs().square().sum().sqrt())
        return replace(self, k=self.k[some], fixed=fixed, norm=norm, weight=self.weight[some])


def _sample(volume: Tensor, points: Tensor) -> Tensor:
    """Trilinear samples `(...)` complex64 of :func:`cryodask.kernels.half_grid.half_volume` at `(..., 3)` (x, y, z)."""
    half = volume.shape[2] - 1
    p = points.reshape(-1, 3) * PADDING
    mirrored = p[:, 0] < 0
    p = torch.where(mirrored[:, None], -p, p)
    floor = torch.floor(p)
    u, v, w = (p - floor).T.contiguous()
    x, y, z = floor.long().T.contiguous()
    line, deep = half + 1, (2 * half + 1) * (half + 1)
    base = (z + half) * deep + (y + half) * line + x
    # real and imaginary parts apart: what is gathered and added lies in one piece, which halves the time
    parts = volume.real.reshape(-1), volume.imag.reshape(-1)
    out = torch.zeros(2, len(p), device=p.device)
    for dz, c in ((0, 1 - w), (1, w)):
        for dy, b in ((0, 1 - v), (1, v)):
            for dx, a in ((0, 1 - u), (1, u)):
                at, share = base + (dz * deep + dy * line + dx), a * b * c
                for sums, part in zip(out, parts):
                    sums += part.index_select(0, at).mul_(share)
    value = torch.complex(out[0], out[1])
    return torch.where(mirrored, value.conj(), value).reshape(points.shape[:-1])


def _half_ball(radius: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Frequencies `(p, 3)` (x, y, z) of half a ball, one of each pair of mates, and their shells."""
    k = torch.arange(-radius, radius + 1, device=device)
    z, y, x = torch.meshgrid(k, k, k[radius:], indexing="ij")
    length = torch.sqrt((x * x + y * y + z * z).float())
    one_of_two = (x > 0) | ((x == 0) & ((y > 0) | ((y == 0) & (z > 0))))
    keep = (length <= radius) & one_of_two
    return torch.stack([x[keep], y[keep], z[keep]], -1).float(), length[keep].round().long()


def _match(fixed: Tensor, moving: Tensor, radius: int, *, white: bool) -> _Match:
    box = fixed.shape[0]
    k, shell = _half_ball(radius, fixed.device)
    spectrum = torch.fft.fftn(torch.fft.ifftshift(fixed))
    i = k.long() % box
    coefficients = spectrum[i[:, 2], i[:, 1], i[:, 0]].to(torch.complex64)
    volume = half_volume(moving, min(radius + 1, box // 2 - 1), box)
    weight = torch.ones(len(k), device=fixed.device)
    norm = float(coefficients.abs().square().sum().sqrt())
    if white:
        count = torch.bincount(shell, minlength=radius + 1).clamp(min=1).float()
        own, theirs = (torch.bincount(shell, c.abs().square(), radius + 1) / count for c in (coefficients, _sample(volume, k)))
        # shells count by their number of coefficients: the result is the mean correlation of all coefficients
        coefficients = coefficients / torch.sqrt(own * theirs).clamp(min=1e-20)[shell]
        weight = 1.0 / theirs.clamp(min=1e-20)[shell]
        norm = math.sqrt(len(k))
    return _Match(k, coefficients, norm, weight, volume, box, white)


def _best_places(match: _Match, rotations: Tensor, radius: int) -> tuple[Tensor, Tensor]:
    """Best correlation `(r,)` over all positions for each rotation, and that position `(r, 3)` (x, y, z), voxels."""
    side = 2 * radius + 4 - (2 * radius) % 4
    i = match.k.long()
    plane = i[:, 0] == 0
    best, where = [], []
    for some in rotations.split(_TOGETHER):
        moved = match.moved(some)
        product = match.fixed * moved.conj()
        grid = torch.zeros(len(some), side, side, side // 2 + 1, dtype=torch.complex64, device=some.device)
        grid[:, i[:, 2] % side, i[:, 1] % side, i[:, 0]] = product
        grid[:, (-i[plane, 2]) % side, (-i[plane, 1]) % side, 0] = product[:, plane].conj()
        values = torch.fft.irfftn(grid, s=(side,) * 3, dim=(1, 2, 3), norm="forward").flatten(1)
        value, at = values.max(1)
        best.append(value / (2.0 * match.norm * (moved.abs().square() * match.weight).sum(1).sqrt()))
        place = torch.stack([at % side, at // side % side, at // side**2], -1).float()
        where.append((place + side / 2) % side - side / 2)
    return torch.cat(best), torch.cat(where) * (match.box / side)


def _rotation_grid(device: torch.device) -> Tensor:
    """Rotations `(4608, 3, 3)` about 15 degrees apart."""
    rot, tilt = (torch.from_numpy(a) for a in healpix_angles(2))
    psi = torch.arange(24).double() * (math.pi / 12)
    i = torch.arange(len(rot)).repeat_interleave(24)
    return euler_to_matrix(rot[i], tilt[i], psi.repeat(len(rot))).float().to(device)


def _climb(
    match: _Match, rotation: Tensor, shift: Tensor, step_deg: float, step_px: float, rounds: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, float]:
    """Random steps about a pose, smaller after each round without improvement."""
    some = match.thinned()
    best = float(some.scores(rotation[None], shift[None])[0])
    for _ in range(rounds):
        turns = torch.stack([small_rotation(math.radians(step_deg), generator) for _ in range(_TRIES)]).to(rotation)
        rotations = turns @ rotation
        shifts = shift + (torch.randn(_TRIES, 3, generator=generator) * step_px).to(shift)
        values = some.scores(rotations, shifts)
        if float(values.max()) > best:
            j = int(values.argmax())
            best, rotation, shift = float(values[j]), rotations[j], shifts[j]
        else:
            step_deg, step_px = step_deg * _SHRINK, step_px * _SHRINK
    return rotation, shift, best


def _separate(scores: Tensor, rotations: Tensor) -> list[int]:
    """The best rotations that lie apart from each other."""
    limit, chosen = math.cos(math.radians(_APART_DEG)), list[int]()
    for i in scores.argsort(descending=True, stable=True).tolist():
        if all((float((rotations[i] * rotations[j]).sum()) - 1.0) / 2.0 < limit for j in chosen):
            chosen.append(i)
            if len(chosen) == _KEPT:
                break
    return chosen


def dock_map(fixed: Tensor, moving: Tensor, voxel_angstrom: float, resolution_angstrom: float, *, seed: int = 0) -> Placement:
    """Place one map in another of the same box and voxel size.

    Parameters
    ----------
    fixed, moving : Tensor, `(z, y, x)`, float32
        Even box, origin n // 2.
    resolution_angstrom : float
        Highest resolution that is compared, Angstrom; never finer than two voxels.
    seed : int
        Of the random rotation of the grid, and of the climbs.
    """
    box, length = fixed.shape[0], fixed.shape[0] * voxel_angstrom
    fine = max(4, min(int(length / resolution_angstrom), box // 2 - 2))
    coarse = max(4, min(int(length / _COARSE_ANGSTROM), fine))
    middle = min(fine, max(coarse, int(length / _MIDDLE_ANGSTROM)))
    generator = torch.Generator().manual_seed(seed)
    grid = _rotation_grid(fixed.device) @ random_rotations(1, generator)[0].to(fixed.device)
    low, mid, top = (_match(fixed, moving, radius, white=white) for radius, white in ((coarse, False), (middle, True), (fine, True)))
    scores, places = _best_places(low, grid, coarse)
    found = []
    voxels = 3.54 / voxel_angstrom
    for i in _separate(scores, grid):
        rotation, shift, _ = _climb(low, grid[i], places[i], 6.0, 0.6 * voxels, 5, generator)
        found.append(_climb(mid, rotation, shift, 3.0, 0.4 * voxels, 5, generator))
    found.sort(key=lambda one: -one[2])
    final = []
    for rotation, shift, _ in found[:_FINALISTS]:
        rotation, shift, _ = _climb(top, rotation, shift, 1.5, 0.3 * voxels, 10, generator)
        final.append((rotation, shift, float(top.scores(rotation[None], shift[None])[0])))
    final.sort(key=lambda one: -one[2])
    return Placement(final[0][0].double(), final[0][1].double(), final[0][2])


def dock_both_hands(
    fixed: Tensor, moving: Tensor, voxel_angstrom: float, resolution_angstrom: float, *, seed: int = 0
) -> tuple[Placement, Placement]:
    """Place one map in another (see :func:`dock_map`) and in the mirror image of that, to 7.3 A at most: poses need no more."""
    fine = max(resolution_angstrom, FINEST_ANGSTROM)
    return (
        dock_map(fixed, moving, voxel_angstrom, fine, seed=seed),
        dock_map(mirrored(fixed), moving, voxel_angstrom, fine, seed=seed),
    )


def refined(fixed: Tensor, moving: Tensor, voxel_angstrom: float, resolution_angstrom: float, start: Placement) -> Placement:
    """A placement improved by a simplex search (Nelder and Mead 1965) on all coefficients of the whitened spectra."""
    box = fixed.shape[0]
    match = _match(fixed, moving, max(4, min(int(box * voxel_angstrom / resolution_angstrom), box // 2 - 2)), white=True)

    def pose(x: np.ndarray) -> tuple[Tensor, Tensor]:
        turn = torch.from_numpy(Rotation.from_rotvec(np.radians(x[:3])).as_matrix())
        return turn.to(start.rotation) @ start.rotation, start.shift_px + torch.from_numpy(x[3:]).to(start.shift_px)

    def loss(x: np.ndarray) -> float:
        rotation, shift = pose(x)
        return -float(match.scores(rotation[None].to(match.k), shift[None].to(match.k))[0])

    simplex = np.vstack([np.zeros(6), np.diag([0.5] * 3 + [0.5 / voxel_angstrom] * 3)])
    best = minimize(
        loss, np.zeros(6), method="Nelder-Mead", options={"initial_simplex": simplex, "xatol": 1e-3, "fatol": 1e-7, "maxfev": 400}
    )
    return Placement(*pose(best.x), -float(best.fun)) if -best.fun > start.white else start


def mirrored(volume: Tensor) -> Tensor:
    """The other hand `(z, y, x)`: z to -z about voxel n // 2."""
    turned = torch.flip(volume, (0,))
    return torch.roll(turned, 1, 0) if volume.shape[0] % 2 == 0 else turned


def moved_map(volume: Tensor, rotation: Tensor, shift_px: Tensor) -> Tensor:
    """A rotated and shifted map, ``M(A (x - t))``, `(z, y, x)`; frequencies beyond the inscribed ball are lost."""
    box = volume.shape[0]
    radius = box // 2 - 1
    grid = half_volume(volume, radius, box)
    k, _ = _half_ball(radius, volume.device)
    k = torch.cat([torch.zeros(1, 3, device=k.device), k])
    turns = (k.double() @ shift_px.to(k.device).double()) * (-2.0 * math.pi / box)
    values = _sample(grid, k @ rotation.to(k).T) * torch.polar(torch.ones_like(turns), turns).to(torch.complex64)
    spectrum = torch.zeros(box, box, box, dtype=torch.complex64, device=volume.device)
    i = k.long()
    spectrum[i[:, 2] % box, i[:, 1] % box, i[:, 0] % box] = values
    spectrum[(-i[:, 2]) % box, (-i[:, 1]) % box, (-i[:, 0]) % box] = values.conj()
    return torch.fft.fftshift(torch.fft.ifftn(spectrum).real) * box


def decided_hand(own: float, other: float, resolution_angstrom: float) -> str:
    """``right``, ``mirrored`` or ``unknown``, from the white correlations with a map of some resolution and with its mirror image."""
    best, worst = max(own, other), max(min(own, other), 1e-6)
    if resolution_angstrom > COARSEST_HAND_ANGSTROM or best < LEAST_CORRELATION or best < HAND_RATIO * worst:
        return "unknown"
    return "right" if own > other else "mirrored"
