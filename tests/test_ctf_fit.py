"""CTF fit: real spectra with published values, simulated micrographs with known truth, and what it must refuse."""

import math

import mrcfile
import numpy as np
import pytest
import torch
from pydantic import ValidationError

from cryodask.errors import MicrographError
from cryodask.formats.star import read_micrographs
from cryodask.kernels.ctf_bands import banded
from cryodask.kernels.ctf_cells import lens_of, polar_cells
from cryodask.kernels.ctf_fit import _score, fit_ctf
from cryodask.kernels.descent import descend, with_gradient
from cryodask.kernels.spectrum import Spectrum, fast_even_size, log_power_image, power_spectrum, spectrum_of_amplitudes
from cryodask.simulate import Optics, simulate_micrograph
from cryodask.stages.ctf import CtfParams, ctf

pytestmark = pytest.mark.heavy


def astigmatism(u, v, angle_rad):
    return (u - v) * np.array([math.cos(2 * angle_rad), math.sin(2 * angle_rad)])


def ring_spectrum(u, v, angle_deg, *, strength=0.5, noise=0.0, half=128, step=1 / 900.0, kv=300.0, cs=2.7, q=0.1, seed=0, phase=0.0):
    """Spectrum of rings on a falling background, with the noise of a mean of 1 / noise^2 periodograms."""
    lam = 12.2643247 / math.sqrt(kv * 1e3 * (1 + kv * 1e3 * 0.978466e-6))
    ky = np.fft.fftfreq(2 * half, 1 / (2 * half))[:, None] * step
    kx = np.arange(half + 1)[None] * step
    k2 = kx**2 + ky**2
    z = (u + v) / 2 + (u - v) / 2 * np.cos(2 * (np.arctan2(ky, kx) - math.radians(angle_deg)))
    ring = np.sin(math.pi * lam * z * k2 - math.pi / 2 * cs * 1e7 * lam**3 * k2**2 + math.asin(q) + phase) ** 2
    power = (1 + 3 * np.exp(-200 * k2)) * (1 + strength * np.exp(-40 * k2) * ring)
    power = power * (1 + noise * np.random.default_rng(seed).standard_normal(power.shape))
    return Spectrum(torch.from_numpy(power.astype(np.float32)), step, 1)


@pytest.mark.parametrize(
    ("u", "v", "angle"), [(12000, 11700, 30), (8000, 8000, 0), (25500, 24500, -70), (5200, 4900, 85), (16500, 15000, 10)]
)
def test_rings_without_noise_give_their_defocus_back(u, v, angle):
    fit = fit_ctf(ring_spectrum(u, v, angle, half=250), lens_of(300.0, 2.7, 0.1))
    assert 0.5 * (fit.defocus_u_angstrom + fit.defocus_v_angstrom) == pytest.approx((u + v) / 2, abs=15)
    error = astigmatism(fit.defocus_u_angstrom, fit.defocus_v_angstrom, fit.defocus_angle_rad) - astigmatism(u, v, math.radians(angle))
    assert np.hypot(*error) < 30
    assert fit.figure_of_merit > 0.7  # rings are averaged over 1/900 A, which blurs the finest
    assert fit.alternative_score < 0.9


def test_a_phase_plate_is_taken_into_account():
    fit = fit_ctf(ring_spectrum(10000, 10000, 0, half=250, phase=math.pi / 2), lens_of(300.0, 2.7, 0.1, math.pi / 2))
    assert fit.defocus_u_angstrom == pytest.approx(10000, abs=30)


def test_a_prior_hides_astigmatism_only_under_noise():
    clear = fit_ctf(ring_spectrum(15800, 15000, 20, half=250), lens_of(300.0, 2.7, 0.1), expected_astigmatism_angstrom=50.0)
    assert clear.defocus_u_angstrom - clear.defocus_v_angstrom == pytest.approx(800, abs=60)


@pytest.mark.parametrize("limit", [0.0, 300.0, 2000.0])
def test_no_fit_has_more_astigmatism_than_the_largest(limit):
    """Noise leads a fit anywhere (1791 A with a limit of 200), and rings of 3750 A lie beyond every limit here."""
    spectra = [ring_spectrum(16000, 15000, 20, noise=3.0, strength=0.02, seed=seed) for seed in (5, 7)]
    for spectrum in (*spectra, ring_spectrum(18750, 15000, 20)):
        fit = fit_ctf(spectrum, lens_of(300.0, 2.7, 0.1), largest_astigmatism_angstrom=limit)
        assert fit.defocus_u_angstrom - fit.defocus_v_angstrom <= limit + 1e-6
        assert fit.defocus_u_angstrom >= fit.defocus_v_angstrom


