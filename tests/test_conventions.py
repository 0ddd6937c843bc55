"""Conventions of images: our CTF, shifts and particles against RELION 3.1.3, and against its numbers where it is not installed.

Poses, projections and symmetry are in test_conventions_3d.py; boxes and normalisation against relion_preprocess in test_extract.py.
"""

import math
import shutil
import subprocess

import mrcfile
import numpy as np
import pytest
import torch

from cryodask.formats import star
from cryodask.kernels.ctf import ctf, electron_wavelength_angstrom

BOX, PIXEL = 64, 2.0
NEEDS_RELION = pytest.mark.skipif(shutil.which("relion_project") is None, reason="needs relion_project")
LENS = {"voltage_kv": 300.0, "spherical_aberration_mm": 2.7, "amplitude_contrast": 0.1}
CASES = {
    "astigmatic": {"defocus_u_angstrom": 14000.0, "defocus_v_angstrom": 10000.0, "defocus_angle_deg": 30.0, "phase_shift_deg": 0.0},
    "phase plate": {"defocus_u_angstrom": 14000.0, "defocus_v_angstrom": 10000.0, "defocus_angle_deg": 30.0, "phase_shift_deg": 60.0},
}


def blobs(points, weights=(1.0, 0.7, 0.5), sigma=1.5):
    """Gaussians at (z, y, x) from index n // 2."""
    i = np.arange(BOX) - BOX // 2
    z, y, x = np.meshgrid(i, i, i, indexing="ij")
    shape = [(z - p[0]) ** 2 + (y - p[1]) ** 2 + (x - p[2]) ** 2 for p in points]
    return sum(w * np.exp(-r2 / (2 * sigma**2)) for w, r2 in zip(weights, shape)).astype(np.float32)


def project(folder, columns, *options):
    """relion_project of ``vol.mrc`` with one particle's columns; `(y, x)`."""
    one = {"image_index": [0], "image_stack": "x.mrcs", "particle_pixel_size_angstrom": PIXEL, "box": BOX, **LENS,
           "rot_deg": 0.0, "tilt_deg": 0.0, "psi_deg": 0.0, "origin_x_angstrom": 0.0, "origin_y_angstrom": 0.0, **columns}  # fmt: skip
    star.write_particles(folder / "p.star", one)
    command = ["relion_project", "--i", "vol.mrc", "--o", "out", "--ang", "p.star", "--angpix", str(PIXEL), *options]
    subprocess.run(command, cwd=folder, capture_output=True, check=True)
    return np.squeeze(mrcfile.read(folder / "out.mrcs")).astype(np.float64)


def save_volume(folder, volume):
    with mrcfile.new(folder / "vol.mrc") as file:
        file.set_data(volume)
        file.voxel_size = PIXEL


def our_ctf(case):
    k = torch.fft.fftfreq(BOX, PIXEL, dtype=torch.float64)
    values = {n: v for n, v in case.items() if not n.endswith("_deg")}
    angles = {"defocus_angle_rad": math.radians(case["defocus_angle_deg"]), "phase_shift_rad": math.radians(case["phase_shift_deg"])}
    return ctf(k[:, None], k[None], **values, **angles, **LENS).numpy()


@pytest.mark.relion
@NEEDS_RELION
@pytest.mark.parametrize("name", CASES)
def test_ctf_is_what_relion_multiplies_with(tmp_path, name):
    save_volume(tmp_path, blobs([(-4, 2, 9), (3, 8, -5), (8, -7, 1)]))
    plain, with_ctf = project(tmp_path, CASES[name]), project(tmp_path, CASES[name], "--ctf")
    a, b = np.fft.fft2(plain), np.fft.fft2(with_ctf)
    k = np.fft.fftfreq(BOX) * BOX
    strong = (np.hypot(k[:, None], k[None]) < 20) & (np.abs(a) > 0.02 * np.abs(a).max())
    assert strong.sum() > 500
    assert np.abs((b[strong] / a[strong]).real - our_ctf(CASES[name])[strong]).max() < 0.01


