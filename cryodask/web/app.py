"""The server's application: routes, log-in, and what is shown when something is wrong."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from urllib.parse import quote

from anyio import to_thread
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, RedirectResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from cryodask.account import cache_folder
from cryodask.errors import CryodaskError, InputError, ProjectFileError, StoreError
from cryodask.tiers.policy import Storage
from cryodask.version import VERSION
from cryodask.web.control import Starter
from cryodask.web.gate import Gate
from cryodask.web.login import Login
from cryodask.web.pages import page, root_of
from cryodask.web.pictures import Cache, Pictures
from cryodask.web.routes import (
    account,
    admin,
    api,
    classes,
    cluster,
    components,
    control,
    data,
    events,
    exposures,
    history,
    maps,
    masks,
    particles,
    picking,
    sessions,
)
from cryodask.web.sessions import Sessions

_ROUTERS = (
    account,
    sessions,
    control,
    events,
    exposures,
    picking,
    classes,
    particles,
    maps,
    masks,
    components,
    history,
    data,
    cluster,
    admin,
    api,
)
_THREADS = 8
_SAID = {
    401: "Log in first.",
    403: "You may look at this session, but not change this.",
    404: "There is nothing at this address, or you may not see it.",
    405: "This address does not take that kind of request.",
    429: "Too many attempts: wait a minute.",
}


def create_app(
    shown: Sessions,
    login: Login,
    *,
    prefix: str = "",
    cache: Path | None = None,
    storage: Storage | None = None,
    starter: Starter | None = None,
    templates: Path | None = None,
) -> Gate:
    """The ASGI application of a server.

    Parameters
    ----------
    shown : Sessions
        What it shows.
    login : Login
        Who may see it.
    prefix : str
        Path before all addresses, where a proxy passes it on.
    cache : Path, optional
        Folder on a local disk for pictures; by default in the account's cache.
    storage : Storage, optional
        How long data are kept.
    starter : Starter, optional
        Starts the runs of sessions; by default none are started.
    templates : Path, optional
        Folder of the project files from which new sessions are made.
    """

    @asynccontextmanager
    async def looking(app: FastAPI) -> AsyncIterator[None]:
        shown.discover()
        # each thread keeps memory of its own for good, and more of them than cores make nothing faster
        to_thread.current_default_thread_limiter().total_tokens = _THREADS
        task = asyncio.create_task(shown.run())
        yield
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        shown.pool.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(title="cryodask", version=VERSION, lifespan=looking, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.sessions, app.state.login, app.state.storage = shown, login, storage or Storage()
    app.state.pictures = Pictures(Cache(cache or cache_folder() / "pictures"))
    app.state.boards, app.state.levels = {}, Cache((cache or cache_folder()) / "levels")
    app.state.starter, app.state.templates = starter or Starter(None, strict=True), templates
    app.mount("/static", StaticFiles(directory=Path(__file__).parent / "static"), name="static")
    for module in _ROUTERS:
        app.include_router(module.router)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(CryodaskError, _failed)
    app.add_exception_handler(Exception, _broken)
    return Gate(app, login, prefix)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 401 and _reads_pages(request) and request.method == "GET":
        then = quote(request.url.path.lstrip("/"))
        return RedirectResponse(f"{root_of(request)}login?next={then}", 303)
    said = error.detail if error.detail not in ("", "Not Found", "Method Not Allowed", "Unauthorized", "Forbidden") else ""
    return told(request, error.status_code, said or _SAID.get(error.status_code, str(error.detail)))


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part != "body")
    return told(request, 422, f"The request is not valid: {where + ': ' if where else ''}{first['msg']}.")


async def _failed(request: Request, error: Exception) -> Response:
    assert isinstance(error, CryodaskError)
    status = 400 if isinstance(error, InputError | ProjectFileError) else 409 if isinstance(error, StoreError) else 500
    return told(request, status, error.what, error.way_out)


async def _broken(request: Request, error: Exception) -> Response:
    return told(request, 500, "The server failed to answer this request; its log says why.", "report it with the end of that log")


def told(request: Request, status: int, what: str, way_out: str = "") -> Response:
    """A page for people, JSON (``what``, ``way_out``) for scripts and programs."""
    if _reads_pages(request):
        return page(request, "error.html", status, what=what, way_out=way_out)
    return JSONResponse({"what": what, "way_out": way_out}, status)


def _reads_pages(request: Request) -> bool:
    return "text/html" in request.headers.get("accept", "")
