"""Refinement of one map against particles, in two independent halves."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from pydantic import Field
from torch import Tensor

from cryodask.errors import InputError
from cryodask.kernels import expectation, polar
from cryodask.kernels import projection as pj
from cryodask.kernels.fourier import resize_map, soft_sphere
from cryodask.kernels.maximisation import crossing, measure_support, next_rings
from cryodask.kernels.orientations import (
    asymmetric_unit,
    healpix_step_rad,
    matrix_to_euler,
    random_rotations,
    small_rotation,
)
from cryodask.kernels.randomness import uniforms
from cryodask.kernels.resampling import resample_map
from cryodask.kernels.symmetry import symmetry_operators
from cryodask.stage import Columns, InputFile, Metrics, Params, ParticleBlock, ParticleSet, Picture, State, Sums, stage

COARSE_ORDER = 3
FINEST_ORDER = 5
GRID_JITTER_RAD = 0.04
SCALE_ROUNDS = 4
SCALE_PARTICLES = 240
DRAWS = 6
KEPT_POSES = 4
POSE_THRESHOLD = 0.03
INSERT_BEYOND_ANGSTROM = 28.0
"""Slices are inserted so many cycles a box beyond the scored rings: box length / 28 A, at least 8."""
PARTICLE_SHARE = 0.9
"""A particle is taken to fill this share of its mask when angular steps are translated into resolution."""
POSE_COLUMNS = ("rot_deg", "tilt_deg", "psi_deg", "origin_y_angstrom", "origin_x_angstrom", "log_likelihood")
MAP_MARGIN = 8
"""Shells by which the box of a travelling map exceeds its content: masks widen spectra, and a tighter box would alias."""


class Refine3DParams(Params):
    """Parameters of ``refine3d``."""

    symmetry: str = Field("C1", description="point group as RELION names it: C1, C4, D2, T, O, I ...")
    reference: InputFile | None = Field(None, description="start map, an MRC file; by default the initial map of an earlier stage")
    lowpass_angstrom: float = Field(40.0, gt=0, description="resolution to which the start map is cut, Angstrom")
    mask_diameter_angstrom: float | None = Field(
        None, gt=0, description="diameter of the soft spherical mask, Angstrom; by default 0.75 of the box"
    )
    shift_range_angstrom: float | None = Field(
        None, gt=0, description="largest shift of a particle from its pick, Angstrom; by default 0.17 of the mask's diameter"
    )
    iterations: int = Field(14, ge=1, description="most iterations of the search; it ends earlier when resolution stands still")
    seed: int = Field(0, description="seed of all random numbers")


@dataclass(frozen=True)
class Shared:
    """What the blocks of a half share in an iteration."""

    volume: pj.FourierVolume
    banks: list[expectation.Bank]
    pixels: Tensor
    noise_power: Tensor


def _map_box(rings: int, box: int) -> int:
    """Even box of a map that holds frequencies up to ``rings``."""
    return min(box, 2 * (rings + MAP_MARGIN))


def _beyond(state: State) -> int:
    """Shells inserted beyond the scored rings."""
    return max(8, round(state["length_angstrom"] / INSERT_BEYOND_ANGSTROM))


def _inserted(state: State) -> int:
    """Highest shell inserted in this iteration."""
    return min(state["box"] // 2 - 1, state["rings"] + _beyond(state))


def _kept_radius(state: State) -> int:
    """Highest frequency of the loaded blocks: grows in steps of 16, so that they are seldom made again."""
    return min(state["box"] // 2 - 1, 16 * math.ceil(_inserted(state) / 16))


def _levels(state: State, rings: int) -> list[expectation.Level]:
    """Levels of the search up to ``rings``: angular steps, ring limits and shifts fit one another.

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


