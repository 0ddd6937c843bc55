"""RELION goes on from an export with movies and micrographs: extraction, and Bayesian polishing."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from _particles import project as projections
from _relion import MICROGRAPH_PIXEL, PIXEL, by_id, correlation, exported, images, linked, relion, rotations
from scipy.ndimage import map_coordinates

from cryodask.formats import star
from cryodask.formats.mrc import read_mrc
from cryodask.simulate import SessionParams, load_truth
from cryodask.store.project import Project
from cryodask.vocabulary import CTF_COLUMNS, OPTICS

pytestmark = [pytest.mark.relion, pytest.mark.heavy]
EXTRACT = ("--extract", "--extract_size", 128, "--scale", 64, "--norm", "--bg_radius", 24, "--invert_contrast")
EXTRACT += ("--white_dust", -1, "--black_dust", -1)
POLISH = ("--i", "particles.star", "--f", "postprocess.star", "--corr_mic", "corrected_micrographs.star", "--s_vel", 0.5, "--s_div", 5000)
POLISH += ("--s_acc", 2, "--j", 1)


@pytest.fixture(scope="module")
def session(tmp_path_factory, client) -> Path:
    return exported(tmp_path_factory, client)


@pytest.fixture
def folder(session, tmp_path) -> Path:
    return linked(session / "relion", tmp_path)


@pytest.fixture
def ours(folder) -> dict[str, np.ndarray]:
    return star.read_particles(folder / "particles.star")


def inside(stack: np.ndarray) -> np.ndarray:
    """Images within the inner circle of Fourier space: at its corners RELION's downscaling differs."""
    k = np.fft.fftfreq(stack.shape[-1])
    return np.fft.ifft2(np.fft.fft2(stack) * (np.hypot(k[:, None], k) < 0.48)).real


def whole(columns: dict[str, np.ndarray]) -> np.ndarray:
    """Particles whose boxes lie within the micrograph: beyond its border RELION repeats the last pixel, and we mirror it."""
    return np.all([(columns[n] >= 64) & (columns[n] < 512 - 64) for n in ("particle_y", "particle_x")], axis=0)


def same_images(folder: Path, theirs: dict[str, np.ndarray], ours: dict[str, np.ndarray]) -> None:
    """One of a pair of terms at the Nyquist frequency is kept by RELION: the noise outside, and the scale with it, differ by a percent."""
    a, b = (inside(images(folder, columns))[whole(ours)] for columns in (theirs, ours))
    assert correlation(a, b) > 0.9999
    np.testing.assert_allclose(a, b, atol=0.1)


def test_relion_extracts_at_our_coordinates_what_we_extract(folder, ours):
    options = ("--i", "micrographs_ctf.star", "--coord_dir", "coordinates/", "--coord_suffix", ".star", "--part_dir", "Extract/")
    relion(folder, "preprocess", *options, "--part_star", "Extract/particles.star", *EXTRACT)
    theirs = star.read_particles(folder / "Extract/particles.star")
    assert len(theirs["image_index"]) == 44
    assert [theirs[n].tolist() for n in ("micrograph_name", "optics_group_name")] == [
        ours[n].tolist() for n in ("micrograph_name", "optics_group_name")
    ]
    for name in (*CTF_COLUMNS, *OPTICS, "particle_pixel_size_angstrom"):
        np.testing.assert_allclose(theirs[name], ours[name], atol=1e-4, err_msg=name)
    assert whole(ours).sum() >= 15
    same_images(folder, theirs, ours)


def test_relion_extracts_our_particles_again_with_their_poses(folder, ours):
    options = ("--i", "micrographs_ctf.star", "--reextract_data_star", "particles.star", "--part_dir", "Re/")
    relion(folder, "preprocess", *options, "--part_star", "Re/particles.star", *EXTRACT)
    theirs = by_id(folder, "Re/particles.star", ours)
    for name in ("rot_deg", "tilt_deg", "psi_deg", "origin_y_angstrom", "origin_x_angstrom", "half_set", *CTF_COLUMNS):
        np.testing.assert_allclose(theirs[name], ours[name], atol=1e-4, err_msg=name)
    same_images(folder, theirs, ours)


