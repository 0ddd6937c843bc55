"""Exposures of the registry, and the comparison of a listing of inputs with them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

from cryodask.errors import InputError

_WHERE_AND_WHEN = ("size", "mtime", "stat", "source", "data_set")
_FILES = ("movie_path", "micrograph_path")
_SHOWN = 3
_ENCODER = json.JSONEncoder(sort_keys=True)


@dataclass(frozen=True)
class Arrival:
    """One exposure of a listing: its name, content identity, and external values (paths, values of a STAR file)."""

    name: str
    content: str
    inputs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Item:
    """One exposure of the registry.

    ``revision`` counts changes of its values: of two records, the one of the later revision counts. ``there``: whether its
    file was in the last complete listing; the results of an archived, deleted or moved exposure still count.
    """

    row: int
    name: str
    content: str
    inputs: dict[str, Any] = field(default_factory=dict)
    revision: int = 0
    there: bool = True

    @property
    def data_set(self) -> str:
        """Name of its data set; empty if the project has a single unnamed one."""
        return str(self.inputs.get("data_set", ""))

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the content and the external values, but not of the path and time of the file."""
        values = {k: v for k, v in self.inputs.items() if not k.endswith("_path") and k not in _WHERE_AND_WHEN}
        return hashlib.blake2b(canonical([self.content, values]).encode(), digest_size=6).hexdigest()


class Entry(NamedTuple):
    """Content of the latest line of a row."""

    item: Item
    gone: bool = False
    forgotten: bool = False
    copies: tuple[str, ...] = ()


class Rows:
    """Rows according to the lines, with look-up by content and name."""

    def __init__(self) -> None:
        self.entries: dict[int, Entry] = {}
        self.of_content: dict[str, int] = {}
        self.holder: dict[str, int] = {}
        self.called: dict[str, set[int]] = {}
        """All rows that ever had a name."""

    def take(self, entry: Entry) -> None:
        """Apply one line."""
        item = entry.item
        old = self.entries.get(item.row)
        if old is not None and old.item.content != item.content:
            self.of_content.pop(old.item.content, None)
        self.entries[item.row] = entry
        self.called.setdefault(item.name, set()).add(item.row)
        self.of_content[item.content] = item.row
        first = self.holder.setdefault(item.name, item.row)
        lost = item.content == unknown_content(item.name) and item.row > first  # the lost row was the later one
        if first != item.row and (item.there or lost):
            self.holder[item.name] = item.row
            former = self.entries[first]
            if former.item.name == item.name:
                self.entries[first] = former._replace(item=replace(former.item, there=False))

    def holds(self, row: int) -> bool:
        """Whether the row still owns its name: no other exposure was found under it since."""
        return self.holder[self.entries[row].item.name] == row

    def counts(self, row: int) -> bool:
        """Whether the row is present."""
        entry = self.entries[row]
        return not entry.gone and not entry.forgotten and self.holds(row)

    def shown(self, row: int) -> str:
        """Display name of the row."""
        name = self.entries[row].item.name
        return name if self.holds(row) else f"{name}~{row}"


