"""How many jobs each pool should have, from the pending work, its duration, and the connected clients."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cryodask.cluster.accounting.accounting import pool_of
from cryodask.cluster.fairshare import FairShareScheduler
from cryodask.cluster.settings import PoolSettings, SlurmSettings
from cryodask.cluster.sharing.owners import is_bound

Needs = tuple[tuple[str, float], ...]
"""Resources that a task needs, sorted by name; empty for a thread alone."""


@dataclass(frozen=True)
class PoolShape:
    """What one job of a pool offers, and the limits of the pool. ``resources`` are per worker process."""

    minimum: int
    maximum: int
    threads: int
    workers: int = 1
    resources: Mapping[str, float] = field(default_factory=dict)
    gpus: int = 0
    memory: int = 0

    @classmethod
    def of(cls, name: str, pool: PoolSettings, minimum: int, maximum: int) -> PoolShape:
        """From the settings of a pool."""
        resources = {**pool.worker_resources, f"pool-{name}": 1e9}
        return cls(minimum, maximum, pool.cores, pool.workers_per_job, resources, pool.gpus, pool.memory_bytes)

    def slots(self, needs: Needs) -> int:
        """Number of tasks of a kind that one job can run at a time; 0 if none."""
        per_worker = self.threads // self.workers
        for name, amount in needs:
            if amount > 0:
                per_worker = min(per_worker, int(self.resources.get(name, 0.0) / amount))
        return per_worker * self.workers

    @property
    def price(self) -> tuple[bool, float]:
        """Sort key: pools without GPUs first, then those with less memory per thread."""
        return self.gpus > 0, self.memory / self.threads


@dataclass
class Work:
    """Tasks of one kind: pending ones, and running ones per pool. Seconds are estimated totals."""

    waiting: float = 0.0
    waiting_seconds: float = 0.0
    running: dict[str, float] = field(default_factory=dict)
    running_seconds: float = 0.0

    def extra_slots(self, seconds: float) -> float:
        """Additional slots needed to finish within this time; never more than there are pending tasks."""
        running = sum(self.running.values())
        return max(0.0, min(self.waiting, (self.waiting_seconds + self.running_seconds) / seconds - running))


def jobs_wanted(pools: Mapping[str, PoolShape], work: Mapping[Needs, Work], *, seconds: float, floor: int = 0) -> dict[str, int]:
    """Jobs that each pool should have now.

    Parameters
    ----------
    pools : mapping of str to PoolShape
    work : mapping of Needs to Work
        Every kind goes to the pools that can run it, cheapest first; tasks that few pools can run are assigned before the others.
    seconds : float
        Time in which the work should be done.
    floor : int
        Least number of threads, whatever the work.

    Returns
    -------
    dict of str to int
        Between each pool's ``minimum`` and ``maximum``. More pending work never means fewer jobs of any pool.
    """
    order = sorted(pools, key=lambda name: pools[name].price)
    load = dict.fromkeys(pools, 0.0)
    for needs, kind in work.items():
        for name in set(kind.running) & set(pools):
            load[name] = min(load[name] + kind.running[name] / (pools[name].slots(needs) or pools[name].threads), pools[name].maximum)
    fitting = {needs: [name for name in order if pools[name].slots(needs)] for needs in work}
    for needs in sorted(work, key=lambda needs: (len(fitting[needs]), needs)):
        extra = work[needs].extra_slots(seconds)
        for name in fitting[needs]:
            jobs = min(extra / pools[name].slots(needs), pools[name].maximum - load[name])
            load[name] += jobs
            extra -= jobs * pools[name].slots(needs)
    wanted = {}
    for name in order:
        shape = pools[name]
        for_floor = min(shape.maximum, math.ceil(max(floor, 0) / shape.threads))
        floor -= for_floor * shape.threads
        wanted[name] = min(shape.maximum, max(shape.minimum, for_floor, math.ceil(load[name] - 1e-9)))
    return wanted


class Recent:
    """The maximum over a time window, so that a pool grows at once and shrinks late."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._peaks: deque[tuple[float, int]] = deque()

    def add(self, now: float, number: int) -> int:
        """Add a number; returns the maximum including it."""
        while self._peaks and self._peaks[-1][1] <= number:
            self._peaks.pop()
        self._peaks.append((now, number))
        while self._peaks[0][0] < now - self._seconds:
            self._peaks.popleft()
        return self._peaks[0][1]

    def begin_with(self, now: float, number: int) -> None:
        """Forget earlier numbers and start with this one, which lasts as long as any other."""
        self._peaks.clear()
        self._peaks.append((now, number))


