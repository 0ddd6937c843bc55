"""Several initial maps at once, without a reference: the chain of :mod:`cryodask.kernels.ab_initio` with one map per class.

Left to itself, the first class with a good map raises the likelihood of every particle and attracts all of them. For most of the chain,
every class is therefore given the same total weight (a Sinkhorn bias per batch); only then may shares differ. Particles that belong to
no molecule (junk) need classes of their own: ask for one or two more than there are molecules.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cryodask.kernels import ab_initio as ab
from cryodask.kernels.expectation import Particles
from cryodask.kernels.fourier import soft_sphere
from cryodask.kernels.half_grid import empty_half_grid, fold_half_grid, half_volume, own_ssnr, reconstruct_half
from cryodask.kernels.local_search import insert, residual_power
from cryodask.kernels.orientations import healpix_step_rad, random_rotations
from cryodask.kernels.rows import ImageRows, shell_counts, shell_power
from cryodask.kernels.symmetry import symmetry_operators
from cryodask.kernels.views import Views, draw, evidence, make_views

SCHEDULE = ab.Schedule(steps=60, first_batch=150, last_batch=300)
FIRST_TEMPERATURE = 8.0
"""Initial temperature of the posterior over classes: classes stay alike until their maps differ."""
BALANCED = 0.7
"""Share of the steps in which all classes get the same total."""
LEAST_SHARE = 0.05
"""Smallest prior share of a class."""
_LEAST_WEIGHT = 0.02
_ROUNDS = 30


@dataclass(frozen=True)
class Classes:
    """Maps `(class, z, y, x)` at the working box, log evidence of all particles `(n, class)` with the log of the shares, and the score:
    mean log evidence of a particle. ``shares`` `(step, class)`: mean posterior of the classes in each step.
    """

    volumes: Tensor
    evidence: Tensor
    score: float
    shares: Tensor


def balanced(logits: Tensor, rounds: int = _ROUNDS) -> Tensor:
    """Posterior over classes `(n, class)` with equal totals: each class has a bias, found by Sinkhorn's iteration."""
    bias = torch.zeros(logits.shape[1], dtype=logits.dtype, device=logits.device)
    for _ in range(rounds):
        mean = torch.softmax(logits + bias, 1).mean(0)
        bias = bias - torch.log(mean.clamp(min=1e-6) * logits.shape[1])
    return torch.softmax(logits + bias, 1)


