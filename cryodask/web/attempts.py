"""A limit on failed log-ins: by address, and by address and name, so that nobody can lock somebody else out."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict

_WINDOW_SECONDS = 300.0
_PER_NAME = 8
_PER_ADDRESS = 60
_MOST_KEYS = 10_000


class Attempts:
    """Failed log-ins of the last minutes."""

    def __init__(self) -> None:
        self._failed: OrderedDict[tuple[str, ...], list[float]] = OrderedDict()
        self._lock = threading.Lock()

    def allowed(self, address: str, name: str) -> bool:
        """Whether another attempt is allowed."""
        with self._lock:
            return self._count((address,)) < _PER_ADDRESS and self._count((address, name)) < _PER_NAME

    def failed(self, address: str, name: str) -> None:
        """Count a failed attempt."""
        with self._lock:
            for key in ((address,), (address, name)):
                recent = [t for t in self._failed.pop(key, []) if time.monotonic() - t < _WINDOW_SECONDS]
                self._failed[key] = [*recent, time.monotonic()][-_PER_ADDRESS:]
            while len(self._failed) > _MOST_KEYS:
                self._failed.popitem(last=False)

    def _count(self, key: tuple[str, ...]) -> int:
        return sum(time.monotonic() - t < _WINDOW_SECONDS for t in self._failed.get(key, ()))
