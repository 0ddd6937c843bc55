"""An initial map without a reference: online expectation maximisation with sampled poses (one chain of a tournament).

Every step takes a small batch of particles, samples a few poses of each from its whole posterior against the current map, and lets the
accumulators forget the past exponentially: there is no gradient and no step length. The sampling noise anneals by itself as the map
gains contrast. The point group is imposed from the first step. The handedness of the map is undetermined: mirror images explain
projections equally well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cryodask.kernels import expectation
from cryodask.kernels.fourier import soft_sphere
from cryodask.kernels.half_grid import empty_half_grid, fold_half_grid, half_volume, own_ssnr, reconstruct_half
from cryodask.kernels.local_search import insert, residual_power
from cryodask.kernels.orientations import healpix_step_rad, random_rotations
from cryodask.kernels.rows import ImageRows, shell_counts, shell_power
from cryodask.kernels.symmetry import symmetry_operators
from cryodask.kernels.views import draw, make_views

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
    data: expectation.Particles, images: ImageRows, *, pixel_size_angstrom: float, symmetry: str, mask_diameter_angstrom: float,
    shift_range_angstrom: float, schedule: Schedule, seed: int,
) -> tuple[Tensor, float, list[float]]:  # fmt: skip
    """One restart.

    Parameters
    ----------
    data, images : Particles, ImageRows
        The same particles, of the working box; ``pixel_size_angstrom`` is that of this box.

    Returns
    -------
    volume : Tensor, `(z, y, x)`, float32
        At the working box.
    score : float
        Mean log-likelihood gain per particle in the last steps, for comparing chains of the same particles.
    trace : list of float
        The same for every step.
    """
    box, device = data.box, str(images.values.device)
    length = box * pixel_size_angstrom
    count = len(data.index)
    operators = symmetry_operators(symmetry)
    generator = torch.Generator().manual_seed(seed)
    limit = min(images.radius, schedule.rings(schedule.steps, length) + 1)
    sphere = soft_sphere(box, pixel_size_angstrom, mask_diameter_angstrom / 2, 15.0, device=device)
    counts = shell_counts(images.radius, device)
    noise = (shell_power(images, images.radius) / count / counts).float()
    noise[0] = noise[1]
    shift_range = shift_range_angstrom / pixel_size_angstrom
    memory = empty_half_grid(limit, device)
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
            rotations = random_rotations(batch * DRAWS, generator).reshape(batch, DRAWS, 3, 3).to(device)
            shifts = torch.zeros(batch, DRAWS, 2, device=device)
        else:
            # order 2 (14.7 degrees) suffices while the arc at the particle's rim stays below half a resolution element
            order = 2 if length / rings >= 0.45 * healpix_step_rad(2) * mask_diameter_angstrom else 3
            turn = random_rotations(1, generator)[0]
            seen = make_views(
                volume, rings, order=order, grid=data.grid, turn=turn, operators=operators, reach_px=shift_range, pruned=False
            )
            uniforms = torch.rand(batch, DRAWS, generator=generator, dtype=torch.float64).to(device)
            rotations, shifts, evidence = draw(data, rows, seen, noise, shift_range, uniforms, schedule.inverse_temperature(step))
            trace.append(float(evidence.mean()))
        fresh = empty_half_grid(limit, device)
        insert(images, rows, fresh, rings + 1, noise, rotations, shifts, torch.full((batch, DRAWS), 1.0 / DRAWS, device=device))
        if step > 2:
            reference = half_volume(volume, rings + 1, box)
            power = residual_power(images, rows, reference, rotations[:, 0], shifts[:, 0], rings, images.radius).sum(0)
            update = (power / batch / counts).float()
            noise[1 : rings + 1] += NOISE_RATE * (update - noise)[1 : rings + 1]
            noise[0] = noise[1]
        window = max(4.0, min(0.75 * count / batch, schedule.window_growth * step))
        memory += (fold_half_grid(fresh, operators) - memory) * (1.0 / min(step + 1.0, window))
        ssnr = own_ssnr(memory, limit) * PRIOR_FACTOR * window
        volume = reconstruct_half(memory, rings + 1, box, image_box=box, ssnr=ssnr.clamp(max=100.0)) * sphere
        if 0.1 * schedule.steps < step < 0.9 * schedule.steps:
            volume = volume.clamp(min=-CLIP * float(volume.std()))
    last = trace[-LAST_STEPS:]
    return volume, sum(last) / len(last), trace
