"""Earlier results: what ``STEP@KEY`` is and what follows inherits, what gc keeps, what tells results apart, choices that belong to one."""

from __future__ import annotations

import json
import shutil
import sys

import _toy_stages  # noqa: F401  its stages are registered
import numpy as np
import pytest
import yaml
from test_counts import PIPELINE, here, movie, run, session, write  # noqa: F401  here is a fixture

from cryodask.cli import app
from cryodask.cli_history import open_project
from cryodask.errors import CryodaskError, InputError, ProjectFileError, StoreError
from cryodask.run.map import MapRunner
from cryodask.run.preview import preview
from cryodask.run.recipe import Plan, draft_plan, make_plan
from cryodask.run.session import run_plan
from cryodask.stages.select import class_numbers
from cryodask.store.identity import birth_of
from cryodask.store.project import Project

pytestmark = pytest.mark.heavy

ALL = "position_y_angstrom > 0"


def selected(source: str, stage: str = "select") -> dict:
    return {stage: {"where": ALL, "from": {"particles": source}}}


def cli(words: list[str]) -> int:
    """Exit status of a command, its error on stderr, as ``main`` gives them."""
    try:
        app(words, standalone_mode=False)
    except CryodaskError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def folders(paths) -> set[str]:
    return {f"{p.parent.name}/{p.name}" for p in paths}


# --- pins --------------------------------------------------------------------------------------------------------------------
def test_a_pinned_refinement_has_the_particles_that_it_had(tmp_path, here):  # noqa: F811
    """Every exposure has particles at y = 4, 8 and 10: a limit of 9 keeps 2 of 3."""
    folder = session(tmp_path, 3)

    def pipeline(limit, *more):
        return [*PIPELINE[:5], {"toy_curate": {"leave_out_above": limit}}, "toy_poses", *more]

    few = run(folder, here, pipeline(9.0)).generation("toy_poses").key
    many = run(folder, here, pipeline(99.0)).generation("toy_poses").key
    for limit, key, count in ((99.0, few, 6), (9.0, many, 9), (9.0, few, 6)):
        found = run(folder, here, pipeline(limit, selected(f"toy_poses@{key}"))).particles("select")
        assert found.sizes["particle"] == count
        assert np.isfinite(found["rot_deg"].values).all()


def test_what_follows_a_pinned_step_inherits_its_parts_and_its_map(tmp_path, here):  # noqa: F811
    folder = session(tmp_path, 3)
    first = run(folder, here, [*PIPELINE[:6], {"toy_extract as full": {"number": 3}}, "toy_poses"])
    old = {label: first.generation(label).key for label in ("full", "toy_poses", "toy_classify")}
    value = float(first["toy_poses"]["final_map"].values.mean())
    images = first["full"]["particle_image"].values
    now = [*PIPELINE[:6], {"toy_extract as full": {"number": 7}}, {"toy_poses": {"number": 4}}]
    pinned = [*now, selected(f"toy_poses@{old['toy_poses'][:6]}"), "toy_polish"]
    project = run(folder, here, pinned)
    parts = project.product("select", "particles").parts
    assert parts["image"] == f"toy_extract/{old['full']}"
    assert parts["pose"] == f"toy_poses/{old['toy_poses']}"
    # a step by the rules: the map that belongs to these poses is that of the same result
    assert set(project.step("toy_polish").inputs["map"][0].parts.values()) == {f"toy_poses/{old['toy_poses']}"}
    one = project.particles("toy_polish").isel(particle=0)
    frames = project["ingest"]["movie"].sel(micrograph=str(one["micrograph"].values)).values.astype(float).sum(0)
    y, x = (int(np.round(float(one[f"centre_{a}_angstrom"]))) for a in "yx")
    assert float(one["particle_brightness"]) == pytest.approx(frames[y, x] + value)
    shown = {s.step: s for s in preview(draft_plan(write(folder, pinned))).steps}
    assert shown["toy_polish"].inputs["map"] == f"toy_poses@{old['toy_poses']}"
    assert all(s.done for s in shown.values())
    # images of the extraction of before, through a selection
    project = run(folder, here, [*now, selected(f"full@{old['full']}")])
    got = project.particles("select")["particle_image"].values
    assert float(np.abs(got).max()) == float(np.nanmax(np.abs(images)))
    # another movie and another present pick leave the pinned one as it is
    movie(folder, 3)
    other = ["toy_motion", "toy_ctf", {"toy_pick": {"number": 9}}, *PIPELINE[3:5]]
    for source in (f"toy_classify@{old['toy_classify']}", f"toy_extract@{first.generation('toy_extract').key}"):
        found = run(folder, here, [*other, selected(source)]).particles("select")
        assert set(birth_of(found["particle_id"].values).tolist()) == {1}
        assert found.sizes["particle"] == 9


