"""Functions of stage ``refine3d``: expectation and maximisation of one map in two halves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cryodask.errors import InputError
from cryodask.formats.mrc import read_mrc
from cryodask.kernels import expectation, polar
from cryodask.kernels import projection as pj
from cryodask.kernels.fourier import resize_map, soft_sphere
from cryodask.kernels.maximisation import measure_support, next_rings
from cryodask.kernels.orientations import asymmetric_unit, matrix_to_euler, random_rotations, small_rotation
from cryodask.kernels.randomness import uniforms
from cryodask.kernels.resampling import resample_map
from cryodask.kernels.symmetry import symmetry_operators
from cryodask.stage import Columns, Context, Metrics, ParticleBlock, ParticleSet, State, Sums
from cryodask.stages._refinement import (
    COARSE_ORDER,
    DRAWS,
    GRID_JITTER_RAD,
    KEPT_POSES,
    POSE_COLUMNS,
    POSE_THRESHOLD,
    Shared,
    coarse_rings,
    final_maps,
    inserted_rings,
    kept_radius,
    map_box,
    rings_beyond,
    scale_sums,
    search_levels,
    update_shifts,
    updated_noise_power,
    updated_scale,
)

if TYPE_CHECKING:
    from cryodask.stages.refine3d import Refine3DParams

_FEWEST = 20
halves = 2


def _start_map(params: Refine3DParams, particles: ParticleSet, inputs: dict[str, Any]) -> tuple[np.ndarray, float]:
    """The start map as given, and its voxel size."""
    if params.reference is not None:
        data, voxel = read_mrc(params.reference)
        data = np.array(data, np.float32)
        if data.ndim != 3:
            raise InputError(
                f"{params.reference} is not a three-dimensional map",
                "an image was given as reference",
                "give an MRC map (cubic, voxel size in the header)",
            )
        name = params.reference
    elif inputs.get("final_map") is not None:
        data, voxel, name = np.array(inputs["final_map"], np.float32), float(inputs["map_pixel_size_angstrom"]), "the start map"
    else:
        raise InputError(
            "refine3d has no map to start from",
            "neither a reference file nor an ab initio map was given",
            "set refine3d.reference to an MRC file, or put ab_initio before refine3d",
        )
    if len(set(data.shape)) != 1:
        raise InputError(
            f"{name} is {' x '.join(map(str, data.shape))} voxels, not a cube",
            "the map was cropped",
            "pad it to a cube, with the molecule at the centre",
        )
    if not np.isfinite(data).all() or data.std() == 0:
        raise InputError(
            f"{name} is empty or contains NaN", "the file is damaged, or a failed run wrote it", "check the map and give another"
        )
    if not voxel or voxel <= 0:
        if data.shape[0] != particles.box:
            raise InputError(
                f"{name} has no voxel size, and its box is {data.shape[0]}, not {particles.box}",
                "the program that wrote it left the MRC header empty",
                "write the voxel size into the header (for example with relion_image_handler --rescale_angpix or mrcfile)",
            )
        voxel = particles.pixel_size_angstrom
    return data, voxel


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
    rings = min(int(length / params.lowpass_angstrom + 1e-6), box // 2 - 2)
    if rings < 2:
        raise InputError(
            f"a start map at {params.lowpass_angstrom:g} A has only {rings} Fourier shells in a box of {length:.0f} A",
            "the low-pass is too strong for the box",
            "lower refine3d.lowpass_angstrom",
        )
    data, voxel = _start_map(params, particles, inputs)
    reference = resample_map(torch.from_numpy(data), voxel, box, pixel, cut_angstrom=params.lowpass_angstrom / 2)
    sphere = soft_sphere(box, pixel, diameter / 2, 12.0)
    outside = reference[sphere == 0]
    reference = (reference - (outside.mean() if outside.numel() else 0.0)) * sphere
    # nothing at all beyond the limit, because a soft edge would appear as common signal of the two halves
    reference = resize_map(pj.cut_map(reference, rings), map_box(rings, box))
    shift_range = params.shift_range_angstrom or 0.17 * diameter
    return {
        "iteration": 0, "phase": "power", "round": 0, "searches": 0, "full_searches": 0, "stalled": 0, "done": False,
        "count": particles.count, "box": box, "length_angstrom": length, "mask_diameter_angstrom": diameter,
        "shift_range_angstrom": shift_range, "shift_sigma_angstrom": shift_range / 2, "reach_angstrom": shift_range,
        "recentre": False, "sampling": True, "rings": rings, "start_rings": rings, "scale": 0.0,
        "maps": torch.stack([reference, reference]).numpy(), "noise_power": np.ones(box // 2), "resolutions": np.zeros(0),
    }  # fmt: skip


def cache_key(params: Refine3DParams, state: State) -> int:
    """Highest frequency that is kept; grows in few steps."""
    return kept_radius(state)


def load(params: Refine3DParams, state: State, block: ParticleBlock, context: Context) -> expectation.Particles:
    """Fourier transforms of a block's images."""
    return expectation.load_particles(
        block.images,
        block.columns,
        block.index,
        pixel_size_angstrom=block.pixel_size_angstrom,
        radius=kept_radius(state),
        mask_radius_angstrom=state["mask_diameter_angstrom"] / 2,
        half=block.half,
        device=context.device,
    )


