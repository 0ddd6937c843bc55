"""Maps of a session: sections, surface, FSC, orientations; class averages."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Query, Request
from fastapi.responses import Response

from cryodask.web import maps
from cryodask.web.boards import board_of
from cryodask.web.maps import MapStep
from cryodask.web.pages import page
from cryodask.web.pictures import Cache
from cryodask.web.sessions import Seen, Session

router = APIRouter()

_KEPT = {"Cache-Control": "private, max-age=3600"}


@router.get("/s/{id}/maps", include_in_schema=False)
def maps_page(request: Request, session: Seen, step: str = "") -> Response:
    """The page of maps; ``step`` is the one that is shown first."""
    follower = session.follower
    follower.look()  # this page does not follow the project, which without viewers is looked at every half a minute only
    steps = [one.label for one in maps.map_steps(follower.project)] if not follower.problem else []
    found = maps.averages(follower) if not follower.problem else None
    chosen = step if step in steps else (steps[-1] if steps else "")
    classes = (found[0], found[1]) if found is not None else None
    components = list(board_of(request, session).board.analyses()) if not follower.problem else []
    return page(request, "maps.html", session=session, steps=steps, chosen=chosen, classes=classes, components=components)


@router.get("/s/{id}/map/{step}")
def one_map(session: Seen, step: str) -> dict[str, Any]:
    """Size, figures and FSC of a map."""
    return maps.described(_step(session, step))


@router.get("/s/{id}/map/{step}/section.png")
def section(
    request: Request,
    session: Seen,
    step: str,
    axis: Annotated[int, Query(ge=0, le=2)] = 0,
    at: Annotated[float, Query(ge=0, le=1, allow_inf_nan=False)] = 0.5,
) -> Response:
    """A section through a map: ``axis`` 0 z, 1 y, 2 x; ``at`` 0 to 1 along it."""
    return Response(maps.section(_cache(request), _step(session, step), axis, at), media_type="image/png", headers=_KEPT)


@router.get("/s/{id}/map/{step}/surface")
def surface(
    request: Request, session: Seen, step: str, sigmas: Annotated[float, Query(ge=-10, le=100, allow_inf_nan=False)] = 3.0
) -> Response:
    """Isosurface of a map, binary: see :func:`cryodask.web.maps.surface`."""
    return Response(maps.surface(_cache(request), _step(session, step), sigmas), media_type="application/octet-stream", headers=_KEPT)


@router.get("/s/{id}/map/{step}/orientations")
def orientations(session: Seen, step: str) -> dict[str, Any]:
    """Viewing directions of the particles of a map; ``counts`` is null for steps that give no orientations."""
    return maps.orientations(_step(session, step))


@router.get("/s/{id}/average/{number}.png")
def class_average(session: Seen, number: int) -> Response:
    """The average of a class of the last classification, counted from 1."""
    found = maps.averages(session.follower)
    if found is None or not 1 <= number <= len(found[2]):
        raise HTTPException(404, "There is no such class.")
    return Response(maps.average_png(found[2], number - 1), media_type="image/png", headers={"Cache-Control": "private, max-age=60"})


def _step(session: Session, label: str) -> MapStep:
    found = next((one for one in maps.map_steps(session.follower.project) if one.label == label), None)
    if found is None:
        raise HTTPException(404, "This step has no map.")
    return found


def _cache(request: Request) -> Cache:
    found: Cache = request.app.state.pictures.cache
    return found
