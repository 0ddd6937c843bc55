"""All birth tables that a project ever wrote, whichever steps it has now: what is born again is compared with these."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from cryodask.store.births import KNOWN, known_of
from cryodask.store.claims import ADOPTING
from cryodask.store.history import generation_folders
from cryodask.store.identity import birth_of
from cryodask.store.journal import decode_value
from cryodask.store.lines import Record

if TYPE_CHECKING:
    from cryodask.store.generation import Generation
    from cryodask.store.project import Project


@dataclass
class BirthBook:
    """Reads the birth tables of an exposure from every generation on the disk, current or not, and from results that were undone."""

    project: Project
    _births: list[tuple[Generation, int]] | None = None
    _read: set[str] = field(default_factory=set)

    def at(self, row: int, number: int, claimed: frozenset[int] = frozenset(), *, again: bool = False) -> dict[str, np.ndarray]:
        """What is known of the particles of an exposure, for a birth that is about to deal its ids.

        Parameters
        ----------
        row : int
            Of the exposure.
        number : int
            Of the birth: its own tables whole, and its particles in the tables of others.
        claimed : frozenset of int
            Births whose particles may come back.
        again : bool
            Look at the disk again: something was written since.
        """
        wanted = np.array(sorted({number, *claimed}), np.int64)
        records: list[tuple[Record, bool]] = []
        for generation, birth in self._generations():
            stage = generation.meta["stage"]
            # only import_project brings particles of a birth that has tables of its own here
            if birth == number or birth in claimed or stage == "import_project" or (claimed and stage in ADOPTING):
                if again or str(generation.path) not in self._read:
                    generation.journal.read()
                    self._read.add(str(generation.path))
                records += [(record, birth == number) for record in generation.journal.ever(row)]
        records.sort(key=lambda one: (one[0].get("attempt", 0), one[0].get("time", 0.0)))
        return known_of(_once(records, wanted))

    def _generations(self) -> list[tuple[Generation, int]]:
        if self._births is None:
            folders = generation_folders(self.project.path)
            found = [self.project.generation_at(f"{f.parent.name}/{f.name}") for f in folders]
            self._births = [(g, int(g.meta["birth"]["number"])) for g in found if g.meta.get("birth")]
        return self._births


def _once(records: list[tuple[Record, bool]], wanted: np.ndarray) -> list[tuple[dict[str, Any], bool]]:
    """Tables of some records, equal ones once; of another birth's table only the particles of the wanted ones."""
    out: list[tuple[dict[str, Any], bool]] = []
    seen: set[str] = set()
    for record, own in records:
        columns = {n: record["columns"][n] for n in KNOWN if n in record["columns"]}
        text = repr(sorted(columns.items()))
        if text in seen or "particle_half" not in columns:
            continue
        seen.add(text)
        table = {n: np.asarray(decode_value(v)) for n, v in columns.items()}
        if not own:
            table = {n: v[np.isin(birth_of(table["particle_id"]), wanted)] for n, v in table.items()}
        out.append((table, own))
    return out
