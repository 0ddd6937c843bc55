"""What is due for each exposure in a per-exposure step, and what other generations have of it; for runs and dry runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from cryodask.run.slices import Slices
from cryodask.store.generation import Generation
from cryodask.store.history import generation_folders
from cryodask.store.lines import Record
from cryodask.store.made import Made, settled, settled_in
from cryodask.store.project import Item, Project


class FactSource(Protocol):
    """A further source of facts about an exposure: an import, or another project."""

    def digest(self, item: Item) -> str:
        """Digest of the facts about this exposure."""
        ...


def facts_digest(item: Item, *facts: FactSource | None) -> str | None:
    """Digest of all further facts about an exposure; None if there are none."""
    return "-".join(one.digest(item) for one in facts if one is not None) or None


def due(items: Iterable[Item], recipes: Mapping[str, str], given: Slices | None, *facts: FactSource | None) -> dict[int, Made]:
    """What the result of each item must be made from, in the current state of the project.

    Parameters
    ----------
    items : iterable of Item
    recipes : mapping
        The recipe of the step for each data set.
    given : Slices or None
        The particles of the step; None if it takes none.
    *facts : FactSource or None
        Imported values of the exposures, and values from other projects that the step reads.
    """
    items = list(items)
    slices: dict[int, str] | None = given.digests(item.row for item in items) if given is not None else None
    out = {}
    for item in items:
        more = facts_digest(item, *facts)
        out[item.row] = Made(item.fingerprint, recipes.get(item.data_set), more if slices is None else joined(slices[item.row], more))
    return out


def joined(given: str, imported: str | None) -> str:
    """Combined digest of the particles given with an exposure and of its imported values."""
    return f"{given}-{imported}" if imported is not None else given


@dataclass(frozen=True)
class Known:
    """Rows that a generation has ``done`` or quarantined (``failed``), and what others have of the rest, as it would be linked."""

    done: set[int]
    failed: set[int]
    linked: list[tuple[Generation, list[Record]]]

    @property
    def records(self) -> dict[int, Record]:
        """Records that would be linked, by row."""
        return {record["row"]: record for _, records in self.linked for record in records}


def known(project: Project, generation: Generation, items: Sequence[Item], asked: Mapping[int, Made]) -> Known:
    """What exists already of what is due, in a generation (which need not exist yet) and in others of its stage."""
    done, failed = settled_in(generation.table(()), asked)
    lacking = {item.row: item for item in items if item.row in asked and item.row not in done}
    linked = []
    for other in _others(project, generation) if lacking else ():
        records = other.committed()
        found, _ = settled({row: records[row] for row in lacking if row in records}, asked)
        if found:
            here = generation.records()
            linked.append((other, [_as_linked(records[row], lacking.pop(row), here.get(row)) for row in sorted(found)]))
    return Known(done, failed, linked)


def _as_linked(record: Record, item: Item, here: Record | None) -> Record:
    """The record of another generation, numbered above the existing one: of two records of a row, the later attempt counts."""
    attempt = max(int(r.get("attempt", 0)) for r in (record, here or {}))
    return {**record, "revision": item.revision, "name": item.name, **({"attempt": attempt} if attempt else {})}


def _others(project: Project, generation: Generation) -> list[Generation]:
    stage = generation.path.parent.name
    folders = [f for f in generation_folders(project.path) if f.parent.name == stage and f != generation.path]
    return [project.generation_at(f"{stage}/{f.name}") for f in folders]