def test_pinned_exposures_are_read_where_they_lie_and_bear_the_same_particles(tmp_path, here):  # noqa: F811
    folder = session(tmp_path, 3)
    first = run(folder, here, PIPELINE[:4])
    motion, images = first.generation("toy_motion").key, first["toy_extract"]["particle_image"].values
    ids = first.particles("toy_extract")["particle_id"].values
    pipeline = [{"toy_motion": {"number": 2}}, "toy_ctf", "toy_pick"]
    second = run(folder, here, [*pipeline, "toy_extract"])
    assert set(birth_of(second.particles("toy_pick")["particle_id"].values).tolist()) == {2}
    np.testing.assert_array_equal(second["toy_extract"]["particle_image"].values, 2 * images)
    pick = {"toy_pick as again": {"from": {"exposures": f"toy_motion@{motion}"}}}
    cut = {"toy_extract as cut": {"number": 5, "from": {"particles": "again"}}}
    project = run(folder, here, [*pipeline, "toy_extract", pick, cut])
    assert project.failures() == []
    np.testing.assert_array_equal(project.particles("again")["particle_id"].values, ids)
    np.testing.assert_array_equal(project["cut"]["particle_image"].values, 5 * images)
    # and picked with another parameter: a birth of its own
    pick = {"toy_pick as again": {"number": 3, "from": {"exposures": f"toy_motion@{motion}"}}}
    project = run(folder, here, [*pipeline, "toy_extract", pick, cut])
    assert set(birth_of(project.particles("cut")["particle_id"].values).tolist()) == {3}
    # pins of pins, and what is computed before is found again
    assert run(folder, here, [*pipeline, "toy_extract", pick, cut, selected(f"cut@{project.generation('cut').key}")]).sets is not None


def test_a_pin_goes_on_to_mean_the_same_when_something_that_it_only_passes_on_changes(tmp_path, here):  # noqa: F811
    """``toy_extract`` does not read the CTF, so its key stays; what was pinned goes on with the CTF of then."""
    folder = session(tmp_path, 3)
    first = run(folder, here, PIPELINE[:4])
    key, ctf = first.generation("toy_extract").key, first.generation("toy_ctf").key
    pin = {"toy_poses as posed": {"from": {"particles": f"toy_extract@{key}"}}}
    run(folder, here, [*PIPELINE[:4], pin])
    for number in (2, 3):
        project = run(folder, here, ["toy_motion", {"toy_ctf": {"number": number}}, *PIPELINE[2:4], pin])
        assert project.generation("toy_extract").key == key
        assert project.step("posed").inputs["exposures"][0].parts["ctf"] == f"toy_ctf/{ctf}"
    assert f"toy_ctf/{ctf}" not in folders(project.superseded())


def test_a_result_can_be_set_beside_an_earlier_one_of_its_step(tmp_path, here):  # noqa: F811
    folder = session(tmp_path, 3)
    key = run(folder, here, PIPELINE[:8]).generation("toy_poses").key
    now = [*PIPELINE[:7], {"toy_poses": {"number": 2}}]
    both = {"consensus": {"largest_degrees": 5, "from": {"particles": "toy_poses", "other": f"toy_poses@{key}"}}}
    project = run(folder, here, [*now, both])
    assert project.particles("consensus").sizes["particle"] == 9
    assert project.step("consensus").inputs["other"][0].place == f"toy_poses/{key}"
    # united under another name, with the exposures that count
    some = {"select": {"where": "position_y_angstrom > 5", "from": {"particles": f"toy_poses@{key}"}}}
    united = {"merge": {"from": {"particles": ["toy_poses", "select"], "exposures": "toy_ctf"}}}
    assert run(folder, here, [*now, some, united]).particles("merge").sizes["particle"] == 9


