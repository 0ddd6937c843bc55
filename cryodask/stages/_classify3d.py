"""Functions of stage ``classify3d``: principal components, k-means, then expectation maximisation over classes at fixed poses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cryodask.kernels import classify3d as c3
from cryodask.kernels import components as pc
from cryodask.kernels.fsc import fsc
from cryodask.kernels.half_grid import fold_half_grid, half_volume, reconstruct_half
from cryodask.kernels.known_poses import Posed
from cryodask.kernels.maximisation import noise_correlation_sd
from cryodask.kernels.symmetry import symmetry_operators
from cryodask.stage import Columns, Context, Metrics, ParticleBlock, ParticleSet, State, Sums
from cryodask.stages import _groups as gr
from cryodask.stages import _posed
from cryodask.stages import _refinement as rf
from cryodask.stages._verdict import gain_sums, mean_gain

if TYPE_CHECKING:
    from cryodask.stages.classify3d import Classify3DParams

FEWEST_OF_A_CLASS = 25
_COMPONENT_ROUNDS, _TRIAL_ROUNDS = 12, 8
_TRIAL_ITERATIONS = 8
_MOST_COMPONENTS = 4
_SAMPLE = 20_000
"""Particles whose coordinates the k-means sees."""
_LEAST_SHARE = 1e-3
"""Smallest prior share of a class, so that an empty one can fill again."""
_VIEWS = 300
"""Number of particles in whose views the distance between two classes is measured."""
_SETTLED = 0.001
"""A start is finished when fewer particles than this share change their class."""

halves = 2


@dataclass(frozen=True)
class Shared:
    """What the blocks of a half-set share: components, or padded transforms of the references (in ``judge``, those of the other half)."""

    pairs: pc.Pairs | None
    references: tuple[torch.Tensor, ...]
    noise_power: torch.Tensor
    shares: np.ndarray
    """Shares of the classes; in the first iteration the centres of their clusters `(class, component)` instead."""


def start(params: Classify3DParams, particles: ParticleSet, inputs: dict[str, Any]) -> State:
    """State before the first iteration; refuses invalid parameters and inputs."""
    fewest = FEWEST_OF_A_CLASS * params.classes
    state = _posed.start_of_posed(params, particles, inputs, fewest=fewest, what=f"{params.classes} classes")
    return {
        **state, "trial": True, "step": 0, "run": 0, "shares": np.zeros(0), "references": np.zeros(0, np.float32), "scores": np.zeros(0),
        "shares_of_step": np.zeros((0, params.classes)), "changed_of_step": np.zeros(0), "best": {},
    }  # fmt: skip


def cache_key(params: Classify3DParams, state: State) -> int:
    """Highest frequency that is kept."""
    return _posed.kept_radius(state)


def load(params: Classify3DParams, state: State, block: ParticleBlock, context: Context) -> _posed.Loaded:
    """Half transforms of a block's images, with their poses."""
    return _posed.load(params, state, block, context)


def prepare(params: Classify3DParams, state: State, half: int, context: Context) -> Shared | None:
    """References of this iteration, made once per worker."""
    if state["phase"] == "power":
        return None
    noise = torch.from_numpy(state["noise_power"]).float().to(context.device)
    if state["phase"] == "mean":
        return Shared(None, (), noise, np.zeros(0))
    if state["phase"] == "judge":
        half = 1 - half
    consensus = state["half_consensus"][half] if state["trial"] else state["consensus"]

    def transform(volume: np.ndarray) -> torch.Tensor:
        return half_volume(torch.from_numpy(volume).to(context.device), state["rings"] + 1, state["box"])

    if state["phase"] in ("components", "start") or (state["phase"] == "classes" and state["step"] == 0):
        mean, components = (torch.from_numpy(v).to(context.device) for v in (consensus, state["components"][half]))
        centres = state["starts"][half][state["run"]] if state["phase"] == "classes" else np.zeros(0)
        return Shared(pc.Pairs.of(mean, components, state["rings"], state["box"]), (), noise, centres)
    maps = list(state["references"][half])
    if state["phase"] == "judge":
        # the mean of a mixture is the best single map to compare its classes with
        maps.append(np.einsum("k,kzyx->zyx", state["shares"][half], state["references"][half]).astype(np.float32))
    return Shared(None, tuple(transform(volume) for volume in maps), noise, state["shares"][half])


