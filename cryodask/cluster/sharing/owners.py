"""A Dask scheduler that knows which lane, user and project each task is charged to; ``fairshare.py`` makes use of it."""

from __future__ import annotations

import logging
import math
import pickle
from collections.abc import Iterable, Mapping
from time import monotonic, time
from typing import Any

from distributed import Scheduler
from distributed.comm import Comm
from distributed.diagnostics.plugin import SchedulerPlugin
from distributed.scheduler import TaskState, WorkerState
from distributed.versions import get_versions

from cryodask.cluster.access.versions import RELEASE, why_refused
from cryodask.cluster.sharing.lanes import LaneOptions, LaneQueue, Owner, Share
from cryodask.cluster.sharing.slices import SlicingScheduler

THREADS = "threads"
_SAMPLED = 200


class _NewGraph(SchedulerPlugin):
    """One-shot plugin that reports a new graph before its tasks move; a permanent plugin would cost a call per transition."""

    name = "cryodask-new-graph"

    def __init__(self, scheduler: LanedScheduler) -> None:
        self._scheduler = scheduler

    def update_graph(
        self, scheduler: Scheduler, *, client: str, tasks: list[Any], annotations: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        scheduler.plugins.pop(self.name, None)
        given = annotations or {}
        self._scheduler.take_graph(client, tasks, given.get("lane") or {})
        self._scheduler.limit_failures(given.get("allowed_failures") or {})


class LanedScheduler(SlicingScheduler):
    """A scheduler that knows the owner of every task, with a queue of tasks waiting in lanes."""

    def configure_lanes(self, lanes: Mapping[str, Any] | None, strict: Iterable[str], default_lane: str) -> None:
        """Start recording owners; parameters as for FairShareScheduler."""
        self._options = {name: LaneOptions.parse(name, given) for name, given in (lanes or {}).items()}
        self._strict, self._default_lane = set(strict), default_lane
        self._clocks: dict[Any, Share] = {}
        self._owners: dict[tuple[str, str, str], Owner] = {}
        # while one owner has all tasks nothing is stored per task: it owns every key that is not in _others
        self._lone: Owner | None = None
        self._others: dict[Any, Owner] = {}
        self._submitting: Any = None
        self._announced: dict[str, tuple[str, int]] = {}
        self.handlers["announce_work"] = self.announce_work
        self._told: dict[tuple[str, str], float] = {}
        self._head_start: dict[Any, int] = {}
        logging.getLogger("distributed.scheduler").addFilter(self._with_true_deaths)
        self._versions = get_versions()
        self._held = LaneQueue(self._leaf)
        self.queued = self._held  # type: ignore[assignment]

    def bulk_schedule_unrunnable_after_adding_worker(self, ws: WorkerState) -> Any:
        """Like distributed's, but also reports that a worker is now running, some time after it joined."""
        self.workers_changed()
        return super().bulk_schedule_unrunnable_after_adding_worker(ws)

    async def remove_worker(self, address: str, **how: Any) -> Any:
        """As distributed's."""
        address = self.coerce_address(address)
        said = await super().remove_worker(address, **how)
        if address not in self.workers:
            self.workers_changed(gone=address)
        return said

    def report(self, msg: dict[str, Any], ts: TaskState | None = None, client: str | None = None) -> None:
        """Like distributed's, but the error of a graph that could not be taken is told to its sender alone.

        Others may have futures of the same keys, and would unpickle the sender's exception.
        """
        if ts is None and client is not None and msg.get("op") == "task-erred":
            stream = self.client_comms.get(client)
            if stream is not None and not stream.closed():
                stream.send(msg)
            return
        super().report(msg, ts=ts, client=client)

    def contest_begins(self) -> None:
        """Called when a second owner has tasks."""

    def workers_changed(self, gone: str | None = None) -> None:
        """Called when a worker starts running or is gone."""

    def identity(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Like distributed's, but with ``used_resources`` of the workers, and ``lanes`` and ``cryodask`` to identify the scheduler."""
        known: dict[str, Any] = {**super().identity(*args, **kwargs), "lanes": True, "cryodask": RELEASE}
        for address, worker in known["workers"].items():
            worker["used_resources"] = dict(self.workers[address].used_resources)
        return known

    # --- who joins ---------------------------------------------------------------------------------------------------------------
    async def add_client(self, comm: Comm, client: str, versions: dict[str, Any]) -> None:
        """Like distributed's, but refuses a client with other versions, which raises ImportError."""
        if why := why_refused("client", versions, self._versions):
            await comm.write([{"op": "stream-start", "error": why}])
            return
        await super().add_client(comm, client, versions)

    async def add_worker(self, comm: Comm, **told: Any) -> None:
        """Like distributed's, but refuses a worker with other versions, which then ends."""
        release = (told.get("extra") or {}).get("cryodask")
        if why := why_refused("worker", told.get("versions"), self._versions, release):
            await comm.write({"status": "error", "message": why, "time": time()})
            return
        await super().add_worker(comm, **told)

    def tell(self, client: str, text: str) -> None:
        """Show a client a warning, the same one at most once per minute."""
        now = monotonic()
        if now - self._told.get((client, text), -60.0) < 60:
            return
        self._told = {what: when for what, when in self._told.items() if now - when < 60} | {(client, text): now}
        event = {"message": pickle.dumps(text), "category": pickle.dumps(UserWarning)}
        self.report({"op": "event", "topic": "warn", "event": (time(), event)}, client=client)

    # --- names -------------------------------------------------------------------------------------------------------------------
    def path_of_client(self, client: str) -> tuple[str, str, str]:
        """Lane, user and project from a client's name ``lane/user/project``."""
        name = client.split("-", 1)[1] if "-" in client else client
        name = name[:-37] if len(name) > 37 and name[-37] == "-" else ("" if len(name) == 36 else name)
        lane, _, rest = name.partition("/")
        if not rest and (not self._options or lane not in self._options):
            return self._default_lane, lane, ""
        user, _, project = rest.partition("/")
        return self._existing_lane(lane), user, project

    def _existing_lane(self, lane: str) -> str:
        return self._default_lane if self._options and lane not in self._options else lane

    def owner_of_client(self, client: str) -> Owner:
        """The owner that a client's tasks are charged to."""
        return self.owner(*self.path_of_client(client))

    def owner(self, lane: str, user: str = "", project: str = "") -> Owner:
        """The owner of that name; an unknown lane becomes the default one."""
        path = (self._existing_lane(lane), user, project)
        if path not in self._owners:
            self._owners[path] = Owner(*path, self._new_leaf(THREADS, path))
        return self._owners[path]

    def owner_of(self, key: Any) -> Owner:
        """The owner that a task is charged to."""
        owner = self._others.get(key) or self._lone
        return owner if owner is not None else self.owner(self._default_lane)

    def _new_leaf(self, clock: Any, path: tuple[str, str, str]) -> Share:
        lane, user, project = path
        options = self._options.get(lane, LaneOptions())
        if clock not in self._clocks:
            self._clocks[clock] = Share(str(clock))
        node = self._clocks[clock]
        weights = (options.weight, options.users.get(user, 1.0), options.projects.get(project, 1.0))
        for name, weight in zip(path, weights):
            if name not in node.children:
                node.children[name] = Share(name, weight, node, strict=node.parent is None and name in self._strict)
            node = node.children[name]
        return node

    def _leaf(self, ts: TaskState) -> Share:
        owner = self._others.get(ts.key) or self._lone or self.owner(self._default_lane)
        if not ts.resource_restrictions:
            return owner.threads
        clock = tuple(sorted(ts.resource_restrictions))
        if clock not in owner.others:
            owner.others[clock] = self._new_leaf(clock, owner.path)
        return owner.others[clock]

    # --- tasks -------------------------------------------------------------------------------------------------------------------
    def _create_taskstate_from_graph(self, *args: Any, submitting_task: Any = None, **kwargs: Any) -> Any:
        self._submitting = submitting_task
        self.add_plugin(_NewGraph(self), idempotent=True)
        try:
            return super()._create_taskstate_from_graph(*args, submitting_task=submitting_task, **kwargs)
        finally:
            self._submitting = None

    def take_graph(self, client: str, keys: list[Any], lanes: Mapping[Any, str]) -> None:
        """Set the owner of the tasks of a new graph; known tasks keep the owner that submitted them first."""
        nested = self._submitting is not None and self._submitting in self.tasks
        payer = self.owner_of(self._submitting) if nested else self.owner_of_client(client)
        if not self._others and (self._lone is None or self._all_new(keys)):
            self._lone = payer
        alone = not self._others
        if payer is not self._lone:
            for key in keys:
                if key not in self._others and self.tasks[key].state == "released":
                    self._others[key] = payer
        for key, lane in lanes.items() if not nested else ():
            if lane != payer.lane and key in self.tasks:
                self._others[key] = self.owner(lane, payer.user, payer.project)
        if alone and self._others:
            self.contest_begins()

    def limit_failures(self, allowed: Mapping[Any, int]) -> None:
        """Apply the annotation ``allowed_failures``: blame a task after this many worker deaths instead of the usual number."""
        for key, deaths in allowed.items():
            if key in self.tasks:
                ts = self.tasks[key]
                more = max(0, self.allowed_failures - deaths - ts.suspicious)
                ts.suspicious += more
                self._head_start[key] = self._head_start.get(key, 0) + more

    def _with_true_deaths(self, record: logging.LogRecord) -> bool:
        """Correct distributed's log message, whose number of worker deaths :meth:`limit_failures` has raised."""
        if isinstance(record.args, tuple) and "workers died" in str(record.msg) and record.args[0] in self._head_start:
            record.args = (record.args[0], int(str(record.args[1])) - self._head_start[record.args[0]], *record.args[2:])
        return True

    async def close(self, *args: Any, **kwargs: Any) -> None:
        """As distributed's."""
        logging.getLogger("distributed.scheduler").removeFilter(self._with_true_deaths)
        await super().close(*args, **kwargs)

    def _all_new(self, keys: list[Any]) -> bool:
        """Whether these are the only tasks, and all of them are new."""
        return len(self.tasks) <= len(keys) and all(self.tasks[key].state == "released" for key in keys if key in self.tasks)

    def _remove_key(self, key: Any) -> None:
        self._others.pop(key, None)
        self._head_start.pop(key, None)
        super()._remove_key(key)

    def prune(self) -> None:
        """Forget owners without tasks; otherwise every client name would be kept as long as the scheduler lives."""
        needed = {owner.path for owner in self._others.values()} | ({self._lone.path} if self._lone is not None else set())
        for path, owner in list(self._owners.items()):
            leaves = [owner.threads, *owner.others.values()]
            if path not in needed and not any(leaf.held or leaf.flying for leaf in leaves):
                del self._owners[path]
                for leaf in leaves:
                    leaf.detach()

    # --- what is waited for ------------------------------------------------------------------------------------------------------
    def lanes_now(self) -> dict[str, dict[str, Any]]:
        """Per lane: ``weight``, tasks ``waiting`` here, tasks ``running`` (on workers), connected ``clients``."""
        now: dict[str, dict[str, Any]] = {}

        def lane(name: str) -> dict[str, Any]:
            weight = self._options.get(name, LaneOptions()).weight
            return now.setdefault(name, {"weight": weight, "waiting": 0, "running": 0, "clients": 0})

        for name in self._options:
            lane(name)
        for client in self.clients:
            if client != "fire-and-forget":
                lane(self.path_of_client(client)[0])["clients"] += 1
        for clock in self._clocks.values():
            for name, share in clock.children.items():
                if share.held:
                    lane(name)["waiting"] += share.held
        for ws in self.workers.values():
            for ts in ws.processing:
                lane(self.owner_of(ts.key).lane)["running"] += 1
        return now

    def waiting_by_owner(self) -> dict[tuple[str, str, str], int]:
        """Ready tasks that are on no worker, by lane, user and project, including those that no worker could run."""
        waiting: dict[tuple[str, str, str], int] = {}
        for path, owner in self._owners.items():
            held = owner.threads.held + sum(leaf.held for leaf in owner.others.values())
            if held:
                waiting[path] = held
        for ts in self.unrunnable:
            path = self.owner_of(ts.key).path
            waiting[path] = waiting.get(path, 0) + 1
        return waiting

    def estimate(self, ts: TaskState) -> float:
        """Estimated duration of a task, seconds."""
        average = ts.prefix.duration_average
        return average if average >= 0 else max(self.UNKNOWN_TASK_DURATION, ts.prefix.max_exec_time)

    async def announce_work(self, client: str, prefix: str, tasks: int) -> None:
        """Handle a client's announcement of how many tasks of a kind it will still send, so that pools can grow in advance."""
        self._announced[client] = prefix, tasks

    def announced_work(self) -> list[dict[str, Any]]:
        """Like :meth:`waiting_work`, but for tasks that clients have announced and not sent yet."""
        found = []
        for client, (prefix, tasks) in list(self._announced.items()):
            if client not in self.clients:
                del self._announced[client]
            elif tasks > 0:
                timed = self.task_prefixes[prefix].duration_average if prefix in self.task_prefixes else -1
                each = timed if timed >= 0 else self.UNKNOWN_TASK_DURATION
                lane = self.path_of_client(client)[0]
                found.append({"lane": lane, "resources": {}, "bound": False, "tasks": tasks, "seconds": tasks * each})
        return found

    def waiting_work(self) -> list[dict[str, Any]]:
        """Waiting work, for decisions on scaling, including tasks that no current worker could run.

        One entry per lane and kind of task: ``lane``, ``resources`` per task (empty for threads), ``bound`` if they may only run on named
        workers, number of ``tasks``, and estimated total ``seconds`` (from the first few hundred in each place).
        """
        found: dict[tuple[str, Any, bool], tuple[float, float]] = {}

        def count(lane: str, some: list[TaskState], each: float) -> None:
            for ts in some:
                key = lane, tuple(sorted((ts.resource_restrictions or {}).items())), is_bound(ts)
                tasks, seconds = found.get(key, (0.0, 0.0))
                found[key] = tasks + each, seconds + each * self.estimate(ts)

        for clock in self._clocks.values():
            for leaf in clock.leaves_in_turn():
                entries = sum(map(len, leaf.heaps.values()))
                for heap in leaf.heaps.values():
                    some = [ts for _, _, ts in heap[:_SAMPLED] if ts in self._held]
                    if some:
                        count(leaf.lane.name, some, leaf.held * len(heap) / entries / len(some))
        for ts in self.unrunnable:
            count(self.owner_of(ts.key).lane, [ts], 1.0)
        return [
            {"lane": lane, "resources": dict(needs), "bound": bound, "tasks": math.ceil(tasks - 1e-6), "seconds": seconds}
            for (lane, needs, bound), (tasks, seconds) in found.items()
        ]


def is_bound(ts: TaskState) -> bool:
    """Whether a task may only run on named workers."""
    return bool(ts.worker_restrictions) and not ts.loose_restrictions