def displacements(field: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Displacement `(particle, frame, 2)` (y, x) at positions, of a field `(81, frame, 2)` on 9 x 9 nodes."""
    nodes = field.reshape(9, 9, *field.shape[1:])
    at = np.array([y, x]) / 511 * 8
    parts = [[map_coordinates(nodes[:, :, f, a], at, order=1) for a in (0, 1)] for f in range(nodes.shape[2])]
    return np.array(parts).transpose(2, 0, 1)


def tracks(folder: Path, name: str) -> np.ndarray:
    """RELION's tracks `(particle, frame, 2)` (y, x), Angstrom."""
    tables = star.read_tables(folder / "micrographs" / f"{name}_tracks.star")
    count = int(tables["general"]["rlnParticleNumber"])
    columns = ["rlnOriginYAngst", "rlnOriginXAngst"]
    return np.array([tables[str(i)][columns].to_numpy(float) for i in range(count)])


def centred_rms(difference: np.ndarray) -> float:
    difference = difference - difference.mean(1, keepdims=True)
    return float(np.sqrt((difference**2).sum(-1).mean()))


def test_polishing_starts_from_our_motion(session, folder, ours):
    """Without iterations RELION's tracks are what it read: global shifts and polynomial, in its signs."""
    (folder / "start").mkdir()
    relion(folder, "motion_refine", *POLISH, "--o", "start/", "--max_iters", 0)
    motion, least = Project(session / "p")["motion"], []
    for name in motion["micrograph"].values:
        rows = [name in m for m in ours["micrograph_name"]]
        one = motion.sel(micrograph=name)
        field = displacements(one["patch_shift"].values, ours["particle_y"][rows], ours["particle_x"][rows])
        theirs = tracks(folder / "start", name)
        assert centred_rms(theirs - field) < 0.15  # Angstrom: what a polynomial cannot express
        assert centred_rms(-theirs - field) > 2.0
        least.append((centred_rms(theirs - one["frame_shift"].values), centred_rms(theirs - field)))
    assert any(alone > 2.0 * both > 0 for alone, both in least), "a movie with local motion tests the polynomial"


@pytest.fixture(scope="module")
def polished(session, tmp_path_factory) -> Path:
    folder = linked(session / "relion", tmp_path_factory.mktemp("polished"))
    polish(folder)
    return folder


def polish(folder: Path) -> None:
    (folder / "polish").mkdir()
    relion(folder, "motion_refine", *POLISH, "--o", "polish/", "--hot", 60, "--combine_frames", "--bfac_minfreq", 20)


def agreement(session: Path, folder: Path) -> tuple[float, float]:
    """Mean correlation with projections of the true map at the true poses: our images, and RELION's polished ones."""
    import torch

    ours = star.read_particles(folder / "particles.star")
    theirs = by_id(folder, "polish/shiny.star", ours)
    truth_map = torch.from_numpy(read_mrc(session / "truth" / "map_64_3.54A.mrc")[0].astype(np.float32))
    origins = np.stack([ours["origin_y_angstrom"], ours["origin_x_angstrom"]], 1) / PIXEL
    columns = {name: ours[name] for name in (*CTF_COLUMNS, *OPTICS)}
    clean = projections(truth_map, rotations(ours).float(), torch.from_numpy(origins).float(), columns, PIXEL)
    return correlation(images(folder, ours), clean), correlation(images(folder, theirs), clean)


def test_polished_particles_show_the_molecule_as_ours_do(session, polished):
    own, shiny = agreement(session, polished)
    assert own > 0.28  # 0.31 seen
    assert shiny > 0.85 * own  # 0.92 seen


def test_tracks_of_polishing_are_the_true_motion(session, polished):
    truth = load_truth(session)
    ours = star.read_particles(polished / "particles.star")
    for i, name in enumerate(truth.names):
        rows = [name in m for m in ours["micrograph_name"]]
        true = displacements(truth.columns["patch_shift"][i], ours["particle_y"][rows], ours["particle_x"][rows])
        found = tracks(polished / "polish", name)
        assert centred_rms(found - true) < 0.35 * centred_rms(true), name


def test_without_the_gain_line_polishing_would_be_of_raw_counts(session, folder):
    (folder / "motion").unlink()
    (folder / "motion").mkdir()
    for path in (session / "relion" / "motion").iterdir():
        text = path.read_text()
        assert text.count("_rlnMicrographGainName") == 1
        (folder / "motion" / path.name).write_text(re.sub("_rlnMicrographGainName.*\n", "", text))
    polish(folder)
    own, shiny = agreement(session, folder)
    assert shiny < 0.6 * own


def test_what_is_written_for_each_movie(session):
    """Doses, sizes, gain, defects and the repaired pixels, where the movie has them in the frame of MRC files."""
    from cryodask.formats.movies import open_movie

    tables = star.read_tables(session / "relion" / "motion" / "movie_0001.star")
    general = tables["general"]
    assert [float(general[f"rln{n}"]) for n in ("ImageSizeX", "ImageSizeY", "ImageSizeZ", "MicrographBinning")] == [512, 512, 6, 1]
    assert [float(general[f"rln{n}"]) for n in ("MicrographDoseRate", "MicrographPreExposure", "Voltage")] == [6.6667, 0.0, 300.0]
    assert float(general["rlnMicrographOriginalPixelSize"]) == MICROGRAPH_PIXEL
    gain = read_mrc(session / "relion" / general["rlnMicrographGainName"])[0]
    np.testing.assert_array_equal(gain, read_mrc(session / "gain.mrc")[0])
    assert read_mrc(session / "relion" / general["rlnMicrographDefectFile"])[0].sum() == 5
    movie = open_movie(session / "relion" / general["rlnMicrographMovieName"])
    total = sum(np.asarray(movie[i], np.float64) for i in range(6)) * gain
    hot = tables["hot_pixels"].to_numpy(float).astype(int)
    assert len(hot) == pytest.approx(20, abs=2)
    assert all(total[y, x] > 2.0 * np.median(total) for x, y in hot)


@pytest.mark.slow
def test_polishing_of_whole_movies_is_no_worse_than_our_sums(tmp_path_factory, client, tmp_path):
    """Movies of the demo: 24 frames of 1024 x 1024 pixels, 40 particles each."""
    params = SessionParams(movies=3, truth_maps=((64, 3.54),))
    session = exported(tmp_path_factory, client, params)
    folder = linked(session / "relion", tmp_path)
    (folder / "polish").mkdir()
    relion(folder, "motion_refine", *POLISH, "--o", "polish/", "--combine_frames", "--bfac_minfreq", 20)
    own, shiny = agreement(session, folder)
    assert shiny > 0.85 * own
