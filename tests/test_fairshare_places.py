"""Where tasks wait and may run: bound, reserved, with resources. Nothing stalls that could run, nothing runs where it may not."""

from __future__ import annotations

import asyncio
import time
from functools import partial

import dask
import pytest
from _lanes import GATE, LOG, client, cluster, have_run, have_shares, held, longest, run, slack, sleep, until, until_clean
from distributed import Worker

pytestmark = pytest.mark.heavy


def begun(name: str) -> float:
    return max(begin for key, begin, _ in LOG if key == name)


def begun_between(known: float, start: float) -> int:
    """How many other tasks began after one was known to the scheduler and before it began."""
    return sum(known < begin < start for _, begin, _ in LOG)


def done_by(scheduler, *addresses) -> list[int]:
    return [len(scheduler.workers[address].has_what) for address in addresses]


def test_a_task_with_large_needs_is_not_starved_by_a_flood_of_small_ones():
    async def scenario():
        async with cluster(1, 4, {"GPU": 2}) as scheduler, client(scheduler, "a/x") as a, client(scheduler, "b/y") as b:
            flood = [a.submit(sleep, i, 0.08 + 0.04 * (i % 3), key=f"a{i}", resources={"GPU": 1}) for i in range(120)]
            await have_run("a")
            b_sent = b.submit(sleep, 0, 0.1, key="b", resources={"GPU": 2})
            await until(lambda: "b" in scheduler.tasks)
            known = time.time()
            await b_sent
            assert begun_between(known, begun("b")) <= 12, "those that were sent ahead and a few more, of a flood of 120"
            await a.gather(flood)
            del flood, b_sent
            await until_clean(scheduler)

    run(scenario)


def test_tasks_pinned_to_a_pool_do_not_pile_up_before_those_of_others():
    async def scenario():
        lanes = {"a": 1, "b": 1}
        async with cluster(1, 2, {"pool-cpu": 1e9}, lanes=lanes) as scheduler, client(scheduler, "a/x") as a, client(scheduler, "b/y") as b:
            first = b.submit(sleep, 0, 0.3, key="first")
            pinned = {"resources": {"pool-cpu": 1}}
            flood = [a.submit(sleep, i, 0.2, key=f"a{i}", **pinned) for i in range(60)]
            await have_run("a")
            both = [b.submit(sleep, 0, 0.1, key="b-pinned", **pinned), b.submit(sleep, 0, 0.1, key="b-free")]
            await until(lambda: {"b-pinned", "b-free"} <= set(scheduler.tasks))
            known = time.time()
            await b.gather(both)
            assert begun_between(known, max(begun("b-pinned"), begun("b-free"))) <= 6, "of a flood of 60"
            await a.cancel(flood)
            del flood, first, both

    run(scenario)


def test_a_stolen_task_leaves_no_gpu_booked_where_it_was():
    async def scenario():
        async with cluster(2, 2, {"GPU": 2}) as scheduler, client(scheduler, "a/x") as a:
            first, other = scheduler.workers
            await a.submit(sleep, -1, 0.3, key="warm")
            cpus = [a.submit(sleep, i, 2.0, key=f"c{i}", workers=[first]) for i in range(2)]
            cpus += [a.submit(sleep, i, 0.8, key=f"d{i}", workers=[other]) for i in range(2)]
            await asyncio.sleep(0.2)
            await a.gather([a.submit(sleep, i, 0.3, key=f"g{i}", resources={"GPU": 1}) for i in range(8)])
            await a.gather(cpus)
            assert [ws.used_resources["GPU"] for ws in scheduler.workers.values()] == [0, 0]

    run(scenario)


def test_a_task_that_would_rather_run_on_a_worker_that_is_gone_finds_its_gpu_elsewhere():
    async def scenario():
        async with cluster(2, 1, {"GPU": 1}) as scheduler, client(scheduler, "a/x") as a:
            loose = {"workers": ["tcp://127.0.0.1:9"], "allow_other_workers": True}
            assert await asyncio.wait_for(a.submit(sleep, 1, 0.05, resources={"GPU": 1}, **loose), 120) == 1

    run(scenario)


def test_what_is_bound_to_a_worker_whose_threads_are_all_reserved_runs_there():
    async def scenario():
        lanes = {"live": 1, "a": 1}
        async with cluster(2, 1, lanes=lanes, reserve={"live": 1}) as scheduler, client(scheduler, "a/x") as a:
            kept = next(iter(scheduler._reserved))
            assert await asyncio.wait_for(a.submit(sleep, 1, 0.05, key="bound", workers=[kept]), 120) == 1
            big = await a.scatter(b"x" * 50_000_000, workers=[kept], direct=False)
            assert await asyncio.wait_for(a.submit(len, big), 120) == 50_000_000
            scheduler.validate_state()

    run(scenario)


