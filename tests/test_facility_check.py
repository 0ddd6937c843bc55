"""``cryodask facility check``: every fault of a site's set-up is found, named, and nothing is left behind."""

from __future__ import annotations

import datetime
import errno
import fcntl
import http.server
import json
import os
import shutil
import socket
import stat
import threading
from collections import namedtuple
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from typer.testing import CliRunner

from cryodask.cli import app
from cryodask.errors import ArchiveError
from cryodask.web.checking import Finding, check_facility, disks
from cryodask.web.checking.network import check_certificate, check_port, check_provider
from cryodask.web.checking.programs import check_slurm
from cryodask.web.settings import Listen, OidcLogin

pytestmark = pytest.mark.heavy

_Usage = namedtuple("_Usage", "total used free")
TB = 10**12


class Site:
    """A folder with the set-up of a facility, all of it right."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "facility.yaml"
        for name in ("edits", "tiers"):
            (folder / "krios" / "session" / name).mkdir(parents=True)
        folder.chmod(0o755)
        (folder / "krios" / "session" / "project.json").write_text("{}")
        (folder / "archive").mkdir()
        for name in ("", "people", "audit"):
            (folder / "state" / name).mkdir(mode=0o700)
        self.secret("state/cookie-secret", "c" * 43)
        self.secret("proxy-secret", "p" * 43)
        self.settings: dict[str, Any] = {
            "name": "north",
            "microscopes": {"krios": [str(folder / "krios")]},
            "state": str(folder / "state"),
            "login": {"passwords": str(folder / "passwords"), "proxy": {"secret_file": str(folder / "proxy-secret")}},
            "listen": {"port": 0},
            "storage": {"archive": str(folder / "archive")},
        }
        done = CliRunner().invoke(app, ["password", str(folder / "passwords"), "anna", "--password", "a long password"])
        assert done.exit_code == 0, done.output
        self.save()

    def secret(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.write_text(text)
        path.chmod(0o600)
        return path

    def save(self) -> None:
        self.path.write_text(yaml.safe_dump(self.settings))
        self.path.chmod(0o644)

    def found(self, state: str = "problem") -> list[Finding]:
        return [finding for finding in check_facility(self.path) if finding.state == state]

    def only(self) -> Finding:
        """The one problem of the site."""
        (finding,) = self.found()
        assert finding.way_out
        return finding


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.setenv("PATH", str(programs(tmp_path / "bin", "sbatch", "squeue", "scancel")))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: _Usage(2 * TB, TB, TB))
    return Site(tmp_path / "site")


def programs(folder: Path, *names: str, script: str = "exit 0") -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    return folder


def files(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


def test_a_site_that_is_right_has_no_problem_and_nothing_is_left_behind(site):
    before = files(site.folder)
    assert site.found() == []
    assert {f.point for f in site.found("ok")} >= {"settings", "passwords", "proxy secret", "state", "port", "Slurm", "free space"}
    assert files(site.folder) == before
    done = CliRunner().invoke(app, ["facility", "check", str(site.path)])
    assert done.exit_code == 0, done.output
    assert done.output.splitlines()[-1] == "Everything is as the server needs it."


def test_templates_that_cannot_be_used_are_problems(site):
    folder = site.folder / "templates"
    folder.mkdir(mode=0o755)
    site.settings["templates"] = str(folder)
    site.save()
    assert "has no template" in next(finding for finding in site.found("note") if finding.point == "templates").what
    (folder / "standard.yaml").write_text('name: "{name}"\nmicroscope: {pixel_size_angstrom: {pixel_size}}\n')
    (folder / "standard.yaml").chmod(0o644)
    assert site.found() == []
    assert "standard asks for the name, pixel_size." in [finding.what for finding in site.found("ok")]
    (folder / "standard.yaml").chmod(0o666)
    assert "Other accounts can change" in site.only().what


def test_problems_are_the_exit_status_and_are_said_with_the_way_out(site):
    (site.folder / "passwords").chmod(0o640)
    done = CliRunner().invoke(app, ["facility", "check", str(site.path)])
    assert done.exit_code == 2
    assert f"What to do: chmod 600 {site.folder / 'passwords'}" in done.output
    assert done.output.splitlines()[-1] == "1 problem."
    done = CliRunner().invoke(app, ["facility", "check", "--json", str(site.path)])
    assert done.exit_code == 2
    (wrong,) = [f for f in json.loads(done.output) if f["state"] == "problem"]
    assert set(wrong) == {"point", "state", "what", "way_out"}


@pytest.mark.parametrize("content", [None, "name: [", "{}", "name: north", "\x00\xff"])
def test_a_wrong_facility_file_is_the_only_finding(tmp_path, content):
    path = tmp_path / "facility.yaml"
    if content is not None:
        path.write_bytes(content.encode("latin-1"))
    (finding,) = check_facility(path)
    assert (finding.point, finding.state) == ("settings", "problem")


# --- secrets ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "mode"),
    [("proxy-secret", 0o644), ("state/cookie-secret", 0o640), ("state", 0o755), ("state/people", 0o750), ("facility.yaml", 0o664)],
)
def test_what_others_can_read_or_change_is_a_problem(site, name, mode):
    path = site.folder / name
    path.chmod(mode)
    found = site.only()
    assert str(path) in found.what
    assert f"{mode:04o}" in found.what
    assert found.way_out.startswith("chmod ")


def test_a_secret_in_a_folder_that_others_can_write_can_be_replaced(site):
    place = site.folder / "shared"
    place.mkdir()
    place.chmod(0o755)
    shutil.move(site.folder / "proxy-secret", place / "secret")
    site.settings["login"]["proxy"]["secret_file"] = str(place / "secret")
    site.save()
    assert site.found() == []
    place.chmod(0o777)
    assert site.only().way_out == f"chmod go-w {place}"
    place.chmod(0o1777)
    assert site.found() == []


def test_a_secret_of_another_account_is_a_problem(site, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    found = site.found()
    assert {f.point for f in found} == {"passwords", "proxy secret", "state"}
    assert all(f"chown {os.getuid() + 1}" in f.way_out for f in found)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("proxy-secret", "", "is empty"),
        ("proxy-secret", "short", "5 characters"),
        ("passwords", "# nobody\n", "has no people"),
        ("passwords", "anna:secret\n", "Line 1"),
    ],
)
def test_secrets_that_let_nobody_or_everybody_in_are_problems(site, name, text, said):
    site.secret(name, text)
    assert said in site.only().what


def test_missing_or_misplaced_secrets_are_problems(site):
    (site.folder / "passwords").unlink()
    assert "cannot be read" in site.only().what
    (site.folder / "passwords").mkdir()
    assert "is a folder, not a file" in site.only().what


def test_a_proxy_that_is_no_address_is_a_problem(site):
    site.settings["login"]["proxy"]["addresses"] = ["proxy.example.org"]
    site.save()
    assert "'proxy.example.org' is not an IP address" in site.only().what
    site.settings["login"]["proxy"]["addresses"] = ["192.0.2.1"]
    site.save()
    assert site.found() == []
    assert "proxy" in {f.point for f in site.found("note")}


# --- folders and file systems ----------------------------------------------------------------------------------------------------
def test_folders_that_are_missing_are_problems(site):
    shutil.rmtree(site.folder / "krios")
    assert "is not a folder" in site.only().what
    shutil.rmtree(site.folder / "archive")
    assert {f.point for f in site.found()} == {"projects of krios", "archive"}


def denied(monkeypatch: pytest.MonkeyPatch, *paths: Path, mode: int) -> None:
    """Have this account, which may be root, lack a permission for some paths."""
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, asked: not (Path(path) in paths and asked & mode) and allowed(path, asked))


def test_projects_that_cannot_be_read_are_named(site, monkeypatch):
    closed = site.folder / "krios" / "closed"
    closed.mkdir()
    (site.folder / "krios" / "lost+found").mkdir()
    denied(monkeypatch, closed, site.folder / "krios" / "lost+found", mode=os.R_OK)
    assert site.only().what == f"{closed} cannot be read."
    denied(monkeypatch, site.folder / "krios" / "session" / "project.json", mode=os.R_OK)
    assert "project.json and 1 others" in site.only().what


def test_projects_whose_edits_cannot_be_written_are_named(site, monkeypatch):
    project = site.folder / "krios" / "session"
    denied(monkeypatch, project / "edits", mode=os.W_OK)
    assert str(project / "edits") in site.only().what
    shutil.rmtree(project / "tiers")
    denied(monkeypatch, project, mode=os.W_OK)
    assert f"{project / 'edits'} and 1 others" in site.only().what  # tiers/ would have to be created
    denied(monkeypatch, site.folder / "krios", mode=os.W_OK)
    assert "could not be tested" in " ".join(f.what for f in site.found("note"))


def test_a_clock_that_is_apart_is_a_problem(site, monkeypatch):
    looked = os.stat

    def late(path: Any, **options: Any) -> Any:
        found = looked(path, **options)
        if Path(str(path)).name == "clock":
            return os.stat_result((*found[:8], found.st_mtime + 3600, found[9]))
        return found

    monkeypatch.setattr(disks.os, "stat", late)
    found = site.found()
    assert found
    assert all("clock differs" in f.what for f in found)
    assert all(" 3600 s" in f.what or " 3599 s" in f.what for f in found)


def refuse(*_: Any, **__: Any) -> None:
    raise OSError(errno.EOPNOTSUPP, "Operation not supported")


@pytest.mark.parametrize(
    ("module", "name", "fault", "said", "points"),
    [
        (os, "link", refuse, "hard links does not work", {"file system of the archive"}),
        (fcntl, "flock", refuse, "flock does not work", {"file system of the state", "file system of the scratch folder"}),
        (
            fcntl,
            "flock",
            lambda *_: None,
            "two processes can hold one lock",
            {"file system of the state", "file system of the scratch folder"},
        ),
        (os, "rename", shutil.copy, "did not replace the former one", {"file system of {}", "file system of the state"}),
        (os, "O_EXCL", 0, "two drivers", {"file system of {}"}),
        (os, "O_APPEND", 0, "overwrote others", {"file system of {}", "file system of the state"}),
    ],
    ids=["links", "no locks", "locks that lock nothing", "rename", "exclusive", "append"],
)
def test_a_file_system_is_a_problem_only_where_the_store_needs_what_it_lacks(site, monkeypatch, module, name, fault, said, points):
    # temporary folders need O_EXCL themselves, so that is taken from the test alone
    if name.startswith("O_"):
        opened, flag = os.open, getattr(os, name)
        monkeypatch.setattr(disks.os, "open", lambda path, flags, *mode, **more: opened(path, flags & ~flag, *mode, **more))
    else:
        monkeypatch.setattr(module, name, fault)
    found = site.found()
    assert {f.point for f in found} == {point.format(site.folder / "krios") for point in points}
    assert all(said in f.what for f in found)
    assert not list(site.folder.rglob(".cryodask-check-*"))


def test_a_disk_that_is_full_is_a_problem(site, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: _Usage(2 * TB, 1.99 * TB, 0.01 * TB))
    found = site.found()
    assert {f.point for f in found} == {"free space"}
    assert "10 GB of 2 TB are free" in found[0].what
    monkeypatch.setattr(disks.tempfile, "mkdtemp", refuse)
    assert "Nothing can be written" in " ".join(f.what for f in site.found())


def test_an_archive_in_an_object_store_is_not_written_to(site, monkeypatch):
    monkeypatch.setattr(disks, "open_archive", lambda url: object())
    site.settings["storage"]["archive"] = "s3://bucket"
    site.save()
    assert site.found() == []
    assert "object store" in " ".join(f.what for f in site.found("note"))

    def without(url: str) -> None:
        raise ArchiveError(f"{url} needs the package obstore, which is not installed.", "", "install it")

    monkeypatch.setattr(disks, "open_archive", without)
    assert "obstore" in site.only().what


def test_a_file_system_that_goes_away_meanwhile_is_a_problem_and_the_rest_is_tested(site, monkeypatch):
    def stale(folder: Path) -> _Usage:
        if Path(folder) == site.folder / "krios":
            raise OSError(errno.ESTALE, "Stale file handle", str(folder))
        return _Usage(2 * TB, TB, TB)

    monkeypatch.setattr(shutil, "disk_usage", stale)
    found = site.only()
    assert (found.point, "Stale file handle" in found.what) == (f"projects in {site.folder / 'krios'}", True)
    assert {f.point for f in site.found("ok")} >= {"port", "Slurm"}


# --- network ---------------------------------------------------------------------------------------------------------------------
def test_a_port_that_another_program_has_is_a_problem():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        taken.settimeout(5)
        answering = threading.Thread(target=lambda: taken.accept()[0].close())
        answering.start()
        found = check_port(Listen(port=taken.getsockname()[1]))
        answering.join()
    assert found.state == "problem"
    assert "Another program listens" in found.what
    assert check_port(Listen.model_construct(host="192.0.2.1", port=1, certificate=None)).way_out == "correct listen.host"


def test_a_port_where_the_dashboard_answers_is_right(answers):
    made = answers({"/healthz": "ok\n"})
    found = check_port(Listen(port=made.server_address[1]))
    assert (found.state, "dashboard answers" in found.what) == ("ok", True)


def test_a_port_that_only_root_may_use_is_explained(monkeypatch):
    def refused(*_: Any) -> None:
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", refused)
    assert "from 1024 on" in check_port(Listen(port=443)).way_out


def certificate(folder: Path, days: tuple[float, float], password: bytes | None = None) -> tuple[Path, Path]:
    folder.mkdir(exist_ok=True)
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "here")])
    built = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    first, last = (now + datetime.timedelta(days=d) for d in days)
    signed = built.not_valid_before(first).not_valid_after(last).sign(key, hashes.SHA256())
    (folder / "cert.pem").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    how = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    (folder / "key.pem").write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, how))
    return folder / "cert.pem", folder / "key.pem"


@pytest.mark.parametrize(
    ("days", "said"),
    [((-1, 90), ""), ((-80, 10.5), "expires in 10 days"), ((-80, -1), "expired on"), ((2, 90), "is not valid before")],
)
def test_a_certificate_is_valid_for_another_month(tmp_path, days, said):
    found = check_certificate(*certificate(tmp_path, days))
    assert found.state == ("problem" if said else "ok")
    assert said in found.what


def test_certificates_that_cannot_be_used_are_problems_and_nothing_is_asked_on_the_terminal(tmp_path):
    one, other = certificate(tmp_path / "one", (-1, 90)), certificate(tmp_path / "other", (-1, 90))
    assert "do not belong together" in check_certificate(one[0], other[1]).what
    assert "cannot be read" in check_certificate(tmp_path / "none", one[1]).what
    (tmp_path / "text").write_text("no certificate")
    assert "cannot be used" in check_certificate(tmp_path / "text", one[1]).what
    assert check_certificate(*certificate(tmp_path / "locked", (-1, 90), b"password")).state == "problem"


def test_the_key_of_the_certificate_is_private(site):
    cert, key = certificate(site.folder, (-1, 90))
    site.settings["listen"] |= {"certificate": str(cert), "key": str(key)}
    site.save()
    key.chmod(0o644)
    assert site.only().point == "TLS key"
    key.chmod(0o600)
    assert site.found() == []
    assert stat.S_IMODE(key.stat().st_mode) == 0o600


@pytest.fixture
def answers() -> Iterator[Callable[..., http.server.HTTPServer]]:
    """Starts a server that gives fixed answers by path, at a clock of its own."""
    started = []

    def start(content: dict[str, Any], late: float = 0.0) -> http.server.HTTPServer:
        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *said: Any) -> None:
                pass

            def date_time_string(self, timestamp: float | None = None) -> str:
                return formatdate(datetime.datetime.now().timestamp() + late, usegmt=True)

            def do_GET(self) -> None:
                if self.path not in content:
                    self.send_error(404)
                    return
                found = content[self.path]
                self.send_response(200)
                self.end_headers()
                self.wfile.write(found.encode() if isinstance(found, str) else json.dumps(found).encode())

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        started.append(server)
        return server

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


def provider(answers: Callable[..., http.server.HTTPServer], late: float = 0.0, **changed: Any) -> OidcLogin:
    content: dict[str, Any] = {"/keys": {"keys": [{"kty": "RSA"}]}}
    address = f"http://127.0.0.1:{answers(content, late).server_address[1]}"
    about = {"issuer": address, "authorization_endpoint": f"{address}/a", "token_endpoint": f"{address}/t", "jwks_uri": f"{address}/keys"}
    content["/.well-known/openid-configuration"] = {k: v for k, v in (about | changed).items() if v is not None}
    return OidcLogin(issuer=address, client_id="x", client_secret_file=Path("x"), redirect="https://here/login/oidc/back")


def wrong_with(login: OidcLogin) -> list[str]:
    return [finding.what for finding in check_provider(login) if finding.state == "problem"]


def test_a_provider_that_answers_is_right(answers):
    assert [f.state for f in check_provider(provider(answers))] == ["ok", "ok"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"issuer": "https://other"}, "says that it is https://other"),
        ({"token_endpoint": None}, "has no token_endpoint"),
        ({"jwks_uri": "file:///etc/passwd"}, "not an http address"),
        ({"jwks_uri": "http://127.0.0.1:1/keys"}, "does not answer"),
        ({"late": 600.0}, "differs from this host's by"),
        ({"late": -600.0}, "differs from this host's by"),
    ],
)
def test_a_provider_that_would_let_nobody_in_is_a_problem(answers, changed, said):
    (what,) = wrong_with(provider(answers, **changed))
    assert said in what


def test_addresses_of_the_log_in_are_checked(answers):
    login = provider(answers)
    assert wrong_with(login.model_copy(update={"redirect": "https://here/back"})) == [
        "https://here/back is not where this server takes log-ins."
    ]
    assert wrong_with(login.model_copy(update={"issuer": "ftp://x"})) == ["'ftp://x' is not an address."]
    assert "without TLS" in wrong_with(login.model_copy(update={"issuer": "http://none.invalid"}))[0]
    text = answers({"/.well-known/openid-configuration": "[1]"})
    assert "not a JSON object" in wrong_with(login.model_copy(update={"issuer": f"http://127.0.0.1:{text.server_address[1]}"}))[0]


# --- Slurm -----------------------------------------------------------------------------------------------------------------------
def test_programs_of_slurm_are_there_and_answer(tmp_path, monkeypatch):
    def found(*names: str, script: str = "exit 0") -> Finding:
        shutil.rmtree(tmp_path / "bin", ignore_errors=True)
        monkeypatch.setenv("PATH", str(programs(tmp_path / "bin", *names, script=script)))
        (one,) = check_slurm()
        return one

    assert found().state == "note"
    assert "sbatch, scancel not found" in found("squeue").what
    assert found("sbatch", "squeue", "scancel").state == "ok"
    failed = found("sbatch", "squeue", "scancel", script="echo no controller >&2; exit 1")
    assert (failed.state, failed.what) == ("problem", "squeue --me fails: no controller")
    assert "exit status 3" in found("sbatch", "squeue", "scancel", script="exit 3").what
    monkeypatch.setattr("cryodask.web.checking.programs._ANSWER_SECONDS", 0.05)
    assert "no answer" in found("sbatch", "squeue", "scancel", script="while :; do :; done").what
