"""GPU or CPU: chosen when an item is sent, from what is free then. Slurm hands out pretended GPUs, so nothing here computes on one."""

from __future__ import annotations

import os
import signal
import time

import numpy as np
import pytest
from _particles import blob_map, simulate
from distributed import Client, LocalCluster
from hypothesis import given
from hypothesis import strategies as st

import cryodask.run.map as map_module
from cryodask.cluster import LaneCluster, connect
from cryodask.cluster.connect import close
from cryodask.cluster.settings import parse_settings
from cryodask.cluster.slurm.pools import PoolCluster
from cryodask.errors import ClusterError, PluginError, ProjectFileError
from cryodask.formats.mrc import write_mrc
from cryodask.run.blocks import ParticlesInMemory, iterate_on_workers
from cryodask.run.devices import gpu_items, on_device, with_gpus
from cryodask.run.map import MapRunner
from cryodask.run.recipe import make_plan
from cryodask.run.selection import Wanted
from cryodask.run.session import check_inputs, run_plan
from cryodask.stage import STAGES, Context, Params, Program, Resources, stage
from cryodask.stages.classify2d import Classify2DParams, classify2d
from cryodask.store.journal import Journal
from cryodask.store.project import Item
from cryodask.testing.faults import FaultyJob

_ONE = {"memory": "800MiB"}
_POOLS = {"cpu": {**_ONE, "partition": "cpu", "count": 1}, "gpu": {"memory": "4GiB", "partition": "gpu", "gpus": 2, "cores": 2, "count": 1}}


def _worker(gpus=0, used=0):
    return {"nthreads": 1, "resources": {"GPU": float(gpus)} if gpus else {}, "used_resources": {"GPU": float(used)}}


@pytest.mark.parametrize(
    ("workers", "ours", "expected"),
    [
        ([_worker()], 0, 0),
        ([_worker(), _worker(1)], 0, 2),
        ([_worker(1), _worker(1, used=1)], 0, 2),  # another has one of them
        ([_worker(1, used=1), _worker(1, used=1)], 0, 1),  # others have all: one waits for our share
        ([_worker(1, used=1), _worker(1, used=1)], 1, 2),  # one of ours runs now
        ([_worker(1, used=1), _worker(1, used=1)], 2, 4),
        ([_worker(1, used=1)] * 4, 0, 1),  # ours only wait: their number does not grow
        ([{"nthreads": 1, "resources": {"GPU": 1.0}}], 0, 2),  # a plain Dask scheduler does not say what is used
    ],
)
def test_items_for_gpus_follow_what_others_leave_free(workers, ours, expected):
    assert gpu_items({f"tcp://{n}": w for n, w in enumerate(workers)}, ours) == expected


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=6), st.integers(0, 50))
def test_no_more_than_two_items_a_gpu_are_sent_and_at_least_one_where_there_is_any(given_gpus, ours):
    workers = {str(n): _worker(gpus, min(used, gpus)) for n, (gpus, used) in enumerate(given_gpus)}
    total = sum(gpus for gpus, _ in given_gpus)
    assert min(1, total) <= gpu_items(workers, ours) <= 2 * total
    assert len(with_gpus(workers)) == sum(gpus > 0 for gpus, _ in given_gpus)


@pytest.mark.parametrize(("visible", "expected"), [(None, ["", "0", "1"]), ("5,GPU-3f,7", ["", "5", "GPU-3f"])])
def test_local_workers_have_a_gpu_each_or_see_none(tmp_path, monkeypatch, visible, expected):
    def device(number=0):  # inside a function it travels by value: workers need not import this module
        return os.environ.get("CUDA_VISIBLE_DEVICES")

    def devices():
        return sorted(client.run(device).values())

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    (tmp_path / "here.yaml").write_text("kind: local\nworkers: 3\ngpus: 2\n")
    client = connect(tmp_path / "here.yaml")
    try:
        client.wait_for_workers(3)
        assert devices() == expected
        workers = client.scheduler_info(n_workers=-1)["workers"]
        assert len(with_gpus(workers)) == 2
        assert gpu_items(workers, 0) == 4
        where = {client.submit(device, i, resources={"GPU": 1}).result(30) for i in range(6)}
        assert where <= set(expected[1:])
        if visible is None:
            return
        victim = next(iter(with_gpus(workers)))
        os.kill(client.run(os.getpid, workers=[victim])[victim], signal.SIGKILL)
        deadline = time.monotonic() + 60
        while victim in client.scheduler_info(n_workers=-1)["workers"] or len(client.nthreads()) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert devices() == expected, "whoever replaces a worker has its GPU"
    finally:
        close(client)


