"""Functions of stage ``classify3d`` with alignment: every particle is aligned to the map of every class.

Poses are drawn from their posterior on a grid of views. The likelihood summed over that grid is the evidence for a class. Once classes
have settled, drawn poses climb to optima at finer rings, and the evidence of a class grows by what its modes gain with these.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cryodask.errors import InputError
from cryodask.kernels import local_search, polar
from cryodask.kernels import views as vw
from cryodask.kernels.classify3d import floored
from cryodask.kernels.half_grid import empty_half_grid, half_volume
from cryodask.kernels.orientations import matrix_to_euler
from cryodask.kernels.projection import cut_map
from cryodask.kernels.randomness import uniforms
from cryodask.kernels.symmetry import symmetry_operators
from cryodask.stage import Columns, Context, ParticleBlock, ParticleSet, State, Sums
from cryodask.stages import _aligned_maps as am
from cryodask.stages import _groups as gr
from cryodask.stages import _refinement as rf
from cryodask.stages._particle_checks import check_particles
from cryodask.stages._refine3d import Loaded, loaded_block
from cryodask.stages._start_map import prepared_map
from cryodask.stages._verdict import gain_sums

if TYPE_CHECKING:
    from cryodask.stages.classify3d import Classify3DParams

FEWEST_OF_A_CLASS = 25
DRAWS = 4
JUDGED_PARTICLES = 600
"""Particles whose evidence under the maps of the other half-set is measured."""
_LEAST_WEIGHT = 0.02
_NATS = 30.0
"""A class whose evidence was this much below the best in a pass at the same resolution is left out for that particle."""
_MOST_RATIO = 1.5
"""Ratio of the sizes of a reference and of the particles' box from which one of the voxel sizes is taken to be wrong."""

halves = 2
maximise = am.maximise


@dataclass(frozen=True)
class Shared:
    """What the blocks of a half-set share: views and padded transforms of the maps of the classes (in ``judge``, those of the other half;
    then, and in ``single``, the map of all particles comes last).
    """

    views: tuple[vw.Views, ...]
    volumes: tuple[torch.Tensor, ...]
    noise_power: torch.Tensor