def expect(
    params: Classify3DParams, state: State, shared: Shared | None, block: _posed.Loaded, previous: Columns, context: Context
) -> tuple[Sums, Columns]:
    """Sums and columns of one block."""
    count, phase, rings = len(block.index), state["phase"], state["rings"]
    columns = previous or {"class3d_number": np.zeros(count, np.int32), "class3d_probability": np.zeros(count, np.float32)}
    if shared is None:
        return {**gr.power_by_group(state, block.rows, _posed.kept_radius(state)), "count": count}, columns
    posed, noise = _posed.with_contrast(state, block), shared.noise_power
    if phase == "mean":
        grid = posed.grid(torch.ones(count, device=noise.device), noise, rings + 1)
        return {"grid": grid.cpu().numpy(), "count": count}, columns
    if phase in ("components", "start"):
        assert shared.pairs is not None
        found = pc.coordinates(posed, shared.pairs, noise, rings)
        if phase == "start":
            return {"sample": _of_sample(state, block.index, found.z), "count": count}, columns
        sums: Sums = {name: v.cpu().numpy() for name, v in pc.component_sums(posed, found, noise, rings + 1).items()}
        if state["trial"] and state["step"] == 0:
            terms = posed.terms(shared.pairs.single[0], rings, rings + 1)
            loaded = _posed.Loaded(block.index, block.micrograph, posed)
            sums |= gr.pose_sums(state, loaded, posed.rows, terms, noise)  # type: ignore[arg-type]
        return {**sums, "count": count}, columns
    if phase == "judge":
        *classes, common = (posed.gain(volume, noise, rings) for volume in shared.references)
        gain = torch.logsumexp(torch.stack(classes, 1) + _log_shares(shared), 1) - common
        return {**gain_sums(gain), "count": count}, columns
    if phase == "classes" and state["step"] == 0:
        assert shared.pairs is not None
        z = pc.coordinates(posed, shared.pairs, noise, rings).z.cpu().numpy()
        labels = torch.from_numpy(c3.nearest_centre(z, shared.shares)).to(noise.device)
        posterior = torch.nn.functional.one_hot(labels, params.classes).double()
        score = 0.0
    else:
        gains = torch.stack([posed.gain(volume, noise, rings) for volume in shared.references], 1) + _log_shares(shared)
        posterior, score = torch.softmax(gains, 1), float(torch.logsumexp(gains, 1).sum())
    number = posterior.argmax(1).cpu().numpy().astype(np.int32) + 1
    radius = _inserted(state)
    grids = torch.stack([posed.grid(posterior[:, k], noise, radius) for k in range(params.classes)])
    sums = {
        "grid": grids.cpu().numpy(), "share": posterior.sum(0).cpu().numpy(), "changed": int((number != columns["class3d_number"]).sum()),
        "log_likelihood": score, "count": count,
    }  # fmt: skip
    if phase == "final":
        sums |= _separation(state, shared, posed, block.index)
    return sums, {"class3d_number": number, "class3d_probability": posterior.amax(1).cpu().numpy().astype(np.float32)}


def _inserted(state: State) -> int:
    return _posed.kept_radius(state) if state["phase"] == "final" else state["rings"] + 1


def _log_shares(shared: Shared) -> torch.Tensor:
    shares = np.maximum(shared.shares, _LEAST_SHARE)
    return torch.from_numpy(np.log(shares / shares.sum())).to(shared.noise_power.device)


