"""Quarantined exposures as text: those with the same reason are told together."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

_EXPLAINED = 20
"""Reasons that are printed in full; further ones take one line each."""
_NAMED = 3
_NUMBER = re.compile(r"\d+(?:\.\d+)?")


def reason_of(name: str, message: str) -> str:
    """A message without what belongs to one exposure: its name, the files named after it, and numbers."""
    own = re.compile(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])")
    return _NUMBER.sub("#", own.sub("*", message) if name else message)


def quarantined_lines(failures: Iterable[Mapping[str, Any]], *, every: bool = False) -> list[str]:
    """Lines about quarantined exposures: per step and reason their number, the first names, and the first message.

    Parameters
    ----------
    failures : iterable of mappings
        ``stage``, ``name``, ``error`` and ``message``, as :meth:`cryodask.store.project.Project.failures` gives them.
    every : bool
        Each exposure by itself, with its own message.
    """
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for failure in failures:
        own = failure["name"] if every else reason_of(str(failure["name"]), str(failure["message"]))
        groups.setdefault((failure["stage"], failure["error"], own), []).append(failure)
    out = []
    for number, alike in enumerate(groups.values(), 1):
        first, names = alike[0], [str(failure["name"]) for failure in alike]
        shown = ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
        head = f"quarantined in {first['stage']}: {f'{len(names)} exposures for one reason: ' if len(names) > 1 else ''}{shown}"
        told = [line.strip() for line in f"{first['error']}: {first['message']}".splitlines()]
        if number <= _EXPLAINED or every:
            out += [head, *(f"  {line}" for line in told)]
        else:
            out.append(f"{head}: {told[0]}")
    return out
