"""The kernels of :mod:`cryodask.kernels.local_search` in torch: for GPUs, and where numba is not installed.

The same steps as in :mod:`cryodask.kernels._slices_numba`, for many poses at once. Poses differ from the compiled ones by rounding only
(below 0.02 degrees where noise leaves 0.5), so a run keeps to one of the two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from cryodask.kernels.rows import independent, row_shells

_PIXELS_TOGETHER = 2**19
SAME_POSE_TRACE = 1.0 + 2.0 * math.cos(math.radians(2.0))
"""Trace of the rotation between two poses below which they count as two."""


@dataclass(frozen=True)
class Plane:
    """Pixels of the half plane within a ring: frequencies `(pixel,)` and their place in rows up to ``radius``."""

    ky: Tensor
    kx: Tensor
    place: Tensor
    shell: Tensor


@lru_cache(maxsize=32)
def plane_within(ring: int, radius: int, device: str) -> Plane:
    inside = independent(ring, device)
    ky, kx = torch.nonzero(inside, as_tuple=True)
    shell = row_shells(ring, device)[inside]
    ky = ky - ring
    return Plane(ky.float(), kx.float(), (ky + radius) * (radius + 1) + kx, shell)


def ctf_argument(numbers: Tensor, ky: Tensor, kx: Tensor) -> Tensor:
    """Argument of the sine of the CTF `(n, pixel)` float64 of the numbers of :func:`cryodask.kernels.rows.ctf_numbers`."""
    xx, xy, yy, four, constant, _, cosine, sine = (numbers[:, i, None] for i in range(8))
    x, y = kx.double(), ky.double()
    square, difference, product = x * x + y * y, x * x - y * y, 2.0 * x * y
    tetrafoil = cosine * (difference * difference - product * product) + 2.0 * sine * difference * product
    return xx * x * x + xy * x * y + yy * y * y - four * square * square + constant + tetrafoil


def ctf_at(numbers: Tensor, ky: Tensor, kx: Tensor) -> Tensor:
    """CTF `(n, pixel)` float32 of the numbers of :func:`cryodask.kernels.rows.ctf_numbers`."""
    return (numbers[:, 5, None] * torch.sin(ctf_argument(numbers, ky, kx))).float()


def _corners(volume: Tensor, rotations: Tensor, plane: Plane) -> tuple[Tensor, Tensor, Tensor]:
    """Flat index of the lower corner, fractions (x, y, z) and sign (-1: conjugate) of the slices' points, each `(n, pixel)`."""
    half = volume.shape[2] - 1
    points = 2.0 * torch.einsum("nkj,kp->njp", rotations[:, :2], torch.stack([plane.kx, plane.ky]))
    sign = torch.where(points[:, 0] < 0, -1.0, 1.0)
    points = points * sign[:, None]
    floor = torch.floor(points)
    x, y, z = floor.long().unbind(1)
    return ((z + half) * (2 * half + 1) + y + half) * (half + 1) + x, points - floor, sign


def _offsets(volume: Tensor) -> list[int]:
    line = volume.shape[2]
    deep = volume.shape[1] * line
    return [z * deep + y * line + x for z in (0, 1) for y in (0, 1) for x in (0, 1)]


def sliced(volume: Tensor, rotations: Tensor, plane: Plane) -> tuple[Tensor, Tensor]:
    """Slices `(n, pixel)` and their gradients along the grid's x, y, z `(n, 3, pixel)`, complex64."""
    base, fraction, sign = _corners(volume, rotations, plane)
    flat = volume.reshape(-1)
    c = [flat[base + offset] for offset in _offsets(volume)]
    u, v, w = fraction.unbind(1)
    x = [c[2 * i + 1] - c[2 * i] for i in range(4)]
    e = [c[2 * i] + u * x[i] for i in range(4)]
    y = [e[1] - e[0], e[3] - e[2]]
    z = [e[0] + v * y[0], e[2] + v * y[1]]
    low, high = x[0] + v * (x[1] - x[0]), x[2] + v * (x[3] - x[2])
    value = z[0] + w * (z[1] - z[0])
    gradient = torch.stack([low + w * (high - low), y[0] + w * (y[1] - y[0]), z[1] - z[0]], 1)
    mirrored = sign < 0
    value = torch.where(mirrored, value.conj(), value)
    return value, torch.where(mirrored[:, None], -gradient.conj(), gradient)


