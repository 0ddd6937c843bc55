"""Euler angles, the HEALPix grid, random rotations, angular errors, random numbers by particle."""

import numpy as np
import pytest
import torch

from cryodask.kernels import orientations as o
from cryodask.kernels.randomness import uniforms
from cryodask.kernels.symmetry import symmetry_operators


def test_euler_angles_of_a_matrix_give_the_matrix_back():
    rotations = o.random_rotations(200, torch.Generator().manual_seed(0)).double()
    back = o.euler_to_matrix(*o.matrix_to_euler(rotations))
    assert torch.allclose(back, rotations, atol=1e-6)


@pytest.mark.parametrize("tilt", [0.0, 180.0])
def test_euler_angles_survive_at_the_poles(tilt):
    angles = torch.deg2rad(torch.tensor([[30.0, tilt, 75.0], [-100.0, tilt, 10.0]], dtype=torch.float64))
    rotations = o.euler_to_matrix(*angles.T)
    rot, tilt_back, psi = o.matrix_to_euler(rotations)
    assert torch.allclose(rot, torch.zeros(2, dtype=torch.float64))
    assert torch.allclose(o.euler_to_matrix(rot, tilt_back, psi), rotations, atol=1e-6)


def test_euler_matrix_is_relions():
    # PEERS: `relion_project` of blobs at known angles; rows for rot 25, tilt 70, psi -40, computed from Rz(psi) Ry(tilt) Rz(rot)
    angles = torch.deg2rad(torch.tensor([25.0, 70.0, -40.0], dtype=torch.float64))
    want = np.array([[0.5091135, -0.4718484, -0.7198463], [0.5232168, 0.8450195, -0.1838495], [0.8516507, 0.3971312, 0.3420201]])
    rz = lambda t: np.array([[np.cos(t), np.sin(t), 0], [-np.sin(t), np.cos(t), 0], [0, 0, 1]])  # noqa: E731
    ry = lambda t: np.array([[np.cos(t), 0, -np.sin(t)], [0, 1, 0], [np.sin(t), 0, np.cos(t)]])  # noqa: E731
    product = rz(float(angles[2])) @ ry(float(angles[1])) @ rz(float(angles[0]))
    got = o.euler_to_matrix(*angles).numpy()
    assert np.allclose(got, product, atol=1e-12)
    assert np.allclose(got[2], want[2], atol=1e-6)


def test_in_plane_rotation_adds_to_psi():
    a = o.euler_to_matrix(*torch.tensor([0.3, 1.1, 0.0]))
    turned = o.in_plane_rotations(torch.tensor(0.7)) @ a
    assert torch.allclose(turned, o.euler_to_matrix(*torch.tensor([0.3, 1.1, 0.7])), atol=1e-6)


def test_healpix_centres_of_order_one_lie_where_gorski_puts_them():
    azimuth, polar = o.healpix_angles(1)
    # Gorski et al. (2005), equations 4 to 9: rings at z = 11/12, 2/3, 1/3, 0 ... of 4, 8, 8, 8 ... pixels
    z, count = np.unique(np.round(np.cos(polar), 9), return_counts=True)
    assert np.allclose(z, [-11 / 12, -2 / 3, -1 / 3, 0, 1 / 3, 2 / 3, 11 / 12])
    assert count.tolist() == [4, 8, 8, 8, 8, 8, 4]
    # pixel 0 is the southern corner of face 0: on the ring z = 1/3 ... its centre has azimuth 45 degrees
    assert np.isclose(np.degrees(azimuth[0]), 45.0)
    assert np.isclose(np.cos(polar[0]), 0.0 + 1 / 3) or np.isclose(np.cos(polar[0]), 0.0, atol=1e-9)


def test_healpix_pixels_are_equally_far_and_children_near_their_parent():
    parents = o.directions(*o.healpix_angles(2))
    children = o.directions(*o.healpix_angles(3)).reshape(192, 4, 3)
    assert np.degrees(np.arccos(np.einsum("pci,pi->pc", children, parents))).max() < 8.5
    assert np.allclose(children.mean(1) @ np.ones(3), (parents * np.linalg.norm(children.mean(1), axis=1)[:, None]) @ np.ones(3), atol=0.02)


@pytest.mark.parametrize(("name", "most"), [("C1", 1.0), ("C3", 1.05), ("D2", 1.01), ("T", 1.05), ("O", 1.08), ("I", 1.25)])
def test_asymmetric_unit_holds_one_of_each_set_of_equivalent_views(name, most):
    operators = symmetry_operators(name)
    kept = o.asymmetric_unit(3, operators)
    assert 0.93 <= len(kept) * len(operators) / o.healpix_count(3) <= most
    # every view of the sphere has a mate near a kept one
    views = o.directions(*o.healpix_angles(3))
    best = np.max([(views @ g.T) @ views[kept].T for g in operators], axis=(0, 2))
    assert np.degrees(np.arccos(np.clip(best, -1, 1))).max() < 8.0


def test_angular_error_sees_no_difference_between_symmetry_mates():
    operators = symmetry_operators("D2")
    a = o.random_rotations(20, torch.Generator().manual_seed(1))
    mates = a @ torch.tensor(operators[2]).float()
    assert float(o.angular_error_deg(a, mates, operators).max()) < 0.1
    turned = o.in_plane_rotations(torch.full((20,), np.radians(3.0))).float() @ a
    assert torch.allclose(o.angular_error_deg(a, turned, operators), torch.full((20,), 3.0, dtype=torch.float64), atol=0.1)


def test_random_numbers_belong_to_the_particle_and_not_to_its_block():
    whole = uniforms(3, 5, np.arange(1000), 6)
    parts = np.concatenate([uniforms(3, 5, some, 6) for some in np.array_split(np.arange(1000), 7)])
    assert np.array_equal(whole, parts)
    assert not np.allclose(whole, uniforms(3, 6, np.arange(1000), 6))
    assert whole.min() >= 0.0
    assert whole.max() < 1.0
    assert abs(whole.mean() - 0.5) < 0.02
    assert abs(np.corrcoef(whole.T) - np.eye(6)).max() < 0.12
