"""Maximisation of stage ``refine3d``: noise, maps and the next pass from what the blocks have summed up."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from cryodask.kernels.fourier import soft_sphere
from cryodask.kernels.half_grid import fold_half_grid, mean_weight, reconstruct_half, resized_half_grid
from cryodask.kernels.maximisation import HalfMaps, next_rings
from cryodask.kernels.symmetry import symmetry_operators
from cryodask.stage import Context, Metrics, State, Sums
from cryodask.stages import _refinement as rf
from cryodask.stages._verdict import judged, mean_gain

if TYPE_CHECKING:
    from cryodask.stages.refine3d import Refine3DParams


def maximise(params: Refine3DParams, state: State, sums: list[Sums], context: Context) -> tuple[State, Metrics]:
    """The next state from the sums of all blocks."""
    new = {**state, "iteration": state["iteration"] + 1}
    total = max(1, sum(s["count"] for s in sums))
    phase = state["phase"]
    if phase == "scale":
        if state["round"] == 0:
            new["gain_of_contrast"] = mean_gain(sums)[1:]
        return rf.updated_scale(new, sums)
    if phase == "verdict":
        return judged(new, sums)
    if phase == "sort":
        kept = sum(s["kept"] for s in sums)
        # where poses were certain in spite of the junk, the map only has to be made again without it
        again = {"phase": "local", "stalled": 0} if state["pose_certainty"] >= rf.SURE else rf.beginning(state, kept)
        return {**new, **again, "sorted": True}, {"phase": "sort", "kept": kept, "left_out": total - kept}
    if phase == "power":
        new["noise_power"] = rf.updated_noise_power(state, sums)
        measured = rf.kept_radius(state)
        new["noise_power"][:, measured + 1 :] = new["noise_power"][:, measured, None]
        return {**new, "phase": "scale"}, {"phase": "noise power"}
    return _next_maps(params, state, new, sums, context)


def _next_maps(params: Refine3DParams, state: State, new: State, sums: list[Sums], context: Context) -> tuple[State, Metrics]:
    """The maps of the halves for the next pass, and how fine it may be."""
    phase, total = state["phase"], max(1, sum(s["count"] for s in sums))
    sizes = rf.sizes_of(state)
    inserted = rf.inserted_rings(state)
    operators = symmetry_operators(params.symmetry or "C1")
    drawn, in_parts = phase == "draw", rf.parts_of(state) > 1
    new["noise_power"] = rf.updated_noise_power(state, sums, 0.3 if in_parts else 1.0)
    grids = [fold_half_grid(torch.from_numpy(s["grid"]).to(context.device), operators) for s in sums]
    if drawn or in_parts:
        grids = _remembered(state, grids, inserted)
        new["grids"] = torch.stack(grids).cpu().numpy()
    small = rf.map_box(inserted, sizes.box)
    means = [mean_weight(grid, inserted) for grid in grids]
    first, second = (reconstruct_half(grid, inserted, small, image_box=sizes.box, mean=mean) for grid, mean in zip(grids, means))
    voxel = sizes.length_angstrom / small
    sphere = soft_sphere(small, voxel, 0.95 * sizes.mask_diameter_angstrom / 2, 10.0, device=context.device)
    generator = torch.Generator().manual_seed(params.seed + 7919 * state["iteration"])
    halves = HalfMaps.of(first, second, inserted=inserted, common=state["start_rings"], generator=generator)
    support = halves.support(sphere, len(operators))
    if drawn:
        known = support
        rings = max(state["start_rings"], min(support.last, sizes.ring_of(rf.DRAWN_ANGSTROM)))
    else:
        known = halves.solvent_support(sphere, support, voxel, len(operators))
        rings = next_rings(known, inserted=inserted, limit=sizes.last, start=state["start_rings"])
    del first, second, halves
    new["rings"] = rings
    new["maps"] = rf.updated_maps(state, grids, means, known, inserted, rings)
    new["resolutions"] = np.append(state["resolutions"], sizes.length_angstrom / max(support.last, 1))
    rf.update_shifts(new, sum(s["shift_square"] for s in sums) / total)
    new["mean_log_likelihood"] = sum(s["log_likelihood"] for s in sums) / total
    new["certainty"] = sum(s["certainty"] for s in sums) / total
    new["likelihoods"] = np.append(state["likelihoods"], new["mean_log_likelihood"])
    new["certainties"] = np.append(state["certainties"], math.nan if drawn else new["certainty"])
    of_pass = ("count", "log_likelihood", "log_likelihood_square", "certainty", "cross", "norm")
    new["of_pass"] = [*state["of_pass"], {"rings": state["rings"], **{name: sum(s[name] for s in sums) for name in of_pass}}]
    rf.next_phase(state, new, iterations=params.iterations)
    if rf.parts_of(new) == 1:
        new["grids"] = np.zeros(0, np.float32)
    metrics = {
        "phase": phase,
        "resolution_angstrom": sizes.length_angstrom / max(support.last, 1),
        "scored_angstrom": sizes.length_angstrom / state["rings"],
        "shift_sigma_angstrom": new["shift_sigma_angstrom"],
        "log_likelihood": new["mean_log_likelihood"],
        "certainty": new["certainty"],
    }
    if new["phase"] == "verdict":
        new.update(rf.final_maps(state, grids, means, support, inserted))
        new["verdict_rings"] = min(sizes.ring_of(rf.DRAWN_ANGSTROM), max(rings, state["start_rings"] + 2), rf.polar_rings(state) - 1)
    return new, metrics


def _remembered(state: State, fresh: list[torch.Tensor], inserted: int) -> list[torch.Tensor]:
    """Grids of a part, with those of the parts before it, which are forgotten exponentially."""
    if not len(state["grids"]):
        return fresh
    old = [resized_half_grid(torch.from_numpy(np.array(grid)).to(new.device), inserted) for grid, new in zip(state["grids"], fresh)]
    if state["phase"] == "global" and state["passes"] == 0 and state["part"] == 0:
        # parts of drawn passes are smaller
        old = [grid.mul_(state["parts"] / rf.parts_of(state)) for grid in old]
    return [before.add_(now - before, alpha=rf.memory_rate(state)) for before, now in zip(old, fresh)]
