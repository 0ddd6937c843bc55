"""A shared cluster as a service on one machine: it outlives its command, is found only while it lives, and is followed by a successor."""

from __future__ import annotations

import asyncio
import json
import os
import queue
import re
import signal
import stat
import subprocess
import sys
import threading
import time
import warnings

import psutil
import pytest
import yaml
from _service import begun, cryodask, cryodask_process, environment_of_tests, holder, journal, open_to_others, program, wait
from distributed import Client
from distributed.core import Server

from cryodask.cluster import close, connect
from cryodask.cluster.service import service
from cryodask.cluster.service.handover import HandingOver
from cryodask.cluster.service.whereabouts import Whereabouts, address_file, folder_of
from cryodask.cluster.settings import parse_settings
from cryodask.cluster.slurm.slurm import new_cluster_id
from cryodask.errors import ClusterError, ProjectFileError


def gone(process):
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def kill(process):
    """A signal is only under way when kill() returns."""
    process.kill()
    wait(lambda: gone(process), "the death")


BOX = {"kind": "local", "workers": 2, "lanes": {"live": 3, "hpda": 1, "batch": 1}}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("home")
        environment_of_tests(patch, folder)
        (folder / "box.yaml").write_text(yaml.safe_dump(BOX))
        yield folder
        for name in service.known():
            try:
                service.find(name).stop()
            except ClusterError:
                service.clean_up(name)


@pytest.fixture(scope="module")
def started(home):
    """What the command said that started the service ``box``."""
    return cryodask_process("cluster", "start", str(home / "box.yaml"))


@pytest.fixture
def box(started):
    return service.find("box")


@pytest.fixture
def client(box):
    made = connect("box", lane="hpda")
    yield made
    close(made)


def test_it_lives_on_when_the_command_that_started_it_has_ended(started, box, client):
    assert f"is running at {box.address}" in started
    assert "cryodask cluster stop box" in started
    assert client.submit(sum, [1, 2]).result(60) == 3
    process = holder("box")
    assert process.terminal() is None
    assert os.getsid(process.pid) != os.getsid(0)
    assert os.getpid() not in [parent.pid for parent in process.parents()]


def test_its_files_are_for_its_account_alone_and_the_address_file_holds_no_secret(box):
    assert stat.S_IMODE(box.folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in box.folder.rglob("*") if path.is_file()} == {0o600}
    public = box.folder.parent.parent / "addresses" / "box.json"
    assert stat.S_IMODE(public.stat().st_mode) == 0o644
    assert json.loads(public.read_text()) == {"cluster": "box", "address": box.address}


def test_it_is_found_by_its_name_and_by_its_cluster_file(box, home, client):
    by_file = connect(str(home / "box.yaml"), lane="live")
    try:
        assert by_file.scheduler.address == box.address == client.scheduler.address
    finally:
        close(by_file)
    assert service.find("box").status()["state"] == "running"  # closing a client ends nothing


def test_a_second_one_of_that_name_is_refused(box):
    with pytest.raises(ClusterError, match=f"box has been running since .* at {box.address}"):
        service.start(parse_settings(BOX), "box")


def test_nothing_of_it_listens_beyond_this_machine(box, client):
    client.submit(sum, [1]).result(60)
    everything = [holder("box"), *holder("box").children(recursive=True)]
    assert len(everything) >= 3
    assert open_to_others(everything) == set()


def test_status_shows_lanes_with_shares_and_what_waits(box, client):
    with connect("box", lane="live") as live:
        futures = [*client.map(time.sleep, [0.5] * 40, pure=False), *live.map(time.sleep, [0.5] * 40, pure=False)]
        wait(lambda: {n for n, lane in box.status()["lanes"].items() if lane["waiting"] and lane["running"]} >= {"live", "hpda"}, "both")
        wait(lambda: box.status()["lanes"]["live"]["share"] > 0.3, "a share")
        said = cryodask("cluster", "status", "box")
        now = json.loads(cryodask("cluster", "status", "box", "--json"))
        client.cancel(futures[:40])
        live.cancel(futures[40:])
    assert now["workers"] == now["threads"] == 2
    assert now["lanes"]["live"]["weight"] == 3
    assert now["lanes"]["live"]["clients"] == now["lanes"]["hpda"]["clients"] == 1
    assert sum(lane["share"] for lane in now["lanes"].values()) == pytest.approx(1)
    for words in ("box: running at", "share, last 5 min", "live", "hpda", f"process {holder('box').pid}"):
        assert words in said
    assert "box" in cryodask("cluster", "status")


