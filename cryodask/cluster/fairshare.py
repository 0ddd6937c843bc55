"""A Dask scheduler that shares the workers between lanes.

A lane is a group of clients: live processing, batch runs, notebooks. Ready tasks wait on the scheduler, and every free slot goes to the
lane that is furthest behind its share (``lanes.py``). Within a lane, users and their projects share in the same way; within
a project tasks run in Dask's own order. Unused shares are redistributed.

Works with any Dask deployment: ``LaneCluster`` is a ``LocalCluster`` with it, ``SpecCluster`` takes it as ``{"cls": FairShareScheduler}``,
cryodask's pools use it, and so does ``dask scheduler --preload cryodask.cluster.fairshare``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from time import monotonic
from typing import Any, cast

import dask
from distributed import Scheduler
from distributed.scheduler import TaskState, WorkerState
from tornado.ioloop import PeriodicCallback

from cryodask.cluster.dashboard import DashboardOnDemand, without_dashboard
from cryodask.cluster.environment import as_the_site_says
from cryodask.cluster.sharing.charging import FIRST, Flight
from cryodask.cluster.sharing.lanes import Place, Share
from cryodask.cluster.sharing.owners import THREADS
from cryodask.cluster.sharing.reserving import ReservingScheduler, load

_TICK_MILLISECONDS = 250
_PRUNE_SECONDS = 60.0


class FairShareScheduler(ReservingScheduler):
    """A scheduler with lanes.

    Parameters
    ----------
    lanes : mapping of str to number or mapping, optional
        Weight of each lane, or ``{"weight": 3, "users": {"anna": 2}, "projects": {"p1": 2}}``. Tasks for a lane that is not listed
        go to ``default_lane``. Without ``lanes`` every name is a lane of weight 1.
    strict : iterable of str
        Lanes that are always served before the others.
    reserve : mapping of str to int
        Number of threads kept free for a lane.
    default_lane : str
        Lane of clients that do not name one.
    memory_share : mapping of str to float, optional
        Fraction of the workers' memory that results of a lane may fill; above it, its tasks without inputs wait.

    Notes
    -----
    The lane of a task is that of the task that submitted it, else the annotation ``lane`` (which Dask keeps only around ``compute()``,
    ``persist()`` and ``submit()``), else the client's name ``lane/user/project``, else ``default_lane``.
    """

    def __init__(
        self,
        *args: Any,
        lanes: Mapping[str, Any] | None = None,
        strict: Iterable[str] = (),
        reserve: Mapping[str, int] | None = None,
        default_lane: str = "default",
        memory_share: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        with_dashboard = without_dashboard(kwargs)
        super().__init__(*args, **as_the_site_says("scheduler", kwargs))
        if with_dashboard:
            self.http_application.add_application(DashboardOnDemand(self, kwargs.get("http_prefix", "/")))
        self.share(lanes, strict=strict, reserve=reserve, default_lane=default_lane, memory_share=memory_share)

    def share(
        self,
        lanes: Mapping[str, Any] | None = None,
        *,
        strict: Iterable[str] = (),
        reserve: Mapping[str, int] | None = None,
        default_lane: str = "default",
        memory_share: Mapping[str, float] | None = None,
    ) -> None:
        """Start sharing; parameters as for the class."""
        self.configure_lanes(lanes, strict, default_lane)
        self.reserve_threads(reserve)
        unknown = [n for n in (*self._strict, *self._reserve, *(memory_share or {})) if self._options and n not in self._options]
        if unknown:
            raise ValueError(f"strict, reserve and memory_share name lanes that are not in lanes: {unknown}")
        self.cap_memory(memory_share)
        self.count_time()
        self.slice_orders()
        self._pruned = monotonic()
        self._arrived: list[Share] = []
        self._target: WorkerState | None = None
        self._fresh = self._dispatching = False
        self.draining = False
        """Whether nothing is sent to workers any more."""
        if math.isinf(self.WORKER_SATURATION):
            self.WORKER_SATURATION = 1.1  # without a bound on the tasks queued on workers there is nothing to share
        self.periodic_callbacks["fairshare"] = PeriodicCallback(self._tick, _TICK_MILLISECONDS)
        if (stealing := self.extensions.get("stealing")) is not None:
            # a stolen task's resources would stay booked on the worker it was stolen from, so tasks with resources are never stolen
            put = stealing.put_key_in_stealable
            stealing.put_key_in_stealable = lambda ts: None if ts.resource_restrictions else put(ts)

    def drain(self) -> None:
        """Send nothing more to workers: ready tasks wait, running tasks finish."""
        self.draining = True

    def resume_dispatch(self) -> None:
        """Undo :meth:`drain`."""
        self.draining = False
        self.stimulus_queue_slots_maybe_opened(stimulus_id="resume-dispatch")

    # --- ready tasks: sent, or held until it is their turn -----------------------------------------------------------------------
    def _transition_waiting_processing(self, key: Any, stimulus_id: str) -> Any:
        ts = self.tasks[key]
        if ts.actor or not (ts._queueable or ts.worker_restrictions or ts.resource_restrictions):
            return Scheduler._transition_waiting_processing(self, key, stimulus_id)
        leaf = self._leaf(ts)
        if self._memory.full and self.is_kept_back(ts, leaf):
            self._hold(ts, leaf, None)
            return {}, {}, {}
        alone = leaf.clock.held == leaf.held and not self.draining
        place: Place = None
        if ts.resource_restrictions:
            if self.decide_worker_non_rootish(ts) is None:
                return {key: "no-worker"}, {}, {}
            place = self._restricted_place(ts)
        elif self.is_rootish(ts):
            if alone and self.idle_task_count and not self._reserved:
                idle = self.decide_worker_rootish_queuing_enabled()
                assert idle is not None
                return self._add_to_processing(ts, idle, stimulus_id)
        else:
            ws = self.decide_worker_non_rootish(ts)
            if ws is None:
                return {key: "no-worker"}, {}, {}
            its_turn = alone or (leaf.held and not self.draining and leaf.is_next())
            if its_turn and self.has_room(ws, leaf.lane, self._ahead(leaf)):
                return self._add_to_processing(ts, ws, stimulus_id)
            place = self._restricted_place(ts) or (ws.address if ts.dependencies else None)
        self._hold(ts, leaf, place)
        return {}, {}, {}

    def _hold(self, ts: TaskState, leaf: Share, place: Place) -> None:
        if not leaf.held and self._others and leaf.clock.name == THREADS:
            self._arrived.append(leaf)
        ts.state = "queued"
        self._held.put(ts, leaf, place)
        self._fresh = True

    def _restricted_place(self, ts: TaskState) -> Place:
        if ts.resource_restrictions:
            needs = tuple(sorted(ts.resource_restrictions.items()))
            return needs, frozenset(ts.worker_restrictions or ()), frozenset(ts.host_restrictions or ())
        if ts.worker_restrictions or ts.host_restrictions:
            able = frozenset(ws.address for ws in self.valid_workers(ts) or ())
            # tasks that merely prefer these workers (allow_other_workers) run anywhere once none of them is left
            return able if able or not ts.loose_restrictions else None
        return None

    def _transition_no_worker_processing(self, key: Any, stimulus_id: str) -> Any:
        ts = self.tasks[key]
        if self.decide_worker_non_rootish(ts) is not None:
            self.unrunnable.pop(ts, None)
            self._hold(ts, self._leaf(ts), self._restricted_place(ts))
        return {}, {}, {}

    def _transition_queued_processing(self, key: Any, stimulus_id: str) -> Any:
        ws, self._target = self._target, None
        if ws is None:
            return {}, {}, {}
        ts = self.tasks[key]
        self._held.discard(ts)
        return self._add_to_processing(ts, ws, stimulus_id)

    _TRANSITIONS_TABLE = {  # noqa: RUF012  (distributed looks its functions up here, not as methods)
        **ReservingScheduler._TRANSITIONS_TABLE,
        ("waiting", "processing"): _transition_waiting_processing,
        ("queued", "processing"): _transition_queued_processing,
        ("no-worker", "processing"): _transition_no_worker_processing,
    }

    def validate_queued(self, key: Any) -> None:
        """Like distributed's, but any ready task may wait, not only those of large groups."""
        ts = self.tasks[key]
        assert ts in self._held
        assert not ts.waiting_on
        assert not ts.who_has
        assert not ts.processing_on
        assert not ts.actor

    def workers_changed(self, gone: str | None = None) -> None:
        """Reassign held tasks that were bound to workers, and choose new threads to reserve."""
        self._sort_again([*(self._held.tasks_at(gone) if gone else ()), *self._held.restricted()])
        if gone:
            self._finished.pop(gone, None)
        if self._reserve:
            self.choose_reserved(gone)

    def _sort_again(self, tasks: Iterable[TaskState]) -> None:
        places: dict[Any, Place] = {}
        for ts in tasks:
            needs = frozenset((ts.resource_restrictions or {}).items())
            same = frozenset(ts.worker_restrictions or ()), frozenset(ts.host_restrictions or ()), needs, ts.loose_restrictions
            if same not in places:
                places[same] = self._restricted_place(ts)
            place = places[same]
            if place != self._held.place_of(ts):
                self._fresh = True
                self._held.discard(ts)
                if place == frozenset():  # bound to workers that are all gone
                    ts.state = "no-worker"
                    self.unrunnable[ts] = monotonic()
                else:
                    self._held.put(ts, self._leaf(ts), place)

    def set_restrictions(self, worker: dict[Any, Any]) -> None:
        """Like distributed's, but also for tasks that wait here."""
        super().set_restrictions(worker)
        self._sort_again([ts for ts in map(self.tasks.__getitem__, worker) if ts in self._held])

    def handle_worker_status_change(self, status: Any, worker: str | WorkerState, stimulus_id: str) -> None:
        """Like distributed's, but also reassigns tasks that wait for a paused worker."""
        super().handle_worker_status_change(status, worker, stimulus_id)
        ws = self.workers.get(worker) if isinstance(worker, str) else worker
        if ws not in self.running:
            self.workers_changed()
            self.stimulus_queue_slots_maybe_opened(stimulus_id=stimulus_id)

    # --- a slot opens ------------------------------------------------------------------------------------------------------------
    def transitions(self, recommendations: Any, stimulus_id: str) -> None:
        """Like distributed's, but then also sends tasks to slots that opened, because no other event may follow."""
        super().transitions(recommendations, stimulus_id)
        if self._fresh and not self._dispatching:
            self.stimulus_queue_slots_maybe_opened(stimulus_id=stimulus_id)

    def stimulus_queue_slots_maybe_opened(self, *, stimulus_id: str) -> None:
        """Send held tasks to workers with free slots, in the order of their lanes."""
        self._fresh = False
        if self._dispatching or self.draining or not self._held:
            return
        self._dispatching = True
        try:
            if self._arrived:
                self._overtake(stimulus_id)
            for name, clock in list(self._clocks.items()):
                if not clock.held:
                    continue
                if name == THREADS:
                    self._fill_threads(clock, stimulus_id)
                else:
                    self._fill_resources(clock, stimulus_id)
        finally:
            self._dispatching = False

    def _send(self, ts: TaskState, ws: WorkerState, stimulus_id: str) -> None:
        self._target = ws
        Scheduler.transitions(self, {ts.key: "processing"}, stimulus_id)

    def _fill_threads(self, clock: Share, stimulus_id: str) -> None:
        tried: set[WorkerState] = set()
        while clock.held:
            idle = self.idle_task_count - tried if tried else self.idle_task_count
            if not idle:
                return
            ws = min(idle, key=load) if len(idle) > 1 else next(iter(idle))
            ts = self._choose(clock, ws)
            if ts is None:
                tried.add(ws)
            else:
                self._send(ts, ws, stimulus_id)

    def _choose(self, clock: Share, ws: WorkerState) -> TaskState | None:
        """The task for a free slot of this worker."""
        first = clock.next_leaf()
        if first is not None and not self._reserved and (ts := self._held.best_at(first, ws.address)) is not None:
            return cast("TaskState", ts)
        for leaf in clock.leaves_in_turn():
            if not self._reserved or self.has_room(ws, leaf.lane, self.WORKER_SATURATION):
                ts = self._held.best_at(leaf, ws.address)
                if ts is not None:
                    return cast("TaskState", ts)
        if len(ws.processing) - len(ws.long_running) < ws.nthreads:  # a thread is idle: take tasks that wait for a busy worker
            for leaf in clock.leaves_in_turn():
                if not self._reserved or self.has_room(ws, leaf.lane, self.WORKER_SATURATION):
                    for place in [p for p in leaf.heaps if type(p) is str]:
                        entry = self._held.top(leaf, place)
                        if entry is not None and self._sooner_here(leaf, place, entry[2], ws):
                            return cast("TaskState", entry[2])
                elif self.is_closed(ws, leaf.lane):
                    for several in list(leaf.several):  # tasks that can run nowhere else
                        if ws.address in several and all(self.is_closed(self.workers.get(a), leaf.lane) for a in several):
                            entry = self._held.top(leaf, several)
                            if entry is not None:
                                return cast("TaskState", entry[2])
        return None

    def _sooner_here(self, leaf: Share, place: str, ts: TaskState, ws: WorkerState) -> bool:
        other = self.workers.get(place)
        if other is None or other not in self.running or self.is_closed(other, leaf.lane):
            return True
        return self.get_comm_cost(ts, ws) < self.estimate(ts) * (1 + len(leaf.heaps[place]) / other.nthreads)

    def _fill_resources(self, clock: Share, stimulus_id: str) -> None:
        while (found := self.next_with_resources(clock)) is not None:
            self._send(*found, stimulus_id)

    def _overtake(self, stimulus_id: str) -> None:
        """Send the first tasks of a lane that becomes active at once, on full workers ahead of the tasks queued there.

        Otherwise they would wait for two tasks of others: the running one and the one queued behind it.
        """
        arrived, self._arrived = self._arrived, []
        for leaf in arrived:
            while leaf.held and leaf.is_next():
                ws = self._worker_to_overtake(leaf)
                ts = None if ws is None else self._held.best_at(leaf, ws.address)
                if ts is None or ws is None:
                    break
                others = [f.rank for f in map(self._flight_of, ws.processing) if f is not None and f.leaf.lane is not leaf.lane]
                self._rank = min([self._base + leaf.lane.start_tag(), *(rank - 1.0 for rank in others if rank > FIRST)])
                self._send(ts, ws, stimulus_id)
                self._rank = None

    def _flight_of(self, ts: TaskState) -> Flight | None:
        return self._flights.get(ts.key)

    def _worker_to_overtake(self, leaf: Share) -> WorkerState | None:
        """Among the allowed workers, one with an idle thread; else the one with the fewest tasks of this lane.

        Among several, the one with the fewest overtaking tasks, then the one likely to finish its next task first.
        """
        best: tuple[bool, int, int, float] | None = None
        found: WorkerState | None = None
        for ws in self.running:
            if not any(place is None or place == ws.address for place in leaf.heaps) and not any(ws.address in p for p in leaf.several):
                continue
            own = sum(f is not None and f.leaf.lane is leaf.lane for f in map(self._flight_of, ws.processing))
            if own >= ws.nthreads or (self._reserved and not self.has_room(ws, leaf.lane, self.AHEAD + 1)):
                continue
            busy = len(ws.processing) - len(ws.long_running)
            beyond = max(0, busy - math.ceil(self.WORKER_SATURATION * ws.nthreads))
            score = busy >= ws.nthreads, own, beyond, self._finished.get(ws.address, 0.0)
            if best is None or score < best:
                best, found = score, ws
        return found

    def handle_task_finished(self, key: Any, worker: str, stimulus_id: str, **message: Any) -> None:
        """Like distributed's, but charges the task's time first; with a single active lane the worker gets its next task at once."""
        self.charge_finished(key, worker, message)
        Scheduler.handle_task_finished(self, key, worker, stimulus_id, **message)
        if self._held.near:
            self._refill(worker, stimulus_id)

    def _refill(self, worker: str, stimulus_id: str) -> None:
        """Keep a worker supplied with tasks whose inputs it has."""
        clock = self._clocks[THREADS]
        while (leaf := clock.next_leaf()) is not None and worker in leaf.heaps:
            ws = self.workers.get(worker)
            if ws is None or ws not in self.running or self.draining or not self.has_room(ws, leaf.lane, self._ahead(leaf)):
                return
            ts = self._held.best_at(leaf, worker)
            if ts is None or self._held.place_of(ts) != worker:
                return
            self._send(ts, ws, stimulus_id)

    def _ahead(self, leaf: Share) -> float:
        """Tasks per thread allowed on a worker when one of this leaf is sent there; more while nobody else has tasks."""
        return self.WORKER_SATURATION if self._others and leaf.clock.flying != leaf.flying else self.AHEAD

    # --- now and then ---------------------------------------------------------------------------------------------------------------
    def _tick(self) -> None:
        now = monotonic()
        self.charge_what_is_out(now)
        self.send_what_waits(now)
        if self._held:
            self.open_stuck_lanes()
            self.stimulus_queue_slots_maybe_opened(stimulus_id=f"fairshare-tick-{now}")
        if now - self._pruned > _PRUNE_SECONDS:
            self._pruned = now
            self.prune()


async def dask_setup(scheduler: Scheduler) -> None:
    """``dask scheduler --preload cryodask.cluster.fairshare``: options are in Dask's configuration under ``cryodask.fairshare``."""
    scheduler.__class__ = FairShareScheduler
    assert isinstance(scheduler, FairShareScheduler)
    scheduler.share(**(dask.config.get("cryodask.fairshare", {}) or {}))
    scheduler.periodic_callbacks["fairshare"].start()
    for table in (scheduler.handlers, scheduler.stream_handlers):
        for operation, function in table.items():
            if getattr(function, "__self__", None) is scheduler:  # bound to its former class
                table[operation] = getattr(scheduler, function.__name__)
