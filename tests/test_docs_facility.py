"""docs/facility: files and commands that its pages name exist, units are valid, and the restore drill restores."""

from __future__ import annotations

import configparser
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import pytest
import typer
import yaml
from _command import command
from _web import Command, make_project
from traitlets.config import Config

from cryodask.cli import app
from cryodask.run.recipe import make_plan
from cryodask.web.directory import Directory
from cryodask.web.ledger import Ledger
from cryodask.web.passwords import PasswordFile
from cryodask.web.session_templates import Template, new_session
from cryodask.web.settings import read_facility

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "facility"
PAGES = sorted(FOLDER.glob("*.md"))
OTHERS = [ROOT / "docs" / name for name in ("dashboard.md", "picking.md", "storage.md")]
PASSWORD = "correct horse battery"


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[str]:
    """What follows ``cryodask`` in the blocks and between back-quotes."""
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL))
    lines = [line for block in blocks(page, "sh") for line in block.splitlines()]
    found = (re.search(r"(?:^|\s)(?:\S*/bin/)?cryodask(?:\.sif)? ([a-z-]+(?: .*)?)$", line) for line in [*lines, *inline])
    return [one[1] for one in found if one is not None]


# --- files and commands -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("page", [*PAGES, *OTHERS, ROOT / "README.md"], ids=lambda page: page.name)
def test_files_and_headings_that_are_named_exist(page):
    for path, anchor in re.findall(r"\]\(([^)#\s]*)(#[^)\s]+)?\)", page.read_text()):
        if "://" in path:
            continue
        other = page.parent / path if path else page
        assert other.exists(), path
        if anchor:
            heads = re.findall(r"^#+ (.*)$", other.read_text(), re.MULTILINE)
            assert anchor[1:] in {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}, path + anchor


def test_every_file_of_the_folder_is_named_in_its_pages_and_every_page_in_the_readme():
    named = "".join(page.read_text() for page in PAGES)
    assert [path.name for path in FOLDER.iterdir() if f"]({path.name})" not in named] == []
    readme = (ROOT / "README.md").read_text()
    assert [page.name for page in (*PAGES, *OTHERS) if f"]({page.relative_to(ROOT)})" not in readme] == []


@pytest.mark.parametrize(
    ("page", "line"), [(page, line) for page in PAGES for line in commands(page)], ids=lambda one: getattr(one, "name", None)
)
def test_every_command_of_the_pages_exists(page, line):
    words = shlex.split(line.partition(" > ")[0], comments=True)
    found = typer.main.get_command(app)
    while words and hasattr(found, "commands"):
        found = found.commands[words.pop(0)]
    # parsing only: unknown options and arguments too many or too few are errors, nothing is called
    if words and not (found.name == "password" and "--password" not in words):
        found.make_context(str(found.name), words)


def test_every_extra_that_the_pages_install_exists():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    files = [*PAGES, *OTHERS, FOLDER / "cryodask.def"]
    named = [extra for path in files for extra in re.findall(r"cryodask\[([\w,]+)\]", path.read_text())]
    assert len(named) > 5
    assert {one for extra in named for one in extra.split(",")} <= set(extras)


