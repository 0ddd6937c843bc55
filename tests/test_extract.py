"""Extraction: placing, borders, normalisation, downscaling, and RELION's own boxes."""

import shutil
import subprocess

import mrcfile
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from cryodask.errors import MicrographError
from cryodask.formats import star
from cryodask.kernels.extraction import cut_boxes, cut_boxes_between_pixels, normalise_background
from cryodask.kernels.fourier import resize_images
from cryodask.run.slices import slice_of_birth
from cryodask.stages.extract import ExtractParams, extract

PIXEL = 2.0


def run(image, y, x, accepted=None, **params):
    y, x = np.asarray(y, np.float32), np.asarray(x, np.float32)
    accepted = np.ones(len(y), np.int8) if accepted is None else np.asarray(accepted, np.int8)
    table = {"particle_id": 100 + np.arange(len(y)), "pick_y": y, "pick_x": x, "pick_score": accepted.astype(np.float32)}
    particles = slice_of_birth(table, PIXEL, 0.5, ["particle_id", "position_y_angstrom", "position_x_angstrom"])
    return extract.process(ExtractParams(**params), micrograph_dw=image, pixel_size_angstrom=PIXEL, **particles)


def noise(shape=(200, 240), seed=0):
    return np.random.default_rng(seed).normal(100.0, 10.0, shape).astype(np.float32)


