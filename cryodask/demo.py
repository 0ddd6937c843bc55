"""The demo: a simulated session, processed from movies to map and compared with the ground truth."""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import typer
import yaml

from cryodask.cluster.connect import close, connect
from cryodask.run.events import Events, ExposureCommitted, StepFinished, StepStarted
from cryodask.run.events.progress import Terminal
from cryodask.run.session import run_session
from cryodask.store.project import Project

_DIAMETER_ANGSTROM = 180.0
_SYMMETRY = "D2"
_BOX, _SCALED_BOX = 160, 96


def write_project_file(folder: Path, params: Any) -> Path:
    """Write a project file for a simulated session."""
    content = {
        "name": "betagal",
        "inputs": {"movies": f"movies/*.{params.format}", "gain": "gain.mrc"},
        "microscope": {
            "voltage_kv": params.voltage_kv,
            "spherical_aberration_mm": params.spherical_aberration_mm,
            "amplitude_contrast": params.amplitude_contrast,
            "pixel_size_angstrom": params.pixel_size_angstrom,
            "dose_per_frame": round(params.dose_per_frame, 5),
        },
        "pipeline": [
            {"motion": {}},
            {"ctf": {}},
            {"pick": {"diameter_angstrom": _DIAMETER_ANGSTROM}},
            {"extract": {"box": _BOX, "scale_to": _SCALED_BOX}},
            {"classify2d": {"classes": 10}},
            {"curate": {"keep": "auto"}},
            {"ab_initio": {"symmetry": _SYMMETRY}},
            {"refine3d": {"symmetry": _SYMMETRY}},
            {"mask": {}},
            {"postprocess": {}},
        ],
        "cluster": "local",
    }
    path = folder / "betagal.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=140))
    return path


def simulate_folder(folder: Path, *, movies: int, size: int, frames: int, particles: int, seed: int, mrc: bool = False) -> Path:
    """Simulate a session into ``folder`` and write its project file; returns the project file."""
    from cryodask.simulate import SessionParams, simulate_session

    dose = 40.0 / 24.0
    params = SessionParams(
        movies=movies,
        height=size,
        width=size,
        frames=frames,
        particles=particles,
        seed=seed,
        dose_per_frame=dose,
        format="mrc" if mrc else "tif",
    )
    with _simulating(movies, f"{movies} movies") as one_done:
        simulate_session(folder, params, lambda done, total: one_done() if done else None, processes=os.cpu_count() or 1)
    return write_project_file(folder, params)


def run_demo(folder: Path, *, movies: int = 24, seed: int = 1, workers: int | None = None) -> dict[str, Any]:
    """Simulate a session, process it and score the results; write ``summary.json`` into ``folder`` and return its content."""
    from cryodask.simulate import SessionParams, load_truth, prepare_session, simulate_one

    started = time.time()
    voxel = 1.77 * _BOX / _SCALED_BOX
    params = SessionParams(movies=movies, seed=seed, truth_maps=((_SCALED_BOX, voxel),))
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

    from cryodask.formats.mrc import read_mrc
    from cryodask.kernels.fsc import resolution_at
    from cryodask.simulate import score as measure

    torch.set_num_threads(os.cpu_count() or 1)
    params = truth.params
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
    precision, recall = measure.precision_and_recall(accepted, named, shape, _DIAMETER_ANGSTROM / pixel)

    refined, mask = project["refine3d"].load(), torch.from_numpy(project["mask"]["solvent_mask"].values)
    post = project["postprocess"].load()
    voxel = float(refined["map_pixel_size_angstrom"])
    box = int(refined.sizes["x"])
    true_map, _ = read_mrc(Path(truth.folder) / "truth" / f"map_{box}_{voxel:g}A.mrc")
    alignment, curve = measure.align_axes(torch.from_numpy(refined["half_map"].values.mean(0)), torch.from_numpy(true_map.copy()), mask)
    oracle = measure.half_maps_from_poses(_true_poses(project, truth, positions, row_of), voxel, _SYMMETRY)
    oracle = torch.stack([alignment(half) for half in oracle])
    return {
        "movies": len(project.items()),
        "micrographs": int(motion.sizes["micrograph"]),
        "particles": int(project.particles("refine3d").sizes["particle"]),
        "picked_precision": round(precision, 4),
        "picked_recall": round(recall, 4),
        "motion_rms_error_angstrom": round(float(np.sqrt(np.mean(np.square(errors)))), 3),
        "defocus_rms_error_angstrom": round(float(np.sqrt(np.mean((defocus - true_defocus) ** 2))), 1),
        "resolution_fsc143_angstrom": round(float(post["resolution_angstrom"]), 3),
        "resolution_true_poses_angstrom": round(measure.corrected_resolution(oracle, mask, voxel), 3),
        "resolution_truth_fsc05_angstrom": round(resolution_at(curve, 0.5, box, voxel), 3),
        "hand_flipped": alignment.flipped,
    }


def _true_poses(project: Project, truth: Any, positions: list[np.ndarray], row_of: dict[str, int]) -> Any:
    """Refined particles that match a simulated one, with their true poses."""
    from cryodask.simulate.score import TruePoses, match_picks

    particles = project.particles("refine3d").load()
    pixel = truth.params.pixel_size_angstrom
    kept: list[np.ndarray] = []
    source: list[tuple[int, np.ndarray]] = []
    centre = np.floor(np.stack([particles["particle_y"].values, particles["particle_x"].values], -1))
    for name in dict.fromkeys(particles["micrograph"].values.tolist()):
        here = np.nonzero(particles["micrograph"].values == name)[0]
        i, j = match_picks(centre[here], positions[row_of[name]], 0.4 * _DIAMETER_ANGSTROM / pixel)
        kept.append(here[i])
        source.append((row_of[name], j))
    index = np.concatenate(kept)
    true = {
        n: np.concatenate([truth.columns[n][row][j] for row, j in source]).astype(np.float64) for n in ("rot_deg", "tilt_deg", "psi_deg")
    }
    where = np.concatenate([positions[row][j] for row, j in source])
    columns = (
        "defocus_u_angstrom",
        "defocus_v_angstrom",
        "defocus_angle_deg",
        "voltage_kv",
        "spherical_aberration_mm",
        "amplitude_contrast",
    )
    some = particles.isel(particle=index)
    half = some["half_set"].values if "half_set" in some else np.arange(len(index)) % 2
    return TruePoses(
        some["particle_image"].values,
        true["rot_deg"],
        true["tilt_deg"],
        true["psi_deg"],
        (centre[index] - where) * pixel,
        {n: some[n].values for n in columns},
        half,
    )