def test_a_pinned_result_that_is_gone_is_refused_by_name_before_work(tmp_path, here):  # noqa: F811
    folder = session(tmp_path, 3)
    first = run(folder, here, [*PIPELINE[:6], {"toy_extract as full": {"number": 3}}, "toy_poses"])
    full, poses = first.generation("full").key, first.generation("toy_poses").key
    now = [*PIPELINE[:6], {"toy_extract as full": {"number": 7}}, "toy_poses"]
    run(folder, here, now)
    shutil.rmtree(first.path / "stages" / "toy_extract" / full)
    with pytest.raises(ProjectFileError, match=rf"select: from.particles: toy_poses@{poses} depends on toy_extract@{full}, which was"):
        run(folder, here, [*now, selected(f"toy_poses@{poses}")])
    Project(first.path).collect_garbage()
    with pytest.raises(ProjectFileError, match=rf"toy_poses@{poses} is gone: gc removed toy_poses@{poses} on "):
        run(folder, here, [*now, selected(f"toy_poses@{poses}")])


@pytest.mark.parametrize("name", ["two", "zwei"])
def test_a_pinned_result_has_the_optics_of_its_time(tmp_path, here, name):  # noqa: F811
    folder = session(tmp_path, 3)

    def plan(voltage: int, called: str, *more) -> Plan:
        optics = {"voltage_kv": voltage, "spherical_aberration_mm": 2.7, "pixel_size_angstrom": 1.0}
        sets = [{"name": called, "movies": "movies/*.mrc", "microscope": optics}]
        (folder / "toy.yaml").write_text(yaml.safe_dump({"name": "toy", "inputs": sets, "pipeline": [*PIPELINE[:8], *more]}))
        return make_plan(folder / "toy.yaml")

    first = run_plan(plan(300, "two"), here)
    key, then = first.generation("toy_poses").key, first.particles("toy_poses")
    pinned = {"select": {"where": "voltage_kv == 300", "from": {"particles": f"toy_poses@{key}"}}}
    project = run_plan(plan(200, name, pinned), here)
    found = project.particles("select")
    for column in ("particle_id", "voltage_kv", "defocus_u_angstrom"):
        assert found[column].values.tolist() == then[column].values.tolist()
    assert set(project.particles("toy_poses")["voltage_kv"].values) == {200}
    made = project.step("select").key
    assert run_plan(plan(100, name, pinned), here).step("select").key == made  # nothing that it is made from has changed


