"""Archive and restore: removed only once a copy has given the bytes back, on folders and real object stores, killed anywhere."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import time
from functools import partial

import pytest
from _command import command
from _stores import make_bucket, store, use

from cryodask.errors import ArchiveError, LockedError, ProjectFileError
from cryodask.store.away import Ledger
from cryodask.store.project import Project
from cryodask.testing.archives import ALL, MOVIES, Faulty, kill_at_random, local, lost, make, truth
from cryodask.testing.crash import crash
from cryodask.tiers import archive as archiving
from cryodask.tiers import places
from cryodask.tiers.archive import archive, restore
from cryodask.tiers.inventory import parse_rows
from cryodask.tiers.marks import identity
from cryodask.tiers.places import FolderArchive, safe_key

pytestmark = pytest.mark.heavy

DAY = 86400.0


@pytest.fixture
def project(tmp_path):
    return make(tmp_path / "s")


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Both object stores, started when they are first asked for."""
    from contextlib import ExitStack

    with ExitStack() as stack:
        running = {}

        def ask(kind):
            if kind not in running:
                folder = tmp_path_factory.mktemp(kind)
                running[kind] = stack.enter_context(store(kind, folder / "data")), itertools.count()
            return running[kind]

        yield ask


@pytest.fixture(params=["folder", "moto", "rclone"])
def place(request, stores, tmp_path, monkeypatch):
    if request.param == "folder":
        return str(tmp_path / "archive")
    url, numbers = stores(request.param)
    use(monkeypatch, url)
    return make_bucket(request.param, url, next(numbers))


# --- the way there and back -------------------------------------------------------------------------------------------------------
def test_archive_and_restore_give_the_same_bytes(project, place):
    wanted = truth(project)
    done = archive(project, place, ALL)
    assert (done.removed, done.problems) == (2 * MOVIES, [])
    assert local(project) == []
    assert not lost(project, wanted)
    lines = Ledger(project).absent()
    assert {line["archive"] for line in lines.values()} == {place}
    assert {name: line["sha256"] for name, line in lines.items()} == wanted
    later = archive(project, place, ALL, now=time.time() + DAY + 10)
    assert later.deleted == 2 * MOVIES
    assert not list(project.parent.rglob(".trash/**/*.tif"))
    assert not lost(project, wanted)
    back = restore(project)
    assert (back.files, back.problems) == (2 * MOVIES, [])
    assert truth(project) == wanted
    assert Project(project).verify() == []
    again = archive(project, place, ALL)  # the copies are still there, and are read again
    assert (again.removed, again.problems) == (2 * MOVIES, [])


def test_times_are_restored_so_that_nothing_is_read_again(project, tmp_path):
    movie = project.parent / "movies" / "m 0.tif"
    os.utime(movie, ns=(5, 1234567890))
    archive(project, str(tmp_path / "a"))
    shutil.rmtree(movie.parent / ".trash")
    restore(project)
    assert movie.stat().st_mtime_ns == 1234567890


def test_only_some_rows_and_categories(project, tmp_path):
    archive(project, str(tmp_path / "a"), rows=[1])
    assert set(Ledger(project).absent()) == {"inputs:movies/m 1.tif"}
    archive(project, str(tmp_path / "a"), ALL)
    assert restore(project, ["micrographs"], rows=[0, 2]).files == 2
    assert len(local(project)) == 2


def test_copies_without_removal(project, tmp_path):
    done = archive(project, str(tmp_path / "a"), remove=False)
    assert (done.kept, done.removed) == (MOVIES, 0)
    assert len(local(project)) == 2 * MOVIES
    assert {line["state"] for line in Ledger(project).records().values()} == {"verified"}
    assert archive(project, str(tmp_path / "a")).removed == MOVIES


def test_an_archive_that_has_moved(project, tmp_path):
    wanted = truth(project)
    archive(project, str(tmp_path / "a"))
    archive(project, str(tmp_path / "a"), now=time.time() + DAY + 10)
    (tmp_path / "a").rename(tmp_path / "b")
    assert restore(project).problems
    assert restore(project, source=str(tmp_path / "b")).files == MOVIES
    assert truth(project) == wanted


