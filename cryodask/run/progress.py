"""Progress of a run: rate and time to go, as moving bars on a terminal, as a line now and then in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

from cryodask.run.status import StatusFile

_LOG_EVERY_SECONDS = 60.0


class Progress:
    """Say what runs. ``begin`` a stage, ``advance`` it, ``end`` it; ``say`` a sentence at any time."""

    def __init__(self, stream: TextIO | None = None, *, quiet: bool = False) -> None:
        self.console = Console(file=stream or sys.stdout, quiet=quiet, highlight=False, soft_wrap=True)
        self._moving = self.console.is_terminal and not quiet
        self._bars: RichProgress | None = None
        self._bar: TaskID | None = None
        self._name, self._total, self._done, self._started, self._logged = "", 0, 0, 0.0, 0.0
        self._status: StatusFile | None = None

    def __enter__(self) -> Progress:
        if self._moving:
            columns = (
                SpinnerColumn(),
                TextColumn("{task.description:<12}"),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(),
            )
            self._bars = RichProgress(*columns, console=self.console)
            self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bars is not None:
            self._bars.stop()

    @contextmanager
    def recorded(self, folder: Path) -> Iterator[None]:
        """Within, ``status.json`` in the project's folder tells everybody what this run does; at its end, how it ended."""
        self._status = StatusFile(folder)
        try:
            yield
        except BaseException as error:
            self._status.end(f"stopped: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
            raise
        finally:
            self._status.end("finished")
            self._status = None

    def account(self, **counts: int | str) -> None:
        """Every input at this moment: seen = done + quarantined + running + waiting."""
        if self._status is not None:
            self._status.update(**counts, rate=self.rate())

    def say(self, text: str) -> None:
        """One line."""
        self.console.print(text, markup=False)

    def begin(self, name: str, total: int | None) -> None:
        """A stage starts; ``total`` None where its length is not known."""
        self._name, self._total, self._done = name, total or 0, 0
        self._started = self._logged = time.monotonic()
        if self._bars is not None:
            self._bar = self._bars.add_task(name, total=total, rate="")
        if self._status is not None:
            self._status.begin(name)

    def expect(self, more: int) -> None:
        """More of it has arrived."""
        self._total += more
        if self._bars is not None and self._bar is not None:
            self._bars.update(self._bar, total=self._total)

    def advance(self, text: str = "", steps: int = 1) -> None:
        """Some of it is done."""
        self._done += steps
        note = "  ".join(t for t in (self.rate(), text) if t)
        if self._status is not None and text:
            self._status.update(iterations=self._done, note=text)
        if self._bars is not None and self._bar is not None:
            self._bars.update(self._bar, advance=steps, rate=note)
        elif time.monotonic() - self._logged > _LOG_EVERY_SECONDS:
            self._logged = time.monotonic()
            of = f"/{self._total}" if self._total else ""
            self.say(f"{self._name}: {self._done}{of}  {note}")

    def end(self, text: str) -> None:
        """It is done; ``text`` is the result in a sentence."""
        if self._bars is not None and self._bar is not None:
            self._bars.remove_task(self._bar)
            self._bar = None
        self.say(f"{self._name:<14} {text}  ({time.monotonic() - self._started:.1f} s)")

    def rate(self) -> str:
        """Rate so far and time to go."""
        seconds = time.monotonic() - self._started
        if not self._done or seconds <= 0:
            return ""
        rate = self._done / seconds
        shown = f"{rate:.1f}/s" if rate >= 1 else f"{rate * 60:.1f}/min"
        if not self._total:
            return shown
        left = (self._total - self._done) / rate
        return f"{shown}, {left / 60:.0f} min to go" if left >= 120 else f"{shown}, {left:.0f} s to go"


def short(values: dict[str, Any]) -> str:
    """The first few numbers of an iteration, for the progress bar."""
    shown = {k: v for k, v in values.items() if isinstance(v, int | float | str | np.floating)}
    return ", ".join(
        f"{k.replace('_', ' ')} {v:.3g}" if isinstance(v, float | np.floating) else f"{k.replace('_', ' ')} {v}"
        for k, v in list(shown.items())[:3]
    )


def summary(result: dict[str, Any]) -> str:
    """What a finished step found, in a few words."""
    if "resolution_angstrom" in result:
        return f"resolution {float(result['resolution_angstrom']):.2f} A"
    if len(result.get("dropped_id", ())):
        kept = len(result["particle_id"])
        return f"{kept} of {kept + len(result['dropped_id'])} particles kept"
    if "class_share" in result:
        return f"{len(result['class_share'])} classes"
    return "done"
