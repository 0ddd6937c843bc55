"""Sessions as they come: movies are taken when their files are complete, in order, through a restart, until a condition."""

from __future__ import annotations

import os
import struct
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from _clock import Clock

from cryodask.errors import ProjectFileError
from cryodask.formats.movies import write_mrc_movie, write_tiff_movie
from cryodask.run import watch
from cryodask.run.events import Counted, Event
from cryodask.run.events.status import read_status, status_sentence
from cryodask.run.map import MapRunner
from cryodask.run.recipe import make_plan
from cryodask.run.selection import Wanted
from cryodask.run.session import check_inputs, run_plan
from cryodask.run.watch import Arrivals, Until
from cryodask.store.project import Project
from cryodask.testing.faults import FaultyJob

pytestmark = pytest.mark.heavy

PROJECT = """
name: live
inputs: {movies: "movies/*.ENDING"}
microscope: {voltage_kv: 300, spherical_aberration_mm: 2.7, pixel_size_angstrom: 1.77, dose_per_frame: 1}
pipeline: [PIPELINE]
"""


def _plan(folder: Path, ending: str = "mrc", pipeline: str = "ingest"):
    (folder / "movies").mkdir(exist_ok=True)
    (folder / "live.yaml").write_text(PROJECT.replace("ENDING", ending).replace("PIPELINE", pipeline))
    return make_plan(folder / "live.yaml")


def _frames(seed: int, frames: int = 3, size: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).poisson(1.0, (frames, size, size)).astype(np.uint8)


def _arrivals(plan, until: Until | None = None, **options) -> Arrivals:
    return Arrivals(plan, Project.create(plan.folder, "live"), until or Until(), lambda text: None, **{"poll_seconds": 0.0, **options})


