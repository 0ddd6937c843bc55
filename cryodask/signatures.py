"""Check that the runners can call the functions of a stage, when it is registered rather than on a worker."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

_HIDDEN = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)

BLOCKS = {
    "start": ("params", "particles", "inputs"),
    "load": ("params", "state", "block", "context"),
    "cache_key": ("params", "state"),
    "prepare": ("params", "state", "half", "context"),
    "expect": ("params", "state", "shared", "block", "previous", "context"),
    "maximise": ("params", "state", "sums", "context"),
    "finished": ("params", "state"),
    "result": ("params", "state", "columns"),
}
TOURNAMENT = {
    "select": ("params", "particles"),
    "seeds": ("params",),
    "chain": ("params", "particles", "seed", "context"),
    "finish": ("params", "particles", "chains", "context"),
}


def problems(shape: str, functions: Any, needs: Sequence[str], optional: Sequence[str]) -> Iterator[str]:
    """What keeps a runner from calling the functions of a stage of this shape, one sentence each."""
    if shape in ("map", "whole"):
        yield from _of_function(functions, ("params",), ("context", *needs, *optional))
    elif shape == "set":
        yield from _of_function(functions, ("params", "inputs"), ())
    else:
        for name, given in (BLOCKS if shape == "blocks" else TOURNAMENT).items():
            function = getattr(functions, name, None)
            if not callable(function):
                yield f"it has no function {name}({', '.join(given)})"
            else:
                yield from _of_function(function, given, ())
        if shape == "blocks" and getattr(functions, "halves", None) not in (1, 2):
            yield "halves must be 1 or 2: whether the half-sets are in separate blocks"


def _of_function(function: Callable[..., Any], positional: Sequence[str], named: Sequence[str]) -> Iterator[str]:
    """Problems of a function that is called with some values by position and others by name."""
    called = f"{function.__name__}({', '.join([*positional, *(['*'] if named else []), *named])})"
    signature = inspect.signature(function)
    hidden = [str(p) for p in signature.parameters.values() if p.kind in _HIDDEN]
    if hidden:
        # the arguments of a stage are part of its documentation, and a misspelt name would pass unnoticed
        yield f"{function.__name__} hides its arguments behind {' and '.join(hidden)}; spell them out: {called}"
        return
    try:
        signature.bind(*positional, **dict.fromkeys(named))
    except TypeError as error:
        yield f"it is called as {called}, and {function.__name__}{signature} cannot be called like that: {error}"
