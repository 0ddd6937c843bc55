"""Optics and gain of the data sets: those of the project file, and of sets that it lists no longer as they were.

An exposure leaves a project only by ``forget``. One whose data set was taken out of ``inputs`` keeps its results, so optics and gain of
that set are kept as well. The name of a set is a label: a set that is renamed is listed under its new name, and nothing stays of the old
one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cryodask.run.recipe import Plan
from cryodask.store.project import Project


@dataclass(frozen=True)
class DataSets:
    """``constants``: optics and dose by data set. ``gains``: stored gain references, seen from the project. ``said``: lines for people."""

    constants: dict[str, dict[str, Any]]
    gains: dict[str, str]
    said: list[str]


def data_sets(plan: Plan, project: Project, gains: Mapping[str, str]) -> DataSets:
    """All data sets that the project has exposures of, once the listing is known; ``gains`` are those of the project file."""
    state = project.state
    left = sorted(name for name in project.known_data_sets() - set(plan.constants) if name in state.constants)
    counts = Counter(item.data_set for item in project.items())
    said = [_said(name, counts[name]) for name in left if counts[name]]
    return DataSets(
        {**{name: state.constants[name] for name in left}, **plan.constants},
        {**{name: state.gain[name] for name in left if name in state.gain}, **gains},
        said,
    )


def _said(name: str, count: int) -> str:
    which = f"data set {name}" if name else "inputs without a name"
    some = "1 exposure belongs" if count == 1 else f"{count} exposures belong"
    return (
        f"{some} to {which}, no longer in the project file: results, optics and gain stay as they were "
        "(cryodask forget leaves exposures out)"
    )
