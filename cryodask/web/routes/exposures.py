"""One exposure: its picture, spectrum and numbers; quarantined exposures; thresholds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel, Field

from cryodask.errors import InputError
from cryodask.run.events.quarantined import reason_of
from cryodask.web import exposure
from cryodask.web.pictures import Pictures, jpeg
from cryodask.web.sessions import Edited, Seen, Session, caller, record
from cryodask.web.thresholds import Ranges, Thresholds, known

router = APIRouter()

_KEPT = {"Cache-Control": "private, max-age=3600"}
Number = Annotated[float, Field(allow_inf_nan=False)]


class Wanted(BaseModel):
    """Ranges by column; null: no limit on that side."""

    ranges: dict[str, tuple[Number | None, Number | None]]


@router.get("/s/{id}/exposure/{row}")
def one(session: Seen, row: int) -> Response:
    """Numbers, picks, spectrum curves and trajectories of an exposure."""
    _looked(session)
    found = exposure.described(session.follower, row)
    if found is None:
        raise HTTPException(404, "There is no exposure in this row.")
    return JSONResponse(found, headers={"Cache-Control": "no-store"})


@router.get("/s/{id}/thumbnail/{row}.jpg", include_in_schema=False)
def thumbnail(request: Request, session: Seen, row: int) -> Response:
    """A small picture for the gallery."""
    _looked(session)
    return _picture(_pictures(request).thumbnail(session.follower, row))


@router.get("/s/{id}/micrograph/{row}.jpg")
def micrograph(request: Request, session: Seen, row: int) -> Response:
    """The preview of a micrograph, at most 1024 pixels long; its lowest row is at the bottom."""
    _looked(session)
    found = _pictures(request).preview(session.follower, row)
    return _picture(None if found is None else jpeg(found[0]))


@router.get("/s/{id}/spectrum/{row}.jpg")
def spectrum(request: Request, session: Seen, row: int) -> Response:
    """The power spectrum of an exposure."""
    _looked(session)
    found = _pictures(request).spectrum(session.follower, row)
    return _picture(None if found is None else jpeg(found))


@router.get("/s/{id}/quarantine")
def quarantine(session: Seen) -> list[dict[str, Any]]:
    """Quarantined exposures, those with the same reason together, the largest group first."""
    groups: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row, failure in sorted(session.follower.failures.items()):
        name, message = str(failure["name"]), str(failure["message"])
        key = (failure["step"], str(failure["error"]), reason_of(name, message))
        group = groups.setdefault(key, {"step": failure["step"], "error": failure["error"], "message": message, "exposures": []})
        group["exposures"].append({"row": row, "name": name})
    return sorted(groups.values(), key=lambda group: -len(group["exposures"]))


@router.get("/s/{id}/thresholds")
def thresholds(session: Seen) -> dict[str, Any]:
    """The ranges that were saved last, and who saved them."""
    return Thresholds(session.follower).current()


@router.put("/s/{id}/thresholds")
def save_thresholds(request: Request, session: Edited, wanted: Wanted) -> dict[str, Any]:
    """Save ranges for all who look at the session."""
    _checked(wanted.ranges)
    saved = Thresholds(session.follower).save(wanted.ranges, caller(request).name)
    record(request, "set thresholds", session, ranges=saved["ranges"])
    return saved


@router.post("/s/{id}/thresholds/step")
def thresholds_as_step(session: Edited, wanted: Wanted) -> Response:
    """A step for the project file that leaves out the exposures that are outside these ranges now."""
    _checked(wanted.ranges)
    return PlainTextResponse(Thresholds(session.follower).as_step(wanted.ranges))


def _checked(ranges: Ranges) -> None:
    if not known(ranges):
        raise InputError(
            f"{', '.join(ranges) or 'The request'} has a range that is empty, or a column that does not exist.", "", "reload the page"
        )


def _pictures(request: Request) -> Pictures:
    found: Pictures = request.app.state.pictures
    return found


def _looked(session: Session) -> None:
    if session.follower.version == 0:
        session.follower.look()


def _picture(content: bytes | Iterable[int] | None) -> Response:
    if content is None:
        raise HTTPException(404, "This exposure has no picture yet.")
    return Response(bytes(content), media_type="image/jpeg", headers=_KEPT)
