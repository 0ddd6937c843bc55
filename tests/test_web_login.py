"""Log-in in all its ways, and what a server refuses: open listening, changes from other pages, floods of attempts and bytes."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.server
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest
import yaml
from _web import TOKEN, Command, Site, make_project, serving
from joserfc import jwt
from joserfc.jwk import RSAKey
from typer.testing import CliRunner

from cryodask.cli import app as command_line
from cryodask.errors import ProjectFileError
from cryodask.web.directory import Directory
from cryodask.web.gate import LARGEST_BODY
from cryodask.web.ledger import Ledger
from cryodask.web.login import FacilityLogin
from cryodask.web.people import Role
from cryodask.web.routes.account import inside
from cryodask.web.serving import _listen
from cryodask.web.sessions import Sessions
from cryodask.web.settings import LoginSettings, read_facility

pytestmark = pytest.mark.heavy

PASSWORD = "correct horse battery"


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A server of one's own."""
    folder = tmp_path_factory.mktemp("own")
    make_project(folder / "session")
    with serving(Sessions({"": [folder]}, Ledger(folder / "audit")), cache=folder / "cache") as site:
        yield site


def test_a_browser_that_comes_before_the_server_is_ready_waits():
    with _listen("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname(), timeout=10) as early:
        assert early.getpeername() == listening.getsockname()


# --- one's own server ------------------------------------------------------------------------------------------------------------
def test_the_token_in_the_address_becomes_a_cookie_that_scripts_cannot_read(own):
    status, headers, _ = own.ask(f"/?token={TOKEN}", token=None)
    assert (status, headers["location"]) == (303, "./")
    cookie = headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=lax" in cookie
    assert "path" not in cookie.lower()
    name = cookie.partition(";")[0]
    assert own.ask("/", token=None, headers={"Cookie": name})[0] == 200
    changed = name[:-2] + ("AA" if name[-2:] != "AA" else "BB")
    assert own.ask("/", token=None, headers={"Cookie": changed})[0] == 401


@pytest.mark.parametrize("path", ["/", "/s/session/", "/s/session/columns", "/s/session/events", "/api/v1/sessions", "/metrics"])
@pytest.mark.parametrize("token", [None, "wrong", "", TOKEN[:-1], TOKEN + "x"])
def test_nothing_is_shown_without_the_token(own, path, token):
    assert own.ask(path, token=token, only_head=True)[0] == 401
    assert own.ask(f"{path}?token={token or ''}", token=None, only_head=True)[0] == 401


def test_a_page_leads_to_the_log_in_and_back(own):
    status, headers, _ = own.ask("/s/session/maps", token=None, headers={"Accept": "text/html"})
    assert (status, headers["location"]) == (303, "../../login?next=s/session/maps")
    status, headers, _ = own.ask(f"/login?token={TOKEN}&next=s/session/maps", token=None)
    assert (status, headers["location"]) == (303, "./s/session/maps")


@pytest.mark.parametrize(
    "address", ["//evil.example", "https://evil.example", "/\\evil", "../../x", "javascript:alert(1)", "s/x\r\nSet-Cookie: a"]
)
def test_a_log_in_leads_to_no_other_server(address):
    assert inside(address) == ""


HERE = {"Sec-Fetch-Site": "same-origin"}


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site", "Origin": "https://evil.example"},
        {},
    ],
)
def test_a_change_from_another_page_is_refused(own, headers):
    cookie = own.ask(f"/?token={TOKEN}", token=None)[1]["set-cookie"].partition(";")[0]
    change: dict[str, Any] = {"sent": {"ranges": {}}, "token": None}
    assert own.ask("/s/session/thresholds", "PUT", headers={"Cookie": cookie, **headers}, **change)[0] == 403
    assert own.ask("/s/session/thresholds", "PUT", headers={"Cookie": cookie, **HERE}, **change)[0] == 200
    assert own.ask("/s/session/thresholds", "PUT", headers={"Cookie": cookie, "Origin": own.address}, **change)[0] == 200


