"""Choosing and drawing the mask of a map by eye."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from fastapi import APIRouter, HTTPException, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field

from cryodask.edits.board import Board
from cryodask.edits.frozen import latest, state_of
from cryodask.edits.log import FROZEN_ROW, OperationLog
from cryodask.edits.masks import standing
from cryodask.web import masks
from cryodask.web.boards import board_of
from cryodask.web.maps import MapStep, map_steps
from cryodask.web.pages import page
from cryodask.web.people import Right
from cryodask.web.pictures import Cache
from cryodask.web.routes.picking import Operations, take, use
from cryodask.web.sessions import Edited, Seen, Session, caller

router = APIRouter()

_FRESH = {"Cache-Control": "no-store"}


class Use(BaseModel):
    """The result whose mask or regions are to be used: ``STAGE/KEY``, with ``.class2`` for the map of a class."""

    of: Annotated[str, Field(max_length=200)]


@router.get("/s/{id}/mask", include_in_schema=False)
def mask_page(request: Request, session: Seen, step: str = "") -> Response:
    """The page on which the mask of a map is chosen."""
    edits = caller(request).may(Right.edit, session.id, session.microscope)
    steps = list(board_of(request, session).board.maps()) if not session.follower.problem else []
    return page(request, "mask.html", session=session, edits=edits, steps=steps, chosen=step if step in steps else "".join(steps[:1]))


@router.get("/s/{id}/mask/{step}")
def mask(request: Request, session: Seen, step: str) -> Response:
    """The mask of a map as people have chosen it so far: parameters of stage ``draw_mask``, what runs use, and what the map is like."""
    board, found = _found(request, session, step)
    of, log = found.place, board.masks
    recipe, frozen = state_of(log, of), latest(log, of)
    current = frozen is not None and frozen.content == json.loads(json.dumps(recipe))
    return JSONResponse(
        {
            "of": of,
            "recipe": recipe,
            "drawn": list(standing(log.of_row(0), of)),
            "edited": any(one["of"] == of for one in log.of_row(0)),
            "former": _former(log, of),
            "map": masks.about(_cache(request), found, recipe),
            "highest": log.highest,
            "frozen": {"who": frozen.who, "time": frozen.time, "current": current} if frozen is not None else None,
            "used": board.is_used("draw_mask"),
        },
        headers=_FRESH,
    )


@router.get("/s/{id}/mask/{step}/volume")
def volume(request: Request, session: Seen, step: str) -> Response:
    """The mask on a coarse grid, binary: see :mod:`cryodask.web.masking`."""
    board, found = _found(request, session, step)
    content = masks.mask_bytes(_cache(request), found, state_of(board.masks, found.place))
    return Response(content, media_type="application/octet-stream", headers={**_FRESH, "Content-Encoding": "gzip"})


@router.get("/s/{id}/mask/{step}/surface")
def surface(
    request: Request,
    session: Seen,
    step: str,
    of: Literal["map", "mask"] = "mask",
    sigmas: Annotated[float, Query(ge=-10, le=100, allow_inf_nan=False)] = 3.0,
) -> Response:
    """Surface of the map or its mask, binary: see :func:`cryodask.web.maps.surface_at`."""
    board, found = _found(request, session, step)
    recipe = state_of(board.masks, found.place) if of == "mask" else None
    return Response(masks.surfaces(_cache(request), found, recipe, sigmas), media_type="application/octet-stream", headers=_FRESH)


@router.post("/s/{id}/mask/ops")
async def edit_mask(request: Request, session: Edited, wanted: Operations) -> dict[str, Any]:
    """Store edits of masks; sent again, they count once."""
    return await take(request, session, "masks", wanted.ops)


@router.post("/s/{id}/mask/freeze")
async def use_mask(request: Request, session: Edited, wanted: Use) -> dict[str, Any]:
    """Use the mask of a map as it is now in the next run."""
    if wanted.of not in (await run_in_threadpool(board_of(request, session).board.maps)).values():
        raise HTTPException(409, "The map was computed again meanwhile: reload the page and choose the mask of the new one.")
    return await use(request, session, "masks", wanted.of)


def _found(request: Request, session: Session, label: str) -> tuple[Board, MapStep]:
    board = board_of(request, session).board
    found = next((one for one in map_steps(board.project(), ["final_map"]) if one.label == label), None)
    if found is None or found.place not in board.maps().values():
        raise HTTPException(404, "This step has no map on which a mask can be chosen.")
    return board, found


def _former(log: OperationLog, of: str) -> dict[str, Any] | None:
    """The mask that was last used of another result of the same stage, to begin with."""
    lines = [line for line in log.of_row(FROZEN_ROW) if line["of"] != of and line["of"].partition("/")[0] == of.partition("/")[0]]
    found = latest(log, lines[-1]["of"]) if lines else None
    return found.content if found is not None else None


def _cache(request: Request) -> Cache:
    found: Cache = request.app.state.pictures.cache
    return found
