"""Tasks that a worker opens only when it can: one that it cannot unpickle fails, instead of ending the worker.

distributed unpickles a task while reading the message that contains it. If that fails, for example because the worker lacks a module
that the scheduler has, the worker and its nanny end, the task is not blamed, and the next worker is sent the same.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from operator import call
from typing import Any

import cloudpickle
from dask._task_spec import GraphNode
from distributed.protocol.pickle import dumps
from distributed.protocol.serialize import Pickled, ToPickle


def sealed(spec: GraphNode, known: bool) -> Pickled | ToPickle[Any]:
    """A task as it is put into a message to a worker; see `Sealed`.

    What nearly all tasks are, without large arrays, is pickled here: distributed would pickle the envelope around it a second time.
    """
    if known:
        buffers: list[pickle.PickleBuffer] = []
        with suppress(Exception):  # whoever writes the message meets it again, as with plain Dask
            frame = dumps(spec, buffer_callback=buffers.append)
            if not buffers:
                return Pickled({"pickled-obj": b"".join((_CALL, *_bytes(pickle.dumps(spec.key)), *_bytes(frame), b"\x86R."))}, [])
    return ToPickle(Sealed(spec, known))


def _bytes(value: bytes) -> tuple[bytes, ...]:
    """A value in a pickle (BINBYTES8)."""
    return b"\x8e", len(value).to_bytes(8, "little"), value


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


def opened_here(key: bytes, frame: bytes) -> Any:
    """`opened` for a pickled key and a pickled task without buffers."""
    return _opened(lambda: pickle.loads(key), frame, [])


_CALL = b"\x80\x05c" + f"{opened_here.__module__}\n{opened_here.__name__}\n".encode()
"""Beginning of a pickle that calls it with two values: protocol 5, the function; then the values, TUPLE2, REDUCE, STOP."""


def opened(key: Any, frame: bytes, buffers: list[Any]) -> Any:
    """The task; if it cannot be unpickled, one that fails with the reason, in the name of this worker."""
    return _opened(lambda: key, frame[::-1], buffers)


def _opened(key_of: Callable[[], Any], frame: bytes, buffers: list[Any]) -> Any:
    """Everything is imported within: where cryodask is not installed this function arrives by value."""
    from distributed.protocol.pickle import loads

    try:
        return loads(frame, buffers=buffers)
    except BaseException as error:  # code of a user, in the middle of a worker's message stream
        import socket
        from contextlib import suppress

        from dask._task_spec import Task

        key = key_of()
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
