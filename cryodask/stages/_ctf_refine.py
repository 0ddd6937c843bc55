"""Functions of stage ``ctf_refine``: half-maps at known poses, and fits of the CTF against them, in turn."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cryodask.errors import InputError
from cryodask.kernels import aberrations as ab
from cryodask.kernels import ctf_refinement as cr
from cryodask.kernels.ctf import electron_wavelength_angstrom
from cryodask.kernels.fourier import soft_sphere
from cryodask.kernels.fsc import fsc, half_radius, resolution_at
from cryodask.kernels.half_grid import empty_half_grid, fold_half_grid, half_volume, reconstruct_half
from cryodask.kernels.local_search import insert
from cryodask.kernels.orientations import euler_to_matrix
from cryodask.kernels.rows import ImageRows, image_rows, shell_counts
from cryodask.kernels.symmetry import symmetry_operators
from cryodask.stage import Columns, Context, Metrics, ParticleBlock, ParticleSet, State, Sums
from cryodask.stages import _groups as gr
from cryodask.stages._particle_checks import check_mask, check_particles
from cryodask.vocabulary import ABERRATIONS, OPTICS

if TYPE_CHECKING:
    from cryodask.stages.ctf_refine import CtfRefineParams

_FEWEST = 50
_KEPT = ("phase_shift_deg", "ctf_b_factor_angstrom2", "ctf_scale_factor")
_DEFOCUS = ("defocus_u_angstrom", "defocus_v_angstrom", "defocus_angle_deg")
_WORST_RINGS = 4
halves = 2


@dataclass(frozen=True)
class Loaded:
    """Particles of a block with the CTF known so far; those of ``rows`` are in the map. Poses and wavelengths are of all particles."""

    rows: torch.Tensor
    micrograph: np.ndarray
    images: ImageRows
    rotations: torch.Tensor
    shifts_px: torch.Tensor
    wavelength: torch.Tensor


@dataclass(frozen=True)
class Shared:
    """Volume of the other half's map, for fits; noise power of each group."""

    volume: torch.Tensor | None
    noise_power: torch.Tensor


def start(params: CtfRefineParams, particles: ParticleSet, inputs: dict[str, Any]) -> State:
    """State before the first iteration."""
    if particles.count < _FEWEST:
        raise InputError(
            f"{particles.count} particles are too few to refine their CTF",
            "picking or curation left hardly any",
            f"check the picks and the classes; at least {_FEWEST} are needed, thousands are usual",
        )
    check_particles(particles, params.mask_diameter_angstrom)
    box, pixel = particles.box, float(particles.pixel_size_angstrom)
    if box % 2 or box < 16:
        raise InputError(f"particles of {box} pixels cannot be used", "the box is odd or too small", "extract them with an even box")
    if not all(np.isfinite(particles.columns[name]).all() for name in ("rot_deg", "tilt_deg", "psi_deg")):
        raise InputError("some particles have no pose", "they were added after the refinement", "refine the set first")
    before = {
        f"before_{name}": np.asarray(particles.columns[name], np.float64)
        for name in (*_DEFOCUS, *_KEPT, *ABERRATIONS)
        if name in particles.columns
    }
    groups = gr.groups_of_set(particles)
    count, micrographs = len(groups["noise_groups"]), len(groups["micrographs"])
    of_group = gr.noise_group(groups, particles.columns)
    used = np.asarray(particles.columns.get("in_map", np.ones(particles.count, bool)), bool)
    return {
        "iteration": 0, "phase": "power", "round": 0, "done": False, "box": box, "length_angstrom": box * pixel,
        "mask": _mask(params, inputs, box, pixel), "group": of_group.astype(np.int16),
        "micrograph": gr.micrograph_rows(groups, particles.columns), "group_count": np.bincount(of_group[used], minlength=count),
        "value": np.tile(np.array([ab.NEUTRAL[name] for name in ABERRATIONS]), (count, 1)),
        "deviation": np.full((count, len(ABERRATIONS)), np.nan), "astigmatism": np.zeros((micrographs, 2)),
        "centre": np.zeros(micrographs), "spread": 100.0, "last": 0, **before, **groups,
    }  # fmt: skip


