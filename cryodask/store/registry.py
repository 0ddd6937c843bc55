"""The registry of a project: which exposure has which row. A row belongs to a content for ever; a name is a label that may move.

``items.jsonl`` has one checked line per change (see lines.py): ``{row, name, content, inputs, revision}`` and, where they are set,
``there: false`` (its file was missing from the last complete listing), ``gone: true`` (missing and without results), ``forgotten: true``
(on purpose) and ``copies: [names]`` (other files of the same content). The latest line of a row counts; of two rows with one name, the
one whose file was found under it last holds it. A batch of lines may be cut short by a crash: the same listing completes it.
Only the driver writes.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from cryodask.errors import InputError, StoreError
from cryodask.store.files import append
from cryodask.store.lines import LineFile, Record, checked_line, set_aside

Seen = Mapping[int, tuple[str, int]]
"""Name and latest revision of rows, as the commit records tell them."""

_WHERE_AND_WHEN = ("size", "mtime", "stat", "source", "data_set")
_SHOWN = 3


@dataclass(frozen=True)
class Arrival:
    """One exposure of a listing: its name, the identity of its bytes, and what is known from outside (paths, values of a STAR file)."""

    name: str
    content: str
    inputs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Item:
    """One exposure of the registry.

    ``revision`` counts how often its values changed: of two records the one of the later revision counts. ``there`` tells whether its
    file was in the last complete listing; the results of an exposure that was archived, deleted or moved away still count.
    """

    row: int
    name: str
    content: str
    inputs: dict[str, Any] = field(default_factory=dict)
    revision: int = 0
    there: bool = True

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the content and of the values known from outside, but not of where the file lies or when it was written."""
        values = {k: v for k, v in self.inputs.items() if not k.endswith("_path") and k not in _WHERE_AND_WHEN}
        return hashlib.blake2b(_text([self.content, values]).encode(), digest_size=6).hexdigest()


@dataclass(frozen=True)
class Update:
    """What a listing changed.

    ``items``: one per arrival that counts, in the order of the listing. ``new``: those of them whose row is new, whose fingerprint
    changed, or that came back. ``said``: one line per event, for people.
    """

    items: list[Item]
    new: list[Item]
    said: list[str]


