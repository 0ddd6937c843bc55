"""An item in a process of its own, and limits on what one item may take: time, and the memory of a worker."""

from __future__ import annotations

import faulthandler
import os
import pickle
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import dask
from distributed import get_worker

from cryodask.leash import die_with_parent

Failure = tuple[str, str, str]
_POLL_SECONDS = 0.1
_START_SECONDS = 120.0
_PAGE = os.sysconf("SC_PAGE_SIZE")


def blamed_at_first_death() -> AbstractContextManager[None]:
    """Around ``submit()`` and ``map()``: these tasks are given back as soon as a worker dies under them.

    The runners send them again, suspects in processes of their own; tried on other workers by the scheduler, as it does with the tasks of
    other people, a task that kills would take three more workers with it. Needs a scheduler with lanes, others use their own number.
    """
    around: AbstractContextManager[None] = dask.annotate(allowed_failures=0)
    return around


class ItemFailure(Exception):
    """(class name, message, "retry" | "quarantine" | "stop"): plain values, so that any stage's exception survives the way back."""


class ItemDied(ItemFailure):
    """The child process of an isolated item died: that item is guilty beyond doubt."""


# --- in a worker ------------------------------------------------------------------------------------------------------------
_DEADLINES: dict[int, float] = {}
_DEADLINES_LOCK = threading.Lock()


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """End this process if what runs within takes longer.

    Nothing less ends code that hangs in a library or on a disk. The watchdog needs no Python: it works while the interpreter is held,
    and leaves the stacks of all threads in the worker's log.
    """
    if seconds is None:
        yield
        return
    thread = threading.get_ident()
    _set_deadline(thread, time.monotonic() + seconds)
    try:
        yield
    finally:
        _set_deadline(thread, None)


def _set_deadline(thread: int, when: float | None) -> None:
    # the process has one watchdog, a worker may have several threads: it is set to the nearest deadline
    with _DEADLINES_LOCK:
        _DEADLINES.pop(thread, None)
        if when is not None:
            _DEADLINES[thread] = when
        if _DEADLINES:
            left = max(0.001, min(_DEADLINES.values()) - time.monotonic())
            faulthandler.dump_traceback_later(left, exit=True, file=sys.__stderr__ or 2)
        else:
            faulthandler.cancel_dump_traceback_later()


def in_child(task: Any, limit_seconds: float | None) -> Failure | None:
    """Carry out ``attempt_item(*task)`` in a child process; a child that dies, or takes too much, convicts its item.

    Raises
    ------
    ItemDied
        With the signal or exit code and the last words of the child.
    """
    # multiprocessing cannot do it: Dask's workers are daemonic
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    begun, tell_begun = os.pipe()
    try:
        command = [sys.executable, "-W", "ignore", "-c", f"from cryodask.run.isolation import child; child({tell_begun}, {os.getpid()})"]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=env, pass_fds=[tell_begun])
        out, log, taken = _watched(process, begun, pickle.dumps(task), limit_seconds, _memory_limit())
    finally:
        os.close(begun)
        os.close(tell_begun)
    if taken:
        return taken
    if process.returncode:
        code = process.returncode
        why = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        tail = log.decode(errors="replace").strip()[-300:]
        raise ItemDied("ProcessDied", f"the process that worked on it died: {why}. {tail}", "quarantine")
    failure: tuple[str, str, str] | None = pickle.loads(out)
    return failure


def _watched(
    process: subprocess.Popen[bytes], begun: int, message: bytes, limit_seconds: float | None, limit_bytes: int | None
) -> tuple[bytes, bytes, Failure | None]:
    """Wait for a child; kill it when it takes more time or memory than it may. Returns its output, its log, and what it took too much.

    Its time counts from when it says that it begins: the start of an interpreter is not the item's.
    """
    started, first = time.monotonic() + _START_SECONDS, True
    while True:
        try:
            out, log = process.communicate(message if first else None, timeout=_POLL_SECONDS)
            return out, log, None
        except subprocess.TimeoutExpired:
            first = False
        if started > time.monotonic() and select.select([begun], [], [], 0)[0]:
            started = time.monotonic()
        taken: Failure | None = None
        if limit_seconds is not None and time.monotonic() - started > limit_seconds:
            taken = ("TimeLimit", f"took longer than {limit_seconds:g} s, the limit of the project file for one item", "quarantine")
        elif limit_bytes is not None and _resident_bytes(process.pid) > limit_bytes:
            taken = ("MemoryLimit", f"needs more memory than a worker has ({limit_bytes / 1e9:.2f} GB)", "quarantine")
        if taken:
            process.kill()
            process.communicate()
            return b"", b"", taken


def _memory_limit() -> int | None:
    """Bytes that this worker may use; the nanny counts the worker's own process only, not its children."""
    try:
        limit = get_worker().memory_manager.memory_limit
    except ValueError:
        return None
    return int(limit) if limit else None


def _resident_bytes(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
    except (OSError, IndexError):
        return 0


# --- in the child -------------------------------------------------------------------------------------------------------------
def child(tell_begun: int, worker: int) -> None:
    """What the child process runs: a pickled task on its standard input, the pickled outcome on its standard output."""
    die_with_parent(worker)  # the thread that started this process waits for its end
    reply = os.dup(1)
    os.dup2(2, 1)  # what a stage prints must not get into the reply
    from cryodask.run.map import attempt_item

    task = pickle.load(sys.stdin.buffer)
    os.write(tell_begun, b"!")
    failure = attempt_item(*task)
    os.write(reply, pickle.dumps(failure))