def test_every_answer_has_a_strict_policy(own):
    for path in ("/", "/s/session/", "/static/base.css", "/nothing", "/s/session/columns"):
        headers = own.ask(path)[1]
        assert "default-src 'self'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("states_its_length", [True, False])
def test_a_large_upload_is_refused_before_it_is_read(own, states_its_length):
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", own.port, timeout=60)
    with contextlib.closing(connection):
        connection.putrequest("PUT", "/s/session/thresholds")
        connection.putheader("Authorization", f"Bearer {TOKEN}")
        connection.putheader("Content-Type", "application/json")
        if states_its_length:
            connection.putheader("Content-Length", str(300 << 20))
            connection.endheaders()
        else:
            connection.putheader("Transfer-Encoding", "chunked")
            connection.endheaders()
            with contextlib.suppress(ConnectionError):
                for _ in range(2 * LARGEST_BODY >> 16):
                    connection.send(b"10000\r\n" + b"x" * 65536 + b"\r\n")
        answer = connection.getresponse()
        assert answer.status == 413
        assert b"MiB" in answer.read()
    assert own.ask("/healthz", token=None)[0] == 200


@pytest.mark.parametrize(
    "sent",
    [
        {"ranges": {"no such column": [0, 1]}},
        {"ranges": {"defocus": [2, 1]}},
        {"ranges": {"defocus": ["a", 1]}},
        {"ranges": {"defocus": [1]}},
        {"ranges": []},
        {},
        [],
        "text",
    ],
)
def test_thresholds_that_mean_nothing_are_refused(own, sent):
    before = own.json("/s/session/thresholds")
    status, _, body = own.ask("/s/session/thresholds", "PUT", sent=sent)
    assert status in {400, 422}
    assert json.loads(body)["what"]
    kind = {"Content-Type": "application/json"}
    status, _, _ = own.ask("/s/session/thresholds", "PUT", body=b'{"ranges": {"defocus": [NaN, 1]}}', headers=kind)
    assert status in {400, 422}
    assert own.json("/s/session/thresholds") == before


def test_thresholds_are_saved_and_become_a_step(own):
    ranges = {"ctf_resolution": [None, 6.0], "defocus": [0.5, 2.5], "picks": [10, None]}
    assert own.ask("/s/session/thresholds", "PUT", sent={"ranges": ranges})[0] == 200
    assert own.json("/s/session/thresholds")["ranges"] == ranges
    step = yaml.safe_load(own.ask("/s/session/thresholds/step", "POST", sent={"ranges": ranges})[2])
    assert step == [
        {
            "select_exposures": {
                "worst_ctf_resolution_angstrom": 6.0,
                "least_defocus_angstrom": 5000.0,
                "largest_defocus_angstrom": 25000.0,
                "leave_out": ["exposure_0", "exposure_1"],
            }
        }
    ]
    from cryodask.stages import select_exposures

    select_exposures.params.model_validate(step[0]["select_exposures"])


def test_what_programs_may_ask_for_is_described(own):
    described = own.json("/api/v1/openapi.json")
    assert {"/s/{id}/columns", "/s/{id}/exposure/{row}", "/api/v1/sessions", "/s/{id}/thresholds"} <= set(described["paths"])
    assert "/login" not in described["paths"]
    metrics = own.ask("/metrics")[2].decode()
    assert 'cryodask_session_done{session="session",microscope=""} 2' in metrics
    assert own.ask("/healthz", token=None)[2] == b"ok\n"


# --- a facility ------------------------------------------------------------------------------------------------------------------
class Facility:
    """A facility's server with everything that its log-in needs."""

    def __init__(self, folder: Path, **ways: Any) -> None:
        make_project(folder / "krios" / "session")
        CliRunner().invoke(command_line, ["password", str(folder / "passwords"), "anna", "--password", PASSWORD], catch_exceptions=False)
        self.folder = folder
        self.directory = Directory(Ledger(folder / "people", private=True), ["anna"])
        self.directory.set_person("bob", admin=False, microscopes=[], sessions={"session": Role.viewer})
        settings = LoginSettings.model_validate({"passwords": folder / "passwords", **ways})
        self.login = FacilityLogin(settings, self.directory, "secret")
        self.audit = Ledger(folder / "audit", private=True)
        self.sessions = Sessions({"krios": [folder / "krios"]}, self.audit)


