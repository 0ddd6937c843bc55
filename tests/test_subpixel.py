"""Maxima between the samples of a grid, against parabolas whose tops are known."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cryodask.kernels.expectation import shift_grid
from cryodask.kernels.subpixel import top_between

STEP = 1.3


@settings(deadline=None)
@given(st.floats(-1.9, 1.9), st.floats(-1.9, 1.9), st.floats(0.1, 30.0))
def test_the_top_of_a_paraboloid_is_found_between_the_samples(y, x, bend):
    offsets = shift_grid(STEP, 4.0 * STEP)
    top = torch.tensor([[y, x]])
    values = -bend * (offsets - top).square().sum(1)[None]
    torch.testing.assert_close(top_between(values, offsets), top, atol=2e-3, rtol=0)


def test_on_the_rim_the_sample_itself_is_the_place():
    offsets = shift_grid(STEP, 2.0 * STEP)
    corner = int((offsets @ torch.tensor([1.0, 0.0])).argmax())
    values = torch.zeros(1, len(offsets))
    values[0, corner] = 1.0
    torch.testing.assert_close(top_between(values, offsets)[0], offsets[corner])
