"""CPU or GPU: which workers have a device, how many of them are free, and torch made ready for it.

A worker process with a device has the resource ``GPU=1`` and sees no other device (``cluster/slurm.py``). Results of both kinds agree to
rounding, not in their bits.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any

from cryodask.errors import ClusterError

GPU = "GPU"
CPU_DEVICE, GPU_DEVICE = "cpu", "cuda"
_AHEAD = 2


def make_ready(device: str) -> None:
    """Before torch is used in a worker.

    Raises
    ------
    ClusterError
        Where torch sees no GPU on a worker that was given one; it stops the run, because every item would meet it.
    """
    import torch

    torch.set_num_threads(1)
    if device != CPU_DEVICE and not torch.cuda.is_available():
        raise ClusterError(
            f"A worker on {socket.gethostname()} has the resource {GPU}, but its torch sees no GPU.",
            "torch was installed in its build for CPUs, or the driver does not fit it",
            "install the other build in the workers' environment, or set gpus: 0 in the cluster file",
        )


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
