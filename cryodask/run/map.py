"""The map runner: every item of a source goes through one fused task that commits it; any worker, item or driver may die at any time.

States of an item: waiting (source, ready, backoff, suspect) -> running (-> isolated) -> done | quarantined. Results are never gathered: a
task returns after its commit, and the journal knows what is done. When a worker dies, Dask blames every task that was sent to it; those
items are run again in child processes, so that a guilty one is convicted by its own signal and the innocent ones are committed.
"""

from __future__ import annotations

import ctypes
import hashlib
import heapq
import os
import pickle
import queue
import signal
import subprocess
import sys
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import cloudpickle
import dask
from distributed import Client, Future, KilledWorker

from cryodask.errors import ClusterError, CryodaskError
from cryodask.store.project import Item

_TRIES = 3
_RETRIED = (OSError, TimeoutError, MemoryError)


class Job(Protocol):
    """What is done with the items. Travels pickled, is unpickled once a process; ``run`` processes AND commits."""

    def run(self, item: Item, device: str) -> None:
        """Process and commit one item (in a worker)."""
        ...

    def quarantine(self, item: Item, error: str, message: str, tries: int) -> None:
        """Record in the driver that an item failed for good."""
        ...


class ItemFailure(Exception):
    """(class name, message, "retry" | "quarantine" | "stop"): plain values, so that any stage's exception survives the way back."""


class ItemDied(ItemFailure):
    """The child process of an isolated item died: that item is guilty beyond doubt."""


_JOBS: OrderedDict[bytes, Job] = OrderedDict()
_JOBS_KEPT = 4


def _job(blob: bytes) -> Job:
    key = hashlib.blake2b(blob, digest_size=8).digest()
    if key not in _JOBS:
        _JOBS[key] = pickle.loads(blob)
    _JOBS.move_to_end(key)
    while len(_JOBS) > _JOBS_KEPT:
        _JOBS.popitem(last=False)
    return _JOBS[key]


def _attempt(blob: bytes, item: Item, device: str) -> tuple[str, str, str] | None:
    try:
        _job(blob).run(item, device)
    except CryodaskError as error:
        return type(error).__name__, str(error)[:2000], error.on_failure
    except _RETRIED as error:
        return type(error).__name__, str(error)[:2000], "retry"
    except Exception as error:  # the runner's single edge: whatever a stage raises ends as a record
        return type(error).__name__, str(error)[:2000], "quarantine"
    return None


def work(item: Item, *, blob: bytes, device: str, isolated: bool) -> None:
    """What a worker does with one item; the state of the future is the acknowledgement."""
    failure = _in_child(blob, item, device) if isolated else _attempt(blob, item, device)
    if failure:
        raise ItemFailure(*failure)


def _in_child(blob: bytes, item: Item, device: str) -> tuple[str, str, str] | None:
    # multiprocessing cannot do it: Dask's workers are daemonic
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-W", "ignore", "-c", "from cryodask.run.map import _child; _child()"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)
    out, log = process.communicate(pickle.dumps((blob, item, device)))
    if process.returncode:
        code = process.returncode
        why = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        tail = log.decode(errors="replace").strip()[-300:]
        raise ItemDied("ProcessDied", f"the process that worked on it died: {why}. {tail}", "quarantine")
    return pickle.loads(out)


def _child() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # die with the worker (Linux: PR_SET_PDEATHSIG)
    reply = os.dup(1)
    os.dup2(2, 1)  # what a stage prints must not get into the reply
    failure = _attempt(*pickle.load(sys.stdin.buffer))
    os.write(reply, pickle.dumps(failure))


