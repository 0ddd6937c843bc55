"""What a worker process keeps between tasks: jobs, states, blocks of images, banks of projections, opened generations.

One cache per process. If several threads ask for the same object, one makes it and the others wait. The least recently used objects are
dropped when the bytes exceed a share of the worker's memory; all objects of a run are dropped when the driver says that the run has
ended, or when none was used for a while (its driver is dead). Heartbeats report the bytes to the scheduler, which charges them to the
lane of the run.
"""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import psutil
from distributed import Client, Future, get_worker
from distributed.client import ClosedClientError

from cryodask.cluster.sharing.memory import RESIDENTS_METRIC
from cryodask.context import return_freed_memory

T = TypeVar("T")

SHARE_OF_MEMORY = 0.5
"""Fraction of a worker's memory limit; the rest is for the tasks themselves and for results."""
_PATIENCE_SECONDS = 1.0
IDLE_SECONDS = 900.0
"""Time after which a run is considered dead. If it is alive after all, it recreates its objects and loses only time."""


class Run(NamedTuple):
    """Owner of objects: the client of the driver, and a token of the run."""

    client: str
    token: str


@dataclass
class _Entry:
    value: Any
    stamp: Any
    bytes: int
    used: float


@dataclass
class Residents:
    """Cache of objects by run and key.

    Parameters
    ----------
    limit_bytes : int, optional
        By default SHARE_OF_MEMORY of the current worker's limit, or of the machine's memory outside a worker.
    """

    limit_bytes: int | None = None
    _entries: OrderedDict[tuple[Run, Hashable], _Entry] = field(default_factory=OrderedDict)
    _making: dict[tuple[Run, Hashable], threading.Event] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def get(self, run: Run, key: Hashable, make: Callable[[], T], *, stamp: Any = None) -> T:
        """The object under a key of a run; made by one thread if it is missing or has another ``stamp``."""
        place = run, key
        while True:
            with self._lock:
                entry = self._entries.get(place)
                if entry is not None and entry.stamp == stamp:
                    self._entries.move_to_end(place)
                    entry.used = time.monotonic()
                    kept: T = entry.value
                    return kept
                others = self._making.get(place)
                if others is None:
                    mine = self._making[place] = threading.Event()
                    entry = self._entries.pop(place, None)  # free it before making its successor
                    break
            others.wait()
        entry = None
        try:
            value = make()
            with self._lock:
                self._entries[place] = _Entry(value, stamp, size_of(value), time.monotonic())
                self._make_room()
            return value
        finally:
            with self._lock:
                del self._making[place]
            mine.set()

    def holds(self, run: Run, key: Hashable) -> bool:
        """Whether there is an object under a key of a run."""
        with self._lock:
            return (run, key) in self._entries

    def _drop_idle(self) -> None:
        now = time.monotonic()
        for place in [p for p, e in self._entries.items() if now - e.used > IDLE_SECONDS]:
            del self._entries[place]

    def _make_room(self) -> None:
        limit = self._limit()
        self._drop_idle()
        held = sum(entry.bytes for entry in self._entries.values())
        while held > limit and len(self._entries) > 1:
            _, entry = self._entries.popitem(last=False)
            held -= entry.bytes

    def _limit(self) -> int:
        if self.limit_bytes is None:
            memory = None
            with suppress(ValueError):  # not in a worker process
                worker = get_worker()
                memory = worker.memory_manager.memory_limit
                worker.metrics.setdefault(RESIDENTS_METRIC, lambda worker: self.bytes_by_client())
            self.limit_bytes = int(SHARE_OF_MEMORY * (memory or psutil.virtual_memory().total))
        return self.limit_bytes

    def release(self, run: Run) -> None:
        """Drop all objects of a run, and those that were not used for IDLE_SECONDS."""
        with self._lock:
            for place in [p for p in self._entries if p[0] == run]:
                del self._entries[place]
            self._drop_idle()

    def bytes_by_client(self) -> dict[str, int]:
        """Bytes kept, by client of the driver. Called at every heartbeat, so it also drops the objects of dead drivers."""
        with self._lock:
            self._drop_idle()
            out: dict[str, int] = {}
            for (run, _), entry in self._entries.items():
                out[run.client] = out.get(run.client, 0) + entry.bytes
            return out