def test_the_recipe_of_the_image_has_its_sections_and_valid_scripts():
    text = (FOLDER / "cryodask.def").read_text()
    sections = dict(re.findall(r"^%(\w+)\n((?:    .*\n|\n)*)", text, re.MULTILINE))
    assert sections.keys() == {"labels", "help", "post", "environment", "runscript", "test"}
    for name in ("post", "environment", "runscript", "test"):
        done = subprocess.run(["sh", "-n"], input=sections[name], text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
    for line in re.findall(r"^    cryodask (.*)$", sections["test"], re.MULTILINE):
        assert command(*line.split()).returncode == 0


def test_the_template_of_a_session_is_a_project_file(tmp_path):
    (text,) = [block for block in blocks(FOLDER / "install.md", "yaml") if "{name}" in block]
    (tmp_path / "standard.yaml").write_text(text)
    template = Template.read(tmp_path / "standard.yaml")
    path = new_session(tmp_path, "apo", template.filled("apo", dict.fromkeys(template.numbers, "1.1")))
    assert make_plan(path.parent / "apo.yaml").folder == path


# --- systemd ----------------------------------------------------------------------------------------------------------------------
def unit(name: str) -> configparser.ConfigParser:
    made = configparser.ConfigParser(strict=False, interpolation=None)
    made.optionxform = str  # type: ignore[assignment,method-assign]
    made.read_string((FOLDER / name).read_text())
    return made


def test_units_are_valid_for_systemd(tmp_path):
    program = shutil.which("systemd-analyze")
    if program is None:
        warnings.warn("systemd-analyze is not installed: the units are NOT checked", stacklevel=1)
        pytest.skip("needs systemd-analyze")
    there = tmp_path / "cryodask"
    there.write_text("#!/bin/sh\n")
    there.chmod(0o755)
    for name in ("cryodask-dashboard.service", "cryodask-announce.service", "cryodask-announce.timer"):
        # the program is not at that place here
        (tmp_path / name).write_text((FOLDER / name).read_text().replace("/opt/cryodask/bin/cryodask", str(there)))
    done = subprocess.run([program, "verify", *map(str, tmp_path.glob("cryodask-*"))], capture_output=True, text=True)
    about = [line for line in done.stderr.splitlines() if "cryodask-" in line]
    assert (about, done.returncode) == ([], 0), done.stderr


def test_the_unit_of_the_server_agrees_with_the_pages():
    service = unit("cryodask-dashboard.service")["Service"]
    install = (FOLDER / "install.md").read_text()
    assert service["ExecStart"] == "/opt/cryodask/bin/cryodask dashboard --facility /etc/cryodask/facility.yaml"
    assert f"useradd --system --shell /usr/sbin/nologin {service['User']}" in install
    assert service["Environment"].split() == ["XDG_STATE_HOME=/var/lib", "XDG_CACHE_HOME=/var/cache"]
    assert service["ReadWritePaths"] in install


def test_the_daily_announcement_reaches_every_project(tmp_path):
    for name in ("krios1/first session", "second"):
        make_project(tmp_path / "data" / name)
    (tmp_path / "facility.yaml").write_text("storage:\n  micrographs: {then: thin, after_days: 1, since: session}\n")
    program = tmp_path / "cryodask"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m cryodask.cli "$@"\n')
    program.chmod(0o755)
    start = unit("cryodask-announce.service")["Service"]["ExecStart"].replace("%%", "%").replace("\\\\", "\\")
    for place, here in (
        ("/opt/cryodask/bin/cryodask", program),
        ("/etc/cryodask/facility.yaml", tmp_path / "facility.yaml"),
        ("/data", tmp_path / "data"),
    ):
        start = start.replace(place, str(here))
    done = subprocess.run(shlex.split(start), capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    told = re.findall(r"^announced: .*$", done.stdout, re.MULTILINE)
    assert len(told) == 2, done.stdout


# --- proxies ----------------------------------------------------------------------------------------------------------------------
def test_settings_behind_proxies_are_valid_and_agree(tmp_path):
    page = (FOLDER / "proxies.md").read_text()
    (login,) = blocks(FOLDER / "proxies.md", "yaml")
    listens = [yaml.safe_load(one) for one in re.findall(r"listen: (\{host.*?\})", page)]
    assert [one["prefix"] for one in listens] == ["/cryo", "/services/cryodask"]
    for one in listens:
        given = {"name": "north", "projects": ["/data"], "listen": one, **yaml.safe_load(login)}
        (tmp_path / "facility.yaml").write_text(yaml.safe_dump(given))
        assert read_facility(tmp_path / "facility.yaml").listen.prefix == one["prefix"]
    portal, hub = listens
    apache = (FOLDER / "ondemand.conf").read_text()
    assert f'<Location "{portal["prefix"]}">' in apache
    assert f'ProxyPass "http://{portal["host"]}:{portal["port"]}{portal["prefix"]}" flushpackets=on' in apache
    settings = read_facility(tmp_path / "facility.yaml").login.proxy
    for header in (settings.header, "X-Proxy-Secret"):
        assert 0 < apache.index(f"unset {header}") < apache.index(f"set {header} "), "what browsers send never passes"

    c = Config()
    c.JupyterHub.services = [{"name": "other"}]
    exec(compile((FOLDER / "jupyterhub_config.py").read_text(), "jupyterhub_config.py", "exec"), {"get_config": lambda: c})
    other, service = c.JupyterHub.services
    assert other == {"name": "other"}
    assert service["url"] == f"http://{hub['host']}:{hub['port']}"
    assert hub["prefix"] == f"/services/{service['name']}"


# --- back-up ----------------------------------------------------------------------------------------------------------------------
def test_the_restore_drill_restores_people_and_log_ins(tmp_path):
    """The blocks of the page in a folder that stands for the root of the file system, up to the server that is started."""
    root = tmp_path / "root"
    settings, state = root / "etc" / "cryodask", root / "var" / "lib" / "cryodask" / "facility" / "north"
    settings.mkdir(parents=True)
    make_project(tmp_path / "projects" / "session")
    PasswordFile(settings / "passwords").write("anna", PASSWORD)
    content = {"name": "north", "projects": [str(tmp_path / "projects")], "admins": ["anna"], "listen": {"port": 8443}}
    (settings / "facility.yaml").write_text(yaml.safe_dump({**content, "login": {"passwords": "/etc/cryodask/passwords"}}))
    Directory(Ledger(state / "people", private=True)).set_person("ben", admin=False, microscopes=["krios1"], sessions={})
    (state / "cookie-secret").write_text("a secret")

    back_up, drill, _ = blocks(FOLDER / "operation.md", "sh")
    *before, start = drill.splitlines()
    script = "\n".join([back_up, *before]).replace("-C / ", f"-C {root} ").replace("8444", "0")
    done = subprocess.run(["bash", "-ec", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert oct((tmp_path / "back-up.tgz").stat().st_mode)[-3:] == "600"

    variable, *words = shlex.split(start.replace("$PWD", str(tmp_path)))
    name, _, value = variable.partition("=")
    assert words[:2] == ["cryodask", "dashboard"]
    words[3] = str(tmp_path / words[3])
    with Command(*words[2:], folder=tmp_path, environment={name: value}) as server:
        form, same = {"name": "anna", "password": PASSWORD}, {"Sec-Fetch-Site": "same-origin"}
        status, headers, _ = server.site.ask("/login", "POST", token=None, form=form, headers=same)
        assert status == 303
        cookie = {"Cookie": headers["set-cookie"].partition(";")[0]}
        assert b"ben" in server.site.ask("/admin/", token=None, headers=cookie)[2]
    drilled = tmp_path / "drill" / "var" / "lib" / "cryodask" / "facility" / "north"
    assert (drilled / "cookie-secret").read_text() == "a secret", "cookies of before stay valid"
    assert list((drilled / "audit").glob("*.jsonl")), "the drill writes into its own state"
    assert not (state / "audit").exists()
