"""``status.json``: what the driver of a project is doing now, for everybody who can read the folder; written from its events."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from cryodask.errors import TakenOverError
from cryodask.run import events as of
from cryodask.run.events import Event
from cryodask.run.events.progress import COUNTS, Pace, figures_text
from cryodask.store.files import check_writable

_NAME = "status.json"
_EVERY_SECONDS = 1.0
_SILENT_SECONDS = 60.0


class StatusFile:
    """Listener that writes the state of the run, at most once per second; a disk that rejects it never disturbs the run."""

    def __init__(self, folder: Path) -> None:
        self._path, self._pace = folder / _NAME, Pace()
        self._run: dict[str, Any] = {}
        self._step: dict[str, Any] = {}
        self._written = float("-inf")

    def __call__(self, event: Event) -> None:
        """Process an event."""
        self._pace(event)
        match event:
            case of.RunStarted():
                self._run = {"run": event.run, "host": event.host, "pid": event.pid, "started": event.time}
            case of.StepStarted():
                self._step = {"state": "running", "step": event.step}
            case of.Counted():
                counts = event.model_dump(exclude={"time", "run", "step"}, exclude_none=True)
                self._step |= counts | {"rate": self._pace.text(event.time), "stall": ""}
            case of.Iteration():
                self._step |= {"iterations": event.iteration, "note": figures_text(event.figures), "stall": ""}
            case of.Stalled():
                self._step["stall"] = event.why
            case of.RunEnded():
                self._step["state"] = event.state
        if isinstance(event, of.StepStarted | of.Stalled | of.RunEnded) or time.monotonic() - self._written > _EVERY_SECONDS:
            self._write(event.time)

    def _write(self, now: float) -> None:
        self._written = time.monotonic()
        part = self._path.with_name(f"{_NAME}.{os.getpid()}.part")
        with suppress(OSError, TakenOverError):  # another driver writes the status now
            check_writable(self._path)
            part.write_text(json.dumps({**self._run, "state": "running", **self._step, "time": round(now, 1)}))
            os.rename(part, self._path)


def read_status(folder: str | Path) -> dict[str, Any]:
    """The last status of a project; empty if there was none."""
    try:
        found: dict[str, Any] = json.loads((Path(folder) / _NAME).read_text())
    except (OSError, ValueError):
        return {}
    return found


def is_silent(folder: Path, status: Mapping[str, Any]) -> bool:
    """Whether the driver of a running project has neither told anything nor renewed its lock for a minute.

    While it waits for movies it has nothing to tell.
    """
    try:
        beat = (folder / "driver.lock").stat().st_mtime
    except OSError:
        beat = 0.0
    return time.time() - max(float(status.get("time") or 0.0), beat) > _SILENT_SECONDS


def status_sentence(folder: str | Path) -> str:
    """One sentence about what the driver of a project is doing; empty if there never was one."""
    facts = read_status(folder)
    if not facts:
        return ""
    state, age = facts.get("state", ""), time.time() - facts.get("time", 0.0)
    counted = ""
    if "seen" in facts:
        counted = f": {COUNTS.format(**facts)}"
        if facts.get("arriving"):
            counted += f", {facts['arriving']} still being written"
        counted += f"; {facts['rate']}" if facts.get("rate") and state == "running" else ""
    elif "iterations" in facts:
        counted = f": {facts['iterations']} iterations, {facts.get('note', '')}"
    where = f"process {facts.get('pid')} on {facts.get('host')}, {age:.0f} s ago"
    if state == "running" and facts.get("host") == socket.gethostname() and not psutil.pid_exists(int(facts.get("pid") or 0)):
        state = "its process is gone, rerun the same command to resume"
    elif state == "running" and is_silent(Path(folder), facts):
        state = "no sign of life"
    stall = f"\n  {facts['stall']}" if facts.get("stall") else ""
    return f"{state}: {facts.get('step', '')}{counted} ({where}){stall}"
