"""What lies where, how large it is, and what is removed when; with the confirmation of an administrator in two steps."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field

from cryodask.errors import StoreError
from cryodask.store.project import Project
from cryodask.tiers import policy
from cryodask.tiers.inventory import CATEGORIES
from cryodask.tiers.overview import as_dict
from cryodask.web.pages import page
from cryodask.web.sessions import Administered, Managed, Seen, Session, record

router = APIRouter()

_LOG = "tiers/last-removal.log"
_LOG_LINES = 20


class Acknowledged(BaseModel):
    """Who has the data now."""

    who: str = Field(min_length=1, max_length=200)


class Confirmed(BaseModel):
    """The size of what goes, as the page shows it."""

    size: str = Field(min_length=1, max_length=40)


@router.get("/s/{id}/data", include_in_schema=False)
def data_page(request: Request, session: Seen) -> Response:
    """The page."""
    rules, project = _rules(request), _project(session)
    due = policy.due_now(project, rules, time.time())
    about = as_dict(project, rules)
    return page(
        request,
        "data.html",
        session=session,
        about=about,
        total={where: sum(one["bytes"] for one in about["held"] if one["where"] == where) for where in _places(about)},
        rules=[(name, getattr(rules, name)) for name in CATEGORIES],
        archive=rules.archive,
        due=due,
        size=policy.confirmation(due),
        acknowledged=policy.acknowledged(project),
        log=_log(session.path),
    )


@router.get("/s/{id}/data.json")
def data_as_json(request: Request, session: Seen) -> dict[str, Any]:
    """What lies where, by category; what goes when; the announcements."""
    return as_dict(_project(session), _rules(request))


@router.post("/s/{id}/data/acknowledge")
def acknowledge(request: Request, session: Managed, body: Acknowledged) -> dict[str, str]:
    """Record that the owner has the data; the retention counts from now."""
    policy.acknowledge(session.path, body.who)
    record(request, "acknowledge hand-over", session, who=body.who)
    return {"who": body.who}


@router.post("/s/{id}/data/remove", status_code=202)
def remove(request: Request, session: Administered, body: Confirmed) -> dict[str, str]:
    """Archive and thin what is due, in a process of its own; the size must be the one that is shown.

    Raises
    ------
    StoreError
        If nothing is due, or the size is another.
    """
    rules = _rules(request)
    size = policy.confirmation(policy.checked(_project(session), rules, body.size, time.time()))
    record(request, "remove data", session, size=size)
    _start(session.path, rules, size)
    return {"size": size}


def _start(folder: Path, rules: policy.Storage, size: str) -> None:
    """Start the removal: it may take hours, and goes on when this server ends."""
    (folder / _LOG).parent.mkdir(exist_ok=True)
    with open(folder / _LOG, "ab") as log:
        words = [sys.executable, "-m", "cryodask.tiers", str(folder), size]
        started = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True)
    assert started.stdin is not None
    try:
        started.stdin.write(rules.model_dump_json().encode())
        started.stdin.close()
    except OSError as error:
        raise StoreError("The removal could not be started.", "", f"see {folder / _LOG}") from error
    threading.Thread(target=started.wait, daemon=True).start()


def _rules(request: Request) -> policy.Storage:
    found: policy.Storage = request.app.state.storage
    return found


def _project(session: Session) -> Project:
    """A project of its own for one request: records of every exposure are needed, and must not stay in memory."""
    return Project(session.path)


def _places(about: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(one["where"] for one in about["held"]))


def _log(folder: Path) -> list[str]:
    try:
        with open(folder / _LOG, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - (1 << 14)))
            return file.read().decode(errors="replace").splitlines()[-_LOG_LINES:]
    except OSError:
        return []
