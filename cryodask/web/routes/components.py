"""The space of components of a variability analysis: maps at its points, and regions of it whose particles are kept as a set."""

from __future__ import annotations

import json
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, JSONResponse, Response
from pydantic import Field, TypeAdapter, ValidationError
from starlette.background import BackgroundTask

from cryodask.edits.board import Board
from cryodask.edits.frozen import latest, state_of
from cryodask.edits.masks import standing
from cryodask.edits.regions import MOST_REGIONS, Region
from cryodask.errors import InputError
from cryodask.web import components
from cryodask.web.boards import board_of
from cryodask.web.components import Analysis
from cryodask.web.pages import page
from cryodask.web.people import Right
from cryodask.web.pictures import Cache
from cryodask.web.routes.masks import Use
from cryodask.web.routes.picking import Operations, take, use
from cryodask.web.sessions import Edited, Seen, Session, caller

router = APIRouter()

_FRESH = {"Cache-Control": "no-store"}
_REGIONS = TypeAdapter(Annotated[list[Region], Field(max_length=MOST_REGIONS)])
_POINT = TypeAdapter(Annotated[list[Annotated[float, Field(ge=-1e3, le=1e3)]], Field(max_length=6)])
At = Annotated[str, Query(max_length=300)]
Chosen = Annotated[str, Query(max_length=20_000)]
Cells = Annotated[int, Query(ge=1, le=600)]
Component = Annotated[int, Query(ge=0, le=6)]


@router.get("/s/{id}/components", include_in_schema=False)
def components_page(request: Request, session: Seen, step: str = "") -> Response:
    """The page on which the space of components is looked at, and regions of it are chosen."""
    edits = caller(request).may(Right.edit, session.id, session.microscope)
    steps = list(board_of(request, session).board.analyses()) if not session.follower.problem else []
    chosen = step if step in steps else "".join(steps[:1])
    return page(request, "components.html", session=session, edits=edits, steps=steps, chosen=chosen)


@router.get("/s/{id}/components/{step}")
def one_analysis(request: Request, session: Seen, step: str) -> Response:
    """An analysis of variability: its components and whether they are noise, the regions that people have chosen, and what runs use."""
    board, found = _found(request, session, step)
    of, log, cache = found.place, board.regions, _cache(request)
    state, frozen = state_of(log, of), latest(log, of)
    lines = {one["id"]: one for one in log.of_row(0)}
    regions = standing(log.of_row(0), of, "region")
    shown = []
    for id, region in regions.items():
        count = components.counted(cache, found, [_region(region)])
        shown.append({**region, "id": id, "reason": lines[id]["reason"], "who": lines[id].get("who", ""), "particles": count})
    return JSONResponse(
        {
            **components.described(cache, found),
            "regions": shown,
            "chosen": components.counted(cache, found, [_region(one) for one in regions.values()]),
            "highest": log.highest,
            "frozen": {"who": frozen.who, "time": frozen.time, "current": frozen.content == json.loads(json.dumps(state))}
            if frozen
            else None,
            "used": board.is_used("select_region"),
        },
        headers=_FRESH,
    )


@router.get("/s/{id}/components/{step}/density")
def density(
    request: Request, session: Seen, step: str, x: Component = 1, y: Component = 0, across: Cells = 180, down: Cells = 140
) -> Response:
    """Particles by cell of the plane of two components (``y`` 0: of one), binary: see :func:`cryodask.web.components.density`."""
    _, found = _found(request, session, step)
    content = components.density(_cache(request), found, x, y, across, down)
    return Response(content, media_type="application/octet-stream", headers=_FRESH)


@router.get("/s/{id}/components/{step}/region")
def region(request: Request, session: Seen, step: str, regions: Chosen = "") -> Response:
    """Particles in ``regions`` (JSON, as ``regions`` of stage ``select_region``; by default those chosen): by half-set and by exposure."""
    board, found = _found(request, session, step)
    figures = components.region_figures(_cache(request), found, _given(board, found, regions), set(board.rows()))
    return JSONResponse(figures, headers=_FRESH)


