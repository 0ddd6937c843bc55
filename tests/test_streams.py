"""Fewer messages between a scheduler with lanes, its workers and clients; nothing is lost, late for long or out of order."""

from __future__ import annotations

import asyncio
import time

from _lanes import client, cluster, run, sleep, until
from distributed import Worker
from distributed.diagnostics.plugin import SchedulerPlugin

from cryodask.cluster import streams


def numbers(count: int) -> list[int]:
    return list(range(count))


def test_a_small_result_is_forgotten_along_with_the_next_task_and_a_large_one_at_once(monkeypatch):
    monkeypatch.setattr(streams, "_LATEST_SECONDS", 60.0)  # a machine that stalls is no worker without work

    async def scenario():
        async with cluster(0) as scheduler, Worker(scheduler.address, dashboard=False) as worker, client(scheduler, "a") as c:
            small, large = c.submit(numbers, 3, key="small"), c.submit(numbers, 10_000, key="large")
            await c.gather([small, large])
            stream = scheduler.stream_comms[worker.address]
            small.release()
            await until(lambda: "small" not in scheduler.tasks)
            sent = stream.batch_count
            await asyncio.sleep(0.1)
            assert "small" in worker.data
            assert stream.batch_count == sent, "no message of its own"
            next_one = c.submit(sleep, 0, 0.0, key="next")
            await next_one
            assert "small" not in worker.data
            assert stream.batch_count == sent + 1, "one message: the task, and what may be forgotten"
            large.release()
            await until(lambda: "large" not in worker.data)

    run(scenario)


def test_a_worker_without_work_forgets_after_a_second():
    async def scenario():
        async with cluster(0) as scheduler, Worker(scheduler.address, dashboard=False) as worker, client(scheduler, "a") as c:
            future = c.submit(numbers, 3, key="small")
            await future
            begin = time.monotonic()
            future.release()
            await until(lambda: "small" not in worker.data)
            assert time.monotonic() - begin > 0.9
            assert not worker.state.tasks

    run(scenario)


def test_what_was_forgotten_can_be_made_again_at_once(monkeypatch):
    monkeypatch.setattr(streams, "_LATEST_SECONDS", 60.0)

    async def scenario():
        async with cluster(1) as scheduler, client(scheduler, "a") as c:
            for attempt in range(20):
                future = c.submit(numbers, attempt, key="same")
                assert await asyncio.wait_for(future, 10) == list(range(attempt)), "not what an earlier attempt has left on the worker"
                future.release()
                await until(lambda: not scheduler.tasks)

    run(scenario)


def test_a_task_that_has_not_begun_is_taken_back_at_once(monkeypatch):
    monkeypatch.setattr(streams, "_LATEST_SECONDS", 60.0)

    async def scenario():
        async with cluster(0) as scheduler, Worker(scheduler.address, nthreads=1, dashboard=False) as worker, client(scheduler, "a") as c:
            (given,) = await c.scatter([1])
            futures = [c.submit(sleep, i, 1.0, given, key=f"task-{i}") for i in range(8)]
            await until(lambda: worker.state.executing and worker.state.ready)
            begun = {ts.key for ts in worker.state.executing}
            await c.cancel(futures)
            await until(lambda: not worker.state.ready)
            assert {ts.key for ts in worker.state.tasks.values() if ts.key.startswith("task")} <= begun

    run(scenario)


class _Early(SchedulerPlugin):
    def add_worker(self, scheduler, worker) -> None:
        scheduler.stream_comms[worker].send({"op": "free-keys", "keys": ["none"], "stimulus_id": "early"})


def test_what_is_sent_before_the_stream_to_a_worker_is_open_is_not_lost():
    async def scenario():
        async with cluster(0) as scheduler:
            scheduler.add_plugin(_Early(), name="early")
            async with Worker(scheduler.address, dashboard=False) as worker:
                await until(lambda: any("early" in entry for entry in worker.state.log), seconds=10)

    run(scenario)


def test_a_chain_of_short_tasks_costs_a_message_to_its_worker_for_each(monkeypatch):
    monkeypatch.setattr(streams, "_LATEST_SECONDS", 60.0)

    async def scenario():
        async with cluster(0) as scheduler, Worker(scheduler.address, dashboard=False) as worker, client(scheduler, "a") as c:
            stream = scheduler.stream_comms[worker.address]
            before = stream.batch_count
            for step in range(100):
                await c.submit(sleep, step, 0.0, key=f"step-{step}")
                await asyncio.sleep(0.01)  # more than distributed gathers messages for by itself
            assert stream.batch_count - before <= 102

    run(scenario)


def test_what_waits_keeps_its_place_before_what_is_sent_after_it():
    async def scenario():
        stream = streams.WorkerStream("5ms")
        stream.send_later("first", "second")
        stream.send("third")
        stream.send_later("fourth")
        stream.send("fifth", "sixth")
        assert stream.buffer == ["first", "second", "third", "fourth", "fifth", "sixth"]

    asyncio.run(scenario())
