"""The block runner: iterations over blocks of particles, the same bits for any number of workers and after any death.

An iteration is: expectation tasks on leaves (fixed runs of particles, cached where they were first loaded), sums added in a tree whose
shape depends on the number of leaves only, one maximisation task, a checkpoint. The state reaches the workers through the checkpoint
file, so that nothing is lost with a worker. Bytes moved an iteration: state bytes x workers (file reads) + (leaves - 1) x sums bytes at
most over the network, fewer where merged leaves lie on one worker.
"""

from __future__ import annotations

import io
import os
import pickle
import time
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import cloudpickle
import numpy as np
from distributed import Client, Future, KilledWorker, wait

from cryodask.errors import ClusterError, InputError
from cryodask.run.particles import StoredParticles
from cryodask.stage import Columns, Metrics, ParticleBlock, ParticleSet, State, Sums
from cryodask.store.generation import disk_errors
from cryodask.store.journal import fsync_folder

_LEAVES = 8
_SMALLEST_LEAF, _LARGEST_LEAF = 32, 2000
_CACHE_BYTES = 4 << 30
_DEATHS_ALLOWED = 5


class Particles(Protocol):
    """What the runner needs of a particle set: :class:`StoredParticles`, or a stack in memory."""

    @property
    def set(self) -> ParticleSet:
        """Every column of the set."""
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
        return ParticleBlock(index, np.asarray(self.images[index], np.float32), columns, self.set.pixel_size_angstrom, half)


@dataclass(frozen=True)
class Leaf:
    """A fixed run of particles of one half-set."""

    number: int
    half: int
    index: np.ndarray


@dataclass(frozen=True)
class BlockJob:
    """What every task of a run needs; pickled once, unpickled once a process."""

    name: str
    functions: Any
    params: Any
    particles: Particles
    device: str = "cpu"