class Scaler:
    """Computes the numbers of jobs of pools with a ``maximum``; the other pools have fixed numbers."""

    def __init__(self, settings: SlurmSettings) -> None:
        self._settings = settings
        self._recent = {n: Recent(60 * settings.idle_minutes) for n, pool in settings.pools.items() if pool.maximum is not None}
        self.stopped = False
        """Set while all pools are scaled to zero by hand."""

    def __contains__(self, pool: str) -> bool:
        return pool in self._recent

    def by_hand(self, jobs: Mapping[str, int], now: float) -> None:
        """Set numbers of jobs by hand: they stay for at least ``idle_minutes``, then follow the work."""
        self.stopped = False
        for name in set(jobs) & set(self._recent):
            self._recent[name].begin_with(now, jobs[name])

    def targets(self, scheduler: FairShareScheduler, jobs: Mapping[str, int], closed: Iterable[str], now: float) -> dict[str, int]:
        """Number of jobs that each of these pools should have.

        Parameters
        ----------
        scheduler : FairShareScheduler
        jobs : mapping of str to int
            Current targets of all pools.
        closed : iterable of str
            Pools that get no more jobs, so that their work goes to others.
        now : float
            Seconds of ``time.monotonic()``.
        """
        if self.stopped or scheduler.draining or not self._recent:
            return {}
        closed, shapes = set(closed), {}
        for name, pool in self._settings.pools.items():
            fixed = name in closed or pool.maximum is None
            least, most = (jobs[name], jobs[name]) if fixed else (pool.minimum, pool.maximum or 0)
            shapes[name] = PoolShape.of(name, pool, least, most)
        wanted = jobs_wanted(
            shapes, work_of(scheduler), seconds=60 * self._settings.catch_up_minutes, floor=_floor(scheduler, self._settings.floor)
        )
        return {name: recent.add(now, wanted[name]) for name, recent in self._recent.items() if name not in closed}


def work_of(scheduler: FairShareScheduler) -> dict[Needs, Work]:
    """All tasks that more jobs could run: ready tasks on workers, held ones, those without a suitable worker, and announced ones.

    Tasks bound to named workers (``workers=``) and new tasks of lanes whose memory is full are left out, because more jobs would not
    help them.
    """
    found: dict[Needs, Work] = {}

    def wait(needs: Mapping[str, float] | None, tasks: float, seconds: float) -> Work:
        work = found.setdefault(tuple(sorted((needs or {}).items())), Work())
        work.waiting += tasks
        work.waiting_seconds += seconds
        return work

    full = scheduler.full_lanes()
    for entry in (*scheduler.waiting_work(), *scheduler.announced_work()):
        if not entry["bound"] and (entry["resources"] or entry["lane"] not in full):
            wait(entry["resources"], entry["tasks"], entry["seconds"])
    for ws in scheduler.workers.values():
        tasks = [ts for ts in ws.processing if ts not in ws.long_running]
        runs = min(1.0, ws.nthreads / len(tasks)) if tasks else 0.0  # the rest is queued on the worker
        pool = pool_of(ws)
        for ts in tasks:
            ahead, seconds = 0.0 if is_bound(ts) else 1 - runs, scheduler.estimate(ts)
            work = wait(ts.resource_restrictions, ahead, ahead * seconds)
            work.running[pool] = work.running.get(pool, 0.0) + runs
            work.running_seconds += runs * seconds
    return found


def _floor(scheduler: FairShareScheduler, floors: Mapping[str, int]) -> int:
    lanes: Mapping[str, Any] = scheduler.lanes_now() if floors else {}
    return sum(threads for lane, threads in floors.items() if lanes.get(lane, {}).get("clients"))
