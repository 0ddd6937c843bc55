"""Follows one project from its journals: the numbers of all exposures in memory, and what has changed since a reader last asked."""

from __future__ import annotations

import json
import os
import struct
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np

from cryodask.errors import CryodaskError, StoreError
from cryodask.run.events.status import read_status
from cryodask.store.generation import Generation
from cryodask.store.lines import Record
from cryodask.store.listing import Item
from cryodask.store.made import shown
from cryodask.store.project import Project
from cryodask.store.table import Table
from cryodask.store.tail import Tail
from cryodask.web.columns import COLUMNS, Column

WAITING, STARTED, DONE, QUARANTINED, LEFT_OUT = range(5)
"""States of an exposure: registered; some steps are done; all are; one failed; excluded or gone."""


class Follower:
    """One project, followed. Looks may come from several threads.

    Attributes
    ----------
    epoch : str
        Differs between servers and restarts: a page that knows another one starts afresh.
    sequence : int
        Rises with every look that finds a change; each exposure has the number of its last change.
    problem : str
        Why the project cannot be read now; empty if it can. What was read before stays.
    viewers : int
        Open pages that are told about changes.
    cpu_seconds : float
        What the last look cost.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.epoch = Path(path), uuid.uuid4().hex[:8]
        self.sequence, self.version, self.viewers, self.problem, self.cpu_seconds = 0, 0, 0, "", 0.0
        self.columns = {column.name: np.zeros(0, np.float32) for column in COLUMNS}
        self.time = np.zeros(0)
        self.state = np.zeros(0, np.uint8)
        self.names: list[str] = []
        self.failures: dict[int, dict[str, Any]] = {}
        self.status: dict[str, Any] = {}
        self._changed = np.zeros(0, np.int64)
        self._project: Project | None = None
        self._stamps: dict[str, Any] = {}
        self._places: dict[str, str] = {}
        self._rows: dict[str, np.ndarray] = {}
        self._failed: dict[str, dict[int, dict[str, Any]]] = {}
        self._tails: dict[str, Tail] = {}
        self._items: dict[int, Item] = {}
        self._absent = np.zeros(0, bool)
        self._lock = threading.RLock()

    def _start_afresh(self) -> None:
        """Forget all numbers: the steps that gave them have changed. Pages see another epoch and start afresh as well."""
        self.epoch = uuid.uuid4().hex[:8]
        self.columns = {name: np.full_like(values, np.nan) for name, values in self.columns.items()}
        self.time = np.full_like(self.time, np.nan)
        self._stamps, self._rows, self._failed = {}, {}, {}
        self._changed[:] = self.sequence

    # --- what others read ---------------------------------------------------------------------------------------------------
    @property
    def project(self) -> Project:
        """The project, as of the last look.

        Raises
        ------
        StoreError
            If it has never been readable.
        """
        if self._project is None:
            self._project = Project(self.path)
        return self._project

    def giving(self, variable: str) -> tuple[str, Generation] | None:
        """The last step whose current result contains a variable, and this result; None if there is none."""
        for label in reversed(self.project.stages):
            generation = self.project.generation(label)
            if variable in generation.meta["gives"]:
                return label, generation
        return None

    def record(self, row: int, variable: str) -> tuple[Generation, Record] | None:
        """The result and the commit record of an exposure that contain a variable; None if it is not committed."""
        found = self.giving(variable)
        record = self.record_in(found[0], row) if found is not None else None
        return (found[1], record) if found is not None and record is not None else None

    def record_in(self, label: str, row: int) -> Record | None:
        """The commit record of an exposure in a step, if the step has it."""
        with self._lock:
            rows = self._rows.get(label, np.zeros(0, np.int64))
            at = int(np.searchsorted(rows, row))
            if at == len(rows) or rows[at] != row:
                return None
        record = self.project.generation(label).journal.record_of(row)
        return record if record is not None and record["ok"] else None

    def counts(self) -> dict[str, int]:
        """How many exposures each per-exposure step has."""
        with self._lock:
            return {label: len(rows) for label, rows in self._rows.items()}

    def counters(self) -> dict[str, Any]:
        """Figures at the head of a session's pages, and what the run does; JSON."""
        with self._lock:
            present = self.state != LEFT_OUT
            counts = np.bincount(self.state, minlength=5).tolist()
            said = {k: self.status.get(k) for k in ("state", "step", "rate", "stall", "note", "iterations", "time")}
            return {
                "epoch": self.epoch,
                "sequence": self.sequence,
                "exposures": int(present.sum()),
                "waiting": counts[WAITING],
                "started": counts[STARTED],
                "done": counts[DONE],
                "quarantined": counts[QUARANTINED],
                "picks": int(np.nansum(self.columns["picks"][present])) if present.any() else 0,
                "run": said,
                "problem": self.problem,
            }

    # --- looking ------------------------------------------------------------------------------------------------------------
    def look(self) -> bool:
        """Read what is new; returns whether anything is. A project that cannot be read now is a ``problem``, never an exception."""
        with self._lock:
            begun = time.thread_time()
            try:
                changed = self._look()
                problem = ""
            except CryodaskError as error:
                changed, problem = False, error.problem
            except (OSError, ValueError, KeyError) as error:
                changed, problem = False, f"{self.path} cannot be read now: {error}."
            if problem != self.problem:
                self.problem, changed = problem, True
                if problem:
                    self._stamps.clear()
            if changed:
                self.version += 1
            self.cpu_seconds = time.thread_time() - begun
            return changed

    def _look(self) -> bool:
        there = os.stat(self.path / "project.json")
        stamp = (there.st_ino, there.st_size, there.st_mtime_ns)
        if self._stamps.get("project") != stamp:
            self.project.refresh()
            places = {label: self.project.step(label).place for label in self.steps()}
            if places != self._places:
                self._start_afresh()
                self._places = places
            self._stamps = {"project": stamp}
        registry = self.project.registry_stamp()
        touched: set[int] = set()
        if self._stamps.get("registry") != registry:
            touched |= self._take_names()
            self._stamps = {"project": stamp, "registry": registry}
        steps = self.steps()
        for label, generation in steps.items():
            found = (generation.key, generation.stamp())
            if not found[1] and not generation.path.exists():
                raise StoreError(
                    f"The results of {label} are gone: there is no folder {generation.path}.",
                    "it was removed while this page was open",
                    "restore the folder, or run the step again",
                )
            known = self._stamps.get(label)
            if known != found:
                if known is None or not self._take_new(label, touched):
                    self._take_step(label, generation, touched)
                self._stamps[label] = found
        if touched:
            self._settle(steps, touched)
        status = read_status(self.path)
        changed = bool(touched) or status != self.status
        self.status = status
        return changed

    def steps(self) -> dict[str, Generation]:
        """Per-exposure steps with their current results."""
        found = {label: self.project.generation(label) for label in self.project.stages}
        return {label: generation for label, generation in found.items() if generation.meta["per_item"]}

    def _take_names(self) -> set[int]:
        self._items = {item.row: item for item in self.project.items()}
        self._grow(max(self._items, default=-1) + 1)
        names = [""] * len(self.state)
        for row, item in self._items.items():
            names[row] = item.name
        old, self.names = self.names, names
        self._absent = np.array([not name for name in names], dtype=bool)
        return {row for row, name in enumerate(names) if row >= len(old) or old[row] != name}

    def _shown(self, label: str) -> list[Column]:
        """Columns whose last step is this one."""
        gives = set(self.project.generation(label).meta["gives"])
        return [c for c in COLUMNS if gives.issuperset(c.variables) and (self.giving(c.variables[0]) or ("",))[0] == label]

    def _threshold(self, label: str) -> float | str | None:
        product = self.project.step(label).product("particles")
        return product.threshold if product is not None else None

    def _take_step(self, label: str, generation: Generation, touched: set[int]) -> None:
        """Take everything of a step."""
        self._tails[label] = Tail(generation.path / "journal")
        columns = self._shown(label)
        table = self.project.table(label, {name for column in columns for name in column.variables})
        generation.forget()
        rows, failed = table.row, table.failures
        self._grow(int(max([-1, *rows[-1:], *failed])) + 1)
        before = self._rows.get(label, np.zeros(0, np.int64))
        touched.update(np.setxor1d(before, rows).tolist())
        gone = np.setdiff1d(before, rows)
        for column in columns:
            self.columns[column.name][gone] = np.nan
        self._put(label, table, columns, touched)
        known = self._failed.get(label, {})
        now = {row: _failure(label, record) for row, record in failed.items()}
        touched.update(row for row in {*known, *now} if known.get(row) != now.get(row))
        self._rows[label], self._failed[label] = rows, now

    def _take_new(self, label: str, touched: set[int]) -> bool:
        """Take what was appended to the journals of a step; False if it is not simply the first results of more exposures."""
        records = self._tails[label].grown()
        if records is None:
            return False
        rows, recipes = self._rows[label], self.project.step(label).recipes
        new: dict[int, Record] = {}
        for record in records:
            row = record["row"]
            item = self._items.get(row)
            at = int(np.searchsorted(rows, row))
            known = row in new or row in self._failed[label] or (at < len(rows) and rows[at] == row)
            if "undoes" in record or known or item is None or not shown(item, recipes, record.get("input"), record.get("recipe")):
                return False
            new[row] = record
        columns = self._shown(label)
        gives = self.project.generation(label).gives
        table = Table.of(new, gives, {name for column in columns for name in column.variables})
        self._put(label, table, columns, touched)
        touched.update(new)
        self._rows[label] = np.union1d(rows, table.row)
        self._failed[label] |= {row: _failure(label, record) for row, record in table.failures.items()}
        return True

    def _put(self, label: str, table: Table, columns: list[Column], touched: set[int]) -> None:
        rows, threshold = table.row, self._threshold(label)
        for column in columns:
            kept, new = self.columns[column.name], column.values(table, threshold)
            touched.update(rows[~((kept[rows] == new) | (np.isnan(kept[rows]) & np.isnan(new)))].tolist())
            kept[rows] = new
        self.time[rows] = np.fmax(self.time[rows], table.numbers["time"])

    def _settle(self, steps: dict[str, Generation], touched: set[int]) -> None:
        """States of exposures from the steps that have them, and the sequence numbers of those that changed."""
        size = len(self.state)
        done = np.zeros(size, np.int16)
        for label in steps:
            done[self._rows[label]] += 1
        self.failures = {row: failure for label in steps for row, failure in self._failed[label].items()}
        state = np.where(done == 0, WAITING, np.where(done >= len(steps), DONE, STARTED)).astype(np.uint8)
        state[list(self.failures)] = QUARANTINED
        state[: len(self._absent)][self._absent] = LEFT_OUT
        state[len(self._absent) :] = LEFT_OUT
        different = np.flatnonzero(state != self.state)
        self.state = state
        self.sequence += 1
        self._changed[different] = self.sequence
        self._changed[sorted(touched)] = self.sequence

    def _grow(self, size: int) -> None:
        more = size - len(self.state)
        if more <= 0:
            return
        self.columns = {name: np.append(values, np.full(more, np.nan, np.float32)) for name, values in self.columns.items()}
        self.time = np.append(self.time, np.full(more, np.nan))
        self.state = np.append(self.state, np.full(more, LEFT_OUT, np.uint8))
        self._changed = np.append(self._changed, np.zeros(more, np.int64))

    # --- for pages and programs ---------------------------------------------------------------------------------------------
    def packed(self, since: int, epoch: str) -> bytes:
        """Exposures that changed after a sequence number, in the binary form that pages read.

        A little-endian u4, the length of the JSON head that follows (padded so that the arrays begin at a multiple of 8 bytes); then
        `time` (f8), `row` (u4), the columns of the head (f4 each), and `state` (u1). Another ``epoch`` gets everything.
        """
        with self._lock:
            since = since if epoch == self.epoch else -1
            rows = np.flatnonzero(self._changed > since)
            head = {
                "epoch": self.epoch,
                "sequence": self.sequence,
                "size": len(self.state),
                "rows": len(rows),
                "columns": [{"name": c.name, "title": c.title, "unit": c.unit} for c in COLUMNS],
                "names": [self.names[row] if row < len(self.names) else "" for row in rows.tolist()],
            }
            text = json.dumps(head).encode()
            text += b" " * (-(len(text) + 4) % 8)
            arrays = [self.time[rows].astype("<f8"), rows.astype("<u4")]
            arrays += [self.columns[c.name][rows].astype("<f4") for c in COLUMNS]
            return b"".join([struct.pack("<I", len(text)), text, *(a.tobytes() for a in arrays), self.state[rows].tobytes()])

    def document(self) -> dict[str, Any]:
        """All exposures as JSON for programs; missing numbers are null."""
        with self._lock:
            rows = [row for row, name in enumerate(self.names) if name]
            columns = {c.name: [_finite(v) for v in self.columns[c.name][rows].tolist()] for c in COLUMNS}
            return {
                "epoch": self.epoch,
                "sequence": self.sequence,
                "row": rows,
                "name": [self.names[row] for row in rows],
                "time": [_finite(v) for v in self.time[rows].tolist()],
                "state": self.state[rows].tolist(),
                "columns": columns,
            }


def _failure(label: str, record: Record) -> dict[str, Any]:
    return {k: record.get(k) for k in ("name", "error", "message", "time")} | {"step": label}


def _finite(value: float) -> float | None:
    return round(value, 6) if np.isfinite(value) else None


class Pace:
    """How long to wait between looks: short while somebody watches; looking never takes more than a tenth of a core."""

    def __init__(self, watched_seconds: float = 0.3, idle_seconds: float = 30.0) -> None:
        self.watched_seconds, self.idle_seconds = watched_seconds, idle_seconds
        self._ended, self._took = float("-inf"), 0.0

    def due(self, viewers: int) -> bool:
        """Whether it is time for the next look."""
        pause = max(self.watched_seconds if viewers else self.idle_seconds, 9 * self._took)
        return time.monotonic() - self._ended >= pause

    def took(self, cpu_seconds: float) -> None:
        """Record that a look has just ended."""
        self._ended, self._took = time.monotonic(), cpu_seconds
