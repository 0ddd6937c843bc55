"""Stopping a run: Ctrl-C, or a file called ``stop`` in the results. What is in flight is finished, nothing else is begun."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from cryodask.errors import Stopped

STOP_FILE = "stop"
_LOOK_SECONDS = 0.5


class Stop:
    """Whether somebody asked the run of a project to stop.

    A second Ctrl-C is not waited for: it is a KeyboardInterrupt, as everywhere.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / STOP_FILE
        self._file.unlink(missing_ok=True)  # meant for a run before this one
        self._by, self._looked = "", float("-inf")

    @property
    def asked(self) -> bool:
        """Whether it is to stop; looks for the file now and then, and takes it away."""
        now = time.monotonic()
        if not self._by and now - self._looked > _LOOK_SECONDS:
            self._looked = now
            if self._file.exists():
                self._file.unlink(missing_ok=True)
                self._by = "the file stop"
        return bool(self._by)

    def check(self) -> None:
        """Raise if it is to stop.

        Raises
        ------
        Stopped
        """
        if self.asked:
            raise Stopped(f"Stopped by {self._by}. What is finished is kept.", "", "the same command goes on from here")

    @contextmanager
    def by_interrupt(self) -> Iterator[Stop]:
        """Within, Ctrl-C asks to stop instead of tearing the run apart (in the main thread; elsewhere no signal arrives)."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = signal.getsignal(signal.SIGINT)
        if before is signal.SIG_IGN:
            yield self
            return

        def ask(number: int, frame: FrameType | None) -> None:
            if self._by:
                raise KeyboardInterrupt
            self._by = "Ctrl-C"

        signal.signal(signal.SIGINT, ask)
        try:
            yield self
        finally:
            signal.signal(signal.SIGINT, before)
