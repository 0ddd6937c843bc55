"""Progress monitoring: polls the scheduler and explains a stall in one sentence."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, cast

from distributed import Client, Future, wait
from distributed.client import ClosedClientError, FuturesCancelledError

from cryodask.errors import ClusterError
from cryodask.store.files import check_still_driving

_LOOK_SECONDS = 2.0
_ANSWER_SECONDS = 20.0
_SILENT_SECONDS = 30.0
_LONGEST_PATIENCE_SECONDS = 600.0


def _gone(client: Client) -> ClusterError:
    return ClusterError(
        f"The scheduler is gone (client {client.status}).",
        "it was stopped, or its machine went down",
        "rerun the same command: everything committed is kept, and the run resumes",
    )


@contextmanager
def scheduler_needed(client: Client) -> Iterator[None]:
    """Context manager for work that fails if the client has closed because its scheduler is gone.

    Raises
    ------
    ClusterError
        As soon as something is sent to the scheduler.
    """
    try:
        yield
    except ClosedClientError as error:
        raise _gone(client) from error


def scheduler_identity(client: Client) -> dict[str, Any] | None:
    """What the scheduler says about itself and all workers; ``missing`` is set by clusters of pools only. None if it does not answer."""
    try:
        # scheduler_info() would block forever on a hanging scheduler
        found = client.sync(client.scheduler.identity, n_workers=-1, callback_timeout=_ANSWER_SECONDS) if client.scheduler else None
    except (OSError, TimeoutError):
        return None
    return cast("dict[str, Any] | None", found)


class Watch:
    """Monitors the workers and reports a stall after ``patience_seconds``, then after twice that time, and so on.

    Parameters
    ----------
    client : Client
    tell : callable
        Called with the sentence that explains a stall.
    looked : callable
        Called at each check; an exception from it ends the waiting.
    """

    def __init__(
        self, client: Client, tell: Callable[[str], None], patience_seconds: float = 30.0, *, looked: Callable[[], None] = lambda: None
    ) -> None:
        self.client, self.tell, self.patience, self._looking = client, tell, patience_seconds, looked
        self.workers: dict[str, dict[str, Any]] = {}
        self.missing = ""
        self.answers = True
        self.lanes = False
        self._announced = 0
        self.stall = ""
        self._looked, self._moved, self._told_after = float("-inf"), time.monotonic(), patience_seconds

    @property
    def slots(self) -> int:
        """Total number of worker threads."""
        return sum(int(w["nthreads"]) for w in self.workers.values())

    def moved(self) -> None:
        """Record progress, or that there is nothing to wait for."""
        self._moved, self._told_after, self.stall = time.monotonic(), self.patience, ""

    def still_for(self, seconds: float) -> bool:
        """Whether nothing was finished for this long."""
        return time.monotonic() - self._moved > seconds

    def look(self, waiting_for: str = "") -> bool:
        """Poll the scheduler if the last answer is old; report a stall. Returns whether it polled.

        Raises
        ------
        ClusterError
            When the scheduler is gone for good.
        TakenOverError
            When another driver has taken the project over.
        """
        self.check_client()
        self._looking()
        asked = time.monotonic() - self._looked > _LOOK_SECONDS
        if asked:
            check_still_driving()
            self._ask()
            self._looked = time.monotonic()
        still = time.monotonic() - self._moved
        if still > self._told_after:
            self._told_after = still + min(2 * self._told_after, _LONGEST_PATIENCE_SECONDS)
            self.stall = f"nothing was finished for {still:.0f} s: {self.reason()}" + (f" ({waiting_for})" if waiting_for else "")
            self.tell(self.stall)
        return asked

    def wait(self, futures: Iterable[Future[Any]], waiting_for: str = "", *, first: bool = False) -> None:
        """Wait until all futures (or the ``first`` one) are finished, lost or erred; report stalls.

        Raises
        ------
        ClusterError
            When the scheduler is gone for good.
        """
        futures = list(futures)
        left = futures
        self.moved()
        while left and not (first and len(left) < len(futures)):
            # futures cancelled with their scheduler raise here; the caller meets each error when it reads the future
            with suppress(TimeoutError, FuturesCancelledError):
                wait(left, timeout=_LOOK_SECONDS, return_when="FIRST_COMPLETED" if first else "ALL_COMPLETED")
            before, left = len(left), [f for f in left if not f.done()]
            if len(left) < before:
                self.moved()
            self.look(waiting_for)

    def announce(self, prefix: str, tasks: int) -> None:
        """Announce to a scheduler with lanes how many tasks of a kind are still to be sent; pools scale with the pending work."""
        scheduler = self.client.scheduler
        if self.lanes and scheduler and self.client.status == "running" and tasks != self._announced:
            with suppress(OSError, TimeoutError):
                self.client.sync(
                    scheduler.announce_work, client=self.client.id, prefix=prefix, tasks=tasks, callback_timeout=_ANSWER_SECONDS
                )
                self._announced = tasks

    def processing(self, addresses: Iterable[str]) -> set[str] | None:
        """Keys of the tasks currently on these workers; None if the scheduler does not answer."""
        scheduler = self.client.scheduler
        try:
            found = self.client.sync(scheduler.processing, workers=list(addresses), callback_timeout=_ANSWER_SECONDS) if scheduler else {}
        except (OSError, TimeoutError):
            return None
        return {str(key) for keys in found.values() for key in keys}

    def reason(self) -> str:
        """Why the run is stalled, as far as the scheduler knows; for queued jobs with the queue's own reason."""
        if self.client.status == "connecting" or not self.answers:
            return "the scheduler does not answer"
        if not self.workers:
            return f"there are no workers: {self.missing or 'they have not started yet, or all were lost'}"
        return self._of_workers() + (f"; {self.missing}" if self.missing else "")

    def _of_workers(self) -> str:
        paused = [w for w in self.workers.values() if w.get("status") == "paused"]
        if len(paused) == len(self.workers):
            return f"all {len(paused)} workers are paused because their memory is full; give them more memory"
        silent = [w for w in self.workers.values() if time.time() - float(w.get("last_seen", time.time())) > _SILENT_SECONDS]
        if silent:
            names = ", ".join(str(w.get("name")) for w in silent[:3])
            return f"{len(silent)} of {len(self.workers)} workers are silent ({names}): their machine or its disk hangs"
        more = f", {len(paused)} of them paused because their memory is full" if paused else ""
        return f"{len(self.workers)} workers are busy{more}"

    def check_client(self) -> None:
        """Raise ClusterError when the scheduler is gone for good.

        A client that has lost its scheduler tries to reconnect for half a minute, then closes. But on any error other than a refused
        connection the reconnecting task dies, and the client stays "connecting" forever.
        """
        trying: asyncio.Task[None] | None = self.client._handle_report_task
        given_up = self.client.status == "connecting" and trying is not None and trying.done()
        if given_up or self.client.status not in ("running", "connecting"):
            raise _gone(self.client)

    def _ask(self) -> None:
        answer = scheduler_identity(self.client)
        self.answers = answer is not None
        if answer is not None:
            self.workers, self.lanes = answer["workers"], bool(answer.get("lanes"))
            self.missing = str(answer.get("missing", ""))  # set only by schedulers with pools
