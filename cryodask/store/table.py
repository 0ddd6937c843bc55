"""Committed items as columns, and the compaction: a cache of the journals in one file.

``columns.npz`` has the columns of all items that were committed when the driver wrote it, and how far it had read each journal.
Readers use it and parse only the rest of the journals. It is never authoritative: if it is missing, damaged, or does not match the
journals, only these are read.
"""

from __future__ import annotations

import io
import json
import lzma
import os
import struct
import zipfile
import zlib
from binascii import a2b_base64
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cryodask.store.files import write_atomically
from cryodask.store.journal import Journal, JournalContents, decode_value, rank
from cryodask.store.lines import Record, mark_of
from cryodask.vocabulary import Var

_FILE = "columns.npz"
_FORMAT = 4
_NUMBERS = ("revision", "attempt", "time")
_UNREADABLE = (zipfile.BadZipFile, OSError, ValueError, EOFError, RuntimeError, struct.error, zlib.error, lzma.LZMAError)
"""Exceptions that zipfile raises for damage, depending on the byte; a flipped method makes it call a decompressor."""


@dataclass(frozen=True)
class Column:
    """One variable of many items: concatenated values, and the shape of each, `(item, dimension)`."""

    flat: np.ndarray
    shapes: np.ndarray

    @classmethod
    def of(cls, values: list[Any], dtype: str, ndim: int) -> Column:
        """From a list of arrays or numbers."""
        if ndim == 0:
            return cls(np.array(values, dtype=dtype), np.zeros((len(values), 0), np.int64))
        arrays = [np.asarray(v, dtype=dtype) for v in values]
        flat = np.concatenate([a.ravel() for a in arrays]) if arrays else np.zeros(0, dtype)
        return cls(flat, np.array([a.shape for a in arrays], dtype=np.int64).reshape(len(arrays), ndim))

    @classmethod
    def of_encoded(cls, values: list[Any], dtype: str, ndim: int) -> Column:
        """From a list of values as they are in records (see :func:`~cryodask.store.journal.encode_value`)."""
        types = {v["dtype"] if isinstance(v, dict) and len(v["shape"]) == ndim else "" for v in values}
        if len(types) != 1 or "" in types:
            return cls.of([decode_value(v) for v in values], dtype, ndim)
        # one array of all bytes: an array per item would cost several times more
        raw = b"".join([a2b_base64(v["base64"]) for v in values])
        shapes = np.array([v["shape"] for v in values], dtype=np.int64).reshape(len(values), ndim)
        return cls(np.frombuffer(raw, types.pop()).astype(dtype), shapes)

    def take(self, index: np.ndarray) -> Column:
        """Some items, in the order of ``index``."""
        shapes = self.shapes[index]
        if self._uniform:
            return Column(self.flat.reshape(len(self.shapes), -1)[index].ravel() if len(self.shapes) else self.flat, shapes)
        ends = np.cumsum(self.shapes.prod(1))
        parts = np.split(self.flat, ends[:-1])
        return Column(np.concatenate([parts[i] for i in index] or [self.flat[:0]]), shapes)

    def __add__(self, other: Column) -> Column:
        return Column(np.concatenate([self.flat, other.flat]), np.concatenate([self.shapes, other.shapes]))

    @property
    def _uniform(self) -> bool:
        return bool((self.shapes == self.shapes[:1]).all())

    def stacked(self) -> np.ndarray:
        """One array `(item, ...)`; items of different lengths are padded with NaN (floats) or -1 (integers)."""
        if self._uniform:
            rest = self.shapes[0] if len(self.shapes) else np.zeros(self.shapes.shape[1], np.int64)
            return self.flat.reshape(len(self.shapes), *rest)
        longest = self.shapes.max(0)
        out = np.full((len(self.shapes), *longest), np.nan if self.flat.dtype.kind == "f" else -1, self.flat.dtype)
        filled = np.ones(out.shape, bool)
        for axis, length in enumerate(longest):
            inside = np.arange(length) < self.shapes[:, axis, np.newaxis]
            filled &= np.expand_dims(inside, tuple(1 + a for a in range(len(longest)) if a != axis))
        out[filled] = self.flat
        return out


