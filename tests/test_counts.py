"""What is computed again, counted: on 200 exposures, on branches, and when a session grows while a step runs. Toy stages, real runner."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import _toy_stages as toys
import numpy as np
import pytest
import yaml
from _told import Told
from distributed import Client
from pydantic import Field

from cryodask.formats.movies import write_mrc_movie
from cryodask.run.preview import preview
from cryodask.run.recipe import draft_plan, make_plan
from cryodask.run.session import run_plan
from cryodask.stage import STAGES, AddedMark
from cryodask.store.births import Birth, born
from cryodask.store.identity import half_sets
from cryodask.store.project import Project

pytestmark = pytest.mark.heavy

PIPELINE = [
    "toy_motion",
    "toy_ctf",
    "toy_pick",
    "toy_extract",
    "toy_classify",
    {"toy_curate": {}},
    {"toy_extract as full": {"number": 3}},
    "toy_poses",
    "toy_polish",
]


@pytest.fixture(scope="module")
def here():
    """A cluster in this process: the toy stages are known here only."""
    with Client(processes=False, n_workers=1, threads_per_worker=1, dashboard_address=None) as client:
        yield client


def movie(folder: Path, number: int) -> None:
    frames = np.random.default_rng(number).poisson(2.0, (2, 16, 16)).astype(np.uint8)
    write_mrc_movie(folder / "movies" / f"m{number:03d}.mrc", frames, 1.0)


def write(folder: Path, pipeline=PIPELINE) -> Path:
    content = {
        "name": "toy",
        "inputs": {"movies": "movies/*.mrc"},
        "microscope": {"voltage_kv": 300, "spherical_aberration_mm": 2.7, "pixel_size_angstrom": 1.0},
        "pipeline": pipeline,
    }
    (folder / "toy.yaml").write_text(yaml.safe_dump(content))
    return folder / "toy.yaml"


def session(folder: Path, count: int) -> Path:
    (folder / "movies").mkdir()
    for number in range(count):
        movie(folder, number)
    return folder


def run(folder: Path, here, pipeline=PIPELINE, **options) -> Project:
    return run_plan(make_plan(write(folder, pipeline)), here, **options)


def made(project: Project) -> dict[tuple[str, str], float]:
    """When each current result was computed, by step and item; what was taken over keeps the time when it was computed."""
    out = {}
    for label in project.stages:
        for record in project.records(label).values():
            out[label, record["name"]] = record.get("computed", record["time"])
    return out


def renewed(before: Project | dict, after: Project) -> dict[str, int]:
    """How many items of each step were computed."""
    old = before if isinstance(before, dict) else made(before)
    counts: dict[str, int] = {}
    for (label, name), when in made(after).items():
        if old.get((label, name)) != when:
            counts[label] = counts.get(label, 0) + 1
    return counts


def test_counted_on_200_exposures(tmp_path, here):
    folder = session(tmp_path, 200)
    first = run(folder, here)
    assert first.failures() == []
    before = made(first)
    # every exposure has particles at y = 4, 8 and 10
    assert len(first.sets.ids(first.product("toy_curate", "particles"))) == 600
    # ten movies more: ten items per step
    for number in range(200, 210):
        movie(folder, number)
    grown = run(folder, here)
    per_exposure = ("ingest", "toy_motion", "toy_ctf", "toy_pick", "toy_extract", "full")
    counts = renewed(before, grown)
    assert {label: counts[label] for label in per_exposure} == dict.fromkeys(per_exposure, 10)
    # polishing reads a map that all particles made: all of it
    assert counts["toy_polish"] == 210
    # a curation that changes two exposures: two are cut again
    ids = grown.particles("toy_curate")["particle_id"].values
    assert len(ids) == 630
    fewer = [*PIPELINE[:5], {"toy_curate": {"leave_out": ids[[33, 34, 200]].tolist()}}, *PIPELINE[6:]]
    changed = run(folder, here, fewer)
    counts = renewed(grown, changed)
    assert {label: counts.get(label, 0) for label in (*per_exposure, "toy_curate")} == {
        **dict.fromkeys(per_exposure, 0), "full": 2, "toy_curate": 1,
    }  # fmt: skip
    assert len(changed.particles("toy_poses")["particle_id"]) == 627
    # and the same curation again: nothing
    assert renewed(changed, run(folder, here, fewer)) == {}


def test_the_same_curation_again_computes_nothing(tmp_path, here):
    folder = session(tmp_path, 6)
    before = made(run(folder, here))
    changed = run(folder, here, [*PIPELINE[:5], {"toy_curate": {"leave_out_above": 11.0}}, *PIPELINE[6:]])
    counts = renewed(before, changed)
    assert counts == {"toy_curate": 1}, "another limit that keeps the same particles"
    assert sum(r.get("linked") is not None for r in changed.records("full").values()) == 6
    fewer = run(folder, here, [*PIPELINE[:5], {"toy_curate": {"leave_out_above": 9.0}}, *PIPELINE[6:]])
    assert renewed(made(changed), fewer) == {"toy_curate": 1, "full": 6, "toy_poses": 1, "toy_polish": 6}
    back = run(folder, here, [*PIPELINE[:5], {"toy_curate": {"leave_out_above": 11.0}}, *PIPELINE[6:]])
    assert renewed(made(changed), back) == {}, "what was there before is found again"


def test_renaming_a_step_or_inserting_one_that_gives_nothing_used_computes_nothing(tmp_path, here):
    folder = session(tmp_path, 5)
    before = {(label.replace("full", "large"), name.replace("full", "large")): t for (label, name), t in made(run(folder, here)).items()}
    renamed = [{"toy_extract as large": {"number": 3}} if isinstance(s, dict) and "toy_extract as full" in s else s for s in PIPELINE]
    assert renewed(before, run(folder, here, renamed)) == {}
    inserted = [*renamed[:4], {"toy_ctf as beside": {"number": 7, "from": {"exposures": "toy_motion"}}}, *renamed[4:]]
    inserted[5] = {"toy_classify": {"from": {"exposures": "toy_ctf"}}}
    inserted[8] = {"toy_poses": {"from": {"exposures": "toy_ctf"}}}
    assert set(renewed(before, run(folder, here, inserted))) == {"beside"}


def test_only_the_changed_branch_is_computed_again(tmp_path, here):
    folder = session(tmp_path, 5)
    branches = [
        *PIPELINE[:6],
        {"toy_extract as a": {"number": 3}},
        {"toy_poses as pa": {}},
        {"toy_extract as b": {"number": 4, "from": {"particles": "toy_curate"}}},
        {"toy_poses as pb": {}},
    ]
    before = made(run(folder, here, branches))
    changed = [*branches[:8], {"toy_extract as b": {"number": 5, "from": {"particles": "toy_curate"}}}, branches[9]]
    assert renewed(before, run(folder, here, changed)) == {"b": 5, "pb": 1}


def test_two_steps_that_ask_for_the_same_share_one_result(tmp_path, here):
    folder = session(tmp_path, 3)
    twice = [*PIPELINE[:7], {"toy_extract as copy": {"number": 3, "from": {"particles": "toy_curate"}}}]
    project = run(folder, here, twice)
    assert project.generation("full").path == project.generation("copy").path


def test_toy_polishing_gets_frames_poses_and_the_map(tmp_path, here):
    folder = session(tmp_path, 4)
    project = run(folder, here)
    polished = project.particles("toy_polish")
    assert "particle_brightness" in polished
    for i in range(polished.sizes["particle"]):
        one = polished.isel(particle=i)
        frames = project["ingest"]["movie"].sel(micrograph=str(one["micrograph"].values)).values.astype(float).sum(0)
        y, x = (int(np.round(float(one[f"centre_{a}_angstrom"]))) for a in "yx")
        expected = frames[y, x] + project["toy_poses"]["final_map"].values.mean()
        assert float(one["particle_brightness"]) == pytest.approx(expected)
    # centres are places: box centre minus origin
    assert np.allclose(polished["centre_y_angstrom"], polished["particle_y"] - 0.75)
    # frames of movies that were archived after a chunked ingest are still there, even where the folder is gone
    shutil.rmtree(folder / "movies")
    again = run(folder, here, [*PIPELINE[:8], {"toy_polish": {"number": 2}}])
    assert len(again.items()) == 4
    assert again.failures() == []


def test_movies_that_left_block_only_what_needs_the_frames_of_a_referenced_ingest(tmp_path, here):
    folder = session(tmp_path, 4)
    pipeline = [{"ingest": {"storage": "in_place"}}, *PIPELINE[:8]]
    before = made(run(folder, here, pipeline))
    (folder / "movies" / "m002.mrc").rename(tmp_path / "elsewhere.mrc")
    after = run(folder, here, pipeline)
    assert renewed(before, after) == {}
    polish = run(folder, here, [*pipeline, "toy_polish"])
    assert [f["name"] for f in polish.failures()] == ["m002"]
    assert len(polish["toy_polish"]["micrograph"]) == 3


def test_a_movie_collected_again_under_its_name_is_another_exposure(tmp_path, here):
    folder = session(tmp_path, 3)
    first = run(folder, here)
    ids = first.particles("toy_poses")["particle_id"].values
    movie(folder, 77)
    os.replace(folder / "movies" / "m077.mrc", folder / "movies" / "m001.mrc")
    second = run(folder, here)
    rows = {item.name: item.row for item in second.items()}
    assert rows == {"m000": 0, "m001": 3, "m002": 2}
    assert len(second.particles("toy_poses")["particle_id"]) == len(ids)
    kept = np.intersect1d(second.particles("toy_poses")["particle_id"].values, ids)
    assert len(kept) == 6, "particles of the former exposure never become those of the new one"


def test_a_birth_computed_again_keeps_ids_and_halves(tmp_path, here):
    folder = session(tmp_path, 3)
    first = run(folder, here)
    before = first.particles("toy_poses").load()
    again = run(folder, here, start_again_from="toy_pick")
    after = again.particles("toy_poses").load()
    assert (after["particle_id"].values == before["particle_id"].values).all()
    assert (after["half_set"].values == before["half_set"].values).all()


def test_one_lost_one_new_and_places_moved_a_little():
    rng = np.random.default_rng(1)
    y, x = rng.uniform(0, 4000, (2, 200)).astype(np.float32)
    score = rng.uniform(1, 9, 200).astype(np.float32)
    birth = Birth(3, seed=5)
    first = born(birth, 12, {"pick_y": y, "pick_x": x, "pick_score": score}, None)
    order = np.argsort(-score, kind="stable")
    assert (np.diff(first["particle_id"][order]) > 0).all(), "numbers follow falling scores: a threshold keeps a prefix"
    keep = np.delete(np.arange(200), 17)
    moved = {
        "pick_y": np.append(y[keep] + 0.05, 4100).astype(np.float32),
        "pick_x": np.append(x[keep] - 0.05, 4100).astype(np.float32),
        "pick_score": np.append(score[keep][::-1], 5.0).astype(np.float32),
    }
    second = born(birth, 12, moved, first)
    assert (second["particle_id"][:199] == first["particle_id"][keep]).all()
    assert (second["particle_half"][:199] == first["particle_half"][keep]).all()
    new = second["particle_id"][199]
    assert new == first["particle_id"].max() + (1 << 7)
    assert second["particle_id"][200] == first["particle_id"][17]
    assert np.isnan(second["pick_score"][200]), "no longer found: its number is never given again"
    third = born(birth, 12, {"pick_y": y, "pick_x": x, "pick_score": score}, second)
    assert (third["particle_id"][:200] == first["particle_id"]).all(), "what comes back is who it was"
    assert (half_sets(first["particle_id"], 5) == first["particle_half"]).all()


def test_a_step_that_was_killed_while_the_session_grew_finishes_its_set_first(tmp_path, here, monkeypatch):
    folder = session(tmp_path, 4)
    marker = str(tmp_path / "died")  # a file: the class travels by value, and with it whatever a list would hold

    def dies(params, state):
        import os

        if state["iteration"] == 1 and not os.path.exists(marker):
            open(marker, "w", encoding="utf-8").close()
            raise RuntimeError("killed")
        return state["iteration"] > 0

    monkeypatch.setattr(toys.toy_poses.functions, "finished", staticmethod(dies))
    with pytest.raises(RuntimeError, match="killed"):
        run(folder, here, PIPELINE[:8])
    monkeypatch.undo()
    for number in range(4, 7):
        movie(folder, number)
    told = Told()
    project = run(folder, here, PIPELINE[:8], listen=[told])
    assert any("resumes with the 12 particles" in text for text in told.said), told.said
    finished = [m for m in project.history("toy_poses") if m.finished]
    assert len(finished) == 2
    assert len(project.particles("toy_poses")["particle_id"]) == 21


CHANGES = [
    ("a parameter of motion", 0, {"toy_motion": {"number": 2}}, {"toy_motion", "toy_ctf", "toy_pick", "toy_extract", "toy_classify",
     "toy_curate", "full", "toy_poses", "toy_polish"}),
    ("a parameter of the CTF", 1, {"toy_ctf": {"number": 2}}, {"toy_ctf", "toy_classify", "toy_curate", "toy_poses", "toy_polish"}),
    ("a parameter of picking", 2, {"toy_pick": {"number": 2}}, {"toy_pick", "toy_extract", "toy_classify", "toy_curate", "full",
     "toy_poses", "toy_polish"}),
    ("a parameter of the first extraction", 3, {"toy_extract": {"number": 2}}, {"toy_extract", "toy_classify", "toy_curate"}),
    ("a parameter of the classes", 4, {"toy_classify": {"number": 2}}, {"toy_classify", "toy_curate"}),
    ("a curation that keeps the same", 5, {"toy_curate": {"leave_out_above": 99.0}}, {"toy_curate"}),
    ("a curation that keeps fewer", 5, {"toy_curate": {"leave_out_above": 5.0}}, {"toy_curate", "full", "toy_poses", "toy_polish"}),
    ("a parameter of the second extraction", 6, {"toy_extract as full": {"number": 9}}, {"full", "toy_poses", "toy_polish"}),
    ("a parameter of the refinement", 7, {"toy_poses": {"number": 2}}, {"toy_poses", "toy_polish"}),
    ("a parameter of polishing", 8, {"toy_polish": {"number": 2}}, {"toy_polish"}),
    ("a parameter given as its default", 8, {"toy_polish": {"number": 1.0}}, set()),
]  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory, here) -> Path:
    folder = session(tmp_path_factory.mktemp("changes"), 3)
    run(folder, here)
    return folder


@pytest.mark.parametrize(("what", "place", "step", "expected"), CHANGES, ids=[c[0] for c in CHANGES])
def test_each_change_reruns_exactly_the_steps_that_read_it(base, here, tmp_path, what, place, step, expected):
    folder = tmp_path / "p"
    shutil.copytree(base, folder)
    before = made(Project(folder / "toy"))
    changed = [*PIPELINE[:place], step, *PIPELINE[place + 1 :]]
    told = {s.step for s in preview(make_plan(write(folder, changed))).steps if not s.done}
    assert set(renewed(before, run(folder, here, changed))) == expected
    assert expected <= told, "the dry run announces at least what is computed"


def test_a_step_of_a_person_waits_and_what_does_not_need_it_goes_on(tmp_path, here):
    folder = session(tmp_path, 3)
    pipeline = [*PIPELINE[:5], "annotate", {"toy_extract as full": {"number": 3}}, {"toy_poses": {"from": {"particles": "toy_extract"}}}]
    project = run(folder, here, pipeline)
    assert "annotate" not in project
    assert "full" not in project
    assert len(project.particles("toy_poses")["particle_id"]) == 9
    told = {s.step: s.why for s in preview(make_plan(folder / "toy.yaml")).steps}
    assert told["annotate"] == "waits for a person"
    assert told["full"] == "waits for annotate"
    assert told["toy_poses"] == ""
    ids = project.particles("toy_classify")["particle_id"].values
    (folder / "notes.csv").write_text("particle_id,value\n" + "".join(f"{i},{k}\n" for k, i in enumerate(ids[:4].tolist())))
    decided = [*pipeline[:5], {"annotate": {"file": "notes.csv"}}, *pipeline[6:]]
    after = run(folder, here, decided)
    noted = after.particles("full")["annotation"].values
    assert noted[:4].tolist() == [0.0, 1.0, 2.0, 3.0]
    assert np.isnan(noted[4:]).all()


def test_numbers_that_a_person_chose_belong_to_one_classification(tmp_path, here):
    from cryodask.errors import ProjectFileError

    folder = session(tmp_path, 3)
    curated = [*PIPELINE[:5], {"curate": {"keep": [1]}}]
    run(folder, here, curated)
    other = [*PIPELINE[:4], {"toy_classify": {"number": 2}}, {"curate": {"keep": [1]}}]
    with pytest.raises(ProjectFileError, match=r"classes 1 were chosen from toy_classify@\w+; toy_classify is now toy_classify@\w+"):
        run(folder, here, other)
    with pytest.raises(ProjectFileError, match=r"class 1 -> 1 \(100% of its particles\)"):
        run(folder, here, other)
    assert len(run(folder, here, other, update=["curate"]).particles("curate")["particle_id"]) == 9
    run(folder, here, other)


def test_a_pinned_generation_is_taken_and_an_unknown_one_refused(tmp_path, here):
    folder = session(tmp_path, 3)
    first = run(folder, here, PIPELINE[:8])
    key = first.generation("toy_poses").key
    value = float(first["toy_poses"]["final_map"].values.mean())
    pinned = [*PIPELINE[:7], {"toy_poses": {"number": 5}}, {"toy_polish": {"from": {"map": f"toy_poses@{key[:6]}"}}}]
    project = run(folder, here, pinned)
    assert project.generation("toy_poses").key != key
    polished = project.particles("toy_polish")
    one = polished.isel(particle=0)
    frames = project["ingest"]["movie"].sel(micrograph=str(one["micrograph"].values)).values.astype(float).sum(0)
    y, x = (int(np.round(float(one[f"centre_{a}_angstrom"]))) for a in "yx")
    assert float(one["particle_brightness"]) == pytest.approx(frames[y, x] + value)
    wrong = [*pinned[:-1], {"toy_polish": {"from": {"map": "toy_poses@ffff"}}}]
    assert "matches no results" in preview(draft_plan(write(folder, wrong))).problems[0]


def test_history_compare_keep_and_gc_on_five_generations(tmp_path, here):
    folder = session(tmp_path, 3)
    for number in (1, 2, 3, 4, 5):
        project = run(folder, here, [*PIPELINE[:7], {"toy_poses": {"number": number}}])
    made_ = project.history("toy_poses")
    assert [m.params["number"] for m in made_] == [1, 2, 3, 4, 5]
    assert [bool(m.steps) for m in made_] == [False] * 4 + [True]
    table = project.compare(f"toy_poses@{made_[0].key}", "toy_poses")
    assert table.loc["param number"].tolist() == [1.0, 5.0]
    old = project["toy_poses", made_[1].key]
    assert old["final_map"].shape == (4, 4, 4)
    assert old.attrs["label"] == "toy_poses"
    project.keep(f"toy_poses@{made_[2].key}", "best so far")
    gone = {p.name for p in project.superseded()}
    assert gone == {made_[0].key, made_[1].key, made_[3].key}
    # a typo in the pipeline takes the step away: its last finished result stays
    fewer = run(folder, here, PIPELINE[:7])
    assert made_[4].key not in {p.name for p in fewer.superseded()}
    assert made_[4].key in {p.name for p in fewer.superseded(last_results=True)}
    assert fewer.collect_garbage() > 0
    assert {m.key for m in fewer.history("toy_poses")} == {made_[2].key, made_[4].key}
    assert fewer.verify() == []
    with pytest.raises(KeyError, match="Did you mean 'toy_pick'"):
        fewer["toy_pic"]


class WithMore(toys.ToyParams):
    more: Annotated[int, AddedMark] = Field(1, description="came later")


def test_a_parameter_that_came_later_recomputes_nothing_until_it_is_given(tmp_path, here, monkeypatch):
    folder = session(tmp_path, 3)
    before = made(run(folder, here, PIPELINE[:3]))
    monkeypatch.setitem(STAGES, "toy_ctf", replace(toys.toy_ctf, params=WithMore))
    after = run(folder, here, PIPELINE[:3])
    assert renewed(before, after) == {}
    assert renewed(before, run(folder, here, ["toy_motion", {"toy_ctf": {"more": 1}}, "toy_pick"])) == {}
    assert renewed(before, run(folder, here, ["toy_motion", {"toy_ctf": {"more": 2}}, "toy_pick"])) == {"toy_ctf": 3}
