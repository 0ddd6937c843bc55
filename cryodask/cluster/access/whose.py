"""A scheduler on which a key has an owner: the person who first submitted it. Nobody else can change it.

Two people's tasks with the same key are one task if they compute the same thing; otherwise the second one is refused.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from contextvars import ContextVar
from itertools import chain
from typing import Any

from dask.utils import format_bytes
from distributed.diagnostics.plugin import SchedulerPlugin
from distributed.utils import offload

from cryodask.cluster.access.limits import LimitReached, Limits
from cryodask.cluster.access.peers import asking
from cryodask.cluster.access.same import Comparison, same_down_to_the_roots
from cryodask.cluster.fairshare import FairShareScheduler

NAMED_CLIENTS = ("published-", "variable-", "queue-")
"""Prefixes of the client names under which the scheduler itself wants what a dataset, a variable or a queue holds."""
FORGETFUL = "fire-and-forget"

_GRAPH_BYTES: ContextVar[int] = ContextVar("cryodask-graph-bytes", default=0)
_NUMBER = (int, float)
_MOST_KINDS = 10_000


class _Intake:
    """A graph of a person, some of whose tasks still exist."""

    __slots__ = ("each", "user")

    def __init__(self, user: str, each: float) -> None:
        self.user, self.each = user, each


class _MetadataOf(SchedulerPlugin):
    """Recorder of the metadata and the final states of one person's tasks."""

    def __init__(self, scheduler: OwningScheduler, name: str, user: str) -> None:
        self.scheduler, self.name, self.user = scheduler, name, user
        self.keys: set[Any] = set()
        self.metadata: dict[Any, Any] = {}
        self.state: dict[Any, str] = {}

    def update_graph(self, scheduler: Any, *, client: str, keys: set[Any], **kwargs: Any) -> None:
        """Called by distributed."""
        if self.scheduler.user_of(client) == self.user:
            self.keys.update(keys)

    def transition(self, key: Any, start: str, finish: str, *args: Any, **kwargs: Any) -> None:
        """Called by distributed."""
        if key in self.keys and finish in ("memory", "erred"):
            ts = self.scheduler.tasks.get(key)
            if ts is not None:
                self.metadata[key], self.state[key] = ts.metadata, finish
                self.keys.discard(key)


