"""What a result of an exposure was made from. A result is current exactly as long as this equals what is due now."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from cryodask.store.lines import Record
from cryodask.store.listing import Item

if TYPE_CHECKING:
    from cryodask.store.project import Project
    from cryodask.store.table import Table


class Made(NamedTuple):
    """What a result was made from, or must be made from.

    ``input``: fingerprint of the exposure. ``recipe``: how it was processed, with the optics and gain of its data set (see run/keys.py).
    ``slice``: digest of the other inputs of the exposure (particles, an import). None if there are none.
    """

    input: str | None
    recipe: str | None = None
    slice: str | None = None

    @classmethod
    def of(cls, record: Record) -> Made:
        """From a commit record."""
        return cls(record.get("input"), record.get("recipe"), record.get("slice"))

    def entries(self) -> dict[str, str]:
        """The entries of a commit record."""
        return {name: value for name, value in self._asdict().items() if value is not None}


def settled(records: Mapping[int, Record], due: Mapping[int, Made]) -> tuple[set[int], set[int]]:
    """Rows that are done, and rows that are quarantined, with respect to what is ``due``."""
    done: set[int] = set()
    failed: set[int] = set()
    for row, made in due.items():
        record = records.get(row)
        if record is None:
            continue
        was = Made.of(record)
        # a failure from before its particles were known does not depend on them
        same = was == made or (not record["ok"] and was == made._replace(slice=None))
        if same:
            (done if record["ok"] else failed).add(row)
    return done, failed


def settled_in(table: Table, due: Mapping[int, Made]) -> tuple[set[int], set[int]]:
    """Like :func:`settled`, from columns, which are cheaper than many records."""
    made = zip(table.row.tolist(), map(Made, table.input, table.recipe, table.slice))
    done = {row for row, was in made if due.get(row) == was}
    return done, settled(table.failures, due)[1]


def shown(item: Item, recipes: Mapping[str, str], made_from: str | None, recipe: str | None) -> bool:
    """Whether a record belongs to the current state of the item.

    Always true if the input never changed. ``recipes``: the current ones by data set; a data set that is not among them, or a
    record without a recipe, is not compared.
    """
    if item.revision and made_from is not None and made_from != item.fingerprint:
        return False
    return recipe is None or recipes.get(item.data_set, recipe) == recipe


class RowsWithResults:
    """Rows with a result in any current generation; looked up on first use."""

    def __init__(self, project: Project) -> None:
        self._project = project

    @cached_property
    def _rows(self) -> set[int]:
        out: set[int] = set()
        for label in self._project.stages:
            generation = self._project.generation(label)
            if generation.meta["per_item"]:
                out |= set(generation.table(()).row.tolist())
        return out

    def __contains__(self, row: object) -> bool:
        return row in self._rows
