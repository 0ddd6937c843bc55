"""Picking: real apoferritin with hand-made picks, simulated truth, empty and broken micrographs."""

import mrcfile
import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from cryodask.errors import MicrographError
from cryodask.kernels.acceptance import least_error, threshold
from cryodask.kernels.picking import SUPPORT, pick_particles
from cryodask.run.acceptance import NEEDED, acceptance_messages
from cryodask.simulate import Optics, simulate_micrograph
from cryodask.stages.pick import PickParams, pick
from cryodask.store.births import accepted as accepted_mask
from cryodask.store.journal import encode_value
from cryodask.store.table import Table
from cryodask.vocabulary import PROFILE_REACH_DIAMETERS, VARIABLES

pytestmark = pytest.mark.heavy


def hits(found, truth, tolerance):
    distance = np.hypot(*(found[:, None] - truth[None]).transpose(2, 0, 1))
    rows, columns = linear_sum_assignment(np.where(distance <= tolerance, distance - 1e4, 0.0))
    return int((distance[rows, columns] <= tolerance).sum())


def figures(found, truth, shape, diameter):
    """F1, precision and recall, one to one within 0.4 diameter, 0.4 diameter at the border left out."""
    limit = np.array(shape) - 0.4 * diameter
    found, truth = (p[((p > 0.4 * diameter) & (p < limit)).all(1)] for p in (found, truth))
    n = hits(found, truth, 0.4 * diameter)
    precision, recall = n / len(found), n / len(truth)
    return 2 * precision * recall / (precision + recall), precision, recall


def accepted(image, diameter_angstrom, pixel, **params):
    out = pick.process(PickParams(diameter_angstrom=diameter_angstrom, **params), micrograph_dw=image, pixel_size_angstrom=pixel)
    limit = params.get("threshold", out["pick_threshold"])
    return np.stack([out["pick_y"], out["pick_x"]], 1)[accepted_mask(out["pick_score"], limit)], out


def simulated(seed, particles=40, defocus=None, **kwargs):
    z = defocus or np.random.default_rng(seed).uniform(8000, 20000)
    optics = Optics(pixel_size_angstrom=1.77, defocus_u_angstrom=z, defocus_v_angstrom=z)
    micrograph = simulate_micrograph(shape=(1024, 1024), optics=optics, particles=particles, seed=seed, **kwargs)
    return micrograph.image, np.stack([micrograph.particles.y, micrograph.particles.x], 1)


@pytest.mark.parametrize(("name", "reached", "wrong"), [("030502", 0.948, 60), ("031302", 0.983, 84), ("043227", 0.951, None)])
def test_apoferritin_agrees_with_picks_by_hand(shared, name, reached, wrong):
    path = shared / f"data/micrographs/apoferritin_10146_{name}.mrc.bz2"
    image = mrcfile.read(path).astype(np.float32)
    truth = np.loadtxt(str(path).replace(".mrc.bz2", "_picks.txt"))[:, ::-1]
    found, _ = accepted(image, 108.0, 1.5)  # 72 pixels
    assert figures(found, truth, image.shape, 72)[0] > reached - 0.02
    if wrong:
        found, _ = accepted(image, 1.5 * wrong, 1.5)
        assert figures(found, truth, image.shape, 72)[0] > 0.9


@pytest.mark.parametrize("defocus", [8000, 14000, 20000])
def test_simulated_particles_are_found_and_little_else(defocus):
    """All 40 of 40 and nothing else in 16 of 16 micrographs of benchmarks/picking.py."""
    image, truth = simulated(defocus, defocus=defocus, signal_amplitude=0.5**0.5)
    found, out = accepted(image, 180.0, 1.77)
    _, precision, recall = figures(found, truth, image.shape, 180 / 1.77)
    assert precision > 0.95
    assert recall > 0.95
    assert len(out["pick_score"]) > len(found)
    assert (np.diff(out["pick_score"]) <= 0).all()
    assert out["pick_profile"][0] < 0  # protein is dark
    distance = np.hypot(*(found[:, None] - truth[None]).transpose(2, 0, 1)).min(1)
    assert np.sqrt(np.mean(distance**2)) < 6  # pixels of 1.77 A


def test_inverted_contrast_gives_the_same_picks_and_the_opposite_profile():
    image, _ = simulated(1)
    dark, first = accepted(image, 180.0, 1.77)
    bright, second = accepted(image.max() - image, 180.0, 1.77)
    assert hits(dark, bright, 3.0) >= 0.95 * len(dark)
    assert second["pick_profile"][0] > 0 > first["pick_profile"][0]


@pytest.mark.parametrize("particles", [1, 3, 12])
def test_few_particles_are_enough(particles):
    image, truth = simulated(100 + particles, particles, defocus=15000)
    found, _ = accepted(image, 180.0, 1.77)
    assert hits(found, truth, 40) == particles
    assert len(found) <= particles + 2


def test_ice_alone_gives_next_to_nothing():
    total = 0
    for seed in range(3):
        image, _ = simulated(seed, 0)
        total += len(accepted(image, 180.0, 1.77)[0])
    noise = np.random.default_rng(0).standard_normal((1024, 1024)).astype(np.float32)
    total += len(accepted(noise, 180.0, 1.77)[0])
    assert total <= 8  # of about 60 peaks in each