class MapRunner:
    """Send items to the workers through a sliding window, and account for every one of them.

    Parameters
    ----------
    client : Client
    job : Job
    event : callable ``(kind, item or None, text)``
        Told of every item that is ``done``, ``quarantined`` or tried ``again``, and of a stall.
    """

    def __init__(
        self,
        client: Client,
        job: Job,
        *,
        lane: str = "batch",
        event: Callable[[str, Item | None, str], None] = lambda kind, item, text: None,
        stall_after_seconds: float = 30.0,
        backoff_seconds: float = 1.0,
    ) -> None:
        self.client, self.job, self.lane, self.event = client, job, lane, event
        self.stall_after, self.backoff = stall_after_seconds, backoff_seconds
        self.blob = cloudpickle.dumps(job)
        self.flying: dict[str, tuple[Future, Item, bool]] = {}
        self.ready: deque[Item] = deque()
        self.later: list[tuple[float, int, Item]] = []
        self.suspects: deque[Item] = deque()
        self.tries: Counter[int] = Counter()
        self.counted: Counter[str] = Counter()
        self.finished: queue.SimpleQueue[Future] = queue.SimpleQueue()
        self.window, self.workers, self._looked = 8, 0, float("-inf")
        self._sequence, self._run = 0, os.urandom(4).hex()
        self._ended = self._idle = False

    def counts(self) -> dict[str, int]:
        """Seen = done + quarantined + running + waiting, at any moment."""
        waiting = len(self.ready) + len(self.later) + len(self.suspects)
        fixed = {k: self.counted[k] for k in ("seen", "done", "quarantined")}
        return {**fixed, "running": len(self.flying), "waiting": waiting}

    def run(self, source: Iterable[Item | None]) -> dict[str, int]:
        """Process all items of a source; ``None`` from a live source means nothing now.

        Raises
        ------
        ClusterError
            When the scheduler is gone; what was committed stays, start again.
        CryodaskError
            When an item meets an error that concerns all items (a full disk).
        """
        items = iter(source)
        self._ended = False
        moved = time.monotonic()
        try:
            while True:
                self._look_at_workers()
                self._refill(items)
                if self._ended and not (self.flying or self.ready or self.later or self.suspects):
                    return self.counts()
                if self._collect():
                    moved = time.monotonic()
                if self.flying and time.monotonic() - moved > self.stall_after:
                    moved = time.monotonic()
                    reason = f"{len(self.flying)} items are out on {self.workers} workers" if self.workers else "there are no workers"
                    self.event("stalled", None, f"nothing finished for {self.stall_after:.0f} s: {reason}")
                self._check_client()
        except BaseException:
            self.client.cancel([f for f, _, _ in self.flying.values()], force=True)
            raise

    def _look_at_workers(self) -> None:
        if time.monotonic() - self._looked < 2.0:
            return
        self._looked = time.monotonic()
        workers = self.client.scheduler_info(n_workers=-1)["workers"].values()
        self.workers = len(workers)
        self.window = 4 * sum(w["nthreads"] for w in workers) + 8  # never 0: a cluster that scales by backlog must see one

    def _refill(self, items: Iterator[Item | None]) -> None:
        now = time.monotonic()
        while self.later and self.later[0][0] <= now:
            self.ready.appendleft(heapq.heappop(self.later)[2])
        self._idle = False
        room = self.window - len(self.flying)
        if self.suspects:
            self._send([self.suspects.popleft() for _ in range(min(max(1, room), len(self.suspects)))], isolated=True)
            room = self.window - len(self.flying)
        if room <= 0 or (room < self.window / 4 and len(self.flying) > 1):
            return
        while len(self.ready) < room and not self._ended:
            try:
                item = next(items)
            except StopIteration:
                self._ended = True
                break
            if item is None:
                self._idle = True
                break
            self.counted["seen"] += 1
            self.ready.append(item)
        if self.ready:
            self._send([self.ready.popleft() for _ in range(min(room, len(self.ready)))], isolated=False)

    def _send(self, items: list[Item], *, isolated: bool) -> None:
        self._sequence += 1
        # a new key each try: an erred key would answer at once
        keys = [f"item-{self._run}-{item.row}-{self._sequence}" for item in items]
        with dask.annotate(lane=self.lane):
            futures = self.client.map(
                work, items, blob=self.blob, device="cpu", isolated=isolated, key=keys, pure=False, retries=0, priority=int(isolated)
            )
        for future, item in zip(futures, items):
            self.flying[str(future.key)] = (future, item, isolated)
            future.add_done_callback(self.finished.put)

    def _collect(self) -> bool:
        """Settle what has finished; False if nothing has."""
        some = False
        try:
            future = self.finished.get(timeout=0.2 if (self._idle or self.later or not self.flying) else 1.0)
            while True:
                some = True
                self._settle(future)
                future = self.finished.get_nowait()
        except queue.Empty:
            return some

    def _settle(self, future: Future) -> None:
        _, item, isolated = self.flying.pop(str(future.key))
        status = future.status
        error = future.exception() if status == "error" else None
        future.release()
        if status == "finished":
            self.counted["done"] += 1
            self.event("done", item, "")
        elif status != "error":  # cancelled or lost: nobody's fault
            self._check_client()
            self.ready.append(item)
            self.event("again", item, str(status))
        elif isinstance(error, KilledWorker) and not isolated:
            self.suspects.append(item)
            self.event("again", item, "its worker died; it is tried in a process of its own")
        else:
            self._settle_failure(item, error)

    def _settle_failure(self, item: Item, error: BaseException | None) -> None:
        if isinstance(error, ItemFailure):
            name, message, action = error.args
        else:
            name, message, action = type(error).__name__, str(error)[:2000], "retry" if isinstance(error, KilledWorker) else "quarantine"
        if action == "stop":
            raise _revived(name, message)
        self.tries[item.row] += 1
        again = self.tries[item.row] < _TRIES
        if isinstance(error, ItemDied) and again:
            self.suspects.append(item)
        elif action == "retry" and again:
            due = time.monotonic() + self.backoff * 2 ** (self.tries[item.row] - 1)
            heapq.heappush(self.later, (due, self._sequence * 1_000_000 + item.row, item))
        else:
            self.job.quarantine(item, name, message, self.tries.pop(item.row))
            self.counted["quarantined"] += 1
            self.event("quarantined", item, f"{name}: {message}")
            return
        self.event("again", item, f"{name}: {message}")

    def _check_client(self) -> None:
        if self.client.status not in ("running", "connecting"):
            raise ClusterError(
                f"The scheduler is gone (client {self.client.status}).",
                "it was stopped, or its machine went down",
                "run the same command again: everything committed is kept and it resumes",
            )


def _revived(name: str, message: str) -> CryodaskError:
    """An error that stops the run, in its own class again."""
    import cryodask.errors as errors

    kind = getattr(errors, name, CryodaskError)
    return kind(message)
