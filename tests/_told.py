"""What a run says to people, kept for tests."""

from __future__ import annotations

from cryodask.run.progress import Progress


class Told(Progress):
    """Keeps what a run says."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)
