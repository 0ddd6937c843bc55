"""Positions of maxima between grid samples."""

from __future__ import annotations

from torch import Tensor


def vertex(before: Tensor, middle: Tensor, after: Tensor) -> Tensor:
    """Position of the vertex of a parabola through three samples, -0.5 to 0.5 of their spacing from the middle one."""
    bend = (before - 2.0 * middle + after).clamp(max=-1e-12)
    return (0.5 * (before - after) / bend).clamp(-0.5, 0.5)
