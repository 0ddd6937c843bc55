"""What tasks used: as the workers measured it, whatever becomes of tasks, workers and the scheduler."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
import warnings
from collections import defaultdict, deque
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from distributed import Client, Reschedule, get_client, get_task_stream, secede
from distributed.utils import open_port
from typer.testing import CliRunner

from cryodask.cli import app
from cryodask.cluster import LaneCluster
from cryodask.cluster.accounting.accounting import Accounting, read_history, read_usage
from cryodask.cluster.accounting.journal import DAY, HOUR, UsageJournal
from cryodask.errors import ClusterError

pytestmark = pytest.mark.heavy

NAMES = ("lane", "user", "project", "pool")


def wait(condition, what, seconds=180):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.05)


def attached(cluster, folder=None):
    async def attach():
        return Accounting.attach(cluster.scheduler, folder)

    return cluster.sync(attach)


def rows(cluster, accounting, **options):
    async def usage():
        return accounting.usage(**options)

    return cluster.sync(usage)


def workers(count=2, **options):
    return LaneCluster(
        n_workers=count, threads_per_worker=1, dashboard_address="127.0.0.1:0", lanes={"live": 3, "hpda": 1}, silence_logs=50, **options
    )


@pytest.fixture(scope="module")
def lane_cluster():
    with workers() as cluster:
        yield cluster


@pytest.fixture
def cluster(lane_cluster):
    yield lane_cluster
    # the next test counts from nothing
    lane_cluster.sync(_detach, lane_cluster.scheduler)


async def _detach(scheduler):
    known = scheduler.plugins.pop(Accounting.name)
    scheduler.periodic_callbacks.pop("accounting").stop()
    scheduler.stream_handlers.update(known._handle)


def nap(i, seconds=0.05):
    time.sleep(seconds)
    return b"x" * 1000


def logged(path, seconds, fail_until=0):
    """A task that writes its own start and stop down, and fails some times first."""

    def run(i):
        start = time.time()
        time.sleep(seconds)
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"{start} {time.time()}\n")
        with open(path, encoding="utf-8") as file:
            runs = len(file.readlines())
        if runs <= fail_until:
            raise ValueError("not yet")

    return run


def spans(path):
    """Seconds of each run, as the task itself measured them."""
    return [float(stop) - float(start) for start, stop in (line.split() for line in path.read_text().splitlines())]


def begins(path):
    return [float(line.split()[0]) for line in path.read_text().splitlines()]


def computed(stream, prefix=""):
    """Seconds of all tasks that ended, as their workers measured them."""
    tasks = [task for task in stream.data if task["key"].startswith(prefix)]
    return sum(s["stop"] - s["start"] for task in tasks for s in task["startstops"] if s["action"] == "compute")


def test_task_seconds_are_those_that_the_workers_measured(cluster):
    accounting = attached(cluster)
    with Client(cluster, name="live/anna/p1") as anna, Client(cluster, name="hpda/ben") as ben:
        with get_task_stream(anna) as stream:
            futures = [anna.map(nap, range(30), pure=False), ben.map(nap, range(30), seconds=0.02, pure=False)]
            anna.gather(futures[0]), ben.gather(futures[1])
        owner = {key: name for name, list_ in zip(("live", "hpda"), futures) for key in (f.key for f in list_)}
        measured = defaultdict(float)
        for task in stream.data:
            measured[owner[task["key"]]] += sum(s["stop"] - s["start"] for s in task["startstops"] if s["action"] == "compute")
        found = {row["lane"]: row for row in rows(cluster, accounting) if row["pool"] != "-"}
        assert {(r["lane"], r["user"], r["project"], r["pool"], r["tasks"]) for r in found.values()} == {
            ("live", "anna", "p1", "local", 30),
            ("hpda", "ben", "", "local", 30),
        }
        for lane, seconds in measured.items():
            assert found[lane]["task_seconds"] == pytest.approx(seconds, abs=1e-6)
        assert measured["live"] >= 30 * 0.05
        assert found["live"]["bytes"] >= 30 * 1000


def test_failed_runs_and_their_retries_count_as_what_they_used(cluster, tmp_path):
    accounting = attached(cluster)
    with Client(cluster, name="live/anna") as client:
        well, badly = tmp_path / "well", tmp_path / "badly"
        sent = time.time()
        ends_well = client.submit(logged(str(well), 0.3, fail_until=3), 0, retries=5)
        ends_well.result(60)
        passed = time.time() - sent
        sent = time.time()
        ends_badly = client.submit(logged(str(badly), 0.2, fail_until=9), 0, retries=1)
        with pytest.raises(ValueError, match="not yet"):
            ends_badly.result(60)
        passed += time.time() - sent
        (row,) = rows(cluster, accounting, by=["lane"])
        assert (row["tasks"], row["failed"], row["lost"]) == (1, 5, 0)
        # the runs follow each other: counted again with each run it would be twice what they took, and longer than all of it
        assert sum(spans(well)) + sum(spans(badly)) <= row["task_seconds"] <= passed


def held(path, go):
    def hold(i):
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"{time.time()}\n")
        while not os.path.exists(go):
            time.sleep(0.02)

    return hold


def test_a_run_that_is_cut_off_counts_until_then(cluster, tmp_path):
    accounting = attached(cluster)
    go = tmp_path / "go"
    with Client(cluster, name="live/anna") as client:
        path = tmp_path / "starts"
        naps = client.map(held(str(path), str(go)), range(6), pure=False)
        wait(lambda: len(accounting._running) == 2, "the heartbeats")
        time.sleep(1.0)
        known = sum(time.time() - start for _, start in accounting._running.values())
        client.cancel(naps)
        wait(lambda: not cluster.scheduler.tasks, "the end of all")
        passed = sum(time.time() - start for start in begins(path))
        go.touch()
        (row,) = rows(cluster, accounting, by=["lane"])
        assert (row["tasks"], row["failed"], row["lost"]) == (0, 0, 2)
        # Dask's clock and the system's may differ by milliseconds
        assert 2 * 1.0 <= known <= row["task_seconds"] + 0.1 <= passed + 0.2
        client.restart()


def test_a_task_that_asks_to_run_elsewhere_counts_both_runs(cluster, tmp_path):
    accounting = attached(cluster)
    path = str(tmp_path / "runs")

    def moves():
        first, start = not os.path.exists(path), time.time()
        time.sleep(2.5 if first else 0.1)
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"{start} {time.time()}\n")
        if first:
            raise Reschedule

    with Client(cluster, name="live/anna") as client:
        sent = time.time()
        client.submit(moves).result(60)
        passed = time.time() - sent
        (row,) = rows(cluster, accounting, by=["lane"])
        assert (row["tasks"], row["lost"]) == (1, 1)
        first, second = spans(Path(path))
        # of the first is known what a heartbeat said of it, which is a little old
        assert first / 2 + second < row["task_seconds"] <= passed


def test_a_task_that_leaves_its_thread_counts_up_to_then(cluster):
    accounting, told = attached(cluster), []
    handle = cluster.scheduler.stream_handlers["long-running"]

    def listened(**message):
        told.append(message["compute_duration"])
        handle(**message)

    cluster.scheduler.stream_handlers["long-running"] = listened

    def drives():
        time.sleep(0.3)
        secede()
        inner = get_client().map(nap, range(10), seconds=0.2, pure=False)
        get_client().gather(inner)

    with Client(cluster, name="live/anna") as client:
        with get_task_stream(client) as stream:
            client.submit(drives).result(60)
        (row,) = rows(cluster, accounting, by=["lane", "user"])
        assert (row["lane"], row["user"], row["tasks"]) == ("live", "anna", 11)
        assert sum(task["key"].startswith("nap") for task in stream.data) == 10
        (until_then,) = told
        assert until_then >= 0.3
        assert row["task_seconds"] == pytest.approx(until_then + computed(stream, "nap"), abs=1e-3)


def test_a_late_report_of_another_run_takes_nothing_off_the_one_that_runs(cluster, tmp_path):
    accounting = attached(cluster)

    async def report(key, worker):
        handle = cluster.scheduler.stream_handlers["long-running"]
        handle(key=key, worker=worker, run_id=-2, compute_duration=7.0, stimulus_id="late")

    with Client(cluster, name="live/anna") as client:
        with get_task_stream(client) as stream:
            future = client.submit(until_there, str(tmp_path / "go"), pure=False)
            wait(lambda: future.key in cluster.scheduler.tasks and cluster.scheduler.tasks[future.key].processing_on, "its start")
            cluster.sync(report, future.key, cluster.scheduler.tasks[future.key].processing_on.address)
            (tmp_path / "go").touch()
            future.result(60)
        (row,) = rows(cluster, accounting, by=["lane"])
        assert row["task_seconds"] == pytest.approx(computed(stream), abs=1e-3)  # the report says 7 more
        assert not accounting._seceded


def test_names_without_end_are_counted_as_others_and_the_sums_stay_right(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr("cryodask.cluster.accounting.accounting.MOST_KEYS", 6)
    accounting = attached(cluster, tmp_path)

    async def write():
        accounting.write()

    for number in range(12):
        with Client(cluster, name=f"{('live', 'hpda')[number % 2]}/user{number}/p{number}") as client:
            client.gather(client.map(nap, range(3), seconds=0.0, pure=False))
        cluster.sync(write)
    kept = rows(cluster, accounting)
    assert sum(row["tasks"] for row in kept) == sum(row["tasks"] for row in read_usage(tmp_path)) == 36
    assert {row["lane"]: row["tasks"] for row in rows(cluster, accounting, by=["lane"])} == {"live": 18, "hpda": 18}
    assert sum(row["user"] != "other" for row in kept) == 6
    assert {(row["user"], row["project"]) for row in kept if row["user"] == "other"} == {("other", "other")}

    async def since_start():
        return accounting.since_start()

    assert len(cluster.sync(since_start)) == len(kept) <= 6 + 4


def until_there(path, number=0):
    """Ends when there is a file."""
    while not os.path.exists(path):
        time.sleep(0.02)
    return number


def test_stolen_tasks_are_counted_once_with_the_pool_that_ran_them(tmp_path):
    go = tmp_path / "go"
    with workers(1, resources={"pool-cpu": 1e9}) as cluster:
        accounting = attached(cluster)
        with Client(cluster, name="live/anna") as client:
            with get_task_stream(client) as stream:
                futures = [client.submit(until_there, str(go), i) for i in range(2)]
                processing = lambda: [len(ws.processing) for ws in cluster.scheduler.workers.values()]  # noqa: E731
                wait(lambda: processing() == [2], "both on the only worker")
                cluster.scale(2)
                wait(lambda: processing() == [1, 1], "a theft")
                go.touch()
                assert client.gather(futures) == [0, 1]
            row = next(row for row in rows(cluster, accounting, by=["pool"]) if row["pool"] == "cpu")
            assert (row["tasks"], row["lost"]) == (2, 0)
            assert row["task_seconds"] == pytest.approx(computed(stream), abs=1e-3)


def test_a_killed_worker_costs_what_its_tasks_had_used(cluster, tmp_path):
    accounting, go = attached(cluster), tmp_path / "go"
    with Client(cluster, name="live/anna") as client:
        pids = client.run(os.getpid)
        with get_task_stream(client) as stream:
            sent = time.time()
            cluster.scheduler.allowed_failures = 3
            future = client.submit(until_there, str(go))
            wait(lambda: accounting._running, "its heartbeat")
            address = cluster.scheduler.tasks[future.key].processing_on.address
            time.sleep(1.0)
            ((_, start),) = accounting._running.values()
            known = time.time() - start
            os.kill(pids[address], signal.SIGKILL)
            wait(lambda: address not in cluster.scheduler.workers, "notice of it")
            passed = time.time() - sent
            go.touch()
            future.result(60)
        (row,) = rows(cluster, accounting, by=["lane"])
        assert (row["tasks"], row["lost"]) == (1, 1)
        assert 1.0 <= known <= row["task_seconds"] - computed(stream) <= passed


def test_waiting_is_the_number_of_held_tasks_over_time(cluster, tmp_path, monkeypatch):
    accounting, seconds = attached(cluster), [1000.0]
    monkeypatch.setattr("cryodask.cluster.accounting.accounting.time", SimpleNamespace(monotonic=lambda: seconds[0], time=time.time))

    async def tick(passed):
        cluster.scheduler.periodic_callbacks["accounting"].stop()
        seconds[0] += passed
        accounting.tick()
        return len(cluster.scheduler.queued)

    with Client(cluster, name="live/anna") as client:
        futures = client.map(until_there, [str(tmp_path / "go")] * 20, range(20), pure=False)
        wait(lambda: sum(len(ws.processing) for ws in cluster.scheduler.workers.values()) >= 2, "two that run")
        cluster.sync(tick, 0.0)
        before = rows(cluster, accounting, by=["pool"])
        held = cluster.sync(tick, 7.0)
        assert 20 - 2 * 2 <= held <= 20 - 2  # on two slots two run, and as many may be sent ahead
        (tmp_path / "go").touch()
        client.gather(futures)
        assert cluster.sync(tick, 5.0) == 0
        waited = {row["pool"]: row["waiting_seconds"] for row in rows(cluster, accounting, by=["pool"])}
        assert waited["-"] - sum(row["waiting_seconds"] for row in before) == 7.0 * held
        assert waited["local"] == 0.0


def test_usage_outlives_the_scheduler(tmp_path):
    for seen in (0, 10):
        with workers(1, processes=False) as cluster:
            accounting = attached(cluster, tmp_path)
            with Client(cluster, name="live/anna") as client:
                assert sum(row["tasks"] for row in rows(cluster, accounting)) == seen
                client.gather(client.map(nap, range(10), pure=False))
                before = rows(cluster, accounting, by=["user"])
        assert [row["tasks"] for row in read_usage(tmp_path, by=["user"])] == [seen + 10]
        assert read_usage(tmp_path, by=["user"])[0]["task_seconds"] == pytest.approx(before[0]["task_seconds"], abs=1e-4)
    assert (tmp_path / "usage.jsonl").stat().st_mode & 0o077 == 0


def test_a_scheduler_that_is_killed_forgets_five_seconds_at_most(tmp_path):
    port = open_port()
    preload = tmp_path / "preload.py"
    preload.write_text(
        "from cryodask.cluster import fairshare\nfrom cryodask.cluster.accounting.accounting import Accounting\n"
        "async def dask_setup(scheduler):\n    await fairshare.dask_setup(scheduler)\n"
        f"    Accounting.attach(scheduler, {str(tmp_path / 'books')!r})\n"
    )
    command = [
        sys.executable,
        "-m",
        "distributed.cli.dask_scheduler",
        "--port",
        str(port),
        "--host",
        "127.0.0.1",
        "--preload",
        str(preload),
    ]
    with open(tmp_path / "log", "w", encoding="utf-8") as log:
        pages = ["--dashboard-address", "127.0.0.1:0", "--no-dashboard"]
        scheduler = subprocess.Popen([*command, *pages], stderr=log)
        worker_command = [sys.executable, "-m", "distributed.cli.dask_worker", f"tcp://127.0.0.1:{port}", "--nthreads", "1", "--no-nanny"]
        worker = subprocess.Popen([*worker_command, *pages, "--local-directory", str(tmp_path)], stderr=log)
        try:
            client = Client(f"tcp://127.0.0.1:{port}", name="live/anna", timeout=60)
            sent = time.time()
            client.gather(client.map(logged(str(tmp_path / "runs"), 0.05), range(20), pure=False))
            ended = time.time()
            # written every five seconds: on a loaded machine the first line may come before the last task
            wait(lambda: sum(row["tasks"] for row in read_usage(tmp_path / "books")) == 20, "all tasks in the books", 60)
        finally:
            scheduler.kill(), worker.kill()
            scheduler.wait(), worker.wait()
    (row,) = read_usage(tmp_path / "books", by=["lane"])
    assert (row["lane"], row["tasks"]) == ("live", 20)
    used, first = spans(tmp_path / "runs"), begins(tmp_path / "runs")[0]
    # one after the other on one thread
    assert 20 * 0.05 <= sum(used) <= row["task_seconds"] <= ended - sent <= ended - first + (first - sent)
    client.close()


def key_of(hour, lane="live"):
    return int(hour * HOUR), (lane, "anna", "", "cpu")


def test_a_torn_line_counts_as_nothing_and_harms_no_other(tmp_path):
    journal = UsageJournal(tmp_path, NAMES)
    journal.append({key_of(1): {"tasks": 1.0}})
    whole = journal.path.read_bytes()
    journal.append({key_of(2): {"tasks": 2.0}})
    both = journal.path.read_bytes()
    for cut in range(len(whole), len(both)):
        journal.path.write_bytes(both[:cut])
        kept = {1: 1.0} if cut < len(both) - 1 else {1: 1.0, 2: 2.0}
        assert {start // HOUR: f["tasks"] for (start, _), f in journal.read().items()} == kept
        journal.append({key_of(3): {"tasks": 3.0}})
        assert {start // HOUR: f["tasks"] for (start, _), f in journal.read().items()} == {**kept, 3: 3.0}
    journal.path.write_bytes(whole + b"\0" * 100 + b"\n[1]\n{}\n")
    assert list(journal.read()) == [key_of(1)]


def test_the_journal_grows_by_hours_not_by_writes(tmp_path):
    journal, now = UsageJournal(tmp_path, NAMES), time.time()
    this_hour = now // HOUR
    for write in range(200):
        journal.append({key_of(this_hour - write % 3): {"tasks": 1.0, "task_seconds": 0.1}})
    old = (now - 100 * DAY) // HOUR
    for hour in range(200):
        journal.append({key_of(old - hour): {"tasks": 1.0}})
    before = journal.read()
    journal.compact(now)
    assert len(journal.path.read_text().splitlines()) <= 3 + 10
    assert sum(f["tasks"] for f in journal.read().values()) == sum(f["tasks"] for f in before.values()) == 400
    assert sum(f.get("task_seconds", 0) for f in journal.read().values()) == pytest.approx(20.0)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 16 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(folder)], capture_output=True, text=True)
    if done.returncode:
        warnings.warn(f"a full disk is NOT tested: {done.stderr.strip()}", stacklevel=1)
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(path):
    with open(path, "wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)


def test_on_a_full_disk_nothing_is_counted_twice_or_forgotten(cluster, small_disk):
    accounting = attached(cluster, small_disk)

    async def write():
        accounting.write()

    def counted():
        return [sum(row["tasks"] for row in rows) for rows in (read_usage(small_disk), rows(cluster, accounting))]

    with Client(cluster, name="live/anna") as client:
        client.gather(client.map(nap, range(5), pure=False))
        cluster.sync(write)
        assert counted() == [5, 5]
        lines = (small_disk / "usage.jsonl").read_bytes()
        with pytest.raises(OSError, match="No space left"):  # more than there is room for: not a part of it stays
            UsageJournal(small_disk, NAMES).append({key_of(hour): {"tasks": 1.0} for hour in range(400)})
        assert (small_disk / "usage.jsonl").read_bytes() == lines
        padding = b"\n" * (4096 - len(lines) % 4096)
        (small_disk / "usage.jsonl").write_bytes(lines + padding)  # a page of memory holds no more
        with pytest.raises(OSError, match="No space left"):
            fill(small_disk / "filler")
        client.gather(client.map(nap, range(5), pure=False))
        cluster.sync(write)
        assert counted() == [5, 10]
        (small_disk / "filler").unlink()
        cluster.sync(write)
        assert counted() == [10, 10]


def test_since_counts_from_the_hour_on(tmp_path):
    hour = time.time() // HOUR
    UsageJournal(tmp_path, NAMES).append(
        {key_of(hour - 5): {"tasks": 1.0}, key_of(hour - 2): {"tasks": 2.0}, key_of(hour, "hpda"): {"tasks": 4.0}}
    )
    assert [row["tasks"] for row in read_usage(tmp_path, by=["lane"])] == [4, 3]
    assert [row["tasks"] for row in read_usage(tmp_path, since=(hour - 2) * HOUR + 1800, by=[])] == [6]
    with pytest.raises(ValueError, match="not by laen"):
        read_usage(tmp_path, by=["laen"])


def test_history_has_a_row_per_hour_and_per_day_before_two_months(tmp_path):
    hour = time.time() // HOUR
    day = (time.time() - 80 * DAY) // DAY * 24
    journal = UsageJournal(tmp_path, NAMES)
    old = {key_of(day + h): {"tasks": 1.0, "task_seconds": 60.0} for h in range(24)}
    journal.append(old | {key_of(hour - 5): {"tasks": 2.0}, key_of(hour - 1): {"tasks": 4.0}, key_of(hour - 1, "hpda"): {"tasks": 8.0}})
    found = read_history(tmp_path, by=["lane"])
    assert [(row["from"], row["seconds"], row["lane"], row["tasks"]) for row in found] == [
        (day * HOUR, DAY, "live", 24),
        ((hour - 5) * HOUR, HOUR, "live", 2),
        ((hour - 1) * HOUR, HOUR, "hpda", 8),
        ((hour - 1) * HOUR, HOUR, "live", 4),
    ]
    assert found[0]["task_seconds"] == 24 * 60
    journal.compact(time.time())
    assert read_history(tmp_path, by=["lane"]) == found
    assert [row["tasks"] for row in read_history(tmp_path, (hour - 2) * HOUR + 1800, [])] == [12]
    assert sum(row["tasks"] for row in found) == read_usage(tmp_path, by=[])[0]["tasks"]
    assert read_history(tmp_path / "none") == []


def test_the_command_prints_hours_from_the_journal_of_this_account(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    folder = tmp_path / "cryodask" / "clusters" / "box"
    hour = time.time() // HOUR
    UsageJournal(folder, NAMES).append({key_of(hour - 3): {"tasks": 2.0, "task_seconds": 7200.0}, key_of(hour): {"tasks": 1.0}})
    (folder / "settings.json").write_text("{}")

    def said(*words):
        return CliRunner().invoke(app, ["cluster", "usage", "box", "--hourly", *words])

    assert [row["from"] for row in json.loads(said("--json").output)] == [(hour - 3) * HOUR, hour * HOUR]
    assert [row["lane"] for row in json.loads(said("--json", "--by", "lane", "--hours", "2").output)] == ["live"]
    lines = said("--by", "user").output.splitlines()
    assert lines[0].split()[:2] == ["from", "user"]
    assert time.strftime("%Y-%m-%d %H:%M", time.localtime((hour - 3) * HOUR)) in lines[1] + lines[2]
    assert "2.000" in said().output
    (folder / "settings.json").unlink()
    assert isinstance(said().exception, ClusterError)


# --- the pages -------------------------------------------------------------------------------------------------------------------
def page(cluster, path):
    with urllib.request.urlopen(cluster.dashboard_link.replace("/status", path), timeout=120) as answer:
        return answer.read().decode()


@pytest.fixture(scope="module")
def with_pages():
    with workers(processes=False, protocol="tcp", host="127.0.0.1") as cluster:
        yield cluster, attached(cluster)


def test_prometheus_reads_what_was_used(with_pages):
    cluster, _ = with_pages
    with Client(cluster, name='live/an"na') as client:
        with get_task_stream(client) as stream:
            client.gather(client.map(nap, range(12), pure=False))
        with pytest.raises(ZeroDivisionError):
            client.submit(lambda: 1 / 0).result(120)
        text = page(cluster, "/cryodask/metrics")
        values = {}
        for line in text.splitlines():
            assert line.startswith(("# HELP cryodask_", "# TYPE cryodask_")) or re.fullmatch(r"cryodask_\w+\{.*\} [0-9.e+-]+", line), line
            if not line.startswith("#"):
                values[line.rsplit(" ", 1)[0]] = float(line.rsplit(" ", 1)[1])
        owner = r'lane="live",user="an\"na",project="",pool="local"'
        assert values[f'cryodask_task_runs_total{{{owner},outcome="done"}}'] == 12
        assert values[f'cryodask_task_runs_total{{{owner},outcome="failed"}}'] == 1
        assert 12 * 0.05 <= computed(stream) <= values[f"cryodask_task_seconds_total{{{owner}}}"]
        assert (values['cryodask_lane_weight{lane="live"}'], values['cryodask_lane_clients{lane="live"}']) == (3, 1)


def drawn(cluster):
    from bokeh.client import pull_session
    from bokeh.models import ColumnDataSource

    with pull_session(url=cluster.dashboard_link.replace("/status", "/lanes")) as session:
        source = next(model for model in session.document.models if isinstance(model, ColumnDataSource) and "time" in model.data)
        return {name: list(values) for name, values in source.data.items()}


def test_the_panel_shows_shares_and_waiting_tasks_of_every_lane(with_pages, tmp_path, monkeypatch):
    cluster, accounting = with_pages
    with Client(cluster, name="live/anna") as anna, Client(cluster, name="hpda/ben") as ben:
        futures = [client.map(until_there, [str(tmp_path / "go")] * 100, range(100), pure=False) for client in (anna, ben)]
        wait(lambda: accounting.samples and len(accounting.samples[-1].waiting) == 2, "a sample of what waits")
        last = accounting.samples[-1]
        assert min(last.waiting.values()) > 50
        assert 'href="lanes"' in page(cluster, "/status")
        assert "Lanes" in page(cluster, "/lanes")
        # forty seconds in which live had three quarters of the workers
        made = [replace(last, when=last.when + i, seconds={"live": 1.5 * i, "hpda": 0.5 * i}) for i in range(41)]
        monkeypatch.setattr(accounting, "samples", deque(made))
        cluster.sync(stop_looking, cluster.scheduler)
        data = drawn(cluster)
        assert data["time"] == [1000 * made[i].when for i in (10, 20, 30, 40)]
        assert data["live to"][-1] - data["live from"][-1] == pytest.approx(75)
        assert data["hpda to"][-1] - data["hpda from"][-1] == pytest.approx(25)
        assert (data["live waiting"][-1], data["hpda waiting"][-1]) == (last.waiting["live"], last.waiting["hpda"])
        (tmp_path / "go").touch()
        anna.gather(futures[0]), ben.gather(futures[1])


async def stop_looking(scheduler):
    scheduler.periodic_callbacks["accounting"].stop()
