"""Make the files of ``data`` from deposited models: ``python -m cryodask.simulate.make_protomer betagal_protomer 5a1a.cif.gz``.

Without hydrogen, water and ions. All entries are CC0:

- ``betagal_protomer``, PDB 5A1A, E. coli beta-galactosidase (Bartesaghi et al. 2015): chain A, moved so that the two-fold axes of
  the tetramer (D2) are x, y and z.
- ``clpb``, PDB 6RN2, ClpB hexamer with casein (Deville et al. 2019): all chains, about their mean. Six copies in a spiral, no symmetry.
"""

from __future__ import annotations

import sys
from pathlib import Path

import gemmi
import numpy as np

FOLDER = Path(__file__).parent / "data"
SOURCES: dict[str, tuple[bool, int]] = {"betagal_protomer": (True, 1), "clpb": (False, 16)}
"""For each file: whether only the first chain is kept, and to what multiple of 0.01 Angstrom coordinates are rounded; 0.16 Angstrom
halves the size of a file, and no simulated map shows it."""


def atoms_of(path: str, first_chain_only: bool) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates `(atom, 3)` (x, y, z) in Angstrom about the mean of all atoms of the entry, and element names `(atom,)`."""
    model = gemmi.read_structure(path)
    model.remove_alternative_conformations()
    model.remove_hydrogens()
    model.remove_waters()
    chains = [[(a.pos.tolist(), a.element.name) for r in chain for a in r if a.element.name in "CNOS"] for chain in model[0]]
    centre = np.mean([position for chain in chains for position, _ in chain], axis=0)
    kept = [atom for chain in chains[: 1 if first_chain_only else None] for atom in chain]
    return np.array([p for p, _ in kept]) - centre, np.array([e for _, e in kept])


if __name__ == "__main__":
    name, source = sys.argv[1:3]
    first_chain_only, step = SOURCES[name]
    positions, elements = atoms_of(source, first_chain_only)
    order = np.lexsort((np.arange(len(elements)), elements))
    rounded = step * np.round(100 * positions[order] / step)
    destination = FOLDER / f"{name}.npz"
    np.savez_compressed(destination, position_centiangstrom=rounded.astype(np.int16), element=elements[order].astype("S1"))
    print(f"{destination}: {len(elements)} atoms, {destination.stat().st_size} bytes")
