"""3D classes at known poses: two states found, their confusion predicted, one state not split, and what cannot work refused."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from _states import BOX, PIXEL, inputs_of, posed, two_states, write_project
from pydantic import ValidationError

from cryodask.errors import InputError, ProjectFileError
from cryodask.kernels import classify3d as c3
from cryodask.kernels.fsc import fsc
from cryodask.report import write_report
from cryodask.run.blocks import ParticlesInMemory, iterate_here
from cryodask.run.recipe import make_plan
from cryodask.run.session import run_plan
from cryodask.stages.classify3d import LEAST_GAIN_Z, Classify3DParams, classify3d, draw, says

pytestmark = pytest.mark.heavy

FAST = {"classes": 2, "resolution_angstrom": 18.0, "restarts": 1, "iterations": 5, "mask_diameter_angstrom": 170.0}


def classes_of(some, mask=None, **params):
    given = Classify3DParams(**{**FAST, **params})
    return iterate_here(classify3d.functions, given, ParticlesInMemory(some.particles, some.images), inputs_of(some, mask=mask))


@pytest.fixture(scope="module")
def some():
    return two_states()


@pytest.fixture(scope="module")
def found(some):
    return classes_of(some, some.mask)


def right(labels, numbers) -> float:
    return c3.agreement_of_labels(numbers - 1, labels, max(numbers.max(), labels.max() + 1))


def test_two_states_are_told_apart_and_their_maps_are_right(some, found):
    assert right(some.labels, found["class3d_number"]) > 0.93
    assert found["class3d_number"].min() == 1
    assert np.allclose(np.bincount(found["class3d_number"])[1:] / 500, found["class3d_share"], atol=0.03)
    assert found["class3d_share"][0] > found["class3d_share"][1]
    sphere = found["class_map"][0] * 0 + some.mask
    difference = torch.from_numpy((found["class_map"][0] - found["class_map"][1]) * sphere)
    truth = (some.maps[0] - some.maps[1]) * torch.from_numpy(sphere)
    assert float(fsc(difference, truth)[2:7].mean()) > 0.8
    assert found["class_half_map"].shape == (2, 2, BOX, BOX, BOX)


def test_the_verdict_and_the_sentence_hold_for_real_classes(some, found):
    assert found["class_gain"] > 0
    assert found["class_gain_z"] > LEAST_GAIN_Z
    assert "2 classes of" in says(found)
    assert "not support" not in says(found)


def test_the_expected_confusion_is_about_the_true_one(some, found):
    expected = float((found["class3d_share"] * np.diag(found["class3d_confusion"])).sum())
    assert abs(expected - right(some.labels, found["class3d_number"])) < 0.08


def test_one_state_split_in_two_is_said_not_to_be_supported():
    alone = two_states(700, share=0.0)
    result = classes_of(alone, alone.mask, restarts=1, iterations=1)
    assert "do not support" in says(result)


def test_the_report_shows_maps_course_and_confusion(found):
    import xarray as xr

    dims = {"class_map": "kzyx", "class3d_share": "k", "class3d_resolution_angstrom": "k", "map_pixel_size_angstrom": "",
            "class3d_confusion": "kj", "class3d_separation": "kj", "iteration_class_share": "ik", "iteration_changed_share": "i",
            "class_gain": "", "class_gain_z": ""}  # fmt: skip
    ds = xr.Dataset({name: (tuple(d), np.asarray(found[name])) for name, d in dims.items()})
    assert [picture.title for picture in draw(ds)] == ["3D classes", "Course of the classification", "Expected confusion"]


# --- what cannot work ------------------------------------------------------------------------------------------------------------
def refused(some, mask=None, particles=None, inputs=None, **params) -> str:
    given = Classify3DParams(**{**FAST, **params})
    with pytest.raises(InputError) as error:
        iterate_here(
            classify3d.functions, given, ParticlesInMemory(particles or some.particles, some.images), inputs or inputs_of(some, mask=mask)
        )
    return str(error.value)


def test_more_classes_than_particles_allow_are_refused(some):
    assert "500 particles are too few for 30 classes" in refused(some, classes=30)
    with pytest.raises(ValidationError):
        Classify3DParams(classes=1)


def test_a_mask_beside_the_molecule_is_refused(some):
    away = np.zeros((BOX,) * 3, np.float32)
    away[2:6, 2:6, 2:6] = 1.0
    assert "outside the molecule" in refused(some, away)
    assert "fills 0.0 %" in refused(some, 0 * away)
    assert "voxels, the map" in refused(some, away[:-2])


def test_particles_without_poses_are_refused(some):
    columns = {**some.particles.columns, "rot_deg": np.where(np.arange(500) < 3, np.nan, some.particles.columns["rot_deg"])}
    assert "3 of 500 particles have no pose" in refused(some, particles=replace(some.particles, columns=columns))


def test_poses_of_another_frame_are_refused(some):
    turned = posed(some.particles, some.rotations[torch.randperm(500, generator=torch.Generator().manual_seed(0))], some.origins)
    assert "another frame" in refused(some, particles=turned)


# --- kernels ---------------------------------------------------------------------------------------------------------------------
def test_expected_confusion_is_that_of_two_normal_likelihoods():
    """P(wrong) = Phi(-d/2) for equal shares: 0.1587 for d = 2; a class of no particles gets nothing."""
    found = c3.confusion(np.array([[0.0, 4.0], [4.0, 0.0]]), np.array([0.5, 0.5]))
    assert math.isclose(found[0, 1], 0.15866, abs_tol=1e-4)
    assert np.allclose(found.sum(1), 1.0)
    # with shares of 3 : 1 the rare class loses more: Phi(-1 + ln(3)/2) = 0.326 and Phi(-1 - ln(3)/2) = 0.0607
    unequal = c3.confusion(np.array([[0.0, 4.0], [4.0, 0.0]]), np.array([0.75, 0.25]))
    assert math.isclose(unequal[1, 0], 0.326, abs_tol=2e-3)
    assert math.isclose(unequal[0, 1], 0.0607, abs_tol=1e-3)
    assert c3.confusion(np.array([[0.0, 4.0], [4.0, 0.0]]), np.array([1.0, 0.0]))[0, 1] == 0.0


def test_clusters_are_found_and_equal_starts_are_one():
    rng = np.random.default_rng(0)
    points = np.concatenate([rng.normal(c, 0.3, (100, 2)) for c in ((0, 0), (3, 0), (0, 3))])
    starts = c3.clusters(points, 3, list(range(6)))
    assert len(starts) == 1
    labels = c3.nearest_centre(points, starts[0])
    assert c3.agreement_of_labels(labels, np.repeat([0, 1, 2], 100), 3) > 0.98
    assert len(c3.clusters(np.zeros((10, 2)), 3, [0, 1])) == 1


def test_outside_the_mask_a_class_is_the_consensus():
    own, consensus = torch.ones(4, 4, 4), torch.zeros(4, 4, 4)
    mask = torch.zeros(4, 4, 4)
    mask[0] = 1.0
    assert torch.equal(c3.within(own, consensus, mask), mask)
    assert torch.equal(c3.within(own, consensus, None), own)


def test_pixel_size_of_the_map_may_differ_from_that_of_the_particles(some):
    coarse = torch.nn.functional.avg_pool3d(torch.from_numpy(inputs_of(some)["final_map"])[None], 1)[0].numpy()
    state = classify3d.functions.start(
        Classify3DParams(**FAST), some.particles, {"final_map": coarse, "map_pixel_size_angstrom": 1.5 * PIXEL}
    )
    assert state["rings"] == 10


# --- from a project file ---------------------------------------------------------------------------------------------------------
def test_later_steps_take_the_particles_and_the_map_of_a_class(some, found, tmp_path, client):
    focused = {"classify3d": {**FAST, "from": {"mask": "import_mask"}}}
    of_first = {"mask as first": {"from": {"map": "classify3d.class1"}}}
    of_second = {"mask as second": {"from": {"map": "classify3d.class2"}}}
    kept = {"select": {"where": "class3d_number == 2", "from": "classify3d"}}
    pipeline = [focused, of_first, of_second, kept]
    project = run_plan(make_plan(write_project(tmp_path, some, pipeline)), client)
    whole = project.particles("classify3d")
    # poses in a STAR file are rounded
    assert np.array_equal(whole["class3d_number"].values, found["class3d_number"])
    assert np.allclose(project["classify3d"]["class_map"].values, found["class_map"], atol=1e-3 * found["class_map"].max())
    for number in (1, 2):
        ids = project.particles(f"classify3d.class{number}")["particle_id"].values
        assert np.array_equal(ids, whole["particle_id"].values[found["class3d_number"] == number])
    assert project.particles("select").sizes["particle"] == int((found["class3d_number"] == 2).sum())
    assert not np.array_equal(project["first"]["solvent_mask"].values, project["second"]["solvent_mask"].values)
    assert "classify3d" in (write_report(project)).read_text()
    # a class that was chosen belongs to one classification
    moved = [
        {"classify3d": {**FAST, "resolution_angstrom": 30.0, "restarts": 1, "iterations": 1, "from": {"mask": "import_mask"}}},
        of_first,
    ]
    with pytest.raises(ProjectFileError, match="classes 1 were chosen from classify3d@"):
        run_plan(make_plan(write_project(tmp_path, some, moved)), client)