def test_a_hot_pixel_and_a_gradient_do_no_harm():
    image, truth = simulated(7)
    image = image * np.linspace(0.8, 1.2, 1024, dtype=np.float32)
    image[300, 400] = 1e6
    found, _ = accepted(image, 180.0, 1.77)
    assert figures(found, truth, image.shape, 180 / 1.77)[0] > 0.95


def test_the_threshold_can_be_given():
    image, _ = simulated(2)
    everything, out = accepted(image, 180.0, 1.77, threshold=-1.0)
    assert len(everything) == len(out["pick_score"])
    none, same = accepted(image, 180.0, 1.77, threshold=1e9)
    assert len(none) == 0
    assert all(np.array_equal(out[name], same[name]) for name in out), "the peaks do not depend on it, and a second run gives the same bits"


def test_one_and_four_threads_give_the_same_bits():
    image, _ = simulated(3)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            found.append(accepted(image, 180.0, 1.77)[1])
    finally:
        torch.set_num_threads(before)
    assert all(np.array_equal(found[0][name], found[1][name]) for name in found[0])


def test_micrographs_need_not_be_square_or_large():
    image = np.random.default_rng(0).standard_normal((300, 701)).astype(np.float32)
    for diameter in (20.0, 140.0):
        picks = pick_particles(torch.from_numpy(image), diameter)
        assert (picks.y < 300).all()
        assert (picks.x < 701).all()


def test_broken_micrographs_and_diameters_are_refused():
    good = np.random.default_rng(0).standard_normal((256, 256)).astype(np.float32)
    nan = good.copy()
    nan[0, 0] = np.nan
    for image, diameter, message in (
        (nan, 100.0, "NaN"),
        (0 * good, 100.0, "every pixel"),
        (good, 600.0, "a diameter of 600"),
        (good, 300.0, "a diameter of 300"),
        (good, 3.0, "a diameter of 3"),
    ):
        with pytest.raises(MicrographError, match=message):
            accepted(image, diameter, 1.5)


def test_two_heaps_of_scores_are_parted_between_them():
    rng = np.random.default_rng(0)
    for low, high in ((50, 50), (300, 20), (10, 150)):
        score = np.concatenate([rng.normal(1, 0.3, low), rng.normal(4, 0.6, high)])
        parted, gain = least_error(score)
        assert 1.4 < parted < 3.2
        assert gain > 0.25
        assert threshold(score, 9.0, clear=True) == parted


def test_one_heap_of_scores_is_not_cut():
    """Particles without other peaks: noise of this spectrum reaches as high as they do, so that it cannot tell."""
    rng = np.random.default_rng(1)
    for _ in range(20):
        score = rng.normal(2.3, 0.5, 240)
        assert least_error(score)[1] < 0.05
        assert (score > threshold(score, 4.0, clear=True)).mean() > 0.75
        assert (score > threshold(score, 4.0, clear=False)).mean() < 0.01


@pytest.mark.parametrize(
    ("seed", "defocus"), [(60, 21000), pytest.param(50, 6000, marks=pytest.mark.slow), pytest.param(53, 10500, marks=pytest.mark.slow)]
)
def test_crowded_particles_are_accepted(seed, defocus):
    """Three of eleven fields 0.75 diameters apart; they lost all but a few particles while their scores were always parted (F1 0.02)."""
    optics = Optics(pixel_size_angstrom=1.77, defocus_u_angstrom=defocus, defocus_v_angstrom=defocus - 100.0)
    crowded = simulate_micrograph(
        shape=(1536, 1536), optics=optics, particles=400, distance_angstrom=135.0, signal_amplitude=0.7, seed=seed
    )
    truth = np.stack([crowded.particles.y, crowded.particles.x], 1)
    found, _ = accepted(crowded.image, 180.0, 1.77)
    assert figures(found, truth, crowded.image.shape, 180 / 1.77)[0] > 0.95


def _picked(name, score, own, chance, skew):
    columns = {"pick_score": score, "pick_threshold": own, "pick_chance": chance, "pick_excess_skew": skew}
    columns = {n: encode_value(np.asarray(v, VARIABLES[n].dtype)) for n, v in columns.items()}
    return {"ok": True, "name": name, "columns": columns, "shards": {}}


def test_the_run_says_where_hardly_any_peak_is_accepted():
    score = np.linspace(0.2, 4.5, 60)
    usual, faint, ice = (score, 2.0, 4.0, 1.5), (score, 4.4, 4.4, 0.19), (score, 4.4, 4.4, 0.02)
    records = {i: {"row": i, **_picked(f"m{i}", *one)} for i, one in enumerate((usual, usual, faint, ice))}
    gives = [VARIABLES[n] for n in NEEDED]
    (said,) = acceptance_messages("pick", Table.of(records, gives, NEEDED), "auto")
    assert "in 1 of 4 micrographs" in said
    assert "m2" in said
    assert "0.19" in said
    assert "2.00, the median of the others" in said
    (said,) = acceptance_messages("pick", Table.of(records, gives, NEEDED), 4.45)
    assert "accepts 4 peaks" in said
    none = Table.of({row: records[row] for row in (0, 1, 3)}, gives, NEEDED)
    assert not list(acceptance_messages("pick", none, "auto"))
    assert not list(acceptance_messages("pick", none, 1.0))


def test_profiles_are_drawn_over_the_radius_on_which_they_were_learnt():
    assert SUPPORT == PROFILE_REACH_DIAMETERS
