"""Particle stacks for the benchmarks, made once and kept under benchmarks/out; and a serial loop over a ``blocks`` stage."""

from __future__ import annotations

import bz2
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
import starfile
import torch

from cryodask.kernels.orientations import angular_error_deg, euler_to_matrix
from cryodask.kernels.symmetry import symmetry_operators
from cryodask.run.blocks import ParticlesInMemory, iterate_here
from cryodask.stage import ParticleSet

OUT = Path(__file__).parent / "out"
SHARED = Path(__file__).resolve().parents[2] / "shared"


def peers_stack() -> dict[str, Path]:
    """p64 and p128 of ``peers/make_stack.py`` (2400 beta-galactosidase particles, D2, noise like real data) and their truth."""
    folder = OUT / "stacks"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "truth64.mrc").exists():
        script = SHARED / "peers" / "make_stack.py"
        shutil.copy(SHARED / "data" / "models" / "5a1a.cif.gz", folder)
        for arguments in (
            ["map", "5a1a.cif.gz", "truth128.mrc"],
            ["stack", "truth128.mrc", "p128"],
            ["halve", "p128", "p64"],
            ["halve", "truth128.mrc", "truth64.mrc"],
        ):
            subprocess.run([sys.executable, str(script), *arguments], cwd=folder, check=True)
    return {name: folder / name for name in ("p64", "p128", "truth64.mrc", "truth128.mrc")}


def another_stack(box: int, count: int, seed: int) -> Path:
    """A stack like p64 or p128 of :func:`peers_stack`, of other particles; without the suffix."""
    folder = peers_stack()[f"p{box}"].parent
    full = f"p128_n{count}_s{seed}"
    out = folder / (full if box == 128 else f"p64_n{count}_s{seed}")
    if not out.with_suffix(".star").exists():
        script = SHARED / "peers" / "make_stack.py"
        for arguments in (["stack", "truth128.mrc", full, "--particles", str(count), "--seed", str(seed)], ["halve", full, out.name]):
            if arguments[0] == "stack" or box == 64:
                subprocess.run([sys.executable, str(script), *arguments], cwd=folder, check=True)
    return out


def read_stack(stack: Path, star: Path) -> tuple[np.ndarray, ParticleSet, Any]:
    """Images `(n, y, x)` float32, their set (halves by parity), and the STAR rows."""
    with mrcfile.open(stack, permissive=True) as f:
        images = np.asarray(f.data, np.float32)
    blocks = starfile.read(star, always_dict=True)
    optics, rows = blocks["optics"].iloc[0], blocks["particles"]
    n = len(rows)
    constant = lambda value: np.full(n, float(value))  # noqa: E731
    columns = {
        "defocus_u_angstrom": rows["rlnDefocusU"].to_numpy(float),
        "defocus_v_angstrom": rows["rlnDefocusV"].to_numpy(float),
        "defocus_angle_deg": rows["rlnDefocusAngle"].to_numpy(float),
        "phase_shift_deg": rows["rlnPhaseShift"].to_numpy(float) if "rlnPhaseShift" in rows else constant(0),
        "voltage_kv": constant(optics["rlnVoltage"]),
        "spherical_aberration_mm": constant(optics["rlnSphericalAberration"]),
        "amplitude_contrast": constant(optics["rlnAmplitudeContrast"]),
        "micrograph": np.unique(rows["rlnMicrographName"], return_inverse=True)[1],
        "half_set": np.arange(n) % 2,
    }
    return images, ParticleSet(n, images.shape[-1], float(optics["rlnImagePixelSize"]), columns), rows


def real_stack() -> tuple[np.ndarray, ParticleSet]:
    """The 2374 particles of EMPIAR-10204 with the tutorial's CTF, and the folder of their starting map."""
    folder = OUT / "stacks"
    folder.mkdir(parents=True, exist_ok=True)
    source = SHARED / "data" / "betagal_10204"
    stack = folder / "real64.mrcs"
    if not stack.exists():
        stack.write_bytes(bz2.decompress((source / "particles_64.mrcs.bz2").read_bytes()))
    images, particles, _ = read_stack(stack, source / "particles.star")
    return images, particles


def ngl_map() -> Path:
    """Map of beta-galactosidase made by others: the start of the real refinement."""
    path = OUT / "stacks" / "ngl.mrc"
    if not path.exists():
        path.write_bytes(bz2.decompress((SHARED / "data" / "models" / "betagal_ngl_100_3.54A.mrc.bz2").read_bytes()))
    return path


def subset(images: np.ndarray, particles: ParticleSet, rows: np.ndarray) -> tuple[np.ndarray, ParticleSet]:
    """Some of the particles as a set of their own."""
    columns = {name: values[rows] for name, values in particles.columns.items()}
    columns["half_set"] = np.arange(len(rows)) % 2
    return images[rows], ParticleSet(len(rows), particles.box, particles.pixel_size_angstrom, columns)


def iterate(
    stage: Any, params: Any, images: np.ndarray, particles: ParticleSet, inputs: dict[str, Any] | None = None,
    watch: Callable[[dict, dict, dict, float], None] | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:  # fmt: skip
    """Run a ``blocks`` stage to its end in this process. Returns (result, last state); ``watch(state, metrics, columns, cpu_seconds)``."""
    start = time.process_time()
    last: dict[str, Any] = {}

    def note(state: dict, metrics: dict, columns: dict) -> None:
        last["state"] = state
        if watch:
            watch(state, metrics, columns, time.process_time() - start)

    result = iterate_here(stage.functions, params, ParticlesInMemory(particles, images), inputs, on_iteration=note)
    return result, last["state"]


def pose_errors(columns: dict[str, np.ndarray], truth: Any, symmetry: str) -> np.ndarray:
    """Angular errors, degrees, against the STAR rows of the truth; of a result, or of the columns of an iteration."""
    if "mode_rotation" in columns:
        found = torch.from_numpy(columns["mode_rotation"][:, 0]).double()
    else:
        found = _matrices(columns["rot_deg"], columns["tilt_deg"], columns["psi_deg"])
    true = _matrices(*truth[["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"]].to_numpy(float).T)
    return angular_error_deg(found, true, symmetry_operators(symmetry)).numpy()


def _matrices(*angles_deg: np.ndarray) -> torch.Tensor:
    return euler_to_matrix(*(torch.deg2rad(torch.from_numpy(np.asarray(a, np.float64))) for a in angles_deg))


def sphere_fsc(a: np.ndarray, b: np.ndarray, pixel: float, radius: float = 95.0) -> np.ndarray:
    """FSC `(shell,)` under a soft sphere with a 10 A edge."""
    from cryodask.kernels.fourier import soft_sphere
    from cryodask.kernels.fsc import fsc

    mask = soft_sphere(a.shape[0], pixel, radius, 10.0)
    return fsc(torch.from_numpy(a) * mask, torch.from_numpy(b) * mask).numpy()


def read_map(path: Path) -> tuple[np.ndarray, float]:
    """Map and voxel size."""
    with mrcfile.open(path, permissive=True) as f:
        return np.array(f.data, np.float32), float(f.voxel_size.x)