def test_removed_files_can_be_picked_up_for_a_day(project, tmp_path):
    wanted = truth(project)
    archive(project, str(tmp_path / "a"))
    shutil.rmtree(tmp_path / "a")
    assert restore(project).files == MOVIES
    assert truth(project) == wanted


def test_the_trash_is_not_emptied_of_files_whose_copy_has_gone(project, tmp_path):
    wanted = truth(project)
    archive(project, str(tmp_path / "a"))
    next((tmp_path / "a").rglob("*_201.tif")).write_bytes(b"rotten")
    later = archive(project, str(tmp_path / "a"), now=time.time() + DAY + 10)
    assert later.deleted == MOVIES - 1
    assert any("stays in the trash" in text and "has changed" in text for text in later.problems)
    assert lost(project, wanted) == []


# --- whatever goes wrong, nothing is removed, and the reason is said ----------------------------------------------------------------
@pytest.mark.parametrize(
    ("fault", "why"),
    [("flipped", "other bytes"), ("truncated", "2999 instead of 3000 bytes"), ("empty", "0 instead of"), ("forgets", "other bytes")],
    ids=lambda value: value,
)
def test_a_copy_that_is_wrong_removes_nothing(project, tmp_path, monkeypatch, fault, why):
    monkeypatch.setattr(archiving, "open_archive", lambda url: Faulty(places.open_archive(url), fault))
    said = []
    done = archive(project, str(tmp_path / "a"), say=said.append)
    assert done.removed == 0
    assert len(done.problems) == MOVIES
    assert said == done.problems
    assert why in done.problems[0]
    assert len(local(project)) == 2 * MOVIES


def test_an_archive_that_is_full_removes_nothing_and_says_so(project, tmp_path, monkeypatch):
    def full(path, pieces):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(places, "write_pieces", full)
    with pytest.raises(ArchiveError, match=r"/a is full"):
        archive(project, str(tmp_path / "a"))
    assert len(local(project)) == 2 * MOVIES
    assert not list((tmp_path / "a").rglob("*.part"))
    monkeypatch.undo()
    assert archive(project, str(tmp_path / "a")).removed == MOVIES


def test_a_local_file_that_changes_meanwhile_is_not_removed(project, tmp_path, monkeypatch):
    movie = project.parent / "movies" / "m 1.tif"
    original = FolderArchive.put

    def change_after(self, key, path):
        done = original(self, key, path)
        if path.name == movie.name:
            movie.write_bytes(movie.read_bytes()[:-1] + b"!")
        return done

    monkeypatch.setattr(FolderArchive, "put", change_after)
    done = archive(project, str(tmp_path / "a"))
    assert done.removed == MOVIES - 1
    assert "it was changed while it was archived" in done.problems[0]
    assert movie.exists()
    monkeypatch.undo()
    (problem,) = archive(project, str(tmp_path / "a")).problems
    assert "changed since it was registered" in problem


def test_a_damaged_shard_is_not_archived(project, tmp_path):
    shard = next((project / "stages").rglob("c/0/0/0"))
    raw = bytearray(shard.read_bytes())
    raw[50] ^= 1
    shard.write_bytes(raw)
    done = archive(project, str(tmp_path / "a"), ["micrographs"])
    assert done.removed == MOVIES - 1
    assert "damaged" in done.problems[0]
    assert shard.exists()


def test_what_is_in_the_archive_already_is_never_overwritten(project, tmp_path, place):
    identity(project)
    other = make(tmp_path / "other", size=4000)
    shutil.copytree(project / "tiers", other / "tiers")  # as if it were a copy of the project in which the movies are others
    wanted, theirs = truth(project), truth(other)
    archive(other, place)
    done = archive(project, place)
    assert done.removed == 0
    assert "or there before" in done.problems[0]
    assert len(local(project)) == 2 * MOVIES
    assert truth(project) == wanted
    restore(other)
    assert truth(other) == theirs


