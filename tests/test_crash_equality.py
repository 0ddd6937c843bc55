"""Processes killed at random moments of real runs: what the resumed run leaves is what an uninterrupted one leaves, bit by bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from _files import written
from _once import simulated

from cryodask.run.recipe import make_plan
from cryodask.run.session import run_plan
from cryodask.simulate import SessionParams
from cryodask.store.generation import Generation
from cryodask.store.journal import content_crc
from cryodask.store.project import Project
from cryodask.store.shards import file_crc
from cryodask.testing.chaos import EVERY_KIND, Chaos, Kill
from cryodask.testing.clusters import ProcessCluster
from cryodask.vocabulary import VARIABLES

PARAMS = SessionParams(movies=6, height=512, width=512, frames=4, dose_per_frame=10, particles=11, truth_maps=((32, 7.08),))
PROJECT = """
name: tiny
inputs: {{movies: "movies/*.tif", gain: gain.mrc}}
microscope: {{voltage_kv: 300, spherical_aberration_mm: 2.7, amplitude_contrast: 0.1, pixel_size_angstrom: 1.77, dose_per_frame: 10}}
pipeline:
  - motion: {{patches: [1, 1]}}
  - ctf
  - pick: {{diameter_angstrom: 180}}
  - extract: {{box: 128, scale_to: 32}}
  - classify2d: {{classes: 2, iterations: 7}}
  - curate: {{keep: all}}
  - extract as full: {{box: 160, scale_to: 32, recentre: true}}
  - refine3d: {{reference: truth/map_32_7.08A.mrc, symmetry: D2, iterations: 2}}