# --- gc ----------------------------------------------------------------------------------------------------------------------
def test_a_generation_with_one_item_of_five_is_not_finished(tmp_path, here, monkeypatch):  # noqa: F811
    folder = session(tmp_path, 5)
    first = run(folder, here, PIPELINE[:4])
    old = {first.step(label).place for label in first.stages}
    real = MapRunner.run

    def killed(self, source):
        real(self, iter([next(iter(source))]))
        raise KeyboardInterrupt

    monkeypatch.setattr(MapRunner, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        run(folder, here, [{"toy_motion": {"number": 2}}, *PIPELINE[1:4]])
    monkeypatch.undo()
    project = Project(first.path)
    assert len(project.records("toy_motion")) == 1
    assert not folders(project.superseded()) & old
    by_key = {m.place: m.finished for m in project.history()}
    assert [by_key[place] for place in sorted(old)] == [True] * 5
    assert not by_key[project.step("toy_motion").place]
    # with the rest done, those of before are superseded
    project = run(folder, here, [{"toy_motion": {"number": 2}}, *PIPELINE[1:4]])
    assert old - folders(project.superseded()) == {project.step("ingest").place}


def test_gc_keeps_the_last_finished_result_of_each_step_and_what_it_rests_on(tmp_path, here):  # noqa: F811
    folder = session(tmp_path, 3)
    head = PIPELINE[:7]

    def poses(number):
        return [{"toy_poses": {"number": number}}, {"toy_poses as branch": {"number": 10 * number, "from": {"particles": "toy_curate"}}}]

    for number in (1, 2):
        project = run(folder, here, [*head, *poses(number)])
    last = {label: project.step(label).place for label in ("toy_poses", "branch", "full")}
    # one of two steps of a stage is taken out; then its input changes as well, and nothing behind it is current
    without = run(folder, here, [*head, poses(2)[0]])
    assert last["branch"] not in folders(without.superseded())
    stopped = run(folder, here, [*PIPELINE[:6], {"toy_extract as full": {"number": 7}}, *poses(2)], until="full")
    assert "toy_poses" not in stopped.stages
    gone = folders(stopped.superseded())
    assert len(gone) == 2, "the first refinements"
    assert not gone & set(last.values())
    assert folders(stopped.superseded(last_results=True)) >= {last["toy_poses"], last["full"]}
    stopped.collect_garbage()
    again = run(folder, here, [*head, *poses(2)])
    assert {label: again.step(label).place for label in last} == last
    assert again.verify() == []


def test_gc_keeps_what_a_named_result_rests_on(tmp_path, here):  # noqa: F811
    folder = session(tmp_path, 3)
    first = run(folder, here, PIPELINE[:8])
    rests = {first.step(label).place for label in first.stages}
    ids = first.particles("toy_poses")["particle_id"].values
    key = first.generation("toy_poses").key
    first.keep("toy_poses", "published")
    other = ["toy_motion", "toy_ctf", {"toy_pick": {"number": 5}}, *PIPELINE[3:6], {"toy_extract as full": {"number": 7}}, "toy_poses"]
    project = run(folder, here, other)
    assert not folders(project.superseded(last_results=True)) & rests
    project.collect_garbage(last_results=True)
    again = {"toy_extract as again": {"from": {"particles": f"toy_poses@{key}"}}}
    project = run(folder, here, [*other, again])
    assert project.failures() == []
    np.testing.assert_array_equal(project.particles("again")["particle_id"].values, ids)


# --- what tells results apart ---------------------------------------------------------------------------------------------------
def test_results_that_differ_in_their_inputs_only_are_told_apart(tmp_path, here, capsys):  # noqa: F811
    folder = session(tmp_path, 3)
    keys, full = [], []
    for number in (1, 2):
        project = run(folder, here, [*PIPELINE[:6], {"toy_extract as full": {"number": number}}, "toy_poses"])
        keys.append(project.generation("toy_poses").key)
        full.append(project.generation("full").key)
    assert [m.inputs["particles"] for m in project.history("toy_poses")] == [[f"full@{key}"] for key in full]
    table = project.compare(f"toy_poses@{keys[0]}", "toy_poses")
    assert table.loc["input particles"].tolist() == [f"full@{key}" for key in full]
    assert table.loc["input particles.image"].tolist() == [f"toy_extract@{key}" for key in full]
    assert "input exposures" not in table.index
    path = str(project.path)
    assert cli(["history", path, "toy_poses"]) == 0
    assert f"from particles of full@{full[0]}" in capsys.readouterr().out
    assert cli(["compare", path, "toy_poses", f"toy_poses@{keys[1]}"]) == 0
    assert "do not differ: parameters, inputs and figures are the same" in capsys.readouterr().out
    # what lies behind the steps before: the same parameters and extraction, another CTF
    first = project.generation("toy_poses").key
    project = run(
        folder, here, ["toy_motion", {"toy_ctf": {"number": 2}}, *PIPELINE[2:6], {"toy_extract as full": {"number": 2}}, "toy_poses"]
    )
    assert "input exposures.ctf" in project.compare(f"toy_poses@{first}", "toy_poses").index


def test_what_gc_removed_is_said(tmp_path, here, capsys):  # noqa: F811
    folder = session(tmp_path, 3)
    old = run(folder, here, PIPELINE[:8]).generation("toy_poses").key
    project = run(folder, here, [*PIPELINE[:7], {"toy_poses": {"number": 5}}])
    assert cli(["gc", str(project.path)]) == 0
    assert f"removing toy_poses@{old}" in capsys.readouterr().out
    project = Project(project.path)
    for ask in (lambda: project.compare("toy_poses", f"toy_poses@{old[:8]}"), lambda: project["toy_poses", old]):
        with pytest.raises(StoreError, match=rf"is gone: gc removed toy_poses@{old} on 20\d\d-"):
            ask()
    run(folder, here, PIPELINE[:7])
    assert cli(["gc", str(project.path), "--last-results"]) == 0
    capsys.readouterr()
    assert cli(["history", str(project.path), "toy_poses"]) == 2
    assert "No result of toy_poses is left: gc removed" in capsys.readouterr().err


def test_names_cannot_be_mistaken(tmp_path, here, capsys):  # noqa: F811
    folder = session(tmp_path, 3)
    project = run(folder, here, PIPELINE[:8])
    path = str(project.path)
    for which, name, said in (
        ("toy_pick", "toy_extract", "looks like a step"),
        ("toy_extract", "toy_extract", "looks like a step"),
        ("toy_pick", "full", "looks like a step"),
        ("toy_pick", "toy_pick@12", "looks like a step"),
        ("toy_extract@", "kept", "No key follows the @"),
    ):
        assert cli(["keep", path, which, name]) == 2
        assert said in capsys.readouterr().err
    assert cli(["keep", path, "toy_pick", "good"]) == 0
    assert cli(["keep", path, "toy_pick", "good"]) == 0, "the same again changes nothing"
    assert cli(["keep", path, "toy_extract", "good"]) == 2
    assert "is called 'good' already" in capsys.readouterr().err
    assert cli(["compare", path, "good", "toy_pick"]) == 0
    assert "do not differ" in capsys.readouterr().out
    assert cli(["keep", path, "good", ""]) == 0
    assert open_project(project.path).state.kept == {}
    # a step that gets the name later is meant by it
    project = open_project(project.path)
    project.keep("toy_pick", "best")
    project = run(folder, here, [*PIPELINE[:7], "toy_poses as best"])
    assert project.compare("best", "toy_pick").loc["input particles"].tolist()[1] is None
    # nothing to keep yet
    place = project.step("best").place
    shutil.rmtree(project.path / "stages" / place / "journal")
    (project.path / "stages" / place / "journal").mkdir()
    with pytest.raises(StoreError, match="cannot be kept"):
        Project(project.path).keep("best", "empty")


def test_where_refuses_nonsense_and_knows_rows_that_lost_their_name(tmp_path, here):  # noqa: F811
    folder = session(tmp_path, 3)
    project = run(folder, here, PIPELINE[:4])
    assert cli(["where", str(project.path), "--", "-5"]) == 2
    for nonsense in ("-5", "0.1.2", "5", str(2**63), "99999999999999999999"):
        with pytest.raises(InputError, match="is not the id of a particle"):
            project.where(nonsense)
    assert project.where("1.1.0")[0][1].endswith("of exposure m001")
    assert project.where("1.77.0")[0][1].endswith("of an exposure in row 77, which the project never had")
    (folder / "movies" / "m001.mrc").unlink()
    other = folder / "else"
    (other / "movies").mkdir(parents=True)
    movie(other, 9)
    (other / "movies" / "m009.mrc").rename(folder / "movies" / "m001.mrc")
    project = run(folder, here, PIPELINE[:4])
    assert project.where("1.1.0")[0][1].endswith("of exposure m001~1, which is not active now")


# --- choices --------------------------------------------------------------------------------------------------------------------
def test_a_choice_of_numbers_is_guarded_whatever_its_step_is_called(tmp_path, here):  # noqa: F811
    folder = session(tmp_path, 3)
    first = run(folder, here, [*PIPELINE[:5], {"curate": {"keep": [1]}}]).generation("toy_classify").key
    new = [*PIPELINE[:4], {"toy_classify": {"number": 2}}]
    renamed = [*PIPELINE[:4], {"toy_classify as classes": {"number": 2}}]
    for pipeline, step in ((new, "curate"), (new, "curate as best"), (renamed, "curate"), (renamed, "curate as best")):
        with pytest.raises(ProjectFileError, match=r"classes 1 were chosen from toy_classify@\w+; \w+ is now toy_classify@"):
            run(folder, here, [*pipeline, {step: {"keep": [1]}}])
    # a name alone is no other choice, and a confirmed one holds under every name
    run(folder, here, [*PIPELINE[:5], {"curate as best": {"keep": [1]}}])
    run(folder, here, [*new, {"curate as best": {"keep": [1]}}], update=["best"])
    run(folder, here, [*new, {"curate": {"keep": [1]}}])
    # an earlier result is named with its key: nothing to guard, and the two do not stop each other
    old = {"curate as old": {"keep": [1], "from": {"particles": f"toy_classify@{first}"}}}
    for _ in range(2):
        run(folder, here, [*new, {"curate": {"keep": [1]}}, old])


def test_an_expression_that_names_classes_is_a_choice_of_numbers(tmp_path, here):  # noqa: F811
    folder = session(tmp_path, 3)

    def pipeline(where, label="select", number=1.0):
        return [
            *PIPELINE[:4],
            {"toy_classify": {"number": number}},
            {f"select as {label}" if label != "select" else label: {"where": where}},
        ]

    run(folder, here, pipeline("class_number == 1"))
    for where, label in (("class_number == 1", "select"), ("class_number in (1,) and position_y_angstrom > 0", "chosen")):
        with pytest.raises(ProjectFileError, match=r"classes 1 were chosen from toy_classify@\w+; toy_classify is now toy_classify@\w+"):
            run(folder, here, pipeline(where, label, 2.0))
    run(folder, here, pipeline("class_number == 1", number=2.0), update=["select"])
    # whether a particle was classified at all is a question to any classification
    run(folder, here, pipeline("class_number > 0"))
    run(folder, here, pipeline("class_number > 0", number=2.0))


@pytest.mark.parametrize(
    ("where", "numbers"),
    [
        ("class_number == 1", {"class2d": [1]}),
        ("class_number in (5, 2) and class_probability > 0.5", {"class2d": [2, 5]}),
        ("not (3 == class_number or position_y_angstrom > 7)", {"class2d": [3]}),
        ("class_number != 4", {"class2d": [4]}),
        ("1 < class_number <= 6", {"class2d": [1, 6]}),
        ("class_number - 2", {"class2d": [2]}),
        ("class_number > 0", {}),
        ("class_number != 0", {}),
        ("class_number >= 1", {}),
        ("1 <= class_number", {}),
        ("isfinite(class_number) and class_probability > 0.5", {}),
        ("position_y_angstrom > 3", {}),
    ],
)
def test_numbers_of_classes_in_an_expression(where, numbers):
    assert class_numbers(where) == numbers


def test_json_of_a_generation_says_where_its_inputs_lie(tmp_path, here):  # noqa: F811
    folder = session(tmp_path, 3)
    project = run(folder, here, PIPELINE[:8])
    for label in project.stages:
        line = json.loads((project.generation(label).path / "places.json").read_text())[label]
        assert line["finished"]
        assert line["products"] == json.loads(project.step(label).model_dump_json())["products"]
        assert line["inputs"] == json.loads(project.step(label).model_dump_json())["inputs"]


def test_a_pin_on_a_result_that_gc_removed_says_so(tmp_path, here):  # noqa: F811
    folder = session(tmp_path, 2)
    project = run(folder, here, PIPELINE[:4])
    place = project.step("toy_extract").place
    project.state.removed["toy_extract/abcdef012345"] = 1.7e9
    project.save()
    for key in ("abcd", "abcdef012345"):
        with pytest.raises(ProjectFileError, match="gc removed toy_extract@abcdef012345 on 2023-11-1"):
            run(folder, here, [*PIPELINE[:4], selected(f"toy_extract@{key}")])
    assert project.step("toy_extract").place == place


def test_a_classification_that_is_undone_has_the_choice_that_was_made_for_it(tmp_path, here):  # noqa: F811
    folder = session(tmp_path, 2)

    def chosen(number: int) -> list:
        return [*PIPELINE[:4], {"toy_classify": {"number": number}}, {"curate": {"keep": [1]}}]

    run(folder, here, chosen(1))
    with pytest.raises(ProjectFileError, match="were chosen from"):
        run(folder, here, chosen(2))
    run(folder, here, chosen(2), update=["curate"])
    run(folder, here, chosen(1))
    run(folder, here, chosen(2))
    with pytest.raises(ProjectFileError, match="were chosen from"):
        run(folder, here, chosen(3))
