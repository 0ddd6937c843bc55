"""Lanes where it is rough: bursts, workers that pause, spill or are stolen from, a scheduler that drains, and what it says of itself."""

from __future__ import annotations

import asyncio
import time

import dask
import numpy as np
import pytest
from _lanes import LOG, client, cluster, have_run, longest, run, slack, sleep, until, until_clean
from distributed import Client, Scheduler, Worker
from distributed.core import Status


async def _roots(c: Client, lane: str, count: int, seconds: float):
    return c.map(sleep, range(count), [seconds] * count, key=lane, pure=False)


async def _in_memory(c: Client, lane: str, count: int, seconds: float):
    inputs = await c.scatter(list(range(count)), hash=False)
    return inputs, c.map(sleep, range(count), [seconds] * count, inputs, key=lane, pure=False)


@pytest.mark.parametrize("flood", [_roots, _in_memory])
def test_a_burst_within_the_share_of_its_lane_waits_for_one_foreign_task_at_most(flood):
    async def scenario():
        async with cluster(2, 4, lanes={"live": 3, "A": 1}) as scheduler, client(scheduler, "live/x") as live, client(scheduler, "A") as a:
            kept = await flood(a, "A", 400, 0.4)
            await have_run("A")  # alone it sends two for each thread
            await asyncio.sleep(0.3)
            waited, first = [], time.time()
            for number in range(5):
                sent = time.time()
                burst = [live.submit(sleep, i, 0.01, key=f"L{number}-{i}", pure=False) for i in range(4)]
                await live.gather(burst)
                waited += [begin - sent for name, begin, _ in LOG if name.startswith(f"L{number}-")]
                await asyncio.sleep(0.27)
            assert len(waited) == 20
            assert max(waited) < longest("A") + slack(first), waited
            del kept

    run(scenario)


def test_users_of_a_lane_go_on_while_others_of_it_come_and_go():
    async def scenario():
        async with cluster(2, 2, lanes={"live": 3, "A": 1}) as scheduler, client(scheduler, "live/first") as first:
            async with client(scheduler, "live/second") as second, client(scheduler, "A") as a:
                kept = [await _roots(a, "A", 300, 0.1), await _roots(first, "1", 300, 0.1)]
                await have_run("A", "1")
                await asyncio.sleep(0.5)
                begin = time.time()
                while time.time() < begin + 3.0:
                    await second.gather([second.submit(sleep, i, 0.1, key=f"2-{time.time()}-{i}", pure=False) for i in range(2)])
                used = {name: sum(b - s for n, s, b in LOG if n[0] == name and s > begin) for name in "12A"}
                total = sum(used.values())
                # of the lane's three quarters the first user has at least its half, whatever the second does
                assert used["1"] / total > 0.3, used
                assert used["A"] / total == pytest.approx(0.25, abs=0.08), used
                del kept

    run(scenario)


def test_what_waits_for_a_worker_that_pauses_runs_on_others_and_it_gets_its_part_again():
    async def scenario():
        async with cluster(2, 1, lanes={"A": 1, "B": 1}) as scheduler, client(scheduler, "A") as a, client(scheduler, "B") as b:
            workers = {ws.name: ws for ws in scheduler.workers.values()}
            inputs = await a.scatter(list(range(40)), hash=False, workers=["w0"])
            futures = [a.map(sleep, range(40), [0.03] * 40, inputs, key="A", pure=False), await _roots(b, "B", 40, 0.03)]
            await have_run("A", "B")
            paused = workers["w0"]
            scheduler.handle_worker_status_change("paused", paused.address, "test-pause")
            await until(lambda: not paused.processing)
            assert paused not in scheduler.running
            done = len(LOG)
            await until(lambda: len(LOG) > done)  # the other worker goes on
            assert not paused.processing
            scheduler.handle_worker_status_change("running", paused.address, "test-resume")
            for who, some in zip((a, b), futures):
                await who.gather(some)
            del inputs, futures, some
            await until_clean(scheduler)

    run(scenario)


