"""A folder of checked lines that several processes append to, each to a file of its own: people, tokens, audit, thresholds."""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from pathlib import Path

from cryodask.store.files import append, disk_errors
from cryodask.store.lines import Record, checked_line, parse_checked


class Ledger:
    """Lines of all files of a folder, oldest first.

    Parameters
    ----------
    folder : Path
        Made on the first write.
    private : bool
        Whether only this account may read it.
    """

    def __init__(self, folder: Path, *, private: bool = False) -> None:
        self.folder, self._private = folder, private
        self._path = folder / f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.jsonl"
        self._read: dict[str, int] = {}
        self._records: list[Record] = []
        self._lock = threading.Lock()

    def append(self, record: Record) -> Record:
        """Write a record with its time, and wait until it is on disk."""
        record = {**record, "time": round(time.time(), 3)}
        with self._lock, disk_errors(self._path):
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700 if self._private else 0o777)
            if self._private and not self._path.exists():
                self._path.touch(mode=0o600)
            append(self._path, checked_line(record))
        return record

    def records(self) -> list[Record]:
        """All records by time; only new lines are parsed."""
        with self._lock:
            try:
                names = sorted(name for name in os.listdir(self.folder) if name.endswith(".jsonl"))
            except FileNotFoundError:
                return []
            new: list[Record] = []
            for name in names:
                with open(self.folder / name, "rb") as file:
                    file.seek(self._read.get(name, 0))
                    data = file.read()
                whole = data[: data.rfind(b"\n") + 1]
                self._read[name] = self._read.get(name, 0) + len(whole)
                new += [record for record in map(parse_checked, whole.split(b"\n")) if record is not None]
            if new:
                self._records = sorted([*self._records, *new], key=lambda record: float(record.get("time", 0.0)))
            return self._records
