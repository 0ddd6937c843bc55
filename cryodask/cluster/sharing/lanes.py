"""The tree of shares: which lanes, users and projects have waiting tasks, who is served next, and usage. Plain data structures.

Start-time fair queueing (Goyal, Vin and Cheng 1996) over the levels clock, lane, user and project: at every level the child with the
smallest virtual time (seconds charged over weight) goes first. A clock is a kind of slot: threads, or a set of named resources.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from operator import attrgetter
from typing import Any

_turn = attrgetter("low_priority", "virtual")
"""Sort key of waiting nodes; the smallest is served first."""

Place = str | frozenset[str] | tuple[Any, ...] | None
"""Where a task may run: None anywhere; an address: preferably there; a frozenset: only there; a tuple: where these resources are free."""


class Share:
    """A node of the tree. Leaves hold tasks, in one heap per place.

    ``virtual``: seconds charged over weight, including tasks on workers at their estimate; ``settled``: finished tasks only;
    ``begun``: ``virtual`` when its last task was sent, the start tag of the paper.
    """

    __slots__ = (
        "ancestors", "begun", "children", "clock", "flying", "heaps", "held", "lane", "low_priority", "name", "parent", "settled",
        "several", "tag", "virtual", "waiting", "weight",
    )  # fmt: skip

    def __init__(self, name: str, weight: float = 1.0, parent: Share | None = None, *, strict: bool = False) -> None:
        self.name, self.weight, self.parent, self.low_priority = name, weight, parent, not strict
        # clock -> lane -> user -> project
        self.clock: Share = self if parent is None else parent.clock
        self.lane: Share = self if parent is None or parent.parent is None else parent.lane
        self.ancestors: tuple[Share, ...] = () if parent is None else (self, *parent.ancestors)  # itself first, up to the lane
        self.children: dict[str, Share] = {}
        self.waiting: list[Share] = []
        self.virtual = self.settled = self.begun = self.tag = 0.0
        self.held = self.flying = 0
        self.heaps: dict[Place, list[tuple[Any, int, Any]]] = {}
        self.several: list[frozenset[str]] = []

    def in_turn(self) -> list[Share]:
        """Children with waiting tasks, in the order of service."""
        if len(self.waiting) > 1:
            self.waiting.sort(key=_turn)
        return self.waiting

    def next_leaf(self) -> Share | None:
        """The leaf below this node to serve next."""
        node = self
        while waiting := node.waiting:
            if len(waiting) > 1:
                waiting.sort(key=_turn)
            node = waiting[0]
        return node if node.held else None

    def is_next(self) -> bool:
        """Whether this waiting leaf is next: at no level is a waiting sibling to be served before it."""
        above = self.clock
        for node in reversed(self.ancestors):
            if len(above.waiting) > 1 and _turn(node) > min(map(_turn, above.waiting)):
                return False
            above = node
        return True

    def leaves_in_turn(self) -> Iterator[Share]:
        """Waiting leaves below this node, in the order of service."""
        for child in list(self.in_turn()):
            if child.children:
                yield from child.leaves_in_turn()
            else:
                yield child

    def charge(self, seconds: float) -> None:
        """Charge time of tasks on workers to a leaf and all its ancestors."""
        for node in self.ancestors:
            node.virtual += seconds / node.weight

    def launch(self, seconds: float) -> None:
        """A task is sent to a worker: charge its estimate to a leaf and its ancestors, and count it at the leaf and the clock."""
        for node in self.ancestors:
            node.begun = node.virtual
            node.virtual += seconds / node.weight
        self.flying += 1
        self.clock.flying += 1

    def land(self, correction: float, settled: float) -> None:
        """A task has left its worker: correct its charge, and stop counting it."""
        for node in self.ancestors:
            node.virtual += correction / node.weight
            node.settled += settled / node.weight
        self.flying -= 1
        self.clock.flying -= 1

    def hold(self, *, first_in_place: bool = False) -> None:
        """Add a waiting task. A node that becomes active gets neither credit nor debt for the time before.

        It starts level with the active nodes: at what the others have settled, or at the last start tag if tasks of one of them
        took far longer than estimated, which is that node's debt alone. Start tags alone are not enough, because they count estimates.

        ``first_in_place``: it is the first task of its leaf in its place. Tasks that waited until then may have been bound to busy
        workers, and being behind for that reason gives no credit either.
        """
        node = self
        while (above := node.parent) is not None:
            if first_in_place or not node.held:
                rivals = [k for k in above.waiting if k is not node] or ([] if above.held else list(above.children.values()))
                rivals = [k for k in rivals if k is not node and k.low_priority == node.low_priority]
                floor = min(max(k.settled for k in rivals), max(k.begun for k in rivals)) if rivals else 0.0
                if node.virtual < floor:
                    node.settled += floor - node.virtual
                    node.virtual = node.begun = floor
            if not node.held:
                above.waiting.append(node)
            node.held += 1
            node = above
        node.held += 1

    def unhold(self) -> None:
        """Remove a waiting task."""
        node = self
        while (above := node.parent) is not None:
            node.held -= 1
            if not node.held:
                above.waiting.remove(node)
            node = above
        node.held -= 1

    def forget(self) -> None:
        """Reset all counts, here and below."""
        self.virtual = self.settled = self.begun = self.tag = 0.0
        for child in self.children.values():
            child.forget()

    def detach(self) -> None:
        """Remove this node, and parents without other children; lanes stay, with their usage."""
        node = self
        while node.parent is not None and node is not node.lane and not node.children:
            del node.parent.children[node.name]
            node = node.parent

    def start_tag(self) -> float:
        """Rank of a lane's next task on its worker: smaller runs first, ties keep Dask's own order.

        It follows the virtual time in steps of a quarter of the work in flight: consecutive tasks of a lane share it, and yet a lane that
        becomes active, which starts at what the others have settled, is ahead of all their tasks that have not started.
        """
        if self.virtual - self.tag > 0.25 * (self.virtual - self.settled):
            self.tag = self.virtual
        return self.tag


@dataclass
class Owner:
    """What a task is charged to: a project of a user in a lane, with a leaf on the clock of threads and on each clock of resources."""

    lane: str
    user: str
    project: str
    threads: Share
    others: dict[tuple[str, ...], Share] = field(default_factory=dict)

    @property
    def path(self) -> tuple[str, str, str]:
        """Lane, user, project."""
        return self.lane, self.user, self.project


@dataclass(frozen=True)
class LaneOptions:
    """Weight of a lane, and weights of users and projects within it (default 1)."""

    weight: float = 1.0
    users: dict[str, float] = field(default_factory=dict)
    projects: dict[str, float] = field(default_factory=dict)

    @classmethod
    def parse(cls, name: str, given: Any) -> LaneOptions:
        """From a number, or a mapping ``{"weight": 3, "users": {"anna": 2}, "projects": {"p1": 2}}``."""
        options = cls(**given) if isinstance(given, dict) else cls(float(given))
        bad = [w for w in (options.weight, *options.users.values(), *options.projects.values()) if not w > 0]
        if bad:
            raise ValueError(f"lane {name!r} has a weight of {bad[0]}, but weights must be positive; leave out the lane to close it")
        return options


class LaneQueue:
    """The tasks waiting on the scheduler, by leaf and place; replaces distributed's ``queued`` heap."""

    def __init__(self, leaf_of: Callable[[Any], Share]) -> None:
        self._leaf_of = leaf_of
        self._where: dict[Any, tuple[Share, Place, int]] = {}
        self._bound: set[Any] = set()
        self.near = 0
        """Tasks whose preferred worker is known, by worker."""
        self._sequence = count()

    def __len__(self) -> int:
        return len(self._where)

    def __iter__(self) -> Iterator[Any]:
        return iter(list(self._where))

    def __contains__(self, task: object) -> bool:
        return task in self._where

    def add(self, task: Any) -> None:
        """Add a task that may run anywhere, with distributed's interface."""
        if task not in self._where:
            self.put(task, self._leaf_of(task), None)

    def put(self, task: Any, leaf: Share, place: Place) -> None:
        """Add a waiting task."""
        number = next(self._sequence)
        heap = leaf.heaps.get(place)
        first_in_place = heap is None
        if heap is None:
            heap = leaf.heaps[place] = []
            if type(place) is frozenset:
                leaf.several.append(place)
        heapq.heappush(heap, (task.priority, number, task))
        self._where[task] = (leaf, place, number)
        if type(place) is str:
            self.near += 1
        elif type(place) is frozenset:
            self._bound.add(task)
        leaf.hold(first_in_place=first_in_place)

    def discard(self, task: Any) -> None:
        """Remove a task; its dead entry leaves the heap when it reaches the top."""
        entry = self._where.pop(task, None)
        if entry is not None:
            leaf, place, _ = entry
            if type(place) is str:
                self.near -= 1
            elif type(place) is frozenset:
                self._bound.discard(task)
            leaf.unhold()
            if not leaf.held:  # dead entries would keep their tasks alive
                leaf.heaps.clear()
                leaf.several.clear()

    def remove(self, task: Any) -> None:
        """Remove a task; KeyError if it is not waiting."""
        if task not in self._where:
            raise KeyError(task)
        self.discard(task)

    def top(self, leaf: Share, place: Place) -> tuple[Any, int, Any] | None:
        """First live entry of a heap, as (priority, number, task)."""
        heap = leaf.heaps.get(place)
        while heap:
            entry = self._where.get(heap[0][2])
            if entry is not None and entry[2] == heap[0][1]:
                return heap[0]
            heapq.heappop(heap)
        if heap is not None:
            del leaf.heaps[place]
            if type(place) is frozenset:
                leaf.several.remove(place)
        return None

    def best_at(self, leaf: Share, address: str) -> Any | None:
        """The leaf's most urgent task for this worker: among those that may run anywhere, prefer it, or are restricted to a set with it."""
        if len(leaf.heaps) == 1 and None in leaf.heaps:
            entry = self.top(leaf, None)
            return None if entry is None else entry[2]
        places: list[Place] = [p for p in (None, address) if p in leaf.heaps]
        if leaf.several:
            places += [p for p in leaf.several if address in p]
        best = None
        for place in places:
            entry = self.top(leaf, place)
            if entry is not None and (best is None or entry < best):
                best = entry
        return None if best is None else best[2]

    def place_of(self, task: Any) -> Place:
        """Place of a waiting task."""
        return self._where[task][1]

    def tasks_at(self, address: str) -> list[Any]:
        """Waiting tasks that prefer this worker."""
        return [task for task, (_, place, _) in self._where.items() if place == address]

    def restricted(self) -> list[Any]:
        """Waiting tasks that are restricted to some workers."""
        return list(self._bound)
