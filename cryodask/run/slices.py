"""The particles of a set, exposure by exposure, as per-exposure stages get them, with a digest per exposure."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from cryodask.store.births import accepted
from cryodask.store.identity import row_of
from cryodask.store.sets import runs


@dataclass(frozen=True)
class Slices:
    """Particles sorted by exposure. ``columns`` has ``particle_id`` and the columns of the parts that a stage declares."""

    rows: np.ndarray
    start: np.ndarray
    columns: dict[str, np.ndarray]

    @classmethod
    def of(cls, ids: np.ndarray, columns: dict[str, np.ndarray]) -> Slices:
        """From a set and its columns."""
        row = row_of(ids)
        order: Any = slice(None) if len(row) < 2 or (np.diff(row) >= 0).all() else np.lexsort((ids, row))
        start, _ = runs(row[order])
        sorted_columns = {"particle_id": ids[order], **{n: v[order] for n, v in columns.items()}}
        return cls(row[order][start], np.append(start, len(ids)), sorted_columns)

    def at(self, row: int) -> dict[str, np.ndarray]:
        """Columns of the particles of an exposure; empty arrays if it has none."""
        i = int(np.searchsorted(self.rows, row))
        there = i < len(self.rows) and self.rows[i] == row
        window = slice(self.start[i], self.start[i + 1]) if there else slice(0, 0)
        return {name: values[window] for name, values in self.columns.items()}

    def digests(self, rows: Iterable[int]) -> dict[int, str]:
        """Digests of the slices of some exposures."""
        columns, start = _headed(self.columns), self.start.tolist()
        place = {row: i for i, row in enumerate(self.rows.tolist())}
        none = _digest(columns, slice(0, 0))
        return {row: none if (i := place.get(row)) is None else _digest(columns, slice(start[i], start[i + 1])) for row in rows}


def slice_digest(columns: dict[str, np.ndarray]) -> str:
    """Digest of the ids and declared columns of an exposure's particles."""
    return _digest(_headed(columns), slice(None))


def _headed(columns: dict[str, np.ndarray]) -> list[tuple[bytes, np.ndarray]]:
    arrays = {name: np.asarray(columns[name]) for name in sorted(columns)}
    return [(f"{name}:{values.dtype.str}:".encode(), values) for name, values in arrays.items()]


def _digest(columns: list[tuple[bytes, np.ndarray]], window: slice) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for head, values in columns:
        digest.update(head)
        digest.update(values[window].tobytes())
    return digest.hexdigest()


def slice_of_birth(
    record_columns: dict[str, Any], pixel_size_angstrom: float, threshold: Any, names: Iterable[str]
) -> dict[str, np.ndarray]:
    """Accepted particles of an exposure directly from its birth table, with the columns ``names`` as in a set."""
    score = np.asarray(record_columns["pick_score"])
    limit = record_columns.get("pick_threshold") if threshold == "auto" else threshold
    mask = accepted(score, None if isinstance(limit, str) else limit)
    ids = np.asarray(record_columns["particle_id"], np.int64)[mask]
    order = np.argsort(ids, kind="stable")
    pixel = np.float64(pixel_size_angstrom)
    table = {
        **record_columns,
        "half_set": record_columns.get("particle_half", np.zeros(len(score), np.int8)),
        "position_y_angstrom": np.asarray(record_columns["pick_y"], np.float64) * pixel,
        "position_x_angstrom": np.asarray(record_columns["pick_x"], np.float64) * pixel,
    }
    return {"particle_id": ids[order], **{n: np.asarray(table[n])[mask][order] for n in names if n != "particle_id" and n in table}}
