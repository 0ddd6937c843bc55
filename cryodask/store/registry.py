"""The registry of a project: which exposure has which row. A row belongs to a content for ever; a name is a label that may move.

``items.jsonl`` has one checked line per change (see lines.py): ``{row, name, content, inputs, revision}`` and, where they are set,
``there: false`` (its file was missing from the last complete listing), ``gone: true`` (missing and without results), ``forgotten: true``
(on purpose) and ``copies: [names]`` (other files of the same content). The latest line of a row counts; of two rows with one name, the
one whose file was found under it last holds it. A batch of lines may be cut short by a crash: the same listing completes it.
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
"""Name and latest revision of rows, as the commit records tell them."""


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
        """Exposures that count, by row, in row order: whether their file is there or left and their results stay."""
        self._look()
        if self._present is None:
            rows = self._rows
            self._present = {row: rows.entries[row].item for row in sorted(rows.entries) if rows.counts(row)}
        return self._present

    def stamp(self) -> tuple[int, int, int]:
        """Changes with what the file says, as of the last look."""
        return id(self._rows), self._file.offset, self._foreseen

    def all(self) -> dict[int, Item]:
        """Every exposure ever registered, by row; one whose name passed to another exposure is called ``NAME~ROW``."""
        self._look()
        rows = self._rows
        return {row: replace(rows.entries[row].item, name=rows.shown(row)) for row in sorted(rows.entries)}

    def former_names(self) -> dict[str, int]:
        """Rows by names that they had before, and that no other exposure has or had."""
        self._look()
        rows = self._rows
        alone = {name: next(iter(had)) for name, had in rows.called.items() if len(had) == 1}
        return {name: row for name, row in alone.items() if rows.entries[row].item.name != name}

    def forgotten(self) -> set[str]:
        """Names of exposures that were forgotten on purpose."""
        self._look()
        return {entry.item.name for row, entry in self._rows.entries.items() if entry.forgotten and self._rows.holds(row)}

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
        found = Comparison(self._rows, list(listing), complete, keep, least_row)
        self._write(found.changed.values())
        return self._update(found)

    def foresee(self, listing: Iterable[Arrival], *, keep: Container[int] = (), least_row: int = 0) -> Update:
        """What :meth:`update` would do with a complete listing; only this object knows of it, nothing is written."""
        self._look()
        found = Comparison(self._rows, list(listing), True, keep, least_row)
        for entry in found.changed.values():
            self._rows.take(entry)
        self._present = None
        self._foreseen += 1
        return self._update(found)

    def rename_data_sets(self, names: Mapping[int, str], *, foresee: bool = False) -> None:
        """Give exposures, by row, the name of another data set (driver only); with ``foresee`` only this object knows of it."""
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
        """Exclude exposures on purpose; they stay out, although their files are listed, until :meth:`remember` (driver only)."""
        entries = [entry for entry in self._named(names) if not entry.forgotten]
        self._write([entry._replace(forgotten=True) for entry in entries])
        return [entry.item for entry in entries]

    def remember(self, names: Iterable[str]) -> list[Item]:
        """Include forgotten exposures again, with their rows and results (driver only)."""
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
        """Whether any line is torn or damaged, so that nothing may be appended before :meth:`repair`."""
        self._look()
        return bool(self._file.torn or self._file.damaged or not self._file.ended)

    def repair(self, seen: Seen) -> None:
        """Set lines aside that cannot be read, and restore from the commit records which row was whose (driver only).

        The content of a lost row is unknown: it becomes that of the first unknown exposure of its name.
        """
        self._look()
        lines = []
        for row, (name, revision) in sorted(seen.items()):
            entry = self._rows.entries.get(row)
            if entry is None:
                lines.append(_line(Entry(Item(row, name, unknown_content(name), {}, revision, there=False), gone=True)))
            elif entry.item.revision < revision:
                lines.append(_line(entry._replace(item=replace(entry.item, revision=revision))))
        set_aside(self.path, torn=True, add=b"".join(lines))

    def _write(self, entries: Iterable[Entry]) -> None:
        lines = [_line(entry) for entry in entries]
        if not lines:
            return
        if self.unreadable:
            reason = "a run was killed while it wrote, or the disk lost bytes"
            raise StoreError(f"{self.path} has lines that cannot be read.", reason, "run the project again: it restores them")
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
