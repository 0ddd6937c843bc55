"""Birth tables: the numbers of an exposure's particles, assigned once and kept forever.

The table of an exposure is stored in the commit record of the stage that creates the particles: ``particle_id``, ``particle_half``,
``pick_y``, ``pick_x``, ``pick_score``, and ``natural_key`` if the particles have names of their own. It is append-only: whenever it is
recomputed (after a repair, on another device, from a sorted, shorter or longer file), a pick with the natural key or the position of a
known particle is that particle. Particles that are no longer found stay at the end of the table with score NaN, so that their numbers are
never reused. If a particle is found twice, the second one is dropped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cryodask.store.claims import SAME_PLACE_PX, proven, same_place
from cryodask.store.identity import birth_of, half_sets, make_ids, number_of, parent_of, row_of
from cryodask.vocabulary import VARIABLES

TABLE = ("particle_id", "particle_half", "pick_y", "pick_x", "pick_score")
KNOWN = (*TABLE, "natural_key")


@dataclass(frozen=True)
class Birth:
    """A birth: its number in the project, and the seed for assigning its particles to half-sets."""

    number: int
    seed: int = 0


def natural_keys(names: Any) -> np.ndarray:
    """Names of particles (image names, uids) as int64: 63 bits of a hash, so that tables of millions stay small."""
    digests = (hashlib.blake2b(str(name).encode(), digest_size=8).digest() for name in names)
    return np.array([int.from_bytes(d, "little") >> 1 for d in digests], np.int64)


def known_of(tables: Iterable[tuple[Mapping[str, Any], bool]]) -> dict[str, np.ndarray]:
    """Concatenate the birth tables of an exposure, earliest first; ``own``: whether a table belongs to the current birth.

    A particle occurs once per table, because every position and natural key that it ever had identifies it.
    """
    parts: dict[str, list[np.ndarray]] = {name: [np.zeros(0, VARIABLES[name].dtype)] for name in KNOWN}
    parts["own"] = [np.zeros(0, bool)]
    tables = list(tables)
    if not tables:
        return {name: some[0] for name, some in parts.items()}
    for table, own in tables:
        count = len(table["particle_id"])
        filled = {"natural_key": np.full(count, -1, np.int64), "own": np.full(count, own), **table}
        for name, some in parts.items():
            some.append(np.asarray(filled[name]))
    return {name: np.concatenate(some).astype(some[0].dtype) for name, some in parts.items()}


def born(birth: Birth, row: int, found: dict[str, Any], before: Mapping[str, np.ndarray] | None) -> dict[str, Any]:
    """The birth table of an exposure.

    Parameters
    ----------
    birth : Birth
    row : int
        Row of the exposure.
    found : dict
        ``pick_y``, ``pick_x`` (pixels), and optionally ``pick_score``, ``natural_key``, ``half_set`` (-1: by the rule), ``particle_id``
        (0 if unknown), ``placed`` (False: y and x are meaningless), ``left_out_id`` (particles that nothing may be matched with).
    before : mapping, optional
        The earlier table of this exposure, or several combined by :func:`known_of`; its particles keep their ids and halves.

    Returns
    -------
    dict
        ``particle_id, particle_half, pick_y, pick_x, pick_score`` (and ``natural_key``): first the found particles in order, each
        once, then those no longer found.
    """
    return _settle(birth, row, found, before)[0]


def with_ids(
    birth: Birth, row: int, given: dict[str, Any], known: Mapping[str, np.ndarray] | None
) -> tuple[dict[str, Any], dict[str, int]]:
    """Add particle ids to the output of a stage, each particle once.

    Returns
    -------
    dict, dict
        All values, and counts for the run to report: ``twice``, rows dropped because their particle is present already;
        ``unproven``, rows with an id that is not theirs here; ``none_left``, earlier rows of which the source has none now;
        ``unmatched``, edits of particles that do not exist.
    """
    found = dict(given)
    if "claimed_id" in given:
        found |= proven(row, given, known if known is not None else known_of(()))
    table, kept = _settle(birth, row, found, known)
    told = {"unmatched": int(given.get("unmatched", 0))}
    if "claimed_id" in given:
        told["unproven"] = int((kept & (np.asarray(given["claimed_id"]) > 0) & (found["particle_id"] == 0)).sum())
        told["none_left"] = 0 if len(kept) else len(table["particle_id"])
    out = dict(given)
    if not kept.all():
        told["twice"] = int((~kept).sum())
        for name, value in given.items():
            if name in VARIABLES and VARIABLES[name].ragged and isinstance(value, np.ndarray) and len(value) == len(kept):
                out[name] = value[kept]
        if int(given.get("particle_count", -1)) == len(kept):
            out["particle_count"] = int(kept.sum())
    return out | table, {name: count for name, count in told.items() if count}


def first_order(y: np.ndarray, x: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Order of numbering: descending score, then row, then column; so a threshold keeps a prefix."""
    return np.lexsort((x, y, -score))


