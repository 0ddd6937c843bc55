"""An initial map without a reference: online expectation maximisation with sampled poses (one chain of a tournament).

Every step takes a small batch of particles, samples a few poses of each from its whole posterior against the current map, and lets the
accumulators forget the past exponentially: there is no gradient and no step length. The sampling noise anneals by itself as the map
gains contrast. The point group is imposed from the first step. The handedness of the map is undetermined: mirror images explain
projections equally well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cryodask.kernels import expectation
from cryodask.kernels import projection as pj
from cryodask.kernels.fourier import soft_sphere
from cryodask.kernels.orientations import asymmetric_unit, healpix_step_rad, random_rotations
from cryodask.kernels.symmetry import symmetry_operators

DRAWS = 4
NOISE_RATE = 0.15
"""Weight of a batch's residual in the running noise power."""
PRIOR_FACTOR = 4.0
"""Prior variance of the map relative to its own shell power; there are no half-maps yet that could determine it."""
CLIP = 0.3
"""Negative density is clipped at this many standard deviations, because protein is denser than water everywhere."""
LAST_STEPS = 6
"""Steps whose mean log-likelihood is the score of a chain."""


@dataclass(frozen=True)
class Schedule:
    """Course of a chain: steps, batch size, resolution (Angstrom) and temperature from first to last.

    A temperature below 1 sharpens the first posteriors, for which the noise power, signal included, is too large: it breaks the
    symmetry of the featureless start. On 2000 particles of beta-galactosidase 0 of 10 chains found the fold with 2.0 and batches of
    90 to 150, 6 of 8 with 0.5 to 0.7 and 120 to 250.
    """

    steps: int = 50
    first_batch: int = 120
    last_batch: int = 250
    first_resolution_angstrom: float = 45.0
    last_resolution_angstrom: float = 28.0
    first_temperature: float = 0.5
    window_growth: float = 0.35

    def ramp(self, step: int) -> float:
        """0 at the first step, 1 from 80 % of the steps on."""
        return min(1.0, step / (0.8 * self.steps))

    def batch(self, step: int) -> int:
        """Number of particles of a step."""
        return int(self.first_batch + (self.last_batch - self.first_batch) * self.ramp(step))

    def rings(self, step: int, length_angstrom: float) -> int:
        """Highest ring used in a step."""
        first, last = (length_angstrom / r for r in (self.first_resolution_angstrom, self.last_resolution_angstrom))
        return max(4, round(first + (last - first) * self.ramp(step)))

    def inverse_temperature(self, step: int) -> float:
        """Factor of the log-likelihood, 1 from 40 % of the steps on."""
        return 1.0 / (1.0 + (self.first_temperature - 1.0) * max(0.0, 1.0 - 2.0 * self.ramp(step)))


def working_box(length_angstrom: float, resolution_angstrom: float, box: int) -> int:
    """Even box to which images are cropped for a chain."""
    return min(box, max(32, 2 * (math.ceil(length_angstrom / resolution_angstrom) + 6)))


def run_chain(
    data: expectation.Particles, *, pixel_size_angstrom: float, symmetry: str, mask_diameter_angstrom: float, shift_range_angstrom: float,
    schedule: Schedule, seed: int, device: str = "cpu",
) -> tuple[Tensor, float, list[float]]:  # fmt: skip
    """One restart.

    Parameters
    ----------
    data : Particles
        Of the working box; ``pixel_size_angstrom`` is that of this box.

    Returns
    -------
    volume : Tensor, `(z, y, x)`, float32
        At the working box.
    score : float
        Mean log-likelihood gain per particle in the last steps, for comparing chains of the same particles.
    trace : list of float
        The same for every step.
    """
    box = data.box
    length = box * pixel_size_angstrom
    count = len(data.index)
    operators = symmetry_operators(symmetry)
    generator = torch.Generator().manual_seed(seed)
    limit = min(data.radius, schedule.rings(schedule.steps, length) + 1)
    sphere = soft_sphere(box, pixel_size_angstrom, mask_diameter_angstrom / 2, 15.0, device=device)
    noise = _mean_power(data)
    side = 2 * pj.grid_half(limit) + 1
    numerator = torch.zeros(side, side, side, dtype=torch.complex64, device=device)
    weight = torch.zeros(side, side, side, device=device)
    volume = torch.zeros(box, box, box, device=device)
    trace: list[float] = []
    order_of_use, used = torch.randperm(count, generator=generator), 0
    for step in range(schedule.steps):
        batch = min(schedule.batch(step), count)
        if used + batch > count:
            order_of_use, used = torch.randperm(count, generator=generator), 0
        rows = order_of_use[used : used + batch].to(device)
        used += batch
        rings = min(limit - 1, schedule.rings(step, length))
        if step == 0:
            found, fourier = [(rows, _random_poses(len(rows), generator, device))], None
        else:
            fourier = pj.fourier_volume(volume, rings + 1)
            found = _draw(
                data, rows, fourier, rings, noise, operators, generator,
                inverse_temperature=schedule.inverse_temperature(step),
                mask_diameter_px=mask_diameter_angstrom / pixel_size_angstrom,
                shift_range_px=shift_range_angstrom / pixel_size_angstrom,
            )  # fmt: skip
            trace.append(float(torch.cat([poses.log_likelihood for _, poses in found]).mean()))
        accumulator = pj.empty_accumulator(limit, device)
        plane = pj.half_plane(rings + 1, device)
        residual = torch.zeros(data.radius + 1, dtype=torch.float64, device=device)
        for lot, poses in found:
            parts = expectation.weighted_slices(data, lot, poses, rings + 1, noise)
            pj.insert_slices(accumulator, parts[0], plane.ky, plane.kx, parts[1], parts[2])
            if fourier is not None and step > 2:
                residual += expectation.residual_power(data, lot, poses, fourier, rings)
        if fourier is not None and step > 2:
            fresh = (residual / batch / _plane_counts(data.radius, device)).float()
            noise[1 : rings + 1] += NOISE_RATE * (fresh - noise)[1 : rings + 1]
            noise[0] = noise[1]
        fresh_numerator, fresh_weight = pj.unfold_accumulator(pj.fold_accumulator(accumulator), operators)
        window = max(4.0, min(0.75 * count / batch, schedule.window_growth * step))
        rate = 1.0 / min(step + 1.0, window)
        numerator += rate * (fresh_numerator - numerator)
        weight += rate * (fresh_weight - weight)
        ssnr = _own_ssnr(numerator, weight, limit) * window
        volume = pj.reconstruct(numerator, weight, rings + 1, box, image_box=box, ssnr=ssnr.clamp(max=100.0)) * sphere
        if 0.1 * schedule.steps < step < 0.9 * schedule.steps:
            volume = volume.clamp(min=-CLIP * float(volume.std()))
    last = trace[-LAST_STEPS:]
    return volume, sum(last) / len(last), trace


