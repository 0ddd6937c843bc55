"""The block runner: iterations over blocks of particles, bit-identical for any number of workers and after any worker's death.

An iteration is: expectation tasks on leaves (fixed runs of particles, cached on the worker where they live), sums added in a tree whose
shape depends on the number of leaves only, one maximisation task, a checkpoint. Workers read the state from the checkpoint file, so
that nothing is lost with a worker. :func:`cryodask.run.leaves.traffic` records the bytes that an iteration moves.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import cloudpickle
import numpy as np
from distributed import Client, Future, KilledWorker, wait
from distributed.client import FuturesCancelledError

from cryodask.errors import ClusterError, InputError
from cryodask.run.checkpoints import last_checkpoint, read_state, write_checkpoint
from cryodask.run.devices import CPU_DEVICE, GPU_DEVICE, dask_resources, on_device, with_gpus
from cryodask.run.events.reports import report_of
from cryodask.run.health import Watch
from cryodask.run.isolation import blamed_at_first_death
from cryodask.run.leaves import Leaf, cut_leaves, home_of_leaves, merges, settle
from cryodask.run.particles import StoredParticles, particle_block
from cryodask.run.residents import RESIDENTS, Run, new_run, release_everywhere, run_here
from cryodask.stage import Columns, Context, Metrics, ParticleBlock, ParticleSet, State, Sums
from cryodask.store.environments import MADE_IN, environment
from cryodask.store.generation import disk_errors

_DEATHS_ALLOWED = 5


class Particles(Protocol):
    """What the runner needs from a particle set: :class:`StoredParticles`, or a stack in memory."""

    @property
    def set(self) -> ParticleSet:
        """All columns of the set."""
        ...

    def block(self, index: np.ndarray, half: int = 0) -> ParticleBlock:
        """Some particles with their images."""
        ...


@dataclass(frozen=True)
class ParticlesInMemory:
    """A particle set with its images, for tests, notebooks and benchmarks."""

    set: ParticleSet
    images: np.ndarray

    def block(self, index: np.ndarray, half: int = 0) -> ParticleBlock:
        """Some particles with their images."""
        columns = {name: values[index] for name, values in self.set.columns.items()}
        return particle_block(index, np.asarray(self.images[index], np.float32), columns, self.set.pixel_size_angstrom, half)


@dataclass(frozen=True)
class BlockJob:
    """What every task of a run needs; pickled once, unpickled once per process."""

    name: str
    functions: Any
    params: Any
    particles: Particles
    topic: str = ""


# --- the arithmetic of an iteration, the same in a worker and in this process ----------------------------------------------
def _expect(job: BlockJob, run: Run, state: State, leaf: Leaf, previous: Columns, context: Context) -> tuple[Sums, dict[int, Columns]]:
    f, p = job.functions, job.params
    iteration = int(state["iteration"]), context.device
    shared = RESIDENTS.get(run, ("shared", leaf.half), lambda: f.prepare(p, state, leaf.half, context), stamp=iteration)
    loaded = f.cache_key(p, state), context.device
    block = RESIDENTS.get(
        run, ("leaf", leaf.number), lambda: f.load(p, state, job.particles.block(leaf.index, leaf.half), context), stamp=loaded
    )
    sums, columns = f.expect(p, state, shared, block, previous, context)
    return sums, {leaf.number: columns}


def add_sums(a: Sums, b: Sums) -> Sums:
    """Sum of two dicts of arrays and numbers."""
    return {k: a[k] + b[k] for k in a}


def _merge(a: tuple[Sums, dict[int, Columns]], b: tuple[Sums, dict[int, Columns]]) -> tuple[Sums, dict[int, Columns]]:
    return add_sums(a[0], b[0]), {**a[1], **b[1]}


def _joined_columns(particles: ParticleSet, leaves: list[Leaf], found: dict[int, Columns]) -> Columns:
    out: Columns = {}
    for leaf in leaves:
        for name, values in found[leaf.number].items():
            values = np.asarray(values)
            if name not in out:
                out[name] = np.zeros((particles.count, *values.shape[1:]), values.dtype)
            out[name][leaf.index] = values
    return out


# --- in this process: for tests, notebooks and benchmarks --------------------------------------------------------------------
def iterate_here(
    functions: Any,
    params: Any,
    particles: Particles,
    inputs: dict[str, Any] | None = None,
    *,
    context: Context | None = None,
    on_iteration: Callable[[State, Metrics, Columns], None] = lambda state, metrics, columns: None,
) -> dict[str, Any]:
    """Run a blocks stage to its end in this process; same leaves and tree, bit-identical to workers with one thread."""
    job = BlockJob("here", functions, params, particles)
    leaves = cut_leaves(particles.set, functions.halves)
    state = functions.start(params, particles.set, inputs or {})
    columns: Columns = {}
    with run_here() as run, context or Context() as context:
        while not functions.finished(params, state):
            sums: dict[int, tuple[Sums, dict[int, Columns]]] = {}
            for leaf in leaves:
                previous = {name: values[leaf.index] for name, values in columns.items()}
                sums[leaf.number] = _expect(job, run, state, leaf, previous, context)
            for half in range(functions.halves):
                for merge in merges(leaves, half):
                    sums[merge.left] = _merge(sums[merge.left], sums.pop(merge.right))
            columns = _joined_columns(particles.set, leaves, {k: v for part in sums.values() for k, v in part[1].items()})
            state, metrics = functions.maximise(params, state, [part[0] for part in sums.values()], context)
            on_iteration(state, metrics, columns)
    result: dict[str, Any] = functions.result(params, state, columns)
    return result


# --- on workers ------------------------------------------------------------------------------------------------------------------
def _job_and_state(run: Run, job_path: str, state_path: str) -> tuple[BlockJob, State]:
    job = RESIDENTS.get(run, "job", lambda: cloudpickle.loads(Path(job_path).read_bytes()))
    return job, RESIDENTS.get(run, "state", lambda: read_state(Path(state_path)), stamp=state_path)


def _expect_task(run: Run, job_path: str, state_path: str, device: str, leaf: Leaf, previous: Columns) -> tuple[Sums, dict[int, Columns]]:
    job, state = _job_and_state(run, job_path, state_path)
    with on_device(device, report=report_of(job.topic, job.name)) as context:
        return _expect(job, run, state, leaf, previous, context)


def _maximise_task(
    run: Run, job_path: str, state_path: str, device: str, *parts: tuple[Sums, dict[int, Columns]]
) -> tuple[State, Metrics, dict[int, Columns]]:
    job, before = _job_and_state(run, job_path, state_path)
    with on_device(device, report=report_of(job.topic, job.name)) as context:
        state, metrics = job.functions.maximise(job.params, before, [p[0] for p in parts], context)
        metrics = {**metrics, MADE_IN: environment()}
    return state, metrics, {k: v for p in parts for k, v in p[1].items()}


def iterate_on_workers(
    client: Client,
    name: str,
    functions: Any,
    params: Any,
    particles: StoredParticles,
    inputs: dict[str, Any],
    folder: Path,
    *,
    on_iteration: Callable[[State, Metrics], None] = lambda state, metrics: None,
    tell: Callable[[str], None] = lambda text: None,
    topic: str = "",
) -> dict[str, Any]:
    """Run a blocks stage to its end on the workers of ``client``, with a checkpoint per iteration in ``folder``.

    A killed run resumes from its last checkpoint. ``tell`` is called with the reason when the run stalls. ``topic``:
    see reports.py.

    Raises
    ------
    ClusterError
        When workers die repeatedly, or the scheduler is gone.
    """
    leaves = cut_leaves(particles.set, functions.halves)
    if len({leaf.half for leaf in leaves}) < functions.halves:
        raise InputError(
            f"Stage {name} got {particles.set.count} particles, fewer than one for each of its {functions.halves} half-sets.",
            "almost nothing was picked (wrong diameter or threshold), or curation removed nearly everything",
            "check the picks in the report, change pick or curate, and run again",
        )
    job_path = folder / f"job-{os.urandom(4).hex()}.pickle"
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for left_by_a_dead_driver in folder.glob("job-*.pickle"):
            left_by_a_dead_driver.unlink()
        job_path.write_bytes(cloudpickle.dumps(BlockJob(name, functions, params, particles, topic)))
    path, state, columns = last_checkpoint(folder)
    if path is None:
        state, columns = functions.start(params, particles.set, inputs), {}
        path = write_checkpoint(folder, state, columns)
    watch, run = Watch(client, tell), new_run(client)
    places: list[str] = []
    try:
        while not functions.finished(params, state):
            state, metrics, found = _Iteration(watch, run, job_path, path, leaves, columns, functions.halves).run(places)
            columns = _joined_columns(particles.set, leaves, found)
            older = path
            path = write_checkpoint(folder, state, columns)
            older.unlink(missing_ok=True)
            on_iteration(state, metrics)
    finally:
        release_everywhere(client, run, watch.workers)
    result: dict[str, Any] = functions.result(params, state, columns)
    job_path.unlink(missing_ok=True)
    return result


class _Iteration:
    """One iteration on the workers: every task is bound to a worker; tasks lost with a worker are sent to another.

    The binding is strict. With a mere preference Dask would steal blocks for any worker that is idle for a moment: their images would
    be loaded again there, and the traffic would depend on chance.
    """

    def __init__(self, watch: Watch, owner: Run, job: Path, state: Path, leaves: list[Leaf], columns: Columns, halves: int) -> None:
        self.watch, self.owner, self.job, self.state = watch, owner, job, state
        self.leaves, self.columns, self.halves = leaves, columns, halves
        self.token, self.sent = f"{state.stem}-{os.urandom(3).hex()}", 0
        self.parts: dict[int, Future[Any]] = {}
        self.at: dict[Any, str] = {}  # address of the worker by key
        self.device = CPU_DEVICE

    def run(self, places: list[str]) -> tuple[State, Metrics, dict[int, Columns]]:
        """Run the iteration; ``places`` (see :func:`settle`) is updated in place."""
        todo, deaths, finished = self.leaves, 0, 0
        while True:
            address_of = self._workers()
            places[:] = settle(places, list(address_of))
            homes = home_of_leaves(len(self.leaves), places, list(address_of))
            for leaf in todo:
                self._send_leaf(leaf, address_of[homes[leaf.number]])
            tree = self._send_tree()
            if self._all_done([*self.parts.values(), *tree]):
                found: tuple[State, Metrics, dict[int, Columns]] = tree[-1].result()
                self._release([*self.parts.values(), *tree])
                return found
            self._release(tree)
            while not self.watch.look():  # refresh the list of workers
                time.sleep(0.1)
            todo = [leaf for leaf in self.leaves if self._is_lost(self.parts[leaf.number])]
            self._release([self.parts[leaf.number] for leaf in todo])
            before, finished = finished, sum(future.status == "finished" for future in self.parts.values())
            deaths = 1 if finished > before else deaths + 1
            if deaths > _DEATHS_ALLOWED:
                raise ClusterError(
                    f"Workers died {deaths} times in one iteration without finishing a block.",
                    "they run out of memory (the box is too large for a worker), or their jobs are killed",
                    "give the workers more memory, or use a smaller box; finished iterations are kept",
                )

    def _send(self, kind: str, address: str, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        self.sent += 1
        key = f"{kind}-{self.token}-{self.sent}"
        self.at[key] = address
        needs = None if function is _merge else dask_resources(self.device)
        with blamed_at_first_death():
            return self.watch.client.submit(function, *arguments, workers=[address], resources=needs, key=key, pure=False)

    def _shared(self) -> tuple[Run, str, str, str]:
        return self.owner, str(self.job), str(self.state), self.device

    def _send_leaf(self, leaf: Leaf, address: str) -> None:
        previous = {name: values[leaf.index] for name, values in self.columns.items()}
        self.parts[leaf.number] = self._send(
            "expect", address, _expect_task, self.owner, str(self.job), str(self.state), self.device, leaf, previous
        )

    def _send_tree(self) -> list[Future[Any]]:
        """Send all additions, each to the worker that holds its left operand, and last the maximisation."""
        tree: list[Future[Any]] = []
        sums = dict(self.parts)
        for half in range(self.halves):
            for merge in merges(self.leaves, half):
                left, right = sums[merge.left], sums.pop(merge.right)
                sums[merge.left] = self._send("merge", self.at[left.key], _merge, left, right)
                tree.append(sums[merge.left])
        roots = list(sums.values())
        tree.append(self._send("maximise", self.at[roots[0].key], _maximise_task, *self._shared(), *roots))
        return tree

    def _workers(self) -> dict[str, str]:
        """Address of each worker by name, which survives a restart by the nanny; waits until there is a worker.

        If some have GPUs, only those: a block takes many times as long on a CPU, and the iteration would wait for it.
        """
        self.watch.look()
        while not self.watch.workers:
            time.sleep(0.2)
            self.watch.look(f"iteration of {self.state.parent}")
        chosen = with_gpus(self.watch.workers)
        self.device = GPU_DEVICE if chosen else CPU_DEVICE
        named = {str(worker["name"]): address for address, worker in (chosen or self.watch.workers).items()}
        return {name: named[name] for name in sorted(named, key=lambda n: (len(n), n))}

    def _all_done(self, futures: list[Future[Any]]) -> bool:
        """Wait until all are done (True) or one is lost with its worker (False). The one place where an iteration waits."""
        done = -1
        while not any(self._is_lost(future) for future in futures):
            before, done = done, sum(future.status == "finished" for future in futures)
            if done > before:
                self.watch.moved()
            if done == len(futures):
                return True
            with suppress(TimeoutError, FuturesCancelledError):
                wait(futures, timeout=1.0)
            self.watch.look(f"{len(futures) - done} tasks of an iteration are pending")
        return False

    @staticmethod
    def _release(futures: list[Future[Any]]) -> None:
        # now rather than at garbage collection: until then Dask keeps the sums, and recomputes them if their worker dies
        for future in futures:
            future.release()

    def _is_lost(self, future: Future[Any]) -> bool:
        """Whether a future was lost with its worker, or waits for a worker that is gone; raises an exception of the stage itself."""
        status = future.status
        if status == "error":
            error = future.exception()
            if not isinstance(error, KilledWorker):
                raise error
        return status not in ("finished", "pending") or (status == "pending" and self.at[future.key] not in self.watch.workers)
