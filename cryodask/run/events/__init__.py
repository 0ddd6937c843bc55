"""The event stream of a run, read by the progress display, the log file, ``status.json`` and others.

An event is a frozen model with its ``time`` (seconds since 1970) and its ``run``; its kind is the name of its class. The driver emits
events and calls listeners at once. Results never depend on events: the journals alone say what is done.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

from pydantic import BaseModel, ConfigDict

from cryodask.errors import exit_status

LOGGER = logging.getLogger("cryodask")


class Event(BaseModel):
    """Base of all events."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    time: float
    run: str

    def as_record(self) -> dict[str, Any]:
        """The event as it is written: its fields, and its kind under ``event``."""
        return {"event": type(self).__name__, **self.__dict__}


class RunStarted(Event):
    """A run starts: what is to be done, and by which process."""

    project: str
    folder: str
    inputs: str
    steps: list[str]
    host: str
    pid: int
    version: str


class Noted(Event):
    """A message for people who follow the run."""

    text: str


class ExposureArrived(Event):
    """A movie is complete and was added to the project."""

    name: str


class StepStarted(Event):
    """A step, or a chain of per-exposure ``steps``, starts. Of ``total`` exposures, ``kept`` were done before."""

    step: str
    steps: list[str]
    total: int | None = None
    kept: int = 0


class ExposureCommitted(Event):
    """An exposure has passed all steps of a chain, and its results are committed."""

    step: str
    row: int
    name: str


class ExposureQuarantined(Event):
    """An exposure cannot be processed; the run continues without it."""

    step: str
    row: int
    name: str
    message: str


class ExposureRetried(Event):
    """An exposure is retried."""

    step: str
    row: int
    name: str
    why: str


class Counted(Event):
    """Counts of a step's exposures at this moment: seen = done + quarantined + running + waiting."""

    step: str
    seen: int
    done: int
    quarantined: int
    running: int
    waiting: int
    workers: int
    arriving: int | None = None


class Iteration(Event):
    """One of ``of`` iterations or independent parts of a step is done; ``figures`` are numbers of interest."""

    step: str
    iteration: int
    of: int | None = None
    figures: dict[str, Any] = {}


class Reported(Event):
    """Progress reported by a stage function: ``fraction`` from 0 to 1; ``row`` and ``name`` of its exposure, if it works on one."""

    step: str
    row: int | None = None
    name: str | None = None
    fraction: float
    figures: dict[str, Any] = {}


class Stalled(Event):
    """The run is stalled, and why."""

    step: str
    why: str


class StepFinished(Event):
    """A step is done; ``result`` is a sentence about it, which stages over sets provide themselves."""

    step: str
    steps: list[str]
    result: str
    seconds: float
    done: int | None = None
    quarantined: int | None = None


class RunEnded(Event):
    """A run has ended: ``state`` is "finished", the steps that wait for a person, or the reason in a sentence; ``status`` the exit status
    of the command.
    """

    state: str
    status: int


KINDS: dict[str, type[Event]] = {kind.__name__: kind for kind in Event.__subclasses__()}
Listener = Callable[[Event], None]


def event_of(record: dict[str, Any]) -> Event | None:
    """The event of a record; None if this version does not know its kind."""
    kind = KINDS.get(record.get("event", ""))
    return kind.model_validate(record) if kind is not None else None


def new_run_id() -> str:
    """Name for a new run; names sort by start time."""
    return f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{os.urandom(3).hex()}"


class Events:
    """The event stream of one run. A context manager: on exit it emits how the run ended.

    Listeners may join later (:meth:`join`) and get the events they missed. One that fails is dropped: a listener must not stop a run.
    """

    def __init__(self, listeners: Iterable[Listener] = ()) -> None:
        self.run = new_run_id()
        self._listeners = list(listeners)
        self._early: list[Event] | None = []
        self._ended = False
        self.waiting_for: list[str] = []
        """Steps that wait for a person when the run ends."""

    def emit(self, kind: type[Event], **fields: Any) -> None:
        """Call all listeners. Fields are not validated, because only the driver emits events."""
        event = kind.model_construct(time=round(time.time(), 3), run=self.run, **fields)
        if self._early is not None:
            self._early.append(event)
        for listener in list(self._listeners):
            self._tell(listener, event)

    def say(self, text: str) -> None:
        """Emit a :class:`Noted` message."""
        self.emit(Noted, text=text)

    def join(self, *listeners: Listener) -> None:
        """Add the listeners that write into the project folder, once this driver may write there; none can join later."""
        for event in self._early or ():
            for listener in listeners:
                self._tell(listener, event)
        self._listeners += listeners
        self._early = None

    def _tell(self, listener: Listener, event: Event) -> None:
        try:
            listener(event)
        except Exception:
            LOGGER.exception("A listener of the run failed and was dropped.")
            if listener in self._listeners:
                self._listeners.remove(listener)

    def end(self, error: BaseException | None) -> None:
        """Emit the end of the run, with or without an error; only the first call counts."""
        if self._ended:
            return
        self._ended = True
        if error is None:
            state = f"waiting for a person: {', '.join(self.waiting_for)}" if self.waiting_for else "finished"
            self.emit(RunEnded, state=state, status=0)
        else:
            said = str(error).splitlines()[0] if str(error) else type(error).__name__
            self.emit(RunEnded, state=f"stopped: {said}", status=exit_status(error))

    def __enter__(self) -> Events:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.end(error)


def whereabouts() -> dict[str, Any]:
    """Host and process of this driver, for :class:`RunStarted`."""
    return {"host": socket.gethostname(), "pid": os.getpid()}
