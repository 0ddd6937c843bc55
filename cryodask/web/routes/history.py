"""Runs and history of a session: the graph of its steps, every result, and two results side by side."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from cryodask.errors import StoreError
from cryodask.run.events import Counted, Event
from cryodask.run.events.log import event_files, tail
from cryodask.run.events.progress import COUNTS, text_of
from cryodask.store import history
from cryodask.store.project import Project
from cryodask.web.exposure import number, numbers
from cryodask.web.graph import drawn
from cryodask.web.pages import page
from cryodask.web.sessions import Seen, Session

router = APIRouter()

_EVENTS = 60


@router.get("/s/{id}/history", include_in_schema=False)
def history_page(request: Request, session: Seen, first: str = "", second: str = "") -> Response:
    """The page; with two results, what differs between them."""
    project = Project(session.path)  # not the follower's: what the history reads of all results is freed with the page
    compared: dict[str, list[Any]] | None = None
    problem = ""
    if first and second:
        try:
            compared = history.differences(project, first, second)
        except StoreError as error:
            problem = error.problem
    # what people ask for comes first
    made = [
        replace(one, figures=dict(sorted(one.figures.items(), key=lambda figure: "resolution" not in figure[0])))
        for one in history.made(project)
    ]
    return page(
        request,
        "history.html",
        session=session,
        graph=drawn(project, session.follower.counts()),
        made=made[::-1],
        runs=len({path.name.rsplit("-", 1)[0] for path in event_files(session.path)}),
        events=[_said(event) for event in tail(session.path, _EVENTS)][::-1],
        first=first,
        second=second,
        compared=compared,
        problem=problem,
    )


@router.get("/s/{id}/history.json")
def history_as_json(session: Seen) -> list[dict[str, Any]]:
    """Every result that was computed, newest last."""
    return [_as_json(made) for made in history.made(Project(session.path))]


def _as_json(made: history.Made) -> dict[str, Any]:
    figures = {name: number(value) for name, value in made.figures.items()}
    return {**asdict(made), "figures": figures}


@router.get("/s/{id}/fsc")
def curves(session: Seen, which: str = "") -> dict[str, Any]:
    """Corrected FSC curves of some results, named ``STEP@KEY`` and separated by commas; those without one are left out."""
    return _curves(session, [name for name in which.split(",") if name])


def _curves(session: Session, names: list[str]) -> dict[str, Any]:
    found = history.curves(Project(session.path), *names)
    return {name: {"frequency": numbers(frequency), "values": numbers(values)} for name, (frequency, values) in found.items()}


def _said(event: Event) -> tuple[float, str, str]:
    """Time, kind and content of an event: its sentence, else its fields."""
    record = event.as_record()
    text = f"{event.step}: {COUNTS.format(**record)}" if isinstance(event, Counted) else text_of(event, every_exposure=True)
    if text:
        return float(record.get("time", 0.0)), str(record.get("kind") or record.get("event") or ""), text
    rest = {k: v for k, v in record.items() if k not in ("time", "kind", "event", "run") and v not in (None, "", {}, [])}
    text = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in rest.items())
    return float(record.get("time", 0.0)), str(record.get("kind") or record.get("event") or ""), text