def cut_leaves(particles: ParticleSet, halves: int) -> list[Leaf]:
    """Leaves from the particles alone, never from the workers: at least four a half-set, at most 2000 particles each."""
    half_of = particles.columns["half_set"] if halves == 2 else np.zeros(particles.count, np.int8)
    leaves: list[Leaf] = []
    for half in range(halves):
        index = np.nonzero(half_of == half)[0]
        size = int(np.clip(-(-len(index) * halves // _LEAVES), _SMALLEST_LEAF, _LARGEST_LEAF))
        for start in range(0, len(index), size):
            leaves.append(Leaf(len(leaves), half, index[start : start + size]))
    return leaves


# --- the arithmetic of an iteration, the same in a worker and in this process ----------------------------------------------
_CACHE: OrderedDict[Any, Any] = OrderedDict()


def _cached(key: Any, make: Callable[[], Any]) -> Any:
    if key in _CACHE:
        _CACHE.move_to_end(key)
        return _CACHE[key]
    value = make()
    _CACHE[key] = value
    while len(_CACHE) > 1 and sum(map(_size, _CACHE.values())) > _CACHE_BYTES:
        _CACHE.popitem(last=False)
    return value


def _size(value: Any) -> int:
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(_size, value))
    if hasattr(value, "__dict__"):
        return sum(map(_size, vars(value).values()))
    size = getattr(value, "nbytes", 0)
    return int(size) if isinstance(size, int) else 0


def _expect(job: BlockJob, token: str, state: State, leaf: Leaf, previous: Columns) -> tuple[Sums, dict[int, Columns]]:
    f, p = job.functions, job.params
    round_ = (token, "shared", leaf.half)
    stamp = int(state["iteration"])
    held = _CACHE.get(round_)
    if held is None or held[0] != stamp:
        _CACHE.pop(round_, None)
        held = _cached(round_, lambda: (stamp, f.prepare(p, state, leaf.half, job.device)))
    place = (token, "leaf", leaf.number)
    key = f.cache_key(p, state)
    kept = _CACHE.get(place)
    if kept is None or kept[0] != key:
        _CACHE.pop(place, None)
        kept = _cached(place, lambda: (key, f.load(p, state, job.particles.block(leaf.index, leaf.half), job.device)))
    _CACHE.move_to_end(place)
    sums, columns = f.expect(p, state, held[1], kept[1], previous, job.device)
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


def _previous(columns: Columns, leaf: Leaf) -> Columns:
    return {name: values[leaf.index] for name, values in columns.items()}


# --- in this process: for tests, notebooks and benchmarks --------------------------------------------------------------------
def iterate_here(
    functions: Any,
    params: Any,
    particles: Particles,
    inputs: dict[str, Any] | None = None,
    *,
    device: str = "cpu",
    on_iteration: Callable[[State, Metrics, Columns], None] = lambda state, metrics, columns: None,
) -> dict[str, Any]:
    """Run a blocks stage to its end in this process; same leaves, same tree, same bits as on workers with one thread."""
    job = BlockJob("here", functions, params, particles, device)
    token = f"here-{os.urandom(4).hex()}"
    leaves = cut_leaves(particles.set, functions.halves)
    state = functions.start(params, particles.set, inputs or {})
    columns: Columns = {}
    while not functions.finished(params, state):
        parts: list[list[Any]] = [[] for _ in range(functions.halves)]
        for leaf in leaves:
            parts[leaf.half].append(_expect(job, token, state, leaf, _previous(columns, leaf)))
        found: dict[int, Columns] = {}
        roots = []
        for half in parts:
            while len(half) > 1:
                half = [_merge(*half[j : j + 2]) if j + 1 < len(half) else half[j] for j in range(0, len(half), 2)]
            roots.append(half[0][0])
            found |= half[0][1]
        columns = _joined_columns(particles.set, leaves, found)
        state, metrics = functions.maximise(params, state, roots, device)
        on_iteration(state, metrics, columns)
    for key in [k for k in _CACHE if k[0] == token]:
        del _CACHE[key]
    return functions.result(params, state, columns)


# --- on workers ------------------------------------------------------------------------------------------------------------------
_STATES: OrderedDict[str, Any] = OrderedDict()


def _load_job(path: str) -> tuple[BlockJob, str]:
    if path not in _STATES:
        import torch

        torch.set_num_threads(1)
        _STATES[path] = cloudpickle.loads(Path(path).read_bytes())
    return _STATES[path], path


def _load_state(path: str) -> State:
    if path not in _STATES:
        for old in [k for k in _STATES if k.endswith(".npz")][:-1]:
            del _STATES[old]
        _STATES[path] = read_checkpoint(Path(path))[0]
    return _STATES[path]


def _expect_task(job_path: str, state_path: str, leaf: Leaf, previous: Columns) -> tuple[Sums, dict[int, Columns]]:
    job, token = _load_job(job_path)
    return _expect(job, token, _load_state(state_path), leaf, previous)


def _maximise_task(job_path: str, state_path: str, *parts: tuple[Sums, dict[int, Columns]]) -> tuple[State, Metrics, dict[int, Columns]]:
    job, _ = _load_job(job_path)
    state, metrics = job.functions.maximise(job.params, _load_state(state_path), [p[0] for p in parts], job.device)
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
) -> dict[str, Any]:
    """Run a blocks stage to its end on the workers of ``client``, with a checkpoint an iteration in ``folder``.

    A run that was killed goes on from its last checkpoint.

    Raises
    ------
    ClusterError
        When the workers die again and again.
    """
    leaves = cut_leaves(particles.set, functions.halves)
    if len({leaf.half for leaf in leaves}) < functions.halves:
        raise InputError(
            f"Stage {name} has {particles.set.count} particles: not one for each of its {functions.halves} half-sets.",
            "almost nothing was picked (wrong diameter or threshold), or curation removed it",
            "look at the picks in the report, change pick or curate, and run again",
        )
    job_path = folder / f"job-{os.urandom(4).hex()}.pickle"
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        job_path.write_bytes(cloudpickle.dumps(BlockJob(name, functions, params, particles)))
    path, state, columns = _last_checkpoint(folder)
    if path is None:
        state, columns = functions.start(params, particles.set, inputs), {}
        path = _checkpoint(folder, state, columns)
    home: dict[int, str] = {}
    while not functions.finished(params, state):
        state, metrics, found = _one_iteration(client, job_path, path, leaves, columns, home, functions.halves)
        columns = _joined_columns(particles.set, leaves, found)
        older = path
        path = _checkpoint(folder, state, columns)
        older.unlink(missing_ok=True)
        on_iteration(state, metrics)
    result = functions.result(params, state, columns)
    job_path.unlink(missing_ok=True)
    return result


def _one_iteration(
    client: Client, job_path: Path, state_path: Path, leaves: list[Leaf], columns: Columns, home: dict[int, str], halves: int
) -> tuple[State, Metrics, dict[int, Columns]]:
    token = f"{state_path.stem}-{os.urandom(3).hex()}"
    deaths = 0

    def submit(leaf: Leaf) -> Future:
        alive = sorted(client.scheduler_info(n_workers=-1)["workers"])
        worker = home.get(leaf.number)
        if worker not in alive and alive:
            worker = home[leaf.number] = alive[leaf.number % len(alive)]
        return client.submit(
            _expect_task,
            str(job_path),
            str(state_path),
            leaf,
            _previous(columns, leaf),
            workers=[worker] if worker else None,
            allow_other_workers=True,
            key=f"expect-{token}-{leaf.number}-{deaths}",
            pure=False,
        )

    parts = {leaf.number: submit(leaf) for leaf in leaves}
    while True:
        wait(list(parts.values()))
        lost = [leaf for leaf in leaves if _died(parts[leaf.number])]
        if not lost:
            roots: list[Future] = []
            for half in range(halves):
                tree = [parts[leaf.number] for leaf in leaves if leaf.half == half]
                level = 0
                while len(tree) > 1:
                    pairs = range(0, len(tree), 2)
                    tree = [
                        client.submit(_merge, *tree[j : j + 2], key=f"merge-{token}-{half}-{level}-{j}-{deaths}", pure=False)
                        if j + 1 < len(tree)
                        else tree[j]
                        for j in pairs
                    ]
                    level += 1
                roots.append(tree[0])
            last = client.submit(_maximise_task, str(job_path), str(state_path), *roots, key=f"maximise-{token}-{deaths}", pure=False)
            wait(last)
            if not _died(last):
                return last.result()
        deaths += 1
        if deaths > _DEATHS_ALLOWED:
            raise ClusterError(
                f"Workers died {deaths} times in one iteration of {job_path.parent.name}.",
                "they run out of memory (a box too large for the memory of a worker), or their jobs are killed",
                "give the workers more memory, or use a smaller box; the iterations done so far are kept",
            )
        time.sleep(min(2.0**deaths, 20.0))
        for leaf in lost:
            parts[leaf.number] = submit(leaf)


def _died(future: Future) -> bool:
    """Whether a future was lost with its worker; an exception of the stage itself is raised here."""
    if future.status == "finished":
        return False
    if future.status == "error":
        error = future.exception()
        if not isinstance(error, KilledWorker):
            raise error
    return True


# --- checkpoints -----------------------------------------------------------------------------------------------------------------
def _checkpoint(folder: Path, state: State, columns: Columns) -> Path:
    path = folder / f"iteration-{int(state['iteration']):04d}.npz"
    buffer = io.BytesIO()
    plain = {k: v for k, v in state.items() if not isinstance(v, np.ndarray)}
    arrays = {f"state/{k}": v for k, v in state.items() if isinstance(v, np.ndarray)}
    arrays |= {f"column/{k}": v for k, v in columns.items()}
    arrays["plain"] = np.frombuffer(cloudpickle.dumps(plain), np.uint8)
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    with disk_errors(folder):
        part = path.with_suffix(f".{os.getpid()}.part")
        with open(part, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.rename(part, path)
        fsync_folder(folder)
    return path


def _last_checkpoint(folder: Path) -> tuple[Path | None, State, Columns]:
    """The last checkpoint that can be read; a damaged one is set aside."""
    for path in sorted(folder.glob("iteration-*.npz"), reverse=True):
        try:
            return path, *read_checkpoint(path)
        except (zipfile.BadZipFile, zlib.error, pickle.UnpicklingError, ValueError, KeyError, EOFError):
            os.rename(path, path.with_suffix(".damaged"))
    return None, {}, {}


def read_checkpoint(path: Path) -> tuple[State, Columns]:
    """State and columns of a checkpoint."""
    with np.load(path) as stored:
        state: State = cloudpickle.loads(stored["plain"].tobytes())
        columns: Columns = {}
        for name in stored.files:
            kind, _, key = name.partition("/")
            if kind == "state":
                state[key] = stored[name]
            elif kind == "column":
                columns[key] = stored[name]
    return state, columns
