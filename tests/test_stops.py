"""What stops a run half-way (a disk, a mount, inputs that vanish): it says so, blames no item, and goes on when that is mended."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from _files import written
from test_bad_input import PIXEL, PROJECT, contents, failures, frames_of, particle_project, star_of_particles
from test_lazy_faces import TABLE

from cryodask.errors import DiskFullError, InputError
from cryodask.formats import star
from cryodask.formats.movies import write_tiff_movie
from cryodask.formats.mrc import write_mrc
from cryodask.run.events import Event, ExposureCommitted, ExposureQuarantined, Iteration
from cryodask.run.recipe import make_plan
from cryodask.run.session import run_plan
from cryodask.store.project import Project

pytestmark = pytest.mark.heavy

MOVIES = 12


class Trouble:
    """Listener; something happens when the ``after``-th item, or iteration, is done."""

    def __init__(self, after: int, happens: Callable[[], object]) -> None:
        self.after, self.happens, self.steps = after, happens, 0

    def __call__(self, event: Event) -> None:
        if isinstance(event, ExposureCommitted | ExposureQuarantined | Iteration):
            self.steps += 1
            if self.steps == self.after:
                self.happens()


def mount(*words: str) -> None:
    if os.geteuid() or shutil.which("mount") is None or subprocess.run(["mount", *words], capture_output=True, check=False).returncode:
        pytest.skip("NOT TESTED: only root can mount file systems, and not everywhere")


@pytest.fixture
def tmpfs():
    """Mount a small file system on a folder; unmounted in the end."""
    mounted: list[Path] = []

    def make(folder: Path, size: str) -> None:
        folder.mkdir(exist_ok=True)
        mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))
        mounted.append(folder)

    yield make
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> None:
    """Leave no free page on the disk of ``folder``."""
    with open(folder / "ballast", "ab", buffering=0) as file:
        for size in (1 << 16, 1 << 12):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue


@pytest.fixture(scope="module")
def movies(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("movies")
    for i in range(MOVIES):
        write_tiff_movie(folder / f"m{i:02d}.tif", frames_of(i), PIXEL)
    return folder


def of_movies(folder: Path, movies: Path):
    shutil.copytree(movies, folder / "movies")
    (folder / "p.yaml").write_text(PROJECT)
    return make_plan(folder / "p.yaml")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, movies, client) -> dict[tuple[str, int], int]:
    return contents(run_plan(of_movies(tmp_path_factory.mktemp("undisturbed"), movies), client))


def intact(folder: Path) -> bool:
    return [p for p in Project(folder).verify() if "harmless" not in p] == []


# --- the disk is full --------------------------------------------------------------------------------------------------------


def test_a_disk_that_fills_between_iterations_costs_none_of_those_done(tmp_path, client, tmpfs):
    star_of_particles(tmp_path, count=200)
    plan = make_plan(particle_project(tmp_path, "classify2d: {classes: 2, iterations: 8}"))
    whole = Trouble(0, lambda: None)
    expected = contents(run_plan(plan, client, listen=[whole]))
    shutil.rmtree(plan.folder)
    tmpfs(plan.folder, "64m")
    full = Trouble(3 + 3, lambda: fill(plan.folder))  # three micrographs, three iterations
    with pytest.raises(DiskFullError, match="rerun the same command"):
        run_plan(plan, client, listen=[full])
    assert intact(plan.folder)
    (plan.folder / "ballast").unlink()
    again = Trouble(0, lambda: None)
    assert contents(run_plan(plan, client, listen=[again])) == expected
    assert again.steps == whole.steps - 6
    assert intact(plan.folder)


def test_a_disk_that_is_full_when_a_record_is_written_leaves_no_half_record(tmp_path, client, tmpfs):
    (tmp_path / "picks").mkdir()
    names = [f"m{i:02d}" for i in range(40)]
    for i, name in enumerate(names):
        write_mrc(tmp_path / f"{name}.mrc", frames_of(i)[0].astype(np.float32), PIXEL)
        star.write_coordinates(tmp_path / "picks" / f"{name}.star", *np.random.default_rng(i).uniform(0, 190, (2, 300)))
    (tmp_path / "m.star").write_text(TABLE + "".join(f"{name}.mrc 1\n" for name in names))
    (tmp_path / "c.yaml").write_text("name: c\ninputs: {micrographs: m.star, coordinates: picks}\npipeline:\n  - import_picks\n")
    plan = make_plan(tmp_path / "c.yaml")
    expected = contents(run_plan(plan, client))
    assert len(expected) == 80
    shutil.rmtree(plan.folder)
    tmpfs(plan.folder, "16m")
    images = contents(run_plan(plan, client, until="import_micrographs"))  # from here on there are records only
    with pytest.raises(DiskFullError, match="rerun the same command"):
        run_plan(plan, client, listen=[Trouble(5, lambda: fill(plan.folder))])
    half = contents(Project(plan.folder))
    assert 5 <= len(half) - len(images) < 40
    assert half.items() <= expected.items()
    (plan.folder / "ballast").unlink()
    done = run_plan(plan, client)
    assert failures(done) == {}
    assert contents(done) == expected
    assert intact(plan.folder)


# --- nothing may be written any more -----------------------------------------------------------------------------------------


def test_a_project_that_becomes_read_only_stops_with_the_reason_and_goes_on_when_it_is_fixed(tmp_path, movies, client, undisturbed):
    plan = of_movies(tmp_path, movies)
    (tmp_path / "p.yaml").write_text(PROJECT.replace("workers: 1", f"cluster: {client.scheduler.address}"))
    command = [sys.executable, "-m", "cryodask.cli", "run", "p.yaml"]
    plan.folder.mkdir()
    with open(tmp_path / "said", "wb") as said:
        driver = subprocess.Popen(command, cwd=tmp_path, stdout=said, stderr=said)
    try:
        deadline = time.monotonic() + 120
        while not any(written(plan.folder, "stages/extract/*/journal/*.jsonl")):
            assert driver.poll() is None, (tmp_path / "said").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        # mounted on itself, for a mount with files that are open for writing cannot be made read-only
        mount("--bind", str(plan.folder), str(plan.folder))
        mount("-o", "remount,bind,ro", str(plan.folder))
        assert driver.wait(timeout=60) == 4, (tmp_path / "said").read_text()
        told = (tmp_path / "said").read_text()
        assert "cannot be written: Read-only file system" in told
        assert "Traceback" not in told
        assert 0 < Project(plan.folder)["extract"].sizes["micrograph"] < MOVIES
        assert failures(Project(plan.folder)) == {}
    finally:
        subprocess.run(["umount", "-l", str(plan.folder)], check=False, capture_output=True)
        driver.kill()
        driver.wait()
    assert contents(run_plan(make_plan(tmp_path / "p.yaml"), client)) == undisturbed
    assert intact(plan.folder)


# --- inputs vanish -----------------------------------------------------------------------------------------------------------


def test_a_movie_that_is_removed_before_its_turn_is_quarantined_and_the_others_are_done(tmp_path, movies, client, undisturbed):
    plan = of_movies(tmp_path, movies)
    last = tmp_path / "movies" / f"m{MOVIES - 1:02d}.tif"
    away = tmp_path / last.name
    done = run_plan(plan, client, listen=[Trouble(1, lambda: os.rename(last, away))])
    assert set(failures(done)) == {last.stem}
    assert "does not exist" in failures(done)[last.stem]
    assert done["extract"].sizes["micrograph"] == MOVIES - 1
    os.rename(away, last)
    assert contents(run_plan(plan, client, retry_quarantined=True)) == undisturbed


@pytest.mark.parametrize("how", ["renamed", "unmounted"])
def test_a_folder_of_inputs_that_vanishes_stops_the_run_and_no_movie_is_blamed(how, tmp_path, movies, client, undisturbed):
    plan = of_movies(tmp_path, movies)
    here, away = tmp_path / "movies", tmp_path / "away"
    if how == "unmounted":
        os.rename(here, away)
        here.mkdir()
        mount("--bind", str(away), str(here))
        gone, back = ["umount", "-l", str(here)], ["mount", "--bind", str(away), str(here)]
    else:
        gone, back = ["mv", str(here), str(away)], ["mv", str(away), str(here)]
    try:
        with pytest.raises(InputError, match="restore the folder and rerun the same command"):
            run_plan(plan, client, listen=[Trouble(1, lambda: subprocess.run(gone, check=True))])
        assert failures(Project(plan.folder)) == {}
        assert intact(plan.folder)
        subprocess.run(back, check=True)
        assert contents(run_plan(plan, client)) == undisturbed
    finally:
        subprocess.run(["umount", "-l", str(here)], check=False, capture_output=True)
