"""Stage ``select``: particles for which an expression over their columns is true."""

from __future__ import annotations

import ast
import difflib
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any

import numpy as np
from pydantic import Field, field_validator

from cryodask.errors import InputError
from cryodask.products import ORIGINS, PARTS, Product, columns_of
from cryodask.stage import ChoiceMark, Output, Params, SetView, port, stage
from cryodask.stages._sets import kept_and_dropped
from cryodask.vocabulary import CTF_COLUMNS, OPTICS, VARIABLES

REASONS = {1: "the expression is false for it"}
"""Meaning of the numbers in ``removal_reason``."""

_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_FUNCTIONS: dict[str, Callable[[Any], Any]] = {"abs": np.abs, "isfinite": np.isfinite}
_LANGUAGE = "columns, numbers, comparisons, and, or, not, in (1, 2), + - * /, abs(), isfinite()"
_LONGEST = 10_000


def class_numbers(where: str) -> dict[str, list[int]]:
    """Class numbers that an expression names, by the part they belong to (``class2d``, ``class3d``).

    ``class_number > 0`` and the like only test whether a particle was classified at all, and are not a choice.
    """
    columns = {
        name: part
        for part in ("class2d", "class3d")
        for name in columns_of("particles", part)
        if VARIABLES[name].dtype.startswith(("i", "u"))
    }
    found: dict[str, set[int]] = {}
    for condition in _conditions(parse(where)):
        names = {columns[n.id] for n in ast.walk(condition) if isinstance(n, ast.Name) and n.id in columns}
        numbers = {n.value for n in ast.walk(condition) if isinstance(n, ast.Constant) and isinstance(n.value, (int, float))}
        if names and numbers - {0} and not _asks_whether_classified(condition):
            for part in names:
                found.setdefault(part, set()).update(int(n) for n in numbers)
    return {part: sorted(numbers) for part, numbers in found.items()}


def _conditions(node: ast.expr) -> list[ast.expr]:
    """The operands of ``and``, ``or`` and ``not``."""
    match node:
        case ast.BoolOp(values=values):
            return [c for value in values for c in _conditions(value)]
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return _conditions(operand)
    return [node]


def _asks_whether_classified(condition: ast.expr) -> bool:
    """Whether a condition is ``column >= 1``, ``column < 1``, or either with sides swapped: classes are numbered from 1."""
    match condition:
        case ast.Compare(left=ast.Name(), ops=[ast.GtE() | ast.Lt()], comparators=[ast.Constant(value=1)]):
            return True
        case ast.Compare(left=ast.Constant(value=1), ops=[ast.LtE() | ast.Gt()], comparators=[ast.Name()]):
            return True
    return False


class SelectParams(Params):
    """Parameters of ``select``."""

    where: Annotated[str, ChoiceMark(class_numbers)] = Field(
        description="which particles to keep, for example `class_number in (1, 3) and defocus_u_angstrom < 20000`. An expression of "
        f"{_LANGUAGE}. Comparisons with an unknown value (NaN) are false"
    )

    @field_validator("where")
    @classmethod
    def _form(cls, where: str) -> str:
        parse(where)
        return where


_ALWAYS = frozenset({"particle_id", "half_set", *OPTICS, *CTF_COLUMNS, *ORIGINS})
"""Columns of sets in addition to those of their parts: of their exposures, and positions relative to the box."""
_PLACED = frozenset({f"{what}_{axis}_angstrom" for what in ("position", "box") for axis in "yx"})


def _check_columns(params: SelectParams, inputs: dict[str, list[Product]]) -> Iterator[str]:
    particles = inputs["particles"][0]
    of_parts = {_in_sets(n): part for part in PARTS["particles"] for n in columns_of("particles", part)}
    for name in names_in(params.where):
        if name in _ALWAYS | _PLACED or of_parts.get(name) in particles.parts:
            continue
        there = sorted({n for n, part in of_parts.items() if part in particles.parts} | _ALWAYS)
        if name in of_parts:
            yield f"where uses {name}, but {particles.ref} has no {of_parts[name]}: no earlier step gives it."
        elif name in VARIABLES and VARIABLES[name].part.startswith("exposures."):
            yield f"where uses {name}, which belongs to exposures. Set a limit for it in select_exposures or curate."
        else:
            near = difflib.get_close_matches(name, there, 1, 0.6)
            yield f"where uses {name!r}, which is not a column of particles." + (f" Did you mean {near[0]!r}?" if near else "")
        return


