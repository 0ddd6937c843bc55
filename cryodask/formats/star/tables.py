"""STAR files as plain tables: every block, under RELION's names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cryodask.errors import StarError
from cryodask.formats.star.names import TEXT
from cryodask.formats.star.numbers import floats, whole
from cryodask.formats.star.rows import read_blocks

if TYPE_CHECKING:
    import pandas as pd

Tables = dict[str, "pd.DataFrame | dict[str, Any]"]


def read_tables(path: str | Path) -> Tables:
    """All blocks of a STAR file: a DataFrame for a loop, a dict for a list of pairs, under RELION's names without ``data_``.

    Columns of numbers are int64 or float64 (NaN where a number is missing), all others texts.

    Raises
    ------
    StarError
        As :func:`~cryodask.formats.star.rows.read_blocks`.
    """
    import pandas as pd

    out: Tables = {}
    for name, block in read_blocks(Path(path)).items():
        columns = {label: _typed(label, values) for label, values in block.columns.items()}
        out[name] = {label: values.tolist()[0] for label, values in columns.items()} if block.pairs else pd.DataFrame(columns)
    return out


def _typed(label: str, texts: list[str]) -> np.ndarray:
    if label not in TEXT and texts:
        integers = whole(texts)
        if integers is not None:
            return integers
        numbers, bad = floats(texts)
        if not len(bad) and np.isfinite(numbers).any():
            return numbers
    return np.array(texts, dtype=object)


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
