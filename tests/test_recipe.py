"""The project file: what is wrong is said before anything runs, with the nearest name."""

from __future__ import annotations

import pytest
import yaml

from cryodask.errors import ProjectFileError, StarError
from cryodask.run.recipe import make_plan, read_project_file
from cryodask.run.refs import variable_sources
from cryodask.run.session import check_inputs
from cryodask.stage import load_stages

GOOD = {
    "name": "p",
    "inputs": {"movies": "movies/*.tif"},
    "microscope": {"voltage_kv": 300, "spherical_aberration_mm": 2.7, "amplitude_contrast": 0.1, "pixel_size_angstrom": 1.0},
    "pipeline": [{"motion": {}}, "ctf", {"pick": {"diameter_angstrom": 150}}, {"extract": {"box": 64}}],
}


def plan_of(folder, **changes):
    (folder / "p.yaml").write_text(yaml.safe_dump({**GOOD, **changes}))
    return make_plan(folder / "p.yaml")


def test_a_good_file_gives_its_steps_with_ingest_before_them(tmp_path):
    plan = plan_of(tmp_path)
    assert [s.label for s in plan.steps] == ["ingest", "motion", "ctf", "pick", "extract"]
    sources = variable_sources(plan, plan.steps[1])
    assert (sources["movie"], sources["pixel_size_angstrom"]) == ("ingest", "inputs")
    assert [product.ref for product in plan.steps[4].inputs["particles"]] == ["pick"]
    assert plan.folder == tmp_path / "p"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pipeline": [{"moton": {}}]}, "Did you mean 'motion'"),
        ({"pipeline": [{"motion": {"patchs": [5, 5]}}]}, "Did you mean 'patches'"),
        ({"microscope": {**GOOD["microscope"], "pixel_size_angstrom": 0}}, "pixel_size_angstrom"),
        ({"microscope": {**GOOD["microscope"], "pixelsize": 1}}, "Did you mean 'pixel_size_angstrom'"),
        ({"microscope": None}, "section `microscope`"),
        ({"inputs": {}}, "exactly one of movies"),
        ({"inputs": {"movies": "a", "particles": "b"}}, "exactly one of movies"),
        ({"pipeline": [{"ctf": {}}]}, "ctf needs micrograph .*no earlier step gives.*Add motion before it"),
        ({"pipeline": [{"motion": {}}, {"motion": {}}]}, "Two steps are called 'motion'.*motion as motion2"),
        ({"pipeline": [{"motion": {}, "ctf": {}}]}, "2 names"),
        ({"pipeline": []}, "pipeline"),
        ({"inputz": {}}, "Did you mean 'inputs'"),
        ({"pipeline": ["motion", "ctf", {"pick": {}}]}, "diameter_angstrom"),
        ({"pipeline": ["motion", "ctf", {"pick": {"diameter_angstrom": 100}}, {"extract": {"box": 63}}]}, "box"),
    ],
)
def test_what_is_wrong_is_named_before_anything_runs(tmp_path, changes, said):
    with pytest.raises(ProjectFileError, match=said):
        plan_of(tmp_path, **changes)


def test_a_stage_may_come_twice_under_another_label(tmp_path):
    plan = plan_of(tmp_path, pipeline=["motion", "ctf", {"ctf as ctf_again": {}}])
    assert plan.steps[-1].label == "ctf_again"
    assert plan.steps[-1].stage.name == "ctf"


def test_a_missing_reference_is_found_at_once(tmp_path):
    steps = [*GOOD["pipeline"], {"refine3d": {"reference": "none.mrc"}}]
    with pytest.raises(ProjectFileError, match=r"no file .*none\.mrc"):
        plan_of(tmp_path, pipeline=steps)


def test_files_that_are_no_project_files_are_refused(tmp_path):
    for text in ("", "- a\n- b\n", "name: [", "\x00\x01"):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ProjectFileError):
            read_project_file(tmp_path / "bad.yaml")
    with pytest.raises(ProjectFileError, match="no project file"):
        read_project_file(tmp_path / "absent.yaml")


def test_a_star_file_without_optics_is_refused_with_the_way_out(tmp_path):
    (tmp_path / "m.star").write_text("data_\n\nloop_\n_rlnMicrographName #1\na.mrc\n")
    with pytest.raises(StarError, match="relion_convert_star"):
        check_inputs(plan_of(tmp_path, inputs={"micrographs": "m.star"}, pipeline=["ctf"]))


def test_every_stage_explains_itself():
    for stage in load_stages().values():
        assert stage.doc.splitlines()[0].endswith(".")
        for name, field in stage.params.model_fields.items():
            assert field.description, f"{stage.name}.{name} has no description"


def test_no_variable_is_hidden_by_an_attribute_of_a_dataset():
    import xarray as xr

    from cryodask.vocabulary import VARIABLES

    hidden = [name for name in VARIABLES if hasattr(xr.Dataset, name)]
    assert hidden == []


@pytest.mark.parametrize("name", ["local", "mixed", "tcp://10.0.0.1:8786"])
def test_a_word_or_an_address_as_cluster_is_taken_as_it_stands(tmp_path, name):
    assert plan_of(tmp_path, cluster=name).cluster == name


def test_a_cluster_file_lies_beside_the_project_file(tmp_path):
    assert plan_of(tmp_path, cluster="slurm.yaml").cluster == str(tmp_path / "slurm.yaml")
    (tmp_path / "mixed").write_text("kind: local\n")
    assert plan_of(tmp_path, cluster="mixed").cluster == str(tmp_path / "mixed")
