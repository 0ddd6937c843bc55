"""Masks as people choose and draw them: where the edge lies, what order means, and the coarse picture of a page against the real mask."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal

from cryodask.edits.log import rank
from cryodask.edits.masks import NUMBERS, recipe
from cryodask.edits.operations import read_operations
from cryodask.errors import InputError
from cryodask.kernels.masking import low_pass
from cryodask.kernels.regions import Drawn, low_passed, soft_mask
from cryodask.stages.draw_mask import DrawMaskParams, draw_mask

OF = "refine3d/0a1b"


def grid(n: int) -> np.ndarray:
    return np.stack(np.mgrid[:n, :n, :n].astype(float), -1) - n // 2


def masked(volume: np.ndarray, drawn: Any = (), edge: float = 8.0, **more: Any) -> np.ndarray:
    options = {"pixel_size_angstrom": 2.0, "extend_angstrom": 4.0, "edge_angstrom": edge, **more}
    return soft_mask(volume, 0.5, drawn=drawn, **options)


def test_a_drawn_ball_is_one_half_at_its_radius_and_soft_on_both_sides():
    empty = np.zeros((48, 48, 48), np.float32)
    ball = masked(empty, [Drawn(((4.0, -6.0, 10.0),), 20.0)])
    away = np.linalg.norm(grid(48) * 2.0 - (4.0, -6.0, 10.0), axis=-1)
    expected = 0.5 + 0.5 * np.cos(np.pi * np.clip((away - 20.0 + 4.0) / 8.0, 0, 1))
    assert_allclose(ball, expected, atol=1e-5)
    assert ball[away < 16].min() == 1.0
    assert ball[away > 24.001].max() < 1e-6
    # volume of a ball of radius 20 A in voxels of 8 cubic A; its soft edge adds a little outside: 4/3 pi 20^3 / 8 = 4189
    assert ball.sum() == pytest.approx(4189, rel=0.03)


def test_a_brush_is_round_at_its_ends_and_a_line_of_points_is_the_union_of_its_parts():
    empty = np.zeros((40, 40, 40), np.float32)
    points = ((0.0, -20.0, 0.0), (0.0, 20.0, 0.0), (0.0, 20.0, 16.0))
    whole = masked(empty, [Drawn(points, 8.0)])
    parts = masked(empty, [Drawn(points[:2], 8.0), Drawn(points[1:], 8.0)])
    assert_array_equal(whole, parts)
    places = grid(40) * 2.0
    away = np.linalg.norm(places - np.clip(places[..., 1], -20, 20)[..., None] * (0, 1, 0), axis=-1)
    first = masked(empty, [Drawn(points[:2], 8.0)])
    assert_allclose(first, 0.5 + 0.5 * np.cos(np.pi * np.clip((away - 4.0) / 8.0, 0, 1)), atol=1e-5)


def test_what_is_erased_is_gone_and_what_is_drawn_after_it_is_there():
    volume = (np.linalg.norm(grid(40), axis=-1) < 10).astype(np.float32)
    plain = masked(volume)
    hole, again = Drawn(((0.0, 0.0, 0.0),), 12.0, erase=True), Drawn(((0.0, 0.0, 0.0),), 6.0)
    assert plain[20, 20, 20] == 1.0
    assert masked(volume, [hole])[20, 20, 20] == 0.0
    assert masked(volume, [hole, again])[20, 20, 20] == 1.0
    assert masked(volume, [again, hole])[20, 20, 20] == 0.0
    # far from what is drawn, not one bit is different
    far = np.linalg.norm(grid(40) * 2.0, axis=-1) > 16.1
    assert_array_equal(masked(volume, [hole])[far], plain[far])


def test_what_lies_outside_the_box_changes_nothing():
    empty = np.zeros((16, 16, 16), np.float32)
    assert not masked(empty, [Drawn(((100.0, 0.0, 0.0),), 20.0), Drawn(((0.0, -1e5, 0.0), (0.0, -900.0, 0.0)), 20.0)]).any()


@pytest.mark.parametrize("n", [32, 33])
def test_the_low_pass_is_that_of_stage_mask(n: int):
    volume = np.random.default_rng(n).normal(size=(n, n, n)).astype(np.float32)
    assert_allclose(low_passed(volume, 2.0, 10.0), low_pass(torch.from_numpy(volume), 2.0, 10.0).numpy(), atol=2e-6)


def test_a_coarse_grid_holds_the_same_low_passed_map():
    n = 64
    volume = np.random.default_rng(1).normal(size=(n, n, n)).astype(np.float32)
    fine = low_passed(volume, 1.5, 15.0)
    assert_allclose(low_passed(volume, 1.5, 15.0, 32), fine[::2, ::2, ::2], atol=2e-6)


def test_the_mask_of_a_page_is_that_of_the_stage():
    """On a grid of half the voxels, the regions above one half agree: Dice coefficient at least 0.97."""
    n, pixel = 96, 2.0
    places = grid(n) * pixel
    volume = sum(np.exp(-(np.linalg.norm(places - c, axis=-1) ** 2) / (2 * 14.0**2)) for c in ((0, 0, 0), (30, 10, -20), (-25, 20, 15)))
    params = DrawMaskParams(threshold=0.4, strokes=({"points": ((0.0, -50.0, 0.0), (0.0, -30.0, 20.0)), "radius_angstrom": 12.0},))
    fine = draw_mask.process(params, final_map=volume.astype(np.float32), map_pixel_size_angstrom=pixel, context=None)["solvent_mask"]
    small = low_passed(volume, pixel, 15.0, 48)
    drawn = [Drawn(one.points, one.radius_angstrom, one.erase) for one in params.strokes]
    # the boundary lies half a voxel beyond the centres of the outermost ones
    coarse = soft_mask(
        small, 0.4, pixel_size_angstrom=2 * pixel, extend_angstrom=7.0 + pixel / 2, edge_angstrom=12.0, drawn=drawn, centre=n / 4
    )
    a, b = fine[::2, ::2, ::2] > 0.5, coarse > 0.5
    assert 2 * (a & b).sum() / (a.sum() + b.sum()) > 0.97
    assert np.abs(fine[::2, ::2, ::2] - coarse).max() < 0.35


def test_the_stage_explains_an_empty_mask_and_takes_a_threshold_of_zero():
    volume = np.ones((8, 8, 8), np.float32)
    with pytest.raises(InputError, match="The mask is empty"):
        draw_mask.process(DrawMaskParams(threshold="none"), final_map=volume, map_pixel_size_angstrom=2.0, context=None)
    all_of_it = draw_mask.process(DrawMaskParams(threshold=0.0), final_map=volume, map_pixel_size_angstrom=2.0, context=None)
    assert all_of_it["solvent_mask"].min() == 1.0


# --- operations ------------------------------------------------------------------------------------------------------------------
def op(n: int, do: str, **more: Any) -> dict[str, Any]:
    return {"id": f"{n:032x}", "n": n, "do": do, "row": 0, "of": OF, **more}


STROKE = {"points": [[1.0, 2.0, 3.0]], "radius_angstrom": 9.0}
OPS = [
    op(1, "set", name="threshold", value=0.02),
    op(2, "draw", stroke=STROKE),
    op(3, "set", name="threshold", value="none"),
    op(4, "draw", stroke={**STROKE, "erase": True}),
    op(5, "remove", drawn=f"{2:032x}"),
]


def test_the_recipe_is_the_same_in_whatever_order_edits_arrive():
    stored = read_operations("masks", OPS)
    wanted = recipe(stored, OF)
    assert wanted == {**NUMBERS, "threshold": "none", "strokes": [stored[3]["stroke"]]}
    for some in permutations(stored):
        assert recipe(sorted(some, key=rank), OF) == wanted
    back = [*stored, *read_operations("masks", [op(6, "restore", drawn=f"{2:032x}")])]
    assert [s["erase"] for s in recipe(back, OF)["strokes"]] == [False, True]
    assert recipe(back, "refine3d/ff") == {**NUMBERS, "strokes": []}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (op(1, "set", name="threshold"), "needs name and value"),
        (op(1, "set", name="extend_angstrom", value="auto"), "a number of Angstrom"),
        (op(1, "set", name="lowpass_angstrom", value=0), "between 0 and 1000"),
        (op(1, "set", name="colour", value=1.0), "name"),
        (op(1, "draw"), "needs stroke"),
        (op(1, "draw", stroke={**STROKE, "points": []}), "at least 1"),
        (op(1, "draw", stroke={**STROKE, "points": [[0, 0, 0]] * 201}), "at most 200"),
        (op(1, "draw", stroke={**STROKE, "radius_angstrom": float("nan")}), "finite"),
        (op(1, "remove"), "needs drawn"),
        ({**op(1, "draw", stroke=STROKE), "row": 3}, "row"),
        ({**op(1, "draw", stroke=STROKE), "of": "../x"}, "of"),
    ],
)
def test_wrong_edits_are_refused(wrong: dict[str, Any], said: str):
    with pytest.raises(InputError, match=said):
        read_operations("masks", [wrong])