def _mask(params: CtfRefineParams, inputs: dict[str, Any], box: int, pixel: float) -> np.ndarray:
    """Soft mask on the grid of the images."""
    given = inputs.get("solvent_mask")
    if given is None:
        diameter = params.mask_diameter_angstrom or 0.85 * box * pixel
        return np.asarray(soft_sphere(box, pixel, diameter / 2.0, 10.0).numpy())
    from cryodask.kernels.resampling import resample_map

    check_mask(given, np.shape(inputs["final_map"]))
    voxel = float(inputs["map_pixel_size_angstrom"])
    soft = resample_map(torch.from_numpy(np.array(given, np.float32)), voxel, box, pixel, cut_angstrom=2.0 * max(voxel, pixel))
    if not float(soft.max()) > 0.5:
        raise InputError("the mask lies outside the box of the particles", "it was made for another map", "make it for this map")
    return np.asarray(soft.clamp(0.0, 1.0).numpy())


def cache_key(params: CtfRefineParams, state: State) -> int:
    """Images are corrected again in each round."""
    return int(state["round"])


def _radius(state: State) -> int:
    return int(state["box"]) // 2 - 2


def load(params: CtfRefineParams, state: State, block: ParticleBlock, context: Context) -> Loaded:
    """Images corrected for what has been found, their CTF and poses."""
    group, micrograph = gr.noise_group(state, block.columns), gr.micrograph_rows(state, block.columns)
    own = {name: state["value"][group, i] for i, name in enumerate(ABERRATIONS)}
    for name in ("tetrafoil_x_angstrom4", "tetrafoil_y_angstrom4"):
        own[name] = own[name] + block.columns.get(name, 0.0)
    columns = {**block.columns, **own, **_with_changes(block.columns, state["astigmatism"][micrograph], 0.0)}
    images, columns = ab.corrected(block.images, columns, block.pixel_size_angstrom)
    device = context.device
    rows = image_rows(
        torch.from_numpy(images).to(device), columns, _radius(state), block.pixel_size_angstrom, torch.from_numpy(group).to(device)
    )
    angles = [torch.deg2rad(torch.from_numpy(np.asarray(columns[f"{name}_deg"], np.float64))) for name in ("rot", "tilt", "psi")]
    origins = [np.asarray(columns.get(f"origin_{axis}_angstrom", np.zeros(len(group))), np.float64) for axis in "yx"]
    used = np.asarray(block.columns.get("in_map", np.ones(len(group), bool)), bool)
    wavelength = np.asarray(electron_wavelength_angstrom(np.asarray(columns["voltage_kv"], np.float64)))  # type: ignore[arg-type]
    return Loaded(
        torch.from_numpy(np.flatnonzero(used)).to(device), micrograph, rows, euler_to_matrix(*angles).float().to(device),
        torch.from_numpy(np.stack(origins, -1) / block.pixel_size_angstrom).float().to(device), torch.from_numpy(wavelength).to(device),
    )  # fmt: skip


def _with_changes(columns: dict[str, np.ndarray], astigmatism: np.ndarray, change: np.ndarray | float) -> dict[str, np.ndarray]:
    """Defocus columns with changes of z cos 2t and z sin 2t `(n, 2)` and of the mean defocus `(n,)`."""
    u, v, angle = (np.asarray(columns[name], np.float64) for name in _DEFOCUS)
    mean, half, twice = (u + v) / 2.0 + change, (u - v) / 2.0, np.radians(2.0 * angle)
    cosine, sine = half * np.cos(twice) + astigmatism[:, 0], half * np.sin(twice) + astigmatism[:, 1]
    ellipse = np.stack([np.stack([mean + cosine, sine], -1), np.stack([sine, mean - cosine], -1)], -2)
    return ab.defocus_columns(ellipse)


def prepare(params: CtfRefineParams, state: State, half: int, context: Context) -> Shared:
    """The other half's map, made once per worker."""
    noise = torch.from_numpy(state["noise_power"]).float().to(context.device)
    if state["phase"] != "fit":
        return Shared(None, noise)
    other = torch.from_numpy(state["maps"][1 - half]).to(context.device)
    return Shared(half_volume(other, state["last"] + 1, state["box"]), noise)


