"""Gains against simulated cameras: the right form is found, what does not fit is refused, and an estimate comes close to the truth."""

from pathlib import Path

import numpy as np
import pytest

from cryodask.errors import CryodaskError, GainError
from cryodask.formats.gain import check_gain, estimate_gain, fitted_exponent, orient_gain, rank_gain_forms, reciprocal_gain
from cryodask.formats.movies import read_gain, write_tiff_movie
from cryodask.formats.mrc import write_mrc
from cryodask.run.gains import store_gains
from cryodask.run.preview import preview
from cryodask.run.recipe import make_plan

SHAPE = (96, 80)


def camera(seed=3, shape=SHAPE, spread=0.05, dead=0):
    """A gain that multiplies, of this relative spread."""
    rng = np.random.default_rng(seed)
    gain = rng.normal(1.0, spread, shape).clip(0.2).astype(np.float32)
    gain.flat[rng.choice(gain.size, dead, replace=False)] = 0.0
    return gain


def counts(gain, mean=40.0, seed=5, scene=None):
    """The sum of raw frames of this camera: Poisson counts, nothing at dead pixels, a few hot ones, an uneven beam."""
    rng = np.random.default_rng(seed)
    beam = 1.0 + 0.3 * np.linspace(-1, 1, gain.shape[1])[None, :]
    rate = mean * beam * (1.0 if scene is None else scene) * reciprocal_gain(gain)
    raw = rng.poisson(rate).astype(np.float64)
    raw.flat[rng.choice(raw.size, 3, replace=False)] *= 12
    return raw


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("rotate", [0, 90, 180, 270])
@pytest.mark.parametrize("flip", ["none", "up-down"])
def test_the_right_form_of_a_gain_is_found(rotate, flip, inverted):
    gain = camera(shape=(96, 96))
    saved = np.rot90(gain[::-1] if flip == "up-down" else gain, rotate // 90)  # undone by the turn in question
    best = rank_gain_forms(counts(gain), reciprocal_gain(saved) if inverted else saved)[0]
    assert (best.rotate_deg, best.flip, best.power) == (rotate, flip, -1 if inverted else 1)
    assert np.array_equal(orient_gain(saved, best.rotate_deg, best.flip), gain)


def of_another_day(gain):
    return (gain * np.random.default_rng(8).normal(1.0, 0.02, gain.shape)).astype(np.float32)


@pytest.mark.parametrize("spread", [0.03, 0.1, 0.3])
@pytest.mark.parametrize("mean", [20.0, 200.0])
@pytest.mark.parametrize(
    ("given", "says"),
    [
        (lambda g: g, ""),
        (lambda g: 7.0 * g, ""),
        (lambda g: np.ones_like(g), ""),  # says nothing, harms nothing
        (of_another_day, ""),
        (reciprocal_gain, "gain_divides"),
        (lambda g: g[::-1], "flip: up-down"),
        (lambda g: reciprocal_gain(g[::-1]), "gain_divides; .*flip: up-down"),
        (lambda g: np.rot90(g, 2), "rotate the gain by 180"),
        (lambda g: camera(seed=99, spread=float(g.std())), "another camera"),
        (lambda g: g * g, "its square"),
    ],
)
def test_a_gain_is_accepted_where_it_fits_and_refused_with_the_form_that_does(given, says, mean, spread):
    gain = camera(spread=spread, dead=4, shape=(192, 128))
    raw = counts(gain, mean)
    form = np.ascontiguousarray(given(gain))
    if not says:
        check_gain(raw, form)
    else:
        with pytest.raises(GainError, match=says):
            check_gain(raw, form)


@pytest.mark.parametrize("mean", [20.0, 200.0])
def test_a_gain_that_was_applied_already_is_refused(mean):
    gain = camera(shape=(256, 192))
    with pytest.raises(GainError, match="corrected already") as refused:
        check_gain(counts(gain, mean) * gain, gain)
    assert "gain: estimate" in refused.value.way_out


def test_the_power_that_fits_is_measured():
    gain = camera(shape=(256, 256), spread=0.1)
    raw = counts(gain, 100.0)
    for power, expected in ((1.0, 1.0), (2.0, 0.5), (0.5, 2.0), (-1.0, -1.0)):
        found, error = fitted_exponent(raw, gain**power)
        assert found == pytest.approx(expected, abs=0.1)
        assert error < 0.05


def test_a_gain_of_the_other_shape_is_refused_with_the_turn_that_fits():
    gain = camera()
    with pytest.raises(GainError, match=r"(?s)80 x 96.*movies are 96 x 80.*rotate the gain by (90|270)"):
        check_gain(counts(gain), np.ascontiguousarray(gain.T))
    with pytest.raises(GainError, match=r"(?s)10 x 10.*another camera mode"):
        check_gain(counts(gain), np.ones((10, 10), np.float32))


def test_a_gain_that_divides_is_read_as_one_that_multiplies(tmp_path: Path):
    gain = camera(dead=2)
    write_mrc(tmp_path / "g.mrc", reciprocal_gain(gain), 1.0)
    assert np.allclose(read_gain(tmp_path / "g.mrc", divides=True), gain, rtol=1e-6)


# --- estimates ---------------------------------------------------------------------------------------------------------------
def scenes(count, shape, seed=0):
    """Micrographs with particles at different places: dark discs."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: shape[0], : shape[1]]
    for _ in range(count):
        scene = np.ones(shape)
        for cy, cx in rng.uniform(0, min(shape), (20, 2)):
            scene -= 0.1 * ((y - cy) ** 2 + (x - cx) ** 2 < 36)
        yield scene


@pytest.mark.parametrize("spread", [0.03, 0.1])
def test_an_estimate_is_close_to_the_true_gain_and_says_how_reliable_it_is(spread):
    gain = camera(shape=(192, 160), spread=spread, dead=5)
    halves = np.zeros((2, *gain.shape))
    for i, scene in enumerate(scenes(40, gain.shape)):
        halves[i % 2] += counts(gain, 40.0, seed=i, scene=scene)
    found, reliability, pattern = estimate_gain((halves[0], halves[1]))
    good = (gain > 0) & (found > 0)
    assert good.mean() > 0.99
    assert not (found[gain == 0] > 0).any()
    # 1600 counts per pixel: shot noise 0.025, and particles
    left = np.std(found[good] / gain[good])
    expected = spread**2 / (spread**2 + 0.025**2 + 0.005**2)
    assert reliability == pytest.approx(expected, abs=0.05)
    assert left < min(0.035, 0.85 * spread)
    assert pattern == pytest.approx(spread, rel=0.15)
    check_gain(counts(gain, 200.0, seed=99), found)


def test_without_a_pattern_the_estimate_is_one():
    flat = np.ones((384, 384), np.float32)
    found, reliability, _ = estimate_gain((counts(flat, 800.0, seed=1), counts(flat, 800.0, seed=2)))
    assert reliability < 0.3  # of a beam that is uneven up to the border
    assert np.std(found[found > 0]) < 0.01


@pytest.fixture
def session(tmp_path: Path):
    """A project whose movies have the pattern of one camera."""
    gain = camera(shape=(96, 96), spread=0.15)

    def make(movies, mean=100.0):
        for i in range(movies):
            frames = np.stack([counts(gain, mean / 4, seed=10 * i + f) for f in range(4)]).clip(0, 255).astype(np.uint8)
            write_tiff_movie(tmp_path / f"m{i:02d}.tif", frames)
        inputs = "{movies: '*.tif', gain: estimate}"
        optics = "{voltage_kv: 300, spherical_aberration_mm: 2.7, pixel_size_angstrom: 1}"
        (tmp_path / "p.yaml").write_text(f"name: r\ninputs: {inputs}\nmicroscope: {optics}\npipeline: [motion]\n")
        return make_plan(tmp_path / "p.yaml")

    return make, gain


def test_a_session_estimates_its_gain_once(session, tmp_path):
    make, gain = session
    plan = make(12)
    assert not preview(plan).problems
    folder = tmp_path / "r"
    folder.mkdir()
    path = store_gains(plan, folder)[""]
    found = np.load(path)
    assert np.std(found[found > 0] / gain[found > 0]) < 0.06
    assert store_gains(make(14), folder)[""] == path, "later movies do not change the results of earlier ones"


@pytest.mark.parametrize(("movies", "mean", "says"), [(1, 100.0, "from 1 readable movies"), (3, 4.0, r"too few.*\n.*about \d+ movies")])
def test_too_few_movies_for_an_estimate_are_refused_with_the_number_needed(session, tmp_path, movies, mean, says):
    with pytest.raises(CryodaskError, match=f"(?s){says}"):
        store_gains(session[0](movies, mean), tmp_path)
    assert not (tmp_path / "inputs").exists()


def test_movies_that_were_corrected_need_no_estimate(tmp_path, session):
    make, _ = session
    plan = make(0)
    for i in range(12):
        frames = np.random.default_rng(i).poisson(2000.0, (4, 96, 96)).astype(np.float32)
        write_tiff_movie(tmp_path / f"m{i:02d}.tif", frames)
    with pytest.raises(GainError, match="no fixed pattern"):
        store_gains(plan, tmp_path)


def test_a_dead_pixel_of_a_gain_that_divides_is_dead_whatever_its_rest():
    gain = np.ones((8, 8), np.float32)
    gain[2, 3], gain[4, 5], gain[6, 7] = 1e-40, 5e-5, 0.0
    made = reciprocal_gain(gain)
    assert np.isfinite(made).all()
    assert made[2, 3] == made[4, 5] == made[6, 7] == 0.0
    assert made.max() == 1.0


@pytest.mark.parametrize(("rows", "refused"), [(0, False), (30, False), (70, True), (127, True)])
def test_a_gain_without_much_of_the_camera_is_refused(tmp_path: Path, rows, refused):
    gain = camera(shape=(128, 96))
    gain[:rows] = 0.0
    write_mrc(tmp_path / "g.mrc", gain, 1.0)
    if refused:
        with pytest.raises(GainError, match=r"is 0 in \d+ % of the pixels"):
            read_gain(tmp_path / "g.mrc")
    else:
        assert np.array_equal(read_gain(tmp_path / "g.mrc"), gain)