def _of_sample(state: State, index: np.ndarray, z: torch.Tensor) -> np.ndarray:
    """Coordinates of those particles of a block that are in the sample, at their places in it `(sample, component)`."""
    stride = -(-state["count"] // _SAMPLE)
    out = np.zeros((-(-state["count"] // stride), z.shape[1]))
    there = index % stride == 0
    out[index[there] // stride] = z.cpu().numpy()[there]
    return out


def _separation(state: State, shared: Shared, posed: Posed, index: np.ndarray) -> Sums:
    """Sums of d^2 between the classes in some views."""
    stride = max(1, state["count"] // _VIEWS)
    # half-sets often alternate: take pairs, so that both halves contribute
    rows = torch.from_numpy(np.nonzero(index // 2 % stride == 0)[0]).to(shared.noise_power.device)
    classes, out = shared.references, np.zeros((len(shared.references),) * 2)
    for a in range(len(classes)):
        for b in range(a):
            norm = posed.agreement(classes[a] - classes[b], shared.noise_power, state["rings"], rows)[1]
            out[a, b] = out[b, a] = 2.0 * float(norm.sum())
    return {"separation": out, "views": len(rows)}


# --- maximisation ---------------------------------------------------------------------------------------------------------------
def maximise(params: Classify3DParams, state: State, sums: list[Sums], context: Context) -> tuple[State, Metrics]:
    """The next state from the sums of all blocks."""
    new = {**state, "iteration": state["iteration"] + 1}
    metrics: Metrics = {"phase": state["phase"]}
    return _PHASES[state["phase"]](params, state, new, sums, context), metrics | _figures(new)


def _figures(state: State) -> Metrics:
    if state["trial"] or not len(state["changed_of_step"]):
        return {}
    return {"changed_share": float(state["changed_of_step"][-1]), "largest_class": float(state["shares_of_step"][-1].max())}


def _after_power(params: Classify3DParams, state: State, new: State, sums: list[Sums], context: Context) -> State:
    return after_power(state, new, sums)


def after_power(state: State, new: State, sums: list[Sums]) -> State:
    """The first estimate of the noise power, which still contains the signal."""
    noise = rf.updated_noise_power(state, sums)
    measured = sums[0]["power"].shape[1] - 1
    noise[:, measured + 1 :] = noise[:, measured, None]
    return {**new, "noise_power": noise, "phase": "mean"}


def _after_mean(params: Classify3DParams, state: State, new: State, sums: list[Sums], context: Context) -> State:
    return _begin(params, {**new, **consensus_of(params, state, sums, context), "trial": True}, context)


def consensus_of(params: Any, state: State, sums: list[Sums], context: Context) -> State:
    """The part of a state that holds the consensus of all particles, and how well it agrees with the given map."""
    grids, small = _grids([s["grid"] for s in sums], params, context), _small(state)
    sphere = _posed.sphere(state, small, context.device)
    whole, halved, curve = c3.filtered_halves(grids, state["rings"] + 1, small, state["box"], sphere)
    return {
        "consensus": whole.cpu().numpy(), "half_consensus": torch.stack(halved).cpu().numpy(),
        "consensus_fsc": torch.nan_to_num(curve).cpu().numpy(), "agreement": _posed.agreement_with(state, whole),
    }  # fmt: skip


def _begin(params: Classify3DParams, new: State, context: Context) -> State:
    """Random components, at the start of the trial in half-sets and of the classification itself."""
    generator = torch.Generator().manual_seed(params.seed)
    count = min(max(2, params.classes - 1), _MOST_COMPONENTS)
    noise = torch.from_numpy(new["noise_power"])
    found = pc.random_components(count, region(new, context), noise, new["rings"], new["box"], generator).cpu().numpy()
    return {
        **new, "components": np.stack([found, found]), "phase": "components", "step": 0, "run": 0, "scores": np.zeros(0), "best": {},
    }  # fmt: skip


def apart(state: State, sums: list[Sums]) -> list[list[Sums]]:
    """Sums grouped by result: one group per half-set in the trial, otherwise one group with both."""
    return [[one] for one in sums] if state["trial"] else [sums]


def of_halves(results: list[Any]) -> list[Any]:
    """A result per half."""
    return results if len(results) == 2 else [results[0], results[0]]


def _after_components(params: Classify3DParams, state: State, new: State, sums: list[Sums], context: Context) -> State:
    where = region(state, context)
    new["components"] = np.stack(of_halves([next_components(params, state, some, where, context)[0] for some in apart(state, sums)]))
    if state["trial"] and state["step"] == 0:
        new["noise_power"] = rf.updated_noise_power(state, sums)
        new["contrast"] = gr.updated_contrast(*(sum(s[name] for s in sums) for name in ("cross", "norm")))
    new["step"] += 1
    rounds = _TRIAL_ROUNDS if state["trial"] else _COMPONENT_ROUNDS
    return {**new, "phase": "components" if new["step"] < rounds else "start"}


def next_components(params: Any, state: State, sums: list[Sums], mask: torch.Tensor, context: Context) -> tuple[np.ndarray, np.ndarray]:
    """Components `(component, z, y, x)` in a mask after one round, and their standard deviations."""
    total = {name: sum(s[name] for s in sums) for name in ("grid", "pair_weight", "second", "count")}
    grid, weights, second = (torch.from_numpy(np.array(total[name])).to(context.device) for name in ("grid", "pair_weight", "second"))
    operators = symmetry_operators(params.symmetry or "C1")
    found = pc.solve_components(grid, weights, operators, state["rings"] + 1, mask.shape[-1], state["box"]) * mask
    components, strength = pc.orthogonal(found, second / total["count"])
    return components.cpu().numpy(), strength.cpu().numpy()


def _after_start(params: Classify3DParams, state: State, new: State, sums: list[Sums], context: Context) -> State:
    most = 1 if state["trial"] else params.restarts
    seeds = [params.seed * 1000 + i for i in range(4 * most)]
    starts = []
    for some in apart(state, sums):
        points = np.asarray(sum(s["sample"] for s in some))
        points = points[points.any(1)]  # those of the other half are zero
        starts.append(np.stack(c3.clusters(points, params.classes, seeds)[:most]))
    return {**new, "starts": of_halves(starts), "phase": "classes", "step": 0}


def _after_classes(params: Classify3DParams, state: State, new: State, sums: list[Sums], context: Context) -> State:
    made = [_class_maps(params, state, some, half, context) for half, some in enumerate(apart(state, sums))]
    new["references"], new["shares"] = (np.stack(of_halves(list(some))) for some in zip(*made))
    count, fresh = sum(s["count"] for s in sums), state["step"] == 0
    changed = sum(s["changed"] for s in sums) / count
    new["step"] += 1
    if state["trial"]:
        return {**new, "phase": "classes" if new["step"] <= _TRIAL_ITERATIONS else "judge"}
    score = sum(s["log_likelihood"] for s in sums) / count
    known = 0 if fresh else len(state["changed_of_step"])
    new["shares_of_step"] = np.concatenate([state["shares_of_step"][:known], new["shares"][:1]])
    new["changed_of_step"] = np.append(state["changed_of_step"][:known], 1.0 if fresh else changed)
    settled = changed < _SETTLED and new["step"] > 10
    if new["step"] <= params.iterations and not settled:
        return new
    kept = ("references", "shares", "shares_of_step", "changed_of_step")
    if not len(state["scores"]) or score > state["scores"].max():
        new["best"] = {name: new[name] for name in kept}
    new["scores"] = np.append(state["scores"], score)
    if state["run"] + 1 < len(state["starts"][0]):
        return {**new, "run": state["run"] + 1, "step": 0}
    best = new["best"]
    order = np.argsort(-best["shares"][0], kind="stable")
    sorted_ = {name: best[name][:, order] for name in ("references", "shares", "shares_of_step")}
    return {**new, **sorted_, "changed_of_step": best["changed_of_step"], "phase": "final", "best": {}}


def _class_maps(params: Classify3DParams, state: State, sums: list[Sums], half: int, context: Context) -> tuple[np.ndarray, np.ndarray]:
    """References `(class, z, y, x)` of the next iteration, and the shares of the classes."""
    small, device = _small(state), context.device
    mask = torch.from_numpy(state["mask"]).to(device) if state["mask"].size else None
    consensus = torch.from_numpy(state["half_consensus"][half] if state["trial"] else state["consensus"]).to(device)
    sphere = _posed.sphere(state, small, device)
    shares = np.asarray(sum(s["share"] for s in sums)) / sum(s["count"] for s in sums)
    references = []
    for k in range(params.classes):
        grids = _grids([s["grid"][k] for s in sums], params, context)
        if len(grids) == 2:
            own = c3.filtered_halves(grids, state["rings"] + 1, small, state["box"], sphere)[0]
        else:
            curve = torch.from_numpy(state["consensus_fsc"]).clamp(1e-3, 0.999)
            ssnr = max(float(shares[k]), 1e-3) * curve / (1.0 - curve)
            own = reconstruct_half(grids[0], state["rings"] + 1, small, image_box=state["box"], ssnr=ssnr) * sphere
        references.append(c3.within(own, consensus, mask).cpu().numpy())
    return np.stack(references), shares


def _after_judge(params: Classify3DParams, state: State, new: State, sums: list[Sums], context: Context) -> State:
    _, new["class_gain"], new["class_gain_z"] = mean_gain(sums)
    return _begin(params, {**new, "trial": False}, context)


def _after_final(params: Classify3DParams, state: State, new: State, sums: list[Sums], context: Context) -> State:
    new["final_shares"] = sum(s["share"] for s in sums) / sum(s["count"] for s in sums)
    new["separation"] = sum(s["separation"] for s in sums) / max(1, sum(s["views"] for s in sums))
    return {**new, **final_class_maps(params, state, sums, _inserted(state), context), "done": True}


def final_class_maps(params: Classify3DParams, state: State, sums: list[Sums], radius: int, context: Context) -> State:
    """Map, half-maps and resolution of each class, at the box of the images, from grids `(class, ...)` of both half-sets."""
    box, order = state["box"], len(symmetry_operators(params.symmetry or "C1"))
    sphere = _posed.sphere(state, box, context.device)
    maps, half_maps, resolutions = [], [], []
    for k in range(params.classes):
        grids = _grids([s["grid"][k] for s in sums], params, context)
        plain = [reconstruct_half(grid, radius, box, image_box=box) for grid in grids]
        maps.append(c3.filtered_halves(grids, radius, box, box, sphere)[0].cpu().numpy())
        half_maps.append(torch.stack(plain).cpu().numpy())
        curve = torch.nan_to_num(fsc(plain[0] * sphere, plain[1] * sphere))[: radius + 1].cpu()
        least = (3.0 * noise_correlation_sd(radius + 1, order, float(sphere.mean()))).clamp(0.143, 0.9)
        failed = torch.nonzero(curve[2:] < least[2:])
        last = int(failed[0]) + 1 if len(failed) else radius
        resolutions.append(state["length_angstrom"] / max(last, 1))
    return {"class_map": np.stack(maps), "class_half_map": np.stack(half_maps), "resolutions": np.array(resolutions)}


_PHASES = {
    "power": _after_power, "mean": _after_mean, "components": _after_components, "start": _after_start, "classes": _after_classes,
    "judge": _after_judge, "final": _after_final,
}  # fmt: skip


def _small(state: State) -> int:
    return int(state["given"].shape[-1])


def region(state: State, context: Context) -> torch.Tensor:
    """Where classes may differ: the mask of the input, or the sphere."""
    sphere = _posed.sphere(state, _small(state), context.device)
    return torch.from_numpy(state["mask"]).to(context.device) * sphere if state["mask"].size else sphere


def _grids(given: list[np.ndarray], params: Any, context: Context) -> list[torch.Tensor]:
    operators = symmetry_operators(params.symmetry or "C1")
    return [fold_half_grid(torch.from_numpy(np.array(grid)).to(context.device), operators) for grid in given]


def finished(params: Classify3DParams, state: State) -> bool:
    """Whether the last iteration is done; refuses poses of another frame, here because the driver calls it."""
    _posed.refuse_foreign_poses(state)
    return bool(state["done"])


def result(params: Classify3DParams, state: State, columns: Columns) -> dict[str, Any]:
    """The output of the stage."""
    return {
        **columns,
        "class_map": state["class_map"],
        "class_half_map": state["class_half_map"],
        "map_pixel_size_angstrom": state["length_angstrom"] / state["box"],
        "class3d_share": state["final_shares"],
        "class3d_resolution_angstrom": state["resolutions"],
        "class3d_separation": state["separation"],
        "class3d_confusion": c3.confusion(state["separation"], state["final_shares"]),
        "iteration_class_share": state["shares_of_step"],
        "iteration_changed_share": state["changed_of_step"],
        "start_score": state["scores"],
        "class_gain": state["class_gain"],
        "class_gain_z": state["class_gain_z"],
    }
