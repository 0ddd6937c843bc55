"""Pools of workers on a real Slurm: each scaled alone, and what happens when jobs, workers, nodes and the controller go away."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings

import psutil
import pytest
import yaml
from _service import running
from distributed import Client

from cryodask.cluster import close, connect
from cryodask.cluster.access.tls import Authority, security
from cryodask.cluster.access.versions import RELEASE
from cryodask.cluster.settings import parse_settings
from cryodask.cluster.slurm.allocation import allocation_script
from cryodask.cluster.slurm.pools import PoolCluster, open_pools
from cryodask.errors import ClusterError
from cryodask.testing.slurm import TinySlurm, missing_programs

pytestmark = pytest.mark.slurm

_ONE = {"memory": "800MiB", "partition": "cpu"}
_POOLS = {
    "cpu": {**_ONE, "walltime": "0:30:00"},
    "two": {**_ONE, "cores": 2, "processes": 2, "memory": "1GiB"},
    "gpu": {**_ONE, "partition": "gpu", "gpus": 2, "cores": 2, "memory": "1GiB"},
    "cheap": {**_ONE, "partition": "preempt"},
    "misspelt": {**_ONE, "partition": "nope"},
    "huge": {**_ONE, "cores": 64},
    "broken": {**_ONE, "python": "/bin/false"},
}


def wait(condition, what, seconds=180):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.05)


def settings(tmp_path, **more):
    return parse_settings({"kind": "slurm", "interface": "lo", "poll_seconds": 0.5, "logs": str(tmp_path), "pools": _POOLS, **more})


@pytest.fixture(scope="module")
def on_slurm(slurm):
    """Slurm's commands of this process speak to the Slurm of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", slurm.environ["SLURM_CONF"])
        yield slurm


@pytest.fixture(scope="module")
def shared_pools(on_slurm, tmp_path_factory):
    with PoolCluster(settings(tmp_path_factory.mktemp("logs"), lanes={"live": 3, "hpda": 1})) as cluster:
        yield cluster


@pytest.fixture
def pools(shared_pools, on_slurm):
    """The pools of this module with one worker of kind cpu."""
    yield at(shared_pools, cpu=1)
    for node in ("c0", "c1", "g0", "p0"):
        on_slurm.resume(node)


def at(cluster, **jobs):
    """Scale, and wait until that many jobs of these pools have all their workers, and the others none."""
    cluster.scale_pool(**{**dict.fromkeys(_POOLS, 0), **jobs})
    expected = {name: count * cluster.settings.pools[name].workers_per_job for name, count in jobs.items()}
    wait(lambda: all(now.workers == expected.get(name, 0) for name, now in cluster.pool_status().items()), f"workers {expected}")
    return cluster


@pytest.fixture
def client(pools):
    with Client(pools, name="hpda/anna") as made:
        yield made


def test_pools_give_a_first_result_and_leave_no_job_behind(on_slurm, tmp_path, capsys):
    start = time.monotonic()
    pools = {"cpu": {**_POOLS["cpu"], "count": 1}}
    with open_pools(settings(tmp_path, pools=pools)) as cluster, Client(cluster) as client:
        cluster.wait_for_first(60)
        assert client.submit(sum, [1, 2]).result(60) == 3
        seconds = time.monotonic() - start
        with capsys.disabled():
            print(f"\nconnect to first result on Slurm: {seconds:.1f} s")
        name = cluster.cluster_id
    left = on_slurm.run("squeue", "-h", "-o", "%k")
    assert name not in left


def test_every_pool_is_scaled_alone(pools):
    at(pools, cpu=1, two=1, gpu=1)
    now = pools.pool_status()
    assert {name: (s.running, s.workers) for name, s in now.items() if s.target} == {"cpu": (1, 1), "two": (1, 2), "gpu": (1, 2)}
    assert pools.what_is_missing() == ""
    assert {worker.extra["cryodask"] for worker in pools.scheduler.workers.values()} == {RELEASE}
    with pytest.raises(ClusterError, match="scale_pool"):
        pools.scale(5)
    with pytest.raises(ClusterError, match="the pools are cpu, two"):
        pools.scale_pool(cqu=1)


