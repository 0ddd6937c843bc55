"""The cluster: lanes, shares, jobs and usage, as the services of this account report them."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from cryodask.web.pages import page
from cryodask.web.people import Person
from cryodask.web.sessions import Caller

router = APIRouter()

_KEEP_SECONDS = 10.0
_ANSWER_SECONDS = 40.0
_PERIODS = (48, 720, 8760)
"""Hours for which usage over time is asked."""


class _Asked:
    """Answers of ``cryodask cluster``, kept for some seconds.

    They are asked for in another process: what a client of a scheduler needs would triple the memory of this server for good.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, ...], tuple[float, Any]] = {}
        self._lock = threading.Lock()

    def __call__(self, *words: str) -> Any:
        when, answer = self._kept.get(words, (float("-inf"), {"problem": "The cluster is being asked; try again in a moment."}))
        # one question at a time: whoever comes meanwhile gets the former answer, instead of another thread of the server
        if time.monotonic() - when > _KEEP_SECONDS and self._lock.acquire(blocking=False):
            try:
                answer = _ask(words)
                self._kept[words] = time.monotonic(), answer
            finally:
                self._lock.release()
        return answer


def _ask(words: tuple[str, ...]) -> Any:
    command = [sys.executable, "-m", "cryodask.cli", "cluster", *words, "--json"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_SECONDS, stdin=subprocess.DEVNULL)
        return json.loads(done.stdout) if done.returncode == 0 else {"problem": done.stderr.strip().splitlines()[0]}
    except (subprocess.TimeoutExpired, ValueError, OSError, IndexError):
        return {"problem": "The cluster did not answer."}


_asked = _Asked()


@router.get("/cluster", include_in_schema=False)
def cluster_page(request: Request, person: Caller) -> Response:
    """The page; its script asks for the state."""
    return page(request, "cluster.html")


@router.get("/api/v1/clusters")
def clusters(request: Request, person: Caller) -> dict[str, Any]:
    """The state of each cluster of the account that runs this server, by name; ``problem`` where one does not answer."""
    names = _asked("status")
    answers = {name: here for name, here in names.items() if isinstance(here, dict)}
    return {name: _asked("status", name) if here.get("address") else {"problem": here.get("says")} for name, here in answers.items()}


@router.get("/api/v1/usage/history")
def usage_history(request: Request, person: Caller, hours: Annotated[int, Query(ge=1, le=_PERIODS[-1])] = 48) -> dict[str, Any]:
    """Usage of each cluster by hour (by day before two months ago), lane and user; people who do not administer see their own."""
    first = time.time() - 3600 * hours
    # few questions, whatever is asked: the answer to each is kept
    period = next(period for period in _PERIODS if period >= hours)
    found: dict[str, Any] = {}
    for name, here in _asked("status").items():
        if isinstance(here, dict):
            rows = _own(_asked("usage", name, "--hourly", "--hours", str(period)), person)
            found[name] = [row for row in rows if row["from"] + row["seconds"] > first] if isinstance(rows, list) else rows
    return found


def _own(rows: Any, person: Person) -> Any:
    """The rows that a person may see; a problem as it is."""
    return [row for row in rows if person.administers() or row.get("user") == person.name] if isinstance(rows, list) else rows


@router.get("/api/v1/usage")
def usage(request: Request, person: Caller) -> dict[str, Any]:
    """Who used how much of each cluster; people who do not administer the facility see their own."""
    found: dict[str, Any] = {}
    for name, here in _asked("status").items():
        if isinstance(here, dict) and here.get("address"):
            found[name] = _own(_asked("usage", name), person)
    return found
