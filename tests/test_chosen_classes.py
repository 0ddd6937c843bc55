"""Numbers of classes that a person chooses are those of one classification, and there are such classes: known before work."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from cryodask.errors import ProjectFileError
from cryodask.run.recipe import make_plan

TWO = ["motion", "ctf", {"pick": {"diameter_angstrom": 180}}, {"extract": {"box": 64}}, {"classify2d": {"classes": 4}}]
UNION = [
    *TWO,
    {"classify2d as other": {"classes": 6, "from": {"particles": "extract"}}},
    {"merge": {"from": {"particles": ["classify2d", "other"]}, "prefer": "other"}},
]


def plan(folder: Path, *pipeline):
    content = {
        "name": "p",
        "inputs": {"movies": "*.tif"},
        "microscope": {"voltage_kv": 300, "spherical_aberration_mm": 2.7, "amplitude_contrast": 0.1, "pixel_size_angstrom": 1.0},
        "pipeline": list(pipeline),
    }
    (folder / "p.yaml").write_text(yaml.safe_dump(content))
    return make_plan(folder / "p.yaml")


@pytest.mark.parametrize(
    ("where", "number"),
    [("class_number == 9", 9), ("class_number in (1, 5)", 5), ("class_number == 0 or class_number == 7", 7)],
)
def test_a_selection_of_a_class_that_will_not_be_is_refused_before_work(tmp_path, where, number):
    with pytest.raises(ProjectFileError, match=rf"select: there is no class (0 and )?{number}: classify2d has 4, numbered from 1"):
        plan(tmp_path, *TWO, {"select": {"where": where}})


@pytest.mark.parametrize("where", ["class_number in (1, 4)", "class_number >= 1", "not class_number == 2 and defocus_u_angstrom < 1e4"])
def test_classes_that_will_be_are_taken(tmp_path, where):
    assert plan(tmp_path, *TWO, {"select": {"where": where}}).steps[-1].label == "select"


def test_a_number_that_means_classes_of_two_classifications_is_refused(tmp_path):
    with pytest.raises(ProjectFileError, match=r"select: the classes of merge come from classify2d and other.*Choose classes before merge"):
        plan(tmp_path, *UNION, {"select": {"where": "class_number == 2"}})
    # whether a particle was classified at all may be asked
    assert plan(tmp_path, *UNION, {"select": {"where": "class_number > 0"}}).steps[-1].label == "select"


def test_two_branches_of_one_classification_keep_the_meaning_of_its_numbers(tmp_path):
    branches = [{"select as a": {"where": "class_number in (1, 2)"}}, {"select as b": {"where": "class_number == 3", "from": "classify2d"}}]
    union = plan(tmp_path, *TWO, *branches, {"merge": {"from": {"particles": ["a", "b"]}}}, {"select as c": {"where": "class_number == 2"}})
    assert union.steps[-1].label == "c"
    with pytest.raises(ProjectFileError, match="c: there is no class 5: classify2d has 4"):
        plan(tmp_path, *TWO, *branches, {"merge": {"from": {"particles": ["a", "b"]}}}, {"select as c": {"where": "class_number == 5"}})
