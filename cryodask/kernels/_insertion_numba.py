"""Compiled insertion of slices, and sums over their shells, of :mod:`cryodask.kernels.local_search` (numba, float32).

Rows of the half plane stay rows, so that neighbours in memory are neighbours in the volume. Sums are reordered by the compiler
(``fastmath``): the same bits on one kind of CPU only. Unsigned indices, which cannot be negative, save it a test each. The functions
release the interpreter's lock.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np

_F, _U = np.float32, np.uint64


def _jit(function: Any) -> Any:
    return numba.njit(cache=True, nogil=True, fastmath=True, error_model="numpy")(function)


@_jit
def ctf_plane(numbers, radius, out):  # type: ignore[no-untyped-def]
    """CTF on rows ``(2 radius + 1, radius + 1)`` of the numbers of :func:`cryodask.kernels.rows.ctf_numbers`."""
    xx, xy, yy, four, constant, contrast = (
        _F(numbers[0]), _F(numbers[1]), _F(numbers[2]), _F(numbers[3]), _F(numbers[4]), _F(numbers[5])
    )  # fmt: skip
    cosine, sine = _F(numbers[6]), _F(numbers[7])
    for row in range(2 * radius + 1):
        y = _F(row - radius)
        for column in range(radius + 1):
            x = _F(column)
            square, difference, product = x * x + y * y, x * x - y * y, _F(2.0) * x * y
            tetrafoil = cosine * (difference * difference - product * product) + _F(2.0) * sine * difference * product
            out[row, column] = contrast * math.sin(xx * x * x + xy * x * y + yy * y * y - four * square * square + constant + tetrafoil)


@_jit
def insert(accumulator, half, images, numbers, radius, weight, rotations, shifts, shares, box, least):  # type: ignore[no-untyped-def]
    """Add slices of all poses with a share above ``least`` to half a grid, flat `(z, y, x, 3)`: numerator (re, im) and weight."""
    ctf = np.empty((2 * radius + 1, radius + 1), _F)
    turn = 2.0 * math.pi / box
    line, plane = _U(3 * (half + 1)), _U(3 * (half + 1) * (2 * half + 1))
    middle = _F(half)
    for particle in range(images.shape[0]):
        ctf_plane(numbers[particle], radius, ctf)
        for k in range(rotations.shape[1]):
            if shares[particle, k] > least:
                pose, shift, share = rotations[particle, k], shifts[particle, k], shares[particle, k]
                r00, r01, r02 = pose[0, 0], pose[0, 1], pose[0, 2]
                r10, r11, r12 = pose[1, 0], pose[1, 1], pose[1, 2]
                step_cosine, step_sine = _F(math.cos(turn * shift[1])), _F(-math.sin(turn * shift[1]))
                for row in range(-radius, radius + 1):
                    first = 0 if row > 0 else 1
                    angle = -turn * (row * shift[0] + first * shift[1])
                    cosine, sine = _F(math.cos(angle)), _F(math.sin(angle))
                    along_y = _F(2 * row)
                    of_image, of_ctf, of_weight = images[particle, row + radius], ctf[row + radius], weight[row + radius]
                    for column in range(first, int(math.sqrt(radius * radius + 0.5 - row * row)) + 1):
                        along_x = _F(2 * column)
                        px, py, pz = r00 * along_x + r10 * along_y, r01 * along_x + r11 * along_y, r02 * along_x + r12 * along_y
                        sign = _F(1.0) if px >= 0 else _F(-1.0)
                        px, py, pz = px * sign, py * sign + middle, pz * sign + middle
                        ix, iy, iz = np.int32(px), np.int32(py), np.int32(pz)
                        u, v, w = px - _F(ix), py - _F(iy), pz - _F(iz)
                        i = _U(column)
                        datum, contrast = of_image[i], of_ctf[i]
                        scaled = contrast * of_weight[i] * share
                        re = (datum.real * cosine - datum.imag * sine) * scaled
                        im = (datum.real * sine + datum.imag * cosine) * scaled * sign
                        density = contrast * scaled
                        cosine, sine = cosine * step_cosine - sine * step_sine, cosine * step_sine + sine * step_cosine
                        corner = _U(iz) * plane + _U(iy) * line + _U(ix) * _U(3)
                        for dz in range(2):
                            deep = w if dz else _F(1.0) - w
                            for dy in range(2):
                                across = deep * (v if dy else _F(1.0) - v)
                                far = across * u
                                near = across - far
                                a = corner + _U(dy) * line
                                accumulator[a] += near * re
                                accumulator[a + _U(1)] += near * im
                                accumulator[a + _U(2)] += near * density
                                accumulator[a + _U(3)] += far * re
                                accumulator[a + _U(4)] += far * im
                                accumulator[a + _U(5)] += far * density
                            corner += plane


@_jit
def shell_terms(volume, half, images, numbers, radius, rotations, shifts, box, ring, out):  # type: ignore[no-untyped-def]
    """Sums over shells of |image|^2, Re(conj(model) image), |model|^2 into ``out`` ``(particle, 3, radius + 2)``.

    Beyond ``ring`` the model is zero.
    """
    ctf = np.empty((2 * radius + 1, radius + 1), _F)
    turn = 2.0 * math.pi / box
    for particle in range(images.shape[0]):
        ctf_plane(numbers[particle], radius, ctf)
        pose, shift = rotations[particle], shifts[particle]
        for row in range(-radius, radius + 1):
            along_y = _F(2 * row)
            for column in range(0 if row > 0 else 1, int(math.sqrt(radius * radius + 0.5 - row * row)) + 1):
                square = column * column + row * row
                shell = int(math.sqrt(square) + 0.5)
                datum = images[particle, row + radius, column]
                out[particle, 0, shell] += datum.real * datum.real + datum.imag * datum.imag
                if square <= ring * ring:
                    along_x = _F(2 * column)
                    px = pose[0, 0] * along_x + pose[1, 0] * along_y
                    py = pose[0, 1] * along_x + pose[1, 1] * along_y
                    pz = pose[0, 2] * along_x + pose[1, 2] * along_y
                    sign = _F(1.0)
                    if px < 0:
                        px, py, pz, sign = -px, -py, -pz, _F(-1.0)
                    py, pz = py + half, pz + half
                    ix, iy, iz = int(px), int(py), int(pz)
                    u, v, w = px - _F(ix), py - _F(iy), pz - _F(iz)
                    low = volume[iz, iy, ix] * (1 - u) + volume[iz, iy, ix + 1] * u
                    high = volume[iz, iy + 1, ix] * (1 - u) + volume[iz, iy + 1, ix + 1] * u
                    front = low * (1 - v) + high * v
                    low = volume[iz + 1, iy, ix] * (1 - u) + volume[iz + 1, iy, ix + 1] * u
                    high = volume[iz + 1, iy + 1, ix] * (1 - u) + volume[iz + 1, iy + 1, ix + 1] * u
                    model = front * (1 - w) + (low * (1 - v) + high * v) * w
                    angle = turn * (row * shift[0] + column * shift[1])
                    contrast = ctf[row + radius, column]
                    c, s = math.cos(angle) * contrast, math.sin(angle) * contrast
                    re, im = model.real * c - model.imag * sign * s, model.real * s + model.imag * sign * c
                    out[particle, 1, shell] += re * datum.real + im * datum.imag
                    out[particle, 2, shell] += re * re + im * im
