"""Our projections, shifts, symmetry and reconstruction are RELION's: against its programs, and its numbers where it is not installed."""

import subprocess

import mrcfile
import numpy as np
import pandas as pd
import pytest
import starfile
import torch
from _particles import blob_map, ctf_columns, project

from cryodask.kernels.fourier import soft_sphere
from cryodask.kernels.fsc import fsc
from cryodask.kernels.half_grid import reconstruct_half
from cryodask.kernels.local_search import grid_of_poses
from cryodask.kernels.orientations import euler_to_matrix, matrix_to_euler, random_rotations
from cryodask.kernels.rows import image_rows
from cryodask.kernels.symmetry import symmetry_operators
from cryodask.vocabulary import CTF_COLUMNS, OPTICS

BOX, PIXEL = 48, 3.0
BLOBS = ((6.0, 2.0, -4.0, 1.0), (-5.0, 7.0, 3.0, 0.7), (1.0, -7.0, 7.0, 0.5), (0.0, 0.0, 0.0, 0.3))
ANGLES = (25.0, 70.0, -40.0)
ORIGIN_ANGSTROM = (6.0, -4.5)  # x, y
# values at (row, column), mean subtracted, of the image that relion_project 3.1.3 makes (the first test below checks them)
RELION_PIXELS = {(24, 24): -0.2270, (20, 22): -0.3411, (26, 19): 0.1001, (29, 31): -0.1872, (18, 27): -0.1207}


def blobs() -> torch.Tensor:
    c = torch.arange(BOX).float() - BOX // 2
    z, y, x = torch.meshgrid(c, c, c, indexing="ij")
    return sum(w * torch.exp(-((x - a) ** 2 + (y - b) ** 2 + (z - d) ** 2) / (2 * 1.7**2)) for a, b, d, w in BLOBS)


def one_particle() -> dict[str, np.ndarray]:
    columns = {k: v[:1] for k, v in ctf_columns(1).items()}
    return columns | {
        "defocus_u_angstrom": np.array([14000.0]),
        "defocus_v_angstrom": np.array([11000.0]),
        "defocus_angle_deg": np.array([30.0]),
    }


def our_image() -> np.ndarray:
    rotation = euler_to_matrix(*torch.deg2rad(torch.tensor(ANGLES)))[None]
    origin = torch.tensor([[ORIGIN_ANGSTROM[1], ORIGIN_ANGSTROM[0]]]) / PIXEL
    return project(blobs(), rotation, origin, one_particle(), PIXEL)[0]


def write_star(path, rotations, origins_px, columns, images):
    """Optics and particles as RELION 3.1 reads them."""
    count = len(rotations)
    rot, tilt, psi = (torch.rad2deg(a).numpy() for a in matrix_to_euler(rotations.double()))
    optics = pd.DataFrame({
        "rlnOpticsGroupName": ["og"], "rlnOpticsGroup": [1], "rlnVoltage": [300.0], "rlnSphericalAberration": [2.7],
        "rlnAmplitudeContrast": [0.1], "rlnImagePixelSize": [PIXEL], "rlnImageSize": [BOX], "rlnImageDimensionality": [2],
    })  # fmt: skip
    rows = pd.DataFrame({
        "rlnImageName": [f"{i + 1:06d}@{images}" for i in range(count)], "rlnMicrographName": "m.mrc", "rlnOpticsGroup": 1,
        "rlnAngleRot": rot, "rlnAngleTilt": tilt, "rlnAnglePsi": psi,
        "rlnOriginXAngst": origins_px[:, 1].numpy() * PIXEL, "rlnOriginYAngst": origins_px[:, 0].numpy() * PIXEL,
        "rlnDefocusU": columns["defocus_u_angstrom"], "rlnDefocusV": columns["defocus_v_angstrom"],
        "rlnDefocusAngle": columns["defocus_angle_deg"],
    })  # fmt: skip
    starfile.write({"optics": optics, "particles": rows}, path, overwrite=True)


def write_mrc(path, data, stack=False):
    with mrcfile.new(path, overwrite=True) as f:
        f.set_data(np.asarray(data, np.float32))
        if stack:
            f.set_image_stack()
        f.voxel_size = PIXEL


def relion(*arguments, cwd):
    return subprocess.run([str(a) for a in arguments], cwd=cwd, check=True, capture_output=True, text=True).stdout