def test_more_gpus_than_workers_or_devices_are_refused(monkeypatch):
    with pytest.raises(ProjectFileError, match="each of the 4 gpus needs its own worker"):
        parse_settings({"kind": "local", "workers": 3, "gpus": 4})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(ValueError, match="gpus is 2, but CUDA_VISIBLE_DEVICES gives this process only 3"):
        LaneCluster(n_workers=2, gpus=2)


def test_a_worker_whose_torch_sees_no_gpu_says_so_and_stops_the_run():
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ClusterError, match="its torch sees no GPU") as raised, on_device("cuda") as context:
        torch.zeros(1, device=context.device)
    assert raised.value.on_failure == "stop"


@pytest.fixture(scope="module")
def gpu_client(slurm, tmp_path_factory):
    content = {"kind": "slurm", "interface": "lo", "poll_seconds": 0.5, "logs": str(tmp_path_factory.mktemp("logs")), "pools": _POOLS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", slurm.environ["SLURM_CONF"])
        with PoolCluster(parse_settings({**content, "lanes": {"batch": 1, "learning": 1}})) as cluster:
            cluster.scale_pool(cpu=1, gpu=1)
            with Client(cluster, name="batch/anna") as client:
                client.wait_for_workers(3, timeout=120)
                yield client


def _records(folder):
    return list(Journal(folder / "journal").read().records.values())


@pytest.mark.slurm
def test_items_go_to_gpus_and_cpus_each_gpu_has_one_at_a_time_and_none_is_lost(gpu_client, tmp_path):
    job = FaultyJob(tmp_path, seconds=0.15)
    counts = MapRunner(gpu_client, job).run(iter([Item(row, f"item{row}", f"content {row}") for row in range(60)]))
    assert counts["done"] == 60
    records = _records(tmp_path)
    on_gpus = [r for r in records if r["device"] == "cuda"]
    # two GPU slots and one thread of a CPU worker, and threads of the workers with GPUs take CPU items besides
    assert 10 <= len(on_gpus) <= 58
    assert {r["gpu"] for r in on_gpus} == {"0", "1"}
    processes = {r["process"] for r in on_gpus}
    assert len(processes) == 2
    assert all(len({r["gpu"] for r in on_gpus if r["process"] == process}) == 1 for process in processes)
    assert {r["device"] for r in records if r["gpu"] == ""} == {"cpu"}


@pytest.mark.slurm
def test_items_that_wait_for_gpus_which_others_keep_go_to_a_cpu_while_a_session_goes_on(gpu_client, tmp_path, monkeypatch):
    monkeypatch.setattr(map_module, "_GPU_PATIENCE_SECONDS", 1.0)
    said = []
    with Client(gpu_client.scheduler.address, name="learning/ben", set_as_default=False) as other:

        def keep(path):
            while not os.path.exists(path):
                time.sleep(0.05)

        kept = [other.submit(keep, str(tmp_path / "go"), resources={"GPU": 1}, pure=False) for _ in range(2)]
        while sum(map(len, gpu_client.processing().values())) < 2:
            time.sleep(0.05)
        job = FaultyJob(tmp_path, seconds=0.05)
        runner = MapRunner(gpu_client, job, event=lambda kind, item, text: said.append(text))

        def session():
            yield from (Item(row, f"item{row}", f"content {row}") for row in range(8))
            while len(_records(tmp_path)) < 8:  # it ends when all of them are done, and not before
                yield None

        counts = runner.run(session())
        assert counts == {"seen": 8, "done": 8, "quarantined": 0, "running": 0, "waiting": 0}
        assert {r["device"] for r in _records(tmp_path)} == {"cpu"}
        assert "no GPU became free; it runs on a CPU" in said
        (tmp_path / "go").touch()
        other.gather(kept)


@pytest.mark.slurm
def test_blocks_go_to_the_workers_with_gpus_which_say_so_when_torch_sees_none(gpu_client, tmp_path):
    images, of, _, _ = simulate(blob_map(32), 200, pixel=5.0, snr=0.2)
    params = Classify2DParams(classes=2, resolution_angstrom=16.0, iterations=1)
    with pytest.raises(ClusterError, match="its torch sees no GPU"):
        iterate_on_workers(gpu_client, "classify2d", classify2d.functions, params, ParticlesInMemory(of, images), {}, tmp_path / "points")


# --- stages that need one ----------------------------------------------------------------------------------------------------------
class NoParams(Params):
    """None."""


@pytest.fixture
def on_gpu():
    """A stage that needs a GPU and gives a mask from where it ran."""

    def needs_gpu(params: NoParams, *, half_map, context: Context):
        """Says where it ran."""
        return {"solvent_mask": np.full(half_map.shape[1:], float(context.device == "cuda"), np.float32)}

    made = stage(version=1, shape="whole", needs=["half_map"], gives=["solvent_mask"], resources=Resources(gpus=1))(needs_gpu)
    yield made
    del STAGES["needs_gpu"]


def test_a_stage_that_needs_a_gpu_is_refused_before_work_where_no_worker_has_one_and_goes_to_one_that_has(on_gpu, tmp_path):
    for seed, name in enumerate(("half1", "half2")):
        write_mrc(tmp_path / f"{name}.mrc", np.random.default_rng(seed).normal(size=(8, 8, 8)).astype(np.float32), 1.0)
    (tmp_path / "p.yaml").write_text("name: p\ninputs: {half_maps: [half1.mrc, half2.mrc]}\npipeline: [needs_gpu]\n")
    plan = make_plan(tmp_path / "p.yaml")
    with pytest.raises(ProjectFileError, match="needs_gpu needs a GPU, but no worker of local has one"):
        check_inputs(plan)
    (tmp_path / "gpus.yaml").write_text("kind: local\nworkers: 1\ngpus: 1\n")
    assert check_inputs(plan, Wanted(cluster=str(tmp_path / "gpus.yaml"))) == []
    with LocalCluster(1, threads_per_worker=1, processes=False, dashboard_address=None, resources={"GPU": 1}) as cluster:
        with Client(cluster) as client:
            assert float(run_plan(plan, client)["needs_gpu"]["solvent_mask"].min()) == 1.0


def test_items_that_need_a_gpu_go_to_no_other_worker_also_when_they_are_tried_again(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(map_module, "_GPU_PATIENCE_SECONDS", 0.0)
    with LaneCluster(n_workers=2, gpus=1) as cluster, Client(cluster, name="batch/anna") as client:
        client.wait_for_workers(2)
        job = FaultyJob(tmp_path, {5: "os-error-once", 7: "raise"}, seconds=0.05)
        items = [Item(row, f"item{row}", f"content {row}") for row in range(20)]
        counts = MapRunner(client, job, needs_gpu=True).run(iter(items))
    assert (counts["done"], counts["quarantined"]) == (19, 1)
    records = [r for r in _records(tmp_path) if r["ok"]]
    assert {(r["device"], r["gpu"]) for r in records} == {("cuda", "0")}


@pytest.mark.parametrize(("shape", "gpus", "programs"), [("map", 2, 0), ("set", 1, 0), ("set", 0, 1)])
def test_what_no_runner_can_place_is_refused_when_it_is_registered(shape, gpus, programs):
    def wrong(params: NoParams, inputs=None, *, context=None, particle_id=None):
        """Nothing."""

    options = {"resources": Resources(gpus=gpus), "programs": [Program("ls")] * programs}
    with pytest.raises(PluginError, match=f"asks for {gpus} GPUs, 0 licences and {programs} programs"):
        stage(version=1, shape=shape, needs=["particle_id"], gives=["particle_id"], **options)(wrong)
    assert "wrong" not in STAGES
