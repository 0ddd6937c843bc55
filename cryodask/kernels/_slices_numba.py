"""The compiled search of :mod:`cryodask.kernels.local_search` (numba, float32 with float64 between groups of pixels).

One particle is worked on at a time: its model at a pose is the map's slice (trilinear, from half a Fourier grid) times CTF times the
phases of its shift. Pixels are taken row by row, so that neighbours in memory are neighbours in the volume. Sums are reordered by
the compiler (``fastmath``): the same bits on one kind of CPU only. The functions release the interpreter's lock.

The loop over the pixels of a slice has no step that depends on the one before, and no array index that may be negative (hence unsigned
ones): so the compiler makes it one of vector instructions, 12 instead of 40 ns per pixel with gradient and normal matrix.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np

from cryodask.kernels._insertion_numba import ctf_plane
from cryodask.kernels._slices_torch import SAME_POSE_TRACE

_F, _U = np.float32, np.uint64
_TOGETHER = 512
"""Pixels summed in float32."""


def _jit(function: Any) -> Any:
    return numba.njit(cache=True, nogil=True, fastmath=True, error_model="numpy")(function)


@_jit
def _trilinear(c0, c1, c2, c3, c4, c5, c6, c7, u, v, w):  # type: ignore[no-untyped-def]
    """Value and gradient (x, y, z) between eight corners, x fastest."""
    x0, x1, x2, x3 = c1 - c0, c3 - c2, c5 - c4, c7 - c6
    e0, e1, e2, e3 = c0 + u * x0, c2 + u * x1, c4 + u * x2, c6 + u * x3
    y0, y1 = e1 - e0, e3 - e2
    z0, z1 = e0 + v * y0, e2 + v * y1
    low, high = x0 + v * (x1 - x0), x2 + v * (x3 - x2)
    return z0 + w * (z1 - z0), low + w * (high - low), y0 + w * (y1 - y0), z1 - z0


@_jit
def _pixels(ring):  # type: ignore[no-untyped-def]
    """Coordinates x and y of the independent pixels up to ``ring``, row by row."""
    count = 0
    for row in range(-ring, ring + 1):
        count += int(math.sqrt(ring * ring + 0.5 - row * row)) + (1 if row > 0 else 0)
    x, y = np.empty(count, _F), np.empty(count, _F)
    place = 0
    for row in range(-ring, ring + 1):
        for column in range(0 if row > 0 else 1, int(math.sqrt(ring * ring + 0.5 - row * row)) + 1):
            x[place], y[place] = column, row
            place += 1
    return x, y


@_jit
def _packed(image, ctf, weight, radius, x, y):  # type: ignore[no-untyped-def]
    """Real and imaginary part of the image, CTF and weight `(4, pixel)` at some pixels of the rows up to ``radius``."""
    out = np.empty((4, len(x)), _F)
    for i in range(len(x)):
        row, column = int(y[i]) + radius, int(x[i])
        datum = image[row, column]
        out[0, i], out[1, i] = datum.real, datum.imag
        out[2, i], out[3, i] = ctf[row, column], weight[row, column]
    return out


@_jit
def _transfer(ctf, ring, shift, turn, out):  # type: ignore[no-untyped-def]
    """CTF times the phases of a shift, real and imaginary parts `(2, pixel)` of the pixels up to ``ring``."""
    across = np.empty((2, ring + 1), _F)
    for column in range(ring + 1):
        across[0, column], across[1, column] = math.cos(turn * column * shift[1]), math.sin(turn * column * shift[1])
    place = 0
    for row in range(-ring, ring + 1):
        cosine, sine = _F(math.cos(turn * row * shift[0])), _F(math.sin(turn * row * shift[0]))
        first = 0 if row > 0 else 1
        count = int(math.sqrt(ring * ring + 0.5 - row * row)) + 1 - first
        for i in range(count):
            contrast, c, s = ctf[place + i], across[0, first + i], across[1, first + i]
            out[0, place + i] = contrast * (cosine * c - sine * s)
            out[1, place + i] = contrast * (cosine * s + sine * c)
        place += count


@_jit
def _slice_sums(volume, half, packed, transfer, along_x, along_y, rotation, turn, begin, end):  # type: ignore[no-untyped-def]
    """Sums over pixels of a slice: log-likelihood gain, its gradient (5) and normal matrix (15, upper triangle by rows).

    Parameters are a rotation about the image's x, y and z axis and a shift in y and x, in pixels. ``volume`` is flat, with real and
    imaginary parts in turn.
    """
    zero = _F(0.0)
    gain = zero
    g0, g1, g2, g3, g4 = zero, zero, zero, zero, zero
    h00, h01, h02, h03, h04, h11, h12, h13 = zero, zero, zero, zero, zero, zero, zero, zero
    h14, h22, h23, h24, h33, h34, h44 = zero, zero, zero, zero, zero, zero, zero
    r00, r01, r02 = rotation[0, 0], rotation[0, 1], rotation[0, 2]
    r10, r11, r12 = rotation[1, 0], rotation[1, 1], rotation[1, 2]
    r20, r21, r22 = rotation[2, 0], rotation[2, 1], rotation[2, 2]
    middle = _F(half)
    point, line, plane = _U(2), _U(2 * (half + 1)), _U(2 * (half + 1) * (2 * half + 1))
    i1, i2, i3 = _U(1), _U(2), _U(3)
    for i in range(begin, end):
        kx, ky = along_x[i], along_y[i]
        x, y = _F(2.0) * kx, _F(2.0) * ky
        px, py, pz = r00 * x + r10 * y, r01 * x + r11 * y, r02 * x + r12 * y
        sign = _F(1.0) if px >= 0 else _F(-1.0)
        px, py, pz = px * sign, py * sign + middle, pz * sign + middle
        ix, iy, iz = np.int32(px), np.int32(py), np.int32(pz)
        u, v, w = px - _F(ix), py - _F(iy), pz - _F(iz)
        a = _U(iz) * plane + _U(iy) * line + _U(ix) * point
        b, c, d = a + line, a + plane, a + plane + line
        re, xr, yr, zr = _trilinear(
            volume[a], volume[a + i2], volume[b], volume[b + i2], volume[c], volume[c + i2], volume[d], volume[d + i2], u, v, w
        )
        im, xi, yi, zi = _trilinear(
            volume[a + i1], volume[a + i3], volume[b + i1], volume[b + i3], volume[c + i1], volume[c + i3], volume[d + i1],
            volume[d + i3], u, v, w,
        )  # fmt: skip
        im *= sign
        tr, ti = transfer[0, i], transfer[1, i]
        mr, mi = re * tr - im * ti, re * ti + im * tr
        datum_r, datum_i, scale = packed[0, i], packed[1, i], packed[3, i]
        gain += scale * (_F(2.0) * (mr * datum_r + mi * datum_i) - (mr * mr + mi * mi))
        # at the mirrored point the gradient is minus the conjugate
        xr, yr, zr = xr * sign, yr * sign, zr * sign
        out_r, out_i = r20 * xr + r21 * yr + r22 * zr, r20 * xi + r21 * yi + r22 * zi
        up_r, up_i = r10 * xr + r11 * yr + r12 * zr, r10 * xi + r11 * yi + r12 * zi
        right_r, right_i = r00 * xr + r01 * yr + r02 * zr, r00 * xi + r01 * yi + r02 * zi
        ar, ai = out_r * tr - out_i * ti, out_r * ti + out_i * tr
        br, bi = up_r * x - right_r * y, up_i * x - right_i * y
        j0r, j0i, j1r, j1i = ar * y, ai * y, -ar * x, -ai * x
        j2r, j2i = br * tr - bi * ti, br * ti + bi * tr
        sy, sx = turn * ky, turn * kx
        j3r, j3i, j4r, j4i = -mi * sy, mr * sy, -mi * sx, mr * sx
        dr, di = scale * (datum_r - mr), scale * (datum_i - mi)
        g0 += j0r * dr + j0i * di
        g1 += j1r * dr + j1i * di
        g2 += j2r * dr + j2i * di
        g3 += j3r * dr + j3i * di
        g4 += j4r * dr + j4i * di
        w0r, w0i, w1r, w1i = scale * j0r, scale * j0i, scale * j1r, scale * j1i
        w2r, w2i, w3r, w3i = scale * j2r, scale * j2i, scale * j3r, scale * j3i
        h00 += w0r * j0r + w0i * j0i
        h01 += w0r * j1r + w0i * j1i
        h02 += w0r * j2r + w0i * j2i
        h03 += w0r * j3r + w0i * j3i
        h04 += w0r * j4r + w0i * j4i
        h11 += w1r * j1r + w1i * j1i
        h12 += w1r * j2r + w1i * j2i
        h13 += w1r * j3r + w1i * j3i
        h14 += w1r * j4r + w1i * j4i
        h22 += w2r * j2r + w2i * j2i
        h23 += w2r * j3r + w2i * j3i
        h24 += w2r * j4r + w2i * j4i
        h33 += w3r * j3r + w3i * j3i
        h34 += w3r * j4r + w3i * j4i
        h44 += scale * (j4r * j4r + j4i * j4i)
    return gain, g0, g1, g2, g3, g4, h00, h01, h02, h03, h04, h11, h12, h13, h14, h22, h23, h24, h33, h34, h44


@_jit
def _terms(volume, half, packed, transfer, x, y, rotation, shift, box, ring, matrix, vector):  # type: ignore[no-untyped-def]
    """Log-likelihood gain at a pose up to ``ring``; the normal equations are left in ``matrix`` and ``vector``."""
    turn = 2.0 * math.pi / box
    pose = rotation.astype(_F)
    _transfer(packed[2], ring, shift, turn, transfer)
    total = np.zeros(21)
    for begin in range(0, len(x), _TOGETHER):
        sums = _slice_sums(volume, half, packed, transfer, x, y, pose, _F(turn), begin, min(len(x), begin + _TOGETHER))
        for i in range(21):
            total[i] += sums[i]
    place = 6
    for i in range(5):
        vector[i] = total[1 + i]
        for j in range(i, 5):
            matrix[i, j] = total[place]
            matrix[j, i] = total[place]
            place += 1
    return total[0]


@_jit
def _factor(matrix, lower):  # type: ignore[no-untyped-def]
    """Cholesky factor of a 5 x 5 matrix; returns the logarithm of its determinant."""
    log_determinant = 0.0
    for i in range(5):
        for j in range(i + 1):
            value = matrix[i, j]
            for k in range(j):
                value -= lower[i, k] * lower[j, k]
            if i == j:
                lower[i, i] = math.sqrt(max(value, 1e-12))
                log_determinant += 2.0 * math.log(lower[i, i])
            else:
                lower[i, j] = value / lower[j, j]
    return log_determinant


@_jit
def _solve(matrix, vector, damping, lower, step):  # type: ignore[no-untyped-def]
    """Solution of the damped normal equations (diagonal times 1 + damping) into ``step``."""
    damped = matrix.copy()
    for i in range(5):
        damped[i, i] = damped[i, i] * (1.0 + damping) + 1e-12
    _factor(damped, lower)
    for i in range(5):
        value = vector[i]
        for k in range(i):
            value -= lower[i, k] * step[k]
        step[i] = value / lower[i, i]
    for i in range(4, -1, -1):
        value = step[i]
        for k in range(i + 1, 5):
            value -= lower[k, i] * step[k]
        step[i] = value / lower[i, i]


@_jit
def _turned(omega, rotation):  # type: ignore[no-untyped-def]
    """``exp(-[omega]x) @ rotation`` (Rodrigues): the slice point k becomes k + omega x k."""
    angle = math.sqrt(omega[0] ** 2 + omega[1] ** 2 + omega[2] ** 2)
    if angle < 1e-12:
        return rotation.copy()
    x, y, z = omega[0] / angle, omega[1] / angle, omega[2] / angle
    s, c = math.sin(angle), 1.0 - math.cos(angle)
    out = np.empty((3, 3))
    for column in range(3):
        a, b, d = rotation[0, column], rotation[1, column], rotation[2, column]
        along = x * a + y * b + z * d
        out[0, column] = a - s * (y * d - z * b) + c * (x * along - a)
        out[1, column] = b - s * (z * a - x * d) + c * (y * along - b)
        out[2, column] = d - s * (x * b - y * a) + c * (z * along - d)
    return out


@_jit
def _climb(volume, half, packed, transfer, x, y, rotation, shift, box, ring, steps, least, prior, hessian):  # type: ignore[no-untyped-def]
    """Levenberg-Marquardt of one pose up to ``ring``, in place; returns the log posterior and leaves minus its Hessian."""
    matrix, vector = np.zeros((5, 5)), np.zeros(5)
    new_matrix, new_vector = np.zeros((5, 5)), np.zeros(5)
    lower, step = np.zeros((5, 5)), np.zeros(5)
    best = _terms(volume, half, packed, transfer, x, y, rotation, shift, box, ring, matrix, vector)
    best -= 0.5 * prior * (shift[0] ** 2 + shift[1] ** 2)
    damping = 1e-3
    for _ in range(steps):
        for i in range(3, 5):
            matrix[i, i] += 0.5 * prior
            vector[i] -= 0.5 * prior * shift[i - 3]
        _solve(matrix, vector, damping, lower, step)
        expected = 0.0
        for i in range(5):
            expected += vector[i] * step[i]
        for i in range(3, 5):
            matrix[i, i] -= 0.5 * prior
            vector[i] += 0.5 * prior * shift[i - 3]
        tried, moved = _turned(step[:3], rotation), shift + step[3:]
        if expected < least:
            rotation[:] = tried
            shift[:] = moved
            best += expected
            break
        found = _terms(volume, half, packed, transfer, x, y, tried, moved, box, ring, new_matrix, new_vector)
        found -= 0.5 * prior * (moved[0] ** 2 + moved[1] ** 2)
        if found > best:
            rotation[:] = tried
            shift[:] = moved
            best = found
            matrix[:] = new_matrix
            vector[:] = new_vector
            damping *= 0.3
        else:
            damping = max(10.0 * damping, 0.1)
            if damping > 20.0:
                break
    for i in range(5):
        for j in range(5):
            hessian[i, j] = 2.0 * matrix[i, j]
    for i in range(3, 5):
        hessian[i, i] += prior
    return best


@_jit
def _same(a, b, operators):  # type: ignore[no-untyped-def]
    """Whether two rotations are less than 2 degrees apart modulo the point group."""
    for g in range(operators.shape[0]):
        trace = 0.0
        for i in range(3):
            for j in range(3):
                turned = b[i, 0] * operators[g, 0, j] + b[i, 1] * operators[g, 1, j] + b[i, 2] * operators[g, 2, j]
                trace += a[i, j] * turned
        if trace > SAME_POSE_TRACE:
            return True
    return False


@_jit
def search(  # type: ignore[no-untyped-def]
    volume, half, images, numbers, radius, weight, rotations, shifts, starts, box, rings, most, steps, least, nats, prior, operators,
    out_rotations, out_shifts, out_score, out_evidence, out_count, out_factor,
):  # fmt: skip
    """Climb from ``starts[i]`` candidates of each particle, ring limit by ring limit; the best ``most`` of a limit go on to the next.

    ``volume`` is flat, with real and imaginary parts in turn.
    ``out_score`` is the log posterior of a mode, ``out_evidence`` the same minus half the log determinant of its Hessian (Laplace),
    ``out_factor`` the Cholesky factor of minus the Hessian. A step that is expected to gain less than ``least`` is the last one.
    """
    ctf = np.empty((2 * radius + 1, radius + 1), _F)
    hessian, lower = np.zeros((5, 5)), np.zeros((5, 5))
    widest = rotations.shape[1]
    for particle in range(images.shape[0]):
        ctf_plane(numbers[particle], radius, ctf)
        pose, shift = rotations[particle].astype(np.float64), shifts[particle].astype(np.float64)
        score, evidence, factor = np.zeros(widest), np.zeros(widest), np.zeros((widest, 5, 5))
        alive = np.arange(starts[particle])
        for level in range(len(rings)):
            ring = rings[level]
            x, y = _pixels(ring)
            packed = _packed(images[particle], ctf, weight, radius, x, y)
            transfer = np.empty((2, len(x)), _F)
            for i in alive:
                score[i] = _climb(
                    volume, half, packed, transfer, x, y, pose[i], shift[i], box, ring, steps[level], least, prior, hessian
                )  # fmt: skip
                evidence[i] = score[i] - 0.5 * _factor(hessian, lower)
                factor[i] = lower
            order = alive[np.argsort(-score[alive], kind="mergesort")]
            kept = np.empty(len(order), np.int64)
            count = 0
            for i in order:
                if count == most[level] or score[i] < score[order[0]] - nats:
                    break
                known = False
                for k in range(count):
                    known = known or _same(pose[i], pose[kept[k]], operators)
                if not known:
                    kept[count] = i
                    count += 1
            alive = kept[:count].copy()
        out_count[particle] = min(len(alive), out_rotations.shape[1])
        for k in range(out_count[particle]):
            out_rotations[particle, k] = pose[alive[k]].astype(_F)
            out_shifts[particle, k] = shift[alive[k]].astype(_F)
            out_score[particle, k] = score[alive[k]]
            out_evidence[particle, k] = evidence[alive[k]]
            out_factor[particle, k] = factor[alive[k]]
