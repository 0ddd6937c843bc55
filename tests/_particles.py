"""Small simulated particle sets with known truth for the tests of the map-making stages."""

from __future__ import annotations

import numpy as np
import torch

from cryodask.kernels.expectation import ctf_values
from cryodask.kernels.fourier import centred_ifft2
from cryodask.kernels.orientations import random_rotations
from cryodask.kernels.projection import fourier_volume, half_plane, shift_phases, slices
from cryodask.kernels.symmetry import symmetry_operators
from cryodask.stage import ParticleSet


def blob_map(box: int, symmetry: str = "C1", blobs: int = 12, seed: int = 3, reach: float = 0.30, width_px: float = 1.5) -> torch.Tensor:
    """A molecule of Gaussian blobs `(z, y, x)`, symmetrised exactly, within ``reach`` of the box."""
    rng = np.random.default_rng(seed)
    c = torch.arange(box).float() - box // 2
    z, y, x = torch.meshgrid(c, c, c, indexing="ij")
    out = torch.zeros(box, box, box)
    for _ in range(blobs):
        v = rng.normal(size=3)
        v *= reach * box * rng.uniform(0.2, 1.0) ** (1 / 3) / np.linalg.norm(v)
        weight = rng.uniform(0.5, 1.5)
        for g in symmetry_operators(symmetry):
            p = g @ v
            out += weight * torch.exp(-((x - p[0]) ** 2 + (y - p[1]) ** 2 + (z - p[2]) ** 2) / (2 * width_px**2))
    return out


def ctf_columns(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    """CTF of a 300 kV microscope, defocus 0.8 to 2.2 um."""
    rng = np.random.default_rng(seed)
    u = rng.uniform(8e3, 2.2e4, count)
    return {
        "defocus_u_angstrom": u,
        "defocus_v_angstrom": u - rng.uniform(0, 400, count),
        "defocus_angle_deg": rng.uniform(0, 180, count),
        "phase_shift_deg": np.zeros(count),
        "voltage_kv": np.full(count, 300.0),
        "spherical_aberration_mm": np.full(count, 2.7),
        "amplitude_contrast": np.full(count, 0.1),
        "half_set": np.arange(count) % 2,
    }


def project(volume: torch.Tensor, rotations: torch.Tensor, origin_px: torch.Tensor, columns: dict, pixel: float) -> np.ndarray:
    """Noise-free images with CTF `(n, y, x)`; ``origin_px`` moves the particle TO the centre."""
    box = volume.shape[-1]
    plane = half_plane(box // 2 - 1)
    fourier = fourier_volume(volume, box // 2 - 1)
    out = []
    for i in torch.arange(len(rotations)).split(64):
        some = {k: v[i.numpy()] for k, v in columns.items()}
        values = slices(fourier, rotations[i], plane.ky, plane.kx) * ctf_values(some, plane.ky, plane.kx, box * pixel)
        values = values * shift_phases(-origin_px[i], plane.ky, plane.kx, box)
        spectrum = torch.zeros(len(i), box, box, dtype=torch.complex64)
        spectrum[:, plane.ky % box, plane.kx] = values
        spectrum[:, (-plane.ky) % box, (-plane.kx) % box] = values.conj()
        out.append(centred_ifft2(spectrum))
    return torch.cat(out).numpy()


def simulate(
    volume: torch.Tensor, count: int, *, pixel: float, snr: float, seed: int = 0, shift_px: float = 1.0
) -> tuple[np.ndarray, ParticleSet, torch.Tensor, torch.Tensor]:
    """Images (noise sd 1), their set, true rotations `(n, 3, 3)` and origins `(n, 2)` in pixels. ``snr``: variance ratio over the box."""
    g = torch.Generator().manual_seed(seed)
    rotations = random_rotations(count, g)
    origins = torch.randn(count, 2, generator=g) * shift_px
    columns = ctf_columns(count, seed)
    clean = project(volume, rotations, origins, columns, pixel)
    scale = np.sqrt(snr / clean.var()) if snr > 0 else 0.0
    noise = np.random.default_rng(seed + 1).standard_normal(clean.shape, dtype=np.float32)
    images = (clean * scale + noise).astype(np.float32)
    return images, ParticleSet(count, volume.shape[-1], pixel, columns), rotations, origins
