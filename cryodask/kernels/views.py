"""Posteriors over all views, in-plane angles and shifts of a coarse grid: poses drawn from them, or the likeliest ones as start poses.

Most of the sphere is ruled out by a coarser grid: the likeliest :data:`KEPT_PARENTS` of its 192 views open their children, and only these
are scored at full resolution. That loses 0.007 nats of a particle's log evidence and takes 41 % of the time. The same grid rules out
shifts: :data:`KEPT_SHIFTS` are scored, those nearest to its likeliest ones. Of 145 that loses 0.0004 nats and takes 55 %.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cryodask.kernels import expectation as ex
from cryodask.kernels import polar
from cryodask.kernels.fourier import resize_map
from cryodask.kernels.local_search import Candidates
from cryodask.kernels.orientations import asymmetric_unit
from cryodask.kernels.polar import PolarGrid
from cryodask.kernels.projection import fourier_volume

ORDER = 3
"""HEALPix order of the views (7.3 degrees); below :data:`COARSE_RINGS` one less suffices."""
COARSE_RINGS = 8
PARENT_RINGS = 9
KEPT_PARENTS = 48
KEPT_SHIFTS = 60
SCALE_ROUNDS, SCALE_PARTICLES = 4, 240
"""Rounds of EM, and particles, that determine the grey scale of a starting map."""
START_NATS = 40.0
"""A view of the coarse grid this much below the best cannot be the right one, even if it lies badly to the pose."""
_TOGETHER_ON_GPU = 16
"""Particles whose children are scored together on a GPU; on a CPU one at a time, so that its table and scores stay in the cache."""
_MARGIN = 8


@dataclass(frozen=True)
class Views:
    """Reference views of one map: all of ``bank``, or the children of the likeliest ``parents``."""

    bank: ex.Bank
    offsets: Tensor
    parents: ex.Bank | None
    parent_offsets: Tensor
    parent_pixels: Tensor


def shift_step_px(rings: int, box: int) -> float:
    """Step of the shifts of views up to ``rings``, pixels: a third of a resolution element."""
    return box / rings / 3.2


def make_views(
    volume: Tensor, rings: int, *, grid: PolarGrid, turn: Tensor, operators: np.ndarray, reach_px: float, pruned: bool = True,
    order: int | None = None,
) -> Views:  # fmt: skip
    """Views of a map `(z, y, x)` up to ``rings``, the grid turned by ``turn`` `(3, 3)`; shifts up to ``reach_px``, a third of a
    resolution element apart. ``grid`` is that of the particles; ``order`` of the views is 2 or 3, by default what the rings need.
    """
    device, box = str(volume.device), grid.box
    small = min(volume.shape[-1], 2 * (rings + _MARGIN))
    reference = fourier_volume(resize_map(volume, small), rings + 1, box)

    def bank(order: int, highest: int, pixels: np.ndarray) -> tuple[ex.Bank, Tensor]:
        level = ex.Level(order, highest, shift_step_px(highest, box), reach_px)
        return ex.make_bank(reference, level, pixels, turn, grid, device), ex.shift_grid(level.step_px, reach_px, device)

    order = order or (ORDER - 1 if rings <= COARSE_RINGS else ORDER)
    unit, coarser = asymmetric_unit(order, operators), asymmetric_unit(ORDER - 1, operators)
    pruned = pruned and order == ORDER
    if pruned and len(coarser) > KEPT_PARENTS:
        # along its border the asymmetric unit of the finer grid is not made of children
        unit = (coarser[:, None] * 4 + np.arange(4)).reshape(-1)
    own, offsets = bank(order, rings, unit)
    parents, parent_offsets = None, offsets
    if pruned and (len(offsets) > KEPT_SHIFTS or len(coarser) > KEPT_PARENTS):
        parents, parent_offsets = bank(ORDER - 1, min(rings, PARENT_RINGS), coarser)
    return Views(own, offsets, parents, parent_offsets, torch.from_numpy(coarser).to(device))


def _posteriors(
    data: ex.Particles, rows: Tensor, views: Views, noise_power: Tensor, sigma_px: float, centres_px: Tensor | None,
    inverse_temperature: float = 1.0,
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:  # fmt: skip
    """Places in ``rows``, log posteriors `(n, psi, shift, view)`, rows of the views in the bank `(n, view)` and shifts `(n, shift, 2)`."""
    bank, device = views.bank, str(rows.device)
    if not len(rows):
        return
    about = torch.zeros(len(rows), 2, device=device) if centres_px is None else centres_px

    def score(lot: Tensor, table: Tensor, bank: ex.Bank, offsets: Tensor, phases: Tensor) -> Tensor:
        prior = ex.shift_log_prior(about[lot], offsets, sigma_px)
        centres = None if centres_px is None else centres_px[lot]
        return ex.log_likelihoods(data, rows[lot], centres, phases, table, bank.level.rings, noise_power, prior, inverse_temperature)

    everything = torch.arange(len(bank.rotations), device=device)
    if views.parents is None:
        table = ex.whole_table(bank)
        for lot in ex.chunks(len(rows), bank, len(views.offsets), device):
            shifts = about[lot, None] + views.offsets
            yield lot, score(lot, table, bank, views.offsets, bank.phases), everything.expand(len(lot), -1), shifts
        return
    table = ex.whole_table(views.parents)
    prunes = len(views.parents.rotations) > KEPT_PARENTS
    whole = None if prunes else ex.whole_table(bank)
    nearest = torch.cdist(views.offsets, views.parent_offsets).argmin(1)
    kept = min(KEPT_SHIFTS, len(nearest))
    together = (1 if device == "cpu" else _TOGETHER_ON_GPU) if prunes else len(ex.chunks(len(rows), bank, kept, device)[0])
    for lot in ex.chunks(len(rows), views.parents, len(views.parent_offsets), device):
        coarse = score(lot, table, views.parents, views.parent_offsets, views.parents.phases).amax(1)
        likely = coarse.amax(2)[:, nearest].topk(kept, 1).indices.sort(1).values
        children = everything.expand(len(lot), -1)
        if prunes:
            parents = views.parent_pixels[coarse.amax(1).topk(KEPT_PARENTS, 1).indices]
            children = bank.place[(parents[:, :, None] * 4 + torch.arange(4, device=device)).reshape(len(lot), -1)]
        for some in torch.arange(len(lot), device=device).split(together):
            own = whole if whole is not None else bank.table[children[some]].permute(0, 2, 3, 1)
            offsets, phases = views.offsets, bank.phases
            if kept < len(nearest):
                offsets, phases = offsets[likely[some]], phases[likely[some]]
            yield lot[some], score(lot[some], own, bank, offsets, phases), children[some], about[lot[some], None] + offsets


def draw(
    data: ex.Particles, rows: Tensor, views: Views, noise_power: Tensor, sigma_px: float, uniforms: Tensor,
    inverse_temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Poses drawn from the posterior: rotations `(n, draw, 3, 3)`, shifts `(n, draw, 2)` in pixels, log evidence `(n,)`.

    ``uniforms`` `(n, draw)` in [0, 1); ``inverse_temperature`` multiplies the log-likelihood (below 1: flatter). There is no selection,
    hence no bias towards the map.
    """
    n, draws = uniforms.shape
    rotations = torch.empty(n, draws, 3, 3, device=rows.device)
    shifts = torch.empty(n, draws, 2, device=rows.device)
    evidence = torch.empty(n, device=rows.device)
    for lot, scores, places, moves in _posteriors(data, rows, views, noise_power, sigma_px, None, inverse_temperature):
        shift, view, angle, evidence[lot] = ex.draw_poses(scores, uniforms[lot])
        rotations[lot] = ex.psi_rotation(angle, scores.shape[1]) @ views.bank.rotations[places.gather(1, view)]
        shifts[lot] = moves.gather(1, shift[..., None].expand(-1, -1, 2))
    return rotations, shifts, evidence


