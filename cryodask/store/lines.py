"""Files of checksummed lines, ``crc32c(json) json``, used for the journals and the registry.

They only grow, so a reader keeps its offset and parses every line once. A line without its end is torn (its process died); a complete one
that does not match its checksum is damaged. Both are ignored, without affecting their neighbours.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c

from cryodask.store.files import append, write_atomically

Record = dict[str, Any]
_MARK = 64
"""Number of bytes before an offset that identify it."""


class Line(NamedTuple):
    """One complete line: its position, its record, and the checksum that identifies it."""

    number: int
    crc: str
    record: Record


def checked_line(record: Record) -> bytes:
    """A record as a line."""
    body = json.dumps(record, sort_keys=True).encode()
    return b"%08x %s\n" % (google_crc32c.value(body), body)


def parse_checked(line: bytes) -> Record | None:
    """The record of a line; None if it does not match its checksum."""
    try:
        body = line[9:]
        if int(line[:8], 16) != google_crc32c.value(body):
            return None
        record = json.loads(body.decode())  # json would first guess the encoding of bytes
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def parse_line(line: bytes) -> Record | None:
    """The record of a row in a line; None if there is none or it does not match its checksum."""
    record = parse_checked(line)
    return record if record is not None and "row" in record else None


class LineFile:
    """A file of lines, read incrementally.

    Parameters
    ----------
    path : Path
    start : int
        Byte at which to start; earlier content is known already.
    """

    def __init__(self, path: Path, start: int = 0) -> None:
        self.path, self.start = path, start
        self._forget()

    def _forget(self) -> None:
        self.offset, self._number, self._stamp = self.start, 0, (0, 0, 0, 0)
        self.damaged: list[int] = []
        self.torn: list[int] = []
        self.ended = True

    def grown(self, end: int | None = None) -> tuple[list[Line], bool]:
        """New lines since the last call, and True if the file was replaced, which invalidates all earlier ones.

        Content beyond byte ``end`` is ignored.

        Raises
        ------
        FileNotFoundError
        """
        with open(self.path, "rb") as file:
            there = os.fstat(file.fileno())
            stamp = (there.st_dev, there.st_ino, there.st_size, there.st_mtime_ns)
            if stamp == self._stamp:
                return [], False
            replaced = bool(self._number) and (stamp[:2] != self._stamp[:2] or there.st_size < self.offset)
            if replaced:
                self._forget()
            file.seek(self.offset)
            data = file.read(-1 if end is None else max(0, end - self.offset))
        self._stamp = stamp
        lines: list[Line] = []
        self.torn = []
        self.ended = not data or data.endswith(b"\n")
        *whole, rest = data.split(b"\n")
        for text in whole:
            self._number += 1
            record = parse_line(text) if text else None
            if record is not None:
                lines.append(Line(self._number, text[:8].decode(), record))
            elif text:
                self.damaged.append(self._number)
        self.offset += len(data) - len(rest)
        if rest:
            record = parse_line(rest)
            if record is None:
                self.torn = [self._number + 1]
            else:  # the line without its newline
                self._number += 1
                self.offset += len(rest)
                lines.append(Line(self._number, rest[:8].decode(), record))
        return lines, replaced


def mark_of(path: Path, offset: int) -> int:
    """Checksum of the last bytes before an offset, to detect changes of earlier content; -1 if there are none."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, offset - _MARK))
            data = file.read(min(offset, _MARK))
    except FileNotFoundError:
        return -1
    return google_crc32c.value(data) if len(data) == min(offset, _MARK) else -1


def set_aside(path: Path, *, torn: bool, add: bytes = b"", end: int | None = None) -> None:
    """Move unreadable lines into ``damaged-lines.txt`` beside the file; a torn end only on request. Only while nobody writes.

    ``add``: lines that replace them atomically. Content beyond byte ``end`` is ignored, and goes.
    """
    *whole, rest = path.read_bytes()[:end].split(b"\n")
    if torn or parse_line(rest) is not None:
        whole, rest = [*whole, rest], b""
    bad = [line for line in whole if line and parse_line(line) is None]
    if bad:
        append(path.with_name("damaged-lines.txt"), b"".join(line + b"\n" for line in bad))
    if bad or torn:
        write_atomically(path, b"".join(line + b"\n" for line in whole if line and line not in bad) + add + rest)