@router.get("/s/{id}/components/{step}/particles.png")
def images(request: Request, session: Seen, step: str, regions: Chosen = "") -> Response:
    """Images of some particles in ``regions``; by default those chosen."""
    board, found = _found(request, session, step)
    return Response(components.images(_cache(request), found, _given(board, found, regions)), media_type="image/png", headers=_FRESH)


@router.get("/s/{id}/components/{step}/section.png")
def section(
    request: Request,
    session: Seen,
    step: str,
    point: At = "[]",
    axis: Annotated[int, Query(ge=0, le=2)] = 0,
    at: Annotated[float, Query(ge=0, le=1, allow_inf_nan=False)] = 0.5,
) -> Response:
    """A section through the map at a point (JSON list of coordinates): ``axis`` 0 z, 1 y, 2 x; ``at`` 0 to 1 along it."""
    _, found = _found(request, session, step)
    return Response(components.section(_cache(request), found, _point(point), axis, at), media_type="image/png", headers=_FRESH)


@router.get("/s/{id}/components/{step}/surface")
def surface(
    request: Request,
    session: Seen,
    step: str,
    point: At = "[]",
    sigmas: Annotated[float, Query(ge=-10, le=100, allow_inf_nan=False)] = 3.0,
) -> Response:
    """Surface of the map at a point (JSON list of coordinates), binary: see :func:`cryodask.web.maps.surface_at`."""
    _, found = _found(request, session, step)
    content = components.surface(_cache(request), found, _point(point), sigmas)
    return Response(content, media_type="application/octet-stream", headers=_FRESH)


@router.get("/s/{id}/components/{step}/map.mrc")
def whole_map(request: Request, session: Seen, step: str, point: At = "[]") -> Response:
    """The map at a point (JSON list of coordinates) with all its voxels, as an MRC file."""
    _, found = _found(request, session, step)
    where = _point(point)
    name = f"{step}_{'_'.join(f'{z:.3g}' for z in where) or 'mean'}.mrc"
    path = components.write_map(_cache(request), found, where)
    removed = BackgroundTask(path.unlink, missing_ok=True)
    return FileResponse(path, media_type="application/octet-stream", filename=name, headers=_FRESH, background=removed)


@router.post("/s/{id}/components/ops")
async def edit_regions(request: Request, session: Edited, wanted: Operations) -> dict[str, Any]:
    """Store edits of regions; sent again, they count once."""
    return await take(request, session, "regions", wanted.ops)


@router.post("/s/{id}/components/freeze")
async def use_regions(request: Request, session: Edited, wanted: Use) -> dict[str, Any]:
    """Use the regions of an analysis as they are now in the next run."""
    if wanted.of not in (await run_in_threadpool(board_of(request, session).board.analyses)).values():
        raise HTTPException(409, "The components were computed again meanwhile: reload the page and choose regions of the new ones.")
    return await use(request, session, "regions", wanted.of)


def _found(request: Request, session: Session, label: str) -> tuple[Board, Analysis]:
    board = board_of(request, session).board
    if label not in board.analyses():
        raise HTTPException(404, "This step has no components.")
    return board, components.analysis(board.project(), label)


def _region(given: dict[str, Any]) -> Region:
    return Region.model_validate(given)


def _given(board: Board, found: Analysis, text: str) -> list[Region]:
    if not text:
        return [_region(one) for one in state_of(board.regions, found.place)["regions"]]
    try:
        return _REGIONS.validate_json(text)
    except ValidationError as error:
        raise InputError(f"The regions are not valid: {error.errors()[0]['msg']}.", "", "draw the region again") from None


def _point(text: str) -> list[float]:
    try:
        return _POINT.validate_json(text)
    except ValidationError as error:
        raise InputError(f"The point is not valid: {error.errors()[0]['msg']}.", "", "choose a point of the picture") from None


def _cache(request: Request) -> Cache:
    found: Cache = request.app.state.pictures.cache
    return found
