"""The demo: its molecules, its project files, and its figures for a session without symmetry."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import yaml
from _once import simulated
from typer.testing import CliRunner

from cryodask.cli import Molecules, app
from cryodask.demo import PROJECT_NAMES, score, sizes_of, write_project_file
from cryodask.run.recipe import make_plan
from cryodask.run.session import run_plan
from cryodask.simulate import SessionParams, load_truth
from cryodask.simulate.model import MOLECULES, MoleculeName

SHORT = {
    "motion": {"patches": [1, 1]},
    "ab_initio": {"steps": 10, "resolution_angstrom": 28.0},
    "refine3d": {"iterations": 1},
}


def test_the_command_line_knows_every_molecule_and_every_molecule_has_a_project():
    assert {m.value for m in Molecules} == set(MOLECULES) == set(get_args(MoleculeName)) == set(PROJECT_NAMES)


@pytest.mark.parametrize(("molecule", "name", "symmetry"), [("beta-galactosidase", "betagal", "D2"), ("clpb", "clpb", "C1")])
def test_diameter_box_and_symmetry_follow_from_the_molecule(molecule, name, symmetry, tmp_path):
    path = write_project_file(tmp_path, SessionParams(molecule=molecule))
    content = yaml.safe_load(path.read_text())
    steps = {key: value for step in content["pipeline"] for key, value in step.items()}
    assert path.name == f"{name}.yaml"
    assert content["name"] == name
    assert steps["pick"] == {"diameter_angstrom": 180.0}
    assert steps["extract"] == {"box": 160, "scale_to": 96}
    assert steps["ab_initio"]["symmetry"] == steps["refine3d"]["symmetry"] == symmetry
    assert sizes_of(SessionParams(molecule=molecule, pixel_size_angstrom=3.54)).box == 80


def test_a_molecule_is_chosen_on_the_command_line(tmp_path):
    done = CliRunner().invoke(
        app, ["simulate", str(tmp_path), "--movies", "1", "--size", "256", "--frames", "1", "--particles", "2", "--molecule", "clpb"]
    )
    assert done.exit_code == 0, done.output
    assert load_truth(tmp_path).params.molecule == "clpb"
    assert (tmp_path / "clpb.yaml").is_file()
    wrong = CliRunner().invoke(app, ["simulate", str(tmp_path / "b"), "--molecule", "titin"])
    assert wrong.exit_code == 2
    assert "beta-galactosidase" in wrong.output


@pytest.fixture(scope="module")
def asymmetric(tmp_path_factory, client) -> tuple[Any, Any]:
    """A finished session of 80 particles without symmetry, too few to be solved, and its truth."""
    folder: Path = tmp_path_factory.mktemp("clpb")
    params = SessionParams(molecule="clpb", movies=2, height=512, width=512, frames=4, pixel_size_angstrom=3.54, dose_per_frame=10.0)
    simulated(tmp_path_factory, folder, params)
    path = write_project_file(folder, params)
    content = yaml.safe_load(path.read_text())
    steps = {name: given for step in content["pipeline"] for name, given in step.items() if name not in ("classify2d", "curate")}
    content["pipeline"] = [{name: {**given, **SHORT.get(name, {})}} for name, given in steps.items()]
    path.write_text(yaml.safe_dump(content))
    return run_plan(make_plan(path), client), load_truth(folder)


def test_a_session_without_symmetry_is_measured_against_its_truth(asymmetric):
    found = score(*asymmetric)
    assert found["molecule"] == "clpb"
    assert found["picked_recall"] > 0.8
    assert found["succeeded"] is False
    assert found["resolution_fsc143_angstrom"] is None
    assert found["poses_right"] < 0.5
    # the same particles at their true poses: 20.3 A; in a wrong frame they would be no better than the refined map, 29 A and worse
    assert found["resolution_true_poses_angstrom"] < 24
    assert np.isfinite(found["pose_error_median_deg"])
