"""Who may do what: every route with every role, enumerated from the application itself."""

from __future__ import annotations

import re
from typing import Any

import pytest
from _web import Site, make_project, routes_of, serving

from cryodask.web.app import create_app
from cryodask.web.directory import Directory
from cryodask.web.ledger import Ledger
from cryodask.web.login import FacilityLogin, OwnLogin
from cryodask.web.passwords import PasswordFile
from cryodask.web.people import Right, Role
from cryodask.web.sessions import Sessions
from cryodask.web.settings import LoginSettings

pytestmark = pytest.mark.heavy

OPEN, PERSON, BROWSER, OPERATOR, ADMIN = "open", "person", "browser", "operator", "admin"
"""Rights of routes that belong to no session: for everybody; whoever is logged in; and not by a program; operators; administrators."""

TABLE: dict[tuple[str, str], str | Right] = {
    ("GET", "/login"): OPEN,
    ("POST", "/login"): OPEN,
    ("GET", "/login/oidc"): OPEN,
    ("GET", "/login/oidc/back"): OPEN,
    ("GET", "/enter"): OPEN,
    ("POST", "/logout"): OPEN,
    ("GET", "/healthz"): OPEN,
    ("GET", "/"): PERSON,
    ("GET", "/account"): PERSON,
    ("GET", "/cluster"): PERSON,
    ("GET", "/metrics"): PERSON,
    ("GET", "/api/v1/openapi.json"): PERSON,
    ("GET", "/api/v1/sessions"): PERSON,
    ("GET", "/api/v1/clusters"): PERSON,
    ("GET", "/api/v1/usage"): PERSON,
    ("GET", "/api/v1/usage/history"): PERSON,
    ("GET", "/api/v1/tokens"): BROWSER,
    ("POST", "/api/v1/tokens"): BROWSER,
    ("DELETE", "/api/v1/tokens/{token}"): BROWSER,
    ("GET", "/api/v1/templates"): OPERATOR,
    ("POST", "/s"): OPERATOR,
    ("GET", "/admin/"): ADMIN,
    ("GET", "/api/v1/people"): ADMIN,
    ("PUT", "/api/v1/people/{name}"): ADMIN,
    ("DELETE", "/api/v1/people/{name}"): ADMIN,
    ("GET", "/api/v1/audit"): ADMIN,
    ("GET", "/api/v1/sessions/{id}"): Right.see,
    ("GET", "/s/{id}/"): Right.see,
    ("GET", "/s/{id}/events"): Right.see,
    ("GET", "/s/{id}/columns"): Right.see,
    ("GET", "/s/{id}/columns.json"): Right.see,
    ("GET", "/s/{id}/columns.parquet"): Right.see,
    ("GET", "/s/{id}/exposure/{row}"): Right.see,
    ("GET", "/s/{id}/thumbnail/{row}.jpg"): Right.see,
    ("GET", "/s/{id}/micrograph/{row}.jpg"): Right.see,
    ("GET", "/s/{id}/spectrum/{row}.jpg"): Right.see,
    ("GET", "/s/{id}/quarantine"): Right.see,
    ("GET", "/s/{id}/thresholds"): Right.see,
    ("PUT", "/s/{id}/thresholds"): Right.edit,
    ("POST", "/s/{id}/thresholds/step"): Right.edit,
    ("GET", "/s/{id}/particles"): Right.see,
    ("GET", "/s/{id}/particles.json"): Right.see,
    ("GET", "/s/{id}/particles/columns"): Right.see,
    ("GET", "/s/{id}/maps"): Right.see,
    ("GET", "/s/{id}/map/{step}"): Right.see,
    ("GET", "/s/{id}/map/{step}/section.png"): Right.see,
    ("GET", "/s/{id}/map/{step}/surface"): Right.see,
    ("GET", "/s/{id}/map/{step}/orientations"): Right.see,
    ("GET", "/s/{id}/mask"): Right.see,
    ("GET", "/s/{id}/mask/{step}"): Right.see,
    ("GET", "/s/{id}/mask/{step}/volume"): Right.see,
    ("GET", "/s/{id}/mask/{step}/surface"): Right.see,
    ("POST", "/s/{id}/mask/ops"): Right.edit,
    ("POST", "/s/{id}/mask/freeze"): Right.edit,
    ("GET", "/s/{id}/components"): Right.see,
    ("GET", "/s/{id}/components/{step}"): Right.see,
    ("GET", "/s/{id}/components/{step}/density"): Right.see,
    ("GET", "/s/{id}/components/{step}/region"): Right.see,
    ("GET", "/s/{id}/components/{step}/particles.png"): Right.see,
    ("GET", "/s/{id}/components/{step}/section.png"): Right.see,
    ("GET", "/s/{id}/components/{step}/surface"): Right.see,
    ("GET", "/s/{id}/components/{step}/map.mrc"): Right.see,
    ("POST", "/s/{id}/components/ops"): Right.edit,
    ("POST", "/s/{id}/components/freeze"): Right.edit,
    ("GET", "/s/{id}/average/{number}.png"): Right.see,
    ("GET", "/s/{id}/history"): Right.see,
    ("GET", "/s/{id}/history.json"): Right.see,
    ("GET", "/s/{id}/fsc"): Right.see,
    ("GET", "/s/{id}/data"): Right.see,
    ("GET", "/s/{id}/data.json"): Right.see,
    ("POST", "/s/{id}/data/acknowledge"): Right.manage,
    ("POST", "/s/{id}/data/remove"): Right.administer,
    ("GET", "/s/{id}/pick/{row}"): Right.see,
    ("GET", "/s/{id}/picture/{row}/{pixels}"): Right.see,
    ("GET", "/s/{id}/picks/{row}"): Right.see,
    ("POST", "/s/{id}/picks/{row}/ops"): Right.edit,
    ("POST", "/s/{id}/picks/freeze"): Right.edit,
    ("GET", "/s/{id}/edits/{kind}/events"): Right.see,
    ("GET", "/s/{id}/classes"): Right.see,
    ("GET", "/s/{id}/classes/{number}.png"): Right.see,
    ("GET", "/s/{id}/choose"): Right.see,
    ("GET", "/s/{id}/choices/{kind}"): Right.see,
    ("GET", "/s/{id}/remarks"): Right.see,
    ("POST", "/s/{id}/choices/{kind}/ops"): Right.edit,
    ("POST", "/s/{id}/choices/{kind}/freeze"): Right.edit,
    ("GET", "/s/{id}/control"): Right.see,
    ("POST", "/s/{id}/start"): Right.operate,
    ("POST", "/s/{id}/pause"): Right.operate,
    ("POST", "/s/{id}/end"): Right.operate,
    ("GET", "/s/{id}/people"): Right.manage,
    ("POST", "/s/{id}/people"): Right.manage,
}
"""Every route that there is, and the right that it needs."""

