"""The workers of a run: found or started when its first step needs them, and left when it ends."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

from distributed import Client


class Workers:
    """Context manager: the workers of a run.

    A run whose steps are done, or cost less than sending them away, never asks for any.

    Parameters
    ----------
    find : callable
        Finds or starts them, and returns their client.
    leave : callable, optional
        Called with that client at the end.
    """

    def __init__(self, find: Callable[[], Client], leave: Callable[[Client], None] | None = None) -> None:
        self._find, self._leave = find, leave
        self._client: Client | None = None

    @property
    def found(self) -> bool:
        """Whether they have been asked for."""
        return self._client is not None

    def client(self) -> Client:
        """Their client.

        Raises
        ------
        ClusterError
        """
        if self._client is None:
            self._client = self._find()
        return self._client

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._client is not None and self._leave is not None:
            self._leave(self._client)
