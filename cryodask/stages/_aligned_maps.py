"""Maximisation of stage ``classify3d`` with alignment: grey scale, decoys, the maps of the classes, the course, and the verdict."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from cryodask.errors import InputError
from cryodask.kernels import decoys
from cryodask.kernels.fourier import resize_map, soft_sphere
from cryodask.kernels.fsc import half_shells, shell_sum
from cryodask.kernels.half_grid import fold_half_grid, mean_weight, reconstruct_half
from cryodask.kernels.maximisation import HalfMaps, Support, next_rings
from cryodask.kernels.projection import cut_map
from cryodask.kernels.symmetry import symmetry_operators
from cryodask.kernels.verdict import LEAST_Z
from cryodask.stage import Context, Metrics, State, Sums
from cryodask.stages import _refinement as rf
from cryodask.stages._classify3d import final_class_maps
from cryodask.stages._verdict import mean_gain

if TYPE_CHECKING:
    from cryodask.stages.classify3d import Classify3DParams

LEAST_SHARE = 1e-3
"""Smallest prior share of a class, so that an empty one can fill again."""
SAMPLE_OF_A_CLASS, SAMPLE_OF_ONE_MAP = 3000, 5000
"""Particles per class that a coarse pass uses at most, and particles of the map that the classes are compared to."""
HELD_OPEN = 4
"""Passes in which every given map keeps at least half of an even share: the first good map would attract the particles of all others."""
_SCALE_ROUNDS, _SINGLE_ROUNDS = 2, 3
_FEWEST_PASSES, _MOST_PASSES, _MOST_FINE_PASSES = HELD_OPEN + 2, 10, 1
_SETTLED, _SETTLED_FINE = 0.03, 0.01
"""Classes have settled when fewer particles than this share change theirs, and the maps get no finer."""
_LEAST_POWER = 0.5
"""A map explains at least this share of the power that the strongest explains: the particles of others lower its apparent grey scale."""
_FEWEST_OF_A_MAP = 10.0
"""Particles below which a class keeps its map."""
_NO_SIGNAL = 1e-6
"""Power of a shell, relative to the strongest, below which a map has been low-passed."""


# --- what follows from a state ---------------------------------------------------------------------------------------------------
def drawn_ring(state: State) -> int:
    """Finest ring of searches over all views."""
    return min(rf.sizes_of(state).ring_of(rf.DRAWN_ANGSTROM), int(state["finest"]))


def view_rings(state: State) -> int:
    """Rings of the views of a pass."""
    return int(min(state["rings"], max(drawn_ring(state), state["start_rings"])))


def inserted_rings(state: State) -> int:
    """Highest shell inserted in this iteration."""
    sizes = rf.sizes_of(state)
    if state["phase"] == "final":
        return sizes.last
    rings = state["rings"] if state["fine"] and state["phase"] == "search" else max(state["start_rings"], drawn_ring(state))
    return int(min(sizes.last, rings + sizes.beyond))


def kept_radius(state: State) -> int:
    """Highest frequency of the loaded images: a quarter of the box, 7/16 of it, or all; so images are read three times at most."""
    box = state["box"]
    return next(r for r in (min(max(16, box // 4), box // 2 - 1), 7 * box // 16, box // 2 - 1) if r >= inserted_rings(state))


def sample(params: Classify3DParams, state: State) -> float:
    """Share of the particles that a pass uses."""
    if state["phase"] == "single":
        return float(min(1.0, SAMPLE_OF_ONE_MAP / state["count"]))
    coarse = state["phase"] == "search" and not state["fine"]
    return float(min(1.0, SAMPLE_OF_A_CLASS * params.classes / state["count"])) if coarse else 1.0


def held_open(state: State) -> bool:
    """Whether the given maps still keep a least share of the particles."""
    return bool(state["step"] < HELD_OPEN)


def least_totals(params: Classify3DParams, state: State) -> np.ndarray:
    """Least mean posterior of each class while they are held open; decoys take only what fits them better."""
    out = np.zeros(params.classes)
    if state["given"] > 1:
        out[: state["given"]] = 0.5 / params.classes
    return out


def last_ring_with_signal(volume: torch.Tensor) -> int:
    """Last shell of a map that has power: one that was low-passed supports no finer search."""
    shells, weight = half_shells(volume.shape[-1])
    power = shell_sum(torch.fft.rfftn(volume).abs().double() ** 2, shells, weight)[1:]
    there = torch.nonzero(power > _NO_SIGNAL * power.max())
    return int(there[-1]) + 1 if len(there) else 0


def resized(volume: torch.Tensor, rings: int, size: int) -> np.ndarray:
    """A map cut at ``rings``, at another box."""
    return np.asarray(resize_map(cut_map(volume, rings), size).float().cpu().numpy())


def refuse_inverted_maps(state: State) -> None:
    """Refuse a map whose inverse explains the particles better.

    Raises
    ------
    InputError
    """
    for number, (gain, z) in enumerate(state.get("gain_of_contrast", ()), 1):
        if z < -LEAST_Z:
            raise InputError(
                f"map {number} of {state['given']} has the wrong contrast: its inverse explains the particles better, by {-gain:.1f} nats",
                "the map or the images are inverted",
                "multiply the map by -1; if all maps are refused, extract the particles with invert",
            )


# --- maximisation ----------------------------------------------------------------------------------------------------------------
def maximise(params: Classify3DParams, state: State, sums: list[Sums], context: Context) -> tuple[State, Metrics]:
    """The next state from the sums of all blocks."""
    new, phase = {**state, "iteration": state["iteration"] + 1}, state["phase"]
    if phase == "power":
        new["noise_power"] = rf.updated_noise_power(state, sums)
        measured = kept_radius(state)
        new["noise_power"][:, measured + 1 :] = new["noise_power"][:, measured, None]
        return {**new, "phase": "scale"}, {"phase": "noise power"}
    if phase == "scale":
        return _after_scale(params, state, new, sums)
    if phase == "single":
        return _after_single(params, state, new, sums, context), {"phase": phase}
    if phase == "judge":
        return _judged(new, sums), {"phase": phase}
    return _after_search(params, state, new, sums, context)


def _after_scale(params: Classify3DParams, state: State, new: State, sums: list[Sums]) -> tuple[State, Metrics]:
    """Grey scales of the given maps; after the last round the maps of all classes, with decoys."""
    cross, norm = (sum(s[name] for s in sums) for name in ("cross", "norm"))
    old = np.where(state["scale"] > 0, state["scale"], 1.0)
    new["scale"] = np.maximum(cross / (2.0 * np.maximum(norm, 1e-30)), 1e-3 * old)
    new["round"] += 1
    if state["round"] == 0:
        parts = [[{name: s[name][k] for name in ("tested", "gain", "gain_square")} for s in sums] for k in range(state["given"])]
        new["gain_of_contrast"] = np.array([mean_gain(part)[1:] for part in parts])
    if new["round"] == _SCALE_ROUNDS:
        power = new["scale"] ** 2 * norm
        new["scale"] = new["scale"] * np.sqrt(np.maximum(power, _LEAST_POWER * power.max()) / np.maximum(power, 1e-30))
        new |= {"maps": _with_decoys(params, new), "phase": "search"}
    return new, {"phase": "grey scale", "scale": float(new["scale"].max())}


def _with_decoys(params: Classify3DParams, state: State) -> np.ndarray:
    """Maps of both half-sets `(2, class, z, y, x)` on the grey scale of the particles; decoys after the given ones."""
    given = state["maps"][0] * state["scale"][:, None, None, None]
    small, rings = given.shape[-1], state["rings"]
    ball = soft_sphere(small, state["length_angstrom"] / small, state["mask_diameter_angstrom"] / 2, 12.0)
    out = [torch.from_numpy(np.asarray(one, np.float32)) for one in given]
    for number in range(params.classes - len(given)):
        model = out[number % len(given)]
        generator = torch.Generator().manual_seed(params.seed * 100 + number)
        # one ball suffices: it takes empty and unspecific images, the others whatever has detail of its own
        decoy = decoys.featureless(model) if number == 0 else decoys.scrambled(model, ball, generator)
        out.append(cut_map(decoy * ball, rings))
    maps = torch.stack(out).float().numpy()
    return np.stack([maps, maps])


def _after_search(params: Classify3DParams, state: State, new: State, sums: list[Sums], context: Context) -> tuple[State, Metrics]:
    """Noise, shares and maps after a pass, and what comes next."""
    total = max(1, sum(s["count"] for s in sums))
    new["noise_power"] = rf.updated_noise_power(state, sums)
    share = np.asarray(sum(s["share"] for s in sums)) / total
    changed = sum(s["changed"] for s in sums) / total
    new["score"] = sum(s["log_likelihood"] for s in sums) / total
    if not held_open(state):
        new["shares"] = share
    rf.update_shifts(new, sum(s["shift_square"] for s in sums) / total)
    last = state["phase"] == "final"
    if last:
        copies = [{"grid": np.array(s["grid"])} for s in sums]
        new |= {"final_shares": share, **final_class_maps(params, state, copies, inserted_rings(state), context)}
    grids = [[_folded(s["grid"][k], params, context) for s in sums] for k in range(params.classes)]
    supports = [_support(params, state, pair, context) for pair in grids]
    rings = state["rings"] if last else _next_rings(state, supports, share)
    small = rf.map_box(rings, state["box"])
    maps = []
    for k, (pair, support) in enumerate(zip(grids, supports)):
        if share[k] * total < _FEWEST_OF_A_MAP:
            maps.append(np.stack([resized(torch.from_numpy(np.array(old)), rings, small) for old in state["maps"][:, k]]))
        else:
            maps.append(_filtered(state, pair, support, rings, context))
    new |= {"maps": np.stack(maps, 1), "rings": rings, "step": state["step"] + 1}
    new["own_rings"] = np.array([own_rings(state, support, rings) for support in supports])
    new["every_class"] = held_open(new) or view_rings(new) != view_rings(state)
    new["shares_of_step"] = np.concatenate([state["shares_of_step"], share[None]])
    new["changed_of_step"] = np.append(state["changed_of_step"], changed)
    finest = state["length_angstrom"] / max(max(support.last for support in supports), 1)
    new["resolutions_of_step"] = np.append(state["resolutions_of_step"], finest)
    _next_phase(params, state, new, rings > state["rings"], changed)
    metrics = {
        "phase": state["phase"], "scored_angstrom": state["length_angstrom"] / state["rings"], "resolution_angstrom": finest,
        "changed_share": changed, "largest_class": float(share.max()), "log_likelihood": new["score"],
    }  # fmt: skip
    return new, metrics


def _folded(grid: np.ndarray, params: Classify3DParams, context: Context) -> torch.Tensor:
    return fold_half_grid(torch.from_numpy(np.array(grid)).to(context.device), symmetry_operators(params.symmetry or "C1"))


def _support(params: Classify3DParams, state: State, grids: list[torch.Tensor], context: Context) -> Support:
    """What the half-maps of a class support."""
    inserted, sizes = inserted_rings(state), rf.sizes_of(state)
    small = rf.map_box(inserted, sizes.box)
    first, second = (torch.nan_to_num(reconstruct_half(grid, inserted, small, image_box=sizes.box)) for grid in grids)
    radius = 0.95 * sizes.mask_diameter_angstrom / 2
    sphere = soft_sphere(small, sizes.length_angstrom / small, radius, 10.0, device=context.device)
    generator = torch.Generator().manual_seed(params.seed + 7919 * state["iteration"])
    halves = HalfMaps.of(first, second, inserted=inserted, common=state["start_rings"], generator=generator)
    return halves.support(sphere, len(symmetry_operators(params.symmetry or "C1")))


def _next_rings(state: State, supports: list[Support], share: np.ndarray) -> int:
    """Rings of the next pass: those of the finest class that is there, after passes at the resolution of the given maps."""
    if state["step"] + 1 < HELD_OPEN:
        return int(state["start_rings"])
    there = [support for support, size in zip(supports, share) if size > 0.02] or supports
    best = max(there, key=lambda support: support.last)
    if state["fine"]:
        return next_rings(best, inserted=inserted_rings(state), limit=state["finest"] + 1, start=state["start_rings"])
    return int(max(state["start_rings"], min(best.last, drawn_ring(state))))


def own_rings(state: State, support: Support, rings: int) -> int:
    """Last ring of the map of a class."""
    return int(min(rings, max(state["start_rings"], support.last)))


def _filtered(state: State, grids: list[torch.Tensor], support: Support, rings: int, context: Context) -> np.ndarray:
    """Maps of both half-sets `(2, z, y, x)` for the next pass: filtered by their FSC (Wiener), masked, and cut where their support ends.

    Beyond that ring a class has noise only, to which its particles would be aligned while another class has detail there.
    """
    own = own_rings(state, support, rings)
    inserted, sizes = inserted_rings(state), rf.sizes_of(state)
    small = rf.map_box(inserted, sizes.box)
    sphere = soft_sphere(small, sizes.length_angstrom / small, sizes.mask_diameter_angstrom / 2, 12.0, device=context.device)
    trusted = torch.nan_to_num(support.corrected).clamp(1e-4, 0.999)
    trusted[own + 1 :] = 1e-4
    maps = []
    for grid in grids:
        mean = mean_weight(grid, inserted)
        map_ = reconstruct_half(grid, inserted, small, image_box=sizes.box, ssnr=trusted / (1.0 - trusted), mean=mean)
        maps.append(resized(torch.nan_to_num(map_) * sphere, own, rf.map_box(rings, sizes.box)))
    return np.stack(maps)


def _next_phase(params: Classify3DParams, state: State, new: State, finer: bool, changed: float) -> None:
    """Coarse passes until the classes have settled, some with all rings, the last one with everything the images have, then the verdict."""
    step = new["step"]
    if state["phase"] == "final":
        new |= {"phase": "single", "round": 0, "single": new["maps"][:, int(new["final_shares"].argmax())]}
    elif state["fine"]:
        new["fine_passes"] = state["fine_passes"] + 1
        settled = not finer and changed < _SETTLED_FINE
        if settled or new["fine_passes"] >= _MOST_FINE_PASSES or step >= params.iterations:
            new["phase"] = "final"
    elif step >= min(_MOST_PASSES, params.iterations) or (step >= _FEWEST_PASSES and not finer and changed < _SETTLED):
        new |= {"fine": True, "fine_passes": 0}


def _after_single(params: Classify3DParams, state: State, new: State, sums: list[Sums], context: Context) -> State:
    """One map of all particles: it started as that of the largest class."""
    grids = [_folded(s["grid"][0], params, context) for s in sums]
    rings = view_rings(state)
    new["single"] = _filtered(state, grids, _support(params, state, grids, context), rings, context)
    new["round"] += 1
    return {**new, "phase": "single" if new["round"] < _SINGLE_ROUNDS else "judge"}


def _judged(new: State, sums: list[Sums]) -> State:
    """The verdict of the other half-set's maps: gain over a single map, confusion and distance of the classes."""
    _, new["class_gain"], new["class_gain_z"] = mean_gain(sums)
    confused, apart, members = (np.asarray(sum(s[name] for s in sums)) for name in ("confused", "apart", "members"))
    there = members > 0.5
    confusion = np.eye(len(members))
    confusion[there] = confused[there] / confused[there].sum(1, keepdims=True)
    apart = apart / np.maximum(members, 0.5)[:, None]
    separation = np.maximum(0.5 * (apart + apart.T), 0.0)
    np.fill_diagonal(separation, 0.0)
    return {**new, "class3d_confusion": confusion, "class3d_separation": separation, "done": True}