def _settle(birth: Birth, row: int, found: Mapping[str, Any], before: Mapping[str, np.ndarray] | None) -> tuple[dict[str, Any], np.ndarray]:
    """The table, and the mask of the found particles that are in it."""
    y, x = (np.asarray(found[name], np.float32) for name in ("pick_y", "pick_x"))
    count = len(y)
    score = np.asarray(found.get("pick_score", np.zeros(count)), np.float32)
    natural = found.get("natural_key")
    known = _as_known(before)
    given = np.asarray(found.get("particle_id", np.zeros(count)), np.int64)
    given = np.where((given > 0) & (row_of(given) == row), given, 0)
    lead, copy = (np.asarray(found.get(n, fill), np.int64) for n, fill in (("lead", np.arange(count)), ("copy", np.zeros(count))))
    ids, kept = _by_name(given, lead, known, natural)
    if found.get("placed", True) and count > 1:
        kept &= ~_at_one_place(np.stack([y, x], 1), score, kept, (given == 0) & (copy == 0), natural)
    fresh = kept & (ids == 0) & (lead == np.arange(count))
    if found.get("placed", True):
        _by_place(birth, ids, fresh, np.stack([y, x], 1), known, np.asarray(found.get("left_out_id", ()), np.int64))
        fresh &= ids == 0
    at = np.flatnonzero(fresh)
    at = at if natural is not None else at[first_order(y[at], x[at], score[at])]
    used = np.concatenate([known["particle_id"], given])
    used = used[birth_of(used) == birth.number]
    ids[at] = make_ids(birth.number, row, int(number_of(used).max(initial=-1)) + 1 + np.arange(len(at)))
    follows = given == 0
    ids[follows] = parent_of(ids[lead[follows]]) | copy[follows]
    kept[follows] = kept[lead[follows]]
    table: dict[str, Any] = {"particle_id": ids[kept], "pick_y": y[kept], "pick_x": x[kept], "pick_score": score[kept]}
    if natural is not None:
        table["natural_key"] = np.asarray(natural, np.int64)[kept]
    half = np.asarray(found.get("half_set", np.full(count, -1)), np.int8)[kept]
    table["particle_half"] = _halves(birth, table["particle_id"], half, known)
    if not len(known["particle_id"]):
        return {name: values.astype(VARIABLES[name].dtype) for name, values in table.items()}, kept
    gone = _latest(known, known["own"] & ~np.isin(known["particle_id"], ids[kept]))
    lost = {name: known[name][gone] for name in table}
    lost["pick_score"] = np.full(len(gone), np.nan, np.float32)
    lost["particle_half"] = _halves(birth, lost["particle_id"], lost["particle_half"], known)
    return {name: np.concatenate([table[name], lost[name]]).astype(VARIABLES[name].dtype) for name in table}, kept


def _as_known(before: Mapping[str, np.ndarray] | None) -> Mapping[str, np.ndarray]:
    if before is None:
        return known_of(())
    return before if "own" in before else known_of([(before, True)])


