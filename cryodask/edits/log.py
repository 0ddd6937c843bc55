"""The operations of one kind in a project: appended durably, read incrementally, each of them once."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from pathlib import Path

from cryodask.edits.operations import KINDS
from cryodask.errors import StoreError
from cryodask.store.files import disk_errors
from cryodask.store.journal import Journal
from cryodask.store.lines import Record

FROZEN_ROW = -2
"""``row`` of the lines that say which state to use."""


class OperationLog:
    """Operations of all processes that edit a project.

    Parameters
    ----------
    project : path
        Folder of the project.
    kind : str
        ``picks``, ``classes``, ``exposures``, ``masks`` or ``regions``.
    """

    def __init__(self, project: str | Path, kind: str) -> None:
        self.project, self.kind = Path(project), kind
        self.folder = self.project / "edits" / kind
        assert kind in KINDS, kind
        self._journal = Journal(self.folder)
        self._lock = threading.RLock()
        self._lines: dict[int, list[tuple[str, Record]]] = {}
        self._rows: dict[int, dict[str, Record]] = {}
        self._ids: set[str] = set()
        self.highest = 0
        self.version = 0

    def look(self) -> bool:
        """Read what any process has added since; returns whether there was something new."""
        with self._lock:
            lines = self._journal.read().lines
            if lines is self._lines:
                return False
            before = len(self._ids)
            for row, some in lines.items():
                if self._lines.get(row) is some:
                    continue
                known = self._rows.setdefault(row, {})
                for _, record in some:
                    old = known.get(record["id"])
                    # one id with two contents is nobody's honest mistake; every reader must choose the same
                    if old is None or _order(record) < _order(old):
                        known[record["id"]] = record
                        self._ids.add(record["id"])
                    self.highest = max(self.highest, int(record["n"]))
            self._lines = lines
            self.version += len(self._ids) > before
            return len(self._ids) > before

    def rows(self) -> list[int]:
        """Rows that have operations."""
        with self._lock:
            return sorted(row for row in self._rows if row != FROZEN_ROW)

    def of_row(self, row: int) -> list[Record]:
        """All known operations of a row, in order of (counter, id)."""
        with self._lock:
            return sorted(self._rows.get(row, {}).values(), key=rank)

    def append(self, operations: Iterable[Record], who: str) -> list[Record]:
        """Store operations that are not known yet, and wait until they are on disk.

        A counter that is far ahead of all others is lowered, so that nobody can outrank everyone for ever.

        Parameters
        ----------
        operations : iterable of dict
            As returned by :func:`~cryodask.edits.operations.read_operations`.
        who : str
            Their author.

        Returns
        -------
        list of dict
            The stored ones; those that were known before are missing.

        Raises
        ------
        StoreError
            If the project is gone, or its disk is full.
        """
        with self._lock, disk_errors(self.folder):
            if not (self.project / "project.json").is_file():
                raise StoreError(
                    f"The project {self.project.name} is no longer there, so the edits were not stored.",
                    "it was moved, or its disk is not mounted",
                    "keep the page open: it sends the edits again when the project is back",
                )
            self.look()
            new: dict[str, Record] = {}
            for one in operations:
                if one["id"] not in self._ids and one["id"] not in new:
                    n = min(int(one["n"]), self.highest + len(new) + 1)
                    new[one["id"]] = {**one, "n": n, "who": who, "time": round(time.time(), 3)}
            if new:
                self._journal.append(*new.values())
                self.look()
            return list(new.values())

    def damaged(self) -> list[str]:
        """Lines that were complete once and do not match their checksum any more: edits that the disk has lost, as ``FILE:LINE``."""
        return list(self._journal.read().damaged_lines)

    def close(self) -> None:
        """Close the file of this process."""
        self._journal.close()


def rank(operation: Record) -> tuple[int, bool, str]:
    """Order of operations that contradict each other; of two with equal counters the one that keeps something counts."""
    return int(operation["n"]), operation.get("do") != "remove", str(operation["id"])


def _order(record: Record) -> tuple[int, float, str]:
    return int(record["n"]), float(record.get("time", 0.0)), repr(sorted(record.items(), key=lambda item: item[0]))
