"""What every request passes: prefix, log-in, origin of changes, size of bodies; and the headers that every answer gets."""

from __future__ import annotations

from urllib.parse import urlsplit

from fastapi import HTTPException, Request
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cryodask.web.login import Login

LARGEST_BODY = 4 << 20
_SAFE = ("GET", "HEAD", "OPTIONS")
_HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'self'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


class Gate:
    """ASGI middleware around the whole server.

    Parameters
    ----------
    prefix : str
        Path before all addresses where a proxy passes it on, such as ``/node/c01/8801``; proxies that remove it need nothing.
    """

    def __init__(self, app: ASGIApp, login: Login, prefix: str = "") -> None:
        self.app, self._login, self._prefix = app, login, prefix.rstrip("/")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        if self._prefix and scope["path"].startswith(f"{self._prefix}/"):
            scope = {**scope, "path": scope["path"][len(self._prefix) :], "raw_path": b""}

        async def headed(message: Message) -> None:
            if message["type"] == "http.response.start":
                present = {name for name, _ in message["headers"]}
                message["headers"] += [(k.encode(), v.encode()) for k, v in _HEADERS.items() if k.encode() not in present]
            await send(message)

        request = Request(scope)
        person = self._login.person_of(request)
        scope.setdefault("state", {})["person"] = person
        told = self._refusal(request)
        if told is not None:
            await JSONResponse({"what": told[1]}, told[0])(scope, receive, headed)
            return
        await self.app(scope, _Limited(receive), headed)

    def _refusal(self, request: Request) -> tuple[int, str] | None:
        """Why a request is refused whoever sends it: status and sentence."""
        if request.method in _SAFE:
            return None
        if not self._from_here(request):
            return 403, "This change was refused, because it was sent from a page of another address."
        try:
            size = int(request.headers.get("content-length", 0))
        except ValueError:
            return 400, "The length of the request is not a number."
        return (413, _TOO_LARGE) if size > LARGEST_BODY else None

    def _from_here(self, request: Request) -> bool:
        """Whether a change comes from a page of this server, or from a program with a token, which no page of another server has."""
        site = request.headers.get("sec-fetch-site")
        if site is not None:
            return site == "same-origin"
        origin = request.headers.get("origin")
        if origin is not None:
            return urlsplit(origin).netloc == request.headers.get("host")
        return request.headers.get("authorization", "").lower().startswith("bearer ")


_TOO_LARGE = f"The request is larger than the {LARGEST_BODY >> 20} MiB that are accepted."


class _Limited:
    """Receives a body up to the limit, also where it does not state its length."""

    def __init__(self, receive: Receive) -> None:
        self._receive, self._got = receive, 0

    async def __call__(self) -> Message:
        message = await self._receive()
        self._got += len(message.get("body", b""))
        if self._got > LARGEST_BODY:
            raise HTTPException(413, _TOO_LARGE)
        return message