_NOT_HERE = ("/step", "/remove", "/start", "/pause", "/end")
"""What changes nothing that can be counted, or is refused while nothing is due or runs."""

SENT: dict[tuple[str, str], Any] = {
    ("PUT", "/s/{id}/thresholds"): {"ranges": {"defocus": [0.5, 3]}},
    ("POST", "/s/{id}/thresholds/step"): {"ranges": {}},
    ("POST", "/s/{id}/data/acknowledge"): {"who": "somebody"},
    ("POST", "/s/{id}/data/remove"): {"size": "1.0 GB"},
    ("POST", "/s/{id}/picks/{row}/ops"): {"ops": [{"id": "a" * 32, "n": 1, "do": "add", "row": 0, "y": 1.0, "x": 1.0}]},
    ("POST", "/s/{id}/picks/freeze"): {},
    ("POST", "/s/{id}/choices/{kind}/ops"): {"ops": [{"id": "b" * 32, "n": 1, "do": "set", "row": 0, "name": "rating", "value": "4"}]},
    ("POST", "/s/{id}/choices/{kind}/freeze"): {},
    ("POST", "/s/{id}/mask/ops"): {"ops": [{"id": "c" * 32, "n": 1, "do": "set", "of": "refine3d/a1", "name": "threshold", "value": 0.4}]},
    ("POST", "/s/{id}/mask/freeze"): {"of": "refine3d/a1"},
    ("POST", "/s/{id}/components/ops"): {
        "ops": [{"id": "d" * 32, "n": 1, "do": "draw", "of": "variability/c1", "region": {"components": [1], "points": [[0.0], [1.0]]}}]
    },
    ("POST", "/s/{id}/components/freeze"): {"of": "variability/c1"},
    ("POST", "/s/{id}/end"): {"name": "session"},
    ("POST", "/s"): {"template": "none", "microscope": "krios", "name": "new"},
    ("POST", "/s/{id}/people"): {"name": "somebody", "role": "viewer"},
    ("PUT", "/api/v1/people/{name}"): {"sessions": {"other": "viewer"}},
    ("POST", "/api/v1/tokens"): {"about": "a test", "scopes": ["read"]},
}
PATH = {
    "id": "session",
    "row": "0",
    "step": "refine3d",
    "number": "1",
    "name": "somebody",
    "token": "none",
    "pixels": "1",
    "kind": "exposures",
}