class OwningScheduler(FairShareScheduler):
    """A scheduler with lanes whose keys have owners."""

    def keep_owners(self, limits: Limits) -> None:
        """Start keeping owners."""
        self.limits = limits
        self._data_of: dict[Any, tuple[str | None, bytes]] = {}
        """Owner and digest of scattered data; the owner is None if a task scattered them."""
        self._scattering: dict[Any, tuple[str | None, bytes]] = {}
        self._intakes: dict[Any, _Intake] = {}
        self._graph_bytes: Counter[str] = Counter()
        self._known_before: set[Any] = set()
        self._kinds: dict[str, dict[str, None]] = {}
        self.handlers["start_task_metadata"] = self.start_task_metadata
        self.handlers["stop_task_metadata"] = self.stop_task_metadata

    # --- whose -------------------------------------------------------------------------------------------------------------------
    def user_of(self, client: str) -> str:
        """The user that a client's tasks belong to."""
        return self.path_of_client(client)[1]

    def is_bounded(self, client: str) -> bool:
        """Whether limits hold for a client."""
        return False

    def whose(self, key: Any) -> str | None:
        """The user to whom an existing key belongs; None for data that a task has scattered."""
        if key in self._data_of:
            return self._data_of[key][0]
        return self.owner_of(key).user

    def is_wanted_by(self, key: Any, user: str) -> bool:
        """Whether a client of a user wants an existing key."""
        return any(self.user_of(name) == user for name in self._clients_wanting(key))

    def _clients_wanting(self, key: Any) -> list[str]:
        return [cs.client_key for cs in self.tasks[key].who_wants or () if cs.client_key in self.client_comms]

    def may_use(self, key: Any, user: str) -> bool:
        """Whether a user may name a key: a new one, their own, or one that they have got through a dataset, a variable or a queue."""
        return key not in self.tasks or self.whose(key) in (user, None) or self.is_wanted_by(key, user)

    def may_want(self, key: Any, user: str) -> bool:
        """Whether a user's client may begin to want a key: as :meth:`may_use`, or what a dataset, a variable or a queue holds."""
        if self.may_use(key, user):
            return True
        return any(cs.client_key.startswith(NAMED_CLIENTS) for cs in self.tasks[key].who_wants or ())

    # --- graphs ------------------------------------------------------------------------------------------------------------------
    async def update_graph(self, client: str, expr_ser: Any, **rest: Any) -> None:  # type: ignore[override]
        """Like distributed's, but the graph counts toward its sender's limit as long as one of its tasks exists."""
        _GRAPH_BYTES.set(sum(memoryview(frame).nbytes for frame in getattr(expr_ser, "frames", ())))
        await super().update_graph(client=client, expr_ser=expr_ser, **rest)

    def _create_taskstate_from_graph(  # type: ignore[override]
        self, *, dsk: Mapping[Any, Any], client: str, keys: set[Any], submitting_task: Any = None, **rest: Any
    ) -> Any:
        if client not in self.clients:
            raise ValueError(f"{client} disconnected before its graph was accepted.")
        nested = submitting_task is not None and submitting_task in self.tasks
        user = (self.owner_of(submitting_task) if nested else self.owner_of_client(client)).user
        bounded = self.is_bounded(client)
        if bounded:
            self._check_form(dsk, rest)
            self._check_bounds(dsk, user)
        self._known_before = self._check_keys(dsk, keys, client, user)
        rest["actors"] = self._actors(rest.get("actors"), keys, dsk, user)
        new = [key for key in dsk if key not in self.tasks] if bounded else ()
        try:
            made = super()._create_taskstate_from_graph(dsk=dsk, client=client, keys=keys, submitting_task=submitting_task, **rest)
        except Exception:
            self._take_back(new, keys, client)
            raise
        finally:
            self._known_before = set()
        if new:
            self._count_graph(new, user)
        self._note_kinds(dsk, user)
        return made

    def _note_kinds(self, dsk: Mapping[Any, Any], user: str) -> None:
        kinds = self._kinds.setdefault(user, {})
        kinds.update(dict.fromkeys(self.tasks[key].prefix.name for key in dsk if key in self.tasks))
        while len(kinds) > _MOST_KINDS:
            del kinds[next(iter(kinds))]

    def own_kinds(self, user: str) -> list[str]:
        """Names of functions of which only this user has submitted tasks."""
        others = {kind for other, kinds in self._kinds.items() if other != user for kind in kinds}
        return [kind for kind in self._kinds.get(user, ()) if kind not in others]

    def _check_form(self, dsk: Mapping[Any, Any], rest: Mapping[str, Any]) -> None:
        """Raise TypeError for what would make distributed fail halfway through a graph."""
        ordered, given = rest.get("ordered") or {}, rest.get("user_priority", 0)
        each = given if isinstance(given, Mapping) else {None: given}
        if not (ordered.keys() >= dsk.keys() and _are_numbers(ordered.values()) and _are_numbers(each.values())):
            raise TypeError("The priorities of a graph are numbers, one for each task.")
        kinds = {"priority": _is_number, "retries": _is_count, "resources": _is_resources, "allowed_failures": _is_count, "lane": _is_word}
        many: dict[str, Iterable[Any]] = {name: values.values() for name, values in (rest.get("annotations_by_type") or {}).items()}
        for name, value in (rest.get("global_annotations") or {}).items():
            many[name] = [*many.get(name, ()), *([value(key) for key in dsk] if callable(value) else [value])]
        for name, values in many.items():
            if not all(kinds.get(name, lambda value: True)(value) for value in values if value is not None):
                raise TypeError(f"The annotation {name} has an invalid value.")
        if not _are_keys(dsk):
            raise TypeError("Keys are strings, numbers and tuples of them.")

    def _check_bounds(self, dsk: Mapping[Any, Any], user: str) -> None:
        if len(dsk) > self.limits.graph_tasks:
            raise ValueError(
                f"A graph of {len(dsk)} tasks is refused: this scheduler accepts at most {self.limits.graph_tasks} from a person "
                "(limits: graph_tasks).\n"
                "  Usual reason: the chunks are very small\n"
                "  What to do: use larger chunks, or submit in several parts"
            )
        if self._graph_bytes[user] + _GRAPH_BYTES.get() > self.limits.bytes:
            raise LimitReached(
                user,
                "bytes",
                format_bytes(self.limits.bytes),
                "in graphs with tasks that are here",
                "scatter large data, or load them in tasks",
            )

    def _check_keys(self, dsk: Mapping[Any, Any], keys: set[Any], client: str, user: str) -> set[Any]:
        """Keys of other users that this graph shares.

        Raises
        ------
        ValueError
            If a key is that of another user's task that does something else, or the graph uses another's task that its sender has not got.
        """
        for key in dsk.keys() & self._scattering.keys():
            raise ValueError(f"{self._scattering[key][0]} is scattering data under the key {key!r}.\n  What to do: choose another key")
        if not self._others and not self._data_of and (self._lone is None or self._lone.user == user):
            return set()
        outside = {key for spec in dsk.values() for key in spec.dependencies if key not in dsk} | (keys - dsk.keys())
        for key in outside:
            if not self.may_use(key, user) and client not in self._clients_wanting(key):
                raise ValueError(
                    f"The key {key!r} is that of a task of {self.whose(key)}, which this graph cannot use.\n"
                    "  Usual reason: your own task of that name was refused\n"
                    "  What to do: choose another key, or get their result through a dataset, a variable or a queue"
                )
        shared, known, comparison = set(), {}, Comparison()  # type: ignore[var-annotated]
        for key in dsk.keys() & self.tasks.keys():
            owner = self.whose(key)
            if owner == user:
                continue
            if not same_down_to_the_roots(key, dsk, self.tasks, known, comparison.tasks):
                raise ValueError(
                    f"The key {key!r} is that of {'a task' if self.tasks[key].run_spec is not None else 'data'} of {owner}, "
                    "and yours does something else.\n"
                    "  Usual reason: both of you chose the same name with key=\n"
                    "  What to do: choose another key, or leave key= out"
                )
            shared.add(key)
        return shared

    def _actors(self, actors: Any, keys: set[Any], dsk: Mapping[Any, Any], user: str) -> list[Any]:
        """Keys that become actors: all wanted ones, or some of the graph.

        Raises
        ------
        ValueError
            If one is shared with another user, or not of this graph.
        """
        wanted = list(keys) if actors is True else list(actors or ())
        for key in wanted:
            ts = self.tasks.get(key)
            if (key not in keys and key not in dsk) or (
                ts is not None and not ts.actor and (self.whose(key) != user or ts.state not in ("released", "waiting"))
            ):
                raise ValueError(f"The task {key!r} cannot become an actor: it exists already, or is not part of this graph.")
        return wanted

    def _take_back(self, new: Iterable[Any], keys: Iterable[Any], client: str) -> None:
        """Forget the tasks of a graph that could not be accepted as a whole."""
        if client in self.clients:
            self.client_releases_keys(keys=list(set(keys) & set(new)), client=client, stimulus_id="graph-refused")
        left = [self.tasks[key] for key in new if key in self.tasks]
        for ts in left:
            for dts in ts.dependencies:
                dts.dependents.discard(ts)
                if dts.waiters is not None:
                    dts.waiters.discard(ts)
        # nothing but each other depends on them
        self.transitions({ts.key: "forgotten" for ts in left if ts.state == "released"}, "graph-refused")

    def take_graph(self, client: str, keys: list[Any], lanes: Mapping[Any, str]) -> None:
        """Like FairShareScheduler's, but what another user has submitted before stays theirs."""
        if self._known_before:
            mine = [key for key in keys if key not in self._known_before]
            super().take_graph(client, mine, {key: lane for key, lane in lanes.items() if key not in self._known_before})
        else:
            super().take_graph(client, keys, lanes)

    def _count_graph(self, new: list[Any], user: str) -> None:
        intake = _Intake(user, _GRAPH_BYTES.get() / len(new))
        here = [key for key in new if key in self.tasks]
        self._intakes.update(dict.fromkeys(here, intake))
        self._graph_bytes[user] += round(intake.each * len(here))

    def _remove_key(self, key: Any) -> None:
        if self._data_of:
            self._data_of.pop(key, None)
        if self._intakes and (intake := self._intakes.pop(key, None)) is not None:
            left = self._graph_bytes[intake.user] - intake.each
            if left >= 1:
                self._graph_bytes[intake.user] = left  # type: ignore[assignment]
            else:
                del self._graph_bytes[intake.user]
        super()._remove_key(key)

    # --- data --------------------------------------------------------------------------------------------------------------------
    async def scatter(self, data: Any, workers: Any = None, client: str | None = None, **rest: Any) -> Any:  # type: ignore[override]
        """Like distributed's; data whose key exists already are shared if they are equal, and refused otherwise."""
        if not isinstance(data, dict) or not all(map(_is_key, data)) or client not in self.clients:
            raise TypeError("scatter takes a mapping of keys to data, from a client that is connected.")
        user, digests = self.user_of(client), {}
        for key, value in data.items():
            digests[key] = await _digest(value)
        new = {}
        for key, value in data.items():
            if self._is_shared(key, digests[key], user):
                self.client_desires_keys([key], client)
            else:
                new[key] = value
        entries = {key: (user, digests[key]) for key in new if key not in self._scattering}
        self._scattering.update(entries)
        try:
            if new:
                await super().scatter(new, workers, client, **rest)
                self._data_of.update({key: entry for key, entry in entries.items() if key in self.tasks})
        finally:
            for key in entries:
                self._scattering.pop(key, None)
        return list(data)

    def _is_shared(self, key: Any, digest: bytes, user: str) -> bool:
        """Whether equal data are on the workers already.

        Raises
        ------
        ValueError
            If the key is that of a task, or of other data of somebody else.
        """
        ts = self.tasks.get(key)
        there = self._scattering.get(key) if ts is None else self._data_of.get(key)
        if ts is None and there is None:
            return False
        if there is not None and there[1] == digest:
            return ts is not None and bool(ts.who_has)
        owner = there[0] if there is not None else self.whose(key)
        if owner != user or (ts is not None and (ts.run_spec is not None or ts.state != "memory")):
            raise ValueError(
                f"The key {key!r} is that of {'a task' if ts is not None and ts.run_spec is not None else 'other data'} of {owner}.\n"
                "  What to do: scatter with hash=False, or under another name"
            )
        return False

    def update_data(self, *, who_has: dict[Any, list[str]], nbytes: dict[Any, int], client: str | None = None) -> None:
        """Like FairShareScheduler's; what tasks scatter is nobody's, and cannot replace a task."""
        taken = [key for key in who_has if key in self.tasks and self.tasks[key].run_spec is not None]
        if taken:
            raise ValueError(f"The key {taken[0]!r} is that of a task of {self.whose(taken[0])}.\n  What to do: scatter under another name")
        fresh = [key for key in who_has if key not in self.tasks and key not in self._scattering]
        super().update_data(who_has=who_has, nbytes=nbytes, client=client)
        self._data_of.update({key: (None, b"") for key in fresh if key in self.tasks})

    # --- recordings --------------------------------------------------------------------------------------------------------------
    def start_task_metadata(self, name: str) -> None:
        """Like distributed's, but a person's recording has a name of its own, and contains only that person's tasks."""
        user = asking()
        if user is None:
            super().start_task_metadata(name)
            return
        name = recording(user, name)
        if name in self.plugins:
            raise ValueError("A recording of that name is running.")
        self.add_plugin(_MetadataOf(self, name, user), name=name)

    def stop_task_metadata(self, name: str | None = None) -> dict[str, Any]:
        """Like distributed's, for what :meth:`start_task_metadata` started."""
        user = asking()
        if user is None:
            return dict(super().stop_task_metadata(name))
        plugin = self.plugins.get(recording(user, name))
        if not isinstance(plugin, _MetadataOf):
            raise ValueError("There is no recording of that name.")
        self.remove_plugin(name=plugin.name)
        return {"metadata": plugin.metadata, "state": plugin.state}


