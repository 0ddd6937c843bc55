"""The map runner: processes and commits each item of a source in one fused task; any worker, item or driver may die at any time.

States of an item: waiting (source, ready, backoff, suspect) -> running (-> isolated) -> done | quarantined. Results are never gathered: a
task returns after its commit, and the journal records what is done. When a worker dies, Dask blames every task that was sent to it; those
items are rerun in child processes, so that the one that crashed its process is quarantined and the others are committed.
"""

from __future__ import annotations

import contextlib
import functools
import heapq
import pickle
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import cloudpickle
from distributed import Client, Future, KilledWorker
from distributed.client import ClosedClientError

from cryodask.errors import CryodaskError
from cryodask.run.devices import CPU_DEVICE, GPU_DEVICE, dask_resources, gpu_items, with_gpus
from cryodask.run.health import Watch, scheduler_needed
from cryodask.run.isolation import ItemDied, ItemFailure, blamed_at_first_death, in_child, time_limit
from cryodask.run.residents import Run, in_run, keep, new_run, release_everywhere, stop_everywhere, stopped_here
from cryodask.run.told import keep_from_log
from cryodask.store.project import Item

PREFIX = "item"
"""Key prefix by which Dask learns how long items take."""

_TRIES = 3
_LONELY_DEATHS = 10
_GPU_PATIENCE_SECONDS = 30.0
_AHEAD_SECONDS = 0.5
_ANSWER_SECONDS = 10.0
_DONE, _NOT_BEGUN = "done", "not begun"
_LOOK_SECONDS = 0.02
_LOOK_SECONDS_AN_ITEM = 100e-6
_RETRIED = (OSError, TimeoutError, MemoryError)


class Job(Protocol):
    """What is done with the items. Sent pickled, unpickled once per process; ``run`` processes AND commits."""

    def brief(self, item: Item, again: bool) -> Any:
        """What is sent along with an item (called in the driver); ``again``: an earlier attempt in this run did not succeed."""
        ...

    def run(self, item: Item, brief: Any, device: str, attempt: int) -> None:
        """Process and commit one item (in a worker); ``attempt`` grows with every submission of an item, also across runs."""
        ...

    def quarantine(self, item: Item, error: str, message: str, tries: int) -> None:
        """Record in the driver that an item failed finally."""
        ...


def attempt_item(run: Run, blob: bytes, item: Item, brief: Any, device: str, attempt: int) -> tuple[str, str, str] | None:
    """Process and commit one item in this process; returns the failure as plain values, or None."""
    try:
        with in_run(run):
            job: Job = keep("job", lambda: pickle.loads(blob))
            job.run(item, brief, device, attempt)
    except CryodaskError as error:
        return type(error).__name__, str(error)[:2000], error.on_failure
    except _RETRIED as error:
        return type(error).__name__, str(error)[:2000], "retry"
    except Exception as error:  # the one place that catches everything: whatever a stage raises is recorded
        return type(error).__name__, str(error)[:2000], "quarantine"
    return None


def work(item: Item, brief: Any, *, run: Run, blob: bytes, device: str, isolated: bool, attempt: int, limit_seconds: float | None) -> str:
    """Task for one item on a worker; the state of the future is the acknowledgement, its value is read only when a run is stopped."""
    if stopped_here(run):
        return _NOT_BEGUN
    if isolated:
        failure = in_child((run, blob, item, brief, device, attempt), limit_seconds)
    else:
        with time_limit(limit_seconds):
            failure = attempt_item(run, blob, item, brief, device, attempt)
    if failure:
        error = ItemFailure(*failure)
        keep_from_log(error)
        raise error
    return _DONE


