"""Stages that unite sets: unions, consensus, matches, duplicates."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from _sets import NAMES, a_set, at, ids_of, posed, product, refusals, run
from hypothesis import given, settings
from hypothesis import strategies as st

from cryodask.errors import InputError
from cryodask.kernels.orientations import euler_to_matrix, random_rotations
from cryodask.kernels.symmetry import symmetry_operators
from cryodask.stage import SetView
from cryodask.stages.merge import conflicts, merged_columns
from cryodask.store.identity import make_ids, row_of


def test_set_stages_load_without_torch_and_scipy() -> None:
    code = (
        "import sys; from cryodask.stage import find_stage; "
        f"shapes = {{find_stage(n).shape for n in {NAMES!r}}}; "
        "assert shapes == {'set'}, shapes; assert not {'torch', 'scipy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- merge ---------------------------------------------------------------------------------------------------------------------------
def test_merge_is_the_union_by_id() -> None:
    a, b = a_set("a", ids_of(0, [1, 2, 3])), a_set("b", ids_of(0, [3, 4]))
    out = run("merge", {}, particles=[a, b])
    assert out["particle_id"].tolist() == ids_of(0, [1, 2, 3, 4]).tolist()
    assert len(out["dropped_id"]) == 0


PICKED = {int(i): v for i, v in zip(range(40), np.random.default_rng(0).normal(size=40))}
SETS = st.lists(st.sets(st.integers(0, 39), min_size=1, max_size=20), min_size=2, max_size=4)


@given(SETS, st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_merge_without_conflicts_is_idempotent_and_ignores_the_order(numbers: list[set[int]], random: Any) -> None:
    sets = [a_set(f"s{i}", ids_of(0, sorted(s)), score={"pick_score": [PICKED[n] for n in sorted(s)]}) for i, s in enumerate(numbers)]
    out = run("merge", {}, particles=sets)
    ids = out["particle_id"]
    assert ids.tolist() == ids_of(0, sorted(set().union(*numbers))).tolist()
    columns = merged_columns(sets, ids, ["score"], None)
    assert columns["pick_score"].tolist() == [PICKED[n] for n in sorted(set().union(*numbers))]
    shuffled = random.sample(sets, len(sets))
    assert run("merge", {}, particles=shuffled)["particle_id"].tolist() == ids.tolist()
    assert merged_columns(shuffled, ids, ["score"], None)["pick_score"].tolist() == columns["pick_score"].tolist()
    again = a_set("union", ids, score=columns)
    assert run("merge", {}, particles=[again, sets[0]])["particle_id"].tolist() == ids.tolist()


def two_with_other_poses() -> tuple[SetView, SetView]:
    a = a_set(
        "a",
        ids_of(0, [1, 2, 3]),
        position=at([[0, 0], [0, 9], [0, 99]]),
        pose={"rot_deg": np.float32([1, 2, 3]), "log_likelihood": np.float32([7, 8, 9])},
        class2d={"class_number": np.int32([5, 5, 6])},
    )
    b = a_set(
        "b.class2",
        ids_of(0, [2, 3, 4]),
        position=at([[0, 9], [0, 99], [0, 999]]),
        pose={"rot_deg": np.float32([20, 3, 40]), "log_likelihood": np.float32([80, 9, 81])},
    )
    return a, b


def test_merge_refuses_different_values_of_one_particle() -> None:
    with pytest.raises(InputError) as error:
        run("merge", {}, particles=list(two_with_other_poses()))
    assert error.value.what == "1 particles have different values of pose in a and b.class2."
    assert "prefer: a}" in error.value.way_out
    assert "prefer: b.class2}" in error.value.way_out


def test_merge_takes_the_values_of_the_preferred_source() -> None:
    sets = list(two_with_other_poses())
    for prefer, expected in (("a", [1, 2, 3, 40]), ("b.class2", [1, 20, 3, 40]), ("a.particles", [1, 2, 3, 40])):
        ids = run("merge", {"prefer": prefer}, particles=sets)["particle_id"]
        columns = merged_columns(sets, ids, ["pose"], prefer)
        assert columns["rot_deg"].tolist() == expected
        assert columns["rot_deg"].dtype == np.float32
    with pytest.raises(InputError, match="prefers 'c'"):
        run("merge", {"prefer": "c"}, particles=sets)


def test_merge_compares_parts_that_every_source_has_and_no_images() -> None:
    ids = ids_of(0, [1, 2])
    a = a_set("a", ids, image={"particle_y": [1.0, 2.0]}, class2d={"class_number": np.int32([1, 2])})
    b = a_set("b", ids, image={"particle_y": [5.0, 6.0]})
    assert len(run("merge", {}, particles=[a, b])["particle_id"]) == 2
    assert [
        (c.part, c.count, c.first, c.second) for c in conflicts([a, a_set("c", ids, class2d={"class_number": [2, 2]})], ids, ["class2d"])
    ] == [("class2d", 1, "a", "c")]


def test_merged_values_of_a_part_come_from_one_source_and_gaps_are_filled() -> None:
    nan = np.nan
    ids = ids_of(0, [1, 2, 3])
    a = a_set("a", ids, class2d={"class_number": np.int32([-1, 4, -1]), "class_probability": np.float32([nan, 0.5, nan])})
    b = a_set("b", ids, class2d={"class_number": np.int32([7, 4, -1]), "class_probability": np.float32([0.9, 0.5, nan])})
    assert conflicts([a, b], ids, ["class2d"]) == []
    columns = merged_columns([a, b], ids, ["class2d"], None)
    assert columns["class_number"].tolist() == [7, 4, -1]
    assert np.array_equal(columns["class_probability"], np.float32([0.9, 0.5, nan]), equal_nan=True)
    # a column that one source lacks: the row of the first source counts as a whole
    c = a_set("c", ids, class2d={"class_number": np.int32([7, 4, 2])})
    assert conflicts([b, c], ids, ["class2d"])[0].count == 2
    assert np.array_equal(merged_columns([c, b], ids, ["class2d"], None)["class_probability"], np.full(3, nan, np.float32), equal_nan=True)


def test_merge_ignores_what_is_computed_when_a_set_is_read() -> None:
    ids = ids_of(0, [1])
    a = a_set("a", ids, pose={"rot_deg": [1.0], "origin_y_angstrom": [1.0]})
    b = a_set("b", ids, pose={"rot_deg": [1.0], "origin_y_angstrom": [5.0]})
    run("merge", {}, particles=[a, b])
    assert set(merged_columns([a, b], ids, ["pose"], None)) == {"rot_deg"}


def test_of_two_picks_the_particle_of_the_first_source_stays() -> None:
    a = a_set("a", ids_of(3, [0, 1]), position=at([[0, 0], [500, 500]]))
    b = a_set("b", ids_of(1, [0, 1, 2]), position=at([[0, 29.9], [0, 30.0], [500, 530.1]]))
    out = run("merge", {"nearer_than_angstrom": 30.0}, particles=[a, b])
    assert out["dropped_id"].tolist() == ids_of(1, [0]).tolist()
    assert out["removal_reason"].tolist() == [1]
    back = run("merge", {"nearer_than_angstrom": 30.0}, particles=[b, a])
    assert back["dropped_id"].tolist() == ids_of(3, [0]).tolist()


def test_particles_of_one_pick_or_of_other_exposures_are_left_alone() -> None:
    a = a_set("a", ids_of(0, [0, 1]), position=at([[0, 0], [0, 5]]))
    b = a_set("b", [*ids_of(1, [0], row=2), *ids_of(0, [2])], position=at([[0, 0], [0, 1]]))
    out = run("merge", {"nearer_than_angstrom": 30.0}, particles=[a, b])
    assert len(out["particle_id"]) == 4


def test_a_particle_that_was_dropped_drops_no_other() -> None:
    a = a_set("a", ids_of(0, [0]), position=at([[0, 0]]))
    b = a_set("b", ids_of(1, [0]), position=at([[0, 20]]))
    c = a_set("c", ids_of(2, [0]), position=at([[0, 40]]))
    out = run("merge", {"nearer_than_angstrom": 30.0}, particles=[a, b, c])
    assert out["dropped_id"].tolist() == ids_of(1, [0]).tolist()


def test_unknown_places_are_near_nothing() -> None:
    a = a_set("a", ids_of(0, [0]), position=at([[0, 0]]))
    b = a_set("b", ids_of(1, [0, 1]), position=at([[np.nan, np.nan], [0, 1]]))
    out = run("merge", {"nearer_than_angstrom": 30.0}, particles=[a, b])
    assert out["dropped_id"].tolist() == ids_of(1, [1]).tolist()
    with pytest.raises(InputError, match="no positions"):
        run("merge", {"nearer_than_angstrom": 30.0}, particles=[a, a_set("c", ids_of(1, [0]))])


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_after_a_merge_no_two_sources_hold_one_particle(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sets = []
    for birth in range(3):
        ids = np.unique(ids_of(birth, rng.integers(0, 60, 60), row=rng.integers(0, 3, 60)))
        sets.append(a_set(f"s{birth}", ids, position=at(rng.uniform(0, 100, (len(ids), 2)))))
    out = run("merge", {"nearer_than_angstrom": 8.0}, particles=sets)
    ids = out["particle_id"]
    everything = np.concatenate([s.ids for s in sets])
    assert np.array_equal(np.sort(np.concatenate([ids, out["dropped_id"]])), np.sort(everything))
    columns = merged_columns(sets, everything[np.argsort(everything)], ["position"], None)
    place = dict(zip(np.sort(everything).tolist(), zip(columns["position_y_angstrom"], columns["position_x_angstrom"])))
    expected: list[int] = []  # one source after the other
    for source in sets:
        near = [
            any(row_of(i) == row_of(j) and np.hypot(*np.subtract(place[i], place[j])) < 8.0 for j in expected) for i in source.ids.tolist()
        ]
        expected += [i for i, n in zip(source.ids.tolist(), near) if not n]
    assert ids.tolist() == sorted(expected)


def test_merge_is_refused_by_the_plan_where_it_cannot_be_right() -> None:
    a, b = product("a"), product("b", births=frozenset({"topaz"}))
    assert refusals("merge", {}, particles=[a])[0].startswith("merge takes two sets or more")
    assert "were picked independently in the same exposures" in refusals("merge", {}, particles=[a, b])[0]
    assert "have none" in refusals("merge", {"nearer_than_angstrom": 50}, particles=[a, b])[0]
    assert "prefer names 'c'" in refusals("merge", {"prefer": "c"}, particles=[a, product("b")])[0]
    assert refusals("merge", {"prefer": "b"}, particles=[a, product("b")]) == []
    with_places = [product(p.step, births=p.births, parts={"position": p.step}) for p in (a, b)]
    assert refusals("merge", {"nearer_than_angstrom": 50}, particles=with_places) == []


def test_the_share_that_a_merge_drops_is_that_of_chance() -> None:
    rng = np.random.default_rng(1)
    sets = []
    for birth in range(2):
        ids = make_ids(birth, np.repeat(np.arange(1000), 100), np.tile(np.arange(100), 1000))
        sets.append(a_set(f"s{birth}", ids, position=at(rng.uniform(0, 4000, (len(ids), 2)))))
    out = run("merge", {"nearer_than_angstrom": 100.0}, particles=sets)
    # chance that one of 100 lies in a disc of 100 A in 4000 x 4000 A, without borders: 0.178
    assert len(out["dropped_id"]) / 100_000 == pytest.approx(0.175, abs=0.005)


# --- consensus -----------------------------------------------------------------------------------------------------------------------
def test_consensus_keeps_what_agrees_and_says_why_the_rest_went() -> None:
    first = random_rotations(6, torch.Generator().manual_seed(1)).double()
    by = [3.0, 8.0, 3.0, 3.0, 3.0, 3.0]
    turn = torch.stack([euler_to_matrix(*torch.deg2rad(torch.tensor([0.0, angle, 0.0]))) for angle in by]).double()
    second = turn @ first
    centre = {"centre_y_angstrom": np.zeros(6), "centre_x_angstrom": np.zeros(6)}
    moved = {"centre_y_angstrom": np.array([0, 0, 3, 0, 0, 0.0]), "centre_x_angstrom": np.array([1, 0, 4, 0, 0, np.nan])}
    other = posed(second, **moved)
    other["rot_deg"] = np.where(np.arange(6) == 4, np.nan, other["rot_deg"]).astype(np.float32)
    ids = ids_of(0, np.arange(6))
    a = a_set("a", ids, pose=posed(first, **centre))
    b = a_set("b", ids, pose=other)
    b = a_set("b", np.delete(ids, 3), pose={n: np.delete(v, 3) for n, v in b.read(["pose"]).items()})
    out = run("consensus", {"largest_degrees": 5.0, "largest_angstrom": 4.9}, particles=a, other=b)
    assert out["particle_id"].tolist() == ids[[0]].tolist()
    assert out["dropped_id"].tolist() == ids[1:].tolist()
    assert out["removal_reason"].tolist() == [2, 3, 1, 4, 3]
    without = run("consensus", {"largest_degrees": 5.0}, particles=a, other=b)
    assert without["particle_id"].tolist() == ids[[0, 2, 5]].tolist()


@pytest.mark.parametrize("symmetry", ["C3", "D2", "T", "O", "I1"])
def test_orientations_that_the_point_group_makes_equivalent_agree(symmetry: str) -> None:
    operators = np.array(symmetry_operators(symmetry))
    rng = np.random.default_rng(2)
    first = random_rotations(40, torch.Generator().manual_seed(2)).double()
    mates = torch.from_numpy(operators[rng.integers(1, len(operators), 40)])
    ids = ids_of(0, np.arange(40))
    a, b = a_set("a", ids, pose=posed(first)), a_set("b", ids, pose=posed(first @ mates))
    assert len(run("consensus", {"largest_degrees": 0.01, "symmetry": symmetry}, particles=a, other=b)["particle_id"]) == 40
    with pytest.raises(InputError, match="consensus kept none of 40 particles"):
        run("consensus", {"largest_degrees": 0.01}, particles=a, other=b)
    with pytest.raises(InputError, match="kept none"):  # the other side is another symmetry
        run("consensus", {"largest_degrees": 0.01, "symmetry": symmetry}, particles=a, other=a_set("b", ids, pose=posed(mates @ first)))


def test_consensus_without_centres_refuses_to_compare_them() -> None:
    ids = ids_of(0, [0])
    a = a_set("a", ids, pose=posed(torch.eye(3)[None]))
    with pytest.raises(InputError, match="a and b have none"):
        run("consensus", {"largest_degrees": 5, "largest_angstrom": 3}, particles=a, other=a_set("b", ids, pose=posed(torch.eye(3)[None])))


def test_consensus_of_different_picks_is_refused_by_the_plan() -> None:
    assert refusals("consensus", {}, particles=product("a"), other=product("a")) == ["both sets come from a."]
    apart = refusals("consensus", {}, particles=product("a"), other=product("b", births=frozenset({"topaz"})))
    assert "hold different particles (picked by pick and by topaz)" in apart[0]


# --- match ---------------------------------------------------------------------------------------------------------------------------
def test_match_finds_partners_and_counts_what_does_not_fit() -> None:
    own = a_set("own", ids_of(0, [0, 1, 2, 3]), position=at([[0, 0], [100, 0], [200, 0], [900, 0]], [0, 1, 0, 1]))
    to = a_set("to", ids_of(1, [0, 1, 2, 3, 4]), position=at([[3, 4], [104, 0], [101, 0], [209, 0], [500, 0]], [0, 0, 0, 1, 1]))
    out = run("match", {"nearer_than_angstrom": 9.0}, particles=own, to=to)
    # 104 has 100 near it, whose nearest is 101; 209 is 9 A away, which is not nearer than 9 A
    assert out["particle_id"].tolist() == ids_of(1, [0, 2]).tolist()
    assert out["dropped_id"].tolist() == ids_of(1, [1, 3, 4]).tolist()
    assert out["removal_reason"].tolist() == [2, 1, 1]
    assert out["unmatched_count"] == 2
    assert out["half_conflict_count"] == 1


def test_match_looks_within_the_exposure_only() -> None:
    own = a_set("own", [*ids_of(0, [0], row=1), *ids_of(0, [0], row=3)], position=at([[0, 0], [5, 5]]))
    to = a_set("to", [*ids_of(1, [0], row=2), *ids_of(1, [0], row=3)], position=at([[0, 0], [5, 5]]))
    out = run("match", {"nearer_than_angstrom": 9.0}, particles=own, to=to)
    assert out["particle_id"].tolist() == ids_of(1, [0], row=3).tolist()
    assert out["unmatched_count"] == 1


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_jittered_picks_are_matched_one_to_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(np.arange(6) * 50.0, np.arange(6) * 50.0), -1).reshape(-1, 2)
    kept = np.sort(rng.choice(36, 20, replace=False))
    moved = (grid + rng.uniform(-10, 10, grid.shape))[order := rng.permutation(36)]
    half = rng.integers(0, 2, 36)
    own = a_set("own", ids_of(0, kept), position=at(grid[kept], half[kept]))
    to = a_set("to", ids_of(1, np.arange(36)), position=at(moved, half[order]))
    out = run("match", {"nearer_than_angstrom": 20.0}, particles=own, to=to)
    assert out["particle_id"].tolist() == ids_of(1, np.flatnonzero(np.isin(order, kept))).tolist()
    assert (out["unmatched_count"], out["half_conflict_count"]) == (0, 0)


def test_match_without_any_partner_says_so() -> None:
    own, to = a_set("own", ids_of(0, [0]), position=at([[0, 0]])), a_set("to", ids_of(1, [0]), position=at([[0, 90]]))
    with pytest.raises(InputError, match="match kept none of 1 particles"):
        run("match", {"nearer_than_angstrom": 30.0}, particles=own, to=to)
    elsewhere = product("b", births=frozenset({"topaz"}), sources=frozenset({"import"}))
    assert "different exposures" in refusals("match", {"nearer_than_angstrom": 3}, particles=product("a"), to=elsewhere)[0]


# --- deduplicate ---------------------------------------------------------------------------------------------------------------------
def test_deduplicate_keeps_the_better_particle() -> None:
    line = at([[0, 0], [0, 20], [0, 40], [0, 70]])
    scored = a_set("s", ids_of(0, [0, 1, 2, 3]), position=line, score={"pick_score": np.float32([1, 3, 2, np.nan])})
    out = run("deduplicate", {"nearer_than_angstrom": 30.0}, particles=scored)
    assert out["particle_id"].tolist() == ids_of(0, [1, 3]).tolist()
    plain = run("deduplicate", {"nearer_than_angstrom": 30.0}, particles=a_set("s", ids_of(0, [0, 1, 2, 3]), position=line))
    # the lower id first: 1 goes for 0, so that 2 may stay; 30 A is not nearer than 30 A
    assert plain["particle_id"].tolist() == ids_of(0, [0, 2, 3]).tolist()
    assert plain["removal_reason"].tolist() == [1]


@given(st.integers(0, 10_000), st.floats(1, 60))
@settings(max_examples=40, deadline=None)
def test_deduplicate_leaves_none_too_near_and_drops_none_without_a_better_neighbour(seed: int, limit: float) -> None:
    rng = np.random.default_rng(seed)
    ids = np.unique(make_ids(rng.integers(0, 2, 80), rng.integers(0, 3, 80), rng.integers(0, 500, 80)))
    places, score = rng.uniform(0, 200, (len(ids), 2)), rng.integers(0, 5, len(ids)).astype(np.float32)
    view = a_set("s", ids, position=at(places), score={"pick_score": score})
    out = run("deduplicate", {"nearer_than_angstrom": limit}, particles=view)
    expected: list[int] = []  # one after the other
    for i in np.lexsort((ids, -score)):
        if not any(row_of(ids[i]) == row_of(ids[j]) and np.hypot(*(places[i] - places[j])) < limit for j in expected):
            expected.append(int(i))
    assert out["particle_id"].tolist() == ids[np.sort(expected)].tolist()
