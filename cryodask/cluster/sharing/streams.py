"""A Dask scheduler that writes fewer messages: each costs both ends more than what it says.

Clients are told of results as often as they write themselves. Workers are told of many results at a time that they may forget them, since
they answer each time, usually with a message of its own: of small values now and then, of what only looks small along with their next task.
Until then a worker may hold an old value of a key that has a new one elsewhere, so it is told before anything else is done there with that
key.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from time import monotonic
from typing import Any

from distributed import Scheduler
from distributed.batched import BatchedSend
from distributed.comm import Comm
from distributed.scheduler import TaskState

_CLIENT_WRITES_SECONDS = 0.01
_SMALL_BYTES = 10_000
_SIZE_IS_KNOWN = {"NoneType", "bool", "int", "float", "str", "bytes"}
"""Types whose size Dask knows; of many others it counts the outermost object only."""

_ALONG_SECONDS = 2.5
_ALONE_SECONDS = 3.5
_MOST = 100
_THERE_AND_BACK_SECONDS = 0.05


class WorkerStream(BatchedSend):
    """Messages to a worker; which small results it may forget waits, until a message comes that must not overtake it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._free: dict[Any, str] = {}
        self._free_since = 0.0

    def send(self, *messages: Any) -> None:
        """As distributed's; what waits goes first if one of them has to do with it, or if it has waited for long enough to go along."""
        if self._free and (monotonic() - self._free_since >= _ALONG_SECONDS or not all(map(self._may_overtake, messages))):
            super().send(self._free_keys(), *messages)
        else:
            super().send(*messages)

    def free_later(self, key: Any, stimulus_id: str, *, with_next: bool) -> None:
        """The worker may forget a result: it is told with others, or along with the next message at the latest."""
        since = monotonic() - with_next * _ALONG_SECONDS
        self._free_since = min(since, self._free_since) if self._free else since
        self._free[key] = stimulus_id
        if len(self._free) >= _MOST:
            self.send_free()

    def send_old(self, now: float) -> None:
        """Send what has waited for long."""
        if now - self._free_since > _ALONE_SECONDS:
            self.send_free()

    def has_waiting(self, keys: Collection[Any] | None) -> bool:
        """Whether the worker is yet to be told of one of the keys (None: of any)."""
        return bool(self._free) if keys is None else not self._free.keys().isdisjoint(keys)

    def send_free(self) -> None:
        """Send what waits, to a worker that is still there."""
        if self._free and not self.closed():
            super().send(self._free_keys())

    def _free_keys(self) -> dict[str, Any]:
        free, self._free = self._free, {}
        return {"op": "free-keys", "keys": list(free), "stimulus_id": next(reversed(free.values()))}

    def _may_overtake(self, message: Any) -> bool:
        """Only tasks that neither are nor need what the worker still has of an earlier time."""
        return message["op"] == "compute-task" and message["key"] not in self._free and self._free.keys().isdisjoint(message["who_has"])


class GatheringScheduler(Scheduler):
    """A scheduler with fewer messages; whoever builds on it calls :meth:`send_what_waits` now and then."""

    async def handle_stream(self, comm: Comm, extra: dict[str, Any] | None = None) -> None:
        """As distributed's; to a client it writes as often as clients write to it, not five times as often.

        Where lanes take turns every few results belong to several clients: written one by one, they would cost more than the turns do.
        """
        if extra is not None and extra.get("client") in self.client_comms:
            self.client_comms[extra["client"]].interval = _CLIENT_WRITES_SECONDS
        await super().handle_stream(comm, extra)

    async def handle_worker(self, comm: Comm, worker: str) -> None:
        """As distributed's, with a stream on which messages can wait."""
        stream = WorkerStream("5ms", loop=self.loop)
        stream.send(*self.stream_comms[worker].buffer)
        self.stream_comms[worker] = stream
        await super().handle_worker(comm, worker)

    def send_what_waits(self, now: float) -> None:
        """Tell workers what they may forget that have not been told for long."""
        for stream in self.stream_comms.values():
            if isinstance(stream, WorkerStream):
                stream.send_old(now)

    async def scatter(self, data: Any, *args: Any, **kwargs: Any) -> Any:
        """As distributed's, which sends data to workers beside the streams."""
        await self._forgotten(data)
        return await super().scatter(data, *args, **kwargs)

    async def gather_on_worker(self, worker_address: str, who_has: Any) -> Any:
        """As distributed's, which asks a worker beside its stream to fetch what it does not have."""
        await self._forgotten(who_has)
        return await super().gather_on_worker(worker_address, who_has)

    async def get_ncores_running(self, workers: Any = None) -> Any:  # type: ignore[override]
        """As distributed's, which awaits its handlers; clients ask before they send data to workers themselves."""
        await self._forgotten(None)
        return super().get_ncores_running(workers)

    async def _forgotten(self, keys: Collection[Any] | None) -> None:
        """Wait until no worker has an old value of a key (None: of any)."""
        streams = [stream for stream in self.stream_comms.values() if isinstance(stream, WorkerStream) and stream.has_waiting(keys)]
        for stream in streams:
            stream.send_free()
        if streams:
            await asyncio.sleep(_THERE_AND_BACK_SECONDS)

    def _transition_memory_released(self, key: Any, stimulus_id: str) -> Any:
        return self._freed_later(self.tasks[key], stimulus_id, *super()._transition_memory_released(key, stimulus_id))

    def _transition_memory_forgotten(self, key: Any, stimulus_id: str) -> Any:
        return self._freed_later(self.tasks[key], stimulus_id, *super()._transition_memory_forgotten(key, stimulus_id))

    def _freed_later(self, ts: TaskState, stimulus_id: str, recommendations: Any, to_clients: Any, to_workers: Any) -> Any:
        # what was scattered from within a task comes again without a word to the scheduler before
        if ts.nbytes <= _SMALL_BYTES and ts.run_spec is not None and not ts.actor:
            for address in list(to_workers):
                stream = self.stream_comms.get(address)
                if isinstance(stream, WorkerStream):
                    del to_workers[address]
                    stream.free_later(ts.key, stimulus_id, with_next=ts.type not in _SIZE_IS_KNOWN)
        return recommendations, to_clients, to_workers

    _TRANSITIONS_TABLE = {  # noqa: RUF012  (distributed looks its functions up here, not as methods)
        **Scheduler._TRANSITIONS_TABLE,
        ("memory", "released"): _transition_memory_released,
        ("memory", "forgotten"): _transition_memory_forgotten,
    }
