"""Parts of the refinement: search levels, noise power, grey scale, spread of shifts, final maps.

All take and return the plain state that the runner transfers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cryodask.kernels import expectation, polar
from cryodask.kernels import projection as pj
from cryodask.kernels.maximisation import Support, crossing
from cryodask.kernels.orientations import healpix_step_rad
from cryodask.stage import Metrics, State, Sums

COARSE_ORDER = 3
FINEST_ORDER = 5
GRID_JITTER_RAD = 0.04
SCALE_ROUNDS = 4
SCALE_PARTICLES = 240
DRAWS = 6
KEPT_POSES = 4
POSE_THRESHOLD = 0.03
INSERT_BEYOND_ANGSTROM = 28.0
"""Slices are inserted this many cycles per box beyond the scored rings: box length / 28 A, at least 8."""
PARTICLE_SHARE = 0.9
"""Fraction of its mask that a particle is assumed to fill when angular steps are converted into resolution."""
POSE_COLUMNS = ("rot_deg", "tilt_deg", "psi_deg", "origin_y_angstrom", "origin_x_angstrom", "log_likelihood")
MAP_MARGIN = 8
"""Extra shells in the box of a transferred map: masks broaden spectra, and a tighter box would alias."""


@dataclass(frozen=True)
class Shared:
    """What the blocks of a half share in an iteration."""

    volume: pj.FourierVolume
    banks: list[expectation.Bank]
    pixels: Tensor
    noise_power: Tensor


def map_box(rings: int, box: int) -> int:
    """Even box size of a map with frequencies up to ``rings``."""
    return min(box, 2 * (rings + MAP_MARGIN))


def rings_beyond(state: State) -> int:
    """Number of shells inserted beyond the scored rings."""
    return max(8, round(state["length_angstrom"] / INSERT_BEYOND_ANGSTROM))


def inserted_rings(state: State) -> int:
    """Highest shell inserted in this iteration."""
    return min(state["box"] // 2 - 1, state["rings"] + rings_beyond(state))


def kept_radius(state: State) -> int:
    """Highest frequency of the loaded blocks; grows in steps of 16, so that they are seldom reloaded."""
    return min(state["box"] // 2 - 1, 16 * math.ceil(inserted_rings(state) / 16))


def search_levels(state: State, rings: int) -> list[expectation.Level]:
    """Search levels up to ``rings``, with matching angular steps, ring limits and shifts.

    The arc between neighbouring views at the particle's rim is one resolution element; shifts step by a third of one.
    """
    length, diameter = state["length_angstrom"], state["mask_diameter_angstrom"]
    pixel = length / state["box"]

    def ring_of(order: int) -> int:
        return max(4, round(length / (healpix_step_rad(order) * PARTICLE_SHARE * diameter)))

    coarse = min(rings, ring_of(COARSE_ORDER))
    step = min(length / coarse / 3.2, 0.05 * diameter)
    out = [expectation.Level(COARSE_ORDER, coarse, step / pixel, state["reach_angstrom"] / pixel, 6)]
    if state["sampling"]:
        return out
    order = COARSE_ORDER
    while True:
        order += 1
        step /= 2.0
        last = order >= FINEST_ORDER and ring_of(order) >= rings
        reach = 2.4 * step if last else 1.5 * step
        out.append(expectation.Level(order, rings if last else min(rings, ring_of(order)), step / pixel, reach / pixel, 0 if last else 4))
        if last:
            return out


def coarse_rings(state: State) -> int:
    """Rings up to which poses are sampled from the coarse level alone."""
    return search_levels({**state, "sampling": True}, state["box"])[0].rings


def updated_noise_power(state: State, mean_power: np.ndarray) -> np.ndarray:
    """Noise power per shell `(box / 2,)`, from means over its pixels; shells not measured now keep their value."""
    out = np.array(state["noise_power"])
    radius = len(mean_power) - 1
    pixels = np.bincount(np.minimum(pj.half_plane(radius).shell.numpy(), radius), minlength=radius + 1)
    known = slice(1, min(radius + 1, len(out)))
    out[known] = np.maximum(mean_power[known] / pixels[known], 1e-12)
    out[known.stop :] = out[known.stop - 1] if (out[known.stop :] == 1.0).all() else out[known.stop :]
    out[0] = out[1]
    return out


def scale_sums(state: State, shared: Shared, block: expectation.Particles, sigma_px: float) -> Sums:
    """Expected cross and norm terms of some particles, from which the grey scale of the start map is estimated."""
    device = str(shared.noise_power.device)
    every = max(1, state["count"] // SCALE_PARTICLES)
    # half-sets often alternate: take pairs, so that both halves contribute
    chosen = torch.from_numpy(np.nonzero(block.index // 2 % every == 0)[0]).to(device)
    bank, table = shared.banks[0], expectation.whole_table(shared.banks[0])
    rings = bank.level.rings
    plain, squared = table[:, :rings].contiguous(), table[:, rings:].contiguous()
    offsets = expectation.shift_grid(bank.level.step_px, bank.level.reach_px, device)
    scale, sums = state["scale"], {"cross": 0.0, "norm": 0.0, "count": len(block.index)}
    for lot in expectation.chunks(len(chosen), bank, len(offsets), device) if len(chosen) else ():
        rows = chosen[lot]
        centres = torch.zeros(len(rows), 2, device=device)
        cross_modes, norm_modes = expectation.image_modes(block, rows, centres, offsets, rings, shared.noise_power)
        cross = polar.rotation_scores(cross_modes, plain, expectation.psi_count(rings))
        norm = polar.rotation_scores(norm_modes, squared, expectation.psi_count(rings))
        # the scale is unknown in round 0: its best value is profiled out of every score
        gain = cross.clamp(min=0.0) ** 2 / (4.0 * norm.clamp(min=1e-9)) if state["round"] == 0 else scale * cross - scale**2 * norm
        gain = gain + expectation.shift_log_prior(centres, offsets, sigma_px)[:, :, None, None]
        weight = torch.softmax(gain.reshape(len(rows), -1), 1).reshape(gain.shape)
        sums["cross"] += float((weight * cross).sum())
        sums["norm"] += float((weight * norm).sum())
    return sums


def updated_scale(new: State, sums: list[Sums]) -> tuple[State, Metrics]:
    cross, norm = (sum(s[name] for s in sums) for name in ("cross", "norm"))
    old = new["scale"] or 1.0
    new["scale"] = max(cross / (2.0 * max(norm, 1e-30)), 1e-3 * old) if cross > 0 else 1e-3 * old
    new["round"] += 1
    if new["round"] == SCALE_ROUNDS:
        new["maps"] = (new["maps"] * new["scale"]).astype(np.float32)
        new["phase"] = "search"
    return new, {"phase": "grey scale", "scale": new["scale"]}


def update_shifts(new: State, mean_square: float) -> None:
    """Update the spread of the shifts (per axis), and the range and centre of the next search.

    Sampled shifts must not become centres (they would drift away), so searches stay centred on the picks unless these are poor: then they
    follow the best shifts of the last full search.
    """
    sigma = max(math.sqrt(mean_square / 2.0), 2.0)
    new["shift_sigma_angstrom"] = min(sigma, new["shift_range_angstrom"])
    wide = 3.0 * sigma > 0.1 * new["mask_diameter_angstrom"]
    new["recentre"] = wide and new["full_searches"] >= 2
    new["reach_angstrom"] = 0.06 * new["mask_diameter_angstrom"] if new["recentre"] else min(3.0 * sigma, new["shift_range_angstrom"])


def final_maps(state: State, grids: list[tuple[Tensor, Tensor]], support: Support, inserted: int) -> State:
    """Half-maps, combined map and curves of the last iteration, at the box of the particles."""
    box, length = state["box"], state["length_angstrom"]
    trusted = support.corrected.clamp(1e-4, 0.999)
    trusted[support.last + 1 :] = 1e-4
    halves = [pj.reconstruct(*g, inserted, box, image_box=box) for g in grids]
    joint = (grids[0][0] + grids[1][0], grids[0][1] + grids[1][1])
    final = pj.reconstruct(*joint, inserted, box, image_box=box, ssnr=2.0 * trusted / (1.0 - trusted))
    return {
        "half_map": torch.stack(halves).float().cpu().numpy(),
        "final_map": final.float().cpu().numpy(),
        "resolution_angstrom": crossing(support.corrected, length, support.last),
        "fsc_unmasked": support.unmasked.cpu().numpy(),
        "fsc_masked": support.masked.cpu().numpy(),
        "fsc_randomised": support.randomised.cpu().numpy(),
        "fsc_corrected": support.corrected.cpu().numpy(),
    }
