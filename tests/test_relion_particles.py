"""RELION goes on from exported particles: local refinement, classes, CTF refinement, maps. Its output comes back with our ids."""

from __future__ import annotations

import shutil
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import torch
from _relion import ANGLES, MAPS, PIXEL, PROJECT, by_id, exported, images, linked, relion, rotations
from scipy.ndimage import affine_transform

from cryodask.formats import star
from cryodask.formats.mrc import read_mrc, write_mrc
from cryodask.kernels.ctf import ctf
from cryodask.kernels.fsc import fsc
from cryodask.kernels.orientations import angular_error_deg
from cryodask.kernels.symmetry import symmetry_operators
from cryodask.run.recipe import make_plan
from cryodask.run.session import run_plan
from cryodask.simulate import load_truth
from cryodask.simulate.score import TruePoses, half_maps_from_poses
from cryodask.stage import load_stages
from cryodask.vocabulary import CTF_COLUMNS, OPTICS

pytestmark = [pytest.mark.relion, pytest.mark.heavy]
REFINE = ("--i", "particles.star", "--ctf", "--particle_diameter", 200, "--flatten_solvent", "--zero_mask", "--norm", "--scale")
REFINE += ("--oversampling", 1, "--offset_range", 4, "--offset_step", 2, "--pad", 1, "--random_seed", 1, "--j", 1)
REFINE += ("--dont_combine_weights_via_disc",)


@pytest.fixture(scope="module")
def session(tmp_path_factory, client) -> Path:
    return exported(tmp_path_factory, client)


@pytest.fixture(scope="module")
def done(session, tmp_path_factory) -> Path:
    """The export after a local refinement, a CTF refinement, polishing and both classifications."""
    folder = linked(session / "relion", tmp_path_factory.mktemp("relion"))
    for name in ("local", "defocus", "class2d", "class3d"):
        (folder / name).mkdir()
    truth_map = session / "truth" / "map_64_3.54A.mrc"
    local = ("--healpix_order", 4, "--sigma_ang", 3, "--sym", "D2", "--firstiter_cc", "--ini_high", 12, "--iter", 1)
    relion(folder, "refine", *REFINE, *local, "--ref", truth_map, "--o", "local/run")
    relion(folder, "refine", *REFINE, "--psi_step", 12, "--K", 2, "--iter", 4, "--o", "class2d/run")
    density = read_mrc(truth_map)[0].astype(np.float32)
    write_mrc(folder / "right.mrc", density, PIXEL)
    write_mrc(folder / "wrong.mrc", np.rot90(density, axes=(0, 2)).copy(), PIXEL)
    (folder / "maps.star").write_text("data_\n\nloop_\n_rlnReferenceImage #1\nwrong.mrc\nright.mrc\n")
    two = ("--ref", "maps.star", "--skip_align", "--sym", "C1", "--firstiter_cc", "--ini_high", 12, "--iter", 1)
    relion(folder, "refine", *REFINE, *two, "--o", "class3d/run")
    (folder / "polish").mkdir()
    polish = ("--corr_mic", "corrected_micrographs.star", "--combine_frames", "--bfac_minfreq", 20, "--j", 1, "--o", "polish/")
    relion(folder, "motion_refine", "--i", "particles.star", "--f", "postprocess.star", *polish)
    fit = ("--fit_defocus", "--fit_mode", "fpfff", "--kmin_defocus", 30, "--j", 1)
    relion(folder, "ctf_refine", "--i", "particles.star", "--f", "postprocess.star", *fit, "--o", "defocus/")
    extract = ("--extract", "--extract_size", 128, "--scale", 64, "--norm", "--bg_radius", 24, "--invert_contrast")
    extract += ("--i", "micrographs_ctf.star", "--white_dust", -1, "--black_dust", -1)
    places = ("--coord_dir", "coordinates/", "--coord_suffix", ".star")
    relion(folder, "preprocess", *extract, *places, "--part_dir", "Extract/", "--part_star", "Extract/particles.star")
    again = ("--reextract_data_star", "particles.star", "--part_dir", "Again/", "--part_star", "Again/particles.star")
    relion(folder, "preprocess", *extract, *again)
    relion(folder, "star_handler", "--i", "particles.star", "--o", "half.star", "--select", "rlnRandomSubset", "--minval", 1, "--maxval", 1)
    return folder


@pytest.fixture
def ours(session) -> dict[str, np.ndarray]:
    return star.read_particles(session / "relion" / "particles.star")


