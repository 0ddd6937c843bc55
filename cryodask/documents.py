"""The YAML files that people write: project files, cluster files, blueprints.

Words are never taken for numbers. PyYAML follows YAML 1.1, in which ``yes`` is true, ``017`` is fifteen, ``1:30`` is ninety, ``12_000`` is
a number, ``2026-11-30`` is a date, ``1e4`` is a word, and the second of two equal keys wins.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

from cryodask.errors import ProjectFileError

_DIGITS = r"(?:0|[1-9][0-9]*)"
_WHOLE = re.compile(rf"-?{_DIGITS}$")
_NUMBER = re.compile(rf"[-+]?(?:{_DIGITS}(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?$")
_ODD = re.compile(r"\.(inf|nan)", re.IGNORECASE)
_VARIABLE = re.compile(r"\$(?:[A-Za-z_]\w*|\{[^}]*\})")


class _Loader(yaml.SafeLoader):
    """A loader for which only plain decimal numbers are numbers, only ``true`` and ``false`` truth values, and keys are unique."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[Any, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                raise yaml.MarkedYAMLError(problem=f"{key.value!r} is given twice, in lines {lines[key.value]} and {line}")
            lines[key.value] = line
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("null", r"(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("merge", r"<<$", "<"),
    ("int", _WHOLE.pattern, "-0123456789"),
    ("float", rf"{_NUMBER.pattern}|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$", "-+.0123456789"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))
_Loader.add_constructor(
    "tag:yaml.org,2002:float", lambda loader, node: float(node.value.lower().replace(".inf", "inf").replace(".nan", "nan"))
)


def read_yaml(path: str | Path, what: str) -> Any:
    """The content of a YAML file in UTF-8; ``what`` it should be, such as "project file", for the errors.

    Raises
    ------
    ProjectFileError
        If it cannot be read, is not valid YAML, gives a key twice, or has a value that contains itself.
    """
    try:
        content = yaml.load(Path(path).read_bytes(), _Loader)
        _check_finite(content, set(), set())
    except FileNotFoundError:
        raise ProjectFileError(f"There is no {what} {path}.", "", "give the path of a .yaml file") from None
    except OSError as error:
        raise ProjectFileError(f"{path} cannot be read: {error.strerror}.", "", f"give the path of a {what} that you may read") from None
    except RecursionError:
        raise ProjectFileError(f"{path} is not a valid {what}: it is nested too deeply.", "", "check its brackets") from None
    except (UnicodeDecodeError, ValueError, yaml.YAMLError) as error:
        raise ProjectFileError(f"{path} is not a valid {what}: {_said(error)}.", "", "fix it and rerun") from None
    return content


def _check_finite(value: Any, above: set[int], done: set[int]) -> None:
    """Raise ValueError if a value contains itself, as ``&x [*x]`` does: nothing that walks through it would come to an end."""
    if not isinstance(value, dict | list) or id(value) in done:
        return
    if id(value) in above:
        raise ValueError("a value contains itself, by an alias (*) within its own anchor (&)")
    above.add(id(value))
    for one in value.values() if isinstance(value, dict) else value:
        _check_finite(one, above, done)
    above.remove(id(value))
    done.add(id(value))


def _said(error: Exception) -> str:
    if not isinstance(error, yaml.MarkedYAMLError):
        return " ".join(str(error).split()).rstrip(".")
    mark = error.problem_mark or error.context_mark
    return f"{error.problem or error.context}{f' (line {mark.line + 1})' if mark else ''}"


class StrictModel(BaseModel):
    """Base of everything that people set in such files: frozen, without unknown names, and with numbers that are numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _a_word_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        kinds = set(_kinds(cls.model_fields[info.field_name or ""].annotation))
        if type(value) is int and str in kinds and not kinds & {int, float, Any}:
            return str(value)  # a session called 20261130
        if kinds & {int, float}:
            for one in _scalars(value):
                if isinstance(one, bool) and not kinds & {bool, Any}:
                    raise ValueError("true and false are not numbers")
                if isinstance(one, str) and not kinds & {str, Any} and _python_reads(one) and not _NUMBER.match(one):
                    raise ValueError("is not a plain decimal number")
        return value


def _kinds(annotation: Any) -> Iterator[Any]:
    """The plain types that an annotation admits at any depth."""
    inner = get_args(annotation)
    if not inner:
        yield annotation
    elif get_origin(annotation) is Annotated:
        yield from _kinds(inner[0])
    else:
        for one in inner:
            yield from _kinds(one)


def _scalars(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for one in value:
            yield from _scalars(one)
    else:
        yield value


def _python_reads(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def expand(path: str) -> str:
    """A path with ``~`` and environment variables replaced.

    Raises
    ------
    ValueError
        If a variable is not set, a person unknown, or a byte is zero, which no path can have.
    """
    if "\0" in path:
        raise ValueError("a path cannot contain a zero byte")
    full = os.path.expanduser(os.path.expandvars(path))
    unset = _VARIABLE.search(full)
    if unset and unset[0] in path:
        raise ValueError(f"the environment variable {unset[0]} is not set")
    if full.startswith("~"):
        raise ValueError(f"{path.partition('/')[0]} is not the home folder of any user of this machine")
    return full
