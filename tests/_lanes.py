"""A scheduler with lanes and workers in this process, and who had how much of them."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import dask
from distributed import Client, Scheduler, Worker
from distributed.diagnostics.plugin import SchedulerPlugin

from cryodask.cluster.fairshare import FairShareScheduler

LOG: list[tuple[str, float, float]] = []
LATE: list[tuple[float, float]] = []
"""When the event loop of scheduler and workers woke up, and how many seconds late: what a busy machine adds to every wait."""


class _Recorder(SchedulerPlugin):
    """Start and stop of every task by the workers' own clocks."""

    def transition(self, key, start, finish, *args, startstops=None, **kwargs) -> None:
        for phase in startstops or () if finish in ("memory", "erred") else ():
            if phase["action"] == "compute":
                name = key[0] if isinstance(key, tuple) else key
                LOG.append((str(name), phase["start"], phase["stop"]))


@asynccontextmanager
async def cluster(workers: int = 2, threads: int = 1, resources: dict | None = None, **options) -> AsyncIterator[FairShareScheduler]:
    LOG.clear()
    LATE.clear()
    GATE.clear()
    settings = {
        "distributed.worker.memory.terminate": False,
        "distributed.worker.memory.pause": False,
        "distributed.admin.tick.limit": "60s",
        "distributed.scheduler.allowed-failures": 3,
    }
    with dask.config.set(settings):
        async with FairShareScheduler(dashboard=False, host="127.0.0.1", port=0, validate=True, **options) as scheduler:
            scheduler.add_plugin(_Recorder())
            here = {"nthreads": threads, "resources": resources, "host": "127.0.0.1", "dashboard": False}

            async def up(number: int) -> Worker:
                return await Worker(scheduler.address, name=f"w{number}", **here)

            # together, as jobs of one pool come
            made = await asyncio.gather(*map(up, range(workers)))
            watch = asyncio.create_task(_watch())
            try:
                yield scheduler
            finally:
                watch.cancel()
                GATE.set()
                for worker in made:
                    await worker.close(nanny=False)


async def _watch() -> None:
    while True:
        due = time.monotonic() + 0.02
        await asyncio.sleep(0.02)
        LATE.append((time.time(), time.monotonic() - due))


def slack(since: float) -> float:
    """Seconds that a wait since then may take beyond what it waits for: the way there and back, and what this machine added to it."""
    return 0.2 + 2 * max((late for when, late in LATE if when >= since), default=0.0)


def was_calm(since: float) -> bool:
    """Whether this machine has not stalled since then for a tenth of a second."""
    return slack(since) < 0.4


def longest(lane: str) -> float:
    """Seconds that the longest task of a lane took."""
    return max(stop - begin for name, begin, stop in LOG if name.startswith(lane))


async def until(condition: Callable[[], object], seconds: float = 120.0) -> None:
    """Wait for what must come, however long this machine takes."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        await asyncio.sleep(0.02)


async def have_run(*lanes: str) -> None:
    """Wait until a task of each lane has ended."""
    await until(lambda: all(any(name.startswith(lane) for name, *_ in LOG) for lane in lanes))


def client(scheduler: Scheduler, name: str) -> Client:
    return Client(scheduler.address, asynchronous=True, name=name, set_as_default=False)


async def attempt(client: Client) -> None:
    """Connect, and close again whatever came: a client that was refused and left open complains when it is collected, in another test."""
    try:
        await client
    finally:
        await client.close()


def sleep(number: int, seconds: float = 0.1, *inputs) -> int:
    time.sleep(seconds)
    return number


GATE = threading.Event()
"""Opened at the end of each cluster; tasks that are held end when a test opens it."""


def held(number: int, *inputs) -> int:
    """Runs until the gate is open (workers are in this process)."""
    assert GATE.wait(300)
    return number


def is_clean(scheduler: FairShareScheduler) -> None:
    assert not scheduler.tasks
    assert len(scheduler.queued) == 0
    assert scheduler._flights == {}
    assert scheduler._others == {}
    for clock in scheduler._clocks.values():
        nodes = [clock]
        while nodes:
            node = nodes.pop()
            assert (node.held, node.flying, node.waiting, node.heaps) == (0, 0, [], {})
            nodes += node.children.values()


async def until_clean(scheduler: FairShareScheduler) -> None:
    await until(lambda: not scheduler.tasks)
    is_clean(scheduler)


def shares(begin: float, end: float, lanes: str) -> list[float]:
    used = [sum(max(0.0, min(b, end) - max(a, begin)) for name, a, b in LOG if name[0] == lane) for lane in lanes]
    return [100 * u / sum(used) for u in used]


async def have_shares(lanes: str, wanted: list[float], seconds: float = 3.0, within: float = 5.0) -> None:
    """Wait until all lanes run; then they have these shares (%) for so long.

    Those that came first had tasks out while they were alone, which the others make up for first. A window in which the machine stalled
    is no measure, and another is taken, at most twice.
    """
    await have_run(*lanes)
    await asyncio.sleep(1.5)
    for _ in range(3):
        begin = time.time()
        await asyncio.sleep(seconds)
        found = shares(begin, time.time() - 0.2, lanes)
        if max(abs(f - w) for f, w in zip(found, wanted)) <= within:
            return
        if was_calm(begin - 1.5):
            break
    raise AssertionError(f"shares {found} instead of {wanted}")


def run(scenario: Callable[[], object]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 400))  # type: ignore[arg-type]
