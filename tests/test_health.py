"""A run that does not move says why, and goes on when it can; one whose scheduler is gone ends with the way out."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import dask
import pytest
from distributed import Client

from cryodask.errors import ClusterError
from cryodask.run import health
from cryodask.run.health import Watch
from cryodask.run.map import MapRunner
from cryodask.store.project import Item
from cryodask.testing.clusters import ProcessCluster
from cryodask.testing.faults import FaultyJob

pytestmark = pytest.mark.heavy

MEMORY = 500_000_000


@pytest.fixture(scope="module")
def cluster() -> Iterator[ProcessCluster]:
    with ProcessCluster(workers=1, memory=str(MEMORY)) as made:
        yield made


@pytest.fixture
def client(cluster, monkeypatch) -> Iterator[Client]:
    monkeypatch.setattr(health, "_ANSWER_SECONDS", 1.0)
    monkeypatch.setattr(health, "_SILENT_SECONDS", 2.0)
    with dask.config.set({"distributed.comm.timeouts.connect": "4s"}), Client(cluster.address) as made:
        yield made


class _Run(threading.Thread):
    """A map run beside the test; ``told`` is what it said of stalls."""

    def __init__(self, client: Client, folder, count: int = 6, seconds: float = 0.0) -> None:
        super().__init__()
        self.told: list[str] = []
        self.error: BaseException | None = None
        self.counts: dict[str, int] = {}
        items = iter([Item(row, f"item{row}", f"content {row}") for row in range(count)])
        self.runner = MapRunner(client, FaultyJob(folder, seconds=seconds), event=self._note, stall_after_seconds=1.5)
        self.items = items
        self.start()

    def _note(self, kind: str, item: Item | None, text: str) -> None:
        if kind == "stalled":
            self.told.append(text)

    def run(self) -> None:
        try:
            self.counts = self.runner.run(self.items)
        except BaseException as error:
            self.error = error

    def wait_for(self, words: str, seconds: float = 120.0) -> None:
        deadline = time.monotonic() + seconds
        while not any(words in text for text in self.told):
            assert time.monotonic() < deadline, f"nothing said {words!r}, only {self.told}, error {self.error}"
            time.sleep(0.1)

    def ended(self) -> dict[str, int]:
        self.join(60)
        assert not self.is_alive()
        if self.error:
            raise self.error
        return self.counts


def test_workers_whose_memory_is_full_are_named_and_the_run_goes_on_when_it_is_free(client, tmp_path):
    def fill(dask_worker) -> None:
        import psutil

        dask_worker.ballast = bytearray(os.urandom(1)) * int(MEMORY * 0.87 - psutil.Process().memory_info().rss)

    def free(dask_worker) -> None:
        del dask_worker.ballast

    client.run(fill)
    deadline = time.monotonic() + 120
    while any(w["status"] != "paused" for w in client.scheduler_info(n_workers=-1)["workers"].values()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    run = _Run(client, tmp_path)
    run.wait_for("all 1 workers are paused because their memory is full")
    client.run(free)
    assert run.ended()["done"] == 6


def test_a_worker_that_hangs_is_named(client, cluster, tmp_path):
    run = _Run(client, tmp_path, seconds=0.2)
    (worker,) = cluster.workers()
    os.kill(worker, signal.SIGSTOP)
    try:
        run.wait_for("1 of 1 workers are silent")
    finally:
        os.kill(worker, signal.SIGCONT)
    assert run.ended()["done"] == 6


def test_a_scheduler_that_hangs_is_named_and_the_run_goes_on_when_it_wakes(client, cluster, tmp_path):
    run = _Run(client, tmp_path, seconds=0.3)
    os.kill(cluster.scheduler, signal.SIGSTOP)
    try:
        run.wait_for("the scheduler does not answer")
    finally:
        os.kill(cluster.scheduler, signal.SIGCONT)
    assert run.ended()["done"] == 6


def test_without_workers_the_run_waits_says_so_and_goes_on_when_one_comes(client, cluster, tmp_path):
    for nanny in cluster.nannies():
        os.killpg(nanny, signal.SIGKILL)
    while client.nthreads():
        time.sleep(0.1)
    run = _Run(client, tmp_path)
    run.wait_for("there are no workers")
    cluster.replace()
    assert run.ended()["done"] == 6


def test_waiting_for_a_task_that_is_not_of_a_map_says_why_too(client, cluster, tmp_path):
    told: list[str] = []

    def until_there(path: str) -> None:
        while not os.path.exists(path):
            time.sleep(0.02)

    def tell(text: str) -> None:
        told.append(text)
        (tmp_path / "go").touch()

    future = client.submit(until_there, str(tmp_path / "go"), pure=False)
    Watch(client, tell, patience_seconds=1.0).wait([future], "1 task is out")
    assert future.done()
    assert "1 workers are busy (1 task is out)" in told[0]


def test_what_pools_wait_for_is_told_in_their_own_words_and_nothing_of_it_where_there_are_none(client, cluster):
    watch = Watch(client, print)
    watch.look()
    assert watch.reason() == "1 workers are busy"
    watch.missing = "pool huge: jobs are pending (2 PartitionConfig)"  # as a scheduler with pools answers
    assert watch.reason() == f"1 workers are busy; {watch.missing}"
    watch.workers = {}
    assert watch.reason() == f"there are no workers: {watch.missing}"


def test_a_client_that_closes_between_two_looks_ends_the_run_in_the_same_way(cluster, tmp_path):
    client = Client(cluster.address)

    def items() -> Iterator[Item]:
        yield Item(0, "item0", "content 0")
        client.close()  # as one that has lost its scheduler closes itself
        yield Item(1, "item1", "content 1")

    with pytest.raises(ClusterError, match="The scheduler is gone"):
        MapRunner(client, FaultyJob(tmp_path)).run(items())


def test_a_client_that_fails_to_come_back_in_a_way_of_its_own_ends_the_run_too(cluster, tmp_path, monkeypatch):
    async def cut(self: Client, timeout: float | None = None) -> None:
        raise ValueError("IOStream is not idle")  # as of tornado, where a connection breaks just before its encryption begins

    client = Client(cluster.address)
    run = _Run(client, tmp_path, count=400, seconds=0.3)
    time.sleep(1.0)
    monkeypatch.setattr(Client, "_ensure_connected", cut)
    client.loop.add_callback(client.scheduler_comm.comm.abort)
    with pytest.raises(ClusterError, match=r"The scheduler is gone \(client connecting\)"):
        run.ended()
    client._handle_report_task = None  # close() would raise what it raised
    client.close()


def test_a_scheduler_that_is_gone_ends_the_run_with_the_way_out(client, cluster, tmp_path):
    run = _Run(client, tmp_path, count=40, seconds=0.3)
    time.sleep(1.0)
    os.kill(cluster.scheduler, signal.SIGKILL)
    with pytest.raises(ClusterError, match="The scheduler is gone") as error:
        run.ended()
    assert "rerun the same command" in str(error.value)
