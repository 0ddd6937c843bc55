"""The list of sessions, and the page of one."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from cryodask.web.pages import page
from cryodask.web.routes.account import login_of, welcome
from cryodask.web.sessions import Caller, Seen, sessions_of

router = APIRouter(include_in_schema=False)


@router.get("/")
def overview(request: Request, person: Caller) -> Response:
    """All sessions that one may see, by microscope; with a token in the address, log in with it."""
    if login_of(request).token_in_address and "token" in request.query_params:
        return welcome(request, {"by": "token"}, "")
    shown = sessions_of(request).visible(person)
    by_microscope: dict[str, list[tuple[object, object]]] = {}
    for session in shown:
        by_microscope.setdefault(session.microscope, []).append((session, session.follower.counters()))
    return page(request, "sessions.html", by_microscope=dict(sorted(by_microscope.items())))


@router.get("/s/{id}/")
def session_page(request: Request, session: Seen) -> Response:
    """The page of a session; its script asks for the numbers."""
    return page(request, "session.html", session=session)