def test_not_every_thread_can_be_reserved():
    async def scenario():
        async with cluster(1, 4, lanes={"live": 1, "a": 1}, reserve={"live": 4}) as scheduler, client(scheduler, "a/x") as a:
            assert await asyncio.wait_for(a.submit(sleep, 1, 0.05), 120) == 1
            assert list(scheduler._reserved.values()) == [("live", 3)]

    run(scenario)


def test_a_reserved_thread_changes_no_share_and_is_kept_from_gpu_tasks_too():
    async def scenario():
        options = {"lanes": {"live": 1, "h": 3}, "reserve": {"live": 1}}
        async with cluster(2, 4, {"GPU": 4}, **options) as scheduler, client(scheduler, "live/x") as live, client(scheduler, "h/y") as hpda:
            kept = [hpda.map(sleep, range(1000), [0.1] * 1000, key="h", pure=False)]
            kept.append(live.map(sleep, range(1000), [0.1] * 1000, key="l", pure=False))
            await have_shares("hl", [75, 25], within=6)
            for future in [*kept[0], *kept[1]]:
                future.release()
            await until_clean(scheduler)
            flood = hpda.map(held, range(60), key="gpu", pure=False, resources={"GPU": 1})
            await until(lambda: sum(len(ws.processing) for ws in scheduler.workers.values()) >= 7)
            await asyncio.sleep(0.3)
            for number in range(3):
                await live.submit(sleep, 0, 0.05, key=f"item{number}")
                assert not GATE.is_set(), "it has waited for no GPU task, for none has ended"
            await hpda.cancel(flood)
            GATE.set()
            del flood, kept, future

    run(scenario)


def test_places_follow_workers_that_join_pause_and_go_on():
    async def scenario():
        async with cluster(1, 1) as scheduler, client(scheduler, "a/x") as a:
            kept = a.map(sleep, range(40), [0.1] * 40, key=[f"a{i}" for i in range(40)], workers="127.0.0.1")
            await have_run("a")
            async with Worker(scheduler.address, name="new", nthreads=1, host="127.0.0.1", dashboard=False) as new:
                await until(lambda: done_by(scheduler, new.address)[0] >= 5)
                await a.cancel(kept)
            del kept
        async with cluster(3, 1) as scheduler, client(scheduler, "a/x") as a:
            first, second, _ = scheduler.workers
            scheduler.handle_worker_status_change("paused", first, "test")
            kept = a.map(sleep, range(40), [0.1] * 40, key=[f"a{i}" for i in range(40)], workers=[first, second])
            await until(lambda: done_by(scheduler, second)[0])
            scheduler.handle_worker_status_change("running", first, "test")
            await until(lambda: done_by(scheduler, first)[0])
            scheduler.handle_worker_status_change("paused", second, "test")
            before = done_by(scheduler, first)[0]
            await until(lambda: done_by(scheduler, first)[0] >= before + 5)
            await a.cancel(kept)
            scheduler.handle_worker_status_change("running", second, "test")
            await until(lambda: not scheduler.tasks)
            kept = a.map(sleep, range(10), [0.05] * 10, key=[f"b{i}" for i in range(10)], workers=[second])
            await until(lambda: len(scheduler.queued) >= 6)
            waiting = len(scheduler.queued)
            scheduler.handle_worker_status_change("paused", second, "test")
            assert (len(scheduler.queued), len(scheduler.unrunnable)) == (0, waiting)
            scheduler.handle_worker_status_change("running", second, "test")
            assert await a.gather(kept) == list(range(10))
            del kept

    run(scenario)


def test_restrictions_that_change_while_tasks_wait_are_kept():
    async def scenario():
        async with cluster(2, 1) as scheduler, client(scheduler, "a/x") as a:
            first, second = scheduler.workers
            for bound in (None, [first]):
                kept = a.map(sleep, range(12), [0.1] * 12, key=[f"{bound}{i}" for i in range(12)], workers=bound)
                await until(lambda: len(scheduler.queued) >= 6)
                held = [ts.key for ts in scheduler.queued]
                scheduler.set_restrictions({key: {second} for key in held})
                await a.gather(kept)
                assert {ws.address for key in held for ws in scheduler.tasks[key].who_has} == {second}

    run(scenario)


def test_quiet_lanes_that_come_together_each_find_a_worker():
    async def scenario():
        async with cluster(8, 1) as scheduler, client(scheduler, "a/x") as a:
            quiet = [await client(scheduler, f"q{i}/y") for i in range(8)]
            flood = a.map(sleep, range(200), [0.8] * 200, key=[f"a{i}" for i in range(200)])
            await have_run("a")
            await asyncio.sleep(0.2)
            sent = time.time()
            await asyncio.gather(*(c.submit(sleep, i, 0.3, key=f"q{i}") for i, c in enumerate(quiet)))
            waits = [begun(f"q{i}") - sent for i in range(8)]
            assert max(waits) < longest("a") + 0.1 + slack(sent), waits
            await a.cancel(flood)
            for c in quiet:
                await c.close()

    run(scenario)


