"""Hand-over, retention by policy, and what is shown of it."""

from __future__ import annotations

import json
import shutil
import stat
import subprocess
import time
from pathlib import Path

import pytest
from _command import command
from _toy_session import finished, run
from distributed import Client

from cryodask.errors import ProjectFileError, StoreError
from cryodask.store.away import Ledger
from cryodask.store.project import Project
from cryodask.testing.archives import MOVIES, local, make, truth
from cryodask.tiers import policy
from cryodask.tiers.archive import archive
from cryodask.tiers.handover import hand_over, manifest_line
from cryodask.tiers.inventory import held, pieces
from cryodask.tiers.policy import DAY, Rule, Storage, announce, announcements, confirmation, due_now, execute, forecast, read_storage


@pytest.fixture
def project(tmp_path):
    return make(tmp_path / "s")


@pytest.fixture(scope="module")
def here():
    with Client(processes=False, n_workers=1, threads_per_worker=1, dashboard_address=None) as client:
        yield client


def checked(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["sha256sum", "-c", "--strict", "manifest.sha256"], cwd=folder, capture_output=True, text=True, check=False)


# --- hand-over ----------------------------------------------------------------------------------------------------------------------
def test_a_hand_over_is_complete_and_checkable_with_plain_sha256sum(tmp_path_factory, here, tmp_path):
    session = finished(tmp_path_factory, here, tmp_path / "session")
    done = hand_over(session / "toy", tmp_path / "copy")
    assert checked(tmp_path / "copy").returncode == 0
    listed = {line.split("  ", 1)[1] for line in done.manifest.read_text().splitlines()}
    there = {str(p.relative_to(tmp_path / "copy")) for p in (tmp_path / "copy").rglob("*") if p.is_file()}
    assert there - listed == {"manifest.sha256", "handover-of.txt"}
    assert {f"movies/m{n}.mrc" for n in range(6)} <= listed
    copy = Project(tmp_path / "copy" / "toy")
    assert copy.verify() == []
    assert copy.overview() == Project(session / "toy").overview()
    shutil.copy(session / "toy.yaml", tmp_path / "copy")
    before = {label: copy.generation(label).committed() for label in copy.stages}
    after = run(tmp_path / "copy", here)  # where everything has its place, nothing is computed again
    assert {label: after.generation(label).committed() for label in after.stages} == before


def test_a_flipped_bit_in_the_hand_over_is_found_and_copied_again(project, tmp_path):
    hand_over(project, tmp_path / "copy")
    movie = tmp_path / "copy" / "movies" / "m 1.tif"
    raw = bytearray(movie.read_bytes())
    raw[7] ^= 1
    movie.write_bytes(raw)
    found = checked(tmp_path / "copy")
    assert found.returncode == 1
    assert "m 1.tif: FAILED" in found.stdout
    hand_over(project, tmp_path / "copy")
    assert checked(tmp_path / "copy").returncode == 0


def test_what_is_away_is_said_in_the_hand_over(project, tmp_path):
    archive(project, str(tmp_path / "a"))
    done = hand_over(project, tmp_path / "copy")
    assert f"originals, {MOVIES} files" in done.away[0]
    assert str(tmp_path / "a") in (tmp_path / "copy" / "README.txt").read_text()
    assert set(Ledger(tmp_path / "copy" / "p").absent()) == set(Ledger(project).absent())


