"""Aberrations of an optics group: beam tilt, trefoil and magnification, corrected in the images; tetrafoil, part of the CTF.

An image shows ``X(k) = sin(gamma(k)) a(M k) exp(i phi(k))`` of the projection's transform a. The odd phase error is

    phi(k) = -2 pi Cs lambda^2 |k|^2 (k . tilt) + trefoil_x |k|^3 cos 3 theta + trefoil_y |k|^3 sin 3 theta

with k in 1/Angstrom and signs of RELION 3.1 (rlnBeamTiltX/Y, rlnOddZernike, rlnMagMat). The magnification M is symmetric. Corrected
images are those of a microscope without these aberrations (and with a slightly different astigmatism), so later steps need not know
of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from cryodask.kernels.ctf import electron_wavelength_angstrom
from cryodask.vocabulary import ABERRATIONS

_TILT, _TREFOIL = ("beam_tilt_x_mrad", "beam_tilt_y_mrad"), ("trefoil_x_angstrom3", "trefoil_y_angstrom3")
_MAGNIFICATION = ("magnification_xx", "magnification_xy", "magnification_yy")
NEUTRAL = {name: 1.0 if name in ("magnification_xx", "magnification_yy") else 0.0 for name in ABERRATIONS}
"""Values of a microscope without aberrations."""


def tilt_phase_per_mrad(voltage_kv: float, spherical_aberration_mm: float) -> float:
    """Factor c of the phase error c |k|^2 (k . tilt), radians x Angstrom^3 per mrad, of a beam tilt in RELION's sign."""
    wavelength = float(electron_wavelength_angstrom(voltage_kv))
    return -2.0 * math.pi * spherical_aberration_mm * 1e7 * wavelength**2 * 1e-3


def odd_basis(ky: Tensor, kx: Tensor) -> Tensor:
    """Odd polynomials `(6, ...)` of frequencies in 1/Angstrom: x, y (a shift), r^2 x, r^2 y (beam tilt), r^3 cos 3t, r^3 sin 3t."""
    square = kx * kx + ky * ky
    return torch.stack([kx, ky, square * kx, square * ky, kx**3 - 3.0 * kx * ky**2, 3.0 * kx**2 * ky - ky**3])


def odd_phase(values: Mapping[str, float], ky: Tensor, kx: Tensor) -> Tensor:
    """Phase error phi `(...)`, radians, of one optics group; ``values`` has its aberrations, voltage and Cs."""
    basis = odd_basis(ky, kx)
    tilt = tilt_phase_per_mrad(values["voltage_kv"], values["spherical_aberration_mm"])
    factors = [tilt * values.get(name, 0.0) for name in _TILT] + [values.get(name, 0.0) for name in _TREFOIL]
    return sum(factor * polynomial for factor, polynomial in zip(factors, basis[2:]))


def magnification(values: Mapping[str, float]) -> np.ndarray:
    """Matrix M `(2, 2)` (x, y) of one optics group."""
    xx, xy, yy = (float(values.get(name, NEUTRAL[name])) for name in _MAGNIFICATION)
    return np.array([[xx, xy], [xy, yy]])


