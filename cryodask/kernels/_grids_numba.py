"""Compiled loops over half Fourier grids of :mod:`cryodask.kernels.half_grid`, and over transforms (numba, float32 with float64 sums).

Shells of grids are those of :func:`cryodask.kernels.half_grid.shells_of_slab`. The functions release the interpreter's lock.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np

_F, _U = np.float32, np.uint64


def _jit(function: Any) -> Any:
    return numba.njit(cache=True, nogil=True, error_model="numpy")(function)


@_jit
def _shell(x, y, z):  # type: ignore[no-untyped-def]
    """Shell of a point of a grid that is padded twice."""
    return int(np.rint(_F(0.5) * math.sqrt(_F(x * x + y * y + z * z))))


@_jit
def add_turned(grid, rotation, out):  # type: ignore[no-untyped-def]
    """Add ``grid(rotation k)`` to ``out(k)``, both `(z, y, x, 3)`, by trilinear interpolation within the sphere that the grid holds."""
    half = grid.shape[2] - 1
    r00, r01, r02 = _F(rotation[0, 0]), _F(rotation[0, 1]), _F(rotation[0, 2])
    r10, r11, r12 = _F(rotation[1, 0]), _F(rotation[1, 1]), _F(rotation[1, 2])
    r20, r21, r22 = _F(rotation[2, 0]), _F(rotation[2, 1]), _F(rotation[2, 2])
    for z in range(-half, half + 1):
        for y in range(-half, half + 1):
            left = half * half - z * z - y * y
            if left < 0:
                continue
            for x in range(int(math.sqrt(left + 0.5)) + 1):
                px, py, pz = r00 * x + r01 * y + r02 * z, r10 * x + r11 * y + r12 * z, r20 * x + r21 * y + r22 * z
                sign = _F(1.0)
                if px < 0:
                    px, py, pz, sign = -px, -py, -pz, _F(-1.0)
                py, pz = py + half, pz + half
                # rounding may take a point on the sphere out of the last cell
                ix, iy, iz = min(int(px), half - 1), min(int(py), 2 * half - 1), min(int(pz), 2 * half - 1)
                u, v, w = px - _F(ix), py - _F(iy), pz - _F(iz)
                re, im, weight = _F(0.0), _F(0.0), _F(0.0)
                for dz in range(2):
                    deep = w if dz else _F(1.0) - w
                    for dy in range(2):
                        across = deep * (v if dy else _F(1.0) - v)
                        far = across * u
                        near = across - far
                        line = grid[iz + dz, iy + dy]
                        re += near * line[ix, 0] + far * line[ix + 1, 0]
                        im += near * line[ix, 1] + far * line[ix + 1, 1]
                        weight += near * line[ix, 2] + far * line[ix + 1, 2]
                here = out[z + half, y + half, x]
                here[0] += re
                here[1] += sign * im
                here[2] += weight


@_jit
def add_half_turn(grid, across_z, across_y, mates, out):  # type: ignore[no-untyped-def]
    """Add a half grid `(z, y, x, 3)` to ``out``, read backwards along z and y, as conjugates if ``mates``."""
    last = grid.shape[0] - 1
    sign = _F(-1.0) if mates else _F(1.0)
    for z in range(last + 1):
        for y in range(last + 1):
            source = grid[last - z if across_z else z, last - y if across_y else y]
            line = out[z, y]
            for x in range(grid.shape[2]):
                line[x, 0] += source[x, 0]
                line[x, 1] += sign * source[x, 1]
                line[x, 2] += source[x, 2]


@_jit
def weight_sums(grid, radius, sums, counts):  # type: ignore[no-untyped-def]
    """Sums of the weights `(z, y, x, 3)` and numbers of points per shell up to ``radius``, the unstored half counted."""
    half = grid.shape[2] - 1
    for z in range(-half, half + 1):
        for y in range(-half, half + 1):
            for x in range(half + 1):
                shell = _shell(x, y, z)
                if shell <= radius:
                    times = 2.0 if x else 1.0
                    sums[shell] += times * grid[z + half, y + half, x, 2]
                    counts[shell] += times


@_jit
def power_sums(grid, radius, ridge, sums, counts):  # type: ignore[no-untyped-def]
    """Sums of |numerator / (weight + ridge of the shell)|^2 and numbers of points per shell up to ``radius``."""
    half = grid.shape[2] - 1
    for z in range(-half, half + 1):
        for y in range(-half, half + 1):
            for x in range(half + 1):
                shell = _shell(x, y, z)
                if shell <= radius:
                    re, im, weight = grid[z + half, y + half, x]
                    times, below = 2.0 if x else 1.0, weight + ridge[shell]
                    sums[shell] += times * (re * re + im * im) / (below * below)
                    counts[shell] += times


@_jit
def filtered_plane(plane, z, radius, prior, scale, out):  # type: ignore[no-untyped-def]
    """Numerator / (weight + prior of the shell) of a plane `(y, x, 3)` into ``out`` `(y, x)`, times ``scale`` with the sign of the point.

    ``out`` is padded: its rows are those of a transform, and it may be narrower than the grid. Points beyond ``radius`` are zero.
    """
    half, limit = plane.shape[1] - 1, out.shape[1] - 1
    wide = out.shape[0]
    for y in range(-limit, limit + 1):
        row = out[y % wide]
        for x in range(limit + 1):
            shell = _shell(x, y, z)
            if shell <= radius:
                re, im, weight = plane[y + half, x]
                factor = scale / (weight + prior[shell] + _F(1e-12))
                if (x + y + z) % 2:
                    factor = -factor
                row[x] = complex(re * factor, im * factor)
            else:
                row[x] = 0.0


@_jit
def correlation_sums(first, second, sums):  # type: ignore[no-untyped-def]
    """Sums over shells up to Nyquist of Re(conj(second) first), |first|^2 and |second|^2 of two real FFTs, into ``sums`` `(3, shell)`."""
    n, columns = first.shape[0], first.shape[2]
    for iz in range(n):
        z = iz if iz < (n + 1) // 2 else iz - n
        for iy in range(n):
            y = iy if iy < (n + 1) // 2 else iy - n
            for x in range(columns):
                shell = int(np.rint(math.sqrt(_F(x * x + y * y + z * z))))
                if shell < sums.shape[1]:
                    times = 1.0 if x == 0 or 2 * x == n else 2.0
                    a, b = first[iz, iy, x], second[iz, iy, x]
                    sums[0, shell] += times * (a.real * b.real + a.imag * b.imag)
                    sums[1, shell] += times * (a.real * a.real + a.imag * a.imag)
                    sums[2, shell] += times * (b.real * b.real + b.imag * b.imag)


@numba.njit(cache=True, nogil=True, fastmath=True, error_model="numpy")
def sliced(values, half, rotations, ky, kx, out):  # type: ignore[no-untyped-def]
    """Trilinear central slices of a whole grid ``values`` (flat, real and imaginary parts in turn) into ``out`` `(n, 2 pixel)`.

    Unsigned indices, which cannot be negative, let the compiler use vector instructions.
    """
    middle, side = _F(half), _U(2 * half + 1)
    for i in range(rotations.shape[0]):
        r00, r01, r02 = rotations[i, 0, 0], rotations[i, 0, 1], rotations[i, 0, 2]
        r10, r11, r12 = rotations[i, 1, 0], rotations[i, 1, 1], rotations[i, 1, 2]
        for j in range(len(kx)):
            along_x, along_y = _F(2.0) * kx[j], _F(2.0) * ky[j]
            px, py, pz = r00 * along_x + r10 * along_y, r01 * along_x + r11 * along_y, r02 * along_x + r12 * along_y
            px, py, pz = px + middle, py + middle, pz + middle
            ix, iy, iz = np.int32(px), np.int32(py), np.int32(pz)
            u, v, w = px - _F(ix), py - _F(iy), pz - _F(iz)
            a = ((_U(iz) * side + _U(iy)) * side + _U(ix)) * _U(2)
            b = a + side * _U(2)
            c = a + side * side * _U(2)
            d = c + side * _U(2)
            for part in range(2):
                low = values[a] + u * (values[a + _U(2)] - values[a])
                high = values[b] + u * (values[b + _U(2)] - values[b])
                front = low + v * (high - low)
                low = values[c] + u * (values[c + _U(2)] - values[c])
                high = values[d] + u * (values[d + _U(2)] - values[d])
                out[i, 2 * j + part] = front + w * (low + v * (high - low) - front)
                a, b, c, d = a + _U(1), b + _U(1), c + _U(1), d + _U(1)