def test_in_a_coroutine_everything_is_awaited(on_slurm, tmp_path):
    async def main():
        async with PoolCluster(settings(tmp_path), asynchronous=True) as cluster, Client(cluster, asynchronous=True) as client:
            await cluster.scale_pool(cpu=1)
            await cluster.wait_for_first(60)
            assert (await cluster.pool_status())["cpu"].workers == 1
            return await client.submit(sum, [2, 3])

    assert asyncio.run(main()) == 5


def test_each_worker_of_a_gpu_job_sees_one_device_of_its_own(pools, client):
    at(pools, cpu=1, gpu=1)

    def where(i):
        time.sleep(0.2)
        return os.environ["SLURM_JOB_PARTITION"], os.environ["CUDA_VISIBLE_DEVICES"], os.environ["OMP_NUM_THREADS"]

    seen = set(client.gather(client.map(where, range(8), resources={"GPU": 1}), errors="raise"))
    assert {partition for partition, _, _ in seen} == {"gpu"}
    assert sorted(device for _, device, _ in seen) == ["0", "1"]
    assert {threads for _, _, threads in seen} == {"1"}
    pinned = client.submit(lambda: os.environ["SLURM_JOB_PARTITION"], resources={"pool-cpu": 1}).result(60)
    assert pinned == "cpu"


def counting(path, seconds=0.0):
    def counted(i):  # inside a function it travels by value: workers on other machines cannot import a test
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"{i}\n")
        time.sleep(seconds)
        return i * i

    return counted


def runs_of(path):
    return path.read_text().split() if path.exists() else []


def test_scale_down_computes_nothing_again(pools, client, tmp_path):
    at(pools, cpu=3)
    futures = client.map(counting(str(tmp_path / "ran")), range(20))
    client.gather(futures)
    held = client.who_has(futures)
    assert len({worker for workers in held.values() for worker in workers}) == 3
    at(pools, cpu=1)
    wait(lambda: len(client.nthreads()) == 1, "the end of the other workers")
    assert client.gather(futures) == [i * i for i in range(20)]
    assert len(runs_of(tmp_path / "ran")) == 20


def job_of(slurm, cluster, pool):
    return next(job for job, (state, name, _) in slurm.jobs().items() if name == f"cryodask-{pool}" and state == "RUNNING")


def cancel(slurm, cluster, client):
    slurm.run("scancel", job_of(slurm, cluster, "cpu"))


def kill_worker(slurm, cluster, client):
    os.kill(next(iter(client.run(os.getpid).values())), signal.SIGKILL)


def kill_nanny(slurm, cluster, client):
    os.kill(next(iter(client.run(os.getppid).values())), signal.SIGKILL)


def take_node_down(slurm, cluster, client):
    slurm.down(slurm.jobs()[job_of(slurm, cluster, "cpu")][2])


@pytest.mark.parametrize(("fault", "jobs_lost"), [(cancel, 1), (kill_worker, 0), (kill_nanny, 1), (take_node_down, 1)])
def test_a_run_ends_right_after(fault, jobs_lost, pools, client, on_slurm, tmp_path):
    lost = pools.pool_status()["cpu"].lost
    futures = client.map(counting(str(tmp_path / "ran"), 0.1), range(20), retries=3)
    wait(lambda: len(runs_of(tmp_path / "ran")) >= 5, "five tasks")
    fault(on_slurm, pools, client)
    assert client.gather(futures) == [i * i for i in range(20)]
    now = pools.pool_status()["cpu"]
    assert (now.target, now.workers, now.lost - lost) == (1, 1, jobs_lost)


