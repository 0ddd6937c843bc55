"""CTF refinement: finds what was done to the images, corrects images exactly, and leaves alone what it cannot know."""

import json

import numpy as np
import pytest
import torch
from _particles import blob_map, simulate

from cryodask.errors import InputError
from cryodask.interop.refined_optics import with_refined_optics
from cryodask.kernels import aberrations as ab
from cryodask.kernels.expectation import ctf_values
from cryodask.kernels.orientations import matrix_to_euler
from cryodask.kernels.projection import fourier_volume, half_plane, shift_phases, slices
from cryodask.run.blocks import ParticlesInMemory, iterate_here
from cryodask.stage import ParticleSet
from cryodask.stages._ctf_refine import start
from cryodask.stages.ctf_refine import CtfRefineParams, ctf_refine

BOX, PIXEL, COUNT = 48, 2.5, 360
TRUE = {
    "beam_tilt_x_mrad": -1.2, "beam_tilt_y_mrad": 0.7, "trefoil_x_angstrom3": 90.0, "trefoil_y_angstrom3": -60.0,
    "tetrafoil_x_angstrom4": 300.0, "tetrafoil_y_angstrom4": -200.0, "magnification_xx": 1.012, "magnification_xy": 0.006,
    "magnification_yy": 0.988,
}  # fmt: skip


def set_of(volume, count):
    """Particles of low defocus, whose delocalised signal stays within the small box, and their rotations and origins."""
    _, particles, rotations, origins = simulate(volume, count, pixel=PIXEL, snr=1.0, shift_px=1.0)
    columns = dict(particles.columns)
    for name in ("defocus_u_angstrom", "defocus_v_angstrom"):
        columns[name] = 0.35 * columns[name]
    return ParticleSet(count, BOX, PIXEL, columns), rotations, origins


