"""Pages from templates. Addresses in them are relative to the root of the server, so that they work behind any prefix."""

from __future__ import annotations

import time
from functools import cache
from typing import Any

import jinja2
from fastapi import Request
from fastapi.responses import HTMLResponse

from cryodask.version import VERSION


@cache
def _environment() -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("cryodask.web", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    made.filters |= {"size": size_text, "date": date_text, "number": number_text}
    made.globals["version"] = VERSION
    return made


def root_of(request: Request) -> str:
    """The address of the root of the server, relative to that of a request."""
    return "../" * (str(request.scope["path"]).count("/") - 1) or "./"


def page(request: Request, template: str, status: int = 200, **values: Any) -> HTMLResponse:
    """A page. Templates know ``root``, ``person`` (None if nobody is logged in), ``version`` and the given values."""
    person = getattr(request.state, "person", None)
    text = _environment().get_template(template).render(root=root_of(request), person=person, **values)
    return HTMLResponse(text, status, {"Cache-Control": "no-store"})


def size_text(count: float) -> str:
    """``1.5 GB``."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 999.5 or unit == "TB":
            break
        count /= 1000
    return f"{count:.3g} {unit}"


def date_text(seconds: float | None) -> str:
    """``2026-11-30 12:00``, in the time of the server; empty if unknown."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds)) if seconds and seconds == seconds else ""


def number_text(value: Any) -> str:
    """A number with four digits; anything else as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
