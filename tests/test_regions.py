"""Regions of the space of components: which particles are in a polygon, what order of edits means, and the stage that keeps them."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from cryodask.edits.log import rank
from cryodask.edits.operations import read_operations
from cryodask.edits.regions import Region, chosen, region_set
from cryodask.errors import InputError
from cryodask.kernels.polygons import in_polygon
from cryodask.stage import SetView
from cryodask.stages.select_region import SelectRegionParams, select_region

OF = "variability/0a1b"
SQUARE = [(0.0, 0.0), (4.0, 0.0), (4.0, 4.0), (0.0, 4.0)]


def grid(low: float, high: float, count: int) -> np.ndarray:
    axis = np.linspace(low, high, count)
    return np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)


# --- polygons --------------------------------------------------------------------------------------------------------------------
def test_a_triangle_holds_what_its_edges_say():
    points = grid(-2, 5, 71)
    found = in_polygon(points, np.array([(0, 0), (4, 0), (0, 3)]))
    x, y = points.T
    clear = np.abs(3 * x + 4 * y - 12) > 1e-9
    assert_array_equal(found[clear], ((x >= 0) & (y >= 0) & (3 * x + 4 * y < 12))[clear])


def test_the_share_of_random_points_in_a_circle_is_that_of_its_area():
    points = np.random.default_rng(0).uniform(-1, 1, (200_000, 2)).astype(np.float32)
    angles = 2 * np.pi * np.arange(200) / 200
    found = in_polygon(points, 0.8 * np.stack([np.cos(angles), np.sin(angles)], 1)).mean()
    # a regular polygon of 200 corners has 100 sin(2 pi / 200) r^2 = 2.0103 for r = 0.8; a square of side 2 has 4: standard error 0.0011
    assert found == pytest.approx(2.0103 / 4, abs=0.004)


def test_a_concave_polygon_leaves_its_bay_out_and_direction_and_start_do_not_matter():
    corners = np.array([(0, 0), (5, 0), (5, 5), (0, 5), (0, 4), (4, 4), (4, 1), (0, 1)], float)
    points = grid(0.25, 4.75, 10)
    found = in_polygon(points, corners)
    x, y = points.T
    assert_array_equal(found, (y < 1) | (y > 4) | (x > 4))
    for same in (corners[::-1], np.roll(corners, 3, 0)):
        assert_array_equal(in_polygon(points, same), found)


def test_points_on_a_shared_edge_are_in_exactly_one_of_two_neighbours():
    rng = np.random.default_rng(1)
    a, b, left, right = rng.normal(size=(4, 2))
    left, right = (a + b) / 2 + (left - right), (a + b) / 2 - (left - right)
    on_edge = a + rng.random((5000, 1)) * (b - a)
    both = in_polygon(on_edge, np.array([a, b, left])).astype(int) + in_polygon(on_edge, np.array([b, a, right]))
    assert_array_equal(both, 1)


def test_what_is_enclosed_twice_or_has_no_coordinates_is_outside():
    twice = np.array([(0, 0), (4, 0), (4, 4), (0, 4), (0, 0), (2, 0), (2, 4), (0, 4)], float)
    assert_array_equal(in_polygon(np.array([(1.0, 1.0), (3.0, 1.0), (np.nan, 1.0), (1.0, np.inf)]), twice), [False, True, False, False])
    assert not in_polygon(np.zeros((0, 2), np.float32), np.array(SQUARE)).any()
    assert not in_polygon(np.array([(1.0, 1.0)]), np.ones((3, 2))).any()  # all corners in one place


# --- regions ---------------------------------------------------------------------------------------------------------------------
COORDINATES = [np.array([1.0, 3.0, 5.0, np.nan, 1.0], np.float32), np.array([1.0, 3.0, 1.0, 1.0, np.nan], np.float32)]


def test_a_particle_in_any_region_is_kept_and_the_ends_of_a_range_belong_to_it():
    square = Region(components=(1, 2), points=SQUARE)
    above = Region(components=(1,), points=[(5.0,), (3.0,)])
    assert_array_equal(chosen([square], COORDINATES), [True, True, False, False, False])
    assert_array_equal(chosen([above], COORDINATES), [False, True, True, False, False])
    assert_array_equal(chosen([square, above], COORDINATES), [True, True, True, False, False])
    assert not chosen([], COORDINATES).any()
    turned = Region(components=(2, 1), points=[(b, a) for a, b in SQUARE])
    assert_array_equal(chosen([turned], np.stack(COORDINATES)), chosen([square], COORDINATES))
    with pytest.raises(InputError, match="A region is of component 3, but there are 2"):
        chosen([Region(components=(3,), points=[(0.0,), (1.0,)])], COORDINATES)


@pytest.mark.parametrize(
    ("components", "points", "said"),
    [
        ([1, 1], SQUARE, "two different components"),
        ([1, 2], SQUARE[:2], "at least three points"),
        ([1, 2], [(0,), (1,), (2,)], "2 coordinates"),
        ([1], [(0,), (1,), (2,)], "two points, its ends"),
        ([1], [(0, 1), (1, 1)], "1 coordinate, "),
        ([], [(0,), (1,)], "at least 1"),
        ([7, 1], SQUARE, "less than or equal to 6"),
        ([1, 2], SQUARE * 51, "at most 200"),
        ([1, 2], [*SQUARE, (float("nan"), 0)], "finite"),
        ([1, 2], [*SQUARE, (1e7, 0)], "less than or equal to 1000000"),
    ],
)
def test_wrong_regions_are_refused(components: list[int], points: Any, said: str):
    with pytest.raises(ValueError, match=said):
        Region(components=components, points=points)
    with pytest.raises(InputError, match=said):
        read_operations("regions", [op(1, "draw", region={"components": components, "points": points})])


# --- operations ------------------------------------------------------------------------------------------------------------------
def op(n: int, do: str, **more: Any) -> dict[str, Any]:
    return {"id": f"{n:032x}", "n": n, "do": do, "row": 0, "of": OF, **more}


RANGE = {"components": [1], "points": [[0.0], [1.0]]}
OPS = [
    op(1, "draw", region=RANGE, reason="open"),
    op(2, "draw", region={"components": [2, 1], "points": SQUARE}),
    op(3, "draw", region=RANGE),
    op(4, "remove", drawn=f"{1:032x}"),
    op(5, "remove", drawn=f"{3:032x}"),
    op(6, "restore", drawn=f"{1:032x}"),
]


def test_the_set_is_the_same_in_whatever_order_edits_arrive():
    stored = read_operations("regions", OPS)
    wanted = region_set(stored, OF)
    assert [one["components"] for one in wanted["regions"]] == [(1,), (2, 1)]
    assert wanted["reasons"] == ["open", ""]
    for some in permutations(stored):
        assert region_set(sorted(some, key=rank), OF) == wanted
    assert region_set(stored, "variability/ff") == {"regions": [], "reasons": []}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (op(1, "draw"), "needs region"),
        (op(1, "remove"), "needs drawn"),
        (op(1, "remove", drawn="d" * 32, region=RANGE), "needs drawn"),
        (op(1, "draw", region=RANGE, reason="x" * 201), "at most 200"),
        ({**op(1, "draw", region=RANGE), "of": "../x"}, "of"),
        ({**op(1, "draw", region=RANGE), "row": 3}, "row"),
    ],
)
def test_wrong_edits_are_refused(wrong: dict[str, Any], said: str):
    with pytest.raises(InputError, match=said):
        read_operations("regions", [wrong])


# --- the stage -------------------------------------------------------------------------------------------------------------------
def view() -> dict[str, list[SetView]]:
    columns = {"component1": COORDINATES[0], "component2": COORDINATES[1]}
    return {"particles": [SetView("variability", np.arange(10, 15), ("components",), lambda parts: columns)]}


def test_the_stage_keeps_them_and_says_why_others_are_not():
    params = SelectRegionParams(regions=({"components": [1, 2], "points": SQUARE},))
    found = select_region.functions(params, view())
    assert_array_equal(found["particle_id"], [10, 11])
    assert_array_equal(found["dropped_id"], [12, 13, 14])
    assert_array_equal(found["removal_reason"], [1, 2, 2])


def test_a_region_without_particles_is_explained():
    with pytest.raises(InputError, match="select_region kept none of 5 particles"):
        select_region.functions(SelectRegionParams(regions=({"components": [1], "points": [(8.0,), (9.0,)]},)), view())