def _by_name(given: np.ndarray, lead: np.ndarray, known: Mapping[str, np.ndarray], natural: Any) -> tuple[np.ndarray, np.ndarray]:
    """Ids given with the particles, else by natural key (0: unknown), and the mask without duplicates."""
    keys = np.asarray(natural, np.int64) if natural is not None else np.full(len(given), -1, np.int64)
    called: list[int] = keys.tolist()
    named: dict[int, int] = {}
    for key, one, score, own in zip(*(known[n].tolist() for n in ("natural_key", "particle_id", "pick_score", "own"))):
        if key >= 0 and own and (np.isfinite(score) or key not in named):  # if two had the same name, the later one
            named[key] = one
    ids, kept = given.copy(), np.ones(len(given), bool)
    if not len(known["particle_id"]) and not given.any() and (natural is None or len(set(called)) == len(called)):
        return ids, kept
    taken: set[int] = set()
    used: set[int] = set()
    for i in [*np.flatnonzero(given > 0).tolist(), *np.flatnonzero((given == 0) & (lead == np.arange(len(given)))).tolist()]:
        if not given[i]:
            ids[i] = named.get(int(keys[i]), 0)
            kept[i] = called[i] == -1 or called[i] not in used
        kept[i] &= not ids[i] or int(ids[i]) not in taken
        if kept[i]:
            used.add(called[i])
            taken.add(int(ids[i]))
    return ids, kept


def _at_one_place(place: np.ndarray, score: np.ndarray, kept: np.ndarray, judged: np.ndarray, natural: Any) -> np.ndarray:
    """Mask of the judged particles within a pixel of another that is kept: of two that are judged, the first in order of numbering is.

    Particles with names of their own may come with meaningless positions, all the same or all zero; these are not compared.
    """
    from scipy.spatial import cKDTree

    dropped = np.zeros(len(place), bool)
    at = np.flatnonzero(kept & np.isfinite(place).all(1) & ((natural is None) | (place != 0).any(1)))
    if len(at) < 2 or (natural is not None and (place[at] == place[at[0]]).all()):
        return dropped
    rank = np.empty(len(place), np.int64)
    rank[np.arange(len(place)) if natural is not None else first_order(place[:, 0], place[:, 1], score)] = np.arange(len(place))
    rank[~judged] -= len(place)
    for i, j in sorted(cKDTree(place[at]).query_pairs(SAME_PLACE_PX), key=lambda pair: max(rank[at[pair[0]]], rank[at[pair[1]]])):
        first, second = sorted((at[i], at[j]), key=lambda one: rank[one])
        if judged[second] and not dropped[first] and np.hypot(*(place[first] - place[second])) < SAME_PLACE_PX:
            dropped[second] = True
    return dropped


def _by_place(
    birth: Birth, ids: np.ndarray, fresh: np.ndarray, place: np.ndarray, known: Mapping[str, np.ndarray], not_these: np.ndarray
) -> None:
    """Assign the ids of known particles by position; `ids` is filled in place."""
    if not len(known["particle_id"]):
        return
    taken = np.concatenate([ids[ids > 0], not_these])
    candidates = (known["own"] | (birth_of(known["particle_id"]) == birth.number)) & ~np.isin(known["particle_id"], taken)
    old = _latest(known, candidates & np.isfinite(known["pick_y"]) & np.isfinite(known["pick_x"]))
    new = np.flatnonzero(fresh & np.isfinite(place).all(1))
    match = same_place(place[new], np.stack([known["pick_y"][old], known["pick_x"][old]], 1))
    ids[new[match >= 0]] = known["particle_id"][old[match[match >= 0]]]


def _latest(known: Mapping[str, np.ndarray], mask: np.ndarray) -> np.ndarray:
    """Row of the last entry of each particle within a mask, in the order of the ids."""
    rows = np.flatnonzero(mask)[::-1]
    return rows[np.unique(known["particle_id"][rows], return_index=True)[1]]


def _halves(birth: Birth, ids: np.ndarray, given: np.ndarray, known: Mapping[str, np.ndarray]) -> np.ndarray:
    """Half-sets are assigned once: known particles (or their parents) keep theirs, others as given, else by the rule."""
    new = np.where(given >= 0, given, half_sets(ids, birth.seed)).astype(np.int8)
    if not len(known["particle_id"]):
        return new
    once: dict[int, int] = {}
    for one, half in zip(known["particle_id"].tolist(), known["particle_half"].tolist()):
        once.setdefault(one, half)
    both = zip(ids.tolist(), parent_of(ids).tolist(), new.tolist())
    return np.array([once.get(one, once.get(parent, half)) for one, parent, half in both], np.int8)


def accepted(score: np.ndarray, threshold: float | np.ndarray | None) -> np.ndarray:
    """Mask of the accepted particles of a birth table: still found, with a score above the threshold (None: all)."""
    alive = np.isfinite(score)
    return alive if threshold is None else np.asarray(alive & (score > threshold))
