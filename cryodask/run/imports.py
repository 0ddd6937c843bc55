"""What other programs say of an exposure: rows of a particle table, a file of picks. The driver reads them; items carry their own part."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from cryodask.errors import InputError
from cryodask.run.recipe import Plan, Step
from cryodask.store.project import Item

_HEAD_BYTES = 1 << 16
"""Bytes at either end of a file that, with its size, make its content known."""


def content_id(path: Path, size: int) -> str:
    """Identity of the bytes of a file: its size, and the checksum of its head and tail."""
    import google_crc32c

    try:
        with open(path, "rb") as file:
            crc = google_crc32c.value(file.read(_HEAD_BYTES))
            if size > _HEAD_BYTES:
                file.seek(max(_HEAD_BYTES, size - _HEAD_BYTES))
                crc = google_crc32c.extend(crc, file.read(_HEAD_BYTES))
    except OSError:
        return f"unreadable:{path.name}"
    return f"{size}-{crc:08x}"


class Import(Protocol):
    """What a step that imports gives each exposure."""

    def values(self, item: Item) -> dict[str, Any]:
        """Values that the stage needs of this exposure; they travel with it and are not stored."""
        ...

    def digest(self, item: Item) -> str:
        """Changes when what is said of this exposure changes."""
        ...


def imports_of(plan: Plan, steps: Iterable[Step]) -> dict[str, Import]:
    """The imports among some steps, by label."""
    out: dict[str, Import] = {}
    for step in steps:
        if step.stage.name == "import_particles":
            out[step.label] = TableImport(step)
        elif step.stage.name == "import_picks":
            out[step.label] = PicksImport(Path(step.params.folder))
    return out


class TableImport:
    """Rows of a particle table, by micrograph; each travels with its exposure, so that no worker reads the table."""

    def __init__(self, step: Step) -> None:
        from cryodask.formats.star import find_beside
        from cryodask.stages.import_particles import read_table

        self.path = str(step.params.star)
        self.table = read_table(self.path)
        self._images = bool(step.params.images)
        self._codes = {name: code for code, name in enumerate(self.table.micrographs)}
        self._stems = {Path(name).stem: code for name, code in self._codes.items()}
        self._digests = row_digests(self.table)
        self._stacks: list[Path | None] = []
        if self._images:
            self._stacks = [find_beside(stack, Path(self.path)) for stack in self.table.stacks]
            self._contents = [content_id(p, p.stat().st_size) if p else n for p, n in zip(self._stacks, self.table.stacks)]

    def stack_of(self, code: int) -> Path | None:
        """A stack that holds images of a micrograph, where one was found."""
        used = np.unique(self.table.stack[self.table.rows_of(code)]).tolist() if self._stacks else []
        return next((self._stacks[i] for i in used if self._stacks[i] is not None), None)

    def _rows(self, item: Item) -> np.ndarray:
        code = self._codes.get(str(item.inputs.get("micrograph_name")), self._stems.get(item.name))
        return self.table.rows_of(code) if code is not None else np.zeros(0, np.int64)

    def values(self, item: Item) -> dict[str, Any]:
        """Rows of the exposure's particles, the table's path, and the micrograph's name there."""
        from cryodask.stages.import_particles import rows_of

        name = str(item.inputs.get("micrograph_name", item.name))
        return {"particles_path": self.path, "micrograph_name": name, "particle_rows": rows_of(self.table, self._rows(item))}

    def digest(self, item: Item) -> str:
        """Of the rows, whatever their order, and of the stacks that hold their images."""
        rows = self._rows(item)
        digest = hashlib.blake2b(np.sort(self._digests[rows]).tobytes(), digest_size=8)
        if self._images:
            digest.update("".join(self._contents[i] for i in np.unique(self.table.stack[rows]).tolist()).encode())
        return digest.hexdigest()


def row_digests(table: Any) -> np.ndarray:
    """A number per row of a particle table: changes with any of its values, whatever its place in the file."""
    total = np.zeros(len(table), np.uint64)
    with np.errstate(over="ignore"):
        columns = [*(np.asarray(v, np.float64) for _, v in sorted(table.columns.items())), table.image_index.astype(np.float64)]
        for i, values in enumerate(columns):
            z = np.ascontiguousarray(values).view(np.uint64) + np.uint64(0x9E3779B97F4A7C15) * np.uint64(2 * i + 1)
            z = (z ^ (z >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9)
            total += z ^ (z >> np.uint64(29))
    return total


class PicksImport:
    """STAR files of picks: ``NAME.star`` or ``NAME_anything.star`` of each micrograph, never that of a longer name."""

    def __init__(self, folder: Path) -> None:
        self._files = sorted(folder.glob("*.star"), reverse=True)
        if not self._files:
            raise InputError(f"There is no STAR file in {folder}.", "a typo in the path", "give the folder with the picks")
        self._known: dict[frozenset[str], dict[str, Path]] = {}
        self._names: frozenset[str] = frozenset()

    def among(self, names: Iterable[str]) -> dict[str, Path]:
        """File of each of some micrographs."""
        known = frozenset(names)
        if known not in self._known:
            out: dict[str, Path] = {}
            for path in self._files:
                stem = path.stem
                ends = (n for n in range(len(stem), 0, -1) if stem[:n] in known and not stem[n : n + 1].isalnum())
                end = next(ends, None)
                if end is not None:
                    out[stem[:end]] = path
            self._known = {known: out}
        return self._known[known]

    def settle(self, names: Iterable[str]) -> None:
        """Names of all micrographs of the project: a file belongs to the longest that fits."""
        self._names = frozenset(names)

    def _file(self, item: Item) -> Path | None:
        return self.among(self._names | {item.name}).get(item.name)

    def values(self, item: Item) -> dict[str, Any]:
        """Path of the exposure's file of picks, where it has one."""
        path = self._file(item)
        return {"coordinates_path": str(path)} if path is not None else {}

    def digest(self, item: Item) -> str:
        """Of the file's content."""
        path = self._file(item)
        return content_id(path, path.stat().st_size) if path is not None else "none"
