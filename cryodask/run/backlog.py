"""Which movie a watched session begins next: the newest, now and then the oldest, and what is made again after all that is new."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from cryodask.store.project import Item

_OLDEST_EVERY = 4
_AGAIN_EVERY = 10


class Backlog:
    """The movies that wait. People look at the newest result: it must not wait for a backlog, and no movie may wait for ever.

    Every fourth start is the oldest one; every tenth, while there are new movies, one that was processed before and is to be made again
    with other parameters.

    Parameters
    ----------
    waiting, again : iterables of Item
        Movies without any result, and those that have one of before; both in the order of their arrival.
    """

    def __init__(self, waiting: Iterable[Item] = (), again: Iterable[Item] = ()) -> None:
        self._new, self._again = deque(waiting), deque(again)
        self._starts = 0

    def __len__(self) -> int:
        return len(self._new) + len(self._again)

    def add(self, items: Iterable[Item]) -> None:
        """Movies that have just arrived, oldest first."""
        self._new.extend(items)

    def take(self) -> Item | None:
        """The next one; None where none waits."""
        if not self:
            return None
        self._starts += 1
        if self._again and (not self._new or self._starts % _AGAIN_EVERY == 0):
            return self._again.popleft()
        return self._new.popleft() if self._starts % _OLDEST_EVERY == 0 else self._new.pop()
