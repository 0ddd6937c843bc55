"""For programs: sessions and their counters as JSON, described by OpenAPI at ``/api/v1/openapi.json``; health and metrics."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse, Response

from cryodask.web.sessions import Caller, Seen, Session, sessions_of

router = APIRouter()


@router.get("/healthz", include_in_schema=False)
def health() -> Response:
    """Whether the server answers; needs no log-in."""
    return PlainTextResponse("ok\n")


@router.get("/api/v1/openapi.json", include_in_schema=False)
def openapi(request: Request, person: Caller) -> dict[str, Any]:
    """Description of everything that programs can ask for."""
    described: dict[str, Any] = request.app.openapi()
    return described


@router.get("/api/v1/sessions")
def list_sessions(request: Request, person: Caller) -> list[dict[str, Any]]:
    """All sessions that one may see, with their counters."""
    return [_described(session) for session in sessions_of(request).visible(person)]


@router.get("/api/v1/sessions/{id}")
def one_session(session: Seen) -> dict[str, Any]:
    """One session with its counters."""
    return _described(session)


@router.get("/metrics", include_in_schema=False)
def metrics(request: Request, person: Caller) -> Response:
    """Sessions that one may see, in Prometheus' text format."""
    lines: list[str] = []
    sessions = [(s, s.follower.counters()) for s in sessions_of(request).visible(person)]
    for name, about in _METRICS.items():
        lines += [f"# HELP cryodask_session_{name} {about}", f"# TYPE cryodask_session_{name} gauge"]
        lines += [f"cryodask_session_{name}{_labels(session)} {now[name]}" for session, now in sessions]
    lines += ["# HELP cryodask_session_readable Whether the project can be read.", "# TYPE cryodask_session_readable gauge"]
    lines += [f"cryodask_session_readable{_labels(session)} {int(not now['problem'])}" for session, now in sessions]
    lines += ["# HELP cryodask_viewers Open pages.", "# TYPE cryodask_viewers gauge"]
    lines += [f"cryodask_viewers{_labels(session)} {session.follower.viewers}" for session, _ in sessions]
    return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4; charset=utf-8")


_METRICS = {
    "exposures": "Exposures of the session.",
    "waiting": "Exposures that no step has processed.",
    "started": "Exposures that some steps have processed.",
    "done": "Exposures that all steps have processed.",
    "quarantined": "Quarantined exposures.",
    "picks": "Accepted picks.",
}


def _labels(session: Session) -> str:
    values = {"session": session.id, "microscope": session.microscope}
    quoted = {k: v.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") for k, v in values.items()}
    return "{" + ",".join(f'{k}="{v}"' for k, v in quoted.items()) + "}"


def _described(session: Session) -> dict[str, Any]:
    return {"id": session.id, "name": session.name, "microscope": session.microscope, **session.follower.counters()}
