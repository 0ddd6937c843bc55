"""Fewer messages between a scheduler with lanes, its workers and clients; nothing is lost, late for long or out of order."""

from __future__ import annotations

import asyncio
import fractions
import time

from _lanes import client, cluster, run, sleep, until
from distributed import Worker
from distributed.diagnostics.plugin import SchedulerPlugin

from cryodask.cluster.sharing import streams


def numbers(count: int) -> list[int]:
    return list(range(count))


def double(number: int) -> int:
    return 2 * number


def never_by_time(monkeypatch) -> None:
    """A machine that stalls is no worker that waits for long."""
    monkeypatch.setattr(streams, "_ALONG_SECONDS", 60.0)
    monkeypatch.setattr(streams, "_ALONE_SECONDS", 600.0)


def test_small_values_are_forgotten_many_at_a_time_and_large_ones_at_once(monkeypatch):
    never_by_time(monkeypatch)

    async def scenario():
        async with cluster(0) as scheduler, Worker(scheduler.address, dashboard=False) as worker, client(scheduler, "a") as c:
            large = c.submit(numbers, 10_000, key="large")
            await large
            stream = scheduler.stream_comms[worker.address]
            before = stream.batch_count
            for step in range(20):
                await c.submit(double, step, key=f"small-{step}")
                await until(lambda: f"small-{step}" not in scheduler.tasks)  # noqa: B023
            assert stream.batch_count == before + 20, "one message a task, none that says what may be forgotten"
            assert set(worker.data) == {"large"} | {f"small-{step}" for step in range(20)}
            large.release()
            await until(lambda: "large" not in scheduler.tasks and "large" not in worker.data)

    run(scenario)


def test_small_values_that_have_waited_are_forgotten_along_with_the_next_task(monkeypatch):
    never_by_time(monkeypatch)

    async def scenario():
        async with cluster(0) as scheduler, Worker(scheduler.address, dashboard=False) as worker, client(scheduler, "a") as c:
            for step in range(5):
                await c.submit(double, step, key=f"small-{step}")
            await until(lambda: not scheduler.tasks)
            sent = scheduler.stream_comms[worker.address].batch_count
            monkeypatch.setattr(streams, "_ALONG_SECONDS", 0.0)
            last = c.submit(double, 3, key="last")
            await last
            assert set(worker.data) == {"last"}
            assert scheduler.stream_comms[worker.address].batch_count == sent + 1

    run(scenario)


def test_what_may_be_larger_than_it_looks_is_forgotten_along_with_the_next_task(monkeypatch):
    """Of a list Dask counts some entries, of an unknown object only itself, whatever hangs on it."""
    never_by_time(monkeypatch)

    async def scenario():
        async with cluster(0) as scheduler, Worker(scheduler.address, dashboard=False) as worker, client(scheduler, "a") as c:
            for kind, step in ((numbers, 3), (fractions.Fraction, 3), (double, 3)):
                future = c.submit(kind, step, key=kind.__name__)
                await future
                sent = scheduler.stream_comms[worker.address].batch_count
                future.release()
                await until(lambda: not scheduler.tasks)
                await asyncio.sleep(0.1)
                assert kind.__name__ in worker.data
                await c.submit(double, 4, key=f"after-{kind.__name__}")
                assert scheduler.stream_comms[worker.address].batch_count == sent + 1, "one message: the task, and what may be forgotten"
                assert (kind.__name__ in worker.data) is (kind is double), "only a number waits for more"

    run(scenario)


def test_a_worker_without_work_forgets_after_a_while(monkeypatch):
    monkeypatch.setattr(streams, "_ALONG_SECONDS", 0.5)
    monkeypatch.setattr(streams, "_ALONE_SECONDS", 1.0)

    async def scenario():
        async with cluster(0) as scheduler, Worker(scheduler.address, dashboard=False) as worker, client(scheduler, "a") as c:
            future = c.submit(double, 3, key="small")
            await future
            begin = time.monotonic()
            future.release()
            await until(lambda: "small" not in worker.data)
            assert time.monotonic() - begin > 0.9
            assert not worker.state.tasks

    run(scenario)


def test_no_more_than_a_hundred_small_results_wait_to_be_forgotten(monkeypatch):
    never_by_time(monkeypatch)

    async def scenario():
        async with cluster(0) as scheduler, Worker(scheduler.address, dashboard=False) as worker, client(scheduler, "a") as c:
            futures = c.map(double, range(350), key=[f"small-{step}" for step in range(350)])
            await c.gather(futures)
            for future in futures:
                future.release()
            await until(lambda: not scheduler.tasks)
            await until(lambda: len(worker.data) == 50)

    run(scenario)


def test_a_result_that_is_made_again_elsewhere_is_not_taken_from_what_is_left_of_the_old_one(monkeypatch):
    never_by_time(monkeypatch)

    async def scenario():
        async with (
            cluster(0) as scheduler,
            Worker(scheduler.address, name="first", dashboard=False) as first,
            Worker(scheduler.address, name="second", dashboard=False) as second,
            client(scheduler, "a") as c,
        ):
            old = c.submit(double, 3, key="made", workers=["first"])
            await old
            old.release()
            await until(lambda: "made" not in scheduler.tasks)
            assert "made" in first.data, "it waits to be told"
            new = c.submit(double, 5, key="made", workers=["second"])
            await new
            assert "made" in second.data
            assert await c.submit(abs, new, key="needs", workers=["first"]) == 10

    run(scenario)