@contextlib.contextmanager
def facility(folder: Path, **ways: Any) -> Iterator[tuple[Site, Facility]]:
    made = Facility(folder, **ways)
    with serving(made.sessions, made.login, cache=folder / "cache") as site:
        yield site, made


def log_in(site: Site, name: str, password: str, **headers: str) -> tuple[int, dict[str, str]]:
    status, headers, _ = site.ask("/login", "POST", token=None, form={"name": name, "password": password}, headers={**HERE, **headers})
    return status, headers


def test_a_password_logs_in_until_it_is_changed(tmp_path):
    with facility(tmp_path) as (site, made):
        status, headers = log_in(site, "anna", PASSWORD)
        assert status == 303
        cookie = {"Cookie": headers["set-cookie"].partition(";")[0]}
        assert site.ask("/admin/", token=None, headers=cookie)[0] == 200
        assert oct((tmp_path / "passwords").stat().st_mode)[-3:] == "600"
        assert PASSWORD not in (tmp_path / "passwords").read_text()
        assert made.login.passwords is not None
        made.login.passwords.write("anna", "another long one")
        assert site.ask("/admin/", token=None, headers=cookie)[0] == 401
        assert log_in(site, "anna", PASSWORD)[0] == 401
        actions = [line["action"] for line in made.audit.records()]
        assert actions == ["logged in", "failed to log in"]


def test_thousands_of_attempts_are_stopped_and_lock_nobody_else_out(tmp_path):
    with facility(tmp_path) as (site, made):
        statuses = [log_in(site, "anna", f"guess {n}")[0] for n in range(20)]
        assert statuses[0] == 401
        assert statuses[-1] == 429
        assert log_in(site, "anna", PASSWORD)[0] == 429  # from this address even with the right password
        for n in range(10_000):
            made.login.attempts.failed("10.0.0.1", f"name {n}")
        assert not made.login.attempts.allowed("10.0.0.1", "anna")
        assert made.login.attempts.allowed("10.0.0.2", "anna")
        assert len(made.login.attempts._failed) <= 10_000
        assert site.ask("/healthz", token=None)[0] == 200


def test_a_flood_through_our_proxy_locks_out_its_own_address_only(tmp_path):
    def attempt(number: int, address: str) -> int:
        return log_in(site, f"name {number}", "guess", **{"X-Forwarded-For": address})[0]

    with facility(tmp_path) as (site, made):
        for number in range(60):
            made.login.attempts.failed("10.0.0.1", f"name {number}")
        assert attempt(100, "10.0.0.1") == 401  # nobody may choose an address to be counted under
        made.login._proxies = frozenset({"127.0.0.1"})
        assert attempt(101, "10.0.0.1") == 429
        assert attempt(102, "10.0.0.1, 10.0.0.2") == 401  # the proxy writes last
        assert log_in(site, "anna", PASSWORD, **{"X-Forwarded-For": "10.0.0.2"})[0] == 303


@pytest.mark.parametrize("line", ["", "anna", "anna:plain:x", "anna:scrypt:1:1", ":", "#"])
def test_a_password_file_with_other_lines_lets_nobody_in(tmp_path, line):
    with facility(tmp_path) as (site, _):
        (tmp_path / "passwords").write_text(f"{line}\n")
        assert log_in(site, "anna", PASSWORD)[0] == 401
        assert log_in(site, "anna", "")[0] in {401, 422}


