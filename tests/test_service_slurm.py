"""A shared cluster in its own Slurm job, with certificates: several people, its end and its successor, batch runs, and what is killed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import ssl
import stat
import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from _service import begun, cryodask, cryodask_process, environment_of_tests, holder, journal, open_to_others, program, running, wait
from test_session import keys, story

from cryodask.cluster import close, connect
from cryodask.cluster.service import batch, service
from cryodask.cluster.service.service import submit
from cryodask.cluster.service.whereabouts import in_thread
from cryodask.cluster.settings import JobSettings, parse_settings
from cryodask.cluster.slurm.slurm import cancel_of
from cryodask.errors import ClusterError, CryodaskError
from cryodask.formats.movies import write_tiff_movie
from cryodask.run.events import Counted, RunEnded
from cryodask.run.events.log import event_files, tail
from cryodask.run.events.status import read_status
from cryodask.store.project import Project
from cryodask.vocabulary import VARIABLES

pytestmark = pytest.mark.slurm

_POOL = {"memory": "800MiB", "partition": "cpu"}


def settings(home, **more):
    return {
        "kind": "slurm",
        "interface": "lo",
        "poll_seconds": 0.5,
        "logs": str(home / "logs"),
        "lanes": {"live": 3, "hpda": 1, "batch": 1},
        "pools": {"cpu": {**_POOL, "count": 1}, "huge": {**_POOL, "cores": 64, "count": 0}},
        "service": {"where": "slurm", "partition": "cpu", "memory": "500MiB", "walltime": "1:00:00", "certificates": True},
        **more,
    }


@pytest.fixture(scope="module")
def home(slurm, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("home")
        environment_of_tests(patch, folder)
        patch.setenv("SLURM_CONF", slurm.environ["SLURM_CONF"])
        (folder / "mixed.yaml").write_text(yaml.safe_dump(settings(folder)))
        yield folder
        for name in service.known():
            try:
                service.find(name).stop()
            except ClusterError:
                service.clean_up(name)
        slurm.reset()


@pytest.fixture(scope="module")
def started(home):
    return cryodask_process("cluster", "start", str(home / "mixed.yaml"))


@pytest.fixture
def mixed(started):
    return service.find("mixed")


@pytest.fixture
def client(mixed):
    made = connect("mixed", lane="hpda")
    yield made
    close(made)


def invited(home, mixed, user, lanes):
    """Where that person has put the invitation."""
    said = cryodask("cluster", "invite", "mixed", user, "--lanes", lanes)
    path = home / f"{user}.invite"
    path.write_text(Path(said.splitlines()[0]).read_text(encoding="utf-8"))
    path.chmod(0o600)
    return str(path)


def test_every_job_script_is_printed_and_nothing_is_started(home):
    said = cryodask("cluster", "start", str(home / "mixed.yaml"), "--name", "dry", "--dry-run")
    assert said.count("#!/usr/bin/env bash") == 3
    for words in ("# --- the scheduler", "-J cryodask-dry", "--signal=B:USR1@900", "-t 1:00:00", "# --- a job of pool cpu", "of pool huge"):
        assert words in said
    assert "dry" not in service.known()


def test_it_runs_in_a_job_of_its_own_and_its_workers_are_guarded(home, started, mixed, client, slurm):
    assert re.search(r"is running at tls://.*Slurm job \d+", started)
    assert client.submit(sum, [1, 2]).result(60) == 3
    job = mixed.status()["slurm_job"]
    assert slurm.jobs()[job][:2] == ("RUNNING", "cryodask-mixed")
    nannies = running(slurm.processes(), "dask_worker")
    assert nannies
    assert all("--preload-nanny cryodask.cluster.guard" in " ".join(p.cmdline()) for p in nannies)
    again = cryodask("cluster", "start", str(home / "mixed.yaml"), "--dry-run")
    assert "TLS__WORKER__CERT" in again  # now that there are certificates


def test_its_log_is_for_its_account_alone_and_it_knows_when_slurm_ends_it(mixed, slurm):
    files = {path.name: stat.S_IMODE(path.stat().st_mode) for path in mixed.folder.rglob("*") if path.is_file()}
    now = mixed.status()
    assert f"service-{now['slurm_job']}.log" in files
    assert set(files.values()) == {0o600}, files
    shown = slurm.run("scontrol", "show", "job", now["slurm_job"])
    ends = time.mktime(time.strptime(re.search(r"EndTime=(\S+)", shown).group(1), "%Y-%m-%dT%H:%M:%S"))
    assert now["hand_over"] + 900 == pytest.approx(ends, abs=3)


def test_nothing_of_it_listens_beyond_this_machine_without_tls(mixed, client, slurm):
    client.submit(sum, [1]).result(60)
    ours = running(slurm.processes(), "cryodask.cluster.service.serving", "dask_worker", "spawn_main")
    assert len(ours) >= 3
    assert open_to_others(ours) == set()
    assert all(address.startswith("tls://") for address in [mixed.address, *client.nthreads()])


def test_status_shows_why_jobs_wait(mixed, client):
    said = cryodask("cluster", "scale", "mixed", "huge=1")
    wait(lambda: any(job["reason"] == "PartitionConfig" for job in mixed.status()["jobs"]), "Slurm's reason")
    said = cryodask("cluster", "status", "mixed")
    for words in ("huge-0", "PartitionConfig", "hands over at", "Missing workers: pool huge: jobs are pending"):
        assert words in said, said
    now = json.loads(cryodask("cluster", "status", "mixed", "--json"))
    assert now["pools"]["huge"]["waiting"] == {"PartitionConfig": 1}
    assert now["pools"]["cpu"]["workers"] == 1
    cryodask("cluster", "scale", "mixed", "huge=0")


def test_two_people_share_it_each_in_their_lanes_and_neither_can_end_it(home, mixed, client):
    anna = connect(invited(home, mixed, "anna", "hpda"), lane="live")
    bert = connect(invited(home, mixed, "bert", "batch,live"), lane="live")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            assert anna.submit(sum, [1, 2]).result(60) == bert.submit(sum, [1, 2]).result(60) == 3
            hers, his = anna.map(time.sleep, [0.3] * 20, pure=False), bert.map(time.sleep, [0.3] * 20, pure=False)
            wait(lambda: {n for n, lane in mixed.status()["lanes"].items() if lane["waiting"]} >= {"hpda", "live"}, "both lanes")
            wait(lambda: any("anna may not use the lane 'live'" in str(w.message) for w in seen), "the warning")
        for person in (anna, bert):
            with pytest.raises(PermissionError, match="reserved for its owner"):
                person.restart()
            for request in ("cluster_scale", "cluster_stop", "cluster_hand_over"):
                guest = service.find(str(home / f"{'anna' if person is anna else 'bert'}.invite"))
                with pytest.raises(ClusterError, match="reserved for its owner"):
                    guest.ask(request)
        guest = service.find(str(home / "anna.invite"))
        assert guest.status()["state"] == "running"
        with pytest.raises(ClusterError, match="by its owner only"):
            guest.stop()
        wait(lambda: {"anna", "bert"} <= {row["user"] for row in mixed.usage()}, "what both used")
        assert {row["user"] for row in guest.usage()} == {"anna"}
        assert {row["user"] for row in guest.usage(by=("lane",))} == {"anna"}
        anna.cancel(hers)
        bert.cancel(his)
    finally:
        anna.close()
        bert.close()
    cryodask("cluster", "invite", "mixed", "bert", "--revoke")
    wait(lambda: refused(str(home / "bert.invite")), "the refusal")
    assert client.submit(sum, [4]).result(60) == 4
    assert "no lane 'gold'" in cryodask("cluster", "invite", "mixed", "carl", "--lanes", "gold", code=2)


def refused(invitation):
    try:
        connect(invitation).close()
    except ClusterError as error:
        return "is not invited" in str(error)
    return False


def test_before_its_walltime_ends_it_hands_over_and_invitations_stay_good(home, mixed, slurm):
    invitation = invited(home, mixed, "anna", "hpda")
    before, job, old = mixed.address, mixed.status()["slurm_job"], holder("mixed")
    anna = connect(invitation, lane="hpda")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        running = anna.submit(lambda: time.sleep(3) or "finished")
        wait(lambda: mixed.status()["lanes"]["hpda"]["running"], "the task")
        slurm.run("scancel", "--batch", "--signal=USR1", job)  # as Slurm does for --signal=B:USR1@900
        assert running.result(60) == "finished"
        wait(lambda: service.find("mixed").address != before, "the successor")
        wait(lambda: anna.status != "running", "the end of the old one")
    assert any("reconnect" in str(w.message) for w in seen)
    anna.close()
    after = service.find("mixed")
    assert after.status()["slurm_job"] != job
    with connect(invitation, lane="hpda") as again:  # written before the address changed
        assert again.scheduler.address == after.address
        assert again.submit(sum, [1, 3]).result(60) == 4
    wait(lambda: not old.is_running(), "the end of the old process")
    wait(lambda: job not in slurm.jobs(), "the end of its job")
    assert sum(row["task_seconds"] for row in after.usage() if row["user"] == "anna") >= 3  # the account goes on


def test_a_submitted_run_goes_on_with_the_successor(home, mixed, slurm, tmp_path):
    folder = tmp_path / "run"
    command = program(folder, "{cluster}", 40, 0.3)
    sent = submit(command, "mixed", lane="batch", name="forty")
    assert "scancel" in str(sent)
    wait(lambda: len(journal(folder)) >= 5, "five items")
    before = mixed.address
    mixed.hand_over()
    wait(lambda: service.find("mixed").address != before, "the successor")
    wait(lambda: sent.job_id not in slurm.jobs(), "the end of the run", 120)
    said = sent.log.read_text()
    assert "the scheduler of mixed was lost; waiting for the cluster, then rerunning the command (2 of 5)" in said
    assert {record["row"] for record in journal(folder)} == set(range(40))
    assert state_of(slurm, sent.job_id) == "COMPLETED"


def state_of(slurm, job):
    lines = (slurm.folder / "log" / "jobcomp.log").read_text().splitlines()
    return re.search(r"JobState=(\w+)", next(line for line in lines if line.startswith(f"JobId={job} "))).group(1)


PROJECT = """
name: tiny
inputs: {movies: "movies/*"}
microscope: {voltage_kv: 300, spherical_aberration_mm: 2.7, amplitude_contrast: 0.1, pixel_size_angstrom: 2.0, dose_per_frame: 5}
pipeline:
  - motion: {patches: [1, 1]}