def test_a_drained_node_takes_no_new_jobs_and_loses_none(pools, client, on_slurm):
    on_slurm.drain("c0")
    on_slurm.drain("c1")
    lost = pools.pool_status()["cpu"].lost
    pools.scale_pool(cpu=2)
    wait(lambda: pools.pool_status()["cpu"].pending == 1, "a pending job")
    wait(lambda: re.search("DRAINED|UnavailableNodes", pools.what_is_missing()), "Slurm's reason")
    assert client.submit(lambda: 7).result(60) == 7
    on_slurm.resume("c0")
    on_slurm.resume("c1")
    wait(lambda: pools.pool_status()["cpu"].workers == 2, "the second worker")
    assert pools.pool_status()["cpu"].lost == lost


def test_preempted_workers_come_back_when_the_urgent_job_is_done(pools, client, on_slurm):
    at(pools, cheap=1)
    urgent = on_slurm.run("sbatch", "--parsable", "-p", "urgent", "-c", "16", "--mem=100", "-o", "/dev/null", "--wrap", "sleep 100").strip()
    wait(lambda: pools.pool_status()["cheap"].lost == 1, "the loss")
    wait(lambda: pools.pool_status()["cheap"].pending == 1, "its replacement in the queue")
    future = client.submit(lambda: 5)
    on_slurm.run("scancel", urgent)
    assert future.result(60) == 5
    assert pools.pool_status()["cheap"].workers == 1


def test_a_missing_partition_is_refused_at_once_with_slurms_words(pools):
    with pytest.raises(ClusterError, match="Invalid partition name specified"):
        pools.scale_pool(misspelt=2, cpu=1)
    now = pools.pool_status()
    assert (now["misspelt"].target, now["cpu"].workers) == (0, 1)
    assert "Invalid partition" in pools.what_is_missing()


def test_a_job_that_can_never_run_says_why(pools):
    pools.scale_pool(huge=1)
    wait(lambda: pools.pool_status()["huge"].waiting == {"PartitionConfig": 1}, "Slurm's reason")
    assert pools.what_is_missing() == "pool huge: jobs are pending (1 PartitionConfig)"


def test_a_pool_whose_jobs_end_before_a_worker_comes_gives_up(pools):
    pools.scale_pool(broken=1)
    wait(lambda: pools.pool_status()["broken"].problem, "giving up")
    assert "3 jobs in a row ended before a worker connected" in pools.what_is_missing()
    assert pools.pool_status()["broken"].target == 0


def test_a_controller_that_is_away_loses_no_job_and_submissions_wait_for_it(pools, client, on_slurm):
    lost = pools.pool_status()["cpu"].lost
    on_slurm.kill_controller()
    wait(lambda: not pools.slurm_answers, "notice of it")
    assert "Slurm does not answer" in pools.what_is_missing()
    pools.scale_pool(cpu=2)
    assert client.submit(lambda: 3).result(60) == 3
    now = pools.pool_status()["cpu"]
    assert (now.target, now.workers, now.lost) == (2, 1, lost)
    on_slurm.start_controller()
    wait(lambda: pools.pool_status()["cpu"].workers == 2, "the second worker")
    assert pools.pool_status()["cpu"].lost == lost
    assert sum(name == "cryodask-cpu" for _, name, _ in on_slurm.jobs().values()) == 2


def _as_anna(cluster, folder):
    return Client(cluster.scheduler_address, name="hpda/anna", security=security(folder, "anna"))


