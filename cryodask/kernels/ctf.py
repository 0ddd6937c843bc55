"""The contrast transfer function in RELION's sign: positive at low frequency, for images with white protein.

CTF(k) = sin(pi lambda z k^2 - pi/2 Cs lambda^3 k^4 + phase_shift + asin(Q)), with z(theta) = (u+v)/2 + (u-v)/2 cos 2(theta - angle)
and theta counted from +x towards +y of the stored array (conventions of RELION 3.1.3; see tests/test_conventions.py).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def electron_wavelength_angstrom(voltage_kv: float | Tensor) -> float | Tensor:
    """Relativistic wavelength of an electron, Angstrom: 0.019687 at 300 kV, 0.025079 at 200 kV."""
    volt = voltage_kv * 1e3
    return 12.2643247 / (volt * (1.0 + volt * 0.978466e-6)) ** 0.5


def ctf_phase(
    ky: Tensor,
    kx: Tensor,
    *,
    defocus_u_angstrom: float | Tensor,
    defocus_v_angstrom: float | Tensor,
    defocus_angle_rad: float | Tensor,
    voltage_kv: float | Tensor,
    spherical_aberration_mm: float | Tensor,
    amplitude_contrast: float | Tensor,
    phase_shift_rad: float | Tensor = 0.0,
) -> Tensor:
    """Argument of the sine of the CTF, radians.

    Parameters
    ----------
    ky, kx : Tensor
        Frequencies, 1/Angstrom; all arguments broadcast against them.
    defocus_u_angstrom, defocus_v_angstrom : float or Tensor
        Defocus along and across ``defocus_angle_rad``; underfocus is positive.
    defocus_angle_rad : float or Tensor
        From +x towards +y of the stored array.
    """
    lam = electron_wavelength_angstrom(voltage_kv)
    k2 = kx * kx + ky * ky
    twice_angle = 2.0 * (torch.atan2(ky, kx) - defocus_angle_rad)
    u, v = defocus_u_angstrom, defocus_v_angstrom
    defocus = 0.5 * (u + v) + 0.5 * (u - v) * torch.cos(twice_angle)
    cs = spherical_aberration_mm * 1e7
    if isinstance(amplitude_contrast, Tensor):
        contrast_phase: float | Tensor = torch.asin(amplitude_contrast)
    else:
        contrast_phase = math.asin(amplitude_contrast)
    return math.pi * lam * defocus * k2 - 0.5 * math.pi * cs * lam**3 * k2 * k2 + phase_shift_rad + contrast_phase


def ctf(
    ky: Tensor,
    kx: Tensor,
    *,
    defocus_u_angstrom: float | Tensor,
    defocus_v_angstrom: float | Tensor,
    defocus_angle_rad: float | Tensor,
    voltage_kv: float | Tensor,
    spherical_aberration_mm: float | Tensor,
    amplitude_contrast: float | Tensor,
    phase_shift_rad: float | Tensor = 0.0,
) -> Tensor:
    """Contrast transfer function, dimensionless; arguments as :func:`ctf_phase`."""
    return torch.sin(
        ctf_phase(
            ky,
            kx,
            defocus_u_angstrom=defocus_u_angstrom,
            defocus_v_angstrom=defocus_v_angstrom,
            defocus_angle_rad=defocus_angle_rad,
            voltage_kv=voltage_kv,
            spherical_aberration_mm=spherical_aberration_mm,
            amplitude_contrast=amplitude_contrast,
            phase_shift_rad=phase_shift_rad,
        )
    )