def test_what_was_forgotten_can_be_made_again_at_once(monkeypatch):
    never_by_time(monkeypatch)

    async def scenario():
        async with cluster(1) as scheduler, client(scheduler, "a") as c:
            for attempt in range(20):
                future = c.submit(double, attempt, key="same")
                assert await asyncio.wait_for(future, 120) == 2 * attempt, "not what an earlier attempt has left on the worker"
                future.release()
                await until(lambda: not scheduler.tasks)

    run(scenario)


def test_a_task_that_has_not_begun_is_taken_back_at_once(monkeypatch):
    never_by_time(monkeypatch)

    async def scenario():
        async with cluster(0) as scheduler, Worker(scheduler.address, nthreads=1, dashboard=False) as worker, client(scheduler, "a") as c:
            (given,) = await c.scatter([1])
            futures = [c.submit(sleep, i, 4.0, given, key=f"task-{i}") for i in range(8)]
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
                await until(lambda: any("early" in entry for entry in worker.state.log))

    run(scenario)


def test_a_chain_of_short_tasks_costs_a_message_to_its_worker_for_each(monkeypatch):
    never_by_time(monkeypatch)

    async def scenario():
        async with cluster(0) as scheduler, Worker(scheduler.address, dashboard=False) as worker, client(scheduler, "a") as c:
            stream = scheduler.stream_comms[worker.address]
            before = stream.batch_count
            for step in range(100):
                await c.submit(sleep, step, 0.0, key=f"step-{step}")
                await asyncio.sleep(0.01)  # more than distributed gathers messages for by itself
            assert stream.batch_count - before <= 102

    run(scenario)


def test_a_value_that_comes_beside_the_stream_is_not_taken_for_what_is_left_of_the_old_one(monkeypatch):
    never_by_time(monkeypatch)

    async def again(c, scheduler, worker) -> None:
        old = c.submit(double, 3, key="named", workers=[worker])
        await old
        old.release()
        await until(lambda: "named" not in scheduler.tasks)
        await asyncio.sleep(0.05)  # the stream gathers for so long

    async def scenario():
        async with (
            cluster(0) as scheduler,
            Worker(scheduler.address, name="first", dashboard=False) as first,
            Worker(scheduler.address, name="second", dashboard=False) as second,
            client(scheduler, "a") as c,
        ):
            for direct in (False, True):
                await again(c, scheduler, "first")
                assert "named" in first.data
                new = (await c.scatter({"named": 7 + direct}, workers=[first.address], direct=direct))["named"]
                assert await c.submit(abs, new, workers=["first"], pure=False) == 7 + direct
                new.release()
                await until(lambda: "named" not in scheduler.tasks and "named" not in first.data)
            await again(c, scheduler, "first")
            new = c.submit(double, 5, key="named", workers=["second"], allow_other_workers=True)
            await new
            assert second.data["named"] == 10
            await c.replicate([new])
            assert first.data["named"] == 10
            await asyncio.sleep(0.05)
            assert {ws.name for ws in scheduler.tasks["named"].who_has} == {"first", "second"}

    run(scenario)


def later(*keys: object, stimulus: str = "stimulus", with_next: bool = False) -> dict[str, object]:
    return {"op": "free-keys", "keys": list(keys), "stimulus_id": stimulus, "later": with_next}


def test_only_what_has_nothing_to_do_with_them_overtakes_what_may_be_forgotten():
    def task(key: str, *needs: str) -> dict[str, object]:
        return {"op": "compute-task", "key": key, "who_has": dict.fromkeys(needs, ("tcp://other",))}

    async def scenario():
        other = task("other", "far")
        for message in (task("old"), task("new", "far", "old"), {"op": "acquire-replicas", "who_has": {}}):
            stream = streams.WorkerStream("5ms")
            stream.send(later("older", stimulus="first"), later("old", stimulus="second"))
            stream.send(other)
            stream.send(other, message)
            stream.send(other)
            free = {"op": "free-keys", "keys": ["older", "old"], "stimulus_id": "second"}
            assert stream.buffer == [other, other, free, message, other]

    asyncio.run(scenario())


def test_a_release_never_overtakes_a_task_that_was_sent_before_it():
    """Tasks whose input is recomputed in the same round of transitions: a worker that dies in a shuffle."""

    async def scenario():
        stream = streams.WorkerStream("5ms")
        needs = {"op": "compute-task", "key": "needs", "who_has": {"input": ("tcp://here",)}}
        free = {"op": "free-keys", "keys": ["needs"], "stimulus_id": "stimulus"}
        stream.send(needs, free, later("input"))
        assert stream.buffer == [needs, free]
        again = {"op": "compute-task", "key": "input", "who_has": {}}
        stream.send(again)
        assert stream.buffer[2:] == [{"op": "free-keys", "keys": ["input"], "stimulus_id": "stimulus"}, again]

    asyncio.run(scenario())


def test_a_worker_that_has_gone_is_told_nothing_and_nobody_fails_for_it():
    class Gone:
        def closed(self) -> bool:
            return True

    async def scenario():
        stream = streams.WorkerStream("5ms")
        stream.comm = Gone()
        for number in range(2 * streams._MOST):
            stream.send(later(number, with_next=True))
        stream.send_old(time.monotonic() + 60)
        assert not stream.buffer

    asyncio.run(scenario())


def test_a_small_value_does_not_make_wait_what_may_be_larger():
    async def scenario():
        for first in (True, False):
            stream = streams.WorkerStream("5ms")
            stream.send(later("one", with_next=first), later("other", with_next=not first))
            task = {"op": "compute-task", "key": "task", "who_has": {}}
            stream.send(task)
            assert stream.buffer == [{"op": "free-keys", "keys": ["one", "other"], "stimulus_id": "stimulus"}, task]

    asyncio.run(scenario())
