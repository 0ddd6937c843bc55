"""Functions of stage ``reslog``: one pass over the particles for the noise, then one for each subset."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cryodask.kernels.fourier import resize_map
from cryodask.kernels.fsc import corrected_fsc, resolution_at
from cryodask.kernels.half_grid import fold_half_grid, reconstruct_half
from cryodask.kernels.particle_number import fit_particle_number
from cryodask.kernels.symmetry import symmetry_operators
from cryodask.stage import Columns, Context, Metrics, ParticleBlock, ParticleSet, State, Sums
from cryodask.stages import _groups as gr
from cryodask.stages import _posed
from cryodask.stages import _refinement as rf

if TYPE_CHECKING:
    from cryodask.stages.reslog import ReslogParams

halves = 2
_FEWEST_SHELLS = 3
"""Maps that agree in fewer shells have no resolution."""


def start(params: ReslogParams, particles: ParticleSet, inputs: dict[str, Any]) -> State:
    """State before the first pass; refuses invalid parameters and inputs."""
    state = _posed.start_of_posed(params, particles, inputs, fewest=4 * params.fewest, what="a plot of resolution over particle number")
    return {
        **state, "phase": "final", "known_noise": False, "level": 0, "levels": int(np.log2(particles.count / params.fewest)) + 1,
        "least_level": smallest_subsets(np.asarray(particles.columns["half_set"]), params.seed),
        "counts": np.zeros(0, np.int64), "resolutions": np.zeros(0), "curves": np.zeros((0, particles.box // 2 + 1)),
    }  # fmt: skip


def smallest_subsets(half_set: np.ndarray, seed: int) -> np.ndarray:
    """The smallest subset that each particle is in `(n,)` int8: subset l has a fraction 2^-l of each half-set, drawn at random."""
    out = np.zeros(len(half_set), np.int8)
    for half in (0, 1):
        rows = np.nonzero(half_set == half)[0]
        place = np.random.default_rng([seed, half]).permutation(len(rows)) + 0.5
        out[rows] = np.floor(np.log2(len(rows) / place))
    return out


def cache_key(params: ReslogParams, state: State) -> int:
    """Highest frequency that is kept."""
    return _posed.kept_radius(state)


def load(params: ReslogParams, state: State, block: ParticleBlock, context: Context) -> _posed.Loaded:
    """Half transforms of a block's images, with their poses."""
    return _posed.load(params, state, block, context)


def prepare(params: ReslogParams, state: State, half: int, context: Context) -> torch.Tensor | None:
    """The noise power, once it is known."""
    return torch.from_numpy(state["noise_power"]).float().to(context.device) if state["known_noise"] else None


def expect(
    params: ReslogParams, state: State, noise: torch.Tensor | None, block: _posed.Loaded, previous: Columns, context: Context
) -> tuple[Sums, Columns]:
    """Power of the images of a block, or the slices of those that are in the subset."""
    radius = _posed.kept_radius(state)
    if noise is None:
        return {**gr.power_by_group(state, block.rows, radius), "count": len(block.index)}, previous
    member = state["least_level"][block.index] >= state["level"]
    weight = torch.from_numpy(member.astype(np.float32)).to(noise.device)
    return {"grid": block.posed.grid(weight, noise, radius).cpu().numpy(), "count": int(member.sum())}, previous


def maximise(params: ReslogParams, state: State, sums: list[Sums], context: Context) -> tuple[State, Metrics]:
    """Resolution of the subset, and the next one."""
    new = {**state, "iteration": state["iteration"] + 1}
    if not state["known_noise"]:
        return {**new, "noise_power": rf.updated_noise_power(state, sums), "known_noise": True}, {"phase": "power"}
    box, voxel, radius = state["box"], state["length_angstrom"] / state["box"], _posed.kept_radius(state)
    operators = symmetry_operators(params.symmetry or "C1")
    grids = (fold_half_grid(torch.from_numpy(np.array(s["grid"])).to(context.device), operators) for s in sums)
    first, second = (reconstruct_half(grid, radius, box, image_box=box) for grid in grids)
    if state["level"] == 0:
        small = state["given"].shape[-1]
        new["agreement"] = _posed.agreement_with(state, resize_map(0.5 * (first + second), small))
    mask = _posed.sphere(state, box, context.device)
    if state["mask"].size:
        mask = mask * resize_map(torch.from_numpy(state["mask"]).to(mask), box).clamp(0.0, 1.0)
    curves = corrected_fsc(first, second, mask, seed=params.seed)
    # the crossing itself: limited to shells beyond all doubt, small subsets would look worse than they are
    resolution = resolution_at(curves.corrected, 0.143, box, voxel)
    if resolution > state["length_angstrom"] / _FEWEST_SHELLS:
        resolution = float("nan")
    count = sum(s["count"] for s in sums)
    new["counts"] = np.append(state["counts"], count)
    new["resolutions"] = np.append(state["resolutions"], resolution)
    new["curves"] = np.vstack([state["curves"], torch.nan_to_num(curves.corrected).cpu().numpy()])
    new["level"] = state["level"] + 1
    return {**new, "done": new["level"] == state["levels"]}, {"particles": count, "resolution_angstrom": resolution}


def finished(params: ReslogParams, state: State) -> bool:
    """Whether the last subset is done; refuses poses of another frame, here because the driver calls it."""
    _posed.refuse_foreign_poses(state)
    return bool(state["done"])


def result(params: ReslogParams, state: State, columns: Columns) -> dict[str, Any]:
    """The output of the stage."""
    voxel = state["length_angstrom"] / state["box"]
    fit = fit_particle_number(state["counts"], state["resolutions"], 2.0 * voxel)
    return {
        "subset_count": state["counts"],
        "subset_resolution_angstrom": state["resolutions"],
        "subset_fsc": state["curves"],
        "reslog_b_factor_angstrom2": fit.b_factor_angstrom2,
        "reslog_intercept": fit.intercept,
        "map_pixel_size_angstrom": voxel,
    }
