"""Commit records: one line per item, written after its data are safe; the only record of what is done.

Every process appends to its own file, so that no two writers ever share one, and to a new one in every epoch of the project (see
epochs.py): whatever an overtaken driver or its workers still write is void. What is done is never derived from the file system, only
from the journal.
"""

from __future__ import annotations

import base64
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from cryodask.errors import TakenOverError
from cryodask.store.epochs import Ends, journal_name
from cryodask.store.files import fsync_folder, holder_of, write_all
from cryodask.store.lines import LineFile, Record, checked_line, parse_line, set_aside
from cryodask.store.row_index import RowIndex


def encode_value(value: Any) -> Any:
    """Encode a column for JSON: numbers and strings as they are (the repr of a float is exact), arrays as base64 of their bytes."""
    if isinstance(value, str | bool):
        return value
    array = np.asarray(value)
    if array.ndim == 0 and array.dtype.kind in "iuf":
        return array.item()
    raw = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False))
    return {
        "dtype": raw.dtype.str,
        "shape": list(array.shape),
        "base64": base64.b64encode(raw.tobytes()).decode(),
    }


def decode_value(value: Any) -> Any:
    """Inverse of :func:`encode_value`."""
    if isinstance(value, dict):
        return np.frombuffer(base64.b64decode(value["base64"]), dtype=np.dtype(value["dtype"])).reshape(value["shape"]).copy()
    return value


def content_crc(record: Record) -> int:
    """Checksum of the content of a record (row, columns, shards), without when and where it was made."""
    content = {k: record[k] for k in ("row", "ok", "columns", "shards") if k in record}
    return int(google_crc32c.value(json.dumps(content, sort_keys=True).encode()))


def rank(record: Record) -> tuple[int, bool, int, float]:
    """Rank of a record; the highest of a row counts: later input, then success, then later attempt, then time.

    Clocks of several machines disagree, so time decides only between otherwise equal records.
    """
    return (
        int(record.get("revision", 0)),
        bool(record.get("ok")),
        int(record.get("attempt", 0)),
        float(record.get("time", 0.0)),
    )


@dataclass(frozen=True)
class JournalContents:
    """Content of the journals of a folder: the current record of each row, and the ignored lines.

    ``torn_lines`` are incomplete (the process died while writing), ``damaged_lines`` were complete once. ``lines`` has every line of a
    row that is not undone, with the checksum that identifies it in :meth:`Journal.undo`; ``undone`` has the others. ``offsets``: how far
    each file was read.
    """

    records: dict[int, Record] = field(default_factory=dict)
    torn_lines: list[str] = field(default_factory=list)
    damaged_lines: list[str] = field(default_factory=list)
    lines: dict[int, list[tuple[str, Record]]] = field(default_factory=dict)
    undone: set[tuple[int, str]] = field(default_factory=set)
    offsets: dict[str, int] = field(default_factory=dict)


