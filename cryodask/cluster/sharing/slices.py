"""A Dask scheduler whose loop is free for others while a client cancels, drops or leaves behind many tasks.

distributed handles each of these in one piece, and a cancel in a time that grows with the square of the number of keys.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Sequence
from time import monotonic, time
from typing import Any

from distributed.comm import Comm
from distributed.scheduler import ClientState

from cryodask.cluster.sharing.streams import GatheringScheduler

logger = logging.getLogger("distributed.scheduler")

LEAVING = "leaving-"
"""Beginning of the name under which the keys of a client that has gone are released."""
_AT_ONCE = 200
_MOST_SECONDS = 0.02
_LOGGED = 100


class SlicingScheduler(GatheringScheduler):
    """A scheduler that serves others between the slices of a long order; a client's own messages keep their order."""

    def slice_orders(self) -> None:
        """Start slicing."""
        self.stream_handlers["cancel-keys"] = self.cancel_keys

    async def handle_stream(self, comm: Comm, extra: dict[str, Any] | None = None) -> None:
        """Like distributed's, but takes no more than some hundred messages at a time."""
        comm.read = _in_pieces(comm.read)  # type: ignore[method-assign, assignment]
        await super().handle_stream(comm, extra)

    # --- cancelling -------------------------------------------------------------------------------------------------------------
    async def cancel_keys(self, keys: Collection[Any], client: str, force: bool = False, reason: Any = None, msg: Any = None) -> None:
        """Like distributed's ``cancel-keys``, in slices; only clients that wanted a key are told that it is cancelled."""
        started = monotonic()
        for step in self._cancelled(keys, client, force, reason, msg):
            step()
            if monotonic() - started > _MOST_SECONDS:
                await asyncio.sleep(0)
                started = monotonic()

    def stimulus_cancel(self, keys: Collection[Any], client: str, force: bool = False, reason: Any = None, msg: Any = None) -> None:
        """Like :meth:`cancel_keys`, at once."""
        for step in self._cancelled(keys, client, force, reason, msg):
            step()

    def _cancelled(self, keys: Collection[Any], client: str, force: bool, reason: Any, msg: Any) -> Iterator[Callable[[], None]]:
        cs = self.clients.get(client)
        if cs is None:
            return
        logger.info("Client %s requests to cancel %d keys", client, len(keys))
        self.log_event(client, {"action": "cancel", "count": len(keys), "force": force})
        found = self._with_dependents(keys, cs, force)
        for key in found[:_LOGGED]:
            logger.info("Scheduler cancels key %s.  Force=%s", key, force)

        def release(some: list[Any]) -> None:
            there = [self.tasks[key] for key in some if key in self.tasks]
            for wanting in {c for ts in there for c in ts.who_wants or ()} if force else {cs}:
                its = [ts.key for ts in there if ts in wanting.wants_what]
                if its and self.clients.get(wanting.client_key) is wanting:
                    self.client_releases_keys(keys=its, client=wanting.client_key, stimulus_id=f"cancel-key-{time()}")
                    self.report({"op": "cancelled-keys", "keys": its, "reason": reason, "msg": msg}, client=wanting.client_key)

        for some in _slices(self._what_runs_last(found)):
            yield lambda some=some: release(some)  # type: ignore[misc]

    def _with_dependents(self, keys: Iterable[Any], cs: ClientState, force: bool) -> list[Any]:
        """Keys to cancel with all that depends on them, dependents first; what other clients want stays unless ``force``."""
        found: dict[Any, bool] = {}
        stack = [self.tasks[key] for key in keys if key in self.tasks]
        while stack:
            ts = stack.pop()
            wanted = ts.who_wants or set()
            if ts.key not in found and (force or wanted <= {cs}):
                found[ts.key] = bool(wanted)
                stack.extend(ts.dependents)
        return [key for key in reversed(found) if found[key]]

    def _what_runs_last(self, keys: Iterable[Any]) -> list[Any]:
        """Keys with those that workers have at the end; else each slice would start tasks that the next one cancels."""
        return sorted(keys, key=lambda key: key in self.tasks and self.tasks[key].state == "processing")

    # --- leaving ----------------------------------------------------------------------------------------------------------------
    def remove_client(self, client: str, stimulus_id: str | None = None) -> None:
        """Like distributed's; the keys of a client that wants many are released in slices, while it is gone for everybody else."""
        cs = self.clients.get(client)
        if cs is None or len(cs.wants_what) <= _AT_ONCE or self.status.name != "running":
            super().remove_client(client, stimulus_id)
            return
        keys = self._what_runs_last([ts.key for ts in cs.wants_what])
        cs.client_key = f"{LEAVING}{client}-{time()}"
        self.clients[cs.client_key], self.clients[client] = cs, ClientState(client)
        super().remove_client(client, stimulus_id)
        self._ongoing_background_tasks.call_soon(self._leave, cs, keys)

    async def _leave(self, cs: ClientState, keys: list[Any]) -> None:
        started = monotonic()
        for some in _slices(keys):
            self.client_releases_keys(keys=some, client=cs.client_key, stimulus_id=f"{LEAVING}{time()}")
            if monotonic() - started > _MOST_SECONDS:
                await asyncio.sleep(0)
                started = monotonic()
        self.clients.pop(cs.client_key, None)


def _slices(keys: Sequence[Any]) -> Iterator[Any]:
    for first in range(0, len(keys), _AT_ONCE):
        yield keys[first : first + _AT_ONCE]


def _in_pieces(read: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """A ``read`` that hands on a long list of messages in several short ones; distributed serves others between two of them."""
    waiting: list[Any] = []

    async def read_some(*args: Any, **kwargs: Any) -> Any:
        if not waiting:
            messages = await read(*args, **kwargs)
            if not isinstance(messages, list | tuple) or len(messages) <= _AT_ONCE:
                return messages
            waiting.extend(reversed(list(_slices(messages))))
        return waiting.pop()

    return read_some
