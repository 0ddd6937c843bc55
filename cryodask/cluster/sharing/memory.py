"""Memory of results on the workers by lane, and a cap above which a lane's new tasks wait."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dask.utils import format_bytes
from distributed import Scheduler
from distributed.diagnostics.plugin import SchedulerPlugin
from distributed.scheduler import TaskState

from cryodask.cluster.sharing.charging import ChargingScheduler
from cryodask.cluster.sharing.lanes import LaneQueue, Share

RESIDENTS_METRIC = "cryodask-residents"
"""Heartbeat metric: bytes that worker processes keep between tasks, by client."""


class LaneMemory(SchedulerPlugin):
    """Bytes of results in memory known to the scheduler: each result counts once, however many copies exist.

    A lane that exceeds its share is in ``full``. Its memory can only decrease through tasks whose inputs are in memory already, or when
    clients release results: until then the scheduler holds back its root tasks.
    """

    name = "lane-memory"

    def __init__(self, scheduler: CappingScheduler, shares: Mapping[str, float]) -> None:
        bad = {lane: share for lane, share in shares.items() if not 0 < share <= 1}
        if bad:
            raise ValueError(f"memory_share must be a fraction of the workers' memory above 0 and at most 1, not {bad}")
        self._scheduler, self.shares = scheduler, dict(shares)
        self._held: dict[Any, tuple[str, int]] = {}
        self.bytes: dict[str, int] = {}
        self._kept: dict[str, dict[str, int]] = {}  # by worker and lane
        self.full: set[str] = set()

    def count(self, ts: TaskState, lane: str) -> None:
        """Count a result that entered memory."""
        self.drop(ts.key)
        self._held[ts.key] = lane, ts.get_nbytes()
        self.bytes[lane] = self.bytes.get(lane, 0) + ts.get_nbytes()
        self._compare(lane)

    def drop(self, key: Any) -> None:
        """Uncount a result that left memory."""
        entry = self._held.pop(key, None)
        if entry is not None:
            self.bytes[entry[0]] -= entry[1]
            self._compare(entry[0])

    def keep(self, worker: str, by_lane: dict[str, int]) -> None:
        """Set what a worker keeps between tasks, from its last heartbeat."""
        lanes = {*self._kept.get(worker, ()), *by_lane}
        self._kept[worker] = by_lane
        for lane in lanes:
            self._compare(lane)

    def total(self) -> dict[str, int]:
        """Bytes of results and of data kept by runs on workers, by lane."""
        out = dict(self.bytes)
        for by_lane in self._kept.values():
            for lane, size in by_lane.items():
                out[lane] = out.get(lane, 0) + size
        return out

    def _compare(self, lane: str) -> None:
        limit = self.shares.get(lane, 0.0) * sum(ws.memory_limit for ws in self._scheduler.workers.values())
        held = self.bytes.get(lane, 0) + sum(by_lane.get(lane, 0) for by_lane in self._kept.values())
        if limit and held > limit:
            if lane not in self.full:
                self.full.add(lane)
                self._scheduler.tell_lane(
                    lane,
                    f"Lane {lane!r} has more than its {format_bytes(int(limit))} of results in memory: "
                    "its new tasks wait until some are released.",
                )
        elif lane in self.full:
            self.full.discard(lane)
            self._scheduler.look_again()

    def stuck(self) -> list[str]:
        """Full lanes with no task on workers and results that wait for tasks not started yet, which may free memory."""
        if not self.full:
            return []
        scheduler = self._scheduler
        running = {scheduler.owner_of(ts.key).lane for ws in scheduler.workers.values() for ts in ws.processing}
        waited = {lane for key, (lane, _) in self._held.items() if lane in self.full - running and scheduler.tasks[key].waiters}
        return sorted(waited)

    def transition(self, key: Any, start: str, finish: str, *args: Any, **kwargs: Any) -> None:
        """Called by distributed."""
        if finish == "memory":
            self.count(self._scheduler.tasks[key], self._scheduler.owner_of(key).lane)
        elif start == "memory":
            self.drop(key)

    def restart(self, scheduler: Scheduler) -> None:
        """Called by distributed."""
        for key in list(self._held):
            self.drop(key)

    def add_worker(self, scheduler: Scheduler, worker: str) -> None:
        """Called by distributed."""
        for lane in list(self.bytes):
            self._compare(lane)

    def remove_worker(self, scheduler: Scheduler, worker: str, **kwargs: Any) -> None:
        """Called by distributed."""
        self._kept.pop(worker, None)
        self.add_worker(scheduler, worker)


class CappedQueue(LaneQueue):
    """A lane queue that holds back the root tasks of full lanes."""

    def __init__(self, leaf_of: Callable[[Any], Share], full: set[str]) -> None:
        super().__init__(leaf_of)
        self._full = full

    def best_at(self, leaf: Share, address: str) -> Any | None:
        """Like LaneQueue's, but for a full lane only tasks with inputs in memory, which may free them."""
        if leaf.lane.name not in self._full or None not in leaf.heaps:
            return super().best_at(leaf, address)
        roots = leaf.heaps.pop(None)
        try:
            return super().best_at(leaf, address)
        finally:
            leaf.heaps[None] = roots


