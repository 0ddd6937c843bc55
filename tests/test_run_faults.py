"""Runs that commit, on a real Slurm that takes their workers away: every item is done once, and the user is told why it stands."""

from __future__ import annotations

import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml
from distributed import Client

from cryodask.cluster.access.tls import Authority, security
from cryodask.cluster.settings import parse_settings
from cryodask.cluster.slurm.pools import PoolCluster, open_pools
from cryodask.formats.movies import write_mrc_movie
from cryodask.run import execute, health
from cryodask.run.events import ExposureCommitted, ExposureQuarantined, Iteration
from cryodask.run.events.progress import text_of
from cryodask.run.events.status import status_sentence
from cryodask.run.health import Watch
from cryodask.run.map import MapRunner
from cryodask.run.recipe import make_plan
from cryodask.run.session import run_plan
from cryodask.stage import OTHERS
from cryodask.store.journal import content_crc
from cryodask.store.project import Project

pytestmark = pytest.mark.slurm

MOVIES, FIRST = 24, 4
_ONE = {"memory": "900MiB", "partition": "cpu", "count": 0}
_COME = r"pool {pool}: (0 workers of \d running jobs have connected|jobs are pending \(1 [\w, ]+\))"

# a stage of another package, so that every process finds it by itself, the children that suspects are tried in too
_STAGE = """
import os
import time
from contextlib import suppress

import numpy as np
from pydantic import Field

from cryodask.stage import Params, stage


class GatedParams(Params):
    gate: str = Field("", description="a folder: while it is there an item must find a file in it to take away")


@stage(
    version=1,
    needs=["movie", "pixel_size_angstrom"],
    gives=["micrograph_sum", "total_motion"],
    sizes=lambda params, sizes: {"y": sizes["y"], "x": sizes["x"]},
)
def gated(params: GatedParams, *, movie, pixel_size_angstrom, context):
    "Sums the frames."
    while os.path.isdir(params.gate) and not let_through(params.gate):
        time.sleep(0.02)
    total = sum(np.asarray(movie[i], np.float32) for i in range(len(movie)))
    return {"micrograph_sum": total, "total_motion": float(total.mean())}


def let_through(gate):
    with suppress(OSError):
        for name in os.listdir(gate):
            os.unlink(os.path.join(gate, name))
            return True
    return False
"""


def wait(condition, what, seconds=180):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.05)


