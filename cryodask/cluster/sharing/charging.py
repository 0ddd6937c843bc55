"""A Dask scheduler that charges every task's time to its lane, user and project, from the moment at which it is sent."""

from __future__ import annotations

import math
from time import monotonic
from typing import Any

from distributed.scheduler import TaskState, WorkerState

from cryodask.cluster.sharing.lanes import Share
from cryodask.cluster.sharing.owners import LanedScheduler

FIRST = -math.inf
"""Rank on a worker of what must not wait there."""


class Flight:
    """A task on a worker: who pays, since when it is there, since when it was seen to run, how much was charged, its rank there."""

    __slots__ = ("charged", "leaf", "rank", "runs", "start")

    def __init__(self, leaf: Share, charged: float, rank: float) -> None:
        self.leaf, self.charged, self.rank, self.start = leaf, charged, rank, monotonic()
        self.runs: float | None = None


class ChargingScheduler(LanedScheduler):
    """Charges a task's estimate when it is sent, and what it really took when it ends. While one owner has all tasks nothing is charged."""

    def count_time(self) -> None:
        """Begin to charge."""
        self._flights: dict[Any, Flight] = {}
        self._finished: dict[str, float] = {}
        self._rank: float | None = None
        # ranks only grow: what is left of one contest must not wait for ever behind the next
        self._base = self._highest = 0.0

    def contest_begins(self) -> None:
        """What was used while an owner was alone is nobody's credit or debt; what it has on workers now counts."""
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
            # what needs resources is sent only when they are free, and must not wait for what was sent before it
            leaf = self._leaf(ts)
            rank = self._rank if self._rank is not None else self._base + leaf.lane.start_tag()
            if rank > self._highest:
                self._highest = rank
            self._charge(ts, leaf, FIRST if ts.resource_restrictions else rank)
        return super()._add_to_processing(ts, ws, stimulus_id)

    def _task_to_msg(self, ts: TaskState) -> dict[str, Any]:
        # workers run by priority, and there an older client's tasks would overtake for ever
        message = super()._task_to_msg(ts)
        flight = self._flights.get(ts.key)
        rank = flight.rank if flight is not None else FIRST if ts.actor else self._highest
        message["priority"] = (rank, *message["priority"])
        return message

    def _settle(self, key: Any, seconds: float | None = None) -> None:
        flight = self._flights.pop(key, None)
        if flight is not None:
            now = monotonic()
            if seconds is not None:  # of what ran before a contest began, only the rest counts in it
                spent = min(now - flight.start, seconds)
            else:
                spent = 0.0 if flight.runs is None else now - flight.runs
            flight.leaf.land(spent - flight.charged, spent)

    def _exit_processing_common(self, ts: TaskState) -> WorkerState | None:
        if ts.key in self._flights:
            self._settle(ts.key)
        return super()._exit_processing_common(ts)

    def charge_finished(self, key: Any, worker: str, message: dict[str, Any]) -> None:
        """Charge a task that ends the time that its worker measured."""
        if key in self._flights:
            # stolen tasks finish elsewhere than where they were sent; a stale report of another worker settles nothing
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
        """As distributed's; a task that has left its thread pays for the time before."""
        if key in self._flights and self._runs_at(key, worker):
            self._settle(key, kwargs.get("compute_duration"))
        super().handle_long_running(key, worker, *args, **kwargs)

    def charge_what_is_out(self, now: float) -> None:
        """Charge what runs longer than it was charged for, so that a lane of long unknown tasks cannot take every slot.

        What waits on a worker behind others does not run: as many run as it has threads, first those of the lowest rank.
        """
        for ws in self.workers.values():
            out = [flight for ts in ws.processing if (flight := self._flights.get(ts.key)) is not None]
            for flight in sorted(out, key=lambda flight: flight.rank)[: ws.nthreads]:
                flight.runs = now if flight.runs is None else flight.runs
                spent = now - flight.runs
                if spent > flight.charged:
                    flight.leaf.charge(spent - flight.charged)
                    flight.charged = spent