cluster: {address}
"""
COMMAND = [sys.executable, "-m", "cryodask.cli", "run", "tiny.yaml"]


@pytest.fixture(scope="module")
def session(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("session")
    simulated(tmp_path_factory, folder, PARAMS)
    return folder


@pytest.fixture(scope="module", params=[2, pytest.param(1, marks=pytest.mark.slow)], ids=lambda threads: f"{threads} threads")
def cluster(request):
    with ProcessCluster(2, threads=request.param) as made:
        yield made


@pytest.fixture(scope="module")
def undisturbed(session, client, tmp_path_factory) -> dict[tuple[str, int], tuple[int, tuple[int, ...]]]:
    """Of workers with one thread each."""
    folder = prepared(session, tmp_path_factory.mktemp("undisturbed"), client.scheduler.address)
    run_plan(make_plan(folder / "tiny.yaml"), client)
    return contents(folder)


def prepared(session: Path, folder: Path, address: str) -> Path:
    """A folder in which the tiny session is to be processed on the workers of a scheduler."""
    for source in ("movies", "gain.mrc", "truth"):
        os.symlink(session / source, folder / source)
    (folder / "tiny.yaml").write_text(PROJECT.format(address=address))
    return folder


def contents(folder: Path) -> dict[tuple[str, int], tuple[int, tuple[int, ...]]]:
    """What every record says of its item, and the checksums of the shards as they lie on the disk."""
    project = Project(folder / "tiny")
    out = {}
    for label in project.stages:
        generation = project.generation(label)
        for row, record in generation.records().items():
            shards = [generation.shard_path(n, row, len(VARIABLES[n].dims)) for n in sorted(record["shards"])]
            out[label, row] = (content_crc(record), tuple(file_crc(path) for path in shards))
    return out


def failures(folder: Path) -> list[bytes]:
    """Every line of a journal that blames an item, whether it counts or not."""
    lines = (line for path in folder.rglob("journal/*.jsonl") for line in path.read_bytes().splitlines())
    return [line for line in lines if b'"ok": false' in line]


def place(folder: Path) -> str:
    """Where the run in ``folder`` is: in the ``map`` stages, in the ``blocks`` stages, elsewhere, or with no driver at work."""
    try:
        holder = json.loads((folder / "tiny" / "driver.lock").read_text())
        if not psutil.pid_exists(holder["pid"]):
            return ""
    except (OSError, ValueError):
        return ""
    stages = folder / "tiny" / "stages"
    if written(stages, "refine3d/*/journal/*.jsonl"):
        return ""
    if written(stages, "classify2d/*/checkpoints/*.npz"):
        return "blocks"
    done = b"".join(written(stages, "extract/*/journal/*.jsonl")).count(b"\n")
    return "map" if written(stages, "ingest/*/journal/*.jsonl") and done < PARAMS.movies else ""


def check_equality(chaos: Chaos, session: Path, folder: Path, undisturbed, strikes: dict[str, int]) -> None:
    """Kill and resume a run in ``folder``; it must end, be whole, blame nobody, and hold what an undisturbed one holds."""
    folder.mkdir()
    prepared(session, folder, chaos.cluster.address)
    chaos.run(COMMAND, folder, strikes=strikes, pause_seconds=(0.05, 0.5), place=lambda: place(folder))
    assert [p for p in Project(folder / "tiny").verify() if "harmless" not in p] == []
    assert failures(folder) == []
    assert contents(folder) == undisturbed


@pytest.mark.heavy
def test_killed_once_by_each_kind_of_death_in_map_and_block_stages_and_resumed_gives_the_same_bits(session, cluster, undisturbed, tmp_path):
    assert {label for label, _ in undisturbed} == {
        "ingest",
        "motion",
        "ctf",
        "pick",
        "extract",
        "classify2d",
        "curate",
        "full",
        "refine3d",
    }
    chaos = Chaos(cluster, seed=1)
    strikes = {"map": 2, "blocks": 3}  # five in a row are of five kinds
    for attempt in range(3):
        check_equality(chaos, session, tmp_path / str(attempt), undisturbed, strikes)
        if chaos.strikes == strikes:
            break
    assert chaos.strikes == strikes
    assert len(chaos.log) >= 5
    assert {kill.what for kill in chaos.log} == set(EVERY_KIND) - {"everything"}


@pytest.mark.heavy
def test_a_run_that_was_stopped_and_overtaken_ends_with_its_own_status_and_changes_no_bit(session, cluster, undisturbed, tmp_path):
    folder = prepared(session, tmp_path, cluster.address)
    drivers: list[subprocess.Popen[bytes]] = []

    def start() -> subprocess.Popen[bytes]:
        with open(folder / f"said-{len(drivers)}", "wb") as said:
            drivers.append(subprocess.Popen([*COMMAND, "--until", "curate"], cwd=folder, stdout=said, stderr=said))
        return drivers[-1]

    def wait(condition) -> None:
        deadline = time.monotonic() + 120
        while not condition():
            assert [driver.poll() for driver in drivers] == [None] * len(drivers)
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def holder() -> dict:
        try:
            return json.loads((folder / "tiny" / "driver.lock").read_text())
        except (OSError, ValueError):
            return {}

    try:
        first = start()
        wait(lambda: place(folder) == "map")
        first.send_signal(signal.SIGSTOP)
        stopped = holder()
        assert stopped["pid"] == first.pid
        second = start()
        # the first taking only tries whether anything may be written
        wait(lambda: holder().get("pid") == second.pid and holder()["epoch"] >= stopped["epoch"] + 2)
        first.send_signal(signal.SIGCONT)
        assert first.wait(60) == 5
        assert second.wait(300) == 0
    finally:
        for driver in drivers:
            driver.kill()
            driver.wait()
    told = (folder / "said-0").read_text()
    assert "TakenOverError: " in told
    assert "Traceback" not in told
    assert failures(folder) == []
    until = Project(folder / "tiny").stages
    assert until[-1] == "curate"
    assert contents(folder) == {(label, row): content for (label, row), content in undisturbed.items() if label in until}
    assert [p for p in Project(folder / "tiny").verify() if "harmless" not in p] == []


@pytest.mark.slow
@pytest.mark.parametrize("where", ["map", "blocks"])
def test_a_scheduler_that_is_gone_ends_the_driver_with_the_reason_and_the_next_run_goes_on(where, session, undisturbed, tmp_path):
    with ProcessCluster(2) as cluster:
        folder = prepared(session, tmp_path, cluster.address)
        with open(folder / "said", "wb") as said:
            driver = subprocess.Popen(COMMAND, cwd=folder, stdout=said, stderr=said)
        try:
            deadline = time.monotonic() + 120
            while place(folder) != where:
                assert driver.poll() is None, (folder / "said").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.02)
            os.kill(cluster.scheduler, signal.SIGKILL)
            assert driver.wait(timeout=90) == 3
        finally:
            driver.kill()
            driver.wait()
        told = (folder / "said").read_text()
        assert "ClusterError: The scheduler is gone" in told
        assert "Traceback" not in told[told.index("ClusterError") :]
        assert not (folder / "tiny" / "driver.lock").exists()
        cluster.replace()
        subprocess.run(COMMAND, cwd=folder, check=True, capture_output=True)
    assert failures(folder) == []
    assert contents(folder) == undisturbed


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_hundred_killed_processes_of_every_kind_change_no_bit(session, cluster, undisturbed, tmp_path):
    killed: list[Kill] = []
    for seed, kinds in enumerate([*((kind,) for kind in EVERY_KIND), EVERY_KIND]):
        each = {("worker",): 8, ("nanny",): 7, ("everything",): 3}.get(kinds, 5)
        chaos = Chaos(cluster, seed, kinds)
        strikes = {"map": each, "blocks": each}
        for attempt in range(8):
            check_equality(chaos, session, tmp_path / f"{seed}-{attempt}", undisturbed, strikes)
            if chaos.strikes == strikes:
                break
        assert chaos.strikes == strikes
        assert {kill.what for kill in chaos.log} == set(EVERY_KIND) - {"everything"} if "everything" in kinds else set(kinds)
        killed += chaos.log
    assert len(killed) >= 100


# --- many kills of a run of many small items ---------------------------------------------------------------------------------

DRIVER = '''
import os, sys
from dataclasses import dataclass
from pathlib import Path
import numpy as np
from cryodask.cluster.connect import connect
from cryodask.errors import ClusterError
from cryodask.run.map import MapRunner
from cryodask.store.generation import Generation
from cryodask.store.layouts import Grid
from cryodask.store.project import Item

folder, address, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])


@dataclass
class Spectra:
    """Commits a small picture an item, made of its row."""

    folder: Path

    def brief(self, item, again):
        pass

    def run(self, item, brief, device, attempt):
        picture = np.random.default_rng(item.row).normal(size=(64, 64)).astype(np.float16)
        Generation(self.folder).commit(item.row, item.name, {"spectrum_image": picture, "mean_count": item.row / 7}, attempt=attempt)

    def quarantine(self, item, error, message, tries):
        Generation(self.folder).commit_failure(item.row, item.name, error, message, tries)


meta = {"stage": "spectra", "version": 1, "params": {}, "recipes": {}, "inputs": {}}
made = Generation.create(
    folder / "g", meta=meta, gives=("spectrum_image", "mean_count"), per_item=True, grids={"": Grid({"ky": 64, "kx": 64}, {})}
)
done = made.committed()
starts = folder / "starts"
starts.write_bytes((starts.read_bytes() if starts.exists() else b"") + b"x")
try:
    runner = MapRunner(connect(address), Spectra(folder / "g"), first_attempt=1_000_000 * len(starts.read_bytes()))
    (folder / "working").write_text(str(os.getpid()))
    runner.run(Item(row, f"m{row}", f"content {row}") for row in range(count) if row not in done)
except ClusterError as error:
    print(error, flush=True)
    sys.exit(2)
'''


def run_of_small_items(cluster: ProcessCluster, folder: Path, *, items: int, strikes: int, seed: int) -> Chaos:
    """Kill and resume a map run of small items; every one must be committed, intact, and none blamed."""
    (folder / "driver.py").write_text(DRIVER)
    chaos = Chaos(cluster, seed)

    def working() -> str:
        try:
            alive = psutil.pid_exists(int((folder / "working").read_text()))
        except (OSError, ValueError):
            alive = False
        return "map" if alive else ""

    command = [sys.executable, "driver.py", str(folder), cluster.address, str(items)]
    chaos.run(command, folder, strikes={"map": strikes}, pause_seconds=(0.05, 1.0), place=working)
    generation = Generation(folder / "g")
    assert [p for p in generation.damaged() if "harmless" not in p] == []
    assert failures(folder) == []
    records = generation.committed()
    assert sorted(records) == list(range(items))
    for row, record in records.items():
        expected = np.random.default_rng(row).normal(size=(64, 64)).astype(np.float16)
        assert np.array_equal(generation.read(record, "spectrum_image"), expected)
        assert generation.read(record, "mean_count") == row / 7
    return chaos


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_small_items_survive_a_kill_every_half_second(cluster, tmp_path):
    chaos = run_of_small_items(cluster, tmp_path, items=3000, strikes=60, seed=5)
    assert chaos.strikes["map"] == 60
    assert len(chaos.log) >= 100
