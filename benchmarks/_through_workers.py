"""One local pass of refine3d on local workers: what moves between them, and what they hold."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from _sizes import Case, Particles, functions, kept_bytes, opened, parameters, pass_state, start_columns
from blocks import read_log, received

from cryodask.cluster.connect import close, connect
from cryodask.run.blocks import iterate_on_workers
from cryodask.run.checkpoints import write_checkpoint
from cryodask.run.leaves import cut_leaves, home_of_leaves, settle, traffic
from cryodask.run.particles import StoredParticles
from cryodask.stage import Columns, Context, ParticleBlock, State, Sums
from cryodask.store.generation import Generation
from cryodask.store.identity import make_ids
from cryodask.store.layouts import Grid
from cryodask.store.particles import ImagePlaces

PER_MICROGRAPH = 250


class OnePass:
    """The functions of refine3d, stopped after one pass; what is done is noted in a file, one line each."""

    halves = functions.halves
    start = staticmethod(functions.start)
    cache_key = staticmethod(functions.cache_key)
    prepare = staticmethod(functions.prepare)

    def __init__(self, log: Path, last: int) -> None:
        self.log, self.last = log, last

    def note(self, event: str, **what: Any) -> None:
        """One line, whoever writes: short appends of several processes do not mix."""
        with open(self.log, "ab", buffering=0) as file:
            file.write(json.dumps({"event": event, **what, "pid": os.getpid()}).encode() + b"\n")

    def load(self, params: Any, state: State, block: ParticleBlock, context: Context) -> Any:
        """As the stage's, noted."""
        start = time.process_time()
        loaded = functions.load(params, state, block, context)
        self.note("load", cpu=time.process_time() - start, kept=kept_bytes(loaded), particles=len(block.index))
        return loaded

    def expect(self, params: Any, state: State, shared: Any, block: Any, previous: Columns, context: Context) -> tuple[Sums, Columns]:
        """As the stage's, noted."""
        start = time.process_time()
        sums, columns = functions.expect(params, state, shared, block, previous, context)
        self.note(
            "expect", cpu=time.process_time() - start, particles=len(block.index),
            sums=sum(int(getattr(v, "nbytes", 8)) for v in sums.values()),
            columns=sum(v.nbytes for v in columns.values()) // len(block.index),
        )  # fmt: skip
        return sums, columns

    def maximise(self, params: Any, state: State, sums: list[Sums], context: Context) -> tuple[State, dict[str, Any]]:
        """As the stage's, noted."""
        start = time.process_time()
        new, metrics = functions.maximise(params, state, sums, context)
        self.note("maximise", cpu=time.process_time() - start)
        return new, metrics

    def finished(self, params: Any, state: State) -> bool:
        """After one pass."""
        return bool(state["iteration"] > self.last)

    def result(self, params: Any, state: State, columns: Columns) -> dict[str, Any]:
        """Nothing is asked for."""
        return {}


def stored(particles: Particles, count: int, folder: Path) -> StoredParticles:
    """The first particles of a stack in a store, committed micrograph by micrograph as an extraction does."""
    box = particles.set.box
    row, slot = np.arange(count) // PER_MICROGRAPH, np.arange(count) % PER_MICROGRAPH
    images = Generation.create(
        folder, meta={"stage": "extract", "version": 1, "params": {}, "recipes": {}}, gives=("particle_image",), per_item=True,
        grids={"": Grid({"slot": PER_MICROGRAPH, "y": box, "x": box}, {})},
    )  # fmt: skip
    for number in range(int(row[-1]) + 1):
        images.commit(number, f"micrograph{number}", {"particle_image": particles.images(np.nonzero(row == number)[0])})
    columns = {name: values[:count] for name, values in particles.set.columns.items()} | {"micrograph": row}
    some = type(particles.set)(count, box, particles.set.pixel_size_angstrom, columns)
    return StoredParticles(some, make_ids(1, row, slot), ImagePlaces((images,), row, slot, np.zeros(count, np.int16)))


def _status() -> dict[str, int]:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("VmHWM", "VmRSS"))}


def one_pass(case: Case, count: int, workers: int, finest_angstrom: float, folder: Path) -> dict[str, Any]:
    """A local pass of ``count`` particles on local workers."""
    particles, params = opened(case), parameters(case)
    count = min(count, particles.set.count)
    shutil.rmtree(folder, ignore_errors=True)
    log = folder / "log"
    (folder / "checkpoints").mkdir(parents=True)
    client = None
    try:
        source = stored(particles, count, folder / "images")
        state = pass_state(case, particles, params, "local", finest_angstrom)
        state["count"] = count
        checkpoint = write_checkpoint(folder / "checkpoints", state, start_columns(particles, np.arange(count)))
        state_bytes = sum(int(getattr(v, "nbytes", 8)) for v in state.values())
        client = connect("local", workers=workers)
        before, begun = received(client), time.perf_counter()
        moved = []
        iterate_on_workers(
            client, "refine3d", OnePass(log, int(state["iteration"])), params, source, {}, checkpoint.parent,
            on_iteration=lambda state, metrics: moved.append(received(client) - before),
        )  # fmt: skip
        wall = time.perf_counter() - begun
        memory = client.run(_status)
        names = sorted((str(w["name"]) for w in client.scheduler_info(n_workers=-1)["workers"].values()), key=lambda n: (len(n), n))
        events = read_log(log)
    finally:
        if client is not None:
            close(client)
        shutil.rmtree(folder, ignore_errors=True)
    done = [e for e in events if e["event"] == "expect"]
    loads = [e for e in events if e["event"] == "load"]
    leaves = cut_leaves(source.set, OnePass.halves)
    homes = home_of_leaves(len(leaves), settle([], names), names)
    model = traffic(leaves, homes, sums_bytes=done[0]["sums"], state_bytes=state_bytes, up_bytes=done[0]["columns"])
    each = lambda some: round(1e3 * sum(e["cpu"] for e in some) / count, 2)  # noqa: E731
    return {
        "particles": count, "workers": workers, "leaves": len(leaves), "rings": state["rings"], "wall_seconds": round(wall, 1),
        "load_ms": each(loads), "expect_ms": each(done),
        "maximise_seconds": round(sum(e["cpu"] for e in events if e["event"] == "maximise"), 1),
        "kept_per_particle": sum(e["kept"] for e in loads) / count, "sums": done[0]["sums"], "moved": moved[0],
        "model": model.between_workers, "bytes_over_model": round(moved[0] / model.between_workers, 4) if model.between_workers else None,
        "worker_peak": max(m["VmHWM"] for m in memory.values()),
    }  # fmt: skip