def test_sessions_of_one_name_share_an_archive(project, tmp_path, place):
    other = make(tmp_path / "other", size=4000)
    wanted, theirs = truth(project), truth(other)
    assert archive(other, place).problems == archive(project, place).problems == []
    restore(other)
    restore(project)
    assert (truth(project), truth(other)) == (wanted, theirs)


def test_an_archive_whose_disk_fails_removes_nothing(project, tmp_path, monkeypatch):
    original = places.pieces

    def broken(path):
        if path.is_relative_to(tmp_path / "a"):
            raise OSError(errno.EIO, "Input/output error")
        return original(path)

    monkeypatch.setattr(places, "pieces", broken)
    with pytest.raises(ArchiveError, match="Input/output error"):
        archive(project, str(tmp_path / "a"))
    assert len(local(project)) == 2 * MOVIES


def test_links_are_left_alone(project, tmp_path):
    movie = project.parent / "movies" / "m 0.tif"
    movie.rename(tmp_path / "real.tif")
    movie.symlink_to(tmp_path / "real.tif")
    done = archive(project, str(tmp_path / "a"))
    assert done.removed == MOVIES - 1
    assert "link" in done.problems[0]
    assert (tmp_path / "real.tif").exists()


def test_a_store_that_goes_away_in_the_middle(project, stores, tmp_path, monkeypatch):
    monkeypatch.setattr(places, "_RETRIES", 0)
    wanted = truth(project)
    with store("moto", tmp_path / "unused") as url:
        use(monkeypatch, url)
        to = make_bucket("moto", url, 0)
        archive(project, to, rows=[0])
    with pytest.raises(ArchiveError, match="s3://bucket0/facility cannot be used"):
        archive(project, to)
    assert len(local(project)) == 2 * MOVIES - 1
    assert restore(project).files == 1  # it is in the trash still
    assert truth(project) == wanted


def test_wrong_credentials_or_bucket_are_named(project, stores, tmp_path, monkeypatch):
    url, _ = stores("rclone")
    use(monkeypatch, url)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(ArchiveError, match="cannot be used"):
        archive(project, "s3://nowhere/x")
    assert len(local(project)) == 2 * MOVIES


def test_another_file_in_the_place_of_a_removed_one_stays(project, tmp_path):
    archive(project, str(tmp_path / "a"))
    movie = project.parent / "movies" / "m 0.tif"
    movie.write_bytes(b"a new recording")
    back = restore(project)
    assert back.files == MOVIES - 1
    assert "another file is at" in back.problems[0]
    assert movie.read_bytes() == b"a new recording"


@pytest.mark.parametrize("fault", ["flipped", "truncated"])
def test_a_rotten_copy_is_not_restored(project, tmp_path, monkeypatch, fault):
    archive(project, str(tmp_path / "a"))
    archive(project, str(tmp_path / "a"), now=time.time() + DAY + 10)
    monkeypatch.setattr(archiving, "open_archive", lambda url: Faulty(places.open_archive(url), fault))
    back = restore(project)
    assert back.files == 0
    assert "does not match its checksums" in back.problems[0]
    assert not list(project.parent.rglob("*.part"))


def test_a_project_that_is_being_run_is_left_alone(project, tmp_path):
    pid = os.fork()
    if pid == 0:
        with Project(project).lock():
            (tmp_path / "held").touch()
            time.sleep(600)
        os._exit(0)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "held").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with pytest.raises(LockedError):
            archive(project, str(tmp_path / "a"))
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    assert len(local(project)) == 2 * MOVIES


# --- killed -------------------------------------------------------------------------------------------------------------------------
def test_the_check_finds_what_is_lost(project, tmp_path):
    wanted = truth(project)
    archive(project, str(tmp_path / "a"), rows=[0])
    (project.parent / "movies" / "m 1.tif").unlink()
    shutil.rmtree(project.parent / "movies" / ".trash")
    next((tmp_path / "a").rglob("*.tif")).write_bytes(b"rotten")
    assert lost(project, wanted) == ["inputs:movies/m 0.tif", "inputs:movies/m 1.tif"]


def _archive(project, to):
    archive(project, to, ["originals"])