@dataclass
class Table:
    """The current records of one generation: committed items as columns, failures as records.

    ``input``, ``recipe`` and ``slice``: what each was made from (see made.py). ``stored``: for each bulk variable, which items have a
    shard. ``layouts`` (JSON, mostly empty): items whose size or type differs from the first data set. ``texts`` and ``columns``: the
    requested variables.
    """

    row: np.ndarray
    name: np.ndarray
    input: np.ndarray
    recipe: np.ndarray
    slice: np.ndarray
    layouts: np.ndarray
    numbers: dict[str, np.ndarray]
    stored: dict[str, np.ndarray]
    failures: dict[int, Record]
    columns: dict[str, Column] = field(default_factory=dict)
    texts: dict[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.row)

    @classmethod
    def of(cls, records: dict[int, Record], gives: list[Var], names: Iterable[str]) -> Table:
        """From records, by row."""
        rows = sorted(row for row, r in records.items() if r["ok"])
        good = [records[row] for row in rows]
        types = {"revision": np.int64, "attempt": np.int64, "time": np.float64}
        wanted = [v for v in gives if v.name in set(names)]
        return cls(
            row=np.array(rows, dtype=np.int64),
            name=_objects([r["name"] for r in good]),
            input=_objects([r.get("input") for r in good]),
            recipe=_objects([r.get("recipe") for r in good]),
            slice=_objects([r.get("slice") for r in good]),
            layouts=_objects([json.dumps(r["layouts"], sort_keys=True) if "layouts" in r else "" for r in good]),
            numbers={n: np.array([r.get(n, 0) for r in good], dtype=types[n]) for n in _NUMBERS},
            stored={v.name: np.array([v.name in r["shards"] for r in good], dtype=bool) for v in gives if v.kind == "bulk"},
            failures={row: r for row, r in records.items() if not r["ok"]},
            columns={
                v.name: Column.of_encoded([r["columns"][v.name] for r in good], v.dtype, len(v.dims)) for v in wanted if v.dtype != "U"
            },
            texts={v.name: _objects([r["columns"][v.name] for r in good]) for v in wanted if v.dtype == "U"},
        )

    def take(self, index: np.ndarray) -> Table:
        """The committed items at ``index``, all failures."""
        if len(index) == len(self) and (index == np.arange(len(self))).all():
            return self
        return Table(
            self.row[index],
            self.name[index],
            self.input[index],
            self.recipe[index],
            self.slice[index],
            self.layouts[index],
            {n: v[index] for n, v in self.numbers.items()},
            {n: v[index] for n, v in self.stored.items()},
            self.failures,
            {n: c.take(index) for n, c in self.columns.items()},
            {n: t[index] for n, t in self.texts.items()},
        )

    def __getitem__(self, name: str) -> np.ndarray:
        """A variable of all items as one array."""
        return self.texts[name] if name in self.texts else self.columns[name].stacked()

    def _rank(self, i: int) -> tuple[int, bool, int, float]:
        revision, attempt, time = (self.numbers[n][i].item() for n in _NUMBERS)
        return revision, True, attempt, time

    def updated(self, tail: dict[int, Record], gives: list[Var]) -> Table:
        """A table updated with later records, where they outrank the known ones of their rows."""
        if not tail:
            return self
        place = {row: i for i, row in enumerate(self.row.tolist())}
        failures, fresh, dropped = dict(self.failures), {}, []
        for row, record in tail.items():
            i = place.get(row)
            known = self._rank(i) if i is not None else rank(failures[row]) if row in failures else None
            if known is not None and known > rank(record):
                continue
            fresh[row] = record
            failures.pop(row, None)
            if i is not None:
                dropped.append(i)
        old = self.take(np.setdiff1d(np.arange(len(self)), dropped))
        new = Table.of(fresh, gives, [*self.columns, *self.texts])
        both = Table(
            np.concatenate([old.row, new.row]),
            np.concatenate([old.name, new.name]),
            np.concatenate([old.input, new.input]),
            np.concatenate([old.recipe, new.recipe]),
            np.concatenate([old.slice, new.slice]),
            np.concatenate([old.layouts, new.layouts]),
            {n: np.concatenate([v, new.numbers[n]]) for n, v in old.numbers.items()},
            {n: np.concatenate([v, new.stored[n]]) for n, v in old.stored.items()},
            failures | new.failures,
            {n: c + new.columns[n] for n, c in old.columns.items()},
            {n: np.concatenate([t, new.texts[n]]) for n, t in old.texts.items()},
        )
        return both.take(np.argsort(both.row, kind="stable"))


