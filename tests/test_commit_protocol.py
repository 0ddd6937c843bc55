"""What a commit does on the disk, in which order, and what is left of it after every kind of damage."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from cryodask.store.generation import Generation
from cryodask.store.journal import Journal
from cryodask.store.layouts import Grid
from cryodask.store.lines import checked_line
from cryodask.store.project import Arrival, Project
from cryodask.store.shards import file_crc, write_shard
from cryodask.store.state import StepState
from cryodask.testing.crash import crash

GIVES = ("micrograph_sum", "micrograph_dw", "total_motion")


def image(value: float) -> np.ndarray:
    return np.full((6, 8), value, np.float32)


def values(value: float) -> dict:
    return {"micrograph_sum": image(value), "micrograph_dw": image(value + 0.5), "total_motion": value}


def arrivals(count: int = 3) -> list[Arrival]:
    return [Arrival(f"m{row}", f"content {row}", {"size": row}) for row in range(count)]


def made(folder: Path, count: int = 3) -> Project:
    """A project of one stage whose values are those of the row."""
    project = Project.create(folder / "p", "p")
    project.update_exposures(arrivals(count), complete=True)
    path = project.path / "stages" / "motion" / "key"
    meta = {"stage": "motion", "version": 1, "params": {}, "recipes": {"": "recipe"}, "inputs": {}}
    Generation.create(path, meta=meta, gives=GIVES, per_item=True, grids={"": Grid({"y": 6, "x": 8}, {})})
    project.state.adopt("motion", StepState(stage="motion", key="key"))
    project.save()
    generation = project.generation("motion")
    for row in range(count):
        generation.commit(row, f"m{row}", values(row), attempt=1, revision=0)
    generation.journal.close()
    return project


def shown(project: Project) -> dict[str, float]:
    """What a reader who opens the project now sees; pictures and numbers must agree."""
    dataset = Project(project.path)["motion"]
    for name, picture, number in zip(dataset["micrograph"].values, dataset["micrograph_sum"].values, dataset["total_motion"].values):
        np.testing.assert_array_equal(picture, image(number), err_msg=str(name))
    return dict(zip(dataset["micrograph"].values.tolist(), dataset["total_motion"].values.tolist()))


def shard(project: Project, row: int, name: str = "micrograph_sum") -> Path:
    return project.generation("motion").shard_path(name, row, 2)


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def damage(project: Project) -> list[str]:
    return [p for p in Project(project.path).verify() if "harmless" not in p]


def mended(project: Project) -> list[str]:
    """Repair, as ``cryodask verify --repair`` does it, then commit again what is missing, as the next run does."""
    opened = Project(project.path)
    with opened.lock():
        taken = opened.repair()
    items = opened.update_exposures(arrivals(), complete=False).items
    generation = opened.generation("motion")
    there = generation.committed()
    for item in items:
        if item.row not in there:
            generation.commit(item.row, item.name, values(item.row), attempt=9, revision=item.revision)
    generation.journal.close()
    assert damage(project) == []
    assert shown(project) == {"m0": 0.0, "m1": 1.0, "m2": 2.0}
    return taken


# --- the order ----------------------------------------------------------------------------------------------------------------


def test_system_calls_of_a_commit_are_shards_then_their_folders_then_the_journal_line(tmp_path):
    strace = shutil.which("strace")
    if strace is None:
        warnings.warn("strace is not installed: the order of a commit's system calls is NOT CHECKED", stacklevel=1)
        pytest.skip("needs strace")
    project = made(tmp_path)
    code = (
        "import numpy as np; from cryodask.store.generation import Generation\n"
        f"g = Generation({str(project.generation('motion').path)!r})\n"
        "v = np.ones((6, 8), np.float32)\n"
        "g.commit(7, 'm7', {'micrograph_sum': v, 'micrograph_dw': v, 'total_motion': 1.0})\n"
    )
    calls = "openat,write,pwrite64,fsync,fdatasync,rename,renameat,renameat2,close"
    log = tmp_path / "strace.txt"
    subprocess.run([strace, "-f", "-y", "-s", "0", "-e", f"trace={calls}", "-o", str(log), sys.executable, "-c", code], check=True)
    folder = re.escape(str(project.generation("motion").path))
    seen: list[str] = []
    for line in log.read_text().splitlines():
        for pattern, word in (
            (rf'openat\(.*"{folder}/(\w+)/c/7/0/0\.[^"]*\.part", O_WRONLY', "open {}"),
            (rf"write\(\d+<{folder}/(\w+)/c/7/0/0\.[^>]*\.part>", "write {}"),
            (rf"fsync\(\d+<{folder}/(\w+)/c/7/0/0\.[^>]*\.part>", "fsync {}"),
            (rf'rename\("{folder}/(\w+)/c/7/0/0\.[^"]*\.part", "{folder}/\1/c/7/0/0"', "rename {}"),
            (rf"fsync\(\d+<{folder}/(\w+)/c/7/0>", "folder {}"),
            (rf"write\(\d+<{folder}/(journal)/[^>]*\.jsonl>", "write {}"),
            (rf"fsync\(\d+<{folder}/(journal)/[^>]*\.jsonl>", "fsync {}"),
        ):
            found = re.search(pattern, line)
            if found:
                step = word.format(found.group(1))
                if seen[-1:] != [step]:  # one write may take several calls
                    seen.append(step)
    want = [f"{step} {name}" for name in ("micrograph_sum", "micrograph_dw") for step in ("open", "write", "fsync", "rename", "folder")]
    assert seen == [*want, "write journal", "fsync journal"]


def test_a_commit_killed_before_any_of_its_system_calls_is_wholly_there_or_not_at_all(tmp_path):
    project = made(tmp_path)

    def commit():
        project.generation("motion").commit(1, "m1", values(1.0), attempt=2)
        yield "acknowledged"

    total = len(crash(commit).calls)
    assert total > 12
    for before in range(1, total + 1):
        for split in (False, True):
            outcome = crash(commit, before=before, split=split)
            assert outcome.killed
            assert outcome.done == []
            assert shown(project) == {"m0": 0.0, "m1": 1.0, "m2": 2.0}
            assert damage(project) == []


def test_the_record_names_checksum_size_and_time_of_every_shard(tmp_path):
    project = made(tmp_path)
    record = project.generation("motion").committed()[1]
    for name in ("micrograph_sum", "micrograph_dw"):
        path = shard(project, 1, name)
        assert record["shards"][name] == file_crc(path)
        assert record["files"][name] == [path.stat().st_size, path.stat().st_mtime_ns]


# --- damage, and its outcome --------------------------------------------------------------------------------------------------


def test_a_torn_journal_line_is_no_commit_and_no_damage(tmp_path):
    project = made(tmp_path)
    journal = project.generation("motion").journal
    line = checked_line({"row": 1, "name": "m1", "ok": True, "columns": {}, "shards": {}, "attempt": 5})
    (journal.folder / "dead-1-torn.jsonl").write_bytes(line[:-20])
    assert any("incomplete, harmless" in p for p in project.verify())
    assert damage(project) == []
    assert shown(project)["m1"] == 1.0


def test_a_line_that_lacks_only_its_end_of_line_is_a_commit(tmp_path):
    project = made(tmp_path)
    journal = next(project.generation("motion").journal.folder.glob("*.jsonl"))
    journal.write_bytes(journal.read_bytes()[:-1])
    assert shown(project) == {"m0": 0.0, "m1": 1.0, "m2": 2.0}
    assert project.verify() == []


def test_a_damaged_journal_line_costs_its_item_alone_and_is_kept_aside(tmp_path):
    project = made(tmp_path)
    journal = next(project.generation("motion").journal.folder.glob("*.jsonl"))
    flip(journal, journal.read_bytes().index(b"\n") + 30)
    assert ["its commit is lost" in p for p in damage(project)] == [True]
    assert shown(project) == {"m0": 0.0, "m2": 2.0}
    mended(project)
    assert (journal.parent / "damaged-lines.txt").read_bytes().count(b"\n") == 1


@pytest.mark.parametrize("compacted", [False, True])
def test_truncated_flipped_and_missing_shards_are_found_and_made_again(tmp_path, compacted):
    project = made(tmp_path)
    if compacted:
        project.generation("motion").compact()
    first = shard(project, 0)
    first.write_bytes(first.read_bytes()[:-9])
    flip(shard(project, 1, "micrograph_dw"), 17)
    shard(project, 2).unlink()
    found = damage(project)
    assert len(found) == 3
    assert "its length does not match" in found[0]
    assert "do not match the record of m1" in found[1]
    assert "missing, though m2 is committed" in found[2]
    assert sorted(mended(project)) == ["motion: m0", "motion: m1", "motion: m2"]
    assert first.exists()


def test_resuming_finds_every_shard_whose_size_or_time_changed_and_reads_only_those(tmp_path, monkeypatch):
    project = made(tmp_path)
    first = shard(project, 0)
    first.write_bytes(first.read_bytes()[:-9])
    os.utime(shard(project, 1), ns=(1, 1))  # a copy of the project: other times, the same bytes
    read = []
    monkeypatch.setattr("cryodask.store.check.file_crc", lambda path: read.append(path) or file_crc(path))
    generation = Project(project.path).generation("motion")
    assert ["row" not in p and "m0" in p for p in generation.check_files()] == [True]
    assert {p.parent.parent.name for p in read} == {"0", "1"}
    assert sorted(generation.committed()) == [1, 2]
    read.clear()
    assert generation.check_files() == []
    assert read == []  # the copy has the time of its record again


def test_a_journal_of_a_dead_host_counts_like_any_other(tmp_path):
    project = made(tmp_path)
    journal = next(project.generation("motion").journal.folder.glob("*.jsonl"))
    text = journal.read_bytes()
    journal.unlink()
    other = journal.with_name("node-that-burnt-down-4711-0badc0de.jsonl")
    records = [r for lines in Journal(_folder_with(tmp_path / "x", text)).read().lines.values() for _, r in lines]
    other.write_bytes(b"".join(checked_line({**r, "host": "node-that-burnt-down", "pid": 4711}) for r in records))
    assert shown(project) == {"m0": 0.0, "m1": 1.0, "m2": 2.0}
    assert project.verify() == []
    project.generation("motion").commit(1, "m1", values(11.0), attempt=2)
    assert shown(project)["m1"] == 11.0


def _folder_with(folder: Path, text: bytes) -> Path:
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(text)
    return folder


def test_of_two_attempts_of_one_item_the_later_sending_counts(tmp_path):
    project = made(tmp_path)
    one, two = (Generation(project.generation("motion").path) for _ in range(2))
    two.commit(1, "m1", values(1.0), attempt=3)
    late = one.commit(1, "m1", values(1.0), attempt=2)
    assert late["time"] >= two.committed()[1]["time"]
    assert two.committed()[1]["attempt"] == 3
    assert project.verify() == []


def test_a_straggler_that_renames_late_is_found_and_its_whole_record_counts_again(tmp_path):
    project = made(tmp_path)
    generation = project.generation("motion")
    generation.commit(1, "m1", values(11.0), attempt=3)
    # attempt 2 slept through it all: it renames its shards over those of attempt 3, and then commits
    generation.commit(1, "m1", values(22.0), attempt=2)
    assert generation.committed()[1]["columns"]["total_motion"] == 11.0
    found = damage(project)
    assert len(found) == 2
    assert all("another attempt at m1" in p for p in found)
    assert len(generation.check_files()) == 1
    assert damage(project) == []
    assert shown(project) == {"m0": 0.0, "m1": 22.0, "m2": 2.0}


def test_a_straggler_that_dies_after_its_rename_costs_the_item_which_is_made_again(tmp_path):
    project = made(tmp_path)
    generation = project.generation("motion")
    write_shard(shard(project, 1), generation.layout(generation.gives[0]), image(22.0))
    assert [bool(re.search(r"(bytes do|length does) not match the record of m1", p)) for p in damage(project)] == [True]
    assert len(Project(project.path).generation("motion").check_files()) == 1
    assert sorted(shown(project)) == ["m0", "m2"]
    assert mended(project) == []


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_clock_that_is_wrong_by_an_hour_changes_nothing(tmp_path, hours):
    project = made(tmp_path)
    generation = project.generation("motion")
    here = generation.committed()[1]["time"]
    generation.commit(1, "m1", values(11.0), attempt=2, time=here + 3600.0 * hours)
    assert shown(project)["m1"] == 11.0
    generation.commit_failure(1, "m1", "OSError", "gone", 1, attempt=3, time=here + 7200.0)
    assert shown(project)["m1"] == 11.0
    generation.commit_failure(1, "m1", "OSError", "gone", 1, attempt=1, revision=1, time=here - 7200.0)
    assert "m1" not in shown(project)
    generation.commit(1, "m1", values(12.0), attempt=2, revision=1, time=here - 7000.0)
    assert shown(project)["m1"] == 12.0


def test_an_orphan_of_a_killed_writer_is_told_and_left_alone(tmp_path):
    project = made(tmp_path)
    orphan = shard(project, 1).with_name("0.node.99.part")
    orphan.write_bytes(b"half a shard")
    assert next(p for p in project.verify() if str(orphan) in p).startswith("left over from a killed process, harmless")
    mended(project)
    assert orphan.exists()


def test_a_damaged_registry_line_costs_nothing_after_the_next_run(tmp_path):
    for at in (25, -25):  # the first row, and the last, which leaves no gap
        folder = tmp_path / str(at)
        project = made(folder)
        flip(project.path / "items.jsonl", at)
        found = damage(project)
        assert len(found) == 1
        assert f"the line of row {0 if at > 0 else 2} is damaged" in found[0]
        again = Project(project.path)
        new = again.update_exposures([Arrival("new", "new content", {"size": 9})], complete=False).items
        assert new[0].row == 3  # never the row of another micrograph
        assert mended(project) == []
        assert [item.name for item in Project(project.path).items()] == ["m0", "m1", "m2", "new"]


def test_a_damaged_compaction_is_told_and_harms_nobody(tmp_path):
    project = made(tmp_path)
    generation = project.generation("motion")
    generation.compact()
    file = generation.path / "columns.npz"
    whole = file.read_bytes()
    for at in range(0, len(whole), 31):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        assert shown(project) == {"m0": 0.0, "m1": 1.0, "m2": 2.0}
        assert damage(project) == []
    file.write_bytes(whole[: len(whole) // 2])
    assert any("columns.npz: damaged" in p and "rebuilt" in p for p in project.verify())
    assert shown(project) == {"m0": 0.0, "m1": 1.0, "m2": 2.0}
    Project(project.path).generation("motion").compact()
    assert project.verify() == []
    assert file.read_bytes() == whole


def test_what_is_taken_back_leaves_the_compaction_as_well(tmp_path):
    project = made(tmp_path)
    project.generation("motion").compact()
    flip(shard(project, 1), 17)
    project.repair()
    assert sorted(shown(project)) == ["m0", "m2"]
    Project(project.path).generation("motion").compact()
    assert sorted(shown(project)) == ["m0", "m2"]
    mended(project)


# --- inputs that change and go ------------------------------------------------------------------------------------------------


def test_results_of_a_removed_input_stay_and_one_without_results_is_hidden(tmp_path):
    project = made(tmp_path)
    project.generation("motion").commit_failure(2, "m2", "OSError", "gone", 1, revision=1)
    assert [f["name"] for f in project.failures()] == ["m2"]
    project.update_exposures(arrivals(1), complete=True)
    assert shown(project) == {"m0": 0.0, "m1": 1.0}
    assert [(item.name, item.there) for item in project.items()] == [("m0", True), ("m1", False)]
    assert Project(project.path).failures() == []
    assert "2/2" in repr(Project(project.path))
    back = project.update_exposures(arrivals(), complete=True).items
    assert [(item.row, item.revision, item.there) for item in back] == [(0, 0, True), (1, 0, True), (2, 0, True)]
    assert [f["name"] for f in project.failures()] == ["m2"]
    assert shown(project) == {"m0": 0.0, "m1": 1.0}
    assert project.verify() == []


def test_results_of_a_forgotten_input_are_hidden_and_come_back_with_it(tmp_path):
    project = made(tmp_path)
    project.generation("motion").commit_failure(2, "m2", "OSError", "gone", 1, revision=1)
    assert [f["name"] for f in project.failures()] == ["m2"]
    assert [item.name for item in project.forget_exposures(["m1", "m2"])] == ["m1", "m2"]
    assert shown(project) == {"m0": 0.0}
    assert Project(project.path).failures() == []
    assert "1/1" in repr(Project(project.path))
    assert sorted(Project(project.path).joined()["micrograph"].values) == ["m0"]
    project.update_exposures(arrivals(), complete=True)
    assert shown(project) == {"m0": 0.0}
    back = project.forget_exposures(["m1"], undo=True)
    assert (back[0].row, back[0].revision) == (1, 0)
    assert shown(project) == {"m0": 0.0, "m1": 1.0}
    assert project.verify() == []


def test_a_result_of_an_earlier_input_is_not_shown_until_it_is_made_again(tmp_path):
    project = made(tmp_path)
    generation = project.generation("motion")
    old = project.items()[1]
    generation.commit(1, "m1", values(1.0), revision=0, attempt=2, input=old.fingerprint)
    new = project.update_exposures([Arrival("m1", old.content, {"defocus_u_angstrom": 77})], complete=False).items[0]
    assert (new.row, new.revision) == (1, 1)
    assert sorted(shown(project)) == ["m0", "m2"]
    generation.commit(1, "m1", values(5.0), revision=1, attempt=1, input=new.fingerprint)
    assert shown(project)["m1"] == 5.0
    generation.commit(1, "m1", values(5.0), revision=0, attempt=99, input=old.fingerprint)  # a straggler with the old input
    assert generation.committed()[1]["revision"] == 1