def test_real_spectra_agree_with_the_tutorial_and_none_is_aliased(shared):
    """RELION's tutorial values by CTFFIND; an aliased fit would be 25,000 A away. 22 A RMS, 35 A at most are reached."""
    folder = shared / "data/betagal_10204"
    official = read_micrographs(folder / "micrographs_ctf_official.star")
    errors, vectors = [], []
    for i, amplitude in enumerate(mrcfile.read(folder / "power_spectra.mrcs.bz2").astype(np.float32)):
        fit = fit_ctf(spectrum_of_amplitudes(torch.from_numpy(amplitude), 1 / (512 * 1.39955)), lens_of(200.0, 1.4, 0.1))
        u, v = official["defocus_u_angstrom"][i], official["defocus_v_angstrom"][i]
        errors.append(0.5 * (fit.defocus_u_angstrom + fit.defocus_v_angstrom - u - v))
        truth = astigmatism(u, v, math.radians(official["defocus_angle_deg"][i]))
        vectors.append(astigmatism(fit.defocus_u_angstrom, fit.defocus_v_angstrom, fit.defocus_angle_rad) - truth)
        assert fit.resolution_angstrom < 5.0
        assert fit.alternative_score < 0.5
    assert np.sqrt(np.mean(np.square(errors))) < 28
    assert np.abs(errors).max() < 45
    assert np.sqrt(np.mean(np.sum(np.square(vectors), 1))) < 55


def simulated(seed, shape=1024, pixel=1.77, particles=40, **kwargs):
    rng = np.random.default_rng(seed)
    mean, length, angle = rng.uniform(8000, 20000), rng.uniform(0, 300), rng.uniform(-90, 90)
    optics = Optics(
        pixel_size_angstrom=pixel,
        defocus_u_angstrom=mean + length / 2,
        defocus_v_angstrom=mean - length / 2,
        defocus_angle_deg=angle,
    )
    return simulate_micrograph(shape=(shape, shape), optics=optics, particles=particles, seed=seed, **kwargs), mean


def run(image, pixel=1.77, **params):
    return ctf.process(
        CtfParams(**params),
        micrograph_sum=image,
        pixel_size_angstrom=pixel,
        voltage_kv=300.0,
        spherical_aberration_mm=2.7,
        amplitude_contrast=0.1,
    )


def test_small_simulated_micrographs_come_out_within_their_noise():
    """1024 x 1024 pixels of 1.77 A, 40 particles of half the power: 52 A RMS over 24 seeds."""
    errors = []
    for seed in range(5):
        micrograph, mean = simulated(seed, signal_amplitude=0.5**0.5)
        out = run(micrograph.image)
        errors.append(0.5 * (out["defocus_u_angstrom"] + out["defocus_v_angstrom"]) - mean)
        assert out["defocus_u_angstrom"] >= out["defocus_v_angstrom"]
        assert out["ctf_resolution_angstrom"] < 12
    assert np.sqrt(np.mean(np.square(errors))) < 100
    assert out["spectrum_average"].shape == out["spectrum_fit"].shape == out["spectrum_frequency"].shape == (192,)
    assert out["spectrum_image"].shape == (256, 256)
    assert out["spectrum_image"].dtype == np.float16
    assert np.isfinite(out["spectrum_image"]).all()
    assert np.isfinite(out["spectrum_average"]).all()


def test_a_pure_noise_micrograph_is_fitted_badly_not_refused():
    noise = np.random.default_rng(0).poisson(100, (512, 768)).astype(np.float32)
    out = run(noise)
    assert out["ctf_figure_of_merit"] < 0.12
    # pixels of 1.77 A do not show the rings of ice
    assert all(np.isfinite(v).all() for name, v in out.items() if name != "ice_ring_excess")


def test_same_micrograph_same_bits():
    micrograph, _ = simulated(3)
    first, second = run(micrograph.image), run(micrograph.image)
    assert first["defocus_u_angstrom"] == second["defocus_u_angstrom"]
    assert (first["spectrum_average"] == second["spectrum_average"]).all()


@pytest.mark.slow
def test_large_simulated_micrographs_come_out_within_80_angstrom():
    """29 A RMS over six in benchmarks/ctf.py."""
    errors = []
    for seed, pixel in ((11, 0.85), (12, 1.0), (13, 1.3)):
        micrograph, mean = simulated(seed, 4096, pixel, 150)
        out = run(micrograph.image, pixel)
        errors.append(0.5 * (out["defocus_u_angstrom"] + out["defocus_v_angstrom"]) - mean)
    assert np.sqrt(np.mean(np.square(errors))) < 80


