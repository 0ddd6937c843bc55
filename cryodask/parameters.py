"""Parameters of a stage: their base, and marks that say what a parameter means to a plan."""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel

from cryodask.documents import StrictModel


class InputFileMark:
    """Marks a parameter that names a file whose content, not name, enters the key."""


InputFile = Annotated[str, InputFileMark()]


class MapFileMark(InputFileMark):
    """Marks a parameter that names an MRC file of a map or mask: it is read, and refused if it is none, before anything runs."""


MapFile = Annotated[str, MapFileMark()]


class SourceFileMark:
    """Marks a parameter that names a file or folder from which the plan makes exposures or particles; its name enters the key."""


SourceFile = Annotated[str, SourceFileMark()]


@dataclass(frozen=True)
class ChoiceMark:
    """Marks a parameter with manually chosen class numbers, which belong to one classification.

    ``numbers`` extracts them from a value that is not a list: part of the particles (``class2d``, ``class3d``) -> numbers.
    """

    numbers: Callable[[Any], Mapping[str, Sequence[int]]] | None = None


class ThresholdMark:
    """Marks the parameter of a picker that decides which peaks are accepted: a score, or "auto" for ``pick_threshold`` of the exposure.

    All peaks are stored with their scores, so it changes no identity and is not part of the key.
    """


class EffortMark:
    """Marks a parameter that limits time or memory, or says when the step runs, but does not affect results; not part of the key."""


class AddedMark:
    """Marks a parameter that a stage was given after it had results: at its default it is not part of the key, so they stay current."""


def marked_fields(model: type[BaseModel], mark: type) -> list[str]:
    """Names of the parameters that carry a mark, such as :class:`InputFileMark`."""

    def carries(annotation: Any, metadata: Iterable[Any]) -> bool:
        if any(m is mark or isinstance(m, mark) for m in metadata):
            return True
        return any(carries(arg, getattr(arg, "__metadata__", ())) for arg in typing.get_args(annotation))

    return [n for n, f in model.model_fields.items() if carries(f.annotation, f.metadata)]


class Params(StrictModel):
    """Base of the parameters of every stage: frozen, and unknown names and words for numbers are refused."""