def test_stolen_tasks_are_charged_once_and_to_their_own_lane():
    async def scenario():
        with dask.config.set({"distributed.scheduler.work-stealing-interval": "50ms"}):
            async with cluster(1, 4, lanes={"A": 1, "B": 1}) as scheduler, client(scheduler, "A") as a, client(scheduler, "B") as b:
                big = await a.scatter(np.zeros(10), workers=["w0"])
                futures = [a.map(sleep, range(60), [0.1] * 60, [big] * 60, key="A", pure=False), await _roots(b, "B", 30, 0.1)]
                await asyncio.sleep(0.3)
                async with Worker(scheduler.address, nthreads=4, name="late", host="127.0.0.1", dashboard=False):
                    await a.gather(futures[0])
                    await b.gather(futures[1])
                    kids = scheduler._clocks["threads"].children
                    ran = {lane: sum(stop - start for name, start, stop in LOG if name[0] == lane) for lane in "AB"}
                    assert kids["B"].settled == pytest.approx(ran["B"], rel=0.15)
                    # what A had on workers before B came is nobody's debt
                    assert ran["A"] - 8 * longest("A") <= kids["A"].settled <= ran["A"] * 1.15
                    assert any(name[0] == "A" for name, *_ in LOG)
                    del big, futures
                await until_clean(scheduler)

    run(scenario)


def test_results_that_were_spilled_are_inputs_like_others(tmp_path):
    async def scenario():
        async with cluster(0, 1, lanes={"A": 1, "B": 1}) as scheduler, client(scheduler, "A") as a, client(scheduler, "B") as b:
            settings = {
                "distributed.worker.memory.spill": 0.2,
                "distributed.worker.memory.target": 0.1,
                "temporary-directory": str(tmp_path),
            }
            with dask.config.set(settings):
                worker = await Worker(scheduler.address, nthreads=1, name="small", host="127.0.0.1", dashboard=False, memory_limit="200 MB")
            try:
                blocks = a.map(lambda i: np.full(1_000_000, i, np.float64), range(20), key="block", pure=False)
                await a.gather(a.map(len, blocks))
                assert worker.data.slow, "nothing was spilled"
                flood = await _roots(b, "B", 60, 0.01)
                sums = a.map(np.sum, blocks, key="A", pure=False)
                assert await a.gather(sums) == [i * 1e6 for i in range(20)]
                await b.gather(flood)
                del blocks, sums, flood
                await until_clean(scheduler)
            finally:
                await worker.close(nanny=False)

    run(scenario)


@pytest.mark.parametrize("flood", [_roots, _in_memory])
@pytest.mark.parametrize("others", [False, True])
def test_a_scheduler_that_drains_sends_nothing_more_and_can_be_told_to_go_on(flood, others):
    async def scenario():
        async with cluster(2, 2, lanes={"A": 1, "B": 1}) as scheduler, client(scheduler, "A") as a, client(scheduler, "B") as b:
            kept = [await flood(a, "A", 60, 0.05)]
            if others:
                kept.append(await flood(b, "B", 60, 0.05))
            await have_run("A")
            scheduler.drain()
            await until(lambda: not any(ws.processing for ws in scheduler.workers.values()))
            done = len(LOG)
            assert 0 < done < 60
            late = a.submit(sleep, 1, 0.0, key="late", pure=False)
            await asyncio.sleep(0.6)  # longer than a tick
            assert len(LOG) == done
            assert scheduler.lanes_now()["A"]["waiting"] > 0
            scheduler.resume_dispatch()
            assert await late == 1
            for who, some in zip((a, b), kept):
                await who.gather(some)
            del kept, late, some
            await until_clean(scheduler)

    run(scenario)


