"""Make ``data/betagal_protomer.npz`` from the deposited model: ``python -m cryodask.simulate.make_protomer 5a1a.cif.gz``.

PDB entry 5A1A, E. coli beta-galactosidase (Bartesaghi et al. 2015), CC0. Chain A without hydrogen, water and ions, moved so
that the two-fold axes of the tetramer (D2) are x, y and z; coordinates are rounded to 0.01 Angstrom.
"""

from __future__ import annotations

import sys
from pathlib import Path

import gemmi
import numpy as np

DESTINATION = Path(__file__).parent / "data" / "betagal_protomer.npz"


def protomer_of(path: str) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates `(atom, 3)` (x, y, z) in Angstrom and element names `(atom,)` of chain A, centred on the tetramer."""
    model = gemmi.read_structure(path)
    model.remove_alternative_conformations()
    model.remove_hydrogens()
    model.remove_waters()
    chains = [[(a.pos.tolist(), a.element.name) for r in chain for a in r if a.element.name in "CNOS"] for chain in model[0]]
    centre = np.mean([position for chain in chains for position, _ in chain], axis=0)
    return np.array([p for p, _ in chains[0]]) - centre, np.array([e for _, e in chains[0]])


if __name__ == "__main__":
    positions, elements = protomer_of(sys.argv[1])
    order = np.lexsort((np.arange(len(elements)), elements))
    np.savez_compressed(
        DESTINATION, position_centiangstrom=np.round(100 * positions[order]).astype(np.int16), element=elements[order].astype("S1")
    )
    print(f"{DESTINATION}: {len(elements)} atoms, {DESTINATION.stat().st_size} bytes")
