"""Stage ``import_particles``: extracted particles of another program."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import numpy as np

from cryodask.errors import InputError, MicrographError
from cryodask.formats.mrc import open_mrc
from cryodask.formats.star import find_beside, read_particles
from cryodask.stage import Params, stage

_OWN = ("defocus_u_angstrom", "defocus_v_angstrom", "defocus_angle_deg", "phase_shift_deg")


class ImportParticlesParams(Params):
    """No parameters."""


@functools.lru_cache(maxsize=2)
def _table(path: str, mtime: float) -> dict[str, np.ndarray]:
    return read_particles(path)


@stage(
    version=1,
    needs=["particles_path", "micrograph_name"],
    gives=[
        "particle_image",
        "particle_y",
        "particle_x",
        "particle_count",
        "particle_pixel_size_angstrom",
        "particle_defocus_u_angstrom",
        "particle_defocus_v_angstrom",
        "particle_defocus_angle_deg",
        "particle_phase_shift_deg",
        "voltage_kv",
        "spherical_aberration_mm",
        "amplitude_contrast",
    ],
)
def import_particles(params: ImportParticlesParams, *, particles_path: str, micrograph_name: str, device: str = "cpu") -> dict[str, Any]:
    """Read the particles of one micrograph from a RELION STAR file and its stacks, each with its own defocus.

    Images are taken as they are: protein white, background mean 0 and standard deviation 1, as RELION extracts them.
    """
    table = _table(particles_path, os.path.getmtime(particles_path))
    names = table.get("micrograph_name")
    rows = np.arange(len(table["image_index"])) if names is None else np.nonzero(np.asarray(names, dtype=str) == micrograph_name)[0]
    if "defocus_u_angstrom" not in table:
        raise InputError(f"{particles_path} has no rlnDefocusU.", "the CTF was not estimated before extraction", "estimate it first")
    images = _read_images(particles_path, table, rows)
    if not np.isfinite(images).all():
        raise MicrographError(f"Particles of {micrograph_name} hold pixels that are no numbers.", "the stack is damaged", "extract again")
    blank = int((images.std((1, 2)) == 0).sum())
    if blank:
        raise MicrographError(
            f"{blank} of {len(rows)} particles of {micrograph_name} are blank.",
            "the extraction wrote empty boxes",
            "remove them from the STAR file",
        )
    u = table["defocus_u_angstrom"][rows]
    column = {name: table.get(name, np.zeros(len(table["image_index"])))[rows] for name in _OWN}
    column["defocus_v_angstrom"] = table.get("defocus_v_angstrom", table["defocus_u_angstrom"])[rows]
    optics = {n: float(table[n][rows[0]]) for n in ("voltage_kv", "spherical_aberration_mm", "amplitude_contrast")}
    zero = np.zeros(len(u), np.float32)
    return {
        "particle_image": images,
        "particle_y": table["particle_y"][rows] if "particle_y" in table else zero,
        "particle_x": table["particle_x"][rows] if "particle_x" in table else zero,
        "particle_count": len(rows),
        "particle_pixel_size_angstrom": float(table["particle_pixel_size_angstrom"][rows[0]]),
        **{f"particle_{n}": v.astype(np.float32) for n, v in column.items()},
        **optics,
    }


def _read_images(star: str, table: dict[str, np.ndarray], rows: np.ndarray) -> np.ndarray:
    stacks = table["image_stack"][rows]
    out: np.ndarray | None = None
    for stack in dict.fromkeys(stacks.tolist()):
        path = find_beside(stack, Path(star))
        if path is None:
            raise MicrographError(
                f"The stack {stack} of {star} is not there.", "the STAR file was moved without its stacks", "copy them beside it"
            )
        frames = open_mrc(path)
        here = np.nonzero(stacks == stack)[0]
        index = table["image_index"][rows[here]]
        if index.max(initial=0) >= len(frames):
            raise MicrographError(
                f"{path} holds {len(frames)} images, {star} asks for number {int(index.max()) + 1}.",
                "the stack was cut short, or belongs to another STAR file",
                "copy it again",
            )
        for place, i in zip(here, index):
            image = np.asarray(frames[int(i)], np.float32)
            if out is None:
                out = np.empty((len(rows), *image.shape), np.float32)
            if image.shape != out.shape[1:]:
                raise MicrographError(
                    f"{path} has boxes of {image.shape}, not {out.shape[1:]}.", "two extractions in one file", "split them"
                )
            out[place] = image
    assert out is not None
    return out
