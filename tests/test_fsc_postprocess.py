"""FSC, masks and sharpening: against analytic cases and against relion_postprocess."""

import shutil
import subprocess

import mrcfile
import numpy as np
import pytest
import starfile
import torch
import xarray as xr

from cryodask.errors import InputError
from cryodask.kernels.fsc import corrected_fsc, fsc, half_radius, resolution_at, shell_resolutions
from cryodask.kernels.masking import low_pass
from cryodask.kernels.regions import density_threshold, otsu_threshold, soft_mask
from cryodask.stages.mask import MaskParams, mask
from cryodask.stages.postprocess import PostprocessParams, draw, postprocess

N, PIXEL = 64, 2.0


def blobs(n=N, seed=0, count=400, radius=12.0):
    """A globular 'molecule' of atoms one pixel wide, and white noise filling a box."""
    rng = np.random.default_rng(seed)
    points = rng.standard_normal((count, 3))
    points *= (radius * rng.random(count) ** (1 / 3) / np.linalg.norm(points, axis=1))[:, None]
    volume = np.zeros((n, n, n), np.float32)
    np.add.at(volume, tuple(np.round(points).astype(int).T + n // 2), 1.0)
    radius_map = half_radius(n)
    return torch.fft.irfftn(
        torch.fft.rfftn(torch.from_numpy(volume)) * torch.exp(-2.0 * (np.pi * radius_map / n) ** 2), s=volume.shape
    ).numpy()


def noisy_halves(volume, sd, seed=1, colour=None):
    rng = np.random.default_rng(seed)
    noise = torch.from_numpy(rng.standard_normal((2, *volume.shape)).astype(np.float32))
    if colour is not None:
        noise = torch.fft.irfftn(torch.fft.rfftn(noise, dim=(1, 2, 3)) * colour, s=volume.shape, dim=(1, 2, 3))
    return (volume + sd * (noise / noise.std()).numpy()).astype(np.float32)


def test_fsc_of_equal_maps_is_one_and_of_independent_noise_is_small():
    a, b = torch.randn(2, 48, 48, 48, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(fsc(a, a), torch.ones(25, dtype=torch.float64), atol=1e-6)
    assert fsc(a, b)[5:].abs().max() < 0.15
    assert torch.allclose(fsc(a, -a)[1:], -torch.ones(24, dtype=torch.float64), atol=1e-6)
    assert fsc(a, torch.zeros_like(a)).tolist() == [0.0] * 25


def test_fsc_of_signal_and_noise_is_what_their_powers_say():
    """White signal of variance 1, white noise of variance 1 in each half: FSC = 1 / 2."""
    g = torch.Generator().manual_seed(1)
    signal, n1, n2 = (torch.randn(64, 64, 64, generator=g) for _ in range(3))
    curve = fsc(signal + n1, signal + n2)
    assert curve[8:].mean() == pytest.approx(0.5, abs=0.01)


def test_crossing_is_the_first_and_is_interpolated():
    curve = torch.tensor([-1.0, 1.0, 0.9, 0.243, 0.043, 0.5, 0.0])  # shell 0 must not count
    assert resolution_at(curve, 0.143, 12, 2.0) == pytest.approx(24.0 / 3.5)
    assert resolution_at(torch.ones(7), 0.143, 12, 2.0) == 4.0  # Nyquist
    assert resolution_at(torch.tensor([1.0, 0.0, 0.0]), 0.143, 4, 1.0) == pytest.approx(4.0 / 0.857)
    assert shell_resolutions(12, 2.0).tolist() == pytest.approx([float("inf"), 24.0, 12.0, 8.0, 6.0, 4.8, 4.0])


def test_correction_takes_away_what_a_tight_mask_feigns():
    """Two halves of pure noise under one common mask with a rough surface look alike; corrected, they do not."""
    volume = blobs()
    tight = torch.from_numpy((volume > 0.02).astype(np.float32))
    halves = torch.from_numpy(noisy_halves(0 * volume + 1.0, 0.5))  # a common density 1 makes the mask itself the 'signal'
    curves = corrected_fsc(halves[0], halves[1], tight)
    assert curves.masked[4:12].mean() > 0.5
    assert curves.randomised_from == 1
    assert curves.corrected[6:].abs().mean() < 0.15


def test_mask_encloses_the_molecule_and_falls_softly():
    volume = blobs()
    halves = noisy_halves(volume, 0.05)
    params = MaskParams(low_pass_angstrom=15, extend_angstrom=6, edge_angstrom=10)
    soft = mask.process(params, half_map=halves, map_pixel_size_angstrom=PIXEL)["solvent_mask"]
    assert soft.shape == volume.shape
    assert soft.dtype == np.float32
    assert (soft * volume).sum() / volume.sum() > 0.99
    assert 0.05 < soft.mean() < 0.2  # a ball of 15 pixels fills 0.054 of the box, of 22 pixels 0.17
    assert soft.min() == 0
    assert soft.max() == 1
    row = soft[N // 2, N // 2]
    assert np.abs(np.diff(row)).max() < 0.4


def test_threshold_does_not_follow_the_noise():
    volume = torch.from_numpy(blobs())
    smooth = low_pass(volume, PIXEL, 15.0).numpy()
    clean = density_threshold(smooth)
    noisy = low_pass(torch.from_numpy(noisy_halves(volume.numpy(), 0.06)).mean(0), PIXEL, 15.0).numpy()
    assert density_threshold(noisy) == pytest.approx(clean, rel=0.5)
    core = soft_mask(noisy, density_threshold(noisy), pixel_size_angstrom=PIXEL, extend_angstrom=0, edge_angstrom=0)
    assert core.mean() < 0.06


def test_otsu_parts_two_heaps_and_bears_equal_values():
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(0, 1, 900), rng.normal(10, 1, 100)])
    assert 3 < otsu_threshold(values) < 7
    assert (np.ones(5) > otsu_threshold(np.ones(5))).all()


def dataset_of(out):
    return xr.Dataset({name: ({0: (), 1: ("shell",), 3: ("z", "y", "x")}[np.ndim(value)], value) for name, value in out.items()})


def test_postprocess_recovers_a_known_b_factor():
    """A flat spectrum blurred with B = 150 must be given B = -150 back."""
    shape = (N, N, N)
    rng = np.random.default_rng(3)
    flat = torch.zeros(shape)
    inside = tuple(torch.from_numpy(rng.integers(N // 2 - 9, N // 2 + 9, (3, 150))))
    flat[inside] = 1.0  # points: white amplitude spectrum
    s2 = (half_radius(N) / (N * PIXEL)) ** 2
    blurred = torch.fft.irfftn(torch.fft.rfftn(flat) * torch.exp(-150.0 / 4.0 * s2), s=shape).numpy()
    halves = noisy_halves(blurred, 1e-4)
    whole = np.ones(shape, np.float32)
    out = postprocess.process(PostprocessParams(), half_map=halves, solvent_mask=whole, map_pixel_size_angstrom=PIXEL)
    assert out["b_factor_angstrom2"] == pytest.approx(-150.0, abs=15.0)
    # the line of the Guinier plot has that slope, and goes through the shells that were fitted
    square = out["shell_resolution_angstrom"] ** -2.0
    fitted = np.isfinite(out["log_amplitude_fitted"])
    assert 4 * np.polyfit(square[fitted], out["log_amplitude_fitted"][fitted], 1)[0] == pytest.approx(out["b_factor_angstrom2"])
    assert np.abs(out["log_amplitude"] - out["log_amplitude_fitted"])[fitted].max() < 0.5
    ds = dataset_of(out)
    pictures = {picture.title: picture.caption for picture in draw(ds)}
    assert list(pictures) == ["Fourier shell correlation", "Guinier plot", "Sharpened map"]
    assert f"B-factor of {out['b_factor_angstrom2']:.0f} Å²" in pictures["Guinier plot"]
    assert [picture.title for picture in draw(ds.drop_vars(["log_amplitude", "log_amplitude_fitted"]))][1] == "Sharpened map"
    assert out["resolution_angstrom"] < 4.5
    assert out["shell_resolution_angstrom"].shape == out["fsc_corrected"].shape == (N // 2 + 1,)


def test_an_asked_b_factor_is_used_and_a_low_resolution_map_is_not_sharpened():
    halves = noisy_halves(low_pass(torch.from_numpy(blobs()), PIXEL, 16.0).numpy(), 0.05)
    whole = np.ones(halves.shape[1:], np.float32)
    given = postprocess.process(
        PostprocessParams(b_factor_angstrom2=-40.0), half_map=halves, solvent_mask=whole, map_pixel_size_angstrom=PIXEL
    )
    assert given["b_factor_angstrom2"] == -40.0
    fitted = postprocess.process(PostprocessParams(), half_map=halves, solvent_mask=whole, map_pixel_size_angstrom=PIXEL)
    assert fitted["resolution_angstrom"] > 10.0
    assert fitted["b_factor_angstrom2"] == 0.0
    half = resolution_at(torch.from_numpy(fitted["fsc_corrected"]), 0.5, N, PIXEL)
    pictures = {picture.title: picture.caption for picture in draw(dataset_of(fitted))}
    assert f"falls to 0.5 at {half:.2f} Å" in pictures["Fourier shell correlation"]
    assert "Too few shells for a fit" in pictures["Guinier plot"]


def test_broken_maps_and_masks_are_refused():
    good = noisy_halves(blobs(32, radius=6.0), 0.1)
    whole = np.ones(good.shape[1:], np.float32)
    nan = good.copy()
    nan[1, 3, 3, 3] = np.nan
    zero = good.copy()
    zero[0] = 0
    for halves, message in ((nan, "half-map 2 has NaN"), (zero, "half-map 1 is zero"), (good[:1], "not two equal cubes")):
        with pytest.raises(InputError, match=message):
            mask.process(MaskParams(), half_map=halves, map_pixel_size_angstrom=PIXEL)
        with pytest.raises(InputError, match=message):
            postprocess.process(PostprocessParams(), half_map=halves, solvent_mask=whole, map_pixel_size_angstrom=PIXEL)
    with pytest.raises(InputError, match="the mask is"):
        postprocess.process(PostprocessParams(), half_map=good, solvent_mask=whole[:16, :16, :16], map_pixel_size_angstrom=PIXEL)
    for bad in (5 * whole, 0 * whole, np.nan * whole):
        with pytest.raises(InputError, match="outside 0 to 1"):
            postprocess.process(PostprocessParams(), half_map=good, solvent_mask=bad, map_pixel_size_angstrom=PIXEL)
    with pytest.raises(InputError, match="no voxel"):
        mask.process(MaskParams(threshold=1e9), half_map=good, map_pixel_size_angstrom=PIXEL)


@pytest.mark.relion
@pytest.mark.skipif(shutil.which("relion_postprocess") is None, reason="needs relion_postprocess")
def test_agrees_with_relion_postprocess(shared, tmp_path):
    volume = mrcfile.read(shared / "data/models/betagal_ngl_100_3.54A.mrc.bz2").astype(np.float32)
    n, pixel = 100, 3.54
    s = half_radius(n) / (n * pixel)
    volume = torch.fft.irfftn(torch.fft.rfftn(torch.from_numpy(volume)) * torch.exp(-150.0 / 4.0 * s**2), s=volume.shape).numpy()
    # the noise in the solvent of a real map would be common to both halves
    volume *= mask.process(MaskParams(), half_map=np.stack([volume, volume]), map_pixel_size_angstrom=pixel)["solvent_mask"]
    halves = noisy_halves(volume, 0.1 * volume.std(), colour=1.0 / (0.01 + s))
    soft = mask.process(MaskParams(), half_map=halves, map_pixel_size_angstrom=pixel)["solvent_mask"]
    for name, data in (("a_half1_class001_unfil", halves[0]), ("a_half2_class001_unfil", halves[1]), ("mask", soft)):
        with mrcfile.new(tmp_path / f"{name}.mrc") as file:
            file.set_data(data)
            file.voxel_size = pixel
    # it aborts after the STAR file when the viewer of PDF files is missing
    command = ["relion_postprocess", "--i", "a_half1_class001_unfil.mrc", "--mask", "mask.mrc", "--angpix", str(pixel)]
    seeds = range(1, 6)
    for seed in seeds:
        once = [*command, "--o", f"pp{seed}", "--random_seed", str(seed), "--auto_bfac", "--force_mask"]
        subprocess.run(once, cwd=tmp_path, capture_output=True, check=False)
    theirs = starfile.read(tmp_path / "pp1.star")
    cut = theirs["general"]["rlnFinalResolution"]
    ours = postprocess.process(PostprocessParams(low_pass_angstrom=cut), half_map=halves, solvent_mask=soft, map_pixel_size_angstrom=pixel)
    curves = theirs["fsc"]
    close = {"rtol": 0, "atol": 0.004}
    np.testing.assert_allclose(ours["fsc_unmasked"], curves.rlnFourierShellCorrelationUnmaskedMaps, **close)
    np.testing.assert_allclose(ours["fsc_masked"], curves.rlnFourierShellCorrelationMaskedMaps, **close)
    # RELION draws the random phases once: its curves differ by up to 0.04 between seeds, so it is its mean that must be met
    drawn = [starfile.read(tmp_path / f"pp{seed}.star")["fsc"].rlnFourierShellCorrelationCorrected.to_numpy() for seed in seeds]
    assert np.abs(ours["fsc_corrected"] - np.mean(drawn, 0)).max() < 0.02
    assert np.sqrt(np.mean((ours["fsc_corrected"] - drawn[0]) ** 2)) < 0.01
    assert ours["resolution_angstrom"] == pytest.approx(cut, rel=0.025)  # RELION does not interpolate
    assert ours["b_factor_angstrom2"] == pytest.approx(theirs["general"]["rlnBfactorUsedForSharpening"], rel=0.02)
    sharpened = mrcfile.read(tmp_path / "pp1.mrc")
    assert np.corrcoef(sharpened.ravel(), ours["sharpened_map"].ravel())[0, 1] > 0.99


def test_fourier_space_that_no_view_reaches_counts_as_noise():
    """With the noise of this map the correlation falls slowly, so that coverage moves its crossing by shells."""
    halves = noisy_halves(blobs(), 0.05)
    given = {"half_map": halves, "solvent_mask": np.ones(halves.shape[1:], np.float32), "map_pixel_size_angstrom": PIXEL}
    whole, same, half, fifth = (
        postprocess.process(PostprocessParams(), **given, **extra)["resolution_angstrom"]
        for extra in ({}, *({"fourier_coverage": np.full(20, share)} for share in (1.0, 0.5, 0.2)))
    )
    assert whole == same
    # half of the power of the truth: 0.143 is reached where the halves correlate by a third
    assert half > 1.02 * whole
    # a fifth never correlates with the truth by 0.5
    assert fifth > 3.0 * whole
