"""One generation of a stage: a Zarr group whose key is a hash of everything its results depend on.

``<project>/stages/<stage>/<key>/`` contains ``zarr.json`` (what made it), one array per bulk variable (one shard file per item),
``journal/`` with the commit records, which include all small variables, and ``columns.npz``, a cache of these (see table.py). The driver
makes the arrays and the cache; workers write shards and journal lines only.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cryodask.errors import StoreError
from cryodask.store import check, environments
from cryodask.store.away import Ledger
from cryodask.store.environments import MADE_IN, Environment
from cryodask.store.files import check_writable, disk_errors, fsync_folder, write_atomically
from cryodask.store.journal import Journal, content_crc, decode_value, encode_value
from cryodask.store.layouts import (
    Grid,
    as_stored,
    check_dimensions,
    create_array,
    fits,
    layout_of_value,
    layout_on,
    layout_text,
    name_of_size,
)
from cryodask.store.lines import Record
from cryodask.store.shards import Layout, ShardFile, ShardReader, write_shard
from cryodask.store.table import Table, TableReader, write_compaction
from cryodask.vocabulary import VARIABLES, Var, described, recall

if TYPE_CHECKING:
    import xarray as xr

_PARTICLE_CHUNK = 1 << 18


def generation_key(parts: dict[str, Any]) -> str:
    """Key of a generation from everything its results depend on."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


