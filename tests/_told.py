"""What a run says to people, kept for tests."""

from __future__ import annotations

from cryodask.run.events import Event
from cryodask.run.events.progress import text_of


class Told:
    """Listener that keeps the lines that people read of a run, and all events."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if text := text_of(event):
            self.said.append(text)