def evidence(data: ex.Particles, rows: Tensor, views: Views, noise_power: Tensor, sigma_px: float) -> Tensor:
    """Log evidence of particles `(n,)`: the posterior summed over the whole grid."""
    out = torch.empty(len(rows), device=rows.device)
    for lot, scores, _, _ in _posteriors(data, rows, views, noise_power, sigma_px, None):
        top = scores.amax((1, 2, 3))
        out[lot] = top + ex.likelihoods(scores, top[:, None, None, None]).sum((1, 2, 3), dtype=torch.float64).log().float()
    return out


def start_poses(
    data: ex.Particles, rows: Tensor, views: Views, noise_power: Tensor, sigma_px: float, keep: int, centres_px: Tensor | None = None
) -> Candidates:
    """The ``keep`` likeliest views of each particle within :data:`START_NATS`, with the best in-plane angle and shift of each.

    Shifts are searched about ``centres_px`` `(n, 2)`, by default zero.
    """
    if not len(rows):
        nothing = torch.zeros(0, keep, 3, 3, device=rows.device)
        return Candidates(nothing, nothing[..., 0, :2], torch.zeros(0, dtype=torch.int64, device=rows.device))
    rotations, shifts, counts = [], [], []
    keep = min(keep, len(views.bank.rotations))
    for _, scores, places, moves in _posteriors(data, rows, views, noise_power, sigma_px, centres_px):
        best, angles = scores.amax(2).max(1)
        score, top = best.topk(keep, 1)
        counts.append((score >= score[:, :1] - START_NATS).sum(1))
        angle = angles.gather(1, top)
        each = torch.arange(len(top), device=top.device)[:, None]
        shift = scores[each, angle, :, top].argmax(2)
        rotations.append(ex.psi_rotation(angle, scores.shape[1]) @ views.bank.rotations[places.gather(1, top)])
        shifts.append(moves.gather(1, shift[..., None].expand(-1, -1, 2)))
    return Candidates(torch.cat(rotations), torch.cat(shifts), torch.cat(counts))


