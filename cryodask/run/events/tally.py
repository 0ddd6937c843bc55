"""Counts the exposures of a step: turns the callbacks of the map runner into events."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from cryodask.run.events import Counted, Events, ExposureCommitted, ExposureQuarantined, ExposureRetried, Stalled
from cryodask.run.map import PREFIX, MapRunner
from cryodask.run.watch import Arrivals
from cryodask.store.project import Item

_COUNT_SECONDS = 1.0


@dataclass
class Tally:
    """Callback of the map runner that emits events and counts.

    ``items``: all items of the chain (in a watched session they grow); ``done`` and ``quarantined``: counts from before.
    """

    events: Events
    step: str
    items: list[Item]
    done: int
    quarantined: int
    arrivals: Arrivals | None = None
    runner: MapRunner | None = None
    _told: float = field(default=float("-inf"), init=False)

    def __call__(self, kind: str, item: Item | None, text: str) -> None:
        """Handle a callback of :class:`MapRunner`."""
        if item is None:
            if kind == "stalled":
                self.events.emit(Stalled, step=self.step, why=text)
            self._count(at_once=True)
            return
        about = {"step": self.step, "row": item.row, "name": item.name}
        if kind == "done":
            self.events.emit(ExposureCommitted, **about)
        elif kind == "quarantined":
            self.events.emit(ExposureQuarantined, **about, message=text)
        else:
            self.events.emit(ExposureRetried, **about, why=text)
        self._count(at_once=kind == "quarantined")

    def _count(self, *, at_once: bool) -> None:
        if self.runner is not None and (at_once or time.monotonic() - self._told > _COUNT_SECONDS):
            self.count()

    def count(self) -> None:
        """Emit the current counts."""
        if self.runner is None:
            return
        self._told = time.monotonic()
        counts = self.runner.counts()
        done, quarantined = self.done + counts["done"], self.quarantined + counts["quarantined"]
        waiting = len(self.items) - done - quarantined - counts["running"]
        self.runner.watch.announce(PREFIX, waiting)
        self.events.emit(
            Counted,
            step=self.step,
            seen=len(self.items),
            done=done,
            quarantined=quarantined,
            running=counts["running"],
            waiting=waiting,
            workers=len(self.runner.watch.workers),
            arriving=len(self.arrivals.pending) if self.arrivals is not None else None,
        )
