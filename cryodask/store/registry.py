"""The registry of a project: which micrograph has which row, for ever.

``items.jsonl`` holds one checked line (see lines.py) a change: ``{row, name, inputs, revision}``, with ``gone: true`` for an input that is
no longer there. The latest line of a row counts. Only the driver writes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cryodask.store.files import append
from cryodask.store.lines import LineFile, Record, checked_line, set_aside

Seen = Mapping[int, tuple[str, int]]
"""Name and latest revision of rows, as the commit records tell them."""


@dataclass(frozen=True)
class Item:
    """One micrograph of the registry: its row for ever, its name, and what is known of it from outside.

    ``revision`` counts how often its input changed: of two records the one of the later revision counts.
    """

    row: int
    name: str
    inputs: dict[str, Any] = field(default_factory=dict)
    revision: int = 0

    @property
    def fingerprint(self) -> str:
        """Changes when the input changes (another size, another time, another value in the STAR file)."""
        return hashlib.blake2b(json.dumps(self.inputs, sort_keys=True).encode(), digest_size=6).hexdigest()


class Registry:
    """The items of a project, read as the file grows."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "items.jsonl"
        self._forget()

    def _forget(self) -> None:
        self._file = LineFile(self.path)
        self._items: dict[int, Item] = {}
        self._rows: dict[str, int] = {}
        self._gone: set[int] = set()
        self._present: dict[int, Item] | None = None

    def _look(self) -> None:
        try:
            lines, replaced = self._file.grown()
        except FileNotFoundError:
            self._forget()
            return
        if replaced:
            self._items, self._rows, self._gone = {}, {}, set()
        for line in lines:
            self._take(line.record)

    def _take(self, entry: Record) -> None:
        item = Item(entry["row"], entry["name"], entry["inputs"], entry.get("revision", 0))
        self._items[item.row] = item
        self._rows[item.name] = item.row
        (self._gone.add if entry.get("gone") else self._gone.discard)(item.row)
        self._present = None

    def present(self) -> dict[int, Item]:
        """Items whose input is there, by row, in row order."""
        self._look()
        if self._present is None:
            self._present = {row: self._items[row] for row in sorted(self._items) if row not in self._gone}
        return self._present

    def damaged(self, seen: Seen) -> list[str]:
        """One sentence for each line that cannot be read; ``seen`` are the rows of the commit records."""
        self._look()
        out = [f"items.jsonl: line {n} was never finished, harmless: it counts for nothing" for n in self._file.torn]
        known = set(self._items)
        lost = sorted(({*seen, *range(max(known, default=-1))} - known) if self._file.damaged else ())
        out += [f"items.jsonl: the line of row {row} is damaged; the next run writes it again" for row in lost]
        out += [f"items.jsonl: line {n} is damaged; the next run writes it again" for n in self._file.damaged[len(lost) :]]
        return out

    @property
    def unreadable(self) -> bool:
        """Whether any line is torn or damaged, so that nothing may be appended before :meth:`mend`."""
        self._look()
        return bool(self._file.torn or self._file.damaged or not self._file.ended)

    def mend(self, seen: Seen) -> None:
        """Set lines aside that cannot be read, and keep from the commit records which row was whose (driver only)."""
        self._look()
        lines = []
        for row, (name, revision) in sorted(seen.items()):
            item = self._items.get(row)
            if item is None and name not in self._rows:
                lines.append(_line(Item(row, name, {}, revision), gone=True))
            elif item is not None and item.revision < revision:
                lines.append(_line(replace(item, revision=revision), gone=row in self._gone))
        set_aside(self.path, torn=True, add=b"".join(lines))

    def add(self, new: Iterable[tuple[str, dict[str, Any]]]) -> list[Item]:
        """Register micrographs by name; see ``Project.add_items`` (driver only)."""
        self._look()
        free = max(self._items, default=-1) + 1
        out: list[Item] = []
        lines: list[bytes] = []
        fresh: dict[str, Item] = {}
        for name, inputs in new:
            old = fresh.get(name) or (self._items[self._rows[name]] if name in self._rows else None)
            if old is None:
                item = Item(free, name, inputs)
                free += 1
            else:
                item = old if old.inputs == inputs else Item(old.row, name, inputs, old.revision + 1)
            if item is not old or (item.row in self._gone and name not in fresh):
                lines.append(_line(item))
            fresh[name] = item
            out.append(item)
        self._write(lines)
        return out

    def keep(self, names: Iterable[str]) -> list[Item]:
        """Mark every present item as gone that is not named; returns those (driver only)."""
        named = set(names)
        gone = [item for item in self.present().values() if item.name not in named]
        self._write([_line(item, gone=True) for item in gone])
        return gone

    def _write(self, lines: list[bytes]) -> None:
        if lines:
            append(self.path, b"".join(lines))


def _line(item: Item, *, gone: bool = False) -> bytes:
    entry: Record = {"row": item.row, "name": item.name, "inputs": item.inputs, "revision": item.revision}
    return checked_line({**entry, "gone": True} if gone else entry)