def address(path: str) -> str:
    """A route with what there is in the session."""
    there = {**PATH, "step": "variability"} if "/components/" in path else PATH
    return re.sub(r"{(\w+)}", lambda found: there[found[1]], path)


MAY: dict[str, set[str | Right]] = {
    "nobody": {OPEN},
    "stranger": {OPEN, PERSON, BROWSER},
    "viewer": {OPEN, PERSON, BROWSER, Right.see},
    "member": {OPEN, PERSON, BROWSER, Right.see, Right.edit},
    "pi": {OPEN, PERSON, BROWSER, Right.see, Right.edit, Right.manage},
    "operator": {OPEN, PERSON, BROWSER, OPERATOR, Right.see, Right.edit, Right.manage, Right.operate},
    "admin": {OPEN, PERSON, BROWSER, OPERATOR, ADMIN, *Right},
    "token read": {OPEN, PERSON, Right.see},
    "token edit": {OPEN, PERSON, Right.see, Right.edit},
    "token of an admin": {OPEN, PERSON, OPERATOR, Right.see, Right.edit, Right.operate},
}
"""What each may do; tokens never manage, administer, or make tokens."""


@pytest.fixture(scope="module")
def application(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("rights")
    return create_app(Sessions({}, Ledger(folder / "audit")), OwnLogin("token"), cache=folder).app


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A facility with one session at a microscope, and everybody of the table; yields the server and a cookie or token for each."""
    folder = tmp_path_factory.mktemp("facility")
    made = make_project(folder / "krios" / "session")
    made.refine()
    made.vary(100)
    make_project(folder / "other" / "other")
    passwords = PasswordFile(folder / "passwords")
    directory = Directory(Ledger(folder / "people", private=True), ["admin"])
    roles: dict[str, dict[str, Any]] = {
        "stranger": {"sessions": {"other": Role.pi}},
        "viewer": {"sessions": {"session": Role.viewer}},
        "member": {"sessions": {"session": Role.member}},
        "pi": {"sessions": {"session": Role.pi}},
        "operator": {"microscopes": ["krios"]},
    }
    for name, given in roles.items():
        directory.set_person(name, **{"admin": False, "microscopes": [], "sessions": {}, **given})
    login = FacilityLogin(LoginSettings(passwords=passwords.path), directory, "secret")
    shown = Sessions({"krios": [folder / "krios"], "glacios": [folder / "other"]}, Ledger(folder / "audit", private=True))
    headers: dict[str, dict[str, str]] = {"nobody": {}}
    for name in (*roles, "admin"):
        passwords.write(name, f"a long password of {name}")
        headers[name] = {"Cookie": f"{login.cookie}={login.signer.dumps(login.with_password(name, f'a long password of {name}'))}"}
    for name, person, scopes in (
        ("token read", "viewer", ["read"]),
        ("token edit", "pi", ["read", "edit"]),
        ("token of an admin", "admin", ["read", "edit", "session"]),
    ):
        headers[name] = {"Authorization": f"Bearer {directory.make_token(person, 'a test', scopes, 1)}"}
    with serving(shown, login, cache=folder / "cache") as running:
        yield running, headers


def routes(application: Any) -> set[tuple[str, str]]:
    return {(method, r.path) for r in routes_of(application) for method in getattr(r, "methods", None) or () if method != "HEAD"}


def test_every_route_is_in_the_table(application):
    assert routes(application) == set(TABLE)


def test_every_role_is_in_the_table(site):
    assert set(site[1]) == set(MAY)


def expected(right: str | Right, who: str) -> set[int]:
    """Statuses that mean no; empty if the role may."""
    if right in MAY[who]:
        return set()
    if who == "nobody":
        return {401}
    if right is BROWSER:
        return {403}
    sees = Right.see in MAY[who]
    return {403} if isinstance(right, Right) and sees else {404}


@pytest.mark.parametrize("who", MAY)
def test_every_route_is_open_to_exactly_those_who_may(site: tuple[Site, dict[str, dict[str, str]]], who: str):
    running, headers = site
    wrong = []
    for (method, path), right in TABLE.items():
        if "oidc" in path or path == "/enter":
            continue  # no provider here: see test_web_login.py
        asked = address(path)
        same = {"Origin": running.address, "Accept": "application/json"}
        form = {"name": "x", "password": "y"} if path == "/login" else None
        sent = SENT.get((method, path))
        status, _, _ = running.ask(
            asked, method, token=None, headers={**headers[who], **same}, sent=sent, form=form if method == "POST" else None, only_head=True
        )
        no = expected(right, who)
        there = path != "/api/v1/tokens/{token}"  # a token that does not exist is 404 for those who may, too
        if (status not in no) if no else (status >= 500 or (right is not OPEN and status in {401, 403, *({404} if there else ())})):
            wrong.append((method, path, status, no or "may"))
    assert wrong == []


def test_others_sessions_are_not_even_listed(site):
    running, headers = site
    for who, ids in (("stranger", ["other"]), ("viewer", ["session"]), ("operator", ["session"]), ("admin", ["other", "session"])):
        found = running.json("/api/v1/sessions", token=None, headers=headers[who])
        assert [s["id"] for s in found] == ids
        metrics = running.ask("/metrics", token=None, headers=headers[who])[2].decode()
        assert set(re.findall(r'exposures\{session="(\w+)"', metrics)) == set(ids)


def test_every_change_is_a_line_of_the_audit(site):
    running, headers = site
    same = {"Origin": running.address}
    before = len(running.json("/api/v1/audit", token=None, headers=headers["admin"]))
    changes = [(m, p) for (m, p), right in TABLE.items() if m != "GET" and isinstance(right, Right) and not p.endswith(_NOT_HERE)]
    for method, path in changes:
        asked = address(path)
        status, _, body = running.ask(asked, method, token=None, headers={**headers["admin"], **same}, sent=SENT[method, path])
        assert status == 200, (path, status, body)
    lines = running.json("/api/v1/audit", token=None, headers=headers["admin"])
    assert len(lines) == before + len(changes)
    assert {line["person"] for line in lines[before:]} == {"admin"}
    assert {line["session"] for line in lines[before:]} == {"session"}


def test_a_removed_person_sees_nothing_any_more(site):
    running, headers = site
    admin = {**headers["admin"], "Origin": running.address}
    running.ask("/api/v1/people/stranger", "DELETE", token=None, headers=admin)
    assert "stranger" not in {p["name"] for p in running.json("/api/v1/people", token=None, headers=admin)}
    assert running.json("/api/v1/sessions", token=None, headers=headers["stranger"]) == []
    assert running.ask("/s/other/", token=None, headers=headers["stranger"])[0] == 404