def test_the_scheduler_says_what_waits_and_what_runs_in_which_lane():
    async def scenario():
        lanes = {"A": 3, "B": 1}
        async with cluster(1, 2, {"GPU": 1}, lanes=lanes) as scheduler, client(scheduler, "A/x") as a, client(scheduler, "B/y") as b:
            kept = [await a.gather(a.map(sleep, range(4), [0.2] * 4, pure=False))]
            kept.append(a.map(sleep, range(50), [0.2] * 50, key="sleep", pure=False))
            kept.append(b.map(sleep, range(30), [0.2] * 30, pure=False, resources={"GPU": 1}))
            await until(lambda: len(scheduler.queued) > 60)
            now = scheduler.lanes_now()
            assert {lane: entry["weight"] for lane, entry in now.items()} == {"A": 3, "B": 1}
            assert {lane: entry["clients"] for lane, entry in now.items()} == {"A": 1, "B": 1}
            assert now["A"]["waiting"] == len([ts for ts in scheduler._held if not ts.resource_restrictions])
            assert now["A"]["running"] + now["B"]["running"] == sum(len(ws.processing) for ws in scheduler.workers.values())
            work = {(entry["lane"], tuple(entry["resources"].items())): entry for entry in scheduler.waiting_work()}
            assert set(work) == {("A", ()), ("B", (("GPU", 1),))}
            assert work["A", ()]["tasks"] == now["A"]["waiting"]
            a_task_seconds = scheduler.task_prefixes["sleep"].duration_average  # on a busy machine a sleep of 0.2 s is longer
            assert a_task_seconds >= 0.2
            assert work["A", ()]["seconds"] == pytest.approx(a_task_seconds * now["A"]["waiting"])
            assert work["B", (("GPU", 1),)]["tasks"] == now["B"]["waiting"] >= 20
            del kept
        assert Status.closed == scheduler.status

    run(scenario)


def test_who_submits_what_another_has_submitted_before_does_not_take_over_who_pays():
    async def scenario():
        async with cluster(1, 1, lanes={"A": 1, "B": 1}) as scheduler, client(scheduler, "A/anna") as a, client(scheduler, "B/ben") as b:
            mine = a.map(sleep, range(4), [0.2] * 4, key=[f"k{i}" for i in range(4)])
            await until(lambda: len(scheduler.tasks) == 4)
            same = b.map(sleep, range(4), [0.2] * 4, key=[f"k{i}" for i in range(4)])
            await until(lambda: len(scheduler.clients[b.id].wants_what) == 4)
            assert {scheduler.owner_of(f"k{i}").path for i in range(4)} == {("A", "anna", "")}
            assert await b.gather(same) == await a.gather(mine) == list(range(4))

    run(scenario)


def test_tasks_whose_inputs_lie_on_a_paused_worker_run_elsewhere_however_large_they_are():
    async def scenario():
        async with cluster(2, 1, lanes={"A": 1, "B": 1}) as scheduler, client(scheduler, "A") as a, client(scheduler, "B") as b:
            (big,) = await a.scatter([1], workers=["w0"], hash=False)
            scheduler.tasks[big.key].set_nbytes(20_000_000_000)
            paused = next(ws for ws in scheduler.workers.values() if ws.name == "w0")
            kept = [a.map(sleep, range(4), [0.05] * 4, [big] * 4, key="A", pure=False), await _roots(b, "B", 40, 0.05)]
            scheduler.handle_worker_status_change("paused", paused.address, "test-pause")
            assert sorted(await asyncio.wait_for(a.gather(kept[0]), 120)) == list(range(4))
            del kept

    run(scenario)