def test_a_proxy_is_believed_only_with_its_secret_and_from_its_address(tmp_path):
    (tmp_path / "secret").write_text("s3cret\n")
    proxy = {"secret_file": str(tmp_path / "secret")}
    with facility(tmp_path, proxy=proxy) as (site, _):
        named = {"X-Remote-User": "bob"}
        assert site.ask("/s/session/", token=None, headers=named)[0] == 401
        assert site.ask("/s/session/", token=None, headers={**named, "X-Proxy-Secret": "wrong"})[0] == 401
        assert site.ask("/s/session/", token=None, headers={**named, "X-Proxy-Secret": ""})[0] == 401
        assert site.ask("/s/session/", token=None, headers={**named, "X-Proxy-Secret": "s3cret"})[0] == 200
        assert site.ask("/admin/", token=None, headers={**named, "X-Proxy-Secret": "s3cret"})[0] == 404
    other = tmp_path / "elsewhere"
    with facility(other, proxy={**proxy, "addresses": ["10.1.2.3"]}) as (site, _):
        forged = {"X-Remote-User": "bob", "X-Proxy-Secret": "s3cret", "X-Forwarded-For": "10.1.2.3"}
        assert site.ask("/s/session/", token=None, headers=forged)[0] == 401


def test_api_tokens_reach_as_far_as_their_scopes_until_they_are_revoked(tmp_path):
    with facility(tmp_path) as (site, made):
        cookie = {"Cookie": log_in(site, "anna", PASSWORD)[1]["set-cookie"].partition(";")[0], **HERE}
        asked = {"about": "a <script>", "scopes": ["read"], "days": 1}
        token = json.loads(site.ask("/api/v1/tokens", "POST", token=None, headers=cookie, sent=asked)[2])["token"]
        assert site.ask("/s/session/columns.json", token=token)[0] == 200
        assert site.ask("/s/session/thresholds", "PUT", token=token, sent={"ranges": {}})[0] == 403
        assert site.ask("/admin/", token=token)[0] == 404
        stored = "".join(path.read_text() for path in (tmp_path / "people").glob("*.jsonl"))
        assert token.partition(".")[2] not in stored
        assert all(oct(path.stat().st_mode)[-3:] == "600" for path in (tmp_path / "people").glob("*.jsonl"))
        (listed,) = site.json("/api/v1/tokens", token=None, headers=cookie)
        assert "hash" not in listed
        assert site.ask(f"/api/v1/tokens/{listed['id']}", "DELETE", token=None, headers=cookie)[0] == 200
        assert site.ask("/s/session/columns.json", token=token)[0] == 401
        expired = made.directory.make_token("anna", "old", ["read"], -1)
        assert site.ask("/", token=expired)[0] == 401
        for wrong in (
            {"about": "x", "scopes": ["everything"]},
            {"about": "x", "scopes": []},
            {"about": "x", "scopes": ["read"], "days": 1e9},
        ):
            assert site.ask("/api/v1/tokens", "POST", token=None, headers=cookie, sent=wrong)[0] in {400, 422}