class DamagedCompaction(Exception):
    """The compaction cannot be used; the journals have the same content."""


class Compaction:
    """An open ``columns.npz``; a rename by the driver does not disturb its readers.

    Raises
    ------
    DamagedCompaction
        On opening, and whenever the data read do not match their checksum.
    FileNotFoundError
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "rb")  # noqa: SIM115  (lives as long as the object)
        there = os.fstat(self._file.fileno())
        self.stamp = (there.st_dev, there.st_ino, there.st_size, there.st_mtime_ns)
        try:
            self._zip = zipfile.ZipFile(self._file)
        except _UNREADABLE as error:
            self._file.close()
            raise DamagedCompaction(str(error)) from error
        self._columns: dict[str, Column] = {}
        self._texts: dict[str, np.ndarray] = {}
        self.head = json.loads(self._bytes("head"))
        if self.head["format"] != _FORMAT:
            raise DamagedCompaction(f"format {self.head['format']}")
        self._table = Table(
            self._array("row"),
            _objects(self.head["name"]),
            _objects(self.head["input"]),
            _objects(self.head["recipe"]),
            _objects(self.head["slice"]),
            _objects(self.head["layouts"]),
            {n: self._array(n) for n in _NUMBERS},
            {n: self._array(f"stored/{n}") for n in self.head["stored"]},
            {r["row"]: r for r in self.head["failures"]},
        )

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()

    def _bytes(self, member: str) -> bytes:
        try:
            return self._zip.read(member)
        except (*_UNREADABLE, KeyError) as error:
            raise DamagedCompaction(f"{member}: {error}") from error

    def _array(self, member: str) -> np.ndarray:
        try:
            with self._zip.open(f"{member}.npy") as file:  # in pieces: reading it at once would take twice the memory
                array = np.lib.format.read_array(file, allow_pickle=False)
                if file.read(1):  # the checksum is verified at the end
                    raise DamagedCompaction(f"{member}: longer than its array")
                return array
        except (*_UNREADABLE, KeyError) as error:
            raise DamagedCompaction(f"{member}: {error}") from error

    def fits(self, journals: Path) -> bool:
        """Whether the journals still begin with the compacted content."""
        return all(mark_of(journals / name, offset) == mark for name, (offset, mark) in self.head["covered"].items())

    def table(self, names: Iterable[str]) -> Table:
        """Table of the items with some variables."""
        wanted = set(names)
        for name in wanted & set(self.head["columns"]) - set(self._columns):
            self._columns[name] = Column(self._array(f"column/{name}"), self._array(f"shape/{name}"))
        for name in wanted & set(self.head["texts"]) - set(self._texts):
            self._texts[name] = _objects(json.loads(self._bytes(f"text/{name}")))
        columns = {n: c for n, c in self._columns.items() if n in wanted}
        texts = {n: t for n, t in self._texts.items() if n in wanted}
        t = self._table
        return Table(t.row, t.name, t.input, t.recipe, t.slice, t.layouts, t.numbers, t.stored, dict(t.failures), columns, texts)

    def check(self) -> None:
        """Read all of it."""
        self.table([*self.head["columns"], *self.head["texts"]])


def write_compaction(folder: Path, table: Table, contents: JournalContents) -> None:
    """Write ``columns.npz`` in a generation's folder from the content of its journals (driver only)."""
    covered = {name: (offset, mark_of(folder / "journal" / name, offset)) for name, offset in contents.offsets.items()}
    head = {
        "format": _FORMAT,
        "covered": covered,
        "name": table.name.tolist(),
        "input": table.input.tolist(),
        "recipe": table.recipe.tolist(),
        "slice": table.slice.tolist(),
        "layouts": table.layouts.tolist(),
        "stored": sorted(table.stored),
        "columns": sorted(table.columns),
        "texts": sorted(table.texts),
        "failures": list(table.failures.values()),
    }
    arrays = {"row": table.row, **table.numbers, **{f"stored/{n}": v for n, v in table.stored.items()}}
    arrays |= {f"column/{n}": c.flat for n, c in table.columns.items()} | {f"shape/{n}": c.shapes for n, c in table.columns.items()}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as file:
        # an explicit ZipInfo has the date 1980, so that the same commits give the same bytes
        file.writestr(zipfile.ZipInfo("head"), json.dumps(head))
        for name, texts in table.texts.items():
            file.writestr(zipfile.ZipInfo(f"text/{name}"), json.dumps(texts.tolist()))
        for name, array in arrays.items():
            with file.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
    write_atomically(folder / _FILE, buffer.getvalue())


