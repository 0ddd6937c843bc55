"""Helices and strands of a protein from its CA atoms alone: P-SEA (Labesse, Colloc'h, Pothier & Mornon 1997, CABIOS 13, 291).

Five CA atoms in a row look like a helix or a strand if their distances are those of one, or if the angle of three and the dihedral of four
of them are. Runs of at least five such residues count; strands of three or four need neighbours as close as in a sheet.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy.spatial import cKDTree

HELIX, STRAND, OTHER = "helix", "strand", ""
_LARGEST_STEP_ANGSTROM = 4.2
_LONG, _SHORT_STRAND = 5, 3
_SHEET_ANGSTROM, _SHEET_CONTACTS = (4.2, 5.2), 5


@dataclass(frozen=True)
class _Rule:
    """Values and tolerances: distances to the second, third and fourth next CA, Angstrom; angle of three, dihedral of four, degrees."""

    second: tuple[float, float]
    third: tuple[float, float]
    fourth: tuple[float, float]
    angle: tuple[float, float]
    dihedral: tuple[float, float]


_HELIX = _Rule((5.5, 0.5), (5.3, 0.5), (6.4, 0.6), (89.0, 12.0), (50.0, 20.0))
_STRAND = _Rule((6.7, 0.6), (9.9, 0.9), (12.4, 1.1), (124.0, 14.0), (-170.0, 45.0))


def structure_of_chain(places: np.ndarray) -> np.ndarray:
    """``"helix"``, ``"strand"`` or ``""`` for each residue `(residue,)` of a chain of CA atoms `(residue, 3)`, Angstrom.

    Residues without a CA are NaN; they, and steps of more than 4.2 A, break the chain.
    """
    out = np.full(len(places), OTHER, dtype="<U6")
    known = np.isfinite(places).all(1)
    tree = cKDTree(places[known]) if known.any() else None
    for first, last in _pieces(places):
        if tree is not None and last - first >= _LONG and known[first:last].all():
            near, nearer = (tree.query_ball_point(places[first:last], r, return_length=True) for r in _SHEET_ANGSTROM[::-1])
            out[first:last] = _of_piece(places[first:last], near - nearer)
    return out


def runs(kinds: np.ndarray) -> Iterator[tuple[int, int]]:
    """First and last + 1 of each run of equal values."""
    edges = [0, *(np.flatnonzero(kinds[1:] != kinds[:-1]) + 1).tolist(), len(kinds)] if len(kinds) else [0]
    yield from pairwise(edges)


def _pieces(places: np.ndarray) -> Iterator[tuple[int, int]]:
    start = 0
    for i, step in enumerate(np.linalg.norm(np.diff(places, axis=0), axis=1).tolist(), 1):
        if not step <= _LARGEST_STEP_ANGSTROM:  # NaN breaks it, too
            yield start, i
            start = i
    yield start, len(places)


def _of_piece(places: np.ndarray, contacts: np.ndarray) -> np.ndarray:
    angle, dihedral = _angles(places)
    second, third, fourth = (_from_second(np.linalg.norm(places[n:] - places[:-n], axis=1), len(places)) for n in (2, 3, 4))

    def looks_like(rule: _Rule) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        by_third, by_angle = _near(third, rule.third), _near(angle, rule.angle)
        by_lengths = by_third & _near(fourth, rule.fourth)
        if rule is _STRAND:
            by_lengths &= _near(second, rule.second)
        twist = np.abs((dihedral - rule.dihedral[0] + 180.0) % 360.0 - 180.0) <= rule.dihedral[1]
        return by_lengths | (by_angle & twist), by_third, by_angle

    out = np.full(len(places), OTHER, dtype="<U6")
    alike, by_third, by_angle = looks_like(_HELIX)
    out[_grown(_long_runs(alike, _LONG), by_third | by_angle)] = HELIX
    alike, by_third, _ = looks_like(_STRAND)
    strand = _grown(_long_runs(alike, _LONG), by_third) | _long_runs(alike, _SHORT_STRAND, contacts)
    out[strand & (out == OTHER)] = STRAND
    return out


def _near(values: np.ndarray, wanted: tuple[float, float]) -> np.ndarray:
    return np.asarray(np.abs(values - wanted[0]) <= wanted[1])  # False for NaN


def _from_second(values: np.ndarray, count: int) -> np.ndarray:
    """Values of neighbourhoods that begin at each residue, moved to the second residue of each, `(count,)`."""
    return np.concatenate([[np.nan], values, np.full(count - 1 - len(values), np.nan)])


def _long_runs(alike: np.ndarray, shortest: int, contacts: np.ndarray | None = None) -> np.ndarray:
    """Runs of at least that length; if ``contacts`` `(residue,)` are given, only those with five or more."""
    out = np.zeros(len(alike), bool)
    for first, last in runs(alike):
        enough = contacts is None or contacts[first:last].sum() >= _SHEET_CONTACTS
        out[first:last] = alike[first] and last - first >= shortest and enough
    return out


def _grown(region: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """A region with the next residue on either side, where that is allowed."""
    beside = np.zeros_like(region)
    beside[1:] |= region[:-1]
    beside[:-1] |= region[1:]
    return region | (beside & allowed)


def _angles(places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Angle of the three and dihedral of the four CA atoms from the one before each residue on, degrees `(residue,)`, NaN at the ends."""
    steps = np.diff(places, axis=0)
    unit = steps / np.linalg.norm(steps, axis=1, keepdims=True)
    angle = np.degrees(np.arccos(np.clip(-(unit[:-1] * unit[1:]).sum(1), -1.0, 1.0)))
    normals = np.cross(unit[:-1], unit[1:])
    sine = (np.cross(normals[:-1], normals[1:]) * unit[1:-1]).sum(1)
    dihedral = np.degrees(np.arctan2(sine, (normals[:-1] * normals[1:]).sum(1)))
    return _from_second(angle, len(places)), _from_second(dihedral, len(places))
