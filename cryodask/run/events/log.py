"""The events of a run on disk: ``<project>/events/<run>-0001.jsonl``, checked lines; written by the driver, read from the end.

Events are for display. They are written without fsync, and a disk that rejects them never disturbs the run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

from cryodask.run.events import Counted, Event, ExposureArrived, ExposureCommitted, ExposureRetried, Noted, RunEnded, event_of
from cryodask.store.files import write_all
from cryodask.store.lines import checked_line, parse_checked

FOLDER = "events"
_FILE_BYTES = 64 << 20
_BUFFER_SECONDS = 0.5
_COUNT_SECONDS = 5.0
_PATIENT = (Counted, ExposureArrived, ExposureCommitted, ExposureRetried)
"""Frequent events (up to thousands per second), which are buffered and written together."""
_TAIL_BYTES = 1 << 16


class EventLog:
    """Listener that appends the events of its run to files; starts a new file when one is full or a line was torn."""

    def __init__(self, folder: Path, run: str, *, file_bytes: int = _FILE_BYTES) -> None:
        self._folder, self._run, self._file_bytes = folder / FOLDER, run, file_bytes
        self._buffer: list[bytes] = []
        self._fd: int | None = None
        self._number, self._size, self._lost = 0, 0, 0
        self._written = self._counted = float("-inf")
        self._count: dict[str, object] = {}

    def __call__(self, event: Event) -> None:
        """Write an event, possibly buffered."""
        now = time.monotonic()
        if isinstance(event, Counted):
            count = event.model_dump(exclude={"time"})
            # while a watched session waits for movies, its counts stay what they are
            if now - self._counted < _COUNT_SECONDS or count == self._count:
                return
            self._counted, self._count = now, count
        self._buffer.append(checked_line(event.as_record()))
        if not isinstance(event, _PATIENT) or now - self._written > _BUFFER_SECONDS:
            self._written = now
            self._flush(event)

    def _flush(self, event: Event) -> None:
        try:
            if self._lost:
                text = f"{self._lost} events before this one could not be written (was the disk full?)"
                self._write(checked_line(Noted(time=event.time, run=self._run, text=text).as_record()))
                self._lost = 0
            self._write(b"".join(self._buffer))
        except OSError:
            self._lost += len(self._buffer)
            self.close()  # a possibly torn line must be the last of its file
        self._buffer = []

    def _write(self, data: bytes) -> None:
        if self._fd is not None and self._size > self._file_bytes:
            self.close()
        if self._fd is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._number += 1
            path = self._folder / f"{self._run}-{self._number:04d}.jsonl"
            self._fd, self._size = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_EXCL, 0o644), 0
        write_all(self._fd, data)
        self._size += len(data)

    def close(self) -> None:
        """Close the file; the next event opens another."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def event_files(folder: str | Path, run: str = "") -> list[Path]:
    """Event files of a project, oldest first; of all runs, or of one."""
    try:
        names = sorted(n for n in os.listdir(Path(folder) / FOLDER) if n.endswith(".jsonl") and n.startswith(run))
    except FileNotFoundError:
        return []
    return [Path(folder) / FOLDER / name for name in names]


def last_run(folder: str | Path) -> str:
    """Name of the latest run; empty if there was none."""
    files = event_files(folder)
    return files[-1].name.rsplit("-", 1)[0] if files else ""


def tail(folder: str | Path, count: int, run: str = "") -> list[Event]:
    """The last ``count`` events of a project or of one run, oldest first; reads only the ends of files."""
    found: list[Event] = []
    for path in reversed(event_files(folder, run)):
        for line in _lines_from_end(path):
            record = parse_checked(line)
            event = event_of(record) if record is not None else None
            if event is not None:
                found.append(event)
            if len(found) == count:
                return found[::-1]
    return found[::-1]


def _lines_from_end(path: Path) -> Iterator[bytes]:
    """Lines of a file, last first, including an unterminated last line."""
    with open(path, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        rest = b""
        while end:
            begin = max(0, end - _TAIL_BYTES)
            file.seek(begin)
            first, *lines = (file.read(end - begin) + rest).split(b"\n")
            yield from reversed([line for line in lines if line])
            rest, end = first, begin
        if rest:
            yield rest


def follow(folder: str | Path, last: int) -> Iterator[Event | None]:
    """Yield the ``last`` earlier events of a project, then each new one as it is written; None when there is nothing new.

    Ends when the current run ends; at once if there is none.
    """
    read = {path: path.stat().st_size for path in event_files(folder)}
    before = tail(folder, max(last, 1))
    yield from before[-last:] if last else []
    if not before or isinstance(before[-1], RunEnded):
        return
    while True:
        new = list(_grown(folder, read))
        yield from new
        if new and isinstance(new[-1], RunEnded):
            return
        if not new:
            yield None


def _grown(folder: str | Path, read: dict[Path, int]) -> Iterator[Event]:
    """Events beyond the offsets in ``read``, which are advanced; incomplete lines are left for later."""
    for path in event_files(folder):
        begin = read.get(path, 0)
        if path.stat().st_size == begin:
            continue
        with open(path, "rb") as file:
            file.seek(begin)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        read[path] = begin + len(whole)
        for line in whole.split(b"\n"):
            record = parse_checked(line)
            event = event_of(record) if record is not None else None
            if event is not None:
                yield event
