"""The files of a project by category: what they are, how big, and where."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cryodask.errors import ProjectFileError
from cryodask.run.content import IMAGES
from cryodask.store.away import REMOVED, THINNED, Ledger
from cryodask.store.generation import Generation
from cryodask.store.history import generation_folders
from cryodask.store.lines import Record
from cryodask.store.project import Project
from cryodask.vocabulary import VARIABLES

CATEGORIES = ("originals", "shards", "micrographs", "particles", "maps")
"""What may be archived: files of the microscope, movies in the project, images by exposure, particle images, results over sets."""
SHOWN = re.compile("preview|spectrum_image")
"""Variables that pages and reports show; they are small, and always stay."""


@dataclass(frozen=True)
class Piece:
    """One file of a project.

    ``name``: as in the ledger. ``row``: of its exposure, if it belongs to one. ``crc``: in the commit record of a result. ``content``: of
    an original, as registered. ``variable``, ``place``: of a result.
    """

    name: str
    path: Path
    category: str
    row: int | None = None
    crc: int | None = None
    content: str = ""
    variable: str = ""
    place: str = ""

    def size(self) -> int | None:
        """Bytes; None if the file is not here."""
        try:
            return os.lstat(self.path).st_size
        except OSError:
            return None


def parse_categories(text: str | None, default: Iterable[str]) -> list[str]:
    """Categories of a comma-separated list.

    Raises
    ------
    ProjectFileError
    """
    if text is None:
        return list(default)
    wanted = [word.strip() for word in text.split(",") if word.strip()]
    unknown = [word for word in wanted if word not in CATEGORIES]
    if unknown or not wanted:
        raise ProjectFileError(f"{unknown[0] if unknown else text!r} is not a category of files.", "", f"use {', '.join(CATEGORIES)}")
    return wanted


def parse_rows(text: str | None) -> set[int] | None:
    """Rows of a list like ``0-4,7``; None for all.

    Raises
    ------
    ProjectFileError
    """
    if text is None:
        return None
    rows: set[int] = set()
    for word in text.split(","):
        found = re.fullmatch(r"\s*(\d{1,9})(?:-(\d{1,9}))?\s*", word)
        if found is None or int(found[2] or found[1]) < int(found[1]):
            raise ProjectFileError(f"{word.strip()!r} is not a row or a range of rows.", "", "give rows as 0-4,7; info lists them")
        rows |= set(range(int(found[1]), int(found[2] or found[1]) + 1))
    return rows


def category_of(variable: str, per_item: bool) -> str:
    """Category of the shard of a variable."""
    if SHOWN.search(variable):
        return "pictures"
    if not per_item:  # columns of particles are stored as arrays there
        return "maps" if VARIABLES[variable].kind == "bulk" else "records"
    return {"movie": "shards", "particle_image": "particles"}.get(variable, "micrographs")


def pieces(project: Project, categories: Collection[str] = CATEGORIES) -> Iterator[Piece]:
    """Files of a project, by exposure first and then by result; also those that are away."""
    if "originals" in categories:
        for item in project.items():
            for name in IMAGES:
                if name in item.inputs:
                    path = str(item.inputs[name])
                    yield Piece(f"inputs:{path}", project.home / path, "originals", item.row, None, item.content)
    if set(categories) - {"originals"}:
        for folder in generation_folders(project.path):
            yield from _of_result(project, project.generation_at(f"{folder.parent.name}/{folder.name}"), categories)


def _of_result(project: Project, generation: Generation, categories: Collection[str]) -> Iterator[Piece]:
    per_item = bool(generation.meta["per_item"])
    root, place = project.path.absolute(), f"{generation.path.parent.name}/{generation.key}"
    for row, record in sorted(generation.committed().items()):
        for variable, crc in record["shards"].items():
            category = category_of(variable, per_item) if variable in VARIABLES else ""
            if category in categories:
                path = generation.shard_of(record, variable).absolute()
                name = f"project:{path.relative_to(root).as_posix()}"
                yield Piece(name, path, category, row if per_item else None, crc, "", variable, place)


@dataclass(frozen=True)
class Held:
    """Bytes and files of a category in one place: ``here``, ``trash``, ``thinned``, or the address of an archive."""

    category: str
    where: str
    files: int
    bytes: int


def held(project: Project) -> list[Held]:
    """What lies where, by category; ``records`` are the journals, numbers and reports, which always stay."""
    ledger = Ledger(project.path)
    lines = ledger.records()
    counted: dict[tuple[str, str], list[int]] = {}
    seen: set[tuple[int, int]] = set()
    for piece in pieces(project, (*CATEGORIES, "pictures")):
        try:
            there = os.stat(piece.path)
        except OSError:
            line = lines.get(piece.name)
            if line is not None and line["state"] in (REMOVED, THINNED):
                where = str(line["archive"]) if line["state"] == REMOVED else THINNED
                counted.setdefault((piece.category, where), []).append(int(line["size"]))
                if (trash := trash_of(project, line)) is not None:
                    counted.setdefault((piece.category, "trash"), []).append(trash.stat().st_size)
            continue
        if (there.st_dev, there.st_ino) not in seen:  # results that share a file
            seen.add((there.st_dev, there.st_ino))
            counted.setdefault((piece.category, "here"), []).append(there.st_size)
    counted["records", "here"] = list(_other_sizes(project.path, seen))
    order = {name: i for i, name in enumerate((*CATEGORIES, "pictures", "records"))}
    known = sorted(counted.items(), key=lambda one: (order[one[0][0]], one[0][1] != "here", one[0][1]))
    return [Held(category, where, len(sizes), sum(sizes)) for (category, where), sizes in known if sizes]


def _other_sizes(folder: Path, seen: set[tuple[int, int]]) -> Iterator[int]:
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name != TRASH]
        for name in names:
            try:
                there = os.lstat(os.path.join(parent, name))
            except OSError:  # gone meanwhile
                continue
            if (there.st_dev, there.st_ino) not in seen:
                yield there.st_size


TRASH = ".trash"


def trash_of(project: Project, line: Record) -> Path | None:
    """Where a removed file can still be picked up; None if it was deleted."""
    if not line.get("trash"):
        return None
    path = (project.path if line["name"].startswith("project:") else project.home) / str(line["trash"])
    return path if path.is_file() else None
