"""From a chain's map at 28 Angstrom to 14: stochastic expectation maximisation with a short memory, on one map of all particles.

At 28 Angstrom the pseudo-symmetry mates of a molecule, and often its mirror image, look alike. A chain's map averages them, and so would
two half-maps started from it, in agreement. At 14 Angstrom they differ. With poses drawn from the posterior, and a map that remembers no
more than 900 particles, chance favours one of the mates, and the map then favours it too: the tie breaks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cryodask.kernels import views as vw
from cryodask.kernels.expectation import Particles
from cryodask.kernels.fourier import resize_map, soft_sphere
from cryodask.kernels.half_grid import empty_half_grid, fold_half_grid, half_volume, reconstruct_half
from cryodask.kernels.local_search import insert, residual_power
from cryodask.kernels.maximisation import HalfMaps
from cryodask.kernels.orientations import random_rotations, small_rotation
from cryodask.kernels.projection import cut_map
from cryodask.kernels.rows import ImageRows, shell_counts, shell_power

BATCH = 300
MEMORY = 3.0
"""Batches that the map remembers."""
DRAWS = 2
NOISE_RATE = 0.3
HOLD = 22
"""Steps at the last resolution. Ending where the likelihood stands still instead left 17 % of the poses at a mate (nucleosome)."""
MOST_STEPS, MOST_STEPS_OF_LARGE_GROUPS = 250, 60
"""A tie may take 110 steps to break (a ribozyme); with symmetry there is hardly one, but rings and shells may never reach the end: the
refinement that follows does (C7, O)."""
LARGE_GROUP = 4
BEYOND = 6
"""Shells inserted beyond the last ring."""
SHIFT_RANGE_ANGSTROM = 12.0


@dataclass(frozen=True)
class Ties:
    """Course of the phase: resolution at which it begins and ends, Angstrom."""

    first_resolution_angstrom: float = 28.0
    last_resolution_angstrom: float = 14.16

    def rings(self, length_angstrom: float) -> tuple[int, int]:
        """First and last ring."""
        first = max(2, int(length_angstrom / self.first_resolution_angstrom))
        return first, max(first, round(length_angstrom / self.last_resolution_angstrom))

    def working_box(self, length_angstrom: float, box: int) -> int:
        """Even box to which images are cropped."""
        return min(box, 2 * (self.rings(length_angstrom)[1] + BEYOND + 2))


def break_ties(
    data: Particles, images: ImageRows, start: Tensor, *, pixel_size_angstrom: float, operators: np.ndarray,
    mask_diameter_angstrom: float, ties: Ties, seed: int, tell: Callable[[int, int, float], None] = lambda step, rings, likelihood: None,
) -> tuple[Tensor, list[float]]:  # fmt: skip
    """A map `(z, y, x)` at the last resolution, at the box of the particles, and the mean log-likelihood of each step.

    Parameters
    ----------
    data, images : Particles, ImageRows
        The same particles, of the working box; ``pixel_size_angstrom`` is that of this box.
    start : Tensor, `(z, y, x)`
        Map of a chain, any box that spans the same length, on any grey scale.
    tell : callable ``(step, rings, mean log-likelihood)``
        Called after every step.

    Notes
    -----
    The mean log-likelihood is nearly held out: most particles of a batch are not in memory. The FSC of odd and even rows of the batches,
    which see the same map, paces the rings and weights the map; it is not a resolution.
    """
    box, device = data.box, str(images.values.device)
    length, count = box * pixel_size_angstrom, len(data.index)
    first, last = ties.rings(length)
    inserted = min(images.radius, last + BEYOND)
    last = min(last, inserted - 1)
    generator = torch.Generator().manual_seed(seed)
    sphere = soft_sphere(box, pixel_size_angstrom, mask_diameter_angstrom / 2, 12.0, device=device)
    seen = soft_sphere(box, pixel_size_angstrom, 0.95 * mask_diameter_angstrom / 2, 10.0, device=device)
    counts = shell_counts(images.radius, device)
    noise = (shell_power(images, images.radius) / count / counts).float()
    noise[0] = noise[1]
    reach = SHIFT_RANGE_ANGSTROM / pixel_size_angstrom
    sigma = reach / 2.0

    def views(volume: Tensor, rings: int, pruned: bool) -> vw.Views:
        turn = random_rotations(1, generator)[0] if len(operators) == 1 else small_rotation(0.1, generator)
        return vw.make_views(volume, rings, grid=data.grid, turn=turn.to(device), operators=operators, reach_px=reach, pruned=pruned)

    volume = cut_map(resize_map(start.to(device), box) * sphere, first)
    scale = None
    some = torch.arange(0, count, max(1, count // vw.SCALE_PARTICLES), device=device)
    of_start = views(volume, first, False)
    for _ in range(vw.SCALE_ROUNDS):
        cross, norm, _ = vw.scale_terms(data, some, of_start, noise, sigma, scale)
        scale = max(cross, 1e-12) / (2.0 * max(norm, 1e-30))
    volume = volume * (scale or 1.0)

    rings, held, trace = first, 0, []
    memory: list[Tensor] = []
    order_of_use = torch.zeros(0, dtype=torch.int64)
    most = MOST_STEPS if len(operators) < LARGE_GROUP else MOST_STEPS_OF_LARGE_GROUPS
    batch = min(BATCH, count)
    for step in range(most):
        while len(order_of_use) < batch:
            order_of_use = torch.cat([order_of_use, torch.randperm(count, generator=generator)])
        rows, order_of_use = order_of_use[:batch].to(device), order_of_use[batch:]
        uniforms = torch.rand(batch, DRAWS, generator=generator, dtype=torch.float64).to(device)
        rotations, shifts, evidence = vw.draw(data, rows, views(volume, rings, True), noise, sigma, uniforms)
        reference = half_volume(volume, rings + 1, box)
        power = residual_power(images, rows, reference, rotations[:, 0], shifts[:, 0], rings, inserted).sum(0)
        rate = 1.0 / min(MEMORY, 1.0 + 0.5 * step)
        share = torch.full((batch, DRAWS), 1.0 / DRAWS, device=device)
        for parity in (0, 1):
            own = slice(parity, None, 2)
            fresh = empty_half_grid(inserted, device)
            insert(images, rows[own], fresh, inserted, noise, rotations[own], shifts[own], share[own])
            fresh = fold_half_grid(fresh, operators)
            if step == 0:
                memory.append(fresh)
            else:
                memory[parity] += (fresh - memory[parity]) * rate
        known = slice(1, inserted + 1)
        noise[known] += NOISE_RATE * ((power / batch / counts[: inserted + 1]).float()[known] - noise[known])
        noise[0] = noise[1]
        odd, even = (reconstruct_half(grid, inserted, box, image_box=box) for grid in memory)
        halves = HalfMaps.of(odd, even, inserted=inserted, common=1, generator=torch.Generator().manual_seed(seed))
        support = halves.support(seen, len(operators))
        rings = max(first, min(support.last, last, rings + 1))
        trusted = support.corrected.clamp(1e-4, 0.999)
        trusted[rings + 1 :] = 1e-4
        joint = reconstruct_half(memory[0] + memory[1], inserted, box, image_box=box, ssnr=2.0 * trusted / (1.0 - trusted))
        volume = cut_map(joint * sphere, rings)
        moved = float(shifts[:, 0].std())
        sigma = max(2.0 / pixel_size_angstrom, 0.9 * sigma + 0.1 * moved)
        reach = min(SHIFT_RANGE_ANGSTROM / pixel_size_angstrom, 2.5 * sigma)
        trace.append(float(evidence.mean()))
        tell(step, rings, trace[-1])
        held += rings >= last
        if held >= HOLD:
            break
    return volume, trace
