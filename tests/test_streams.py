"""Fewer messages between a scheduler with lanes, its workers and clients; nothing is lost, late for long or out of order."""

from __future__ import annotations

import asyncio
import time

from _lanes import client, cluster, run, sleep, until
from distributed import Worker

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


def test_what_was_forgotten_can_be_made_again_at_once():
    async def scenario():
        async with cluster(2) as scheduler, client(scheduler, "a") as c:
            for attempt in range(50):
                first = c.submit(numbers, attempt, key="same")
                second = c.submit(len, first, key="length")
                assert await second == attempt, "not what an earlier attempt has left on a worker"
                first.release()
                second.release()
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


def test_a_task_for_a_worker_that_just_comes_is_not_lost():
    async def scenario():
        async with cluster(0) as scheduler, client(scheduler, "a") as c:
            futures = c.map(sleep, range(20), [0.0] * 20, pure=False)
            await until(lambda: len(scheduler.tasks) == 20)
            async with Worker(scheduler.address, dashboard=False):  # tasks are sent before its stream is open
                assert await asyncio.wait_for(c.gather(futures), 10) == list(range(20))

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
