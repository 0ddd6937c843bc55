"""Atomic models: read, checked, turned into density, moved into the frame of a map and written as mmCIF."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cryodask.errors import InputError

_FINEST_VOXEL_ANGSTROM = 1.9
_SOLVENT_SHARE, _SOLVENT_BLUR_ANGSTROM = 0.6, 4.0
_FEWEST_ATOMS = 50


@dataclass(frozen=True)
class Atoms:
    """Atoms of a model without hydrogens, waters and second conformations: ``positions`` `(n, 3)` (x, y, z) in Angstrom, ``elements``
    `(n,)`, and for each atom the row in ``residues`` of its residue.
    """

    positions: np.ndarray
    elements: list[str]
    residue: np.ndarray
    residues: list[str]


def read_model(path: str, assembly: str | None = None) -> np.ndarray:
    """A PDB or mmCIF file, optionally compressed, as the bytes of an mmCIF file; ``assembly``: name of the biological assembly to build.

    Raises
    ------
    InputError
    """
    import gemmi

    try:
        structure = gemmi.read_structure(str(path))
    except (RuntimeError, ValueError, IndexError, OSError) as error:
        raise InputError(
            f"{path} cannot be read as a model: {error}", "it is not a PDB or mmCIF file, or is damaged", "check the file"
        ) from error
    if assembly is not None:
        known = [one.name for one in structure.assemblies]
        if assembly not in known:
            raise InputError(f"{path} has no assembly {assembly}.", "", f"choose one of {', '.join(known) or 'none: leave it out'}")
        structure.transform_to_assembly(assembly, gemmi.HowToNameCopiedChain.AddNumber)
    if not len(structure):
        raise InputError(f"{path} has no atoms.", "it is not a PDB or mmCIF file of a model", "check the file")
    while len(structure) > 1:
        del structure[1]
    made = bytes_of(structure)
    positions = atoms_of(structure).positions
    count = len(positions)
    if not np.isfinite(positions).all():
        raise InputError(f"{path} has atoms without coordinates.", "the file is damaged, or was edited by hand", "check the file")
    if count > 1 and np.ptp(positions, axis=0).max() < 1.0:
        raise InputError(f"All atoms of {path} are in one place.", "the program that wrote it failed", "check the file")
    if count < _FEWEST_ATOMS:
        raise InputError(
            f"{path} has only {count} atoms.", "it is a ligand, or a fragment", f"give a model of {_FEWEST_ATOMS} atoms or more"
        )
    return made


def bytes_of(structure: Any) -> np.ndarray:
    """The mmCIF file of a gemmi structure `(byte,)` uint8."""
    structure.setup_entities()
    text: str = structure.make_mmcif_document().as_string()
    return np.frombuffer(text.encode(), np.uint8).copy()


def structure_of(model_file: np.ndarray) -> Any:
    """The gemmi structure of stored bytes."""
    import gemmi

    document = gemmi.cif.read_string(np.asarray(model_file, np.uint8).tobytes().decode())
    return gemmi.make_structure_from_block(document.sole_block())


def atoms_of(structure: Any) -> Atoms:
    """Atoms of the first model of a gemmi structure, and of the first conformer of each residue, without hydrogen and water."""
    positions, elements, residue, residues = [], [], [], []
    for chain, one, atoms in kept_atoms(structure):
        residues.append(f"{chain} {one.name} {one.seqid}")
        positions += [a.pos.tolist() for a in atoms]
        elements += [a.element.name for a in atoms]
        residue += [len(residues) - 1] * len(atoms)
    return Atoms(np.array(positions, float).reshape(-1, 3), elements, np.array(residue, np.int64), residues)


def kept_atoms(structure: Any) -> Iterator[tuple[str, Any, list[Any]]]:
    """Chain, residue and atoms that comparisons with a map use: no water, no hydrogen, the first conformer of each residue."""
    for chain in structure[0]:
        for residue in chain.first_conformer():
            conformer = next((a.altloc for a in residue if a.altloc != "\0"), "\0")
            atoms = [a for a in residue if a.altloc in ("\0", conformer) and not a.element.is_hydrogen]
            if atoms and not residue.is_water():
                yield chain.name, residue, atoms


def check_hand(dock_hand: str | None) -> None:
    """Refuse a model that `dock` has placed in the mirror image of the map.

    Raises
    ------
    InputError
    """
    if dock_hand is not None and str(dock_hand) == "mirrored":
        raise InputError(
            "the map has the wrong hand: the model was docked in its mirror image",
            "projections do not tell a map from its mirror image",
            "mirror the map with  - hand: {from: {model: dock}}  and dock the model again after it",
        )


def density(atoms: Atoms, positions: np.ndarray, box: int, voxel_angstrom: float, b_factor_angstrom2: float) -> np.ndarray:
    """Electron scattering density of atoms minus a smooth solvent `(z, y, x)` float32; ``positions`` `(n, 3)` are relative to voxel n // 2.

    Gaussian form factors (International Tables, by gemmi) on a fine grid, which is then cropped in Fourier space to avoid aliasing.
    """
    import gemmi
    import torch
    from scipy.ndimage import gaussian_filter

    from cryodask.kernels.fourier import resize_map

    side, fine = box * voxel_angstrom, box
    while side / fine > _FINEST_VOXEL_ANGSTROM:
        fine *= 2
    voxel = side / fine
    structure, model, chain, residue = gemmi.Structure(), gemmi.Model(1), gemmi.Chain("A"), gemmi.Residue()
    structure.cell, structure.spacegroup_hm = gemmi.UnitCell(side, side, side, 90, 90, 90), "P 1"
    residue.name, residue.seqid = "ALA", gemmi.SeqId("1")
    for position, element in zip(positions + fine // 2 * voxel, atoms.elements):
        atom = gemmi.Atom()
        atom.name, atom.element, atom.pos = "X", gemmi.Element(element), gemmi.Position(*position)
        atom.b_iso, atom.occ = b_factor_angstrom2, 1.0
        residue.add_atom(atom)
    chain.add_residue(residue)
    model.add_chain(chain)
    structure.add_model(model)
    calculator = gemmi.DensityCalculatorE()
    calculator.grid.set_unit_cell(structure.cell)
    calculator.grid.set_size(fine, fine, fine)
    calculator.add_model_density_to_grid(structure[0])
    rho = np.array(calculator.grid, copy=True).transpose(2, 1, 0).astype(np.float64)
    rho -= _SOLVENT_SHARE * gaussian_filter(rho, _SOLVENT_BLUR_ANGSTROM / voxel, mode="wrap")
    whole = torch.from_numpy(rho.astype(np.float32))
    return np.asarray((resize_map(whole, box) if fine != box else whole).numpy())


def moved_file(model_file: np.ndarray, rotation: np.ndarray, shift_angstrom: np.ndarray) -> np.ndarray:
    """The model with coordinates ``rotation @ x + shift``, as the bytes of an mmCIF file without unit cell and space group."""
    import gemmi

    structure = structure_of(model_file)
    transform = gemmi.Transform(gemmi.Mat33(rotation.tolist()), gemmi.Vec3(*shift_angstrom.tolist()))
    structure[0].transform_pos_and_adp(transform)
    structure.cell, structure.spacegroup_hm = gemmi.UnitCell(), ""
    return bytes_of(structure)


def write_model(path: Path, model_file: np.ndarray) -> None:
    """Write a stored model as an mmCIF file."""
    path.write_bytes(np.asarray(model_file, np.uint8).tobytes())