class Comparison:
    """Comparison of a listing with the registry: ``placed`` has the row of each active name, ``changed`` the entries to write."""

    def __init__(self, rows: Rows, listing: list[Arrival], complete: bool, keep: Container[int], least_row: int) -> None:
        self.rows, self.complete = rows, complete
        self.free = max(max(rows.entries, default=-1) + 1, least_row)
        self.named = _by_name(listing)
        self.names: dict[str, list[str]] = {}
        for arrival in listing:
            self.names.setdefault(arrival.content, []).append(arrival.name)
        self.changed: dict[int, Entry] = {}
        self.new: set[int] = set()
        self.said: list[str] = []
        self.back: list[str] = []
        placed = dict(self._place(content, names) for content, names in self.names.items())
        self.placed = {name: placed[name] for name in self.named if name in placed}
        if self.back:
            self.said.append(f"{_are(self.back)} back ({_some(self.back)})")
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
        entry = Entry(item, False, old is not None and old.forgotten, tuple(unlisted + others))
        self.said += [f"{n} is a copy of {name} and is skipped" for n in others if n not in before]
        self._tell(old, entry)
        if entry != old:
            self.changed[item.row] = entry
        return name, item.row

    def _known(self, content: str, names: list[str]) -> Entry | None:
        """The entry with this content, else one with one of these names and unknown content."""
        rows = self.rows
        for known in (content, *map(unknown_content, names)):
            row = rows.of_content.get(known)
            if row is not None and (known == content or rows.holds(row)):
                return rows.entries[row]
        return None

    def _is_elsewhere(self, old: Entry) -> bool:
        """Whether an exposure missing from the listing of a watched session still exists."""
        return not self.complete and old.item.there and old.item.name not in self.named

    def _tell(self, old: Entry | None, entry: Entry) -> None:
        """Record whether an exposure is new, with a message for the user."""
        row, name = entry.item.row, entry.item.name
        former = self._former(entry.item)
        gone = former is None or self.rows.entries[former].gone
        if old is None:
            if former is not None:
                kept = "" if gone else f"; the results of the former one are kept as {name}~{former}"
                lost = entry.item.content == unknown_content(name)
                what = f"is now {_origin(entry.item)}, which does not exist" if lost else "was recorded again"
                self.said.append(f"{name} {what}: it is a new exposure{kept}")
            self.new.add(row)
            return
        there = old.item.there
        shown = self.rows.shown(row)
        if shown != name:
            kept = "" if gone else f"; the results of the former {name} are kept as {name}~{former}"
            self.said.append(f"{shown} {'is now called' if there else 'is back as'} {name}{kept}")
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
        """Record exposures that are missing from a complete listing."""
        left: list[str] = []
        lost = 0
        for row, old in self.rows.entries.items():
            item = old.item
            if item.content in self.names or item.name in self.placed:
                continue
            # without its import an imported exposure has nothing; the results of an exposure with its own file stay
            gone = row not in keep or not _has_a_file(item)
            entry = Entry(replace(item, there=False) if item.there else item, gone, old.forgotten)
            if entry != old:
                self.changed[row] = entry
            if self.rows.counts(row) and (item.there or gone):
                left.append(item.name)
                lost += gone
        if left:
            was = "it was" if len(left) == 1 else "they were"
            stay = f"the results of {len(left) - lost} stay, {lost} no longer count" if lost else "the results stay"
            self.said.append(f"{_are(left)} no longer where {was} ({_some(left)}): {stay}")


def _has_a_file(item: Item) -> bool:
    """Whether an exposure has a movie or micrograph file, rather than only an entry in a table or another project."""
    return any(name in item.inputs for name in _FILES) or "source" not in item.inputs


def _by_name(listing: list[Arrival]) -> dict[str, Arrival]:
    named: dict[str, Arrival] = {}
    for arrival in listing:
        if arrival.name in named:
            raise InputError(
                f"Two exposures have the same name {arrival.name}: {_origin(named[arrival.name])} and {_origin(arrival)}.",
                "files with the same name are in several folders, or differ only in their extension",
                "rename one of them, or make a separate project for each folder",
            )
        named[arrival.name] = arrival
    return named


def _origin(arrival: Arrival | Item) -> str:
    return next((str(v) for k, v in arrival.inputs.items() if k.endswith("_path")), arrival.content)


def _renewed(old: Item, arrival: Arrival) -> Item:
    """A known exposure updated from the listing; the same object if nothing changed."""
    same = old.inputs == arrival.inputs or canonical(old.inputs) == canonical(arrival.inputs)
    if same and old.there and old.name == arrival.name and old.content == arrival.content:
        return old
    inputs = old.inputs if same else arrival.inputs
    new = replace(old, name=arrival.name, content=arrival.content, inputs=inputs, there=True)
    return new if new.fingerprint == old.fingerprint else replace(new, revision=old.revision + 1)


def canonical(value: Any) -> str:
    """A canonical text for a value: equal values give equal texts."""
    return _ENCODER.encode(value)


def _are(names: list[str]) -> str:
    return "1 exposure is" if len(names) == 1 else f"{len(names)} exposures are"


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def unknown_content(name: str) -> str:
    """Placeholder content of a lost row that was restored by name."""
    return f"name:{name}"
