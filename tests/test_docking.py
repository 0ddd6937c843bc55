"""The judge of the demo: where a molecule lies in a refined map of either hand, from poses of which some are wrong."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from cryodask.kernels.orientations import random_rotations
from cryodask.kernels.symmetry import symmetry_operators
from cryodask.simulate.docking import dock
from cryodask.simulate.model import beta_galactosidase, clpb, density_map

MIRROR = np.diag([1.0, 1.0, -1.0])
T = np.array([4.0, -7.0, 2.5])


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_molecule_without_symmetry_is_found_in_a_map_of_either_hand(mirrored):
    generator = torch.Generator().manual_seed(3)
    true = random_rotations(300, generator).double()
    frame = random_rotations(1, generator)[0].double()
    found = torch.from_numpy(Rotation.from_rotvec(np.random.default_rng(0).normal(0.0, 0.017, (300, 3))).as_matrix()) @ true @ frame.T
    if mirrored:
        found = torch.from_numpy(MIRROR) @ found @ torch.from_numpy(MIRROR)
    found[:90] = random_rotations(90, generator).double()
    displacement = (found @ torch.from_numpy(T))[:, [1, 0]].numpy() + np.random.default_rng(1).normal(0.0, 1.0, (300, 2))
    docked = dock(found, true, displacement, "C1")
    assert docked.mirrored is mirrored
    assert 0.69 < (docked.degrees < 12.0).mean() < 0.72
    turn = (MIRROR if mirrored else np.eye(3)) @ frame.numpy()
    assert np.abs(docked.turn - turn).max() < 0.01
    assert np.abs(docked.shift_angstrom.numpy() - T).max() < 0.4
    poses, moved = docked.poses(true)
    assert torch.allclose(poses[90:], found[90:], atol=0.1)
    assert np.abs(moved[90:].numpy() + displacement[90:]).mean() < 1.2


def test_what_the_docking_says_of_a_map_is_where_its_density_lies():
    """The mirrored and shifted map of the molecule projects, under the poses of the map, to the same images."""
    generator = torch.Generator().manual_seed(5)
    true = random_rotations(40, generator).double()
    frame = random_rotations(1, generator)[0].double()
    mirror = torch.from_numpy(MIRROR)
    found = mirror @ true @ frame.T @ mirror
    docked = dock(found, true, (found @ torch.from_numpy(T))[:, [1, 0]].numpy(), "C1")
    there = clpb().placed(docked.turn, docked.shift_angstrom.numpy())
    for element, points in there.positions.items():
        seen = points @ found[7, :2].numpy().T
        want = clpb().positions[element] @ true[7, :2].numpy().T + T @ found[7, :2].numpy().T
        assert np.abs(seen - want).max() < 1e-4


def test_mates_of_a_point_group_count_as_one():
    generator = torch.Generator().manual_seed(7)
    true = random_rotations(120, generator).double()
    operators = torch.from_numpy(np.array(symmetry_operators("D2")))
    axes = torch.tensor([[0.0, 1, 0], [0, 0, 1], [1, 0, 0]], dtype=torch.float64)
    found = true @ axes.T @ operators[torch.randint(4, (120,), generator=generator)]
    docked = dock(found, true, np.zeros((120, 2)), "D2")
    assert docked.degrees.max() < 0.1
    assert np.abs(docked.shift_angstrom.numpy()).max() < 1e-4
    # the axes of the map are those of the molecule in another order: its density is the same up to that order
    volume, there = (density_map(m, 32, 7.0) for m in (beta_galactosidase(), beta_galactosidase().placed(docked.turn, np.zeros(3))))
    assert any(np.allclose(there, volume.transpose(order), atol=1e-3) for order in permutations(range(3)))