def corrected(
    images: np.ndarray, columns: Mapping[str, np.ndarray], pixel_size_angstrom: float
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Images `(n, y, x)` corrected for odd aberrations and anisotropic magnification, and their columns with the corrected CTF.

    Magnification turns the defocus ellipse into ``M^-T Z M^-1``; its effect on the term of the spherical aberration (0.03 radians at
    4 A for half a per cent) is left out. The columns of the corrected aberrations are not returned.
    """
    known = [name for name in (*_TILT, *_TREFOIL, *_MAGNIFICATION) if name in columns]
    if not known or not len(images):
        return images, {name: values for name, values in columns.items() if name not in known}
    names = [*known, "voltage_kv", "spherical_aberration_mm"]
    table = np.stack([np.asarray(columns[name], np.float64) for name in names], 1)
    groups, of = np.unique(table, axis=0, return_inverse=True)
    out, changed = np.array(images, np.float32), {name: values for name, values in columns.items() if name not in known}
    for number, row in enumerate(groups):
        some, values = np.flatnonzero(of.reshape(-1) == number), dict(zip(names, row.tolist()))
        if all(abs(values.get(name, NEUTRAL[name]) - NEUTRAL[name]) < 1e-9 for name in known):
            continue
        out[some] = _corrected_images(torch.from_numpy(out[some]), values, pixel_size_angstrom).numpy()
        for name, turned in _turned_defocus(columns, some, magnification(values)).items():
            changed[name] = np.array(changed[name], np.float64)
            changed[name][some] = turned
    return out, changed


def _corrected_images(images: Tensor, values: Mapping[str, float], pixel_size_angstrom: float) -> Tensor:
    box = images.shape[-1]
    length = box * pixel_size_angstrom
    ky, kx = (torch.fft.fftfreq(box, 1.0 / box).double() / length)[:, None], torch.fft.rfftfreq(box, 1.0 / box).double() / length
    phase = odd_phase(values, *torch.broadcast_tensors(ky, kx)).float()
    back = torch.polar(torch.ones_like(phase), -phase)
    matrix = magnification(values)
    if np.allclose(matrix, np.eye(2), rtol=0.0, atol=1e-9):
        return torch.fft.irfft2(torch.fft.rfft2(images) * back, s=images.shape[-2:])
    # f(M r) by two shears and a scaling between them, each exact for a band-limited image: M = U D U^T
    slope = matrix[0, 1] / matrix[1, 1]
    scale_x, scale_y = matrix[0, 0] - slope**2 * matrix[1, 1], matrix[1, 1]
    place = torch.arange(box).double() - box // 2
    turns = 2.0 * math.pi * slope * place / box
    along_x = turns[:, None] * torch.fft.rfftfreq(box, 1.0 / box).double()
    along_y = torch.fft.rfftfreq(box, 1.0 / box).double()[:, None] * turns
    spectrum = torch.fft.ifft(torch.fft.rfft2(images) * back, dim=-2)
    sheared = torch.fft.irfft(spectrum * torch.polar(torch.ones_like(along_x), along_x).to(torch.complex64), n=box, dim=-1)
    scaled = _scaling(box, scale_y) @ sheared @ _scaling(box, scale_x).T
    spectrum = torch.fft.rfft(scaled, dim=-2) * torch.polar(torch.ones_like(along_y), along_y).to(torch.complex64)
    return torch.fft.irfft(spectrum, n=box, dim=-2) * float(np.linalg.det(matrix))


def _scaling(box: int, scale: float) -> Tensor:
    """Matrix `(box, box)` float32 that samples a periodic row at ``scale`` times the distance from box // 2 (Dirichlet kernel)."""
    place = torch.arange(box).double() - box // 2
    off = scale * place[:, None] - place[None]
    # a whole period away it is the same sample
    off = off - box * torch.round(off / box)
    kernel = torch.sin(math.pi * off) / (box * torch.tan(math.pi * off / box))
    return torch.where(off.abs() < 1e-9, torch.ones_like(off), kernel).float()


def _turned_defocus(columns: Mapping[str, np.ndarray], some: np.ndarray, matrix: np.ndarray) -> dict[str, np.ndarray]:
    """Defocus columns of some particles after the correction of their magnification."""
    u, v, angle = (np.asarray(columns[f"defocus_{name}"], np.float64)[some] for name in ("u_angstrom", "v_angstrom", "angle_deg"))
    mean, half, twice = (u + v) / 2.0, (u - v) / 2.0, np.radians(2.0 * angle)
    ellipse = np.empty((len(some), 2, 2))
    ellipse[:, 0, 0], ellipse[:, 1, 1] = mean + half * np.cos(twice), mean - half * np.cos(twice)
    ellipse[:, 0, 1] = ellipse[:, 1, 0] = half * np.sin(twice)
    back = np.linalg.inv(matrix)
    return defocus_columns(back.T @ ellipse @ back)


def defocus_columns(ellipse: np.ndarray) -> dict[str, np.ndarray]:
    """Defocus u, v (u the larger), Angstrom, and angle, degrees within 0 to 180, of symmetric matrices `(n, 2, 2)` (x, y)."""
    mean = (ellipse[:, 0, 0] + ellipse[:, 1, 1]) / 2.0
    cosine, sine = (ellipse[:, 0, 0] - ellipse[:, 1, 1]) / 2.0, ellipse[:, 0, 1]
    half = np.hypot(cosine, sine)
    angle = np.degrees(np.arctan2(sine, cosine)) / 2.0 % 180.0
    return {"defocus_u_angstrom": mean + half, "defocus_v_angstrom": mean - half, "defocus_angle_deg": angle}
