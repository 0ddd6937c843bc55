"""Frame size, number of frames and pixel type of the movies of each data set, by majority of its movies."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from cryodask.stage import Stage
from cryodask.store.generation import Generation
from cryodask.store.layouts import Grid, layout_on, layout_text
from cryodask.store.project import Item
from cryodask.store.shards import Layout
from cryodask.vocabulary import VARIABLES

_MOVIE = "movie"


def brings_movies(stage: Stage) -> bool:
    """Whether a stage reads movies into a project."""
    return _MOVIE in stage.gives and not stage.ports


def mark(grid: Grid) -> str:
    """Size and type of the movies of a data set, in the form recorded with a failure and with a movie that is read in place."""
    return layout_text(layout_on(VARIABLES[_MOVIE], grid))


def movie_marks(generation: Generation) -> dict[int, str]:
    """Size and type of each committed movie, by row: from its stored frames, or from its record if it is read in place."""
    table, var = generation.table(()), VARIABLES[_MOVIE]
    if "y" not in generation.meta["sizes"]:
        return {}
    if not table.stored.get(_MOVIE, np.zeros(0)).any():
        return {row: record["grid"] for row, record in generation.committed().items() if "grid" in record}
    usual = layout_text(generation.layout(var))
    own = {text: _text_in(json.loads(text)) for text in set(table.layouts.tolist()) if text}
    stored = table.stored[_MOVIE]
    return {row: own.get(text) or usual for row, text in zip(table.row[stored].tolist(), table.layouts[stored].tolist())}


def _text_in(layouts: Mapping[str, tuple[list[int], str]]) -> str:
    own = layouts.get(_MOVIE)
    return layout_text(Layout.of(tuple(own[0]), VARIABLES[_MOVIE].chunk, own[1])) if own is not None else ""


def known_grids(generations: Iterable[Generation], items: Iterable[Item]) -> dict[str, Grid]:
    """Size and type of most movies of each data set; data sets without committed movies are left out.

    Parameters
    ----------
    generations : iterable of Generation
        Generations of one stage; the first one that has an exposure counts.
    items : iterable of Item
        Exposures with their current data sets.
    """
    data_sets = {item.row: item.data_set for item in items}
    grids: dict[str, Grid] = {}
    counts: dict[str, Counter[str]] = {}
    for generation in generations:
        if _MOVIE not in generation.meta["gives"]:
            continue
        grids |= {mark(grid): grid for grid in generation.grids.values() if "y" in grid.sizes}
        for row, text in movie_marks(generation).items():
            if row in data_sets:
                counts.setdefault(data_sets.pop(row), Counter())[text] += 1
    usual = {name: count.most_common(1)[0][0] for name, count in counts.items()}
    return {name: grids[text] for name, text in usual.items() if text in grids}


def misplaced(
    generation: Generation, items: Iterable[Item], known: Callable[[], dict[str, Grid]], look: Callable[[list[Item]], Grid | None]
) -> set[int]:
    """Rows whose movie differs from those of its current data set, and rows that failed in a data set of another size.

    Parameters
    ----------
    generation : Generation
        Of a stage that brings movies.
    items : iterable of Item
        All exposures.
    known : callable ``() -> grids``
        As from :func:`known_grids`; called only if there is something to compare.
    look : callable ``(items) -> grid or None``
        Reads size and type from the files of a data set that has no committed movie.
    """
    stored = movie_marks(generation)
    failed = {row: record["grid"] for row, record in generation.table(()).failures.items() if "grid" in record}
    if not stored and not failed:
        return set()
    grids: dict[str, Grid | None] = {**known()}
    alike: dict[str, list[Item]] = {}
    for item in items:
        alike.setdefault(item.data_set, []).append(item)
    out = set()
    for name, some in alike.items():
        if name not in grids and any(item.row in failed for item in some):
            grids[name] = look(some)
        grid = grids.get(name)
        if grid is not None:
            usual = mark(grid)
            out |= {item.row for item in some if (stored.get(item.row) or failed.get(item.row) or usual) != usual}
    return out
