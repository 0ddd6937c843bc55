"""A project has one driver, whatever clocks and hosts say; a dead one keeps nobody out, one that was overtaken changes nothing."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from _clock import Clock
from _drivers import PLACE, Driver, container, make_project, write, written

from cryodask.errors import DiskError, LockedError, TakenOverError
from cryodask.store import lock as lock_module
from cryodask.store.epochs import Epochs
from cryodask.store.files import append, write_atomically
from cryodask.store.lock import ProjectLock
from cryodask.store.project import Project

pytestmark = pytest.mark.heavy

APART_SECONDS = [-3600, -120, 120, 3600]


@pytest.fixture
def folder(tmp_path) -> Path:
    return make_project(tmp_path / "p").path


def touch(folder: Path, seconds: float) -> None:
    """As if the clock of the host that wrote the lock were so far ahead."""
    for path in (folder / "driver.lock", *(folder / "epochs").iterdir()):
        os.utime(path, (time.time() + seconds,) * 2)


def a_beat(folder: Path) -> None:
    """Wait until the driver has shown that it lives, however long this machine takes."""
    path, deadline = folder / "driver.lock", time.monotonic() + 120
    before = path.read_text()
    while path.read_text() in (before, ""):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(lock_module, "time", made)
    return made


# --- one machine ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seconds", APART_SECONDS)
def test_a_living_driver_is_not_robbed_and_a_killed_one_is_followed_at_once_whatever_the_dates_of_the_files(seconds, folder, clock):
    with Driver(folder) as first:
        assert first.says().startswith("held")
        touch(folder, seconds)
        with pytest.raises(LockedError, match="is working on"), Project(folder).lock():
            pass
        assert first.ask("write") == "wrote"
        first.send(signal.SIGKILL)
        first.ends()
        touch(folder, seconds)
        begun = clock.monotonic()
        with Project(folder).lock():
            assert clock.monotonic() == begun


def test_a_driver_that_ends_in_order_leaves_the_lock_to_the_next(folder):
    with Driver(folder) as first:
        assert first.says() == "held 2"  # the first made the project
        assert (folder / "driver.lock").exists()
        assert first.ask("leave") == "left"
        assert not (folder / "driver.lock").exists()
    with Driver(folder) as second:
        assert second.says() == "held 3"
        assert Project(folder).lock().folder == folder


def test_another_process_with_the_pid_of_a_dead_driver_is_not_taken_for_it(folder, clock):
    with Driver(folder) as first:
        first.says()
        first.send(signal.SIGKILL)
        first.ends()
    path = folder / "driver.lock"
    holder = json.loads(path.read_text())
    path.write_text(json.dumps({**holder, "pid": os.getpid()}))
    with Project(folder).lock():
        pass


def test_a_driver_that_the_process_table_hides_is_not_taken_for_dead(folder, clock, monkeypatch):
    with Driver(folder) as first:
        first.says()
        monkeypatch.setattr(lock_module, "_stat_of", lambda pid: [])  # /proc mounted with hidepid
        clock.meanwhile = lambda: a_beat(folder)
        with pytest.raises(LockedError), Project(folder).lock():
            pass


# --- hosts and containers -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seconds", [0, *APART_SECONDS])
def test_between_containers_with_equal_pids_and_names_a_living_driver_is_not_robbed_and_a_dead_one_is_followed(seconds, folder):
    with Driver(folder, apart=True, ahead_seconds=max(0, seconds)) as first:
        assert first.says().startswith("held")
        assert first.ask("write") == "wrote"
        touch(folder, seconds)
        with Driver(folder, apart=True, ahead_seconds=max(0, -seconds)) as second:
            assert second.says() == "refused"
        holder = json.loads((folder / "driver.lock").read_text())
        assert (holder["host"], holder["pid"]) == ("node", 1)
        first.send(signal.SIGKILL)
        first.ends()
        touch(folder, seconds)
        with Driver(folder, apart=True, ahead_seconds=max(0, -seconds)) as third:
            assert third.says().startswith("held")
            holder = json.loads((folder / "driver.lock").read_text())
            assert (holder["host"], holder["pid"]) == ("node", 1)
            assert third.ask("write") == "wrote"


def test_a_driver_whose_start_time_looks_shifted_from_another_time_namespace_is_not_taken_for_dead(folder):
    with Driver(folder) as first:
        assert first.says().startswith("held")
        assert not wrong_in_time_namespace(folder)


def wrong_in_time_namespace(folder: Path) -> bool:
    """Whether an observer among the same processes, but with other clocks, is let in."""
    words = [*container(3600, kinds=()), sys.executable, str(Path(__file__).with_name("_drivers.py")), str(folder)]
    return "held" in subprocess.run(words, capture_output=True, text=True, input="", check=False).stdout


def of_another_host(folder: Path) -> None:
    """Make the lock one of another boot: nobody here can tell whether its holder lives."""
    path = folder / "driver.lock"
    path.write_text(json.dumps({**json.loads(path.read_text()), "boot": "another"}))


def test_a_dead_driver_of_another_host_blocks_for_no_longer_than_ten_seconds(folder, clock):
    with Driver(folder) as first:
        first.says()
        first.send(signal.SIGKILL)
        first.ends()
    of_another_host(folder)
    begun = clock.monotonic()
    with Project(folder).lock():
        assert 5 < clock.monotonic() - begun <= 10


def test_a_dead_driver_that_never_came_to_show_its_lock_blocks_for_no_longer(folder, clock):
    assert Epochs(folder).claim(7, "")
    begun = clock.monotonic()
    with Project(folder).lock() as lock:
        assert lock.epoch == 8
        assert clock.monotonic() - begun <= 10


def test_a_beat_at_the_last_moment_is_enough(folder, clock):
    with Driver(folder) as first:
        first.says()
        first.send(signal.SIGKILL)
        first.ends()
    of_another_host(folder)
    holder = json.loads((folder / "driver.lock").read_text())

    def beat() -> None:
        if clock.seconds > 1007.5:
            (folder / "driver.lock").write_text(json.dumps({**holder, "beat": 100}))

    clock.meanwhile = beat
    with pytest.raises(LockedError), Project(folder).lock():
        pass


def test_an_observer_that_was_itself_stopped_does_not_take_that_for_the_silence_of_the_driver(folder, clock, monkeypatch):
    with Driver(folder, apart=True) as first:
        first.says()
        look, looks = ProjectLock._look, []

        def stopped_after(self, at_least=0):
            looks.append(look(self, at_least))
            clock.seconds += 60
            return looks[-1]

        monkeypatch.setattr(ProjectLock, "_look", stopped_after)
        clock.meanwhile = lambda: a_beat(folder) if len(looks) > 1 else None
        with pytest.raises(LockedError), Project(folder).lock():
            pass


def test_a_copy_of_a_project_that_is_worked_on_is_not_blocked_by_the_driver_of_the_other(folder, clock, tmp_path):
    with Driver(folder) as first:
        first.says()
        shutil.copytree(folder, tmp_path / "copy")
        with Project(tmp_path / "copy").lock():
            write(tmp_path / "copy", "here")
        assert first.ask("write") == "wrote"


# --- paused and overtaken -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("apart", [False, True])
def test_a_stopped_driver_is_overtaken_and_ends_when_it_wakes_before_it_writes_anything(apart, folder):
    with Driver(folder, apart=apart) as first:
        assert first.says() == "held 2"
        assert first.ask("write") == "wrote"
        first.send(signal.SIGSTOP)
        with Driver(folder, apart=apart) as second:
            assert second.says() == "held 3"
            assert written(folder) == ("2", {"2"}, {"2"})
            assert second.ask("write") == "wrote"
            first.tell("write")
            first.send(signal.SIGCONT)
            assert first.says() == "overtaken"
            assert first.ends() == 5
            assert json.loads((folder / "driver.lock").read_text())["epoch"] == 3
            assert second.ask("write") == "wrote"
            assert second.ask("leave") == "left"
    assert written(folder) == ("3", {"2", "3"}, {"2", "3"})


def test_a_driver_that_writes_nothing_more_tells_at_its_end_that_it_was_overtaken(folder):
    with Driver(folder) as first:
        first.says()
        with Driver(folder, force=True) as second:
            assert second.says() == "held 3"
            assert first.ask("leave") == "overtaken"
            assert first.ends() == 5
            assert second.ask("write") == "wrote"
            assert second.ask("leave") == "left"


@pytest.fixture
def overtaken_after_asking(folder, monkeypatch):
    """This process holds the lock, and is overtaken at the worst moment: right after it was told that it may write."""
    check = ProjectLock.check
    followers: list[Driver] = []

    def late(self) -> None:
        check(self)
        if not followers:
            followers.append(Driver(folder, force=True))
            assert followers[0].says().startswith("held")

    with pytest.raises(TakenOverError), Project(folder).lock():  # noqa: PT012
        monkeypatch.setattr(ProjectLock, "check", late)
        yield followers
        monkeypatch.setattr(ProjectLock, "check", check)
    for follower in followers:
        assert follower.ask("write") == "wrote"
        assert follower.ask("leave") == "left"
        follower.__exit__()


def test_a_record_that_slips_through_is_void(folder, overtaken_after_asking):
    generation = Project(folder).generation("motion")
    generation.commit_failure(1, "m1", "late", "blamed", 3)
    assert overtaken_after_asking
    assert b'"late"' in b"".join(path.read_bytes() for path in generation.journal.folder.glob("*.jsonl"))
    assert written(folder)[0] is None
    assert generation.records() == {}  # also for who had read it already


def test_a_line_of_the_registry_that_slips_through_is_void(folder, overtaken_after_asking):
    before = (folder / "items.jsonl").read_bytes()
    append(folder / "items.jsonl", b"late\n")
    assert overtaken_after_asking
    assert (folder / "items.jsonl").read_bytes() == before


@pytest.mark.parametrize("name", ["project.json", f"stages/{PLACE}/columns.npz", f"stages/{PLACE}/checkpoints/iteration-0001.npz"])
def test_a_file_that_slips_through_is_not_replaced(name, folder, overtaken_after_asking):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    before = path.read_bytes() if path.exists() else None
    with pytest.raises(FileNotFoundError):
        write_atomically(path, b"late")
    assert overtaken_after_asking
    assert (path.read_bytes() if path.exists() else None) == before


WORKER = """
import sys
import numpy as np
from cryodask.store.generation import Generation

