"""Signal subtraction: what particle images show of a map, as they are stored.

A stored image shows ``X(k) = CTF(k) a(M k) exp(i phi(k))`` of the projection's transform a, with the odd phase error phi and the
magnification M of its optics group (see :mod:`cryodask.kernels.aberrations`). Poses and centres refer to images that were corrected for
these, so they enter at M k.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from cryodask.kernels._slices_torch import Plane, ctf_at, shift_phases, sliced
from cryodask.kernels.aberrations import NEUTRAL, magnification, odd_phase
from cryodask.kernels.fsc import fsc
from cryodask.kernels.half_grid import half_volume
from cryodask.kernels.rows import ctf_numbers

_STRETCH = 1.1
"""Largest magnification whose slices lie within the volume."""
_TOGETHER = 32
PRIOR_CONTRAST_SD = 0.3
"""Standard deviation of the contrast of exposures about 1: what is assumed of those with little signal."""
_FSC_LEAST = 0.143


def filtered_half_maps(half_maps: Tensor, support: Tensor) -> tuple[Tensor, int]:
    """Half-maps `(2, z, y, x)` within a soft support, times their FSC (the Wiener weight of a half-map), and the last shell of it.

    The filter ends where the FSC falls below 0.143, at the last shell before Nyquist at most.
    """
    within = half_maps * support
    box = within.shape[-1]
    curve = torch.nan_to_num(fsc(within[0], within[1])).clamp(0.0, 1.0)[: box // 2]
    fallen = torch.nonzero(curve[1:] < _FSC_LEAST)
    last = int(fallen[0]) if len(fallen) else len(curve) - 1
    weight = torch.zeros(box, dtype=torch.float32, device=within.device)
    weight[: last + 1] = curve[: last + 1].float()
    weight[0] = 1.0
    axes = torch.fft.fftfreq(box, 1.0 / box, device=within.device)
    shell = torch.sqrt(axes[:, None, None] ** 2 + axes[None, :, None] ** 2 + axes[None, None, : box // 2 + 1].abs() ** 2)
    factor = weight[shell.round().long().clamp(max=box - 1)]
    return torch.fft.irfftn(torch.fft.rfftn(within, dim=(1, 2, 3)) * factor, s=(box,) * 3, dim=(1, 2, 3)), last


def slice_volume(volume: Tensor, radius: int, image_box: int) -> Tensor:
    """The transform of a map that slices up to ``radius``, stretched by a magnification, are taken from."""
    return half_volume(volume, min(int(np.ceil(radius * _STRETCH)), volume.shape[-1] // 2 - 1), image_box)


def shown_spectra(
    volume: Tensor,
    rotations: Tensor,
    shifts_px: Tensor,
    columns: Mapping[str, np.ndarray],
    pixel_size_angstrom: float,
    box: int,
    radius: int,
) -> Tensor:
    """Half transforms `(n, box, box // 2 + 1)` complex64, DFT / box, of what images show of a map at known poses; zero beyond ``radius``.

    Parameters
    ----------
    volume : Tensor
        From :func:`slice_volume`.
    rotations, shifts_px : Tensor, `(n, 3, 3)` and `(n, 2)` (y, x), float32
    columns : mapping
        CTF of each particle, optics, and aberrations where they are known.
    """
    device = volume.device
    y, x = torch.meshgrid(torch.arange(-radius, radius + 1, device=device), torch.arange(radius + 1, device=device), indexing="ij")
    inside = (y * y + x * x <= radius * radius) & ((y != 0) | (x != 0))
    ky, kx = y[inside], x[inside]
    length = box * pixel_size_angstrom
    numbers = torch.from_numpy(ctf_numbers(columns, length)).to(device)
    out = torch.zeros(len(rotations), box, box // 2 + 1, dtype=torch.complex64, device=device)
    names = [*NEUTRAL, "voltage_kv", "spherical_aberration_mm"]
    count = len(rotations)
    table = np.stack([np.broadcast_to(np.asarray(columns.get(n, NEUTRAL.get(n)), np.float64), (count,)) for n in names], 1)
    groups, of = np.unique(table, axis=0, return_inverse=True)
    limit = (volume.shape[2] - 1) // 2
    for number, row in enumerate(groups):
        values = dict(zip(names, row.tolist()))
        matrix = magnification(values)
        seen_x, seen_y = (matrix[i, 0] * kx + matrix[i, 1] * ky for i in (0, 1))
        within = seen_x * seen_x + seen_y * seen_y <= limit * limit
        # x may become negative by a shear at the edge of the half plane: the slice is Hermitian there, as everywhere
        plane = Plane(seen_y.float(), seen_x.float(), ky, ky)
        phase = odd_phase(values, ky.double() / length, kx.double() / length).float()
        factor = torch.polar(within.float(), phase)
        for some in torch.from_numpy(np.flatnonzero(of.reshape(-1) == number)).to(device).split(_TOGETHER):
            value = sliced(volume, rotations[some], plane)[0] * shift_phases(shifts_px[some], plane, box)
            out[some[:, None], (ky % box)[None], kx[None]] = value * ctf_at(numbers[some], ky, kx) * factor
    return out


def contrast_of(images: Tensor, shown: Tensor) -> float:
    """Contrast of an exposure: the factor of a model's spectra that fits those of its images best, with a prior of 1 +- 0.3.

    The noise of each Fourier ring is what the images differ from the model by. Both are `(n, box, box // 2 + 1)`, DFT / box.
    """
    box = images.shape[1]
    ky = torch.fft.fftfreq(box, 1.0 / box, device=images.device)[:, None]
    kx = torch.arange(box // 2 + 1, device=images.device)[None]
    ring = torch.sqrt(ky * ky + kx * kx).round().long()
    counts = ((shown.abs().amax(0) > 0) & ((kx > 0) | (ky > 0))).double()
    ring_count = torch.bincount(ring.reshape(-1), counts.reshape(-1)).clamp(min=1.0) * len(images)

    def by_ring(values: Tensor) -> Tensor:
        return torch.bincount(ring.reshape(-1), (values.double().sum(0) * counts).reshape(-1))

    noise = (by_ring((images - shown).abs().square()) / ring_count).clamp(min=1e-30)
    # of a complex number of variance s2, the part along the model has half of it
    weight = 2.0 / noise
    cross, power = by_ring((shown.conj() * images).real), by_ring(shown.abs().square())
    prior = PRIOR_CONTRAST_SD**-2
    return float(((cross * weight).sum() + prior) / ((power * weight).sum() + prior))
