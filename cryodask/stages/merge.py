"""Stage ``merge``: the union of several sets of particles."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import Field

from cryodask.errors import InputError
from cryodask.products import ORIGINS, Product, place_named
from cryodask.stage import Output, Params, SetView, port, stage
from cryodask.stages._sets import exposures_of
from cryodask.store.identity import MOST_BIRTHS, birth_of, place_of, row_of

REASONS = {1: "a particle of an earlier source is closer than nearer_than_angstrom"}
"""Meaning of the numbers in ``removal_reason``."""

_NOT_OF_A_PART = (*ORIGINS, "box_y_angstrom", "box_x_angstrom")
"""Columns that are computed when a set is read, and not given by a step."""

_WITHOUT_CONFLICTS = "image"
"""Images are in shards; the runner compares and selects them."""


class MergeParams(Params):
    """Parameters of ``merge``."""

    prefer: str | None = Field(
        None, description="source whose values are used for particles that several sources hold with different values; named as in `from`"
    )
    nearer_than_angstrom: float | None = Field(
        None,
        gt=0,
        description="for sources that were picked independently: of two particles closer than this in one exposure, the first source's "
        "is kept, Angstrom; half the particle diameter is a good value",
    )


def _check(params: MergeParams, inputs: dict[str, list[Product]]) -> Iterator[str]:
    sets = inputs["particles"]
    if len(sets) < 2:
        yield "merge takes two sets or more: from: {particles: [a, b]}."
    names = [s.name for s in sets]
    if params.prefer is not None and place_named(params.prefer, names) is None:
        yield f"prefer names {params.prefer!r}, which is not one of the sources: {', '.join(names)}."
    for place, a in enumerate(sets):
        for b in sets[place + 1 :]:
            apart = a.births - b.births and b.births - a.births
            if not (apart and a.sources & b.sources):
                continue
            if not params.nearer_than_angstrom:
                yield (
                    f"{a.ref} and {b.ref} were picked independently in the same exposures, so one particle may be in both. Set "
                    "nearer_than_angstrom (for example half the diameter): of two that are closer, the first source's is kept."
                )
            for source in (a, b):
                if "position" not in source.parts:
                    yield f"nearer_than_angstrom compares positions, but the particles of {source.ref} have none."


@stage(
    version=1,
    shape="set",
    needs=[],
    gives=[],
    ports=[port("particles*:particles", copies=True, subtracted=True), "exposures?!:exposures"],
    outputs=[Output("particles", "particles", on="particles")],
    check=_check,
    reasons=REASONS,
)
def merge(params: MergeParams, inputs: dict[str, list[SetView]]) -> dict[str, Any]:
    """Merge several sets of particles; each particle is in the union once.

    Particles are the same if their ids are. A part (poses, classes ...) is kept if every source has it. If sources have different
    values for the same particle, ``prefer`` must name the source whose values are used; after it the order of the sources decides.
    Sources that were picked independently in the same exposures share no ids: with ``nearer_than_angstrom`` a particle is left out
    if a particle of another picking run in an earlier source is closer than that. Within one source nothing is left out; use
    ``deduplicate`` for that.
    """
    sets = inputs["particles"]
    if not sets:
        raise InputError("merge got no sets.", "", "name them: from: {particles: [a, b]}")
    by_preference([s.name for s in sets], params.prefer)
    ids = np.unique(np.concatenate([s.ids for s in sets]))
    if not len(ids):
        raise InputError(
            f"merge left no particles: {' and '.join(s.name for s in sets)} are all empty.",
            "an earlier selection removed every particle",
            "check the steps that gave these sets",
        )
    dropped = np.zeros(len(ids), bool)
    if params.nearer_than_angstrom is None:
        _refuse_picked_apart(sets)
    elif len(np.unique(birth_of(ids))) > 1:
        lacking = [s.name for s in sets if "position" not in s.parts]
        if lacking:
            raise InputError(
                f"The particles of {', '.join(lacking)} have no positions, so nearer_than_angstrom cannot be used.",
                "they were imported without coordinates",
                "import them with coordinates, or leave out nearer_than_angstrom",
            )
        dropped = _near_an_earlier_one(sets, ids, params.nearer_than_angstrom)
    kept = ids[~dropped]
    if params.prefer is None:
        _refuse(conflicts(sets, kept, surviving_parts(sets)))
    return {"particle_id": kept, "dropped_id": ids[dropped], "removal_reason": np.ones(int(dropped.sum()), np.int8)}


def surviving_parts(sets: Sequence[SetView]) -> list[str]:
    """Parts that every source has, in the order of the first source."""
    return [part for part in sets[0].parts if all(part in s.parts for s in sets)]


@dataclass(frozen=True)
class Conflict:
    """A part for which two sources have different values, and for how many particles."""

    part: str
    count: int
    first: str
    second: str


def conflicts(sets: Sequence[SetView], ids: np.ndarray, parts: Sequence[str]) -> list[Conflict]:
    """Conflicting values of the sources for the same particles.

    Parameters
    ----------
    sets : sequence of SetView
        The sources.
    ids : `(n,)`, int64, sorted
        Particles to compare.
    parts : sequence of str
        Parts to compare; images are not compared.

    Returns
    -------
    list of Conflict
        One for each part and pair of sources. A particle without a value in one of the two (its step did not process it) is no conflict.
    """
    found = []
    for part in parts:
        if part == _WITHOUT_CONFLICTS:
            continue
        read = [_Source(s, part) for s in sets]
        for place, a in enumerate(read):
            for b in read[place + 1 :]:
                count = _differing(a, b, ids)
                if count:
                    found.append(Conflict(part, count, a.name, b.name))
    return found


def merged_columns(sets: Sequence[SetView], ids: np.ndarray, parts: Sequence[str], prefer: str | None) -> dict[str, np.ndarray]:
    """Columns of some parts of a union.

    Parameters
    ----------
    sets : sequence of SetView
        The sources, in the order given.
    ids : `(n,)`, int64, sorted
        Particles of the union.
    parts : sequence of str
        Parts whose values come from several steps.
    prefer : str or None
        Source that takes precedence over the others.

    Returns
    -------
    dict of arrays `(n,)`
        Under the names of particle sets. For each particle the values of a part come from one source, the first that has any; NaN,
        or -1 for integers, if none has.
    """
    ordered = [sets[i] for i in by_preference([s.name for s in sets], prefer)]
    out: dict[str, np.ndarray] = {}
    for part in parts:
        read = [_Source(s, part) for s in ordered]
        names = dict.fromkeys(name for source in read for name in source.columns)
        for name in names:
            dtype = np.result_type(*(source.columns[name].dtype for source in read if name in source.columns))
            shape = next(source.columns[name].shape[1:] for source in read if name in source.columns)
            out[name] = np.full((len(ids), *shape), -1 if dtype.kind in "iu" else np.nan, dtype)
        empty = np.ones(len(ids), bool)
        for source in read:
            at = place_of(ids, source.ids)
            here = np.flatnonzero(empty & (at >= 0))
            here = here[source.known[at[here]]]
            for name, values in source.columns.items():
                out[name][here] = values[at[here]]
            empty[here] = False
    return out


class _Source:
    """Columns of one part of one source; ``known``: particles for which at least one of them has a value."""

    def __init__(self, view: SetView, part: str) -> None:
        self.name, self.ids = view.name, view.ids
        given = view.read([part]) if part in view.parts else {}
        self.columns = {name: np.asarray(values) for name, values in given.items() if name not in _NOT_OF_A_PART}
        self.known = np.zeros(len(view.ids), bool)
        for values in self.columns.values():
            self.known |= _there(values)


def _there(values: np.ndarray) -> np.ndarray:
    """Mask `(n,)` of the values that are not missing (NaN, or -1 for integers)."""
    there = np.ones(values.shape, bool)
    if values.dtype.kind in "iu":
        there = np.not_equal(values, -1)
    elif values.dtype.kind == "f":
        there = ~np.isnan(values)
    return np.asarray(there.reshape(len(values), -1).any(1)) if values.ndim > 1 else there


def _differing(a: _Source, b: _Source, ids: np.ndarray) -> int:
    """Number of particles with different values in the two sources."""
    in_a, in_b = place_of(ids, a.ids), place_of(ids, b.ids)
    shared = (in_a >= 0) & (in_b >= 0)
    in_a, in_b = in_a[shared], in_b[shared]
    both = a.known[in_a] & b.known[in_b]
    in_a, in_b = in_a[both], in_b[both]
    differs = np.zeros(len(in_a), bool)
    for name in {**a.columns, **b.columns}:
        if name in a.columns and name in b.columns:
            x, y = a.columns[name][in_a], b.columns[name][in_b]
            same = x == y
            if x.dtype.kind == "f" and y.dtype.kind == "f":
                same |= np.isnan(x) & np.isnan(y)
            differs |= ~(same.reshape(len(same), -1).all(1) if same.ndim > 1 else same)
        else:
            source, at = (a, in_a) if name in a.columns else (b, in_b)
            differs |= _there(source.columns[name][at])
    return int(differs.sum())


def _refuse(found: Sequence[Conflict]) -> None:
    if not found:
        return
    first = found[0]
    others = list(dict.fromkeys(c.part for c in found if c.part != first.part))
    more = f" The values of {', '.join(others)} differ as well." if others else ""
    raise InputError(
        f"{first.count:,} particles have different values of {first.part} in {first.first} and {first.second}.{more}",
        "the two sets were classified or refined separately",
        f"choose one, merge: {{prefer: {first.first}}} or merge: {{prefer: {first.second}}}",
    )


def by_preference(names: Sequence[str], prefer: str | None) -> list[int]:
    """Indices of the sources of these names, the preferred one first.

    Raises
    ------
    InputError
        If ``prefer`` does not name one of them.
    """
    if prefer is None:
        return list(range(len(names)))
    place = place_named(prefer, names)
    if place is None:
        raise InputError(f"merge prefers {prefer!r}, which is not one of its sources.", "", f"name one of {', '.join(names)}")
    return [place, *(i for i in range(len(names)) if i != place)]


def _refuse_picked_apart(sets: Sequence[SetView]) -> None:
    """Refuse independently picked sets that share exposures (pooled projects, imported tables), which the plan cannot know."""
    births = [np.unique(birth_of(s.ids)) for s in sets]
    here = [_births_by_exposure(s.ids) for s in sets]
    together = {pair for found in here for some in found.values() if len(some) > 1 for pair in itertools.combinations(sorted(some), 2)}
    for i, a in enumerate(sets):
        for j in range(i + 1, len(sets)):
            b = sets[j]
            only_a = np.unique(row_of(a.ids[~np.isin(birth_of(a.ids), births[j])]))
            only_b = np.unique(row_of(b.ids[~np.isin(birth_of(b.ids), births[i])]))
            rows = set(only_a[np.isin(only_a, only_b)].tolist())
            # if the numbers of some exposures of a project were assigned independently, these have another birth than the rest of its set
            rows |= {row for row in here[i].keys() & here[j].keys() if _apart(here[i][row], here[j][row], together)}
            shared = len(rows)
            if shared:
                raise InputError(
                    f"{a.name} and {b.name} were picked or imported independently and share {shared:,} exposures, so one particle may "
                    "be in both, and in both half-sets.",
                    "two pickers were run, or two selections of one session were imported",
                    "set nearer_than_angstrom (for example half the diameter): of two that are closer, the first source's is kept; "
                    "join tables of images without coordinates in one STAR file before importing them",
                )


def _births_by_exposure(ids: np.ndarray) -> dict[int, set[int]]:
    """Births of the particles of each exposure, by row."""
    out: dict[int, set[int]] = {}
    for both in np.unique(row_of(ids) * MOST_BIRTHS + birth_of(ids)).tolist():
        out.setdefault(both // MOST_BIRTHS, set()).add(both % MOST_BIRTHS)
    return out


def _apart(a: set[int], b: set[int], together: set[tuple[int, int]]) -> bool:
    """Whether the births of two sets in an exposure are unrelated: no set has both in one exposure."""
    return not a & b and not any((min(p, q), max(p, q)) in together for p in a for q in b)


def _near_an_earlier_one(sets: Sequence[SetView], ids: np.ndarray, limit_angstrom: float) -> np.ndarray:
    """Mask `(n,)` of the particles close to a kept particle of another birth from an earlier source."""
    from scipy.spatial import cKDTree

    columns = merged_columns(sets, ids, ["position"], None)
    places = np.stack([columns["position_y_angstrom"], columns["position_x_angstrom"]], -1)
    births, source = birth_of(ids), _first_source(sets, ids)
    dropped = np.zeros(len(ids), bool)
    for _, index in exposures_of(ids, np.isfinite(places).all(1)):
        birth, rank = births[index], source[index]
        if (birth == birth[0]).all():
            continue
        for later in np.unique(rank)[1:]:
            earlier = (rank < later) & ~dropped[index]
            for own in np.unique(birth[rank == later]):
                others, asking = index[earlier & (birth != own)], index[(rank == later) & (birth == own)]
                if len(others):
                    distance, _ = cKDTree(places[others]).query(places[asking])
                    dropped[asking] = distance < limit_angstrom
    return dropped


def _first_source(sets: Sequence[SetView], ids: np.ndarray) -> np.ndarray:
    """Index of the first source that has each particle."""
    rank = np.full(len(ids), len(sets), np.int64)
    for number in reversed(range(len(sets))):
        rank[np.searchsorted(ids, sets[number].ids)] = number
    return rank