# --- OpenID Connect: a provider of our own, with signed tokens ------------------------------------------------------------------------
class Provider:
    """An OpenID Connect provider that names whoever it is told to."""

    def __init__(self) -> None:
        self.key = RSAKey.generate_key(2048, {"kid": "one"})
        self.codes: dict[str, dict[str, str]] = {}
        self.claims: dict[str, Any] = {}
        self.sign_with = self.key
        provider = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *said: Any) -> None:
                pass

            def _send(self, content: Any) -> None:
                body = json.dumps(content).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self) -> None:
                if self.path.startswith("/.well-known"):
                    names = {"authorization_endpoint": "/authorize", "token_endpoint": "/token", "jwks_uri": "/keys"}
                    self._send({"issuer": provider.issuer, **{k: provider.issuer + v for k, v in names.items()}})
                elif self.path == "/keys":
                    self._send({"keys": [provider.key.as_dict(private=False)]})
                else:
                    asked = {k: v[0] for k, v in parse_qs(urlsplit(self.path).query).items()}
                    code = f"code-{len(provider.codes)}"
                    provider.codes[code] = asked
                    self.send_response(303)
                    self.send_header("Location", f"{asked['redirect_uri']}?{urlencode({'code': code, 'state': asked['state']})}")
                    self.end_headers()

            def do_POST(self) -> None:
                form = {k: v[0] for k, v in parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode()).items()}
                asked = provider.codes.pop(form["code"], None)
                basic = base64.b64encode(b"dashboard:client-secret").decode()
                digest = base64.urlsafe_b64encode(hashlib.sha256(form["code_verifier"].encode()).digest()).rstrip(b"=").decode()
                if asked is None or self.headers["Authorization"] != f"Basic {basic}" or asked["code_challenge"] != digest:
                    self.send_error(400)
                    return
                claims = {
                    "iss": provider.issuer,
                    "aud": "dashboard",
                    "exp": int(time.time()) + 60,
                    "nonce": asked["nonce"],
                    **provider.claims,
                }
                token = jwt.encode({"alg": "RS256", "kid": "one"}, claims, provider.sign_with)
                self._send({"access_token": "x", "token_type": "Bearer", "id_token": token})

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.issuer = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture(scope="module")
def oidc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Site, Provider]]:
    folder = tmp_path_factory.mktemp("oidc")
    provider = Provider()
    (folder / "client-secret").write_text("client-secret\n")
    settings = {
        "issuer": provider.issuer,
        "client_id": "dashboard",
        "client_secret_file": str(folder / "client-secret"),
        "redirect": "http://here/login/oidc/back",
        "admin_groups": ["cryo-admins"],
        "operator_groups": {"krios-staff": ["krios"]},
    }
    with facility(folder, oidc=settings) as (site, _):
        yield site, provider
    provider.server.shutdown()
    provider.server.server_close()


def through_the_provider(site: Site, *, change_state: bool = False, forget_cookie: bool = False) -> tuple[int, dict[str, str], str]:
    """What a browser does; the last answer of this server, and the cookie that it has set."""
    status, headers, _ = site.ask("/login/oidc?next=s/session/", token=None)
    assert status == 303
    memory = headers["set-cookie"].partition(";")[0]
    to = urlsplit(headers["location"])
    connection = http.client.HTTPConnection(to.netloc)
    connection.request("GET", f"{to.path}?{to.query}")
    back = urlsplit(connection.getresponse().headers["Location"]).query
    connection.close()
    if change_state:
        back = back.replace("state=", "state=_")
    status, headers, _ = site.ask(f"/login/oidc/back?{back}", token=None, headers={} if forget_cookie else {"Cookie": memory})
    if status != 303:
        return status, headers, ""
    assert headers["location"].startswith("../../enter?")
    status, headers, _ = site.ask(headers["location"].removeprefix("../.."), token=None)
    return status, headers, headers.get("set-cookie", "").partition(";")[0]


def test_a_provider_logs_people_in_with_the_roles_of_their_groups(oidc):
    site, provider = oidc
    for claims, ids, admin in (
        ({"preferred_username": "carol", "groups": ["cryo-admins"]}, ["session"], 200),
        ({"preferred_username": "dave", "groups": ["krios-staff"]}, ["session"], 404),
        ({"preferred_username": "bob"}, ["session"], 404),
        ({"preferred_username": "erin", "groups": ["others"]}, [], 404),
    ):
        provider.claims = claims
        status, headers, cookie = through_the_provider(site)
        assert (status, headers["location"]) == (303, "./s/session/")
        assert [s["id"] for s in site.json("/api/v1/sessions", token=None, headers={"Cookie": cookie})] == ids
        assert site.ask("/admin/", token=None, headers={"Cookie": cookie})[0] == admin


@pytest.mark.parametrize(
    "claims",
    [
        {"aud": "another client"},
        {"iss": "https://evil.example"},
        {"exp": 1},
        {"nonce": "of another log-in"},
        {"preferred_username": ""},
        {"preferred_username": ["anna"]},
    ],
)
def test_a_token_that_is_not_for_this_log_in_lets_nobody_in(oidc, claims):
    site, provider = oidc
    provider.claims = {"preferred_username": "anna", **claims}
    assert through_the_provider(site)[0] == 401


