"""Faults of pools on a real Slurm, by what the user sees of them: a full scratch disk, jobs and nodes that go away."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import time
import warnings

import dask.array as da
import pytest
from distributed import Client, get_worker

from cryodask.cluster.settings import parse_settings
from cryodask.cluster.slurm import pool_jobs
from cryodask.cluster.slurm.pools import PoolCluster, open_pools

pytestmark = pytest.mark.slurm

_ONE = {"memory": "800MiB", "partition": "cpu", "walltime": "0:30:00"}
MIB = 2**20


def wait(condition, what, seconds=180):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.05)


def settings(tmp_path, pools, **more):
    options = {"interface": "lo", "poll_seconds": 0.5, "logs": str(tmp_path / "logs"), "lanes": {"live": 3, "hpda": 1}, **more}
    return parse_settings({"kind": "slurm", "pools": pools, **options})


@pytest.fixture
def on_slurm(slurm, monkeypatch):
    monkeypatch.setenv("SLURM_CONF", slurm.environ["SLURM_CONF"])
    yield slurm
    slurm.reset()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MiB and 300 files."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m,nr_inodes=300", "tmpfs", str(folder)], capture_output=True, text=True)
    if done.returncode:
        warnings.warn(f"a full scratch disk is NOT tested: {done.stderr.strip()}", stacklevel=1)
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder):
    for i in range(1000):
        try:
            (folder / f"filler-{i}").write_bytes(b"x" * 65536)
        except OSError:
            if i > 400:  # neither a byte nor a name is free
                return


def test_workers_that_find_a_full_scratch_say_so(on_slurm, small_disk, tmp_path):
    fill(small_disk)
    with PoolCluster(settings(tmp_path, {"cpu": {**_ONE, "scratch": str(small_disk)}})) as cluster:
        cluster.scale_pool(cpu=1)
        wait(lambda: cluster.pool_status()["cpu"].problem, "giving up", 90)
        assert re.search(
            r"pool cpu: 3 jobs in a row ended before a worker connected\. .*No space left on device", cluster.what_is_missing()
        )
        assert cluster.pool_status()["cpu"].target == 0


def test_a_scratch_that_fills_up_fails_the_tasks_that_write_there_and_no_others(on_slurm, small_disk, tmp_path):
    def writes(i):
        path = os.path.join(get_worker().local_directory, f"part-{i}")
        with open(path, "wb") as file:
            file.write(b"x" * MIB)
        return path

    pools = {"cpu": {**_ONE, "scratch": str(small_disk), "count": 1}}
    with open_pools(settings(tmp_path, pools)) as cluster, Client(cluster, name="hpda/anna") as client:
        cluster.wait_for_first(60)
        futures = client.map(writes, range(12))
        others = client.map(abs, range(20))
        assert client.gather(others) == list(range(20))
        wait(lambda: all(f.done() for f in futures), "an answer for every task")
        failed = [f for f in futures if f.status == "error"]
        assert 4 <= len(failed) < 12
        assert all(re.search("No space left on device", str(f.exception())) for f in failed)
        now = cluster.pool_status()["cpu"]
        assert (now.workers, now.lost, cluster.what_is_missing()) == (1, 0, "")
        (row,) = cluster.usage(by=["lane"])
        assert row["failed"] == len(failed)


def test_a_shuffle_through_a_full_scratch_ends_with_its_reason(on_slurm, small_disk, tmp_path):
    pools = {"cpu": {**_ONE, "scratch": str(small_disk), "count": 2}}
    with open_pools(settings(tmp_path, pools)) as cluster, Client(cluster, name="hpda/anna") as client:
        wait(lambda: cluster.pool_status()["cpu"].workers == 2, "both workers")
        turned = da.ones((4000, 4000), chunks=(200, 4000)).rechunk((4000, 200), method="p2p")  # 122 MiB
        future = client.compute(turned.sum())
        wait(future.done, "an end", 120)
        reasons, error = [], future.exception()
        while error is not None:
            reasons.append(str(error))
            error = error.__cause__
        assert any("No space left on device" in reason for reason in reasons), reasons
        assert client.submit(sum, [1, 2]).result(60) == 3
        wait(lambda: cluster.pool_status()["cpu"].workers == 2, "both workers")


def cancel(slurm, client, job):
    slurm.run("scancel", job)


def kill_nanny(slurm, client, job):
    os.kill(next(iter(client.run(os.getppid).values())), signal.SIGKILL)


def take_node_down(slurm, client, job):
    slurm.down(slurm.jobs()[job][2])


def preempt(slurm, client, job):
    slurm.run("sbatch", "--parsable", "-p", "urgent", "-c", "16", "--mem=100", "-o", "/dev/null", "--wrap", "sleep 2")


def test_every_lost_job_is_told_with_its_number_and_replaced(on_slurm, tmp_path):
    pools = {"cheap": {**_ONE, "partition": "preempt", "count": 1}}
    with open_pools(settings(tmp_path, pools)) as cluster, Client(cluster, name="hpda/anna") as client:

        def now():
            return cluster.pool_status()["cheap"]

        for fault in (cancel, kill_nanny, take_node_down, preempt):
            wait(lambda: now().workers == 1 and not cluster.what_is_missing(), "a worker", 90)
            (job,) = on_slurm.jobs()
            future = client.submit(time.sleep, 1, pure=False)
            wait(lambda: any(client.processing().values()), "the task")
            fault(on_slurm, client, job)
            wait(lambda: now().workers == 0, f"notice of {fault.__name__}")
            told = {cluster.what_is_missing()}
            while now().workers == 0:
                told.add(cluster.what_is_missing())
                time.sleep(0.05)
            # while a job waits, or its worker has not come yet, it is told for what
            known = r"pool cheap: (jobs are pending \(1 [\w, ]+\)|0 workers of \d running jobs have connected)"
            assert any(re.fullmatch(known, text) for text in told), (fault, told)
            assert future.result(60) is None
            (text,) = [text for _, pool, text in cluster.events if pool == "cheap" and f"({job})" in text]
            assert re.fullmatch(rf"job cheap-\d+ \({job}\): Slurm (no longer shows it|says it is [A-Z_]+)", text)
            on_slurm.resume("p0")
        assert now().lost == 4


def test_a_run_starts_with_the_workers_that_came_and_ends_without_the_others(on_slurm, tmp_path):
    pools = {"cpu": {**_ONE, "count": 1}, "huge": {**_ONE, "cores": 64, "count": 2}}
    with open_pools(settings(tmp_path, pools)) as cluster, Client(cluster, name="hpda/anna") as client:
        cluster.wait_for_first(60)
        assert client.gather(client.map(abs, range(30))) == list(range(30))
        wait(lambda: cluster.what_is_missing() == "pool huge: jobs are pending (2 PartitionConfig)", "Slurm's reason")


def held_back(until):
    """Makes a result that nobody can take before a file is there."""

    class Large:
        def __sizeof__(self):
            return 20 * MIB  # large results are sent from a thread of their own

        def __reduce__(self):
            while not os.path.exists(until):
                time.sleep(0.05)
            return str, ("handed over",)

    def make(ran):
        with open(ran, "a", encoding="utf-8") as file:
            file.write("x")
        return Large()

    return make


def test_a_job_whose_results_nobody_takes_in_time_works_on_and_goes_later(on_slurm, tmp_path, monkeypatch):
    monkeypatch.setattr(pool_jobs, "_RETIRE_SECONDS", 20.0)
    monkeypatch.setattr(pool_jobs, "_AGAIN_SECONDS", 4.0)
    go, ran = tmp_path / "go", tmp_path / "ran"
    with open_pools(settings(tmp_path, {"cpu": {**_ONE, "count": 2}})) as cluster, Client(cluster, name="hpda/anna") as client:
        wait(lambda: cluster.pool_status()["cpu"].workers == 2, "both workers")
        first, other = client.nthreads()
        held = client.submit(held_back(str(go)), str(ran), workers=[first], allow_other_workers=True)
        more = client.submit(bytes, 40 * MIB, workers=[other], allow_other_workers=True)  # the first is worth less
        wait(lambda: held.done() and more.done(), "both results")
        assert [len(ws) for ws in client.who_has([held, more]).values()] == [1, 1]
        cluster.scale_pool(cpu=1)
        assert not any("others did not take them" in text for _, _, text in cluster.events), "nothing waits for a retirement"
        wait(lambda: cluster.scheduler.workers[first] not in cluster.scheduler.running, "its retirement")
        (job,) = (name for name in cluster.workers if name == cluster.scheduler.workers[first].name)
        wait(
            lambda: any("it stays for now, with 1 results: others did not take them within 20 s" in text for _, _, text in cluster.events),
            "its end",
        )
        assert job in next(text for _, _, text in cluster.events if "it stays for now" in text)
        assert client.submit(pow, 2, 3, workers=[first]).result(120) == 8
        go.touch()
        wait(lambda: cluster.pool_status()["cpu"].workers == 1, "the end of the job")
        wait(lambda: len(on_slurm.jobs()) == 1, "and of Slurm's")
        assert held.result(120) == "handed over"
        assert ran.read_text() == "x"
        assert cluster.pool_status()["cpu"].lost == 0


def test_when_all_pools_are_to_have_no_jobs_they_go_with_their_results_and_say_so(on_slurm, tmp_path):
    with open_pools(settings(tmp_path, {"cpu": {**_ONE, "count": 1}})) as cluster, Client(cluster, name="hpda/anna") as client:
        cluster.wait_for_first(60)
        held = client.submit(pow, 2, 3)
        assert held.result(30) == 8
        cluster.scale_pool(cpu=0)
        wait(lambda: not cluster.pool_status()["cpu"].workers and not on_slurm.jobs(), "the end of the job")
        assert any("1 of its results are lost: no other worker can take them" in text for _, _, text in cluster.events)


def test_a_watcher_that_loses_a_cancellation_ends_all_the_same():
    async def loses_one():
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:  # as wait_for() of Python 3.11 may, where a result comes with it
            await asyncio.sleep(60)

    async def scenario():
        watcher = asyncio.create_task(loses_one())
        await asyncio.sleep(0)
        await asyncio.wait_for(pool_jobs._end({watcher}), 120)
        assert watcher.cancelled()

    asyncio.run(scenario())