def expect(
    params: CtfRefineParams, state: State, shared: Shared, block: Loaded, previous: Columns, context: Context
) -> tuple[Sums, Columns]:
    """Sums and columns of one block."""
    count, phase = len(block.micrograph), state["phase"]
    if phase == "power":
        nothing: Columns = {"change": np.zeros(count), "likelihood": np.zeros((count, len(cr.defocus_grid())), np.float32)}
        return gr.power_by_group(state, block.images, _radius(state)), nothing
    columns: Columns = {**previous, "change": np.array(previous["change"])}
    rows = block.rows.cpu().numpy()
    if phase == "map" and state["round"] and params.defocus and len(rows):
        offset = torch.from_numpy(columns["change"] - state["centre"][block.micrograph])[rows]
        found, _ = cr.defocus_changes(torch.from_numpy(previous["likelihood"][rows]).double(), offset, state["spread"])
        # the last bits depend on where threads divide the particles
        columns["change"][rows] += np.round(found.numpy(), 6)
    images = _at_defocus(state, block, columns["change"])
    if phase == "map":
        grid = empty_half_grid(_radius(state), str(block.rows.device))
        shares = torch.ones(len(rows), 1, device=block.rows.device)
        poses = block.rotations[block.rows, None], block.shifts_px[block.rows, None]
        insert(images, block.rows, grid, _radius(state), shared.noise_power, *poses, shares)
        return {"grid": grid.cpu().numpy(), "count": len(rows)}, columns
    return _fit_sums(state, shared, block, images, columns)


def _at_defocus(state: State, block: Loaded, change: np.ndarray) -> ImageRows:
    """Images whose CTF is that of a changed defocus."""
    numbers = block.images.ctf.clone()
    more = torch.from_numpy(change).to(numbers) * block.wavelength * (np.pi / state["length_angstrom"] ** 2)
    numbers[:, 0] += more
    numbers[:, 2] += more
    return replace(block.images, ctf=numbers)


def _rings(params_from: float, state: State) -> cr.Rings:
    length = float(state["length_angstrom"])
    return cr.Rings(max(2, int(length / params_from)), int(state["last"]), length)


def _fit_sums(state: State, shared: Shared, block: Loaded, images: ImageRows, columns: Columns) -> tuple[Sums, Columns]:
    rows = block.rows
    assert shared.volume is not None
    found = cr.fit_sums(
        images, rows, shared.volume, shared.noise_power, block.rotations[rows], block.shifts_px[rows], block.wavelength[rows],
        _rings(state["from_angstrom"], state),
    )  # fmt: skip
    used = rows.cpu().numpy()
    micrograph, group = block.micrograph[used], images.group[rows].cpu().numpy()
    columns = {**columns, "likelihood": np.array(columns["likelihood"])}
    columns["likelihood"][used] = (found["defocus"] - found["defocus"].amax(1, keepdim=True)).float().cpu().numpy()
    offset = torch.from_numpy(columns["change"] - state["centre"][block.micrograph])[used]
    by = {name: values.cpu().numpy() for name, values in found.items()}
    return {
        "odd": by["odd"], "even": by["even"],
        "residual": _summed(by["residual"], group, len(shared.noise_power)),
        "fitted": np.bincount(group, minlength=len(shared.noise_power)),
        "magnification": _summed(by["magnification"], group, len(shared.noise_power)),
        "astigmatism": _summed(by["astigmatism"], micrograph, len(state["micrographs"])),
        "spread": cr.spread_evidence(found["defocus"].cpu(), offset).numpy(),
        "of_micrograph": _summed(columns["change"][used, None], micrograph, len(state["micrographs"])),
        "count_of_micrograph": np.bincount(micrograph, minlength=len(state["micrographs"])),
    }, columns  # fmt: skip


def _summed(values: np.ndarray, of: np.ndarray, count: int) -> np.ndarray:
    out = np.zeros((count, values.shape[1]))
    np.add.at(out, of, values)
    return out


def maximise(params: CtfRefineParams, state: State, sums: list[Sums], context: Context) -> tuple[State, Metrics]:
    """The next state from the sums of all blocks."""
    new = {**state, "iteration": state["iteration"] + 1, "from_angstrom": params.from_angstrom}
    if state["phase"] == "power":
        power, count = (sum(s[name] for s in sums) for name in ("power", "group_count"))
        radius = _radius(state)
        own = power / np.maximum(count, 1)[:, None] / shell_counts(radius).numpy()
        new["noise_power"][:, : radius + 1] = np.maximum(own, 1e-12)
        new["noise_power"][:, radius + 1 :] = new["noise_power"][:, radius, None]
        return {**new, "phase": "map"}, {"phase": "noise power"}
    if state["phase"] == "map":
        return _with_maps(params, new, sums, context)
    return _fitted(params, new, sums)