def test_usage_is_shown_by_lane_and_user_while_it_runs(box, client):
    client.gather(client.map(time.sleep, [0.2] * 4, pure=False))
    wait(lambda: sum(row["task_seconds"] for row in box.usage(by=("lane",)) if row["lane"] == "hpda") > 0.7, "the seconds")
    rows = json.loads(cryodask("cluster", "usage", "box", "--by", "lane,user", "--json"))
    assert {row["lane"] for row in rows} >= {"hpda"}
    assert "task hours" in cryodask("cluster", "usage", "box")
    assert "use lane, user" in cryodask("cluster", "usage", "box", "--by", "colour", code=2)


def test_nobody_is_invited_where_nothing_is_encrypted(box):
    assert "has no certificates" in cryodask("cluster", "invite", "box", "anna", code=2)


def test_scale_down_keeps_what_is_in_memory(box, client):
    wait(lambda: len(client.nthreads()) == 2, "both workers")
    futures = client.map(lambda i: i * i, range(20))
    client.gather(futures)
    cryodask("cluster", "scale", "box", "workers=1")
    wait(lambda: len(client.nthreads()) == 1, "the end of a worker")
    assert {future.status for future in futures} == {"finished"}
    assert client.gather(futures) == [i * i for i in range(20)]
    assert "no pools" in cryodask("cluster", "scale", "box", "cpu=2", code=2)
    cryodask("cluster", "scale", "box", "workers=2")
    wait(lambda: len(client.nthreads()) == 2, "the second worker")


def test_it_hands_over_when_what_runs_has_finished_and_connected_clients_are_told(box, tmp_path):
    box.scale(workers=1)
    before, old = box.address, holder("box")
    client = connect("box", lane="hpda")

    def slow(path):
        while not os.path.exists(path):
            time.sleep(0.05)
        return "finished"

    running = client.submit(slow, str(tmp_path / "go"))
    wait(lambda: any(client.processing().values()), "the task")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        old.send_signal(signal.SIGUSR1)
        wait(lambda: box.status()["state"] == "draining", "draining")
        held = client.submit(sum, [1, 2])
        assert service.find("box").address == before  # until it has let go
        (tmp_path / "go").touch()
        assert running.result(60) == "finished"
        wait(lambda: service.find("box").address != before, "the successor")
        wait(lambda: held.status == "cancelled", "the end of the connection")
    assert any("reconnect" in str(w.message) for w in seen)
    wait(lambda: gone(old), "the end of the old one")
    client.close()
    with connect("box", lane="hpda") as again:
        wait(lambda: len(again.nthreads()) == 1, "as many workers as were asked for")
        assert again.submit(sum, [1, 3]).result(60) == 4
    assert json.loads((box.folder.parent.parent / "addresses" / "box.json").read_text())["address"] == service.find("box").address
    assert not (box.folder / "successor.json").exists()


def test_a_run_whose_driver_was_killed_goes_on_with_the_same_service(box, tmp_path):
    folder, command = tmp_path / "run", program(tmp_path / "run", "box", 30, 0.2)
    driver = begun(folder, command)
    wait(lambda: len(journal(folder)) >= 5, "five items")
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    wait(lambda: box.status()["lanes"]["batch"]["clients"] == 0, "notice of it")
    assert begun(folder, command).wait(60) == 0
    (before,) = re.findall(r"([1-9]\d*) were done before", (folder / "said.txt").read_text())
    assert int(before) >= 5
    assert f"'done': {30 - int(before)}" in (folder / "said.txt").read_text()
    assert {record["row"] for record in journal(folder)} == set(range(30))


