"""A Dask scheduler that charges each task's time to its lane, user and project, from the moment it is sent."""

from __future__ import annotations

import math
from time import monotonic
from typing import Any

from distributed.scheduler import TaskState, WorkerState

from cryodask.cluster.sharing.lanes import Share
from cryodask.cluster.sharing.owners import LanedScheduler
from cryodask.cluster.sharing.sealed import sealed

FIRST = -math.inf
"""Rank on a worker of tasks that must not wait there."""


class Flight:
    """A task on a worker: who it is charged to, when it was sent, when it was first seen running, the charge so far, its rank."""

    __slots__ = ("charged", "leaf", "rank", "runs", "start")

    def __init__(self, leaf: Share, charged: float, rank: float) -> None:
        self.leaf, self.charged, self.rank, self.start = leaf, charged, rank, monotonic()
        self.runs: float | None = None


class ChargingScheduler(LanedScheduler):
    """Charges a task's estimate when it is sent, and corrects it when it ends. While a single owner has all tasks, nothing is charged."""

    def count_time(self) -> None:
        """Start charging."""
        self._flights: dict[Any, Flight] = {}
        self._finished: dict[str, float] = {}
        self._rank: float | None = None
        # ranks only increase, so that tasks left from one contest do not wait forever behind the next
        self._base = self._highest = 0.0

    def contest_begins(self) -> None:
        """A second owner has tasks: usage from before is not charged, but tasks currently on workers are."""
        self._base = self._highest
        for clock in self._clocks.values():
            clock.forget()
        for flight in self._flights.values():
            flight.leaf.charge(flight.charged)
        for ws in self.workers.values():
            for ts in ws.processing:
                if ts.key not in self._flights and not ts.actor and ts not in ws.long_running:
                    self._charge(ts, self._leaf(ts), self._base)

    def _charge(self, ts: TaskState, leaf: Share, rank: float) -> None:
        cost = self.estimate(ts)
        self._flights[ts.key] = Flight(leaf, cost, rank)
        leaf.launch(cost)

    def _add_to_processing(self, ts: TaskState, ws: WorkerState, stimulus_id: str) -> Any:
        if self._others and not ts.actor:
            # tasks with resources are sent only when these are free, and must not wait behind tasks sent earlier
            leaf = self._leaf(ts)
            rank = self._rank if self._rank is not None else self._base + leaf.lane.start_tag()
            if rank > self._highest:
                self._highest = rank
            self._charge(ts, leaf, FIRST if ts.resource_restrictions else rank)
        return super()._add_to_processing(ts, ws, stimulus_id)

    def _task_to_msg(self, ts: TaskState) -> dict[str, Any]:
        # workers run tasks by priority, by which those of an older client would always overtake
        message = super()._task_to_msg(ts)
        flight = self._flights.get(ts.key)
        rank = flight.rank if flight is not None else FIRST if ts.actor else self._highest
        message["priority"] = (rank, *message["priority"])
        ws = ts.processing_on
        if ts.run_spec is not None and ws is not None and not ws.address.startswith("inproc://"):  # there nothing is pickled
            message["run_spec"] = sealed(ts.run_spec, "cryodask" in ws.extra)
        return message

    def _settle(self, key: Any, seconds: float | None = None) -> None:
        flight = self._flights.pop(key, None)
        if flight is not None:
            now = monotonic()
            if seconds is not None:  # of a task that ran before the contest began, only the rest counts
                spent = min(now - flight.start, seconds)
            else:
                spent = 0.0 if flight.runs is None else now - flight.runs
            flight.leaf.land(spent - flight.charged, spent)

    def _exit_processing_common(self, ts: TaskState) -> WorkerState | None:
        if ts.key in self._flights:
            self._settle(ts.key)
        return super()._exit_processing_common(ts)

    def charge_finished(self, key: Any, worker: str, message: dict[str, Any]) -> None:
        """Charge the time that the worker measured for a finished task."""
        if key in self._flights:
            # stolen tasks finish on another worker than the one they were sent to; a stale report of another worker is ignored
            if self._runs_at(key, worker):
                seconds = 0.0
                for phase in message["startstops"]:
                    if phase["action"] == "compute":
                        seconds += phase["stop"] - phase["start"]
                self._settle(key, seconds)
            self._finished[worker] = monotonic()

    def _runs_at(self, key: Any, worker: str) -> bool:
        ts = self.tasks.get(key)
        return ts is not None and ts.processing_on is not None and ts.processing_on.address == worker

    def handle_long_running(self, key: Any, worker: str, *args: Any, **kwargs: Any) -> None:
        """Like distributed's, but also charges the time before the task left its thread."""
        if key in self._flights and self._runs_at(key, worker):
            self._settle(key, kwargs.get("compute_duration"))
        super().handle_long_running(key, worker, *args, **kwargs)

    def charge_what_is_out(self, now: float) -> None:
        """Charge tasks that run longer than estimated, so that a lane of long unknown tasks cannot take every slot.

        Tasks queued on a worker behind others are not running: as many run as it has threads, lowest rank first.
        """
        for ws in self.workers.values():
            out = [flight for ts in ws.processing if (flight := self._flights.get(ts.key)) is not None]
            for flight in sorted(out, key=lambda flight: flight.rank)[: ws.nthreads]:
                flight.runs = now if flight.runs is None else flight.runs
                spent = now - flight.runs
                if spent > flight.charged:
                    flight.leaf.charge(spent - flight.charged)
                    flight.charged = spent
