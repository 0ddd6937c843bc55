"""Stages that run as one task (whole) or as a few independent ones (tournament)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cloudpickle
from distributed import Client, Future, KilledWorker
from distributed.client import ClosedClientError

from cryodask.errors import ClusterError
from cryodask.run.devices import CPU_DEVICE, GPU_DEVICE, dask_resources, on_device, with_gpus
from cryodask.run.events.reports import report_of
from cryodask.run.health import Watch
from cryodask.run.isolation import blamed_at_first_death
from cryodask.run.particles import StoredParticles
from cryodask.stage import find_stage
from cryodask.store.environments import MADE_IN, environment
from cryodask.store.generation import Generation

Topic = tuple[str, str]
"""Under which a step reports (see reports.py), and its label."""

_TRIES = 3


@dataclass(frozen=True)
class Stored:
    """A variable of a finished step, read where it is used, so that maps are not sent with the graph; ``index``: one of several maps."""

    folder: Path
    name: str
    index: int | None = None

    def load(self) -> Any:
        """The value."""
        generation = Generation(self.folder)
        value = generation.read(generation.committed()[0], self.name)
        return value if self.index is None else value[self.index]


def loaded(inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs with all stored variables loaded, also those in lists."""
    return {name: _loaded(value) for name, value in inputs.items()}


def _loaded(value: Any) -> Any:
    if isinstance(value, list):
        return [_loaded(one) for one in value]
    return value.load() if isinstance(value, Stored) else value


def run_whole(stage_name: str, params: Any, inputs: dict[str, Any], watch: Watch, log: Path, report: Topic) -> dict[str, Any]:
    """Call a whole stage on a worker; ``log`` keeps the output of programs."""
    stage = find_stage(stage_name)
    blob = cloudpickle.dumps((stage_name, params, inputs, log, stage.program_versions(), report))
    device = GPU_DEVICE if stage.resources.gpus else CPU_DEVICE
    needs = dask_resources(device, stage.resources.licences)
    tasks = {0: lambda: _submit(watch.client, _whole_task, blob, device, resources=needs)}
    result = _results(watch, tasks, lambda number, of: None)[0]
    return {**result, MADE_IN: [result[MADE_IN]]}


def _whole_task(blob: bytes, device: str) -> dict[str, Any]:
    stage_name, params, inputs, log, programs, report = cloudpickle.loads(blob)
    with on_device(device, log=log, programs=programs, report=report_of(*report)) as context:
        return {**find_stage(stage_name).process(params, context=context, **loaded(inputs)), MADE_IN: environment()}


def run_tournament(
    functions: Any, params: Any, particles: StoredParticles, watch: Watch, on_chain: Callable[[int, int], None], report: Topic
) -> dict[str, Any]:
    """Run all chains of a tournament, one task each; another finishes the best. ``on_chain``: called with (done, total)."""
    index = functions.select(params, particles.set)
    blob = cloudpickle.dumps((functions, params, particles, index, report))
    seeds = functions.seeds(params)
    tasks = {i: _submitter(watch, _chain_task, blob, seed) for i, seed in enumerate(seeds)}
    chains = _results(watch, tasks, on_chain)
    made_in = [chain.pop(MADE_IN) for chain in chains.values()]
    ending = {0: _submitter(watch, _finish_task, blob, [chains[i] for i in range(len(seeds))])}
    result: dict[str, Any] = _results(watch, ending, lambda number, of: None)[0]
    return {**result, MADE_IN: [*made_in, result[MADE_IN]]}


def _submitter(watch: Watch, function: Callable[..., Any], blob: bytes, argument: Any) -> Callable[[], Future[Any]]:
    def submit() -> Future[Any]:
        device = GPU_DEVICE if with_gpus(watch.workers) else CPU_DEVICE
        return _submit(watch.client, function, blob, argument, device, resources=dask_resources(device))

    return submit


def _submit(client: Client, function: Callable[..., Any], *arguments: Any, resources: dict[str, float] | None = None) -> Future[Any]:
    with blamed_at_first_death():
        return client.submit(function, *arguments, resources=resources, pure=False)


def _chain_task(blob: bytes, seed: int, device: str) -> dict[str, Any]:
    functions, params, particles, index, report = cloudpickle.loads(blob)
    with on_device(device, report=report_of(*report)) as context:
        return {**functions.chain(params, particles.block(index), seed, context), MADE_IN: environment()}


def _finish_task(blob: bytes, chains: list[dict[str, Any]], device: str) -> dict[str, Any]:
    functions, params, particles, index, report = cloudpickle.loads(blob)
    with on_device(device, report=report_of(*report)) as context:
        return {**functions.finish(params, particles.block(index), chains, context), MADE_IN: environment()}


def _results(watch: Watch, tasks: dict[int, Callable[[], Future[Any]]], done: Callable[[int, int], None]) -> dict[int, Any]:
    """Results of tasks by number; a task whose worker died is resubmitted. Pending tasks are cancelled if the run ends."""
    watch.look()
    running = {number: submit() for number, submit in tasks.items()}
    tries = dict.fromkeys(tasks, 1)
    out: dict[int, Any] = {}
    try:
        while running:
            watch.wait(running.values(), f"{len(running)} tasks are pending", first=True)
            for number, future in [(n, f) for n, f in running.items() if f.done()]:
                error = future.exception() if future.status == "error" else None
                if future.status == "finished":
                    out[number] = future.result()
                    del running[number]
                    done(len(out), len(tasks))
                    continue
                if error is not None and not isinstance(error, KilledWorker):
                    raise error
                tries[number] += isinstance(error, KilledWorker)
                if tries[number] > _TRIES:
                    raise ClusterError(
                        f"Workers died {_TRIES} times on the same task.",
                        "it needs more memory than they have",
                        "give the workers more memory",
                    )
                running[number] = tasks[number]()
    except BaseException:
        with suppress(ClosedClientError, RuntimeError):
            watch.client.cancel(list(running.values()), force=True)
        raise
    return out
