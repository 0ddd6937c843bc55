"""A process that dies with the one that started it, however that dies: no signal handler, thread or pipe has to be served for it."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from typing import Any

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int | None = None) -> None:
    """From now on the kernel kills this process as soon as its parent is gone (Linux; elsewhere nothing happens).

    Also where this process holds the interpreter, hangs in a library, or is stopped. To be precise, the kernel waits for the end of the
    thread of the parent that started this process: it must live at least as long as this process is wanted.

    Parameters
    ----------
    parent : int, optional
        Process id of the parent as it was known when this process was started: if it is another one by now, it has died already.
    """
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is None:
        return
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def die_with_spawner() -> None:
    """The same for a process that multiprocessing has started; nothing happens in any other one."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        die_with_parent(parent.pid)


async def dask_setup(worker: Any) -> None:
    """``preload`` of workers whose nanny lives in the driver.

    distributed starts each worker in a thread that lives as long as the nanny wants the worker.
    """
    die_with_spawner()
