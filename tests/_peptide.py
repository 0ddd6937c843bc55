"""Small proteins with known secondary structure and their density, for tests of models in maps."""

from __future__ import annotations

import gemmi
import numpy as np

from cryodask.stages import _models as md

HELIX, STRAND = (-57.0, -47.0), (-120.0, 130.0)


def placed(a: np.ndarray, b: np.ndarray, c: np.ndarray, length: float, angle_deg: float, dihedral_deg: float) -> np.ndarray:
    """A fourth atom from three and its internal coordinates."""
    angle, dihedral = np.radians([angle_deg, dihedral_deg])
    along = (c - b) / np.linalg.norm(c - b)
    normal = np.cross(b - a, along)
    normal /= np.linalg.norm(normal)
    across = np.cross(normal, along)
    return c + length * (-np.cos(angle) * along + np.sin(angle) * (np.cos(dihedral) * across + np.sin(dihedral) * normal))


def chain_of(name: str, turns: list[tuple[float, float]], first: int = 1) -> gemmi.Chain:
    """Polyalanine with these phi and psi, degrees: N, CA, C, O and CB of each residue."""
    n, ca, c = np.array([0.0, 0.0, 0.0]), np.array([1.458, 0.0, 0.0]), np.array([2.0, 1.42, 0.0])
    chain = gemmi.Chain(name)
    for number, (phi, psi) in enumerate(turns):
        if number:
            n_next = placed(n, ca, c, 1.329, 116.6, turns[number - 1][1])
            ca_next = placed(ca, c, n_next, 1.458, 121.7, 180.0)
            n, ca, c = n_next, ca_next, placed(c, n_next, ca_next, 1.525, 111.0, phi)
        oxygen = placed(n, ca, c, 1.231, 120.1, psi + 180.0)
        beta = placed(n, c, ca, 1.53, 110.5, -122.5)
        residue = gemmi.Residue()
        residue.name, residue.seqid = "ALA", gemmi.SeqId(first + number, " ")
        for atom_name, element, place in (("N", "N", n), ("CA", "C", ca), ("C", "C", c), ("O", "O", oxygen), ("CB", "C", beta)):
            residue.add_atom(atom(atom_name, element, place))
        chain.add_residue(residue)
    return chain


def atom(name: str, element: str, place: np.ndarray) -> gemmi.Atom:
    """An atom."""
    made = gemmi.Atom()
    made.name, made.element, made.pos, made.occ, made.b_iso = name, gemmi.Element(element), gemmi.Position(*place), 1.0, 30.0
    return made


def bundle(helices: int = 3, strands: int = 2, residues: int = 18, spacing: float = 11.0, centre: float = 32.0) -> gemmi.Structure:
    """Parallel helices and strands, one chain each, about a centre on the diagonal."""
    structure, model = gemmi.Structure(), gemmi.Model(1)
    for number in range(helices + strands):
        chain = chain_of("ABCDEFGH"[number], [HELIX if number < helices else STRAND] * residues)
        places = np.array([a.pos.tolist() for r in chain for a in r])
        middle = places.mean(0)
        _, _, axes = np.linalg.svd(places - middle)
        axes *= np.linalg.det(axes)
        across, up = number % 3 - 1.0, number // 3 - 0.5
        for residue in chain:
            for one in residue:
                turned = axes @ (np.array(one.pos.tolist()) - middle)
                one.pos = gemmi.Position(*(turned[[1, 2, 0]] + centre + spacing * np.array([across, up, 0.0])))
        model.add_chain(chain)
    structure.add_model(model)
    return structure


def density_of(structure: gemmi.Structure, box: int, voxel: float, b_factor: float = 60.0) -> np.ndarray:
    """Density of a model whose coordinates are from the centre of voxel 0 `(z, y, x)`."""
    atoms = md.atoms_of(structure)
    return md.density(atoms, atoms.positions - box // 2 * voxel, box, voxel, b_factor)
