"""What a refinement refuses: runs that would end with a good-looking number for a wrong map."""

import numpy as np
import pytest
import torch
from _particles import blob_map, ctf_columns, project, simulate
from test_refine3d import BOX, PIXEL, refine, write_map

from cryodask.errors import InputError
from cryodask.kernels.fsc import resolution_at
from cryodask.kernels.half_grid import empty_half_grid, fold_half_grid
from cryodask.kernels.local_search import insert
from cryodask.kernels.map_evidence import covered, fourier_coverage
from cryodask.kernels.orientations import euler_to_matrix, random_rotations
from cryodask.kernels.rows import image_rows
from cryodask.kernels.signal_share import explained_share
from cryodask.kernels.verdict import LEAST_EXPLAINED
from cryodask.stage import ParticleSet
from cryodask.stages import _verdict
from cryodask.stages.ab_initio import AbInitioParams, ab_initio
from cryodask.stages.refine3d import Refine3DParams, refine3d

START = 192.0 / 4  # of a starting map at 40 A


def within(degrees: float, count: int, seed: int = 0) -> torch.Tensor:
    """Rotations `(n, 3, 3)` whose views lie within an angle of the z axis."""
    rng = np.random.default_rng(seed)
    tilt = np.arccos(rng.uniform(np.cos(np.radians(degrees)), 1.0, count))
    rot, psi = (torch.from_numpy(rng.uniform(-np.pi, np.pi, count)) for _ in range(2))
    return euler_to_matrix(rot, torch.from_numpy(tilt), psi).float()


def assert_refused(result, words):
    assert not result["succeeded"]
    assert result["resolution_angstrom"] == START
    assert refine3d.says(result).startswith("not solved")
    assert words in refine3d.says(result)


@pytest.mark.heavy
def test_a_point_group_that_is_too_high_is_refused(tmp_path):
    volume = blob_map(BOX, "D2", blobs=20, width_px=1.2)
    images, particles, _, _ = simulate(volume, 200, pixel=PIXEL, snr=0.3)
    result, _ = refine(tmp_path, images, particles, volume, symmetry="D4", iterations=4)
    assert result["explained_share"] < LEAST_EXPLAINED
    assert_refused(result, "the point group is too high")


@pytest.mark.heavy
def test_a_set_of_two_molecules_is_refused(tmp_path):
    volume, other = (blob_map(BOX, "D2", blobs=20, width_px=1.2, seed=seed) for seed in (3, 21))
    images, particles, _, _ = simulate(volume, 240, pixel=PIXEL, snr=0.3)
    images[1::4], images[2::4] = (simulate(other, 240, pixel=PIXEL, snr=0.3)[0][first::4] for first in (1, 2))
    result, _ = refine(tmp_path, images, particles, volume, iterations=4)
    assert_refused(result, "several molecules")


def refine_views_within(tmp_path, degrees: float):
    volume = blob_map(BOX, blobs=30, width_px=1.2)
    columns, views = ctf_columns(120), within(degrees, 120)
    clean = project(volume, views, torch.zeros(120, 2), columns, PIXEL)
    images = clean / clean.std() * np.sqrt(0.3) + np.random.default_rng(1).standard_normal(clean.shape)
    particles = ParticleSet(120, BOX, PIXEL, columns)
    return refine(tmp_path, images.astype(np.float32), particles, volume, symmetry="C1", iterations=4)[0]


@pytest.mark.heavy
def test_views_from_one_side_are_refused(tmp_path):
    result = refine_views_within(tmp_path, 10.0)
    assert result["view_coverage"] < 0.5
    assert_refused(result, "of Fourier space")


@pytest.mark.heavy
def test_views_that_leave_some_of_fourier_space_empty_lower_the_resolution(tmp_path):
    result = refine_views_within(tmp_path, 40.0)
    assert result["succeeded"]
    assert 0.5 < result["view_coverage"] < 0.8
    halves = resolution_at(torch.from_numpy(result["fsc_corrected"]), 0.143, BOX, PIXEL)
    assert result["resolution_angstrom"] > 1.02 * halves


@pytest.mark.heavy
def test_a_mask_that_cuts_the_molecule_is_refused(tmp_path):
    volume = blob_map(BOX, "D2", blobs=20, width_px=1.2)
    images, particles, _, _ = simulate(volume, 160, pixel=PIXEL, snr=0.3)
    result, _ = refine(tmp_path, images, particles, volume, mask_diameter_angstrom=100.0, iterations=4)
    assert result["held_out_z"] > 6.0
    assert_refused(result, "mask_diameter_angstrom is too small")


def test_a_start_map_with_inverted_contrast_is_refused_before_any_work(tmp_path):
    particles = ParticleSet(60, BOX, PIXEL, ctf_columns(60))
    params = Refine3DParams(reference=write_map(tmp_path / "a.mrc", -blob_map(BOX)))
    with pytest.raises(InputError, match="darker than its surroundings"):
        refine3d.functions.start(params, particles, {})


def test_particles_with_inverted_contrast_are_refused_before_poses_are_searched(tmp_path):
    volume = blob_map(BOX, "D2", blobs=20, width_px=1.2)
    images, particles, _, _ = simulate(volume, 160, pixel=PIXEL, snr=0.02)
    with pytest.raises(InputError, match="particles are darker than their surroundings"):
        refine(tmp_path, -images, particles, volume, iterations=4)


