"""The tree of shares: who waits, who is served next, who has used how much. Plain data structures; the scheduler drives them.

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

_turn = attrgetter("late", "virtual")
"""Of two nodes that wait, the one that is smaller in this is served first."""

Place = str | frozenset[str] | tuple[Any, ...] | None
"""Where a task may run: None anywhere, an address best there, a frozenset only there, a tuple wherever its resources are free."""


class Share:
    """A node of the tree. Leaves hold tasks, in one heap a place.

    ``virtual`` is seconds charged over weight, tasks on workers included at their estimate; ``settled`` counts finished ones only;
    ``begun`` is what ``virtual`` was when its last task was sent: the start tag of the paper.
    """

    __slots__ = (
        "begun", "clock", "flying", "heaps", "held", "kids", "lane", "late", "line", "name", "parent", "settled", "several", "tag",
        "virtual", "waiting", "weight",
    )  # fmt: skip

    def __init__(self, name: str, weight: float = 1.0, parent: Share | None = None, *, strict: bool = False) -> None:
        self.name, self.weight, self.parent, self.late = name, weight, parent, not strict
        # clock -> lane -> user -> project
        self.clock: Share = self if parent is None else parent.clock
        self.lane: Share = self if parent is None or parent.parent is None else parent.lane
        self.line: tuple[Share, ...] = () if parent is None else (self, *parent.line)  # up to the lane
        self.kids: dict[str, Share] = {}
        self.waiting: list[Share] = []
        self.virtual = self.settled = self.begun = self.tag = 0.0
        self.held = self.flying = 0
        self.heaps: dict[Place, list[tuple[Any, int, Any]]] = {}
        self.several: list[frozenset[str]] = []

    def in_turn(self) -> list[Share]:
        """Children that wait, the next to be served first."""
        if len(self.waiting) > 1:
            self.waiting.sort(key=_turn)
        return self.waiting

    def next_leaf(self) -> Share | None:
        """The leaf below this node that is to be served next."""
        node = self
        while waiting := node.waiting:
            if len(waiting) > 1:
                waiting.sort(key=_turn)
            node = waiting[0]
        return node if node.held else None

    def is_next(self) -> bool:
        """Whether it is the turn of this leaf, which waits: at no level a sibling that waits, too, is to be served before."""
        above = self.clock
        for node in reversed(self.line):
            if len(above.waiting) > 1 and _turn(node) > min(map(_turn, above.waiting)):
                return False
            above = node
        return True

    def leaves_in_turn(self) -> Iterator[Share]:
        """Leaves that wait below this node, in the order in which they are to be served."""
        for kid in list(self.in_turn()):
            if kid.kids:
                yield from kid.leaves_in_turn()
            else:
                yield kid

    def charge(self, seconds: float) -> None:
        """Count time used by tasks that are on workers, against a leaf and all above it."""
        for node in self.line:
            node.virtual += seconds / node.weight

    def launch(self, seconds: float) -> None:
        """A task goes to a worker: charge its estimate to a leaf and all above it, and count it at the leaf and the clock."""
        for node in self.line:
            node.begun = node.virtual
            node.virtual += seconds / node.weight
        self.flying += 1
        self.clock.flying += 1

    def land(self, correction: float, settled: float) -> None:
        """A task has left its worker: charge what it took beyond what it was charged for (or less), and count it no more."""
        for node in self.line:
            node.virtual += correction / node.weight
            node.settled += settled / node.weight
        self.flying -= 1
        self.clock.flying -= 1

    def hold(self, *, anew: bool = False) -> None:
        """One more task waits. A node that begins to wait gets neither credit nor debt for the time before.

        It starts with those that are being served: at what the others have settled, or at the last start tag where tasks of one of them
        took far longer than was thought, which is that one's debt alone. Start tags do not serve by themselves: they count estimates.

        ``anew``: it is the first of its leaf in its place. What waited until then may have been bound to workers that were busy, and being
        behind for that reason is no credit either.
        """
        node = self
        while (above := node.parent) is not None:
            if anew or not node.held:
                rivals = [k for k in above.waiting if k is not node] or ([] if above.held else list(above.kids.values()))
                rivals = [k for k in rivals if k is not node and k.late == node.late]
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
        """One task fewer waits."""
        node = self
        while (above := node.parent) is not None:
            node.held -= 1
            if not node.held:
                above.waiting.remove(node)
            node = above
        node.held -= 1

    def forget(self) -> None:
        """Begin to count anew, here and below."""
        self.virtual = self.settled = self.begun = self.tag = 0.0
        for kid in self.kids.values():
            kid.forget()

    def detach(self) -> None:
        """Leave the tree, and take along parents that have no other child; lanes stay, with what they have used."""
        node = self
        while node.parent is not None and node is not node.lane and not node.kids:
            del node.parent.kids[node.name]
            node = node.parent

    def start_tag(self) -> float:
        """Rank of a lane's next task on its worker: smaller runs first, equal leaves Dask's own order.

        It follows the virtual time in steps of a quarter of what is in flight: consecutive tasks of a lane share it, and still a lane that
        comes anew, which starts at what the others have settled, is ahead of everything of theirs that has not begun.
        """
        if self.virtual - self.tag > 0.25 * (self.virtual - self.settled):
            self.tag = self.virtual
        return self.tag


@dataclass
class Owner:
    """Who pays for a task: a project of a user in a lane, with a leaf on the clock of threads and one on each clock of resources."""

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
    """Weight of a lane, and weights of users and projects inside it (1 if not named)."""

    weight: float = 1.0
    users: dict[str, float] = field(default_factory=dict)
    projects: dict[str, float] = field(default_factory=dict)

    @classmethod
    def parse(cls, name: str, given: Any) -> LaneOptions:
        """From a number, or a mapping ``{"weight": 3, "users": {"anna": 2}, "projects": {"p1": 2}}``."""
        options = cls(**given) if isinstance(given, dict) else cls(float(given))
        bad = [w for w in (options.weight, *options.users.values(), *options.projects.values()) if not w > 0]
        if bad:
            raise ValueError(f"lane {name!r} has a weight of {bad[0]}: weights are positive; leave the lane out to close it")
        return options


class LaneQueue:
    """The set of tasks that wait on the scheduler; stands in for distributed's ``queued`` heap, and knows who holds what where."""

    def __init__(self, leaf_of: Callable[[Any], Share]) -> None:
        self._leaf_of = leaf_of
        self._where: dict[Any, tuple[Share, Place, int]] = {}
        self._bound: set[Any] = set()
        self.near = 0
        """Tasks that wait for one worker as their best place."""
        self._sequence = count()

    def __len__(self) -> int:
        return len(self._where)

    def __iter__(self) -> Iterator[Any]:
        return iter(list(self._where))

    def __contains__(self, task: object) -> bool:
        return task in self._where

    def add(self, task: Any) -> None:
        """Let a task wait that may run anywhere, as distributed itself does it."""
        if task not in self._where:
            self.put(task, self._leaf_of(task), None)

    def put(self, task: Any, leaf: Share, place: Place) -> None:
        """Let a task wait for its turn."""
        number = next(self._sequence)
        heap = leaf.heaps.get(place)
        anew = heap is None
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
        leaf.hold(anew=anew)

    def discard(self, task: Any) -> None:
        """Take a task out; its dead entry leaves the heap when it comes to the top."""
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
        """Take a task out; KeyError if it does not wait."""
        if task not in self._where:
            raise KeyError(task)
        self.discard(task)

    def top(self, leaf: Share, place: Place) -> tuple[Any, int, Any] | None:
        """First entry of a heap that still waits, as (priority, number, task)."""
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
        """The leaf's most urgent task among those that may run anywhere, best here, or here as one of a few."""
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
        """Where a waiting task may run."""
        return self._where[task][1]

    def tasks_at(self, address: str) -> list[Any]:
        """Tasks that wait for this worker as their best place."""
        return [task for task, (_, place, _) in self._where.items() if place == address]

    def restricted(self) -> list[Any]:
        """Tasks that may run on some workers only."""
        return list(self._bound)