class TableReader:
    """The table of one generation, from its compaction and the rest of its journals; reads incrementally between calls."""

    def __init__(self, folder: Path, journal: Journal) -> None:
        self.folder, self.journal = folder, journal
        self._compaction: Compaction | None = None
        self._tail = journal
        self._bad_stamp: tuple[int, ...] = ()

    def read(self, gives: list[Var], names: Iterable[str]) -> tuple[Table, JournalContents]:
        """Table with some variables, and the contents of the journals it was made from."""
        names = list(names)
        compaction = self._open()
        if compaction is not None:
            contents = self._tail.read()
            if not contents.undone:  # records undone since may be in the compaction
                try:
                    table = compaction.table(names)
                    return table.updated(contents.records, gives), contents
                except DamagedCompaction:
                    self._bad_stamp = compaction.stamp
                    self._compaction = None
        contents = self.journal.read()
        return Table.of(contents.records, gives, names), contents

    def tail_length(self) -> int:
        """Number of records that readers have to parse: those beyond the compaction, or all if it cannot be used."""
        if self._open() is not None:
            contents = self._tail.read()
            if not contents.undone:
                return len(contents.records)
        return sum(len(lines) for lines in self.journal.read().lines.values())

    def _open(self) -> Compaction | None:
        try:
            there = os.stat(self.folder / _FILE)
        except FileNotFoundError:
            return None
        stamp = (there.st_dev, there.st_ino, there.st_size, there.st_mtime_ns)
        if stamp == self._bad_stamp:
            return None
        if self._compaction is None or self._compaction.stamp != stamp:
            try:
                self._compaction = Compaction(self.folder / _FILE)
            except (DamagedCompaction, FileNotFoundError):
                self._bad_stamp, self._compaction = stamp, None
                return None
            start = {name: offset for name, (offset, _) in self._compaction.head["covered"].items()}
            self._tail = Journal(self.folder / "journal", start)
        return self._compaction if self._compaction.fits(self.folder / "journal") else None


def damaged_compaction(folder: Path) -> list[str]:
    """A sentence if the compaction of a generation cannot be read; nothing is lost."""
    try:
        Compaction(folder / _FILE).check()
    except FileNotFoundError:
        return []
    except DamagedCompaction as error:
        return [f"{folder / _FILE}: damaged ({error}), harmless: it is rebuilt from the journals"]
    return []


def _objects(values: list[Any]) -> np.ndarray:
    out = np.empty(len(values), dtype=object)
    out[:] = values
    return out