def test_one_that_was_killed_is_named_and_a_run_resumes_when_it_is_started_again(box, home, tmp_path):
    folder, command = tmp_path / "run", program(tmp_path / "run", "box", 30, 0.2)
    driver = begun(folder, command)
    wait(lambda: len(journal(folder)) >= 5, "five items")
    process = holder("box")
    workers = process.children(recursive=True)
    kill(process)
    with pytest.raises(ClusterError, match=r"has ended: .*scheduler\.json names process") as said:
        service.find("box")
    assert "cryodask cluster start box" in str(said.value)
    assert "which is gone" in cryodask("cluster", "status", "box", code=2)
    assert driver.wait(90) == 1
    assert "The scheduler is gone" in (folder / "said.txt").read_text()
    psutil.wait_procs(workers, 30)
    assert not [w for w in workers if not gone(w)]
    assert json.loads(cryodask("cluster", "usage", "box", "--json"))  # from the journal
    with pytest.raises(ClusterError, match="has ended"):
        connect("box")
    cryodask("cluster", "start", "box")  # by its name, with the settings it had
    assert begun(folder, command).wait(60) == 0
    assert {record["row"] for record in journal(folder)} == set(range(30))


def test_one_that_was_killed_is_cleared_away_by_stop(home):
    service.start(parse_settings({**BOX, "workers": 1}), "brief")
    kill(holder("brief"))
    said = cryodask("cluster", "stop", "brief")
    assert "scheduler.json removed" in said
    with pytest.raises(ClusterError, match="is not running"):
        service.find("brief")


def test_stop_lets_what_runs_finish_if_asked_to(home, tmp_path):
    service.start(parse_settings({**BOX, "workers": 1}), "brief")
    with Client(service.find("brief").address) as client:

        def slow(path):
            time.sleep(2)
            open(path, "w", encoding="utf-8").close()

        future = client.submit(slow, str(tmp_path / "finished"))
        wait(lambda: any(client.processing().values()), "the task")
        process = holder("brief")
        assert "have ended" in cryodask("cluster", "stop", "brief", "--drain", "30")
        assert (tmp_path / "finished").exists()
        assert gone(process)
        del future
    assert "is not running" in cryodask("cluster", "status", "brief", code=2)


def test_one_that_takes_a_request_and_never_answers_is_given_up(monkeypatch):
    monkeypatch.setattr(service, "_WORK_SECONDS", 0.5)
    address, over = queue.Queue(), threading.Event()

    async def never() -> None:
        await asyncio.sleep(3600)

    async def serve() -> None:
        async with Server({"cluster_status": never}) as server:
            await server.listen("tcp://127.0.0.1:0")
            address.put(server.address)
            while not over.is_set():
                await asyncio.sleep(0.05)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        with pytest.raises(ClusterError, match="did not answer within"):
            service.Service("box", address.get(timeout=60), folder=None, security=None).status()
    finally:
        over.set()
        thread.join()


def test_one_that_cannot_start_says_why(home, tmp_path):
    pools = {"cpu": {"memory": "1GiB", "count": 1}}
    nowhere = parse_settings({"kind": "slurm", "interface": "nosuch0", "pools": pools})
    with pytest.raises(ClusterError, match="no network interface nosuch0"):
        service.start(nowhere, "broken")
    (tmp_path / "python").write_text("#!/bin/sh\necho no such module >&2\nexit 1\n")
    (tmp_path / "python").chmod(0o755)
    with pytest.raises(ClusterError, match="ended while starting: no such module"):
        service.start(parse_settings({**BOX, "service": {"python": str(tmp_path / "python")}}), "broken")


def test_a_name_or_file_that_is_none_is_refused_in_plain_words(home, tmp_path):
    with pytest.raises(ClusterError, match="There is no cluster nosuch; there are box"):
        connect("nosuch")
    with pytest.raises(ClusterError, match="cannot be the name of a cluster"):
        service.start(parse_settings(BOX), "../box")
    (tmp_path / "asks.yaml").write_text(yaml.safe_dump({**BOX, "service": {"name": "asked"}}))
    with pytest.raises(ClusterError, match="There is no cluster asked"):
        connect(str(tmp_path / "asks.yaml"))
    with pytest.raises(ProjectFileError, match="did you mean 'walltime'"):
        parse_settings({**BOX, "service": {"waltime": "1:00:00"}})


def test_two_commands_do_not_start_it_twice(home):
    settings = parse_settings(BOX)
    with service.prepared(settings, "brief"), pytest.raises(ClusterError, match="being started"):
        service.start(settings, "brief")


def test_the_public_address_file_lies_where_the_settings_say(home, tmp_path):
    settings = parse_settings({**BOX, "service": {"address_file": str(tmp_path / "public" / "box")}})
    assert address_file(folder_of("box"), settings) == tmp_path / "public" / "box"
    assert address_file(folder_of("box"), parse_settings(BOX)) == home / "state" / "cryodask" / "addresses" / "box.json"


