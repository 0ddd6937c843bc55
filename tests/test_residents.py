"""What workers keep between tasks: made once however many threads ask, bounded, whose it is, and gone when the run is over."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import dask
import numpy as np
import psutil
import pytest
from _particles import blob_map, simulate
from distributed import Client, get_worker
from hypothesis import given
from hypothesis import strategies as st

from cryodask.cluster import LaneCluster
from cryodask.cluster.connect import connect
from cryodask.cluster.sharing.memory import RESIDENTS_METRIC
from cryodask.run import residents
from cryodask.run.blocks import ParticlesInMemory, iterate_here, iterate_on_workers
from cryodask.run.residents import RESIDENTS, Residents, Run, size_of
from cryodask.stages.classify2d import Classify2DParams, classify2d
from cryodask.stages.refine3d import Refine3DParams, refine3d

RUN, OTHER = Run("anna", "1"), Run("ben", "2")
MB = 1 << 20


def array(megabytes: int = 1) -> np.ndarray:
    return np.ones(megabytes * MB, np.uint8)


# --- one process ---------------------------------------------------------------------------------------------------------------
def test_one_thread_makes_and_the_others_wait():
    kept, made, got = Residents(100 * MB), [], []
    begun, go = threading.Event(), threading.Event()

    def make() -> np.ndarray:
        made.append(threading.get_ident())
        begun.set()
        assert go.wait(30)
        return array()

    threads = [threading.Thread(target=lambda: got.append(kept.get(RUN, "a", make))) for _ in range(8)]
    for thread in threads:
        thread.start()
    assert begun.wait(30)
    go.set()
    for thread in threads:
        thread.join(30)
    assert len(made) == 1
    assert all(one is got[0] for one in got)
    assert len(got) == 8


def test_of_a_failure_the_next_one_tries_again():
    kept = Residents(100 * MB)

    def fail() -> None:
        raise OSError("no disk")

    with pytest.raises(OSError, match="no disk"):
        kept.get(RUN, "a", fail)
    assert kept.get(RUN, "a", lambda: 3) == 3


def test_another_stamp_replaces_and_frees_first():
    kept, alive = Residents(100 * MB), []
    kept.get(RUN, "a", lambda: array(3), stamp=1)

    def make() -> np.ndarray:
        alive.append(kept.bytes_by_client())
        return array(2)

    kept.get(RUN, "a", make, stamp=2)
    assert alive == [{}]
    assert kept.bytes_by_client() == {"anna": 2 * MB}


def test_what_was_used_longest_ago_goes_when_the_memory_is_full():
    kept = Residents(10 * MB)
    for key in "abc":
        kept.get(RUN, key, lambda: array(3))
    kept.get(RUN, "a", lambda: pytest.fail("it is there"))
    kept.get(RUN, "d", lambda: array(3))
    kept.get(RUN, "a", lambda: pytest.fail("it was used"))
    assert kept.get(RUN, "b", lambda: "made again") == "made again"
    assert sum(kept.bytes_by_client().values()) <= 10 * MB


def test_a_thing_larger_than_the_limit_is_kept_alone():
    kept = Residents(2 * MB)
    kept.get(RUN, "a", array)
    kept.get(RUN, "large", lambda: array(5))
    kept.get(RUN, "large", lambda: pytest.fail("it is there"))
    assert kept.bytes_by_client() == {"anna": 5 * MB}


def test_the_end_of_a_run_frees_its_own_things_only():
    kept = Residents(100 * MB)
    kept.get(RUN, "a", array)
    kept.get(OTHER, "a", lambda: array(2))
    kept.release(RUN)
    assert kept.bytes_by_client() == {"ben": 2 * MB}


def test_a_run_of_which_nothing_was_heard_for_long_is_over(monkeypatch):
    kept, now = Residents(100 * MB), [0.0]
    monkeypatch.setattr(residents.time, "monotonic", lambda: now[0])
    kept.get(RUN, "a", array)
    now[0] = residents.IDLE_SECONDS - 1
    kept.get(OTHER, "a", array)
    now[0] += 2
    assert kept.bytes_by_client() == {"ben": MB}, "a heartbeat asks, so an idle worker frees it, too"


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4), st.integers(0, 2)), max_size=60))
def test_the_bytes_are_those_of_what_is_there(asked):
    kept = Residents(6 * MB)
    for key, megabytes, stamp in asked:
        kept.get(RUN, key, lambda m=megabytes: array(m), stamp=stamp)
        held = sum(kept.bytes_by_client().values())
        assert held == sum(entry.value.nbytes for entry in kept._entries.values())
        assert held <= 6 * MB or len(kept._entries) == 1
    assert not kept._making


def test_size_counts_arrays_and_tensors_once():
    import torch

    one = array()
    assert size_of({"a": one, "b": [one, torch.zeros(MB)], "text": "x" * 1000}) == MB + 4 * MB
    assert size_of(b"1234") == 4


def kept_here() -> dict[str, int]:
    """Asked on a worker: that process has residents of its own."""
    return residents.RESIDENTS.bytes_by_client()


# --- block stages: the same bits with one thread and with four -------------------------------------------------------------------
def particles(stage: str, count: int = 160) -> tuple[Any, Any, ParticlesInMemory, dict[str, Any]]:
    volume = blob_map(32, "D2" if stage == "refine3d" else "C1")
    images, of, _, _ = simulate(volume, count, pixel=5.0, snr=0.2)
    if stage == "classify2d":
        params: Any = Classify2DParams(classes=4, resolution_angstrom=16.0, shift_range_angstrom=12.0, iterations=3)
        return classify2d.functions, params, ParticlesInMemory(of, images), {}
    params = Refine3DParams(symmetry="D2", lowpass_angstrom=30, iterations=1)
    inputs = {"final_map": volume.numpy(), "map_pixel_size_angstrom": 5.0}
    return refine3d.functions, params, ParticlesInMemory(of, images), inputs


@pytest.fixture(scope="module")
def four_threads():
    with LaneCluster(n_workers=1, threads_per_worker=4, dashboard_address="127.0.0.1:0") as cluster, Client(cluster) as client:
        yield client


@pytest.mark.parametrize("stage", ["classify2d", "refine3d"])
def test_a_block_stage_gives_the_same_bits_with_one_and_with_four_threads(stage, four_threads, tmp_path):
    functions, params, of, inputs = particles(stage)
    alone = iterate_here(functions, params, of, inputs)
    found = iterate_on_workers(four_threads, stage, functions, params, of, inputs, tmp_path / "checkpoints")
    left = four_threads.run(kept_here)
    assert found.keys() == alone.keys()
    for name in alone:
        assert np.asarray(found[name]).tobytes() == np.asarray(alone[name]).tobytes(), name
    assert set(map(str, left.values())) == {"{}"}, "nothing is kept once the run is over"


def test_a_block_stage_that_fails_in_this_process_leaves_nothing_behind():
    functions, params, of, inputs = particles("classify2d")
    before = RESIDENTS.bytes_by_client()  # what other tests left in this process

    def stop(*iteration: Any) -> None:
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        iterate_here(functions, params, of, inputs, on_iteration=stop)
    assert RESIDENTS.bytes_by_client() == before


@pytest.mark.heavy
def test_runs_one_after_the_other_leave_the_worker_as_the_first_left_it(tmp_path):
    functions, params, of, inputs = particles("classify2d", 400)
    params = params.model_copy(update={"iterations": 1})
    with LaneCluster(n_workers=1, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster, Client(cluster) as client:
        sizes = []
        for number in range(6):
            iterate_on_workers(client, "classify2d", functions, params, of, inputs, tmp_path / str(number))
            (size,) = client.run(lambda: psutil.Process(os.getpid()).memory_info().rss).values()
            sizes.append(size)
    assert max(sizes[1:]) <= 1.05 * sizes[0] + 8 * MB, sizes


# --- the scheduler's accounts ------------------------------------------------------------------------------------------------------
def hold(run: Run, megabytes: int) -> str:
    RESIDENTS.get(run, "a", lambda: array(megabytes))
    return str(get_worker().address)


def test_what_runs_keep_counts_for_the_memory_of_their_lane():
    options = {"lanes": {"live": 1, "hpda": 1}, "memory_share": {"hpda": 0.5}}
    with (
        LaneCluster(n_workers=1, threads_per_worker=1, dashboard_address="127.0.0.1:0", **options) as cluster,
        Client(cluster, name="hpda/anna") as client,
    ):
        run = residents.new_run(client)
        client.submit(hold, run, 40, pure=False).result(30)
        scheduler = cluster.scheduler
        deadline = time.monotonic() + 60
        while scheduler.memory_by_lane().get("hpda", 0) < 40 * MB:
            assert time.monotonic() < deadline, [ws.metrics.get(RESIDENTS_METRIC) for ws in scheduler.workers.values()]
            time.sleep(0.1)
        residents.release_everywhere(client, run, [*scheduler.workers])
        while scheduler.memory_by_lane().get("hpda", 0) >= 40 * MB:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_telling_workers_that_have_gone_leaves_no_task_behind():
    with dask.config.set({"distributed.worker.profile.enabled": False}):
        client = connect("local", workers=1)
        try:
            run = residents.new_run(client)
            residents.release_everywhere(client, run, ["tcp://127.0.0.1:9"])
            deadline = time.monotonic() + 120
            while any("release" in str(key) for key in client.cluster.scheduler.tasks):
                assert time.monotonic() < deadline
                time.sleep(0.05)
        finally:
            client.close()
            client.cluster.close()


def test_a_task_keeps_things_for_its_own_run(tmp_path: Path):
    with residents.in_run(RUN):
        assert residents.keep("x", lambda: 1) == 1
    with residents.in_run(OTHER):
        assert residents.keep("x", lambda: 2) == 2
    residents.release(RUN)
    residents.release(OTHER)


@pytest.mark.heavy
def test_code_counts_for_nothing():
    assert size_of({"functions": refine3d.functions, "kind": Refine3DParams, "image": np.zeros(10)}) == 80
