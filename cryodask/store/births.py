"""Birth tables: the numbers of the particles of an exposure, given once and kept for ever.

The table of an exposure rides in the commit record of the stage that gives birth: ``particle_id``, ``particle_half``, ``pick_y``,
``pick_x``, ``pick_score``, and ``natural_key`` where the particles have a name of their own. It is append-only: when it is computed again
(after a repair, on another device, from a sorted file), what lies where a particle lay, or has its natural key, is that particle. What is
no longer found stays at the end of the table with the score NaN, so that its number is never given to another.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from cryodask.store.identity import birth_of, half_sets, make_ids, number_of, row_of

SAME_PLACE_PX = 1.0
"""Distance within which a pick that is found again is the same particle."""
TABLE = ("particle_id", "particle_half", "pick_y", "pick_x", "pick_score")


@dataclass(frozen=True)
class Birth:
    """A birth: its number in the project, and the seed by which its particles are dealt to the half-sets."""

    number: int
    seed: int = 0


def natural_keys(names: Any) -> np.ndarray:
    """Names of particles (image names, uids) as int64: 63 bits of a hash, so that tables of millions stay small."""
    digests = (hashlib.blake2b(str(name).encode(), digest_size=8).digest() for name in names)
    return np.array([int.from_bytes(d, "little") >> 1 for d in digests], np.int64)


def born(birth: Birth, row: int, found: dict[str, Any], before: dict[str, np.ndarray] | None) -> dict[str, Any]:
    """The birth table of an exposure.

    Parameters
    ----------
    birth : Birth
    row : int
        Of the exposure.
    found : dict
        ``pick_y``, ``pick_x`` (pixels), and perhaps ``pick_score``, ``natural_key``, ``half_set`` (-1: by the rule), ``particle_id`` (of
        particles that were exported from this project).
    before : dict, optional
        The table that this exposure had; its particles keep their numbers.

    Returns
    -------
    dict
        ``particle_id, particle_half, pick_y, pick_x, pick_score`` (and ``natural_key``): first what was found, in its order, then what
        is no longer found.
    """
    known = np.asarray(found.get("particle_id", ()), np.int64)
    if len(known) == len(found["pick_y"]) and (known > 0).any() and (row_of(known[known > 0]) == row).all():
        return _with_returned(birth, row, found, before, known > 0)
    y, x = (np.asarray(found[name], np.float32) for name in ("pick_y", "pick_x"))
    score = np.asarray(found.get("pick_score", np.zeros(len(y))), np.float32)
    natural = found.get("natural_key")
    if before is None or not len(before["particle_id"]):
        number = np.empty(len(y), np.int64)
        number[first_order(y, x, score) if natural is None else np.arange(len(y))] = np.arange(len(y))
        gone = np.zeros(0, np.int64)
    else:
        known = _found_again(y, x, natural, before)
        old_number = number_of(before["particle_id"])
        number = np.where(known >= 0, old_number[known], -1)
        fresh = np.flatnonzero(known < 0)
        fresh = fresh[first_order(y[fresh], x[fresh], score[fresh])] if natural is None else fresh
        number[fresh] = int(old_number.max()) + 1 + np.arange(len(fresh))
        gone = np.setdiff1d(np.arange(len(old_number)), known)
    ids = make_ids(birth.number, row, number)
    half = half_sets(ids, birth.seed)
    given = found.get("half_set")
    if given is not None:
        half = np.where(np.asarray(given) >= 0, given, half).astype(np.int8)
    table: dict[str, Any] = {"particle_id": ids, "particle_half": half, "pick_y": y, "pick_x": x, "pick_score": score}
    if natural is not None:
        table["natural_key"] = np.asarray(natural, np.int64)
    if before is not None and len(before["particle_id"]):
        table["particle_half"] = _halves_as_before(table, before)
        lost = {name: before[name][gone] for name in table}
        lost["pick_score"] = np.full(len(gone), np.nan, np.float32)
        table = {name: np.concatenate([table[name], lost[name]]).astype(table[name].dtype) for name in table}
    return table


def first_order(y: np.ndarray, x: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Order in which particles are numbered: falling score, then row, then column; so a threshold keeps a prefix."""
    return np.lexsort((x, y, -score))


def _with_returned(
    birth: Birth, row: int, found: dict[str, Any], before: dict[str, np.ndarray] | None, known: np.ndarray
) -> dict[str, Any]:
    """The table where some particles keep the ids that they had (back from another program, or from another step); the rest is born."""
    columns = {n: np.asarray(found[n]) for n in ("pick_y", "pick_x", "pick_score", "natural_key", "half_set") if n in found}
    mine = None
    if before is not None:
        here = birth_of(before["particle_id"]) == birth.number
        mine = {name: values[here] for name, values in before.items()}
    fresh = born(birth, row, {name: values[~known] for name, values in columns.items()}, mine)
    ids = np.asarray(found["particle_id"], np.int64)[known]
    half = half_sets(ids, birth.seed)
    if "half_set" in columns:
        half = np.where(columns["half_set"][known] >= 0, columns["half_set"][known], half)
    table: dict[str, Any] = {"particle_id": ids, "particle_half": half.astype(np.int8)}
    for name in fresh:
        if name not in table:
            table[name] = columns[name][known] if name in columns else np.zeros(len(ids), fresh[name].dtype)
    return {name: np.concatenate([table[name], fresh[name]]).astype(fresh[name].dtype) for name in fresh}


def _halves_as_before(table: dict[str, Any], before: dict[str, np.ndarray]) -> np.ndarray:
    """Halves are written once: those of known particles are what they were."""
    half = dict(zip(before["particle_id"].tolist(), before["particle_half"].tolist()))
    return np.array([half.get(i, h) for i, h in zip(table["particle_id"].tolist(), table["particle_half"].tolist())], np.int8)


def _found_again(y: np.ndarray, x: np.ndarray, natural: Any, before: dict[str, np.ndarray]) -> np.ndarray:
    """Place in the table before of each particle found now, -1 for new ones; nobody is found twice."""
    if natural is not None and "natural_key" in before:
        place = {key: i for i, key in enumerate(before["natural_key"].tolist())}
        return np.array([place.get(key, -1) for key in np.asarray(natural).tolist()], np.int64)
    from scipy.spatial import cKDTree

    if not len(y):
        return np.zeros(0, np.int64)
    old, new = np.stack([before["pick_y"], before["pick_x"]], 1), np.stack([y, x], 1)
    distance, nearest = cKDTree(old).query(new, distance_upper_bound=SAME_PLACE_PX)
    _, back = cKDTree(new).query(old)
    near = np.isfinite(distance)
    mutual = np.zeros(len(y), bool)
    mutual[near] = back[nearest[near]] == np.flatnonzero(near)
    return np.where(mutual, nearest, -1)


def accepted(score: np.ndarray, threshold: float | np.ndarray | None) -> np.ndarray:
    """Mask of the particles of a birth table that count: still found, and with a score above the threshold (None: all of them)."""
    alive = np.isfinite(score)
    return alive if threshold is None else alive & (score > threshold)