class Registry:
    """The exposures of a project, read as the file grows."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "items.jsonl"
        self._reset()

    def _reset(self) -> None:
        self._file = LineFile(self.path)
        self._rows = _Rows()
        self._present: dict[int, Item] | None = None

    def _look(self) -> None:
        try:
            lines, replaced = self._file.grown()
        except FileNotFoundError:
            self._reset()
            return
        if replaced:
            self._rows = _Rows()
        if lines or replaced:
            self._present = None
        for line in lines:
            self._rows.take(_parse(line.record))

    def present(self) -> dict[int, Item]:
        """Exposures that count, by row, in row order: whether their file is there or left and their results stay."""
        self._look()
        if self._present is None:
            rows = self._rows
            self._present = {row: rows.entries[row].item for row in sorted(rows.entries) if rows.counts(row)}
        return self._present

    def stamp(self) -> tuple[int, int]:
        """Changes with what the file says, as of the last look."""
        return id(self._rows), self._file.offset

    def all(self) -> dict[int, Item]:
        """Every exposure ever registered, by row; one whose name passed to another exposure is called ``NAME~ROW``."""
        self._look()
        rows = self._rows
        return {row: replace(rows.entries[row].item, name=rows.shown(row)) for row in sorted(rows.entries)}

    def update(self, listing: Iterable[Arrival], *, complete: bool, keep: Container[int] = (), least_row: int = 0) -> Update:
        """Compare a listing as a whole with the registry, and register what it changes (driver only).

        Parameters
        ----------
        listing : iterable of Arrival
        complete : bool
            Whether the listing is all there is, so that what it lacks has left; False for arrivals of a live session.
        keep : container of int
            Rows that have results: they stay present when their file leaves; others no longer count.
        least_row : int
            New rows are not below it, whatever the file says (rows known from journals and birth tables are never used again).
        """
        self._look()
        found = _Comparison(self._rows, list(listing), complete, keep, least_row)
        self._write(found.changed.values())
        entries = self._rows.entries
        counted = [entries[row].item for row in found.placed.values() if not entries[row].forgotten]
        return Update(counted, [item for item in counted if item.row in found.new], found.said)

    def forget(self, names: Iterable[str]) -> list[Item]:
        """Exclude exposures on purpose; they stay out, although their files are listed, until :meth:`remember` (driver only)."""
        entries = [entry for entry in self._named(names) if not entry.forgotten]
        self._write([entry._replace(forgotten=True) for entry in entries])
        return [entry.item for entry in entries]

    def remember(self, names: Iterable[str]) -> list[Item]:
        """Include forgotten exposures again, with their rows and results (driver only)."""
        entries = [entry for entry in self._named(names) if entry.forgotten]
        self._write([entry._replace(forgotten=False, gone=False) for entry in entries])
        return [entry.item for entry in entries]

    def _named(self, names: Iterable[str]) -> list[_Entry]:
        known = {item.name: row for row, item in self.all().items()}
        out: dict[int, _Entry] = {}
        for name in names:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
                raise InputError(
                    f"The project has no exposure called {name}.",
                    "the name has a typo, or still has the folder or ending of its file",
                    f"use the name as the project has it; the nearest is {near[0]}"
                    if near
                    else "run the project first: it has no exposures",
                )
            out[known[name]] = self._rows.entries[known[name]]
        return list(out.values())

    def damaged(self, seen: Seen) -> list[str]:
        """One sentence for each line that cannot be read; ``seen`` are the rows of the commit records."""
        self._look()
        out = [f"items.jsonl: line {n} was never finished, harmless: it counts for nothing" for n in self._file.torn]
        known = set(self._rows.entries)
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
        """Set lines aside that cannot be read, and restore from the commit records which row was whose (driver only).

        The content of a lost row is unknown: it becomes that of the first unknown exposure of its name.
        """
        self._look()
        lines = []
        for row, (name, revision) in sorted(seen.items()):
            entry = self._rows.entries.get(row)
            if entry is None:
                lines.append(_line(_Entry(Item(row, name, _unknown(name), {}, revision, there=False), gone=True)))
            elif entry.item.revision < revision:
                lines.append(_line(entry._replace(item=replace(entry.item, revision=revision))))
        set_aside(self.path, torn=True, add=b"".join(lines))

    def _write(self, entries: Iterable[_Entry]) -> None:
        lines = [_line(entry) for entry in entries]
        if not lines:
            return
        if self.unreadable:
            reason = "a run was killed while it wrote, or the disk lost bytes"
            raise StoreError(f"{self.path} has lines that cannot be read.", reason, "run the project again: it restores them")
        append(self.path, b"".join(lines))
        self._look()


class _Entry(NamedTuple):
    """What the latest line of a row says."""

    item: Item
    gone: bool = False
    forgotten: bool = False
    copies: tuple[str, ...] = ()


class _Rows:
    """Rows as the lines tell them, and which row has which content and which name."""

    def __init__(self) -> None:
        self.entries: dict[int, _Entry] = {}
        self.of_content: dict[str, int] = {}
        self.holder: dict[str, int] = {}

    def take(self, entry: _Entry) -> None:
        """Apply one line."""
        item = entry.item
        old = self.entries.get(item.row)
        if old is not None and old.item.content != item.content:
            self.of_content.pop(old.item.content, None)
        self.entries[item.row] = entry
        self.of_content[item.content] = item.row
        first = self.holder.setdefault(item.name, item.row)
        lost = item.content == _unknown(item.name) and item.row > first  # a lost row was the later one
        if first != item.row and (item.there or lost):
            self.holder[item.name] = item.row
            former = self.entries[first]
            if former.item.name == item.name:
                self.entries[first] = former._replace(item=replace(former.item, there=False))

    def holds(self, row: int) -> bool:
        """Whether the row has its name: no other exposure was found under it since."""
        return self.holder[self.entries[row].item.name] == row

    def counts(self, row: int) -> bool:
        """Whether the row is present."""
        entry = self.entries[row]
        return not entry.gone and not entry.forgotten and self.holds(row)

    def shown(self, row: int) -> str:
        """What people call the row."""
        name = self.entries[row].item.name
        return name if self.holds(row) else f"{name}~{row}"


class _Comparison:
    """A listing compared with the registry: ``placed`` has the row of each name that counts, ``changed`` what is to be written."""

    def __init__(self, rows: _Rows, listing: list[Arrival], complete: bool, keep: Container[int], least_row: int) -> None:
        self.rows, self.complete = rows, complete
        self.free = max(max(rows.entries, default=-1) + 1, least_row)
        self.named = _by_name(listing)
        self.names: dict[str, list[str]] = {}
        for arrival in listing:
            self.names.setdefault(arrival.content, []).append(arrival.name)
        self.changed: dict[int, _Entry] = {}
        self.new: set[int] = set()
        self.said: list[str] = []
        self.back: list[str] = []
        placed = dict(self._place(content, names) for content, names in self.names.items())
        self.placed = {name: placed[name] for name in self.named if name in placed}
        if self.back:
            self.said.append(f"{_are(self.back)} there again ({_some(self.back)})")
        if complete:
            self._leave(keep)

    def _place(self, content: str, names: list[str]) -> tuple[str, int]:
        """Name and row of one content of the listing."""
        old = self._known(content, names)
        name = names[0]
        if old is not None and (old.item.name in names or self._is_elsewhere(old)):
            name = old.item.name
        if old is None:
            item = Item(self.free, name, content, self.named[name].inputs)
            self.free += 1
        else:
            item = _renewed(old.item, self.named[name]) if name in names else old.item
        others = [n for n in names if n != name]
        before = old.copies if old else ()
        unlisted = [] if self.complete else [n for n in before if n not in self.named]
        entry = _Entry(item, False, old is not None and old.forgotten, tuple(unlisted + others))
        self.said += [f"{n} is a copy of {name} and is left out" for n in others if n not in before]
        self._tell(old, entry)
        if entry != old:
            self.changed[item.row] = entry
        return name, item.row

    def _known(self, content: str, names: list[str]) -> _Entry | None:
        """The entry of a content, or else one of these names whose content is unknown."""
        rows = self.rows
        for known in (content, *map(_unknown, names)):
            row = rows.of_content.get(known)
            if row is not None and (known == content or rows.holds(row)):
                return rows.entries[row]
        return None

    def _is_elsewhere(self, old: _Entry) -> bool:
        """Whether an exposure that the listing of a live session does not name is still there."""
        return not self.complete and old.item.there and old.item.name not in self.named

    def _tell(self, old: _Entry | None, entry: _Entry) -> None:
        """Note whether an exposure is new, and what people should know of it."""
        row, name = entry.item.row, entry.item.name
        former = self._former(entry.item)
        gone = former is None or self.rows.entries[former].gone
        if old is None:
            if former is not None:
                kept = "" if gone else f"; the results of the former one are kept as {name}~{former}"
                self.said.append(f"{name} was collected again: it is a new exposure{kept}")
            self.new.add(row)
            return
        there = old.item.there
        shown = self.rows.shown(row)
        if shown != name:
            kept = "" if gone else f"; the results of the former {name} are kept as {name}~{former}"
            self.said.append(f"{shown} {'is now called' if there else 'is there again as'} {name}{kept}")
        elif not there and not entry.forgotten:
            self.back.append(name)
        if not there or entry.item.revision != old.item.revision:
            self.new.add(row)

    def _former(self, item: Item) -> int | None:
        """The row that loses its name to ``item`` and is not in the listing under another one."""
        row = self.rows.holder.get(item.name, item.row)
        if row == item.row:
            return None
        former = self.rows.entries[row].item
        return row if former.name == item.name and former.content not in self.names else None

    def _leave(self, keep: Container[int]) -> None:
        """Take note of exposures that a complete listing lacks."""
        left: list[str] = []
        lost = 0
        for row, old in self.rows.entries.items():
            item = old.item
            if item.content in self.names or item.name in self.placed:
                continue
            gone = row not in keep
            entry = _Entry(replace(item, there=False) if item.there else item, gone, old.forgotten)
            if entry != old:
                self.changed[row] = entry
            if self.rows.counts(row) and (item.there or gone):
                left.append(item.name)
                lost += gone
        if left:
            was = "it was" if len(left) == 1 else "they were"
            stay = f"the results of {len(left) - lost} stay, {lost} had none and no longer count" if lost else "the results stay"
            self.said.append(f"{_are(left)} no longer where {was} ({_some(left)}): {stay}")


def _by_name(listing: list[Arrival]) -> dict[str, Arrival]:
    named: dict[str, Arrival] = {}
    for arrival in listing:
        if arrival.name in named:
            raise InputError(
                f"Two exposures would both be called {arrival.name}: {_origin(named[arrival.name])} and {_origin(arrival)}.",
                "files of one name lie in several folders, or differ in their ending only",
                "rename one of them, or make one project per folder",
            )
        named[arrival.name] = arrival
    return named


def _origin(arrival: Arrival) -> str:
    return next((str(v) for k, v in arrival.inputs.items() if k.endswith("_path")), arrival.content)


def _renewed(old: Item, arrival: Arrival) -> Item:
    """A known exposure as it was found now; the same object if nothing changed."""
    same = old.inputs == arrival.inputs or _text(old.inputs) == _text(arrival.inputs)
    if same and old.there and old.name == arrival.name and old.content == arrival.content:
        return old
    inputs = old.inputs if same else arrival.inputs
    new = replace(old, name=arrival.name, content=arrival.content, inputs=inputs, there=True)
    return new if new.fingerprint == old.fingerprint else replace(new, revision=old.revision + 1)


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _are(names: list[str]) -> str:
    return "1 exposure is" if len(names) == 1 else f"{len(names)} exposures are"


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _unknown(name: str) -> str:
    """Content of a row that was lost and restored by its name."""
    return f"name:{name}"


def _parse(entry: Record) -> _Entry:
    gone, name = entry.get("gone", False), entry["name"]
    content = entry.get("content") or _unknown(name)
    item = Item(entry["row"], name, content, entry["inputs"], entry.get("revision", 0), entry.get("there", not gone))
    return _Entry(item, gone, entry.get("forgotten", False), tuple(entry.get("copies", ())))


def _line(entry: _Entry) -> bytes:
    item = entry.item
    record: Record = {"row": item.row, "name": item.name, "inputs": item.inputs, "revision": item.revision}
    if item.content != _unknown(item.name):
        record["content"] = item.content
    if not item.there:
        record["there"] = False
    record |= {k: v for k, v in (("gone", entry.gone), ("forgotten", entry.forgotten), ("copies", list(entry.copies))) if v}
    return checked_line(record)
