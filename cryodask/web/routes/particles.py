"""The particles of a step: density of two columns, and ranges of others."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from cryodask.errors import StoreError
from cryodask.store.project import Project
from cryodask.web import particles
from cryodask.web.pages import page
from cryodask.web.sessions import Seen, Session

router = APIRouter()


@router.get("/s/{id}/particles", include_in_schema=False)
def particles_page(request: Request, session: Seen, step: str = "") -> Response:
    """The page; ``step`` is the one that is shown first."""
    session.follower.look()
    steps = particles.particle_steps(session.follower.project) if not session.follower.problem else []
    chosen = step if step in steps else (steps[-1] if steps else "")
    return page(request, "particles.html", session=session, steps=steps, chosen=chosen)


@router.get("/s/{id}/particles.json")
def particle_columns(session: Seen, step: str) -> dict[str, Any]:
    """The columns of the particles of a step, and those to begin with."""
    found = particles.described(_now(session), step)
    return {"step": step, "columns": found, "first": particles.first_columns(found)}


@router.get("/s/{id}/particles/columns")
def particle_values(session: Seen, step: str, names: Annotated[str, Query(max_length=1000)]) -> Response:
    """Columns (``names``, separated by commas) of the particles of a step, binary: see :func:`cryodask.web.particles.packed`."""
    content = particles.packed(_now(session), step, [name for name in names.split(",") if name])
    return Response(content, media_type="application/octet-stream", headers={"Cache-Control": "no-store"})


def _now(session: Session) -> Project:
    """The project as it is now: this page does not follow it, and without viewers it is looked at every half a minute only."""
    session.follower.look()
    if session.follower.problem:
        raise StoreError(session.follower.problem, "", "reload the page when the project can be read again")
    return session.follower.project