class CappingScheduler(ChargingScheduler):
    """Holds back new tasks of lanes whose results exceed their share of the workers' memory."""

    def cap_memory(self, memory_share: Mapping[str, float] | None) -> None:
        """Start counting; parameter as for FairShareScheduler."""
        self._memory = LaneMemory(self, memory_share or {})
        if memory_share:
            self._held = CappedQueue(self._leaf, self._memory.full)
            self.queued = self._held  # type: ignore[assignment]
            self.add_plugin(self._memory)

    def full_lanes(self) -> set[str]:
        """Lanes whose new tasks wait until results are released."""
        return set(self._memory.full)

    def memory_by_lane(self) -> dict[str, int]:
        """Bytes of results in memory and of data kept by runs on workers, by lane (empty without ``memory_share``)."""
        return self._memory.total()

    def is_kept_back(self, ts: TaskState, leaf: Share) -> bool:
        """Whether a ready task would add results to a full lane; tasks with inputs in memory may free them, and proceed."""
        if leaf.lane.name not in self._memory.full:
            return False
        free = ts._queueable and not (ts.actor or ts.worker_restrictions or ts.host_restrictions or ts.resource_restrictions)
        return free and (not ts.dependencies or self.is_rootish(ts))

    def tell_lane(self, lane: str, text: str) -> None:
        """Show a warning to every client of a lane."""
        for client in list(self.client_comms):
            if self.path_of_client(client)[0] == lane:
                self.tell(client, text)

    def open_stuck_lanes(self) -> None:
        """Let stuck lanes, whose cap is below the needs of a single task, proceed until their next result."""
        for lane in self._memory.stuck():
            self._memory.full.discard(lane)

    def look_again(self) -> None:
        """Retry tasks that could not be sent before."""
        self._fresh = True

    def heartbeat_worker(self, *, address: str, metrics: dict[str, Any], **rest: Any) -> dict[str, Any]:
        """Like distributed's, but also counts what runs keep on the worker for their lanes."""
        answer: dict[str, Any] = super().heartbeat_worker(address=address, metrics=metrics, **rest)
        if self._memory.shares and RESIDENTS_METRIC in metrics:
            by_lane: dict[str, int] = {}
            for client, size in metrics[RESIDENTS_METRIC].items():
                if client in self.clients:
                    lane = self.path_of_client(client)[0]
                    by_lane[lane] = by_lane.get(lane, 0) + size
            self._memory.keep(address, by_lane)
        return answer

    def update_data(self, *, who_has: dict[Any, list[str]], nbytes: dict[Any, int], client: str | None = None) -> None:
        """Like distributed's, but also counts scattered data for the lane of the client."""
        super().update_data(who_has=who_has, nbytes=nbytes, client=client)
        if self._memory.shares:
            for key in who_has:
                lane = self.path_of_client(client)[0] if client in self.clients else self.owner_of(key).lane
                self._memory.count(self.tasks[key], lane)
