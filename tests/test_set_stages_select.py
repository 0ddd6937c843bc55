"""Stages that take from sets or copy: selections, exposures, symmetry copies."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
import torch
from _particles import blob_map, ctf_columns, project
from _sets import a_set, ids_of, matrices, posed, refusals, run
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from cryodask.errors import InputError
from cryodask.kernels.orientations import random_rotations
from cryodask.products import Product
from cryodask.stage import ExposureView, SetView, find_stage
from cryodask.stages.select import evaluate
from cryodask.store.identity import copy_of, parent_of, place_of


# --- select --------------------------------------------------------------------------------------------------------------------------
def some_columns() -> dict[str, np.ndarray]:
    return {
        "particle_quality": np.float32([0.2, 0.6, np.nan, 0.9]),
        "class_number": np.int32([1, 2, 3, -1]),
        "defocus_u_angstrom": np.array([10_000.0, 20_000.0, 15_000.0, 30_000.0]),
    }


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("particle_quality > 0.5", [0, 1, 0, 1]),
        ("class_number in (1, 3) and defocus_u_angstrom < 20000", [1, 0, 1, 0]),
        ("not class_number in (1, 3)", [0, 1, 0, 1]),
        ("class_number not in (1, 3)", [0, 1, 0, 0]),
        ("class_number != 2", [1, 0, 1, 0]),
        ("particle_quality != 0", [1, 1, 0, 1]),
        ("not particle_quality > 0.5", [1, 0, 1, 0]),
        ("1e4 < defocus_u_angstrom <= 2e4", [0, 1, 1, 0]),
        ("isfinite(particle_quality)", [1, 1, 0, 1]),
        ("not isfinite(particle_quality) or class_number == 1", [1, 0, 1, 0]),
        ("abs(defocus_u_angstrom - 15000) < 5000", [0, 0, 1, 0]),
        ("-defocus_u_angstrom / 2 + 5000 * 2 < -1", [0, 0, 0, 1]),
        ("class_number / (class_number - 1) > 5", [1, 0, 0, 0]),
        ("particle_quality", [1, 1, 0, 1]),
        ("class_number in (2,)\n  or particle_quality == 0.9", [0, 1, 0, 0]),
        ("1 < 2 < 3", [1, 1, 1, 1]),
        ("2 < 1", [0, 0, 0, 0]),
    ],
)
def test_expressions_mean_what_they_say(where: str, expected: list[int]) -> None:
    assert evaluate(where, some_columns(), 4).tolist() == [bool(e) for e in expected]


@pytest.mark.parametrize(
    "where",
    [
        "",
        "class_number >",
        "class_number = 1",
        "class_number == 'a'",
        "class_number is 1",
        "class_number in 3",
        "class_number in (1, 2) in (3, 4)",
        "class_number ** 9",
        "class_number % 2",
        "class_number // 2",
        "class_number & 2",
        "~class_number",
        "class_number[0] > 1",
        "class_number.real > 1",
        "__import__('os').system('true')",
        "().__class__",
        "sum(class_number) > 1",
        "abs(class_number, 2)",
        "abs(*class_number)",
        "abs > 1",
        "isfinite(x=class_number)",
        "[c for c in (1, 2)]",
        "lambda: 1",
        "1 if class_number else 2",
        "(a := 1)",
        "True",
        "None",
        "1j",
        "f'{class_number}'",
        "class_number, 2",
        "1e999 > class_number",
        "class_number > 1; class_number",
        "import os",
        "not " * 3000 + "class_number",
        "(" * 400 + "1" + ")" * 400,
    ],
)
def test_what_is_no_expression_is_refused_when_the_project_file_is_read(where: str) -> None:
    with pytest.raises(ValidationError, match="where"):
        find_stage("select").params(where=where)
    with pytest.raises(InputError):
        evaluate(where, some_columns(), 4)


def test_unknown_columns_are_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError) as error:
        evaluate("clas_number == 1", some_columns(), 4)
    assert "Did you mean class_number?" in error.value.what
    assert "class_number, defocus_u_angstrom, particle_quality" in error.value.way_out


TOKENS = [
    "class_number",
    "particle_quality",
    "1",
    "-2.5",
    "(",
    ")",
    ",",
    "<",
    ">=",
    "==",
    "!=",
    "in",
    "not",
    "and",
    "or",
    "abs(",
    "isfinite(",
    "+",
    "/",
]


@given(st.one_of(st.text(max_size=40), st.lists(st.sampled_from(TOKENS), max_size=9).map(" ".join)))
@settings(max_examples=300, deadline=None)
def test_any_text_is_either_an_expression_or_refused(text: str) -> None:
    with contextlib.suppress(InputError):
        mask = evaluate(text, some_columns(), 4)
        assert (mask.shape, mask.dtype) == ((4,), bool)


def test_select_reads_the_parts_it_needs() -> None:
    asked = []
    made = a_set("s", ids_of(0, [0, 1]), ctf={"defocus_u_angstrom": [1.0, 2.0]}, class2d={"class_number": [1, 2]}, note={"mine": [0, 1]})
    view = SetView("s", made.ids, made.parts, lambda parts: asked.append(parts) or made.read(parts))  # type: ignore[func-returns-value]
    out = run("select", {"where": "defocus_u_angstrom > 1"}, particles=view)
    assert (out["particle_id"].tolist(), out["removal_reason"].tolist()) == (ids_of(0, [1]).tolist(), [1])
    run("select", {"where": "mine == 1"}, particles=view)
    with pytest.raises(InputError, match="class_number, defocus_u_angstrom, mine"):
        run("select", {"where": "rot_deg == 1"}, particles=view)
    with pytest.raises(InputError, match="select kept none of 2 particles"):
        run("select", {"where": "class_number == 9"}, particles=view)
    assert asked == [["ctf"], None, None, ["class2d"]]


# --- select_exposures ----------------------------------------------------------------------------------------------------------------
def exposures() -> ExposureView:
    nan = np.nan
    values = {
        "ctf_resolution_angstrom": np.array([3.0, 9.0, nan, 4.0, 5.0]),
        "total_motion": np.array([10.0, 10.0, 10.0, 60.0, nan]),
        "defocus_u_angstrom": np.array([8e3, 1.2e4, 1.3e4, 2.1e4, nan]),
        "defocus_v_angstrom": np.array([6e3, 1.0e4, 1.1e4, 1.9e4, nan]),
    }
    return ExposureView("ctf", np.array([0, 2, 3, 7, 8]), ("m0", "m2", "m3", "m7", "m8"), lambda name: values[name])


@pytest.mark.parametrize(
    ("params", "kept", "reasons"),
    [
        ({}, [0, 2, 3, 7, 8], []),
        ({"worst_ctf_resolution_angstrom": 5.0}, [0, 7, 8], [2, 2]),
        ({"largest_motion_angstrom": 50.0}, [0, 2, 3], [3, 3]),
        ({"least_defocus_angstrom": 7001.0}, [2, 3, 7], [4, 4]),
        ({"largest_defocus_angstrom": 1.1e4}, [0, 2], [5, 5, 5]),
        ({"least_defocus_angstrom": 1e4, "largest_defocus_angstrom": 1.5e4}, [2, 3], [4, 5, 4]),
        ({"leave_out": ["m2", "m8"]}, [0, 3, 7], [1, 1]),
        ({"leave_out": ["m2"], "worst_ctf_resolution_angstrom": 5.0}, [0, 7, 8], [1, 2]),
    ],
)
def test_exposures_within_limits_are_kept(params: dict[str, Any], kept: list[int], reasons: list[int]) -> None:
    out = run("select_exposures", params, exposures=exposures())
    assert out["exposure_row"].tolist() == kept
    assert out["dropped_row"].tolist() == [r for r in (0, 2, 3, 7, 8) if r not in kept]
    assert out["removal_reason"].tolist() == reasons
    assert (out["exposure_row"].dtype, out["removal_reason"].dtype) == (np.int64, np.int8)


def test_wrong_limits_of_exposures_are_refused() -> None:
    with pytest.raises(InputError, match="did you mean 'm2'"):
        run("select_exposures", {"leave_out": ["m22"]}, exposures=exposures())
    with pytest.raises(InputError, match="kept none of 5 exposures"):
        run("select_exposures", {"worst_ctf_resolution_angstrom": 1.0}, exposures=exposures())
    with pytest.raises(ValidationError, match="must not exceed"):
        find_stage("select_exposures").params(least_defocus_angstrom=2.0, largest_defocus_angstrom=1.0)
    given = Product("exposures", "motion", "exposures", 0, parts={"field": "motion"})
    said = refusals("select_exposures", {"worst_ctf_resolution_angstrom": 5, "largest_motion_angstrom": 5}, exposures=given)
    assert len(said) == 1
    assert said[0].startswith("worst_ctf_resolution_angstrom needs the quality of the CTF fits, which motion does not give.")


# --- expand and contract ---------------------------------------------------------------------------------------------------------------
def posed_set(count: int, seed: int = 0) -> SetView:
    rotations = random_rotations(count, torch.Generator().manual_seed(seed)).double()
    more = {"centre_y_angstrom": np.arange(count) * 10.0, "centre_x_angstrom": np.arange(count) * 20.0}
    return a_set("s", ids_of(2, np.arange(count)), pose=posed(rotations, log_likelihood=np.arange(count, dtype=np.float32), **more))


@pytest.mark.parametrize(("symmetry", "order"), [("C4", 4), ("D2", 4), ("D7", 14), ("T", 12), ("O", 24), ("I", 60)])
def test_copies_show_the_same_image_of_a_symmetric_map_and_others_of_an_asymmetric_one(symmetry: str, order: int) -> None:
    view = posed_set(2, seed=4)
    out = run("expand", {"symmetry": symmetry}, particles=view)
    assert len(out["particle_id"]) == 2 * order
    rotations = matrices(out).float()
    columns = {n: np.repeat(v[:1], 2 * order, 0) for n, v in ctf_columns(1).items()}
    origins = torch.zeros(2 * order, 2)
    for map_symmetry, equal in ((symmetry, True), ("C1", False)):
        images = project(blob_map(24, map_symmetry, blobs=2 if equal else 6), rotations, origins, columns, 2.0).reshape(2, order, -1)
        deviation = np.abs(images - images[:, :1]).max(-1) / np.abs(images).max()
        assert (deviation[:, 1:] < 0.1).all() if equal else (deviation[:, 1:] > 0.3).all()


def test_copies_are_numbered_and_share_their_centre() -> None:
    view = posed_set(3)
    out = run("expand", {"symmetry": "d3"}, particles=view)
    ids = out["particle_id"]
    assert ids.tolist() == sorted(ids.tolist())
    assert copy_of(ids).tolist() == [1, 2, 3, 4, 5, 6] * 3
    at_parent = place_of(ids, view.ids)
    pose = view.read(["pose"])
    for name in ("centre_y_angstrom", "centre_x_angstrom", "log_likelihood"):
        assert np.array_equal(out[name], pose[name][at_parent])
    for name in ("rot_deg", "tilt_deg", "psi_deg"):
        assert np.array_equal(out[name][::6], pose[name])
        assert out[name].dtype == np.float32
    different = matrices(out).reshape(3, 6, 9)
    assert (torch.cdist(different, different) + 9 * torch.eye(6)).min() > 0.5


def test_unknown_poses_stay_unknown_and_missing_columns_missing() -> None:
    pose = {n: np.float32([np.nan, 10.0]) for n in ("rot_deg", "tilt_deg", "psi_deg")}
    out = run("expand", {"symmetry": "C2"}, particles=a_set("s", ids_of(0, [0, 1]), pose=pose))
    assert np.isnan(out["rot_deg"]).tolist() == [True, True, False, False]
    assert not {"centre_y_angstrom", "log_likelihood"} & set(out)


@pytest.mark.parametrize(
    ("symmetry", "says"), [("C1", "nothing to expand"), ("D64", "128 operators"), (None, "point group to expand is unknown")]
)
def test_what_cannot_be_expanded_is_refused(symmetry: str | None, says: str) -> None:
    with pytest.raises(InputError, match=says):
        run("expand", {"symmetry": symmetry}, particles=posed_set(1))


def test_the_plan_refuses_to_expand_by_another_symmetry_than_the_map_has() -> None:
    of_d2 = Product("map", "refine3d", "map", 0, point_group="D2")
    assert refusals("expand", {}, map=of_d2) == []
    assert "D7 is not the symmetry of the map of refine3d (D2)" in refusals("expand", {"symmetry": "D7"}, map=of_d2)[0]
    assert "nothing to expand in C1" in refusals("expand", {}, map=Product("map", "m", "map", 0, point_group="C1"))[0]


@given(st.sets(st.integers(0, 200), min_size=1, max_size=30), st.sampled_from(["C2", "D2", "T"]), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_expanding_and_contracting_gives_the_particles_back(numbers: set[int], symmetry: str, seed: int) -> None:
    rotations = random_rotations(len(numbers), torch.Generator().manual_seed(seed))
    view = a_set("s", ids_of(1, sorted(numbers)), pose=posed(rotations))
    copies = run("expand", {"symmetry": symmetry}, particles=view)["particle_id"]
    assert run("contract", {}, particles=a_set("c", copies, pose={}))["particle_id"].tolist() == view.ids.tolist()
    some = copies[np.random.default_rng(seed).random(len(copies)) < 0.3]
    if len(some):
        out = run("contract", {}, particles=a_set("c", some, pose={}))
        assert out["particle_id"].tolist() == sorted(set(parent_of(some).tolist()))
    with pytest.raises(InputError, match="copies already"):
        run("expand", {"symmetry": symmetry}, particles=a_set("c", copies, pose={}))
