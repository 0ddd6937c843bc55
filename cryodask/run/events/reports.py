"""What stage functions report while they work (``context.report``): from the worker to the driver, which emits it as events."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any

from distributed import Client, get_worker

from cryodask.cluster.access.gate import REPORTS
from cryodask.context import no_report
from cryodask.run.events import Events, Reported

_LEAST_SECONDS = 1.0
"""Between two reports of one call; the last one, of fraction 1, is always sent."""

Report = Callable[[float, dict[str, float]], None]


def report_of(topic: str, step: str, row: int | None = None, name: str | None = None) -> Report:
    """The ``on_report`` of a context in a worker, for one call of a stage function. Without a topic nobody listens."""
    if not topic:
        return no_report
    sent = float("-inf")

    def report(fraction: float, figures: dict[str, float]) -> None:
        nonlocal sent
        now = time.monotonic()
        if now - sent < _LEAST_SECONDS and fraction < 1.0:
            return
        sent = now
        message = {
            "step": step,
            "row": row,
            "name": name,
            "fraction": float(fraction),
            "figures": {k: float(v) for k, v in figures.items()},
        }
        # a process without a worker (an isolated item) has nobody to tell
        with suppress(ValueError):
            get_worker().log_event(topic, message)

    return report


class Reports:
    """The reports of one run, in its driver. They arrive in the client's thread and are emitted where the run asks for them.

    Parameters
    ----------
    events : Events
    """

    def __init__(self, events: Events) -> None:
        self.topic = REPORTS + events.run
        self._client: Client | None = None
        self._events = events
        self._arrived: SimpleQueue[Any] = SimpleQueue()

    def listen(self, client: Client) -> None:
        """Take the reports of this client's workers from now on."""
        self._client = client
        client.subscribe_topic(self.topic, self._take)

    def emit(self) -> None:
        """Emit what has arrived since the last call."""
        with suppress(Empty):
            while True:
                message = self._arrived.get_nowait()
                self._events.emit(Reported, **{name: message.get(name) for name in ("step", "row", "name", "fraction", "figures")})

    def _take(self, event: tuple[float, Any]) -> None:
        _, message = event
        if isinstance(message, dict):
            self._arrived.put(message)

    def __enter__(self) -> Reports:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.emit()
        if self._client is not None:
            with suppress(Exception):  # the scheduler may be gone, and the subscription with it
                self._client.unsubscribe_topic(self.topic)