@pytest.mark.parametrize("lack", ["missing", "NaN", "zero"])
def test_particles_without_ctf_are_refused_before_any_work(tmp_path, lack):
    columns = ctf_columns(60)
    for axis in "uv":
        name = f"defocus_{axis}_angstrom"
        if lack == "missing":
            del columns[name]
        else:
            columns[name] = np.full(60, np.nan if lack == "NaN" else 0.0)
    particles = ParticleSet(60, BOX, PIXEL, columns)
    params = Refine3DParams(reference=write_map(tmp_path / "a.mrc", blob_map(BOX)))
    with pytest.raises(InputError, match="60 of 60 particles have no CTF"):
        refine3d.functions.start(params, particles, {})
    with pytest.raises(InputError, match="60 of 60 particles have no CTF"):
        ab_initio.functions.select(AbInitioParams(), particles)


def test_a_mask_wider_than_the_box_is_refused_before_any_work(tmp_path):
    particles = ParticleSet(60, BOX, PIXEL, ctf_columns(60))
    params = {"mask_diameter_angstrom": 200.0}
    with pytest.raises(InputError, match="does not fit into a box of 192 A"):
        refine3d.functions.start(Refine3DParams(reference=write_map(tmp_path / "a.mrc", blob_map(BOX)), **params), particles, {})
    with pytest.raises(InputError, match="does not fit into a box of 192 A"):
        ab_initio.functions.select(AbInitioParams(**params), particles)


def coverage_of(views: torch.Tensor, radius: int = 22) -> np.ndarray:
    count = len(views)
    rows = image_rows(torch.randn(count, BOX, BOX), ctf_columns(count), radius, PIXEL)
    grid = empty_half_grid(radius)
    insert(
        rows,
        torch.arange(count),
        grid,
        radius,
        torch.ones(BOX // 2),
        views[:, None].float(),
        torch.zeros(count, 1, 2),
        torch.ones(count, 1),
    )
    return fourier_coverage(fold_half_grid(grid, np.eye(3)[None]), radius).numpy()


def test_coverage_is_the_share_of_directions_that_views_reach():
    assert coverage_of(random_rotations(1000, torch.Generator().manual_seed(0)))[5:21].min() > 0.98
    # views within an angle of one axis reach the directions within that angle of the plane across it: the sine of the angle
    assert coverage_of(within(30.0, 1000))[16] == pytest.approx(0.5, abs=0.06)
    assert coverage_of(within(60.0, 1000))[16] == pytest.approx(0.87, abs=0.04)


def test_correlation_without_half_of_fourier_space_is_that_of_a_map_with_noise_there():
    curve = torch.tensor([1.0, 0.6, 1.0 / 3.0], dtype=torch.float64)
    assert covered(curve, torch.ones(3, dtype=torch.float64)).tolist() == pytest.approx(curve.tolist())
    # half of the power of the truth: C^2 = 1/2, F = C^2 / (2 - C^2)
    assert float(covered(curve, torch.full((3,), 0.5))[0]) == pytest.approx(1.0 / 3.0)
    # (2 F / (1 + F)) / 2 = 1/4: the limit of resolution
    assert float(covered(curve, torch.full((3,), 0.5))[2]) == pytest.approx(1.0 / 7.0)


def test_noise_of_the_maps_does_not_count_against_them_but_missing_signal_does():
    """Image^2, image x other, other^2, other x own, own^2; signal and noise of the maps have powers 1 and 0.25."""
    whole = np.tile(np.array([[1.0], [1.0], [1.25], [1.0], [1.25]]), 10)
    assert explained_share(whole, np.ones(10)) == pytest.approx(1.0)
    missing = np.tile(np.array([[2.0], [1.0], [1.25], [1.0], [1.25]]), 10)
    assert explained_share(missing, np.ones(10)) == pytest.approx(0.5)
    # shells whose halves disagree say nothing
    noisy = whole.copy()
    noisy[[0, 2, 4], 6:] = 9.0
    assert explained_share(noisy, np.ones(10)) == pytest.approx(1.0)


@pytest.mark.parametrize(("certainty", "phase"), [(0.8, "sort"), (float("nan"), "verdict")])
def test_junk_is_sorted_out_only_where_poses_were_decided(certainty, phase):
    """A third of the particles is not helped; noise explains a tenth at a mean gain of 3.3."""
    state = {
        "phase": "verdict", "pose_certainty": certainty, "view_coverage": 1.0, "cut_share": 0.0, "noise_power": np.ones((1, 12)),
        "sorted": False, "length_angstrom": 200.0, "start_rings": 7,
    }  # fmt: skip
    sums = [{"tested": 120, "gain": 396.0, "gain_square": 2500.0, "unhelped": 40, "count": 500, "products": np.zeros((5, 8))}]
    new, metrics = _verdict.judged(state, sums)
    assert new["phase"] == phase
    assert ("unhelped" in metrics) == (phase == "sort")
    few, _ = _verdict.judged(state, [{**sums[0], "unhelped": 20}])
    assert few["phase"] == "verdict"
