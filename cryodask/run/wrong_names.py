"""Readable messages for wrong values in a project file: one per name, from pydantic's errors."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

_ANOTHER_FORM = ("_type", "_parsing", "literal_error")
"""Suffixes of error types for a value of an altogether different form."""


def problems(error: ValidationError, model: type[BaseModel]) -> str:
    """Errors as sentences. For a value that matches none of several forms, only the errors of the closest form."""
    by_name: dict[Any, list[ErrorDetails]] = {}
    errors = error.errors()
    for found in (e for e in errors if not _misspelt(e, errors, model)):
        by_name.setdefault(next(iter(_written(model, found["loc"])), None), []).append(found)
    return "; ".join(sentence for group in by_name.values() for sentence in _of_one_name(group, model))


def _of_one_name(group: list[ErrorDetails], model: type[BaseModel]) -> list[str]:
    forms: dict[Any, list[ErrorDetails]] = {}
    for found in group:
        written = _written(model, found["loc"])
        form = next((step for step, name in zip(found["loc"], [*written, None, None]) if step != name), None)
        forms.setdefault(form if len(written) < len(found["loc"]) else None, []).append(found)
    if len(forms) == 1:
        return [_sentence(found, model) for found in group]
    fitting = [of_form for form, of_form in forms.items() if not all(_is_another(found, form) for found in of_form)]
    if fitting:
        nearest_form = max(fitting, key=lambda of_form: max(len(found["loc"]) for found in of_form))
        return [_sentence(found, model) for found in nearest_form]
    first, *others = dict.fromkeys(_sentence(found, model) for found in group)
    words = [text.partition(" should be ")[2].partition(" (given")[0] for text in others]
    return [first.replace(" (given", f", or {', or '.join(words)} (given", 1) if all(words) and others else first]


def _is_another(found: ErrorDetails, form: Any) -> bool:
    """Whether the value itself has another form; an error inside it means that it has this one."""
    return found["type"].endswith(_ANOTHER_FORM) and found["loc"][-1] == form


def _misspelt(found: ErrorDetails, errors: Iterable[ErrorDetails], model: type[BaseModel]) -> bool:
    """Whether a missing name was misspelt, which is reported anyway."""
    if found["type"] != "missing":
        return False
    beside = [e for e in errors if e["type"] == "extra_forbidden" and e["loc"][:-1] == found["loc"][:-1]]
    fields = [f for m in _models(model, _written(model, found["loc"])[:-1]) for f in m.model_fields]
    return any(nearest(str(e["loc"][-1]), fields) == f" Did you mean {found['loc'][-1]!r}?" for e in beside)


def _sentence(found: ErrorDetails, model: type[BaseModel]) -> str:
    path = _written(model, found["loc"])
    where = ".".join(map(str, path))
    if found["type"] == "extra_forbidden":
        return f"unknown name {where!r}.{nearest(str(path[-1]), _models(model, path[:-1])[-1].model_fields)}"
    whole = isinstance(found["input"], dict | list | BaseModel) and found["type"] == "value_error"
    got = "" if found["type"] == "missing" or whole else f" (given: {found['input']!r})"
    return f"{where + ': ' if where else ''}{found['msg'].removeprefix('Value error, ')}{got}"


def _written(model: type[BaseModel], location: tuple[Any, ...]) -> list[Any]:
    """The names and indices of a location as written, without pydantic's tags for the members of a union."""
    path: list[Any] = []
    for step in location:
        inside = _models(model, path)
        known = any(step in m.model_fields for m in inside)
        if isinstance(step, int) or known or (inside and step == location[-1] and "[" not in str(step)):
            path.append(step)
    return path


def _models(model: type[BaseModel], path: Iterable[Any]) -> list[type[BaseModel]]:
    """Models that the value at a path may be; empty if it is not a model."""
    here = [model]
    for step in path:
        if isinstance(step, int):
            continue
        fields = [m.model_fields[step] for m in here if step in m.model_fields]
        here = [m for f in fields for m in _in(f.annotation)]
    return here


def _in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for inner in typing.get_args(annotation) for m in _in(inner)]


def nearest(name: str, known: Iterable[str]) -> str:
    """`` Did you mean ...?`` for an unknown name, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""
