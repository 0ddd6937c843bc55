"""CPU or GPU: which workers have a device, how many are free, and the set-up of a stage function on one.

A worker process with a device has the resource ``GPU=1`` and sees no other device (``cluster/slurm/slurm.py``). CPU and GPU results agree
to rounding; they are not bit-identical.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cryodask.cluster.fields import GPU, licence
from cryodask.context import Context, no_report
from cryodask.errors import ClusterError, CryodaskError
from cryodask.programs import Program
from cryodask.run.events.reports import Report
from cryodask.run.told import keep_from_log

CPU_DEVICE, GPU_DEVICE = "cpu", "cuda"
_AHEAD = 2


@contextmanager
def on_device(
    device: str, *, log: Path | None = None, programs: Mapping[Program, str] | None = None, report: Report = no_report
) -> Iterator[Context]:
    """The context of a stage function in a worker: one thread, its device, a scratch folder that is removed afterwards.

    Raises
    ------
    ClusterError
        If a function failed and torch sees no GPU on a worker that has one. It stops the run, because every item would fail.
    """
    _one_thread()
    try:
        with Context(device, 1, log, programs or {}, report) as context:
            yield context
    except Exception as error:
        if isinstance(error, CryodaskError):
            keep_from_log(error)
        cuda = getattr(sys.modules.get("torch"), "cuda", None)
        if device == CPU_DEVICE or cuda is None or cuda.is_available():
            raise
        raise ClusterError(
            f"A worker on {socket.gethostname()} has the resource {GPU}, but its torch sees no GPU.",
            "the CPU-only build of torch is installed, or the GPU driver does not match it",
            "install the CUDA build in the workers' environment, or set gpus: 0 in the cluster file",
        ) from error


def _one_thread() -> None:
    """Limit torch to one thread, whether it is imported already or later by a stage."""
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    # while another thread is importing torch the attribute is missing, and torch reads the environment
    limit = getattr(sys.modules.get("torch"), "set_num_threads", None)
    if limit is not None:
        limit(1)


def dask_resources(device: str, licences: Iterable[str] = ()) -> dict[str, float] | None:
    """Dask resources of a task on a device that holds some licences; None if it needs none."""
    return {**({GPU: 1.0} if device == GPU_DEVICE else {}), **dict.fromkeys(map(licence, licences), 1.0)} or None


def with_gpus(workers: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Those of the workers (by address, as the scheduler describes them) that have a device."""
    return {address: worker for address, worker in workers.items() if (worker.get("resources") or {}).get(GPU)}


def gpu_items(workers: Mapping[str, Mapping[str, Any]], running: int) -> int:
    """How many items a run should have running on GPUs or queued for them, from what is free now.

    Parameters
    ----------
    workers : mapping
        By address, as the scheduler describes them.
    running : int
        Items of this run that are on GPUs.

    Notes
    -----
    Two per device that others leave free, so that none is idle between two items. If others use all of them, one item is queued: that
    claims the lane's share, and the number grows as the share is granted.
    """
    some = with_gpus(workers).values()
    devices = sum(int(worker["resources"][GPU]) for worker in some)
    used = sum(int((worker.get("used_resources") or {}).get(GPU, 0)) for worker in some)
    return max(1, _AHEAD * (devices - max(0, used - running))) if devices else 0