def _start_map(params: Refine3DParams, particles: ParticleSet, inputs: dict[str, Any]) -> tuple[np.ndarray, float]:
    """The start map as given and its voxel size."""
    if params.reference is not None:
        import mrcfile

        with mrcfile.open(params.reference, permissive=True) as f:
            if f.data is None or f.data.ndim != 3:
                raise InputError(
                    f"{params.reference} is not a map of three dimensions",
                    "an image stack or a damaged file was given as reference",
                    "give an MRC map (mode 2, cubic, voxel size in the header)",
                )
            data, voxel = np.array(f.data, np.float32), float(f.voxel_size.x)
        name = params.reference
    elif inputs.get("initial_map") is not None:
        data, voxel, name = np.array(inputs["initial_map"], np.float32), float(inputs["map_pixel_size_angstrom"]), "the initial map"
    else:
        raise InputError(
            "refine3d has no map to start from",
            "neither a reference file nor an ab initio map was given",
            "set refine3d.reference to an MRC file, or put ab_initio before refine3d",
        )
    if len(set(data.shape)) != 1:
        raise InputError(
            f"{name} is {' x '.join(map(str, data.shape))} voxels, not a cube", "a cropped or masked map", "pad it to a cube, molecule in the middle"
        )
    if not np.isfinite(data).all() or data.std() == 0:
        raise InputError(f"{name} is empty or holds NaN", "a damaged file, or a run that failed", "look at the map and give another")
    if voxel <= 0:
        if data.shape[0] != particles.box:
            raise InputError(
                f"{name} gives no voxel size, and its box is {data.shape[0]}, not {particles.box}",
                "the program that wrote it left the MRC header empty",
                "write the voxel size into the header (for example with relion_image_handler --rescale_angpix or mrcfile)",
            )
        voxel = particles.pixel_size_angstrom
    return data, voxel


