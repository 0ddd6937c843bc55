"""Starting, pausing and ending a session from its page: real runs in processes of their own, and who may not."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _browser import Tab, chromium
from _web import DEADLINE_SECONDS, Site, serving

from cryodask.formats.movies import write_mrc_movie
from cryodask.run.events.status import status_sentence
from cryodask.run.selection import Wanted
from cryodask.run.started import Started
from cryodask.run.stopping import forget
from cryodask.run.watch import Until
from cryodask.web.control import HERE, Starter, run_state
from cryodask.web.ledger import Ledger
from cryodask.web.sessions import Sessions

pytestmark = pytest.mark.heavy

PROJECT = """
name: live
inputs: {movies: "movies/*.mrc"}
microscope: {voltage_kv: 300, spherical_aberration_mm: 2.7, pixel_size_angstrom: 1.5, dose_per_frame: 1}
pipeline: [ingest]
"""


def session(folder: Path) -> Path:
    """A project file with three movies, and its results as a run left them that has not found a movie yet."""
    (folder / "movies").mkdir()
    for number in range(3):
        movie = folder / "movies" / f"m{number}.mrc"
        write_mrc_movie(movie, np.random.default_rng(number).poisson(1.0, (3, 16, 16)).astype(np.uint8), 1.0)
        os.utime(movie, (1, 1))
    (folder / "live.yaml").write_text(PROJECT)
    made = folder / "live"
    made.mkdir()
    (made / "project.json").write_text("{}")
    return made


def status(folder: Path, state: str, **more: Any) -> None:
    (folder / "status.json").write_text(json.dumps({"state": state, "host": "elsewhere", "pid": 1, "time": time.time(), **more}))


# --- states ----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("given", "files", "state"),
    [
        ({"state": "running"}, [], "running"),
        ({"state": "running"}, ["stop"], "pausing"),
        ({"state": "running"}, ["end"], "ending"),
        ({"state": "running", "time": 1.0}, [], "silent"),
        ({"state": "running", "time": 1.0}, ["driver.lock"], "running"),
        ({"state": "running", "host": os.uname().nodename, "pid": 2**22 + 1}, [], "gone"),
        ({"state": "stopped: Stopped by the file stop. Finished results are kept."}, ["stop"], "paused"),
        ({"state": "stopped: The disk is full."}, [], "failed"),
        ({"state": "waiting for a person: draw_mask"}, [], "waits"),
        ({"state": "finished"}, ["end"], "finished"),
    ],
)
def test_what_a_run_does_in_a_word(tmp_path: Path, given: dict[str, Any], files: list[str], state: str) -> None:
    assert run_state(tmp_path) == "never"
    status(tmp_path, **given)
    for name in files:
        (tmp_path / name).touch()
    assert run_state(tmp_path) == state
    assert status_sentence(tmp_path).startswith("no sign of life") == (state == "silent")
    # a new run forgets what was asked of an earlier one
    forget(tmp_path)
    assert not any((tmp_path / name).exists() for name in files if name != "driver.lock")


def test_how_a_run_was_started_is_remembered_with_its_folder(tmp_path: Path) -> None:
    (tmp_path / "a" / "live").mkdir(parents=True)
    wanted = Wanted(watch=Until(idle_seconds=90, movies=7), workers=3, start_again_from="ctf")
    assert wanted.words == ("--watch", "--until-idle", "1.5", "--until-movies", "7", "--workers", "3")
    Started(tmp_path / "a" / "x.yaml", wanted.words, True, "krios", None).write(tmp_path / "a" / "live")
    (tmp_path / "a").rename(tmp_path / "b")
    assert Started.read(tmp_path / "b" / "live") == Started(tmp_path / "b" / "x.yaml", wanted.words, True, "krios", None)
    for text in ("", "[]", '{"file": 3}', "null"):
        (tmp_path / "b" / "live" / "started.json").write_text(text)
        assert Started.read(tmp_path / "b" / "live") is None


@pytest.mark.parametrize(
    ("where", "strict", "mode", "said"),
    [
        (None, False, 0o644, "This server starts no sessions. Start it with  cryodask run"),
        (HERE, True, 0o664, "Other accounts can change its project file"),
        (HERE, False, 0o664, ""),
        (HERE, True, 0o644, ""),
    ],
)
def test_what_others_can_change_is_not_started(tmp_path: Path, where: str | None, strict: bool, mode: int, said: str) -> None:
    folder = session(tmp_path)
    starter = Starter(where, strict=strict)
    assert "never run with this version" in starter.state(folder)["why_not"]
    Started(tmp_path / "live.yaml", (), False).write(folder)
    (tmp_path / "live.yaml").chmod(mode)
    folder.chmod(0o755)
    now = starter.state(folder)
    assert now["why_not"].startswith(said)
    assert now["start"] is not bool(said)


# --- a real run, from the page -----------------------------------------------------------------------------------------------------
@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[Site, Path]]:
    folder = session(tmp_path)
    (folder / "project.json").unlink()
    from cryodask.store.project import Project

    Project.create(folder, "live").save()
    Started(tmp_path / "live.yaml", ("--watch", "--workers", "1"), True).write(folder)
    with serving(Sessions({"": [folder]}, Ledger(tmp_path / "audit")), cache=tmp_path / "cache", starter=Starter(HERE, strict=False)) as on:
        yield on, folder


def test_a_session_is_started_paused_started_again_and_ended(site: tuple[Site, Path]) -> None:
    running, folder = site
    with chromium() as browser:
        one = Tab(browser, running).log_in().open("s/live/")
        one.until("document.body.dataset.run === 'never'")
        assert [one.ask(f"document.getElementById('r-{what}').disabled") for what in ("start", "pause", "end")] == [False, True, True]
        one.page.click("#r-start")
        one.until("document.body.dataset.run === 'running'")
        assert running.ask("/s/live/start", "POST", sent={})[0] == 409
        one.until("document.getElementById('c-done').textContent === '3'")
        one.page.click("#r-pause")
        one.until("document.body.dataset.run === 'paused'")
        assert "paused" in one.text("r-said")
        assert running.ask("/s/live/end", "POST", sent={"name": "live"})[0] == 409
        # by keyboard alone
        one.page.focus("#r-start")
        one.page.keyboard.press("Enter")
        one.until("document.body.dataset.run === 'running'")
        one.page.focus("#r-end")
        one.page.keyboard.press("Enter")
        one.until("document.activeElement.name === 'name'")
        one.page.keyboard.type("life")
        one.page.keyboard.press("Enter")
        one.until("document.querySelector('.toast.bad')?.textContent.includes('type the name of the session')")
        one.page.focus("#r-confirm input")
        one.page.keyboard.press("Control+A")
        one.page.keyboard.type("live")
        one.page.keyboard.press("Enter")
        one.until("document.body.dataset.run === 'finished'")
        assert [w for w in one.wrong if "409" not in w] == []
        one.close()
    assert (folder / "report.html").exists(), "the later steps ran"
    assert "the session was ended by a person" in (folder / "last-start.log").read_text()
    lines = Ledger(folder.parent / "audit").records()
    assert [line["action"] for line in lines] == ["start", "pause", "start", "end"]


def test_a_run_that_cannot_begin_says_why(site: tuple[Site, Path]) -> None:
    running, folder = site
    (folder.parent / "live.yaml").write_text("name: <script>alert(1)</script>\n")
    assert running.json("/s/live/control", token=None, headers={"Authorization": "Bearer a-token"})["start"]
    assert running.ask("/s/live/start", "POST", sent={})[0] == 202
    until = time.monotonic() + DEADLINE_SECONDS
    while not (now := running.json("/s/live/control"))["problem"]:
        assert time.monotonic() < until
        time.sleep(0.2)
    assert now["state"] == "never"
    assert "live.yaml" in now["problem"]
    assert now["start"]
