"""Whether two tasks with the same key compute the same thing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dask._task_spec import Alias, DataNode, GraphNode, NestedContainer, Task, TaskRef
from dask.tokenize import tokenize

_PLAIN = (str, bytes, int, float, complex, bool, type(None), slice)


class Comparison:
    """Compares tasks of one graph with those of a scheduler; functions and data that several tasks share are compared once.

    Dask's own comparison tokenizes both tasks, which takes ten times as long for the tasks that large graphs consist of.
    """

    def __init__(self) -> None:
        self._same: dict[tuple[int, int], bool] = {}
        self._kept: list[tuple[Any, Any]] = []  # what is compared by id must not be garbage-collected meanwhile

    def tasks(self, one: GraphNode, other: GraphNode) -> bool:
        """Whether two specifications do the same with the same inputs; how the inputs are made is not compared."""
        if type(one) is not type(other) or one.dependencies != other.dependencies:
            return False
        if isinstance(one, NestedContainer | Task):
            mine, its = one, other
            return (
                self.values(mine.func, its.func)  # type: ignore[attr-defined]
                and self.values(mine.args, its.args)  # type: ignore[attr-defined]
                and self.values(mine.kwargs, its.kwargs)  # type: ignore[attr-defined]
            )
        if isinstance(one, DataNode):
            return self.values(one.value, other.value)  # type: ignore[attr-defined]
        if isinstance(one, Alias):
            return bool(one.target == other.target)  # type: ignore[attr-defined]
        return self._by_token(one, other)

    def values(self, one: Any, other: Any) -> bool:
        """Whether two arguments, functions or containers are the same."""
        if one is other:
            return True
        if type(one) is not type(other):
            return False
        if isinstance(one, _PLAIN):
            return repr(one) == repr(other)  # 0.0 == -0.0, and a NaN is not itself
        if isinstance(one, TaskRef):
            return bool(one.key == other.key)
        if isinstance(one, GraphNode):
            return self.tasks(one, other)
        if type(one) in (tuple, list):
            return len(one) == len(other) and all(map(self.values, one, other))
        if type(one) is dict:
            return len(one) == len(other) and all(map(self.values, one, other)) and all(map(self.values, one.values(), other.values()))
        return self._by_token(one, other)

    def _by_token(self, one: Any, other: Any) -> bool:
        pair = id(one), id(other)
        if pair not in self._same:
            self._kept.append((one, other))
            self._same[pair] = tokenize(one) == tokenize(other)
        return self._same[pair]


def same_down_to_the_roots(
    key: Any,
    graph: Mapping[Any, GraphNode],
    tasks: Mapping[Any, Any],
    known: dict[Any, bool],
    compare: Callable[[GraphNode, GraphNode], bool],
) -> bool:
    """Whether a key of a graph computes what the scheduler's task of that key does, with all that leads to it.

    Parameters
    ----------
    known : dict
        Answers for keys of this graph; new ones are added.

    Notes
    -----
    Dask keeps all that leads to a wanted task, so there is always something to compare with. A dependency that is not in the graph
    is the task that the scheduler holds.
    """
    stack = [key]
    while stack:
        this = stack.pop()
        if this in known:
            if not known[this]:
                return False
            continue
        ts, spec = tasks.get(this), graph.get(this)
        if spec is None and ts is not None:
            known[this] = True
            continue
        known[this] = (
            ts is not None
            and spec is not None
            and ts.run_spec is not None
            and {d.key for d in ts.dependencies} == set(spec.dependencies)
            and compare(ts.run_spec, spec)
        )
        if not known[this]:
            return False
        stack.extend(spec.dependencies)  # type: ignore[union-attr]
    return True
