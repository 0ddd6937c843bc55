"""docs/dashboard.md and docs/facility: commands, settings and tables are those of the program."""

from __future__ import annotations

import functools
import hashlib
import re
import shutil
import subprocess
import warnings
from pathlib import Path

import pytest
import yaml
from _web import TOKEN, Command, make_project
from typer.testing import CliRunner

from cryodask.cli import app
from cryodask.web.people import SCOPES, Person, Right, Role
from cryodask.web.settings import LoginSettings, read_facility

DOCS = Path(__file__).parents[1] / "docs"
PAGE, INSTALL = (DOCS / "dashboard.md").read_text(), (DOCS / "facility" / "install.md").read_text()
PROXIES = (DOCS / "facility" / "proxies.md").read_text()
VENDOR = Path(__file__).parents[1] / "cryodask" / "web" / "static" / "vendor"


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


def test_the_commands_run(tmp_path):
    made = make_project(tmp_path / "demo" / "betagal")
    made.refine()
    made.vary(100)
    start, ask = blocks(PAGE, "sh")
    (words,) = re.findall(r"^cryodask dashboard (\w+) ", start, re.MULTILINE)
    with Command(tmp_path / words, "--token", TOKEN, folder=tmp_path) as command:
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/\?token=\S+", command.said)
        lines = ask.splitlines()
        assert len(lines) == 3
        if shutil.which("curl") is None:
            warnings.warn("curl is not installed: the commands for programs are SKIPPED", stacklevel=1)
            pytest.skip("needs curl")
        for line in lines:
            here = line.replace("8801", str(command.site.port)).replace("$TOKEN", TOKEN).replace("curl", "curl --fail --silent")
            done = subprocess.run(here, shell=True, capture_output=True, text=True)
            assert done.returncode == 0, (line, done.stderr)
            assert "betagal" in done.stdout or "exposure_0" in done.stdout
        for named in re.findall(r"^\| (`/.*?`) \|", PAGE, re.MULTILINE):
            for path in re.findall(r"`(/[^`]*)`", named):
                words = {"components/STEP": "components/variability", "ID": "betagal", "ROW": "0", "STEP": "refine3d"}
                words |= {"since=N&epoch=E": "since=0", "names=A,B": "names="}
                there = functools.reduce(lambda text, word: text.replace(*word), words.items(), path)
                assert command.site.ask(there, only_head=True)[0] == 200, path


def test_the_facility_file_is_valid(tmp_path):
    example, _ = blocks(INSTALL, "yaml")
    path = tmp_path / "facility.yaml"
    path.write_text(example)
    settings = read_facility(path)
    assert set(settings.folders) == {"krios1", "glacios", ""}
    told = set(re.findall(r"^\| `(\w+)` \| ", INSTALL, re.MULTILINE))
    assert told == set(LoginSettings.model_fields)
    (command,) = re.findall(r"`cryodask password \S+ (\w+)`", INSTALL)
    done = CliRunner().invoke(app, ["password", str(tmp_path / "passwords"), command, "--password", "a long password"])
    assert done.exit_code == 0, done.output


def test_the_command_that_checks_a_site_runs(tmp_path):
    (line,) = [line for block in blocks(INSTALL, "sh") for line in block.splitlines() if line.startswith("cryodask facility check")]
    example = yaml.safe_load(blocks(INSTALL, "yaml")[0])
    (tmp_path / "facility.yaml").write_text(yaml.safe_dump(example))
    words = line.split()
    assert words[0] == "cryodask"
    done = CliRunner().invoke(app, [*words[1:-1], str(tmp_path / words[-1])])
    assert done.exit_code == 2, done.output  # the folders of the example do not exist here
    assert "/data/krios1 is not a folder" in done.output


def test_the_table_of_roles_is_that_of_the_program():
    rows = {
        cells[0]: cells[1:]
        for cells in (re.split(r"\s*\|\s*", line.strip("| \n")) for line in INSTALL.splitlines() if line.startswith("| "))
    }
    people = [Person("p", sessions={"s": role}) for role in (Role.viewer, Role.member, Role.pi)]
    people += [Person("p", microscopes=frozenset({"m"})), Person("p", admin=True)]
    for right, row in (
        (Right.see, "see a session"),
        (Right.edit, "set ranges, edit picks, choose classes"),
        (Right.manage, "add people to a session, hand over, export"),
        (Right.administer, "people, roles, tokens of others, audit"),
    ):
        assert [cell != "no" for cell in rows[row]] == [person.may(right, "s", "m") for person in people], row
    assert all(f"`{scope}`" in INSTALL for scope in SCOPES)


def test_the_nginx_part_is_valid(tmp_path):
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if program is None:
        warnings.warn("nginx is not installed: its test is SKIPPED", stacklevel=1)
        pytest.skip("needs nginx")
    place, named = blocks(PROXIES, "nginx")
    part = place.replace("}\n", f"{named}}}\n")
    settings = tmp_path / "nginx.conf"
    folders = " ".join(f"{kind}_temp_path {tmp_path}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    server = f"server {{ listen 127.0.0.1:8080; {part} }}"
    settings.write_text(f"pid {tmp_path}/pid; events {{}} http {{ access_log off; {folders} {server} }}")
    done = subprocess.run([program, "-t", "-c", str(settings), "-e", str(tmp_path / "errors")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_files_of_others_are_as_they_were_released():
    table = re.findall(r"^\| (\S+) \| .* \| (\w{64}) \|$", (VENDOR / "README.md").read_text(), re.MULTILINE)
    assert {name for name, _ in table} == {path.name for path in VENDOR.iterdir()} - {"README.md"}
    for name, wanted in table:
        assert hashlib.sha256((VENDOR / name).read_bytes()).hexdigest() == wanted, name