@pytest.mark.slow
def test_a_high_defocus_gets_longer_tiles():
    optics = Optics(pixel_size_angstrom=1.3, defocus_u_angstrom=45000, defocus_v_angstrom=45000)
    out = run(simulate_micrograph(shape=(4096, 4096), optics=optics, particles=150, seed=5).image, 1.3)
    assert out["defocus_u_angstrom"] == pytest.approx(45000, abs=200)


def test_broken_micrographs_are_refused():
    good = np.random.default_rng(0).poisson(100, (256, 256)).astype(np.float32)
    nan = good.copy()
    nan[7, 9] = np.nan
    for image, pixel, message in (
        (nan, 1.77, "1 pixels are NaN"),
        (0 * good, 1.77, "every pixel is 0"),
        (good[:100], 1.77, "too small"),
        (good, 0.5, "too small"),
        (good, 12.0, "too coarse"),
        (good[None], 1.77, "not an image"),
    ):
        with pytest.raises(MicrographError, match=message):
            run(image, pixel)


def test_ranges_that_make_no_sense_are_refused():
    with pytest.raises(ValidationError, match="coarsest"):
        CtfParams(coarsest_angstrom=4.0, finest_angstrom=3.5)
    with pytest.raises(ValidationError, match="largest_defocus"):
        CtfParams(least_defocus_angstrom=5000, largest_defocus_angstrom=5000)


def test_white_noise_has_a_flat_spectrum_and_a_wave_stands_at_its_frequency():
    rng = np.random.default_rng(0)
    image = torch.from_numpy(rng.standard_normal((600, 700)).astype(np.float32))
    flat = power_spectrum(image, pixel_size_angstrom=1.0, tile_angstrom=100.0, finest_angstrom=2.0)
    assert flat.power[5:-5, 5:45].std() / flat.power[5:-5, 5:45].mean() < 0.2
    y, x = np.mgrid[:600, :700]
    wave = torch.from_numpy(np.cos(2 * np.pi * (y * 0.1 - x * 0.2)).astype(np.float32))
    spectrum = power_spectrum(wave, pixel_size_angstrom=1.0, tile_angstrom=100.0, finest_angstrom=2.0)
    row, column = divmod(int(spectrum.power.argmax()), spectrum.power.shape[1])
    assert (row - len(spectrum.power), column) == (-10, 20)  # ky -0.1, kx 0.2: the other half of the plane
    assert spectrum.step == pytest.approx(0.01)
    picture = log_power_image(spectrum, 64, 0.4)
    assert picture.shape == (64, 64)
    row, column = divmod(int(picture.argmax()), 64)
    spots = {(32 - 8, 32 + 16), (32 + 8, 32 - 16)}  # 0.1 and 0.2 of 0.4 at 32 pixels
    assert min(abs(row - y) + abs(column - x) for y, x in spots) <= 2


def test_fast_sizes_hold_small_primes_only():
    assert [fast_even_size(n) for n in (1, 7, 11, 97, 509, 1001)] == [2, 8, 12, 100, 512, 1024]


def test_the_polar_table_keeps_every_pixel_once():
    spectrum = ring_spectrum(10000, 10000, 0, half=100)
    cells = polar_cells(spectrum, 1 / 30.01, 1 / 9.99)
    ky = np.fft.fftfreq(200, 1 / 200)[:, None] / 900
    kx = np.arange(101)[None] / 900
    k = np.hypot(ky, kx)
    expected = ((k > 1 / 30.01) & (k < 1 / 9.99) & (np.abs(ky) > 1.5 / 900) & (kx > 1.5 / 900)).sum()
    assert cells.weight.sum() == expected


# --- the search for a maximum
def test_the_score_has_the_derivatives_that_it_says():
    cells = polar_cells(ring_spectrum(12000, 11600, 30, noise=0.05), 1 / 30, 1 / 4)
    data, lens = banded(cells, 6), lens_of(300.0, 2.7, 0.1)
    at = torch.tensor([11700.0, 250.0, 300.0], dtype=torch.float64)
    _, gradient = _score(data, lens, at, 300.0)
    for i, step in enumerate(torch.eye(3, dtype=torch.float64)):
        numeric = (_score(data, lens, at + step, 300.0)[0] - _score(data, lens, at - step, 300.0)[0]) / 2.0
        assert float(gradient[i]) == pytest.approx(numeric, rel=1e-3)


def test_a_curved_valley_is_followed_to_its_end():
    """Rosenbrock's function, from its usual start, to its minimum at (1, 1)."""
    calls = []

    @with_gradient
    def valley(x):
        calls.append(x)
        return 100.0 * (x[1] - x[0] ** 2) ** 2 + (1.0 - x[0]) ** 2

    found = descend(valley, torch.tensor([-1.2, 1.0], dtype=torch.float64), evaluations=60)
    assert found.tolist() == pytest.approx([1.0, 1.0], abs=0.01)
    assert len(calls) <= 60
