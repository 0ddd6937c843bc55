"""docs/facility/tutorial.md from end to end: its commands in a shell, its clicks in a browser, and what it says that they print."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from _browser import chromium
from _web import DEADLINE_SECONDS, wait_for

from cryodask.store.project import Project

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "facility" / "tutorial.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
STAYS = ("cryodask run betagal.yaml --watch", "cryodask dashboard")
"""Commands that a person leaves running in a terminal of their own."""


class Terminal:
    """A folder in which the commands of the page are carried out by a shell."""

    def __init__(self, folder: Path) -> None:
        self.folder, programs = folder, folder / "programs"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = str(free.getsockname()[1])
        programs.mkdir()
        # the command of the code under test, whatever is installed
        script = programs / "cryodask"
        script.write_text(f'#!/bin/sh\nexec {sys.executable} -m cryodask.cli "$@"\n')
        script.chmod(0o755)
        here = {name: str(folder / "account" / name) for name in ("XDG_STATE_HOME", "XDG_CACHE_HOME")}
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self.environ = {**os.environ, **here, "PYTHONPATH": path, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "200"}
        self.running: list[subprocess.Popen[str]] = []

    def run(self, block: str) -> str:
        """Carry out a block, line by line; returns what it prints."""
        done = subprocess.run(
            ["bash", "-ec", f"{block}\npwd >&2"], cwd=self.folder, env=self.environ, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, (block, done.stdout, done.stderr)
        self.folder = Path(done.stderr.splitlines()[-1])
        return done.stdout + done.stderr

    def start(self, block: str) -> subprocess.Popen[str]:
        """Start a block that goes on running."""
        words = block.replace("8801", self.port)
        process = subprocess.Popen(
            ["bash", "-c", f"exec {words}"], cwd=self.folder, env=self.environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.running.append(process)
        return process

    def end(self) -> None:
        """End what is still running."""
        for process in self.running:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.communicate()


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    made = Terminal(tmp_path)
    yield made
    made.end()


def is_said(text: str, printed: str) -> None:
    """Each line of a block of the page begins a line that was printed, whatever its numbers of seconds, spaces and the account."""

    def plain(line: str) -> str:
        return re.sub(r" +", " ", line).strip()

    lines = [plain(line) for line in printed.splitlines()]
    for wanted in map(plain, text.splitlines()):
        start = wanted.removesuffix("YOU")
        assert any(line.startswith(start) for line in lines), (wanted, printed)


def checksums(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.tif")}


class Person:
    """Somebody at the browser who presses what the page prints in bold."""

    def __init__(self, browser: Any) -> None:
        self.page = browser.new_context(viewport={"width": 1200, "height": 900}).new_page()
        self.page.set_default_timeout(DEADLINE_SECONDS * 1000)
        self.pressed: set[str] = set()

    def press(self, name: str, role: str = "link") -> None:
        self.page.get_by_role(role, name=name, exact=True).click()
        self.pressed.add(name)

    def wait(self, script: str) -> Any:
        return self.page.wait_for_function(script)

    def remove_one_and_add_one(self) -> None:
        self.page.wait_for_selector("body[data-ready=yes]")
        # an empty place: the one of a coarse grid that is furthest from all picks
        places = self.page.evaluate("""() => {
          const picks = picker.shown(), far = (y, x) => Math.min(...picks.map((p) => Math.hypot(p.y - y, p.x - x)));
          const grid = [];
          for (let y = 60; y < picker.height - 60; y += 20) for (let x = 60; x < picker.width - 60; x += 20) grid.push([far(y, x), y, x]);
          grid.sort((a, b) => b[0] - a[0]);
          return [[picks[0].y, picks[0].x], grid[0].slice(1)].map(([y, x]) => picker.frame.toScreen(y, x));
        }""")
        box = self.page.locator("canvas.view").bounding_box()
        before = self.page.evaluate("picker.shown().map(p => p.pick)")
        for right, down in places:
            self.page.mouse.click(box["x"] + right, box["y"] + down)
        self.wait("() => !picker.queue.pending().length && !picker.queue.busy && !picker.refreshing && !picker.sent.size")
        after = self.page.evaluate("picker.shown().map(p => p.pick)")
        assert (len(set(before) - set(after)), len(set(after) - set(before))) == (1, 1)


@pytest.mark.heavy
def test_the_install_block_is_carried_out(tmp_path: Path) -> None:
    """Without network: the new environment sees the packages of this one, so that pip has only to find everything there and compatible."""
    make, *then = BLOCKS[0][1].splitlines()
    programs, home = tmp_path / "programs", tmp_path / "home"
    programs.mkdir()
    home.mkdir()
    (programs / "python3").symlink_to(sys.executable)
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environ = {**kept, "HOME": str(home), "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "PIP_NO_INDEX": "1"}

    def run(block: str) -> str:
        done = subprocess.run(["bash", "-ec", block], cwd=home, env=environ, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, (block, done.stdout, done.stderr)
        return done.stdout + done.stderr

    run(make)
    (packages,) = (home / "cryodask" / "lib").glob("python*/site-packages")
    here = [path for path in sys.path if path.endswith("-packages")]
    (packages / "these.pth").write_text(f"import sys; sys.path[:0] = {here}\n")
    said = run("\n".join([*then, "python -c 'import sys; print(sys.prefix)'"]))
    assert str(home / "cryodask") in said.splitlines()[-1], "the environment is active"
    for name in ("torch", "cryodask[em,facility]", "fastapi", "tifffile"):
        assert re.search(rf"already satisfied: {re.escape(name)}\W", said), (name, said)
    assert "does not provide the extra" not in said


@pytest.mark.heavy
def test_the_tutorial_from_install_to_restore(terminal: Terminal) -> None:
    with chromium() as browser:
        follow_the_page(terminal, Person(browser))


def follow_the_page(terminal: Terminal, person: Person) -> None:
    (kind, install), *rest = BLOCKS
    assert kind == "sh"
    for extra in re.findall(r"cryodask\[(.*?)\]", install):
        assert set(extra.split(",")) <= set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    printed, before, page = "", {}, person.page
    for kind, block in rest:
        if kind == "text":
            is_said(block, printed)
        elif kind == "yaml":
            (terminal.folder / "betagal.yaml").write_text(block)
        elif block.startswith(STAYS[0]):
            watching = terminal.start(block)
            wait_for((terminal.folder / "betagal" / "project.json").is_file, "the project")
        elif block.startswith(STAYS[1]):
            address = terminal.start(block).stdout.readline()
            assert re.fullmatch(rf"http://127\.0\.0\.1:{terminal.port}/\?token=\S+", address.strip())
            page.goto(address.strip())
            person.press("betagal")
            person.wait("() => document.getElementById('run').textContent")
            assert ": ," not in page.inner_text("#run")
            person.wait("() => document.getElementById('c-exposures').textContent === '3'")
        elif block.startswith("mv later"):
            terminal.run(block)
            person.wait("() => document.getElementById('c-exposures').textContent === '4'")
            printed, _ = watching.communicate(timeout=300)
            assert watching.returncode == 0, printed
            page.locator("#gallery [data-row]").first.click()
            person.press("Edit picks")
            person.remove_one_and_add_one()
            person.press("Use these picks", "button")
            person.wait("() => picker.frozen.time")
        else:
            if "archive" in block:
                before = checksums(terminal.folder / "movies")
            printed = terminal.run(block)
            if "archive" in block:
                assert len(before) == 4
                assert checksums(terminal.folder / "movies") == {}
                person.press("Data")
                page.get_by_role("row", name="originals").filter(has_text=str(terminal.folder.parent / "archive")).first.wait_for()
            if "restore" in block:
                assert checksums(terminal.folder / "movies") == before
            if "classify2d" in printed and "Classes" not in person.pressed:
                person.press("Classes")
                page.wait_for_selector("body[data-ready=yes]")
                page.locator(".choice").first.click()
                person.wait("() => !choices.queue.pending().length && !choices.queue.busy && !choices.sent.size && choices.chosen().length")
                person.press("Use this choice", "button")
                page.wait_for_function("() => document.getElementById('frozen').textContent.includes('froze on')")
    assert person.pressed == set(re.findall(r"\*\*(.+?)\*\*", PAGE)), "what the page says to press"
    project = Project(terminal.folder / "betagal")
    assert project.step("select_classes").products
    assert (terminal.folder / "betagal" / "report.html").is_file()


def test_lines_that_are_not_printed_are_found() -> None:
    is_said("classify2d     3 classes\nfrozen by YOU\n", "classify2d   3 classes  (2.0 s)\nfrozen by anna on Monday\n")
    with pytest.raises(AssertionError):
        is_said("classify2d  4 classes\n", "classify2d  3 classes\n")