def run_class_chain(
    data: Particles, images: ImageRows, classes: int, *, pixel_size_angstrom: float, symmetry: str, mask_diameter_angstrom: float,
    shift_range_angstrom: float, schedule: ab.Schedule, seed: int,
) -> Classes:  # fmt: skip
    """One restart with ``classes`` maps; arguments as of :func:`cryodask.kernels.ab_initio.run_chain`."""
    box, device = data.box, str(images.values.device)
    length, count = box * pixel_size_angstrom, len(data.index)
    operators = symmetry_operators(symmetry)
    generator = torch.Generator().manual_seed(seed)
    limit = min(images.radius, schedule.rings(schedule.steps, length) + 1)
    sphere = soft_sphere(box, pixel_size_angstrom, mask_diameter_angstrom / 2, 15.0, device=device)
    counts = shell_counts(images.radius, device)
    noise = (shell_power(images, images.radius) / count / counts).float()
    noise[0] = noise[1]
    shift_range = shift_range_angstrom / pixel_size_angstrom
    memory = torch.stack([empty_half_grid(limit, device) for _ in range(classes)])
    volumes = torch.zeros(classes, box, box, box, device=device)
    shares = torch.full((classes,), 1.0 / classes, device=device)
    course: list[Tensor] = []

    def views_of(volume: Tensor, rings: int) -> Views:
        order = 2 if length / rings >= 0.45 * healpix_step_rad(2) * mask_diameter_angstrom else 3
        turn = random_rotations(1, generator)[0]
        return make_views(volume, rings, order=order, grid=data.grid, turn=turn, operators=operators, reach_px=shift_range, pruned=False)

    order_of_use, used = torch.randperm(count, generator=generator), 0
    for step in range(schedule.steps):
        batch = min(schedule.batch(step), count)
        if used + batch > count:
            order_of_use, used = torch.randperm(count, generator=generator), 0
        rows = order_of_use[used : used + batch].to(device)
        used += batch
        rings = min(limit - 1, schedule.rings(step, length))
        if step == 0:
            labels = torch.randint(0, classes, (batch,), generator=generator).to(device)
            posterior = torch.nn.functional.one_hot(labels, classes).float()
            poses = [
                (random_rotations(batch * ab.DRAWS, generator).reshape(batch, ab.DRAWS, 3, 3).to(device), torch.zeros(batch, ab.DRAWS, 2))
                for _ in range(classes)
            ]
        else:
            poses, gains = [], []
            for volume in volumes:
                uniforms = torch.rand(batch, ab.DRAWS, generator=generator, dtype=torch.float64).to(device)
                warmth = schedule.inverse_temperature(step)
                rotations, shifts, gain = draw(data, rows, views_of(volume, rings), noise, shift_range, uniforms, warmth)
                poses.append((rotations, shifts))
                gains.append(gain)
            temperature = 1.0 + (FIRST_TEMPERATURE - 1.0) * max(0.0, 1.0 - 2.0 * schedule.ramp(step))
            logits = torch.stack(gains, 1) / temperature
            if step < BALANCED * schedule.steps:
                posterior = balanced(logits)
            else:
                posterior = torch.softmax(logits + shares.log(), 1)
                shares = (0.9 * shares + 0.1 * posterior.mean(0)).clamp(min=LEAST_SHARE)
                shares = shares / shares.sum()
        course.append(posterior.mean(0).cpu())
        window = max(4.0, min(0.75 * count / batch, schedule.window_growth * step))
        best, power = posterior.argmax(1), torch.zeros(images.radius + 1, dtype=torch.float64, device=device)
        for k, (rotations, shifts) in enumerate(poses):
            fresh = empty_half_grid(limit, device)
            weight = (posterior[:, k : k + 1] / ab.DRAWS).expand(-1, ab.DRAWS).contiguous()
            insert(images, rows, fresh, rings + 1, noise, rotations, shifts.to(device), weight, least=_LEAST_WEIGHT / ab.DRAWS)
            mine = torch.nonzero(best == k)[:, 0]
            if step > 2 and len(mine):
                reference = half_volume(volumes[k], rings + 1, box)
                power += residual_power(images, rows[mine], reference, rotations[mine, 0], shifts[mine, 0], rings, images.radius).sum(0)
            memory[k] += (fold_half_grid(fresh, operators) - memory[k]) * (1.0 / min(step + 1.0, window))
            ssnr = own_ssnr(memory[k], limit) * ab.PRIOR_FACTOR * window
            volume = reconstruct_half(memory[k], rings + 1, box, image_box=box, ssnr=ssnr.clamp(max=100.0)) * sphere
            if 0.1 * schedule.steps < step < 0.9 * schedule.steps:
                volume = volume.clamp(min=-ab.CLIP * float(volume.std()))
            volumes[k] = volume
        if step > 2:
            update = (power / batch / counts).float()
            noise[1 : rings + 1] += ab.NOISE_RATE * (update - noise)[1 : rings + 1]
            noise[0] = noise[1]
    rings = min(limit - 1, schedule.rings(schedule.steps, length))
    every = torch.arange(count, device=device)
    found = torch.stack([evidence(data, every, views_of(volume, rings), noise, shift_range) for volume in volumes], 1) + shares.log()
    return Classes(volumes, found, float(torch.logsumexp(found.double(), 1).mean()), torch.stack(course))
