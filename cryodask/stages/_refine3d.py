"""Functions of stage ``refine3d``: expectation and maximisation of one map in two halves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cryodask.errors import InputError
from cryodask.kernels import expectation, local_search, polar
from cryodask.kernels import views as vw
from cryodask.kernels.fourier import soft_sphere
from cryodask.kernels.half_grid import empty_half_grid, fold_half_grid, half_volume, mean_weight, reconstruct_half
from cryodask.kernels.maximisation import measure_support, next_rings
from cryodask.kernels.orientations import matrix_to_euler, random_rotations, small_rotation
from cryodask.kernels.projection import cut_map
from cryodask.kernels.randomness import uniforms
from cryodask.kernels.rows import ImageRows, image_rows, shell_power
from cryodask.kernels.symmetry import symmetry_operators
from cryodask.kernels.verdict import Evidence
from cryodask.stage import Columns, Context, Metrics, ParticleBlock, ParticleSet, State, Sums
from cryodask.stages import _refinement as rf
from cryodask.stages._start_map import start_map

if TYPE_CHECKING:
    from cryodask.stages.refine3d import Refine3DParams

_FEWEST = 20
halves = 2


@dataclass(frozen=True)
class Loaded:
    """Particles of a block: on polar rings for searches over all views, and as rows for everything else."""

    index: np.ndarray
    polar: expectation.Particles
    rows: ImageRows


@dataclass(frozen=True)
class Shared:
    """What the blocks of a half share in an iteration: views, the volume of local searches, noise power; other maps for the verdict."""

    views: vw.Views | None
    volume: torch.Tensor | None
    noise_power: torch.Tensor
    others: tuple[vw.Views, ...] = ()


def start(params: Refine3DParams, particles: ParticleSet, inputs: dict[str, Any]) -> State:
    """State before the first iteration; refuses invalid parameters and maps."""
    if particles.count < _FEWEST:
        raise InputError(
            f"{particles.count} particles are too few for a refinement in two halves",
            "picking or curation left hardly any",
            f"check the picks and the classes; at least {_FEWEST} are needed, thousands are usual",
        )
    box, pixel = particles.box, float(particles.pixel_size_angstrom)
    if box % 2 or box < 16:
        raise InputError(
            f"particles of {box} pixels cannot be refined",
            "the box is odd or too small",
            "extract them with an even box of 32 pixels or more",
        )
    length = box * pixel
    diameter = params.mask_diameter_angstrom or 0.75 * length
    lowpass = params.lowpass_angstrom or (40.0 if params.reference is not None else rf.FIRST_ANGSTROM)
    rings = min(int(length / lowpass + 1e-6), box // 2 - 2)
    if rings < 2:
        raise InputError(
            f"a start map at {lowpass:g} A has only {rings} Fourier shells in a box of {length:.0f} A",
            "the low-pass is too strong for the box",
            "lower refine3d.lowpass_angstrom",
        )
    reference = start_map(params, particles, inputs, lowpass_angstrom=lowpass, mask_diameter_angstrom=diameter, rings=rings)
    shift_range = params.shift_range_angstrom or 0.17 * diameter
    reach = min(12.0, shift_range)
    return {
        "iteration": 0, "phase": "power", "round": 0, "sorted": False, "done": False, "count": particles.count, "box": box,
        "length_angstrom": length, "mask_diameter_angstrom": diameter, "shift_range_angstrom": shift_range,
        "shift_sigma_angstrom": reach / 2, "reach_angstrom": reach, "rings": rings, "start_rings": rings, "scale": 0.0,
        "maps": torch.stack([reference, reference]).numpy(), "noise_power": np.ones(box // 2), "resolutions": np.zeros(0),
        "likelihoods": np.zeros(0), "certainties": np.zeros(0),
    }  # fmt: skip


def cache_key(params: Refine3DParams, state: State) -> int:
    """Highest frequency that is kept; grows twice at most."""
    return rf.kept_radius(state)


def load(params: Refine3DParams, state: State, block: ParticleBlock, context: Context) -> Loaded:
    """Fourier transforms of a block's images."""
    images = torch.from_numpy(np.ascontiguousarray(block.images, np.float32)).to(context.device)
    on_rings = expectation.load_particles(
        block.images,
        block.columns,
        block.index,
        pixel_size_angstrom=block.pixel_size_angstrom,
        rings=rf.polar_rings(state),
        mask_radius_angstrom=state["mask_diameter_angstrom"] / 2,
        device=context.device,
    )
    return Loaded(block.index, on_rings, image_rows(images, block.columns, rf.kept_radius(state), block.pixel_size_angstrom))


