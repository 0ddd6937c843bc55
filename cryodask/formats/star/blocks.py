"""Fast reading of regular STAR files in one pass: rows go from the file into pandas' C parser in pieces.

Only files that read the same here and in :func:`~cryodask.formats.star.rows.read_blocks` are accepted: tables with one row per line,
without quotes, control characters, comments beside values or non-ASCII letters. For all others, and for everything broken,
:func:`scan` returns None.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from io import BytesIO
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from cryodask.formats.star.names import KEPT, PARTICLE_ID, TEXT, WHOLE, canonical
from cryodask.formats.star.texts import Coded, Coder, Images, split_image_names

if TYPE_CHECKING:
    import pandas as pd

Loop = dict[str, Any]
"""A table: RELION's name to numbers, to :class:`Coded` texts, or to :class:`Images`."""

_PIECE = 1 << 22
_LINE = 1 << 16
# characters that another reader would treat as a blank or the end of a line
_BREAKS = [bytes([c]) for c in b"\0\x0b\x0c\r\x1c\x1d\x1e\x1f"]
_QUOTES = [b"'", b'"']
_NEXT_BLOCK = re.compile(rb"\n[ \t]*data_")
# what a comment beside values, or a row that begins with a name or a keyword, is the general reader decides
_BESIDE_VALUES = re.compile(rb"[^\n]#")
_NAME_FIRST = re.compile(rb"\n[ \t]*(?:[_;]|(?i:loop_|data_))")
_END = "end of the row"
_TEXT, _WHOLE = frozenset((*TEXT, *KEPT)), frozenset(WHOLE)


class _UnusualError(Exception):
    """The file is not regular."""


def scan(path: Path, wanted: Iterable[str], *, split_images: bool = False) -> dict[str, Loop | None] | None:
    """The wanted columns of every block of a regular STAR file.

    Parameters
    ----------
    path : Path
    wanted : names
        RELION's names of the columns to read.
    split_images : bool
        Give ``rlnImageName`` as :class:`Images` rather than as texts.

    Returns
    -------
    dict
        Block name to its columns, or to None for a list of pairs without a wanted one. None instead of a dict: the file is not regular.
    """
    try:
        with open(path, "rb") as file:
            return _scan(file, frozenset(wanted), split_images)
    except (_UnusualError, OSError, ValueError, OverflowError):
        return None


def _scan(file: IO[bytes], wanted: frozenset[str], split_images: bool) -> dict[str, Loop | None]:
    blocks: dict[str, Loop | None] = {}
    while (line := _read_line(file)) is not None:
        if line.startswith("loop_"):
            raise _UnusualError
        if not line.startswith("data_"):
            if line and not line.startswith("#"):
                raise _UnusualError
            continue
        if line[5:] in blocks or len(line.split()) > 1 or canonical(line[5:]) != line[5:]:
            raise _UnusualError
        blocks[line[5:]] = _read_block(file, wanted, split_images)
    if not blocks:
        raise _UnusualError
    return blocks


def _read_line(file: IO[bytes]) -> str | None:
    """The next line without surrounding blanks; None at the end of the file."""
    raw = file.readline(_LINE)
    if len(raw) == _LINE:
        raise _UnusualError
    comment = raw.lstrip().startswith(b"#")
    return _checked(raw, _BREAKS if comment else _BREAKS + _QUOTES).decode("ascii").strip() if raw else None


def _checked(data: bytes, refused: list[bytes]) -> bytes:
    if not data.isascii() or any(c in data for c in refused):
        raise _UnusualError
    return data


def _read_block(file: IO[bytes], wanted: frozenset[str], split_images: bool) -> Loop | None:
    while (line := _read_line(file)) is not None:
        if line == "loop_":
            return _read_loop(file, _read_labels(file), wanted, split_images)
        if line.startswith("_"):
            _skip_pairs(file, line, wanted)
            return None
        if line and not line.startswith("#"):
            break
    raise _UnusualError


def _skip_pairs(file: IO[bytes], line: str | None, wanted: frozenset[str]) -> None:
    """Skip to the next block; a list of pairs that are wanted is a table of one row, for the general reader."""
    seen: set[str] = set()
    while line is not None:
        if line and not line.startswith("#"):
            words = line.split()
            if not line.startswith("_") or "#" in line or len(words) != 2 or canonical(words[0][1:]) in wanted | seen:
                raise _UnusualError
            seen.add(words[0][1:])
        at = file.tell()
        line = _read_line(file)
        if line is not None and line.startswith("data_"):
            file.seek(at)
            return


