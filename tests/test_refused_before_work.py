"""Wrong values in a project file and in the tables that it names: one sentence each, before any work, with the way out."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import yaml
from test_identity import write

from cryodask.errors import InputError, ProjectFileError
from cryodask.run.preview import preview
from cryodask.run.recipe import draft_plan

PICKED = ["motion", "ctf", {"pick": {"diameter_angstrom": 180}}]
CLASSES = [*PICKED, {"extract": {"box": 64}}, {"classify2d": {"classes": 5}}]
PROJECT = {
    "name": "p",
    "inputs": {"movies": "movies/*.tif"},
    "microscope": {"voltage_kv": 300, "spherical_aberration_mm": 2.7, "pixel_size_angstrom": 1.0},
    "pipeline": CLASSES,
}


def said(folder: Path, pipeline: list | None = None, **changes) -> str:
    """The one problem of a project file."""
    content = {**copy.deepcopy(PROJECT), **changes, **({"pipeline": pipeline} if pipeline else {})}
    (folder / "p.yaml").write_text(yaml.safe_dump(content))
    try:
        problems = draft_plan(folder / "p.yaml").graph.problems
    except ProjectFileError as error:
        return error.what.partition("p.yaml: ")[2]
    assert len(problems) == 1, problems
    return problems[0]


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ({"movies": "m", "gain_flip": "updown"}, "inputs.gain_flip: Input should be 'none', 'up-down' or 'left-right' (given: 'updown')"),
        ({"movies": "m", "gan": "x"}, "unknown name 'inputs.gan'. Did you mean 'gain'?"),
        (
            {"movies": "m", "particles": "x"},
            "inputs: give exactly one of movies, micrographs, particles, half_maps (given: movies, particles)",
        ),
        ({"movies": "m", "coordinates": "x"}, "coordinates need micrographs; with movies, write a step  import_picks"),
        ([{"name": "a", "movies": "m"}, {"name": "a", "movies": "n"}], "two data sets are called 'a'"),
        ([{"name": "a", "moves": "m"}], "unknown name 'inputs.0.moves'. Did you mean 'movies'?"),
        ([{"name": "a", "movies": "m", "gain_rotate": 45}], "inputs.0.gain_rotate: Input should be 0, 90, 180 or 270 (given: 45)"),
    ],
)
def test_a_wrong_input_is_one_sentence_without_the_words_of_a_library(tmp_path, inputs, expected):
    text = said(tmp_path, inputs=inputs)
    assert text.startswith(expected) or f": {expected}" in text
    assert ";" not in text.replace("micrographs; with", "")
    assert "function-" not in text
    assert "Value error" not in text


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        ({"curate": {"keep": [0]}}, "curate: keep.0: Input should be greater than or equal to 1 (given: 0)"),
        ({"curate": {"keep": []}}, "curate: keep: List should have at least 1 item"),
        ({"curate": {"keep": [1, 7]}}, "there is no class 7: classify2d has 5, numbered from 1"),
        ({"select_classes": {"keep": [6, 9]}}, "there is no class 6, 9: classify2d has 5, numbered from 1"),
        ({"select": {"where": "class_numbr == 1"}}, "'class_numbr', which is not a column of particles. Did you mean 'class_number'?"),
        ({"select": {"where": "ctf_resolution_angstrom < 5"}}, "ctf_resolution_angstrom, which belongs to exposures. Set"),
        ({"select": {"where": "rot_deg < 5"}}, "where uses rot_deg, but classify2d has no pose"),
        ({"import_picks": {"folder": "empty"}}, "There is no STAR file in"),
        ({"import_picks": {"folder": "p.yaml"}}, "p.yaml is a file. Give the folder"),
        ({"contract": {"from": "posed"}}, "posed has no symmetry copies, so there is nothing to contract"),
    ],
)
def test_a_wrong_choice_is_refused_before_work(tmp_path, step, expected):
    (tmp_path / "empty").mkdir()
    (tmp_path / "map.mrc").write_bytes(b"")
    posed = [{"ab_initio": {"symmetry": "D2"}}, "refine3d as posed"] if "contract" in step else []
    assert expected in said(tmp_path, [*CLASSES, *posed, step])


@pytest.mark.parametrize(
    "where", ["class_number == 1", "half_set == 0 and defocus_u_angstrom < 2e4", "abs(origin_y_angstrom) < 3", "position_y_angstrom > 1"]
)
def test_a_right_expression_is_not_refused(tmp_path, where):
    (tmp_path / "p.yaml").write_text(yaml.safe_dump({**PROJECT, "pipeline": [*CLASSES, {"select": {"where": where}}]}))
    assert draft_plan(tmp_path / "p.yaml").graph.problems == ()


HEADER = "micrograph,action,y,x,particle_id\n"


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        (HEADER + "m1,remvoe,,,1.0.0\n", "line 2: 'remvoe' is not an edit of picks. Write remove."),
        (HEADER + "m1,add,5,5,\nm1,add,5,\n", "line 3: add has no position. Give y and x in pixels of the exposure."),
        (HEADER + "m1,add,-5,5,\n", "line 2: y -5, x 5 is outside any exposure."),
        (HEADER + "m1,add,nan,5,\n", "is outside any exposure"),
        (HEADER + "m1,remove,,,\n", "line 2: remove names no particle."),
        (HEADER + "m1,remove,,,one\n", "line 2: "),
        ("micrograph,action,y,x\nm1,remove,5,5\n", "remove names no particle"),
        ("micrograph;action;y;x\nm1;add;5;5\n", "has the columns micrograph;action;y;x. Name its columns micrograph, action"),
        ("", "has the columns of an empty file"),
    ],
)
def test_a_table_of_edits_that_cannot_be_understood_is_refused_with_the_line(tmp_path, table, expected):
    (tmp_path / "edits.csv").write_text(table)
    assert expected in said(tmp_path, [*PICKED, {"edit_picks": {"file": "edits.csv"}}])


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ("particle_id;value\n1.1.1;3\n", "has the columns particle_id;value"),
        ("", "of an empty file"),
        ("particle_id,value\n1.1.1,x\n", "not a number"),
    ],
)
def test_a_table_of_notes_that_cannot_be_understood_is_refused(tmp_path, table, expected):
    (tmp_path / "notes.csv").write_text(table)
    assert expected in said(tmp_path, [*CLASSES, {"annotate": {"file": "notes.csv"}}])


def test_exposures_that_nobody_knows_are_refused_before_work(tmp_path):
    (tmp_path / "movies").mkdir()
    for i in (1, 2):
        (tmp_path / "movies" / f"movie_{i}.tif").write_bytes(b"not read for this")
    (tmp_path / "edits.csv").write_text(HEADER + "movie_3,add,5,5,\n")
    gainless = {"inputs": {"movies": "movies/*.tif"}}
    for step, expected in (
        (
            {"select_exposures": {"leave_out": ["movie_2.tif"]}},
            "select_exposures names the exposure 'movie_2.tif', which is not among the inputs. Did you mean 'movie_2'?",
        ),
        ({"edit_picks": {"file": "edits.csv"}}, "edit_picks names the exposure 'movie_3', which is not among the inputs."),
    ):
        write(tmp_path, [*PICKED, step], **gainless)
        problems = preview(draft_plan(tmp_path / "p.yaml")).problems
        assert len(problems) == 1
        assert expected in problems[0]
    write(tmp_path, [*PICKED, {"select_exposures": {"leave_out": ["movie_2"]}}], **gainless)
    assert preview(draft_plan(tmp_path / "p.yaml")).problems == []


def test_an_unknown_point_group_is_told(tmp_path):
    (tmp_path / "a.mrc").write_bytes(b"")
    for more, told in (({}, True), ({"symmetry": "C1"}, False)):
        steps = [*CLASSES, {"import_map": {"half_maps": ["a.mrc", "a.mrc"], **more}}, "refine3d"]
        (tmp_path / "p.yaml").write_text(yaml.safe_dump({**PROJECT, "pipeline": steps}))
        warnings = draft_plan(tmp_path / "p.yaml").graph.warnings
        assert ("refine3d: the point group of import_map is unknown, so C1 is assumed. Set symmetry, even if it is C1." in warnings) == told


def test_a_problem_in_one_line_is_two_sentences():
    assert InputError("rlnDefocusU is not a number in row 1", "", "remove the row").problem == (
        "rlnDefocusU is not a number in row 1. remove the row"
    )
    assert InputError("There is no file.").problem == "There is no file."
