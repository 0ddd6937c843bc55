"""``status.json``: what the driver of a project is doing now, for everybody who may read the folder."""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from cryodask.errors import TakenOverError
from cryodask.store.files import check_writable

_NAME = "status.json"
_EVERY_SECONDS = 1.0
_SILENT_SECONDS = 60.0


class StatusFile:
    """Written by the driver at most once a second; a disk that refuses it never disturbs the run."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / _NAME
        self._facts: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid(), "started": round(time.time(), 1)}
        self._written = float("-inf")

    def begin(self, step: str) -> None:
        """A step starts."""
        kept = {k: v for k, v in self._facts.items() if k in ("host", "pid", "started")}
        self._facts = {**kept, "state": "running", "step": step}
        self._write()

    def update(self, **facts: Any) -> None:
        """What is known of the step now."""
        self._facts |= facts
        if time.monotonic() - self._written > _EVERY_SECONDS:
            self._write()

    def end(self, state: str) -> None:
        """The run is over; the first word counts."""
        if self._facts.get("state", "running") == "running":
            self._facts["state"] = state
            self._write()

    def _write(self) -> None:
        self._written = time.monotonic()
        part = self._path.with_name(f"{_NAME}.{os.getpid()}.part")
        with suppress(OSError, TakenOverError):  # what another driver does now is not this one's to tell
            check_writable(self._path)
            part.write_text(json.dumps({**self._facts, "time": round(time.time(), 1)}))
            os.rename(part, self._path)


def read_status(folder: str | Path) -> dict[str, Any]:
    """The last status of a project, empty if there was none."""
    try:
        return json.loads((Path(folder) / _NAME).read_text())
    except (OSError, ValueError):
        return {}


def status_sentence(folder: str | Path) -> str:
    """What the driver of a project is doing, in a sentence; empty if there never was one."""
    facts = read_status(folder)
    if not facts:
        return ""
    state, age = facts.get("state", ""), time.time() - facts.get("time", 0.0)
    counted = ""
    if "seen" in facts:
        counted = ": {seen} seen = {done} done + {quarantined} quarantined + {running} running + {waiting} waiting".format(**facts)
        if facts.get("arriving"):
            counted += f", {facts['arriving']} still being written"
        counted += f"; {facts['rate']}" if facts.get("rate") and state == "running" else ""
    elif "iterations" in facts:
        counted = f": {facts['iterations']} iterations, {facts.get('note', '')}"
    where = f"process {facts.get('pid')} on {facts.get('host')}, {age:.0f} s ago"
    if state == "running" and facts.get("host") == socket.gethostname() and not psutil.pid_exists(int(facts.get("pid") or 0)):
        state = "its process is gone, the same command goes on"
    elif state == "running" and age > _SILENT_SECONDS:
        state = "no sign of life"
    stall = f"\n  {facts['stall']}" if facts.get("stall") else ""
    return f"{state}: {facts.get('step', '')}{counted} ({where}){stall}"
