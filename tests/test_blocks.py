"""The block runner: the same bits for any number of workers and after any death, and what it moves is what its cost model says."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _particles import blob_map, simulate
from distributed import Client, LocalCluster
from hypothesis import given
from hypothesis import strategies as st

from cryodask.cluster.connect import close, connect
from cryodask.run.blocks import ParticlesInMemory, iterate_here, iterate_on_workers
from cryodask.run.checkpoints import last_checkpoint, write_checkpoint
from cryodask.run.leaves import Leaf, cut_leaves, home_of_leaves, merges, settle, traffic
from cryodask.stage import ParticleSet
from cryodask.stages.classify2d import Classify2DParams, classify2d

PARAMS = Classify2DParams(classes=4, resolution_angstrom=16.0, shift_range_angstrom=12.0, iterations=3)


class Slow:
    """classify2d with a pause before each block, which is noted in a file: time to be killed."""

    halves = 1
    start = staticmethod(classify2d.functions.start)
    cache_key = staticmethod(classify2d.functions.cache_key)
    load = staticmethod(classify2d.functions.load)
    prepare = staticmethod(classify2d.functions.prepare)
    maximise = staticmethod(classify2d.functions.maximise)
    finished = staticmethod(classify2d.functions.finished)
    result = staticmethod(classify2d.functions.result)

    def __init__(self, log: Path, pause_seconds: float) -> None:
        self.log, self.pause_seconds = log, pause_seconds

    def expect(self, params: Any, state: Any, shared: Any, block: Any, previous: Any, context: Any) -> Any:
        with open(self.log, "a", encoding="utf-8") as file:
            file.write(f"{os.getpid()} {state['iteration']} {block.index[0]}\n")
        time.sleep(self.pause_seconds)
        return classify2d.functions.expect(params, state, shared, block, previous, context)


def done(log: Path) -> list[tuple[int, ...]]:
    """(process, iteration, first particle) of every block that was begun."""
    return [tuple(map(int, line.split())) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []


@pytest.fixture(scope="module")
def particles() -> ParticlesInMemory:
    images, of, _, _ = simulate(blob_map(32), 400, pixel=5.0, snr=0.2)
    return ParticlesInMemory(of, images)


@pytest.fixture(scope="module")
def alone(particles: ParticlesInMemory) -> dict[str, Any]:
    """The result in this process."""
    return iterate_here(classify2d.functions, PARAMS, particles)


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(np.asarray(a[k]).tobytes() == np.asarray(b[k]).tobytes() for k in a)


@pytest.fixture(scope="module")
def three() -> Iterator[Client]:
    """Three workers, to be killed: they come back."""
    client = connect("local", workers=3)
    yield client
    close(client)


@pytest.fixture(scope="module")
def one() -> Iterator[Client]:
    with LocalCluster(1, threads_per_worker=1, processes=False, dashboard_address=None) as cluster, Client(cluster) as made:
        yield made


@pytest.mark.parametrize("workers", [1, 3])
def test_the_bits_are_the_same_for_any_number_of_workers(workers, particles, alone, tmp_path, request):
    log = tmp_path / "log"
    client = request.getfixturevalue({1: "one", 3: "three"}[workers])
    result = iterate_on_workers(client, "classify2d", Slow(log, 0.0), PARAMS, particles, {}, tmp_path / "checkpoints")
    assert same(result, alone)
    leaves = len(cut_leaves(particles.set, 1))
    assert len(done(log)) == 4 * leaves
    homes = {(process, first) for process, _, first in done(log)}
    assert len(homes) == leaves, "a block moved from one worker to another"
    assert len({process for process, _ in homes}) == workers


def test_a_killed_worker_costs_its_own_blocks_only_and_has_them_back_later(three, particles, alone, tmp_path):
    log = tmp_path / "log"
    victims: list[int] = []

    def kill() -> None:
        deadline = time.monotonic() + 60.0
        while not victims and time.monotonic() < deadline:
            begun = [process for process, iteration, _ in done(log) if iteration == 1]
            twice = [p for p in begun if begun.count(p) == 2]
            if twice:
                os.kill(twice[0], signal.SIGKILL)
                victims.append(twice[0])
            time.sleep(0.02)

    killer = threading.Thread(target=kill)
    killer.start()
    result = iterate_on_workers(
        three, "classify2d", Slow(log, 0.3), PARAMS, particles, {}, tmp_path / "checkpoints",
        on_iteration=lambda state, metrics: three.wait_for_workers(3, timeout=120),
    )  # fmt: skip
    killer.join()
    assert same(result, alone)
    leaves = len(cut_leaves(particles.set, 1))
    by_iteration = [[(process, first) for process, i, first in done(log) if i == iteration] for iteration in range(4)]
    of_victim = {first for process, first in by_iteration[0] if process == victims[0]}
    assert [len(by_iteration[i]) for i in (0, 2, 3)] == [leaves] * 3
    begun = sorted(first for process, first in by_iteration[1] if process == victims[0])
    firsts = [first for _, first in by_iteration[1]]
    again = sorted(first for first in set(firsts) for _ in range(firsts.count(first) - 1))
    assert len(begun) >= 2
    assert again == begun, "what the dead worker had done and the block at work are done again, each once, and no other"
    assert len(firsts) == leaves + len(begun)
    twice = [first for _, first in by_iteration[1] if [f for _, f in by_iteration[1]].count(first) == 2]
    assert set(twice) <= of_victim
    survivor = {process for process, _ in by_iteration[0]} - {victims[0]}
    assert {first for process, first in by_iteration[3] if process not in survivor} == of_victim, "they are home again"


def test_an_error_of_the_stage_ends_the_iteration_with_that_error(client, particles, tmp_path):
    class Broken(Slow):
        def expect(self, *arguments: Any) -> Any:
            raise ValueError("this block cannot be done")

    with pytest.raises(ValueError, match="this block cannot be done"):
        iterate_on_workers(client, "classify2d", Broken(tmp_path / "log", 0.0), PARAMS, particles, {}, tmp_path / "checkpoints")


def a_set(count: int) -> ParticleSet:
    return ParticleSet(count, 32, 1.0, {"half_set": np.arange(count) % 2})


@given(st.integers(1, 300_000), st.sampled_from([1, 2]))
def test_leaves_hold_every_particle_once_and_never_too_many(count, halves):
    leaves = cut_leaves(a_set(count), halves)
    assert np.array_equal(np.sort(np.concatenate([leaf.index for leaf in leaves])), np.arange(count))
    assert max(len(leaf.index) for leaf in leaves) <= 2000
    assert [leaf.number for leaf in leaves] == list(range(len(leaves)))
    for half in range(halves):
        own = [len(leaf.index) for leaf in leaves if leaf.half == half]
        assert len(own) in {2**k for k in range(12)} or count < halves
        assert len(own) < 2 or sum(own) >= 50 * len(own)


@given(st.integers(1, 70))
def test_the_tree_adds_every_leaf_once(count):
    sums = {number: {number} for number in range(count)}
    for merge in merges([Leaf(n, 0, np.arange(1)) for n in range(count)], 0):
        added = sums.pop(merge.right)
        assert not sums[merge.left] & added
        sums[merge.left] |= added
    assert sums == {0: set(range(count))}


def test_neighbours_live_together_and_a_dead_worker_keeps_its_place():
    names = ["0", "1", "2", "3"]
    places = settle([], names)
    assert home_of_leaves(8, places, names) == ["0", "0", "1", "1", "2", "2", "3", "3"]
    alive = ["0", "2", "3"]
    places = settle(places, alive)
    assert home_of_leaves(8, places, alive) == ["0", "0", "0", "2", "2", "2", "3", "3"]
    assert home_of_leaves(8, settle(places, names), names) == ["0", "0", "1", "1", "2", "2", "3", "3"]
    assert home_of_leaves(8, settle(places, ["0", "2", "3", "9"]), ["0", "2", "3", "9"]) == ["0", "0", "9", "9", "2", "2", "3", "3"]
    assert home_of_leaves(4, settle(["0"], names), names) == names


@pytest.mark.parametrize(("workers", "halves", "moves"), [(1, 1, 0), (2, 1, 1), (4, 1, 3), (8, 1, 7), (2, 2, 1), (4, 2, 3), (3, 1, 3)])
def test_the_cost_model_counts_one_sum_a_worker_but_the_first(workers, halves, moves):
    leaves = cut_leaves(a_set(16_000), halves)
    names = [str(n) for n in range(workers)]
    homes = home_of_leaves(len(leaves), settle([], names), names)
    cost = traffic(leaves, homes, sums_bytes=10**6, state_bytes=10**5, up_bytes=0, down_bytes=8)
    assert cost.between_workers == moves * 10**6
    assert (cost.state_read, cost.down, cost.up) == (workers * 10**5, 16_000 * 8, 10**5)


def test_the_cost_model_counts_the_columns_that_ride_with_the_sums():
    leaves = [Leaf(n, 0, np.arange(100)) for n in range(4)]
    # 1 is added to 0 where both lie, 3 goes to 2 with 100 particles, then 2 to 0 with 200
    cost = traffic(leaves, ["a", "a", "b", "c"], sums_bytes=1000, state_bytes=50, up_bytes=3)
    assert cost.between_workers == 1000 + 300 + 1000 + 600
    assert (cost.down, cost.up) == (400 * 11, 50 + 400 * 3)


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_counts(tmp_path):
    first = write_checkpoint(tmp_path, {"iteration": 1, "map": np.arange(3.0)}, {"score": np.arange(2)})
    second = write_checkpoint(tmp_path, {"iteration": 2, "map": np.arange(4.0)}, {})
    second.write_bytes(second.read_bytes()[:-40])
    path, state, columns = last_checkpoint(tmp_path)
    assert path == first
    assert state["iteration"] == 1
    assert np.array_equal(columns["score"], [0, 1])
    assert list(tmp_path.glob("*.damaged"))
