"""A per-exposure generation as a run would leave it: its own results and those it would link from others. Nothing is written."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cryodask.store.generation import Generation
from cryodask.store.lines import Record
from cryodask.store.table import Table


class Foreseen(Generation):
    """Has the small variables of ``records``; images that would be linked are not available yet."""

    def __init__(self, path: str | Path, meta: dict[str, Any], records: dict[int, Record]) -> None:
        super().__init__(path)
        self._meta, self._records = meta, records

    def records(self) -> dict[int, Record]:
        """Records that would count, by row."""
        return self._records

    def table(self, names: Iterable[str] | None = None) -> Table:
        """These records as columns."""
        small = [v.name for v in self.gives if v.kind != "bulk"]
        return Table.of(self._records, self.gives, small if names is None else names)

    def stamp(self) -> tuple[Any, ...]:
        """Never equal to that of the generation on disk."""
        return ("foreseen", id(self))