def test_killed_before_system_calls_every_byte_is_here_or_verified(tmp_path):
    make(tmp_path / "one", movies=1, size=200)
    states: set[str] = set()
    for before in itertools.count(1, 2):
        folder = tmp_path / f"s{before}"
        shutil.copytree(tmp_path / "one", folder)
        project, to = folder / "p", str(folder / "a")
        wanted = truth(project)
        ended = crash(partial(_archive, project, to), before=before, split=before % 4 == 1)
        assert lost(project, wanted) == [], before
        states |= {line["state"] for line in Ledger(project).records().values()}
        assert archive(project, to, ["originals"]).problems == []  # goes on where it stopped
        assert lost(project, wanted) == []
        restore(project)
        assert truth(project) == wanted
        if not ended.killed:
            break
    assert states == {"copied", "verified", "removed"}
    assert before > 20


def test_killed_at_random_while_archiving_deleting_and_restoring(tmp_path):
    killed = kill_at_random(tmp_path / "s", str(tmp_path / "a"), 10)
    assert (killed.kills.total(), killed.bytes_lost) == (10, 0)


@pytest.mark.slow
def test_killed_200_times_on_an_object_store(tmp_path):
    """In a process of its own, for the client of the store must not be used on both sides of a fork."""
    import subprocess
    import sys

    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import pathlib, pytest, _stores as s, cryodask.testing.archives as t\n"
        "folder = pathlib.Path(sys.argv[2]); patch = pytest.MonkeyPatch()\n"
        "with s.store('moto', folder) as url:\n"
        "    s.use(patch, url); to = s.make_bucket('moto', url, 0)\n"
        "    killed = t.kill_at_random(folder / 's', to, 200, place=s.Plain(url, to))\n"
        "    assert (killed.kills.total(), killed.bytes_lost) == (200, 0), killed\n"
    )
    subprocess.run([sys.executable, "-c", code, os.path.dirname(__file__), str(tmp_path)], check=True, timeout=550)


# --- commands -----------------------------------------------------------------------------------------------------------------------
def test_the_commands(project, tmp_path):
    wanted = truth(project)
    first = command("archive", project, "--to", tmp_path / "a")
    assert (first.returncode, f"{MOVIES} files" in first.stdout) == (0, True), first
    assert command("restore", project, "--rows", "0,2", "--what", "originals").stdout.startswith("2 files")
    assert command("restore", project).returncode == 0
    assert truth(project) == wanted


def test_a_problem_is_the_exit_status(project, tmp_path):
    (project.parent / "movies" / "m 1.tif").write_bytes(b"changed")
    ended = command("archive", project, "--to", tmp_path / "a")
    assert ended.returncode == 1
    assert "m 1.tif: it has changed since it was registered; it stays" in ended.stdout


@pytest.mark.parametrize(
    "words", [["--to", "ftp://x/y"], ["--to", "s3://k:s@b/x"], ["--to", "a", "--categories", "moves"], ["--to", "a", "--rows", "3-1"]]
)
def test_wrong_options_are_refused(project, words):
    assert command("archive", project, *words, folder=project.parent).returncode == 2
    assert len(local(project)) == 2 * MOVIES


def test_an_archive_in_the_project_is_refused(project):
    with pytest.raises(ProjectFileError):
        archive(project, str(project / "archive"))


def test_rows_and_keys():
    assert parse_rows("0-2, 7") == {0, 1, 2, 7}
    assert safe_key("a b/é#.tif") == "a_20b/_c3_a9_23.tif"


def test_a_folder_is_recorded_without_detours(tmp_path, monkeypatch):
    (tmp_path / "s").mkdir()
    monkeypatch.chdir(tmp_path / "s")
    for given in ("../archive", f"file://{tmp_path}/s/../archive", f"{tmp_path}/archive"):
        assert places.open_archive(given).folder == tmp_path / "archive"
    (tmp_path / "link").symlink_to(tmp_path / "s")
    assert places.open_archive(str(tmp_path / "link" / "archive")).folder == tmp_path / "link" / "archive"
    with pytest.raises(ProjectFileError, match="lies in the project folder"):
        archive(tmp_path / "s", "../s/archive", ["originals"])
