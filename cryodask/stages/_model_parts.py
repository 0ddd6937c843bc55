"""What a model consists of: kinds of residues, what is left out of comparisons, helices and strands."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from cryodask.stages._models import kept_atoms

PROTEIN, NUCLEIC, OTHER = "protein", "nucleic acid", "other"


@dataclass(frozen=True)
class Parts:
    """Residues of a model, in the order of :class:`cryodask.stages._models.Atoms`, and what else is in its file.

    ``kinds`` `(residue,)`; ``chains`` `(residue,)`; ``ca`` `(residue, 3)` places of the CA atoms, NaN where there is none;
    ``sizes`` `(residue,)` number of atoms; ``waters``, ``hydrogens`` and ``alternates``: number of atoms left out.
    """

    kinds: np.ndarray
    chains: np.ndarray
    ca: np.ndarray
    sizes: np.ndarray
    waters: int
    hydrogens: int
    alternates: int

    @property
    def only_guides(self) -> bool:
        """Whether it is a trace: one atom per residue of the polymers (CA or P), or hardly more."""
        polymer = self.kinds != OTHER
        return bool(polymer.any() and self.sizes[polymer].mean() < 2.0)


@dataclass(frozen=True)
class Element:
    """A helix or strand: its residues are rows ``first`` to ``last`` - 1 of the model's."""

    kind: str
    first: int
    last: int


def parts_of(structure: Any) -> Parts:
    """The parts of the first model of a gemmi structure."""
    import gemmi

    kinds, chains, ca, sizes = [], [], [], []
    for chain, residue, atoms in kept_atoms(structure):
        known = gemmi.find_tabulated_residue(residue.name)
        kinds.append(PROTEIN if known.is_amino_acid() else NUCLEIC if known.is_nucleic_acid() else OTHER)
        chains.append(chain)
        guide = next((a for a in atoms if a.name == "CA" and a.element.name == "C"), None)
        ca.append(guide.pos.tolist() if guide is not None else [np.nan] * 3)
        sizes.append(len(atoms))
    everything = [(residue.is_water(), a.element.is_hydrogen) for chain in structure[0] for residue in chain for a in residue]
    waters = sum(water for water, _ in everything)
    hydrogens = sum(hydrogen and not water for water, hydrogen in everything)
    rest = len(everything) - waters - hydrogens - sum(sizes)
    return Parts(np.array(kinds), np.array(chains), np.array(ca, float).reshape(-1, 3), np.array(sizes), waters, hydrogens, rest)


def secondary_structure(structure: Any, parts: Parts) -> tuple[list[Element], str]:
    """Helices and strands in the order of the residues, and where they are from: ``file``, ``CA atoms`` (P-SEA) or ``both``.

    Each chain has those of the file's records, or if it has none there those of its CA atoms.
    """
    from cryodask.kernels.secondary_structure import runs, structure_of_chain

    recorded = _recorded(structure)
    kinds, sources = np.full(len(parts.kinds), "", dtype="<U6"), set()
    elements = []
    for first, last in runs(parts.chains):
        chain = str(parts.chains[first])
        if chain in recorded:
            kinds[first:last] = _from_records(structure, chain, recorded[chain], last - first)
            sources.add("file")
        elif (parts.kinds[first:last] == PROTEIN).any():
            kinds[first:last] = structure_of_chain(np.where(parts.kinds[first:last, None] == PROTEIN, parts.ca[first:last], np.nan))
            sources.add("CA atoms")
        elements += [Element(str(kinds[first + a]), first + a, first + b) for a, b in runs(kinds[first:last]) if kinds[first + a]]
    used = sorted(sources) if elements else []
    return elements, "both" if len(used) == 2 else "".join(used)


def _recorded(structure: Any) -> dict[str, list[tuple[str, Any, Any]]]:
    """Kind, first and last residue of the helices and strands in the file, by chain."""
    out: dict[str, list[tuple[str, Any, Any]]] = {}
    ends = [("helix", h.start, h.end) for h in structure.helices]
    ends += [("strand", strand.start, strand.end) for sheet in structure.sheets for strand in sheet.strands]
    for kind, start, end in ends:
        out.setdefault(start.chain_name, []).append((kind, start.res_id.seqid, end.res_id.seqid))
    return out


def _from_records(structure: Any, chain: str, records: list[tuple[str, Any, Any]], count: int) -> np.ndarray:
    places = {place: row for row, place in enumerate(_places(structure, chain))}
    out = np.full(count, "", dtype="<U6")
    for kind, start, end in records:
        first, last = places.get((start.num, start.icode)), places.get((end.num, end.icode))
        if first is not None and last is not None:
            out[first : last + 1] = kind
    return out


def _places(structure: Any, chain: str) -> Iterator[tuple[int, str]]:
    for name, residue, _ in kept_atoms(structure):
        if name == chain:
            yield residue.seqid.num, residue.seqid.icode