def test_short_tasks_that_turn_out_long_were_not_all_sent_ahead():
    async def scenario():
        async with cluster(2, 4) as scheduler, client(scheduler, "a/x") as a:
            inputs = a.map(sleep, range(600), [0.0] * 600, key=[("work", i) for i in range(600)])
            await a.gather(inputs)
            kept = a.map(sleep, range(600), [0.2] * 600, inputs, key=[("work", 600 + i) for i in range(600)])
            await asyncio.sleep(0.5)
            assert max(len(ws.processing) for ws in scheduler.workers.values()) <= 8 * 4
            await a.cancel(kept)
            del kept, inputs

    run(scenario)


def test_short_tasks_with_inputs_are_sent_ahead_in_turn_and_yield_to_who_comes():
    async def scenario():
        lanes = {"A": 1, "B": 3, "C": 1}
        a, b, c = (partial(client, name=f"{lane}/x") for lane in lanes)
        async with cluster(1, 4, lanes=lanes) as scheduler, a(scheduler) as a, b(scheduler) as b, c(scheduler) as c:
            sides = a, b, c
            # tasks of few inputs would be roots to Dask
            inputs = [await side.scatter([f"{lane}{i}" for i in range(10)]) for lane, side in zip("ABC", sides)]
            for lane, side in zip("ABC", sides):
                await side.submit(sleep, 0, 0.005, key=(f"{lane}-short", -1))  # how long these are is known then
            floods = [
                side.map(sleep, range(count), [0.005] * count, given * (count // 10), key=[(f"{lane}-short", i) for i in range(count)])
                for lane, side, given, count in zip("AB", sides, inputs, (800, 2200))
            ]
            (worker,) = scheduler.workers.values()
            most = 0
            while len(LOG) < 700:
                if len(LOG) > 300:  # both lanes have work, and take turns
                    most = max(most, len(worker.processing))
                await asyncio.sleep(0.002)
            # by far longer than was thought, as all are that a stall of this machine meets: A's debt, behind which C does not wait
            await a.submit(sleep, 0, 0.3, inputs[0][0], key=("A-short", -2), priority=1)
            short = c.submit(sleep, 0, 0.005, inputs[2][0], key=("C-short", 0))
            await until(lambda: short.key in scheduler.tasks)
            known = time.time()
            await short
            before = sum(known < begin < begun("C-short") for _, begin, _ in LOG)
            assert before < 32, f"{before} began before it: as many as are sent ahead, and thousands wait"
            assert 5 < most <= 32 + 4, most  # of one that comes anew as many overtake as there are threads
            await have_shares("AB", [25, 75], seconds=1.0)
            await a.cancel(floods[0])
            await b.cancel(floods[1])
            del floods, inputs

    run(scenario)


def test_what_waits_on_a_worker_is_not_charged_as_if_it_ran():
    async def scenario():
        lanes = {"A": 1, "B": 1}
        async with cluster(1, 1, lanes=lanes) as scheduler, client(scheduler, "A/x") as a, client(scheduler, "B/y") as b:
            given = await a.scatter([f"A{i}" for i in range(10)])
            begin = time.monotonic()
            kept = a.map(sleep, range(20), [0.3] * 20, given * 2, key=[("A-task", i) for i in range(20)])  # believed to be short
            await until(lambda: len(next(iter(scheduler.workers.values())).processing) > 2)  # some are sent ahead
            await b.submit(sleep, 0, 0.1, key="B-task")
            await until(lambda: len([name for name, *_ in LOG if name.startswith("A")]) >= 4)
            used, passed = scheduler._clocks["threads"].children["A"].virtual, time.monotonic() - begin
            # one thread cannot be used for longer than the time that has passed; all that were sent ahead would be a multiple of it
            assert 0.3 < used < 1.5 * passed, (used, passed)
            await a.cancel(kept)
            del kept, given

    with dask.config.set({"distributed.scheduler.default-task-durations": {"A-task": "5ms"}}):
        run(scenario)


def block(number: int) -> bytes:
    return b"x" * 1_000_000


def total(blocks: list[bytes]) -> int:
    return sum(map(len, blocks))


def test_a_reduction_above_the_cap_of_its_lane_comes_to_its_end_all_the_same():
    async def scenario():
        async with cluster(1, 2, lanes={"a": 1, "b": 1}, memory_share={"a": 0.001}) as scheduler, client(scheduler, "a/x") as a:
            limit = 0.001 * next(iter(scheduler.workers.values())).memory_limit
            count = int(limit / 1e6) + 20
            blocks = [a.submit(block, i, key=f"block-{i}") for i in range(count)]
            future = a.submit(total, blocks, key="total")
            del blocks
            with pytest.warns(UserWarning, match="has more than its"):
                assert await asyncio.wait_for(future, 120) == count * 1_000_000

    run(scenario)