def prepare(params: Refine3DParams, state: State, half: int, context: Context) -> Shared | None:
    """References of this iteration, made once per worker."""
    phase, device = state["phase"], context.device
    if phase == "power":
        return None
    operators = symmetry_operators(params.symmetry or "C1")
    noise = torch.from_numpy(state["noise_power"]).float().to(device)
    grid = polar.polar_grid(state["box"], rf.polar_rings(state), None, device)
    generator = torch.Generator().manual_seed(((params.seed * 1009 + state["iteration"]) * 2 + half) & 0x7FFFFFFF)
    jitter = rf.grid_jitter_rad(state, len(operators))
    turn = (random_rotations(1, generator)[0] if jitter is None else small_rotation(jitter, generator)).to(device)
    make_views = partial(
        vw.make_views, rings=rf.coarse_rings(state), grid=grid, turn=turn, operators=operators, reach_px=rf.reach_px(state),
        pruned=phase not in ("scale", "verdict"),
    )  # fmt: skip
    if phase in ("verdict", "sort"):
        other = torch.from_numpy(state["maps"][1 - half]).to(device)
        cuts = state["verdict_rings"], min(state["start_rings"], rf.sizes_of(state).ring_of(rf.FIRST_ANGSTROM))
        return Shared(None, None, noise, tuple(make_views(cut_map(other, rings)) for rings in cuts))
    volume = torch.from_numpy(state["maps"][half]).to(device)
    views = None if phase == "local" else make_views(volume)
    return Shared(views, None if phase == "scale" else half_volume(volume, state["rings"] + 1, state["box"]), noise)


