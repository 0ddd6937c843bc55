"""Functions of stage ``refine3d``: expectation and maximisation of one map in two halves."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cryodask.errors import InputError
from cryodask.kernels import expectation, local_search, polar
from cryodask.kernels import views as vw
from cryodask.kernels.half_grid import empty_half_grid, half_volume
from cryodask.kernels.orientations import matrix_to_euler
from cryodask.kernels.projection import cut_map
from cryodask.kernels.randomness import uniforms
from cryodask.kernels.rows import ImageRows, image_rows
from cryodask.kernels.symmetry import symmetry_operators
from cryodask.kernels.verdict import FIGURES
from cryodask.stage import Columns, Context, ParticleBlock, ParticleSet, State, Sums
from cryodask.stages import _groups as gr
from cryodask.stages import _refined_maps
from cryodask.stages import _refinement as rf
from cryodask.stages._particle_checks import check_particles
from cryodask.stages._start_map import start_map
from cryodask.stages._verdict import explained_sums, gain_sums, refuse_inverted

if TYPE_CHECKING:
    from cryodask.stages.refine3d import Refine3DParams

_FEWEST = 20
halves = 2
maximise = _refined_maps.maximise


@dataclass(frozen=True)
class Loaded:
    """Particles of a block: on polar rings for searches over all views, and as rows for everything else; row of their micrograph."""

    index: np.ndarray
    micrograph: np.ndarray
    polar: expectation.Particles
    rows: ImageRows


@dataclass(frozen=True)
class Shared:
    """What the blocks of a half share in an iteration: views, the volume of local searches, noise power; other maps for the verdict."""

    views: vw.Views | None
    volume: torch.Tensor | None
    noise_power: torch.Tensor
    others: tuple[vw.Views, ...] = ()
    other_volume: torch.Tensor | None = None


def start(params: Refine3DParams, particles: ParticleSet, inputs: dict[str, Any]) -> State:
    """State before the first iteration; refuses invalid parameters and maps."""
    if particles.count < _FEWEST:
        raise InputError(
            f"{particles.count} particles are too few for a refinement in two halves",
            "picking or curation left hardly any",
            f"check the picks and the classes; at least {_FEWEST} are needed, thousands are usual",
        )
    check_particles(particles, params.mask_diameter_angstrom)
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
            f"a starting map at {lowpass:g} A has only {rings} Fourier shells in a box of {length:.0f} A",
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
        "maps": torch.stack([reference, reference]).numpy(), "resolutions": np.zeros(0), "likelihoods": np.zeros(0),
        "certainties": np.zeros(0), **gr.groups_of_set(particles),
    }  # fmt: skip


def cache_key(params: Refine3DParams, state: State) -> int:
    """Highest frequency that is kept; grows twice at most."""
    return rf.kept_radius(state)


def load(params: Refine3DParams, state: State, block: ParticleBlock, context: Context) -> Loaded:
    """Fourier transforms of a block's images."""
    return loaded_block(state, block, rf.kept_radius(state), context)


def loaded_block(state: State, block: ParticleBlock, radius: int, context: Context) -> Loaded:
    """Fourier transforms of a block's images: rows up to ``radius``, and the polar rings of searches over all views."""
    images = torch.from_numpy(np.ascontiguousarray(block.images, np.float32)).to(context.device)
    group = torch.from_numpy(gr.noise_group(state, block.columns)).to(context.device)
    on_rings = expectation.load_particles(
        block.images,
        block.columns,
        block.index,
        pixel_size_angstrom=block.pixel_size_angstrom,
        rings=rf.polar_rings(state),
        mask_radius_angstrom=state["mask_diameter_angstrom"] / 2,
        group=group,
        device=context.device,
    )
    rows = image_rows(images, block.columns, radius, block.pixel_size_angstrom, group)
    return Loaded(block.index, gr.micrograph_rows(state, block.columns), on_rings, rows)


def prepare(params: Refine3DParams, state: State, half: int, context: Context) -> Shared | None:
    """References of this iteration, made once per worker."""
    phase, device = state["phase"], context.device
    if phase == "power":
        return None
    operators = symmetry_operators(params.symmetry or "C1")
    noise = torch.from_numpy(state["noise_power"]).float().to(device)
    grid = polar.polar_grid(state["box"], rf.polar_rings(state), None, device)
    turn = rf.grid_turn(state, params.seed, half, len(operators)).to(device)
    make_views = partial(
        vw.make_views, rings=rf.coarse_rings(state), grid=grid, turn=turn, operators=operators, reach_px=rf.reach_px(state),
        pruned=phase not in ("scale", "verdict"),
    )  # fmt: skip
    if phase in ("verdict", "sort"):
        own, other = (torch.from_numpy(state["maps"][h]).to(device) for h in (half, 1 - half))
        volumes = [half_volume(m, state["rings"] + 1, state["box"]) for m in (own, other)]
        cuts = state["verdict_rings"], min(state["start_rings"], rf.sizes_of(state).ring_of(rf.FIRST_ANGSTROM))
        return Shared(None, volumes[0], noise, tuple(make_views(cut_map(other, rings)) for rings in cuts), volumes[1])
    volume = torch.from_numpy(state["maps"][half]).to(device)
    views = make_views(volume) if phase != "local" or rf.seeks_strays(state) else None
    return Shared(views, None if phase == "scale" else half_volume(volume, state["rings"] + 1, state["box"]), noise)