def prepare(params: Refine3DParams, state: State, half: int, context: Context) -> Shared | None:
    """References of this iteration, made once per worker."""
    if state["phase"] == "power":
        return None
    rings = state["rings"]
    radius = kept_radius(state)
    grid = polar.polar_grid(state["box"], radius, None, context.device)
    volume = pj.fourier_volume(torch.from_numpy(state["maps"][half]).to(context.device), rings + 1, state["box"])
    generator = torch.Generator().manual_seed(((params.seed * 1009 + state["searches"]) * 2 + half) & 0x7FFFFFFF)
    # the first grid is rotated at random, later ones a little, so that no view is favoured by lying on the grid
    first = state["searches"] == 0
    turn = random_rotations(1, generator)[0] if first else small_rotation(GRID_JITTER_RAD, generator)
    pixels = asymmetric_unit(COARSE_ORDER, symmetry_operators(params.symmetry or "C1"))
    levels = search_levels(state, rings)
    banks, some = [], pixels
    for level in levels:
        if level.order > COARSE_ORDER:
            some = (some[:, None] * 4 + np.arange(4)).reshape(-1)
        banks.append(expectation.make_bank(volume, level, some, turn, grid, context.device))
    noise = torch.from_numpy(state["noise_power"]).float().to(context.device)
    return Shared(volume, banks, torch.from_numpy(pixels).to(context.device), noise)


def expect(
    params: Refine3DParams, state: State, shared: Shared | None, block: expectation.Particles, previous: Columns, context: Context
) -> tuple[Sums, Columns]:
    """Sums and columns of one block."""
    count = len(block.index)
    columns = {name: np.zeros(count, np.float32) for name in POSE_COLUMNS}
    if shared is None:
        return {"power": block.shell_power.sum(0, dtype=torch.float64).cpu().numpy(), "count": count}, columns
    pixel = state["length_angstrom"] / state["box"]
    sigma = state["shift_sigma_angstrom"] / pixel
    if state["phase"] == "scale":
        return scale_sums(state, shared, block, sigma), columns
    inserted = inserted_rings(state)
    plane = pj.half_plane(inserted, context.device)
    accumulator = pj.empty_accumulator(inserted, context.device)
    residual = torch.zeros(block.radius + 1, dtype=torch.float64, device=context.device)
    draws = torch.from_numpy(uniforms(params.seed, state["searches"], block.index, DRAWS)).to(context.device)
    centres = torch.zeros(count, 2, device=context.device)
    if state["recentre"] and previous:
        centres = torch.from_numpy(np.stack([previous["origin_y_angstrom"], previous["origin_x_angstrom"]], -1) / pixel)
        centres = centres.float().to(context.device)
    rotations, best, origins, likelihood = [], [], [], []
    bank, table = shared.banks[0], expectation.whole_table(shared.banks[0])
    offsets = expectation.shift_grid(bank.level.step_px, bank.level.reach_px, context.device)
    for rows in expectation.chunks(count, bank, len(offsets), context.device):
        if state["sampling"]:
            found = expectation.sample_poses(block, rows, centres[rows], offsets, bank, table, shared.noise_power, sigma, draws[rows])
        else:
            found = expectation.search_poses(
                block, rows, centres[rows], shared.banks, table, shared.pixels, shared.volume, shared.noise_power, sigma,
                poses=KEPT_POSES, threshold=POSE_THRESHOLD,
            )  # fmt: skip
        parts = expectation.weighted_slices(block, rows, found, inserted, shared.noise_power)
        pj.insert_slices(accumulator, parts[0], plane.ky, plane.kx, parts[1], parts[2])
        residual += expectation.residual_power(block, rows, found, shared.volume, state["rings"])
        rotations.append(found.rotations[:, 0])
        best.append(found.best_px * pixel)
        origins.append(found.top_px * pixel)
        likelihood.append(found.log_likelihood)
    angles = [torch.rad2deg(a) for a in matrix_to_euler(torch.cat(rotations))]
    origin = torch.cat(origins)
    values = (*angles, origin[:, 0], origin[:, 1], torch.cat(likelihood))
    columns |= {name: value.float().cpu().numpy() for name, value in zip(POSE_COLUMNS, values)}
    sums = {
        "accumulator": pj.fold_accumulator(accumulator).cpu().numpy(),
        "power": residual.cpu().numpy(),
        "count": count,
        "shift_square": float(torch.cat(best).double().square().sum()),
        "log_likelihood": float(columns["log_likelihood"].astype(np.float64).sum()),
    }
    return sums, columns


