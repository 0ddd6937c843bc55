"""Kill a process between any two of its system calls, to check what the next process finds.

The work runs in a forked child whose ``os`` calls that change the disk are counted; before the n-th of them the child kills itself with
SIGKILL, which no handler, ``finally`` or buffer survives. Writes through Python's ``open(...)`` are not counted: the store
writes only through ``os``. The machine stays up, so this does not test power failures.
"""

from __future__ import annotations

import os
import pickle
import signal
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

CALLS = ("open", "write", "fsync", "rename", "replace", "link", "unlink", "mkdir", "rmdir", "utime")
"""Functions of ``os`` that are counted (``open`` only where it may create or write)."""


@dataclass(frozen=True)
class Crash:
    """Outcome of a child.

    ``done``: values that the work yielded before it died, which its caller considers safe. ``calls``: the system calls that it made.
    """

    killed: bool
    done: list[Any] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)


def crash(work: Callable[[], Iterable[Any] | None], *, before: int | None = None, split: bool = False) -> Crash:
    """Run ``work`` in a forked child, killed before its system call number ``before`` (counted from 1).

    Parameters
    ----------
    work : callable
        May be a generator: each value that it yields is an acknowledgement, and is in ``done`` if the child got that far.
    before : int, optional
        Without it, or if the work makes fewer calls, nothing is killed.
    split : bool
        If that call is a write, first write half of its bytes, for a torn line or a truncated file.

    Raises
    ------
    RuntimeError
        If the work raised, with its traceback.
    """
    receive, send = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(receive)
        _child(work, send, before, split)
    os.close(send)
    with open(receive, "rb") as pipe:
        raw = pipe.read()
    _, status = os.waitpid(pid, 0)
    done: list[Any] = []
    calls: list[str] = []
    position = 0
    while position < len(raw):
        size = int.from_bytes(raw[position : position + 4], "little")
        kind, value = pickle.loads(raw[position + 4 : position + 4 + size])
        position += 4 + size
        if kind == "error":
            raise RuntimeError(f"the work raised in the child:\n{value}")
        (done if kind == "done" else calls).append(value)
    return Crash(os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, done, calls)


def _child(work: Callable[[], Iterable[Any] | None], send: int, before: int | None, split: bool) -> None:
    write = os.write

    def tell(kind: str, value: Any) -> None:
        data = pickle.dumps((kind, value))
        write(send, len(data).to_bytes(4, "little") + data)  # unbuffered: a pipe keeps what a killed process wrote

    count = 0

    def watched(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            nonlocal count
            if name == "open" and not args[1] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return call(*args, **options)
            count += 1
            if count == before:
                if split and name == "write":
                    call(args[0], args[1][: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            tell("call", name)
            return call(*args, **options)

        return counted

    try:
        for name in CALLS:
            setattr(os, name, watched(name, getattr(os, name)))
        for value in work() or ():
            tell("done", value)
    except BaseException:
        tell("error", traceback.format_exc())
    os._exit(0)
