"""What a person's requests may contain: whose keys and names, and how much. Operations as a whole are allowed or not in ``gate.py``."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import TYPE_CHECKING, Any

from dask.utils import format_bytes, parse_timedelta

from cryodask.cluster.access.gate import FORWARDED, REPORTS
from cryodask.cluster.access.limits import LimitReached
from cryodask.cluster.access.names import ENDS, NAMED, Names
from cryodask.cluster.access.whose import FORGETFUL, recording

if TYPE_CHECKING:
    from cryodask.cluster.guard import GuardedScheduler

EVERYBODY_READS = frozenset({"all", "scheduler", "print", "warn", "stealing"})
"""Topics that the scheduler writes to, or whose events every client unpickles."""
_MOST_ANNOUNCED = 10_000_000
_SHORTEST_SAMPLES_SECONDS = 0.1
_CONFIRMED_SECONDS = 60.0
_MOST_FLUSHES = 1000


class Orders:
    """Checks the requests of people.

    Parameters
    ----------
    scheduler : GuardedScheduler
    """

    def __init__(self, scheduler: GuardedScheduler) -> None:
        self._scheduler = scheduler
        self.names = Names(scheduler.limits, self._existing, self._length)
        self._recorders: dict[str, dict[str, str | None]] = {}
        self._fetching: Counter[str] = Counter()
        self._locking: dict[Any, str] = {}

    def _existing(self, kind: str) -> Collection[Any]:
        extensions = self._scheduler.extensions
        there: dict[str, Callable[[], Collection[Any]]] = {
            "variable": lambda: extensions["variables"].variables,
            "queue": lambda: extensions["queues"].queues,
            "dataset": lambda: extensions["publish"].datasets,
            "metadata": lambda: self._scheduler.task_metadata,
            "event": lambda: extensions["events"]._events,
            "lock or semaphore": lambda: extensions["semaphores"].max_leases,
            "lock of several": lambda: [lock for lock, users in extensions["multi_locks"].locks.items() if users],
        }
        return there[kind]()

    def _length(self, queue: str) -> int:
        made = self._scheduler.extensions["queues"].queues.get(queue)
        return 0 if made is None else made.qsize()

    # --- keys --------------------------------------------------------------------------------------------------------------------
    def check_own(self, user: str, what: str, keys: Iterable[Any]) -> None:
        """Raise PermissionError if one of the keys belongs to a task or data of another user."""
        scheduler = self._scheduler
        for key in _listed(keys):
            if key in scheduler.tasks and scheduler.whose(key) not in (user, None):
                raise PermissionError(
                    f"{what} {key!r} is refused to {user}: it belongs to {scheduler.whose(key)}.\n"
                    "  What to do: leave it to its owner, who submitted it first"
                )

    def _refuse_unwanted(self, user: str, client: str, keys: list[Any]) -> list[Any]:
        """Keys that a user's client may want; futures of the others fail, and the rest of them is not affected."""
        scheduler = self._scheduler
        for key in keys:
            if not scheduler.may_want(key, user):
                error = PermissionError(
                    f"The result of {key!r} is refused to {user}: it belongs to {scheduler.whose(key)}.\n"
                    "  What to do: ask for it as a dataset, a variable or an item of a queue"
                )
                scheduler.let_fail(client, [key], error)
        return [key for key in keys if scheduler.may_want(key, user)]

    def _check_given(self, user: str, keys: Iterable[Any]) -> None:
        """Raise PermissionError if one of the keys is neither the user's nor wanted by one of their clients."""
        for key in _listed(keys):
            if not self._scheduler.may_use(key, user):
                self.check_own(user, "Keeping or fetching", [key])

    # --- requests ----------------------------------------------------------------------------------------------------------------
    def check(self, user: str, op: str, message: dict[str, Any], size: int) -> None:
        """Check a request, and change what must not stay as it is.

        Raises
        ------
        PermissionError, ValueError, TypeError
        """
        check = getattr(self, f"_{op}", None)
        if check is not None:
            check(user, message, size)
        if op in NAMED:
            self._check_named(user, op, message, size)

    def _check_named(self, user: str, op: str, message: dict[str, Any], size: int) -> None:
        kind, field, writes = NAMED[op]
        given: Any = message.get(field)
        names = _sequence(given) if field == "locks" else [given]
        if kind in ("variable", "queue") and type(given) is not str:
            raise ValueError(f"The name of a {kind} is a string.")
        if op in ("variable_set", "queue_put") and (key := message.get("key")) is not None:
            self._check_given(user, [key])
        self.names.check(user, kind, names, writes=writes)
        if op in ENDS:
            self.names.ends(kind, given)
        if op == "variable_set":
            self.names.keep(user, ("variable", given), size)
        elif op == "queue_put":
            self.names.put(user, given, size)
        elif op == "queue_create" and type(message.get("maxsize", 0)) is not int:
            raise TypeError("The size of a queue is a whole number.")
        elif op == "semaphore_register" and not (type(message.get("max_leases")) is int and message["max_leases"] > 0):
            raise TypeError("The number of leases is a whole number above 0.")
        elif op == "semaphore_acquire" and len(repr(message.get("lease_id"))) > 200:
            raise ValueError("The name of a lease has at most 200 characters.")

    def _multi_lock_acquire(self, user: str, message: dict[str, Any], size: int) -> None:
        locks, number = _listed(message.get("locks")), message.get("num_locks")
        if len(set(locks)) != len(locks) or type(number) is not int or not 0 < number <= len(locks):
            raise TypeError("A lock of several names takes distinct names, and the number of them that is needed.")
        held = self._scheduler.extensions["multi_locks"].requests
        self._locking = {name: owner for name, owner in self._locking.items() if name in held}
        if message.get("id") in held or type(message.get("id")) is not str or len(message["id"]) > 200:
            raise ValueError("This lock has been requested already, or its id is invalid.")
        self._locking[message["id"]] = user

    def _multi_lock_release(self, user: str, message: dict[str, Any], size: int) -> None:
        if self._locking.pop(message.get("id"), None) != user:
            raise PermissionError(f"Releasing a lock that {user} does not hold is refused.")

    def _semaphore_refresh_leases(self, user: str, message: dict[str, Any], size: int) -> None:
        leases = self._scheduler.extensions["semaphores"].leases
        held = leases.get(message.get("name"), {}) if message.get("name") in leases else {}
        message["lease_ids"] = [lease for lease in _listed(message.get("lease_ids") or ()) if lease in held]

    def _retry(self, user: str, message: dict[str, Any], size: int) -> None:
        tasks = self._scheduler.tasks
        keys = [key for key in _listed(message.get("keys") or ()) if key in tasks and tasks[key].state == "erred"]
        self.check_own(user, "Retrying", self._with_inputs_that_failed(keys))
        message["keys"] = keys

    def _with_inputs_that_failed(self, keys: Iterable[Any]) -> list[Any]:
        tasks, stack = self._scheduler.tasks, list(keys)
        found: dict[Any, None] = {}
        while stack:
            if (key := stack.pop()) not in found:
                found[key] = None
                stack += [dts.key for dts in tasks[key].dependencies if dts.state == "erred"]
        return list(found)

    def _update_data(self, user: str, message: dict[str, Any], size: int) -> None:
        raise PermissionError(
            f"Data that {user} has put onto workers are not taken.\n  Usual reason: direct=True\n  What to do: scatter without direct=True"
        )

    def _gather(self, user: str, message: dict[str, Any], size: int) -> None:
        keys = _listed(message.get("keys") or ())
        self.check_own(user, "Fetching", [key for key in keys if not self._scheduler.may_want(key, user)])
        tasks, limit = self._scheduler.tasks, self._scheduler.limits.bytes
        total = sum(max(tasks[key].nbytes, 0) for key in keys if key in tasks)
        if total + self._fetching[user] > limit:
            raise LimitReached(
                user, "bytes", format_bytes(limit), f"of results on their way through it, and these are {format_bytes(total)}",
                "fetch smaller parts, or write the results to files in tasks",
            )  # fmt: skip

    @contextmanager
    def fetching(self, user: str, keys: Iterable[Any]) -> Iterator[None]:
        """Context manager: count results that are on their way to a person."""
        tasks = self._scheduler.tasks
        size = sum(max(tasks[key].nbytes, 0) for key in keys if key in tasks)
        self._fetching[user] += size
        try:
            yield
        finally:
            self._fetching[user] -= size

    def _versions(self, user: str, message: dict[str, Any], size: int) -> None:
        # asking for the version of a module imports it
        message["packages"] = [name for name in message.get("packages") or () if type(name) is str and name in sys.modules]

    def _subscribe_worker_status(self, user: str, message: dict[str, Any], size: int) -> None:
        # all subscriptions have one name, so that a second one would end the first
        raise PermissionError(f"Following the workers is refused to {user}: that is for the cluster's manager.\n  What to do: use identity")

    def _proxy(self, user: str, message: dict[str, Any], size: int) -> None:
        inner = message.get("msg")
        if not isinstance(inner, dict) or inner.get("op") not in FORWARDED:
            op = inner.get("op") if isinstance(inner, dict) else inner
            raise PermissionError(
                f"Forwarding {op!r} to workers (client.run and the like) is refused to {user}: on a shared cluster it is reserved for "
                f"its owner.\n  Usual reason: the notebook was written for a private cluster\n  What to do: submit a task instead"
            )
        if str(inner["op"]).startswith("actor_"):
            self.check_own(user, "The actor", [inner.get("actor")])
        where = message.get("workers")
        if where is not None and not all(address in self._scheduler.workers for address in _listed(where)):
            raise ValueError("A request is forwarded to workers of this cluster only.")
        if message.get("nanny") or message.get("hosts"):
            raise PermissionError(f"Requests to nannies are refused to {user}.")
        if inner["op"] == "versions":
            self._versions(user, inner, size)
        message["msg"] = {name: value for name, value in inner.items() if name not in ("reply", "close", "serializers")}

    _broadcast = _proxy

    # --- what is kept here -------------------------------------------------------------------------------------------------------
    def _set_metadata(self, user: str, message: dict[str, Any], size: int) -> None:
        keys = message.get("keys")
        if type(keys) not in (tuple, list) or not keys or not all(type(key) in (str, int) for key in keys):
            raise TypeError("The keys of metadata are strings and whole numbers.")
        self.names.check(user, "metadata", [str(keys[0])], writes=True)
        self.names.keep(user, ("metadata", *map(str, keys)), size)

    def _publish_put(self, user: str, message: dict[str, Any], size: int) -> None:
        names, keys, data = [message.get("name")], [message.get("keys")], [message.get("data")]
        if "names" in message:
            names, keys, data = (_sequence(message.get(part)) for part in ("names", "keys", "data"))
        if not len(names) == len(keys) == len(data) > 0:
            raise TypeError("Datasets have a name, keys and a description each.")
        for some in keys:
            self._check_given(user, _sequence(some))
        self.names.check(user, "dataset", names, writes=True)
        for name in names:
            self.names.keep(user, ("dataset", str(name)), size // len(names))

    def _publish_delete(self, user: str, message: dict[str, Any], size: int) -> None:
        names = _sequence(message["names"]) if "names" in message else [message.get("name")]
        self.names.check(user, "dataset", names, writes=True)
        for name in names:
            self.names.free("dataset", name)

    def _start_task_metadata(self, user: str, message: dict[str, Any], size: int) -> None:
        self._record(user, recording(user, message.get("name")), None)

    def _stop_task_metadata(self, user: str, message: dict[str, Any], size: int) -> None:
        self._recorders.get(user, {}).pop(recording(user, message.get("name")), None)

    def _memory_sampler_start(self, user: str, message: dict[str, Any], size: int) -> None:
        interval: Any = message.get("interval")
        if type(interval) not in (int, float) or not 0 < interval < 1e6:
            raise TypeError("The interval of a sampler is a number of seconds.")
        self._scheduler.own_client(user, message.get("client"))
        message["interval"] = max(_SHORTEST_SAMPLES_SECONDS, interval)
        self._record(user, f"sampler {monotonic()}", str(message["client"]))

    def _memory_sampler_stop(self, user: str, message: dict[str, Any], size: int) -> None:
        mine = self._recorders.get(user, {})
        for name in [name for name in mine if name.startswith("sampler")][:1]:
            del mine[name]

    def _record(self, user: str, name: str, client: str | None) -> None:
        mine = self._recorders.setdefault(user, {})
        running = self._scheduler.plugins
        for old, of in list(mine.items()):
            if (of is None and old not in running) or (of is not None and of not in self._scheduler.clients):
                del mine[old]
        if len(mine) >= self._scheduler.limits.recorders:
            raise LimitReached(user, "recorders", self._scheduler.limits.recorders, "recordings at a time", "stop some")
        mine[name] = client

    def _announce_work(self, user: str, message: dict[str, Any], size: int) -> None:
        tasks, prefix = message.get("tasks"), message.get("prefix")
        if type(tasks) is not int or not 0 <= tasks <= _MOST_ANNOUNCED or type(prefix) is not str or len(prefix) > 200:
            raise TypeError("An announcement takes the name of a kind of task and a number of tasks.")
        self._scheduler.own_client(user, message.get("client"))

    # --- events ------------------------------------------------------------------------------------------------------------------
    def _log_event(self, user: str, message: dict[str, Any], size: int) -> None:
        topics = message.get("topic")
        topics = [topics] if type(topics) is str else _listed(topics or ())
        if not topics:
            raise ValueError("An event needs a topic.")
        self._check_topics(user, topics)
        taken = [topic for topic in topics if topic in EVERYBODY_READS or topic in self._scheduler.workers or topic.startswith(REPORTS)]
        if taken:
            raise PermissionError(
                f"An event under {taken[0]!r}, which every client reads, is refused to {user}.\n  What to do: choose another topic"
            )
        self.names.event(user, topics, size, self._scheduler._broker._topics[topics[0]].events.maxlen or 100_000)

    def _check_topics(self, user: str, topics: list[Any]) -> None:
        self.names.topics(user, [topic for topic in topics if type(topic) is not str or topic not in EVERYBODY_READS])
        for topic in topics:
            if self._scheduler.is_anothers_client(topic, user):
                raise PermissionError(f"Events of another person's client are refused to {user}.")

    def _events(self, user: str, message: dict[str, Any], size: int) -> None:
        topic = message.get("topic")
        if type(topic) is not str or topic not in self._scheduler._broker._topics:
            if topic is None:
                raise PermissionError(f"Events of all topics are refused to {user}.\n  What to do: name a topic")
            raise ValueError(f"There are no events under {str(topic)[:100]!r}.")
        self._check_topics(user, [topic])

    # --- looking -----------------------------------------------------------------------------------------------------------------
    def _get_runspec(self, user: str, message: dict[str, Any], size: int) -> None:
        self.check_own(user, "The code of", [message.get("key")])

    def _get_error_cause(self, user: str, message: dict[str, Any], size: int) -> None:
        self.check_own(user, "The error of", message.get("keys") or ())

    def _call_stack(self, user: str, message: dict[str, Any], size: int) -> None:
        tasks = self._scheduler.tasks
        if message.get("keys") is None:
            mine = [ts.key for ws in self._scheduler.workers.values() for ts in ws.processing if self._scheduler.whose(ts.key) == user]
        else:
            mine = _listed(message["keys"])
            stack, seen = [key for key in mine if key in tasks], set()  # it looks at the inputs of those that wait as well
            while stack:
                if (key := stack.pop()) not in seen:
                    seen.add(key)
                    stack += [dts.key for dts in tasks[key].dependencies] if tasks[key].state == "waiting" else []
            self.check_own(user, "The call stack of", seen)
        message["keys"] = mine

    def _profile(self, user: str, message: dict[str, Any], size: int) -> None:
        if message.get("scheduler") or message.get("server"):
            raise PermissionError(f"Profiles of the scheduler and of the workers themselves are refused to {user}.")
        key = message.get("key")
        if key is not None and key not in self._scheduler.own_kinds(user):
            raise PermissionError(
                f"The profile of {str(key)[:100]!r} is refused to {user}: it shows code of others, or nobody's.\n"
                "  What to do: leave out key=, or name a function that only you have submitted"
            )

    # --- messages of a stream ----------------------------------------------------------------------------------------------------
    def check_streamed(self, user: str, client: str, op: str, message: dict[str, Any], size: int) -> bool:
        """Check a message of a client's stream; returns whether there is anything left to do.

        Raises
        ------
        PermissionError, ValueError, TypeError
        """
        scheduler = self._scheduler
        if op in ("client-desires-keys", "client-releases-keys", "cancel-keys"):
            message["keys"] = keys = [key for key in _listed(message.get("keys") or ()) if _hashable(key)]
            if op == "client-desires-keys" and message.get("client") == FORGETFUL:
                mine = [key for key in keys if key in scheduler.tasks and scheduler.whose(key) == user]
                message["keys"] = [key for key in mine if scheduler.tasks[key].state not in ("memory", "erred")]
            elif op == "client-desires-keys":
                message["keys"] = self._refuse_unwanted(user, client, keys)
            elif op == "cancel-keys":
                message["force"] = bool(message.get("force"))
                self._check_force(user, message)
                for name in ("reason", "msg"):
                    message[name] = str(message.get(name) or "")[:1000]
        elif op == "report-key":
            message.pop("ts", None)
            self._check_given(user, [message.get("key")])
        elif op == "subscribe-topic":
            self._check_topics(user, [message.get("topic")])
        elif op == "queue-future-release":
            self._check_named(user, op, message, size)
            return bool(scheduler.extensions["queues"].future_refcount.get((message.get("name"), message.get("key"))))
        elif op == "variable-future-received-confirm":
            self._check_named(user, op, message, size)
            waiting = scheduler.extensions["variables"].waiting
            return message.get("token") in waiting.get((message.get("key"), message.get("name")), ())
        elif op == "publish_flush_batched_send":
            flushes = scheduler.extensions["publish"]._flush_received
            return len(repr(message.get("uid"))) < 200 and (message.get("uid") in flushes or len(flushes) < _MOST_FLUSHES)
        elif op in NAMED:
            self._check_named(user, op, message, size)
        return True

    def _check_force(self, user: str, message: dict[str, Any]) -> None:
        """Raise PermissionError if a cancel with force would reach what others own or keep."""
        scheduler, seen = self._scheduler, set()
        stack = [scheduler.tasks[key] for key in message["keys"] if key in scheduler.tasks] if message["force"] else []
        while stack:
            ts = stack.pop()
            if ts.key in seen:
                continue
            seen.add(ts.key)
            stack.extend(ts.dependents)
            others = {scheduler.user_of(cs.client_key) for cs in ts.who_wants or () if cs.client_key in scheduler.client_comms} - {user}
            if others:
                raise PermissionError(f"Cancelling with force what {', '.join(sorted(others))} waits for is refused to {user}.")
            self.check_own(user, "Cancelling with force", [ts.key])


def forget_unconfirmed(scheduler: Any, record: Any, name: Any) -> None:
    """Release what a reader of a variable has got if the reader does not confirm it in time; otherwise the variable could never change."""
    if not isinstance(record, dict) or "token" not in record:
        return
    variables, token, key = scheduler.extensions["variables"], record["token"], record["value"]

    def forget() -> None:
        if token in variables.waiting.get((key, name), ()):
            scheduler.loop.add_callback(_confirm)

    async def _confirm() -> None:
        waiting = variables.waiting.get((key, name))
        if waiting and token in waiting:
            waiting.remove(token)
            if not waiting:
                async with variables.waiting_conditions[name]:
                    variables.waiting_conditions[name].notify_all()

    scheduler.loop.call_later(_CONFIRMED_SECONDS, forget)


def _sequence(values: Any) -> list[Any]:
    if type(values) not in (list, tuple, set, frozenset):
        raise TypeError("Keys and names must come in a list.")
    return list(values)


def _listed(keys: Any) -> list[Any]:
    return [key for key in _sequence(keys) if _hashable(key)]


def _hashable(key: Any) -> bool:
    try:
        hash(key)
    except TypeError:
        return False
    return True


def check_graph_message(message: dict[str, Any]) -> None:
    """Raise TypeError if a graph's message has parts that would make distributed fail after it has begun to process it."""
    keys: Any = message.get("keys")
    actors, priorities = message.get("actors"), message.get("internal_priority")
    if type(keys) not in (list, tuple, set, frozenset) or not all(map(_hashable, keys)) or "expr_ser" not in message:
        raise TypeError("A graph must come with its keys.")
    if not (actors is None or type(actors) in (bool, list, tuple, set)) or not (priorities is None or type(priorities) is dict):
        raise TypeError("A graph has a list of actors and a number for the order of each task, or neither.")
    parse_timedelta(message.get("fifo_timeout", 0.0))
