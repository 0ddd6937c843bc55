"""Shared by the stages that work on sets: results with reasons, positions of particles, grouping by exposure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from cryodask.errors import InputError
from cryodask.stage import SetView
from cryodask.store.identity import row_of


def kept_and_dropped(ids: np.ndarray, reason: np.ndarray, *, stage: str, usual_reason: str, way_out: str) -> dict[str, Any]:
    """Result of a stage that keeps some particles of one set.

    Parameters
    ----------
    ids : `(n,)`, int64, sorted
        The particles that the stage judged.
    reason : `(n,)`, int8
        0 for a kept particle, else the number of the reason.
    stage, usual_reason, way_out : str
        For the error message.

    Returns
    -------
    dict
        ``particle_id``, ``dropped_id``, ``removal_reason``.

    Raises
    ------
    InputError
        If no particle is kept.
    """
    kept = reason == 0
    if not kept.any():
        raise InputError(f"{stage} kept none of {len(ids)} particles.", usual_reason, way_out)
    return {"particle_id": ids[kept], "dropped_id": ids[~kept], "removal_reason": reason[~kept].astype(np.int8)}


def places_of(view: SetView) -> np.ndarray:
    """Picked positions `(n, 2)` float64 (y, x) in the exposures, angstrom; NaN where unknown."""
    columns = view.read(["position"])
    return np.stack([np.asarray(columns[f"position_{axis}_angstrom"], np.float64) for axis in "yx"], -1)


def exposures_of(ids: np.ndarray, usable: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the row of each exposure with the indices of its ``usable`` particles, in the order of the ids."""
    chosen = np.flatnonzero(usable)
    rows = row_of(ids[chosen])
    order = np.argsort(rows, kind="stable")
    rows = rows[order]
    starts = np.flatnonzero(np.diff(rows, prepend=-1))
    for start, index in zip(starts, np.split(chosen[order], starts[1:])):
        yield int(rows[start]), index


def too_near(ids: np.ndarray, places: np.ndarray, score: np.ndarray, limit_angstrom: float) -> np.ndarray:
    """Mask `(n,)` of the particles that are too close to a better one that is kept.

    Parameters
    ----------
    ids : `(n,)`, int64
    places : `(n, 2)`
        Positions in the exposure, angstrom; those that are not finite are near nothing.
    score : `(n,)`
        The higher is better; of two alike, the lower id.
    """
    from scipy.spatial import cKDTree

    rank = np.empty(len(ids), np.int64)
    rank[np.lexsort((ids, -score))] = np.arange(len(ids))
    found = []
    for _, index in exposures_of(ids, np.isfinite(places).all(1)):
        pairs = cKDTree(places[index]).query_pairs(limit_angstrom, output_type="ndarray")
        if len(pairs):
            pairs = index[pairs]
            found.append(pairs[np.hypot(*(places[pairs[:, 0]] - places[pairs[:, 1]]).T) < limit_angstrom])
    dropped = np.zeros(len(ids), bool)
    if not found:
        return dropped
    pairs = np.concatenate(found)
    swap = rank[pairs[:, 0]] > rank[pairs[:, 1]]
    better, worse = np.where(swap, pairs[:, 1], pairs[:, 0]), np.where(swap, pairs[:, 0], pairs[:, 1])
    # equivalent to going through the particles by rank, but decides all that no undecided one outranks at once
    while len(better):
        outranked = np.zeros(len(ids), bool)
        outranked[worse] = True
        dropped[worse[~outranked[better]]] = True
        open_ = ~(dropped[better] | dropped[worse])
        better, worse = better[open_], worse[open_]
    return dropped
