"""A Dask scheduler that sends fewer messages, because each costs both ends more than its content.

Clients are told of results as often as they write themselves. Workers are told to release many results at a time, since they answer each
message, usually with a separate one: small values now and then, results that only look small along with the next task. Until then a worker
may have an old value of a key that has a new one elsewhere, so it is told before anything else is done there with that key.
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
"""Types whose size Dask knows; for many others it counts only the outermost object."""

_ALONG_SECONDS = 2.5
_ALONE_SECONDS = 3.5
_MOST = 100
_THERE_AND_BACK_SECONDS = 0.05
_LATER = "later"
"""Key of a message that releases results and may wait: whether at the latest for the next message. Streams keep such messages, in their
order among the others: a task that was sent before its input was released must not be overtaken by the release."""


class WorkerStream(BatchedSend):
    """Message stream to a worker; releases of small results are delayed until a message comes that must not overtake them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._free: dict[Any, str] = {}
        self._free_since = 0.0

    def send(self, *messages: Any) -> None:
        """Like distributed's, but keeps releases that may wait, and sends them first if a message concerns them, or after long enough."""
        now: list[Any] = []
        for message in messages:
            if _LATER in message:
                self._free_later(message)
            elif self._free and (monotonic() - self._free_since >= _ALONG_SECONDS or not self._may_overtake(message)):
                now += [self._free_keys(), message]
            else:
                now.append(message)
        if len(self._free) >= _MOST and not self.closed():
            now.append(self._free_keys())
        if now:
            super().send(*now)

    def _free_later(self, message: dict[str, Any]) -> None:
        since = monotonic() - message[_LATER] * _ALONG_SECONDS
        self._free_since = min(since, self._free_since) if self._free else since
        self._free.update(dict.fromkeys(message["keys"], message["stimulus_id"]))

    def send_old(self, now: float) -> None:
        """Send releases that have waited long enough."""
        if now - self._free_since > _ALONE_SECONDS:
            self.send_free()

    def has_waiting(self, keys: Collection[Any] | None) -> bool:
        """Whether a release of one of the keys (None: of any) is still delayed."""
        return bool(self._free) if keys is None else not self._free.keys().isdisjoint(keys)

    def send_free(self) -> None:
        """Send delayed releases if the worker is still connected."""
        if self._free and not self.closed():
            super().send(self._free_keys())

    def _free_keys(self) -> dict[str, Any]:
        free, self._free = self._free, {}
        return {"op": "free-keys", "keys": list(free), "stimulus_id": next(reversed(free.values()))}

    def _may_overtake(self, message: Any) -> bool:
        """Whether a message may overtake: only tasks that are neither an outdated key on the worker nor depend on one."""
        return message["op"] == "compute-task" and message["key"] not in self._free and self._free.keys().isdisjoint(message["who_has"])


class GatheringScheduler(Scheduler):
    """A scheduler with fewer messages; subclasses call :meth:`send_what_waits` periodically."""

    async def handle_stream(self, comm: Comm, extra: dict[str, Any] | None = None) -> None:
        """Like distributed's, but writes to a client as often as clients write to it, not five times as often.

        When lanes take turns, consecutive results belong to different clients; writing them one by one would cost more than the switching.
        """
        if extra is not None and extra.get("client") in self.client_comms:
            self.client_comms[extra["client"]].interval = _CLIENT_WRITES_SECONDS
        await super().handle_stream(comm, extra)

    async def handle_worker(self, comm: Comm, worker: str) -> None:
        """Like distributed's, but with a stream that can delay messages."""
        stream = WorkerStream("5ms", loop=self.loop)
        stream.send(*self.stream_comms[worker].buffer)
        self.stream_comms[worker] = stream
        await super().handle_worker(comm, worker)

    def send_what_waits(self, now: float) -> None:
        """Send releases that have been delayed for long."""
        for stream in self.stream_comms.values():
            if isinstance(stream, WorkerStream):
                stream.send_old(now)

    async def scatter(self, data: Any, *args: Any, **kwargs: Any) -> Any:
        """Like distributed's, which sends data to workers outside the streams, but first waits for delayed releases."""
        await self._forgotten(data)
        return await super().scatter(data, *args, **kwargs)

    async def gather_on_worker(self, worker_address: str, who_has: Any) -> Any:
        """Like distributed's, which makes requests to a worker outside its stream, but first waits for delayed releases."""
        await self._forgotten(who_has)
        return await super().gather_on_worker(worker_address, who_has)

    async def get_ncores_running(self, workers: Any = None) -> Any:  # type: ignore[override]
        """Like distributed's, but waits for delayed releases, because clients call it before they send data to workers."""
        await self._forgotten(None)
        return super().get_ncores_running(workers)

    async def _forgotten(self, keys: Collection[Any] | None) -> None:
        """Wait until no worker has an outdated value of a key (None: of any)."""
        streams = [stream for stream in self.stream_comms.values() if isinstance(stream, WorkerStream) and stream.has_waiting(keys)]
        for stream in streams:
            stream.send_free()
        if streams:
            await asyncio.sleep(_THERE_AND_BACK_SECONDS)

    def _transition_memory_released(self, key: Any, stimulus_id: str) -> Any:
        return self._freed_later(self.tasks[key], *super()._transition_memory_released(key, stimulus_id))

    def _transition_memory_forgotten(self, key: Any, stimulus_id: str) -> Any:
        return self._freed_later(self.tasks[key], *super()._transition_memory_forgotten(key, stimulus_id))

    def _freed_later(self, ts: TaskState, recommendations: Any, to_clients: Any, to_workers: Any) -> Any:
        # data scattered from within a task may come again without prior notice to the scheduler
        if ts.nbytes <= _SMALL_BYTES and ts.run_spec is not None and not ts.actor:
            for address, messages in to_workers.items():
                if isinstance(self.stream_comms.get(address), WorkerStream):
                    for message in messages:
                        message[_LATER] = ts.type not in _SIZE_IS_KNOWN
        return recommendations, to_clients, to_workers

    _TRANSITIONS_TABLE = {  # noqa: RUF012  (distributed looks its functions up here, not as methods)
        **Scheduler._TRANSITIONS_TABLE,
        ("memory", "released"): _transition_memory_released,
        ("memory", "forgotten"): _transition_memory_forgotten,
    }
