"""RELION's asymmetric units: directions of its samplings, and equivalent poses within them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from _relion import relion
from hypothesis import given, settings
from hypothesis import strategies as st

from cryodask.errors import InputError
from cryodask.formats import star
from cryodask.formats.mrc import write_mrc
from cryodask.kernels.asymmetric_unit import into_unit, unit_normals
from cryodask.kernels.orientations import angular_error_deg, directions, euler_to_matrix
from cryodask.kernels.symmetry import symmetry_operators

GROUPS = ("C1", "C2", "C3", "C4", "C7", "D1", "D2", "D3", "D4", "D7", "T", "O", "I", "I1", "I2", "I3", "I4")


def views(rot_deg: np.ndarray, tilt_deg: np.ndarray) -> np.ndarray:
    return directions(np.radians(rot_deg), np.radians(tilt_deg))


def random_angles(count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.uniform(-180, 180, count), np.degrees(np.arccos(rng.uniform(-1, 1, count))), rng.uniform(-180, 180, count)


def rotations(angles: tuple[np.ndarray, np.ndarray, np.ndarray]) -> torch.Tensor:
    return euler_to_matrix(*(torch.deg2rad(torch.from_numpy(a)) for a in angles))


@pytest.mark.parametrize("group", GROUPS)
def test_equivalent_poses_lie_within_the_unit_and_show_the_same_projection(group):
    before = random_angles(2000, 1)
    after = into_unit(*before, group)
    assert (views(*after[:2]) @ unit_normals(group).T).min(initial=0.0) > -1e-9
    operators = symmetry_operators(group)
    assert float(angular_error_deg(rotations(before), rotations(after), operators).max()) < 1e-4
    # an image shows the same, not only the view: before = after @ operator
    relative = rotations(after).mT @ rotations(before)
    nearest = np.abs(relative.numpy()[:, None] - operators).max((2, 3)).min(1)
    assert nearest.max() < 1e-6
    # the unit is a fraction of the sphere, so most poses of a large group move
    inside = np.all([a == b for a, b in zip(before, after)], axis=0).mean()
    assert inside == pytest.approx(1 / len(operators), abs=0.03)
    np.testing.assert_array_equal(into_unit(*after, group), after)


@settings(max_examples=60, deadline=None)
@given(
    group=st.sampled_from(GROUPS),
    rot=st.sampled_from([-180.0, -90.0, 0.0, 30.0, 90.0, 180.0]) | st.floats(-720, 720),
    tilt=st.sampled_from([0.0, 1e-9, 45.0, 90.0, 180.0]) | st.floats(-180, 180),
    psi=st.floats(-720, 720),
)
def test_any_angles_have_an_equivalent_pose(group, rot, tilt, psi):
    """On axes and planes of the group, at the poles, and beyond the usual range of angles."""
    before = tuple(np.array([a]) for a in (rot, tilt, psi))
    after = into_unit(*before, group)
    assert (views(*after[:2]) @ unit_normals(group).T).min(initial=0.0) > -1e-6
    assert float(angular_error_deg(rotations(before), rotations(after), symmetry_operators(group)).max()) < 1e-3


def test_a_group_with_mirrors_and_no_group_are_refused():
    for name in ("Oh", "I5", "X"):
        with pytest.raises(InputError, match="not a supported point group"):
            into_unit(np.zeros(1), np.zeros(1), np.zeros(1), name)


@pytest.mark.relion
@pytest.mark.parametrize("group", [g for g in GROUPS if g != "C1"])
def test_the_unit_is_what_relion_samples(group, tmp_path):
    """All directions of its finest cheap grid are within, and it has as many as the unit's share of the sphere."""
    blob = np.exp(-((np.indices((16, 16, 16)) - 8) ** 2).sum(0) / 20.0).astype(np.float32)
    write_mrc(tmp_path / "map.mrc", blob, 4.0)
    write_mrc(tmp_path / "x.mrcs", np.random.default_rng(0).normal(size=(1, 16, 16)).astype(np.float32), 4.0, stack=True)
    zero = {name: [0.0] for name in ("rot_deg", "tilt_deg", "psi_deg", "origin_x_angstrom", "origin_y_angstrom")}
    lens = {"voltage_kv": 300.0, "spherical_aberration_mm": 2.7, "amplitude_contrast": 0.1}
    one = {"image_index": [0], "image_stack": "x.mrcs", "micrograph_name": "m.mrc", "particle_pixel_size_angstrom": 4.0, "box": 16}
    star.write_particles(tmp_path / "p.star", {**one, **lens, **zero})
    options = ("--i", "p.star", "--o", "./run", "--ref", "map.mrc", "--sym", group, "--iter", 1, "--healpix_order", 4, "--oversampling", 0)
    options += ("--psi_step", 120, "--offset_range", 0, "--offset_step", 1, "--particle_diameter", 50, "--firstiter_cc", "--perturb", 0)
    relion(Path(tmp_path), "refine", *options)
    table = star.read_tables(tmp_path / "run_it001_sampling.star")["sampling_directions"]
    sampled = views(table["rlnAngleRot"].to_numpy(float), table["rlnAngleTilt"].to_numpy(float))
    share = 12 * 4**4 / len(symmetry_operators(group))
    assert share - 2 * np.sqrt(share) < len(sampled) < share + 4 * np.sqrt(share)  # those on the border are counted twice
    assert (sampled @ unit_normals(group).T).min() > -1e-6
