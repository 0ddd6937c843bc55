"""Frozen edits in runs: only touched exposures are computed again, ids stay, and runs that waited go on. Toy stages, real runner."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _classified import CLASSIFIED
from _told import Told
from test_counts import here, made, movie, renewed, run, session, write  # noqa: F401
from typer.testing import CliRunner

from cryodask.cli import app
from cryodask.edits.board import Board
from cryodask.edits.frozen import freeze
from cryodask.edits.log import OperationLog
from cryodask.edits.operations import new_id
from cryodask.errors import InputError, ProjectFileError
from cryodask.interop.edited_picks import export_picks, import_edits
from cryodask.run.events.status import status_sentence
from cryodask.run.preview import preview
from cryodask.run.recipe import make_plan
from cryodask.run.watch import Until
from cryodask.store.identity import birth_of, id_text
from cryodask.store.project import Project

pytestmark = pytest.mark.heavy

PICKED = ["toy_motion", "toy_ctf", "toy_pick"]
EDITED = [*PICKED, "edit_picks", "toy_extract"]


def op(board: Board, do: str, row: int, **more: Any) -> dict[str, Any]:
    return {"id": new_id(), "n": board.picks.highest + 1, "do": do, "row": row, **more}


def particles(project: Project) -> dict[int, tuple[float, float]]:
    table = project.particles("edit_picks")
    return dict(
        zip(
            table["particle_id"].values.tolist(),
            zip(table["position_y_angstrom"].values.tolist(), table["position_x_angstrom"].values.tolist()),
        )
    )


def past(movies: Path) -> None:
    """Movies that have been complete for a while."""
    for path in movies.iterdir():
        os.utime(path, (1, 1))


def test_only_touched_exposures_run_again_and_ids_stay(tmp_path: Path, here: Any) -> None:  # noqa: F811
    folder = session(tmp_path, 12)
    before = run(folder, here, EDITED)
    first, counted = particles(before), made(before)
    board = Board(folder / "toy")
    assert board.rows() == list(range(12))
    picks = board.edited(5)
    assert [(p.y, p.x, p.on) for p in picks] == [(4.0, 4.0, True), (8.0, 8.0, True), (10.0, 10.0, True)]
    (added,) = board.take("picks", [op(board, "add", 5, y=6.0, x=7.0)], "anna")
    board.take(
        "picks",
        [op(board, "remove", 5, pick=picks[0].pick, y=4.0, x=4.0), op(board, "move", 7, pick=board.edited(7)[1].pick, y=8.5, x=9.0)],
        "ben",
    )
    # what nobody said to use changes nothing
    assert renewed(counted, run(folder, here, EDITED)) == {}
    freeze(board.picks, "anna")
    shown = {s.step: s for s in preview(make_plan(folder / "toy.yaml")).steps}
    assert shown["edit_picks"].todo == 2
    told = Told()
    after = run(folder, here, EDITED, listen=[told])
    assert renewed(counted, after) == {"edit_picks": 2, "toy_extract": 2}
    assert any("edit_picks: 3 edits, frozen by anna on 20" in line for line in told.said)
    now = particles(after)
    (new,) = now.keys() - first.keys()
    assert first.keys() - now.keys() == {next(i for i in first if id_text(i) == picks[0].pick)}
    assert now[new] == (6.0, 7.0)
    assert birth_of(np.array([new]))[0] != birth_of(np.array(list(first)))[0]
    assert [now[i] for i in now if id_text(i) == board.edited(7)[1].pick] == [(8.5, 9.0)]
    # moved by somebody else, an added pick is who it was; a restored one comes back
    counted = made(after)
    board.take("picks", [op(board, "move", 5, pick=added["id"], y=6.5, x=11.0), op(board, "restore", 5, pick=picks[0].pick)], "ben")
    freeze(board.picks, "ben")
    last = run(folder, here, EDITED)
    assert renewed(counted, last) == {"edit_picks": 1, "toy_extract": 1}
    assert particles(last).keys() == now.keys() | first.keys()
    assert particles(last)[new] == (6.5, 11.0)


def test_a_run_that_waited_for_picks_goes_on(tmp_path: Path, here: Any) -> None:  # noqa: F811
    folder = session(tmp_path, 3)
    waits = [*PICKED, {"edit_picks": {"wait": True}}, "toy_extract"]
    told = Told()
    project = run(folder, here, waits, listen=[told])
    assert "edit_picks: waits for a person" in told.said
    assert "toy_extract: waits for edit_picks" in told.said
    assert told.said[-1] == "waiting for a person: edit_picks"
    assert status_sentence(folder / "toy").startswith("waiting for a person: edit_picks: ")
    assert "edit_picks" not in project
    board = Board(folder / "toy")
    board.take("picks", [op(board, "remove", 1, pick=board.edited(1)[0].pick)], "anna")
    assert "edit_picks" not in run(folder, here, waits)
    freeze(board.picks, "anna")
    assert len(particles(run(folder, here, waits))) == 8
    assert status_sentence(folder / "toy").startswith("finished: ")
    # waiting changes no result
    assert renewed(made(Project(folder / "toy")), run(folder, here, EDITED)) == {}


def test_a_driver_goes_on_with_what_is_decided_while_it_runs(tmp_path: Path, here: Any) -> None:  # noqa: F811
    folder = session(tmp_path, 3)

    def decide(event: Any) -> None:
        if type(event).__name__ == "StepFinished" and "toy_pick" in event.steps:
            freeze(OperationLog(folder / "toy", "picks"), "anna")

    told = Told()
    project = run(folder, here, [*PICKED, {"edit_picks": {"wait": True}}, "toy_extract"], listen=[told, decide])
    assert "new decisions were frozen during the run; it goes on with them" in told.said
    assert len(particles(project)) == 9


def test_a_file_is_not_mixed_with_edits_of_the_browser(tmp_path: Path, here: Any) -> None:  # noqa: F811
    folder = session(tmp_path, 2)
    (folder / "e.csv").write_text("micrograph,action,y,x,particle_id\nm001,add,6,6,\n")
    run(folder, here, EDITED)
    board = Board(folder / "toy")
    board.take("picks", [op(board, "remove", 0, pick=board.edited(0)[0].pick)], "anna")
    freeze(board.picks, "anna")
    assert len(particles(run(folder, here, [*PICKED, {"edit_picks": {"file": "e.csv"}}, "toy_extract"]))) == 7
    with pytest.raises(Exception, match="leave out file or wait"):
        make_plan(write(folder, [*PICKED, {"edit_picks": {"file": "e.csv", "wait": True}}]))


def test_exposures_excluded_by_eye(tmp_path: Path, here: Any) -> None:  # noqa: F811
    folder = session(tmp_path, 4)
    pipeline = ["toy_motion", "toy_ctf", "select_exposures", "toy_pick", "toy_extract"]
    assert len(run(folder, here, pipeline).particles("toy_extract")["particle_id"]) == 12
    board = Board(folder / "toy")
    one = {"id": new_id(), "n": 1, "do": "set", "row": 2, "name": "leave_out", "value": "ice"}
    board.take("exposures", [one, {**one, "id": new_id(), "row": 1, "name": "rating", "value": "4"}], "anna")
    freeze(board.exposures, "anna")
    told = Told()
    project = run(folder, here, pipeline, listen=[told])
    assert any("1 exposure excluded by eye, frozen by anna" in line for line in told.said)
    assert set(project.particles("toy_extract")["micrograph"].values.tolist()) == {"m000", "m001", "m003"}


def test_edits_that_do_not_fit_the_project_are_refused(tmp_path: Path, here: Any) -> None:  # noqa: F811
    folder = session(tmp_path, 2)
    run(folder, here, EDITED)
    board = Board(folder / "toy")
    own = board.edited(0)[0].pick
    for wrong, said in (
        (op(board, "remove", 1, pick=own), "has no pick"),
        (op(board, "remove", 0, pick="9.0.0"), "has no pick"),
        (op(board, "remove", 0, pick=new_id()), "has no pick"),
        (op(board, "add", 0, y=16.0, x=1.0), "is outside m000"),
        (op(board, "move", 0, pick=own, y=1.0, x=16.0), "is outside m000"),
        (op(board, "add", 7, y=1.0, x=1.0), "no exposure with row 7"),
    ):
        with pytest.raises(InputError, match=said):
            board.take("picks", [op(board, "add", 0, y=1.0, x=1.0), wrong], "anna")
    assert board.picks.rows() == [], "all or none"
    board.take("picks", [op(board, "add", 0, y=15.9, x=0.0)], "anna")
    assert board.picks.rows() == [0]


def choose(board: Board, of: str, *numbers: int, do: str = "set") -> None:
    ops = [{"id": new_id(), "n": board.classes.highest + 1, "do": do, "row": k, "of": of, "value": "sharp"} for k in numbers]
    board.take("classes", ops, "anna")


def test_classes_chosen_by_eye_and_a_classification_that_is_computed_again(tmp_path: Path, here: Any) -> None:  # noqa: F811
    folder = session(tmp_path, 4)
    pipeline = [*CLASSIFIED, "select_classes", "toy_poses"]
    told = Told()
    project = run(folder, here, pipeline, listen=[told])
    assert "select_classes: waits for a person" in told.said
    board, place = Board(folder / "toy"), project.step("toy_averages").place
    choose(board, place, 1, 3, 4)
    choose(board, place, 4, do="unset")
    for wrong in (5, 99):
        with pytest.raises(InputError, match=f"There is no class {wrong}"):
            choose(board, place, wrong)
    with pytest.raises(InputError, match="no classification"):
        choose(board, "toy_averages/0123", 1)
    assert "select_classes" not in run(folder, here, pipeline)
    freeze(board.classes, "anna", place)
    told = Told()
    project = run(folder, here, pipeline, listen=[told])
    assert any("select_classes: keeps classes 1, 3, frozen by anna on 20" in line for line in told.said)
    assert len(project.particles("toy_poses")["particle_id"]) == 6
    assert project.generation("select_classes").meta["params"]["keep"] == [1, 3]
    # the same numbers of another classification are other classes
    other = [*CLASSIFIED[:-1], {"toy_averages": {"number": 2}}, "select_classes", "toy_poses"]
    with pytest.raises(ProjectFileError, match="classes 1, 3 were chosen from"):
        run(folder, here, other)
    place = Project(folder / "toy").step("toy_averages").place
    told = Told()
    assert "select_classes" not in run(folder, here, other, listen=[told])
    assert "select_classes: waits for a person" in told.said
    choose(board, place, 2)
    freeze(board.classes, "ben", place)
    assert len(run(folder, here, other).particles("toy_poses")["particle_id"]) == 3


def test_star_files_there_and_back_and_the_command_line(tmp_path: Path, here: Any) -> None:  # noqa: F811
    folder = session(tmp_path, 3)
    run(folder, here, EDITED)
    board = Board(folder / "toy")
    board.take("picks", [op(board, "add", 1, y=6.25, x=7.5), op(board, "remove", 1, pick=board.edited(1)[0].pick)], "anna")
    written = export_picks(board, tmp_path / "star")
    assert [path.name for path in written] == ["m000.star", "m001.star", "m002.star"]
    assert import_edits(board, tmp_path / "star", "ben") == {"m000": 0, "m001": 0, "m002": 0}
    # a copy of the project in which nobody has edited anything becomes the same
    shutil.copytree(folder / "toy", tmp_path / "copy", ignore=shutil.ignore_patterns("edits"))
    copy = Board(tmp_path / "copy")
    assert import_edits(copy, tmp_path / "star", "ben") == {"m000": 0, "m001": 2, "m002": 0}
    assert [(p.y, p.x) for p in copy.edited(1) if p.on] == [(p.y, p.x) for p in board.edited(1) if p.on]
    with pytest.raises(InputError, match="called after an exposure"):
        import_edits(board, tmp_path, "ben")
    shell = CliRunner()
    said = shell.invoke(app, ["edits", "show", str(folder / "toy")]).output
    assert "picks      1 exposure with edited picks; nothing frozen" in said
    assert "exposures  0 exposures excluded; nothing frozen" in said
    shutil.copytree(tmp_path / "copy", tmp_path / "third", ignore=shutil.ignore_patterns("edits"))
    said = shell.invoke(app, ["edits", "import", str(tmp_path / "third"), str(tmp_path / "star")]).output
    assert said.startswith("2 edits in 1 exposure. To use them:  cryodask edits freeze ")
    assert "1 frozen as" in shell.invoke(app, ["edits", "freeze", str(folder / "toy"), "picks"]).output
    assert "runs use those frozen by" in shell.invoke(app, ["edits", "show", str(folder / "toy")]).output
    assert len(particles(run(folder, here, EDITED))) == 9
    (journal,) = (path for path in (folder / "toy" / "edits" / "picks").glob("*.jsonl") if "anna" in path.read_text())
    journal.write_bytes(journal.read_bytes().replace(b"anna", b"ANNA", 1))
    lost = shell.invoke(app, ["edits", "show", str(folder / "toy")])
    assert lost.exit_code == 1
    assert f"edits/picks/{journal.name}:1: damaged" in lost.output
    journal.write_bytes(journal.read_bytes().replace(b"ANNA", b"anna", 1))
    # what later steps use is exported as well, and comes back as picks
    again = export_picks(Board(folder / "toy"), tmp_path / "again")
    # the first line says when it was written
    assert [p.read_text().splitlines()[1:] for p in again] == [p.read_text().splitlines()[1:] for p in written]


def test_a_mask_chosen_by_eye_and_a_map_that_is_computed_again(tmp_path: Path, here: Any) -> None:  # noqa: F811
    folder = session(tmp_path, 4)
    pipeline = [*CLASSIFIED[:-1], "toy_poses", "draw_mask", {"toy_postprocess": {"from": {"mask": "draw_mask"}}}]
    told = Told()
    project = run(folder, here, pipeline, listen=[told])
    assert {"draw_mask: waits for a person", "toy_postprocess: waits for draw_mask"} <= set(told.said)
    board, place = Board(folder / "toy"), project.step("toy_poses").place
    assert board.maps() == {"toy_poses": place}

    def edit(do: str, **more: Any) -> dict[str, Any]:
        (one,) = board.take("masks", [{"id": new_id(), "n": board.masks.highest + 1, "do": do, "of": place, **more}], "anna")
        return one

    edit("set", name="threshold", value="none")
    edit("set", name="edge_angstrom", value=2.0)
    ball = edit("draw", stroke={"points": [[0.0, 0.0, 0.0]], "radius_angstrom": 2.0})
    for wrong in ({"drawn": new_id()}, {"drawn": ball["id"], "of": "toy_poses/0123"}):
        with pytest.raises(InputError, match=r"Nothing was drawn|has no map"):
            edit("remove", **wrong)
    assert "draw_mask" not in run(folder, here, pipeline)
    result = CliRunner().invoke(app, ["edits", "freeze", str(folder / "toy"), "masks"])
    assert "masks: 1 drawn stroke frozen as" in result.output
    shown = CliRunner().invoke(app, ["edits", "show", str(folder / "toy")]).output
    assert "masks      1 drawn stroke on toy_poses; runs use those frozen by" in shown
    told = Told()
    project = run(folder, here, pipeline, listen=[told])
    assert any("draw_mask: 1 drawn stroke, frozen by " in line for line in told.said)
    mask = np.asarray(project.generation("draw_mask").read(project.records("draw_mask")[0], "solvent_mask"))
    n = mask.shape[0]
    assert mask[n // 2, n // 2, n // 2] == 1.0
    assert mask[0, 0, 0] == 0.0
    assert "toy_postprocess" in project
    # nothing is computed again, and what was recorded are the numbers
    assert renewed(made(project), run(folder, here, pipeline)) == {}
    recorded = project.generation("draw_mask").meta["params"]["strokes"]
    assert recorded == [{"points": [[0.0, 0.0, 0.0]], "radius_angstrom": 2.0, "erase": False}]
    # a mask belongs to one map: computed again in the same run, it has none yet
    other = [*pipeline[:-3], {"toy_poses": {"number": 2}}, *pipeline[-2:]]
    told = Told()
    assert "draw_mask" not in run(folder, here, other, listen=[told])
    assert "draw_mask: waits for a person" in told.said
    # changed back, it is there
    assert "toy_postprocess" in run(folder, here, pipeline) or "toy_postprocess" in run(folder, here, pipeline)


def test_a_mask_chosen_by_eye_on_the_map_of_a_class(tmp_path: Path, here: Any) -> None:  # noqa: F811
    folder = session(tmp_path, 4)
    masked = {"draw_mask": {"from": {"map": "toy_classes3d.class2"}}}
    pipeline = [*CLASSIFIED[:-1], "toy_poses", "toy_classes3d", masked]
    project = run(folder, here, pipeline)
    assert "draw_mask" not in project
    board, place = Board(folder / "toy"), f"{project.step('toy_classes3d').place}.class2"
    assert list(board.maps()) == ["toy_classes3d.class1", "toy_classes3d.class2", "toy_poses"]
    assert board.maps()["toy_classes3d.class2"] == place
    numbers = {"threshold": 1.5, "lowpass_angstrom": 2.0, "extend_angstrom": 0.0, "edge_angstrom": 0.0}
    edits = [{"id": new_id(), "n": n, "do": "set", "of": place, "name": k, "value": v} for n, (k, v) in enumerate(numbers.items())]
    assert len(board.take("masks", edits, "anna")) == 4
    freeze(board.masks, "anna", place)
    project = run(folder, here, pipeline)
    mask = np.asarray(project.generation("draw_mask").read(project.records("draw_mask")[0], "solvent_mask"))
    # the cube of 4 x 4 x 4 voxels of the second class is above 1.5; the first is nowhere
    assert mask.sum() == 64


def test_regions_chosen_by_eye_and_components_that_are_computed_again(tmp_path: Path, here: Any) -> None:  # noqa: F811
    folder = session(tmp_path, 4)
    pipeline = [*CLASSIFIED[:-1], "toy_components", "select_region", "toy_averages"]
    told = Told()
    project = run(folder, here, pipeline, listen=[told])
    assert {"select_region: waits for a person", "toy_averages: waits for select_region"} <= set(told.said)
    board, place = Board(folder / "toy"), project.step("toy_components").place
    assert board.analyses() == {"toy_components": place}
    assert board.is_used("select_region")
    with pytest.raises(InputError, match="No region of"):
        freeze(board.regions, "anna", place)

    def edit(do: str, **more: Any) -> dict[str, Any]:
        (one,) = board.take("regions", [{"id": new_id(), "n": board.regions.highest + 1, "do": do, "of": place, **more}], "anna")
        return one

    end = {"components": [1], "points": [[1.0], [9.0]]}
    corner = {"components": [1, 2], "points": [[-3.0, -1.0], [-1.5, -1.0], [-1.5, 1.0], [-3.0, 1.0]]}
    edit("draw", region=end, reason="open")
    edit("draw", region=corner)
    for wrong in ({"region": {**end, "components": [3]}}, {"region": end, "of": "toy_components/0123"}):
        with pytest.raises(InputError, match=r"There is no component 3|has no analysis"):
            edit("draw", **wrong)
    with pytest.raises(InputError, match="Nothing was drawn"):
        edit("remove", drawn=new_id())
    assert "select_region" not in run(folder, here, pipeline)
    shell = CliRunner()
    assert "regions: 2 regions frozen as" in shell.invoke(app, ["edits", "freeze", str(folder / "toy"), "regions"]).output
    assert "regions    2 regions of toy_components; runs use" in shell.invoke(app, ["edits", "show", str(folder / "toy")]).output
    told = Told()
    project = run(folder, here, pipeline, listen=[told])
    assert any("select_region: 2 regions (open), frozen by " in line for line in told.said)
    component = project.particles("toy_components")["component1"].values
    kept = project.particles("select_region")
    assert kept.sizes["particle"] == ((component >= 1) | (component < -1.5)).sum() > 0
    assert "toy_averages" in project
    assert renewed(made(project), run(folder, here, pipeline)) == {}
    # the same regions in the project file give the same particles, of the same result
    by_file = [*pipeline[:-2], {"select_region": {"regions": [end, corner]}}, "toy_averages"]
    again = run(folder, here, by_file)
    assert not Board(folder / "toy").is_used("select_region")
    assert again.step("select_region").place == project.step("select_region").place
    # regions belong to one analysis: computed again, it has none yet; changed back, they are there
    other = [*pipeline[:-3], {"toy_components": {"number": 2}}, *pipeline[-2:]]
    told = Told()
    assert "select_region" not in run(folder, here, other, listen=[told])
    assert "select_region: waits for a person" in told.said
    assert "toy_averages" in run(folder, here, pipeline) or "toy_averages" in run(folder, here, pipeline)


def test_a_watched_session_goes_on_with_edits_while_it_runs(tmp_path: Path, here: Any) -> None:  # noqa: F811
    """Frozen after four of eight movies: the touched one is edited and extracted again at once, then the rest arrives."""
    folder = session(tmp_path, 4)
    steps: list[tuple[str, int]] = []
    state: dict[str, Any] = {}

    def act(event: Any) -> None:
        project = folder / "toy"
        if type(event).__name__ == "Counted" and not state.get("frozen") and event.done == 4:
            board = state["board"] = Board(project)
            state["before"] = made(board.project())
            board.take("picks", [op(board, "remove", 2, pick=board.edited(2)[0].pick)], "anna")
            freeze(board.picks, "anna")
            state["frozen"] = True
        elif type(event).__name__ == "StepStarted" and state.get("frozen") and not state.get("seen"):
            state["seen"] = True
            for number in range(4, 8):
                movie(folder, number)
            past(folder / "movies")

    def hear(event: Any) -> None:
        if type(event).__name__ == "StepFinished":
            steps.append((event.result, event.done or 0))
            state.setdefault("extracted", len(Project(folder / "toy").records("toy_extract")))

    past(folder / "movies")
    told = Told()
    after = run(folder, here, EDITED, watch=Until(movies=8), listen=[told, hear, act])
    assert "new decisions were frozen during the run; it goes on with them" in told.said
    first, second = "4 micrographs done so far", "8 micrographs done, 3 of them from before"
    assert steps == [(first, 4), (second, 8)]
    assert state["extracted"] == 4, "images follow while the session goes on"
    again = {key for key, when in made(after).items() if state["before"].get(key, when) != when}
    assert again == {("edit_picks", "m002"), ("toy_extract", "m002")}
    assert len(particles(after)) == len(after.particles("toy_extract")["particle_id"]) == 23
    assert renewed(made(after), run(folder, here, EDITED)) == {}, "a run without watching finds the same particles"
