"""Tasks that a worker opens only when it can: one that it cannot unpickle fails, instead of ending the worker.

distributed unpickles a task while reading the message that contains it. If that fails, for example because the worker lacks a module
that the scheduler has, the worker and its nanny end, the task is not blamed, and the next worker is sent the same.
"""

from __future__ import annotations

import pickle
import sys
from functools import cache
from operator import call
from typing import Any

import cloudpickle
from dask._task_spec import GraphNode
from distributed.protocol.pickle import dumps


class Sealed:
    """A task as it is sent to a worker.

    Parameters
    ----------
    spec : GraphNode
        The task.
    known : bool
        Whether the worker has cryodask, and with it the function that opens the task; others are sent the function as well.
    """

    __slots__ = ("known", "spec")

    def __init__(self, spec: GraphNode, known: bool) -> None:
        self.spec, self.known = spec, known

    def __reduce__(self) -> Any:
        buffers: list[pickle.PickleBuffer] = []
        # backwards, because distributed pickles again, and slowly, what contains "__main__": the functions of every script and notebook
        frame = dumps(self.spec, buffer_callback=buffers.append)[::-1]
        if self.known:
            return opened, (self.spec.key, frame, buffers)
        return call, (_Carried(), self.spec.key, frame, buffers)


class _Carried:
    """:func:`opened` itself, for processes that cannot import it."""

    def __reduce__(self) -> Any:
        return pickle.loads, (_opened_by_value(),)


@cache
def _opened_by_value() -> bytes:
    module = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(module)
    try:
        return bytes(cloudpickle.dumps(opened))
    finally:
        cloudpickle.unregister_pickle_by_value(module)


def opened(key: Any, frame: bytes, buffers: list[Any]) -> Any:
    """The task; if it cannot be unpickled, one that fails with the reason, in the name of this worker.

    Everything is imported within: where cryodask is not installed this function arrives by value.
    """
    from distributed.protocol.pickle import loads

    try:
        return loads(frame[::-1], buffers=buffers)
    except BaseException as error:  # code of a user, in the middle of a worker's message stream
        import socket
        from contextlib import suppress

        from dask._task_spec import Task

        kind = ModuleNotFoundError if isinstance(error, ModuleNotFoundError) else RuntimeError
        said = type(error).__name__
        with suppress(BaseException):  # its text is code of the user as well
            said = f"{said}: {error}"

        def fail() -> None:
            from distributed import get_worker

            try:
                where = f"{get_worker().address} on {socket.gethostname()}"
            except ValueError:
                where = socket.gethostname()
            raise kind(
                f"Worker {where} cannot read task {key!r}. {said}\n"
                "  Usual reason: its environment lacks a module, or has another version of it\n"
                "  What to do: install the module for the workers, or define the function in the notebook"
            )

        return Task(key, fail)