@pytest.fixture
def clock(monkeypatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(watch, "time", made)
    return made


def _names(found) -> list[str]:
    return [arrival.name for arrival in found]


def test_an_mrc_movie_is_taken_when_its_last_byte_is_there(tmp_path):
    plan = _plan(tmp_path)
    write_mrc_movie(tmp_path / "whole.mrc", _frames(1), 1.0)
    whole = (tmp_path / "whole.mrc").read_bytes()
    arrivals = _arrivals(plan, settled_seconds=1000)
    arrivals.expected_frames = {3}
    target = tmp_path / "movies" / "a.mrc"
    for size in (0, 100, 1024, len(whole) - 1):
        target.write_bytes(whole[:size])
        os.utime(target, (1, 1))  # old by its date: age alone proves nothing
        assert arrivals.poll() == []
        assert list(arrivals.pending) == [str(target)]
    target.write_bytes(whole)
    assert _names(arrivals.poll()) == ["a"]
    assert arrivals.poll() == []


def test_a_tiff_that_grows_by_frames_is_whole_after_each_and_complete_after_the_last(tmp_path):
    plan = _plan(tmp_path, "tif")
    target = tmp_path / "movies" / "a.tif"
    arrivals = _arrivals(plan, settled_seconds=1000)
    arrivals.expected_frames = {3}
    for frames in (1, 2):
        write_tiff_movie(target, _frames(1)[:frames])
        assert arrivals.poll() == []
    write_tiff_movie(target, _frames(1))
    assert _names(arrivals.poll()) == ["a"]


def test_a_tiff_without_its_last_bytes_is_not_whole(tmp_path):
    plan = _plan(tmp_path, "tif")
    write_tiff_movie(tmp_path / "whole.tif", _frames(1))
    whole = (tmp_path / "whole.tif").read_bytes()
    arrivals = _arrivals(plan, settled_seconds=0)
    for part in (8, len(whole) // 2, len(whole) - 1):
        (tmp_path / "movies" / "a.tif").write_bytes(whole[:part])
        assert arrivals.poll() == []


def test_the_first_movies_and_shorter_ones_must_stand_still(tmp_path, clock):
    plan = _plan(tmp_path)
    write_mrc_movie(tmp_path / "movies" / "a.mrc", _frames(1), 1.0)
    arrivals = _arrivals(plan, settled_seconds=0.3)
    assert arrivals.poll() == []
    clock.sleep(0.35)
    assert _names(arrivals.poll()) == ["a"]
    arrivals.expected_frames = {3}
    write_mrc_movie(tmp_path / "movies" / "short.mrc", _frames(1)[:2], 1.0)
    write_mrc_movie(tmp_path / "movies" / "usual.mrc", _frames(1), 1.0)
    assert _names(arrivals.poll()) == ["usual"]
    clock.sleep(0.35)
    assert _names(arrivals.poll()) == ["short"]


def test_first_come_first_served_whatever_the_names(tmp_path):
    plan = _plan(tmp_path)
    arrivals = _arrivals(plan)
    arrivals.expected_frames = {3}
    for place, name in enumerate(["z", "a", "m"]):
        path = tmp_path / "movies" / f"{name}.mrc"
        write_mrc_movie(path, _frames(place), 1.0)
        os.utime(path, (1000 + place, 1000 + place))
    assert _names(arrivals.poll()) == ["z", "a", "m"]


def test_a_second_movie_of_one_name_is_left_out_and_said(tmp_path):
    (tmp_path / "movies" / "b").mkdir(parents=True)
    (tmp_path / "live.yaml").write_text(PROJECT.replace("movies/*.ENDING", "movies/**/*.mrc").replace("PIPELINE", "ingest"))
    said: list[str] = []
    plan = make_plan(tmp_path / "live.yaml")
    arrivals = Arrivals(plan, Project.create(plan.folder, "live"), Until(), said.append, poll_seconds=0)
    arrivals.expected_frames = {3}
    for path in ("movies/a.mrc", "movies/b/a.mrc"):
        write_mrc_movie(tmp_path / path, _frames(1), 1.0)
    assert _names(arrivals.poll()) == ["a"]
    assert arrivals.poll() == []
    assert len(said) == 1
    assert "same name" in said[0]


def test_a_file_that_never_becomes_whole_is_handed_on_at_the_end_of_the_session(tmp_path, clock):
    plan = _plan(tmp_path)
    (tmp_path / "movies" / "cut.mrc").write_bytes(b"\0" * 2000)
    arrivals = _arrivals(plan, Until(idle_seconds=0.3), settled_seconds=0.2)
    assert arrivals.poll() == []
    assert not arrivals.over
    clock.sleep(0.35)
    assert _names(arrivals.poll()) == ["cut"]
    assert arrivals.over


def test_a_growing_file_keeps_the_session_open(tmp_path, clock):
    plan = _plan(tmp_path)
    arrivals = _arrivals(plan, Until(idle_seconds=0.4))
    for size in (1, 2, 3):
        (tmp_path / "movies" / "a.mrc").write_bytes(b"\0" * size)
        clock.sleep(0.3)
        arrivals.poll()
        assert not arrivals.over
    clock.sleep(0.45)
    arrivals.poll()
    assert arrivals.over


def test_only_movies_can_be_watched_for(tmp_path):
    (tmp_path / "p.star").write_text("data_\n")
    plan = _plan(tmp_path)
    check_inputs(plan, Wanted(watch=Until()))
    for name in ("a", "b"):
        (tmp_path / f"{name}.mrc").write_bytes(b"a map")
    halves = "name: x\ninputs: {half_maps: [a.mrc, b.mrc]}\npipeline: [mask]\n"
    (tmp_path / "x.yaml").write_text(halves)
    with pytest.raises(ProjectFileError, match="--watch needs movies"):
        check_inputs(make_plan(tmp_path / "x.yaml"), Wanted(watch=Until()))


class _Noted:
    """Listener that keeps every account of the inputs, to be added up."""

    def __init__(self) -> None:
        self.accounts: list[dict] = []

    def __call__(self, event: Event) -> None:
        if isinstance(event, Counted):
            self.accounts.append(event.model_dump())


def _adds_up(accounts: list[dict]) -> bool:
    return all(
        a["seen"] == a["done"] + a["quarantined"] + a["running"] + a["waiting"] and min(a["waiting"], a["running"]) >= 0 for a in accounts
    )


def _write_slowly(folder: Path, count: int, pause: float) -> None:
    """As a camera does: the header first, then frame by frame."""
    for number in range(count):
        scratch = folder / f"scratch-{number}"
        write_mrc_movie(scratch.with_suffix(".mrc"), _frames(number, 3, 128), 1.0)
        data = scratch.with_suffix(".mrc").read_bytes()
        scratch.with_suffix(".mrc").unlink()
        with open(folder / "movies" / f"m{number:03d}.mrc", "wb", buffering=0) as file:
            for part in range(0, len(data), 16384):
                file.write(data[part : part + 16384])
                time.sleep(pause / 4)


def test_forty_movies_are_processed_while_they_are_written_through_a_restart(tmp_path, client):
    plan = _plan(tmp_path, pipeline="motion: {patches: [1, 1]}")
    writer = threading.Thread(target=_write_slowly, args=(tmp_path, 40, 0.12))
    writer.start()
    first, second = _Noted(), _Noted()
    run_plan(plan, client, watch=Until(movies=15), listen=[first])
    before = {r: rec["time"] for r, rec in Project(plan.folder).generation("ingest").committed().items()}
    project = run_plan(plan, client, watch=Until(movies=40), listen=[second])
    writer.join()
    records = project.generation("ingest").committed()
    assert len(records) == len(project.generation("motion").committed()) == 40
    assert len(before) >= 15
    assert all(records[row]["time"] == when for row, when in before.items()), "nothing is done twice"
    assert project.failures() == []
    assert project.verify() == []
    assert _adds_up(first.accounts + second.accounts)
    assert second.accounts[-1]["done"] == 40
    for number in (0, 17, 39):
        item = next(i for i in project.items() if i.name == f"m{number:03d}")
        np.testing.assert_array_equal(project.generation("ingest").read(records[item.row], "movie").read(), _frames(number, 3, 128))
    status = read_status(project.path)
    assert status["state"] == "finished"
    assert status_sentence(project.path).startswith("finished: ingest > motion: 40 seen = 40 done + 0 quarantined")


def test_a_movie_that_is_written_again_during_the_session_is_processed_again(tmp_path, client):
    plan = _plan(tmp_path)
    for number in range(4):
        write_mrc_movie(tmp_path / "movies" / f"m{number}.mrc", _frames(number), 1.0)

    def again() -> None:
        while not (plan.folder / "stages" / "ingest").exists() or not Project(plan.folder).stages:
            time.sleep(0.05)
        time.sleep(1.0)
        write_mrc_movie(tmp_path / "movies" / "m2.mrc", _frames(77), 1.0)
        write_mrc_movie(tmp_path / "movies" / "m4.mrc", _frames(4), 1.0)

    writer = threading.Thread(target=again)
    writer.start()
    project = run_plan(plan, client, watch=Until(movies=5))
    writer.join()
    records = project.generation("ingest").committed()
    row = next(i.row for i in project.items() if i.name == "m2")
    np.testing.assert_array_equal(project.generation("ingest").read(records[row], "movie").read(), _frames(77))


@pytest.mark.parametrize("count", [1000, pytest.param(5000, marks=pytest.mark.slow)])
def test_many_names_arrive_over_time_and_every_one_is_accounted_for(tmp_path, client, count):
    plan = _plan(tmp_path)
    job = FaultyJob(tmp_path / "job", {})
    (tmp_path / "job").mkdir()
    project = Project.create(plan.folder, "live")
    arrivals = Arrivals(plan, project, Until(movies=count), lambda text: None, poll_seconds=0.2)
    arrivals.expected_frames = {1}
    header = bytearray(1024)
    struct.pack_into("<4i", header, 0, 4, 4, 1, 0)
    struct.pack_into("<3i", header, 28, 4, 4, 1)
    header[208:212] = b"MAP "
    header[212:216] = bytes([0x44, 0x44, 0, 0])

    def camera() -> None:
        for number in range(count):
            (tmp_path / "movies" / f"x{number:05d}.mrc").write_bytes(bytes(header) + number.to_bytes(16, "little"))
            if number % 50 == 0:
                time.sleep(0.1)

    def source():
        waiting: list = []
        while True:
            if arrivals.due:
                waiting.extend(project.update_exposures(arrivals.poll(), complete=False).new)
            if waiting:
                yield waiting.pop(0)
            elif arrivals.over:
                return
            else:
                yield None

    looks = []
    runner = MapRunner(client, job, event=lambda kind, item, text: looks.append(runner.counts()))
    thread = threading.Thread(target=camera)
    thread.start()
    counts = runner.run(source())
    thread.join()
    assert counts == {"seen": count, "done": count, "quarantined": 0, "running": 0, "waiting": 0}
    assert all(c["seen"] == c["done"] + c["quarantined"] + c["running"] + c["waiting"] for c in looks)
    assert max(c["running"] for c in looks) <= runner.window