@settings(max_examples=40, deadline=None)
@given(y=st.floats(24, 175), x=st.floats(24, 215), box=st.sampled_from([16, 32, 48]), scale=st.sampled_from([1, 2]))
def test_the_pixel_of_a_pick_lands_at_the_origin(y, x, box, scale):
    """Fractions are cut off: 201.6 is pixel 201."""
    image = noise() * 0.01
    image[int(np.float32(y)), int(np.float32(x))] += 1000.0
    out = run(image, [y], [x], box=box, scale_to=box // scale, invert=False)
    box_image = out["particle_image"][0]
    assert np.unravel_index(box_image.argmax(), box_image.shape) == (box // scale // 2,) * 2
    assert (out["particle_y"][0], out["particle_x"][0]) == (int(np.float32(y)), int(np.float32(x)))


def blobs(places, shape=(200, 240), sigma=2.5):
    """Gaussians, band-limited to 1e-6 of their height, at places between pixels."""
    y, x = np.ogrid[: shape[0], : shape[1]]
    return sum(np.exp(-((y - v) ** 2 + (x - u) ** 2) / (2 * sigma**2)) for v, u in places).astype(np.float32)


@pytest.mark.parametrize(("recentre", "kept", "left_out"), [(True, [10, 12], [(11, 4)]), (False, [10, 11, 12], [])])
def test_what_the_map_does_not_explain_is_not_recentred(recentre, kept, left_out):
    places = np.array([[60.0, 70.0], [120.0, 160.0], [99.0, 110.0]]) * PIXEL
    out = extract.process(
        ExtractParams(box=48, recentre=recentre),
        micrograph_dw=np.random.default_rng(0).normal(size=(200, 240)).astype(np.float32),
        pixel_size_angstrom=PIXEL,
        particle_id=np.arange(10, 13),
        **{f"{of}_{axis}_angstrom": places[:, i] for of in ("position", "centre") for i, axis in enumerate("yx")},
        in_map=np.array([True, False, True]),
    )
    assert out["particle_id"].tolist() == kept
    assert [*zip(out["left_out_id"].tolist(), out["left_out_reason"].tolist())] == left_out


@pytest.mark.parametrize("scale", [1, 2])
def test_recentred_boxes_have_the_refined_centre_at_their_origin_between_pixels_too(scale):
    """The centroid of a Gaussian that lies at the centre is n // 2 to 0.01 pixels; whole pixels would be up to 0.5 off."""
    places = np.array([[60.5, 70.25], [120.3, 160.0], [99.9, 110.49], [140.0, 50.0]])
    image = 100.0 + 50.0 * blobs(places)
    out = extract.process(
        ExtractParams(box=48, scale_to=48 // scale, recentre=True, invert=False, ramp=False),
        micrograph_dw=image,
        pixel_size_angstrom=PIXEL,
        particle_id=np.arange(4),
        position_y_angstrom=(places[:, 0] + 3.0) * PIXEL,
        position_x_angstrom=(places[:, 1] - 3.0) * PIXEL,
        centre_y_angstrom=places[:, 0] * PIXEL,
        centre_x_angstrom=places[:, 1] * PIXEL,
    )
    assert np.stack([out["particle_y"], out["particle_x"]], -1) == pytest.approx(places, abs=1e-4)
    i = np.arange(48 // scale) - 24 // scale
    for cut in out["particle_image"]:
        weight = cut - np.median(cut)
        weight[np.hypot(i[:, None], i[None]) > 10 / scale] = 0
        assert [(weight.sum(a) * i).sum() / weight.sum() for a in (1, 0)] == pytest.approx([0, 0], abs=0.01)


def test_a_box_moved_between_pixels_keeps_its_noise_and_its_edges():
    """A box at a whole pixel is the one that is only cut. Half a pixel away, white noise keeps its variance (to 2 percent)."""
    image = torch.from_numpy(noise((400, 400)))
    whole = cut_boxes_between_pixels(image, torch.tensor([200.0], dtype=torch.float64), torch.tensor([180.0], dtype=torch.float64), 256)
    assert whole.numpy() == pytest.approx(cut_boxes(image, torch.tensor([200]), torch.tensor([180]), 256).numpy(), abs=1e-3)
    half = cut_boxes_between_pixels(image, torch.tensor([200.5], dtype=torch.float64), torch.tensor([180.5], dtype=torch.float64), 256)
    assert float(half.std() / whole.std()) == pytest.approx(1.0, abs=0.02)
    edge = half[0, 0]
    assert float(edge.std() / whole.std()) == pytest.approx(1.0, abs=0.15)
    assert half[0].mean() == pytest.approx(100.0, abs=0.2)


def test_background_has_mean_nought_and_deviation_one():
    image = noise() + np.linspace(0, 300, 240, dtype=np.float32)[None]
    out = run(image, [100, 60], [120, 80], box=64, background_diameter_angstrom=96.0)
    i = np.arange(64) - 32
    outside = i[:, None] ** 2 + i[None] ** 2 > 24**2
    for particle in out["particle_image"]:
        assert particle[outside].mean() == pytest.approx(0, abs=1e-5)
        assert particle[outside].std() == pytest.approx(1, abs=1e-5)
        slope = np.polyfit(np.arange(64), particle.mean(0), 1)[0]
        assert abs(slope) < 0.01  # the ramp is gone


def test_protein_is_white_after_inversion():
    image = noise()
    image[90:110, 110:130] -= 50.0
    out = run(image, [100], [120], box=64)
    assert out["particle_image"][0, 28:36, 28:36].mean() > 3
    assert run(image, [100], [120], box=64, invert=False)["particle_image"][0, 28:36, 28:36].mean() < -3


def test_only_accepted_picks_that_lie_well_inside_are_cut():
    out = run(noise(), [100, 100, 3, 196, 100], [120, 121, 100, 100, 238], accepted=[1, 0, 1, 1, 1], box=32)
    assert out["particle_count"] == 1
    assert out["particle_y"].tolist() == [100.0]
    assert out["particle_id"].tolist() == [100]
    assert out["left_out_id"].tolist() == [102, 103, 104], "101 was not accepted"
    assert out["left_out_reason"].tolist() == [1, 1, 1]


def test_corners_beyond_the_border_are_mirrored():
    image = noise()
    out = run(image, [40, 100], [60, 120], box=96, background_diameter_angstrom=64.0)
    assert out["particle_count"] == 2
    assert np.isfinite(out["particle_image"]).all()
    boxes = cut_boxes(torch.from_numpy(image), torch.tensor([2]), torch.tensor([120]), 16).numpy()[0]
    assert (boxes[8 - 2] == image[0, 112:128]).all()
    assert (boxes[8 - 3] == image[1, 112:128]).all()
    assert (boxes[8 - 4] == image[2, 112:128]).all()


def test_no_picks_give_empty_arrays():
    for y, accepted in (([], []), ([50.0], [0])):
        out = run(noise(), y, y, accepted, box=32, scale_to=16)
        assert out["particle_image"].shape == (0, 16, 16)
        assert out["particle_y"].shape == out["particle_x"].shape == out["particle_id"].shape == out["left_out_id"].shape == (0,)
        assert out["particle_count"] == 0
        assert out["particle_pixel_size_angstrom"] == 4.0


def test_downscaling_keeps_low_frequencies_where_they_are():
    i = np.arange(64) - 32
    y, x = np.meshgrid(i, i, indexing="ij")
    blob = np.exp(-((x - 6) ** 2 + (y + 4) ** 2) / (2 * 4.0**2)).astype(np.float32)
    small = resize_images(torch.from_numpy(blob), 32).numpy()
    j = np.arange(32) - 16
    y, x = np.meshgrid(j, j, indexing="ij")
    assert small == pytest.approx(np.exp(-((x - 3) ** 2 + (y + 2) ** 2) / (2 * 2.0**2)), abs=2e-3)


def test_a_constant_image_survives_normalisation():
    assert torch.isfinite(normalise_background(torch.ones(1, 16, 16), 5.0)).all()


def test_boxes_and_diameters_that_cannot_be_are_refused():
    for params, message in (
        ({"box": 33}, "even"),
        ({"box": 32, "scale_to": 15}, "even"),
        ({"box": 32, "scale_to": 64}, "must not exceed"),
        ({"box_angstrom": 300.0}, "together"),
        ({"box": 32, "pixel_size_angstrom": 2.0}, "together"),
        ({"box_angstrom": 300.0, "pixel_size_angstrom": 2.0, "scale_to": 64}, "scale_to is only for box"),
        ({"box": 32, "colour": 1}, "Extra inputs"),
    ):
        with pytest.raises(ValidationError, match=message):
            ExtractParams(**params)
    nan = noise()
    nan[5, 5] = np.nan
    with pytest.raises(MicrographError, match="larger than the micrograph"):
        run(noise(), [100], [120], box=256)
    with pytest.raises(MicrographError, match="leaves no background"):
        run(noise(), [100], [120], box=32, background_diameter_angstrom=80.0)
    with pytest.raises(MicrographError, match="NaN"):
        run(nan, [100], [120], box=32)


@pytest.mark.relion
@pytest.mark.skipif(shutil.which("relion_preprocess") is None, reason="needs relion_preprocess")
@pytest.mark.parametrize(
    ("options", "params"),
    [
        (["--bg_radius", "24", "--invert_contrast"], {}),
        (["--bg_radius", "24", "--no_ramp"], {"invert": False, "ramp": False}),
        (["--scale", "32", "--bg_radius", "12", "--invert_contrast"], {"scale_to": 32}),
    ],
)
def test_boxes_are_those_of_relion_preprocess(tmp_path, options, params):
    """The same pixels to the last digits; after downscaling to the Nyquist frequency, where RELION keeps one of a pair of terms."""
    image = noise((256, 256)) + np.linspace(0, 30, 256, dtype=np.float32)[None]
    y, x = np.array([100.4, 150.6, 128.0]), np.array([90.7, 60.2, 200.0])
    with mrcfile.new(tmp_path / "m.mrc") as file:
        file.set_data(image)
        file.voxel_size = PIXEL
    star.write_coordinates(tmp_path / "m_pick.star", y, x)
    columns = {"micrograph_name": ["m.mrc"], "defocus_u_angstrom": [1e4], "defocus_v_angstrom": [9e3], "defocus_angle_deg": [10.0],
               "voltage_kv": 300.0, "spherical_aberration_mm": 2.7, "amplitude_contrast": 0.1, "pixel_size_angstrom": PIXEL}  # fmt: skip
    star.write_micrographs_ctf(tmp_path / "mics.star", columns)
    command = ["relion_preprocess", "--i", "mics.star", "--coord_dir", "./", "--coord_suffix", "_pick.star", "--part_star", "out.star",
               "--part_dir", "P/", "--extract", "--extract_size", "64", "--norm"]  # fmt: skip
    subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, check=True)
    theirs = mrcfile.read(tmp_path / "P/m.mrcs")
    ours = run(image, y, x, box=64, background_diameter_angstrom=96.0, **params)["particle_image"]
    if "scale_to" not in params:
        assert ours == pytest.approx(theirs, abs=1e-5)
        return
    ours, theirs = (np.fft.rfft2(a)[:, 1:15, 1:15] for a in (ours, theirs))
    assert np.abs(ours - theirs).max() < 0.05 * np.abs(theirs).max()
    assert np.corrcoef(ours.ravel().real, theirs.ravel().real)[0, 1] > 0.999
    back = star.read_particles(tmp_path / "out.star")
    assert back["particle_pixel_size_angstrom"].tolist() == [4.0] * 3
    assert back["particle_y"] == pytest.approx(y, abs=1e-4)