_EVERY_PART = ", ".join(f"{part}?" for part in PARTS["particles"])


@stage(
    version=1,
    shape="set",
    needs=[],
    gives=[],
    ports=[port(f"particles[{_EVERY_PART}]", copies=True, subtracted=True, whole=True)],
    outputs=[Output("particles", "particles", on="particles", subset=True)],
    check=_check_columns,
    reasons=REASONS,
)
def select(params: SelectParams, inputs: dict[str, list[SetView]]) -> dict[str, Any]:
    """Keep the particles for which an expression over their columns is true.

    The expression may use every column of the set: positions, scores, classes, poses, its own CTF, scores of a sorter, annotations.
    Comparisons with an unknown value (NaN, or -1 in an integer column) are false, both == and !=; ``isfinite(column)`` tests whether a
    value is known. A number on its own is true if it is known and not 0.
    """
    view = inputs["particles"][0]
    columns = _columns(view, params.where)
    holds = evaluate(params.where, columns, len(view.ids))
    return kept_and_dropped(
        view.ids,
        np.where(holds, 0, 1).astype(np.int8),
        stage="select",
        usual_reason="the expression is false for all of them",
        way_out=f"check the values of {', '.join(names_in(params.where)) or 'the columns'} and change where",
    )


def _columns(view: SetView, where: str) -> dict[str, np.ndarray]:
    """The columns that an expression uses; all columns if the parts of one are unknown."""
    home = {_in_sets(name): part for part in view.parts for name in columns_of("particles", part)}
    names = names_in(where)
    if names and all(name in home for name in names):
        columns = view.read(sorted({home[name] for name in names}))
        if all(name in columns for name in names):
            return columns
    return view.read(None)


def _in_sets(name: str) -> str:
    """Name in particle sets of a variable of the vocabulary."""
    return name.removeprefix("particle_") if VARIABLES[name].part == "particles.ctf" else name


# --- the language --------------------------------------------------------------------------------------------------------------------
def parse(where: str) -> ast.expr:
    """Parse an expression into a tree.

    Raises
    ------
    ValueError
        If it is not a valid expression, or uses something that is not allowed.
    """
    text = " ".join(where.split())
    if not text:
        raise ValueError("where is empty; write an expression, for example class_number in (1, 3)")
    if len(text) > _LONGEST:
        raise ValueError(f"where has {len(text):,} characters; {_LONGEST:,} are allowed")
    try:
        tree = ast.parse(text, mode="eval").body
        _check(tree)
    except SyntaxError as error:
        near = f" near {text[max(error.offset - 6, 0) : error.offset + 6]!r}" if error.offset else ""
        raise ValueError(f"{text!r} is not an expression: {error.msg}{near}") from error
    except (RecursionError, MemoryError) as error:
        raise ValueError("where is nested too deeply") from error
    return tree


def _check(node: ast.expr) -> None:
    """Refuse everything that is not part of the language."""
    for part in _operands(node):
        _check(part)


def _operands(node: ast.expr) -> list[ast.expr]:
    """Subexpressions of a node.

    Raises
    ------
    ValueError
        For a node that is not part of the language.
    """
    match node:
        case ast.Name(id=name):
            if name in _FUNCTIONS:
                raise ValueError(f"{name} is a function; write {name}(column)")
            return []
        case ast.Constant(value=value):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ValueError(f"{value!r} is not a number")
            if abs(value) > 1e300:
                raise ValueError("a number is too large")
            return []
        case ast.BoolOp(values=values):
            return values
        case ast.UnaryOp(op=ast.Not() | ast.USub() | ast.UAdd(), operand=operand):
            return [operand]
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
            return [left, right]
        case ast.Compare(left=left, ops=ops, comparators=others):
            out = [left]
            for comparison, other in zip(ops, others):
                if isinstance(comparison, (ast.In, ast.NotIn)):
                    if not isinstance(other, ast.Tuple) or not other.elts:
                        raise ValueError(f"`in` needs a list of values, for example (1, 3) or (1,), not {ast.unparse(other)}")
                    out += other.elts
                elif type(comparison) in _COMPARISONS:
                    out.append(other)
                else:
                    raise ValueError(f"{ast.unparse(node)} uses `is`; write ==")
            return _only_at_the_end(out, ops, node)
        case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]) if name in _FUNCTIONS and not isinstance(argument, ast.Starred):
            return [argument]
    raise ValueError(f"{ast.unparse(node)} is not allowed; expressions consist of {_LANGUAGE}")


