"""Software versions that a step was computed with: a run that continues with others warns, or is refused if so requested."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cryodask.errors import StoreError
from cryodask.store import environments
from cryodask.store.environments import Environment
from cryodask.store.files import disk_errors, write_atomically
from cryodask.store.generation import Generation


class MadeIn:
    """The environments of the iterations of a step, stored with its checkpoints: it may resume in another environment."""

    def __init__(self, generation: Generation) -> None:
        self._path = generation.path / "checkpoints" / "environments.json"
        self.found: list[dict[str, str]] = []
        with contextlib.suppress(OSError, ValueError):
            self.found = json.loads(self._path.read_text())

    def add(self, made_in: dict[str, str]) -> None:
        """Record the environment of an iteration."""
        if made_in not in self.found:
            self.found.append(made_in)
            with disk_errors(self._path):
                write_atomically(self._path, json.dumps(self.found))


def before_adding(label: str, project: Path, before: Iterable[Environment | str], *, same: bool) -> str:
    """A sentence if results of ``before`` (environments, or their ids) were computed with versions other than the current ones.

    Raises
    ------
    StoreError
        If they are required to be the ``same``.
    """
    now = environments.environment()
    known = (environments.read(project, one) if isinstance(one, str) else one for one in before)
    others = [one for one in known if one and one != now]
    if not others:
        return ""
    what = f"{label}: its results so far were computed with other versions ({environments.difference(others[0], now)})"
    if same:
        raise StoreError(
            f"{what}, and --same-environment was given.",
            "cryodask or a library was updated, or this is another machine",
            f"run it in the original environment, or recompute it with  --from {label}",
        )
    return f"{what}; new ones may differ in the last digits"


def lines(generations: dict[str, Generation]) -> list[str]:
    """Every environment of some steps, with its number of results; for ``cryodask info --environment``."""
    out = []
    for label, generation in generations.items():
        for name, count in environments.counts(generation.records().values()).most_common():
            made_in: dict[str, Any] = environments.read(generation.project, name)
            said = ", ".join(f"{key} {value}" for key, value in made_in.items()) or f"environment {name}, whose description is missing"
            out.append(f"{label:<14} {count} {'result' if count == 1 else 'results'}: {said}")
    return out