def aberrated(volume, rotations, origin_px, columns, values):
    """Noise-free images with aberrations, from their definition."""
    plane = half_plane(BOX // 2 - 1)
    fourier, length = fourier_volume(volume, BOX // 2 - 1), BOX * PIXEL
    matrix = ab.magnification(values)
    x, y = (matrix[i, 0] * plane.kx + matrix[i, 1] * plane.ky for i in (0, 1))
    kx, ky = plane.kx.double() / length, plane.ky.double() / length
    tilt = 2.0 * np.pi * 2.7e7 * 0.0196875**2 * (kx**2 + ky**2) * 1e-3
    phase = -tilt * (kx * values["beam_tilt_x_mrad"] + ky * values["beam_tilt_y_mrad"])
    cube = (torch.complex(kx, ky)) ** 3
    phase = phase + values["trefoil_x_angstrom3"] * cube.real + values["trefoil_y_angstrom3"] * cube.imag
    four = {name: np.full(len(rotations), values[name]) for name in ("tetrafoil_x_angstrom4", "tetrafoil_y_angstrom4")}
    spectrum = torch.zeros(len(rotations), BOX, BOX, dtype=torch.complex64)
    image = slices(fourier, rotations, y.float(), x.float()) * ctf_values(columns | four, plane.ky, plane.kx, length)
    image = image * shift_phases(-origin_px, plane.ky, plane.kx, BOX) * torch.polar(torch.ones_like(phase), phase).to(torch.complex64)
    spectrum[:, plane.ky % BOX, plane.kx] = image
    spectrum[:, (-plane.ky) % BOX, (-plane.kx) % BOX] = image.conj()
    return torch.fft.fftshift(torch.fft.ifft2(spectrum * BOX).real, dim=(-2, -1)).numpy()


@pytest.fixture(scope="module")
def simulated():
    """Images of a molecule of small blobs with aberrations and wrong defocus, their set, and the errors of the defocus."""
    volume = blob_map(BOX, "D2", blobs=40, width_px=0.8)
    particles, rotations, origins = set_of(volume, COUNT)
    rng = np.random.default_rng(4)
    columns = {**particles.columns, "micrograph": np.arange(COUNT) % 6}
    off = rng.normal(0.0, 150.0, COUNT)
    real = {name: columns[name] + off for name in ("defocus_u_angstrom", "defocus_v_angstrom")}
    clean = aberrated(volume, rotations, origins, columns | real, TRUE)
    images = clean + rng.standard_normal(clean.shape).astype(np.float32) * clean.std() * 1.5
    angles = [np.degrees(a.numpy()) for a in matrix_to_euler(rotations.double())]
    posed = dict(zip(("rot_deg", "tilt_deg", "psi_deg"), angles))
    posed |= {f"origin_{axis}_angstrom": origins[:, i].numpy() * PIXEL for i, axis in enumerate("yx")}
    return images, ParticleSet(COUNT, BOX, PIXEL, columns | posed), off


def refined(images, particles, **params):
    given = CtfRefineParams(**{"symmetry": "D2", "tetrafoil": True, "rounds": 3, **params})
    return iterate_here(ctf_refine.functions, given, ParticlesInMemory(particles, images), {"map_pixel_size_angstrom": PIXEL})


@pytest.fixture(scope="module")
def found(simulated):
    images, particles, _ = simulated
    return refined(images, particles)


def test_aberrations_are_found_with_relions_signs(found):
    assert bool(found["aberration_fitted"][0])
    for name, limit in (("beam_tilt", 0.35), ("trefoil", 25.0), ("tetrafoil", 160.0), ("magnification", 0.003)):
        for column in (n for n in TRUE if n.startswith(name)):
            assert found[column][0] == pytest.approx(TRUE[column], abs=limit), column


def test_defocus_of_each_particle_is_found_and_the_half_maps_agree_better(simulated, found):
    _, _, off = simulated
    error = found["defocus_change_angstrom"] - off
    assert np.sqrt((error**2).mean()) < 0.6 * off.std()
    assert 80.0 < found["defocus_spread_angstrom"] < 260.0
    assert (found["fsc_after"] - found["fsc_before"])[18:22].mean() > 0.04


def test_images_that_are_corrected_show_an_unaberrated_projection(simulated):
    volume = blob_map(BOX, blobs=60, width_px=1.0, reach=0.22)
    particles, rotations, origins = set_of(volume, 8)
    columns = particles.columns
    neutral = {name: ab.NEUTRAL[name] for name in TRUE}
    known = {name: value if not name.startswith("tetrafoil") else 0.0 for name, value in TRUE.items()}
    bent = aberrated(volume, rotations, origins * 0, columns, known)
    images, turned = ab.corrected(bent, columns | {name: np.full(8, value) for name, value in known.items()}, PIXEL)
    assert not {"beam_tilt_x_mrad", "trefoil_x_angstrom3", "magnification_xx"} & set(turned)
    right = aberrated(volume, rotations, origins * 0, turned, neutral)
    assert (images - right).std() < 0.015 * right.std()
    assert (bent - right).std() > 0.05 * right.std()


def test_a_second_refinement_adds_to_the_first(simulated, found):
    images, particles, _ = simulated
    names = [n for n in TRUE if n in found]
    known = {n: found[n] for n in names}
    defocus = {f"defocus_{n}": found[f"particle_defocus_{n}"].astype(float) for n in ("u_angstrom", "v_angstrom", "angle_deg")}
    again = refined(images, ParticleSet(COUNT, BOX, PIXEL, particles.columns | known | defocus), rounds=1)
    assert np.abs(again["aberration_value"][0, :2]).max() < 0.4
    assert again["beam_tilt_x_mrad"][0] == pytest.approx(TRUE["beam_tilt_x_mrad"], abs=0.4)
    assert again["magnification_xx"][0] == pytest.approx(TRUE["magnification_xx"], abs=0.004)


def test_an_optics_group_of_three_particles_keeps_its_aberrations(simulated):
    images, particles, _ = simulated
    columns = {**particles.columns, "data_set": np.where(np.arange(COUNT) < 3, 7, 0)}
    result = refined(images, ParticleSet(COUNT, BOX, PIXEL, columns), rounds=1)
    assert result["aberration_count"].tolist() == [COUNT - 3, 3]
    assert result["aberration_fitted"].tolist() == [True, False]
    assert (result["beam_tilt_x_mrad"][:3] == 0.0).all()
    assert result["magnification_xx"][:3].tolist() == [1.0] * 3
    assert "aberrations of an optics group with 3 particles not fitted" in ctf_refine.says(result)


def test_a_mask_on_another_grid_than_the_map_is_refused(simulated):
    _, particles, _ = simulated
    inputs = {"final_map": np.ones((BOX,) * 3), "solvent_mask": np.ones((BOX - 2,) * 3), "map_pixel_size_angstrom": PIXEL}
    with pytest.raises(InputError, match=f"the mask has {BOX - 2} x {BOX - 2} x {BOX - 2} voxels, the map {BOX} x {BOX} x {BOX}"):
        start(CtfRefineParams(), particles, inputs)


def test_wrong_poses_are_refused(simulated):
    images, particles, _ = simulated
    rng = np.random.default_rng(0)
    wrong = {name: rng.uniform(-180.0, 180.0, COUNT) for name in ("rot_deg", "tilt_deg", "psi_deg")}
    with pytest.raises(InputError, match="half-maps agree only to"):
        refined(images, ParticleSet(COUNT, BOX, PIXEL, particles.columns | wrong))


def test_aberrations_are_written_in_relions_words():
    columns = {name: np.array([value, np.nan]) for name, value in TRUE.items()}
    first, second = with_refined_optics(np.array(['{"rlnMtfFileName": "m.star"}', ""], dtype=object), columns)
    assert second == ""
    group = json.loads(first)
    assert group["rlnMtfFileName"] == "m.star"
    assert group["rlnBeamTiltX"] == "-1.2"
    assert group["rlnOddZernike"] == "[0,0,-60,0,0,90]"
    assert group["rlnEvenZernike"] == "[0,0,0,0,200,0,0,0,-300]"
    assert group["rlnMagMat01"] == group["rlnMagMat10"] == "0.006"
