"""Optics and gain of the data sets: those in the project file, and those of data sets that it no longer lists.

An exposure leaves a project only by ``forget``. One whose data set was removed from ``inputs`` keeps its results, so the optics and gain
of that data set are kept as well. The name of a data set is a label: a renamed one is listed under its new name only. If another data
set reuses the name of a removed one, the removed one is kept as ``NAME~NUMBER``.
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
    """``constants``: optics and dose by data set. ``gains``: paths of gain references, relative to the project. ``said``: messages."""

    constants: dict[str, dict[str, Any]]
    gains: dict[str, str]
    said: list[str]


def data_sets(plan: Plan, project: Project, gains: Mapping[str, str]) -> DataSets:
    """All data sets of the project's exposures, once the listing is known; ``gains`` are those in the project file."""
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
    """Before a listing is registered, rename a removed data set whose name another one now has.

    Parameters
    ----------
    plan : Plan
    project : Project
    listing : iterable of Arrival or None
        All files present; None for a watched session, where the patterns of the data sets decide what they list.
    foresee : bool
        Change this object only; write nothing.
    """
    if not any(name in project.state.constants for name in plan.data_sets):
        return
    known = {row: item for row, item in project.registered().items() if "movie_path" in item.inputs}
    patterns = {name: _Pattern(plan, movies.movies or "") for name, movies in plan.data_sets.items()}
    listed = _listed(known, patterns, listing)
    met = Counter(name for name in listed.values())
    stayed = Counter(name for row, name in listed.items() if known[row].data_set == name)
    # a data set whose files moved is the same one if most of what it lists was listed before
    other = {name for name in patterns if name in project.state.constants and 2 * stayed[name] < max(met[name], 1)}
    # files archived out of a folder belong to the data set that lists this folder
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
        project.save()  # first, because exposures of a data set without optics could not be processed
    project.rename_data_sets({row: names[item.data_set] for row, item in apart.items()}, foresee=foresee)


class _Pattern:
    """The files that a data set lists."""

    def __init__(self, plan: Plan, pattern: str) -> None:
        self._home = plan.path.parent.resolve()
        self._pattern = os.path.normpath(plan.resolve(pattern)).replace("**/", "*")

    def lists(self, item: Item) -> bool:
        """Whether an exposure is, or was, in a place that matches the pattern."""
        return fnmatch.fnmatchcase(os.path.normpath(self._home / str(item.inputs["movie_path"])), self._pattern)


def _listed(known: Mapping[int, Item], patterns: Mapping[str, _Pattern], listing: Iterable[Arrival] | None) -> dict[int, str]:
    """Data set that lists each known exposure now, by row."""
    if listing is None:
        found = {row: [name for name, pattern in patterns.items() if pattern.lists(item)] for row, item in known.items()}
        return {row: names[0] for row, names in found.items() if names}
    rows = {item.content: row for row, item in known.items()}
    return {rows[a.content]: str(a.inputs.get("data_set", "")) for a in listing if a.content in rows}


def _name_of_its_own(plan: Plan, project: Project, name: str) -> str:
    """``NAME~NUMBER``: the name of a former data set with the same optics and gain, else an unused one."""
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
        f"{some} to {which}, which is no longer in the project file: results, optics and gain stay as they were "
        "(cryodask forget excludes exposures)"
    )
