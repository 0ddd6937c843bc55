"""The demo: a simulated session, processed from movies to map and compared with the ground truth."""

from __future__ import annotations

import json
import math
import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import typer
import yaml

from cryodask.cluster.connect import close, connect
from cryodask.run.events import Events, ExposureCommitted, StepFinished, StepStarted
from cryodask.run.events.progress import Terminal
from cryodask.run.session import run_session
from cryodask.store.project import Project

if TYPE_CHECKING:
    from torch import Tensor

    from cryodask.simulate.score import TruePoses

BETA_GALACTOSIDASE = "beta-galactosidase"
PROJECT_NAMES = {BETA_GALACTOSIDASE: "betagal", "clpb": "clpb"}
"""Name of the project of each molecule of the simulator."""


@dataclass(frozen=True)
class Sizes:
    """What a pipeline must know of its molecule: particle diameter, Angstrom; boxes, pixels; point group."""

    diameter_angstrom: float
    box: int
    scaled_box: int
    symmetry: str


def sizes_of(params: Any) -> Sizes:
    """Sizes for the molecule of a session (a :class:`cryodask.simulate.SessionParams`): a box of at least 1.5 diameters, kept at 0.6."""
    from cryodask.simulate.model import MOLECULES

    molecule = MOLECULES[params.molecule]()
    diameter = 10.0 * round(molecule.diameter_angstrom / 10.0)
    tens = math.ceil(1.5 * diameter / params.pixel_size_angstrom / 20.0)
    return Sizes(diameter, 20 * tens, 12 * tens, molecule.symmetry)


def write_project_file(folder: Path, params: Any) -> Path:
    """Write a project file for a simulated session."""
    sizes, is_eer = sizes_of(params), params.format == "eer"
    content = {
        "name": PROJECT_NAMES[params.molecule],
        "inputs": {"movies": f"movies/*.{params.format}", "gain": "gain.gain" if is_eer else "gain.mrc"},
        "microscope": {
            "voltage_kv": params.voltage_kv,
            "spherical_aberration_mm": params.spherical_aberration_mm,
            "amplitude_contrast": params.amplitude_contrast,
            "pixel_size_angstrom": params.pixel_size_angstrom,
            # of a camera frame
            "dose_per_frame": round(params.dose_per_frame / params.camera_frames, 7) if is_eer else round(params.dose_per_frame, 5),
        },
        "pipeline": [
            *([{"ingest": {"eer_fraction_frames": params.camera_frames}}] if is_eer else []),
            {"motion": {}},
            {"ctf": {}},
            {"pick": {"diameter_angstrom": sizes.diameter_angstrom}},
            {"extract": {"box": sizes.box, "scale_to": sizes.scaled_box}},
            {"classify2d": {"classes": 10}},
            {"curate": {"keep": "auto"}},
            {"ab_initio": {"symmetry": sizes.symmetry}},
            {"refine3d": {"symmetry": sizes.symmetry}},
            {"mask": {}},
            {"postprocess": {}},
        ],
        "cluster": "local",
    }
    path = folder / f"{content['name']}.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=140))
    return path


def simulate_folder(
    folder: Path, *, movies: int, size: int, frames: int, particles: int, seed: int, ending: str = "tif", molecule: str = BETA_GALACTOSIDASE
) -> Path:
    """Simulate a session into ``folder`` and write its project file; returns the project file. ``ending``: tif, mrc or eer."""
    from cryodask.simulate import SessionParams, simulate_session

    dose = 40.0 / 24.0
    params = SessionParams(
        molecule=molecule,  # type: ignore[arg-type]  # checked by the model
        movies=movies,
        height=size,
        width=size,
        frames=frames,
        particles=particles,
        seed=seed,
        dose_per_frame=dose,
        format=ending,  # type: ignore[arg-type]  # checked by the model
    )
    with _simulating(movies, f"{movies} movies") as one_done:
        simulate_session(folder, params, lambda done, total: one_done() if done else None, processes=min(os.cpu_count() or 1, movies))
    return write_project_file(folder, params)


