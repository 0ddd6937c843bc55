"""A job of the map runner whose items fail on purpose: raise, kill their process, or succeed at the second try."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

from cryodask.errors import DiskFullError, MovieError
from cryodask.store.journal import Journal
from cryodask.store.project import Item


@dataclass
class FaultyJob:
    """Commits a journal line an item; ``faults`` says for a row what goes wrong.

    ``raise``: an error that quarantines; ``os-error-once``: an OSError at the first try; ``exit``: the process exits; ``segfault``: it
    dies by a signal; ``unpicklable``: an exception that cannot travel; ``disk-full``: an error that stops the run.
    """

    folder: Path
    faults: dict[int, str] = field(default_factory=dict)
    seconds: float = 0.0

    def run(self, item: Item, device: str) -> None:
        """Process one item."""
        fault = self.faults.get(item.row)
        time.sleep(self.seconds)
        if fault == "raise":
            raise MovieError(f"{item.name} is bad")
        if fault == "os-error-once":
            mark = self.folder / f"tried-{item.row}"
            if not mark.exists():
                mark.touch()
                raise OSError("the disk was busy")
        if fault == "exit":
            os._exit(3)
        if fault == "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        if fault == "unpicklable":
            raise _Unpicklable(lambda: None)
        if fault == "disk-full":
            raise DiskFullError("No space is left")
        Journal(self.folder / "journal").append({"row": item.row, "ok": True})

    def quarantine(self, item: Item, error: str, message: str, tries: int) -> None:
        """Record a failure."""
        record = {"row": item.row, "ok": False, "error": error, "message": message, "attempt": tries}
        Journal(self.folder / "journal").append(record)


class _Unpicklable(Exception):
    pass
