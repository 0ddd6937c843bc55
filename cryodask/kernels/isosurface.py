"""Isosurface of a map as triangles: naive surface nets (Gibson 1998, Lecture Notes in Computer Science 1496, 888)."""

from __future__ import annotations

import numpy as np

_CORNERS = np.array([[z, y, x] for z in (0, 1) for y in (0, 1) for x in (0, 1)])


def isosurface(volume: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Closed surface around the voxels above a level.

    Every cube of 2 x 2 x 2 voxels that the surface passes through has one vertex, the mean of where it crosses the cube's edges; every edge
    between two voxels on different sides gives two triangles between the four cubes around it. The border of the map counts as below.

    Parameters
    ----------
    volume : ndarray, `(z, y, x)`
    level : float

    Returns
    -------
    vertices : ndarray, `(vertex, 3)`, float32
        (z, y, x) in voxels of ``volume``.
    triangles : ndarray, `(triangle, 3)`, int32
        Anticlockwise as seen from outside, in a frame of right-handed (x, y, z).
    """
    padded = np.pad(volume.astype(np.float32, copy=False), 1, constant_values=min(float(volume.min()), level) - 1.0)
    above = padded > level
    shape = tuple(n - 1 for n in padded.shape)
    count = sum(above[tuple(slice(c, c + n) for c, n in zip(corner, shape))].astype(np.uint8) for corner in _CORNERS)
    cubes = np.argwhere((count > 0) & (count < 8))
    number = np.full(shape, -1, np.int32)
    number[tuple(cubes.T)] = np.arange(len(cubes), dtype=np.int32)
    vertices = _crossings(padded, above, cubes, level)
    triangles = [_around(above, number, axis) for axis in range(3)]
    return (vertices - 1.0).astype(np.float32), np.concatenate(triangles)


def _crossings(padded: np.ndarray, above: np.ndarray, cubes: np.ndarray, level: float) -> np.ndarray:
    """Mean of the points where the surface crosses the edges of each cube, `(cube, 3)`."""
    total, crossed = np.zeros((len(cubes), 3)), np.zeros(len(cubes))
    for axis in range(3):
        for corner in _CORNERS[_CORNERS[:, axis] == 0]:
            first = cubes + corner
            second = first.copy()
            second[:, axis] += 1
            a, b = padded[tuple(first.T)], padded[tuple(second.T)]
            crosses = above[tuple(first.T)] != above[tuple(second.T)]
            share = np.where(crosses, (level - a) / np.where(b == a, 1.0, b - a), 0.0)
            point = first.astype(np.float64)
            point[:, axis] += share
            total += np.where(crosses[:, None], point, 0.0)
            crossed += crosses
    return total / np.maximum(crossed, 1.0)[:, None]


def _around(above: np.ndarray, number: np.ndarray, axis: int) -> np.ndarray:
    """Triangles of the edges along an axis, `(triangle, 3)`."""
    low = np.take(above, range(above.shape[axis] - 1), axis)
    high = np.take(above, range(1, above.shape[axis]), axis)
    edges = np.argwhere(low != high)
    outwards = low[tuple(edges.T)]
    one, two = (axis + 1) % 3, (axis + 2) % 3
    ring = []
    for down_one, down_two in ((0, 0), (1, 0), (1, 1), (0, 1)):
        cube = edges.copy()
        cube[:, one] -= down_one
        cube[:, two] -= down_two
        ring.append(number[tuple(cube.T)])
    a, b, c, d = ring
    # axes are stored (z, y, x): their order is left-handed in (x, y, z), which turns the ring around
    flipped = outwards
    first = np.stack([a, np.where(flipped, c, b), np.where(flipped, b, c)], 1)
    second = np.stack([a, np.where(flipped, d, c), np.where(flipped, c, d)], 1)
    return np.concatenate([first, second]).astype(np.int32)


def reduced(volume: np.ndarray, longest: int) -> np.ndarray:
    """A map averaged over blocks of voxels until no side is longer than ``longest``."""
    step = -(-max(volume.shape) // longest)
    if step == 1:
        return volume
    depth, height, width = (n // step for n in volume.shape)
    blocks = volume[: depth * step, : height * step, : width * step].reshape(depth, step, height, step, width, step)
    return np.asarray(blocks.mean((1, 3, 5), dtype=np.float32))
