"""Super-resolution movies summed at the physical pixel size: against plane waves, and against the cropped transform of full-size sums."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from _once import simulated

from cryodask.errors import MicrographError
from cryodask.formats import star
from cryodask.interop import export_relion
from cryodask.kernels.warp import add_warped, response, stripe_field
from cryodask.run.recipe import make_plan
from cryodask.run.session import check_inputs, run_plan
from cryodask.simulate import SessionParams, load_truth, simulate_movie
from cryodask.simulate.model import beta_galactosidase, density_map
from cryodask.simulate.session import session_detector
from cryodask.stages.motion import MotionParams, motion
from cryodask.stages.polish import PolishParams, polish

pytestmark = pytest.mark.heavy

PIXEL, FINE = 1.77, 0.885
PARAMS = SessionParams(
    movies=2, seed=3, height=1024, width=896, frames=10, pixel_size_angstrom=FINE, dose_per_frame=4.0, particles=10, truth_maps=()
)
OPTICS = {"dose_per_frame": 4.0, "pre_exposure": 0.0, "voltage_kv": 300.0}


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shift", [0.0, 0.31, -2.5])
@pytest.mark.parametrize("frequency", [0.05, 0.2, 0.35, 0.45])
def test_a_plane_wave_comes_through_with_the_stated_response(frequency, shift, axis):
    """Every second pixel of a wave is the wave at twice the frequency, in the stated amplitude and without a shift of its own."""
    length = 256
    wave = torch.cos(np.pi * frequency * torch.arange(length, dtype=torch.float64)).float()
    frame = wave[:, None].repeat(1, 64) if axis == 0 else wave[None].repeat(64, 1)
    shape = tuple(frame.shape)
    nodes = [torch.full((1, 2, 2), shift if i == axis else 0.0) for i in (0, 1)]
    out = torch.zeros(shape[0] // 2, shape[1] // 2)
    y, x = (stripe_field(one, shape, 16, step=2, every_column=n) for one, n in zip(nodes, (1, 2)))
    add_warped([out], torch.ones(1, 1), [frame], None, y, x, stripe=16, step=2)
    expected = np.cos(2 * np.pi * frequency * (np.arange(length // 2) + shift / 2))
    amplitude = float(response(torch.tensor([frequency]), 2))
    line = (out[:, 16] if axis == 0 else out[16]).numpy()
    np.testing.assert_allclose(line[8:-8], amplitude * expected[8:-8], atol=5e-3)


def test_the_response_is_that_of_a_half_band_filter():
    found = response(torch.tensor([0.0, 0.1, 0.25, 0.5]), 2)
    # 1 at zero, 1/2 at Nyquist by symmetry; three quarters of the band pass within a tenth
    assert found[0] == pytest.approx(1.0, abs=1e-6)
    assert found[1] == pytest.approx(1.0, abs=0.01)
    assert found[2] > 0.97
    assert found[3] == pytest.approx(0.5, abs=0.01)


@pytest.fixture(scope="module")
def movie() -> tuple[np.ndarray, dict[str, Any], np.ndarray]:
    frames, truth = simulate_movie(PARAMS, 0)
    return frames, truth, session_detector(PARAMS).gain


@pytest.fixture(scope="module")
def sums(movie) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of all pixels, and of the physical ones."""
    frames, _, gain = movie
    full = motion.process(MotionParams(), movie=frames, gain=gain, pixel_size_angstrom=FINE, **OPTICS)
    binned = motion.process(MotionParams(binning=2), movie=frames, gain=gain, pixel_size_angstrom=PIXEL, **OPTICS)
    return full, binned


