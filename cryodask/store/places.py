"""What generations rest on: for each step whose result one was, the exact places of the products that it took and gave.

``places.json`` in the folder of a generation, written by the driver. Steps that ask for the same share one generation, but may have come to
it along different lines: so the file has an entry for each of them, as it was when the generation was last the step's current one.
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
    """Optics that exposures have from their data set; ``rows`` are runs of rows, first and last."""

    values: dict[str, float | None]
    rows: list[tuple[int, int]]


class Line(BaseModel):
    """How a step came to a generation.

    ``steps`` are the places of the step itself and of all behind it, by label. ``facts`` are what the plan knew of the products, ``origin``
    what a birth behind it is known by. ``since``: when it became the step's current result (seconds since 1970). ``finished``: it was done
    with everything that there was. ``optics`` of the exposures then: data sets may have others since, and other names.
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
        """All generations that the step took something from, and those whose parts it passed on."""
        refs = (*self.products.values(), *(ref for refs in self.inputs.values() for ref in refs))
        return set().union(*(ref.places() for ref in refs)) if refs else set()

    def label_at(self, place: str) -> str | None:
        """Label that the step at a place had; None where it is not behind this one."""
        return next((label for label, there in self.steps.items() if there == place), None)


_LINES = TypeAdapter(dict[str, Line])


def read_lines(folder: Path) -> dict[str, Line]:
    """The entries of a generation by label; none where it was made before there were any.

    Raises
    ------
    StoreError
        Where the file is damaged.
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
            "remove this one file and run the project again: the steps that have this result now write it again",
        ) from error


def line_of(folder: Path, label: str | None) -> Line | None:
    """How a step came to a generation; of one that never had it the latest entry there is."""
    lines = read_lines(folder)
    if label in lines:
        return lines[label]
    return max(lines.values(), key=lambda line: line.since, default=None)


def note(folder: Path, label: str, line: Line, *, again: bool, fixed: bool) -> None:
    """Write how a step came to a generation (driver only).

    ``again``: it was not its current result before. ``fixed``: an entry stays as it is, because somebody named or pinned the generation.
    """
    lines = read_lines(folder)
    old = lines.get(label)
    since = time.time() if again or old is None else old.since
    kept = old if old is not None and fixed else line
    new = kept.model_copy(update={"since": since, "finished": old is not None and old.finished})
    if new != old:
        _write(folder, {**lines, label: new})


def finish(folder: Path, label: str) -> None:
    """Note that a step is done with everything that there is (driver only)."""
    lines = read_lines(folder)
    if label in lines and not lines[label].finished:
        _write(folder, {**lines, label: lines[label].model_copy(update={"finished": True})})


def _write(folder: Path, lines: dict[str, Line]) -> None:
    with disk_errors(folder):
        write_atomically(folder / _FILE, _LINES.dump_json(lines))


def behind(project: Path, starts: Iterable[tuple[str, str | None]]) -> set[str]:
    """Places of some generations and of everything that they rest on.

    Parameters
    ----------
    project : Path
        Its folder.
    starts : iterable of (place, label)
        Without a label along every line on which the generation was come to.
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
