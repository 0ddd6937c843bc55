"""Items processed in the driver's own process: for stages that cost less than the message to a worker, and than a sync of the disk."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Protocol

from cryodask.errors import CryodaskError
from cryodask.run.devices import CPU_DEVICE
from cryodask.run.map import Job
from cryodask.run.residents import run_here
from cryodask.store.project import Item

_TOGETHER_SECONDS = 0.2
"""Time for which items are processed before they are committed; a driver that is killed loses no more."""


class JobHere(Job, Protocol):
    """A job that can commit several items with one sync."""

    def together(self) -> AbstractContextManager[None]:
        """Context manager at whose end all items committed within it are safe."""
        ...


def process_here(
    job: JobHere,
    source: Iterable[Item | None],
    *,
    event: Callable[[str, Item | None, str], None] = lambda kind, item, text: None,
    first_attempt: int = 0,
    stopped: Callable[[], bool] = lambda: False,
) -> None:
    """Process and commit items in this process, some at a time; each is reported when it is safe.

    Raises
    ------
    CryodaskError
        If an error affects all items (a full disk).
    """
    items = enumerate(item for item in source if item is not None)
    with run_here():
        for first in items:
            done, failed = _processed_together(job, itertools.chain([first], items), first_attempt)
            for item in done:
                event("done", item, "")
            if failed is not None:
                event("quarantined", failed[0], _recorded(job, *failed))
            if stopped():
                return


def _processed_together(
    job: JobHere, items: Iterable[tuple[int, Item]], first_attempt: int
) -> tuple[list[Item], tuple[Item, Exception] | None]:
    """Process and commit items for a short time; returns those that are done, and the one that failed, if any."""
    done: list[Item] = []
    until = time.monotonic() + _TOGETHER_SECONDS
    with job.together():
        for number, item in items:
            try:
                job.run(item, job.brief(item, False), CPU_DEVICE, first_attempt + number)
            except Exception as error:  # as on a worker: whatever a stage raises is recorded
                return done, (item, error)
            done.append(item)
            if time.monotonic() > until:
                break
    return done, None


def _recorded(job: Job, item: Item, error: Exception) -> str:
    """Record a failed item; returns what the run reports about it. Errors that stop the run are raised."""
    if isinstance(error, CryodaskError) and error.on_failure == "stop":
        raise error
    job.quarantine(item, type(error).__name__, str(error)[:2000], 1)
    return f"{type(error).__name__}: {error}"
