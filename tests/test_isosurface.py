"""The isosurface is closed, faces outwards, and lies where the density crosses the level."""

from __future__ import annotations

import numpy as np
import pytest

from cryodask.kernels.isosurface import isosurface, reduced


def ball(radius: float, size: int = 40, centre: tuple[float, float, float] = (0, 0, 0)) -> np.ndarray:
    z, y, x = np.mgrid[:size, :size, :size] - (size - 1) / 2
    return radius - np.sqrt((z - centre[0]) ** 2 + (y - centre[1]) ** 2 + (x - centre[2]) ** 2)


def volume(vertices: np.ndarray, triangles: np.ndarray) -> float:
    a, b, c = (vertices[triangles[:, i], ::-1].astype(np.float64) for i in range(3))
    return float(np.einsum("ij,ij->i", a, np.cross(b, c)).sum() / 6)


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_every_edge_belongs_to_two_triangles(seed):
    density = ball(12) if seed is None else np.random.default_rng(seed).normal(size=(9, 10, 11))
    _, triangles = isosurface(density, 0.0)
    edges = np.sort(np.concatenate([triangles[:, [0, 1]], triangles[:, [1, 2]], triangles[:, [2, 0]]]), axis=1)
    _, counts = np.unique(edges, axis=0, return_counts=True)
    assert (counts % 2 == 0).all()
    if seed is None:
        assert (counts == 2).all()


def test_its_volume_is_that_of_the_ball_and_positive():
    assert volume(*isosurface(ball(12), 0.0)) == pytest.approx(4 / 3 * np.pi * 12**3, rel=0.02)


def test_vertices_lie_on_the_surface():
    vertices, _ = isosurface(ball(12, centre=(3, 0, -2)), 0.0)
    distance = np.linalg.norm(vertices - (np.array([3, 0, -2]) + 19.5), axis=1)
    assert np.abs(distance - 12).max() < 0.25


def test_density_that_reaches_the_border_is_closed_there():
    vertices, triangles = isosurface(ball(12, centre=(19, 0, 0)), 0.0)
    assert 0.4 * 4 / 3 * np.pi * 12**3 < volume(vertices, triangles) < 0.6 * 4 / 3 * np.pi * 12**3


@pytest.mark.parametrize("level", [1e9, -1e9])
def test_a_level_that_nothing_crosses_gives_nothing_or_the_box(level):
    vertices, triangles = isosurface(ball(12), level)
    assert (len(triangles) == 0) == (level > 0)
    assert len(vertices) >= 0


def test_a_reduced_map_has_the_mean_of_its_blocks():
    density = np.random.default_rng(0).normal(size=(50, 50, 50)).astype(np.float32)
    small = reduced(density, 25)
    assert small.shape == (25, 25, 25)
    assert small[3, 4, 5] == pytest.approx(density[6:8, 8:10, 10:12].mean(), abs=1e-6)
    assert reduced(density, 50) is density
