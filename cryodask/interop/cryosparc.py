"""Export to cryoSPARC: a result group of particles."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cryodask.formats import cryosparc
from cryodask.formats.mrc import write_mrc
from cryodask.interop.exposures import Exposures
from cryodask.interop.relion_maps import write_maps
from cryodask.interop.relion_micrographs import micrograph_file
from cryodask.interop.relion_particles import exported_particles
from cryodask.store.files import disk_errors
from cryodask.store.project import Project


def export_cryosparc(project: Project, folder: str | Path) -> list[Path]:
    """Export the particles of a project with CTF, poses, half-sets and positions, and its maps; return the paths written.

    ``particles.csg`` is what cryoSPARC's job "Import Result Group" takes; with ``particles.cs`` and ``particles.mrcs``. The uid of a
    particle is the one it came with, else its id in the project. Which particles, images, maps: as for RELION.
    """
    out = Path(folder)
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        exposures = Exposures.of(project)
        written = write_maps(project, out)
        found = exported_particles(exposures)
        if found is None:
            return written
        columns, images = found
        write_mrc(out / "particles.mrcs", images, columns["particle_pixel_size_angstrom"], stack=True)
        own = columns["particle_id"]
        known = np.asarray(columns.get("cryosparc_uid", np.zeros_like(own)), np.int64)
        columns["cryosparc_uid"] = np.where(known != 0, known, own).view(np.uint64)
        shapes = _shapes(exposures)
        names = columns["micrograph_name"].tolist()
        shape = np.array([shapes[n] for n in names]) if all(n in shapes for n in names) else None
        cryosparc.write_particles(out / "particles.cs", columns, shape)
    return [out / "particles.csg", out / "particles.cs", out / "particles.mrcs", *written]


def _shapes(exposures: Exposures) -> dict[str, tuple[int, int]]:
    """Size (y, x) of each micrograph, by the name of its file."""
    every = [d for label in exposures.givers("micrograph") for d in exposures.project.by_image_size(label)]
    return {micrograph_file(str(n)): (d.sizes["y"], d.sizes["x"]) for d in every for n in d["micrograph"].values if "micrograph_dw" in d}
