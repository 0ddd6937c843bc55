"""Faults of a particle set that are known before a map is made from it."""

from __future__ import annotations

import numpy as np

from cryodask.errors import InputError
from cryodask.stage import ParticleSet

_LEAST_DEFOCUS_ANGSTROM = 100.0


def check_particles(particles: ParticleSet, mask_diameter_angstrom: float | None) -> None:
    """Refuse particles without a CTF, and a mask that is wider than their box.

    Raises
    ------
    InputError
    """
    nothing = np.full(particles.count, np.nan)
    u, v = (np.asarray(particles.columns.get(f"defocus_{axis}_angstrom", nothing), float) for axis in "uv")
    # a phase plate needs no defocus
    phase = np.asarray(particles.columns.get("phase_shift_deg", np.zeros(particles.count)), float)
    lacking = int((~((np.abs(u + v) >= 2.0 * _LEAST_DEFOCUS_ANGSTROM) | (np.isfinite(u + v) & (np.abs(phase) > 1.0)))).sum())
    if lacking:
        raise InputError(
            f"{lacking} of {particles.count} particles have no CTF: their defocus is missing or zero",
            "the CTF was not estimated, or was lost between programs",
            "estimate it (stage ctf), or import a STAR file with rlnDefocusU and rlnDefocusV",
        )
    length = particles.box * float(particles.pixel_size_angstrom)
    if mask_diameter_angstrom is not None and mask_diameter_angstrom > length:
        raise InputError(
            f"a mask of {mask_diameter_angstrom:g} A does not fit into a box of {length:.0f} A",
            "the diameter is that of another molecule, or in other units",
            "set mask_diameter_angstrom to about 1.1 times the diameter of the molecule, or extract larger boxes",
        )


def check_mask(mask: np.ndarray, shape: tuple[int, ...]) -> None:
    """Refuse a mask that is not on the grid of a map of this shape.

    Raises
    ------
    InputError
    """
    if np.shape(mask) != shape:
        raise InputError(
            f"the mask has {' x '.join(map(str, np.shape(mask)))} voxels, the map {' x '.join(map(str, shape))}",
            "it was made for another map",
            "make the mask from this map, or resample it onto its grid",
        )