def run_demo(
    folder: Path, *, molecule: str = BETA_GALACTOSIDASE, movies: int = 24, seed: int = 1, workers: int | None = None
) -> dict[str, Any]:
    """Simulate a session, process it and score the results; write ``summary.json`` into ``folder`` and return its content."""
    from cryodask.simulate import SessionParams, load_truth, prepare_session, simulate_one

    started = time.time()
    params = SessionParams(molecule=molecule, movies=movies, seed=seed)  # type: ignore[arg-type]  # checked by the model
    sizes = sizes_of(params)
    voxel = params.pixel_size_angstrom * sizes.box / sizes.scaled_box
    params = params.model_copy(update={"truth_maps": ((sizes.scaled_box, voxel),)})
    client = connect("local", workers=workers)
    try:
        with _simulating(movies, f"{movies} movies of 1024 x 1024 x 24") as one_done:
            folder.mkdir(parents=True, exist_ok=True)
            prepare_session(folder, params)
            tasks = client.map(simulate_one, [str(folder)] * movies, [params] * movies, range(movies), pure=False)
            from distributed import as_completed

            for task in as_completed(tasks):
                task.result()
                one_done()
        seconds = {"simulate": round(time.time() - started, 1)}
        project = run_session(write_project_file(folder, params), client=client, listen=[Terminal()])
        peak = sum(client.run(_peak_memory).values()) + _peak_memory()
    finally:
        close(client)
    summary = score(project, load_truth(folder))
    summary["seconds_per_stage"] = seconds | stage_seconds(project)
    summary["peak_memory_bytes"] = peak
    summary["failed_items"] = len(project.failures())
    summary["seconds_total"] = round(time.time() - started, 1)
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    typer.echo(json.dumps(summary, indent=1))
    return summary


@contextmanager
def _simulating(movies: int, result: str) -> Iterator[Callable[[], None]]:
    """Show the progress of the simulation; yields a function to call after each movie."""
    events, started = Events([Terminal()]), time.monotonic()
    events.emit(StepStarted, step="simulate", steps=["simulate"], total=movies, kept=0)
    yield lambda: events.emit(ExposureCommitted, step="simulate", row=0, name="")
    events.emit(StepFinished, step="simulate", steps=["simulate"], result=result, seconds=time.monotonic() - started)


