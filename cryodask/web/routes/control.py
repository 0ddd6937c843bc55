"""Starting, pausing and ending a session from its page."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field

from cryodask.web.control import Starter
from cryodask.web.people import Right
from cryodask.web.sessions import Operated, Seen, Session, caller, record

router = APIRouter()


class Confirmed(BaseModel):
    """The name of the session, typed by whoever ends it."""

    name: str = Field(min_length=1, max_length=300)


@router.get("/s/{id}/control")
def control(request: Request, session: Seen) -> Response:
    """What the run of a session does, and what the caller may ask of it."""
    return JSONResponse(_now(request, session), headers={"Cache-Control": "no-store"})


@router.post("/s/{id}/start", status_code=202)
def start(request: Request, session: Operated) -> dict[str, Any]:
    """Start the run of a session as it was started last, in a process or job of its own."""
    _starter(request).start(session.path)
    record(request, "start", session)
    return _now(request, session)


@router.post("/s/{id}/pause", status_code=202)
def pause(request: Request, session: Operated) -> dict[str, Any]:
    """Let the exposures in flight finish, and start nothing else; it can be started again."""
    _starter(request).pause(session.path)
    record(request, "pause", session)
    return _now(request, session)


@router.post("/s/{id}/end", status_code=202)
def end(request: Request, session: Operated, body: Confirmed) -> dict[str, Any]:
    """Take no further movies, and go on with the later steps; the name of the session confirms it."""
    if body.name.strip() != session.name:
        raise HTTPException(409, f"To confirm, type the name of the session: {session.name}.")
    _starter(request).end(session.path)
    record(request, "end", session)
    return _now(request, session)


def _now(request: Request, session: Session) -> dict[str, Any]:
    may = caller(request).may(Right.operate, session.id, session.microscope)
    now = _starter(request).state(session.path)
    # paths and logs are for those who may do something about them
    hidden = {} if may else {"why_not": "", "problem": "", "start": False, "pause": False, "end": False}
    return {**now, **hidden, "may": may}


def _starter(request: Request) -> Starter:
    found: Starter = request.app.state.starter
    return found
