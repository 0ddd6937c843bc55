"""Which classes the parameters of a step choose."""

from __future__ import annotations

from collections.abc import Collection

from cryodask.parameters import ChoiceMark, Params, marked_fields


def chosen_classes(params: Params, parts: Collection[str]) -> dict[str, list[int]]:
    """Numbers of classes by the part of the particles (``class2d``, ``class3d``) to which they belong.

    A list of numbers means the classes in 2D where the particles have both.
    """
    chosen: dict[str, list[int]] = {}
    for name in marked_fields(type(params), ChoiceMark):
        value = getattr(params, name)
        if value is None:
            continue
        marks = (m for m in type(params).model_fields[name].metadata if isinstance(m, ChoiceMark))
        numbers = next((m.numbers for m in marks if m.numbers is not None), None)
        if numbers is not None:
            chosen |= {part: list(found) for part, found in numbers(value).items()}
        elif isinstance(value, list | tuple) and value and (part := next((p for p in ("class2d", "class3d") if p in parts), None)):
            chosen[part] = list(value)
    return chosen