def size_of(value: Any, seen: set[int] | None = None) -> int:
    """Bytes of the arrays and tensors in a value, each counted once; code (classes, modules) is not counted."""
    seen = set() if seen is None else seen
    if id(value) in seen or isinstance(value, str | bytes | int | float | type(None) | type | ModuleType):
        return len(value) if isinstance(value, bytes) else 0
    seen.add(id(value))
    size = getattr(value, "nbytes", None)
    if isinstance(size, int):
        return size
    parts: Iterable[Any] = ()
    if isinstance(value, dict):
        parts = value.values()
    elif isinstance(value, list | tuple):
        parts = value
    elif hasattr(value, "__dict__"):
        parts = vars(value).values()
    return sum(size_of(part, seen) for part in parts)


RESIDENTS = Residents()
"""The cache of this process."""


_NOBODY = Run("", "outside")
CURRENT: ContextVar[Run] = ContextVar("run", default=_NOBODY)
"""The run whose task this thread executes."""


@contextmanager
def in_run(run: Run) -> Iterator[None]:
    """Context manager around a task: objects kept within belong to the run."""
    token = CURRENT.set(run)
    try:
        yield
    finally:
        CURRENT.reset(token)


@contextmanager
def run_here() -> Iterator[Run]:
    """A run in this process; its objects are dropped when the block ends."""
    run = Run("", os.urandom(4).hex())
    try:
        with in_run(run):
            yield run
    finally:
        release(run)


def keep(key: Hashable, make: Callable[[], T]) -> T:
    """The object under a key of the current task's run, made if it is missing."""
    return RESIDENTS.get(CURRENT.get(), key, make)


def new_run(client: Client) -> Run:
    """A new run of a driver."""
    return Run(str(client.id), os.urandom(4).hex())


def release(run: Run) -> None:
    """Drop what this process keeps for a run, and return the memory to the system."""
    RESIDENTS.release(run)
    return_freed_memory()


_STOPPED = "stopped"


def _stop_here(run: Run) -> None:
    RESIDENTS.get(run, _STOPPED, lambda: True)


def stopped_here(run: Run) -> bool:
    """Whether the driver of a run has told this process to start nothing more for it."""
    return RESIDENTS.holds(run, _STOPPED)


def release_everywhere(client: Client, run: Run, addresses: Iterable[str]) -> None:
    """Tell the workers that a run has ended. Workers that are busy find out by themselves after IDLE_SECONDS."""
    told = _tell_everywhere(client, release, run, addresses)
    with suppress(ClosedClientError, RuntimeError, OSError):
        try:
            # distributed's wait() uses the default client, which may be another one
            until = time.monotonic() + _PATIENCE_SECONDS
            while time.monotonic() < until and not all(future.done() for future in told):
                time.sleep(0.02)
        finally:
            # a task for a lost worker would stay forever and keep a service from ending
            for future in told:
                future.release()


def stop_everywhere(client: Client, run: Run, addresses: Iterable[str]) -> list[Future[Any]]:
    """Tell the workers to start nothing more for a run; tasks in flight continue. The caller must keep the returned futures."""
    return _tell_everywhere(client, _stop_here, run, addresses)


def _tell_everywhere(client: Client, what: Callable[[Run], None], run: Run, addresses: Iterable[str]) -> list[Future[Any]]:
    """Submit a task to each worker that runs before all others."""
    name = what.__name__.strip("_")
    with suppress(ClosedClientError, RuntimeError, OSError):  # the scheduler may be gone, too
        return [
            client.submit(what, run, workers=[address], key=f"{name}-{run.token}-{address}", pure=False, retries=0, priority=2)
            for address in addresses
        ]
    return []
