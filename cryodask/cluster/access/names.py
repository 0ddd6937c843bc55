"""Names of variables, queues, datasets, metadata, events, locks and topics: each belongs to the first person who writes to it.

Others can read it, but not change it; names that begin with ``shared/`` belong to everybody. What a person keeps under names is bounded.
Requests from tasks come with the certificate of a worker, belong to no person, and are not checked here.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Iterable
from time import monotonic
from typing import Any

from dask.utils import format_bytes

from cryodask.cluster.access.limits import LimitReached, Limits

SHARED = "shared/"
"""Prefix of names that anybody may write to."""
_LONGEST_NAME = 500
_LONGEST_TOPIC = 200
_EVENT_BYTES = 1 << 16
_MADE_SECONDS = 5.0
"""A name that was taken longer ago than this, and under which nothing exists, is free again."""

NAMED: dict[str, tuple[str, str, bool]] = {
    **{f"variable_{op}": ("variable", "name", op != "get") for op in ("set", "get", "delete")},
    "variable-future-release": ("variable", "name", True),
    "variable-future-received-confirm": ("variable", "name", False),
    **{f"queue_{op}": ("queue", "name", op != "qsize") for op in ("create", "put", "get", "qsize", "release")},
    "queue-future-release": ("queue", "name", True),
    **{f"event_{op}": ("event", "name", op in ("set", "clear")) for op in ("set", "clear", "wait", "is_set")},
    **{
        f"semaphore_{op}": ("lock or semaphore", "name", op != "value")
        for op in ("register", "acquire", "release", "close", "refresh_leases", "value")
    },
    **{f"lock_{op}": ("lock or semaphore", "name", op != "locked") for op in ("acquire", "release", "locked")},
    "multi_lock_acquire": ("lock of several", "locks", True),
}
"""By operation: the kind of name, the argument with it, and whether the operation writes."""

ENDS = frozenset({"variable_delete", "queue_release", "event_clear", "semaphore_close"})
"""Operations after which nothing may be left under a name."""


class Names:
    """Who owns which names, and what is kept under them.

    Parameters
    ----------
    limits : Limits
    existing : callable ``(kind) -> collection``
        The names of that kind under which something exists; names of things that are gone are free again.
    length : callable ``(queue) -> int``
        Number of items in a queue.
    """

    def __init__(self, limits: Limits, existing: Callable[[str], Collection[Any]], length: Callable[[str], int]) -> None:
        self._limits, self._existing, self._length = limits, existing, length
        self._owners: dict[tuple[str, str], tuple[str, float]] = {}
        self._count: Counter[str] = Counter()
        self._kept: dict[str, dict[tuple[Any, ...], int]] = defaultdict(dict)
        self._queued: dict[str, deque[tuple[str, int]]] = defaultdict(deque)
        self._topics: dict[str, set[str]] = defaultdict(set)
        self._writers: dict[str, str] = {}
        self._events: dict[str, deque[tuple[str, int]]] = {}
        self._event_bytes: Counter[str] = Counter()

    # --- whose -------------------------------------------------------------------------------------------------------------------
    def owner(self, kind: str, name: Any) -> str | None:
        """The person to whom a name belongs; None for nobody."""
        owner, since = self._owners.get((kind, str(name)), (None, 0.0))
        if owner is not None and monotonic() - since > _MADE_SECONDS and not self._exists(kind, name):
            self.free(kind, name)
            return None
        return owner

    def _exists(self, kind: str, name: Any) -> bool:
        there = self._existing(kind)
        return (type(name) is str and name in there) or str(name) in map(str, there)

    def check(self, user: str, kind: str, names: Iterable[Any], *, writes: bool) -> None:
        """Take names for a person who writes them.

        Raises
        ------
        PermissionError
            If one belongs to somebody else, or the person has too many.
        ValueError
            If one cannot be a name.
        """
        names = list(names)
        for name in names:
            if not _is_name(name):
                raise ValueError(f"The name of this {kind} is not a text, or a tuple of texts, of at most {_LONGEST_NAME} characters.")
            owner = self.owner(kind, name)
            if writes and owner not in (None, user) and not str(name).startswith(SHARED):
                raise PermissionError(
                    f"The {kind} {name!r} belongs to {owner}; changing it is refused to {user}.\n"
                    "  Usual reason: both of you chose the same name\n"
                    f"  What to do: choose another one, or one that begins with {SHARED}, which everybody may change"
                )
        if writes:
            for name in names:
                self._take(user, kind, str(name))

    def _take(self, user: str, kind: str, name: str) -> None:
        if (kind, name) in self._owners:
            return
        if self._count[user] >= self._limits.names:
            self._forget_gone(user)
        if self._count[user] >= self._limits.names:
            raise LimitReached(
                user,
                "names",
                self._limits.names,
                "names of variables, queues, datasets, events and locks",
                "delete some, or reuse names",
            )
        self._owners[kind, name] = user, monotonic()
        self._count[user] += 1

    def _forget_gone(self, user: str) -> None:
        """Free all names of a person under which nothing is left, in one pass: there may be tens of thousands."""
        old = monotonic() - _MADE_SECONDS
        names = [entry for entry, (owner, since) in self._owners.items() if owner == user and since < old]
        there = {kind: set(map(str, self._existing(kind))) for kind in {kind for kind, _ in names}}
        self._free({(kind, name) for kind, name in names if name not in there[kind]})

    def free(self, kind: str, name: Any) -> None:
        """Forget a name of something that is gone, and what was kept under it."""
        self._free({(kind, str(name))})

    def _free(self, gone: set[tuple[str, str]]) -> None:
        """Forget names of things that are gone, and what was kept under them."""
        for entry in gone:
            owner = self._owners.pop(entry, None)
            if owner is not None:
                self._count[owner[0]] -= 1
        for kept in self._kept.values():
            for what in [what for what in kept if what[:2] in gone]:
                del kept[what]

    def ends(self, kind: str, name: Any) -> None:
        """Note that a name is free as soon as nothing is left under it."""
        owner = self._owners.get((kind, str(name)))
        if owner is not None:
            self._owners[kind, str(name)] = owner[0], float("-inf")

    # --- how much ----------------------------------------------------------------------------------------------------------------
    def keep(self, user: str, what: tuple[Any, ...], size: int) -> None:
        """Count the bytes that a person keeps under a name, in place of what was there before.

        Raises
        ------
        LimitReached
        """
        kept = self._kept[user]
        self._check_bytes(user, size - kept.get(what, 0))
        if what not in kept and len(kept) >= self._limits.names:
            raise LimitReached(user, "names", self._limits.names, "names of metadata and datasets", "reuse names")
        for others in self._kept.values():
            others.pop(what, None)
        kept[what] = size

    def _check_bytes(self, user: str, more: int) -> None:
        if more > 0 and self._bytes(user) + more > self._limits.bytes:
            self._forget_gone(user)
            if self._bytes(user) + more > self._limits.bytes:
                raise LimitReached(
                    user, "bytes", format_bytes(self._limits.bytes), "in variables, queues, metadata and datasets",
                    "delete variables and datasets, empty queues; scatter large data, or write them to files",
                )  # fmt: skip

    def _bytes(self, user: str) -> int:
        queued = sum(size for sizes in self._queued.values() for owner, size in sizes if owner == user)
        return queued + sum(self._kept[user].values())

    def put(self, user: str, name: str, size: int) -> None:
        """Count bytes that are put into a queue.

        Raises
        ------
        LimitReached
        """
        for queue, sizes in list(self._queued.items()):
            left = self._length(queue)
            while len(sizes) > left:
                sizes.popleft()
            if not sizes:
                del self._queued[queue]
        self._check_bytes(user, size)
        self._queued[name].append((user, size))

    # --- events ------------------------------------------------------------------------------------------------------------------
    def topics(self, user: str, topics: Iterable[Any]) -> None:
        """Count the topics that a person writes to or reads.

        Raises
        ------
        LimitReached, ValueError
        """
        mine = self._topics[user]
        for topic in topics:
            if type(topic) is not str or len(topic) > _LONGEST_TOPIC:
                raise ValueError(f"A topic is a string of at most {_LONGEST_TOPIC} characters.")
            if topic not in mine and len(mine) >= self._limits.topics:
                raise LimitReached(user, "topics", self._limits.topics, "topics of events", "reuse them: they live as long as the cluster")
            mine.add(topic)

    def event(self, user: str, topics: list[str], size: int, most: int) -> None:
        """Count an event, of which a topic keeps at most ``most``; a topic belongs to the first person who writes to it.

        Raises
        ------
        LimitReached, PermissionError
        """
        for topic in topics:
            owner = self._writers.get(topic, user)
            if owner != user and not topic.startswith(SHARED):
                raise PermissionError(
                    f"The topic {topic!r} belongs to {owner}; writing to it is refused to {user}.\n"
                    f"  What to do: choose another one, or one that begins with {SHARED}"
                )
        if size > _EVENT_BYTES:
            raise LimitReached(user, "bytes", format_bytes(_EVENT_BYTES), "in an event", "write large things to a file, and log its name")
        if self._event_bytes[user] + size * len(topics) > self._limits.bytes:
            raise LimitReached(user, "bytes", format_bytes(self._limits.bytes), "in events", "log less, or smaller things")
        for topic in topics:
            self._writers.setdefault(topic, user)
            events = self._events.setdefault(topic, deque())
            events.append((user, size))
            self._event_bytes[user] += size
            if len(events) > most:
                writer, old = events.popleft()
                self._event_bytes[writer] -= old


def _is_name(name: Any) -> bool:
    if type(name) in (tuple, list):
        return bool(name) and len(repr(name)) <= _LONGEST_NAME and all(type(part) in (str, int) for part in name)
    return type(name) is str and 0 < len(name) <= _LONGEST_NAME