"""


def test_a_project_is_submitted_and_the_user_told_how_to_follow_it(mixed, slurm, tmp_path):
    (tmp_path / "movies").mkdir()
    random = np.random.default_rng(0)
    for i in range(3):
        write_tiff_movie(tmp_path / "movies" / f"m{i}.tif", random.poisson(3, (3, 192, 192)).astype(np.uint8), 2.0)
    (tmp_path / "tiny.yaml").write_text(PROJECT)
    assert "cryodask.cluster.service.driver 5" in cryodask("submit", str(tmp_path / "tiny.yaml"), "--cluster", "mixed", "--dry-run")
    said = cryodask("submit", str(tmp_path / "tiny.yaml"), "--cluster", "mixed", "--lane", "live", "--partition", "cpu")
    (job,) = re.findall(r"Slurm job (\d+)", said)
    for words in ("tail -F", f"squeue -j {job}", f"scancel {job}", f"cryodask info {tmp_path / 'tiny.yaml'}"):
        assert words in said
    wait(lambda: job not in slurm.jobs(), "the end", 120)
    log = Path(re.findall(r"tail -F (\S+)", said)[0]).read_text(encoding="utf-8")
    assert "3 micrographs done" in log, log
    assert "motion" in cryodask("info", str(tmp_path / "tiny.yaml"))
    assert "are on one machine" in cryodask("submit", str(tmp_path / "tiny.yaml"), code=2)
    # the same by hand, on the same service: equal results, and the same story
    again = tmp_path / "by-hand"
    shutil.copytree(tmp_path / "movies", again / "movies")
    (again / "tiny.yaml").write_text(PROJECT)
    cryodask("run", str(again / "tiny.yaml"), "--cluster", "mixed", "--lane", "live")
    folders = [next(folder.glob("*/project.json")).parent for folder in (tmp_path, again)]
    assert keys(folders[0]) == keys(folders[1])
    stories = [story(tail(folder, 1000)) for folder in folders]
    assert stories[0] == stories[1]
    assert stories[0][-1]["status"] == 0
    assert all((folder / "report.html").exists() for folder in folders)


def results_of(folder):
    """What is stored of every movie, by its name: numbers, and the bytes of its arrays as they lie on the disk."""
    project = Project(folder)
    names = {item.row: item.name for item in project.items()}
    found = {}
    for label in project.stages:
        generation = project.generation(label)
        for row, record in generation.committed().items():
            arrays = [generation.shard_path(name, row, len(VARIABLES[name].dims)).read_bytes() for name in sorted(record["shards"])]
            found[label, names[row]] = (json.dumps(record["columns"], sort_keys=True), arrays)
    return found


@pytest.mark.heavy
def test_a_watched_session_goes_on_after_kill_9_of_its_job_and_after_a_hand_over(mixed, slurm, tmp_path):
    waiting, watched, whole = tmp_path / "waiting", tmp_path / "watched", tmp_path / "whole"
    for folder in (waiting, watched / "movies", whole / "movies"):
        folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for number in range(6):
        movie = waiting / f"m{number}.tif"
        write_tiff_movie(movie, random.poisson(3, (3, 192, 192)).astype(np.uint8), 2.0)
        os.utime(movie, (1, 1))  # unchanged for long, so it is taken at once
        shutil.copy2(movie, whole / "movies")
    for folder in (watched, whole):
        (folder / "tiny.yaml").write_text(PROJECT)
    results = watched / "tiny"

    def arrive(*numbers):
        for number in numbers:
            os.rename(waiting / f"m{number}.tif", watched / "movies" / f"m{number}.tif")

    def submitted():
        words = ("--watch", "--until-movies", "6", "--cluster", "mixed", "--partition", "cpu")
        said = cryodask("submit", str(watched / "tiny.yaml"), *words)
        (job,) = re.findall(r"Slurm job (\d+)", said)
        return job, Path(re.findall(r"tail -F (\S+)", said)[0])

    def done():
        with suppress(CryodaskError):  # there is no project yet, or no such step
            return len(Project(results).generation("motion").committed())
        return 0

    arrive(0, 1)
    job, _ = submitted()
    wait(lambda: done() >= 1, "the first movie")
    arrive(2, 3)
    slurm.run("scancel", "--signal=KILL", "--full", job)
    wait(lambda: job not in slurm.jobs(), "the end of the killed job")
    killed = len(event_files(results))
    assert state_of(slurm, job) != "COMPLETED"
    assert not any(isinstance(event, RunEnded) for event in tail(results, 1000)), "it had no time to say anything"

    job, log = submitted()
    wait(lambda: done() >= 4, "what had arrived before the kill")
    before = mixed.address
    mixed.hand_over()
    arrive(4, 5)
    wait(lambda: service.find("mixed").address != before, "the successor")
    wait(lambda: job not in slurm.jobs(), "the end of the session", 120)
    assert state_of(slurm, job) == "COMPLETED", log.read_text()
    assert len(event_files(results)) > killed

    counts = [event for event in tail(results, 100_000) if isinstance(event, Counted)]
    assert all(c.seen == c.done + c.quarantined + c.running + c.waiting for c in counts)
    last = read_status(results)
    assert last["state"] == "finished"
    assert [last[name] for name in ("seen", "done", "quarantined", "running", "waiting")] == [6, 6, 0, 0, 0]
    assert Project(results).failures() == []
    assert [p for p in Project(results).verify() if "harmless" not in p] == []
    cryodask("run", str(whole / "tiny.yaml"), "--cluster", "mixed", "--lane", "live")
    assert len(results_of(results)) == 12
    assert results_of(results) == results_of(whole / "tiny"), "bits equal those of a run that nothing disturbed"


def test_an_invitation_is_as_good_in_an_address_file_and_in_a_batch_job(home, mixed, slurm, tmp_path, monkeypatch):
    invited(home, mixed, "carla", "hpda")
    monkeypatch.chdir(home)
    (home / "theirs.yaml").write_text(yaml.safe_dump({"kind": "address", "invitation": "carla.invite"}))
    with connect(Path("theirs.yaml"), lane="hpda") as client:
        assert client.submit(sum, [1, 2]).result(60) == 3
    (tmp_path / "ask.py").write_text(
        "import sys\nfrom cryodask.cluster import connect\nclient = connect(sys.argv[1], lane='hpda')\n"
        "print('sum', client.submit(sum, [1, 2]).result(60))\n"
    )
    # the job begins elsewhere, and its account has no cluster mixed of its own
    elsewhere = JobSettings(partition="cpu", memory="500MiB", environment=("cd /", f"export XDG_STATE_HOME={tmp_path}"))
    sent = submit([sys.executable, str(tmp_path / "ask.py"), "{cluster}"], "carla.invite", name="guest", job=elsewhere)
    wait(lambda: sent.job_id not in slurm.jobs(), "the end", 90)
    assert "sum 3" in sent.log.read_text()


def test_a_submitted_command_that_fails_by_itself_is_not_run_again(mixed, slurm):
    sent = submit(["sh", "-c", "echo once; exit 7"], "mixed", name="fails")
    wait(lambda: sent.job_id not in slurm.jobs(), "the end")
    assert sent.log.read_text().count("once") == 1
    assert state_of(slurm, sent.job_id) == "FAILED"


def test_a_submitted_run_that_is_cancelled_says_that_it_can_go_on(mixed, slurm):
    sent = submit(["sh", "-c", "echo begun; sleep 300"], "mixed", name="long")
    wait(lambda: sent.log.exists() and "begun" in sent.log.read_text(), "its start")
    slurm.run("scancel", sent.job_id)
    wait(lambda: sent.job_id not in slurm.jobs(), "the end")
    assert "submit the run again to resume it" in sent.log.read_text()
    assert sent.log.read_text().count("begun") == 1


def test_a_killed_scheduler_takes_its_workers_along_and_its_jobs_are_cancelled_at_the_next_start(home, mixed, slurm, tmp_path):
    folder, command = tmp_path / "run", program(tmp_path / "run", "mixed", 40, 0.2)
    mixed.scale(huge=1)
    driver = begun(folder, command)
    wait(lambda: len(journal(folder)) >= 5, "five items")
    wait(lambda: mixed.status()["pools"]["huge"]["pending"] == 1, "a pending job")
    workers = running(slurm.processes(), "dask_worker")
    holder("mixed").send_signal(signal.SIGKILL)
    assert driver.wait(240) == 1  # it tries to reach the scheduler for a minute or two first
    assert "The scheduler is gone" in (folder / "said.txt").read_text()
    _, alive = psutil.wait_procs(workers, 60)
    assert not alive
    assert any(name == "cryodask-huge" for _, name, _ in slurm.jobs().values())
    assert "has ended" in cryodask("cluster", "status", "mixed", code=2)
    cryodask("cluster", "start", "mixed")
    pending = service.find("mixed").status()
    assert not pending["pools"]["huge"]["pending"]
    wait(lambda: not any(name == "cryodask-huge" for _, name, _ in slurm.jobs().values()), "the end of the leftover")
    assert any("left by" in text for _, text in pending["events"])
    assert begun(folder, command).wait(60) == 0
    assert {record["row"] for record in journal(folder)} == set(range(40))


def test_stop_cancels_every_job(home, mixed, slurm):
    assert "have ended" in cryodask("cluster", "stop", "mixed")
    wait(lambda: not slurm.jobs(), "an empty queue")
    assert "is not running" in cryodask("cluster", "status", "mixed", code=2)


def test_one_that_waits_in_the_queue_says_so_and_can_be_stopped(home, slurm):
    waiting = settings(home, service={"where": "slurm", "cores": 64, "certificates": True})
    with pytest.raises(ClusterError, match=r"Slurm job \d+ is pending, reason PartitionConfig"):
        service.start(parse_settings(waiting), "late", wait_seconds=2)
    with pytest.raises(ClusterError, match="it is starting: Slurm job"):
        service.find("late")
    with pytest.raises(ClusterError, match="is starting"):
        service.start(parse_settings(waiting), "late")
    assert "ended" in cryodask("cluster", "stop", "late")
    wait(lambda: not slurm.jobs(), "an empty queue")


def test_a_successor_that_slurm_took_without_saying_so_is_found_in_the_queue(home, slurm):
    waiting = parse_settings(settings(home, service={"where": "slurm", "cores": 64, "certificates": True}))
    with service.prepared(waiting, "unsure") as folder:
        pass
    first = batch.launch(folder, waiting, after="elsewhere.1.2.abc")
    wait(lambda: first.job in slurm.jobs(), "its job")
    assert batch.launch(folder, waiting, after="elsewhere.1.2.abc").job == first.job
    other = batch.launch(folder, waiting, after="elsewhere.3.4.def")
    assert other.job != first.job
    assert len(in_thread(cancel_of(batch.follower_mark("elsewhere.1.2.abc")))) == 1
    wait(first.ended, "its end")
    assert not other.ended()
    other.end()
    wait(lambda: not slurm.jobs(), "an empty queue")


def pid_of(name):
    try:
        return service.find(name).status()["pid"]
    except ClusterError:
        return None


def test_with_a_fixed_port_the_successor_is_found_by_connected_clients(home):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pools = {"cpu": {**_POOL, "count": 1}}
    fixed = parse_settings(settings(home, pools=pools, port=port, service={"certificates": True}))
    old = service.start(fixed, "fixed").status()["pid"]
    with connect("fixed", lane="live") as client:
        assert client.submit(sum, [1, 2]).result(60) == 3
        service.find("fixed").hand_over()
        wait(lambda: pid_of("fixed") not in (old, None), "the successor")
        wait(lambda: client.status == "running" and client.scheduler_comm is not None, "the connection")
        assert client.submit(sum, [1, 3]).result(60) == 4
        assert client.scheduler.address == f"tls://127.0.0.1:{port}"
    wait(lambda: not psutil.pid_exists(old) or psutil.Process(old).status() == psutil.STATUS_ZOMBIE, "the end of the old one")
    assert "have ended" in cryodask("cluster", "stop", "fixed")


def speaks_tls(host, port):
    trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
    try:
        with socket.create_connection((host, port), 10) as plain, trusting.wrap_socket(plain):
            return True
    except ssl.SSLError as error:
        return "ALERT" in str(error).upper()


def test_what_other_machines_can_reach_speaks_tls_and_lets_nobody_in_without_a_certificate(home, slurm):
    names = [name for name, found in psutil.net_if_addrs().items() if name != "lo" and any(a.family == socket.AF_INET for a in found)]
    if not names:
        warnings.warn("this machine has no network: a service beyond it is NOT tested", stacklevel=1)
        pytest.skip("no network interface")
    wide = settings(home, interface=names[0], pools={"cpu": {**_POOL, "count": 1}}, service={})
    found = service.start(parse_settings(wide), "wide")
    with connect("wide") as client:
        assert client.submit(sum, [1, 2]).result(60) == 3
        reachable = open_to_others([holder("wide"), *running(slurm.processes(), "dask_worker", "spawn_main")])
    assert len(reachable) >= 3  # scheduler, nanny, worker
    assert {address for address in reachable if not speaks_tls(*address)} == set()
    with pytest.raises(ClusterError, match="requires a certificate"):
        connect(found.address)
    found.stop()


def test_one_whose_jobs_are_all_refused_says_so_in_slurms_words(home):
    pools = {"cpu": {**_POOL, "partition": "nope", "count": 1}}
    with pytest.raises(ClusterError, match="Invalid partition name"):
        service.start(parse_settings(settings(home, pools=pools, service={"certificates": True})), "refused")
    with pytest.raises(ClusterError, match="Invalid partition name"):
        service.start(parse_settings(settings(home, service={"where": "slurm", "partition": "nope"})), "refused")


def test_a_batch_run_is_refused_where_its_workers_are_out_of_reach(home, tmp_path, monkeypatch):
    with pytest.raises(ClusterError, match="are on one machine"):
        submit(["true"], "local")
    own = own_file(home)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ClusterError, match="Slurm is not available: sbatch is not on the PATH"):
        submit(["true"], own)
    with pytest.raises(ClusterError, match=r"(?s)are on one machine.*Slurm, which runs batch jobs, is not available"):
        submit(["true"], "local")


def own_file(home):
    """A cluster file without a service."""
    content = settings(home)
    del content["service"]
    (home / "own.yaml").write_text(yaml.safe_dump(content))
    return home / "own.yaml"


def test_a_batch_job_opens_the_pools_of_a_file_by_itself(home, slurm, tmp_path):
    others = set(slurm.jobs())
    sent = submit(program(tmp_path / "run", "{cluster}", 5, 0.1), own_file(home), name="own")
    wait(lambda: sent.job_id not in slurm.jobs(), "the end", 90)
    assert "'done': 5" in sent.log.read_text()
    wait(lambda: set(slurm.jobs()) <= others, "the end of its workers")


def test_one_allocation_has_lanes_too(home, slurm, tmp_path):
    single = {**settings(home, single_allocation=True), "pools": {"cpu": {**_POOL, "count": 1}}, "lanes": {"live": 3, "batch": 2}}
    del single["service"]
    (home / "single.yaml").write_text(yaml.safe_dump(single))
    (tmp_path / "ask.py").write_text(
        "from os import environ\nfrom cryodask.cluster import connect\n"
        "client = connect(environ['CRYODASK_CLUSTER'], lane=environ['CRYODASK_LANE'])\n"
        "print(client.submit(sum, [1, 2]).result(60), client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.lanes_now()))\n"
    )
    sent = submit([sys.executable, str(tmp_path / "ask.py")], home / "single.yaml", lane="live")
    wait(lambda: sent.job_id not in slurm.jobs(), "the end", 90)
    said = sent.log.read_text()
    assert re.search(r"^3 \{.*'live': \{'weight': 3.0, [^}]*'clients': 1\}", said, re.M), said
    assert "'batch': {'weight': 2.0" in said


@pytest.mark.slow
def test_slurm_itself_gives_the_signal_before_the_walltime_ends(home, slurm):
    brief = settings(home, service={"where": "slurm", "partition": "cpu", "memory": "500MiB", "walltime": "0:02:00", "certificates": True})
    first = service.start(parse_settings(brief), "brief")
    wait(lambda: service.find("brief").address != first.address, "the successor", 150)
    with connect("brief") as client:
        assert client.submit(sum, [1]).result(60) == 1
    service.find("brief").stop()
