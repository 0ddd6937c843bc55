"""Dependencies of generations: for each step whose result one was, the exact places of its inputs and outputs.

The driver writes ``places.json`` in the folder of a generation. Identical steps share one generation, but may have reached
it along different lines, so the file has one entry per step, as of the last time the generation was its current one.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from cryodask.errors import StoreError
from cryodask.store.files import disk_errors, write_atomically
from cryodask.store.state import ProductRef

_FILE = "places.json"


class Optics(BaseModel):
    """Optics that exposures get from their data set; ``rows``: runs of rows, first and last."""

    values: dict[str, float | None]
    rows: list[tuple[int, int]]


class Line(BaseModel):
    """The ancestry of a generation as the result of a step.

    ``steps``: places of the step and all its ancestors, by label. ``facts``: what the plan knew about the products. ``origin``:
    identity of an ancestral birth. ``since``: when it became the step's current result (seconds since 1970). ``finished``: it
    was complete. ``optics``: those of the exposures at that time; data sets may have changed or been renamed since.
    """

    inputs: dict[str, list[ProductRef]] = Field(default_factory=dict)
    products: dict[str, ProductRef] = Field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = Field(default_factory=dict)
    steps: dict[str, str] = Field(default_factory=dict)
    origin: Any = None
    since: float = 0.0
    finished: bool = False
    optics: list[Optics] = Field(default_factory=list)

    def places(self) -> set[str]:
        """All generations that the step read from, and those whose parts it passed on."""
        refs = (*self.products.values(), *(ref for refs in self.inputs.values() for ref in refs))
        return set().union(*(ref.places() for ref in refs)) if refs else set()

    def label_at(self, place: str) -> str | None:
        """Label of the step at a place; None if it is not an ancestor."""
        return next((label for label, there in self.steps.items() if there == place), None)


_LINES = TypeAdapter(dict[str, Line])


def read_lines(folder: Path) -> dict[str, Line]:
    """The entries of a generation by label; empty if it was made before the file existed.

    Raises
    ------
    StoreError
        If the file is damaged.
    """
    path = folder / _FILE
    try:
        return _LINES.validate_json(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValidationError as error:
        raise StoreError(
            f"{path} is damaged: {str(error).splitlines()[0]}.",
            "it was edited by hand, or the disk lost bytes",
            "remove this file and rerun the project: the steps that have this result now rewrite it",
        ) from error


def line_of(folder: Path, label: str | None) -> Line | None:
    """The entry of a step; the latest entry if the step never had this generation."""
    lines = read_lines(folder)
    if label in lines:
        return lines[label]
    return max(lines.values(), key=lambda line: line.since, default=None)


def note(folder: Path, label: str, line: Line, *, again: bool, fixed: bool) -> None:
    """Record the ancestry of a step's generation (driver only).

    ``again``: it was not the current result before. ``fixed``: an existing entry stays, because the generation is named or pinned.
    """
    lines = read_lines(folder)
    old = lines.get(label)
    since = time.time() if again or old is None else old.since
    kept = old if old is not None and fixed else line
    new = kept.model_copy(update={"since": since, "finished": old is not None and old.finished})
    if new != old:
        _write(folder, {**lines, label: new})


def finish(folder: Path, label: str) -> None:
    """Record that a step is complete (driver only)."""
    lines = read_lines(folder)
    if label in lines and not lines[label].finished:
        _write(folder, {**lines, label: lines[label].model_copy(update={"finished": True})})


def _write(folder: Path, lines: dict[str, Line]) -> None:
    with disk_errors(folder):
        write_atomically(folder / _FILE, _LINES.dump_json(lines))


def behind(project: Path, starts: Iterable[tuple[str, str | None]]) -> set[str]:
    """Places of some generations and of everything that they depend on.

    Parameters
    ----------
    project : Path
        Folder of the project.
    starts : iterable of (place, label)
        Without a label, all lines of the generation are followed.
    """
    found: set[str] = set()
    seen: set[tuple[str, str | None]] = set()
    waiting = list(starts)
    while waiting:
        place, label = waiting.pop()
        if (place, label) in seen:
            continue
        seen.add((place, label))
        found.add(place)
        lines = read_lines(project / "stages" / place)
        for line in [lines[label]] if label is not None and label in lines else lines.values():
            waiting += [(other, line.label_at(other)) for other in line.places() if other != place]
    return found
