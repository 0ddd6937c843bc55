"""What one person may put into a shared scheduler."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from dask.utils import parse_bytes


@dataclass(frozen=True)
class Limits:
    """Bounds per person; the owner of a cluster has none.

    Parameters
    ----------
    bytes : int
        Bytes of each of: variables, queues, metadata and datasets together; graphs with unfinished or kept tasks; results in transit
        through the scheduler; events that the scheduler keeps.
    names : int
        Names of variables, queues, datasets, metadata, events, locks and semaphores.
    topics : int
        Topics of events written or subscribed to.
    clients, recorders, connections : int
        At any one time. Recorders are recordings of task metadata and samplers of memory.
    graph_tasks : int
        Tasks of one graph.
    """

    bytes: int = 256 << 20
    names: int = 10_000
    topics: int = 1_000
    clients: int = 64
    recorders: int = 8
    connections: int = 256
    graph_tasks: int = 50_000

    @classmethod
    def of(cls, given: Mapping[str, Any] | None) -> Self:
        """From the section ``limits`` of a cluster file.

        Raises
        ------
        ValueError
            If a name is unknown or a number is not positive.
        """
        known = {field.name for field in fields(cls)}
        made = {name: parse_bytes(value) if name == "bytes" else value for name, value in (given or {}).items()}
        wrong = [f"{name}: {value}" for name, value in made.items() if name not in known or type(value) is not int or value < 1]
        if wrong:
            raise ValueError(f"limits has {', '.join(wrong)}; it takes positive numbers for {', '.join(sorted(known))}")
        return cls(**made)


class LimitReached(PermissionError):
    """A person has as much of something as the cluster file allows."""

    def __init__(self, person: str, limit: str, most: Any, what: str, way_out: str) -> None:
        super().__init__(
            f"{person} has reached a limit of this scheduler: {most} {what} (limits: {limit}).\n"
            "  Usual reason: things that are no longer needed, or a loop that creates new ones\n"
            f"  What to do: {way_out}; or ask the owner for a higher limit"
        )

    def __reduce__(self) -> Any:
        return PermissionError, self.args
