"""Changes of a session as they happen (server-sent events), and its numbers: binary for pages, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response, StreamingResponse

from cryodask.web import parquet
from cryodask.web.sessions import Seen, Session, Sessions, sessions_of

router = APIRouter()

_SILENCE_SECONDS = 15.0
"""After so long without a change a comment is sent: proxies close connections that are silent for a minute."""
_SPREAD_MS_PER_VIEWER = 3
_LONGEST_SPREAD_MS = 300


@router.get("/s/{id}/events", include_in_schema=False)
async def events(request: Request, session: Seen) -> Response:
    """The counters of a session whenever they change; pages then ask for the columns."""
    stream = _changes(session, sessions_of(request))
    return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})


async def _changes(session: Session, shown: Sessions) -> AsyncIterator[str]:
    follower = session.follower
    follower.viewers += 1
    try:
        yield "retry: 2000\n\n"
        sent: dict[str, Any] = {}
        while True:
            now = follower.counters()
            if now != sent:
                sent = now
                # so that a hundred open pages do not all ask for the columns at the same moment
                spread = min(_LONGEST_SPREAD_MS, _SPREAD_MS_PER_VIEWER * (follower.viewers - 1))
                yield f"event: changed\ndata: {json.dumps({**now, 'spread_ms': spread})}\n\n"
            if not await shown.changed(session, _SILENCE_SECONDS):
                yield ": still here\n\n"
    finally:
        follower.viewers -= 1


@router.get("/s/{id}/columns")
async def columns(session: Seen, since: int = -1, epoch: str = "") -> Response:
    """Exposures that changed after a sequence number, binary: see :meth:`cryodask.web.follow.Follower.packed`."""
    await _first_look(session)
    content = session.follower.packed(since, epoch)
    return Response(content, media_type="application/octet-stream", headers={"Cache-Control": "no-store"})


@router.get("/s/{id}/columns.json")
async def columns_as_json(session: Seen) -> Response:
    """All exposures with their numbers; missing ones are null."""
    await _first_look(session)
    return JSONResponse(await run_in_threadpool(session.follower.document), headers={"Cache-Control": "no-store"})


@router.get("/s/{id}/columns.parquet")
async def columns_as_parquet(session: Seen) -> Response:
    """All exposures with their numbers as a Parquet file; 501 where pyarrow is not installed."""
    if not parquet.available():
        raise HTTPException(501, "Parquet needs the package pyarrow on the server, which is not installed: use columns.json.")
    await _first_look(session)
    content = await run_in_threadpool(lambda: parquet.as_parquet(session.follower.packed(-1, "")))
    headers = {"Cache-Control": "no-store", "Content-Disposition": 'attachment; filename="columns.parquet"'}
    return Response(content, media_type="application/vnd.apache.parquet", headers=headers)


async def _first_look(session: Session) -> None:
    if session.follower.version == 0:
        await run_in_threadpool(session.follower.look)