generation = Generation(sys.argv[1])
for line in sys.stdin:
    row, epoch, how = line.split()
    values = {"micrograph_sum": np.full((6, 8), float(row), np.float32), "total_motion": float(row)}
    try:
        if how == "unasked":
            generation.journal.refuse_void = lambda epoch: None
        generation.commit(int(row), f"m{row}", values, epoch=int(epoch))
        print("committed", flush=True)
    except Exception as error:
        print(type(error).__name__, flush=True)
"""


def test_what_workers_of_an_overtaken_driver_commit_later_is_void_and_what_they_did_before_counts(folder):
    path = folder / "stages" / PLACE
    words = [sys.executable, "-c", WORKER, str(path)]
    worker = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def commit(row: int, epoch: int, how: str = "as always") -> str:
        worker.stdin.write(f"{row} {epoch} {how.replace(' ', '-')}\n")
        worker.stdin.flush()
        return worker.stdout.readline().strip()

    reader = Project(folder).generation("motion")
    try:
        with Driver(folder) as first:
            assert first.says() == "held 2"
            with Driver(folder) as late:
                assert late.says() == "refused"
            assert commit(0, 2) == "committed"
            with Project(folder).lock(force=True) as lock:
                assert lock.epoch == 3
                assert sorted(reader.records()) == [0]
                Project(folder).generation("motion").compact()
                assert commit(1, 2) == "TakenOverError"
                assert commit(1, 2, "unasked") == "committed"
                assert sorted(reader.records()) == [0]
                assert reader.table(["total_motion"]).row.tolist() == [0]
                assert commit(5, 3) == "committed"  # the same process now works for the driver of now
                assert commit(1, 2, "unasked") == "committed"
                assert sorted(reader.records()) == [0, 5]
                Project(folder).generation("motion").compact()
            for generation in (reader, Project(folder).generation("motion")):
                assert sorted(generation.records()) == [0, 5]
                assert generation.table(["total_motion"]).row.tolist() == [0, 5]
            names = sorted(p.name[:6] for p in (path / "journal").glob("*.jsonl"))
            assert set(names) == {"000002", "000003"}
    finally:
        worker.kill()
        worker.communicate()


def test_repair_does_not_revive_what_is_void(folder):
    path = folder / "stages" / PLACE / "journal"
    with Driver(folder) as first:
        first.says()
        assert first.ask("write") == "wrote"
        with Project(folder).lock(force=True):
            (journal,) = path.glob("000002-*.jsonl")
            line = journal.read_bytes()
            journal.write_bytes(line[:20] + bytes([line[20] ^ 1]) + line[21:])
            with open(journal, "ab") as file:
                file.write(line)
            generation = Project(folder).generation("motion")
            assert generation.records() == {}
            generation.repair()
            assert generation.records() == {}
            assert Project(folder).generation("motion").records() == {}


def test_every_line_says_its_epoch_and_numbers_are_never_given_twice(folder, clock):
    with Project(folder).lock() as lock:
        write(folder, "here")
        first = lock.epoch
    lines = [p.read_text() for p in (folder / "stages" / PLACE / "journal").glob("*.jsonl")]
    assert [json.loads(line.split(" ", 1)[1])["epoch"] for line in lines] == [first]
    shutil.rmtree(folder / "epochs")
    with Project(folder).lock() as lock:
        assert lock.epoch == first + 1


def test_epochs_that_nobody_needs_are_removed_and_those_that_void_lines_stay(folder):
    with Driver(folder) as first:
        assert first.says() == "held 2"
        first.send(signal.SIGKILL)
        first.ends()
    for _ in range(70):
        with Project(folder).lock() as lock:
            pass
    assert lock.epoch == 72
    names = sorted(p.name for p in (folder / "epochs").iterdir())
    assert names[:2] == ["000002", "000002.closed"]
    assert len(names) <= 2 * 66


# --- files that vanish, disks that refuse ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("what", ["driver.lock", "driver.lock and epochs"])
@pytest.mark.parametrize("apart", [False, True])
def test_a_removed_lock_is_put_back_by_its_holder_and_lets_nobody_in(what, apart, folder):
    with Driver(folder, apart=apart) as first:
        assert first.says() == "held 2"
        assert first.ask("write") == "wrote"
        (folder / "driver.lock").unlink()
        if what != "driver.lock":
            shutil.rmtree(folder / "epochs")
        with Driver(folder, apart=apart) as second:
            assert second.says() == "refused"
        assert first.ask("write") == "wrote"
        assert json.loads((folder / "driver.lock").read_text())["epoch"] == 2
        assert first.ask("leave") == "left"
        assert not (folder / "driver.lock").exists()


def test_a_lock_that_is_removed_while_its_holder_is_stopped_is_lost_to_who_comes(folder):
    with Driver(folder) as first:
        first.says()
        first.send(signal.SIGSTOP)
        (folder / "driver.lock").unlink()
        with Driver(folder) as second:
            assert second.says() == "held 3"
            first.tell("write")
            first.send(signal.SIGCONT)
            assert first.says() == "overtaken"
            assert second.ask("write") == "wrote"
            assert second.ask("leave") == "left"
    assert written(folder) == ("3", {"3"}, {"3"})


def test_in_a_folder_that_cannot_be_written_the_lock_is_refused_with_the_reason(folder):
    container()
    code = f"from cryodask.store.project import Project; Project({str(folder)!r}).lock().__enter__()"
    script = f'mount --bind {folder} {folder} && mount -o remount,bind,ro {folder} && exec "$@"'
    words = ["unshare", "--mount", "sh", "-c", script, "sh", sys.executable, "-c", code]
    said = subprocess.run(words, capture_output=True, text=True, check=False).stderr
    assert "DiskError" in said
    assert "Read-only file system" in said
    assert "choose another folder for the project" in said


def test_the_lock_needs_no_hard_links(folder, monkeypatch):
    def refused(*paths, **options) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    with Driver(folder) as first:
        first.says()
        first.send(signal.SIGKILL)
        first.ends()
    with Project(folder).lock():
        write(folder, "here")
    assert written(folder)[0] == "here"


def test_a_disk_without_space_leaves_a_lock_that_keeps_nobody_waiting(folder, clock, monkeypatch):
    real = os.write

    def full(fd, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(DiskError, match="No space"), Project(folder).lock():
        pass
    monkeypatch.setattr(os, "write", real)
    begun = clock.monotonic()
    with Project(folder).lock():
        assert clock.monotonic() == begun


# --- many at once ---------------------------------------------------------------------------------------------------------------
FORK = """
def fork(numbers):
    'In a process for each of several numbers: its own.'
    sys.stdin.readline()  # all start at the same moment
    for number in numbers[1:]:
        if os.fork() == 0:
            return number
    if len(numbers) > 1 and os.fork():
        sys.exit(any(os.wait()[1] >> 8 for _ in numbers))
    return numbers[0]
