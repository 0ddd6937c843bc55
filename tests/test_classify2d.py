"""Two-dimensional classification and curation."""

import numpy as np
import pytest
import torch
from _particles import blob_map, ctf_columns, simulate
from pydantic import ValidationError
from scipy import ndimage

from cryodask.errors import InputError
from cryodask.kernels import polar
from cryodask.kernels.classify2d import modes_to_half_circle
from cryodask.run.blocks import ParticlesInMemory, iterate_here
from cryodask.stage import ParticleSet
from cryodask.stages._classify2d import class_scores
from cryodask.stages._map_pictures import draw_classes, montage
from cryodask.stages.classify2d import Classify2DParams, classify2d
from cryodask.stages.curate import CurateParams, curate, good_classes

BOX, PIXEL = 40, 5.0


def blobs_of_junk(count, seed):
    """Random soft blobs in noise, a third of them noise alone."""
    rng = np.random.default_rng(seed)
    x = np.arange(BOX) - BOX // 2
    out = rng.standard_normal((count, BOX, BOX)).astype(np.float32)
    for image in out[: 2 * count // 3]:
        junk = np.zeros((BOX, BOX))
        for _ in range(rng.integers(2, 6)):
            c, w = rng.normal(0, 9, 2), 1.5 + 3 * rng.random(2)
            junk += np.exp(-(((x[:, None] - c[0]) / w[0]) ** 2) / 2 - ((x[None] - c[1]) / w[1]) ** 2 / 2)
        image += 0.6 * (junk - junk.mean()) / junk.std()
    return out


@pytest.fixture(scope="module")
def classified():
    """Two molecules and junk: (labels 0, 1 and 2, result)."""
    first, second = blob_map(BOX, "D2", blobs=6, seed=2, reach=0.33), blob_map(BOX, "C1", blobs=9, seed=8, reach=0.22)
    images = [simulate(m, 240, pixel=PIXEL, snr=0.25, seed=i, shift_px=0.8)[0] for i, m in enumerate((first, second))]
    images = np.concatenate([*images, blobs_of_junk(120, 5)])
    labels = np.repeat([0, 1, 2], [240, 240, 120])
    order = np.random.default_rng(0).permutation(600)
    particles = ParticleSet(600, BOX, PIXEL, ctf_columns(600))
    params = Classify2DParams(classes=16, mask_diameter_angstrom=160.0, iterations=14)
    columns = {
        k: np.concatenate([ctf_columns(240, 0)[k], ctf_columns(240, 1)[k], ctf_columns(120, 2)[k]])[order] for k in particles.columns
    }
    particles = ParticleSet(600, BOX, PIXEL, columns)
    return labels[order], iterate_here(classify2d.functions, params, ParticlesInMemory(particles, images[order]))


@pytest.mark.heavy
def test_classes_are_pure_in_a_mixture_with_junk(classified):
    labels, result = classified
    table = np.zeros((16, 3), int)
    np.add.at(table, (result["class_number"] - 1, labels), 1)
    assert table.max(1).sum() / 600 >= 0.95, table
    assert result["class_average"].shape == (16, BOX, BOX)
    assert abs(result["class_share"].sum() - 1) < 1e-6


def test_junk_lies_in_low_scores_and_auto_curation_removes_it(classified):
    labels, result = classified
    score = result["class_score"][result["class_number"] - 1]
    assert np.mean(score[labels == 2]) < 0.6 * np.mean(score[labels < 2])
    kept = curate.process(CurateParams(), **{k: result[k] for k in ("class_number", "class_score", "class_probability")})["particle_kept"]
    assert kept[labels < 2].mean() >= 0.97
    assert kept[labels == 2].mean() <= 0.4


@pytest.mark.heavy
@pytest.mark.parametrize("symmetry", ["C1", "D2"])
def test_classes_are_centred_on_the_molecule_not_where_their_average_came_to_lie(symmetry):
    """Picks 2 pixels off an axis: classes lie 0.47 (C1) and 0.12 pixels (D2) off; 1.12 and 1.00 where averages stay as they come."""
    volume = blob_map(BOX, symmetry, blobs=12, seed=5, reach=0.25).numpy()
    # the centre of an asymmetric molecule is its centre of mass
    volume = torch.from_numpy(ndimage.shift(volume, BOX // 2 - np.array(ndimage.center_of_mass(volume))))
    images, particles, _, origins = simulate(volume, 300, pixel=PIXEL, snr=0.25, seed=3, shift_px=2.0)
    params = Classify2DParams(classes=6, mask_diameter_angstrom=160.0, shift_range_angstrom=30.0, iterations=12)
    result = iterate_here(classify2d.functions, params, ParticlesInMemory(particles, images))
    y, x = np.stack([result["class_origin_y_angstrom"], result["class_origin_x_angstrom"]]) / PIXEL - origins.numpy().T
    psi, number = np.deg2rad(result["class_psi_deg"]), result["class_number"]
    # errors as seen in the average: what all particles of a class have in common is how far it lies from the centre
    inside = np.stack([np.sin(psi) * x + np.cos(psi) * y, np.cos(psi) * x - np.sin(psi) * y], -1)
    offsets = np.array([np.median(inside[number == k], 0) for k in range(1, 7) if (number == k).sum() >= 10])
    assert np.sqrt(np.mean(offsets**2)) < {"C1": 0.7, "D2": 0.3}[symmetry]


def test_auto_curation_keeps_all_where_all_classes_are_good():
    rng = np.random.default_rng(0)
    score = rng.normal(0.62, 0.04, 20)
    assert good_classes(score, rng.integers(10, 100, 20).astype(float)).all()
    assert good_classes(np.zeros(5), np.ones(5)).all()


def test_scores_do_not_punish_small_classes():
    ring = np.arange(1, 17)
    ssnr = 8.0 / ring**2  # of one particle
    number = np.repeat([0, 1, 2], [200, 20, 60])
    size = np.array([200, 20, 60])[:, None]
    correlation = size / 2 * ssnr / (1 + size / 2 * ssnr)
    residual = np.ones((3, 17)) * size
    gain = np.full(280, 30.0)
    scores = class_scores(correlation, np.ones(3), number, gain, residual)
    assert scores.max() - scores.min() < 0.03
    empty = class_scores(correlation, np.ones(3), number, np.where(number == 1, 2.0, 30.0), residual)
    assert empty[1] < 0.3 * scores[1]
    mixed = class_scores(correlation, np.ones(3), number, gain, residual * np.array([1.0, 1.6, 1.0])[:, None])
    assert mixed[1] < 0.3 * scores[1]
    assert np.allclose(mixed[[0, 2]], scores[[0, 2]])


def test_curation_names_its_reasons_and_can_be_undone():
    number = np.array([1, 1, 2, 2, 3, 0])
    score, probability = np.array([0.7, 0.6, 0.2]), np.array([1.0, 0.3, 1.0, 1.0, 1.0, 1.0])
    common = {"class_number": number, "class_score": score, "class_probability": probability}
    out = curate.process(CurateParams(keep=[1, 3], least_class_probability=0.5), **common)
    assert out["removal_reason"].tolist() == [0, 2, 1, 1, 0, 5]
    assert out["particle_kept"].tolist() == [True, False, False, False, True, False]
    assert out["class_score"].tolist() == [0.7, 0.2], "the classes that are kept"
    everything = curate.process(CurateParams(keep="all"), **common)
    assert everything["particle_kept"].tolist() == [1, 1, 1, 1, 1, 0]
    poor = curate.process(
        CurateParams(keep="all", worst_ctf_resolution_angstrom=6.0), **common, ctf_resolution_angstrom=np.array([4, 9, 4, np.nan, 5, 5])
    )
    assert poor["removal_reason"].tolist() == [0, 3, 0, 3, 0, 5]
    unlikely = curate.process(
        CurateParams(keep="all", likelihood_deviations=5.0), **common, class_log_likelihood=np.array([10.0, 11, 12, 9, -80, 10])
    )
    assert unlikely["removal_reason"].tolist() == [0, 0, 0, 0, 4, 5]


def test_classes_that_do_not_exist_are_refused():
    common = {"class_number": np.array([1, 2]), "class_score": np.array([0.5, 0.5]), "class_probability": np.ones(2)}
    with pytest.raises(InputError, match=r"no classes \[7\]"):
        curate.process(CurateParams(keep=[1, 7]), **common)
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        CurateParams(keep=[0, 1])
    with pytest.raises(InputError, match="class 2 has no score"):
        curate.process(CurateParams(), **{**common, "class_score": np.array([0.5])})


def test_modes_give_their_half_circles_back():
    grid = polar.polar_grid(40, 12)
    images = torch.stack([blob_map(40, seed=s).sum(0) for s in (1, 2)])
    half = polar.polar_transforms(images, grid)
    back = modes_to_half_circle(polar.angular_modes(half, grid.angle_count // 2 - 1), grid.angle_count)
    assert float((back - half).norm() / half.norm()) < 1e-3


def test_a_montage_has_its_first_image_at_the_top_left_and_classes_their_numbers_from_1():
    images = [np.full((4, 4), value, np.float32) for value in (1.0, 2.0, 3.0)]
    picture, corners = montage([images[0], None, *images[1:]], 2, gap_y=3, gap_x=1)
    assert picture.shape == (14, 9)
    # drawn from below, so the first row is the upper half of the array
    assert (picture[7:11, :4] == 1.0).all()
    assert np.isnan(picture[7:11, 4:]).all()
    assert (picture[:4, :4] == 2.0).all()
    assert (picture[:4, 5:] == 3.0).all()
    assert corners == [(0.0, 11.0), (5.0, 11.0), (0.0, 4.0), (5.0, 4.0)]
    averages = np.random.default_rng(0).normal(size=(3, 8, 8)).astype(np.float32)
    drawn = draw_classes(averages, np.array([0.1, 0.9, 0.5]), np.array([0.2, 0.5, 0.3]), np.array([9.0, 8.0, 7.0]))
    texts = [text.get_text() for text in drawn.figure.axes[0].texts]
    assert texts == ["2: 0.90\n50 %, 8 Å", "3: 0.50\n30 %, 7 Å", "1: 0.10\n20 %, 9 Å"]
