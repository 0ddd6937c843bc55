"""What was removed on purpose is away, not lost: results stay, nothing is recomputed, and what needs the pixels names the command."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

import _toy_stages as toys
import numpy as np
import pytest
from _command import command
from _toy_session import MOVIES, change, finished, run
from distributed import Client

from cryodask.errors import AwayError, StoreError
from cryodask.run.preview import preview
from cryodask.run.recipe import make_plan
from cryodask.store import environments
from cryodask.store.away import Ledger, row_ranges
from cryodask.store.project import Project
from cryodask.tiers.archive import archive, restore
from cryodask.tiers.thin import thin


@pytest.fixture(scope="module")
def here():
    """A cluster in this process: the toy stages are known here only."""
    with Client(processes=False, n_workers=1, threads_per_worker=1, dashboard_address=None) as client:
        yield client


@pytest.fixture
def session(tmp_path_factory, here, tmp_path) -> Path:
    return finished(tmp_path_factory, here, tmp_path / "session")


def made(project: Project) -> dict[tuple[str, int], float]:
    """When each current result was computed."""
    records = {label: project.generation(label).committed() for label in project.stages}
    return {(label, row): record["time"] for label, some in records.items() for row, record in some.items()}


def images(project: Project, label: str, name: str) -> list[np.ndarray]:
    generation = project.generation(label)
    return [np.asarray(generation.read(r, name)[:]) for _, r in sorted(generation.committed().items())]


def shards(session: Path, label: str, name: str) -> list[Path]:
    generation = Project(session / "toy").generation(label)
    return [generation.shard_of(record, name) for record in generation.committed().values()]


# --- the three faults that made archiving impossible ----------------------------------------------------------------------------
def test_shards_that_were_archived_are_not_made_again(session, here):
    before = made(Project(session / "toy"))
    archive(session / "toy", str(session / "archive"), ["shards"])
    assert not any(path.exists() for path in shards(session, "ingest", "movie"))
    said: list[str] = []
    assert made(run(session, here, said)) == before
    assert not [text for text in said if "missing" in text or "recomputed" in text]


def test_half_of_the_movies_away_hides_nothing_and_is_no_news(session, here):
    before = Project(session / "toy")
    archive(session / "toy", str(session / "archive"), ["originals"], rows=range(0, MOVIES, 2))
    assert len(list((session / "movies").glob("*.mrc"))) == MOVIES // 2
    said: list[str] = []
    after = run(session, here, said)
    assert made(after) == made(before)
    assert not [text for text in said if "no longer" in text]
    assert all(item.there for item in after.items())
    assert len(after.items()) == MOVIES
    assert after.overview() == before.overview()


@pytest.mark.parametrize("categories", [["originals"], ["originals", "shards"]], ids=str)
def test_with_all_pixels_away_a_new_classification_runs(session, here, categories):
    before = Project(session / "toy")
    archive(session / "toy", str(session / "archive"), categories)
    assert [step.todo for step in preview(make_plan(session / "toy.yaml")).steps] == [0] * len(before.stages)
    change(session, 4, {"toy_classify": {"number": 2}})
    after = run(session, here)
    assert after.generation("toy_classify").key != before.generation("toy_classify").key
    assert after.particles("toy_classify").sizes["particle"] == before.particles("toy_classify").sizes["particle"] > 0
    kept = {k: v for k, v in made(after).items() if k[0] != "toy_classify"}
    assert kept == {k: v for k, v in made(before).items() if k in kept}


def test_info_and_verify_say_where_it_is(session):
    archive(session / "toy", str(session / "archive"), ["originals", "shards"])
    shown = command("info", session / "toy").stdout
    assert f"originals, {MOVIES} files" in shown
    assert str(session / "archive") in shown
    verified = command("verify", session / "toy")
    assert (verified.returncode, "intact or away on purpose" in verified.stdout) == (0, True)
    assert f"shards, {MOVIES} files" in verified.stdout


def test_a_file_that_is_missing_without_a_line_is_lost_as_before(session):
    archive(session / "toy", str(session / "archive"), ["shards"], rows=[0])
    shards(session, "ingest", "movie")[3].unlink()
    (problem,) = Project(session / "toy").verify()
    assert "missing, though m3 is committed" in problem


def test_a_shard_that_came_back_with_other_bytes_is_damaged(session):
    archive(session / "toy", str(session / "archive"), ["shards"], rows=[0])
    shards(session, "ingest", "movie")[0].write_bytes(b"something else")
    (problem,) = Project(session / "toy").verify()
    assert "damaged" in problem


# --- what needs the pixels ------------------------------------------------------------------------------------------------------
def test_a_step_that_needs_archived_pixels_stops_before_work_and_names_the_command(session, here):
    before = Project(session / "toy")
    archive(session / "toy", str(session / "archive"), ["micrographs"], rows=[1, 2, 4])
    change(session, 2, {"toy_pick": {"number": 3}})
    with pytest.raises(AwayError) as error:
        run(session, here)
    assert f"cryodask restore {session / 'toy'} --what micrographs --rows 1-2,4" in str(error.value)
    assert "step toy_pick needs them" in str(error.value)
    restore(session / "toy", ["micrographs"], rows=[1, 2, 4])
    after = run(session, here)
    assert made(after)["toy_motion", 1] == made(before)["toy_motion", 1]
    assert len(after.table("toy_pick")) == MOVIES


def test_movies_read_in_place_that_are_away_are_named_too(session, here):
    content = (session / "toy.yaml").read_text().replace("pipeline:\n", "pipeline:\n- ingest: {storage: in_place}\n")
    (session / "toy.yaml").write_text(content)
    run(session, here)
    archive(session / "toy", str(session / "archive"), ["originals"])
    change(session, 1, {"toy_motion": {"number": 5}})
    with pytest.raises(AwayError, match="--what originals --rows 0-5"):
        run(session, here)


def test_reading_an_archived_array_names_the_command(session):
    archive(session / "toy", str(session / "archive"), ["micrographs", "maps", "particles"])
    project = Project(session / "toy")
    record = project.generation("toy_motion").committed()[2]
    with pytest.raises(AwayError, match="--what micrographs --rows 2"):
        project.generation("toy_motion").read(record, "micrograph_sum")
    lazy = project["toy_refine"]["final_map"]
    assert lazy.shape == (4, 4, 4)
    with pytest.raises(AwayError, match="--what maps"):  # zarr alone would give zeros
        lazy.compute()
    particles = project.particles("toy_classify")
    assert particles.sizes["particle"]
    with pytest.raises(AwayError, match="--what particles"):
        particles["particle_image"].compute()


def test_results_that_are_away_are_linked_into_another_generation(session, here):
    before = Project(session / "toy")
    change(session, 0, {"toy_motion": {"number": 7}})
    run(session, here)
    change(session, 0, "toy_motion")
    shutil.rmtree(before.generation("toy_extract").path)
    archive(session / "toy", str(session / "archive"), ["shards"])
    after = run(session, here)
    assert made(after)["ingest", 0] == made(before)["ingest", 0]
    assert after.verify() == []


# --- thinned ----------------------------------------------------------------------------------------------------------------------
def test_thinned_arrays_come_back_bit_identical_when_they_are_needed(session, here):
    before = Project(session / "toy")
    crcs = {label: [r["shards"] for r in before.generation(label).committed().values()] for label in ("toy_motion", "toy_extract")}
    sums = images(before, "toy_motion", "micrograph_sum")
    size = sum(path.stat().st_size for path in shards(session, "toy_motion", "micrograph_sum"))
    assert thin(session / "toy", "toy_motion", dry_run=True).bytes == size
    done = thin(session / "toy", "toy_motion")
    assert (done.files, done.bytes) == (MOVIES, size)
    thin(session / "toy", "toy_extract")
    assert Project(session / "toy").verify() == []
    assert made(run(session, here)) == made(before)  # nothing needs them
    assert not any(path.exists() for path in shards(session, "toy_motion", "micrograph_sum"))
    change(session, 4, {"toy_classify": {"number": 2}})
    said: list[str] = []
    after = run(session, here, said)
    for label in crcs:
        assert f"{label}: {MOVIES} exposures recomputed, bit-identical to the stored checksums" in said
        assert [r["shards"] for r in after.generation(label).committed().values()] == crcs[label]
    assert all(np.array_equal(a, b) for a, b in zip(sums, images(after, "toy_motion", "micrograph_sum")))
    assert after.generation("toy_refine").key == before.generation("toy_refine").key
    assert after.verify() == []
    assert made(run(session, here)) == made(after)


def test_thinned_shards_of_the_camera_are_made_again_from_the_originals(session, here):
    thin(session / "toy", "ingest")
    change(session, 0, {"toy_motion": {"number": 2}})
    said: list[str] = []
    after = run(session, here, said)
    assert f"ingest: {MOVIES} exposures recomputed, bit-identical to the stored checksums" in said
    assert len(after.table("toy_motion")) == MOVIES


def test_what_was_recomputed_in_another_environment_says_so(session, here, monkeypatch):
    thin(session / "toy", "toy_motion")
    was = environments.environment()
    monkeypatch.setattr(environments, "environment", lambda: {**was, "numpy": "9.9"})

    def other(params, **values):
        given = toys.toy_motion.functions(params, **values)
        return {**given, "micrograph_sum": given["micrograph_sum"] + np.float32(1)}

    monkeypatch.setitem(toys.stage.__globals__["STAGES"], "toy_motion", dataclasses.replace(toys.toy_motion, target=other))
    change(session, 1, {"toy_ctf": {"number": 2}})
    said: list[str] = []
    after = run(session, here, said)
    (text,) = [t for t in said if "differ from the stored checksums" in t]
    assert f"{MOVIES} of them" in text
    assert "numpy" in text
    assert "9.9" in text
    assert after.verify() == []


def test_thinned_arrays_whose_originals_are_archived_name_the_command(session, here):
    thin(session / "toy", "ingest")
    archive(session / "toy", str(session / "archive"), ["originals"])
    change(session, 0, {"toy_motion": {"number": 2}})
    with pytest.raises(AwayError, match="--what originals --rows 0-5"):
        run(session, here)
    restore(session / "toy")
    assert len(run(session, here).table("toy_motion")) == MOVIES


@pytest.mark.parametrize(("label", "why"), [("toy_refine", "over a set"), ("toy_pick", "born")], ids=str)
def test_steps_that_must_stay_are_not_thinned(session, label, why):
    with pytest.raises(StoreError, match=why):
        thin(session / "toy", label)


def test_what_is_named_or_behind_it_is_not_thinned(session):
    with Project(session / "toy").lock():
        Project(session / "toy").keep("toy_refine", "best")
    for label in ("toy_extract", "toy_motion"):
        with pytest.raises(StoreError, match="named"):
            thin(session / "toy", label)


def test_what_cannot_be_recomputed_stays_and_is_said(session):
    (session / "movies" / "m2.mrc").unlink()
    done = thin(session / "toy", "ingest")
    assert done.files == MOVIES - 1
    assert any("1 of the exposures" in text for text in done.kept)
    assert shards(session, "ingest", "movie")[2].exists()


def test_files_shared_with_other_results_are_not_counted_as_freed(session):
    sizes = [path.stat().st_size for path in shards(session, "toy_motion", "micrograph_sum")]
    os.link(shards(session, "toy_motion", "micrograph_sum")[0], session / "shared")
    done = thin(session / "toy", "toy_motion")
    assert done.bytes == sum(sizes[1:])
    assert any("share" in text for text in done.kept)


def test_results_that_gc_has_removed_are_not_brought_back(session, here):
    archive(session / "toy", str(session / "archive"), ["micrographs"])
    old = Project(session / "toy").generation("toy_motion").path
    shutil.rmtree(old)
    assert Ledger(session / "toy").absent() == {}
    assert restore(session / "toy").files == 0
    assert not old.exists()


def test_a_report_is_written_while_images_are_away(session):
    from cryodask.report import write_report

    archive(session / "toy", str(session / "archive"), ["originals", "shards", "micrographs", "particles", "maps"])
    assert "toy_motion" in write_report(Project(session / "toy")).read_text()


def test_the_ledger_survives_a_torn_line(session):
    archive(session / "toy", str(session / "archive"), ["originals"], rows=[0])
    journal = next((session / "toy" / "tiers").rglob("*.jsonl"))
    with open(journal, "ab") as file:
        file.write(b"1234abcd {half a li")
    assert set(Ledger(session / "toy").absent()) == {"inputs:movies/m0.mrc"}
    archive(session / "toy", str(session / "archive"), ["originals"])
    assert len(Ledger(session / "toy").absent()) == MOVIES


def test_ranges_of_rows():
    assert row_ranges([7, 0, 1, 2, 4]) == "0-2,4,7"