def cropped(image: np.ndarray) -> np.ndarray:
    """Every second pixel after the Fourier transform is cropped; counts of four pixels."""
    height, width = image.shape
    transform = np.fft.fftshift(np.fft.fft2(image.astype(np.float64)))
    inner = transform[height // 4 : height // 4 + height // 2, width // 4 : width // 4 + width // 2]
    return np.fft.ifft2(np.fft.ifftshift(inner)).real


def by_shell(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Correlation and ratio of amplitudes (b over a) in ten shells up to the Nyquist frequency, without the border."""
    a, b = a[16:-16, 16:-16], b[16:-16, 16:-16]
    window = np.hanning(a.shape[0])[:, None] * np.hanning(a.shape[1])
    a, b = (np.fft.rfft2((image - image.mean()) * window) for image in (a, b))
    k = 2 * np.hypot(np.fft.fftfreq(len(a))[:, None], np.fft.rfftfreq(2 * (a.shape[1] - 1))[None])
    shells = [(k >= low) & (k < low + 0.1) for low in np.arange(10) / 10]
    power = [[float((np.abs(image[s]) ** 2).sum()) for s in shells] for image in (a, b)]
    cross = np.array([float((a[s].conj() * b[s]).real.sum()) for s in shells])
    return cross / np.sqrt(np.multiply(*power)), np.sqrt(np.divide(power[1], power[0]))


@pytest.mark.parametrize("name", ["micrograph_sum", "micrograph_dw"])
def test_sums_at_the_physical_pixel_are_the_cropped_sums_of_all_pixels(sums, name):
    """Correlations of 1.000 to half of the Nyquist frequency, 0.996 at three quarters and 0.90 at its end, where noise folds over."""
    full, binned = sums
    assert binned[name].shape == (512, 448)
    expected = cropped(full[name])
    assert binned[name].mean() == pytest.approx(expected.mean(), rel=1e-3), "counts of four pixels"
    correlation, amplitude = by_shell(expected, binned[name])
    assert (correlation[:6] > 0.999).all()
    assert (correlation[6:8] > 0.99).all()
    assert correlation[9] > 0.85
    np.testing.assert_allclose(amplitude[:8], 1.0, atol=0.02)


def test_the_motion_is_the_same_and_its_places_are_pixels_of_the_micrograph(movie, sums):
    full, binned = sums
    for name in ("frame_shift", "patch_shift", "motion_polynomial", "hot_pixel", "total_motion"):
        assert np.array_equal(full[name], binned[name]), name
    assert binned["patch_position"].max(0).tolist() == [511.5, 447.5]
    error = binned["patch_shift"] - movie[1]["patch_shift"]
    error -= error.mean(1, keepdims=True)
    assert np.sqrt((error**2).sum(-1).mean()) < 0.8  # Angstrom; 0.45 seen
    assert binned["micrograph_preview"].shape == (2, 512, 448)


def test_polishing_binned_movies_gives_what_polishing_all_pixels_gives(movie, sums):
    frames, true, gain = movie
    half = torch.from_numpy(density_map(beta_galactosidase(), 80, 3.0)).numpy()
    place = np.stack([true["particle_y"], true["particle_x"]], -1).astype(float) * FINE
    count = len(place)
    rng = np.random.default_rng(1)
    centre = place + rng.normal(0, 0.8, place.shape)
    needs = {
        **OPTICS, "movie": frames, "gain": gain, "spherical_aberration_mm": 2.7, "amplitude_contrast": 0.1, "phase_shift_deg": 0.0,
        **{n: float(true[n]) for n in ("defocus_u_angstrom", "defocus_v_angstrom", "defocus_angle_deg")},
        **{n: np.asarray(true[n], float) for n in ("rot_deg", "tilt_deg", "psi_deg")},
        "particle_id": np.arange(count), "half_set": np.arange(count) % 2,
        **{f"{n}_{a}_angstrom": centre[:, j] for n in ("position", "centre") for j, a in enumerate("yx")},
        "half_map": np.stack([half, half]), "final_map": half, "map_pixel_size_angstrom": 3.0,
        "fsc_corrected": 1.0 / (1.0 + (np.arange(41) / 34.0) ** 12),
    }  # fmt: skip
    given = [{n: one[n] for n in ("patch_position", "patch_shift", "hot_pixel")} for one in sums]
    full = polish.process(PolishParams(box=256, scale_to=64), **needs, **given[0], pixel_size_angstrom=FINE)
    binned = polish.process(PolishParams(box=128, scale_to=64, binning=2), **needs, **given[1], pixel_size_angstrom=PIXEL)
    assert full["polish_prior"] == binned["polish_prior"] == "absolute"
    for name in ("patch_shift", "centre_y_angstrom", "centre_x_angstrom"):
        np.testing.assert_allclose(binned[name], full[name], atol=1e-3, err_msg=name)
    assert binned["particle_id"].tolist() == full["particle_id"].tolist()
    assert len(binned["particle_id"]) >= 2
    for ours, theirs in zip(binned["particle_image"], full["particle_image"]):
        assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.985  # 0.990 seen
    with pytest.raises(MicrographError, match="binning is not that of the motion correction"):
        polish.process(PolishParams(box=128), **needs, **given[1], pixel_size_angstrom=PIXEL)


def test_frames_of_odd_sizes_are_no_super_resolution():
    with pytest.raises(MicrographError, match="101 x 120 pixels cannot be binned by 2"):
        motion.process(MotionParams(binning=2), movie=np.ones((4, 101, 120), np.uint8), pixel_size_angstrom=PIXEL, **OPTICS)


# --- a project ----------------------------------------------------------------------------------------------------------------------------
def project(folder: Path, pixel: float = PIXEL) -> Path:
    content = {
        "name": "p",
        "inputs": {"movies": "movies/*.tif", "gain": "gain.mrc"},
        "microscope": {"voltage_kv": 300, "spherical_aberration_mm": 2.7, "pixel_size_angstrom": pixel, "dose_per_frame": 4.0},
        "pipeline": [{"motion": {"binning": 2}}, "ctf", {"pick": {"diameter_angstrom": 180}}, {"extract": {"box": 128, "scale_to": 64}}],
    }
    (folder / "p.yaml").write_text(yaml.safe_dump(content))
    return folder / "p.yaml"


def test_all_later_steps_work_at_the_physical_pixel(tmp_path_factory, tmp_path, client):
    simulated(tmp_path_factory, tmp_path, PARAMS)
    assert not [w for w in check_inputs(make_plan(project(tmp_path))) if "pixel size" in w]
    wrong = check_inputs(make_plan(project(tmp_path, FINE)))
    assert any("gives a pixel size of 0.885 A, 1.770 A after binning, the project file 0.885 A" in w for w in wrong)
    done = run_plan(make_plan(project(tmp_path)), client)
    assert done.failures() == []
    assert done["motion"]["micrograph_dw"].shape == (2, 512, 448)
    truth = load_truth(tmp_path)
    defocus = [
        sum(given[f"defocus_{a}_angstrom"] for a in "uv") / 2 for given in ({n: v.values for n, v in done["ctf"].items()}, truth.columns)
    ]
    np.testing.assert_allclose(*defocus, atol=150.0)
    found = done.particles("pick")
    movies = [truth.names.index(n) for n in found["micrograph"].values]
    away = [FINE * truth.columns[f"particle_{a}"][movies] - found[f"position_{a}_angstrom"].values[:, None] for a in "yx"]
    assert np.median(np.nanmin(np.hypot(*away), axis=1)) < 8.0

    export_relion(done, tmp_path / "relion")
    general = star.read_tables(tmp_path / "relion" / "motion" / "movie_0001.star")["general"]
    stated = {"ImageSizeX": 896, "ImageSizeY": 1024, "MicrographBinning": 2, "MicrographOriginalPixelSize": FINE}
    assert {name: float(general[f"rln{name}"]) for name in stated} == pytest.approx(stated)
    optics = star.read_tables(tmp_path / "relion" / "corrected_micrographs.star")["optics"].iloc[0]
    assert float(optics["rlnMicrographPixelSize"]) == pytest.approx(PIXEL)
    assert float(optics["rlnMicrographOriginalPixelSize"]) == pytest.approx(FINE)
