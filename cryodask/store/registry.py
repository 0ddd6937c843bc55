"""The registry of a project: the row of each exposure. A row belongs to one content forever; a name is a label that may move.

``items.jsonl`` has one checked line per change (see lines.py): ``{row, name, content, inputs, revision}`` and, if set,
``there: false`` (its file was missing from the last complete listing), ``gone: true`` (missing and without results), ``forgotten: true``
(on purpose) and ``copies: [names]`` (other files of the same content). The latest line of a row counts; if two rows have one name, it
belongs to the one whose file was found under it last. A crash may truncate a batch of lines: the same listing completes it.
Only the driver writes.
"""

from __future__ import annotations

import difflib
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from cryodask.errors import InputError, StoreError
from cryodask.store.files import append
from cryodask.store.lines import LineFile, Record, checked_line, set_aside
from cryodask.store.listing import Arrival, Comparison, Entry, Item, Rows, unknown_content

__all__ = ["Arrival", "Item", "Registry", "Update"]

Seen = Mapping[int, tuple[str, int]]
"""Name and latest revision of rows, according to the commit records."""


@dataclass(frozen=True)
class Update:
    """What a listing changed.

    ``items``: one per active arrival, in the order of the listing. ``new``: those whose row is new, whose fingerprint
    changed, or that came back. ``said``: one message per event.
    """

    items: list[Item]
    new: list[Item]
    said: list[str]


