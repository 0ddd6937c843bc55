"""The numbers of every exposure that pages show, and the variables that they are made from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cryodask.store.births import accepted
from cryodask.store.table import Table


@dataclass(frozen=True)
class Column:
    """A number of every exposure that pages show: its name, title, unit, and the variables that it is made from."""

    name: str
    title: str
    unit: str
    variables: tuple[str, ...]
    made: Callable[[Table, float | str | None], np.ndarray] | None = None
    """From a table and the score above which a step accepts picks; by default the one variable itself."""

    def values(self, table: Table, threshold: float | str | None) -> np.ndarray:
        """Its values for the items of a table, `(item,)`, float32."""
        found = self.made(table, threshold) if self.made is not None else table[self.variables[0]]
        return np.asarray(found, dtype=np.float32)


def _defocus(table: Table, threshold: float | str | None) -> np.ndarray:
    return np.asarray((table["defocus_u_angstrom"] + table["defocus_v_angstrom"]) / 2e4)


def _astigmatism(table: Table, threshold: float | str | None) -> np.ndarray:
    return np.asarray(table["defocus_u_angstrom"] - table["defocus_v_angstrom"])


def _accepted(table: Table, threshold: float | str | None) -> np.ndarray:
    scores = table.columns["pick_score"]
    counts = scores.shapes[:, 0]
    if not len(scores.flat):
        return np.zeros(len(counts))
    limit = np.repeat(table["pick_threshold"], counts) if threshold == "auto" else threshold
    mask = accepted(scores.flat, None if isinstance(limit, str) else limit)
    out = np.zeros(len(counts))
    some = counts > 0
    out[some] = np.add.reduceat(mask, (np.cumsum(counts) - counts)[some], dtype=np.int32)
    return out


_DEFOCUS = ("defocus_u_angstrom", "defocus_v_angstrom")
COLUMNS = (
    Column("defocus", "Defocus", "µm", _DEFOCUS, _defocus),
    Column("astigmatism", "Astigmatism", "Å", _DEFOCUS, _astigmatism),
    Column("ctf_resolution", "CTF fit", "Å", ("ctf_resolution_angstrom",)),
    Column("ctf_fom", "CTF figure of merit", "", ("ctf_figure_of_merit",)),
    Column("alternative", "Second-best CTF fit", "", ("ctf_alternative_score",)),
    Column("total_motion", "Motion", "Å", ("total_motion",)),
    Column("early_motion", "Early motion", "Å", ("early_motion",)),
    Column("picks", "Picks", "", ("pick_score", "pick_threshold"), _accepted),
    Column("dose", "Mean count", "e/px", ("mean_count",)),
)
