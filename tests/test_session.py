"""One way to run: command line, Python and a batch job leave equal results and tell the same story; --until, --from, --only; stop."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from _told import Told
from test_bad_input import particle_project, star_of_particles
from typer.testing import CliRunner

import cryodask
from cryodask.cli import app
from cryodask.errors import ProjectFileError, Quarantined, Stopped, StoreError
from cryodask.formats.movies import write_tiff_movie
from cryodask.run.backlog import Backlog
from cryodask.run.events import ExposureCommitted, RunEnded, RunStarted, StepFinished, StepStarted
from cryodask.run.events.log import tail
from cryodask.run.preview import preview
from cryodask.run.recipe import draft_plan, make_plan
from cryodask.run.session import run_plan
from cryodask.run.watch import Until
from cryodask.stage import Params, stage
from cryodask.store import environments
from cryodask.store.project import Item, Project

pytestmark = pytest.mark.heavy

COMMAND = [sys.executable, "-m", "cryodask.cli"]
MICROSCOPE = {
    "voltage_kv": 300,
    "spherical_aberration_mm": 2.7,
    "amplitude_contrast": 0.1,
    "pixel_size_angstrom": 1.0,
    "dose_per_frame": 1.0,
}
STEPS = [{"motion": {"patches": [1, 1]}}, {"pick": {"diameter_angstrom": 20}}, {"extract": {"box": 16}}]


def session(folder: Path, movies: int = 3, pipeline=STEPS, size: int = 128, **more) -> Path:
    (folder / "movies").mkdir(parents=True, exist_ok=True)
    for number in range(movies):
        movie(folder, number, size)
    content = {"name": "p", "inputs": {"movies": "movies/*.tif"}, "microscope": MICROSCOPE, "pipeline": pipeline, "workers": 2, **more}
    content = {name: value for name, value in content.items() if value is not None}
    (folder / "p.yaml").write_text(yaml.safe_dump(content))
    return folder / "p.yaml"


def movie(folder: Path, number: int, size: int = 128) -> None:
    frames = np.random.default_rng(number).poisson(1.0, (3, size, size)).astype(np.uint8)
    part = folder / f"m{number:03d}.part"
    write_tiff_movie(part, frames, 1.0)
    os.rename(part, folder / "movies" / f"m{number:03d}.tif")


def keys(folder: Path) -> dict[str, dict[int, int]]:
    """Every result by its content."""
    project = Project(folder)
    out = {}
    for label in project.stages:
        generation = project.generation(label)
        records = generation.committed()
        out[f"{label} {generation.path.name}"] = {row: hash(json.dumps(r.get("columns"), sort_keys=True)) for row, r in records.items()}
    return out


def story(events) -> list:
    """What is told, without what differs from run to run."""
    kinds = [e for e in events if isinstance(e, RunStarted | StepStarted | StepFinished | RunEnded)]
    return [{**e.as_record(), "time": 0, "run": "", "seconds": 0, "folder": "", "pid": 0} for e in kinds]


# --- one story ---------------------------------------------------------------------------------------------------------------
def test_command_python_and_notebook_leave_equal_results_events_and_reports(tmp_path, client):
    ways = {name: session(tmp_path / name, workers=1) for name in ("command", "python", "client")}
    done = subprocess.run([*COMMAND, "run", str(ways["command"]), "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    printed = [json.loads(line) for line in done.stdout.splitlines()]
    assert all({"event", "time", "run"} <= set(line) for line in printed)
    told = Told()
    cryodask.run_project(ways["python"], listen=[told])
    cryodask.run_project(ways["client"], client, listen=[])
    stories = {name: story(tail(path.parent / "p", 10_000)) for name, path in ways.items()}
    assert stories["command"] == stories["python"] == stories["client"] == story(told.events)
    assert [e["event"] for e in stories["command"]] == ["RunStarted", "StepStarted", "StepFinished", "RunEnded"]
    assert {line["event"] for line in printed} >= {"RunStarted", "StepStarted", "ExposureCommitted", "Counted", "StepFinished", "RunEnded"}
    assert sum(line["event"] == "ExposureCommitted" for line in printed) == 3
    assert keys(tmp_path / "command" / "p") == keys(tmp_path / "python" / "p") == keys(tmp_path / "client" / "p")
    assert all((path.parent / "p" / "report.html").exists() for path in ways.values())
    logs = [next((path.parent / "p" / "logs").glob("*.log")).read_text() for path in ways.values()]
    assert all("done m002" in text and text.rstrip().endswith("finished") for text in logs)
    shown = CliRunner().invoke(app, ["watch", str(tmp_path / "python" / "p")])
    assert shown.exit_code == 0
    assert "done m001" in shown.stdout
    assert "3 micrographs done" in shown.stdout

    # nothing is left to do: no workers are started, and the report is kept; with another movie, neither holds
    report = tmp_path / "python" / "p" / "report.html"
    written, told = report.stat().st_mtime_ns, Told()
    cryodask.run_project(ways["python"], listen=[told])
    assert (report.stat().st_mtime_ns, "Dask dashboard" in str(told.said)) == (written, False)
    assert any("Report: " in sentence for sentence in told.said)
    movie(tmp_path / "python", 3)
    cryodask.run_project(ways["python"], client, listen=[told])
    assert report.stat().st_mtime_ns > written
    assert "Dask dashboard" in str(told.said)


def test_an_input_that_is_wrong_a_strict_run_and_what_each_says(tmp_path, client):
    path = session(tmp_path, workers=None, cluster=client.scheduler.address)
    (tmp_path / "movies" / "m001.tif").write_bytes(b"II*\0broken")
    told = Told()
    with pytest.raises(Quarantined, match=r"1 exposure is "):
        cryodask.run_project(path, client, strict=True, listen=[told])
    assert (told.events[-1].status, Quarantined.exit_status) == (1, 1)
    shown = CliRunner().invoke(app, ["run", str(path), "--strict", "-q"])
    assert isinstance(shown.exception, Quarantined)
    session(tmp_path, 0, [{"motion": {"patchez": 1}}])
    told = Told()
    with pytest.raises(ProjectFileError):
        cryodask.run_project(path, client, listen=[told])
    assert [(type(e), e.status) for e in told.events] == [(RunEnded, 2)]


def test_version_and_short_help():
    runner = CliRunner()
    assert runner.invoke(app, ["--version"]).stdout == f"cryodask {cryodask.__version__}\n"
    assert "--until-idle" in runner.invoke(app, ["run", "-h"]).stdout


# --- which steps ---------------------------------------------------------------------------------------------------------------
def test_until_from_and_only_mean_the_same_in_a_run_and_in_its_preview(tmp_path, client):
    path = session(tmp_path)
    plan = make_plan(path)

    def both(**wanted) -> list[str]:
        from cryodask.run.selection import Wanted

        shown = preview(draft_plan(path), Wanted(**wanted))
        assert shown.problems == []
        before = {label: state.place for label, state in Project.create(plan.folder, "p").state.steps.items()}
        told = Told()
        run_plan(plan, client, listen=[told], **wanted)
        after = Project(plan.folder).state.steps
        ran = [label for e in told.events if isinstance(e, StepFinished) for label in e.steps]
        assert ran == [s.step for s in shown.steps]
        assert {s.step for s in shown.steps if not s.done} == {label for label in ran if after[label].place != before.get(label)}
        return ran

    assert both(until="motion") == ["ingest", "motion"]
    with pytest.raises(StoreError, match="extract needs the result of pick"):
        run_plan(plan, client, only="extract")
    assert both(only="pick") == ["pick"]
    assert "extract" not in Project(plan.folder).stages
    assert both() == ["ingest", "motion", "pick", "extract"]
    place = Project(plan.folder).state.steps["motion"].place
    assert both(start_again_from="pick", until="pick") == ["ingest", "motion", "pick"]
    assert Project(plan.folder).state.steps["motion"].place == place
    for wrong in ({"only": "pick", "until": "pick"}, {"start_again_from": "pick", "until": "motion"}, {"only": "pic"}):
        with pytest.raises(ProjectFileError):
            run_plan(plan, client, **wrong)


# --- stop ----------------------------------------------------------------------------------------------------------------------
class SlowParams(Params):
    """Nothing to set."""


@stage(version=1, needs=["movie", "pixel_size_angstrom"], gives=["micrograph_sum"], sizes=lambda params, sizes: {n: sizes[n] for n in "yx"})
def slow_sum(params: SlowParams, *, movie, pixel_size_angstrom, context):
    """Sums the frames; from a certain number of items on not before the stop was noticed."""
    begun, moment = Path(os.environ["CRYODASK_TEST_BEGUN"]), int(os.environ["CRYODASK_TEST_MOMENT"])
    Path(begun, f"{time.monotonic_ns()}-{threading.get_ident()}").touch()
    time.sleep(0.2)
    while len(list(begun.iterdir())) >= moment and not (begun.parent / "noticed").exists():
        time.sleep(0.02)
    return {"micrograph_sum": sum(np.asarray(movie[i], np.float32) for i in range(len(movie)))}


@pytest.fixture
def slow(tmp_path, monkeypatch):
    """A client whose workers know the slow stage, and the folder that holds a file for each item that was begun."""
    from distributed import Client, LocalCluster

    begun = tmp_path / "begun"
    begun.mkdir()
    monkeypatch.setenv("CRYODASK_TEST_BEGUN", str(begun))
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None) as cluster, Client(cluster) as made:
        yield made, begun


def test_a_watch_that_is_stopped_at_ten_moments_finishes_what_is_in_flight_and_nothing_else(tmp_path, slow, monkeypatch):
    """40 movies wait, two threads process them; each time the watch goes on where it was."""
    client, begun = slow
    plan = make_plan(session(tmp_path, 40, ["ingest", "slow_sum"]))
    random_ = random.Random(7)
    before = 0

    def stop_when(moment: int) -> None:
        while len(list(begun.iterdir())) < moment:
            time.sleep(0.01)
        stop = plan.folder / "stop"
        stop.touch()
        while stop.exists():
            time.sleep(0.01)
        (tmp_path / "noticed").touch()

    for _ in range(10):
        moment = before + random_.randint(1, 3)
        monkeypatch.setenv("CRYODASK_TEST_MOMENT", str(moment))
        (tmp_path / "noticed").unlink(missing_ok=True)
        stopping = threading.Thread(target=stop_when, args=(moment,), daemon=True)
        stopping.start()
        told = Told()
        with pytest.raises(Stopped, match="the file stop"):
            run_plan(plan, client, watch=Until(idle_seconds=60), listen=[told])
        stopping.join(60)
        number = len(list(begun.iterdir()))
        # two threads: what was begun when the file came, and what they began until the workers were told
        assert moment <= number <= moment + 4
        done = sum(isinstance(e, ExposureCommitted) for e in told.events)
        assert done == number - before, "whatever was begun was finished and told"
        assert told.events[-1].status == 130
        project = Project(plan.folder)
        assert len(project.generation("slow_sum").committed()) == number
        assert project.verify() == []
        assert project.failures() == []
        finished = [label for e in told.events if isinstance(e, StepFinished) for label in e.steps]
        assert finished == [], "no step is finished, and none after it was begun"
        before = number
    project = run_plan(plan, client)
    assert len(project.generation("slow_sum").committed()) == 40
    assert len(list(begun.iterdir())) == 40, "nothing was begun twice"


def test_ctrl_c_in_a_step_over_a_set_ends_after_the_iteration_and_goes_on_from_there(tmp_path, client):
    star_of_particles(tmp_path, count=200)
    plan = make_plan(particle_project(tmp_path, "classify2d: {classes: 2, iterations: 6}"))
    seen: list[int] = []

    def interrupt(event) -> None:
        if type(event).__name__ == "Iteration":
            seen.append(event.iteration)
            if event.iteration == 2 and len(seen) == 2:
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Stopped, match="Ctrl-C"):
        run_plan(plan, client, listen=[interrupt])
    assert seen == [1, 2]
    run_plan(plan, client, listen=[interrupt])
    assert seen == list(range(1, seen[-1] + 1)), "no iteration is made twice"
    assert seen[-1] >= 6
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# --- which movie first ----------------------------------------------------------------------------------------------------------
def test_the_newest_first_every_fourth_the_oldest_and_the_old_ones_last():
    def item(row: int) -> Item:
        return Item(row=row, name=f"m{row}", inputs={}, content="")

    backlog = Backlog([item(i) for i in range(10, 18)], [item(i) for i in range(4)])
    assert [backlog.take().row for _ in range(12)] == [17, 16, 15, 10, 14, 13, 12, 11, 0, 1, 2, 3]
    assert backlog.take() is None
    backlog.add([item(30), item(31)])
    assert [backlog.take().row for _ in range(2)] == [31, 30]


def test_a_day_with_a_stall_of_ninety_minutes():
    """LIVE.md 2.3, the same day in a model: newest result older than 5 minutes for about 10 % of the day instead of 43 %."""
    spec = importlib.util.spec_from_file_location("live_order", Path(__file__).parents[1] / "benchmarks" / "live_order.py")
    made = sys.modules["live_order"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    newest, oldest = made.day("newest", seed=1), made.day("oldest", seed=1)
    assert newest.stale_share < 0.15 < 0.3 < oldest.stale_share
    assert newest.median_minutes < 2.5 < oldest.median_minutes
    assert newest.done == oldest.done


# --- what made a result ---------------------------------------------------------------------------------------------------------
def test_results_say_in_which_environment_they_were_made(tmp_path, client, monkeypatch):
    path = session(tmp_path)
    plan = make_plan(path)
    project = run_plan(plan, client, until="motion")
    made_in = environments.environment()
    assert made_in["numpy"] == np.__version__
    assert {"cryodask", "python", "torch", "numpy", "scipy", "zarr", "cpu"} <= set(made_in)
    (name,) = environments.counts(project.records("motion").values())
    assert environments.read(project.path, name) == made_in
    shown = CliRunner().invoke(app, ["info", str(path), "--environment"]).stdout
    assert f"motion         3 results: cryodask {cryodask.__version__}" in shown
    # the same project under another numpy, as after an update
    movie(tmp_path, 3)
    file = project.path / "environments" / f"{name}.json"
    file.write_text(json.dumps(made_in | {"numpy": "1.0"}))
    with pytest.raises(StoreError, match=rf"numpy 1.0 -> {np.__version__}.*--same-environment"):
        run_plan(plan, client, until="motion", same_environment=True)
    assert len(Project(plan.folder).generation("motion").committed()) == 3
    told = Told()
    run_plan(plan, client, until="motion", listen=[told])
    assert sum(f"numpy 1.0 -> {np.__version__}" in text for text in told.said) == 2, told.said  # ingest and motion
    assert len(Project(plan.folder).generation("motion").committed()) == 4
    told = Told()
    run_plan(plan, client, until="motion", listen=[told])
    assert not any("numpy" in text for text in told.said), "where nothing is added nothing is said"


def test_a_step_over_a_set_that_went_on_under_other_versions_names_both(tmp_path, client):
    star_of_particles(tmp_path, count=200)
    plan = make_plan(particle_project(tmp_path, "classify2d: {classes: 2, iterations: 3}"))

    def interrupt(event) -> None:
        if type(event).__name__ == "Iteration" and event.iteration == 1:
            (plan.folder / "stop").touch()
            time.sleep(0.6)

    with pytest.raises(Stopped):
        run_plan(plan, client, listen=[interrupt])
    (file,) = plan.folder.glob("stages/classify2d/*/checkpoints/environments.json")
    (made_in,) = json.loads(file.read_text())
    file.write_text(json.dumps([made_in | {"torch": "1.0"}]))
    told = Told()
    project = run_plan(plan, client, listen=[told])
    assert any("torch 1.0 -> " in text for text in told.said)
    (record,) = project.records("classify2d").values()
    assert sorted(environments.read(project.path, name)["torch"] for name in record["made_in"]) == sorted(["1.0", made_in["torch"]])
