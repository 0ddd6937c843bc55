"""Local workers without certificates: what one lane does there must not stop the others."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
import time
import urllib.request

import dask
import numpy as np
import psutil
import pytest
from _lanes import attempt
from _lanes import client as lane_client
from _lanes import cluster as lane_cluster
from _workers import workers_of
from distributed import Client, KilledWorker, Worker
from distributed.versions import get_versions

from cryodask.cluster import LaneCluster, close, connect
from cryodask.cluster.local import local_memory
from cryodask.cluster.settings import LocalSettings
from cryodask.run.isolation import blamed_at_first_death

MIB = 2**20


def block(number: int) -> np.ndarray:
    return np.full(20 * MIB // 8, number, np.float64)


@pytest.fixture
def cluster_file(tmp_path):
    def write(**more):
        lines = ["kind: local", "workers: 2", "memory: 500MiB", f"scratch: {tmp_path}", "lanes: {live: 3, hpda: 1}"]
        path = tmp_path / "here.yaml"
        path.write_text("\n".join([*lines, *(f"{key}: {value}" for key, value in more.items())]))
        return str(path)

    return write


def test_results_that_fill_the_memory_are_spilled_and_a_quiet_lane_is_still_served(cluster_file):
    hpda = connect(cluster_file(), lane="hpda")
    try:
        with Client(hpda.scheduler.address, name="live/anna") as live:
            kept = hpda.map(block, range(80))  # 1.6 GiB on workers that have 1
            assert hpda.gather(hpda.map(len, kept)) == [20 * MIB // 8] * 80
            assert live.submit(sum, [1, 2, 3]).result(60) == 6
            assert hpda.submit(np.max, kept[3]).result(60) == 3.0
    finally:
        close(hpda)


def test_a_lane_that_fills_its_share_of_the_memory_waits_and_is_told(cluster_file):
    hpda = connect(cluster_file(memory_share="{hpda: 0.2}"), lane="hpda")
    try:
        with Client(hpda.scheduler.address, name="live/anna") as live, pytest.warns(UserWarning, match="has more than its"):  # noqa: PT031
            kept = hpda.map(block, range(40))
            deadline = time.monotonic() + 60
            while sum(f.done() for f in kept) < 10:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            time.sleep(1.0)
            assert live.submit(sum, [1, 2, 3]).result(60) == 6
            done = [f for f in kept if f.done()]
            assert len(done) < 20, "two fifths of what would come"
            waiting = [f for f in kept if not f.done()]
            for future in done:
                future.release()
            assert waiting[0].result(60)[0] == kept.index(waiting[0])
    finally:
        close(hpda)


def once(path: str) -> int:
    """Takes its worker along the first time."""
    if not os.path.exists(path):
        open(path, "w", encoding="utf-8").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return os.getpid()


def test_a_task_whose_worker_died_is_tried_elsewhere_unless_it_asked_for_the_blame(tmp_path):
    client = connect("local", workers=2)
    try:
        others = client.map(time.sleep, [0.5] * 6, pure=False)
        assert client.submit(once, str(tmp_path / "first")).result(60)
        assert client.gather(others) == [None] * 6
        with blamed_at_first_death():
            future = client.submit(once, str(tmp_path / "second"))
        with pytest.raises(KilledWorker):
            future.result(60)
    finally:
        close(client)


def parent_and_draw(_: int) -> tuple[int, str | None, float]:
    return os.getppid(), os.environ.get("CRYODASK_SAID_LATER"), float(np.random.random())  # noqa: NPY002


def test_forked_workers_have_their_own_random_numbers_and_the_environment_of_their_cluster(monkeypatch):
    seen = []
    for said in ("first", "second"):
        monkeypatch.setenv("CRYODASK_SAID_LATER", said)
        client = connect("local", workers=2)
        try:
            # one task for each worker
            futures = [client.submit(parent_and_draw, n, workers=[worker]) for n, worker in enumerate(workers_of(client))]
            seen += client.gather(futures)
        finally:
            close(client)
    parents, environment, draws = zip(*seen)
    assert len(set(parents)) == 1, "one fork server for all"
    assert parents[0] != os.getpid()
    assert environment == ("first", "first", "second", "second")
    assert len(set(draws)) == 4


def test_clients_and_workers_of_other_versions_are_refused_without_certificates_too(monkeypatch):
    found = get_versions()
    other = found | {"packages": found["packages"] | {"distributed": "2025.7.1"}}

    async def scenario():
        async with lane_cluster(1, 1, lanes={"A": 1}) as scheduler:
            async with lane_client(scheduler, "A/x") as first:
                monkeypatch.setattr("distributed.client.version_module.get_versions", lambda: other)
                monkeypatch.setattr("distributed.worker.get_versions", lambda: other)
                with pytest.raises(
                    ImportError, match=r"versions of this client differ from the scheduler's: distributed 2025\.7\.1 \(here 20"
                ):
                    await attempt(lane_client(scheduler, "A/y"))
                with pytest.raises(Exception, match=r"versions of this worker differ|failed to start"):
                    await Worker(scheduler.address, host="127.0.0.1", dashboard=False)
                monkeypatch.undo()
                assert len(scheduler.workers) == 1
                assert len(scheduler.clients) == 2  # and that of tasks which nobody waits for
                assert await first.submit(sum, [1, 2]) == 3

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_all_options_of_lanes_are_those_of_the_cluster():
    options = {"lanes": {"live": 3, "hpda": 1}, "strict": ["live"], "reserve": {"live": 1}, "memory_share": {"hpda": 0.5}}
    with dask.config.set({"distributed.worker.profile.enabled": False}):
        with LaneCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address="127.0.0.1:0", **options) as made:
            with Client(made, name="hpda/ben") as client:
                assert client.submit(sum, [1, 2]).result() == 3
            assert made.scheduler._reserve == {"live": 1}
            assert made.scheduler._strict == {"live"}
            assert made.scheduler.memory_by_lane().keys() <= {"hpda"}


@pytest.fixture(scope="module")
def one():
    client = connect("local", workers=1)
    yield client
    close(client)


def test_a_local_worker_has_an_equal_share_of_the_machine_or_what_the_file_says(one):
    from distributed.system import MEMORY_LIMIT

    shares = [local_memory(LocalSettings(workers=n)) for n in (1, 2, 5)]
    assert shares == [MEMORY_LIMIT, MEMORY_LIMIT // 2, int(MEMORY_LIMIT * (1 / 5))]
    assert local_memory(LocalSettings(workers=5, memory="500MiB")) == 500 * MIB
    assert [w["memory_limit"] for w in workers_of(one).values()] == [MEMORY_LIMIT]


def test_a_local_worker_listens_on_loopback_only_and_loads_no_dashboard_of_its_own(one):
    ((process, with_bokeh),) = one.run(lambda: (os.getpid(), "bokeh" in sys.modules)).values()
    listening = [c.laddr.ip for c in psutil.Process(process).net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    assert set(listening) == {"127.0.0.1"}
    assert not with_bokeh, "it would double the CPU time of starting a worker"


def test_the_dashboard_is_loaded_when_it_is_first_looked_at(one):
    def dashboards():
        return [app for app in one.cluster.scheduler.http_application.applications if hasattr(app, "app_paths")]

    assert dashboards() == []
    for page in ("status", "workers"):
        with urllib.request.urlopen(one.dashboard_link.replace("status", page), timeout=120) as answer:
            assert "bokeh" in answer.read().decode()
        assert len(dashboards()) == 1


def test_workers_do_not_look_for_garbage_in_what_they_share(client):
    """Looking would write to 45 MiB of it; torch alone is more than 100,000 objects."""
    frozen = client.run(lambda: (gc.isenabled(), gc.get_freeze_count()))
    assert len(frozen) == 2
    assert all(enabled and count > 100_000 for enabled, count in frozen.values()), frozen
