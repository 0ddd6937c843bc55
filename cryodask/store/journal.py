"""Commit records: one line an item, written after its data is safe; the only witness of what is done.

A line is ``crc32c(json) json``. Every process appends to a file of its own, so that no two writers ever share one; a line that is torn
or does not fit its checksum is no commit. Nothing ever asks the file system what is done: it asks the journal.
"""

from __future__ import annotations

import base64
import json
import os
import socket
import threading
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

Record = dict[str, Any]


def encode_value(value: Any) -> Any:
    """A column as JSON: numbers and text as they are (repr of a float is exact), arrays as base64 of their bytes."""
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
    """Checksum of what a record says about its item (row, columns, shards), not of when and where it was made."""
    content = {k: record[k] for k in ("row", "ok", "columns", "shards") if k in record}
    return google_crc32c.value(json.dumps(content, sort_keys=True).encode())


def fsync_folder(folder: str | Path) -> None:
    """Make a rename or a new file in ``folder`` survive a crash of the machine."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@dataclass
class JournalContents:
    """What the journals of a folder say: the record that counts for each row, and the lines that count for nothing.

    ``torn_lines`` lack their end (the process died while it wrote), ``damaged_lines`` were whole once. ``lines`` holds the checksums of
    all lines of a row, by which :meth:`Journal.undo` calls them.
    """

    records: dict[int, Record] = field(default_factory=dict)
    torn_lines: list[str] = field(default_factory=list)
    damaged_lines: list[str] = field(default_factory=list)
    lines: dict[int, list[str]] = field(default_factory=dict)


class Journal:
    """Append and read the commit records of one folder. Open files never travel with a pickle."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._lock = threading.Lock()
        self._fd: int | None = None
        self._pid = 0
        self._file = self.folder

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["folder"])  # type: ignore[misc]

    def append(self, record: Record) -> None:
        """Write one record and wait until it is on the disk."""
        body = json.dumps(record, sort_keys=True).encode()
        line = b"%08x %s\n" % (google_crc32c.value(body), body)
        with self._lock:
            if self._fd is None or self._pid != os.getpid() or not self._in_place(self._fd):
                self.folder.mkdir(parents=True, exist_ok=True)
                name = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.jsonl"
                self._file = self.folder / name
                self._fd = os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_EXCL, 0o644)
                self._pid = os.getpid()
                fsync_folder(self.folder)
            written = 0
            while written < len(line):
                try:
                    written += os.write(self._fd, line[written:])
                except OSError:
                    # the torn line must not swallow the next record: a new file starts clean
                    os.close(self._fd)
                    self._fd = None
                    raise
            os.fsync(self._fd)

    def _in_place(self, fd: int) -> bool:
        """Whether the open file is still the one under its name: a worker may outlive a generation that was removed and made anew."""
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

    def undo(self, row: int, name: str, lines: list[str], reason: str) -> None:
        """Make some lines of a row count for nothing (checksums as in ``JournalContents.lines``); nothing is deleted."""
        self.append({"row": row, "name": name, "undoes": lines, "reason": reason, "time": round(time.time(), 3), "pid": os.getpid()})

    def drop_damaged_lines(self) -> None:
        """Move lines that were whole once into ``damaged-lines.txt`` beside the journals; only while nobody writes."""
        for path in sorted(self.folder.glob("*.jsonl")):
            *whole, rest = path.read_bytes().split(b"\n")
            bad = [line for line in whole if line and _parse(line) is None]
            if not bad:
                continue
            with open(self.folder / "damaged-lines.txt", "ab") as file:
                file.write(b"".join(line + b"\n" for line in bad))
                file.flush()
                os.fsync(file.fileno())
            part = path.with_suffix(f".{os.getpid()}.part")
            part.write_bytes(b"\n".join([*(line for line in whole if line not in bad), rest]))
            os.rename(part, path)
            fsync_folder(self.folder)

    def read(self) -> JournalContents:
        """The record that counts for each row: that of the latest input; for one input a success before a failure, then the latest."""
        contents = JournalContents()
        found: list[tuple[str, Record]] = []
        undone: set[tuple[int, str]] = set()
        for path in sorted(self.folder.glob("*.jsonl")):
            lines = path.read_bytes().split(b"\n")
            for number, line in enumerate(lines, 1):
                if not line:
                    continue
                record = _parse(line)
                if record is None:
                    (contents.torn_lines if number == len(lines) else contents.damaged_lines).append(f"{path.name}:{number}")
                elif "undoes" in record:
                    undone.update((record["row"], line_crc) for line_crc in record["undoes"])
                else:
                    found.append((line[:8].decode(), record))
        best: dict[tuple[int, Any], Record] = {}
        latest: dict[tuple[int, Any], float] = {}
        for line_crc, record in found:
            row = record["row"]
            if (row, line_crc) in undone:
                continue
            contents.lines.setdefault(row, []).append(line_crc)
            key = (row, record.get("input"))
            if key not in best or _rank(record) >= _rank(best[key]):
                best[key] = record
            latest[key] = max(latest.get(key, 0.0), float(record.get("time", 0.0)))
        for key in sorted(best, key=lambda k: latest[k]):
            contents.records[key[0]] = best[key]
        return contents


def _parse(line: bytes) -> Record | None:
    try:
        if int(line[:8], 16) != google_crc32c.value(line[9:]):
            return None
        record = json.loads(line[9:])
    except ValueError:
        return None
    return record if isinstance(record, dict) and "row" in record else None


def _rank(record: Record) -> tuple[bool, int, float]:
    return bool(record.get("ok")), int(record.get("attempt", 0)), float(record.get("time", 0.0))
