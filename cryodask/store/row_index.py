"""Where the journals of a folder have the lines of each row, for readers of single records.

Everything else that reads journals keeps all records in memory. A page that shows one exposure of ten thousand needs one of them: one
pass over the bytes finds where each begins, and nothing is parsed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_MARK = b'"row": '
_BLOCK = 1 << 20
_BITS = 44


class Found(NamedTuple):
    """A line of a row: its file, the byte at which it begins, and its text."""

    name: str
    offset: int
    text: bytes


class RowIndex:
    """Lines by row; brought up to date whenever it is asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._forget()

    def _forget(self) -> None:
        self._files: list[str] = []
        self._read: dict[str, tuple[int, int]] = {}
        # file and byte in one number: with tuples the index of ten thousand rows would have three times the size
        self._first: dict[int, int] = {}
        self._others: dict[int, list[int]] = {}

    def lines(self, row: int) -> Iterator[Found]:
        """Lines that name a row, in the order of files and bytes; the reader checks what they are."""
        self._look()
        packed = [self._first[row], *self._others.get(row, ())] if row in self._first else []
        for name, offset in sorted((self._files[at >> _BITS], at & (1 << _BITS) - 1) for at in packed):
            with open(self.folder / name, "rb") as file:
                file.seek(offset)
                yield Found(name, offset, file.readline().rstrip(b"\n"))

    def _look(self) -> None:
        try:
            names = sorted(name for name in os.listdir(self.folder) if name.endswith(".jsonl"))
        except FileNotFoundError:
            names = []
        stats = {name: os.stat(self.folder / name) for name in names}
        for name, (inode, size) in self._read.items():
            if name not in stats or stats[name].st_ino != inode or stats[name].st_size < size:
                self._forget()  # replaced, as by another driver
                break
        for name, there in stats.items():
            if there.st_size > self._read.get(name, (0, 0))[1]:
                self._read[name] = there.st_ino, self._index(name)

    def _index(self, name: str) -> int:
        """Index what is new in a file; returns the end of its last complete line."""
        if name not in self._files:
            self._files.append(name)
        number = self._files.index(name)
        offset = self._read.get(name, (0, 0))[1]
        with open(self.folder / name, "rb") as file:
            file.seek(offset)
            rest = b""
            while data := file.read(_BLOCK):
                data = rest + data
                begin = 0
                while (end := data.find(b"\n", begin)) >= 0:
                    # keys are sorted, and what follows "row" is short: from the end it is found at once
                    at = data.rfind(_MARK, begin, end)
                    if at >= 0:
                        self._add(data[at + len(_MARK) : at + len(_MARK) + 20], number, offset + begin)
                    begin = end + 1
                offset += begin
                rest = data[begin:]
        return offset

    def _add(self, text: bytes, number: int, offset: int) -> None:
        digits = text[: len(text) - len(text.lstrip(b"0123456789"))]
        if digits:
            row, packed = int(digits), number << _BITS | offset
            if self._first.setdefault(row, packed) != packed:
                self._others.setdefault(row, []).append(packed)
