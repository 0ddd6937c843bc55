"""Order of movies in a watched session: newest first, every fourth start the oldest; movies to recompute come after new ones."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from cryodask.store.project import Item

_OLDEST_EVERY = 4
_AGAIN_EVERY = 10


class Backlog:
    """Pending movies. People look at the newest result, so it must not wait for a backlog; and no movie may wait forever.

    Every fourth start is the oldest movie. While there are new movies, every tenth is one that was processed before and is recomputed with
    other parameters.

    Parameters
    ----------
    waiting, again : iterables of Item
        Movies without any result, and movies with an outdated one; both in order of arrival.
    """

    def __init__(self, waiting: Iterable[Item] = (), again: Iterable[Item] = ()) -> None:
        self._new, self._again = deque(waiting), deque(again)
        self._starts = 0

    def __len__(self) -> int:
        return len(self._new) + len(self._again)

    def add(self, items: Iterable[Item]) -> None:
        """Add movies that have just arrived, oldest first."""
        self._new.extend(items)

    def take(self) -> Item | None:
        """The next movie; None if none is pending."""
        if not self:
            return None
        self._starts += 1
        if self._again and (not self._new or self._starts % _AGAIN_EVERY == 0):
            return self._again.popleft()
        return self._new.popleft() if self._starts % _OLDEST_EVERY == 0 else self._new.pop()
