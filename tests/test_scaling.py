"""How many jobs pools should have: a function of the work; and pools on a real Slurm that follow it."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import time
from collections import deque
from itertools import pairwise

import numpy as np
import psutil
import pytest
from _lanes import client as lane_client
from _lanes import cluster as lane_cluster
from _lanes import held, sleep
from _secure import authority, guarded, person
from distributed import Client
from hypothesis import given
from hypothesis import strategies as st

from cryodask.cluster.settings import parse_settings
from cryodask.cluster.slurm.pools import PoolCluster, open_pools
from cryodask.cluster.slurm.scaling import PoolShape, Recent, Work, jobs_wanted, work_of
from cryodask.errors import ClusterError

GIB = 2**30
CPU = PoolShape(0, 16, threads=16, workers=4, resources={"pool-cpu": 1e9}, memory=64 * GIB)
GPU = PoolShape(0, 4, threads=16, workers=4, resources={"GPU": 1.0, "pool-gpu": 1e9}, gpus=4, memory=128 * GIB)
HIGHMEM = PoolShape(0, 2, threads=32, resources={"pool-highmem": 1e9}, memory=1024 * GIB)
POOLS = {"gpu": GPU, "highmem": HIGHMEM, "cpu": CPU}
GPU_TASK, PINNED = (("GPU", 1.0),), (("pool-highmem", 1.0),)


def wanted(work, pools=POOLS, seconds=600, floor=0):
    return jobs_wanted(pools, work, seconds=seconds, floor=floor)


def wait(condition, what, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.05)


# --- the function ----------------------------------------------------------------------------------------------------------------
def test_jobs_are_those_that_do_the_work_in_time():
    # 32,000 s in 600 s are 53.3 threads, 3.3 jobs of 16
    assert wanted({(): Work(1000, 32_000.0)}) == {"cpu": 4, "highmem": 0, "gpu": 0}
    assert wanted({}) == {"cpu": 0, "highmem": 0, "gpu": 0}
    assert wanted({(): Work(1, 0.1)})["cpu"] == 1


def test_three_tasks_of_an_hour_want_three_threads_and_not_eighteen():
    assert wanted({(): Work(3, 3 * 3600.0)})["cpu"] == 1
    assert wanted({(): Work(17, 17 * 3600.0)})["cpu"] == 2


def test_tasks_that_wait_behind_hours_of_work_get_threads_of_their_own():
    busy = {"cpu": 16.0}
    assert wanted({(): Work(3, 3.0, busy, 16 * 3600.0)})["cpu"] == 2
    assert wanted({(): Work(3, 3.0, busy, 16 * 1.0)})["cpu"] == 1  # these are done in a moment


def test_gpu_tasks_go_to_pools_with_gpus_and_pinned_ones_to_their_pool():
    work = {GPU_TASK: Work(10, 10 * 3600.0), PINNED: Work(40, 40 * 3600.0), (): Work(20, 20 * 3600.0)}
    assert wanted(work) == {"gpu": 3, "highmem": 2, "cpu": 2}
    assert wanted({(("FPGA", 1.0),): Work(5, 5000.0)}) == {"gpu": 0, "highmem": 0, "cpu": 0}


def test_the_rest_goes_to_the_cheapest_pool_and_over_to_the_next():
    most = Work(10_000, 10_000 * 3600.0)
    assert wanted({(): most}) == {"cpu": 16, "highmem": 2, "gpu": 4}
    closed = {**POOLS, "cpu": PoolShape(1, 1, threads=16, memory=64 * GIB)}
    assert wanted({(): Work(40, 40 * 3600.0)}, closed) == {"cpu": 1, "highmem": 1, "gpu": 0}


def test_a_floor_is_there_without_any_work():
    assert wanted({}, floor=8) == {"cpu": 1, "highmem": 0, "gpu": 0}
    assert wanted({}, floor=260) == {"cpu": 16, "highmem": 1, "gpu": 0}
    assert wanted({(): Work(100, 36_000.0)}, floor=8)["cpu"] == 4


amounts = st.floats(0, 1e5)
works = st.builds(
    lambda tasks, each, running, each_running: Work(tasks, tasks * each, running, sum(running.values()) * each_running),
    st.integers(0, 5000),
    st.floats(0.01, 5000),
    st.dictionaries(st.sampled_from([*"abcd", "local"]), st.integers(0, 300).map(float), max_size=3),
    st.floats(0.01, 5000),
)
kinds = st.sampled_from([(), GPU_TASK, PINNED, (("FPGA", 1.0),), (("pool-cpu", 1.0),), (("GPU", 0.5),)])
loads = st.dictionaries(kinds, works, max_size=5)


@st.composite
def shapes(draw):
    minimum = draw(st.integers(0, 5))
    workers = draw(st.integers(1, 4))
    return PoolShape(
        minimum,
        minimum + draw(st.integers(0, 20)),
        threads=workers * draw(st.integers(1, 8)),
        workers=workers,
        resources=draw(st.sampled_from([CPU, GPU, HIGHMEM])).resources,
        gpus=draw(st.integers(0, 2)),
        memory=draw(st.integers(1, 100)) * GIB,
    )


pools = st.dictionaries(st.sampled_from("abcd"), shapes(), min_size=1)


@given(pools, loads, st.integers(0, 500), st.floats(1, 3600))
def test_always_between_minimum_and_maximum_and_above_the_floor_if_it_can_be(pools, load, floor, seconds):
    jobs = jobs_wanted(pools, load, seconds=seconds, floor=floor)
    assert set(jobs) == set(pools)
    for name, shape in pools.items():
        assert shape.minimum <= jobs[name] <= shape.maximum
    threads = sum(jobs[name] * shape.threads for name, shape in pools.items())
    assert threads >= min(floor, sum(shape.maximum * shape.threads for shape in pools.values()))


@given(pools, loads, kinds, st.integers(0, 1000), st.floats(0, 1e6), st.integers(0, 100))
def test_more_work_never_means_fewer_jobs_of_any_pool(pools, load, kind, tasks, seconds, floor):
    before = jobs_wanted(pools, load, seconds=600, floor=floor)
    old = load.get(kind, Work())
    more = {**load, kind: Work(old.waiting + tasks, old.waiting_seconds + seconds, old.running, old.running_seconds)}
    after = jobs_wanted(pools, more, seconds=600, floor=floor)
    assert all(after[name] >= before[name] for name in pools)


@given(pools, loads)
def test_tasks_that_wait_get_a_job_wherever_one_can_run_them(pools, load):
    jobs = jobs_wanted(pools, load, seconds=600)
    for needs, kind in load.items():
        able = [name for name, shape in pools.items() if shape.slots(needs) and shape.maximum]
        # behind others of their kind they have workers already, ours or not
        if able and kind.waiting and not any(kind.running.values()):
            assert any(jobs[name] for name in able)


# --- the work of a scheduler -----------------------------------------------------------------------------------------------------
async def until(condition, what):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within 120 s"
        await asyncio.sleep(0.02)


def test_tasks_that_no_new_job_could_run_are_no_reason_for_one():
    async def scenario():
        async with lane_cluster(2, 1, lanes={"A": 1}) as scheduler, lane_client(scheduler, "A/x") as a:
            here = next(iter(scheduler.workers))
            kept = [a.map(held, range(40), key="bound", workers=[here], pure=False)]
            kept.append(a.submit(sleep, 0, key="nowhere", workers=["tcp://127.0.0.1:1"]))
            await until(lambda: len(scheduler.unrunnable) == 1 and len(scheduler.queued) > 30, "tasks that wait")
            work = work_of(scheduler)[()]
            assert (work.waiting, work.waiting_seconds) == (0, 0)
            assert sum(work.running.values()) == 1
            kept.append(a.submit(sleep, 0, key="gpu", resources={"GPU": 1}))
            kept.append(a.map(held, range(30), key="loose", workers=[here], allow_other_workers=True, pure=False))
            await until(lambda: len(scheduler.unrunnable) == 2 and len(scheduler.queued) > 60, "more of them")
            work = work_of(scheduler)
            assert 25 <= work[()].waiting <= 30
            assert (work[GPU_TASK].waiting, work[GPU_TASK].waiting_seconds) == (1, 0.5)
            del kept

    asyncio.run(scenario())


def _block(number):
    return np.ones(1 << 17)  # 1 MiB


def test_new_tasks_of_a_lane_whose_memory_is_full_are_no_reason_for_a_job(tmp_path):
    async def scenario():
        folder = authority(tmp_path / "a", anna=["hpda"]).folder
        options = {"lanes": {"hpda": 1, "batch": 1}, "memory_share": {"hpda": 0.01}}
        async with guarded(folder, memory_limit=1 << 30, **options) as scheduler, person(scheduler, folder, "anna") as anna:
            kept = anna.map(_block, range(60))
            idle = lambda: not any(ws.processing for ws in scheduler.workers.values())  # noqa: E731
            await until(lambda: scheduler.memory_by_lane().get("hpda", 0) > 20 << 20 and idle(), "a full lane")
            assert sum(entry["tasks"] for entry in scheduler.waiting_work()) >= 30
            assert sum(work.waiting for work in work_of(scheduler).values()) == 0
            del kept

    asyncio.run(scenario())


def test_tasks_that_a_client_has_announced_are_work_like_those_that_wait():
    async def scenario():
        async with lane_cluster(1, 1, lanes={"live": 3, "A": 1}) as scheduler, lane_client(scheduler, "live/x") as live:
            assert await live.gather(live.map(sleep, range(4), [0.1] * 4, key="item", pure=False)) == [0, 1, 2, 3]
            assert sum(work.waiting for work in work_of(scheduler).values()) == 0
            await scheduler.announce_work(live.id, "item", 500)
            work = work_of(scheduler)[()]
            assert work.waiting == 500
            each = scheduler.task_prefixes["item"].duration_average
            assert each >= 0.1
            assert work.waiting_seconds == pytest.approx(500 * each)
            pool = {"cpu": PoolShape(0, 16, threads=4)}
            assert jobs_wanted(pool, work_of(scheduler), seconds=50 * each) == {"cpu": 3}  # 10 threads

    asyncio.run(scenario())


# --- in time ---------------------------------------------------------------------------------------------------------------------
@given(st.lists(st.tuples(st.floats(0, 100), st.integers(0, 20)), min_size=1), st.floats(0, 1000))
def test_the_largest_number_of_late_is_remembered(steps, seconds):
    recent, seen, now = Recent(seconds), [], 0.0
    for passed, number in steps:
        now += passed
        seen.append((now, number))
        assert recent.add(now, number) == max(n for t, n in seen if t >= now - seconds)


def test_a_number_given_by_hand_stays_for_as_long_as_any_other_and_work_may_raise_it():
    recent = Recent(100)
    assert recent.add(0, 9) == 9
    recent.begin_with(10, 4)
    assert [recent.add(now, 1) for now in (10, 60, 110, 111)] == [4, 4, 4, 1]
    recent.begin_with(200, 0)
    assert recent.add(201, 6) == 6


def simulate(arrivals, *, task_seconds, start_seconds, minutes, idle_minutes=10.0, catch_up_minutes=10.0, tick=10.0):
    """A pool of jobs of four threads, second by second: how many jobs start and stop, and the jobs there at every tick."""
    shape = PoolShape(0, 50, threads=4)
    recent = Recent(60 * idle_minutes)
    waiting, running, starting, jobs, history = 0.0, deque(), deque(), 0, []
    for second in range(int(60 * minutes)):
        waiting += arrivals(second)
        while running and running[0] <= second:
            running.popleft()
        while starting and starting[0] <= second:
            starting.popleft()
            jobs += 1
        begin = min(4 * jobs - len(running), int(waiting))
        waiting -= max(0, begin)
        running.extend([second + task_seconds] * max(0, begin))
        if second % tick == 0:
            work = {(): Work(waiting, waiting * task_seconds, {"p": float(len(running))}, len(running) * task_seconds)}
            target = recent.add(second, jobs_wanted({"p": shape}, work, seconds=60 * catch_up_minutes)["p"])
            starting.extend([second + start_seconds] * max(0, target - jobs - len(starting)))
            idle = jobs - math.ceil(len(running) / 4)
            jobs -= max(0, min(jobs - target, idle))
            history.append((jobs, waiting))
    return history


@pytest.mark.parametrize("task_seconds", [1, 7, 60, 300, 900])
@pytest.mark.parametrize("start_seconds", [5, 120])
def test_a_constant_load_moves_nothing_once_it_is_served(task_seconds, start_seconds):
    rate = 37 / task_seconds  # keeps 37 threads busy
    history = simulate(lambda s: rate, task_seconds=task_seconds, start_seconds=start_seconds, minutes=400)
    late = [jobs for jobs, _ in history[len(history) // 2 :]]
    assert max(late) - min(late) <= 1
    assert sum(a != b for a, b in pairwise(late)) <= 2
    assert 10 <= late[-1] <= 13
    assert history[-1][1] * task_seconds <= 2 * 37 * 600  # and the queue is about what is caught up with in time


def test_a_burst_brings_jobs_at_once_and_they_leave_when_the_time_is_over():
    history = simulate(lambda s: 2000 if s == 600 else 0, task_seconds=6, start_seconds=30, minutes=60)
    jobs = [number for number, _ in history]
    assert max(jobs[:60]) == 0
    assert max(jobs) == 5  # 12,000 s in 600 s: 20 threads
    gone = next(i for i, number in enumerate(jobs) if i > jobs.index(5) and number == 0) * 10
    done = next(i for i, (_, waiting) in enumerate(history) if i > 61 and not waiting) * 10
    assert 0 < gone - done <= 620


def test_pulses_shorter_than_the_idle_time_keep_their_jobs():
    history = simulate(lambda s: 400 if s % 300 == 0 else 0, task_seconds=3, start_seconds=30, minutes=240)
    late = [jobs for jobs, _ in history[200:]]
    assert len(set(late)) == 1


# --- on Slurm --------------------------------------------------------------------------------------------------------------------
_ONE = {"memory": "800MiB", "partition": "cpu", "walltime": "0:30:00"}


@pytest.fixture
def on_slurm(slurm, monkeypatch):
    monkeypatch.setenv("SLURM_CONF", slurm.environ["SLURM_CONF"])
    return slurm


def settings(tmp_path, pools, **more):
    options = {"interface": "lo", "poll_seconds": 0.5, "logs": str(tmp_path), "lanes": {"live": 3, "hpda": 1}, **more}
    return parse_settings({"kind": "slurm", "pools": pools, **options})


def counting(path, seconds, until=""):
    """A task that takes so long, and as long as there is no file ``until``."""

    def counted(i):
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"{i}\n")
        time.sleep(seconds)
        while until and not os.path.exists(until):
            time.sleep(0.02)
        return i * i

    return counted


@pytest.mark.slurm
def test_a_burst_brings_jobs_and_idleness_takes_them_away_without_computing_anything_again(on_slurm, tmp_path):
    pools = {"cpu": {**_ONE, "minimum": 1, "maximum": 4}, "gpu": {**_ONE, "partition": "gpu", "gpus": 1, "minimum": 0, "maximum": 2}}
    with (
        open_pools(settings(tmp_path, pools, catch_up_minutes=0.1, idle_minutes=0.1)) as cluster,
        Client(cluster, name="hpda/anna") as client,
    ):
        cluster.wait_for_first(60)
        futures = client.map(counting(str(tmp_path / "ran"), 0.2, str(tmp_path / "go")), range(60))
        wait(lambda: cluster.pool_status()["cpu"].workers >= 2, "more workers")
        (tmp_path / "go").touch()
        on_gpu = client.submit(lambda: os.environ["CUDA_VISIBLE_DEVICES"], resources={"GPU": 1})
        assert on_gpu.result(60) == "0"
        assert client.gather(futures) == [i * i for i in range(60)]
        wait(lambda: cluster.pool_status()["cpu"].workers == 1 and not cluster.pool_status()["gpu"].workers, "the end of the idle ones")
        wait(lambda: len(on_slurm.jobs()) == 1, "the end of their jobs")
        assert client.gather(futures) == [i * i for i in range(60)]
        assert len((tmp_path / "ran").read_text().split()) == 60
        assert (on_gpu.result(120), cluster.pool_status()["cpu"].lost) == ("0", 0)
        with pytest.raises(ClusterError, match="between 1 and 4"):
            cluster.scale_pool(cpu=5)
        used = {row["pool"]: row for row in cluster.usage(by=["pool"])}
        assert used["cpu"]["tasks"] + used["gpu"]["tasks"] == 61  # a GPU job's thread takes other tasks, too
        assert used["gpu"]["tasks"] >= 1


@pytest.mark.slurm
def test_the_last_worker_stays_while_it_holds_results_and_a_lane_with_clients_has_its_floor(on_slurm, tmp_path):
    pools = {"cpu": {**_ONE, "minimum": 0, "maximum": 3}}
    with PoolCluster(settings(tmp_path, pools, idle_minutes=0.02, floor={"live": 2})) as cluster:
        with Client(cluster, name="hpda/anna") as client:
            cluster.wait_for_first(1)
            held = client.submit(counting(str(tmp_path / "ran"), 0.1), 7)
            assert held.result(60) == 49
            time.sleep(6)
            assert cluster.pool_status()["cpu"].workers == 1
            with Client(cluster, name="live/ben") as ben:
                wait(lambda: cluster.pool_status()["cpu"].workers == 2, "the floor")
                (holder,) = client.who_has([held])[held.key]
                (other,) = set(client.nthreads()) - {holder}
                also_held = client.submit(pow, 2, 5, workers=[other])  # now both hold results: one takes those of the other
                assert also_held.result(60) == 32
                assert ben.nthreads()
            wait(lambda: cluster.pool_status()["cpu"].workers == 1, "the end of the floor")
            assert client.gather([held, also_held]) == [49, 32]
            assert (tmp_path / "ran").read_text().split() == ["7"]
            del held, also_held
        wait(lambda: not on_slurm.jobs(), "the end of the last job")


@pytest.mark.slurm
def test_a_job_is_replaced_when_a_nanny_is_gone_and_not_while_one_starts_its_worker_again(on_slurm, tmp_path):
    pools = {"gpu": {**_ONE, "partition": "gpu", "gpus": 2, "cores": 2, "count": 1, "memory": "1GiB"}}
    with open_pools(settings(tmp_path, pools)) as cluster, Client(cluster, name="hpda/anna") as client:
        wait(lambda: cluster.pool_status()["gpu"].workers == 2, "both workers")
        held = client.submit(counting(str(tmp_path / "ran"), 0.0), 3)
        assert held.result(60) == 9
        (holder,) = client.who_has([held])[held.key]
        other = next(address for address in client.nthreads() if address != holder)
        # a nanny ends with a worker that dies before the nanny has noticed its start, which is up to 50 ms after the worker is listed
        states = lambda: set(client.run(lambda dask_worker: dask_worker.status.name, nanny=True).values())  # noqa: E731
        wait(lambda: states() == {"running"}, "nannies that have noticed their workers")
        os.kill(client.run(os.getpid, workers=[other])[other], signal.SIGKILL)
        wait(lambda: cluster.pool_status()["gpu"].workers == 1, "the end of one worker")
        wait(lambda: cluster.pool_status()["gpu"].workers == 2, "its second life")
        assert cluster.pool_status()["gpu"].lost == 0
        other = next(address for address in client.nthreads() if address != holder)
        nanny = psutil.Process(client.run(os.getppid, workers=[other])[other])
        nanny.kill()
        wait(lambda: cluster.pool_status()["gpu"].lost == 1, "notice of it")
        wait(lambda: cluster.pool_status()["gpu"].workers == 2, "two new workers")
        assert any("nanny" in text for _, _, text in cluster.events)


@pytest.mark.slurm
def test_the_work_of_a_pool_that_slurm_refuses_goes_to_the_next(on_slurm, tmp_path):
    pools = {"misspelt": {**_ONE, "partition": "nope", "maximum": 2}, "cpu": {**_ONE, "maximum": 2}}
    with open_pools(settings(tmp_path, pools)) as cluster, Client(cluster, name="hpda/anna") as client:
        assert client.submit(sum, [1, 2]).result(60) == 3
        now = cluster.pool_status()
        assert (now["misspelt"].target, now["cpu"].workers) == (0, 1)
        assert "Invalid partition name specified" in cluster.what_is_missing()