def test_a_forged_signature_or_state_lets_nobody_in(oidc):
    site, provider = oidc
    provider.claims = {"preferred_username": "anna"}
    provider.sign_with = RSAKey.generate_key(2048, {"kid": "one"})
    assert through_the_provider(site)[0] == 401
    provider.sign_with = provider.key
    assert through_the_provider(site, change_state=True)[0] == 401
    assert through_the_provider(site, forget_cookie=True)[0] == 401
    assert site.ask("/enter?ticket=forged", token=None)[0] == 401
    assert through_the_provider(site)[0] == 303


# --- the file --------------------------------------------------------------------------------------------------------------------
FILE: dict[str, Any] = {"name": "north", "microscopes": {"krios": ["krios"]}, "login": {"passwords": "passwords"}}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"listen": {"host": "0.0.0.0"}}, "certificate"),
        ({"listen": {"host": "::"}}, "certificate"),
        ({"listen": {"host": "node17"}}, "certificate"),
        ({"login": {}}, "no way to log in"),
        ({"listen": {"certificate": "cert.pem"}}, "belong together"),
        ({"microscopes": {}}, "nothing is shown"),
        ({"name": "../x"}, "name"),
        ({"lissten": {}}, "lissten"),
        ({"login": {"proxy": {}}}, "secret_file"),
        ({"listen": {"prefix": "no-slash"}}, "prefix"),
        ({"start": "nowhere/cluster.yaml"}, "cluster.yaml, which is not there"),
        ({"templates": "nowhere"}, "nowhere, which is no folder"),
    ],
)
def test_a_facility_file_that_would_be_open_or_wrong_is_refused(tmp_path, change, told):
    path = tmp_path / "facility.yaml"
    path.write_text(yaml.safe_dump({**FILE, **change}))
    with pytest.raises(ProjectFileError, match=told):
        read_facility(path)


def test_the_cluster_that_runs_sessions_is_named_or_a_file_beside_the_facility_file(tmp_path):
    path = tmp_path / "facility.yaml"
    (tmp_path / "cluster.yaml").write_text("kind: local\n")
    for start, found in ((None, None), ("here", "here"), ("mixed", "mixed"), ("cluster.yaml", str(tmp_path / "cluster.yaml"))):
        path.write_text(yaml.safe_dump({**FILE, "start": start}))
        assert read_facility(path).start == found


def test_the_command_serves_a_facility_and_remembers_people_when_it_is_killed(tmp_path):
    make_project(tmp_path / "krios" / "session")
    CliRunner().invoke(command_line, ["password", str(tmp_path / "passwords"), "anna", "--password", PASSWORD], catch_exceptions=False)
    path = tmp_path / "facility.yaml"
    places = {"microscopes": {"krios": [str(tmp_path / "krios")]}, "login": {"passwords": str(tmp_path / "passwords")}}
    path.write_text(yaml.safe_dump({**FILE, **places, "listen": {"port": 0}, "admins": ["anna"], "state": str(tmp_path / "facility")}))
    with Command("--facility", path, folder=tmp_path) as command:
        cookie = {"Cookie": log_in(command.site, "anna", PASSWORD)[1]["set-cookie"].partition(";")[0], **HERE}
        asked = {"sessions": {"session": "member"}}
        assert command.site.ask("/api/v1/people/bob", "PUT", token=None, headers=cookie, sent=asked)[0] == 200
        command.process.kill()
    with Command("--facility", path, folder=tmp_path) as command:
        people = command.site.json("/api/v1/people", token=None, headers=cookie)
        assert {p["name"]: p["sessions"] for p in people} == {"anna": {}, "bob": {"session": "member"}}
    assert oct((tmp_path / "facility" / "cookie-secret").stat().st_mode)[-3:] == "600"
