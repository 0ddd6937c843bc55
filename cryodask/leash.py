"""Processes that die with their parent, however it dies; no signal handler, thread or pipe is needed."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from typing import Any

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int | None = None) -> None:
    """Have the kernel kill this process as soon as its parent is gone (Linux; a no-op elsewhere).

    This works even if the process holds the GIL, hangs in a library, or is stopped. Strictly, the kernel watches the parent's thread that
    started this process: that thread must live as long as this process is wanted.

    Parameters
    ----------
    parent : int, optional
        Process id of the parent when this process was started. If the parent is another one by now, the original has died already.
    """
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is None:
        return
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def die_with_spawner() -> None:
    """Like :func:`die_with_parent`, for a process started by multiprocessing; a no-op in any other process.

    The parent of a forked process is multiprocessing's fork server, which ends when no process holds the pipe to it any more.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    die_with_parent()
    _let_go_of_fork_server()
    if not parent.is_alive():  # it has died before the kernel watched
        os.kill(os.getpid(), signal.SIGKILL)


def _let_go_of_fork_server() -> None:
    """Close this process's end of the pipe: multiprocessing passes it on, and the fork server would outlive the driver with its workers."""
    from multiprocessing import forkserver

    server: Any = forkserver._forkserver
    if server._forkserver_pid is None and server._forkserver_alive_fd is not None:
        os.close(server._forkserver_alive_fd)
        server._forkserver_alive_fd = None