def _only_at_the_end(operands: list[ast.expr], ops: list[ast.cmpop], node: ast.expr) -> list[ast.expr]:
    """Refuse `in` before the end of a chain of comparisons, because a tuple is not a number."""
    if any(isinstance(op, (ast.In, ast.NotIn)) for op in ops[:-1]):
        raise ValueError(f"nothing can be compared with the list in {ast.unparse(node)}; join comparisons with `and`")
    return operands


def names_in(where: str) -> list[str]:
    """Columns that an expression uses, in order."""
    return list(dict.fromkeys(node.id for node in ast.walk(parse(where)) if isinstance(node, ast.Name) and node.id not in _FUNCTIONS))


def evaluate(where: str, columns: Mapping[str, np.ndarray], count: int) -> np.ndarray:
    """Mask `(count,)` of the particles for which an expression is true.

    Parameters
    ----------
    where : str
        See :class:`SelectParams`.
    columns : mapping of arrays `(count,)`
        Values of its names.
    count : int
        Number of particles.

    Raises
    ------
    InputError
        If the expression is invalid, or a name is not among the columns.
    """
    try:
        tree, used = parse(where), names_in(where)
    except ValueError as error:
        raise InputError(f"{error}.", "", f"use {_LANGUAGE}") from error
    known = sorted(name for name, values in columns.items() if values.ndim == 1 and values.dtype.kind in "iufb")
    for name in used:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, 0.6)
            raise InputError(
                f"select.where uses {name}, which is not a column of these particles." + (f" Did you mean {near[0]}?" if near else ""),
                "the step that gives the column is not an ancestor of these particles" if not near else "",
                f"use one of {', '.join(known)}" if known else "these particles have no columns",
            )
    values = {name: _as_float(columns[name]) for name in used}
    with np.errstate(all="ignore"):
        return np.broadcast_to(_true(_value(tree, values)), (count,)).copy()


def _as_float(values: np.ndarray) -> np.ndarray:
    """As float64, missing integers as NaN."""
    out = values.astype(np.float64)
    return np.where(values == -1, np.nan, out) if values.dtype.kind == "i" else out


def _true(value: Any) -> Any:
    """Truth of a condition, or of a number (known and not 0)."""
    value = np.asarray(value)
    return value if value.dtype == bool else ~np.isnan(value) & (value != 0)


def _number(value: Any) -> Any:
    return np.asarray(value, np.float64)


def _value(node: ast.expr, columns: Mapping[str, np.ndarray]) -> Any:
    """Value of a checked expression: float64 or bool, one per particle or a single one."""
    match node:
        case ast.Name(id=name):
            return columns[name]
        case ast.Constant(value=value):
            return np.float64(value)  # type: ignore[arg-type]
        case ast.BoolOp(op=op, values=values):
            join = np.logical_and if isinstance(op, ast.And) else np.logical_or
            out = _true(_value(values[0], columns))
            for other in values[1:]:
                out = join(out, _true(_value(other, columns)))
            return out
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return ~_true(_value(operand, columns))
        case ast.UnaryOp(op=op, operand=operand):
            number = _number(_value(operand, columns))
            return -number if isinstance(op, ast.USub) else number
        case ast.BinOp(left=left, op=op, right=right):
            return _ARITHMETIC[type(op)](_number(_value(left, columns)), _number(_value(right, columns)))
        case ast.Compare(left=left, ops=ops, comparators=others):
            return _compared(left, ops, others, columns)
        case ast.Call(func=ast.Name(id=name), args=[argument]):
            return _FUNCTIONS[name](_number(_value(argument, columns)))
    raise ValueError(f"{ast.unparse(node)} is not allowed")


def _compared(left: ast.expr, ops: list[ast.cmpop], others: list[ast.expr], columns: Mapping[str, np.ndarray]) -> Any:
    """A chain of comparisons; false for NaN, even with !=."""
    first, out = _number(_value(left, columns)), np.True_
    for op, other in zip(ops, others):
        if isinstance(op, (ast.In, ast.NotIn)):
            given = [_number(_value(e, columns)) for e in other.elts]  # type: ignore[attr-defined]
            inside = np.logical_or.reduce(np.broadcast_arrays(*(first == v for v in given)))
            holds = inside if isinstance(op, ast.In) else ~inside & ~np.isnan(first)
        else:
            second = _number(_value(other, columns))
            holds = _COMPARISONS[type(op)](first, second) & ~np.isnan(first) & ~np.isnan(second)
            first = second
        out = out & holds
    return out
