"""STAR files as plain tables: every block, under RELION's names."""

from __future__ import annotations

import linecache
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cryodask.errors import StarError
from cryodask.formats.star.names import TEXT

if TYPE_CHECKING:
    import pandas as pd

Tables = dict[str, "pd.DataFrame | dict[str, Any]"]


def read_tables(path: str | Path) -> Tables:
    """All blocks of a STAR file: a DataFrame for a loop, a dict for a list of pairs, under RELION's names without ``data_``.

    Raises
    ------
    StarError
        If the file is missing, has no block, or a row is longer or shorter than its header.
    """
    import starfile

    path = Path(path)
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise StarError(f"{path} cannot be read: {error}", "the path is wrong, or it is not a STAR file", "check the path") from error
    _check_rows(path, lines)
    # starfile reads through linecache, which could return outdated content of the same path
    linecache.checkcache(str(path))
    try:
        return dict(starfile.read(path, always_dict=True, parse_as_string=list(TEXT)))
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise StarError(
            f"{path} cannot be parsed: {error}", "it is not a RELION STAR file, or was edited by hand", "write it again"
        ) from error


def write_tables(path: str | Path, tables: Mapping[str, pd.DataFrame | Mapping[str, Any]]) -> None:
    """Write blocks under RELION's names; numbers keep nine digits.

    Raises
    ------
    StarError
        If a string is empty, or has blanks, quotes or `#`, which RELION cannot read; or if a number is NaN.
    """
    import pandas as pd
    import starfile

    for block, table in tables.items():
        columns: Iterable[tuple[Any, Any]] = table.items()
        for name, values in columns:
            array = np.atleast_1d(np.asarray(values))
            if array.dtype.kind == "f" and np.isnan(array).any():
                raise StarError(
                    f"{path}: column {name} of data_{block} contains NaN",
                    "an earlier step failed for some rows",
                    "remove these rows",
                )
            if array.dtype.kind in "OUS":
                bad = [t for t in map(str, array) if not t.isprintable() or t.split() != [t] or any(c in t for c in "'\"#")]
                if bad:
                    raise StarError(
                        f"{path}: {name} cannot contain {bad[0]!r}",
                        "a file name has blanks, quotes or #",
                        "rename the file",
                    )
    ready = {b: t if isinstance(t, pd.DataFrame) else dict(t) for b, t in tables.items()}
    starfile.write(ready, Path(path), float_format="%.9g", overwrite=True)


def _check_rows(path: Path, lines: list[str]) -> None:
    """Refuse ragged rows: the parser below would fill short ones with NaN."""
    header, in_loop, blocks = 0, False, 0
    for number, raw in enumerate(lines, 1):
        line = raw.strip()
        if line.startswith("data_"):
            header, in_loop, blocks = 0, False, blocks + 1
        elif line.startswith("loop_"):
            in_loop = True
        elif in_loop and line.startswith("_") and len(line.split("#")[0].split()) == 1:
            header += 1
        elif in_loop and line and not line.startswith("#"):
            try:
                fields = shlex.split(line, comments=True) if any(c in line for c in "'\"#") else line.split()
            except ValueError as error:
                raise StarError(f"{path}, line {number}: {error}", "a quote is not closed", "fix that line and rerun") from error
            if len(fields) != header:
                raise StarError(
                    f"{path}, line {number}: {len(fields)} values for {header} columns",
                    "the file is truncated, or a name contains a blank",
                    "write the file again",
                )
    if not blocks:
        raise StarError(f"{path} has no data_ block", "it is not a STAR file, or is empty", "check the path")
