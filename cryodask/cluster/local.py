"""Worker processes on this machine, forked from one process that has imported what they need."""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import dask
from distributed import LocalCluster, Nanny, Worker, WorkerPlugin
from distributed.utils import get_mp_context
from distributed.worker_memory import parse_memory_limit

from cryodask.cluster.access.versions import announce
from cryodask.cluster.environment import ALLOCATOR, ONE_THREAD, SETTINGS
from cryodask.cluster.fairshare import FairShareScheduler
from cryodask.cluster.fields import GPU, licence
from cryodask.cluster.settings import LocalSettings
from cryodask.leash import die_with_spawner

# distributed counts what a worker shares with the fork server (0.4 GiB) as the worker's own memory
_ENOUGH_TO_SHARE = 2 << 30


class LaneCluster(LocalCluster):
    """A ``LocalCluster`` whose scheduler has lanes, and whose worker processes die with this one, even if it is killed.

    ``lanes``, ``strict``, ``reserve``, ``default_lane`` and ``memory_share`` as in FairShareScheduler; ``gpus``: this many worker processes
    have one GPU each (the resource ``GPU``), the others see none; ``licences``: by name, how many have one (the resource
    ``licence-NAME``); all other arguments as in ``LocalCluster``.
    """

    def __init__(
        self,
        *args: Any,
        lanes: Mapping[str, Any] | None = None,
        strict: Iterable[str] = (),
        reserve: Mapping[str, int] | None = None,
        default_lane: str = "default",
        memory_share: Mapping[str, float] | None = None,
        gpus: int = 0,
        licences: Mapping[str, int] | None = None,
        **kwargs: Any,
    ) -> None:
        self._gpus, self._licences = gpus, dict(licences or {})
        self._sharing = {
            "lanes": lanes, "strict": tuple(strict), "reserve": reserve, "default_lane": default_lane, "memory_share": memory_share
        }  # fmt: skip
        preload = kwargs.pop("preload", None) or dask.config.get("distributed.worker.preload")
        super().__init__(*args, preload=[*preload, "cryodask.cluster.local"], **kwargs)

    async def _start(self) -> None:
        if self.scheduler_spec["cls"] is not FairShareScheduler:
            self.scheduler_spec["cls"] = FairShareScheduler
            self.scheduler_spec["options"] = {**self.scheduler_spec.get("options", {}), **self._sharing}
            if self._gpus:
                self._hand_out_gpus()
            for name, number in self._licences.items():
                for worker in list(self.worker_spec)[:number]:
                    self._give(worker, licence(name))
        await super()._start()

    def _hand_out_gpus(self) -> None:
        """Assign one GPU to each of the first workers through the environment of the process, which torch reads once."""
        names = list(self.worker_spec)
        if self._gpus > len(names) or any(spec["cls"] is not Nanny for spec in self.worker_spec.values()):
            raise ValueError(f"{self._gpus} GPUs need one worker process each, but there are {len(names)} workers")
        here = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = here.split(",") if here else list(map(str, range(self._gpus)))
        if len(devices) < self._gpus:
            raise ValueError(f"gpus is {self._gpus}, but CUDA_VISIBLE_DEVICES gives this process only {here}")
        given: list[str | None] = [*devices[: self._gpus], *[None] * (len(names) - self._gpus)]
        for name, device in zip(names, given):
            spec = self.worker_spec[name]
            options = {**spec["options"], "env": {**(spec["options"].get("env") or {}), "CUDA_VISIBLE_DEVICES": device or ""}}
            self.worker_spec[name] = {**spec, "options": options}
            if device is not None:
                self._give(name, GPU)

    def _give(self, worker: Any, resource: str) -> None:
        spec = self.worker_spec[worker]
        resources = {**(spec["options"].get("resources") or {}), resource: 1}
        self.worker_spec[worker] = {**spec, "options": {**spec["options"], "resources": resources}}


class PlainHeartbeats(WorkerPlugin):
    """A worker that ends during a heartbeat logs one line, without the traceback that Dask prints on the user's terminal."""

    name = "cryodask-plain-heartbeats"

    def setup(self, worker: Worker) -> None:
        """Start filtering the log of a worker."""
        logging.getLogger("distributed.worker").addFilter(_without_traceback_of_heartbeats)


def _without_traceback_of_heartbeats(record: logging.LogRecord) -> bool:
    if record.exc_info and "communicate with scheduler during heartbeat" in record.getMessage():
        record.exc_info = None
    return True


def local_environment() -> dict[str, Any]:
    """Dask settings with which :func:`local_cluster` starts its workers."""
    return {
        **SETTINGS,
        "distributed.nanny.pre-spawn-environ": {**ONE_THREAD, **ALLOCATOR, "PYTHONDONTWRITEBYTECODE": ""},
    }


def _choose_start(*, forked: bool) -> None:
    """Have workers, later ones too, forked from a process that has imported what their tasks need; else each would, for 2 CPU s."""
    dask.config.set({"distributed.worker.multiprocessing-method": "forkserver" if forked else "spawn"})
    if forked:
        get_mp_context()  # the first call names modules of its own
        multiprocessing.set_forkserver_preload(["cryodask.cluster.forked"])


def local_workers(settings: LocalSettings) -> int:
    """Number of worker processes of a local cluster."""
    return settings.workers or max(os.cpu_count() or 1, settings.gpus)


def local_memory(settings: LocalSettings) -> int | None:
    """Memory limit of a local worker, bytes: from the file, else an equal share of the machine; None for no limit."""
    return parse_memory_limit(settings.memory or "auto", 1, local_workers(settings), logger=logging.getLogger("distributed.worker"))


def local_cluster(settings: LocalSettings, *, asynchronous: bool = False) -> LaneCluster:
    """Start single-threaded worker processes on this machine, with a scheduler with lanes in this process."""
    memory = local_memory(settings)
    _choose_start(forked=memory is None or memory >= _ENOUGH_TO_SHARE)
    return LaneCluster(
        n_workers=local_workers(settings),
        threads_per_worker=1,
        processes=True,
        host="127.0.0.1",
        dashboard_address="127.0.0.1:0",
        memory_limit=memory,
        env=dict(os.environ),  # else forked workers have the environment of the first cluster of this process
        local_directory=settings.scratch,
        silence_logs=40,
        gpus=settings.gpus,
        licences=settings.licences,
        **settings.sharing(),
        asynchronous=asynchronous,
    )


async def dask_setup(worker: Worker) -> None:
    """``preload`` for workers whose nanny runs in the driver.

    distributed starts each worker in a thread that lives as long as the worker is wanted.
    """
    die_with_spawner()
    announce(worker)
    if "numpy" in sys.modules:  # else all forked workers would draw the same numbers from NumPy's global generator
        sys.modules["numpy"].random.seed()