def expect(
    params: Refine3DParams, state: State, shared: Shared | None, block: Loaded, previous: Columns, context: Context
) -> tuple[Sums, Columns]:
    """Sums and columns of one block."""
    count, phase, device = len(block.index), state["phase"], context.device
    columns = previous or _no_poses(count)
    if shared is None:
        return {**gr.power_by_group(state, block.rows, rf.kept_radius(state)), "count": count}, columns
    block = Loaded(block.index, block.micrograph, *gr.with_contrast(block.polar, block.rows, state["contrast"][block.micrograph]))
    sizes = rf.sizes_of(state)
    sigma = state["shift_sigma_angstrom"] / sizes.pixel_size_angstrom
    if phase == "scale":
        every = rf.every_for_scale(state)
        # half-sets often alternate: take pairs, so that both halves contribute
        rows = torch.from_numpy(np.nonzero(block.index // 2 % every == 0)[0]).to(device)
        known = None if state["round"] == 0 else state["scale"]
        cross, norm, white = vw.scale_terms(block.polar, rows, shared.views, shared.noise_power, sigma, known)  # type: ignore[arg-type]
        return {"cross": cross, "norm": norm, "count": count, **gain_sums(white)}, columns
    if phase == "verdict":
        return _verdict_sums(params, state, shared, block, columns, sigma), columns
    if phase == "sort":
        gain = _gain_of_detail(shared, block, torch.arange(count, device=device), sigma)
        columns = {**columns, "in_map": (gain > 0).cpu().numpy()}
        return {"kept": int(columns["in_map"].sum()), "count": count}, columns
    if phase == "draw":
        return _drawn_sums(params, state, shared, block, columns, sigma, device)
    if rf.seeks_strays(state):
        strays = np.nonzero((columns["log_likelihood"] < state["stray_below"]) & columns["in_map"])[0]
        # the prior has learnt the spread of the others
        anywhere = 0.5 * state["shift_range_angstrom"] / sizes.pixel_size_angstrom
        found = _searched(params, state, shared, block, columns, strays, max(sigma, anywhere))
        columns = _updated(columns, strays, found, sizes.pixel_size_angstrom)
        columns["in_map"] &= columns["log_likelihood"] >= state["foreign_below"]
    chosen = _chosen(params, state, block, columns)
    rows = torch.from_numpy(chosen).to(device)
    if phase == "global":
        found = _searched(params, state, shared, block, columns, chosen, sigma)
    else:
        found = _climbed(params, state, shared, block, rows, _poses_of(columns, chosen, sizes.pixel_size_angstrom, device), sigma)
    columns = _updated(columns, chosen, found, sizes.pixel_size_angstrom)
    poses = found.rotations, found.shifts_px, found.shares
    if phase == "global":
        # optima fit the noise of their own map; poses drawn about them do not
        numbers = torch.from_numpy(uniforms(params.seed, state["iteration"], block.index[chosen], 6 * rf.DRAWS)).to(device)
        drawn = found.draw(numbers.reshape(len(chosen), rf.DRAWS, 6))
        poses = *drawn, torch.full((len(chosen), rf.DRAWS), 1.0 / rf.DRAWS, device=device)
    return _sums(state, shared, block, rows, *poses, columns), columns


def _searched(
    params: Refine3DParams, state: State, shared: Shared, block: Loaded, columns: Columns, chosen: np.ndarray, sigma_px: float
) -> local_search.Modes:
    """Optima that some particles reach from the likeliest of all views, and from their last pose."""
    assert shared.views is not None
    rows = torch.from_numpy(chosen).to(shared.noise_power.device)
    old = _poses_of(columns, chosen, rf.sizes_of(state).pixel_size_angstrom, str(rows.device))
    centres = old.shifts_px[:, 0] if rf.centred(state) else None
    found = vw.start_poses(block.polar, rows, shared.views, shared.noise_power, sigma_px, rf.KEPT_VIEWS, centres)
    # the last pose may lie between the views of the grid
    begin = local_search.Candidates(
        torch.cat([old.rotations[:, :1], found.rotations], 1), torch.cat([old.shifts_px[:, :1], found.shifts_px], 1), found.count + 1
    )
    return _climbed(params, state, shared, block, rows, begin, sigma_px, from_views=True)


def _climbed(
    params: Refine3DParams, state: State, shared: Shared, block: Loaded, rows: torch.Tensor, begin: local_search.Candidates,
    sigma_px: float, *, from_views: bool = False,
) -> local_search.Modes:  # fmt: skip
    """Optima near some start poses: views of a grid, or poses that were optima of the last map."""
    assert shared.volume is not None
    limits = {"nats": local_search.NATS} if from_views else {"nats": 0.5 * local_search.NATS, "least_gain": rf.LOCAL_LEAST_GAIN}
    return local_search.climb(
        block.rows, rows, shared.volume, shared.noise_power, begin, rf.climbs(state, from_views=from_views), sigma_px=sigma_px,
        operators=symmetry_operators(params.symmetry or "C1"), modes=rf.MODES, **limits,
    )  # fmt: skip


def _chosen(params: Refine3DParams, state: State, block: Loaded, columns: Columns) -> np.ndarray:
    """Particles of a block that take part in this part of a pass."""
    parts, sample = rf.parts_of(state), state["sample"] if state["phase"] == "draw" else 1.0
    if parts == 1 and sample == 1.0:
        return np.nonzero(columns["in_map"])[0]
    lottery = uniforms(params.seed, 1_000_000 + state["drawn_passes"] + state["passes"], block.index, 1)[:, 0]
    return np.nonzero((rf.part_of_pass(lottery, parts, sample) == state["part"]) & columns["in_map"])[0]


def _no_poses(count: int) -> Columns:
    return {
        "mode_rotation": np.tile(np.eye(3, dtype=np.float32), (count, rf.MODES, 1, 1)),
        "mode_origin_angstrom": np.zeros((count, rf.MODES, 2), np.float32),
        "mode_count": np.ones(count, np.int8),
        "log_likelihood": np.zeros(count, np.float32),
        "certainty": np.zeros(count, np.float32),
        "in_map": np.ones(count, bool),
    }


def _updated(columns: Columns, chosen: np.ndarray, found: local_search.Modes, pixel: float) -> Columns:
    """Columns with new modes of some particles, in the order of their shares: the width of a mode decides as well as its likelihood."""
    shares = found.shares
    order = torch.argsort(-shares, dim=1, stable=True)
    fresh = {
        "mode_rotation": found.rotations.take_along_dim(order[..., None, None], 1),
        "mode_origin_angstrom": found.shifts_px.take_along_dim(order[..., None], 1) * pixel,
        "mode_count": found.count.to(torch.int8),
        "log_likelihood": found.total.float(),
        "certainty": shares.amax(1),
    }
    columns = {name: np.array(values) for name, values in columns.items()}
    for name, values in fresh.items():
        columns[name][chosen] = values.cpu().numpy()
    return columns


def _poses_of(columns: Columns, chosen: np.ndarray, pixel: float, device: str) -> local_search.Candidates:
    return local_search.Candidates(
        torch.from_numpy(columns["mode_rotation"][chosen]).to(device),
        (torch.from_numpy(columns["mode_origin_angstrom"][chosen]) / pixel).to(device),
        torch.from_numpy(columns["mode_count"][chosen].astype(np.int64)).to(device),
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
    terms = local_search.shell_terms(
        block.rows, rows, shared.volume, rotations[each, best], shifts_px[each, best], state["rings"], inserted
    )
    chosen = rows.cpu().numpy()
    return {
        "grid": grid.cpu().numpy(),
        **gr.pose_sums(state, block, rows, terms, shared.noise_power),
        "count": len(rows),
        "shift_square": float((shifts_px[each, best] * pixel).double().square().sum()),
        "log_likelihood": float(columns["log_likelihood"][chosen].astype(np.float64).sum()),
        "log_likelihood_square": float(np.square(columns["log_likelihood"][chosen], dtype=np.float64).sum()),
        "certainty": float(columns["certainty"][chosen].astype(np.float64).sum()),
    }


def _drawn_sums(
    params: Refine3DParams, state: State, shared: Shared, block: Loaded, columns: Columns, sigma: float, device: str
) -> tuple[Sums, Columns]:
    """One part of a pass with drawn poses."""
    chosen = _chosen(params, state, block, columns)
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


def _verdict_sums(params: Refine3DParams, state: State, shared: Shared, block: Loaded, columns: Columns, sigma: float) -> Sums:
    """Gains of log-likelihood by the detail of the other half's map, for some particles."""
    lottery = uniforms(params.seed, 2_000_000, block.index, 1)[:, 0]
    rows = torch.from_numpy(np.nonzero((lottery < rf.VERDICT_PARTICLES / state["count"]) & columns["in_map"])[0])
    gain = _gain_of_detail(shared, block, rows.to(shared.noise_power.device), sigma)
    assert shared.volume is not None
    assert shared.other_volume is not None
    operators = symmetry_operators(params.symmetry or "C1")
    return {
        **gain_sums(gain), "unhelped": int((gain <= 0).sum()), "count": len(block.index),
        "products": explained_sums(
            state, block.rows, shared.volume, shared.other_volume, shared.noise_power, operators, columns, lottery
        ),
    }  # fmt: skip


def _gain_of_detail(shared: Shared, block: Loaded, rows: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gain of log evidence by the detail of the other half's map, float64 `(rows,)`."""
    whole, cut = (vw.evidence(block.polar, rows, views, shared.noise_power, sigma).double() for views in shared.others)
    return whole - cut


def finished(params: Refine3DParams, state: State) -> bool:
    """Whether the last iteration is done; refuses particles of inverted contrast, here because the driver calls it."""
    refuse_inverted(state)
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
        **{name: state[name] for name in ("fourier_coverage", "succeeded", *FIGURES)},
    }
