"""Choosing classes and exposures by eye, with reasons; ratings, tags and notes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field

from cryodask.edits.board import Board
from cryodask.edits.choices import current
from cryodask.edits.frozen import latest
from cryodask.edits.log import OperationLog
from cryodask.web.boards import board_of
from cryodask.web.maps import average_png
from cryodask.web.pages import page
from cryodask.web.people import Right
from cryodask.web.routes.picking import Operations, take, use
from cryodask.web.sessions import Edited, Seen, Session, caller

router = APIRouter()

Chosen = Literal["classes", "exposures"]
_STEPS = {"classes": "select_classes", "exposures": "select_exposures"}


class Use(BaseModel):
    """Which choice to use; ``of``: the classification of classes."""

    of: Annotated[str, Field(max_length=200)] = ""


@router.get("/s/{id}/classes", include_in_schema=False)
def classes_page(request: Request, session: Seen) -> Response:
    """The page on which classes are chosen."""
    return _page(request, session, "classes")


@router.get("/s/{id}/choose", include_in_schema=False)
def exposures_page(request: Request, session: Seen) -> Response:
    """The page on which exposures are excluded, rated and tagged by eye."""
    return _page(request, session, "exposures")


def _page(request: Request, session: Session, kind: Chosen) -> Response:
    edits = caller(request).may(Right.edit, session.id, session.microscope)
    steps = list(board_of(request, session).board.classifications()) if kind == "classes" else []
    return page(request, "choose.html", session=session, kind=kind, edits=edits, steps=steps)


@router.get("/s/{id}/choices/{kind}")
def choices(request: Request, session: Seen, kind: Chosen, of: str = "") -> Response:
    """What can be chosen, and what is: values by row and name, with who set them."""
    board = board_of(request, session).board
    log = board.log(kind)
    log.look()
    of, items = _classes(board, of) if kind == "classes" else _exposures(session, set(board.rows()))
    frozen = latest(log, of)
    return JSONResponse(
        {
            "of": of,
            "items": items,
            "values": _values(log, of),
            "highest": log.highest,
            "frozen": {"who": frozen.who, "time": frozen.time, "count": len(frozen.content)} if frozen is not None else None,
            "used": board.is_used(_STEPS[kind]),
        },
        headers={"Cache-Control": "no-store"},
    )


@router.get("/s/{id}/remarks")
def remarks(request: Request, session: Seen) -> Response:
    """Exclusions, ratings, tags and notes of exposures, for filters; row -1 is the session."""
    log = board_of(request, session).board.exposures
    log.look()
    return JSONResponse({"values": _values(log, "")}, headers={"Cache-Control": "no-store"})


def _values(log: OperationLog, of: str) -> list[list[Any]]:
    found = current(one for row in log.rows() for one in log.of_row(row))
    return [[row, name, value.value, value.who] for (place, row, name), value in found.items() if place == of]


def _classes(board: Board, of: str) -> tuple[str, list[dict[str, Any]]]:
    of, generation = board.classification(of)
    if generation is None:
        return "", []
    record = generation.committed()[0]
    share = np.asarray(generation.read(record, "class_share"), np.float64).ravel()
    figures: list[list[str]] = [[f"{100 * s:.1f} %"] for s in share]
    if "class_resolution_angstrom" in generation.meta["gives"]:
        for said, value in zip(figures, np.asarray(generation.read(record, "class_resolution_angstrom")).ravel()):
            said += [f"{value:.1f} Å"] if np.isfinite(value) else []
    items = [
        {
            "row": n + 1,
            "name": f"class {n + 1}",
            "about": ", ".join(said),
            "picture": f"classes/{n + 1}.png?of={of}",
            "sort": -float(share[n]),
        }
        for n, said in enumerate(figures)
    ]
    return of, sorted(items, key=lambda item: item["sort"])


def _exposures(session: Session, pictured: set[int]) -> tuple[str, list[dict[str, Any]]]:
    follower = session.follower
    if follower.version == 0:
        follower.look()
    items = []
    for row, name in enumerate(list(follower.names)):
        if name:
            values = [(c, float(follower.columns[c][row])) for c in ("ctf_resolution", "defocus", "picks")]
            units = {"ctf_resolution": "Å", "defocus": "µm", "picks": "picks"}
            about = ", ".join(f"{value:.3g} {units[c]}" for c, value in values if np.isfinite(value))
            items.append(
                {"row": row, "name": name, "about": about, "picture": f"thumbnail/{row}.jpg" if row in pictured else "", "sort": row}
            )
    return "", items


@router.get("/s/{id}/classes/{number}.png")
def average(request: Request, session: Seen, number: int, of: str = "") -> Response:
    """The average of a class, counted from 1; ``of``: the classification (by default the last one that people choose from)."""
    _, generation = board_of(request, session).board.classification(of)
    if generation is None:
        raise HTTPException(404, "There is no such classification.")
    images = np.asarray(generation.read(generation.committed()[0], "class_average"))
    if not 1 <= number <= len(images):
        raise HTTPException(404, "There is no such class.")
    headers = {"Cache-Control": "private, max-age=31536000, immutable"}
    return Response(average_png(images, number - 1), media_type="image/png", headers=headers)


@router.post("/s/{id}/choices/{kind}/ops")
async def choose(request: Request, session: Edited, kind: Chosen, wanted: Operations) -> dict[str, Any]:
    """Store choices, ratings, tags and notes; sent again, they count once."""
    return await take(request, session, kind, wanted.ops)


@router.post("/s/{id}/choices/{kind}/freeze")
async def use_choices(request: Request, session: Edited, kind: Chosen, wanted: Use) -> dict[str, Any]:
    """Use the choice as it is now in the next run."""
    if kind == "classes" and not (await run_in_threadpool(board_of(request, session).board.classification, wanted.of))[0]:
        raise HTTPException(409, "The classification was computed again meanwhile: reload the page and choose from the new one.")
    return await use(request, session, kind, wanted.of if kind == "classes" else "")
