"""Particle images as rows of half their transforms, at half precision: what the local search and the insertion read.

Row ky of an image holds kx = 0 .. radius, so neighbours in memory are neighbours in the volume. At 16 bits a pixel takes 4 bytes;
rounding moves a pose by 0.006 degrees where noise moves it by 0.2 (256 px, 2.2 Angstrom).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from cryodask.kernels.ctf import electron_wavelength_angstrom

_LOT = 256


@dataclass(frozen=True)
class ImageRows:
    """Half transforms of images, DFT / box, of one box and pixel size.

    ``values`` `(n, 2 radius + 1, radius + 1, 2)` float16 (real, imaginary), in units of ``scale`` `(n,)` float32;
    ``ctf`` `(n, 8)` float64 of :func:`ctf_numbers`; ``group`` `(n,)` int64, the row of noise power spectra that holds for an image.
    """

    values: Tensor
    scale: Tensor
    ctf: Tensor
    radius: int
    box: int
    group: Tensor

    def with_contrast(self, contrast: Tensor) -> ImageRows:
        """The same images, their signal expected to be ``contrast`` `(n,)` times that of a mean image."""
        numbers = self.ctf.clone()
        numbers[:, 5] = contrast
        return replace(self, ctf=numbers)

    def lots(self, rows: Tensor, size: int) -> list[tuple[Tensor, int]]:
        """Places in ``rows``, at most ``size`` of one noise group together, and their group."""
        group = self.group[rows]
        return [(lot, int(g)) for g in group.unique() for lot in torch.nonzero(group == g)[:, 0].split(size)]

    def part(self, rows: Tensor, radius: int) -> Tensor:
        """Some images up to a smaller radius, `(len(rows), 2 radius + 1, radius + 1)` complex64."""
        middle = slice(self.radius - radius, self.radius + radius + 1)
        values = self.values[rows, middle, : radius + 1].float() * self.scale[rows, None, None, None]
        return torch.view_as_complex(values.contiguous())


def image_rows(
    images: Tensor, columns: Mapping[str, np.ndarray], radius: int, pixel_size_angstrom: float, group: Tensor | None = None
) -> ImageRows:
    """Half transforms of images `(n, y, x)` (origin n // 2) up to ``radius``; by default all are of one noise group."""
    box, device = images.shape[-1], images.device
    ky = torch.arange(-radius, radius + 1, device=device) % box
    values = torch.empty(len(images), 2 * radius + 1, radius + 1, 2, dtype=torch.float16, device=device)
    scale = torch.empty(len(images), device=device)
    for lot in torch.arange(len(images)).split(_LOT):
        spectrum = torch.fft.rfft2(torch.fft.ifftshift(images[lot], dim=(-2, -1)))[:, ky, : radius + 1] / box
        parts = torch.view_as_real(spectrum)
        # a thousandth of the largest value is what float16 holds best; an empty image stays empty
        scale[lot] = parts.abs().amax((1, 2, 3)).clamp(min=1e-30) / 1000.0
        values[lot] = (parts / scale[lot, None, None, None]).half()
    numbers = torch.from_numpy(ctf_numbers(columns, box * pixel_size_angstrom)).to(device)
    group = torch.zeros(len(images), dtype=torch.int64, device=device) if group is None else group
    return ImageRows(values, scale, numbers, radius, box, group)


def ctf_numbers(columns: Mapping[str, np.ndarray], length_angstrom: float) -> np.ndarray:
    """Numbers `(n, 8)` float64 that give a particle's CTF at integer frequencies (cycles per ``length_angstrom``).

    ``CTF(x, y) = f sin(a x^2 + b x y + c y^2 - d (x^2 + y^2)^2 + e + g (x^4 - 6 x^2 y^2 + y^4) + h (4 x^3 y - 4 x y^3))`` with a contrast
    f of 1; columns as in the vocabulary, those of the tetrafoil (g, h) only where it is known.
    """
    # the same for all, or an array like the other columns
    wavelength: np.ndarray = electron_wavelength_angstrom(np.asarray(columns["voltage_kv"], np.float64))  # type: ignore[arg-type, assignment]
    u, v = (np.asarray(columns[f"defocus_{axis}_angstrom"], np.float64) for axis in "uv")
    mean, difference = (u + v) / 2.0, (u - v) / 2.0
    twice = 2.0 * np.radians(np.asarray(columns["defocus_angle_deg"], np.float64))
    factor = math.pi * wavelength / length_angstrom**2
    spherical = 1e7 * np.asarray(columns["spherical_aberration_mm"], np.float64)
    amplitude = np.arcsin(np.asarray(columns["amplitude_contrast"], np.float64))
    return np.stack(
        [
            factor * (mean + difference * np.cos(twice)),
            2.0 * factor * difference * np.sin(twice),
            factor * (mean - difference * np.cos(twice)),
            0.5 * math.pi * spherical * wavelength**3 / length_angstrom**4,
            amplitude + np.radians(np.asarray(columns["phase_shift_deg"], np.float64)),
            np.ones_like(mean),
            *(np.zeros_like(mean) + columns.get(f"tetrafoil_{axis}_angstrom4", 0.0) / length_angstrom**4 for axis in "xy"),
        ],
        -1,
    )


@lru_cache(maxsize=32)
def row_shells(radius: int, device: str = "cpu") -> Tensor:
    """Shell number of the pixels of rows up to a radius, int64 `(2 radius + 1, radius + 1)`."""
    y, x = torch.arange(-radius, radius + 1).double(), torch.arange(radius + 1).double()
    return torch.round(torch.hypot(y[:, None], x[None])).long().to(device)


@lru_cache(maxsize=32)
def independent(radius: int, device: str = "cpu") -> Tensor:
    """Which pixels of the rows count: within the radius, and one of each pair of mates; bool `(2 radius + 1, radius + 1)`."""
    y, x = torch.arange(-radius, radius + 1)[:, None], torch.arange(radius + 1)[None]
    return ((y * y + x * x <= radius * radius) & ((x > 0) | (y > 0))).to(device)


def shell_counts(radius: int, device: str = "cpu") -> Tensor:
    """Number of independent pixels per shell, int64 `(radius + 1,)`, at least 1."""
    shells = row_shells(radius, device)[independent(radius, device)]
    return torch.bincount(shells.clamp(max=radius), minlength=radius + 1).clamp(min=1)


def shell_power(images: ImageRows, radius: int, rows: Tensor | None = None) -> Tensor:
    """Sum over particles (all, or ``rows``) and pixels of |image|^2 per shell, float64 `(radius + 1,)`."""
    device = str(images.values.device)
    inside = independent(radius, device)
    shells = row_shells(radius, device)[inside].clamp(max=radius)
    out = torch.zeros(radius + 1, dtype=torch.float64, device=device)
    rows = torch.arange(len(images.values), device=device) if rows is None else rows
    for lot in rows.split(_LOT):
        square = images.part(lot, radius).abs().square().sum(0, dtype=torch.float64)
        out.index_add_(0, shells, square[inside])
    return out
