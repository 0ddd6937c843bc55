"""Lanes on a real scheduler with real workers in this process: who pays, who goes next, and that nothing is ever left behind."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import dask
import dask.array as da
import pytest
from _lanes import GATE, LOG, client, cluster, have_run, have_shares, held, is_clean, longest, run, slack, sleep, until, until_clean
from distributed import Client, Reschedule, SpecCluster, Worker, get_client, get_worker

from cryodask.cluster.fairshare import FairShareScheduler
from cryodask.cluster.local import LaneCluster


# --- shares ------------------------------------------------------------------------------------------------------------------------
async def _roots(c: Client, lane: str, seconds: float = 0.2):
    return c.map(sleep, range(800), [seconds] * 800, key=lane, pure=False)


async def _in_memory(c: Client, lane: str, seconds: float = 0.2):
    inputs = await c.scatter(list(range(800)), hash=False)
    return [inputs, c.map(sleep, range(800), [seconds] * 800, inputs, key=lane, pure=False)]


async def _with_resources(c: Client, lane: str):
    return c.map(sleep, range(800), [0.2] * 800, key=lane, pure=False, resources={"GPU": 1})


async def _restricted(c: Client, lane: str):
    return c.map(sleep, range(800), [0.2] * 800, key=lane, pure=False, workers=["w0", "w1"])


@pytest.mark.parametrize("flood", [_roots, _in_memory, _with_resources, _restricted])
@pytest.mark.parametrize("weights", [(1, 1), (1, 3)])
def test_a_lane_that_comes_later_gets_its_share(flood, weights):
    async def scenario():
        lanes = dict(zip("AB", weights))
        async with cluster(2, 8, {"GPU": 8}, lanes=lanes) as scheduler, client(scheduler, "A/x") as a, client(scheduler, "B/y") as b:
            kept = [await flood(a, "A")]
            await asyncio.sleep(0.5)
            kept.append(await flood(b, "B"))
            await have_shares("AB", [100 * w / sum(weights) for w in weights])
            del kept

    run(scenario)


def test_users_and_projects_share_inside_their_lane():
    async def scenario():
        lanes = {"A": {"weight": 1, "users": {"anna": 2}}, "B": 1}
        async with cluster(2, 8, lanes=lanes) as scheduler, client(scheduler, "A/anna") as anna, client(scheduler, "A/ben/p") as ben:
            async with client(scheduler, "B") as b:
                kept = [await _roots(anna, "1"), await _roots(ben, "2"), await _roots(b, "3")]
                await have_shares("123", [100 / 3, 100 / 6, 50], 4.0)
                del kept

    run(scenario)


def test_short_tasks_are_not_worth_more_than_long_ones():
    async def scenario():
        async with cluster(2, 4, lanes={"A": 1, "B": 1}) as scheduler, client(scheduler, "A") as a, client(scheduler, "B") as b:
            kept = [a.map(sleep, range(500), [0.2] * 500, key="A", pure=False)]
            kept.append(b.map(sleep, range(4000), [0.025] * 4000, key="B", pure=False))
            await have_shares("AB", [50, 50], 5.0, within=6)
            del kept

    run(scenario)


# --- latency -----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("flood", [_roots, _in_memory])
def test_a_single_task_of_a_quiet_lane_waits_for_one_foreign_task_at_most(flood):
    async def scenario():
        async with cluster(2, 1, lanes={"live": 3, "A": 1}) as scheduler, client(scheduler, "live/x") as live, client(scheduler, "A") as a:
            kept = await flood(a, "A", 0.4)
            await have_run("A")
            await asyncio.sleep(0.6)
            waited, first = [], time.time()
            for number in range(8):
                sent = time.time()
                await live.submit(sleep, number, 0.01, key=f"L{number}", pure=False)
                waited.append(next(begin for name, begin, _ in LOG if name == f"L{number}") - sent)
                await asyncio.sleep(0.33)
            assert max(waited) < longest("A") + slack(first), waited  # one foreign task
            del kept

    run(scenario)


def test_a_reserved_thread_is_free_for_its_lane_at_once():
    async def scenario():
        async with cluster(2, 2, lanes={"live": 1, "A": 1}, reserve={"live": 1}) as scheduler:
            async with client(scheduler, "A") as a, client(scheduler, "live") as live:
                kept = a.map(held, range(100), key="A", pure=False)
                await until(lambda: sum(len(ws.processing) for ws in scheduler.workers.values()) >= 3)
                await asyncio.sleep(0.3)
                assert sum(len(ws.processing) for ws in scheduler.workers.values() if len(ws.processing) < ws.nthreads) == 1
                await live.submit(sleep, 1, 0.01, key="L", pure=False)
                assert not GATE.is_set(), "it has waited for no other task, for none has ended"
                del kept

    run(scenario)


def test_a_strict_lane_goes_before_all_others():
    async def scenario():
        async with cluster(1, 1, lanes={"live": 1, "A": 9}, strict=["live"]) as scheduler:
            async with client(scheduler, "A") as a, client(scheduler, "live") as live:
                kept = a.map(sleep, range(50), [0.05] * 50, key="A", pure=False)
                await have_run("A")
                await live.gather(live.map(sleep, range(10), [0.05] * 10, key="L", pure=False))
                order = [name[0] for name, _, _ in sorted(LOG, key=lambda entry: entry[1])]
                first = order.index("L")
                assert order[first : first + 11].count("A") <= 1, order
                del kept

    run(scenario)


# --- who pays ------------------------------------------------------------------------------------------------------------------------
def test_the_lane_comes_from_the_name_the_annotation_or_the_default():
    async def scenario():
        async with cluster(lanes={"live": 3, "hpda": 1}, default_lane="hpda") as scheduler:
            async with client(scheduler, "live/anna/p1") as c, client(scheduler, "nobody") as other:
                with dask.annotate(lane="hpda"):
                    annotated = c.submit(sleep, 1, 0.5, key="annotated", pure=False)
                    invented = other.submit(sleep, 1, 0.5, key="other", pure=False)
                with dask.annotate(lane="invented"):
                    unknown = c.submit(sleep, 1, 0.5, key="unknown", pure=False)
                named = c.submit(sleep, 1, 0.5, key="named", pure=False)
                await until(lambda: len(scheduler.tasks) == 4)
                paths = {key: scheduler.owner_of(key).path for key in ("annotated", "other", "unknown", "named")}
                assert paths["named"] == ("live", "anna", "p1")
                assert paths["annotated"] == ("hpda", "anna", "p1")
                assert paths["unknown"] == ("hpda", "anna", "p1"), "an invented lane is the default one"
                assert paths["other"] == ("hpda", "nobody", "")
                await asyncio.gather(annotated, invented, unknown, named)

    run(scenario)


def test_an_annotation_holds_around_compute_and_is_lost_where_a_graph_is_built():
    async def scenario():
        async with cluster(lanes={"live": 1, "hpda": 1}, default_lane="hpda") as scheduler, client(scheduler, "hpda") as c:

            def lanes() -> set[str]:
                return {scheduler.owner_of(key).lane for key in scheduler.tasks}

            def block(x):
                time.sleep(0.3)
                return x

            with dask.annotate(lane="live"):
                built = da.ones((4, 4), chunks=2).map_blocks(block)
            future = c.compute(built.sum())
            await until(lanes)
            assert lanes() == {"hpda"}, "Dask forgets annotations of graphs of arrays"
            await future
            del future
            await until_clean(scheduler)
            with dask.annotate(lane="live"):
                future = c.compute(da.ones((4, 4), chunks=2).map_blocks(block).sum())
            await until(lanes)
            assert lanes() == {"live"}
            await future

    run(scenario)


def test_tasks_submitted_by_tasks_stay_in_their_lane():
    def parent() -> list[int]:
        with get_client() as inner:
            return inner.gather(inner.map(sleep, range(4), [0.1] * 4, key="child", pure=False))

    async def scenario():
        async with cluster(2, 2, lanes={"live": 1, "hpda": 1}) as scheduler, client(scheduler, "live/anna") as c:
            future = c.submit(parent, key="parent", pure=False)
            seen = set()
            while not future.done():
                seen |= {scheduler.owner_of(key).path for key in scheduler.tasks if "child" in str(key)}
                await asyncio.sleep(0.02)
            assert await future == [0, 1, 2, 3]
            assert seen == {("live", "anna", "")}

    run(scenario)


# --- nothing is left behind ------------------------------------------------------------------------------------------------------------
class Counter:
    def __init__(self) -> None:
        self.n = 0

    def add(self) -> int:
        self.n += 1
        return self.n


def sometimes(number: int) -> int:
    worker = get_worker()
    if worker.name == "w0" and number % 2:
        raise Reschedule
    return number


def test_actors_shuffles_nested_rescheduled_late_and_cancelled_tasks_end_and_leave_nothing():
    async def scenario():
        import pandas as pd
        from dask import dataframe as dd

        async with cluster(2, 2, {"GPU": 1}, lanes={"A": 1, "B": 2}) as scheduler, client(scheduler, "A") as a, client(scheduler, "B") as b:
            flood = a.map(sleep, range(400), [0.01] * 400, key="A", pure=False)
            actor = b.submit(Counter, actor=True, key="actor")
            await until(lambda: "actor" in scheduler.tasks and scheduler.tasks["actor"].state == "memory")  # it comes past the flood
            assert scheduler.tasks["actor"].actor
            frame = dd.from_pandas(pd.DataFrame({"k": [i % 7 for i in range(200)], "v": 1.0}), npartitions=8)
            shuffled = b.compute(frame.shuffle("k").groupby("k").v.sum())
            moved = b.map(sometimes, range(20), pure=False, key="moved")
            gate = b.submit(sleep, 0, 0.5, key="gate", pure=False)
            late = b.map(sleep, range(100), [0.01] * 100, [gate] * 100, key="late", pure=False)
            with_gpu = b.map(sleep, range(10), [0.01] * 10, key="gpu", pure=False, resources={"GPU": 1})
            dropped = b.map(sleep, range(200), [0.05] * 200, key="dropped", pure=False)
            array = b.compute(da.random.random((400, 400), chunks=50).rechunk((400, 10)).sum())
            await asyncio.sleep(0.2)
            await b.cancel(dropped)
            assert (await shuffled).sum() == 200.0
            assert await b.gather(moved) == list(range(20))
            assert await b.gather(late) == list(range(100))
            assert await b.gather(with_gpu) == list(range(10))
            assert 79_000 < float(await array) < 81_000
            assert await a.gather(flood) == list(range(400))
            del flood, actor, shuffled, moved, gate, late, with_gpu, dropped, array
            await until_clean(scheduler)

    run(scenario)


def test_a_worker_that_is_lost_with_held_and_running_tasks_costs_nothing_but_time():
    async def scenario():
        async with cluster(1, 2, lanes={"A": 1, "B": 1}) as scheduler, client(scheduler, "A") as a, client(scheduler, "B") as b:
            doomed = await Worker(scheduler.address, nthreads=2, host="127.0.0.1", dashboard=False, name="doomed")
            inputs = await a.scatter(list(range(60)), hash=False, workers=["w0"])
            futures = a.map(sleep, range(60), [0.05] * 60, inputs, key="A", pure=False)
            only_there = b.map(sleep, range(30), [0.05] * 30, key="B", pure=False, workers=["doomed"], allow_other_workers=True)

            def places() -> set[str]:
                return {ts.processing_on.name for ts in scheduler.tasks.values() if ts.key.startswith("B") and ts.processing_on}

            await until(places)
            assert places() == {"doomed"}
            await doomed.close(nanny=False)
            assert await b.gather(only_there) == list(range(30))
            assert await a.gather(futures) == list(range(60))
            del inputs, futures, only_there
            await until_clean(scheduler)

    run(scenario)


def test_tasks_that_prefer_a_worker_wait_for_it_while_it_lives():
    async def scenario():
        async with cluster(2, 1, lanes={"A": 1, "B": 1}) as scheduler, client(scheduler, "A") as a, client(scheduler, "B") as b:
            kept = a.map(sleep, range(40), [0.02] * 40, key="A", pure=False)
            futures = b.map(
                lambda i: (time.sleep(0.02), get_worker().name)[1], range(20), key="B", workers=["w1"], allow_other_workers=True
            )
            assert set(await b.gather(futures)) == {"w1"}
            del kept

    run(scenario)


def test_no_gpu_is_given_away_twice():
    async def scenario():
        async with cluster(2, 8, {"GPU": 2}, lanes={"A": 1, "B": 1}) as scheduler, client(scheduler, "A") as a, client(scheduler, "B") as b:
            kept = [await _with_resources(a, "A"), await _with_resources(b, "B")]
            for _ in range(20):
                await asyncio.sleep(0.05)
                assert all(sum(bool(ts.resource_restrictions) for ts in ws.processing) <= 2 for ws in scheduler.workers.values())
            del kept

    run(scenario)


def test_an_owner_alone_writes_nothing_down_and_sends_two_a_thread_at_most():
    async def scenario():
        async with cluster(2, 2, lanes={"A": 1, "B": 1}) as scheduler, client(scheduler, "A") as a:
            kept = await _in_memory(a, "A")
            for _ in range(10):
                await asyncio.sleep(0.05)
                assert all(len(ws.processing) <= 2 * ws.nthreads for ws in scheduler.workers.values())
            assert scheduler._others == {}
            assert scheduler._flights == {}
            del kept

    run(scenario)


def test_seceded_tasks_free_their_lane():
    def leave() -> int:
        from distributed import secede

        secede()
        return held(1)

    async def scenario():
        async with cluster(1, 1, lanes={"A": 1, "B": 1}) as scheduler, client(scheduler, "A") as a, client(scheduler, "B") as b:
            kept = b.map(sleep, range(100), [0.02] * 100, key="B", pure=False)
            future = a.submit(leave, key="A", pure=False)
            await until(lambda: next(iter(scheduler.workers.values())).long_running)
            assert scheduler.tasks["A"].state == "processing"
            assert "A" not in scheduler._flights
            GATE.set()
            assert await future == 1
            del kept

    run(scenario)


def test_as_scheduler_class_of_a_cluster():
    with (
        SpecCluster(
            scheduler={"cls": FairShareScheduler, "options": {"lanes": {"live": 1, "hpda": 1}, "dashboard_address": "127.0.0.1:0"}},
            workers={i: {"cls": Worker, "options": {"nthreads": 1, "dashboard_address": "127.0.0.1:0"}} for i in range(2)},
        ) as made,
        Client(made, name="live/x") as c,
    ):
        assert isinstance(made.scheduler, FairShareScheduler)
        kept = c.map(sleep, range(50), [0.05] * 50, pure=False)
        assert c.gather(c.map(lambda x: x + 1, range(20))) == list(range(1, 21))
        del kept


def test_a_restart_in_the_middle_of_a_contest_leaves_nothing_behind():
    with (
        dask.config.set({"distributed.deploy.lost-worker-timeout": "1h"}),  # else a slow start closes the nanny for good
        LaneCluster(n_workers=1, threads_per_worker=2, lanes={"A": 1, "B": 1}, dashboard_address=None) as made,
        Client(made, name="A/x") as a,
        Client(made, name="B/x", set_as_default=False) as b,
    ):
        scheduler = made.scheduler
        lost = [c.map(sleep, range(200), [0.1] * 200, pure=False) for c in (a, b)]
        lost.append([a.submit(sleep, 0, 0, pure=False, workers=["nowhere"], key="bound")])
        while not (scheduler._flights and len(scheduler.queued) > 300):
            time.sleep(0.02)
        a.restart()
        left = scheduler.tasks, scheduler.queued, scheduler.unrunnable, scheduler._flights, scheduler._others
        assert list(map(len, left)) == [0] * 5
        assert all(future.cancelled() for futures in lost for future in futures)
        assert [c.submit(sleep, i, 0.01, pure=False).result(120) for i, c in enumerate((a, b))] == [0, 1]
        while scheduler.tasks:
            time.sleep(0.02)
        is_clean(scheduler)


def test_owners_without_tasks_are_forgotten_and_their_lanes_keep_what_they_used():
    async def scenario():
        async with cluster(1, 2, lanes={"A": 1, "B": 1}) as scheduler, client(scheduler, "B/stays") as b:
            kept = b.map(sleep, range(20), [0.05] * 20, pure=False)
            for number in range(5):
                async with client(scheduler, f"A/visitor{number}") as a:
                    await a.submit(sleep, 1, 0.02, pure=False)
            await until(lambda: not any("visitor" in name for name in scheduler.clients))
            used = scheduler._clocks["threads"].children["A"].settled
            assert used > 0
            scheduler.prune()
            assert {path[:2] for path in scheduler._owners} == {("B", "stays")}
            assert scheduler._clocks["threads"].children["A"].children == {}
            assert scheduler._clocks["threads"].children["A"].settled == used
            assert await b.gather(kept) == list(range(20))
            async with client(scheduler, "A/visitor0") as a:
                assert await a.submit(sleep, 7, 0.0, pure=False) == 7
            del kept

    run(scenario)


def test_lanes_that_do_not_exist_cannot_be_strict_or_reserved():
    async def scenario():
        with pytest.raises(ValueError, match="not in lanes"):
            await FairShareScheduler(dashboard=False, port=0, lanes={"a": 1}, strict=["b"])

    run(scenario)


def test_the_lines_of_the_readme_run(tmp_path):
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    (code,) = [c for c in re.findall(r"```python\n(.*?)```", readme, re.S) if "LaneCluster" in c]
    (tmp_path / "lanes.py").write_text(code)
    shown = subprocess.run([sys.executable, "-W", "ignore", "lanes.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert shown.stdout.strip() == "6", shown.stderr[-2000:]


def test_a_plain_dask_scheduler_takes_lanes_as_a_preload(tmp_path):
    (tmp_path / "lanes.yaml").write_text("cryodask: {fairshare: {lanes: {live: 3, hpda: 1}}}")
    file = tmp_path / "scheduler.json"
    pages = ["--dashboard-address", "127.0.0.1:0", "--no-dashboard"]
    words = ["scheduler", "--host", "127.0.0.1", "--port", "0", *pages, "--scheduler-file", str(file)]
    command = [sys.executable, "-m", "dask", *words, "--preload", "cryodask.cluster.fairshare"]
    process = subprocess.Popen(command, env={**os.environ, "DASK_CONFIG": str(tmp_path)}, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not file.exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)

        async def scenario():
            address = json.loads(file.read_text())["address"]
            async with Worker(address, nthreads=2, host="127.0.0.1", dashboard=False):
                async with Client(address, asynchronous=True, name="live/x") as a, Client(address, asynchronous=True, name="hpda/y") as b:
                    kept = b.map(time.sleep, [0.02] * 200, pure=False)
                    assert await a.gather(a.map(abs, range(5), pure=False)) == list(range(5))
                    assert (await a.scheduler.identity())["type"] == "FairShareScheduler"
                    del kept

        run(scenario)
    finally:
        process.terminate()
        process.wait(120)