# --- a session, and what it must come to -----------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """A folder with movies, and a stage that the processes of jobs find as well."""
    folder = tmp_path_factory.mktemp("session")
    (folder / "movies").mkdir()
    for number in range(MOVIES):
        frames = np.random.default_rng(number).poisson(2.0, (3, 16, 16)).astype(np.uint8)
        write_mrc_movie(folder / "movies" / f"m{number:02d}.mrc", frames, 1.0)
    package = folder / "package"
    (package / "gated-1.0.dist-info").mkdir(parents=True)
    (package / "gated.py").write_text(_STAGE)
    (package / "gated-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: gated\nVersion: 1.0\n")
    (package / "gated-1.0.dist-info" / "entry_points.txt").write_text("[cryodask.stages]\ngated = gated\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(package))
        patch.setenv("PYTHONPATH", str(package), prepend=os.pathsep)
        patch.setattr(OTHERS, "_loaded", None)  # other tests of this process may have looked before the package was there
        yield folder


@pytest.fixture
def gate(tmp_path):
    return Gate(tmp_path / "gate")


class Gate:
    """Lets the first items of a run through, and the others when it is opened."""

    def __init__(self, folder):
        self.folder, self.count = folder, 0
        folder.mkdir()
        self.let(FIRST)

    def let(self, items):
        for _ in range(items):
            self.count += 1
            (self.folder / str(self.count)).touch()

    def open(self):
        shutil.rmtree(self.folder, ignore_errors=True)


def project_file(session, folder, gate=None, **more):
    content = {
        "name": "toy",
        "inputs": {"movies": str(session / "movies" / "*.mrc")},
        "microscope": {"voltage_kv": 300, "spherical_aberration_mm": 2.7, "pixel_size_angstrom": 1.0},
        "pipeline": [{"gated": {"gate": str(gate.folder) if gate else ""}}],
        **more,
    }
    (folder / "toy.yaml").write_text(yaml.safe_dump(content))
    return folder / "toy.yaml"


def contents(project):
    """What the records say of their items, not where and when they were made."""
    labels = project.stages
    return {(label, row): content_crc(r) for label in labels for row, r in project.generation(label).committed().items()}


@pytest.fixture(scope="module")
def undisturbed(session, tmp_path_factory):
    with Client(processes=False, n_workers=1, threads_per_worker=1, dashboard_address=None) as client:
        return contents(run_plan(make_plan(project_file(session, tmp_path_factory.mktemp("undisturbed"))), client))


def check(folder, undisturbed):
    """Every item is committed once in every stage, none is blamed, and the bits are those of a run that nothing befell."""
    project = Project(folder / "toy")
    assert len(undisturbed) == 2 * MOVIES
    assert contents(project) == undisturbed
    assert list(project["gated"]["micrograph"].values) == [f"m{number:02d}" for number in range(MOVIES)]
    assert project.failures() == []
    assert [problem for problem in project.verify() if "harmless" not in problem] == []


# --- pools, and a run beside the test --------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def on_slurm(slurm, session):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", slurm.environ["SLURM_CONF"])
        yield slurm
        slurm.reset()


def content_of(session, folder, pools):
    """A cluster file; ``pools`` are their differences from one with single cores."""
    options = {"kind": "slurm", "interface": "lo", "poll_seconds": 0.5, "logs": str(folder / "logs"), "lanes": {"live": 3, "hpda": 1}}
    return {**options, "pools": {name: {**_ONE, **more} for name, more in pools.items()}}


def settings(session, folder, **pools):
    return parse_settings(content_of(session, folder, pools))


@pytest.fixture(scope="module")
def pools(session, on_slurm, tmp_path_factory):
    chosen = settings(session, tmp_path_factory.mktemp("pools"), cpu={}, cheap={"partition": "preempt"}, huge={"cores": 64})
    with PoolCluster(chosen) as made:
        yield made


class _Run(threading.Thread):
    """A run of a project; ``said`` is what its user reads."""

    def __init__(self, file, cluster):
        super().__init__(daemon=True)
        self.file, self.cluster = file, cluster
        self.said, self.done, self.error = [], 0, None
        self.start()

    def run(self):
        try:
            with Client(self.cluster, name="hpda/anna", set_as_default=False) as client:
                run_plan(make_plan(self.file), client, listen=[self._listen])
        except BaseException as error:
            self.error = error

    def _listen(self, event):
        self.done += isinstance(event, ExposureCommitted | ExposureQuarantined | Iteration)
        if text := text_of(event):
            self.said.append(text)

    def tells(self, pattern):
        """Wait until it says so."""
        deadline = time.monotonic() + 300
        while not any(re.search(pattern, text) for text in list(self.said)):
            assert self.is_alive(), self.error
            assert time.monotonic() < deadline, self.said
            time.sleep(0.05)

    def ends(self):
        self.join(120)
        assert not self.is_alive(), self.said
        if self.error is not None:
            raise self.error


@pytest.fixture
def impatient(monkeypatch):
    """Runs that tell of a stall after half a second, and each second or so anew: a lost worker may soon be replaced."""
    monkeypatch.setattr(execute, "MapRunner", functools.partial(MapRunner, stall_after_seconds=0.5))
    monkeypatch.setattr(health, "_LOOK_SECONDS", 0.3)
    monkeypatch.setattr(health, "_LONGEST_PATIENCE_SECONDS", 0.7)


def begun(session, folder, gate, cluster, pool):
    """A run whose first items are done, on one worker of a pool; also the name and the number of its job, and its process."""
    cluster.scale_pool(**{**dict.fromkeys(cluster.settings.pools, 0), pool: 1})
    wait(lambda: {n: s.workers for n, s in cluster.pool_status().items() if s.workers} == {pool: 1}, f"a worker of {pool} alone")
    with Client(cluster, name="hpda/bert", set_as_default=False) as client:
        (worker,) = client.run(os.getpid).values()
    ((name, job),) = ((name, job.job_id) for name, job in cluster.workers.items() if job.pool == pool)
    run = _Run(project_file(session, folder, gate), cluster)
    wait(lambda: run.done == FIRST or run.error, "the first items")
    assert run.error is None
    return run, name, job, worker


# --- what befalls it -------------------------------------------------------------------------------------------------------------
def cancel(slurm, job, worker):
    slurm.run("scancel", job)


def nanny_of(worker):
    return int(Path(f"/proc/{worker}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])


def kill_worker(slurm, job, worker):
    nanny = nanny_of(worker)
    os.kill(nanny, signal.SIGSTOP)  # on a quick machine its new worker would be there before the run had told of anything
    os.kill(worker, signal.SIGKILL)
    threading.Timer(6.0, os.kill, (nanny, signal.SIGCONT)).start()


def kill_nanny(slurm, job, worker):
    os.kill(nanny_of(worker), signal.SIGKILL)


def drain(slurm, job, worker):
    for node in ("c0", "c1"):
        slurm.drain(node)
    slurm.run("scancel", job)


def down(slurm, job, worker):
    node = slurm.jobs()[job][2]
    for other in {"c0", "c1"} - {node}:
        slurm.drain(other)  # the next job waits: else its worker might be there before the run had told of anything
    slurm.down(node)


def preempt(slurm, job, worker):
    slurm.run("sbatch", "--parsable", "-J", "urgent", "-p", "urgent", "-c", "16", "--mem=100", "-o", "/dev/null", "--wrap", "sleep 600")


@dataclass(frozen=True)
class Fault:
    """Something that takes the only worker away: what the run tells then, and how the cluster tells of the job (not at all if ``""``)."""

    strike: object
    tells: str = _COME
    event: str = r"Slurm (no longer shows it|says it is [A-Z_]+)"
    pool: str = "cpu"


FAULTS = [
    Fault(cancel),
    Fault(kill_worker, event=""),
    Fault(kill_nanny, event=r"(Slurm (no longer shows it|says it is [A-Z_]+)|runs on c\d, but worker cpu-\d+ and its nanny are gone)"),
    Fault(drain, tells=r"pool {pool}: jobs are pending \(1 [\w, ]*(DRAINED|UnavailableNodes)[\w, ]*\)"),
    Fault(down),
    Fault(preempt, tells=r"pool {pool}: jobs are pending \(1 Resources\)", pool="cheap"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.strike.__name__)
def test_a_run_that_loses_its_only_worker_says_why_it_stands_and_ends_right(
    fault, session, gate, pools, on_slurm, undisturbed, impatient, tmp_path
):
    lost = pools.pool_status()[fault.pool].lost
    run, name, job, worker = begun(session, tmp_path, gate, pools, fault.pool)
    try:
        fault.strike(on_slurm, job, worker)
        run.tells("nothing was finished for .*there are no workers: " + fault.tells.format(pool=fault.pool))
        wait(lambda: "there are no workers: pool " in status_sentence(tmp_path / "toy"), "the same for all others to read")
        assert run.done == FIRST
    finally:
        gate.open()
        on_slurm.run("scancel", "-n", "urgent")
        for node in ("c0", "c1", "p0"):
            on_slurm.resume(node)
    run.ends()
    check(tmp_path, undisturbed)
    told = [text for _, pool, text in pools.events if text.startswith(f"job {name} ({job}): ")]
    assert [bool(re.search(fault.event, text)) for text in told] == ([True] if fault.event else []), told
    assert pools.pool_status()[fault.pool].lost - lost == len(told)
    assert "finished" in status_sentence(tmp_path / "toy")


def test_a_run_whose_jobs_wait_gives_slurms_own_reason_and_goes_on_with_the_first_worker(session, pools, undisturbed, impatient, tmp_path):
    pools.scale_pool(cpu=0, cheap=0, huge=2)
    wait(lambda: not any(now.workers for now in pools.pool_status().values()), "no workers")
    run = _Run(project_file(session, tmp_path), pools)
    run.tells(r"there are no workers: pool huge: jobs are pending \(2 PartitionConfig\) \(\d+ items are in flight\)$")
    wait(
        lambda: "pool huge: jobs are pending (2 PartitionConfig)" in status_sentence(tmp_path / "toy"),
        "the same for all others to read",
    )
    pools.scale_pool(cpu=1)
    run.ends()
    check(tmp_path, undisturbed)


def test_those_who_are_invited_are_told_the_reason_too(session, on_slurm, tmp_path):
    Authority.create(tmp_path / "ca", owner="service").invite("anna", ["hpda"], address="tls://127.0.0.1:1")
    huge = settings(session, tmp_path, huge={"cores": 64, "count": 1})
    told = []
    with open_pools(huge, certificates=tmp_path / "ca", owner="service") as cluster:
        wait(lambda: cluster.pool_status()["huge"].waiting, "Slurm's reason")
        anna = security(tmp_path / "ca", "anna")
        with Client(cluster.scheduler_address, name="hpda/anna", security=anna, set_as_default=False) as client:
            Watch(client, told.append, patience_seconds=0.0).look("1 task is out")
    assert "there are no workers: pool huge: jobs are pending (1 PartitionConfig) (1 task is out)" in told[0]


@pytest.mark.slow
def test_a_controller_that_is_away_for_long_costs_no_item_and_is_named_when_workers_cannot_be_replaced(
    session, gate, pools, on_slurm, undisturbed, impatient, tmp_path
):
    run, _, _, worker = begun(session, tmp_path, gate, pools, "cpu")
    on_slurm.kill_controller()
    away = time.monotonic()
    try:
        wait(lambda: "Slurm does not answer" in pools.what_is_missing(), "notice of it")
        gate.let(2)
        wait(lambda: run.done == FIRST + 2 or run.error, "items meanwhile")
        kill_nanny(on_slurm, "", worker)
        run.tells(r"there are no workers: pool cpu: 0 workers of 1 running jobs have connected; Slurm does not answer")
        wait(lambda: time.monotonic() - away > 20, "an outage that is long")
        assert run.is_alive()
    finally:
        gate.open()
        on_slurm.start_controller()
    run.ends()
    check(tmp_path, undisturbed)
    assert "Slurm does not answer" not in pools.what_is_missing()


# --- the driver, which holds the scheduler ---------------------------------------------------------------------------------------
@pytest.mark.heavy
def test_a_killed_driver_with_pools_of_its_own_is_started_again_and_goes_on(session, gate, on_slurm, undisturbed, tmp_path):
    (tmp_path / "pools.yaml").write_text(yaml.safe_dump(content_of(session, tmp_path, {"cpu": {"count": 1}})))
    file = project_file(session, tmp_path, gate, cluster=str(tmp_path / "pools.yaml"))
    command = [sys.executable, "-m", "cryodask.cli", "run", str(file)]

    with open(tmp_path / "said", "wb") as said:
        driver = subprocess.Popen(command, stdout=said, stderr=said, start_new_session=True)
    try:
        wait(lambda: f" {FIRST} done " in status_sentence(tmp_path / "toy") or driver.poll() is not None, "the first items")
        assert driver.poll() is None, (tmp_path / "said").read_text()
    finally:
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
        gate.open()
    assert re.search(rf" {FIRST} done .* \(process {driver.pid} on ", status_sentence(tmp_path / "toy"))
    again = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stdout + again.stderr
    (kept,) = re.findall(rf"{MOVIES} micrographs done, (\d+) of them from before", again.stdout)
    assert FIRST <= int(kept) < MOVIES  # a worker may end what it has before it sees that its scheduler is gone
    check(tmp_path, undisturbed)


# --- a full disk -----------------------------------------------------------------------------------------------------------------
@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m,nr_inodes=300", "tmpfs", str(folder)], capture_output=True, text=True)
    if done.returncode:
        warnings.warn(f"a full scratch disk is NOT tested: {done.stderr.strip()}", stacklevel=1)
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder):
    """Leave neither a byte nor a name free."""
    (folder / "ballast").mkdir(exist_ok=True)
    for i in range(1000):
        try:
            (folder / "ballast" / uuid.uuid4().hex).write_bytes(b"x" * 65536)
        except OSError:
            if i > 400:
                return


@pytest.mark.slow
def test_a_scratch_that_fills_up_harms_no_item_and_is_named_when_no_worker_can_start_on_it(
    session, gate, on_slurm, small_disk, undisturbed, impatient, tmp_path
):
    with PoolCluster(settings(session, tmp_path, cpu={"scratch": str(small_disk)})) as cluster:
        run, _, job, _ = begun(session, tmp_path, gate, cluster, "cpu")
        fill(small_disk)
        gate.let(2)
        wait(lambda: run.done == FIRST + 2 or run.error, "items that a full disk does not stop")
        # the next job must not start before what this one leaves free is taken
        drain(on_slurm, job, 0)
        wait(lambda: job not in on_slurm.jobs(), "the end of the job")
        fill(small_disk)
        for node in ("c0", "c1"):
            on_slurm.resume(node)
        run.tells(r"there are no workers: pool cpu: 3 jobs in a row ended before a worker connected\. .*No space left on device")
        shutil.rmtree(small_disk / "ballast")
        gate.open()
        cluster.scale_pool(cpu=1)
        run.ends()
    check(tmp_path, undisturbed)