def shift_phases(shifts: Tensor, plane: Plane, box: int) -> Tensor:
    turns = (shifts[:, :1] * plane.ky + shifts[:, 1:] * plane.kx) * (2.0 * math.pi / box)
    return torch.polar(torch.ones_like(turns), turns)


def _terms(
    volume: Tensor, images: Tensor, contrast: Tensor, weight: Tensor, rotations: Tensor, shifts: Tensor, box: int, plane: Plane
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-likelihood gains `(n,)`, normal matrices `(n, 5, 5)` and gradients `(n, 5)`, float64, of poses on a plane."""
    poses = rotations.float()
    value, gradient = sliced(volume, poses, plane)
    factor = shift_phases(shifts.float(), plane, box) * contrast
    model = value * factor
    # derivatives along the image's axes: right, up, out
    right, up, out = (torch.einsum("nj,njp->np", poses[:, i].to(gradient.dtype), gradient) for i in range(3))
    turn = 2.0 * math.pi / box
    ky, kx = plane.ky, plane.kx
    jacobian = torch.stack(
        [
            2.0 * ky * out * factor,
            -2.0 * kx * out * factor,
            2.0 * (kx * up - ky * right) * factor,
            1j * turn * ky * model,
            1j * turn * kx * model,
        ],
        1,
    )
    gain = (weight * (2.0 * (model.conj() * images).real - model.abs().square())).sum(1, dtype=torch.float64)
    j = torch.view_as_real(jacobian).flatten(2)
    scaled = torch.view_as_real(jacobian * weight).flatten(2)
    difference = torch.view_as_real(images - model).flatten(1)
    return gain, (scaled @ j.transpose(1, 2)).double(), (scaled @ difference[..., None])[..., 0].double()


def turned(omega: Tensor, rotations: Tensor) -> Tensor:
    x, y, z = omega.unbind(-1)
    zero = torch.zeros_like(x)
    skew = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).reshape(-1, 3, 3)
    return torch.linalg.matrix_exp(-skew) @ rotations


def _log_prior(shifts: Tensor, prior: float) -> Tensor:
    return -0.5 * prior * shifts.square().sum(-1)


def _climb(
    volume: Tensor, images: Tensor, contrast: Tensor, weight: Tensor, rotations: Tensor, shifts: Tensor, box: int, plane: Plane,
    steps: int, least: float, prior: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Levenberg-Marquardt of many poses; returns rotations, shifts, log posterior and minus its Hessian."""
    gain, matrix, vector = _terms(volume, images, contrast, weight, rotations, shifts, box, plane)
    best = gain + _log_prior(shifts, prior)
    n, device = len(best), best.device
    damping = torch.full((n,), 1e-3, dtype=torch.float64, device=device)
    active = torch.arange(n, device=device)
    own = torch.zeros(5, dtype=torch.float64, device=device)
    own[3:] = 0.5 * prior
    rotations, shifts = rotations.clone(), shifts.clone()
    for _ in range(steps):
        if not len(active):
            break
        slope = vector[active].clone()
        slope[:, 3:] -= 0.5 * prior * shifts[active]
        posed = matrix[active] + torch.diag(own)
        diagonal = torch.diagonal(posed, dim1=1, dim2=2)
        posed = posed + torch.diag_embed(diagonal * damping[active, None] + 1e-12)
        step = torch.linalg.solve(posed, slope[..., None])[..., 0]
        expected = (slope * step).sum(1)
        tried, moved = turned(step[:, :3], rotations[active]), shifts[active] + step[:, 3:]
        last = expected < least
        rotations[active[last]], shifts[active[last]] = tried[last], moved[last]
        best[active[last]] += expected[last]
        active, tried, moved = active[~last], tried[~last], moved[~last]
        if not len(active):
            break
        some = images[active], contrast[active]
        gain, new_matrix, new_vector = _terms(volume, *some, weight, tried, moved, box, plane)
        found = gain + _log_prior(moved, prior)
        better = found > best[active]
        taken = active[better]
        rotations[taken], shifts[taken], best[taken] = tried[better], moved[better], found[better]
        matrix[taken], vector[taken] = new_matrix[better], new_vector[better]
        damping[active] = torch.where(better, 0.3 * damping[active], (10.0 * damping[active]).clamp(min=0.1))
        active = active[better | (damping[active] <= 20.0)]
    hessian = 2.0 * (matrix + torch.diag(own))
    return rotations, shifts, best, hessian


def _distinct(rotations: Tensor, score: Tensor, operators: Tensor, most: int, nats: float) -> Tensor:
    """Which candidates `(n, candidate)` go on: the best ``most`` within ``nats`` that differ by 2 degrees modulo the group."""
    n, count = score.shape
    order = torch.argsort(-score, dim=1, stable=True)
    sorted_score = score.gather(1, order)
    poses = rotations.gather(1, order[..., None, None].expand(-1, -1, 3, 3))
    same = torch.zeros(n, count, count, dtype=torch.bool, device=score.device)
    for g in operators:
        same |= torch.einsum("naij,nbij->nab", poses, poses @ g) > SAME_POSE_TRACE
    kept = torch.zeros(n, count, dtype=torch.bool, device=score.device)
    within = sorted_score >= sorted_score[:, :1] - nats
    for i in range(count):
        kept[:, i] = within[:, i] & (kept.sum(1) < most) & ~(same[:, i] & kept).any(1)
    return torch.zeros_like(kept).scatter_(1, order, kept)


def search(
    volume: Tensor, images: Tensor, numbers: Tensor, radius: int, weight: Tensor, rotations: Tensor, shifts: Tensor, starts: Tensor,
    box: int, rings: list[int], most: list[int], steps: list[int], least: float, nats: float, prior: float, operators: Tensor,
    survivors: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See :func:`cryodask.kernels._slices_numba.search`; returns rotations, shifts, score, evidence, count and factor of the modes."""
    n, widest = shifts.shape[:2]
    device = images.device
    pose, shift = rotations.double(), shifts.double()
    score = torch.full((n, widest), -torch.inf, dtype=torch.float64, device=device)
    evidence = score.clone()
    factor = torch.eye(5, dtype=torch.float64, device=device).repeat(n, widest, 1, 1)
    alive = torch.arange(widest, device=device)[None] < starts[:, None]
    for ring, limit, count in zip(rings, most, steps):
        plane = plane_within(ring, radius, str(device))
        pixels = images.flatten(1)[:, plane.place]
        contrast = ctf_at(numbers, plane.ky, plane.kx)
        own_weight = weight.flatten()[plane.place]
        particle, candidate = torch.nonzero(alive, as_tuple=True)
        for lot in torch.arange(len(particle), device=device).split(max(1, _PIXELS_TOGETHER // len(plane.place))):
            i, k = particle[lot], candidate[lot]
            found = _climb(volume, pixels[i], contrast[i], own_weight, pose[i, k], shift[i, k], box, plane, count, least, prior)
            pose[i, k], shift[i, k], score[i, k] = found[:3]
            lower = torch.linalg.cholesky_ex(found[3] + 1e-9 * torch.eye(5, dtype=torch.float64, device=device)).L
            factor[i, k] = lower
            evidence[i, k] = found[2] - torch.diagonal(lower, dim1=1, dim2=2).log().sum(1)
        score[~alive] = -torch.inf
        alive = _distinct(pose, score, operators.double(), limit, nats)
    order = torch.argsort(torch.where(alive, -score, torch.inf), dim=1, stable=True)[:, :survivors]
    count_of = alive.sum(1).clamp(max=survivors)
    nine = order[..., None, None].expand(-1, -1, 3, 3)
    return (
        pose.gather(1, nine).float(), shift.gather(1, order[..., None].expand(-1, -1, 2)).float(),
        score.gather(1, order), evidence.gather(1, order), count_of, factor.gather(1, order[..., None, None].expand(-1, -1, 5, 5)),
    )  # fmt: skip


def insert(
    grid: Tensor, images: Tensor, numbers: Tensor, radius: int, weight: Tensor, rotations: Tensor, shifts: Tensor, shares: Tensor,
    box: int, least: float,
) -> None:  # fmt: skip
    """Add slices of all poses with a share above ``least`` to half a grid `(z, y, x, 3)`, in place."""
    plane = plane_within(radius, radius, str(images.device))
    pixels = images.flatten(1)[:, plane.place]
    own_weight = weight.flatten()[plane.place]
    flat = grid.view(-1, 3)
    particle, pose = torch.nonzero(shares > least, as_tuple=True)
    for lot in torch.arange(len(particle), device=images.device).split(max(1, _PIXELS_TOGETHER // len(plane.place))):
        i, k = particle[lot], pose[lot]
        base, fraction, sign = _corners(grid, rotations[i, k], plane)
        contrast = ctf_at(numbers[i], plane.ky, plane.kx)
        scaled = contrast * own_weight * shares[i, k][:, None]
        numerator = pixels[i] * shift_phases(-shifts[i, k], plane, box) * scaled
        values = torch.stack([numerator.real, numerator.imag * sign, contrast * scaled], -1).reshape(-1, 3)
        u, v, w = fraction.unbind(1)
        for number, offset in enumerate(_offsets(grid)):
            x, y, z = number & 1, number >> 1 & 1, number >> 2
            part = (u if x else 1 - u) * (v if y else 1 - v) * (w if z else 1 - w)
            flat.index_add_(0, (base + offset).reshape(-1), values * part.reshape(-1, 1))


def models(volume: Tensor, numbers: Tensor, rotations: Tensor, shifts: Tensor, box: int, ring: int) -> Tensor:
    """Slices of half a volume at one pose each, with CTF: `(n, pixel)` complex64 for the independent pixels of rows up to ``ring``."""
    plane = plane_within(ring, ring, str(volume.device))
    return sliced(volume, rotations, plane)[0] * ctf_at(numbers, plane.ky, plane.kx) * shift_phases(shifts, plane, box)


def shell_terms(
    volume: Tensor, images: Tensor, numbers: Tensor, radius: int, rotations: Tensor, shifts: Tensor, box: int, ring: int
) -> Tensor:
    """Sums over shells of |image|^2, Re(conj(model) image), |model|^2, `(particle, 3, radius + 1)` float64; no model beyond ``ring``."""
    device = str(images.device)
    whole, inner = plane_within(radius, radius, device), plane_within(ring, radius, device)
    flat = images.flatten(1)
    out = torch.zeros(len(images), 3, radius + 1, dtype=torch.float64, device=images.device)
    out[:, 0].index_add_(1, whole.shell.clamp(max=radius), flat[:, whole.place].abs().square().double())
    for lot in torch.arange(len(images), device=images.device).split(max(1, _PIXELS_TOGETHER // len(inner.place))):
        model = models(volume, numbers[lot], rotations[lot], shifts[lot], box, ring)
        both = torch.stack([(model.conj() * flat[lot][:, inner.place]).real, model.abs().square()], 1)
        sums = torch.zeros(len(lot), 2, radius + 1, dtype=torch.float64, device=images.device)
        out[lot, 1:] = sums.index_add_(2, inner.shell.clamp(max=radius), both.double())
    return out
