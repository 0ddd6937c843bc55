"""The judge of benchmarks/c1.py finds a known placement, hand, pose errors and the share at a rival orientation; verdicts are judged."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cryodask.kernels.orientations import random_rotations, small_rotation
from cryodask.stage import ParticleSet

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from _judge import judge, mirrored_map, mirrored_poses, placed, true_poses
from _molecules import MapTransform, Poses, Stack, project, random_columns
from verdict import honest, verdict_is_right

sys.path.pop(0)

BOX, PIXEL, COUNT = 32, 5.0, 400
TURN = random_rotations(1, torch.Generator().manual_seed(3))[0].double()
SHIFT = torch.tensor([4.0, -6.0, 3.0])


def blobs() -> np.ndarray:
    """An asymmetric map of 40 Gaussian blobs."""
    rng = np.random.default_rng(2)
    grid = (np.mgrid[:BOX, :BOX, :BOX] - BOX // 2) * PIXEL
    centres = rng.normal([0.0, 6.0, -4.0], 18.0, (40, 3))
    return sum(np.exp(-((grid - c[:, None, None, None]) ** 2).sum(0) / (2 * 5.0**2)) for c in centres).astype(np.float32)


@pytest.fixture(scope="module")
def stack() -> Stack:
    truth = blobs()
    generator = torch.Generator().manual_seed(1)
    rotations = random_rotations(COUNT, generator)
    origins = np.random.default_rng(1).normal(0.0, 0.8, (COUNT, 2))
    columns = random_columns(COUNT, 7)
    images = project(truth, PIXEL, rotations, origins, columns)
    images += np.random.default_rng(4).normal(0.0, images.std() * 2, images.shape).astype(np.float32)
    poses = Poses(rotations.double(), origins * PIXEL, np.zeros(COUNT, bool))
    return Stack("blobs", images, ParticleSet(COUNT, BOX, PIXEL, columns), poses, truth, PIXEL, {})


@pytest.mark.heavy
@pytest.mark.parametrize(("mirrored", "with_poses"), [(False, True), (True, True), (True, False)])
def test_the_judge_finds_a_known_placement(stack: Stack, mirrored: bool, with_poses: bool) -> None:
    volume = placed(MapTransform(stack.truth, PIXEL), BOX, PIXEL, TURN, SHIFT)
    generator = torch.Generator().manual_seed(5)
    estimated = torch.stack([small_rotation(np.radians(1.0), generator).double() @ a for a in stack.poses.rotations]) @ TURN
    estimated[:60] = estimated[:60] @ random_rotations(1, generator)[0].double()
    if mirrored:
        volume, estimated = mirrored_map(volume), mirrored_poses(estimated)
    found = judge(stack, volume, PIXEL, 12.0, 120.0, "C1", "C1", estimated if with_poses else None).figures
    assert found["hand"] == ("mirrored" if mirrored else "true")
    assert found["truth05_angstrom"] == pytest.approx(2 * PIXEL, rel=0.05)
    assert found["docking_correlation"] > 0.97
    if with_poses:
        assert 1.0 < found["median_deg"] < 2.2
        assert found["share_above_20"] == pytest.approx(0.15)
        assert found["rival_share"] == pytest.approx(0.15)


def test_true_poses_reproduce_the_truth_and_shifted_ones_do_not(stack: Stack) -> None:
    right, curve = true_poses(stack, 120.0, "C1")
    assert right["true_poses_truth05_angstrom"] < 14.0
    assert curve[1:8].min() > 0.9
    opposite = Poses(stack.poses.rotations, -stack.poses.origins_angstrom * 3, stack.poses.junk)
    wrong = Stack(stack.name, stack.images, stack.particles, opposite, stack.truth, PIXEL, {})
    assert true_poses(wrong, 120.0, "C1")[0]["true_poses_truth05_angstrom"] > 1.3 * right["true_poses_truth05_angstrom"]


@pytest.mark.parametrize(
    ("arguments", "succeeded", "reported", "truth", "near", "right"),
    [
        ("--model 6rn2", True, 7.5, 7.5, 0.99, True),
        ("--model 6rn2", False, 28.0, 7.5, 0.99, False),
        ("--model 6rn2 --noise 1.6", True, 9.0, 9.5, 0.85, True),
        ("--model 6rn2 --noise 1.6", False, 28.0, 9.5, 0.85, True),
        ("--model 6rn2 --without-ties", True, 11.0, 11.5, 0.3, False),
        ("--model 6rn2 --phases 10", True, 7.5, 9.9, 0.99, False),
        ("--model 6rn2 --noise-only", True, 7.5, None, None, False),
        ("--model 6rn2 --noise-only", False, 28.0, None, None, True),
        ("--model 6rn2 --symmetry C3", True, 7.5, 7.5, 0.99, False),
    ],
)
def test_a_verdict_is_right_where_it_says_what_the_truth_says(arguments, succeeded, reported, truth, near, right) -> None:
    row = {
        "succeeded": succeeded, "reported_angstrom": reported, "truth05_angstrom": truth, "true_poses_truth05_angstrom": 7.4,
        "share_below_12": near,
    }  # fmt: skip
    assert verdict_is_right(arguments, row) is right


def test_a_figure_is_false_if_it_is_better_than_the_truth_by_a_tenth() -> None:
    assert honest({"reported_angstrom": 10.0, "truth05_angstrom": 10.9})
    assert not honest({"reported_angstrom": 10.0, "truth05_angstrom": 11.1})
    assert honest({"reported_angstrom": 28.0, "truth05_angstrom": None})
    assert not honest({"reported_angstrom": 20.0, "truth05_angstrom": None})
