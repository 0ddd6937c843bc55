"""A map-runner job whose items fail on purpose: they raise, hang, exhaust memory, kill their process, or succeed on a later try."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cryodask.errors import DiskFullError, MovieError
from cryodask.store.journal import Journal
from cryodask.store.project import Item

_NEEDED_BYTES = 4 << 30
_STEP_BYTES = 32 << 20


@dataclass
class FaultyJob:
    """Commits one journal line per item; ``faults`` maps rows to what goes wrong.

    ``raise``: an error that quarantines; ``os-error-once``, ``fails-twice``: an OSError on the first one or two tries, then success;
    ``exit``: the process exits; ``segfault``: it dies by a signal; ``hang``: it waits forever in C while other threads continue;
    ``freeze``: the same while holding the GIL, so that nothing else in the process runs; ``memory``: it needs 4 GB and
    touches all of it; ``unpicklable``: an exception that cannot be pickled; ``disk-full``: an error that stops the run.
    """

    folder: Path
    faults: dict[int, str] = field(default_factory=dict)
    seconds: float = 0.0

    def brief(self, item: Item, again: bool) -> None:
        """Nothing is sent along with an item."""

    def run(self, item: Item, brief: None, device: str, attempt: int) -> None:
        """Process one item."""
        time.sleep(self.seconds)
        fault = self.faults.get(item.row)
        if fault is not None:
            self._go_wrong(fault, item)
        where = {"device": device, "gpu": os.environ.get("CUDA_VISIBLE_DEVICES", ""), "process": os.getpid()}
        Journal(self.folder / "journal").append({"row": item.row, "name": item.name, "ok": True, "attempt": attempt, **where})

    def quarantine(self, item: Item, error: str, message: str, tries: int) -> None:
        """Record a failure."""
        record = {"row": item.row, "name": item.name, "ok": False, "error": error, "message": message, "tries": tries}
        Journal(self.folder / "journal").append(record)

    def _go_wrong(self, fault: str, item: Item) -> None:
        if fault == "raise":
            raise MovieError(f"{item.name} is bad")
        if fault in ("os-error-once", "fails-twice"):
            mark = self.folder / f"tries-{item.row}"
            tries = len(mark.read_bytes()) if mark.exists() else 0
            mark.write_bytes(b"x" * (tries + 1))
            if tries < (1 if fault == "os-error-once" else 2):
                raise OSError("the disk was busy")
            return
        if fault == "exit":
            os._exit(3)
        if fault == "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        if fault in ("hang", "freeze"):
            library = ctypes.CDLL(None) if fault == "hang" else ctypes.PyDLL(None)
            while True:
                library.pause()
        if fault == "memory":
            kept = []
            for _ in range(_NEEDED_BYTES // _STEP_BYTES):
                kept.append(np.ones(_STEP_BYTES, np.uint8))
                time.sleep(0.0005)  # as work on it would take
            return
        if fault == "unpicklable":
            raise _Unpicklable(lambda: None)
        if fault == "disk-full":
            raise DiskFullError("No space is left")
        raise ValueError(f"there is no fault {fault!r}")


class _Unpicklable(Exception):
    pass
