"""Positions of maxima between grid samples."""

from __future__ import annotations

import torch
from torch import Tensor


def vertex(before: Tensor, middle: Tensor, after: Tensor) -> Tensor:
    """Position of the vertex of a parabola through three samples, -0.5 to 0.5 of their spacing from the middle one."""
    bend = (before - 2.0 * middle + after).clamp(max=-1e-12)
    return (0.5 * (before - after) / bend).clamp(-0.5, 0.5)


def top_between(values: Tensor, offsets: Tensor) -> Tensor:
    """Offset `(n, 2)` of the maximum of functions sampled on a square grid, by a parabola along each axis.

    Near its maximum the logarithm of a likelihood is a parabola. If a neighbour is missing (at the rim of the grid), the sample itself is
    the position along that axis.

    Parameters
    ----------
    values : Tensor, `(n, offset)`
    offsets : Tensor, `(offset, 2)`
        Positions of the samples; the smallest distance between two of them is the grid spacing.
    """
    best = values.argmax(1)
    place = offsets[best]
    apart = torch.cdist(offsets, offsets)
    step = apart[apart > 0].min()
    moves = []
    for axis in range(2):
        unit = torch.zeros_like(offsets[:1])
        unit[0, axis] = step
        sides = []
        for sign in (-1.0, 1.0):
            distance, neighbour = torch.cdist(offsets + sign * unit, offsets).min(1)
            sides.append((neighbour[best], distance[best] < 0.01 * step))
        (left, has_left), (right, has_right) = sides
        samples = (values.gather(1, index[:, None])[:, 0] for index in (left, best, right))
        moves.append(torch.where(has_left & has_right, step * vertex(*samples), torch.zeros_like(place[:, 0])))
    return place + torch.stack(moves, -1)