def test_with_certificates_scheduler_and_workers_speak_tls_and_are_guarded(on_slurm, tmp_path):
    Authority.create(tmp_path / "ca", owner="service").invite("anna", ["hpda"], address="tls://127.0.0.1:1")
    pools = {"cpu": {**_POOLS["cpu"], "count": 1}, "gpu": {**_POOLS["gpu"], "count": 1}}
    mixed = settings(tmp_path / "logs", pools=pools, lanes={"live": 3, "hpda": 1}, max_graph_bytes="1MiB")
    with open_pools(mixed, certificates=tmp_path / "ca", owner="service") as cluster:
        wait(lambda: sum(now.workers for now in cluster.pool_status().values()) == 3, "three workers")
        with Client(cluster) as owner, _as_anna(cluster, tmp_path / "ca") as anna:
            assert anna.submit(lambda: os.environ["SLURM_JOB_PARTITION"], resources={"GPU": 1}).result(60) == "gpu"
            assert all(address.startswith("tls://") for address in owner.nthreads())
            with pytest.raises(PermissionError, match="anna"):
                anna.run(os.getpid)
            with pytest.raises(ValueError, match=r"accepts at most 1.00 MiB"):
                anna.submit(len, bytes(2_000_000)).result(60)
            assert len(owner.run(os.getpid)) == 3
        at_loopback = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
        dask = running(on_slurm.processes(), "dask_worker", "multiprocessing.spawn")
        listening = {c.laddr.ip for p in dask for c in p.net_connections("tcp") if c.status == "LISTEN"}
        assert len(dask) >= 6
        assert listening <= at_loopback
        cluster.scale_pool(gpu=0)
        wait(lambda: cluster.pool_status()["gpu"].workers == 0, "the end of the GPU workers")


@pytest.mark.slow
def test_a_job_is_replaced_before_its_walltime_ends_and_nothing_is_lost(on_slurm, tmp_path):
    pools = {"cpu": {**_ONE, "walltime": "0:02:00", "count": 1}}
    with open_pools(settings(tmp_path, pools=pools)) as cluster, Client(cluster) as client:
        held = client.submit(counting(str(tmp_path / "ran")), 9)
        assert held.result(60) == 81
        (first,) = client.nthreads()
        wait(lambda: len(client.nthreads()) == 2, "the replacement", 100)
        assert first in client.nthreads()
        wait(lambda: first not in client.nthreads() and len(client.nthreads()) == 1, "the end of the first", 60)
        assert held.result(60) == 81
        assert len(runs_of(tmp_path / "ran")) == 1
        assert cluster.pool_status()["cpu"].lost == 0


_DRIVER = """
import sys, time
from cryodask.cluster.slurm.pools import open_pools
from cryodask.cluster.settings import parse_settings
if __name__ == "__main__":
    one = {"memory": "800MiB", "partition": "cpu"}
    pools = {"cpu": {**one, "count": 1}, "huge": {**one, "cores": 64, "count": 1}}
    cluster = open_pools(parse_settings({"kind": "slurm", "interface": "lo", "logs": sys.argv[1], "pools": pools}))
    cluster.wait_for_first(60)
    print(cluster.cluster_id, flush=True)
    time.sleep(600)
"""


def test_jobs_of_a_killed_driver_end_and_the_next_start_cancels_those_that_wait(on_slurm, tmp_path):
    driver = subprocess.Popen([sys.executable, "-c", _DRIVER, str(tmp_path)], stdout=subprocess.PIPE, text=True, start_new_session=True)
    cluster_id = driver.stdout.readline().strip()
    os.killpg(driver.pid, signal.SIGKILL)
    driver.communicate()

    def states():
        lines = (line.split("|") for line in on_slurm.run("squeue", "-h", "-o", "%T|%k").splitlines())
        return [state for state, comment in lines if cluster_id in comment]

    wait(lambda: states() == ["PENDING"], "the end of the running job")
    with PoolCluster(settings(tmp_path)) as cluster:
        assert any("left by a cluster whose process died" in text for _, _, text in cluster.events)
        wait(lambda: not states(), "the end of the pending job")