class Journal:
    """Append and read the commit records of one folder. Open files are not pickled.

    ``start``: byte from which each file is read, for a reader that knows the rest from the compaction.
    """

    def __init__(self, folder: str | Path, start: Mapping[str, int] | None = None) -> None:
        self.folder, self.start = Path(folder), dict(start or {})
        self._lock = threading.Lock()
        self._fd: int | None = None
        self._pid = self._epoch = 0
        self._held: list[Record] | None = None
        self._ends = Ends(self.folder)
        self._index = RowIndex(self.folder)
        self._file = self.folder
        self._reading = threading.Lock()
        self._forget()

    def _forget(self) -> None:
        self._files: dict[str, LineFile] = {}
        self._found: dict[int, list[tuple[tuple[str, int], str, Record]]] = {}
        self._undone: set[tuple[int, str]] = set()
        self._contents = JournalContents()

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "start": self.start}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["folder"], state["start"])  # type: ignore[misc]

    def append(self, *records: Record) -> None:
        """Write records, all of one epoch, and wait until they are on disk.

        In the process that holds the project's lock they get its epoch; elsewhere they carry their own.

        Raises
        ------
        TakenOverError
            In a driver that has lost the lock. Nothing is written.
        """
        if self._held is not None:
            self._held += records
            return
        holder = holder_of(self.folder)
        if holder is not None:
            records = tuple({**record, "epoch": holder.epoch} for record in records)
        epoch = records[0].get("epoch", 0) if records else 0
        line = b"".join(map(checked_line, records))
        with self._lock:
            if self._fd is not None and self._pid == os.getpid() and self._epoch != epoch:
                os.close(self._fd)
                self._fd = None
            if self._fd is None or self._pid != os.getpid() or not self._in_place(self._fd):
                self.folder.mkdir(parents=True, exist_ok=True)
                name = journal_name(epoch, f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}")
                self._file = self.folder / name
                self._fd = os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_EXCL, 0o644)
                self._pid, self._epoch = os.getpid(), epoch
                fsync_folder(self.folder)
            if holder is not None:
                holder.check()
            try:
                write_all(self._fd, line)
                os.fsync(self._fd)
            except OSError:
                # start a new file, because a torn line must not swallow the next record
                os.close(self._fd)
                self._fd = None
                raise

    @contextmanager
    def together(self) -> Iterator[None]:
        """Hold back the records appended in the block, and write them at its end with one sync. Only for a journal of one thread."""
        self._held = []
        try:
            yield
        finally:
            held, self._held = self._held, None
            if held:
                self.append(*held)

    def refuse_void(self, epoch: int) -> None:
        """Refuse work whose lines would be void, so that it does not overwrite the results of others.

        Raises
        ------
        TakenOverError
        """
        if self._ends.is_closed(epoch):
            raise TakenOverError(
                f"Another driver has taken over the project of {self.folder.parent}; work from the previous driver is refused.",
                "the previous driver was suspended or could not reach the disk for some time, or the other was started with --force",
                "nothing is lost: the other driver computes it",
            )

    def _in_place(self, fd: int) -> bool:
        """Whether the open file still exists under its name: a worker may outlive a generation that was removed and recomputed."""
        try:
            there, here = os.stat(self._file), os.fstat(fd)
        except FileNotFoundError:
            there = None
        if there is not None and (there.st_ino, there.st_dev) == (here.st_ino, here.st_dev):
            return True
        os.close(fd)
        self._fd = None
        return False

    def close(self) -> None:
        """Close this process's file; the next append opens a new one."""
        with self._lock:
            if self._fd is not None and self._pid == os.getpid():
                os.close(self._fd)
            self._fd = None

    def __del__(self) -> None:
        if hasattr(self, "_lock"):  # missing if __init__ failed
            self.close()

    def undo(self, row: int, name: str, lines: list[str], reason: str) -> None:
        """Invalidate some lines of a row (checksums as in ``JournalContents.lines``); nothing is deleted."""
        self.append({"row": row, "name": name, "undoes": lines, "reason": reason, "time": round(time.time(), 3), "pid": os.getpid()})

    def drop_damaged_lines(self) -> None:
        """Move damaged lines into ``damaged-lines.txt`` beside the journals; only while nobody writes."""
        self._ends.look()
        for path in sorted(self.folder.glob("*.jsonl")):
            set_aside(path, torn=False, end=self._ends.end(path.name))

    def read(self) -> JournalContents:
        """Current content of the journals. Only new lines are parsed; for an unchanged folder it costs one listing."""
        with self._reading:
            touched = self._take_in()
            if touched is None:
                self._forget()
                touched = self._take_in() or set()
            return self._settled(touched)

    def record_of(self, row: int) -> Record | None:
        """Current record of one row, for readers of single items: the records of all others are neither parsed nor kept."""
        with self._reading:
            self._ends.look()
            lines = list(self._index.lines(row))
        found: list[tuple[str, int, str, Record]] = []
        undone: set[str] = set()
        for name, offset, text in lines:
            end = self._ends.end(name)
            record = parse_line(text) if end is None or offset + len(text) <= end else None
            if record is None or record["row"] != row:
                continue
            if "undoes" in record:
                undone.update(record["undoes"])
            else:
                found.append((name, offset, text[:8].decode(), record))
        alive = [entry for entry in found if entry[2] not in undone]
        return max(alive, key=lambda entry: (rank(entry[3]), entry[:2]))[3] if alive else None

    def ever(self, row: int) -> list[Record]:
        """All successes of a row read so far, including undone ones: birth tables are continued from these."""
        return [record for _, _, record in self._found.get(row, ()) if record.get("ok")]

    def _take_in(self) -> set[int] | None:
        """Parse new lines; returns their rows, or None if a file that was read before was replaced or removed."""
        try:
            names = sorted(name for name in os.listdir(self.folder) if name.endswith(".jsonl"))
        except FileNotFoundError:
            names = []
        if any(name not in names for name in self._files):
            return None
        self._ends.look()
        touched: set[int] = set()
        for name in names:
            file = self._files.setdefault(name, LineFile(self.folder / name, self.start.get(name, 0)))
            end = self._ends.end(name)
            if end is not None and file.offset > max(end, file.start):
                return None  # its epoch was closed since, and void lines were read
            try:
                lines, replaced = file.grown(end)
            except FileNotFoundError:
                return None
            if replaced:
                return None
            for number, crc, record in lines:
                row = record["row"]
                touched.add(row)
                if "undoes" in record:
                    self._undone.update((row, line) for line in record["undoes"])
                else:
                    self._found.setdefault(row, []).append(((name, number), crc, record))
        return touched

    def _settled(self, touched: set[int]) -> JournalContents:
        old = self._contents
        torn = [f"{name}:{number}" for name, file in self._files.items() for number in file.torn]
        damaged = [f"{name}:{number}" for name, file in self._files.items() for number in file.damaged]
        offsets = {name: file.offset for name, file in self._files.items()}
        if not touched and (torn, damaged, offsets) == (old.torn_lines, old.damaged_lines, old.offsets):
            return old
        records, lines = dict(old.records), dict(old.lines)
        for row in touched:
            alive = sorted((e for e in self._found.get(row, []) if (row, e[1]) not in self._undone), key=lambda e: e[0])
            records.pop(row, None)
            lines.pop(row, None)
            if alive:
                # on equal ranks the last in file order, so that every reader sees the same
                records[row] = max(alive, key=lambda e: (rank(e[2]), e[0]))[2]
                lines[row] = [(crc, record) for _, crc, record in alive]
        self._contents = JournalContents(records, torn, damaged, lines, set(self._undone), offsets)
        return self._contents