def test_a_folder_of_something_else_is_not_written_to(project, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    for folder in (tmp_path / "full", project / "copy", project.parent.parent):
        with pytest.raises(ProjectFileError):
            hand_over(project, folder)
    hand_over(project, tmp_path / "copy")
    with pytest.raises(ProjectFileError, match="not an earlier hand-over"):
        hand_over(make(tmp_path / "t"), tmp_path / "copy")


def test_odd_names_in_a_manifest(tmp_path):
    name = "a\\b\nc.tif"
    (tmp_path / name).write_bytes(b"")
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    (tmp_path / "manifest.sha256").write_bytes(manifest_line(empty, name))
    assert checked(tmp_path).returncode == 0


# --- what lies where, what goes when -----------------------------------------------------------------------------------------------
def sizes(project: Path) -> dict[tuple[str, str], int]:
    return {(one.category, one.where): one.bytes for one in held(Project(project))}


def test_sizes_by_category_and_place(project, tmp_path):
    found = sizes(project)
    assert found["originals", "here"] == sum(3000 + n for n in range(MOVIES))
    everything = sum(p.stat().st_size for p in project.rglob("*") if p.is_file())
    assert found["micrographs", "here"] + found["records", "here"] == everything
    archive(project, str(tmp_path / "a"), rows=[0])
    found = sizes(project)
    assert found["originals", str(tmp_path / "a")] == found["originals", "trash"] == 3000
    assert found["originals", "here"] == 6003


def test_nothing_has_a_date_before_the_hand_over_is_acknowledged(project):
    rules = Storage(archive="/archive")
    going = {one.category: one for one in forecast(Project(project), rules)}
    assert going["originals"].due is None
    assert "not acknowledged" in going["originals"].why
    policy.acknowledge(project, "a scientist")
    now = time.time()
    going = {one.category: one for one in forecast(Project(project), rules)}
    assert going["originals"].due is not None
    assert abs(going["originals"].due - now - 90 * DAY) < DAY
    assert abs((going["micrographs"].due or 0) - now - 365 * DAY) < DAY
    assert {one.category: one.why for one in forecast(Project(project), Storage())}["originals"] == "no archive is set"


def test_announcements_come_14_7_and_1_days_before_each_once(project):
    rules = Storage(archive="/archive", micrographs=Rule())
    policy.acknowledge(project, "a scientist")
    (going,) = forecast(Project(project), rules)
    assert going.due is not None
    said = {days: announce(project, rules, going.due - days * DAY) for days in (20, 14.5, 13.9, 13, 8, 6.9, 3, 0.9, 0.5, -1)}
    assert [days for days, texts in said.items() if texts] == [13.9, 6.9, 0.9]
    assert [a["category"] for a in announcements(Project(project))] == ["originals"] * 3
    assert "3 files of originals, 9.0 kB: archive on " in str(announcements(Project(project))[0]["text"])


def test_what_was_not_announced_or_not_confirmed_stays(project, tmp_path):
    rules = Storage(archive=str(tmp_path / "a"), micrographs=Rule())
    policy.acknowledge(project, "a scientist")
    late = time.time() + 100 * DAY
    with pytest.raises(StoreError, match="Nothing is due"):
        execute(project, rules, "9.0 kB", now=late)
    announce(project, rules, late)
    with pytest.raises(StoreError, match="Nothing is due"):  # announced this moment
        execute(project, rules, "9.0 kB", now=late)
    late += 2 * DAY
    going = due_now(Project(project), rules, late)
    assert confirmation(going) == "9.0 kB"
    for text in ("", "yes", "9.1 kB"):
        with pytest.raises(StoreError, match="is not the size"):
            execute(project, rules, text, now=late)
    assert len(local(project)) == 2 * MOVIES
    wanted = truth(project)
    assert execute(project, rules, "9.0 kB", now=late).removed == MOVIES
    assert len(local(project)) == MOVIES
    assert command("restore", project).returncode == 0
    assert truth(project) == wanted


def test_shards_of_a_session_are_thinned_by_policy(tmp_path_factory, here, tmp_path):
    session = finished(tmp_path_factory, here, tmp_path / "session")
    rules, late = Storage(), time.time() + 10 * DAY
    announce(session / "toy", rules, late - 2 * DAY)
    size = confirmation(due_now(Project(session / "toy"), rules, late))
    assert execute(session / "toy", rules, size, now=late).removed == 6
    assert not [p for p in pieces(Project(session / "toy"), ["shards"]) if p.path.exists()]
    assert Project(session / "toy").verify() == []


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("storage: {originals: {then: burn}}", "storage.originals.then"),
        ("storage: {orginals: {}}", "storage.orginals"),
        ("storage: {shards: {after_days: -1}}", "storage.shards.after_days"),
        ("storage: [1]", "storage"),
    ],
)
def test_a_wrong_policy_is_refused(tmp_path, text, why):
    (tmp_path / "facility.yaml").write_text(text)
    with pytest.raises(ProjectFileError, match=why):
        read_storage(tmp_path / "facility.yaml")


def test_other_sections_of_a_facility_file_are_not_looked_at(tmp_path):
    (tmp_path / "facility.yaml").write_text("people: {a: b}\nstorage: {archive: /x, shards: {then: keep}}\n")
    rules = read_storage(tmp_path / "facility.yaml")
    assert (rules.archive, rules.shards.then, rules.originals.after_days) == ("/x", "keep", 90)


def test_the_command_shows_announces_and_executes_in_two_steps(project, tmp_path, monkeypatch):
    facility = tmp_path / "facility.yaml"
    facility.write_text(f"storage: {{archive: {tmp_path / 'a'}, originals: {{then: archive, after_days: 0}}, micrographs: {{then: keep}}}}")
    shown = command("storage", project, "--facility", facility)
    assert "originals        9.0 kB        3  here" in shown.stdout
    assert "no date yet: the hand-over is not acknowledged" in shown.stdout
    assert command("handover", project, "--acknowledge", "a scientist").returncode == 0
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 10)
    assert "announced: p: 3 files of originals" in command("storage", project, "--facility", facility, "--announce").stdout
    monkeypatch.setattr(time, "time", lambda: now + 2 * DAY)
    first = command("storage", project, "--facility", facility, "--execute")
    assert "--confirm '9.0 kB'" in first.stdout
    assert len(local(project)) == 2 * MOVIES
    assert command("storage", project, "--facility", facility, "--execute", "--confirm", "1 kB").returncode == 2
    assert command("storage", project, "--facility", facility, "--execute", "--confirm", "9.0 kB").returncode == 0
    assert len(local(project)) == MOVIES
    (told,) = json.loads(command("storage", project, "--facility", facility, "--json").stdout)
    assert {(one["category"], one["where"]) for one in told["held"]} >= {("originals", str(tmp_path / "a")), ("originals", "trash")}
    assert told["announcements"][0]["category"] == "originals"


def test_lustre_is_shown_where_lfs_exists(project, tmp_path, monkeypatch):
    """``lfs`` is a program of the site: here one that answers as it does."""
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert "Lustre" not in command("storage", project).stdout
    program = tmp_path / "bin" / "lfs"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\nif [ "$1" = getstripe ]; then echo 4; else echo "  $5  12T  20T  25T"; fi\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    shown = command("storage", project).stdout
    assert "has a stripe count of 4" in shown
    assert f"Lustre: {project}  12T  20T  25T" in shown
    program.write_text("#!/bin/sh\nexit 1\n")
    assert "Lustre" not in command("storage", project).stdout