class Registry:
    """The exposures of a project; the file is read incrementally."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "items.jsonl"
        self._reset()

    def _reset(self) -> None:
        self._file = LineFile(self.path)
        self._rows = Rows()
        self._present: dict[int, Item] | None = None
        self._foreseen = 0

    def _look(self) -> None:
        try:
            lines, replaced = self._file.grown()
        except FileNotFoundError:
            self._reset()
            return
        if replaced:
            self._rows = Rows()
        if lines or replaced:
            self._present = None
        for line in lines:
            self._rows.take(_parse(line.record))

    def present(self) -> dict[int, Item]:
        """Active exposures by row, in row order: their file is present, or it left and their results stay."""
        self._look()
        if self._present is None:
            rows = self._rows
            self._present = {row: rows.entries[row].item for row in sorted(rows.entries) if rows.counts(row)}
        return self._present

    def stamp(self) -> tuple[int, int, int]:
        """A value that changes with the content of the file, as of the last read."""
        return id(self._rows), self._file.offset, self._foreseen

    def all(self) -> dict[int, Item]:
        """Every exposure ever registered, by row; called ``NAME~ROW`` if another exposure has its name now."""
        self._look()
        rows = self._rows
        return {row: replace(rows.entries[row].item, name=rows.shown(row)) for row in sorted(rows.entries)}

    def former_names(self) -> dict[str, int]:
        """Rows by former names that no other exposure has or had."""
        self._look()
        rows = self._rows
        alone = {name: next(iter(had)) for name, had in rows.called.items() if len(had) == 1}
        return {name: row for name, row in alone.items() if rows.entries[row].item.name != name}

    def forgotten(self) -> set[str]:
        """Names of forgotten exposures."""
        self._look()
        return {entry.item.name for row, entry in self._rows.entries.items() if entry.forgotten and self._rows.holds(row)}

    def update(self, listing: Iterable[Arrival], *, complete: bool, keep: Container[int] = (), least_row: int = 0) -> Update:
        """Compare a listing with the registry, and register the changes (driver only).

        Parameters
        ----------
        listing : iterable of Arrival
        complete : bool
            Whether the listing is complete, so that missing exposures have left; False for arrivals of a watched session.
        keep : container of int
            Rows that have results: they stay active when their file leaves; others do not.
        least_row : int
            Lower bound for new rows, whatever the file says (rows known from journals and birth tables are never reused).
        """
        self._look()
        found = Comparison(self._rows, list(listing), complete, keep, least_row)
        self._write(found.changed.values())
        return self._update(found)

    def foresee(self, listing: Iterable[Arrival], *, keep: Container[int] = (), least_row: int = 0) -> Update:
        """Like :meth:`update` with a complete listing, but only in this object; nothing is written."""
        self._look()
        found = Comparison(self._rows, list(listing), True, keep, least_row)
        for entry in found.changed.values():
            self._rows.take(entry)
        self._present = None
        self._foreseen += 1
        return self._update(found)

    def rename_data_sets(self, names: Mapping[int, str], *, foresee: bool = False) -> None:
        """Assign exposures, by row, to the name of another data set (driver only); with ``foresee`` only in this object."""
        self._look()
        changed = []
        for row, name in names.items():
            entry = self._rows.entries[row]
            changed.append(entry._replace(item=replace(entry.item, inputs={**entry.item.inputs, "data_set": name})))
        if not foresee:
            self._write(changed)
            return
        for entry in changed:
            self._rows.take(entry)
        self._present = None
        self._foreseen += 1

    def _update(self, found: Comparison) -> Update:
        entries = self._rows.entries
        counted = [entries[row].item for row in found.placed.values() if not entries[row].forgotten]
        return Update(counted, [item for item in counted if item.row in found.new], found.said)

    def forget(self, names: Iterable[str]) -> list[Item]:
        """Exclude exposures until :meth:`remember`, although their files are listed (driver only)."""
        entries = [entry for entry in self._named(names) if not entry.forgotten]
        self._write([entry._replace(forgotten=True) for entry in entries])
        return [entry.item for entry in entries]

    def remember(self, names: Iterable[str]) -> list[Item]:
        """Include forgotten exposures again with their rows and results (driver only)."""
        entries = [entry for entry in self._named(names) if entry.forgotten]
        self._write([entry._replace(forgotten=False, gone=False) for entry in entries])
        return [entry.item for entry in entries]

    def _named(self, names: Iterable[str]) -> list[Entry]:
        known = {item.name: row for row, item in self.all().items()}
        out: dict[int, Entry] = {}
        for name in names:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
                raise InputError(
                    f"The project has no exposure called {name!r}.",
                    "it was given with the folder or extension of its file",
                    f"use the name in the project; the closest is {near[0]}" if near else "run the project first: it has no exposures",
                )
            out[known[name]] = self._rows.entries[known[name]]
        return list(out.values())

    def damaged(self, seen: Seen) -> list[str]:
        """One sentence per unreadable line; ``seen``: rows of the commit records."""
        self._look()
        out = [f"items.jsonl: line {n} is incomplete, harmless: it is ignored" for n in self._file.torn]
        known = set(self._rows.entries)
        lost = sorted({*seen, *(range(max(known, default=-1)) if self._file.damaged else ())} - known)
        out += [f"items.jsonl: the line of row {row} is damaged; the next run rewrites it" for row in lost]
        out += [f"items.jsonl: line {n} is damaged; the next run rewrites it" for n in self._file.damaged[len(lost) :]]
        return out

    @property
    def unreadable(self) -> bool:
        """Whether any line is torn or damaged, so that nothing may be appended before :meth:`repair`."""
        self._look()
        return bool(self._file.torn or self._file.damaged or not self._file.ended)

    def repair(self, seen: Seen) -> None:
        """Set unreadable lines aside, and restore the owners of rows from the commit records (driver only).

        The content of a lost row is unknown until the first unknown exposure of its name claims it.
        """
        self._look()
        lines = []
        for row, (name, revision) in sorted(seen.items()):
            entry = self._rows.entries.get(row)
            if entry is None:
                lines.append(_line(Entry(Item(row, name, unknown_content(name), {}, revision, there=False), gone=True)))
            elif entry.item.revision < revision:
                lines.append(_line(entry._replace(item=replace(entry.item, revision=revision))))
        if lines and not self.path.exists():
            append(self.path, b"".join(lines))
            return
        set_aside(self.path, torn=True, add=b"".join(lines))

    def _write(self, entries: Iterable[Entry]) -> None:
        lines = [_line(entry) for entry in entries]
        if not lines:
            return
        if self.unreadable:
            reason = "a run was killed while writing, or the disk lost bytes"
            raise StoreError(f"{self.path} has lines that cannot be read.", reason, "rerun the project to restore them")
        append(self.path, b"".join(lines))
        self._look()


def _parse(entry: Record) -> Entry:
    gone, name = entry.get("gone", False), entry["name"]
    content = entry.get("content") or unknown_content(name)
    item = Item(entry["row"], name, content, entry["inputs"], entry.get("revision", 0), entry.get("there", not gone))
    return Entry(item, gone, entry.get("forgotten", False), tuple(entry.get("copies", ())))


def _line(entry: Entry) -> bytes:
    item = entry.item
    record: Record = {"row": item.row, "name": item.name, "inputs": item.inputs, "revision": item.revision}
    if item.content != unknown_content(item.name):
        record["content"] = item.content
    if not item.there:
        record["there"] = False
    record |= {k: v for k, v in (("gone", entry.gone), ("forgotten", entry.forgotten), ("copies", list(entry.copies))) if v}
    return checked_line(record)
