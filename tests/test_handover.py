"""How a service hands over when things go wrong: its successor dies, never comes, or comes too late, or the service is ended half-way."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from contextlib import asynccontextmanager, suppress

import psutil
import pytest
from _service import environment_of_tests, holder, wait
from distributed import Client

from cryodask.cluster import connect
from cryodask.cluster.service import batch, handover, service
from cryodask.cluster.service.handover import HandingOver
from cryodask.cluster.service.serving import Serving
from cryodask.cluster.service.whereabouts import Whereabouts, folder_of
from cryodask.cluster.settings import parse_settings
from cryodask.cluster.slurm.slurm import new_cluster_id
from cryodask.errors import ClusterError

pytestmark = pytest.mark.heavy

BOX = {"kind": "local", "workers": 1}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("home")
        environment_of_tests(patch, folder)
        yield folder
        for name in service.known():
            try:
                service.find(name).stop()
            except ClusterError:
                with suppress(ClusterError):
                    service.clean_up(name)


def prepared(name, **more):
    with service.prepared(parse_settings({**BOX, **more}), name) as folder:
        return folder


def here(name, **more):
    own = Whereabouts("tcp://127.0.0.1:1", name, new_cluster_id(), os.uname().nodename.split(".")[0], os.getpid(), 0.0, None, "me", "")
    return Whereabouts(**{**vars(own), **more})


def gone(process):
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def successor_of(name, old):
    """The process that stands ready beside another one."""
    found = Whereabouts.read(folder_of(name) / "successor.json")
    return None if found is None or found.pid == old.pid else psutil.Process(found.pid)


# --- with all its processes ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def relay(home):
    return service.start(parse_settings(BOX), "relay")


@pytest.fixture
def draining(relay, tmp_path):
    """The old process and its successor while a task keeps the service from handing over, and how to end that task."""
    old = holder("relay")
    with Client(service.find("relay").address, set_as_default=False) as client:

        def slow(path):
            while not os.path.exists(path):
                time.sleep(0.05)
            return "finished"

        task = client.submit(slow, str(tmp_path / "go"))
        wait(lambda: any(client.processing().values()), "the task")
        service.find("relay").hand_over()
        wait(lambda: service.find("relay").status()["state"] == "draining", "draining")
        yield client, task, old, successor_of("relay", old), tmp_path / "go"
        (tmp_path / "go").touch()


def test_when_the_successor_dies_before_it_has_taken_over_the_service_goes_on(draining):
    client, task, old, successor, go = draining
    held = client.submit(sum, [1, 2])
    successor.kill()
    wait(lambda: service.find("relay").status()["state"] == "running", "notice of it")
    go.touch()
    assert task.result(60) == "finished"
    assert held.result(60) == 3  # it sends tasks again
    assert holder("relay").pid == old.pid
    for words in ("the successor ended before it took over", "no successor was ready, so this service continues"):
        wait(lambda words=words: words in [text for _, text in service.find("relay").status()["events"]], words)


def test_slurms_sigterm_while_it_hands_over_ends_the_old_one_and_the_successor_follows(draining):
    _, _, old, successor, _ = draining
    old.send_signal(signal.SIGTERM)
    wait(lambda: gone(old), "the end of the old one")
    wait(lambda: Whereabouts.read(folder_of("relay") / "scheduler.json").pid == successor.pid, "the successor")
    with connect("relay") as client:
        assert client.submit(sum, [1, 3]).result(60) == 4
    wait(lambda: not (folder_of("relay") / "successor.json").exists(), "an end to standing ready")


def test_stop_while_it_hands_over_ends_the_successor_too(draining):
    _, _, old, successor, _ = draining
    service.find("relay").stop()
    wait(lambda: gone(old) and gone(successor), "the end of both")
    assert not [file for file in ("scheduler.json", "successor.json", "launched.json") if (folder_of("relay") / file).exists()]
    with pytest.raises(ClusterError, match="is not running"):
        service.find("relay")


# --- in this process -------------------------------------------------------------------------------------------------------------
@asynccontextmanager
async def serving(folder):
    """A service whose scheduler and worker run, and that has taken its place."""
    one = Serving(folder)
    await one.cluster
    try:
        await one._take_over(None)
        yield one
    finally:
        await one.cluster.close()
        forget(folder, one.id)


def forget(folder, name):
    """This process goes on, so a file that names it would look like a service that lives."""
    path = folder / "scheduler.json"
    if (found := Whereabouts.read(path)) is not None and found.id == name:
        path.unlink()


def test_a_hand_over_that_fails_is_told_and_the_service_goes_on(home):
    folder = prepared("fails")
    (folder / "scaled.json").mkdir()  # it cannot be written

    async def run():
        async with serving(folder) as one:
            one.cluster.scheduler.drain()
            one.hand_over_soon()
            await one._handing
            assert (one.state, one.cluster.scheduler.draining) == ("running", False)
            assert any("the hand-over failed: IsADirectoryError" in text for _, text in one.events)

    asyncio.run(run())


def test_a_hand_over_that_fails_is_tried_again_while_there_is_time(home, monkeypatch):
    folder = prepared("again")
    (folder / "scaled.json").mkdir()
    monkeypatch.setattr(handover, "_AGAIN_SECONDS", 0.2)

    async def ends():
        return time.time() + 600

    async def run():
        async with serving(folder) as one:
            one._walltime_ends = ends
            one.hand_over_soon()
            while not any("failed" in text for _, text in one.events):
                await asyncio.sleep(0.05)
            (folder / "scaled.json").rmdir()
            await asyncio.wait_for(one._handing, 180)
            assert one.state == "handed over"
            assert Whereabouts.read(folder / "scheduler.json").id != one.id

    asyncio.run(run())
    service.find("again").stop()


def test_a_successor_that_never_becomes_ready_is_ended_when_nobody_waits_for_it_any_more(home, monkeypatch, tmp_path):
    (tmp_path / "python").write_text("#!/bin/sh\nexec sleep 600\n")
    (tmp_path / "python").chmod(0o755)
    folder = prepared("never", service={"python": str(tmp_path / "python")})
    monkeypatch.setattr(handover, "_PATIENCE_SECONDS", 1.0)

    async def run():
        async with serving(folder) as one:
            one.hand_over_soon()
            await one._handing
            assert one.state == "running"

    asyncio.run(run())
    launched = batch.Launched.read(folder)
    wait(launched.ended, "the end of the one that was launched")


def test_ending_half_way_does_not_take_its_own_record_for_that_of_the_successor(home):
    folder = prepared("itself")
    own = psutil.Process()
    received = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))

    async def run():
        async with serving(folder) as one:
            batch.Launched(folder / "service.log", pid=own.pid, started=own.create_time()).write(folder)  # it was a successor itself once
            one._handing = asyncio.ensure_future(asyncio.sleep(600))  # and nothing has been launched yet
            await one.cluster_stop()
            await one._leave()

    try:
        asyncio.run(run())
        time.sleep(0.1)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not received
    assert not (folder / "scheduler.json").exists()


def test_one_that_nobody_waits_for_leaves_before_it_starts_anything(home):
    folder = prepared("late")
    for named, words in ((here("late"), "another successor has taken over"), (None, "the service was stopped meanwhile")):
        if named is None:
            (folder / "scheduler.json").unlink()
        else:
            named.write(folder / "scheduler.json")
        started = batch.launch(folder, parse_settings(BOX), after="elsewhere.1.2.abc")
        wait(started.ended, "its end")
        said = started.log.read_text()
        assert words in said
        assert "running at" not in said
        assert Whereabouts.read(folder / "scheduler.json") == named
        assert not (folder / "successor.json").exists()
        assert not (folder / "failed.json").exists()


def ready(folder, follows):
    """One that stands ready, without its cluster."""
    one = HandingOver(folder, parse_settings(BOX), "me", follows)
    one.id = new_cluster_id()
    return one


def test_one_that_stands_ready_does_not_begin_to_hand_over(home):
    async def run():
        one = ready(prepared("ready"), "elsewhere.1.2.abc")
        one.hand_over_soon()
        assert one._handing is None

    asyncio.run(run())


def test_only_a_file_that_is_missing_for_long_means_that_the_service_was_stopped(home, tmp_path, monkeypatch):
    folder = prepared("missing")
    monkeypatch.setattr(handover, "_LOOK_SECONDS", 0.05)
    held = here("missing")

    async def named_after(hide, show):
        one = ready(folder, held.id)
        hide()
        looking = asyncio.ensure_future(one._named())
        await asyncio.sleep(show[0])
        assert not looking.done()
        show[1]()
        assert (await asyncio.wait_for(looking, 120)).id == held.id

    path = folder / "scheduler.json"
    held.write(path)
    asyncio.run(named_after(lambda: path.rename(tmp_path / "away"), (0.2, lambda: (tmp_path / "away").rename(path))))
    long = 2 * handover._ABSENT_LOOKS * handover._LOOK_SECONDS

    def unreadable():
        path.rename(tmp_path / "away")
        path.mkdir()

    def readable():
        path.rmdir()
        (tmp_path / "away").rename(path)

    asyncio.run(named_after(unreadable, (long, readable)))
    path.unlink()

    async def absent():
        assert await asyncio.wait_for(ready(folder, held.id)._named(), 120) is None

    asyncio.run(absent())


def test_of_two_that_would_follow_a_dead_one_the_second_gives_way(home):
    folder = prepared("two")
    host, pid, start, random = new_cluster_id().split(".")
    dead = here("two", id=f"{host}.{pid}.{int(start) - 100}.{random}")
    dead.write(folder / "scheduler.json")

    async def run():
        async with serving_ready(folder, dead.id) as first, serving_ready(folder, dead.id) as second:
            assert first._succeed_the_dead()
            assert not second._succeed_the_dead()
            assert Whereabouts.read(folder / "scheduler.json").id == first.id
            assert not await second._my_turn()

    asyncio.run(run())


@asynccontextmanager
async def serving_ready(folder, follows):
    one = Serving(folder, follows)
    await one.cluster
    try:
        yield one
    finally:
        await one.cluster.close()
        forget(folder, one.id)


def test_the_end_is_that_of_the_job_not_so_long_after_the_start_of_the_process(home, monkeypatch):
    folder = prepared("ends")
    settings = parse_settings(
        {"kind": "slurm", "interface": "lo", "pools": {"cpu": {"memory": "1GiB"}}, "service": {"where": "slurm", "walltime": "1:00:00"}}
    )
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("PATH", "/nowhere")  # Slurm does not answer
    end = int(time.time()) + 1234

    async def run():
        one = HandingOver(folder, settings, "me", "")
        assert await one._walltime_ends() == one.since + 3600
        monkeypatch.setenv("SLURM_JOB_END_TIME", str(end))
        assert await one._walltime_ends() == end

    asyncio.run(run())
    assert "SLURM_JOB_END_TIME" in batch.service_script(folder, settings.service)  # what is kept of Slurm's variables