@pytest.mark.parametrize("says_so", [True, False])
@pytest.mark.parametrize("strictly", [True, False])
def test_tasks_that_wait_for_a_worker_that_goes_run_elsewhere_only_if_they_may(strictly, says_so):
    async def scenario():
        async with cluster(1, 1, lanes={"A": 1, "B": 1}) as scheduler, client(scheduler, "A") as a, client(scheduler, "B") as b:
            bound = await Worker(scheduler.address, nthreads=1, name="bound", host="127.0.0.1", dashboard=False)
            port = int(bound.address.rsplit(":", 1)[1])
            names = [f"A{i}" for i in range(12)]
            kept = [a.map(sleep, range(12), [0.1] * 12, key=names, workers=[bound.address], allow_other_workers=not strictly)]
            kept.append(await _roots(b, "B", 40, 0.02))
            await until(lambda: len([ts for ts in scheduler.queued if ts.worker_restrictions]) >= 8)
            if says_so:
                await bound.close(nanny=False)
            else:
                await scheduler.remove_worker(bound.address, stimulus_id="test")
                assert not scheduler._held.restricted()
                await bound.finished()
            lost = time.time()
            await b.gather(kept[1])
            if strictly:
                await asyncio.sleep(0.5)
                assert not [name for name, begin, _ in LOG if name[0] == "A" and begin > lost]
                assert all(future.status == "pending" for future in kept[0] if scheduler.tasks[future.key].state != "memory")
                assert len(scheduler.unrunnable) >= 8
                again = await Worker(scheduler.address, nthreads=1, port=port, name="again", host="127.0.0.1", dashboard=False)
                assert again.address == bound.address
                assert await asyncio.wait_for(a.gather(kept[0]), 120) == list(range(12))
                await again.close(nanny=False)
            else:
                assert await asyncio.wait_for(a.gather(kept[0]), 120) == list(range(12))
            del kept
            await until_clean(scheduler)

    run(scenario)


def test_tasks_bound_to_workers_are_not_sorted_in_again_when_other_workers_come():
    async def scenario():
        async with cluster(1, 1, lanes={"A": 1}) as scheduler, client(scheduler, "A") as a:
            kept = a.map(sleep, range(50), [0.2] * 50, key="A", pure=False, workers=["w0"])
            await until(lambda: len(scheduler.queued) >= 40)
            leaf = scheduler.owner("A").threads
            before = sum(map(len, leaf.heaps.values()))
            for _ in range(20):
                scheduler.workers_changed()
            assert sum(map(len, leaf.heaps.values())) <= before
            del kept

    run(scenario)


def test_work_that_a_client_announces_is_known_until_it_leaves():
    async def scenario():
        async with cluster(1, 2, lanes={"A": 1, "live": 3}) as scheduler:
            async with client(scheduler, "live/anna") as live:
                await live.gather(live.map(sleep, range(4), [0.1] * 4, key=[f"item-{i}" for i in range(4)]))
                await live.scheduler.announce_work(client=live.id, prefix="item", tasks=500)
                (entry,) = scheduler.announced_work()
                assert (entry["lane"], entry["resources"], entry["tasks"]) == ("live", {}, 500)
                assert entry["seconds"] == pytest.approx(50, rel=0.3)
                await live.scheduler.announce_work(client=live.id, prefix="item", tasks=0)
                assert scheduler.announced_work() == []
                await live.scheduler.announce_work(client=live.id, prefix="item", tasks=7)
            assert scheduler.announced_work() == []
            assert scheduler._announced == {}

    run(scenario)


def test_nothing_of_ours_stays_to_hear_of_every_transition():
    async def scenario():
        async with Scheduler(dashboard=False, host="127.0.0.1", port=0) as plain:
            usual = {name.partition("-")[0] for name in plain.plugins}
        async with cluster(1, 1, lanes={"A": 1, "B": 1}) as scheduler, client(scheduler, "A") as a, client(scheduler, "B") as b:
            assert await asyncio.gather(a.submit(sleep, 1, 0.01, pure=False), b.submit(sleep, 2, 0.01, pure=False)) == [1, 2]
            assert {name.partition("-")[0] for name in scheduler.plugins} - usual == {"_Recorder"}

    run(scenario)
