"""All birth tables that a project ever wrote, whatever its current steps; new birth tables are compared with them."""

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
    """Reads the birth tables of an exposure from every generation on disk, current or not, and from invalidated results."""

    project: Project
    _births: list[tuple[Generation, int]] | None = None
    _read: set[str] = field(default_factory=set)

    def at(self, row: int, number: int, claimed: frozenset[int] = frozenset(), *, again: bool = False) -> dict[str, np.ndarray]:
        """Known particles of an exposure, for a birth that is about to assign ids.

        Parameters
        ----------
        row : int
            Row of the exposure.
        number : int
            Number of the birth: its own tables in full, and its particles in the tables of others.
        claimed : frozenset of int
            Births whose particles may be reimported.
        again : bool
            Reread the disk, because something was written since.
        """
        wanted = np.array(sorted({number, *claimed}), np.int64)
        records: list[tuple[Record, bool]] = []
        for generation, birth in self._generations():
            stage = generation.meta["stage"]
            # only import_project reads particles of a birth that has its own tables here
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
    """Tables of some records without duplicates; from another birth's table only the particles of the wanted births."""
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