def recording(user: str, name: Any) -> str:
    """Name of a person's recorder among the plugins of the scheduler."""
    return f"metadata of {user}: {str(name)[:100]}"


def _is_number(value: Any) -> bool:
    return type(value) in _NUMBER and value == value and abs(value) != float("inf")


def _are_numbers(values: Collection[Any]) -> bool:
    return set(map(type, values)) <= {int} or all(map(_is_number, values))  # the first is a tenth of the time


def _are_keys(keys: Collection[Any]) -> bool:
    kinds = set(map(type, keys))
    if kinds == {tuple}:
        kinds = set(map(type, chain.from_iterable(keys)))
    return kinds <= {str, int, float, bytes} or all(map(_is_key, keys))


def _is_count(value: Any) -> bool:
    return type(value) is int and abs(value) < 1 << 31


def _is_word(value: Any) -> bool:
    return type(value) is str


def _is_resources(value: Any) -> bool:
    return type(value) is dict and all(type(name) is str and _is_number(amount) and amount >= 0 for name, amount in value.items())


def _is_key(key: Any) -> bool:
    kind = type(key)
    return kind is str or kind in (int, float, bytes) or (kind is tuple and all(map(_is_key, key)))


async def _digest(value: Any) -> bytes:
    """Digest of scattered data as they came: frames, and how they are to be read."""
    header, frames = getattr(value, "header", None), getattr(value, "frames", ())

    def made() -> bytes:
        digest = hashlib.blake2b(repr(header).encode(), digest_size=16)
        for frame in frames:
            digest.update(frame)
        return digest.digest()

    return await offload(made) if frames else hashlib.blake2b(repr(value).encode(), digest_size=16).digest()
