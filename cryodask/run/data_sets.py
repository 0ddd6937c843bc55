"""Optics and gain of the data sets: those of the project file, and of sets that it lists no longer as they were.

An exposure leaves a project only by ``forget``. One whose data set was taken out of ``inputs`` keeps its results, so optics and gain of
that set are kept as well. The name of a set is a label: a set that is renamed is listed under its new name, and nothing stays of the old
one. Where another set has taken the name of one that left, the one that left is kept under a name of its own, ``NAME~NUMBER``.
"""

from __future__ import annotations

import fnmatch
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cryodask.run.recipe import Plan
from cryodask.store.project import Arrival, Item, Project


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


def keep_former(plan: Plan, project: Project, listing: Iterable[Arrival] | None, *, foresee: bool = False) -> None:
    """Keep exposures apart whose data set left and whose name another data set has now, before a listing is registered.

    Parameters
    ----------
    plan : Plan
    project : Project
    listing : iterable of Arrival or None
        All that is there; None for a session that is watched: then the patterns of the data sets say what they list.
    foresee : bool
        Only this object knows of it, nothing is written.
    """
    if not any(name in project.state.constants for name in plan.data_sets):
        return
    known = {row: item for row, item in project.registered().items() if "movie_path" in item.inputs}
    patterns = {name: _Pattern(plan, movies.movies or "") for name, movies in plan.data_sets.items()}
    listed = _listed(known, patterns, listing)
    met = Counter(name for name in listed.values())
    stayed = Counter(name for row, name in listed.items() if known[row].data_set == name)
    # a set whose files moved is the same set: most of what it lists, it listed before
    other = {name for name in patterns if name in project.state.constants and 2 * stayed[name] < max(met[name], 1)}
    # what was archived out of a folder belongs to the set that lists this folder
    apart = {r: i for r, i in known.items() if i.data_set in other and r not in listed and not patterns[i.data_set].lists(i)}
    if not apart:
        return
    state = project.state
    names = {name: _name_of_its_own(plan, project, name) for name in sorted({item.data_set for item in apart.values()})}
    for name, own in names.items():
        state.constants[own] = state.constants[name]
        if name in state.gain:
            state.gain[own] = state.gain[name]
    if not foresee:
        project.save()  # first: exposures of a set whose optics are lost could not be processed
    project.rename_data_sets({row: names[item.data_set] for row, item in apart.items()}, foresee=foresee)


class _Pattern:
    """The files that a data set lists."""

    def __init__(self, plan: Plan, pattern: str) -> None:
        self._home = plan.path.parent.resolve()
        self._pattern = os.path.normpath(plan.resolve(pattern)).replace("**/", "*")

    def lists(self, item: Item) -> bool:
        """Whether an exposure lies, or lay, where the pattern looks."""
        return fnmatch.fnmatchcase(os.path.normpath(self._home / str(item.inputs["movie_path"])), self._pattern)


def _listed(known: Mapping[int, Item], patterns: Mapping[str, _Pattern], listing: Iterable[Arrival] | None) -> dict[int, str]:
    """In which data set known exposures are listed now, by row."""
    if listing is None:
        found = {row: [name for name, pattern in patterns.items() if pattern.lists(item)] for row, item in known.items()}
        return {row: names[0] for row, names in found.items() if names}
    rows = {item.content: row for row, item in known.items()}
    return {rows[a.content]: str(a.inputs.get("data_set", "")) for a in listing if a.content in rows}


def _name_of_its_own(plan: Plan, project: Project, name: str) -> str:
    """``NAME~NUMBER``: that of a former set with the same optics and gain, else one that no set ever had."""
    state = project.state
    taken = {*project.known_data_sets(), *state.constants, *plan.constants}
    number = 1
    while (own := f"{name}~{number}") in taken:
        same = own in state.constants and state.constants[own] == state.constants[name] and state.gain.get(own) == state.gain.get(name)
        if same and own not in plan.constants:
            break
        number += 1
    return own


def _said(name: str, count: int) -> str:
    label, _, former = name.partition("~")
    which = f"data set {label}" if label else "inputs without a name"
    if former:
        which = f"a former {which} (kept as {name})"
    some = "1 exposure belongs" if count == 1 else f"{count} exposures belong"
    return (
        f"{some} to {which}, no longer in the project file: results, optics and gain stay as they were "
        "(cryodask forget leaves exposures out)"
    )