"""
CONTENDER = (
    f"""
import os, random, signal, sys, time
from cryodask.errors import LockedError
from cryodask.store.project import Project
{FORK}"""
    + """
folder = sys.argv[1]
dice = random.Random(int(fork(sys.argv[3:])))
inside = os.path.join(folder, "inside")
while True:
    try:
        with Project(folder).lock() as lock:
            fd = os.open(f"{inside}-{lock.epoch}", os.O_CREAT | os.O_EXCL)
            others = [n for n in os.listdir(folder) if n.startswith("inside-") and n != f"inside-{lock.epoch}"]
            print(f"{lock.epoch} {'alone' if not others else others}", flush=True)
            time.sleep(dice.uniform(0, 0.05))
            os.unlink(f"{inside}-{lock.epoch}")
            if dice.random() < float(sys.argv[2]):
                os.kill(os.getpid(), signal.SIGKILL)
        break
    except LockedError:
        time.sleep(0.01)
"""
)


@pytest.mark.parametrize(("apart", "dying"), [(False, 0.0), (False, 0.5), (True, 0.0)])
def test_of_many_drivers_that_start_at_the_same_moment_one_at_a_time_has_the_project(apart, dying, folder):
    seeds = [*map(str, range(8))]
    command = [sys.executable, "-c", CONTENDER, str(folder), str(dying)]
    before = container() if apart else []
    commands = [[*before, *command, seed] for seed in seeds] if apart else [[*command, *seeds]]
    many = [subprocess.Popen(words, stdin=-1, stdout=-1, text=True) for words in commands]
    try:
        for one in many:
            one.stdin.write("\n")
            one.stdin.flush()
        lines = [line for one in many for line in one.communicate(timeout=120)[0].splitlines()]
    finally:
        for one in many:
            one.kill()
    epochs = sorted(int(line.split()[0]) for line in lines)
    assert [line for line in lines if not line.endswith("alone")] == []
    assert len(epochs) == len(set(epochs)) == 8


def test_a_driver_that_is_stopped_while_it_takes_the_lock_and_overtaken_gives_way(folder, monkeypatch):
    show, others = ProjectLock._show, []

    def late(self) -> None:
        if not others:
            others.append(Driver(folder, force=True))
            assert others[0].says() == "held 3"
        show(self)

    monkeypatch.setattr(ProjectLock, "_show", late)
    try:
        with pytest.raises(LockedError), Project(folder).lock():
            pass
        assert others[0].ask("write") == "wrote"
        assert json.loads((folder / "driver.lock").read_text())["epoch"] == 3
    finally:
        others[0].__exit__()


def test_a_project_that_is_being_made_is_not_made_by_another_driver(tmp_path, monkeypatch):
    code = """
