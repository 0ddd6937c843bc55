"""Progress display of a run: bars on a terminal, lines in a log, a log file in the project. All read the events."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from cryodask.run import events as of
from cryodask.run.events import Event
from cryodask.run.events.quarantined import reason_of

_LOG_EVERY_SECONDS = 60.0
_EXPLAINED = 20
"""Reasons for which exposures are quarantined that are printed with advice; further exposures take one line each."""


COUNTS = "{seen} seen = {done} done + {quarantined} quarantined + {running} running + {waiting} waiting"


def text_of(event: Event, *, every_exposure: bool = False) -> str:
    """An event as a line of text; empty if it only advances a bar."""
    match event:
        case of.RunStarted():
            return f"{event.project}: {event.inputs} -> {event.folder}"
        case of.Noted():
            return event.text
        case of.ExposureQuarantined():
            return f"quarantined {event.name}: {event.message}"
        case of.Stalled():
            return event.why
        case of.StepFinished():
            return f"{event.step:<14} {event.result}  ({event.seconds:.1f} s)"
        case of.RunEnded():
            return event.state if event.state != "finished" or every_exposure else ""
    if not every_exposure:
        return ""
    match event:
        case of.ExposureArrived():
            return f"arrived {event.name}"
        case of.ExposureCommitted():
            return f"done {event.name}"
        case of.ExposureRetried():
            return f"again {event.name}: {event.why}"
        case of.StepStarted():
            return f"{event.step} begins"
        case of.Iteration():
            return f"{event.step}: iteration {event.iteration}  {figures_text(event.figures)}".rstrip()
        case of.Reported():
            return f"{event.step}{f' {event.name}' if event.name else ''}: {event.fraction:.0%}  {figures_text(event.figures)}".rstrip()
    return ""


def figures_text(figures: dict[str, Any]) -> str:
    """The first few numbers of an iteration, for the progress bar."""
    return ", ".join(
        f"{name.replace('_', ' ')} {value:.3g}" if isinstance(value, float) else f"{name.replace('_', ' ')} {value}"
        for name, value in list(figures.items())[:3]
    )


class Pace:
    """Progress, rate and remaining time of the current step; fed with all events."""

    def __init__(self) -> None:
        self.step, self.done, self.total, self._kept, self._started = "", 0, 0, 0, 0.0

    def __call__(self, event: Event) -> None:
        """Process an event."""
        match event:
            case of.StepStarted():
                self.step, self.total, self._started = event.step, event.total or 0, event.time
                self.done = self._kept = event.kept
            case of.ExposureCommitted() | of.ExposureQuarantined():
                self.done += 1
            case of.Counted():
                self.done, self.total = event.done + event.quarantined, event.seen
            case of.Iteration():
                self.done, self.total = self.done + 1, event.of or 0

    def text(self, now: float) -> str:
        """Rate so far and remaining time at a moment (seconds since 1970)."""
        new, seconds = self.done - self._kept, now - self._started
        if new <= 0 or seconds <= 0:
            return ""
        rate = new / seconds
        shown = f"{rate:.1f}/s" if rate >= 1 else f"{rate * 60:.1f}/min"
        if not self.total:
            return shown
        left = max(0, self.total - self.done) / rate
        if not left:
            return shown  # a watched session goes on
        return f"{shown}, {left / 60:.0f} min to go" if left >= 120 else f"{shown}, {left:.0f} s to go"


class Terminal:
    """Listener that prints to a terminal or to the log of a job.

    Parameters
    ----------
    stream : text stream, optional
        By default standard output. Bars are shown only on a terminal; elsewhere one line per minute shows the progress of a step.
    verbosity : int
        0: lines and bars; 1: also every exposure and iteration; -1: only the error that ended the run.
    """

    def __init__(self, stream: TextIO | None = None, *, verbosity: int = 0) -> None:
        self.console = Console(file=stream or sys.stdout, quiet=verbosity < 0, highlight=False, soft_wrap=True)
        self._verbose, self._moving = verbosity > 0, self.console.is_terminal and verbosity >= 0
        self._pace, self._note, self._logged = Pace(), "", 0.0
        self._reasons: set[str] = set()
        self._bars: Bars | None = None
        self._bar: TaskID | None = None

    def __call__(self, event: Event) -> None:
        """Show an event."""
        self._pace(event)
        if isinstance(event, of.StepFinished | of.RunEnded):
            self.close()
        text = text_of(event, every_exposure=self._verbose)
        if isinstance(event, of.ExposureQuarantined):
            reason = reason_of(event.name, event.message)
            text = text if reason not in self._reasons and len(self._reasons) < _EXPLAINED else text.splitlines()[0]
            self._reasons.add(reason)
        if text:
            self.console.print(text, markup=False)
        if isinstance(event, of.StepStarted):
            self._note, self._logged = "", event.time
            if self._moving:
                self._begin(event)
        if isinstance(event, of.Iteration):
            self._note = figures_text(event.figures)
        if isinstance(event, of.Reported) and event.row is None:
            self._note = f"{event.fraction:.0%}  {figures_text(event.figures)}".rstrip()
        if self._bars is not None and self._bar is not None:
            self._bars.update(self._bar, completed=self._pace.done, total=self._pace.total or None, note=self._said(event.time))
        elif self._pace.step and event.time - self._logged > _LOG_EVERY_SECONDS:
            self._logged = event.time
            of_all = f"/{self._pace.total}" if self._pace.total else ""
            self.console.print(f"{self._pace.step}: {self._pace.done}{of_all}  {self._said(event.time)}", markup=False)

    def _said(self, now: float) -> str:
        return "  ".join(t for t in (self._pace.text(now), self._note) if t)

    def _begin(self, event: of.StepStarted) -> None:
        self.close()
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description:<12}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
        )
        self._bars = Bars(*columns, console=self.console, transient=True)
        self._bar = self._bars.add_task(event.step, total=event.total, note="")
        self._bars.start()

    def close(self) -> None:
        """Remove the bar."""
        if self._bars is not None:
            self._bars.stop()
        self._bars = self._bar = None


class JsonLines:
    """Listener that prints every event as one line of JSON."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout

    def __call__(self, event: Event) -> None:
        """Print an event."""
        print(json.dumps(event.as_record()), file=self._stream, flush=True)


class LogFile:
    """Listener that writes ``logs/<run>.log`` in the project, with timestamps; a disk that rejects it never disturbs the run."""

    def __init__(self, folder: Path, run: str) -> None:
        self._path = folder / "logs" / f"{run}.log"

    def __call__(self, event: Event) -> None:
        """Write an event."""
        text = text_of(event, every_exposure=True)
        if not text:
            return
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(event.time))}  {text}\n"
        try:
            if not self._path.exists():
                self._path.parent.mkdir(exist_ok=True)
            with open(self._path, "ab", buffering=0) as file:
                file.write(line.encode())
        except OSError:
            return
