"""A Dask scheduler that writes fewer messages: each costs both ends more than what it says.

Clients are told of results as often as they write themselves. That a worker may forget a small result goes along with the next message
that it must have: usually its next task, so that it still forgets the old before it begins the new.
"""

from __future__ import annotations

from time import monotonic
from typing import Any

from distributed import Scheduler
from distributed.batched import BatchedSend
from distributed.comm import Comm
from distributed.scheduler import TaskState

_CLIENT_WRITES_SECONDS = 0.01
_SMALL_BYTES = 10_000
_LATEST_SECONDS = 1.0


class WorkerStream(BatchedSend):
    """Messages to a worker, in the order in which they were given; what is not urgent waits for what is."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._waiting: list[Any] = []
        self._waiting_since = 0.0

    def send(self, *messages: Any) -> None:
        """As distributed's, after what waits."""
        waiting, self._waiting = self._waiting, []
        super().send(*waiting, *messages)

    def send_later(self, *messages: Any) -> None:
        """Send them before the next message, or when :meth:`send_old` is called a second later."""
        if not self._waiting:
            self._waiting_since = monotonic()
        self._waiting.extend(messages)

    def send_old(self, now: float) -> None:
        """Send what has waited for long."""
        if self._waiting and now - self._waiting_since > _LATEST_SECONDS and not self.closed():
            self.send()


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
        """Send workers that get no tasks what has waited for one."""
        for stream in self.stream_comms.values():
            if isinstance(stream, WorkerStream):
                stream.send_old(now)

    def _transition_memory_released(self, key: Any, stimulus_id: str) -> Any:
        return self._freed_later(self.tasks[key], *super()._transition_memory_released(key, stimulus_id))

    def _transition_memory_forgotten(self, key: Any, stimulus_id: str) -> Any:
        return self._freed_later(self.tasks[key], *super()._transition_memory_forgotten(key, stimulus_id))

    def _freed_later(self, ts: TaskState, recommendations: Any, to_clients: Any, to_workers: Any) -> Any:
        if ts.nbytes <= _SMALL_BYTES and not ts.actor:
            for address in list(to_workers):
                stream = self.stream_comms.get(address)
                if isinstance(stream, WorkerStream):
                    stream.send_later(*to_workers.pop(address))
        return recommendations, to_clients, to_workers

    _TRANSITIONS_TABLE = {  # noqa: RUF012  (distributed looks its functions up here, not as methods)
        **Scheduler._TRANSITIONS_TABLE,
        ("memory", "released"): _transition_memory_released,
        ("memory", "forgotten"): _transition_memory_forgotten,
    }
