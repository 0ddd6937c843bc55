"""Simulated particles in RELION form: a stack and a STAR file, with true positions and CTF."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from cryodask.formats.mrc import write_mrc
from cryodask.formats.star import write_particles
from cryodask.kernels.extraction import extract_particles
from cryodask.simulate.model import MoleculeName
from cryodask.simulate.scene import Optics, simulate_micrograph

_EDGE = 1024
_PER_MICROGRAPH = 100


def simulate_particles(
    folder: str | Path,
    *,
    molecule: MoleculeName = "beta-galactosidase",
    count: int = 300,
    box: int = 48,
    pixel_size_angstrom: float = 5.5,
    seed: int = 1,
) -> Path:
    """Write ``particles.mrcs`` and ``particles.star`` into a folder; returns the STAR file. At most 100 particles share a micrograph.

    Parameters
    ----------
    molecule : str
        A name of :data:`cryodask.simulate.model.MOLECULES`.
    count : int
        Number of particles.
    box : int
        Box size of the images, pixels, even.
    pixel_size_angstrom : float
        Pixel size of the images; the micrographs they are extracted from have half of it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.Generator(np.random.SFC64([seed, 3]))
    pixel = 0.5 * pixel_size_angstrom
    images: list[np.ndarray] = []
    columns: dict[str, list[np.ndarray]] = {}
    micrograph = 0
    while (missing := count - sum(len(i) for i in images)) > 0:
        defocus = rng.uniform(10000.0, 22000.0)
        optics = Optics(
            pixel, defocus_u_angstrom=defocus + 100.0, defocus_v_angstrom=defocus - 100.0, defocus_angle_deg=rng.uniform(0.0, 180.0)
        )
        made = simulate_micrograph(
            shape=(_EDGE, _EDGE),
            optics=optics,
            molecule=molecule,
            particles=min(missing, _PER_MICROGRAPH),
            damage=False,
            seed=1000 * seed + micrograph,
        )
        micrograph += 1
        y, x = np.floor(made.particles.y), np.floor(made.particles.x)
        rows, across = (torch.from_numpy(v.astype(np.int64)) for v in (y, x))
        cut = extract_particles(
            torch.from_numpy(made.image), rows, across, box=2 * box, size=box, background_radius_px=0.375 * box, invert=True, ramp=True
        )
        images.append(cut.numpy())
        one = np.ones(len(y))
        for name, values in {
            "micrograph_name": np.full(len(y), f"micrograph_{micrograph:03d}.mrc", dtype=object),
            "particle_y": y,
            "particle_x": x,
            "defocus_u_angstrom": one * optics.defocus_u_angstrom,
            "defocus_v_angstrom": one * optics.defocus_v_angstrom,
            "defocus_angle_deg": one * optics.defocus_angle_deg,
            "voltage_kv": one * optics.voltage_kv,
            "spherical_aberration_mm": one * optics.spherical_aberration_mm,
            "amplitude_contrast": one * optics.amplitude_contrast,
        }.items():
            columns.setdefault(name, []).append(values)
    stack = np.concatenate(images)
    write_mrc(folder / "particles.mrcs", stack, pixel_size_angstrom, stack=True)
    path = folder / "particles.star"
    write_particles(
        path,
        {name: np.concatenate(values) for name, values in columns.items()}
        | {
            "image_index": np.arange(len(stack)),
            "image_stack": "particles.mrcs",
            "particle_pixel_size_angstrom": pixel_size_angstrom,
            "pixel_size_angstrom": pixel,
            "box": box,
        },
    )
    return path
