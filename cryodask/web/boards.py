"""The edits of the sessions that are open in a browser, and who waits for those of others."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastapi import Request
from fastapi.concurrency import run_in_threadpool

from cryodask.edits.board import Board
from cryodask.edits.choices import current
from cryodask.errors import StoreError
from cryodask.store.project import Project
from cryodask.web.sessions import Session

_LOOK_SECONDS = 0.5
"""How often edits that arrive through another server are looked for."""


class Watched:
    """A board with its open pages."""

    def __init__(self, session: Session) -> None:
        def opened() -> Project:
            # as it is on disk now: a page must not edit a project that is gone
            return session.follower.project.refresh()

        self.board = Board(session.path, opened)
        self._changed = asyncio.Event()
        self._looked = float("-inf")

    def tell(self) -> None:
        """Wake the open pages (from the event loop)."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def changed(self, kind: str, version: int, seconds: float) -> int:
        """Wait until the edits of a kind have another version, but at most some seconds; returns their version."""
        log, until = self.board.log(kind), time.monotonic() + seconds
        while log.version == version and time.monotonic() < until:
            event = self._changed
            try:
                await asyncio.wait_for(event.wait(), _LOOK_SECONDS)
            except TimeoutError:
                if time.monotonic() - self._looked >= _LOOK_SECONDS:
                    self._looked = time.monotonic()
                    await run_in_threadpool(log.look)
        return log.version


def remarks_of(watched: Watched, row: int) -> list[list[Any]]:
    """Ratings, tags and notes of an exposure, or of the session (row -1): row, name, value and author, as pages filter by them."""
    log = watched.board.exposures
    with suppress(StoreError, OSError):  # of a project that is gone the page says so, and shows the others
        log.look()
    return [[row, name, value.value, value.who] for (_, _, name), value in sorted(current(log.of_row(row)).items())]


def board_of(request: Request, session: Session) -> Watched:
    """The board of a session."""
    boards: dict[Path, Watched] = request.app.state.boards
    return boards.setdefault(session.path, Watched(session))