def errors_deg(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> np.ndarray:
    return angular_error_deg(rotations(a), rotations(b), symmetry_operators("D2")).numpy()


def test_exported_poses_are_the_true_ones_within_the_asymmetric_unit(session, ours):
    true = star.read_particles(session / "truth.star")
    assert np.median(errors_deg(ours, true)) < 1e-3
    assert (np.abs(ours["tilt_deg"] - true["tilt_deg"]) > 1.0).sum() > 10
    assert ours["tilt_deg"].max() <= 90.0
    assert ours["rot_deg"].min() >= 0.0
    assert ours["rot_deg"].max() <= 180.0


def test_local_refinement_keeps_our_poses(done, ours):
    error = errors_deg(ours, by_id(done, "local/run_it001_data.star", ours))
    assert len(error) == 44
    assert np.median(error) < 6.0  # 3.4 seen; the search has steps of 1.8
    assert error.max() < 15.0  # poses outside of the asymmetric unit end 20 to 100 degrees away


def test_ctf_refinement_finds_the_true_defocus(session, done, ours):
    found, truth = by_id(done, "defocus/particles_ctf_refine.star", ours), load_truth(session)
    for i, name in enumerate(truth.names):
        rows = [name in m for m in found["micrograph_name"]]
        mean = 0.5 * (found["defocus_u_angstrom"][rows] + found["defocus_v_angstrom"][rows])
        true = 0.5 * (truth.columns["defocus_u_angstrom"][i] + truth.columns["defocus_v_angstrom"][i])
        assert mean.std() > 50.0, "each particle was fitted"
        assert abs(mean.mean() - true) < 250.0  # Angstrom; to 95 seen


def test_particles_choose_the_right_map(done, ours):
    assert np.bincount(by_id(done, "class3d/run_it001_data.star", ours)["class_number"], minlength=3).tolist() == [0, 0, 44]


def test_class_averages_are_of_our_particles(done, ours):
    """The larger class average is the mean of its particles at RELION's angles and shifts, which came back with them."""
    found = by_id(done, "class2d/run_it004_data.star", ours)
    number = int(np.bincount(found["class_number"]).argmax())
    rows = found["class_number"] == number
    assert rows.sum() >= 15
    average = read_mrc(done / "class2d/run_it004_classes.mrcs")[0][number - 1]
    mean = aligned_mean(images(done, ours)[rows], {name: values[rows] for name, values in found.items()})
    assert ring_correlation(average, mean)[2:11].mean() > 0.85  # 0.93 seen, 0.1 with psi of the other sign


def ring_correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Fourier ring correlation `(ring,)`."""
    k = np.fft.fftfreq(64) * 64
    ring = np.rint(np.hypot(k[:, None], k)).astype(int).ravel()
    x, y = np.fft.fft2(a).ravel(), np.fft.fft2(b).ravel()
    cross, *powers = (np.bincount(ring, (u * v.conj()).real) for u, v in ((x, y), (x, x), (y, y)))
    return cross / np.sqrt(powers[0] * powers[1])


def aligned_mean(stack: np.ndarray, columns: dict[str, np.ndarray]) -> np.ndarray:
    """Mean of CTF-multiplied images in the frame of their class: image(x) = class(Rz(psi)^T (x + origin))."""
    k = torch.fft.fftfreq(64, PIXEL, dtype=torch.float64)
    total = np.zeros((64, 64))
    for i, image in enumerate(stack):
        case = {n: float(columns[n][i]) for n in ("defocus_u_angstrom", "defocus_v_angstrom", *OPTICS)}
        angles = {f"{n}_rad": float(np.radians(columns[f"{n}_deg"][i])) for n in ("defocus_angle", "phase_shift")}
        values = ctf(k[:, None], k[None], **case, **angles).numpy()
        c, s = (float(f(np.radians(columns["psi_deg"][i]))) for f in (np.cos, np.sin))
        turn, origin = np.array([[c, -s], [s, c]]), [columns[f"origin_{axis}_angstrom"][i] / PIXEL for axis in "yx"]
        total += affine_transform(np.fft.ifft2(np.fft.fft2(image) * values).real, turn, 32 - turn @ [32, 32] - origin, order=1)
    return total / len(stack)


def test_relion_reconstructs_our_map(session, ours, tmp_path):
    folder = linked(session / "relion", tmp_path)
    relion(folder, "reconstruct", "--i", "particles.star", "--o", "map_relion.mrc", "--ctf", "--sym", "D2")
    theirs = torch.from_numpy(read_mrc(folder / "map_relion.mrc")[0].astype(np.float32))
    origins = np.stack([ours["origin_y_angstrom"], ours["origin_x_angstrom"]], 1)
    known = {name: ours[name] for name in (*CTF_COLUMNS, *OPTICS)}
    half = np.zeros(44, np.int8)
    one = TruePoses(images(folder, ours).astype(np.float32), rotations(ours), origins, known, half)
    sphere = torch.from_numpy((np.sqrt(((np.indices((64, 64, 64)) - 32) ** 2).sum(0)) < 28).astype(np.float32))
    curve = fsc(half_maps_from_poses(one, PIXEL, "D2")[0] * sphere, theirs * sphere)
    assert float(curve[1:11].min()) > 0.97  # to 22 Angstrom; 0.98 seen


def test_relion_post_processes_our_half_maps_to_our_curve(session, tmp_path):
    folder = linked(session / "relion", tmp_path)
    options = ("--i", "half1.mrc", "--i2", "half2.mrc", "--mask", "mask.mrc", "--angpix", PIXEL, "--auto_bfac", "--autob_lowres", 15)
    (folder / "post").mkdir()
    relion(folder, "postprocess", *options, "--o", "post/run")
    curves = [star.read_tables(folder / name)["fsc"] for name in ("postprocess.star", "post/run.star")]
    for name in ("rlnFourierShellCorrelationUnmaskedMaps", "rlnFourierShellCorrelationMaskedMaps"):
        ours, theirs = (curve[name].to_numpy(float)[1:31] for curve in curves)
        np.testing.assert_allclose(ours, theirs, atol=0.02, err_msg=name)


def test_relion_star_handler_reads_every_table_that_we_write(session, tmp_path):
    folder = linked(session / "relion", tmp_path)
    counts = {"particles.star": 44, "micrographs_ctf.star": 4, "corrected_micrographs.star": 4}
    for name, count in counts.items():
        wanted = "rlnDefocusU" if count == 44 else "rlnAccumMotionTotal"
        said = relion(folder, "star_handler", "--i", name, "--o", "out.star", "--select", wanted, "--minval", -1e9, "--maxval", 1e9)
        assert f"with {count} item(s)" in said, name


BACK = {"local": "local/run_it001_data.star", "defocus": "defocus/particles_ctf_refine.star", "class3d": "class3d/run_it001_data.star"}
BACK |= {"polished": "polish/shiny.star", "class2d": "class2d/run_it004_data.star", "again": "Again/particles.star"}
OTHERS = {"chosen": "half.star", "extracted": "Extract/particles.star"}
"""Output with some of the particles, and output without ids."""


def test_what_relion_found_comes_back_with_our_ids(session, done, client, tmp_path, ours):
    for name in ("movies", "gain.mrc", "truth.star", "half1.mrc", "half2.mrc"):
        (tmp_path / name).symlink_to(session / name)
    shutil.copytree(session / "p", tmp_path / "p")
    tables = BACK | OTHERS
    steps = "".join(f"  - import_particles as {name}: {{star: {done / path}, from: {{exposures: ctf}}}}\n" for name, path in tables.items())
    (tmp_path / "p.yaml").write_text(PROJECT + MAPS + steps)
    project = run_plan(make_plan(tmp_path / "p.yaml"), client)
    assert project.failures() == []
    theirs = {name: by_id(done, path, ours) for name, path in BACK.items()}
    for name in BACK:
        back = project.particles(name)
        assert back["particle_id"].values.tolist() == ours["particle_id"].tolist()
        np.testing.assert_allclose(back["particle_image"].values, images(done, theirs[name]), atol=1e-5)
    for angle in ANGLES:
        np.testing.assert_allclose(project.particles("local")[angle].values, theirs["local"][angle], atol=1e-4)
    found = project.particles("defocus")["defocus_u_angstrom"].values
    np.testing.assert_allclose(found, theirs["defocus"]["defocus_u_angstrom"], atol=2e-3)
    assert (project.particles("class3d")["class_number"].values == 2).all()
    assert project.particles("class2d")["class_number"].values.tolist() == theirs["class2d"]["class_number"].tolist()
    chosen = project.particles("chosen")
    assert chosen["particle_id"].values.tolist() == ours["particle_id"][ours["half_set"] == 0].tolist()
    assert (chosen["half_set"].values == 0).all()
    extracted = project.particles("extracted")  # RELION's coordinates have no ids, so these are new particles at the same places
    for axis in "yx":
        places = star.read_particles(done / OTHERS["extracted"])[f"particle_{axis}"]
        np.testing.assert_allclose(extracted[f"particle_{axis}"].values, np.floor(places + 1e-6))
        np.testing.assert_allclose(places, ours[f"particle_{axis}"], atol=1.0)


def test_maps_that_relion_made_are_read_with_their_voxels(session, tmp_path):
    folder = linked(session / "relion", tmp_path)
    relion(folder, "reconstruct", "--i", "particles.star", "--o", "made.mrc", "--ctf", "--sym", "D2")
    options = ("--i", "half1.mrc", "--i2", "half2.mrc", "--mask", "mask.mrc", "--angpix", PIXEL, "--auto_bfac", "--autob_lowres", 15)
    (folder / "post").mkdir()
    relion(folder, "postprocess", *options, "--o", "post/run")
    stage = load_stages()["import_map"]
    for name in ("made.mrc", "post/run.mrc", "post/run_masked.mrc"):
        found = stage.process(stage.params(file=str(folder / name)))
        assert np.array_equal(found["final_map"], mrcfile.read(folder / name))
        assert found["map_pixel_size_angstrom"] == pytest.approx(PIXEL, rel=1e-6)
