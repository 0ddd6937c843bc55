"""Logging in and out, and the tokens of one's own programs."""

from __future__ import annotations

import re
from typing import Annotated, Any

from fastapi import APIRouter, Form, HTTPException, Request
from fastapi.responses import RedirectResponse, Response
from pydantic import BaseModel, Field

from cryodask.web.directory import Directory
from cryodask.web.login import COOKIE_SECONDS, FacilityLogin, Login, LogInError
from cryodask.web.pages import page, root_of
from cryodask.web.passwords import LONGEST
from cryodask.web.people import SCOPES, Person
from cryodask.web.sessions import Caller, record, sessions_of

router = APIRouter()

_PLAIN = re.compile(r"[A-Za-z0-9._~/-]*(\?[A-Za-z0-9._~=&-]*)?")
_OIDC_COOKIE = "cryodask-oidc"
_OIDC_SECONDS = 600


class NewToken(BaseModel):
    """What a token is for and how far it reaches."""

    about: str = Field(min_length=1, max_length=200)
    scopes: list[str]
    days: float = Field(default=90, gt=0, le=3650, allow_inf_nan=False)


def login_of(request: Request) -> Login:
    """How people log in to the server that answers a request."""
    found: Login = request.app.state.login
    return found


def inside(address: str) -> str:
    """An address below the root of this server; whatever else was given becomes the root."""
    fits = _PLAIN.fullmatch(address) and not address.startswith("/") and ".." not in address
    return address if fits else ""


def welcome(request: Request, content: dict[str, Any], then: str) -> Response:
    """Set the cookie and go on to the page that was asked for."""
    login = login_of(request)
    response = RedirectResponse(f"{root_of(request)}{inside(then)}", 303)
    _set(request, response, login.cookie, login.signer.dumps(content), COOKIE_SECONDS)
    return response


def _set(request: Request, response: Response, name: str, value: str, seconds: int) -> None:
    secure = request.url.scheme == "https" or request.headers.get("x-forwarded-proto") == "https"
    response.set_cookie(name, value, max_age=seconds, path=None, httponly=True, samesite="lax", secure=secure)


@router.get("/login", include_in_schema=False)
def log_in_page(request: Request, token: str = "", next: str = "") -> Response:
    """The log-in page; where the token may be in the address, log in with it."""
    login = login_of(request)
    if login.token_in_address and login.person_with_token(token) is not None:
        return welcome(request, {"by": "token"}, next)
    return _form(request, next, "This token is not valid. Use the address that the server printed when it started." if token else "")


def _form(request: Request, then: str, wrong: str, status: int | None = None) -> Response:
    login = login_of(request)
    ways = {
        "token": login.token_in_address,
        "password": isinstance(login, FacilityLogin) and login.passwords is not None,
        "oidc": login.provider is not None,
    }
    return page(request, "login.html", status or (401 if wrong else 200), next=inside(then), wrong=wrong, ways=ways)


@router.post("/login", include_in_schema=False)
def log_in(
    request: Request,
    name: Annotated[str, Form(max_length=200)],
    password: Annotated[str, Form(max_length=LONGEST)],
    next: Annotated[str, Form(max_length=500)] = "",
) -> Response:
    """Log in with a password."""
    login = login_of(request)
    if not isinstance(login, FacilityLogin) or login.passwords is None:
        raise HTTPException(404)
    address = login.address_of(request)
    if not login.attempts.allowed(address, name):
        return _form(request, next, "There were too many attempts: wait five minutes.", 429)
    content = login.with_password(name, password)
    shown = sessions_of(request)
    if content is None:
        login.attempts.failed(address, name)
        shown.record(Person(name), "failed to log in", address=address)
        return _form(request, next, "The name or the password is wrong.")
    shown.record(Person(name), "logged in", address=address)
    return welcome(request, content, next)