def start(params: Classify3DParams, particles: ParticleSet, inputs: dict[str, Any]) -> State:
    """State before the first iteration; refuses invalid parameters, particles and maps."""
    fewest = FEWEST_OF_A_CLASS * params.classes
    if particles.count < fewest:
        raise InputError(
            f"{particles.count} particles are too few for {params.classes} classes: at least {fewest} are needed",
            "",
            "pick or keep more particles, or ask for fewer classes",
        )
    check_particles(particles, params.mask_diameter_angstrom)
    box, pixel = particles.box, float(particles.pixel_size_angstrom)
    if box % 2 or box < 16:
        raise InputError(
            f"particles of {box} pixels cannot be aligned",
            "the box is odd or too small",
            "extract them with an even box of 32 pixels or more",
        )
    length = box * pixel
    diameter = params.mask_diameter_angstrom or 0.75 * length
    lowpass = params.lowpass_angstrom or rf.FIRST_ANGSTROM
    finest = min(int(length / params.resolution_angstrom + 1e-6), box // 2 - 2)
    rings = min(int(length / lowpass + 1e-6), finest)
    if rings < 2:
        raise InputError(
            f"references at {lowpass:g} A have only {rings} Fourier shells in a box of {length:.0f} A",
            "lowpass_angstrom or resolution_angstrom is too coarse for the box",
            "set a finer one",
        )
    given, rings = _references(params, particles, inputs, lowpass, diameter, rings)
    shift_range = params.shift_range_angstrom or 0.17 * diameter
    reach = min(12.0, shift_range)
    return {
        "iteration": 0, "phase": "power", "round": 0, "step": 0, "passes": 0, "fine": False, "done": False, "count": particles.count,
        "box": box, "length_angstrom": length, "mask_diameter_angstrom": diameter, "shift_range_angstrom": shift_range,
        "shift_sigma_angstrom": reach / 2, "reach_angstrom": reach, "rings": rings, "start_rings": rings, "finest": finest,
        "every_class": True, "own_rings": np.full(params.classes, rings), "given": len(given), "scale": np.zeros(len(given)),
        "maps": np.stack([given, given]), "single": np.zeros(0, np.float32), "shares": np.full(params.classes, 1.0 / params.classes),
        "shares_of_step": np.zeros((0, params.classes)), "changed_of_step": np.zeros(0), "resolutions_of_step": np.zeros(0),
        **gr.groups_of_set(particles),
    }  # fmt: skip


def _references(
    params: Classify3DParams, particles: ParticleSet, inputs: dict[str, Any], lowpass: float, diameter: float, rings: int
) -> tuple[np.ndarray, int]:
    """The given maps `(map, z, y, x)`, and the rings that all of them have."""
    several = inputs.get("maps_final_map")
    if several:
        given = list(zip(several, inputs["maps_map_pixel_size_angstrom"]))
    else:
        given = [(inputs["final_map"], inputs["map_pixel_size_angstrom"])]
    length = particles.box * float(particles.pixel_size_angstrom)
    out, supported = [], [rings]
    for number, (data, voxel) in enumerate(given, 1):
        name = f"map {number}" if len(given) > 1 else "the starting map"
        data, voxel = np.array(data, np.float32), float(voxel)
        ratio = data.shape[0] * voxel / length
        if voxel > 0 and not 1.0 / _MOST_RATIO <= ratio <= 2.0 * _MOST_RATIO:
            raise InputError(
                f"{name} is {data.shape[0] * voxel:.0f} A wide, the box of the particles {length:.0f} A",
                "a voxel size is wrong, or the map is that of another data set",
                "check the voxel size of the map (import_map) and the pixel size of the particles",
            )
        if 2.2 * voxel > lowpass:
            raise InputError(
                f"{name} has voxels of {voxel:g} A, too coarse for a start at {lowpass:g} A",
                "it was binned for display",
                "give the map before binning, or raise lowpass_angstrom",
            )
        size = {"lowpass_angstrom": lowpass, "mask_diameter_angstrom": diameter, "rings": rings}
        out.append(prepared_map(data, voxel, name, particles, **size, dark=len(given) > 1))  # type: ignore[arg-type]
        supported.append(int(am.last_ring_with_signal(torch.from_numpy(data)) / ratio) if voxel > 0 else rings)
    rings = max(2, min(supported))
    small = rf.map_box(rings, particles.box)
    return np.stack([am.resized(one, rings, small) for one in out]), rings


def cache_key(params: Classify3DParams, state: State) -> int:
    """Highest frequency that is kept."""
    return am.kept_radius(state)


def load(params: Classify3DParams, state: State, block: ParticleBlock, context: Context) -> Loaded:
    """Fourier transforms of a block's images."""
    return loaded_block(state, block, am.kept_radius(state), context)


def prepare(params: Classify3DParams, state: State, half: int, context: Context) -> Shared | None:
    """References of this iteration, made once per worker."""
    phase, device = state["phase"], context.device
    if phase == "power":
        return None
    operators = symmetry_operators(params.symmetry or "C1")
    noise = torch.from_numpy(state["noise_power"]).float().to(device)
    grid = polar.polar_grid(state["box"], rf.polar_rings(state), None, device)
    # the classes share one grid of views: none of them has a view closer to a particle by chance
    turn = rf.grid_turn(state, params.seed, half, len(operators)).to(device)
    rings = am.view_rings(state)
    views = partial(
        vw.make_views, rings=rings, grid=grid, turn=turn, operators=operators, reach_px=rf.reach_px(state), pruned=phase != "scale"
    )
    maps = state["maps"][1 - half if phase == "judge" else half]
    if phase == "judge":
        maps = [*maps, state["single"][1 - half]]
    elif phase == "single":
        maps = state["single"][half][None]
    volumes = [torch.from_numpy(np.array(one)).to(device) for one in maps]
    if phase in ("search", "final"):
        padded = tuple(half_volume(volume, state["rings"] + 1, state["box"]) for volume in volumes)
        return Shared(tuple(views(cut_map(volume, rings)) for volume in volumes), padded, noise)
    return Shared(tuple(views(cut_map(volume, rings)) for volume in volumes), (), noise)


def expect(
    params: Classify3DParams, state: State, shared: Shared | None, block: Loaded, previous: Columns, context: Context
) -> tuple[Sums, Columns]:
    """Sums and columns of one block."""
    count, phase = len(block.index), state["phase"]
    columns = previous or _nothing_known(params, count)
    if shared is None:
        return {**gr.power_by_group(state, block.rows, am.kept_radius(state)), "count": count}, columns
    sigma = state["shift_sigma_angstrom"] / rf.sizes_of(state).pixel_size_angstrom
    if phase == "scale":
        return _scale_sums(state, shared, block, sigma), columns
    lottery = uniforms(params.seed, 1_000_000 + state["step"], block.index, 1)[:, 0]
    if phase == "judge":
        return _judge_sums(state, shared, block, columns, sigma, lottery < JUDGED_PARTICLES / state["count"]), columns
    chosen = np.nonzero(lottery < am.sample(params, state))[0]
    rows = torch.from_numpy(chosen).to(block.rows.values.device)
    if phase == "single":
        return _single_sums(params, state, shared, block, rows, sigma), columns
    return _search_sums(params, state, shared, block, columns, rows, sigma)


def _nothing_known(params: Classify3DParams, count: int) -> Columns:
    return {
        "class_evidence": np.zeros((count, params.classes), np.float32),
        "class3d_number": np.zeros(count, np.int32), "class3d_probability": np.zeros(count, np.float32),
        "rotation": np.tile(np.eye(3, dtype=np.float32), (count, 1, 1)), "origin_angstrom": np.zeros((count, 2), np.float32),
        "log_likelihood": np.zeros(count, np.float32),
    }  # fmt: skip


def _scale_sums(state: State, shared: Shared, block: Loaded, sigma: float) -> Sums:
    """For each given map what its grey scale follows from, and by how much log evidence falls if it is inverted."""
    # half-sets often alternate: take pairs, so that both halves contribute
    chosen = np.nonzero(block.index // 2 % rf.every_for_scale(state) == 0)[0]
    rows = torch.from_numpy(chosen).to(block.rows.values.device)
    found: list[Sums] = []
    for views, scale in zip(shared.views, state["scale"]):
        known = None if state["round"] == 0 else float(scale)
        cross, norm, white = vw.scale_terms(block.polar, rows, views, shared.noise_power, sigma, known)
        found.append({"cross": cross, "norm": norm, **gain_sums(white)})
    return {name: np.array([one[name] for one in found]) for name in found[0]} | {"scaled": len(rows), "count": len(block.index)}


def _uniforms(params: Classify3DParams, state: State, block: Loaded, rows: torch.Tensor, count: int) -> torch.Tensor:
    numbers = uniforms(params.seed, state["iteration"], block.index[rows.cpu().numpy()], count)
    return torch.from_numpy(numbers).to(rows.device)


def _log_shares(shares: np.ndarray, device: torch.device) -> torch.Tensor:
    limited = np.maximum(shares, am.LEAST_SHARE)
    return torch.from_numpy(np.log(limited / limited.sum())).to(device)


@dataclass(frozen=True)
class _Poses:
    """Poses of some particles in one class: drawn ones `(n, draw, ...)` with their shares, the one that is reported, and the log evidence
    of the class `(n,)` float64.
    """

    rotations: torch.Tensor
    shifts_px: torch.Tensor
    shares: torch.Tensor
    rotation: torch.Tensor
    shift_px: torch.Tensor
    evidence: torch.Tensor


def _search_sums(
    params: Classify3DParams, state: State, shared: Shared, block: Loaded, columns: Columns, rows: torch.Tensor, sigma: float
) -> tuple[Sums, Columns]:
    """Align some particles to all classes, and sum them up by their posteriors."""
    chosen, device = rows.cpu().numpy(), rows.device
    numbers = _uniforms(params, state, block, rows, 7 * DRAWS * params.classes).reshape(len(rows), params.classes, 7, DRAWS)
    known = torch.from_numpy(columns["class_evidence"][chosen]).to(device)
    open_ = (known >= known.amax(1, keepdim=True) - _NATS) | bool(state["every_class"])
    evidence, poses = known.double(), []
    for k in range(params.classes):
        some = torch.nonzero(open_[:, k])[:, 0]
        volume, noise = shared.volumes[k], shared.noise_power
        found = _drawn(block, rows[some], shared.views[k], noise, sigma, numbers[some, k, 0])
        if state["fine"] and (state["phase"] == "final" or state["own_rings"][k] > am.view_rings(state)):
            climbed = _climbed(params, state, block, rows[some], found, volume, noise, sigma, numbers[some, k, 1:].transpose(1, 2))
            if state["own_rings"][k] > am.view_rings(state):
                found = climbed
            else:
                # the views show all that this map has; in a blurred one optima are bumps of noise, which would gather the particles
                found = replace(found, rotation=climbed.rotation, shift_px=climbed.shift_px)
        evidence[some, k] = found.evidence
        poses.append((some, found))
    compared = torch.where(open_, evidence, -torch.inf)
    if am.held_open(state):
        posterior = floored(compared, torch.from_numpy(am.least_totals(params, state)).to(device))
    else:
        posterior = torch.softmax(compared + _log_shares(state["shares"], device), 1)
    number = posterior.argmax(1)
    inserted = am.inserted_rings(state)
    grids = [empty_half_grid(inserted, str(device)) for _ in poses]
    sums: Sums = {}
    fresh = {name: np.array(values[chosen]) for name, values in columns.items()}
    pixel = rf.sizes_of(state).pixel_size_angstrom
    shift_square = 0.0
    for k, (some, one) in enumerate(poses):
        weight = posterior[some, k : k + 1].float() * one.shares
        local_search.insert(
            block.rows, rows[some], grids[k], inserted, shared.noise_power, one.rotations, one.shifts_px, weight,
            least=_LEAST_WEIGHT / DRAWS,
        )  # fmt: skip
        mine = torch.nonzero(number[some] == k)[:, 0]
        likeliest = one.shares[mine].argmax(1)
        drawn = one.rotations[mine, likeliest], one.shifts_px[mine, likeliest]
        terms = local_search.shell_terms(block.rows, rows[some[mine]], shared.volumes[k], *drawn, state["rings"], inserted)
        residual = gr.pose_sums(state, block, rows[some[mine]], terms, shared.noise_power)
        sums = {name: sums[name] + values if sums else values for name, values in residual.items()}
        shift_square += float((drawn[1] * pixel).double().square().sum())
        here = some[mine].cpu().numpy()
        fresh["rotation"][here] = one.rotation[mine].cpu().numpy()
        fresh["origin_angstrom"][here] = (one.shift_px[mine] * pixel).cpu().numpy()
        fresh["log_likelihood"][here] = one.evidence[mine].float().cpu().numpy()
    fresh["class_evidence"] = evidence.float().cpu().numpy()
    fresh["class3d_number"] = number.cpu().numpy().astype(np.int32) + 1
    fresh["class3d_probability"] = posterior.amax(1).float().cpu().numpy()
    changed = int((fresh["class3d_number"] != columns["class3d_number"][chosen]).sum())
    columns = {name: np.array(values) for name, values in columns.items()}
    for name, values in fresh.items():
        columns[name][chosen] = values
    sums |= {
        "grid": torch.stack(grids).cpu().numpy(), "share": posterior.sum(0).cpu().numpy(), "changed": changed, "count": len(rows),
        "log_likelihood": float(torch.logsumexp(compared, 1).sum()), "shift_square": shift_square,
    }  # fmt: skip
    return sums, columns


def _drawn(block: Loaded, rows: torch.Tensor, views: vw.Views, noise_power: torch.Tensor, sigma: float, numbers: torch.Tensor) -> _Poses:
    """Poses drawn from the posterior of one class; ``numbers`` `(n, draw)` in [0, 1)."""
    rotations, shifts, evidence = vw.draw(block.polar, rows, views, noise_power, sigma, numbers.contiguous())
    shares = torch.full(shifts.shape[:2], 1.0 / DRAWS, device=rows.device)
    return _Poses(rotations.float(), shifts, shares, rotations[:, 0].float(), shifts[:, 0], evidence.double())


def _climbed(
    params: Classify3DParams, state: State, block: Loaded, rows: torch.Tensor, drawn: _Poses, volume: torch.Tensor,
    noise_power: torch.Tensor, sigma: float, numbers: torch.Tensor,
) -> _Poses:  # fmt: skip
    """Drawn poses climb to the optimum next to each, first with the rings of the views, then with all; then they are drawn about it.

    Optima themselves would fit the noise of their own map, and the best alone would gather the particles of a blurred map in a few views.
    The evidence, summed over the views, grows by the mean over the draws of what each gains with finer rings, widths included (Laplace).
    """
    n = len(rows)
    climb = partial(
        local_search.climb, block.rows, rows.repeat_interleave(DRAWS), volume, noise_power, sigma_px=sigma,
        operators=symmetry_operators(params.symmetry or "C1"), modes=1, least_gain=rf.LOCAL_LEAST_GAIN,
    )  # fmt: skip
    one = torch.ones(n * DRAWS, dtype=torch.int64, device=rows.device)
    start = local_search.Candidates(drawn.rotations.reshape(-1, 1, 3, 3), drawn.shifts_px.reshape(-1, 1, 2), one)
    found = climb(start, [local_search.Climb(am.view_rings(state), 1, 5)])
    gain = torch.zeros(n, DRAWS, dtype=torch.float64, device=rows.device)
    if state["rings"] > am.view_rings(state):
        fine = climb(local_search.Candidates(found.rotations, found.shifts_px, one), [local_search.Climb(state["rings"], 1, 5)])
        gain, found = (fine.total - found.total).reshape(n, DRAWS), fine
    rotations, shifts = found.draw(numbers.reshape(n * DRAWS, 1, 6))
    each, best = torch.arange(n, device=rows.device), found.score.reshape(n, DRAWS).argmax(1)
    return _Poses(
        rotations.reshape(n, DRAWS, 3, 3), shifts.reshape(n, DRAWS, 2), torch.softmax(gain, 1).float(),
        found.rotations.reshape(n, DRAWS, 3, 3)[each, best], found.shifts_px.reshape(n, DRAWS, 2)[each, best],
        drawn.evidence + torch.logsumexp(gain, 1) - np.log(DRAWS),
    )  # fmt: skip


def _single_sums(params: Classify3DParams, state: State, shared: Shared, block: Loaded, rows: torch.Tensor, sigma: float) -> Sums:
    """Grid of one map of all particles, to which the classes are compared."""
    numbers = _uniforms(params, state, block, rows, DRAWS)
    poses = _drawn(block, rows, shared.views[0], shared.noise_power, sigma, numbers)
    radius = am.inserted_rings(state)
    grid = empty_half_grid(radius, str(rows.device))
    local_search.insert(block.rows, rows, grid, radius, shared.noise_power, poses.rotations, poses.shifts_px, poses.shares)
    return {"grid": grid[None].cpu().numpy(), "count": len(rows)}


def _judge_sums(state: State, shared: Shared, block: Loaded, columns: Columns, sigma: float, tested: np.ndarray) -> Sums:
    """How much better the classes of the other half-set explain particles than its single map, and how classes are confused."""
    rows = torch.from_numpy(np.nonzero(tested)[0]).to(block.rows.values.device)
    found = torch.stack([vw.evidence(block.polar, rows, views, shared.noise_power, sigma).double() for views in shared.views], 1)
    classes, single = found[:, :-1], found[:, -1]
    logits = classes + _log_shares(state["shares"], rows.device)
    posterior = torch.softmax(logits, 1)
    number = torch.from_numpy(columns["class3d_number"][rows.cpu().numpy()].astype(np.int64) - 1).to(rows.device)
    assigned = torch.nn.functional.one_hot(number, classes.shape[1]).double()
    apart = 2.0 * (classes[:, :, None] - classes[:, None, :])
    return {
        **gain_sums(torch.logsumexp(logits, 1) - single), "confused": (posterior.T @ assigned).cpu().numpy(),
        "apart": (posterior[:, :, None] * apart).sum(0).cpu().numpy(), "members": posterior.sum(0).cpu().numpy(), "count": len(block.index),
    }  # fmt: skip


def finished(params: Classify3DParams, state: State) -> bool:
    """Whether the last iteration is done; refuses a map of inverted contrast, here because the driver calls it."""
    am.refuse_inverted_maps(state)
    return bool(state["done"])


def result(params: Classify3DParams, state: State, columns: Columns) -> dict[str, Any]:
    """The output of the stage."""
    angles = [torch.rad2deg(a).float().numpy() for a in matrix_to_euler(torch.from_numpy(columns["rotation"]).double())]
    return {
        **{name: columns[name] for name in ("class3d_number", "class3d_probability", "log_likelihood")},
        **dict(zip(("rot_deg", "tilt_deg", "psi_deg"), angles)),
        "origin_y_angstrom": columns["origin_angstrom"][:, 0],
        "origin_x_angstrom": columns["origin_angstrom"][:, 1],
        "map_pixel_size_angstrom": state["length_angstrom"] / state["box"],
        "class3d_share": state["final_shares"],
        "class3d_resolution_angstrom": state["resolutions"],
        "iteration_class_share": state["shares_of_step"],
        "iteration_changed_share": state["changed_of_step"],
        "start_score": np.array([state["score"]]),
        **{n: state[n] for n in ("class_map", "class_half_map", "class3d_separation", "class3d_confusion", "class_gain", "class_gain_z")},
    }
