"""Stopping a run with Ctrl-C or a file called ``stop`` in the results: items in flight are finished, nothing new is started.

A file called ``end`` ends a watched session: no further movies are taken, and the later steps run.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from cryodask.errors import Stopped

STOP_FILE, END_FILE = "stop", "end"
_LOOK_SECONDS = 0.5


def forget(folder: Path) -> None:
    """Remove what was asked of an earlier run; before anybody can see that this one runs, and ask something of it."""
    for name in (STOP_FILE, END_FILE):
        (folder / name).unlink(missing_ok=True)


class Stop:
    """Whether a stop of the run was requested.

    A second Ctrl-C raises KeyboardInterrupt as usual.
    """

    def __init__(self, folder: Path) -> None:
        self._file, self._end = folder / STOP_FILE, folder / END_FILE
        self._by, self._looked = "", float("-inf")
        self._at_once = False

    @property
    def asked(self) -> bool:
        """Whether to stop; looks for the file now and then, and removes it."""
        now = time.monotonic()
        if not self._by and now - self._looked > _LOOK_SECONDS:
            self._looked = now
            if self._file.exists():
                self._file.unlink(missing_ok=True)
                self._by = "the file stop"
        return bool(self._by)

    @property
    def ended(self) -> bool:
        """Whether the end of a watched session was requested; the file stays until the next run."""
        return self._end.exists()

    def check(self) -> None:
        """Raise if a stop was requested.

        Raises
        ------
        Stopped
        """
        if self.asked:
            raise Stopped(f"Stopped by {self._by}. Finished results are kept.", "", "rerun the same command to resume")

    @contextmanager
    def by_interrupt(self) -> Iterator[Stop]:
        """Context manager: within, Ctrl-C requests a stop instead of interrupting the run (main thread only, where signals arrive)."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = signal.getsignal(signal.SIGINT)
        if before is signal.SIG_IGN:
            yield self
            return

        def ask(number: int, frame: FrameType | None) -> None:
            if self._by or self._at_once:
                raise KeyboardInterrupt
            self._by = "Ctrl-C"

        signal.signal(signal.SIGINT, ask)
        try:
            yield self
        finally:
            signal.signal(signal.SIGINT, before)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Context manager: within, no items are in flight (the run waits for workers), and Ctrl-C interrupts at once."""
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False
