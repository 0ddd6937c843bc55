"""A small session with known truth, exported to RELION once per run, and RELION's programs run in it."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
import torch
from _once import once, simulated

from cryodask.formats import star
from cryodask.formats.mrc import write_mrc
from cryodask.interop import export_relion
from cryodask.kernels.orientations import euler_to_matrix
from cryodask.run.recipe import make_plan
from cryodask.run.session import run_plan
from cryodask.simulate import SessionParams, load_truth

PARAMS = SessionParams(movies=4, height=512, width=512, frames=6, dose_per_frame=40 / 6, particles=11, truth_maps=((64, 3.54),))
"""The movies of test_chain.py."""
BOX, PIXEL, MICROGRAPH_PIXEL = 64, 3.54, 1.77
ANGLES = ("rot_deg", "tilt_deg", "psi_deg")
GREY_SCALE = 0.04
"""Of the particle images, over the truth map's."""
PROJECT = """
name: p
inputs: {movies: "movies/*.tif", gain: gain.mrc}
microscope: {voltage_kv: 300, spherical_aberration_mm: 2.7, amplitude_contrast: 0.1, pixel_size_angstrom: 1.77, dose_per_frame: 6.667}
pipeline:
  - motion: {patches: [3, 3]}
  - ctf
  - import_particles: {star: truth.star, images: false, from: {exposures: ctf}}
  - extract: {box: 128, scale_to: 64, from: {exposures: ctf}}
"""
MAPS = """  - import_map: {half_maps: [half1.mrc, half2.mrc], symmetry: D2, frame_of: import_particles}
  - mask
  - postprocess: {fit_from_angstrom: 15}
"""


def exported(factory: Any, client: Any, params: SessionParams = PARAMS) -> Path:
    """The folder of the session: its project ``p``, and its export ``relion``."""

    def make(folder: Path) -> None:
        simulated(factory, folder, params)
        truth_map = mrcfile.read(folder / "truth" / "map_64_3.54A.mrc").astype(np.float32)
        rng = np.random.default_rng(0)
        for half in (1, 2):
            noise = 1.5 * truth_map.std() * rng.normal(size=truth_map.shape)
            write_mrc(folder / f"half{half}.mrc", (GREY_SCALE * (truth_map + noise)).astype(np.float32), PIXEL)
        write_truth(folder)
        project = PROJECT.replace("dose_per_frame: 6.667", f"dose_per_frame: {params.dose_per_frame:.5g}")
        (folder / "p.yaml").write_text(project + MAPS)
        export_relion(run_plan(make_plan(folder / "p.yaml"), client), folder / "relion")

    return once(factory, f"relion-session-{params.height}", make)


def write_truth(folder: Path) -> None:
    """True positions and poses of all particles as ``truth.star``, without images: coordinates of whole pixels, the rest as origins."""
    truth = load_truth(folder)
    counts = truth.columns["particle_count"].astype(int)
    columns = {
        name: np.concatenate([truth.columns[name][i][:n] for i, n in enumerate(counts)]).astype(float)
        for name in ("particle_y", "particle_x", *ANGLES)
    }
    count = int(counts.sum())
    for axis in "yx":
        whole = np.floor(columns[f"particle_{axis}"])
        columns[f"origin_{axis}_angstrom"] = (whole - columns[f"particle_{axis}"]) * MICROGRAPH_PIXEL
        columns[f"particle_{axis}"] = whole
    star.write_particles(
        folder / "truth.star",
        {
            **columns,
            "micrograph_name": np.repeat([f"micrographs/{name}.mrc" for name in truth.names], counts).astype(object),
            "image_index": np.arange(count),
            "image_stack": "none.mrcs",
            "particle_pixel_size_angstrom": MICROGRAPH_PIXEL,
            "pixel_size_angstrom": MICROGRAPH_PIXEL,
            "box": 128,
            "voltage_kv": 300.0,
            "spherical_aberration_mm": 2.7,
            "amplitude_contrast": 0.1,
            "half_set": np.arange(count) % 2,
        },
    )


def linked(export: Path, folder: Path) -> Path:
    """The files of an export in another folder, where programs may write."""
    for path in export.iterdir():
        (folder / path.name).symlink_to(path)
    return folder


def relion(folder: Path, program: str, *options: object) -> str:
    """Run a program in a folder; what it said. It fails if it does not know one of the options."""
    done = subprocess.run([f"relion_{program}", *map(str, options)], cwd=folder, capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-2000:]
    assert "not a valid RELION argument" not in said, said[-2000:]
    return said


def images(folder: Path, columns: dict[str, np.ndarray]) -> np.ndarray:
    """Images `(particle, y, x)` of a table."""
    stacks = {name: np.atleast_3d(mrcfile.read(folder / name)).reshape(-1, BOX, BOX) for name in set(columns["image_stack"])}
    return np.array([stacks[name][i] for name, i in zip(columns["image_stack"], columns["image_index"])])


def by_id(folder: Path, name: str, like: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A table of particles in the order of another one with the same ids."""
    columns = star.read_particles(folder / name)
    place = {int(i): row for row, i in enumerate(columns["particle_id"])}
    assert place.keys() == set(like["particle_id"].tolist())
    order = [place[int(i)] for i in like["particle_id"]]
    return {key: values[order] for key, values in columns.items()}


def rotations(columns: dict[str, np.ndarray]) -> torch.Tensor:
    """Poses `(particle, 3, 3)` of a table."""
    return euler_to_matrix(*(torch.deg2rad(torch.from_numpy(columns[name])) for name in ANGLES))


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Mean correlation of the images of two stacks."""
    return float(np.mean([np.corrcoef(x.ravel(), y.ravel())[0, 1] for x, y in zip(a, b)]))