def maximise(params: Refine3DParams, state: State, sums: list[Sums], context: Context) -> tuple[State, Metrics]:
    """The next state from the sums of all blocks."""
    new = {**state, "iteration": state["iteration"] + 1}
    total = sum(s["count"] for s in sums)
    if state["phase"] == "scale":
        return updated_scale(new, sums)
    new["noise_power"] = updated_noise_power(state, sum(s["power"] for s in sums) / total)
    if state["phase"] == "power":
        return {**new, "phase": "scale"}, {"phase": "noise power"}
    box, length = state["box"], state["length_angstrom"]
    limit, inserted, scored = box // 2 - 1, inserted_rings(state), state["rings"]
    operators = symmetry_operators(params.symmetry or "C1")
    grids = [pj.unfold_accumulator(torch.from_numpy(s["accumulator"]).to(context.device), operators) for s in sums]
    small = map_box(inserted, box)
    voxel = length / small
    plain = [pj.reconstruct(*g, inserted, small, image_box=box) for g in grids]
    radius = state["mask_diameter_angstrom"] / 2
    support = measure_support(
        plain[0],
        plain[1],
        soft_sphere(small, voxel, 0.95 * radius, 10.0, device=context.device),
        inserted=inserted,
        common=state["start_rings"],
        operators=len(operators),
        generator=torch.Generator().manual_seed(params.seed + 7919 * state["searches"]),
    )
    rings = next_rings(support, inserted=inserted, limit=limit, start=state["start_rings"], scored=scored, beyond=rings_beyond(state))
    trusted = support.corrected.clamp(1e-4, 0.999)
    trusted[rings + 1 :] = 1e-4
    sphere = soft_sphere(small, voxel, radius, 12.0, device=context.device)
    maps = [pj.reconstruct(*g, inserted, small, image_box=box, ssnr=trusted / (1.0 - trusted)) * sphere for g in grids]
    # low-pass AFTER the mask: its smearing beyond the supported shells would be aligned to and come back as resolution
    new["maps"] = torch.stack([resize_map(pj.cut_map(m, rings), map_box(rings, box)) for m in maps]).float().cpu().numpy()
    new["rings"] = rings
    new["searches"] = state["searches"] + 1
    new["full_searches"] = state["full_searches"] + (not state["sampling"])
    new["resolutions"] = np.append(state["resolutions"], length / max(support.last, 1))
    update_shifts(new, sum(s["shift_square"] for s in sums) / total)
    new["stalled"] = 0 if rings > scored else state["stalled"] + 1
    # sampling ends when finer rings need finer views, or when strong particles outgrow the coarse grid before that; for noise, which
    # never supports more than the start map, it never ends
    outgrown = new["stalled"] > 0 and rings > state["start_rings"] + 1
    new["sampling"] = state["sampling"] and rings <= coarse_rings(state) and not outgrown
    if state["sampling"] and not new["sampling"]:
        new["stalled"] = 0
    at_limit = scored >= limit - 1
    # a search without improvement is repeated once, unless enough full ones came before
    patience = 3 if state["sampling"] else 2 if new["full_searches"] < 4 and not at_limit else 1
    new["done"] = new["searches"] >= params.iterations or new["stalled"] >= patience
    metrics = {
        "resolution_angstrom": length / max(support.last, 1),
        "scored_angstrom": length / scored,
        "shift_sigma_angstrom": new["shift_sigma_angstrom"],
        "log_likelihood": sum(s["log_likelihood"] for s in sums) / total,
        "sampling": state["sampling"],
    }
    if new["done"]:
        new.update(final_maps(state, grids, support, inserted))
    return new, metrics


def finished(params: Refine3DParams, state: State) -> bool:
    """Whether the last iteration is done."""
    return bool(state["done"])


def result(params: Refine3DParams, state: State, columns: Columns) -> dict[str, Any]:
    """The output of the stage."""
    curves = {name: state[name] for name in ("fsc_unmasked", "fsc_masked", "fsc_randomised", "fsc_corrected")}
    shells = np.arange(len(curves["fsc_corrected"]))
    return {
        **columns,
        **curves,
        "half_map": state["half_map"],
        "final_map": state["final_map"],
        "map_pixel_size_angstrom": state["length_angstrom"] / state["box"],
        "resolution_angstrom": state["resolution_angstrom"],
        "shell_resolution_angstrom": state["length_angstrom"] / np.maximum(shells, 0.5),
        "iteration_resolution_angstrom": state["resolutions"],
    }
