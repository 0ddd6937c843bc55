"""Threads reserved for a lane, the limit of tasks per worker, and workers with free resources."""

from __future__ import annotations

import math
from collections.abc import Mapping

from distributed import Scheduler
from distributed.scheduler import TaskState, WorkerState

from cryodask.cluster.sharing.lanes import Place, Share
from cryodask.cluster.sharing.memory import CappingScheduler


class ReservingScheduler(CappingScheduler):
    """Reserves threads for lanes; tasks restricted to such workers still run there, on idle threads."""

    AHEAD, AHEAD_SECONDS, AHEAD_SECONDS_OF_SEVERAL, AHEAD_MOST = 2, 0.1, 0.02, 8
    """Tasks per thread that a lane may have on a worker while no other lane has tasks; for short tasks, seconds of work per thread (fewer
    if several lanes have tasks), up to a maximum number of tasks, because their duration is a guess from others of their name. A lane that
    becomes active overtakes them there."""

    def reserve_threads(self, reserve: Mapping[str, int] | None) -> None:
        """Start reserving threads; parameter as for FairShareScheduler."""
        self._reserve = dict(reserve or {})
        self._reserved: dict[str, tuple[str, int]] = {}

    def choose_reserved(self, gone: str | None = None) -> None:
        """Choose the reserved threads among the running workers again; at least one stays open to everybody."""
        self._reserved.clear()
        running = sorted((ws for ws in self.running if ws.address != gone), key=lambda ws: ws.address)
        most = sum(ws.nthreads for ws in running) - 1
        for lane, threads in self._reserve.items():
            left = min(threads, most)
            most -= max(left, 0)
            for ws in running:
                if left > 0 and ws.address not in self._reserved:
                    kept = min(left, ws.nthreads)
                    self._reserved[ws.address] = (lane, kept)
                    left -= kept

    def is_closed(self, ws: WorkerState | None, lane: Share) -> bool:
        """Whether all threads of a worker are reserved for others."""
        kept = self._reserved.get(ws.address) if ws is not None else None
        return ws is not None and kept is not None and kept[0] != lane.name and kept[1] >= ws.nthreads

    def is_unoccupied(self, ws: WorkerState, occupancy: float, nprocessing: int) -> bool:
        """Like distributed's, but a reserved thread does not attract stolen tasks."""
        if self._reserved and nprocessing:
            kept = self._reserved.get(ws.address)
            if kept is not None and nprocessing + kept[1] >= ws.nthreads:
                return False
        return Scheduler.is_unoccupied(self, ws, occupancy, nprocessing)

    def has_room(self, ws: WorkerState, lane: Share, saturation: float) -> bool:
        """Whether a worker may get another task of a lane."""
        busy = len(ws.processing) - len(ws.long_running)
        kept = self._reserved.get(ws.address)
        if kept is not None and kept[0] != lane.name:
            own = sum(ts not in ws.long_running and self.owner_of(ts.key).lane == kept[0] for ts in ws.processing)
            return busy - own + kept[1] < ws.nthreads
        if busy < max(math.ceil(saturation * ws.nthreads), 1):
            return True
        seconds = self.AHEAD_SECONDS if saturation == self.AHEAD else self.AHEAD_SECONDS_OF_SEVERAL
        return ws.occupancy < seconds * ws.nthreads and busy < self.AHEAD_MOST * ws.nthreads

    def next_with_resources(self, clock: Share) -> tuple[TaskState, WorkerState] | None:
        """The next task with resources to send, and its worker."""
        able: dict[Place, set[WorkerState]] = {}
        free: dict[Place, set[WorkerState]] = {}
        kept: WorkerState | None = None
        for leaf in clock.leaves_in_turn():
            for place in list(leaf.heaps):
                entry = self._held.top(leaf, place)
                if entry is None:
                    continue
                ts = entry[2]
                if place not in able:
                    able[place] = self._workers_with_resources(ts)
                    free[place] = {ws for ws in able[place] if _has_free(ws, ts)}
                chosen = [ws for ws in free[place] if ws is not kept]
                if self._reserved and any(not self.is_closed(ws, leaf.lane) for ws in able[place]):
                    chosen = [ws for ws in chosen if self.has_room(ws, leaf.lane, self.AHEAD)]
                if chosen:
                    return ts, min(chosen, key=load)
                if kept is None and able[place]:
                    # a worker is drained for the task whose turn it is, because small requests of others would starve large ones
                    kept = min(able[place], key=lambda ws: sum(ws.used_resources.get(r, 0.0) for r in ts.resource_restrictions))
        return None

    def _workers_with_resources(self, ts: TaskState) -> set[WorkerState]:
        """Running workers that have the resources of a task, in use or not."""
        valid = self.valid_workers(ts)
        if not valid and ts.loose_restrictions:
            needs = (ts.resource_restrictions or {}).items()
            valid = {ws for ws in self.running if all(ws.resources.get(r, 0.0) >= need for r, need in needs)}
        return self.running & (valid or set())


def load(ws: WorkerState) -> float:
    """Tasks per thread on a worker."""
    return len(ws.processing) / ws.nthreads


def _has_free(ws: WorkerState, ts: TaskState) -> bool:
    """Whether the resources of a task and a thread are free now; such tasks never queue on a worker."""
    needs = (ts.resource_restrictions or {}).items()
    return (
        all(ws.used_resources.get(r, 0.0) + need <= ws.resources.get(r, 0.0) for r, need in needs)
        and sum(bool(t.resource_restrictions) and t not in ws.long_running for t in ws.processing) < ws.nthreads
    )  # fmt: skip
