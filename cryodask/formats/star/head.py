"""What the head of a STAR file says, for plans: columns of its table and pixel sizes of its optics groups, without reading its rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cryodask.errors import StarError
from cryodask.formats.star.blocks import scan
from cryodask.formats.star.names import ALIASES, OPTICS, canonical
from cryodask.formats.star.numbers import floats
from cryodask.formats.star.rows import is_data, is_loop, read_blocks, split_line, unquoted

_GROUP = "rlnOpticsGroup"
_HEAD = [c for c in OPTICS if c.name in ("pixel_size_angstrom", "particle_pixel_size_angstrom", "box")]


def read_labels(path: str | Path, *tables: str) -> frozenset[str]:
    """Labels, without the underscore, of the first of some tables that the file has, else of its first table that is not the optics.

    No more is read than the head of the file, if it begins with the first of these tables.

    Raises
    ------
    StarError
        If the file cannot be read, or has no table.
    """
    labels: dict[str, set[str]] = {}
    block, in_head = "", True
    for words in _head(Path(path)):
        if is_data(words[0]) and len(words) == 1:
            block, in_head = canonical(words[0][len("data_") :]), True
        elif words[0].startswith("_") and in_head:
            labels.setdefault(block, set()).add(canonical(words[0][1:]))
        elif not is_loop(words[0]):
            in_head = False
            if block == tables[0]:
                break
    found = next((labels[name] for name in (*tables, *(name for name in labels if name != "optics")) if name in labels), None)
    if found is None:
        raise StarError(f"{path} has no table.", "it is another kind of file, or empty", "give a RELION STAR file")
    return frozenset(found)


def _head(path: Path) -> Iterator[list[str]]:
    """Lines as words, without comments and blank lines; bytes that are not text do not matter until the whole file is read."""
    try:
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            for number, line in enumerate(file, 1):
                words = split_line(path, number, line.rstrip("\n"))
                if words:
                    yield words
    except OSError as error:
        raise StarError(f"{path} cannot be read: {error.strerror}.", "", "check the path") from None


def read_optics(path: str | Path) -> list[dict[str, float]]:
    """What the optics groups that rows use say of pixels and images, one dict per group.

    Only the head of the file is read, and the group numbers of its rows if the groups differ.

    Returns
    -------
    list of dict
        ``pixel_size_angstrom`` of micrographs, ``particle_pixel_size_angstrom`` and ``box`` (pixels) of images, those that are given.
        Empty where the file has no table of optics at its head, or one that cannot be read: reading the whole file says why.
    """
    try:
        names, rows = _head_table(Path(path))
    except StarError:
        return []
    groups: list[dict[str, float]] = []
    numbers: list[float] = []
    for row in (dict(zip(names, row)) for row in rows if len(row) == len(names)):
        found = {c.name: [row[n] for n in (c.relion, *ALIASES.get(c.relion, ())) if n in row] for c in _HEAD}
        known = {name: float(floats([unquoted(texts[0])])[0][0]) for name, texts in found.items() if texts}
        groups.append({name: value for name, value in known.items() if np.isfinite(value)})
        numbers.append(float(floats([unquoted(row.get(_GROUP, "nan"))])[0][0]))
    if _GROUP not in names or all(group == groups[0] for group in groups):
        return groups
    used = _used(Path(path))
    return [group for number, group in zip(numbers, groups) if number in used] if used else groups


def _used(path: Path) -> set[float]:
    """Numbers of optics groups in the rows of all tables; empty where the file cannot be read, or has none."""
    try:
        tables = scan(path, [_GROUP]) or {name: {n: floats(v)[0] for n, v in b.columns.items()} for name, b in read_blocks(path).items()}
    except StarError:
        return set()
    return {float(n) for name, table in tables.items() if name != "optics" and table and _GROUP in table for n in np.unique(table[_GROUP])}


def _head_table(path: Path) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the table of optics, if the file begins with it."""
    names: list[str] = []
    rows: list[list[str]] = []
    pairs: list[str] = []
    for begun, words in enumerate(_head(path)):
        if is_data(words[0]) and len(words) == 1:
            if begun or canonical(words[0][len("data_") :]) != "optics":
                break
        elif words[0].startswith("_"):
            names.append(canonical(words[0][1:]))
            pairs += words[1:]
        elif not is_loop(words[0]):
            rows.append(words)
    return names, [*rows, pairs] if pairs else rows
