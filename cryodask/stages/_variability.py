"""Functions of stage ``variability``: principal components of particles at their poses, first in each half-set alone, then in both."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cryodask.kernels import components as pc
from cryodask.kernels.fourier import resize_map
from cryodask.stage import Columns, Context, Metrics, ParticleBlock, ParticleSet, State, Sums
from cryodask.stages import _classify3d as cl
from cryodask.stages import _groups as gr
from cryodask.stages import _posed
from cryodask.stages import _refinement as rf

if TYPE_CHECKING:
    from cryodask.stages.variability import VariabilityParams

FEWEST = 100
_ROUNDS_ALONE = 8
SERIES = (-2.0, -1.0, 0.0, 1.0, 2.0)
"""Coordinates, in standard deviations, at which maps along a component are made."""

halves = 2


def start(params: VariabilityParams, particles: ParticleSet, inputs: dict[str, Any]) -> State:
    """State before the first iteration; refuses invalid parameters and inputs."""
    state = _posed.start_of_posed(params, particles, inputs, fewest=FEWEST, what="an analysis of variability")
    return {**state, "trial": True, "step": 0, "strength": np.zeros(params.components), "agreements": np.zeros(0)}


def cache_key(params: VariabilityParams, state: State) -> int:
    """Highest frequency that is kept."""
    return _posed.kept_radius(state)


def load(params: VariabilityParams, state: State, block: ParticleBlock, context: Context) -> _posed.Loaded:
    """Half transforms of a block's images, with their poses."""
    return _posed.load(params, state, block, context)


def prepare(params: VariabilityParams, state: State, half: int, context: Context) -> cl.Shared | None:
    """Mean and components of this iteration, made once per worker."""
    return cl.prepare(params, state, half, context)  # type: ignore[arg-type]


def expect(
    params: VariabilityParams, state: State, shared: cl.Shared | None, block: _posed.Loaded, previous: Columns, context: Context
) -> tuple[Sums, Columns]:
    """Sums and columns of one block."""
    count, phase, rings = len(block.index), state["phase"], state["rings"]
    columns = previous or {"z": np.zeros((count, params.components), np.float32)}
    if shared is None:
        return {**gr.power_by_group(state, block.rows, _posed.kept_radius(state)), "count": count}, columns
    posed, noise = _posed.with_contrast(state, block), shared.noise_power
    if phase == "mean":
        return {"grid": posed.grid(torch.ones(count, device=noise.device), noise, rings + 1).cpu().numpy(), "count": count}, columns
    assert shared.pairs is not None
    found = pc.coordinates(posed, shared.pairs, noise, rings)
    if phase == "start":
        return {"explained": float(found.explained.sum()), "count": count}, {"z": found.z.float().cpu().numpy()}
    sums: Sums = {name: v.cpu().numpy() for name, v in pc.component_sums(posed, found, noise, rings + 1).items()}
    if state["trial"] and state["step"] == 0:
        terms = posed.terms(shared.pairs.single[0], rings, rings + 1)
        sums |= gr.pose_sums(state, _posed.Loaded(block.index, block.micrograph, posed), posed.rows, terms, noise)  # type: ignore[arg-type]
    return {**sums, "count": count}, columns


def maximise(params: VariabilityParams, state: State, sums: list[Sums], context: Context) -> tuple[State, Metrics]:
    """The next state from the sums of all blocks."""
    new = {**state, "iteration": state["iteration"] + 1}
    metrics: Metrics = {"phase": "half-sets alone" if state["phase"] == "components" and state["trial"] else state["phase"]}
    if state["phase"] == "power":
        return cl.after_power(state, new, sums), metrics
    if state["phase"] == "mean":
        new |= cl.consensus_of(params, state, sums, context)
        return _begin(params, {**new, "trial": True}, context), metrics
    if state["phase"] == "start":
        new["explained"] = sum(s["explained"] for s in sums) / sum(s["count"] for s in sums)
        return {**new, "done": True}, metrics
    region = cl.region(state, context)
    found = [cl.next_components(params, state, some, region, context) for some in cl.apart(state, sums)]
    new["components"] = np.stack(cl.of_halves([components for components, _ in found]))
    new["strength"], new["step"] = found[0][1], state["step"] + 1
    if state["trial"]:
        if state["step"] == 0:
            new["noise_power"] = rf.updated_noise_power(state, sums)
            new["contrast"] = gr.updated_contrast(*(sum(s[name] for s in sums) for name in ("cross", "norm")))
        if new["step"] == _ROUNDS_ALONE:
            new["agreements"] = agreement_of_components(*new["components"])
            return _begin(params, {**new, "trial": False}, context), metrics
        return new, metrics
    return {**new, "phase": "components" if new["step"] < params.iterations else "start"}, metrics


def _begin(params: VariabilityParams, new: State, context: Context) -> State:
    """Random components; different ones for each half-set in the trial."""
    noise, made = torch.from_numpy(new["noise_power"]), []
    for half in range(2):
        generator = torch.Generator().manual_seed(params.seed * 2 + (half if new["trial"] else 0))
        made.append(pc.random_components(params.components, cl.region(new, context), noise, new["rings"], new["box"], generator))
    return {**new, "components": torch.stack(made).cpu().numpy(), "phase": "components", "step": 0}


def agreement_of_components(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Canonical correlations `(component,)`, largest first, of two sets of maps `(component, z, y, x)`: 0 for noise, 1 for one space."""
    bases = [np.linalg.qr(maps.reshape(len(maps), -1).astype(np.float64).T)[0] for maps in (first, second)]
    return np.asarray(np.linalg.svd(bases[0].T @ bases[1], compute_uv=False))


def finished(params: VariabilityParams, state: State) -> bool:
    """Whether the last iteration is done; refuses poses of another frame, here because the driver calls it."""
    _posed.refuse_foreign_poses(state)
    return bool(state["done"])


def result(params: VariabilityParams, state: State, columns: Columns) -> dict[str, Any]:
    """The output of the stage."""
    box = state["box"]
    mean, *maps = (resize_map(torch.from_numpy(m), box) for m in (state["consensus"], *state["components"][0]))
    along = torch.stack([torch.stack([mean + z * one for z in SERIES]) for one in maps])
    return {
        **{f"component{j + 1}": np.ascontiguousarray(columns["z"][:, j]) for j in range(params.components)},
        "component_map": torch.stack(maps).numpy(),
        "component_series": along.numpy(),
        "component_strength": state["strength"],
        "component_agreement": state["agreements"],
        "component_gain": state["explained"],
        "map_pixel_size_angstrom": state["length_angstrom"] / box,
    }
