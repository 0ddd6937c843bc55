"""Models that external programs write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cryodask.errors import InputError, ProgramError
from cryodask.stages._models import atoms_of, kept_atoms

_WAY_OUT = "check its output in the folder logs of the result"


def built_model(path: Path, program: str, box: int, voxel_angstrom: float) -> Any:
    """The gemmi structure that a program wrote, with its first model only.

    Raises
    ------
    ProgramError
        It cannot be read, has no atoms, or lies outside the map of ``box`` voxels.
    """
    import gemmi

    try:
        structure = gemmi.read_structure(str(path))
    except (RuntimeError, ValueError, IndexError, OSError) as error:
        raise ProgramError(f"{program} wrote a model that cannot be read: {error}", "", _WAY_OUT) from error
    while len(structure) > 1:
        del structure[1]
    count = len(atoms_of(structure).elements) if len(structure) else 0
    if not count:
        raise ProgramError(f"{program} wrote a model without atoms", "the map is too poor, or its hand is wrong", _WAY_OUT)
    places = atoms_of(structure).positions / voxel_angstrom
    outside = float(((places < 0) | (places > box - 1)).any(1).mean())
    if outside > 0.1:
        raise ProgramError(f"{100 * outside:.0f} % of the model that {program} wrote lies outside the map", "", _WAY_OUT)
    structure.setup_entities()
    structure.cell, structure.spacegroup_hm = gemmi.UnitCell(), ""
    return structure


def check_map(volume: np.ndarray) -> None:
    """Refuse a map from which no program can build anything.

    Raises
    ------
    InputError
    """
    if not np.isfinite(volume).all() or not np.std(volume) > 0:
        raise InputError("the map is empty or contains NaN", "the refinement that made it failed", "check its report")


def rms_movement(before: Any, after: Any) -> float:
    """Root mean square distance, Angstrom, between atoms of the same chain, residue and name in two structures; NaN if there are none."""

    def places(structure: Any) -> dict[tuple[str, str, str], list[float]]:
        return {(c, str(r.seqid), a.name): a.pos.tolist() for c, r, atoms in kept_atoms(structure) for a in atoms}

    old, new = places(before), places(after)
    both = [key for key in old if key in new]
    if not both:
        return float("nan")
    apart = np.array([old[key] for key in both]) - np.array([new[key] for key in both])
    return float(np.sqrt((apart * apart).sum(1).mean()))