def _plane_counts(radius: int, device: str) -> Tensor:
    shells = pj.half_plane(radius, device).shell.clamp(max=radius)
    return torch.bincount(shells, minlength=radius + 1).clamp(min=1)


def _mean_power(data: expectation.Particles) -> Tensor:
    """Mean power of the images per shell `(radius + 1,)`: the first guess of the noise, including signal, for a soft start."""
    device = str(data.shell_power.device)
    out = (data.shell_power.double().mean(0) / _plane_counts(data.radius, device)).float()
    out[0] = out[1]
    return out


def _random_poses(count: int, generator: torch.Generator, device: str) -> expectation.Poses:
    rotations = random_rotations(count * DRAWS, generator).reshape(count, DRAWS, 3, 3).to(device)
    weights = torch.full((count, DRAWS), 1.0 / DRAWS, device=device)
    zero = torch.zeros(count, 2, device=device)
    return expectation.Poses(rotations, weights, weights[..., None], zero, zero[:1], zero, zero, zero[:, 0])


def _draw(
    data: expectation.Particles, rows: Tensor, fourier: pj.FourierVolume, rings: int, noise: Tensor, operators: np.ndarray,
    generator: torch.Generator, *, inverse_temperature: float, mask_diameter_px: float, shift_range_px: float,
) -> list[tuple[Tensor, expectation.Poses]]:  # fmt: skip
    """Sample poses of a batch from the tempered posterior; returns chunks of rows with their poses."""
    device = str(noise.device)
    # order 2 (14.7 degrees) suffices while the arc at the particle's rim stays below half a resolution element
    order = 2 if data.box / rings >= 0.45 * healpix_step_rad(2) * mask_diameter_px else 3
    pixels = asymmetric_unit(order, operators)
    level = expectation.Level(order, rings, data.box / rings / 3.0, shift_range_px, 0)
    turn = random_rotations(1, generator)[0]
    bank = expectation.make_bank(fourier, level, pixels, turn, data.grid, device)
    offsets = expectation.shift_grid(level.step_px, level.reach_px, device)
    uniforms = torch.rand(len(rows), DRAWS, generator=generator, dtype=torch.float64).to(device)
    table = expectation.whole_table(bank)
    found = []
    for lot in expectation.chunks(len(rows), bank, len(offsets), device):
        centres = torch.zeros(len(lot), 2, device=device)
        poses = expectation.sample_poses(
            data, rows[lot], centres, offsets, bank, table, noise, shift_range_px, uniforms[lot], inverse_temperature
        )
        found.append((rows[lot], poses))
    return found


def _own_ssnr(numerator: Tensor, weight: Tensor, limit: int) -> Tensor:
    """Mean weight x prior variance per shell `(limit + 1,)`, with the prior from the map's own power."""
    shells = pj.grid_shells(weight.shape[0], weight.device).clamp(max=limit + 1).reshape(-1)
    counts = torch.bincount(shells, minlength=limit + 2).clamp(min=1)
    mean = torch.bincount(shells, weight.reshape(-1).double(), limit + 2) / counts
    filled = (numerator / (weight + 0.1 * mean[shells].float().reshape(weight.shape) + 1e-20)).abs().square()
    power = torch.bincount(shells, filled.reshape(-1).double(), limit + 2) / counts
    return (mean * PRIOR_FACTOR * power)[: limit + 1]