@pytest.mark.parametrize(("good", "encrypted"), [(True, True), (False, False)])
def test_one_allocation_holds_scheduler_workers_and_driver(good, encrypted, on_slurm, tmp_path):
    if encrypted:
        Authority.create(tmp_path / "ca", owner="service")
    one = {"pools": {"cpu": {**_POOLS["cpu"], "count": 2}}, "single_allocation": True}
    driver = tmp_path / "driver.py"
    work = (
        "print(client.scheduler.address, 'sum', client.submit(sum, client.map(abs, range(10))).result())" if good else "raise SystemExit(7)"
    )
    driver.write_text(
        "import os\nfrom distributed import Client\n"
        f"client = Client(scheduler_file=os.environ['CRYODASK_CLUSTER'])\nclient.wait_for_workers(2, timeout=60)\n{work}\n"
    )
    certificates = tmp_path / "ca" if encrypted else None
    script = allocation_script(settings(tmp_path, **one), f"{sys.executable} {driver}", certificates=certificates)
    (tmp_path / "job.sh").write_text(script)
    job = on_slurm.run("sbatch", "--parsable", str(tmp_path / "job.sh")).strip()
    wait(lambda: job not in on_slurm.jobs(), "the end of the job")
    said = (tmp_path / f"cryodask-batch-{job}.log").read_text()
    assert ("sum 45" in said) == good, said
    assert ("tls://" in said) == encrypted
    finished = (on_slurm.folder / "log" / "jobcomp.log").read_text().splitlines()
    line = next(line for line in finished if line.startswith(f"JobId={job} "))
    assert ("JobState=COMPLETED" in line) == good
    assert not list(tmp_path.glob("batch-*"))


def test_close_leaves_no_job_and_no_process(on_slurm, tmp_path):
    before = set(on_slurm.processes())
    with PoolCluster(settings(tmp_path)) as cluster:
        at(cluster, cpu=1)
        cluster.scale_pool(huge=1)
        inside = cluster.cluster_id
        threads = threading.active_count()
        assert inside in on_slurm.run("squeue", "-h", "-o", "%k")
    assert inside not in on_slurm.run("squeue", "-h", "-o", "%k")
    wait(lambda: not running(list(set(on_slurm.processes()) - before), "dask"), "an end")
    assert threading.active_count() <= threads


_OWNER = """
import os, signal, sys
from cryodask.testing.slurm import TinySlurm
slurm = TinySlurm().__enter__()
slurm.run("sbatch", "--mem=100", "-o", "/dev/null", "--wrap", "setsid sleep 500 & sleep 400", )
while not any(state == "RUNNING" for state, _, _ in slurm.jobs().values()):
    pass
print(slurm.folder, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(bool(missing_programs()), reason="needs Debian's slurm-wlm and munge")
def test_the_slurm_of_the_tests_ends_with_the_process_that_started_it():
    out = subprocess.run([sys.executable, "-c", _OWNER], stdout=subprocess.PIPE, text=True, timeout=60).stdout
    left = TinySlurm.__new__(TinySlurm)
    left.environ = {"SLURM_CONF": out.strip() + "/slurm.conf"}
    wait(lambda: not left.processes() and not os.path.exists(out.strip()), "the end of all")


def test_connect_opens_pools_with_certificates_of_their_own_and_takes_them_away_again(on_slurm, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    pool = {**_POOLS["cpu"], "count": 1}
    names = [n for n, found in psutil.net_if_addrs().items() if n != "lo" and any(a.family == socket.AF_INET for a in found)]
    if not names:
        warnings.warn("this machine has no network: connecting beyond it is NOT tested", stacklevel=1)
        pytest.skip("no network interface")
    name = names[0]
    (tmp_path / "mixed.yaml").write_text(
        yaml.safe_dump({"kind": "slurm", "interface": name, "pools": {"cpu": pool}, "lanes": {"live": 3, "hpda": 1}, "logs": str(tmp_path)})
    )
    client = connect(str(tmp_path / "mixed.yaml"), lane="live")
    try:
        assert client.scheduler.address.startswith("tls://")
        assert client.submit(sum, [1, 2]).result(60) == 3
        (folder,) = (tmp_path / "cryodask" / "certificates").iterdir()
        assert folder.stat().st_mode & 0o077 == 0
        with pytest.raises(ClusterError, match="certificate"):
            connect(client.scheduler.address)
    finally:
        close(client)
    assert list((tmp_path / "cryodask" / "certificates").iterdir()) == []