def scale_terms(
    data: ex.Particles, rows: Tensor, views: Views, noise_power: Tensor, sigma_px: float, scale: float | None
) -> tuple[float, float, Tensor]:
    """Expected cross and norm terms of some particles: half their ratio is the grey scale of the map (one step of EM).

    ``scale`` is the last estimate; None: unknown, then its best value is profiled out of every score. Third: by how much log evidence
    falls if the map is inverted, `(n,)`; empty once the scale is known.
    """
    bank, device = views.bank, str(rows.device)
    rings = bank.level.rings
    table, angles = ex.whole_table(bank), ex.psi_count(rings)
    cross_sum, norm_sum = 0.0, 0.0
    inverted = []
    for lot in ex.chunks(len(rows), bank, len(views.offsets), device) if len(rows) else ():
        cross, norm = ex.cross_products(data, rows[lot], None, bank.phases, table, rings, noise_power)
        cross, norm = (polar.angle_scores(products, polar.mode_limit(rings), angles) for products in (cross, norm))
        prior = ex.shift_log_prior(torch.zeros(len(lot), 2, device=device), views.offsets, sigma_px)[:, None, :, None]
        if scale is None:
            gain, other = (prior + (sign * cross).clamp(min=0.0) ** 2 / (4.0 * norm.clamp(min=1e-9)) for sign in (1.0, -1.0))
            inverted.append(gain.flatten(1).logsumexp(1) - other.flatten(1).logsumexp(1))
        else:
            gain = prior + scale * cross - scale**2 * norm
        flat = gain.reshape(len(lot), -1)
        weight = ex.likelihoods(flat, flat.amax(1, keepdim=True)).reshape(gain.shape)
        weight /= weight.sum((1, 2, 3), keepdim=True)
        cross_sum += float((weight * cross).sum())
        norm_sum += float((weight * norm).sum())
    return cross_sum, norm_sum, torch.cat(inverted) if inverted else torch.zeros(0, device=device)