def _read_labels(file: IO[bytes]) -> list[str]:
    """Column names under ``loop_``; the file is left at the line after them."""
    labels: list[str] = []
    while True:
        at = file.tell()
        line = _read_line(file)
        if line is None or not line.startswith("_"):
            file.seek(at)
            break
        label, *comment = line.split()
        if comment and not comment[0].startswith("#"):
            raise _UnusualError
        labels.append(label[1:])
    if [canonical(label) for label in labels] != labels:
        raise _UnusualError
    if len(labels) < 2 or len({*labels, _END}) <= len(labels):
        raise _UnusualError
    return labels


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    """The rows of one table, some whole lines at a time, up to the next block, where the file is left."""
    rest = b""
    while True:
        new = file.read(_PIECE)
        data = rest + _checked(new, _BREAKS + _QUOTES)
        cut = data.rfind(b"\n") + 1 if new else len(data)
        if new and not cut:
            raise _UnusualError
        lines, rest = data[:cut], data[cut:]
        found = _NEXT_BLOCK.search(b"\n" + lines) if b"data_" in lines else None
        if found and len((b"\n" + lines)[found.start() :].split(b"\n", 2)[1].split()) > 1:
            raise _UnusualError
        rows = lines[: found.start()] if found else lines
        if _NAME_FIRST.search(b"\n" + rows) or (b"#" in rows and _BESIDE_VALUES.search(b"\n" + rows)):
            raise _UnusualError
        yield rows
        if found:
            file.seek(found.start() - len(data), 1)
            return
        if not new:
            return


def _read_loop(file: IO[bytes], labels: list[str], wanted: frozenset[str], split_images: bool) -> Loop:
    columns = {label: _Column(label, split_images) for label in labels if label in wanted}
    count = 0
    for rows in _pieces(file, labels, wanted):
        last = rows[labels[-1]].to_numpy()
        if (rows[_END].to_numpy() != "").any() or (last.dtype == object and (last == "").any()):  # a row is too long or too short
            raise _UnusualError
        for name, column in columns.items():
            column.add(rows[name].to_numpy())
        count += len(rows)
    if not count:
        raise _UnusualError
    return {name: columns.pop(name).result() for name in list(columns)}


def _pieces(file: IO[bytes], labels: list[str], wanted: frozenset[str]) -> Iterator[pd.DataFrame]:
    """Rows of a table, some thousands at a time: the wanted columns, the last one and what follows it."""
    import pandas as pd

    names = [*labels, _END]
    use = [i for i, name in enumerate(names) if name in wanted or i >= len(labels) - 1]
    types = {names[i]: _dtype(names[i], wanted) for i in use}
    # one field longer than the table, so that rows that are too long show in the last column
    first = b"0 " * len(labels) + b"0\n"
    for lines in _lines(file):
        rows = pd.read_csv(
            BytesIO(first + lines),
            sep=r"\s+",
            header=None,
            names=names,
            usecols=use,
            dtype={name: dtype for name, dtype in types.items() if dtype is not None},
            comment="#",
            na_filter=False,
            engine="c",
            low_memory=False,
        )
        yield rows.iloc[1:]


def _dtype(name: str, wanted: frozenset[str]) -> Any:
    """Dtype with which pandas reads a column; None lets it infer: integers stay exact, yet may be written as 1.0."""
    if name not in wanted or name in _TEXT:
        return object
    if name in _WHOLE:
        return None
    return np.float64


class _Column:
    """One column, gathered from the pieces of a table."""

    def __init__(self, name: str, split_images: bool) -> None:
        self._text, self._exact = name in _TEXT, name == PARTICLE_ID
        self._image = split_images and name == "rlnImageName"
        self._numbers: list[np.ndarray] = []
        self._coder = Coder()

    def add(self, values: np.ndarray) -> None:
        """Append the values of some rows."""
        import pandas as pd

        if not len(values):
            return
        if self._image:
            self._add_images(values)
        elif self._text:
            codes, names = pd.factorize(values)
            if "" in names:
                raise _UnusualError
            self._coder.add(codes, names)
        elif values.dtype != np.int64 and (self._exact or values.dtype != np.float64):
            raise _UnusualError
        else:
            self._numbers.append(values.copy())

    def _add_images(self, values: np.ndarray) -> None:
        parts = split_image_names(values)
        if parts is None:
            raise _UnusualError
        self._numbers.append(parts[0])
        self._coder.add(*parts[1:])

    def result(self) -> np.ndarray | Coded | Images:
        """The whole column."""
        if self._image:
            return Images(np.concatenate(self._numbers), self._coder.result())
        return self._coder.result() if self._text else np.concatenate(self._numbers)
