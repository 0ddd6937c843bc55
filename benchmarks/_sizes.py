"""Stacks of real sizes for the benchmarks, the passes that are timed on them, and RELION's local step.

The molecules are 6bqn (C1) and beta-galactosidase (5a1a, D2): 256 pixels of 0.885 A, B factor 40 A^2, or the same Fourier-cropped to 128.
"strong" means var(signal) / var(noise) = 0.02 within a circle of 200 A at 256 px; "real" is 5.3 times weaker, the ratio of good data.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import starfile
import torch
from scipy.spatial.transform import Rotation

sys.path.insert(0, str(Path(__file__).parent))
from _molecules import (
    AMPLITUDE_CONTRAST,
    MOLECULES,
    POSE_LABELS,
    SPHERICAL_ABERRATION_MM,
    STACKS,
    VOLTAGE_KV,
    Poses,
    density,
    project,
    random_columns,
    read_atoms,
    read_rows,
)
from _stacks import read_map

from cryodask.formats.mrc import open_mrc, write_mrc
from cryodask.kernels.fourier import resize_map
from cryodask.kernels.orientations import matrix_to_euler, random_rotations
from cryodask.kernels.projection import cut_map
from cryodask.kernels.resampling import resample_map
from cryodask.stage import Columns, ParticleBlock, ParticleSet, State
from cryodask.stages import _refine3d as functions
from cryodask.stages import _refinement as rf
from cryodask.stages.refine3d import Refine3DParams

WIDE_BOX, WIDE_PIXEL, B_FACTOR_A2 = 256, 0.885, 40.0
STRONG_SNR, WEAKER, CIRCLE_ANGSTROM = 0.02, 5.3, 200.0
SHIFT_SD_ANGSTROM = 3.0
START_ERROR_DEG, START_ERROR_ANGSTROM = 1.0, 0.7
"""Errors per axis of the poses that a timed local pass starts from."""


@dataclass(frozen=True)
class Case:
    """Particles of one size: where they are, what is known of them, and to which resolution poses are refined."""

    name: str
    star: Path
    truth: Path
    symmetry: str
    mask_diameter_angstrom: float
    finest_angstrom: float


@dataclass(frozen=True)
class Particles:
    """A case in memory; images stay on disk until a block is read. ``truth`` `(z, y, x)` has the box and grey scale of the images."""

    set: ParticleSet
    stack: Path
    order: np.ndarray
    poses: Poses | None
    truth: np.ndarray

    @property
    def pixel(self) -> float:
        """Pixel size, Angstrom."""
        return float(self.set.pixel_size_angstrom)

    def block(self, index: np.ndarray, half: int = 0) -> ParticleBlock:
        """Some particles, read from the disk."""
        columns = {name: values[index] for name, values in self.set.columns.items()}
        return ParticleBlock(index, self.images(index), columns, self.set.pixel_size_angstrom, half)

    def images(self, index: np.ndarray) -> np.ndarray:
        """Images `(n, y, x)` float32."""
        stack = open_mrc(self.stack)
        out = np.empty((len(index), *stack.shape[1:]), np.float32)
        for row, place in zip(out, self.order[index]):
            row[:] = stack[int(place)]
        return out


# --- stacks -----------------------------------------------------------------------------------------------------------------
def made(model: str, count: int, box: int, strength: str, seed: int) -> Case:
    """A stack of this file's head, made on first use."""
    symmetry, finest = MOLECULES[model].symmetry, 3.78 if box < WIDE_BOX else 2.2
    star = STACKS / f"size_{model}_n{count}_b{box}_{strength}_s{seed}.star"
    truth, finished = star.with_name(f"{star.stem}_truth.mrc"), star.with_suffix(".json")
    case = Case(star.stem, star, truth, symmetry, CIRCLE_ANGSTROM, finest)
    if finished.exists():
        return case
    STACKS.mkdir(parents=True, exist_ok=True)
    pixel = WIDE_PIXEL * WIDE_BOX / box
    volume = torch.from_numpy(_scaled_map(model) / (1.0 if strength == "strong" else WEAKER**0.5))
    volume = (resize_map(volume, box) * (WIDE_BOX / box) ** 2).numpy()
    rotations, columns = random_rotations(count, torch.Generator().manual_seed(seed)), random_columns(count, seed + 20)
    origins = np.random.default_rng(seed + 10).normal(0.0, SHIFT_SD_ANGSTROM / pixel, (count, 2))
    images = project(volume, pixel, rotations, origins, columns, chunk=max(8, 200 * 64**2 // box**2))
    facts = {"signal_to_noise_in_circle": float(images[:200, _circle(box, pixel)].var(axis=1).mean())}
    rng = np.random.default_rng(seed + 30)
    for image in images:
        image += rng.standard_normal(image.shape, dtype=np.float32)
    write_mrc(star.with_suffix(".mrcs"), images, pixel, stack=True)
    write_mrc(truth, volume, pixel)
    _write_star(star, box, pixel, columns, Poses(rotations, origins * pixel, np.zeros(count, bool)))
    part = finished.with_suffix(".part")
    part.write_text(json.dumps(facts))
    os.replace(part, finished)
    print(f"{star.name} made: {facts}", flush=True)
    return case


def _circle(box: int, pixel: float) -> np.ndarray:
    y, x = np.mgrid[:box, :box] - box // 2
    return np.asarray(y**2 + x**2 < (CIRCLE_ANGSTROM / 2 / pixel) ** 2)


def _scaled_map(model: str) -> np.ndarray:
    """The molecule at 256 px, on the scale of "strong" images with noise of variance 1."""
    kept = STACKS / f"size_{model}_map.mrc"
    if not kept.exists():
        volume = density(*read_atoms(MOLECULES[model]), WIDE_BOX, WIDE_PIXEL, B_FACTOR_A2)
        views = random_rotations(60, torch.Generator().manual_seed(5))
        images = project(volume, WIDE_PIXEL, views, np.zeros((60, 2)), random_columns(60, 5), chunk=10)
        volume *= np.sqrt(STRONG_SNR / images[:, _circle(WIDE_BOX, WIDE_PIXEL)].var(axis=1).mean())
        part = kept.with_suffix(".part.mrc")
        write_mrc(part, volume, WIDE_PIXEL)
        os.replace(part, kept)
    return read_map(kept)[0]


def _write_star(path: Path, box: int, pixel: float, columns: dict[str, np.ndarray], poses: Poses) -> None:
    count = len(poses.rotations)
    optics = {
        "rlnOpticsGroupName": "og1", "rlnOpticsGroup": 1, "rlnVoltage": VOLTAGE_KV, "rlnSphericalAberration": SPHERICAL_ABERRATION_MM,
        "rlnAmplitudeContrast": AMPLITUDE_CONTRAST, "rlnImagePixelSize": pixel, "rlnImageSize": box, "rlnImageDimensionality": 2,
        "rlnMicrographOriginalPixelSize": pixel,
    }  # fmt: skip
    angles = [np.degrees(a.numpy()) for a in matrix_to_euler(poses.rotations.double())]
    rows = pd.DataFrame({
        "rlnImageName": [f"{i + 1:06d}@{path.stem}.mrcs" for i in range(count)],
        "rlnMicrographName": [f"mic{m:03d}.mrc" for m in columns["micrograph"]],
        "rlnOpticsGroup": 1,
        "rlnDefocusU": columns["defocus_u_angstrom"],
        "rlnDefocusV": columns["defocus_v_angstrom"],
        "rlnDefocusAngle": columns["defocus_angle_deg"],
        **dict(zip(POSE_LABELS, (*angles, *poses.origins_angstrom.T))),
    })  # fmt: skip
    starfile.write({"optics": pd.DataFrame([optics]), "particles": rows}, path, overwrite=True)


def opened(case: Case) -> Particles:
    """A case with its columns; the truth at the images' box, on the grey scale that fits them best at their true poses."""
    names, particles, poses = read_rows(case.star)
    places = [name.split("@", 1) for name in names]
    files = {file for _, file in places}
    if len(files) != 1:
        raise SystemExit(f"{case.star} has images in {len(files)} files; this benchmark reads one")
    file = files.pop()
    stack = next((p for p in (case.star.parent / file, Path(file), case.star.parent / Path(file).name) if p.exists()), None)
    if stack is None:
        raise SystemExit(f"{case.star} names {file}, which does not exist beside it or here")
    volume, voxel = read_map(case.truth)
    pixel = float(particles.pixel_size_angstrom)
    if volume.shape[0] != particles.box or abs(voxel / pixel - 1.0) > 1e-3:
        volume = resample_map(torch.from_numpy(volume), voxel, particles.box, pixel, cut_angstrom=case.finest_angstrom).numpy()
    found = Particles(particles, stack, np.array([int(index) - 1 for index, _ in places]), poses, volume)
    return found if poses is None else replace(found, truth=found.truth * _grey_scale(found))


def _grey_scale(particles: Particles) -> float:
    """The factor of the truth that fits some images best."""
    some = np.arange(0, particles.set.count, max(1, particles.set.count // 60))
    assert particles.poses is not None
    columns = {name: values[some] for name, values in particles.set.columns.items()}
    origins = particles.poses.origins_angstrom[some] / particles.pixel
    clean = project(particles.truth, particles.pixel, particles.poses.rotations[some], origins, columns, chunk=10)
    return float((clean * particles.images(some)).sum() / (clean * clean).sum())


# --- passes of the refinement -----------------------------------------------------------------------------------------------
def parameters(case: Case, lowpass_angstrom: float = 15.0) -> Refine3DParams:
    """Parameters of a refinement that starts from the truth at a low resolution."""
    return Refine3DParams(
        symmetry=case.symmetry,
        reference=str(case.truth),
        lowpass_angstrom=lowpass_angstrom,
        mask_diameter_angstrom=case.mask_diameter_angstrom,
    )


def pass_state(case: Case, particles: Particles, params: Refine3DParams, phase: str, finest_angstrom: float) -> State:
    """State of a pass at a resolution with the truth as map; a local one is the last, so that final maps and curves are made as well."""
    state = functions.start(params, particles.set, {})
    box, length = particles.set.box, float(state["length_angstrom"])
    rings = min(round(length / finest_angstrom), box // 2 - 2)
    reference = resize_map(cut_map(torch.from_numpy(particles.truth), rings), rf.map_box(rings, box))
    last = phase == "local"
    return {
        **state, **rf.beginning(state | {"start_maps": state["maps"]}, particles.set.count), "iteration": 9, "phase": phase,
        "passes": params.iterations - 1 if last else 0, "rings": rings, "best_rings": rings, "parts": 1,
        "maps": torch.stack([reference, reference]).numpy(), "scale": 1.0, "shift_sigma_angstrom": SHIFT_SD_ANGSTROM, "pose_certainty": 0.9,
    }  # fmt: skip


def start_columns(particles: Particles, index: np.ndarray) -> Columns:
    """Columns of the pass before: true poses with errors."""
    poses = particles.poses
    assert poses is not None
    rng = np.random.default_rng(3)
    turns = Rotation.from_rotvec(np.radians(rng.normal(0.0, START_ERROR_DEG, (particles.set.count, 3)))).as_matrix()
    origins = poses.origins_angstrom + rng.normal(0.0, START_ERROR_ANGSTROM, poses.origins_angstrom.shape)
    columns = functions._no_poses(len(index))
    columns["mode_rotation"][:, 0] = (turns @ poses.rotations.numpy())[index]
    columns["mode_origin_angstrom"][:, 0] = origins[index]
    return columns


def kept_bytes(loaded: Any) -> int:
    """Bytes of what stays loaded of a leaf."""
    rows, polar = loaded.rows, loaded.polar
    return int(sum(t.nbytes for t in (rows.values, rows.scale, rows.ctf, polar.polar_images, polar.polar_ctf)))


class Clock:
    """CPU seconds spent in some functions, while it is entered."""

    def __init__(self, *places: tuple[Any, str]) -> None:
        self.places, self.before, self.seconds = places, [getattr(*place) for place in places], dict.fromkeys((n for _, n in places), 0.0)

    def __enter__(self) -> Clock:
        for (module, name), function in zip(self.places, self.before):
            setattr(module, name, self._timed(name, function))
        return self

    def __exit__(self, *error: object) -> None:
        for (module, name), function in zip(self.places, self.before):
            setattr(module, name, function)

    def _timed(self, name: str, function: Any) -> Any:
        def timed(*arguments: Any, **named: Any) -> Any:
            start = time.process_time()
            result = function(*arguments, **named)
            self.seconds[name] += time.process_time() - start
            return result

        return timed


# --- RELION -----------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class RelionStep:
    """RELION's local step: CPU seconds per particle from two counts, the seconds of each count, and its final angular step."""

    seconds_per_particle: float
    seconds: tuple[float, float]
    peak_bytes: int
    step_deg: float


def relion_local(case: Case, particles: Particles, folder: Path, counts: tuple[int, int]) -> RelionStep | None:
    """One expectation with back-projection near the true poses, in the finest sampling that the resolution asks for; None without RELION.

    Angular and shift sampling, prior and oversampling are those of relion_refine's own local searches (prior: two coarse steps).
    """
    if shutil.which("relion_refine") is None:
        return None
    (folder / "out").mkdir(parents=True, exist_ok=True)
    write_mrc(folder / "reference.mrc", particles.truth, particles.pixel)
    wanted = 0.45 * np.degrees(case.finest_angstrom / (case.mask_diameter_angstrom / 2))
    order = next(o for o in range(2, 9) if 58.6 / 2 ** (o + 1) <= wanted)
    blocks = starfile.read(case.star, always_dict=True)
    seconds, peak = [], 0
    for count in counts:
        some = {**blocks, "particles": blocks["particles"].iloc[:count].copy()}
        some["particles"]["rlnImageName"] = [f"{place + 1}@images.mrcs" for place in range(count)]
        write_mrc(folder / "images.mrcs", particles.images(np.arange(count)), particles.pixel, stack=True)
        starfile.write(some, folder / "some.star", overwrite=True)
        command = (
            f"relion_refine --i some.star --o out/run --ref reference.mrc --iter 1 --ini_high {case.finest_angstrom} --ctf "
            f"--oversampling 1 --particle_diameter {case.mask_diameter_angstrom:g} --healpix_order {order} "
            f"--sigma_ang {58.6 / 2**order * 2:.3f} --offset_range 3 --offset_step 2 "
            f"--sym {case.symmetry} --pad 2 --norm --scale --zero_mask --flatten_solvent "
            "--preread_images --j 1 --skip_maximize --perturb 0"
        )
        with open(folder / "log", "w", encoding="utf-8") as log:
            process = subprocess.Popen(command.split(), cwd=folder, stdout=log, stderr=log)
            _, status, used = os.wait4(process.pid, 0)
        if status:
            raise RuntimeError(f"relion_refine failed: {(folder / 'log').read_text()[-800:]}")
        seconds.append(used.ru_utime + used.ru_stime)
        peak = max(peak, used.ru_maxrss * 1024)
    marginal = (seconds[1] - seconds[0]) / (counts[1] - counts[0])
    return RelionStep(marginal, (seconds[0], seconds[1]), peak, 58.6 / 2 ** (order + 1))
