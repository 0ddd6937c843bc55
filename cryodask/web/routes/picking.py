"""Picking in the browser: the page, its pictures, the picks, and the edits of all who look at them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, Field

from cryodask.edits.frozen import freeze
from cryodask.edits.operations import MOST_AT_ONCE
from cryodask.edits.pictures import level, steps_of
from cryodask.edits.shown import about_picks
from cryodask.web.boards import Watched, board_of
from cryodask.web.pages import page
from cryodask.web.people import Right
from cryodask.web.pictures import Cache
from cryodask.web.sessions import Edited, Seen, Session, caller, record

router = APIRouter()

Kind = Literal["picks", "classes", "exposures", "masks", "regions"]
_SILENCE_SECONDS = 15.0


class Operations(BaseModel):
    """Edits to store, all or none."""

    ops: Annotated[list[dict[str, Any]], Field(max_length=MOST_AT_ONCE)]


@router.get("/s/{id}/pick/{row}", include_in_schema=False)
def pick_page(request: Request, session: Seen, row: int) -> Response:
    """The page on which picks of an exposure are edited."""
    board = board_of(request, session).board
    exposure, rows = board.exposure(row), board.rows()
    at = rows.index(row) if row in rows else 0
    edits = caller(request).may(Right.edit, session.id, session.microscope)
    values: dict[str, Any] = {
        "before": rows[at - 1] if at else None,
        "after": rows[at + 1] if at + 1 < len(rows) else None,
        "number": at + 1,
    }
    return page(request, "pick.html", session=session, row=row, name=exposure.name, edits=edits, many=len(rows), **values)


@router.get("/s/{id}/picture/{row}/{pixels}")
def picture(session: Seen, request: Request, row: int, pixels: int) -> Response:
    """A level of the picture pyramid: rows of bytes, the lowest first; their number and length are in ``X-Shape``."""
    exposure = board_of(request, session).board.exposure(row)
    if pixels not in steps_of(exposure.shape):
        raise HTTPException(404, f"The levels of this picture are {', '.join(map(str, steps_of(exposure.shape)))}.")
    cache: Cache = request.app.state.levels
    content = cache.get(f"{exposure.crc:08x}-{session.id}-{row}-{pixels}", lambda: level(exposure, pixels).tobytes())
    height, width = (n // pixels for n in exposure.shape)
    headers = {"X-Shape": f"{height},{width}", "Cache-Control": "private, max-age=31536000, immutable"}
    return Response(content, media_type="application/octet-stream", headers=headers)


@router.get("/s/{id}/picks/{row}")
def picks(request: Request, session: Seen, row: int) -> Response:
    """Picks of an exposure as people have edited them, in pixels of the micrograph, whose rows run upwards."""
    return JSONResponse(about_picks(board_of(request, session).board, row), headers={"Cache-Control": "no-store"})


@router.post("/s/{id}/picks/{row}/ops")
async def edit_picks(request: Request, session: Edited, row: int, wanted: Operations) -> dict[str, Any]:
    """Store edits of the picks of an exposure; sent again, they count once."""
    if any(one.get("row") != row for one in wanted.ops):
        raise HTTPException(422, f"An edit is of another exposure than row {row}.")
    return await take(request, session, "picks", wanted.ops)


async def take(request: Request, session: Session, kind: Kind, ops: list[dict[str, Any]]) -> dict[str, Any]:
    """Store edits by the caller and tell all open pages."""
    watched = board_of(request, session)
    stored = await run_in_threadpool(watched.board.take, kind, ops, caller(request).name)
    rows = sorted({one["row"] for one in stored})
    await run_in_threadpool(record, request, f"edit {kind}", session, count=len(stored), rows=rows[:20])
    if stored:
        watched.tell()
    log = watched.board.log(kind)
    return {"stored": len(stored), "highest": log.highest, "version": log.version}


@router.post("/s/{id}/picks/freeze")
async def use_picks(request: Request, session: Edited) -> dict[str, Any]:
    """Use the edits as they are now in the next run."""
    return await use(request, session, "picks")


async def use(request: Request, session: Session, kind: Kind, of: str = "") -> dict[str, Any]:
    """Freeze the edits of a kind for the caller."""
    watched = board_of(request, session)
    made = await run_in_threadpool(freeze, watched.board.log(kind), caller(request).name, of)
    await run_in_threadpool(record, request, f"freeze {kind}", session, state=made.digest, of=of)
    watched.tell()
    return {"state": made.digest, "who": made.who, "time": made.time, "edits": len(made.content)}


@router.get("/s/{id}/edits/{kind}/events", include_in_schema=False)
async def events(request: Request, session: Seen, kind: Kind) -> Response:
    """The version of the edits of a kind whenever it changes (server-sent events)."""
    stream = _changes(board_of(request, session), kind)
    return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})


async def _changes(watched: Watched, kind: Kind) -> AsyncIterator[str]:
    yield "retry: 1000\n\n"
    await run_in_threadpool(watched.board.log(kind).look)
    version = watched.board.log(kind).version
    while True:
        yield f"event: edits\ndata: {json.dumps(version)}\n\n"
        now = version
        while now == version:
            now = await watched.changed(kind, version, _SILENCE_SECONDS)
            if now == version:
                yield ": still here\n\n"
        version = now
