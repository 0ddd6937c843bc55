"""One generation of a stage: a Zarr group whose key is a hash of all that its results depend on.

``<project>/stages/<label>/<key>/`` holds ``zarr.json`` (what made it), one array a bulk variable (one shard file an item), and
``journal/`` with the commit records, in which every small variable rides. Arrays are created by the driver; workers write shards and
journal lines only.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cryodask.errors import DiskFullError, MicrographError, StoreError
from cryodask.store.journal import Journal, JournalContents, Record, content_crc, decode_value, encode_value
from cryodask.store.shards import Layout, ShardReader, file_crc, write_shard
from cryodask.vocabulary import VARIABLES, Var

if TYPE_CHECKING:
    import xarray as xr

_CAPACITY = 1 << 20
_PARTICLE_CHUNK = 1 << 18


def generation_key(parts: dict[str, Any]) -> str:
    """Key of a generation from everything its results depend on."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk and a missing permission into errors that say what to do; they stop a run, whoever meets them."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DiskFullError(
                f"No space is left for {path} ({error.strerror}).",
                "the disk, your quota or a limit on the size of files is used up; everything committed so far is safe",
                "free some space (cryodask gc removes superseded results) and run the same command again: it resumes",
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
            raise StoreError(
                f"{error.filename or path} cannot be written: {error.strerror}.",
                "the folder belongs to somebody else, a file of that name is in the way, or the file system is mounted read-only",
                "choose another folder for the project, or ask for write permission",
            ) from error
        raise


class Generation:
    """A generation on disk. Cheap to make and to pickle: metadata are read when first needed."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.journal = Journal(self.path / "journal")
        self._meta: dict[str, Any] | None = None
        self._records: dict[int, Record] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

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
        sizes: dict[str, int],
        dtypes: dict[str, str],
    ) -> Generation:
        """Open the generation at ``path``, or make it (driver only).

        ``sizes`` gives the length of every dimension of the bulk variables, ``dtypes`` those that depend on the input.
        """
        made = cls(path)
        if (path / "zarr.json").exists():
            made._check_sizes(sizes)
            return made
        import zarr

        with disk_errors(path):
            attributes = {
                **meta,
                "gives": list(gives),
                "per_item": per_item,
                "sizes": sizes,
                "dtypes": dtypes,
                "created": time.time(),
                "host": socket.gethostname(),
                "python": platform.python_version(),
            }
            part = path.with_name(f"{path.name}.{os.getpid()}.part")
            group = zarr.open_group(part, mode="w", attributes={"cryodask": attributes})
            made._meta = attributes
            if per_item:
                for var in made._bulk():
                    layout = made.layout(var)
                    group.create_array(
                        var.name,
                        shape=(_CAPACITY, *layout.shape),
                        shards=(1, *layout.padded),
                        chunks=(1, *layout.chunk),
                        dtype=layout.dtype,
                        compressors=layout.zarr_codecs() or None,
                        filters=None,
                        dimension_names=("micrograph", *var.dims),
                        attributes={"units": var.units, "long_name": var.doc},
                    )
            (part / "journal").mkdir()
            if path.exists():  # what an interrupted removal left; gc takes it later
                os.rename(path, path.with_name(f"{path.name}.{time.time_ns()}.part"))
            os.rename(part, path)
        return made

    def _check_sizes(self, sizes: dict[str, int]) -> None:
        old = self.meta["sizes"]
        wrong = {k: (old[k], v) for k, v in sizes.items() if k in old and old[k] != v}
        if wrong:
            text = ", ".join(f"{k} {a} -> {b}" for k, (a, b) in wrong.items())
            raise StoreError(
                f"The inputs of stage {self.meta['label']} changed their size ({text}).",
                "movies of another camera or binning were added to the project",
                "put them into a project of their own",
            )

    # --- what it is ---------------------------------------------------------------------------------------------------------
    @property
    def meta(self) -> dict[str, Any]:
        """What made it: label, stage, version, params, upstream keys, sizes."""
        if self._meta is None:
            try:
                self._meta = json.loads((self.path / "zarr.json").read_text())["attributes"]["cryodask"]
            except (FileNotFoundError, ValueError, KeyError) as error:
                raise StoreError(
                    f"{self.path} is no result of a stage: its zarr.json is missing or damaged ({type(error).__name__}).",
                    "the folder was removed or changed by hand",
                    "remove this folder and run the project again: it is made anew",
                ) from error
        return self._meta

    @property
    def key(self) -> str:
        """Its key."""
        return self.path.name

    @property
    def gives(self) -> list[Var]:
        """Variables it holds."""
        return [VARIABLES[name] for name in self.meta["gives"] if name in VARIABLES]

    def _bulk(self) -> list[Var]:
        return [v for v in self.gives if v.kind == "bulk"]

    def layout(self, var: Var, shape: tuple[int, ...] | None = None) -> Layout:
        """Shape, chunks and type of one item of a bulk variable."""
        dtype = self.meta["dtypes"].get(var.name, var.dtype)
        if shape is None:
            shape = tuple(self.meta["sizes"][d] for d in var.dims)
        return Layout.of(shape, var.chunk, str(np.dtype(dtype)))

    def shard_path(self, name: str, row: int, ndim: int) -> Path:
        """Where zarr expects the one shard of an item."""
        zeros = ["0"] * ndim
        parts = [str(row), *zeros] if self.meta["per_item"] else zeros
        return self.path.joinpath(name, "c", *parts)

    # --- commit -------------------------------------------------------------------------------------------------------------
    def commit(self, row: int, name: str, values: dict[str, Any], **info: Any) -> Record:
        """Write all bulk variables of an item, then its record: after this it exists, before it does not."""
        columns: dict[str, Any] = {}
        shards: dict[str, int] = {}
        with disk_errors(self.path):
            for var in self.gives:
                value = values[var.name]
                if var.kind == "bulk":
                    if not getattr(value, "stored", True):
                        continue  # a movie that is used where it lies
                    layout = self.layout(var)
                    value = self._checked(var, layout, value, name)
                    shards[var.name] = write_shard(self.shard_path(var.name, row, len(layout.shape)), layout, value)
                elif var.dtype == "U":
                    columns[var.name] = str(value)
                else:
                    columns[var.name] = encode_value(np.asarray(value, dtype=var.dtype))
            record = {
                "row": row,
                "name": name,
                "ok": True,
                "columns": columns,
                "shards": shards,
                **_where(),
                **info,
            }
            self.journal.append(record)
        return record

    def _checked(self, var: Var, layout: Layout, value: Any, name: str) -> Any:
        shape = tuple(value.shape)
        fits = shape == layout.shape or (var.dims[0] == "slot" and shape[1:] == layout.shape[1:] and shape[0] <= layout.shape[0])
        if not fits:
            raise MicrographError(
                f"{var.name} of {name} has shape {shape}, not {layout.shape} as most of this project.",
                "movies of different cameras, binnings or frame numbers in one folder, or more than 4096 picks",
                "process them as projects of their own",
            )
        if not np.can_cast(value.dtype, layout.dtype, "safe" if np.dtype(layout.dtype).kind in "iu" else "same_kind"):
            raise MicrographError(
                f"{var.name} of {name} has the type {value.dtype}, not {layout.dtype}, as most of this project.",
                "movies of different cameras or conversions in one folder; stored as that type, values would change",
                "process them as projects of their own",
            )
        return np.asarray(value, dtype=layout.dtype) if isinstance(value, np.ndarray) else value

    def commit_failure(self, row: int, name: str, error: str, message: str, tries: int, **info: Any) -> None:
        """Quarantine an item: a record like any other, so that it can be listed and undone."""
        with disk_errors(self.path):
            self.journal.append(
                {
                    "row": row,
                    "name": name,
                    "ok": False,
                    "error": error,
                    "message": message,
                    "attempt": tries,
                    **_where(),
                    **info,
                }
            )

    def commit_result(self, values: dict[str, Any], **info: Any) -> Record:
        """Write the one result of a blocks, tournament or whole stage (driver only)."""
        import zarr

        columns: dict[str, Any] = {}
        shards: dict[str, int] = {}
        with disk_errors(self.path):
            group = zarr.open_group(self.path, mode="a")
            for name, value in values.items():
                var = VARIABLES[name]
                array = np.asarray(value, dtype=var.dtype)
                if var.kind != "bulk" and not var.per_particle:
                    columns[name] = encode_value(array)
                    continue
                hint = (_PARTICLE_CHUNK,) if var.per_particle and not var.chunk else var.chunk
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
                        dimension_names=var.dims,
                        attributes={"units": var.units, "long_name": var.doc},
                        overwrite=True,
                    )
                    shards[name] = write_shard(self.shard_path(name, 0, array.ndim), layout, array)
            record = {
                "row": 0,
                "name": self.meta["label"],
                "ok": True,
                "columns": columns,
                "shards": shards,
                **_where(),
                **info,
            }
            self.journal.append(record)
        self._records = None
        return record

    # --- reading ------------------------------------------------------------------------------------------------------------
    def records(self, refresh: bool = True) -> dict[int, Record]:
        """Records that count, by row (failures included)."""
        if refresh or self._records is None:
            self._records = self.journal.read().records
        return self._records

    def committed(self, refresh: bool = True) -> dict[int, Record]:
        """Records of the items that exist."""
        return {row: r for row, r in self.records(refresh).items() if r["ok"]}

    def read(self, record: Record, name: str) -> Any:
        """A variable of a committed item: number, text, array; a movie comes as frames."""
        var = VARIABLES[name]
        if name in record["columns"]:
            return decode_value(record["columns"][name])
        if not self.meta["per_item"]:
            import zarr

            if name not in record["shards"]:
                return np.zeros((0,) * len(var.dims), var.dtype)
            return np.asarray(zarr.open_array(self.path / name, mode="r")[...])
        reader = self.bulk_reader(record, name)
        return reader if var.dims[0] == "frame" else reader.read()

    def shard(self, row: int, name: str, length: int | None = None) -> ShardReader:
        """Reader of an item's shard; ``length`` cuts a ragged item to its own."""
        layout = self.layout(VARIABLES[name])
        return ShardReader(self.shard_path(name, row, len(layout.shape)), layout, length)

    def bulk_reader(self, record: Record, name: str) -> ShardReader:
        """Reader of an item's shard; a ragged item is cut to its own length."""
        length = None
        if VARIABLES[name].ragged:
            ragged = next((record["columns"][v.name] for v in self.gives if v.kind != "bulk" and v.ragged), None)
            length = int(ragged["shape"][0]) if ragged else None
        return self.shard(record["row"], name, length)

    def dataset(self) -> xr.Dataset:
        """What is committed, as a lazy Dataset: columns in memory, bulk variables as dask arrays."""
        from cryodask.store.datasets import generation_dataset

        return generation_dataset(self)

    def damaged(self) -> list[str]:
        """Committed shards whose bytes do not fit their record, and journal lines that cannot be read; one sentence each."""
        contents = self.journal.read()
        torn = [f"journal line {line} was never finished, harmless: it counts for nothing" for line in contents.torn_lines]
        lost = [f"{self.path}: journal line {line} is damaged, its commit is lost" for line in contents.damaged_lines]
        return [*torn, *lost, *(problem for _, problem in self._damaged_shards(contents))]

    def _damaged_shards(self, contents: JournalContents) -> Iterator[tuple[Record, str]]:
        for record in contents.records.values():
            for name, crc in record.get("shards", {}).items():
                path = self.shard_path(name, record["row"], len(VARIABLES[name].dims))
                if not path.exists():
                    yield record, f"{path}: missing, though {record['name']} is committed"
                elif file_crc(path) != crc:
                    yield record, f"{path}: damaged, its bytes do not fit the record of {record['name']}"

    def repair(self) -> list[str]:
        """Take the commits of damaged items back, so that the next run makes them again; returns the names of these items.

        The shards stay until they are written anew, the journal lines for ever (driver only, under the project's lock).
        """
        contents = self.journal.read()
        damaged = {record["row"]: (record["name"], problem) for record, problem in self._damaged_shards(contents)}
        with disk_errors(self.path):
            for row, (name, problem) in damaged.items():
                self.journal.undo(row, name, contents.lines[row], problem)
            self.journal.close()
            self.journal.drop_damaged_lines()
        self._records = None
        return [name for name, _ in damaged.values()]


def consumed_key(generation: Generation, rows: list[int]) -> str:
    """Hash of the content of some committed items: what a blocks or whole stage was computed from."""
    records = generation.committed()
    text = ",".join(f"{row}:{content_crc(records[row])}" for row in rows)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _where() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "time": round(time.time(), 3)}