def _peak_memory() -> int:
    """Peak resident memory of this process, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def stage_seconds(project: Project) -> dict[str, float]:
    """Seconds spent in each stage: summed over all micrographs for map stages, wall time for the others."""
    out = {}
    for label in project.stages:
        records = project.generation(label).committed().values()
        out[label] = round(sum(float(r.get("seconds", 0.0)) for r in records), 1)
    return out


def score(project: Project, truth: Any) -> dict[str, Any]:
    """Compare a processed session with its ground truth (a :class:`cryodask.simulate.Truth`)."""
    import torch

    from cryodask.kernels.fsc import fsc, resolution_at
    from cryodask.simulate import score as measure
    from cryodask.simulate.docking import NEAR_DEG, dock
    from cryodask.simulate.model import MOLECULES, density_map

    params, sizes = truth.params, sizes_of(truth.params)
    pixel, shape = params.pixel_size_angstrom, params.shape
    row_of = {name: i for i, name in enumerate(truth.names)}
    true = truth.columns
    positions = [
        np.stack([true["particle_y"][i], true["particle_x"][i]], -1)[: int(true["particle_count"][i])] for i in range(len(truth.names))
    ]

    motion, ctf, picks = project["motion"], project["ctf"], project["pick"]
    errors = []
    for name in motion["micrograph"].values:
        one, i = motion.sel(micrograph=name), row_of[name]
        found = measure.relion_displacement(
            one["frame_shift"].values, one["motion_polynomial"].values, true["patch_position"][i], shape, pixel
        )
        errors.append(measure.rms_motion_error(found, true["patch_shift"][i]))
    rows = [row_of[n] for n in ctf["micrograph"].values]
    defocus = 0.5 * (ctf["defocus_u_angstrom"] + ctf["defocus_v_angstrom"]).values
    true_defocus = 0.5 * (true["defocus_u_angstrom"] + true["defocus_v_angstrom"])[rows]

    accepted = []
    for name in picks["micrograph"].values:
        one = picks.sel(micrograph=name)
        keep = one["pick_accepted"].values > 0
        accepted.append(np.stack([one["pick_y"].values[keep], one["pick_x"].values[keep]], -1))
    named = [positions[row_of[n]] for n in picks["micrograph"].values]
    precision, recall = measure.precision_and_recall(accepted, named, shape, sizes.diameter_angstrom / pixel)

    refined, mask = project["refine3d"].load(), torch.from_numpy(project["mask"]["solvent_mask"].values)
    post = project["postprocess"].load()
    voxel = float(refined["map_pixel_size_angstrom"])
    box = int(refined.sizes["x"])
    matched = _matched(project, truth, positions, row_of, 0.4 * sizes.diameter_angstrom / pixel)
    docking = dock(matched.found_rotations, matched.true.rotations, matched.displacement_angstrom, sizes.symmetry)
    there = MOLECULES[params.molecule]().placed(docking.turn, docking.shift_angstrom.numpy())
    true_map = torch.from_numpy(density_map(there, box, voxel))
    curve = fsc(torch.from_numpy(refined["half_map"].values.mean(0)) * mask, true_map * mask)
    rotations, moved = docking.poses(matched.true.rotations)
    in_map = replace(matched.true, rotations=rotations, origin_angstrom=matched.true.origin_angstrom - moved.numpy())
    oracle = measure.half_maps_from_poses(in_map, voxel, sizes.symmetry)
    return {
        "molecule": params.molecule,
        "movies": len(project.items()),
        "micrographs": int(motion.sizes["micrograph"]),
        "particles": int(project.particles("refine3d").sizes["particle"]),
        "picked_precision": round(precision, 4),
        "picked_recall": round(recall, 4),
        "motion_rms_error_angstrom": round(float(np.sqrt(np.mean(np.square(errors)))), 3),
        "defocus_rms_error_angstrom": round(float(np.sqrt(np.mean((defocus - true_defocus) ** 2))), 1),
        "succeeded": bool(refined["succeeded"]),
        "resolution_fsc143_angstrom": round(float(post["resolution_angstrom"]), 3) if refined["succeeded"] else None,
        "resolution_true_poses_angstrom": round(measure.corrected_resolution(oracle, mask, voxel), 3),
        "resolution_truth_fsc05_angstrom": round(resolution_at(curve, 0.5, box, voxel), 3),
        "pose_error_median_deg": round(float(np.median(docking.degrees)), 2),
        "poses_right": round(float((docking.degrees < NEAR_DEG).mean()), 4),
        "hand_flipped": docking.mirrored,
    }


@dataclass(frozen=True)
class _Matched:
    """Refined particles that match a simulated one: true poses, found ones, and (y, x) from the found to the true centre."""

    true: TruePoses
    found_rotations: Tensor
    displacement_angstrom: np.ndarray


def _matched(project: Project, truth: Any, positions: list[np.ndarray], row_of: dict[str, int], tolerance_px: float) -> _Matched:
    import torch

    from cryodask.kernels.orientations import euler_to_matrix
    from cryodask.simulate.score import TruePoses, match_picks

    particles = project.particles("refine3d").load()
    pixel = truth.params.pixel_size_angstrom
    kept: list[np.ndarray] = []
    source: list[tuple[int, np.ndarray]] = []
    centre = np.floor(np.stack([particles["particle_y"].values, particles["particle_x"].values], -1))
    for name in dict.fromkeys(particles["micrograph"].values.tolist()):
        here = np.nonzero(particles["micrograph"].values == name)[0]
        i, j = match_picks(centre[here], positions[row_of[name]], tolerance_px)
        kept.append(here[i])
        source.append((row_of[name], j))
    index = np.concatenate(kept)
    some = particles.isel(particle=index)
    where = np.concatenate([positions[row][j] for row, j in source])
    angles = ("rot_deg", "tilt_deg", "psi_deg")
    true = [np.concatenate([truth.columns[name][row][j] for row, j in source]) for name in angles]
    true_rotations, found_rotations = (
        euler_to_matrix(*(torch.deg2rad(torch.from_numpy(np.asarray(a, np.float64))) for a in columns))
        for columns in (true, [some[name].values for name in angles])
    )
    ctf = (
        "defocus_u_angstrom",
        "defocus_v_angstrom",
        "defocus_angle_deg",
        "voltage_kv",
        "spherical_aberration_mm",
        "amplitude_contrast",
    )
    half = some["half_set"].values if "half_set" in some else np.arange(len(index)) % 2
    poses = TruePoses(
        some["particle_image"].values, true_rotations, (centre[index] - where) * pixel, {n: some[n].values for n in ctf}, half
    )
    found = np.stack([some["centre_y_angstrom"].values, some["centre_x_angstrom"].values], -1)
    return _Matched(poses, found_rotations, where * pixel - found)
