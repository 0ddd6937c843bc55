"""Export to cryoSPARC: result groups of particles and of micrographs."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from cryodask.formats import cryosparc
from cryodask.formats.mrc import write_mrc
from cryodask.interop.exposures import Exposures
from cryodask.interop.refined_optics import warn_of_unconverted
from cryodask.interop.relion_maps import write_maps
from cryodask.interop.relion_micrographs import exported_micrographs, micrograph_file
from cryodask.interop.relion_particles import exported_particles
from cryodask.store.files import disk_errors
from cryodask.store.project import Item, Project


def export_cryosparc(project: Project, folder: str | Path) -> list[Path]:
    """Export the particles of a project with CTF, poses, half-sets and positions, its micrographs with their CTF and movies, and its
    maps; return the paths written.

    ``particles.csg`` and ``micrographs.csg`` are what cryoSPARC's job "Import Result Group" takes. The uid of a particle is the one it
    came with, else its id in the project; that of a micrograph follows from the content of its movie. Which particles, images, maps: as
    for RELION.
    """
    out = Path(folder)
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        exposures = Exposures.of(project)
        written = [*write_maps(project, out), *_write_micrographs(exposures, out)]
        found = exported_particles(exposures)
        if found is None:
            return written
        columns, images = found
        warn_of_unconverted(columns["relion_optics"], "cryoSPARC")
        write_mrc(out / "particles.mrcs", images, columns["particle_pixel_size_angstrom"], stack=True)
        own = columns["particle_id"]
        known = np.asarray(columns.get("cryosparc_uid", np.zeros_like(own)), np.int64)
        columns["cryosparc_uid"] = np.where(known != 0, known, own).view(np.uint64)
        shapes = _shapes(exposures)
        names = columns["micrograph_name"].tolist()
        shape = np.array([shapes[n] for n in names]) if all(n in shapes for n in names) else None
        uids = {micrograph_file(item.name): _uid(item) for item in project.items()}
        columns["micrograph_uid"] = np.array([uids[n] for n in names], np.uint64)
        cryosparc.write_particles(out / "particles.cs", columns, shape)
    return [out / "particles.csg", out / "particles.cs", out / "particles.mrcs", *written]


def _write_micrographs(exposures: Exposures, out: Path) -> list[Path]:
    """``micrographs.csg`` and ``micrographs.cs``, and the micrographs that they list; nothing if there are none with a CTF."""
    columns, shapes = exported_micrographs(exposures, out)
    if not columns:
        return []
    items = {micrograph_file(name): item for name, item in exposures.items.items()}
    listed = [items[name] for name in columns["micrograph_name"].tolist()]
    columns["cryosparc_uid"] = np.array([_uid(item) for item in listed], np.uint64)
    movies = [exposures.project.value_of(item, "movie_path") for item in listed]
    if all(movies):
        columns["movie_name"] = np.array([str(Path(movie).absolute()) for movie in movies], dtype=object)
    cryosparc.write_micrographs(out / "micrographs.cs", columns, shapes)
    return [out / "micrographs.csg", out / "micrographs.cs"]


def _uid(item: Item) -> int:
    return int.from_bytes(hashlib.blake2b(item.content.encode(), digest_size=8).digest(), "little")


def _shapes(exposures: Exposures) -> dict[str, tuple[int, int]]:
    """Size (y, x) of each micrograph, by the name of its file."""
    every = [d for label in exposures.givers("micrograph") for d in exposures.project.by_image_size(label)]
    return {micrograph_file(str(n)): (d.sizes["y"], d.sizes["x"]) for d in every for n in d["micrograph"].values if "micrograph_dw" in d}
