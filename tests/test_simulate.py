"""The simulator: its physics against analytic values and RELION, its files against its truth."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
import scipy.fft
import scipy.ndimage
import torch

from cryodask.formats.movies import open_movie, read_gain
from cryodask.formats.mrc import read_mrc, write_mrc
from cryodask.kernels.ctf import ctf
from cryodask.kernels.orientations import euler_to_matrix
from cryodask.simulate import Optics, SessionParams, load_truth, prepare_session, simulate_micrograph, simulate_movie, simulate_one
from cryodask.simulate.model import _splat, beta_galactosidase, clpb, density_map, interaction_constant, phase_transform, scattering_factor
from cryodask.simulate.movie import random_drift
from cryodask.simulate.scene import CountTable

pytestmark = pytest.mark.heavy

SMALL = SessionParams(movies=2, height=256, width=320, frames=6, particles=4, truth_maps=((32, 7.08),), hot_pixels=5)


def test_the_molecule_is_the_deposited_one_with_d2_symmetry() -> None:
    molecule = beta_galactosidase()
    assert {e: len(p) for e, p in molecule.positions.items()} == {"C": 20816, "N": 5808, "O": 6120, "S": 160}  # 5A1A, no H, no ions
    for signs in ([-1, -1, 1], [1, -1, -1], [-1, 1, -1]):
        turned = molecule.positions["S"] * np.array(signs)
        assert {tuple(p) for p in np.round(turned, 2).tolist()} == {tuple(p) for p in np.round(molecule.positions["S"], 2).tolist()}


def test_the_asymmetric_molecule_is_the_deposited_one() -> None:
    molecule = clpb()
    assert {e: len(p) for e, p in molecule.positions.items()} == {"C": 20526, "N": 5945, "O": 6306, "S": 129}  # 6RN2
    assert 170.0 < molecule.diameter_angstrom < 185.0
    assert np.abs(sum(p.sum(0) for p in molecule.positions.values())).max() < 0.01 * 32906


def test_scattering_is_in_absolute_units() -> None:
    # free atoms at zero angle, International Tables C 4.3.2.2: carbon 2.51 A; solvent must leave a protein less than half of it
    assert interaction_constant(300.0) == pytest.approx(0.000653, rel=1e-3)
    assert interaction_constant(200.0) == pytest.approx(0.000729, rel=1e-3)
    zero = np.zeros(1)
    molecule = beta_galactosidase()
    inside = sum(float(scattering_factor(e, zero)[0]) * len(p) for e, p in molecule.positions.items())
    free = sum(f * len(molecule.positions[e]) for e, f in {"C": 2.51 + 1.3 * 0.53, "N": 2.21 + 1.2 * 0.53, "O": 1.98 + 0.35 * 0.53}.items())
    assert 2.0 < free / inside < 2.8  # 2.4 by METHODS' sum over the atoms


def test_a_projection_of_the_atoms_is_the_sum_of_the_map() -> None:
    box, pixel = 96, 2.36
    volume = density_map(beta_galactosidase(), box, pixel)
    transform = phase_transform(beta_galactosidase(), np.eye(3)[None], np.full((1, 2), 48.0), (box, box), pixel, 300.0)
    transform[box // 2], transform[:, -1] = 0.0, 0.0
    image = scipy.fft.irfft2(transform, s=(box, box))
    assert np.abs(image - volume.sum(0) * pixel * interaction_constant(300.0)).max() < 1e-5 * image.max()


@pytest.mark.relion
def test_views_are_those_of_relion_project(tmp_path: Path) -> None:
    box, pixel = 96, 2.36
    write_mrc(tmp_path / "map.mrc", density_map(beta_galactosidase(), box, pixel), pixel)
    options = "--i map.mrc --o view.mrc --rot 25 --tilt 70 --psi -40 --angpix 2.36"
    subprocess.run(["relion_project", *options.split()], cwd=tmp_path, check=True, capture_output=True)
    view = euler_to_matrix(*(torch.tensor([np.radians(a)]) for a in (25.0, 70.0, -40.0))).numpy()
    transform = phase_transform(beta_galactosidase(), view, np.full((1, 2), 48.0), (box, box), pixel, 300.0)
    ours = scipy.fft.irfft2(transform, s=(box, box))
    theirs = read_mrc(tmp_path / "view.mrc")[0]
    assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.98  # 0.992 at 1.77 A: RELION interpolates


def test_tabulated_counts_are_poisson() -> None:
    rng = np.random.Generator(np.random.SFC64(1))
    rates = rng.uniform(0.2, 9.0, (1500, 1500)).astype(np.float32)
    counts = CountTable(0.5, 8.0).draw(rng, rates).astype(float)
    for low, high in ((0.2, 0.5), (0.5, 2.0), (2.0, 5.0), (5.0, 8.0), (8.0, 9.0)):
        part = (rates >= low) & (rates < high)
        residual, mean = (counts - rates)[part], rates[part].mean()
        assert abs(residual.mean()) < 5.0 * np.sqrt(mean / part.sum()) + 1e-3 * mean
        assert np.var(residual) == pytest.approx(mean, rel=0.02)
    lines = (rates > 3.0) & (rates < 3.1)
    assert np.mean(counts[lines] == 3) == pytest.approx(0.2225, abs=0.01)  # e^-3.05 3.05^3 / 3!


def test_one_seed_and_index_give_the_same_movie_whatever_came_before() -> None:
    first, truth = simulate_movie(SMALL, 1)
    simulate_movie(SMALL, 0)
    again, truth_again = simulate_movie(SMALL, 1)
    assert np.array_equal(first, again)
    assert all(np.array_equal(truth[k], truth_again[k]) for k in truth)
    assert not np.array_equal(first, simulate_movie(SMALL.model_copy(update={"seed": 2}), 1)[0])


def test_a_session_folder_holds_movies_gain_and_truth(tmp_path: Path) -> None:
    prepare_session(tmp_path, SMALL)
    simulate_one(tmp_path, SMALL, 1)
    path = simulate_one(tmp_path, SMALL.model_copy(update={"format": "mrc"}), 0)
    assert Path(path).name == "movie_0001.mrc"
    truth = load_truth(tmp_path)
    assert truth.names == ("movie_0001", "movie_0002")
    assert truth.params == SMALL
    assert truth.columns["patch_shift"].shape == (2, 81, 6, 2)
    assert truth.columns["particle_y"].shape[0] == 2
    assert np.abs(truth.columns["patch_shift"].mean(2)).max() < 1e-4
    movie, gain = open_movie(tmp_path / "movies" / "movie_0002.tif"), read_gain(tmp_path / "gain.mrc")
    assert movie.shape == (6, 256, 320)
    assert movie.pixel_size_angstrom == pytest.approx(1.77, rel=1e-4)
    frames = np.stack([movie[i] for i in range(6)]).astype(float)
    assert not frames[:, gain == 0].any()
    assert (gain == 0).sum() == 5
    expected = SMALL.dose_per_frame * 1.77**2
    corrected = (frames.mean(0) * gain)[gain > 0]
    assert np.median(corrected) == pytest.approx(expected, rel=0.03)
    hot = corrected > expected + 12 * np.sqrt(expected / 6)
    assert hot.sum() == 5
    box, voxel = read_mrc(tmp_path / "truth" / "map_32_7.08A.mrc")
    assert box.shape == (32, 32, 32)
    assert voxel == pytest.approx(7.08)


def test_particles_stand_dark_at_their_true_places() -> None:
    micrograph = simulate_micrograph(
        shape=(768, 640), particles=8, optics=Optics(pixel_size_angstrom=1.5, defocus_u_angstrom=2e4, defocus_v_angstrom=2e4), seed=3
    )
    smooth = scipy.ndimage.gaussian_filter(micrograph.image, 25.0 / 1.5)
    at = np.round(np.stack([micrograph.particles.y, micrograph.particles.x], 1)).astype(int)
    here = smooth[at[:, 0], at[:, 1]]
    assert len(at) == 8
    assert (here < np.percentile(smooth, 10)).mean() >= 0.75
    assert micrograph.image.mean() == pytest.approx(40.0 * 1.5**2, rel=0.005)


def test_ice_alone_has_the_power_spectrum_of_its_ctf_in_absolute_units() -> None:
    optics = Optics(pixel_size_angstrom=1.5, defocus_u_angstrom=21000.0, defocus_v_angstrom=15000.0, defocus_angle_deg=30.0)
    ice, n = 0.02, 1024
    image = simulate_micrograph(
        shape=(n, n), particles=0, optics=optics, ice_noise_angstrom2=ice, ice_b_angstrom2=25.0, damage=False, seed=1
    ).image
    power = np.abs(np.fft.fft2(image / image.mean() - 1.0)) ** 2 / n**2
    k = torch.fft.fftfreq(n, 1.5)
    ky, kx = k[:, None], k[None]
    k2 = (ky**2 + kx**2).numpy()
    inside = (k2 > 1 / 30**2) & (k2 < 1 / 7**2)

    def predicted(angle_deg: float) -> np.ndarray:
        transfer = ctf(
            ky,
            kx,
            defocus_u_angstrom=21000.0,
            defocus_v_angstrom=15000.0,
            defocus_angle_rad=np.radians(angle_deg),
            voltage_kv=300.0,
            spherical_aberration_mm=2.7,
            amplitude_contrast=0.1,
        ).numpy()
        # 4 CTF^2 x ice x its fall-off x the envelope B = 60 on amplitudes, over the pixel's area
        return (4.0 * ice / 1.5**2 * transfer**2 * np.exp(-(25.0 + 60.0) / 2.0 * k2))[inside]

    design = np.stack([predicted(30.0), np.ones(inside.sum())], 1)
    (slope, shot), *_ = np.linalg.lstsq(design, power[inside], rcond=None)
    assert slope == pytest.approx(1.0, abs=0.05)
    assert shot == pytest.approx(1.0 / (40.0 * 1.5**2), rel=0.05)
    wrong = np.corrcoef(predicted(-30.0), power[inside])[0, 1]
    assert np.corrcoef(predicted(30.0), power[inside])[0, 1] > wrong + 0.05


def test_drift_has_the_length_seen_in_real_movies() -> None:
    # RELION's tracks of 24 movies of EMPIAR-10204, 30.6 e/A^2: whole path 9.2-21.4 A, mean 13.2 A (the estimates' own noise included)
    lengths = [np.linalg.norm(np.diff(random_drift(np.random.default_rng(s), 24, 1.277), axis=0), axis=1).sum() for s in range(60)]
    assert 9.0 < np.mean(lengths) < 18.0


def test_atoms_are_shared_among_their_neighbours_alike_on_small_and_large_grids():
    """The two ways of adding up give the same bits; on the large grid there are more than 64 pixels to an atom."""
    points = np.random.default_rng(0).uniform(0.0, 8.0, (50, 2))
    small, large = _splat(points, (9, 9)), _splat(points, (128, 128))
    assert np.array_equal(large[:9, :9], small)
    assert float(large.sum()) == pytest.approx(50.0)
