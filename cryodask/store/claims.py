"""Claims: particle ids from outside the project, and which of them are proven.

Ids are unique within one project only; other projects use the same numbers. So an id in an imported file is accepted only with a proof:
the particle's position at birth (which exported files have in extra columns), or its natural key. An unproven claim is dropped, and the
particle gets a new id from the import.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from cryodask.store.identity import birth_of, copy_of, parent_of, row_of

SAME_PLACE_PX = 1.0
"""Distance within which a repeated pick is the same particle."""
ADOPTING = ("edit_picks", "import_particles", "import_project")
"""Stages whose birth tables may contain particles of other births."""
_ROUNDING_PX = 1e-3
"""Tolerance for positions that were stored as text or in single precision."""
_BITS = 24


def birth_marks(y: Any, x: Any, natural_key: Any) -> tuple[np.ndarray, np.ndarray]:
    """Positions at birth (y, x), `(n,)` each, pixels of the exposure: the proof that an exported file contains.

    A particle without a position (y and x are 0) but with a natural key gets one that is derived from the key.
    """
    y, x = (np.asarray(a, np.float64) for a in (y, x))
    key = np.asarray(natural_key, np.int64)
    nowhere = (y == 0) & (x == 0) & (key >= 0)
    limit = (1 << _BITS) - 1
    return np.where(nowhere, key & limit, y), np.where(nowhere, (key >> _BITS) & limit, x)


def same_place(new: np.ndarray, old: np.ndarray) -> np.ndarray:
    """Index in `old` of the position within 1 px of each position in `new`, -1 if there is none; positions `(n, 2)`, pixels.

    Both must be mutual nearest neighbours, so nothing is matched twice.
    """
    from scipy.spatial import cKDTree

    if not len(new) or not len(old):
        return np.full(len(new), -1, np.int64)
    distance, nearest = cKDTree(old).query(new, distance_upper_bound=SAME_PLACE_PX)
    _, back = cKDTree(new).query(old)
    near = np.isfinite(distance)
    mutual = np.zeros(len(new), bool)
    mutual[near] = back[nearest[near]] == np.flatnonzero(near)
    return np.where(mutual, nearest, -1).astype(np.int64)


def proven(row: int, found: Mapping[str, Any], known: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Decide which claims are accepted.

    Parameters
    ----------
    row : int
        Row of the exposure.
    found : mapping
        ``claimed_id`` (0: none), and optionally ``claimed_y, claimed_x`` (position at birth according to the file, pixels), ``pick_y,
        pick_x``, ``natural_key``, ``placed``. ``claims_by_name``: the births were already matched by identity, so an unused id belongs
        to this particle; then either all particles of a birth and exposure are accepted, or none.
    known : mapping
        Known particles of the exposure, from :func:`cryodask.store.births.known_of`.

    Returns
    -------
    dict
        ``particle_id`` (0 if unproven), and for copies of a particle whose claim is dropped ``lead``, the first of them, and ``copy``.
    """
    claimed = np.asarray(found["claimed_id"], np.int64)
    count, parent = len(claimed), parent_of(claimed)
    if not claimed.any():
        return {"particle_id": claimed, "lead": np.arange(count), "copy": np.zeros(count, np.int64)}
    y, x, placed = _claimed_places(found, count)
    keys = np.asarray(found.get("natural_key", np.full(count, -1)), np.int64)
    places, names = _proofs(known)
    here = (claimed > 0) & (row_of(claimed) == row)
    there = np.array([one in places for one in parent.tolist()], bool)
    agrees = np.array(
        [
            key in names.get(one, ()) or any(np.hypot(y[i] - b, x[i] - a) <= SAME_PLACE_PX + _ROUNDING_PX for b, a in places.get(one, ()))
            for i, (one, key) in enumerate(zip(parent.tolist(), keys.tolist()))
        ],
        bool,
    )
    believed = here & there & agrees
    if found.get("claims_by_name"):
        # the numbers were assigned independently: no number of that birth and exposure identifies a particle
        apart = np.unique(birth_of(claimed[here & there & ~agrees])) if placed else np.zeros(0, np.int64)
        believed = here & ~np.isin(birth_of(claimed), apart)
    ids = np.where(believed, claimed, 0)
    lead, copy = np.arange(count), np.zeros(count, np.int64)
    doubted = np.flatnonzero((claimed > 0) & ~believed)
    copy[doubted] = copy_of(claimed[doubted])
    _, first, group = np.unique(parent[doubted], return_index=True, return_inverse=True)
    grouped = copy[doubted] > 0
    lead[doubted[grouped]] = doubted[first[group]][grouped]
    return {"particle_id": ids, "lead": lead, "copy": copy}


def _claimed_places(found: Mapping[str, Any], count: int) -> tuple[np.ndarray, np.ndarray, bool]:
    """Positions that prove the claims: those at birth if the file has them, else the current ones."""
    if "claimed_y" in found and "claimed_x" in found:
        return np.asarray(found["claimed_y"], np.float64), np.asarray(found["claimed_x"], np.float64), True
    if not found.get("placed", True):
        return np.full(count, np.nan), np.full(count, np.nan), False
    return np.asarray(found["pick_y"], np.float64), np.asarray(found["pick_x"], np.float64), True


def _proofs(known: Mapping[str, np.ndarray]) -> tuple[dict[int, list[tuple[float, float]]], dict[int, set[int]]]:
    """All positions and natural keys that each particle ever had, by id."""
    y, x = birth_marks(known["pick_y"], known["pick_x"], known["natural_key"])
    places: dict[int, list[tuple[float, float]]] = {}
    names: dict[int, set[int]] = {}
    for one, b, a, key in zip(parent_of(known["particle_id"]).tolist(), y.tolist(), x.tolist(), known["natural_key"].tolist()):
        places.setdefault(one, []).append((b, a))
        if key >= 0:
            names.setdefault(one, set()).add(key)
    return places, names
