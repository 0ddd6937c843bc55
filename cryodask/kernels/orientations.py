"""Orientations: Euler angles as RELION writes them, a HEALPix grid of views, random rotations, angular errors.

A rotation matrix A = Rz(psi) Ry(tilt) Rz(rot) (passive, rows are the image's axes seen from the map) acts on vectors ``(x, y, z)``.
The Fourier slice of an image samples the map's transform at ``A^T (kx, ky, 0)``; symmetry acts as ``A -> A g``.
HEALPix (Gorski et al. 2005, nested numbering): pixel p of an order has the children 4p .. 4p+3 in the next.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

_FACE_ROW = np.array([2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4])
_FACE_COLUMN = np.array([1, 3, 5, 7, 0, 2, 4, 6, 1, 3, 5, 7])
_GENERIC_DIRECTION = np.array([0.32, 0.21, 0.92])
"""A generic direction, off all mirror planes and axes of the point groups; decides between equivalent views."""


def euler_to_matrix(rot_rad: Tensor, tilt_rad: Tensor, psi_rad: Tensor) -> Tensor:
    """Rotation matrices `(..., 3, 3)` of Euler angles `(...)` in radians, RELION's convention."""
    ca, sa = torch.cos(rot_rad), torch.sin(rot_rad)
    cb, sb = torch.cos(tilt_rad), torch.sin(tilt_rad)
    cg, sg = torch.cos(psi_rad), torch.sin(psi_rad)
    rows = [
        *(cg * cb * ca - sg * sa, cg * cb * sa + sg * ca, -cg * sb),
        *(-sg * cb * ca - cg * sa, -sg * cb * sa + cg * ca, sg * sb),
        *(sb * ca, sb * sa, cb),
    ]
    return torch.stack(rows, -1).reshape(*rot_rad.shape, 3, 3)


def matrix_to_euler(rotations: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Euler angles (rot, tilt, psi), radians, each `(...)`, of rotation matrices `(..., 3, 3)`; rot is 0 at the poles."""
    a = rotations
    sine = torch.hypot(a[..., 2, 0], a[..., 2, 1])
    tilt = torch.atan2(sine, a[..., 2, 2])
    rot = torch.atan2(a[..., 2, 1], a[..., 2, 0])
    psi = torch.atan2(a[..., 1, 2], -a[..., 0, 2])
    pole = sine < 1e-6
    # at tilt 0 only psi + rot is defined, at 180 only psi - rot
    psi_at_pole = torch.atan2(a[..., 0, 1], a[..., 1, 1])
    return torch.where(pole, torch.zeros_like(rot), rot), tilt, torch.where(pole, psi_at_pole, psi)


def in_plane_rotations(angle_rad: Tensor) -> Tensor:
    """Rz(angle), `(..., 3, 3)`: ``Rz(psi) @ A(rot, tilt, 0)`` is A(rot, tilt, psi)."""
    c, s, zero = torch.cos(angle_rad), torch.sin(angle_rad), torch.zeros_like(angle_rad)
    return torch.stack([c, s, zero, -s, c, zero, zero, zero, zero + 1.0], -1).reshape(*angle_rad.shape, 3, 3)


def healpix_count(order: int) -> int:
    """Pixels of the whole sphere at an order: 12 * 4^order, their distance about 58.6 / 2^order degrees."""
    return 12 * 4**order


def healpix_step_rad(order: int) -> float:
    """Square root of a pixel's area, radians."""
    return math.sqrt(4.0 * math.pi / healpix_count(order))


def healpix_angles(order: int, pixels: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Azimuth and polar angle (rot, tilt), radians, of nested HEALPix pixels (all by default)."""
    side = 2**order
    if pixels is None:
        pixels = np.arange(healpix_count(order))
    face, inside = np.divmod(np.asarray(pixels, np.int64), side * side)
    x, y = _even_bits(inside), _even_bits(inside >> 1)
    ring = _FACE_ROW[face] * side - x - y - 1
    polar_width = np.where(ring < side, ring, np.where(ring > 3 * side, 4 * side - ring, side))
    cap = polar_width < side
    height = np.where(cap, 1.0 - polar_width**2 / (3.0 * side * side), (2 * side - ring) * 2.0 / (3.0 * side))
    height = np.where(cap & (ring > 2 * side), -height, height)
    offset = np.where(cap, 0, (ring - side) & 1)
    column = (_FACE_COLUMN[face] * polar_width + x - y + 1 + offset) // 2
    column = np.where(column > 4 * side, column - 4 * side, column)
    column = np.where(column < 1, column + 4 * side, column)
    azimuth = (column - (offset + 1) * 0.5) * (0.5 * math.pi / polar_width)
    return azimuth, np.arccos(height)


def _even_bits(values: np.ndarray) -> np.ndarray:
    """Every second bit of the numbers, packed."""
    out = np.zeros_like(values)
    for bit in range(16):
        out |= ((values >> (2 * bit)) & 1) << bit
    return out


def directions(rot_rad: np.ndarray, tilt_rad: np.ndarray) -> np.ndarray:
    """Unit vectors `(n, 3)` (x, y, z) along the views."""
    sine = np.sin(tilt_rad)
    return np.stack([sine * np.cos(rot_rad), sine * np.sin(rot_rad), np.cos(tilt_rad)], -1)


def asymmetric_unit(order: int, operators: np.ndarray) -> np.ndarray:
    """Nested HEALPix pixels, one of each set of views that the point group makes equivalent.

    A view is kept if it is nearer to a generic direction than all its mates. Pixels on the border may lose a little coverage: a grid
    that is rotated at random in every iteration compensates for it.
    """
    views = directions(*healpix_angles(order))
    generic = _GENERIC_DIRECTION / np.linalg.norm(_GENERIC_DIRECTION)
    best = np.max([(views @ g.T) @ generic for g in operators], axis=0)
    return np.nonzero(views @ generic >= best - 1e-9)[0]


def random_rotations(count: int, generator: torch.Generator) -> Tensor:
    """Rotations `(count, 3, 3)` uniform on SO(3) (normalised Gaussian quaternions)."""
    q = torch.randn(count, 4, generator=generator)
    w, x, y, z = (q / q.norm(dim=-1, keepdim=True)).unbind(-1)
    rows = [
        *(1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)),
        *(2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)),
        *(2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)),
    ]
    return torch.stack(rows, -1).reshape(count, 3, 3)


def small_rotation(rms_rad: float, generator: torch.Generator) -> Tensor:
    """One rotation `(3, 3)` about a random axis, Gaussian with ``rms_rad`` about each coordinate axis."""
    x, y, z = (torch.randn(3, generator=generator) * rms_rad).unbind()
    zero = torch.zeros_like(x)
    return torch.linalg.matrix_exp(torch.stack([zero, -z, y, z, zero, -x, -y, x, zero]).reshape(3, 3))


def angular_error_deg(a: Tensor, b: Tensor, operators: np.ndarray) -> Tensor:
    """Smallest angle, degrees `(n,)`, between rotations `(n, 3, 3)` over the point group: min over g of angle(a, b g)."""
    trace = torch.stack([torch.einsum("nij,nij->n", a.double(), b.double() @ torch.tensor(g)) for g in operators])
    return torch.rad2deg(torch.acos(((trace.amax(0) - 1.0) / 2.0).clamp(-1.0, 1.0)))