# (ky, kx) of a box of 64 pixels of 2 A -> coefficient of relion_project --ctf over that without, RELION 3.1.3, a point as the map
RELION_CTF = {
    "astigmatic": {(0, 0): 0.10000, (0, 12): 0.75711, (12, 0): -0.22636, (8, 14): 0.92963, (-14, 8): -0.39779, (-9, -9): 0.81821},
    "phase plate": {(0, 0): 0.91168, (0, 12): 0.94432, (12, 0): 0.73037, (8, 14): 0.78394, (-14, 8): -0.99345, (-9, -9): -0.08878},
}


@pytest.mark.parametrize("name", RELION_CTF)
def test_ctf_has_the_numbers_that_relion_gave(name):
    values = our_ctf(CASES[name])
    for (ky, kx), expected in RELION_CTF[name].items():
        assert values[ky, kx] == pytest.approx(expected, abs=2e-5)


def test_wavelengths_are_relativistic():
    assert electron_wavelength_angstrom(300.0) == pytest.approx(0.0196875, abs=1e-6)
    assert electron_wavelength_angstrom(200.0) == pytest.approx(0.0250793, abs=1e-6)
    assert electron_wavelength_angstrom(100.0) == pytest.approx(0.0370144, abs=1e-6)


@pytest.mark.relion
@NEEDS_RELION
def test_an_origin_of_relion_moves_the_particle_to_the_centre(tmp_path):
    """rlnOriginX/Y of +6, -4 A at 2 A a pixel: the object stands at -3, +2 pixels, and shifting by +3, -2 centres it."""
    save_volume(tmp_path, blobs([(0, 0, 0)], (1.0,)))
    image = project(tmp_path, {"origin_x_angstrom": 6.0, "origin_y_angstrom": -4.0})
    assert np.unravel_index(image.argmax(), image.shape) == (BOX // 2 + 2, BOX // 2 - 3)
    k = np.fft.fftfreq(BOX)
    shift = np.exp(-2j * np.pi * (k[:, None] * -4.0 + k[None] * 6.0) / PIXEL)
    centred = np.fft.ifft2(np.fft.fft2(image) * shift).real
    assert np.unravel_index(centred.argmax(), centred.shape) == (BOX // 2, BOX // 2)
    reference = project(tmp_path, {})
    assert np.abs(centred - reference).max() < 0.02 * reference.max()


@pytest.mark.relion
@NEEDS_RELION
def test_relion_reads_the_tables_that_we_write(tmp_path):
    """A particle table of two optics groups goes through relion_star_handler unharmed."""
    columns = {"image_index": [0, 1, 2], "image_stack": "x.mrcs", "particle_pixel_size_angstrom": PIXEL, "box": BOX, **LENS,
               "voltage_kv": [300.0, 200.0, 300.0], "rot_deg": [10.0, 20.0, -30.0], "class_number": [0, 1, 2],
               "defocus_u_angstrom": [10000.0, 11000.0, 12000.5], "origin_x_angstrom": [1.5, -2.5, 0.0]}  # fmt: skip
    star.write_particles(tmp_path / "p.star", columns)
    command = ["relion_star_handler", "--i", "p.star", "--o", "q.star", "--select", "rlnDefocusU", "--minval", "10500"]
    subprocess.run(command, cwd=tmp_path, capture_output=True, check=True)
    back = star.read_particles(tmp_path / "q.star")
    assert back["image_index"].tolist() == [1, 2]
    assert back["voltage_kv"].tolist() == [200.0, 300.0]
    assert back["class_number"].tolist() == [1, 2]
    assert back["defocus_u_angstrom"].tolist() == [11000.0, 12000.5]
    assert back["rot_deg"].tolist() == [20.0, -30.0]