def our_reconstruction(images, columns, rotations, origins_px, symmetry):
    radius = BOX // 2 - 1
    rows = image_rows(torch.from_numpy(images), columns, radius, PIXEL)
    everything = torch.arange(len(images))
    grid = grid_of_poses(rows, everything, torch.ones(radius + 1), rotations, origins_px, radius, symmetry_operators(symmetry))
    return reconstruct_half(grid, radius, BOX, image_box=BOX)


@pytest.mark.relion
def test_projections_are_those_of_relion_project(tmp_path):
    write_mrc(tmp_path / "vol.mrc", blobs())
    rotation = euler_to_matrix(*torch.deg2rad(torch.tensor(ANGLES)))[None]
    origin = torch.tensor([[ORIGIN_ANGSTROM[1], ORIGIN_ANGSTROM[0]]]) / PIXEL
    write_star(tmp_path / "p.star", rotation, origin, one_particle(), "x.mrcs")
    relion("relion_project", "--i", "vol.mrc", "--o", "out", "--ang", "p.star", "--ctf", "--angpix", PIXEL, cwd=tmp_path)
    theirs = np.squeeze(mrcfile.read(tmp_path / "out.mrcs"))
    ours = our_image()
    a, b = ours - ours.mean(), theirs - theirs.mean()
    assert np.sqrt(((a - b) ** 2).sum() / (b**2).sum()) < 5e-3
    for place, value in RELION_PIXELS.items():
        assert abs((theirs - theirs.mean())[place] - value) < 2e-3


def test_projections_have_relions_pixel_values():
    ours = our_image()
    ours = ours - ours.mean()
    assert RELION_PIXELS
    for place, value in RELION_PIXELS.items():
        assert abs(ours[place] - value) < 0.01 * np.abs(ours).max()


@pytest.mark.relion
@pytest.mark.parametrize("name", ["C3", "D2", "D3", "T", "O", "I1", "I2", "I3", "I4"])
def test_symmetry_operators_are_those_that_relion_prints(name, tmp_path):
    text = relion("relion_refine", "--sym", name, "--print_symmetry_ops", cwd=tmp_path)
    rows = [[float(x) for x in line.split()] for line in text.splitlines() if len(line.split()) == 3 and not line.strip().startswith("R")]
    theirs = np.array(rows).reshape(-1, 3, 3)
    ours = symmetry_operators(name)
    assert len(theirs) == len(ours)
    for g in theirs:
        assert np.abs(ours - g).max((1, 2)).min() < 2e-3


@pytest.mark.relion
@pytest.mark.parametrize("symmetry", ["C1", "D2", "C3"])
def test_relion_reconstructs_our_map_from_our_poses(symmetry, tmp_path):
    g = torch.Generator().manual_seed(5)
    # narrow blobs: shells without signal would compare how two programs treat noise in empty voxels
    volume = blob_map(BOX, symmetry, blobs=8, reach=0.25, width_px=0.9)
    count = 800
    rotations, origins, columns = random_rotations(count, g), torch.randn(count, 2, generator=g), ctf_columns(count, 2)
    images = project(volume, rotations, origins, columns, PIXEL)
    images += 0.1 * images.std() * np.random.default_rng(0).standard_normal(images.shape, dtype=np.float32)
    write_mrc(tmp_path / "p.mrcs", images, stack=True)
    write_star(tmp_path / "p.star", rotations, origins, columns, "p.mrcs")
    relion("relion_reconstruct", "--i", "p.star", "--o", "map.mrc", "--ctf", "--sym", symmetry, cwd=tmp_path)
    theirs = torch.from_numpy(np.array(mrcfile.read(tmp_path / "map.mrc"), np.float32))
    ours = our_reconstruction(images, columns, rotations, origins, symmetry)
    mask = soft_sphere(BOX, PIXEL, 55.0, 10.0)
    curve = fsc(ours * mask, theirs * mask)
    assert float(curve[1 : int(0.8 * BOX / 2) + 1].min()) > 0.98


def test_reconstruction_from_true_poses_returns_the_map():
    g = torch.Generator().manual_seed(5)
    rotations, origins, columns = random_rotations(400, g), torch.randn(400, 2, generator=g), ctf_columns(400, 2)
    images = project(blobs(), rotations, origins, columns, PIXEL)
    ours = our_reconstruction(images, {k: columns[k] for k in (*CTF_COLUMNS, *OPTICS)}, rotations, origins, "C1")
    mask = soft_sphere(BOX, PIXEL, 55.0, 10.0)
    assert float(fsc(ours * mask, blobs() * mask)[1:18].min()) > 0.97
