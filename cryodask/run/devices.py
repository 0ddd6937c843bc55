"""CPU or GPU: which workers have a device, how many of them are free, and what is made ready for a stage function on one.

A worker process with a device has the resource ``GPU=1`` and sees no other device (``cluster/slurm.py``). Results of both kinds agree to
rounding, not in their bits.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cryodask.context import Context
from cryodask.errors import ClusterError
from cryodask.programs import Program

GPU = "GPU"
CPU_DEVICE, GPU_DEVICE = "cpu", "cuda"
_AHEAD = 2


@contextmanager
def on_device(device: str, *, log: Path | None = None, programs: Mapping[Program, str] | None = None) -> Iterator[Context]:
    """The context of a stage function in a worker: one thread, its device; what it left in scratch goes when it has returned.

    Raises
    ------
    ClusterError
        Where a function failed and torch sees no GPU on a worker that was given one; it stops the run, because every item would meet it.
    """
    _one_thread()
    try:
        with Context(device, 1, log, programs or {}) as context:
            yield context
    except Exception as error:
        cuda = getattr(sys.modules.get("torch"), "cuda", None)
        if device == CPU_DEVICE or cuda is None or cuda.is_available():
            raise
        raise ClusterError(
            f"A worker on {socket.gethostname()} has the resource {GPU}, but its torch sees no GPU.",
            "torch was installed in its build for CPUs, or the driver does not fit it",
            "install the other build in the workers' environment, or set gpus: 0 in the cluster file",
        ) from error


def _one_thread() -> None:
    """Torch takes one thread, whether it is imported already or will be by a stage that uses it."""
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    # while another thread imports it, it has no such attribute yet, and goes by the environment
    limit = getattr(sys.modules.get("torch"), "set_num_threads", None)
    if limit is not None:
        limit(1)


def with_gpus(workers: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Of the workers, as the scheduler describes them by address, those that have a device."""
    return {address: worker for address, worker in workers.items() if (worker.get("resources") or {}).get(GPU)}


def gpu_items(workers: Mapping[str, Mapping[str, Any]], running: int) -> int:
    """How many items one run should have on GPUs or waiting for them, from what is free now.

    Parameters
    ----------
    workers : mapping
        As the scheduler describes them by address.
    running : int
        Items of this run that run on GPUs.

    Notes
    -----
    Two for each device that others leave us, so that none is idle between two items. Where others have them all, one item waits: that is
    how a lane's share is claimed, and as it is granted the number grows.
    """
    some = with_gpus(workers).values()
    devices = sum(int(worker["resources"][GPU]) for worker in some)
    used = sum(int((worker.get("used_resources") or {}).get(GPU, 0)) for worker in some)
    return max(1, _AHEAD * (devices - max(0, used - running))) if devices else 0
