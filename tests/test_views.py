"""Searches over all views: what the coarser grid rules out was unlikely."""

import numpy as np
import pytest
import torch
from _particles import blob_map, ctf_columns, project

from cryodask.kernels import expectation, polar, views
from cryodask.kernels.orientations import random_rotations
from cryodask.kernels.symmetry import symmetry_operators

BOX, PIXEL, COUNT = 48, 4.0, 8


@pytest.mark.heavy
@pytest.mark.parametrize("symmetry", ["C1", "D2"])
def test_the_coarser_grid_rules_out_hardly_any_evidence(symmetry):
    """Shifts over a third of the box at a signal-to-noise ratio of 0.02."""
    volume = blob_map(BOX, symmetry, blobs=20, width_px=1.2, reach=0.2)
    g = torch.Generator().manual_seed(0)
    origins = (torch.rand(COUNT, 2, generator=g) - 0.5) * BOX / 3
    columns = ctf_columns(COUNT)
    clean = project(volume, random_rotations(COUNT, g), origins, columns, PIXEL)
    scale = float(np.sqrt(0.02 / clean.var()))
    images = (scale * clean + np.random.default_rng(1).standard_normal(clean.shape)).astype(np.float32)
    data = expectation.load_particles(images, columns, np.arange(COUNT), pixel_size_angstrom=PIXEL, rings=13, mask_radius_angstrom=90.0)
    rows = torch.arange(COUNT)
    found, shifts = [], []
    for pruned in (False, True):
        made = views.make_views(
            scale * volume, 12, grid=data.grid, turn=torch.eye(3), operators=symmetry_operators(symmetry), reach_px=10.0, pruned=pruned
        )
        assert len(made.offsets) > 2 * views.KEPT_SHIFTS
        found.append(views.evidence(data, rows, made, torch.ones(BOX // 2), 5.0))
        shifts.append(views.start_poses(data, rows, made, torch.ones(BOX // 2), 5.0, 1).shifts_px[:, 0])
    lost = found[0] - found[1]
    assert float(lost.min()) > -0.01
    assert float(lost.mean()) < 0.05
    assert torch.allclose(*shifts)


@pytest.mark.parametrize("symmetry", ["C1", "C2", "C3"])
def test_all_views_can_be_reached_from_the_coarser_grid(symmetry):
    grid = polar.polar_grid(BOX, 13)
    made = views.make_views(blob_map(BOX, symmetry), 12, grid=grid, turn=torch.eye(3), operators=symmetry_operators(symmetry), reach_px=3.0)
    assert made.parents is not None
    children = made.bank.place[(made.parent_pixels[:, None] * 4 + torch.arange(4)).reshape(-1)]
    assert sorted(children.tolist()) == list(range(len(made.bank.rotations)))