def expect(
    params: Refine3DParams, state: State, shared: Shared | None, block: Loaded, previous: Columns, context: Context
) -> tuple[Sums, Columns]:
    """Sums and columns of one block."""
    count, phase, device = len(block.index), state["phase"], context.device
    columns = previous or _no_poses(count)
    if shared is None:
        return {"power": shell_power(block.rows, rf.kept_radius(state)).cpu().numpy(), "count": count}, columns
    sizes = rf.sizes_of(state)
    sigma = state["shift_sigma_angstrom"] / sizes.pixel_size_angstrom
    if phase == "scale":
        every = rf.every_for_scale(state)
        # half-sets often alternate: take pairs, so that both halves contribute
        rows = torch.from_numpy(np.nonzero(block.index // 2 % every == 0)[0]).to(device)
        known = None if state["round"] == 0 else state["scale"]
        cross, norm = vw.scale_terms(block.polar, rows, shared.views, shared.noise_power, sigma, known)  # type: ignore[arg-type]
        return {"cross": cross, "norm": norm, "count": count}, columns
    centres = float(rf.centred(state)) * _poses_of(columns, sizes.pixel_size_angstrom, device).shifts_px[:, 0]
    if phase == "verdict":
        return _verdict_sums(params, state, shared, block, columns, sigma, centres), columns
    if phase == "sort":
        gain = _gain_of_detail(shared, block, torch.arange(count, device=device), sigma, centres)
        columns = {**columns, "in_map": (gain > 0).cpu().numpy()}
        return {"kept": int(columns["in_map"].sum()), "count": count}, columns
    if phase == "draw":
        return _drawn_sums(params, state, shared, block, columns, sigma, device)
    chosen = np.nonzero(columns["in_map"])[0]
    rows = torch.from_numpy(chosen).to(device)
    old = _poses_of({name: values[chosen] for name, values in columns.items()}, sizes.pixel_size_angstrom, device)
    if phase == "global":
        assert shared.views is not None
        start_poses = vw.start_poses(block.polar, rows, shared.views, shared.noise_power, sigma, rf.KEPT_VIEWS, centres[rows])
        # the last pose may lie between the views of the grid
        start_poses = local_search.Candidates(
            torch.cat([old.rotations[:, :1], start_poses.rotations], 1),
            torch.cat([old.shifts_px[:, :1], start_poses.shifts_px], 1),
            start_poses.count + 1,
        )
        limits = {"nats": local_search.NATS}
    else:
        start_poses, limits = old, {"nats": 0.5 * local_search.NATS, "least_gain": rf.LOCAL_LEAST_GAIN}
    assert shared.volume is not None
    found = local_search.climb(
        block.rows, rows, shared.volume, shared.noise_power, start_poses, rf.climbs(state), sigma_px=sigma,
        operators=symmetry_operators(params.symmetry or "C1"), modes=rf.MODES, **limits,
    )  # fmt: skip
    shares = found.shares
    fresh = _likeliest_first({
        "mode_rotation": found.rotations.cpu().numpy(),
        "mode_origin_angstrom": (found.shifts_px * sizes.pixel_size_angstrom).cpu().numpy(),
        "mode_count": found.count.cpu().numpy().astype(np.int8),
        "log_likelihood": found.total.float().cpu().numpy(),
        "certainty": shares.amax(1).cpu().numpy(),
    }, shares.cpu().numpy())  # fmt: skip
    columns = {name: np.array(values) for name, values in columns.items()}
    for name, values in fresh.items():
        columns[name][chosen] = values
    return _sums(state, shared, block, rows, found.rotations, found.shifts_px, shares, columns), columns


def _no_poses(count: int) -> Columns:
    return {
        "mode_rotation": np.tile(np.eye(3, dtype=np.float32), (count, rf.MODES, 1, 1)),
        "mode_origin_angstrom": np.zeros((count, rf.MODES, 2), np.float32),
        "mode_count": np.ones(count, np.int8),
        "log_likelihood": np.zeros(count, np.float32),
        "certainty": np.zeros(count, np.float32),
        "in_map": np.ones(count, bool),
    }


def _likeliest_first(columns: Columns, shares: np.ndarray) -> Columns:
    """Modes in the order of their shares, which the width of a mode decides as well as its likelihood."""
    order = np.argsort(-shares, axis=1, kind="stable")
    return {
        **columns,
        "mode_rotation": np.take_along_axis(columns["mode_rotation"], order[..., None, None], 1),
        "mode_origin_angstrom": np.take_along_axis(columns["mode_origin_angstrom"], order[..., None], 1),
    }


def _poses_of(columns: Columns, pixel: float, device: str) -> local_search.Candidates:
    return local_search.Candidates(
        torch.from_numpy(np.array(columns["mode_rotation"])).to(device),
        (torch.from_numpy(np.array(columns["mode_origin_angstrom"])) / pixel).to(device),
        torch.from_numpy(columns["mode_count"].astype(np.int64)).to(device),
    )


def _sums(
    state: State, shared: Shared, block: Loaded, rows: torch.Tensor, rotations: torch.Tensor, shifts_px: torch.Tensor,
    shares: torch.Tensor, columns: Columns,
) -> Sums:  # fmt: skip
    """Grid, residual power and means of some particles at weighted poses `(n, pose, ...)`."""
    inserted, pixel = rf.inserted_rings(state), rf.sizes_of(state).pixel_size_angstrom
    grid = empty_half_grid(inserted, str(rows.device))
    local_search.insert(block.rows, rows, grid, inserted, shared.noise_power, rotations, shifts_px, shares)
    best = shares.argmax(1)
    each = torch.arange(len(rows), device=rows.device)
    assert shared.volume is not None
    power = (
        local_search.residual_power(block.rows, rows, shared.volume, rotations[each, best], shifts_px[each, best], state["rings"], inserted)
        if len(rows)
        else torch.zeros(1, inserted + 1, dtype=torch.float64)
    )
    chosen = rows.cpu().numpy()
    return {
        "grid": grid.cpu().numpy(),
        "power": power.sum(0).cpu().numpy(),
        "count": len(rows),
        "shift_square": float((shifts_px[each, best] * pixel).double().square().sum()),
        "log_likelihood": float(columns["log_likelihood"][chosen].astype(np.float64).sum()),
        "certainty": float(columns["certainty"][chosen].astype(np.float64).sum()),
    }


def _drawn_sums(
    params: Refine3DParams, state: State, shared: Shared, block: Loaded, columns: Columns, sigma: float, device: str
) -> tuple[Sums, Columns]:
    """One part of a pass with drawn poses."""
    lottery = uniforms(params.seed, 1_000_000 + state["drawn_passes"], block.index, 1)[:, 0]
    mine = rf.part_of_pass(lottery, state["parts"], state["sample"]) == state["part"]
    chosen = np.nonzero(mine & columns["in_map"])[0]
    rows = torch.from_numpy(chosen).to(device)
    numbers = torch.from_numpy(uniforms(params.seed, state["iteration"], block.index[chosen], rf.DRAWS)).to(device)
    assert shared.views is not None
    rotations, shifts, evidence = vw.draw(block.polar, rows, shared.views, shared.noise_power, sigma, numbers)
    columns = {name: np.array(values) for name, values in columns.items()}
    columns["mode_rotation"][chosen, 0] = rotations[:, 0].cpu().numpy()
    columns["mode_origin_angstrom"][chosen, 0] = (shifts[:, 0] * rf.sizes_of(state).pixel_size_angstrom).cpu().numpy()
    columns["log_likelihood"][chosen] = evidence.cpu().numpy()
    shares = torch.full(rotations.shape[:2], 1.0 / rf.DRAWS, device=device)
    return _sums(state, shared, block, rows, rotations, shifts, shares, columns), columns


def _verdict_sums(
    params: Refine3DParams, state: State, shared: Shared, block: Loaded, columns: Columns, sigma: float, centres: torch.Tensor
) -> Sums:
    """Gains of log-likelihood by the detail of the other half's map, for some particles."""
    lottery = uniforms(params.seed, 2_000_000, block.index, 1)[:, 0]
    rows = torch.from_numpy(np.nonzero((lottery < rf.VERDICT_PARTICLES / state["count"]) & columns["in_map"])[0])
    gain = _gain_of_detail(shared, block, rows.to(centres.device), sigma, centres)
    return {
        "tested": len(rows), "gain": float(gain.sum()), "gain_square": float(gain.square().sum()), "unhelped": int((gain <= 0).sum()),
        "count": len(block.index),
    }  # fmt: skip


def _gain_of_detail(shared: Shared, block: Loaded, rows: torch.Tensor, sigma: float, centres: torch.Tensor) -> torch.Tensor:
    """Gain of log evidence by the detail of the other half's map, float64 `(rows,)`."""
    whole, cut = (vw.evidence(block.polar, rows, views, shared.noise_power, sigma, centres[rows]).double() for views in shared.others)
    return whole - cut


def maximise(params: Refine3DParams, state: State, sums: list[Sums], context: Context) -> tuple[State, Metrics]:
    """The next state from the sums of all blocks."""
    new = {**state, "iteration": state["iteration"] + 1}
    total = max(1, sum(s["count"] for s in sums))
    phase = state["phase"]
    if phase == "scale":
        return rf.updated_scale(new, sums)
    if phase == "verdict":
        return _judged(new, sums)
    if phase == "sort":
        kept = sum(s["kept"] for s in sums)
        # where poses were certain in spite of the junk, the map only has to be made again without it
        again = {"phase": "local", "stalled": 0, "checked": True} if state["pose_certainty"] >= rf.SURE else rf.beginning(state, kept)
        return {**new, **again, "sorted": True}, {"phase": "sort", "kept": kept, "left_out": total - kept}
    if phase == "power":
        new["noise_power"] = rf.updated_noise_power(state, sum(s["power"] for s in sums) / total)
        measured = rf.kept_radius(state)
        new["noise_power"][measured + 1 :] = new["noise_power"][measured]
        return {**new, "phase": "scale"}, {"phase": "noise power"}
    sizes = rf.sizes_of(state)
    inserted = rf.inserted_rings(state)
    operators = symmetry_operators(params.symmetry or "C1")
    drawn = phase == "draw"
    new["noise_power"] = rf.updated_noise_power(state, sum(s["power"] for s in sums) / total, 0.3 if drawn else 1.0)
    grids = [fold_half_grid(torch.from_numpy(s["grid"]).to(context.device), operators) for s in sums]
    if drawn:
        grids = _remembered(state, grids)
        new["grids"] = torch.stack(grids).cpu().numpy()
    small = rf.map_box(inserted, sizes.box)
    means = [mean_weight(grid, inserted) for grid in grids]
    first, second = (reconstruct_half(grid, inserted, small, image_box=sizes.box, mean=mean) for grid, mean in zip(grids, means))
    support = measure_support(
        first,
        second,
        soft_sphere(small, sizes.length_angstrom / small, 0.95 * sizes.mask_diameter_angstrom / 2, 10.0, device=context.device),
        inserted=inserted,
        common=state["start_rings"],
        operators=len(operators),
        generator=torch.Generator().manual_seed(params.seed + 7919 * state["iteration"]),
    )
    del first, second
    if drawn:
        rings = max(state["start_rings"], min(support.last, sizes.ring_of(rf.DRAWN_ANGSTROM)))
    else:
        rings = next_rings(support, inserted=inserted, limit=sizes.last, start=state["start_rings"])
    new["rings"] = rings
    new["maps"] = rf.updated_maps(state, grids, means, support, inserted, rings)
    new["resolutions"] = np.append(state["resolutions"], sizes.length_angstrom / max(support.last, 1))
    rf.update_shifts(new, sum(s["shift_square"] for s in sums) / total)
    new["mean_log_likelihood"] = sum(s["log_likelihood"] for s in sums) / total
    new["certainty"] = sum(s["certainty"] for s in sums) / total
    new["likelihoods"] = np.append(state["likelihoods"], new["mean_log_likelihood"])
    new["certainties"] = np.append(state["certainties"], math.nan if drawn else new["certainty"])
    rf.next_phase(state, new, iterations=params.iterations)
    if new["phase"] != "draw":
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


def _remembered(state: State, fresh: list[torch.Tensor]) -> list[torch.Tensor]:
    """Grids of a drawn part, with those of the parts before it, which are forgotten exponentially."""
    if not len(state["grids"]):
        return fresh
    done = state["drawn_passes"] * state["parts"] + state["part"] + 1
    rate = 1.0 / min(max(1.0, 0.5 * done), rf.MEMORY, max(1, state["parts"]))
    old = [torch.from_numpy(np.array(grid)).to(new.device) for grid, new in zip(state["grids"], fresh)]
    return [before.add_(now - before, alpha=rate) for before, now in zip(old, fresh)]


def _judged(new: State, sums: list[Sums]) -> tuple[State, Metrics]:
    """The verdict on the final maps; without its support the resolution is that of the start."""
    tested = max(1, sum(s["tested"] for s in sums))
    gain, square = (sum(s[name] for s in sums) / tested for name in ("gain", "gain_square"))
    deviation = math.sqrt(max(square - gain * gain, 0.0) / tested)
    found = Evidence(new["pose_certainty"], gain, gain / (deviation + 1e-9))
    new |= {"succeeded": found.succeeded, "held_out_gain": found.gain, "held_out_z": found.z, "done": True}
    unhelped = sum(s["unhelped"] for s in sums) / tested
    if not new["sorted"] and rf.JUNK_SHARE < unhelped < 1.0 - rf.JUNK_SHARE and not math.isnan(new["pose_certainty"]):
        return {**new, "phase": "sort", "done": False}, {"phase": "verdict", "unhelped": unhelped}
    if not found.succeeded:
        new["resolution_angstrom"] = new["length_angstrom"] / new["start_rings"]
    return new, {"phase": "verdict", "succeeded": found.succeeded, "held_out_gain": found.gain, "held_out_z": found.z}


def finished(params: Refine3DParams, state: State) -> bool:
    """Whether the last iteration is done."""
    return bool(state["done"])


def result(params: Refine3DParams, state: State, columns: Columns) -> dict[str, Any]:
    """The output of the stage."""
    curves = {name: state[name] for name in ("fsc_unmasked", "fsc_masked", "fsc_randomised", "fsc_corrected")}
    shells = np.arange(len(curves["fsc_corrected"]))
    angles = [torch.rad2deg(a).float().numpy() for a in matrix_to_euler(torch.from_numpy(columns["mode_rotation"][:, 0]).double())]
    origins = columns["mode_origin_angstrom"][:, 0]
    return {
        **dict(zip(("rot_deg", "tilt_deg", "psi_deg"), angles)),
        "origin_y_angstrom": origins[:, 0].astype(np.float32),
        "origin_x_angstrom": origins[:, 1].astype(np.float32),
        "log_likelihood": columns["log_likelihood"],
        "in_map": columns["in_map"],
        **curves,
        "half_map": state["half_map"],
        "final_map": state["final_map"],
        "map_pixel_size_angstrom": state["length_angstrom"] / state["box"],
        "resolution_angstrom": state["resolution_angstrom"],
        "shell_resolution_angstrom": state["length_angstrom"] / np.maximum(shells, 0.5),
        "iteration_resolution_angstrom": state["resolutions"],
        "iteration_log_likelihood": state["likelihoods"],
        "iteration_certainty": state["certainties"],
        **{name: state[name] for name in ("succeeded", "pose_certainty", "held_out_gain", "held_out_z")},
    }