def whereabouts(name, **more):
    own = Whereabouts("tcp://127.0.0.1:1", name, new_cluster_id(), os.uname().nodename.split(".")[0], os.getpid(), 0.0, None, "me", "")
    return Whereabouts(**{**vars(own), **more})


def test_a_process_is_told_dead_by_its_own_machine_only(home):
    own = whereabouts("x")
    assert own.life() == "lives"
    host, pid, start, random = own.id.split(".")
    assert whereabouts("x", id=f"{host}.{pid}.{int(start) - 100}.{random}").life() == "dead"  # another process had that number
    assert whereabouts("x", host="elsewhere").life() == "cannot tell"
    assert whereabouts("x", host="elsewhere", address="").life() == "cannot tell"  # one that waits for its port


def test_nothing_of_one_on_another_machine_that_does_not_answer_is_touched_unless_forced(home):
    with service.prepared(parse_settings(BOX), "far") as folder:
        whereabouts("far", host="elsewhere").write(folder / "scheduler.json")
    with pytest.raises(ClusterError, match="run this on elsewhere"):
        service.find("far")
    with pytest.raises(ClusterError, match="It is unknown whether"):
        service.start(parse_settings(BOX), "far")
    assert "cryodask cluster stop far --force" in cryodask("cluster", "stop", "far", code=2)
    assert (folder / "scheduler.json").exists()
    assert "scheduler.json removed" in cryodask("cluster", "stop", "far", "--force")
    with pytest.raises(ClusterError, match="is not running"):
        service.find("far")


def test_a_scheduler_file_that_cannot_be_read_is_no_sign_of_an_end(home):
    with service.prepared(parse_settings(BOX), "far") as folder:
        (folder / "scheduler.json").mkdir()
    with pytest.raises(ClusterError, match="cannot be read"):
        service.start(parse_settings(BOX), "far")
    with pytest.raises(ClusterError, match="cannot be read"):
        service.clean_up("far")
    (folder / "scheduler.json").rmdir()


def test_others_come_through_to_the_address_file_whatever_the_umask(home, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "deep" / "state"))
    before = os.umask(0o077)
    try:
        for _ in range(2):
            with service.prepared(parse_settings(BOX), "box") as folder:
                one = HandingOver(folder, parse_settings(BOX), "me", "")
                asyncio.run(_publishes(one))
            (tmp_path / "deep" / "state" / "cryodask").chmod(0o700)  # as an earlier command may have left it
        with service.prepared(parse_settings(BOX), "box"):
            pass
    finally:
        os.umask(before)
    public = address_file(folder, parse_settings(BOX))
    assert stat.S_IMODE(public.stat().st_mode) == 0o644
    above = [path for path in public.parents if path.is_relative_to(tmp_path / "deep")]
    assert len(above) == 4
    assert all(path.stat().st_mode & 0o011 == 0o011 for path in above)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


async def _publishes(one):
    one._publish_address("tls://127.0.0.1:1")
    assert not one.events


BARE = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in "torch scipy matplotlib mrcfile tifffile gemmi imagecodecs starfile jinja2 bokeh".split():
            raise ModuleNotFoundError(name + " is not installed")
sys.meta_path.insert(0, Blocked())
"""


@pytest.mark.parametrize(
    "words", [["--help"], ["cluster", "--help"], ["cluster", "start", "--help"], ["submit", "--help"], ["cluster", "status"]]
)
def test_the_commands_need_nothing_of_electron_microscopy(words, home):
    code = f"{BARE}\nsys.argv = ['cryodask', *{words!r}]\nfrom cryodask.cli import main\nmain()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_clusters_services_and_connect_need_nothing_of_electron_microscopy(home, tmp_path):
    code = f"""{BARE}
import importlib, pkgutil
import cryodask.cluster
if __name__ == "__main__":
    for module in pkgutil.iter_modules(cryodask.cluster.__path__):
        importlib.import_module("cryodask.cluster." + module.name)
    client = cryodask.connect("local", workers=1, lane="live")
    assert client.submit(sum, [1, 2]).result() == 3
    cryodask.cluster.close(client)
"""
    (tmp_path / "bare.py").write_text(code)
    done = subprocess.run([sys.executable, str(tmp_path / "bare.py")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
