"""Accounting of worker usage: counted by the scheduler as tasks end, and kept in a journal that outlives it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

from distributed.diagnostics.plugin import SchedulerPlugin
from distributed.scheduler import WorkerState
from tornado.ioloop import PeriodicCallback

from cryodask.cluster.accounting.journal import Sums, UsageJournal, add, bucket_seconds, bucket_start
from cryodask.cluster.fairshare import FairShareScheduler

logger = logging.getLogger("cryodask.cluster")

KEYS = ("lane", "user", "project", "pool")
NO_POOL = "-"
"""Pool of waiting tasks, which have no worker yet."""
OTHER = "other"
"""User and project (and lane if it is new as well) of everything beyond ``MOST_KEYS`` combinations since the start."""
MOST_KEYS = 1000

_TICK_SECONDS = 1.0
_WRITE_SECONDS = 5.0
_SYNC_SECONDS = 60.0
_KEPT_SAMPLES = 3600


@dataclass(slots=True)
class Use:
    """Usage under one key; see :meth:`Accounting.usage`."""

    task_seconds: float = 0.0
    waiting_seconds: float = 0.0
    tasks: int = 0
    failed: int = 0
    lost: int = 0
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class Sample:
    """State of the lanes at one moment: seconds of work since the start (with running tasks), numbers of waiting and running tasks."""

    when: float
    seconds: dict[str, float]
    waiting: dict[str, int]
    running: dict[str, int]


class Accounting(SchedulerPlugin):
    """Counts the work of a ``FairShareScheduler`` by lane, user, project and pool. Make one with :meth:`attach`.

    Notes
    -----
    A task that ends, successfully or with an error, counts the compute time that its worker measured. A run that is interrupted, because
    its worker dies or the task is cancelled, released or rescheduled, counts from the start that the worker reported in its last heartbeat
    (every half second to few seconds): an interrupted run shorter than that counts nothing. A task that leaves its thread (``secede``)
    counts up to then. Method calls of actors are not tasks. Waiting is the number of ready tasks held by the scheduler, integrated over
    time and sampled once per second: it costs nothing per task.

    The journal is written every five seconds and synced to disk every minute and at the end: a scheduler killed with SIGKILL loses up to
    five seconds.
    """

    name = "cryodask-accounting"

    def __init__(self, scheduler: FairShareScheduler, folder: str | Path | None = None) -> None:
        self._scheduler = scheduler
        self._journal: UsageJournal | None = None
        self._kept: Sums = {}
        self._use: dict[tuple[str, ...], Use] = {}
        self._since_start: dict[tuple[str, ...], Use] = {}
        self._keys: set[tuple[str, ...]] = set()
        self._lanes: set[str] = set()
        self._pools: dict[str, str] = {}
        # runs reported in heartbeats: key -> pool, start
        self._running: dict[Any, tuple[str, float]] = {}
        self._seceded: set[Any] = set()
        self.samples: deque[Sample] = deque(maxlen=_KEPT_SAMPLES)
        """One per second, for an hour."""
        self._looked = time.monotonic()
        self._written, self._synced, self._compacted = self._looked, self._looked, 0
        self._failing = False
        self._handle: dict[str, Any] = {}
        self._syncing: asyncio.Future[None] | None = None
        if folder is not None:
            self.keep_in(folder)

    @classmethod
    def attach(cls, scheduler: FairShareScheduler, folder: str | Path | None = None) -> Accounting:
        """Start counting; must be called in the scheduler's event loop.

        Parameters
        ----------
        scheduler : FairShareScheduler
            If it has an accounting already, that is returned and keeps its journal in ``folder`` from now on.
        folder : path, optional
            Folder of ``usage.jsonl``, which is continued if it exists. Without it everything is lost with the scheduler.
        """
        known = scheduler.plugins.get(cls.name)
        if isinstance(known, cls):
            if folder is not None:
                known.keep_in(folder)
            return known
        accounting = cls(scheduler, folder)
        # plugin hooks see neither failed runs that are retried, nor tasks that secede
        handlers = scheduler.stream_handlers
        accounting._handle = {op: handlers[op] for op in ("task-finished", "task-erred", "long-running")}
        handlers |= {"task-finished": accounting._finished, "task-erred": accounting._erred, "long-running": accounting._left_its_thread}
        scheduler.add_plugin(accounting)
        ticking = scheduler.periodic_callbacks["accounting"] = PeriodicCallback(accounting.tick, _TICK_SECONDS * 1000)
        ticking.start()
        from cryodask.cluster.accounting.panel import add_pages

        add_pages(scheduler, accounting)
        return accounting

    def keep_in(self, folder: str | Path) -> None:
        """Keep a journal in this folder, continuing from its content."""
        self._journal = UsageJournal(folder, KEYS)
        now = time.time()
        kept, self._kept = self._kept, self._journal.compact(now)
        for key, figures in kept.items():  # counted before there was a journal
            add(self._kept, key, figures)
        self._journal.append(kept)
        self._compacted = bucket_start(now, now)

    # --- tasks that end ------------------------------------------------------------------------------------------------------------
    def _of(self, key: Any, pool: str) -> Use:
        path = (*self._scheduler.owner_of(key).path, pool)
        return self._use.get(path) or self._use_of(path)

    def _use_of(self, path: tuple[str, ...]) -> Use:
        """Usage of a path, limited in number: names are free text, and everything counted under one is kept."""
        if path not in self._keys:
            if len(self._keys) < MOST_KEYS:
                self._keys.add(path)
                self._lanes.add(path[0])
            else:
                path = (path[0] if path[0] in self._lanes else OTHER, OTHER, OTHER, path[-1])
        return self._use.setdefault(path, Use())

    def _pool(self, worker: str) -> str:
        pool = self._pools.get(worker)
        if pool is None:
            pool = self._pools[worker] = pool_of(self._scheduler.workers.get(worker))
        return pool

    def _ended(self, key: Any, worker: str, message: dict[str, Any]) -> Use:
        use = self._of(key, self._pool(worker))
        self._running.pop(key, None)
        if key in self._seceded:
            self._seceded.discard(key)
        else:
            for span in message["startstops"]:
                if span["action"] == "compute":
                    use.task_seconds += span["stop"] - span["start"]
        return use

    def _finished(self, key: Any, worker: str, stimulus_id: str, **message: Any) -> None:
        try:
            if key in self._scheduler.tasks and worker in self._scheduler.workers:
                use = self._ended(key, worker, message)
                use.tasks += 1
                use.bytes += message["nbytes"] or 0
        except Exception:  # an error here would close the connection to the worker
            logger.exception("a task could not be counted")
        self._handle["task-finished"](key=key, worker=worker, stimulus_id=stimulus_id, **message)

    def _erred(self, key: Any, worker: str, stimulus_id: str, **message: Any) -> None:
        try:
            if key in self._scheduler.tasks and worker in self._scheduler.workers:
                self._ended(key, worker, message).failed += 1
        except Exception:
            logger.exception("a task could not be counted")
        self._handle["task-erred"](key=key, worker=worker, stimulus_id=stimulus_id, **message)

    def _left_its_thread(self, key: Any, worker: str, **message: Any) -> None:
        ts = self._scheduler.tasks.get(key)
        current = ts is not None and ts.processing_on is not None and (ts.processing_on.address, ts.run_id) == (worker, message["run_id"])
        if current and key not in self._seceded:  # distributed also ignores a late report of another run
            self._of(key, self._pool(worker)).task_seconds += message.get("compute_duration") or 0.0
            self._running.pop(key, None)
            self._seceded.add(key)
        self._handle["long-running"](key=key, worker=worker, **message)

    def transition(self, key: Any, start: str, finish: str, *args: Any, **kwargs: Any) -> None:
        """Called by distributed; a known run that leaves its worker without a report was interrupted."""
        if start == "processing" and (key in self._running or key in self._seceded):
            self._seceded.discard(key)
            run = self._running.pop(key, None)
            if run is not None:
                use = self._of(key, run[0])
                use.task_seconds += max(0.0, time.time() - run[1])
                use.lost += 1

    def remove_worker(self, scheduler: Any, worker: str, **kwargs: Any) -> None:
        """Called by distributed."""
        self._pools.pop(worker, None)

    async def before_close(self) -> None:
        """Called by distributed; writes the last lines of the journal."""
        self.tick()
        self.write()
        if self._journal is not None:
            await asyncio.get_running_loop().run_in_executor(None, self._journal.sync)

    # --- each second ---------------------------------------------------------------------------------------------------------------
    def tick(self) -> None:
        """Sample running and waiting tasks, and write the journal when it is due."""
        now = time.monotonic()
        passed, self._looked = now - self._looked, now
        waiting: dict[str, int] = {}
        for owner, tasks in self._scheduler.waiting_by_owner().items():
            waiting[owner[0]] = waiting.get(owner[0], 0) + tasks
            self._use_of((*owner, NO_POOL)).waiting_seconds += tasks * passed
        self._look_at_workers()
        self._sample(waiting)
        if now - self._written >= _WRITE_SECONDS:
            self._written = now
            self.write()
        if now - self._synced >= _SYNC_SECONDS and self._journal is not None:
            self._synced = now
            if self._syncing is None or self._syncing.done():  # a slow file system must not block the scheduler
                self._syncing = asyncio.get_running_loop().run_in_executor(None, self._journal.sync)

    def _look_at_workers(self) -> None:
        self._running = {
            ts.key: (self._pool(address), ws.last_seen - seconds)
            for address, ws in self._scheduler.workers.items()
            for ts, seconds in ws.executing.items()
            # a heartbeat is slightly old: skip runs that have ended since
            if ts in ws.processing and ts not in ws.long_running
        }

    def _sample(self, waiting: dict[str, int]) -> None:
        now, seconds, running = time.time(), dict[str, float](), dict[str, int]()
        for uses in (self._since_start, self._use):
            for path, use in uses.items():
                if use.task_seconds:
                    seconds[path[0]] = seconds.get(path[0], 0.0) + use.task_seconds
        for key, (_, start) in self._running.items():
            lane = self._scheduler.owner_of(key).lane
            seconds[lane] = seconds.get(lane, 0.0) + max(0.0, now - start)
            running[lane] = running.get(lane, 0) + 1
        self.samples.append(Sample(now, seconds, waiting, running))

    def write(self) -> None:
        """Append what was counted since the last write to the journal; on a full disk it stays in memory and is retried."""
        now = time.time()
        start = bucket_start(now, now)
        new = {(start, path): asdict(use) for path, use in self._use.items() if any(astuple(use))}
        try:
            if self._journal is not None:
                self._journal.append(new)
            for key, figures in new.items():
                add(self._kept, key, figures)
                _add_use(self._since_start.setdefault(key[1], Use()), self._use[key[1]])
            self._use.clear()
            if self._journal is not None and start > self._compacted:
                self._kept = self._journal.compact(now)
                self._compacted = start
        except OSError as error:
            if self._journal is not None and not self._failing:
                logger.warning("the usage journal %s cannot be written; usage is kept in memory: %s", self._journal.path, error)
            self._failing = True
        else:
            self._failing = False

    # --- what users ask ------------------------------------------------------------------------------------------------------------
    def usage(self, since: float | None = None, by: Sequence[str] = KEYS) -> list[dict[str, Any]]:
        """Usage, one row per combination of the names in ``by``.

        Parameters
        ----------
        since : float, optional
            Seconds since 1970; counted in whole hours, including that of ``since`` (whole days for entries older than two months).
        by : sequence of str
            Some of ``lane``, ``user``, ``project``, ``pool``.

        Returns
        -------
        list of dict
            ``task_seconds`` (thread seconds of tasks), ``waiting_seconds`` (task seconds of waiting; their pool is ``-``), ``tasks``
            (successful runs), ``failed`` (runs that raised), ``lost`` (interrupted runs), ``bytes`` (of results in memory).
        """
        now = time.time()
        sums: Sums = {key: dict(figures) for key, figures in self._kept.items()}
        for path, use in self._use.items():
            add(sums, (bucket_start(now, now), path), asdict(use))
        return _rows(sums, since, by)

    def since_start(self) -> dict[tuple[str, ...], Use]:
        """Usage since this scheduler started, by (lane, user, project, pool); it never decreases, as Prometheus requires."""
        total = {path: Use(*astuple(use)) for path, use in self._since_start.items()}
        for path, use in self._use.items():
            _add_use(total.setdefault(path, Use()), use)
        return total


def read_usage(folder: str | Path, since: float | None = None, by: Sequence[str] = KEYS) -> list[dict[str, Any]]:
    """Like :meth:`Accounting.usage`, but from the journal in a folder, with or without its scheduler; up to five seconds old."""
    return _rows(UsageJournal(folder, KEYS).read(), since, by)


def read_history(folder: str | Path, since: float | None = None, by: Sequence[str] = KEYS) -> list[dict[str, Any]]:
    """Like :func:`read_usage`, but one row per hour (per day for entries older than two months) and combination, the oldest first.

    ``from`` and ``seconds`` are the start of that time, in seconds since 1970, and its length.
    """
    now = time.time()
    buckets: dict[tuple[int, int], Sums] = {}
    for (start, path), figures in UsageJournal(folder, KEYS).read().items():
        # until the file is compacted, it has single hours of days that count as a whole by now
        bucket = bucket_start(start, now), bucket_seconds(start, now)
        add(buckets.setdefault(bucket, {}), (0, path), figures)
    first = float("-inf") if since is None else bucket_start(since, now)
    return [
        {"from": start, "seconds": length, **row}
        for (start, length), sums in sorted(buckets.items())
        if start >= first
        for row in _rows(sums, None, by)
    ]


def pool_of(ws: WorkerState | None) -> str:
    """Name of a worker's pool, from its resource ``pool-NAME``; ``local`` for a worker without one."""
    return next((name[5:] for name in (ws.resources if ws is not None else ()) if name.startswith("pool-")), "local")


def _add_use(into: Use, more: Use) -> None:
    for name in Use.__slots__:
        setattr(into, name, getattr(into, name) + getattr(more, name))


def _rows(sums: Sums, since: float | None, by: Iterable[str]) -> list[dict[str, Any]]:
    by = tuple(by)
    unknown = set(by) - set(KEYS)
    if unknown:
        raise ValueError(f"usage can be grouped by {', '.join(KEYS)}, not by {', '.join(sorted(unknown))}")
    places = [KEYS.index(name) for name in by]
    rows: Sums = {}
    for (start, path), figures in sums.items():
        if since is None or start >= bucket_start(since, time.time()):
            add(rows, (0, tuple(path[i] for i in places)), figures)
    zero = asdict(Use())
    return [
        {**dict(zip(by, path)), **{name: type(kind)(figures.get(name, 0)) for name, kind in zero.items()}}
        for (_, path), figures in sorted(rows.items())
    ]