class MapRunner:
    """Send items to the workers through a sliding window, and account for each of them.

    Parameters
    ----------
    client : Client
    job : Job
    event : callable ``(kind, item or None, text)``
        Called for every item that is ``done``, ``quarantined`` or retried (``again``), on a stall (``stalled``), and every two seconds
        (``looked``).
    limit_seconds : float, optional
        An item that takes longer is quarantined; the worker process is killed.
    first_attempt : int
        First attempt number, above those of all earlier runs.
    live : bool
        The source decides late which item is next, so few items are queued on the workers.
    stopped : callable
        Polled; once it returns true nothing new is started, and :meth:`run` returns when the items in flight have finished.
    needs_gpu : bool
        Items go only to workers with GPUs; otherwise a GPU is used if one is free.
    licences : tuple of str
        Each item in flight holds one of each.
    """

    def __init__(
        self,
        client: Client,
        job: Job,
        *,
        event: Callable[[str, Item | None, str], None] = lambda kind, item, text: None,
        stall_after_seconds: float = 30.0,
        backoff_seconds: float = 1.0,
        limit_seconds: float | None = None,
        first_attempt: int = 0,
        live: bool = False,
        stopped: Callable[[], bool] = lambda: False,
        needs_gpu: bool = False,
        licences: tuple[str, ...] = (),
    ) -> None:
        self.needs_gpu, self.licences = needs_gpu, licences
        self.client, self.job, self.event = client, job, event
        self.live, self.stopped = live, stopped
        self.backoff, self.limit_seconds, self.first_attempt = backoff_seconds, limit_seconds, first_attempt
        self.watch = Watch(client, lambda text: event("stalled", None, text), stall_after_seconds)
        self.blob = cloudpickle.dumps(job)
        self.flying: dict[str, tuple[Future[Any], Item, bool]] = {}
        self.for_gpus: dict[str, float] = {}  # time of submission
        self.on_gpus = 0
        self.ready: deque[Item] = deque()
        self.later: list[tuple[float, int, Item]] = []
        self.suspects: deque[Item] = deque()
        self.tries: Counter[int] = Counter()
        self.lonely_deaths: Counter[int] = Counter()
        self.returned: set[int] = set()
        self.counted: Counter[str] = Counter()
        self.window = 8
        self._sequence, self._run = 0, new_run(client)
        self._ended = self._idle = self._stopping = False
        self._told: list[Future[Any]] = []
        self._told_of_stop: set[str] = set()
        self._unsent: set[str] = set()
        self._finished_at: deque[float] = deque(maxlen=1000)

    def counts(self) -> dict[str, int]:
        """Counts of items; seen = done + quarantined + running + waiting at any moment."""
        waiting = len(self.ready) + len(self.later) + len(self.suspects)
        fixed = {k: self.counted[k] for k in ("seen", "done", "quarantined")}
        return {**fixed, "running": len(self.flying), "waiting": waiting}

    def run(self, source: Iterable[Item | None]) -> dict[str, int]:
        """Process all items of a source; ``None`` from a live source means that none is ready now.

        Raises
        ------
        ClusterError
            When the scheduler is gone; committed results stay, and the run can be restarted.
        CryodaskError
            If an error affects all items (a full disk).
        """
        items = iter(source)
        self._ended = False
        try:
            with scheduler_needed(self.client):
                while True:
                    if self.watch.look(f"{len(self.flying)} items are in flight"):
                        self.window = self._window()
                        self._look_at_gpus()
                        self.event("looked", None, "")
                        if self._stopping:
                            self._withdraw()
                    if not self._stopping and self.stopped():
                        self._stop()
                    if not self._stopping:
                        self._refill(items)
                    if self._ended and not (self.flying or self.ready or self.later or self.suspects):
                        return self.counts()
                    if self._collect() or not self.flying:
                        self.watch.moved()
        except BaseException:
            with contextlib.suppress(ClosedClientError, RuntimeError):  # a closed client or event loop cannot cancel
                self.client.cancel([f for f, _, _ in self.flying.values()], force=True)
            raise
        finally:
            self.watch.announce(PREFIX, 0)
            release_everywhere(self.client, self._run, self.watch.workers)

    def _window(self) -> int:
        """How many items may be in flight. Never 0: a cluster that scales by backlog must see one."""
        if not self.live:
            return 4 * self.watch.slots + 8
        recent = time.monotonic() - _AHEAD_SECONDS
        return self.watch.slots + 2 + sum(moment > recent for moment in self._finished_at)

    def _stop(self) -> None:
        """Start nothing more: workers refuse items that they have not started, once they are told."""
        self._stopping = self._ended = True
        self.ready.clear()
        self.later.clear()
        self.suspects.clear()
        self._tell_new_workers()

    def _tell_new_workers(self) -> None:
        new = set(self.watch.workers) - self._told_of_stop
        self._told_of_stop |= new
        self._told += stop_everywhere(self.client, self._run, new)

    def _withdraw(self) -> None:
        """Cancel items that have reached no worker since the last check; those that reach one meanwhile are refused there."""
        self._tell_new_workers()
        sent = self.watch.processing(self.watch.workers)
        unsent = set(self.flying) - sent if sent is not None else set()
        back = [self.flying.pop(key)[0] for key in unsent & self._unsent]
        self._unsent = unsent
        self.client.cancel(back, force=True)

    def _refill(self, items: Iterator[Item | None]) -> None:
        now = time.monotonic()
        while self.later and self.later[0][0] <= now:
            self.ready.appendleft(heapq.heappop(self.later)[2])
        self._idle = False
        room = self.window - len(self.flying)
        usual = GPU_DEVICE if self.needs_gpu else CPU_DEVICE
        if self.suspects:
            self._send([self.suspects.popleft() for _ in range(min(max(1, room), len(self.suspects)))], isolated=True, device=usual)
            room = self.window - len(self.flying)
        # a GPU that is only used if free may be on a worker without the licence
        for_gpus = 0 if self.licences else max(0, gpu_items(self.watch.workers, self.on_gpus) - len(self.for_gpus))
        if not self.live and room < self.window / 2 and len(self.flying) > 1:  # a few large messages are cheaper than many small ones
            room = 0
        room = max(room, for_gpus)
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
        chosen = [self.ready.popleft() for _ in range(min(room, len(self.ready)))]
        self._send(chosen[:for_gpus], isolated=False, device=GPU_DEVICE)
        self._send(chosen[for_gpus:], isolated=False, device=usual)

    def _send(self, items: list[Item], *, isolated: bool, device: str = CPU_DEVICE) -> None:
        if not items:
            return
        self._sequence += 1
        # a new key per attempt: an erred key would return its error at once
        keys = [f"{PREFIX}-{self._run.token}-{item.row}-{self._sequence}" for item in items]
        with blamed_at_first_death():
            futures = self.client.map(
                # one object for all items, because Dask traverses keyword arguments for each item
                functools.partial(
                    work,
                    run=self._run,
                    blob=self.blob,
                    device=device,
                    isolated=isolated,
                    attempt=self.first_attempt + self._sequence,
                    limit_seconds=self.limit_seconds,
                ),
                items,
                [self.job.brief(item, item.row in self.returned) for item in items],
                key=keys,
                pure=False,
                retries=0,
                priority=int(isolated),
                resources=dask_resources(device, self.licences),
            )
        if device == GPU_DEVICE:
            self.for_gpus |= {str(future.key): time.monotonic() for future in futures}
        for future, item in zip(futures, items):
            self.flying[str(future.key)] = (future, item, isolated)

    def _look_at_gpus(self) -> None:
        """Track which items run on GPUs; those that have waited too long for one go to a CPU."""
        if self.needs_gpu:
            return
        gpus = with_gpus(self.watch.workers)
        begun = self.watch.processing(gpus) if self.for_gpus and gpus else set()
        if begun is None:
            return
        self.on_gpus = len(begun & set(self.for_gpus))
        late = time.monotonic() - _GPU_PATIENCE_SECONDS
        for key in [key for key, sent in self.for_gpus.items() if sent < late and key not in begun]:
            future, item, _ = self.flying[key]
            if future.done():
                continue
            del self.flying[key], self.for_gpus[key]
            future.cancel()
            self._send([item], isolated=False)
            self.event("again", item, "no GPU became free; it runs on a CPU")

    def _collect(self) -> bool:
        """Handle finished futures; False if there are none."""
        until = time.monotonic() + (0.2 if (self._idle or self.later or not self.flying) else 1.0)
        while True:
            # a callback per future would cost a coroutine and two thread switches per item
            time.sleep(_LOOK_SECONDS + _LOOK_SECONDS_AN_ITEM * len(self.flying))
            finished = [key for key, (future, _, _) in self.flying.items() if future.status != "pending"]
            if finished:
                break
            if time.monotonic() > until:
                return False
        futures = [self.flying[key][0] for key in finished]
        try:
            for key in finished:
                self._settle(key)
        finally:
            if loop := self.client.loop:
                loop.add_callback(_release, futures)
        return True

    def _settle(self, key: str) -> None:
        future, item, isolated = self.flying.pop(key)
        self.for_gpus.pop(key, None)
        status = future.status
        if status == "finished" and (not self._stopping or _word_of(future) == _DONE):
            self.counted["done"] += 1
            self._finished_at.append(time.monotonic())
            self.event("done", item, "")
            return
        error = future.exception() if status == "error" else None
        if self._stopping and not (isinstance(error, ItemFailure) and error.args[2] in ("quarantine", "stop")):
            return  # whatever happened, the next run finds it pending
        self.returned.add(item.row)
        if status != "error":  # cancelled or lost: not the item's fault
            self.watch.check_client()
            self.ready.append(item)
            self.event("again", item, str(status))
        elif isinstance(error, KilledWorker) and (not isolated or self._died_beside(item)):
            self.suspects.append(item)
            self.event("again", item, "its worker died; it is retried in its own process")
        else:
            self._settle_failure(item, error)

    def _died_beside(self, item: Item) -> bool:
        """Whether a worker's death may have had a cause other than its isolated item: always possible, but not ten times."""
        self.lonely_deaths[item.row] += 1
        return self.lonely_deaths[item.row] < _LONELY_DEATHS

    def _settle_failure(self, item: Item, error: BaseException | None) -> None:
        if isinstance(error, ItemFailure):
            name, message, action = error.args
        elif isinstance(error, KilledWorker):
            name, action = "KilledWorker", "quarantine"
            message = (
                f"its worker died {_LONELY_DEATHS} times, although the item ran in its own process "
                "(is there a memory limit on both together?)"
            )
        else:
            name, message, action = type(error).__name__, str(error)[:2000], "quarantine"
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


def _word_of(future: Future[Any]) -> str:
    """What :func:`work` returned; empty if its worker is gone."""
    try:
        return str(future.result(timeout=_ANSWER_SECONDS))
    except Exception:  # whatever happened, the next run asks the journal
        return ""


def _release(futures: list[Future[Any]]) -> None:
    """Release futures in the client's event loop, where it is cheapest."""
    for future in futures:
        future.release()


def _revived(name: str, message: str) -> CryodaskError:
    """Rebuild an error that stops the run in its own class."""
    import cryodask.errors as errors

    kind = getattr(errors, name, CryodaskError)
    return kind(message)