import sys
from cryodask.store.project import Project
project = Project.create(sys.argv[1], "p")
project.state.removed["by the other"] = 1.0
project.save()
"""
    said = []

    def meanwhile(folder) -> dict[str, int]:
        said.append(subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False).stderr)
        return {}

    monkeypatch.setattr("cryodask.store.history.births_on_disk", meanwhile)
    Project.create(tmp_path / "p", "p")
    assert "LockedError" in said[0]


def test_drivers_that_make_a_project_at_the_same_moment_lose_nothing_of_each_other(tmp_path):
    code = f"""
import os, sys
from cryodask.errors import LockedError
from cryodask.store.project import Project
{FORK}
number = fork(sys.argv[2:])
while True:
    try:
        with Project.create(sys.argv[1], "p").lock():
            project = Project(sys.argv[1])
            project.state.removed[number] = 1.0
            project.save()
        break
    except LockedError:
        pass
"""
    folder = tmp_path / "new"
    subprocess.run([sys.executable, "-c", code, str(folder), *map(str, range(8))], input="\n", text=True, check=True, timeout=120)
    assert set(Project(folder).state.removed) == {str(n) for n in range(8)}


def test_drivers_that_are_stopped_and_woken_at_random_never_write_beside_each_other(folder):
    """The last to take over is the last whose writes count, and nobody's writes follow those of a later epoch."""
    dice = random.Random(3)
    drivers: list[Driver] = []
    try:
        for _ in range(6):
            drivers.append(Driver(folder, force=True))
            assert drivers[-1].says().startswith("held")
            assert drivers[-1].ask("write") == "wrote"
            for former in drivers[:-1]:
                if dice.random() < 0.3:
                    former.tell("write")
            drivers[-1].send(signal.SIGSTOP)
        for driver in dice.sample(drivers, len(drivers)):
            driver.send(signal.SIGCONT)
        assert [driver.ask("write") for driver in drivers] == [*["overtaken"] * 5, "wrote"]
        assert drivers[-1].ask("leave") == "left"
    finally:
        for driver in drivers:
            driver.__exit__()
    names = {str(number) for number in range(2, 8)}
    assert written(folder) == ("7", names, names)