@router.get("/login/oidc", include_in_schema=False)
def log_in_elsewhere(request: Request, next: str = "") -> Response:
    """Send the browser to the provider."""
    login = login_of(request)
    if login.provider is None:
        raise HTTPException(404)
    address, memory = login.provider.begin()
    response = RedirectResponse(address, 303)
    _set(request, response, _OIDC_COOKIE, login.signer.dumps({**memory, "next": inside(next)}), _OIDC_SECONDS)
    return response


@router.get("/login/oidc/back", include_in_schema=False)
def back_from_elsewhere(request: Request, code: str = "", state: str = "") -> Response:
    """Take the person that the provider sends back."""
    login = login_of(request)
    if not isinstance(login, FacilityLogin) or login.provider is None:
        raise HTTPException(404)
    memory = login.read(request.cookies.get(_OIDC_COOKIE, ""), _OIDC_SECONDS) or {}
    try:
        name, groups = login.provider.end(code, state, memory)
    except LogInError as error:
        return _form(request, "", error.problem)
    sessions_of(request).record(Person(name), "logged in", provider=login.provider.settings.issuer)
    # the cookie must reach all pages, but this answer comes from two levels below their root: the page there sets it
    handed = login.signer.dumps({**login.with_oidc(name, groups), "next": memory.get("next", "")})
    return RedirectResponse(f"{root_of(request)}enter?ticket={handed}", 303)


@router.get("/enter", include_in_schema=False)
def enter(request: Request, ticket: str = "") -> Response:
    """Set the cookie of a person whom the provider has just named."""
    content = login_of(request).read(ticket, 30)
    if content is None or content.get("by") != "oidc":
        return _form(request, "", "This log-in is too old: log in again.")
    return welcome(request, {k: v for k, v in content.items() if k != "next"}, str(content.get("next", "")))


@router.post("/logout", include_in_schema=False)
def log_out(request: Request) -> Response:
    """Forget the cookie."""
    response = RedirectResponse(f"{root_of(request)}login", 303)
    response.set_cookie(login_of(request).cookie, "", max_age=0, path=None, httponly=True, samesite="lax")
    return response


# --- tokens of programs ----------------------------------------------------------------------------------------------------------
def directory_of(request: Request) -> Directory:
    """People and tokens of a facility; 404 on a server of one's own, which has neither."""
    found = login_of(request).directory
    if found is None:
        raise HTTPException(404, "This server is for one person: its people and tokens cannot be changed.")
    return found


def in_browser(person: Person) -> Person:
    """Refuse programs: a token cannot make others."""
    if person.scopes is not None:
        raise HTTPException(403, "A token cannot do this: log in with a browser.")
    return person


@router.get("/account", include_in_schema=False)
def account_page(request: Request, person: Caller) -> Response:
    """One's own roles and tokens."""
    directory = login_of(request).directory
    tokens = directory.tokens(person.name) if directory is not None else None
    return page(request, "account.html", tokens=tokens, scopes=SCOPES)


@router.get("/api/v1/tokens")
def list_tokens(request: Request, person: Caller) -> list[dict[str, Any]]:
    """The valid tokens of one's own programs, without their secrets."""
    in_browser(person)
    return [{k: t[k] for k in ("id", "about", "scopes", "expires")} for t in directory_of(request).tokens(person.name)]


@router.post("/api/v1/tokens")
def make_token(request: Request, person: Caller, wanted: NewToken) -> dict[str, str]:
    """Make a token for a program; its secret is shown once."""
    in_browser(person)
    token = directory_of(request).make_token(person.name, wanted.about, wanted.scopes, wanted.days)
    record(request, "made a token", token_id=token.partition(".")[0], scopes=wanted.scopes)
    return {"token": token}


@router.delete("/api/v1/tokens/{token}")
def revoke_token(request: Request, person: Caller, token: str) -> dict[str, str]:
    """Make a token invalid: one's own, or, for administrators, anybody's."""
    in_browser(person)
    directory = directory_of(request)
    mine = None if person.administers() else person.name
    if token not in {t["id"] for t in directory.tokens(mine)}:
        raise HTTPException(404, "There is no such token.")
    directory.revoke(token)
    record(request, "revoked a token", token_id=token)
    return {"revoked": token}
