"""Running one item in its own process, and limits per item: time, and the memory of a worker."""

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
    """Context manager around ``submit()`` and ``map()``: these tasks fail on the first death of their worker.

    The runners resubmit them, suspects each in its own process. If the scheduler retried them on other workers, as it does by default, a
    task that kills its worker would kill three more. Needs a scheduler with lanes; others use their own number of retries.
    """
    around: AbstractContextManager[None] = dask.annotate(allowed_failures=0)
    return around


class ItemFailure(Exception):
    """(class name, message, "retry" | "quarantine" | "stop"): plain values, so that any stage's exception can be unpickled."""


class ItemDied(ItemFailure):
    """The child process of an isolated item died, so the item itself caused it."""


# --- in a worker ------------------------------------------------------------------------------------------------------------
_DEADLINES: dict[int, float] = {}
_DEADLINES_LOCK = threading.Lock()


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Context manager that ends this process if its body takes longer.

    Nothing less can end code that hangs in a library or on a disk. The watchdog does not run Python code: it works while the GIL is held,
    and writes the stacks of all threads to the worker's log.
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
    # there is one watchdog per process, but a worker may have several threads: set it to the nearest deadline
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
    """Run ``attempt_item(*task)`` in a child process; if the child dies or exceeds a limit, its item is to blame.

    Raises
    ------
    ItemDied
        With the signal or exit code and the last output of the child.
    """
    # not multiprocessing, because Dask's workers are daemonic
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
        raise ItemDied("ProcessDied", f"the process that was processing it died: {why}. {tail}", "quarantine")
    failure: tuple[str, str, str] | None = pickle.loads(out)
    return failure


def _watched(
    process: subprocess.Popen[bytes], begun: int, message: bytes, limit_seconds: float | None, limit_bytes: int | None
) -> tuple[bytes, bytes, Failure | None]:
    """Wait for a child; kill it when it exceeds its time or memory limit. Returns its output, its log, and the exceeded limit.

    The time starts when the child reports that it begins, so that the start of the interpreter does not count.
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
            taken = ("TimeLimit", f"took longer than {limit_seconds:g} s, the limit per item in the project file", "quarantine")
        elif limit_bytes is not None and _resident_bytes(process.pid) > limit_bytes:
            taken = ("MemoryLimit", f"needs more memory than a worker has ({limit_bytes / 1e9:.2f} GB)", "quarantine")
        if taken:
            process.kill()
            process.communicate()
            return b"", b"", taken


def _memory_limit() -> int | None:
    """Memory limit of this worker in bytes; the nanny watches the worker's own process only, not its children."""
    try:
        limit = get_worker().memory_manager.memory_limit
    except ValueError:
        return None
    return int(limit) if limit else None


def _resident_bytes(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text(encoding="utf-8").split()[1]) * _PAGE
    except (OSError, IndexError):
        return 0


# --- in the child -------------------------------------------------------------------------------------------------------------
def child(tell_begun: int, worker: int) -> None:
    """Entry point of the child process: reads a pickled task from standard input, writes the pickled outcome to standard output."""
    die_with_parent(worker)  # the thread that started this process is waiting for it
    reply = os.dup(1)
    os.dup2(2, 1)  # output of a stage must not get into the reply
    from cryodask.run.map import attempt_item

    task = pickle.load(sys.stdin.buffer)
    os.write(tell_begun, b"!")
    failure = attempt_item(*task)
    os.write(reply, pickle.dumps(failure))
