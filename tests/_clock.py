"""A clock that is fed in, in place of the ``time`` of a module."""

from __future__ import annotations

from collections.abc import Callable


class Clock:
    """Time as an observer has it: it passes while the observer sleeps. ``meanwhile`` happens at every sleep."""

    def __init__(self, meanwhile: Callable[[], object] = lambda: None) -> None:
        self.seconds, self.meanwhile = 1000.0, meanwhile

    def monotonic(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds
        self.meanwhile()