def _with_maps(params: CtfRefineParams, new: State, sums: list[Sums], context: Context) -> tuple[State, Metrics]:
    """Half-maps, masked and filtered by their FSC, and the range of resolution that they support."""
    radius, box, length = _radius(new), int(new["box"]), float(new["length_angstrom"])
    if not all(s["count"] for s in sums):
        raise InputError("no particle of a half-set is in the map", "the refinement left all of them out", "check the refinement")
    operators = symmetry_operators(params.symmetry or "C1")
    mask = torch.from_numpy(new["mask"]).to(context.device)
    maps = [
        reconstruct_half(fold_half_grid(torch.from_numpy(s["grid"]).to(context.device), operators), radius, box, image_box=box) * mask
        for s in sums
    ]
    curve = fsc(*maps).cpu()
    curve[radius + 1 :] = 0.0
    low = torch.nonzero(curve[3:] < 0.143)
    last = int(low[0]) + 2 if len(low) else radius
    resolution = resolution_at(curve, 0.143, box, length / box)
    first = new["round"] == 0
    new["fsc_before" if first else "fsc_after"], new["resolution_before" if first else "resolution_after"] = curve.numpy(), resolution
    metrics = {"phase": "half-maps", "resolution_angstrom": resolution}
    if new["round"] >= params.rounds:
        new.pop("maps", None)
        return {**new, "done": True}, metrics
    new["last"] = min(last, radius)
    if new["last"] < _rings(params.from_angstrom, {**new, "last": last}).low + _WORST_RINGS:
        raise InputError(
            f"the half-maps agree only to {resolution:.1f} A, too close to from_angstrom ({params.from_angstrom:g} A) for a fit",
            "the poses are poor or belong to another frame, or the map has a low resolution",
            "refine first; CTF refinement is worthwhile for maps better than about 8 A",
        )
    shell = half_radius(box, context.device).round().long().clamp(max=box // 2)
    factor = torch.where(torch.arange(box // 2 + 1) <= new["last"] + 2, curve.clamp(0.0, 1.0), 0.0).float().to(context.device)
    new["maps"] = torch.stack([torch.fft.irfftn(torch.fft.rfftn(m) * factor[shell], s=m.shape) * mask for m in maps]).cpu().numpy()
    return {**new, "phase": "fit"}, metrics


def _fitted(params: CtfRefineParams, new: State, sums: list[Sums]) -> tuple[State, Metrics]:
    """Aberrations of the groups, astigmatism and mean defocus of the micrographs, spread of the particles, noise."""
    total = {name: sum(s[name] for s in sums) for name in sums[0]}
    rings = _rings(params.from_angstrom, new)
    ky, kx = rings.frequencies()
    new["value"], new["deviation"] = new["value"].copy(), new["deviation"].copy()
    counts = shell_counts(rings.last).numpy()
    new["noise_power"] = new["noise_power"].copy()
    for g, row in enumerate(new["noise_groups"]):
        if not total["fitted"][g]:
            continue
        measured = total["residual"][g] / total["fitted"][g] / counts
        new["noise_power"][g, rings.low : rings.last + 1] = measured[rings.low :]
        if total["fitted"][g] < params.least_particles:
            continue
        of_group = {name: torch.from_numpy(total[name][g]) for name in ("odd", "even")}
        _update_group(params, new, g, row, of_group, total["magnification"][g], ky, kx)
    if params.astigmatism:
        new["astigmatism"] = new["astigmatism"] + cr.astigmatism_changes(total["astigmatism"])
    evidence = total["spread"]
    new["spread"] = float(cr.SPREADS_ANGSTROM[int(np.argmax(evidence))])
    # the mean of few particles is uncertain: shrink it toward zero
    new["centre"] = total["of_micrograph"][:, 0] / (total["count_of_micrograph"] + 4.0)
    new["round"] = new["round"] + 1
    metrics = {"phase": "fit", "spread_angstrom": new["spread"], "scored_angstrom": rings.length_angstrom / rings.last}
    return {**new, "phase": "map"}, metrics


def _update_group(
    params: CtfRefineParams, new: State, g: int, row: np.ndarray, sums: dict[str, torch.Tensor], of_magnification: np.ndarray,
    ky: torch.Tensor, kx: torch.Tensor,
) -> None:  # fmt: skip
    value, deviation = new["value"][g], new["deviation"][g]
    optics = dict(zip(("data_set", *OPTICS), row.tolist()))
    if params.tilt or params.trefoil:
        found, spread = cr.odd_solution(sums["odd"], ky, kx)
        per_mrad = ab.tilt_phase_per_mrad(optics["voltage_kv"], optics["spherical_aberration_mm"])
        if params.tilt and per_mrad:  # without spherical aberration a tilt only shifts the image
            value[:2] += found[2:4] / per_mrad
            deviation[:2] = np.abs(spread[2:4] / per_mrad)
        if params.trefoil:
            value[2:4] += found[4:]
            deviation[2:4] = spread[4:]
    if params.tetrafoil:
        found, deviation[4:6] = cr.tetrafoil_solution(sums["even"], ky, kx)
        value[4:6] += found
    if params.magnification:
        step, spread = cr.magnification_step(of_magnification)
        change = np.array([[1.0 + step[0], step[1]], [step[1], 1.0 - step[0]]])
        matrix = change @ np.array([[value[6], value[7]], [value[7], value[8]]])
        value[6:] = matrix[0, 0], (matrix[0, 1] + matrix[1, 0]) / 2.0, matrix[1, 1]
        deviation[6:] = spread[0], spread[1], spread[0]


def finished(params: CtfRefineParams, state: State) -> bool:
    """Whether the last round is done."""
    return bool(state["done"])


def result(params: CtfRefineParams, state: State, columns: Columns) -> dict[str, Any]:
    """The output of the stage: what was known before, with the changes."""
    before = {name.removeprefix("before_"): values for name, values in state.items() if name.startswith("before_")}
    count, group = len(state["group"]), state["group"].astype(np.int64)
    changed = _with_changes(before, state["astigmatism"][state["micrograph"]], columns["change"])
    mean = (changed["defocus_u_angstrom"] + changed["defocus_v_angstrom"] - before["defocus_u_angstrom"] - before["defocus_v_angstrom"]) / 2
    box = int(state["box"])
    return {
        **{f"particle_{name}": values.astype(np.float32) for name, values in changed.items()},
        "particle_phase_shift_deg": before.get("phase_shift_deg", np.zeros(count)).astype(np.float32),
        "ctf_b_factor_angstrom2": before.get("ctf_b_factor_angstrom2", np.full(count, np.nan)).astype(np.float32),
        "ctf_scale_factor": before.get("ctf_scale_factor", np.full(count, np.nan)).astype(np.float32),
        **_composed(before, state["value"][group]),
        "aberration_count": state["group_count"].astype(np.int64),
        "aberration_fitted": state["group_count"] >= params.least_particles,
        "aberration_value": state["value"],
        "aberration_deviation": state["deviation"],
        "defocus_change_angstrom": mean.astype(np.float32),
        "defocus_spread_angstrom": float(state["spread"]),
        "refinement_frequency": np.arange(box // 2 + 1) / float(state["length_angstrom"]),
        "fsc_before": state["fsc_before"],
        "fsc_after": state["fsc_after"],
        "resolution_before_angstrom": float(state["resolution_before"]),
        "resolution_after_angstrom": float(state["resolution_after"]),
    }


def _composed(before: dict[str, np.ndarray], value: np.ndarray) -> dict[str, np.ndarray]:
    """Aberrations of each particle: those for which its image had been corrected before, combined with what was then found `(n, 9)`."""
    out = {name: value[:, i] + before.get(name, 0.0) for i, name in enumerate(ABERRATIONS[:6])}
    xx, xy, yy = (before.get(name, np.full(len(value), ab.NEUTRAL[name])) for name in ABERRATIONS[6:])
    earlier = np.stack([np.stack([xx, xy], -1), np.stack([xy, yy], -1)], -2)
    found = np.stack([value[:, [6, 7]], value[:, [7, 8]]], -2)
    matrix = found @ earlier
    both = (matrix[:, 0, 0], (matrix[:, 0, 1] + matrix[:, 1, 0]) / 2.0, matrix[:, 1, 1])
    return {name: values.astype(np.float32) for name, values in (out | dict(zip(ABERRATIONS[6:], both))).items()}