class Generation:
    """A generation on disk. Cheap to create and to pickle: data are read on first use, and then incrementally."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.journal = Journal(self.path / "journal")
        self._tables = TableReader(self.path, self.journal)
        self._meta: dict[str, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # whoever unpickles it may have another working folder
        return {"path": self.path.absolute()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"])  # type: ignore[misc]

    # --- made by the driver -------------------------------------------------------------------------------------------------
    @classmethod
    def create(
        cls,
        path: Path,
        *,
        meta: dict[str, Any],
        gives: tuple[str, ...],
        per_item: bool,
        grids: Mapping[str, Grid] | None = None,
    ) -> Generation:
        """Open the generation at ``path``, or create it (driver only).

        ``grids`` has one entry per data set; arrays of the first are named after their variables, those of other sizes get longer names.
        """
        grids = grids or {"": Grid({}, {})}
        made = cls(path)
        if (path / "zarr.json").exists():
            made._admit(grids)
            return made
        import zarr

        first = next(iter(grids.values()))
        with disk_errors(path):
            attributes = {
                **meta,
                "gives": list(gives),
                "variables": described(gives),
                "per_item": per_item,
                "sizes": first.sizes,
                "dtypes": first.dtypes,
                "grids": grids,
                "created": time.time(),
                "host": socket.gethostname(),
            }
            part = path.with_name(f"{path.name}.{os.getpid()}.part")
            group = zarr.open_group(part, mode="w", attributes={"cryodask": attributes})
            made._meta = attributes
            if per_item:
                for var in made._bulk():
                    for layout in dict.fromkeys(layout_on(var, grid) for grid in grids.values()):
                        create_array(group, made.array_name(var, layout), var, layout)
            (part / "journal").mkdir()
            for folder, _, names in os.walk(part):  # zarr does not fsync, and a generation is lost without its metadata
                for name in names:
                    fsync_folder(os.path.join(folder, name))
                fsync_folder(folder)
            check_writable(path)
            if path.exists() and not (path / "zarr.json").exists():  # left by an interrupted removal; gc removes it later
                os.rename(path, path.with_name(f"{path.name}.{time.time_ns()}.part"))
            os.rename(part, path)
            fsync_folder(path.parent)
        return made

    def _admit(self, grids: Mapping[str, Grid]) -> None:
        """Create arrays for data sets with new image sizes."""
        known = self.grids
        added = {name: grid for name, grid in grids.items() if known.get(name) != grid}
        if not added:
            return
        import zarr

        group = zarr.open_group(self.path, mode="a")
        with disk_errors(self.path):
            for var in self._bulk() if self.meta["per_item"] else ():
                for layout in dict.fromkeys(layout_on(var, grid) for grid in added.values()):
                    folder = self.path / self.array_name(var, layout)
                    if not (folder / "zarr.json").exists():
                        create_array(group, folder.name, var, layout)
                        fsync_folder(folder / "zarr.json")
                        fsync_folder(folder)
            document = json.loads((self.path / "zarr.json").read_text())
            document["attributes"]["cryodask"]["grids"] = {**known, **added}
            write_atomically(self.path / "zarr.json", json.dumps(document, indent=2).encode())
        self._meta = None

    # --- what it is ---------------------------------------------------------------------------------------------------------
    @property
    def meta(self) -> dict[str, Any]:
        """What made it: label, stage, version, params, upstream keys, sizes."""
        if self._meta is None:
            try:
                self._meta = json.loads((self.path / "zarr.json").read_text())["attributes"]["cryodask"]
            except (FileNotFoundError, ValueError, KeyError) as error:
                raise StoreError(
                    f"{self.path} is not a valid result of a stage: its zarr.json is missing or damaged ({type(error).__name__}).",
                    "the folder was removed or changed by hand",
                    "remove this folder and rerun the project: it is recomputed",
                ) from error
            recall(self._meta.get("variables", {}))
        return self._meta

    @property
    def key(self) -> str:
        """Its key."""
        return self.path.name

    @property
    def gives(self) -> list[Var]:
        """Variables it contains."""
        return [self._as_here(VARIABLES[name]) for name in self.meta["gives"] if name in VARIABLES]

    def _bulk(self) -> list[Var]:
        return [v for v in self.gives if v.kind == "bulk"]

    @property
    def grids(self) -> dict[str, Grid]:
        """Sizes and types of the bulk variables, by data set."""
        return {name: Grid(*grid) for name, grid in self.meta["grids"].items()}

    def layout(self, var: Var, record: Record | None = None) -> Layout:
        """Shape, chunks and dtype of a bulk variable: for one item, or by default for the first data set."""
        own = (record or {}).get("layouts", {}).get(var.name)
        if own is not None:
            return Layout.of(tuple(own[0]), var.chunk, own[1], rounded=self._rounded(var.name))
        return layout_on(self._as_here(var), Grid(self.meta["sizes"], self.meta["dtypes"]))

    def _as_here(self, var: Var) -> Var:
        """A variable as it is stored here: an earlier version may have stored it as it was, and not rounded."""
        rounded = self._rounded(var.name)
        return var if var.rounded == rounded else replace(var, rounded=rounded)

    def _rounded(self, name: str) -> bool:
        return bool(self.meta.get("variables", {}).get(name, {}).get("rounded", False))

    def array_name(self, var: Var, layout: Layout) -> str:
        """Name of the Zarr array for a layout: that of the variable, with size and type unless it is the first data set's layout."""
        return var.name if layout == self.layout(var) else name_of_size(var, layout)

    def shard_path(self, name: str, row: int, ndim: int) -> Path:
        """Where zarr expects the one shard of an item, in the array called ``name``."""
        zeros = ["0"] * ndim
        parts = [str(row), *zeros] if self.meta["per_item"] else zeros
        return self.path.joinpath(name, "c", *parts)

    def shard_of(self, record: Record, name: str) -> Path:
        """The shard of a variable of a committed item."""
        var = VARIABLES[name]
        array = self.array_name(var, self.layout(var, record)) if name in record.get("layouts", {}) else name
        return self.shard_path(array, record["row"], len(var.dims))

    # --- commit -------------------------------------------------------------------------------------------------------------
    def commit(self, row: int, name: str, values: dict[str, Any], *, grid: Grid | None = None, **info: Any) -> Record:
        """Write all bulk variables of an item, then its record; only then does the item exist.

        ``grid``: the required sizes and types, if those of the item's data set are known. ``info`` is added to the record; a worker
        passes the ``epoch`` of its driver.

        Raises
        ------
        MicrographError
            If a value has the wrong shape or type.
        TakenOverError
            If another driver took the project over.
        """
        self.journal.refuse_void(info.get("epoch", 0))
        columns: dict[str, Any] = {}
        shards: dict[str, ShardFile] = {}
        layouts: dict[str, tuple[tuple[int, ...], str]] = {}
        with disk_errors(self.path):
            for var in self.gives:
                value = values[var.name]
                check_dimensions(var, value, name)
                if var.kind == "bulk":
                    if not getattr(value, "stored", True):  # a movie that is read in place
                        if grid is not None:
                            as_stored(var, layout_on(var, grid), value, name)
                            info["grid"] = layout_text(layout_on(var, grid))
                        continue
                    layout = layout_on(var, grid) if grid is not None else self._layout_of_value(var, value)
                    array = self.array_name(var, layout)
                    if array != var.name:
                        layouts[var.name] = (layout.shape, layout.dtype)
                    value = as_stored(var, layout, value, name)
                    shards[var.name] = write_shard(self.shard_path(array, row, len(layout.shape)), layout, value)
                elif var.dtype == "U":
                    columns[var.name] = str(value)
                else:
                    columns[var.name] = encode_value(np.asarray(value, dtype=var.dtype))
            made_in = {MADE_IN: [environments.note(self.project)]}
            record = _record(row, name, columns, shards, {**info, **made_in, **({"layouts": layouts} if layouts else {})})
            self.journal.append(record)
        return record

    @contextmanager
    def together(self) -> Iterator[None]:
        """Context manager in which commits are not safe before its end: then all are, with one sync."""
        with disk_errors(self.path), self.journal.together():
            yield

    def _layout_of_value(self, var: Var, value: Any) -> Layout:
        """The first data set's layout if the value fits it, else that of another data set with its size and type."""
        usual = self.layout(var)
        if fits(var, value, usual):
            return usual
        own = layout_of_value(var, value)
        return own if (self.path / self.array_name(var, own) / "zarr.json").exists() else usual

    def link(self, other: Generation, records: list[Record]) -> None:
        """Link items from another generation of the same stage: hard links to its shards, one journal line each (driver only)."""
        away = Ledger(self.project)
        with disk_errors(self.path):
            check_writable(self.path)
            taken = [self._laid_out_here(other, record) for record in records]
            shared: dict[str, Record] = {}
            for theirs, record in zip(records, taken):
                for name in record["shards"]:
                    source, target = other.shard_of(theirs, name), self.shard_of(record, name)
                    line = away.of_result(source)
                    if line is not None and not source.exists():
                        shared[away.name_of(target)] = {k: v for k, v in line.items() if k != "trash"}
                    else:
                        _link_file(source, target)
            away.note_all(shared)  # before the records, which would be invalid without
            for record in taken:
                if "log" in record:
                    (self.path / "logs").mkdir(exist_ok=True)
                    with suppress(FileNotFoundError):
                        shutil.copy2(other.path / record["log"], self.path / record["log"])
            if taken:
                linked = ({**r, **_where(), "epoch": 0, "linked": other.key, "computed": r.get("computed", r["time"])} for r in taken)
                self.journal.append(*linked)

    def _laid_out_here(self, other: Generation, record: Record) -> Record:
        """A record of another generation adapted to this one, whose first data set may differ."""
        layouts = {}
        for name in record["shards"]:
            layout = other.layout(VARIABLES[name], record)
            if layout != self.layout(VARIABLES[name]):
                layouts[name] = (layout.shape, layout.dtype)
        bare = {k: v for k, v in record.items() if k != "layouts"}
        return {**bare, "layouts": layouts} if layouts else bare

    def commit_failure(self, row: int, name: str, error: str, message: str, tries: int, **info: Any) -> None:
        """Quarantine an item with a record like any other, so that it can be listed and undone."""
        with disk_errors(self.path):
            self.journal.append(
                {
                    "row": row,
                    "name": name,
                    "ok": False,
                    "error": error,
                    "message": message,
                    "tries": tries,
                    **_where(),
                    **info,
                }
            )

    @property
    def project(self) -> Path:
        """Folder of the project."""
        return self.path.parents[2]

    def commit_result(self, values: dict[str, Any], made_in: Iterable[Environment] = (), **info: Any) -> Record:
        """Write the single result of a blocks, tournament or whole stage (driver only).

        ``made_in``: environments of the workers that computed it; by default that of this process.
        """
        import zarr

        columns: dict[str, Any] = {}
        shards: dict[str, ShardFile] = {}
        with disk_errors(self.path):
            check_writable(self.path)
            group = zarr.open_group(self.path, mode="a")
            for name, value in values.items():
                var = VARIABLES[name]
                array = np.asarray(value, dtype=var.dtype)
                if var.kind != "bulk" and not var.ragged and var.dims not in (("dropped",), ("exposure",)):
                    columns[name] = encode_value(array)
                    continue
                hint = (_PARTICLE_CHUNK,) if var.kind != "bulk" else var.chunk
                layout = Layout.of(array.shape, hint, str(array.dtype))
                if array.size:
                    group.create_array(
                        name,
                        shape=array.shape,
                        shards=layout.padded,
                        chunks=layout.chunk,
                        dtype=layout.dtype,
                        compressors=layout.zarr_codecs() or None,
                        filters=None,
                        dimension_names=var.dims_in(per_item=False),
                        attributes={"units": var.units, "long_name": var.doc},
                        overwrite=True,
                    )
                    shards[name] = write_shard(self.shard_path(name, 0, array.ndim), layout, array)
            names = sorted({environments.note(self.project, one) for one in made_in or [environments.environment()]})
            record = _record(0, self.meta["stage"], columns, shards, {**info, MADE_IN: names})
            self.journal.append(record)
        return record

    # --- reading ------------------------------------------------------------------------------------------------------------
    def records(self) -> dict[int, Record]:
        """Current records by row, including failures."""
        return self.journal.read().records

    def committed(self) -> dict[int, Record]:
        """Records of committed items."""
        return {row: r for row, r in self.records().items() if r["ok"]}

    def table(self, names: Iterable[str] | None = None) -> Table:
        """Committed items of a map stage as columns, with all or the named small variables; failures as records."""
        gives = self.gives
        return self._tables.read(gives, _small(gives) if names is None else names)[0]

    def read(self, record: Record, name: str) -> Any:
        """A variable of a committed item: number, string or array; a movie is returned as frames."""
        var = VARIABLES[name]
        if name in record["columns"]:
            return decode_value(record["columns"][name])
        if not self.meta["per_item"]:
            if name not in record["shards"]:
                return np.zeros((0,) * len(var.dims), var.dtype)
            return self.result_reader(name).read(record["shards"][name])
        reader = self.bulk_reader(record, name)
        return reader if var.dims[0] == "frame" else reader.read()

    def result_reader(self, name: str) -> ShardReader:
        """Reader of a large variable of a single result, by parts where the whole is more than the memory should hold."""
        # not through zarr: its event loop and threads cost more CPU than reading the columns of millions of particles
        layout = Layout.of_array(self.path / name)
        return ShardReader(self.shard_path(name, 0, len(layout.shape)), layout)

    def _variable(self, name: str) -> Var:
        """A variable; described by the generation if the package that defines it is not installed."""
        if name not in VARIABLES:
            recall(self.meta.get("variables", {}))
        return VARIABLES[name]

    def shard(self, row: int, name: str, length: int | None = None, layout: Layout | None = None) -> ShardReader:
        """Reader of an item's shard; ``length``: true length of a ragged item, ``layout``: by default the usual one."""
        var = self._variable(name)
        layout = layout or self.layout(var)
        array = self.array_name(var, layout)
        return ShardReader(self.shard_path(array, row, len(layout.shape)), layout, length)

    def bulk_reader(self, record: Record, name: str) -> ShardReader:
        """Reader of an item's shard; a ragged item has its true length."""
        length = None
        if VARIABLES[name].ragged:
            ragged = next((record["columns"][v.name] for v in self.gives if v.kind != "bulk" and v.ragged), None)
            length = int(ragged["shape"][0]) if ragged else None
        return self.shard(record["row"], name, length, self.layout(VARIABLES[name], record))

    def dataset(self) -> xr.Dataset:
        """All committed items as a lazy Dataset: columns in memory, bulk variables as dask arrays."""
        from cryodask.store.datasets import generation_dataset, result_dataset

        return generation_dataset(self, self.table()) if self.meta["per_item"] else result_dataset(self, self.committed().get(0))

    # --- care ---------------------------------------------------------------------------------------------------------------
    def compact(self) -> None:
        """Write the columns of all committed items into one file, so that opening 10,000 of them is cheap (driver only)."""
        with disk_errors(self.path):
            write_compaction(self.path, *self._tables.read(self.gives, _small(self.gives)))

    def stamp(self) -> tuple[Any, ...]:
        """A value that changes with every commit and invalidation; costs one listing of the journals."""
        try:
            with os.scandir(self.path / "journal") as entries:
                return tuple(sorted((e.name, e.stat().st_size, e.stat().st_ino) for e in entries))
        except FileNotFoundError:
            return ()

    def forget(self) -> None:
        """Free what was read: for readers that have taken from it what they need, and keep many projects open."""
        self.journal = Journal(self.path / "journal")
        self._tables = TableReader(self.path, self.journal)

    def tail_length(self) -> int:
        """Number of commit records that are not in the compaction, which a reader has to parse."""
        return self._tables.tail_length()

    def check_files(self) -> list[str]:
        """Invalidate commits whose shards are missing or do not match, by size and time, then bytes (driver only); one sentence each."""
        return check.check_files(self)

    def damaged(self) -> list[str]:
        """Reread everything: one sentence per item that does not match its checksum or was left behind."""
        return check.damaged(self)

    def repair(self) -> list[str]:
        """Invalidate damaged items, so that the next run recomputes them (driver only); returns their names."""
        return check.repair(self)


def _small(gives: list[Var]) -> list[str]:
    return [v.name for v in gives if v.kind != "bulk"]


def _record(row: int, name: str, columns: dict[str, Any], shards: dict[str, ShardFile], info: dict[str, Any]) -> Record:
    return {
        "row": row,
        "name": name,
        "ok": True,
        "columns": columns,
        "shards": {n: s.crc for n, s in shards.items()},
        "files": {n: [s.size, s.mtime_ns] for n, s in shards.items()},
        **_where(),
        **info,
    }


def _link_file(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        os.link(source, part)
    except OSError:  # a file system without hard links
        shutil.copy2(source, part)
    os.replace(part, target)


def consumed_key(generation: Generation, rows: list[int]) -> str:
    """Hash of the content of some committed items that a blocks or whole stage was computed from."""
    records = generation.committed()
    text = ",".join(f"{row}:{content_crc(records[row])}" for row in rows)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _where() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "time": round(time.time(), 3)}