@stage(
    version=1,
    shape="blocks",
    needs=["particle_image"],
    optional=["initial_map", "map_pixel_size_angstrom"],
    gives=[
        "half_map", "final_map", "map_pixel_size_angstrom", "rot_deg", "tilt_deg", "psi_deg", "origin_y_angstrom", "origin_x_angstrom",
        "log_likelihood", "half_set", "resolution_angstrom", "fsc_unmasked", "fsc_masked", "fsc_randomised", "fsc_corrected",
        "shell_resolution_angstrom", "iteration_resolution_angstrom",
    ],
    params=Refine3DParams,
)  # fmt: skip
class refine3d:
    """Refines a map against the particles, in two halves that never meet (gold standard).

    Expectation maximisation over orientations, in-plane angles and shifts with Gaussian noise per Fourier ring (Scheres 2012, J. Mol.
    Biol. 415, 406). Every iteration searches all orientations. While only coarse rings are used, poses are drawn from the whole
    posterior, which keeps noise from being aligned to the start map; then the best ones are refined over three levels. The grey scale
    of the start map and the spread of the shifts are estimated from the data. Slices are inserted well beyond the rings that were
    scored, so that the correlation of the half-maps there is honest; it alone decides how far the next iteration looks. The
    correlation below the low-pass limit of the start map is high by construction.
    """

    halves = 2

    @staticmethod
    def start(params: Refine3DParams, particles: ParticleSet, inputs: dict[str, Any]) -> State:
        symmetry_operators(params.symmetry)
        box, pixel = particles.box, float(particles.pixel_size_angstrom)
        if box % 2 or box < 16:
            raise InputError(
                f"particles of {box} pixels cannot be refined", "an odd or tiny box", "extract them with an even box of 32 pixels or more"
            )
        length = box * pixel
        diameter = params.mask_diameter_angstrom or 0.75 * length
        rings = min(int(length / params.lowpass_angstrom + 1e-6), box // 2 - 2)
        if rings < 2:
            raise InputError(
                f"a start map at {params.lowpass_angstrom:g} A holds {rings} Fourier shells in a box of {length:.0f} A",
                "the low-pass is too strong for the box",
                "lower refine3d.lowpass_angstrom",
            )
        data, voxel = _start_map(params, particles, inputs)
        reference = resample_map(torch.from_numpy(data), voxel, box, pixel, cut_angstrom=params.lowpass_angstrom / 2)
        sphere = soft_sphere(box, pixel, diameter / 2, 12.0)
        outside = reference[sphere == 0]
        reference = (reference - (outside.mean() if outside.numel() else 0.0)) * sphere
        # strictly nothing beyond the limit: a soft edge would show up as common signal of the two halves
        reference = resize_map(pj.cut_map(reference, rings), _map_box(rings, box))
        shift_range = params.shift_range_angstrom or 0.17 * diameter
        return {
            "iteration": 0, "phase": "power", "round": 0, "searches": 0, "full_searches": 0, "stalled": 0, "done": False,
            "count": particles.count, "box": box, "length_angstrom": length, "mask_diameter_angstrom": diameter,
            "shift_range_angstrom": shift_range, "shift_sigma_angstrom": shift_range / 2, "reach_angstrom": shift_range,
            "recentre": False, "sampling": True, "rings": rings, "start_rings": rings, "scale": 0.0,
            "maps": torch.stack([reference, reference]).numpy(), "noise_power": np.ones(box // 2), "resolutions": np.zeros(0),
        }  # fmt: skip

    @staticmethod
    def cache_key(params: Refine3DParams, state: State) -> int:
        """Highest frequency that is kept: grows in few steps."""
        return _kept_radius(state)

    @staticmethod
    def load(params: Refine3DParams, state: State, block: ParticleBlock, device: str) -> expectation.Particles:
        return expectation.load_particles(
            block.images,
            block.columns,
            block.index,
            pixel_size_angstrom=block.pixel_size_angstrom,
            radius=_kept_radius(state),
            mask_radius_angstrom=state["mask_diameter_angstrom"] / 2,
            half=block.half,
            device=device,
        )

    @staticmethod
    def prepare(params: Refine3DParams, state: State, half: int, device: str) -> Shared | None:
        if state["phase"] == "power":
            return None
        rings = state["rings"]
        radius = _kept_radius(state)
        grid = polar.polar_grid(state["box"], radius, None, device)
        volume = pj.fourier_volume(torch.from_numpy(state["maps"][half]).to(device), rings + 1, state["box"])
        generator = torch.Generator().manual_seed(((params.seed * 1009 + state["searches"]) * 2 + half) & 0x7FFFFFFF)
        # the first grid is turned at random, later ones a little: no view is favoured by lying on the grid
        first = state["searches"] == 0
        turn = random_rotations(1, generator)[0] if first else small_rotation(GRID_JITTER_RAD, generator)
        pixels = asymmetric_unit(COARSE_ORDER, symmetry_operators(params.symmetry))
        levels = _levels(state, rings)
        banks, some = [], pixels
        for level in levels:
            if level.order > COARSE_ORDER:
                some = (some[:, None] * 4 + np.arange(4)).reshape(-1)
            banks.append(expectation.make_bank(volume, level, some, turn, grid, device))
        noise = torch.from_numpy(state["noise_power"]).float().to(device)
        return Shared(volume, banks, torch.from_numpy(pixels).to(device), noise)

    @staticmethod
    def expect(
        params: Refine3DParams, state: State, shared: Shared | None, block: expectation.Particles, previous: Columns, device: str
    ) -> tuple[Sums, Columns]:
        count = len(block.index)
        columns = {name: np.zeros(count, np.float32) for name in POSE_COLUMNS}
        columns["half_set"] = np.full(count, block.half, np.int8)
        if shared is None:
            return {"power": block.shell_power.sum(0, dtype=torch.float64).cpu().numpy(), "count": count}, columns
        pixel = state["length_angstrom"] / state["box"]
        sigma = state["shift_sigma_angstrom"] / pixel
        if state["phase"] == "scale":
            return _scale_sums(state, shared, block, sigma), columns
        inserted = _inserted(state)
        plane = pj.half_plane(inserted, device)
        accumulator = pj.empty_accumulator(inserted, device)
        residual = torch.zeros(block.radius + 1, dtype=torch.float64, device=device)
        draws = torch.from_numpy(uniforms(params.seed, state["searches"], block.index, DRAWS)).to(device)
        centres = torch.zeros(count, 2, device=device)
        if state["recentre"] and previous:
            centres = torch.from_numpy(np.stack([previous["origin_y_angstrom"], previous["origin_x_angstrom"]], -1) / pixel)
            centres = centres.float().to(device)
        rotations, origins, likelihood = [], [], []
        bank, table = shared.banks[0], expectation.whole_table(shared.banks[0])
        offsets = expectation.shift_grid(bank.level.step_px, bank.level.reach_px, device)
        for rows in expectation.chunks(count, bank, len(offsets), device):
            if state["sampling"]:
                found = expectation.sample_poses(
                    block, rows, centres[rows], offsets, bank, table, shared.noise_power, sigma, draws[rows]
                )
            else:
                found = expectation.search_poses(
                    block, rows, centres[rows], shared.banks, table, shared.pixels, shared.volume, shared.noise_power, sigma,
                    poses=KEPT_POSES, threshold=POSE_THRESHOLD,
                )  # fmt: skip
            parts = expectation.weighted_slices(block, rows, found, inserted, shared.noise_power)
            pj.insert_slices(accumulator, parts[0], plane.ky, plane.kx, parts[1], parts[2])
            residual += expectation.residual_power(block, rows, found, shared.volume, state["rings"])
            rotations.append(found.rotations[:, 0])
            origins.append(found.best_px * pixel)
            likelihood.append(found.log_likelihood)
        angles = [torch.rad2deg(a) for a in matrix_to_euler(torch.cat(rotations))]
        origin = torch.cat(origins)
        values = (*angles, origin[:, 0], origin[:, 1], torch.cat(likelihood))
        columns |= {name: value.float().cpu().numpy() for name, value in zip(POSE_COLUMNS, values)}
        sums = {
            "accumulator": pj.fold_accumulator(accumulator).cpu().numpy(),
            "power": residual.cpu().numpy(),
            "count": count,
            "shift_square": float(origin.double().square().sum()),
            "log_likelihood": float(columns["log_likelihood"].astype(np.float64).sum()),
        }
        return sums, columns

    @staticmethod
    def maximise(params: Refine3DParams, state: State, sums: list[Sums], device: str) -> tuple[State, Metrics]:
        new = {**state, "iteration": state["iteration"] + 1}
        total = sum(s["count"] for s in sums)
        if state["phase"] == "scale":
            return _next_scale(new, sums)
        new["noise_power"] = _noise_power(state, sum(s["power"] for s in sums) / total)
        if state["phase"] == "power":
            return {**new, "phase": "scale"}, {"phase": "noise power"}
        box, length = state["box"], state["length_angstrom"]
        pixel = length / box
        limit, inserted, scored = box // 2 - 1, _inserted(state), state["rings"]
        operators = symmetry_operators(params.symmetry)
        grids = [pj.unfold_accumulator(torch.from_numpy(s["accumulator"]).to(device), operators) for s in sums]
        small = _map_box(inserted, box)
        voxel = length / small
        plain = [pj.reconstruct(*g, inserted, small, image_box=box) for g in grids]
        radius = state["mask_diameter_angstrom"] / 2
        support = measure_support(
            *plain,
            soft_sphere(small, voxel, 0.95 * radius, 10.0, device=device),
            inserted=inserted,
            common=state["start_rings"],
            operators=len(operators),
            generator=torch.Generator().manual_seed(params.seed + 7919 * state["searches"]),
        )
        rings = next_rings(
            support, inserted=inserted, limit=limit, start=state["start_rings"], scored=scored, beyond=_beyond(state)
        )
        trusted = support.corrected.clamp(1e-4, 0.999)
        trusted[rings + 1 :] = 1e-4
        sphere = soft_sphere(small, voxel, radius, 12.0, device=device)
        maps = [pj.reconstruct(*g, inserted, small, image_box=box, ssnr=trusted / (1.0 - trusted)) * sphere for g in grids]
        # cut AFTER the mask: its smear beyond the supported shells would be aligned to, and would come back as resolution
        new["maps"] = torch.stack([resize_map(pj.cut_map(m, rings), _map_box(rings, box)) for m in maps]).float().cpu().numpy()
        new["rings"] = rings
        new["searches"] = state["searches"] + 1
        new["full_searches"] = state["full_searches"] + (not state["sampling"])
        new["resolutions"] = np.append(state["resolutions"], length / max(support.last, 1))
        _update_shifts(new, sum(s["shift_square"] for s in sums) / total)
        new["stalled"] = 0 if rings > scored else state["stalled"] + 1
        # drawing ends when finer rings need finer views, or when strong particles outgrow the coarse grid before that; noise, which
        # never supports more than the start map, is drawn from to the end
        outgrown = new["stalled"] > 0 and rings > state["start_rings"] + 1
        new["sampling"] = state["sampling"] and rings <= _coarse_rings(state) and not outgrown
        if state["sampling"] and not new["sampling"]:
            new["stalled"] = 0
        at_limit = scored >= limit - 1
        new["done"] = bool(
            new["searches"] >= params.iterations or new["stalled"] >= (3 if state["sampling"] else 2) or (at_limit and new["stalled"] >= 1)
        )
        metrics = {
            "resolution_angstrom": length / max(support.last, 1),
            "scored_angstrom": length / scored,
            "shift_sigma_angstrom": new["shift_sigma_angstrom"],
            "log_likelihood": sum(s["log_likelihood"] for s in sums) / total,
            "sampling": state["sampling"],
        }
        if new["done"]:
            new.update(_final_maps(state, grids, support, inserted, pixel))
        return new, metrics

    @staticmethod
    def finished(params: Refine3DParams, state: State) -> bool:
        return bool(state["done"])

    @staticmethod
    def result(params: Refine3DParams, state: State, columns: Columns) -> dict[str, Any]:
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


def _coarse_rings(state: State) -> int:
    """Rings up to which poses are drawn from the coarse level alone."""
    return _levels({**state, "sampling": True}, state["box"])[0].rings


def _noise_power(state: State, mean_power: np.ndarray) -> np.ndarray:
    """Noise power `(box / 2,)` a shell from the mean of sums over its pixels; shells not measured now keep their value."""
    out = np.array(state["noise_power"])
    radius = len(mean_power) - 1
    pixels = np.bincount(np.minimum(pj.half_plane(radius).shell.numpy(), radius), minlength=radius + 1)
    known = slice(1, min(radius + 1, len(out)))
    out[known] = np.maximum(mean_power[known] / pixels[known], 1e-12)
    out[known.stop :] = out[known.stop - 1] if (out[known.stop :] == 1.0).all() else out[known.stop :]
    out[0] = out[1]
    return out


def _scale_sums(state: State, shared: Shared, block: expectation.Particles, sigma_px: float) -> Sums:
    """Expected cross and norm terms of some particles: what the grey scale of the start map is estimated from."""
    device = str(shared.noise_power.device)
    every = max(1, state["count"] // SCALE_PARTICLES)
    # half-sets often go by parity: pairs are taken, so that both halves have their share
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
        # round 0 knows no scale: its best value is profiled out of every score
        gain = cross.clamp(min=0.0) ** 2 / (4.0 * norm.clamp(min=1e-9)) if state["round"] == 0 else scale * cross - scale**2 * norm
        gain = gain + expectation.shift_log_prior(centres, offsets, sigma_px)[:, :, None, None]
        weight = torch.softmax(gain.reshape(len(rows), -1), 1).reshape(gain.shape)
        sums["cross"] += float((weight * cross).sum())
        sums["norm"] += float((weight * norm).sum())
    return sums


def _next_scale(new: State, sums: list[Sums]) -> tuple[State, Metrics]:
    cross, norm = (sum(s[name] for s in sums) for name in ("cross", "norm"))
    old = new["scale"] or 1.0
    new["scale"] = max(cross / (2.0 * max(norm, 1e-30)), 1e-3 * old) if cross > 0 else 1e-3 * old
    new["round"] += 1
    if new["round"] == SCALE_ROUNDS:
        new["maps"] = (new["maps"] * new["scale"]).astype(np.float32)
        new["phase"] = "search"
    return new, {"phase": "grey scale", "scale": new["scale"]}


def _update_shifts(new: State, mean_square: float) -> None:
    """Spread of the shifts (an axis), and how far and about what the next search looks.

    Drawn shifts must not become centres (they walk away), so searches stay centred on the picks unless these are bad: then they
    follow the best shifts of the last full search.
    """
    sigma = max(math.sqrt(mean_square / 2.0), 2.0)
    new["shift_sigma_angstrom"] = min(sigma, new["shift_range_angstrom"])
    wide = 3.0 * sigma > 0.1 * new["mask_diameter_angstrom"]
    new["recentre"] = wide and new["full_searches"] >= 2
    new["reach_angstrom"] = 0.06 * new["mask_diameter_angstrom"] if new["recentre"] else min(3.0 * sigma, new["shift_range_angstrom"])


def _final_maps(state: State, grids: list[tuple[Tensor, Tensor]], support: Any, inserted: int, pixel: float) -> State:
    """Half-maps, the joint map and the curves of the last iteration, at the particles' own box."""
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


@refine3d.figures
def draw(ds: xr.Dataset) -> Iterator[Picture]:
    """Correlation of the halves, the way there, the map and the views."""
    from cryodask.stages._map_pictures import draw_correlation, draw_iterations, draw_slices, draw_views

    if "fsc_corrected" in ds:
        yield draw_correlation(ds)
    if "iteration_resolution_angstrom" in ds:
        yield draw_iterations(ds["iteration_resolution_angstrom"].values)
    if "final_map" in ds:
        yield draw_slices(ds["final_map"].values, float(ds["map_pixel_size_angstrom"]), "Refined map", "Sections and projections of the refined map, not sharpened.")
    if "rot_deg" in ds:
        yield draw_views(ds["rot_deg"].values, ds["tilt_deg"].values)
