"""The list of sessions, the page of one, and new ones from templates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field

from cryodask.errors import InputError
from cryodask.web.boards import board_of, remarks_of
from cryodask.web.pages import page
from cryodask.web.routes.account import login_of, welcome
from cryodask.web.session_templates import Template, new_session, templates_in
from cryodask.web.sessions import Caller, Seen, record, sessions_of

router = APIRouter()

_THE_SESSION = -1
"""Row of what is said about a session as a whole."""


class New(BaseModel):
    """A session that is to be made."""

    template: str = Field(max_length=100)
    microscope: str = Field(max_length=100)
    name: str = Field(max_length=60)
    values: dict[str, str] = Field(default_factory=dict, max_length=50, description="the numbers that the template asks for")


@router.get("/", include_in_schema=False)
def overview(request: Request, person: Caller) -> Response:
    """All sessions that one may see, by microscope; with a token in the address, log in with it."""
    if login_of(request).token_in_address and "token" in request.query_params:
        return welcome(request, {"by": "token"}, "")
    shown = sessions_of(request).visible(person)
    by_microscope: dict[str, list[tuple[object, object, object]]] = {}
    for session in shown:
        said = remarks_of(board_of(request, session), _THE_SESSION)
        by_microscope.setdefault(session.microscope, []).append((session, session.follower.counters(), said))
    operated = sessions_of(request).microscopes(person)
    offered = [one for one in known_templates(request) if not one.problem] if operated else []
    return page(
        request, "sessions.html", by_microscope=dict(sorted(by_microscope.items())), microscopes=sorted(operated), templates=offered
    )


def known_templates(request: Request) -> list[Template]:
    """The templates of the server that answers a request."""
    folder: Path | None = request.app.state.templates
    return templates_in(folder)


@router.get("/api/v1/templates")
def list_templates(request: Request, person: Caller) -> list[dict[str, Any]]:
    """Templates of new sessions, for operators of a microscope: the numbers that each asks for, and what is wrong with it."""
    if not sessions_of(request).microscopes(person):
        raise HTTPException(404)
    return [{"name": one.name, "numbers": list(one.numbers), "problem": one.problem} for one in known_templates(request)]


@router.post("/s", status_code=201)
def make_session(request: Request, person: Caller, new: New) -> dict[str, str]:
    """Make a session at a microscope that one operates, from a template with its name and numbers; it is not started yet."""
    operated = sessions_of(request).microscopes(person)
    if new.microscope not in operated:
        raise HTTPException(404)
    template = next((one for one in known_templates(request) if one.name == new.template), None)
    if template is None:
        raise InputError(f"There is no template {new.template!r}.", "", "reload the page")
    path = new_session(operated[new.microscope], new.name, template.filled(new.name, new.values))
    session = sessions_of(request).found(path)
    record(request, "new session", session, template=new.template, values=new.values)
    return {"id": session.id}


@router.get("/s/{id}/", include_in_schema=False)
def session_page(request: Request, session: Seen) -> Response:
    """The page of a session; its script asks for the numbers."""
    return page(request, "session.html", session=session)
