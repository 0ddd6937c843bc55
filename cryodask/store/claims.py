"""Claims: ids that particles bring along from outside, and which of them are proven.

An id is a number of this project only; another project deals the same ones. So an id that comes back is believed only with a proof: the
place at which the particle was born (which an exported file carries in columns of its own), or its natural key. An unproven claim is
dropped, and the particle is born again under the import.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from cryodask.store.identity import birth_of, copy_of, parent_of, row_of

SAME_PLACE_PX = 1.0
"""Distance within which a pick that is found again is the same particle."""
ADOPTING = ("edit_picks", "import_particles", "import_project")
"""Stages whose birth tables may hold particles of other births."""
_ROUNDING_PX = 1e-3
"""Places went through text and single precision."""
_BITS = 24


def birth_marks(y: Any, x: Any, natural_key: Any) -> tuple[np.ndarray, np.ndarray]:
    """Where particles were born, `(n,)` each, pixels of the exposure: the proof that an exported file carries.

    A particle that has no place (y and x are 0), but a natural key, is given one that is made from the key.
    """
    y, x = (np.asarray(a, np.float64) for a in (y, x))
    key = np.asarray(natural_key, np.int64)
    nowhere = (y == 0) & (x == 0) & (key >= 0)
    limit = (1 << _BITS) - 1
    return np.where(nowhere, key & limit, y), np.where(nowhere, (key >> _BITS) & limit, x)


def same_place(new: np.ndarray, old: np.ndarray) -> np.ndarray:
    """Place in `old` of what lies within 1 px of each place of `new`, -1 where nothing does; places `(n, 2)`, pixels.

    Both must be the nearest of each other, so nobody is found twice.
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
    """Which claims are believed.

    Parameters
    ----------
    row : int
        Of the exposure.
    found : mapping
        ``claimed_id`` (0: none), and perhaps ``claimed_y, claimed_x`` (the place of birth as the file says it, pixels), ``pick_y,
        pick_x``, ``natural_key``, ``placed``. ``claims_by_name``: the births were compared by their identity already, so an id that
        nobody has yet is that of this particle. There all particles of a birth and exposure are believed, or none.
    known : mapping
        All that is known of the particles of the exposure, as :func:`cryodask.store.births.known_of` makes it.

    Returns
    -------
    dict
        ``particle_id`` (0 where nothing is proven), and for copies of a particle whose claim is dropped ``lead``, the first of them, and
        ``copy``.
    """
    claimed = np.asarray(found["claimed_id"], np.int64)
    count, parent = len(claimed), parent_of(claimed)
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
        # numbers that name other places here were dealt apart: of that birth no number of the exposure says who a particle is
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
    """Places that prove the claims: those of birth where the file has them, else those at which the particles stand now."""
    if "claimed_y" in found and "claimed_x" in found:
        return np.asarray(found["claimed_y"], np.float64), np.asarray(found["claimed_x"], np.float64), True
    if not found.get("placed", True):
        return np.full(count, np.nan), np.full(count, np.nan), False
    return np.asarray(found["pick_y"], np.float64), np.asarray(found["pick_x"], np.float64), True


def _proofs(known: Mapping[str, np.ndarray]) -> tuple[dict[int, list[tuple[float, float]]], dict[int, set[int]]]:
    """Every place and every natural key that a particle ever had, by its id."""
    y, x = birth_marks(known["pick_y"], known["pick_x"], known["natural_key"])
    places: dict[int, list[tuple[float, float]]] = {}
    names: dict[int, set[int]] = {}
    for one, b, a, key in zip(parent_of(known["particle_id"]).tolist(), y.tolist(), x.tolist(), known["natural_key"].tolist()):
        places.setdefault(one, []).append((b, a))
        if key >= 0:
            names.setdefault(one, set()).add(key)
    return places, names
