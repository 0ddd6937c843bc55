"""Half-maps that are not independent are refused with a number, and honest ones pass: simulated molecules and noise, in small boxes."""

import functools
import itertools

import numpy as np
import pytest
import scipy.ndimage
import torch

from cryodask.errors import InputError
from cryodask.formats.mrc import write_mrc
from cryodask.kernels.independence import independence
from cryodask.stage import load_stages
from cryodask.stages._half_maps import check_independent, doubt
from cryodask.stages.postprocess import says

pytestmark = pytest.mark.heavy


def radius(n):
    k = np.fft.fftfreq(n, 1.0 / n)
    return np.sqrt(k[:, None, None] ** 2 + k[None, :, None] ** 2 + k**2)


def filtered(volume, amplitude):
    return np.fft.ifftn(np.fft.fftn(volume) * amplitude).real


def gaussian(volume, width):
    n = volume.shape[0]
    return filtered(volume, np.exp(-width * (radius(n) / n) ** 2))


def moved(volume, shift):
    return np.fft.ifftn(scipy.ndimage.fourier_shift(np.fft.fftn(volume), shift)).real


def lowpass(volume, shell):
    return filtered(volume, 1.0 / (1.0 + np.exp(radius(volume.shape[0]) - shell)))


def joined(first, second, shell):
    inner = radius(first.shape[0]) <= shell
    mean = filtered((first + second) / 2, inner)
    return mean + filtered(first, ~inner), mean + filtered(second, ~inner)


def cubic(volume):
    """The mean over the 24 rotations of a cube: many of its Fourier coefficients are real, or equal."""
    out = np.zeros_like(volume)
    for axes in itertools.permutations(range(3)):
        for flips in itertools.product((False, True), repeat=3):
            if np.linalg.det(np.eye(3)[list(axes)]) * (-1) ** sum(flips) > 0:
                turned = volume.transpose(axes)
                for axis in np.flatnonzero(flips):
                    turned = np.roll(np.flip(turned, axis), 1 - len(volume) % 2, axis)
                out += turned / 24
    return out


class Pair:
    """Two honest half-maps of a molecule of 150 atoms, in a box of ``n`` voxels, with noise of this standard deviation and colour."""

    def __init__(self, n, noise, seed):
        rng = np.random.default_rng(seed)
        # an atom is the product of its profiles along the axes
        profiles = np.exp(-((np.arange(n) - n // 2 - rng.normal(0, 0.1 * n, (150, 3))[..., None]) ** 2) / 2.0)
        molecule = np.einsum("az,ay,ax->zyx", *profiles.transpose(1, 0, 2), optimize=True)
        molecule /= molecule.std()
        noises = [gaussian(rng.normal(size=molecule.shape), 8.0) * noise for _ in range(3)]
        self.first, self.second, self.other_noise = molecule + noises[0], molecule + noises[1], noises[2]
        self.noises, self.mean = noises[:2], molecule + (noises[0] + noises[1]) / 2
        self.mask = gaussian((molecule > 0.5).astype(float), 30.0) > 0.05

    def both(self, change):
        return change(self.first), change(self.second)


@pytest.fixture(scope="module", params=[(48, 0.5, 1), (48, 3.0, 3), (64, 1.0, 4), (65, 1.0, 5), (32, 0.4, 6)], ids=str)
def pair(request):
    return Pair(*request.param)


HONEST = {
    "as they are": lambda p: (p.first, p.second),
    "negative": lambda p: p.both(np.negative),
    "mirrored": lambda p: p.both(lambda m: m[::-1]),
    "float16": lambda p: p.both(lambda m: m.astype(np.float16).astype(float)),
    "int16": lambda p: p.both(lambda m: np.round(m * 1000)),
    "scaled": lambda p: (p.first, 3.0 * p.second + 1.0),
    "joined to 4": lambda p: joined(p.first, p.second, 4),
    "joined to a sixth": lambda p: joined(p.first, p.second, p.first.shape[0] // 6),
    "low-passed": lambda p: p.both(lambda m: lowpass(m, m.shape[0] // 4)),
    "low-passed, not alike": lambda p: (p.first, lowpass(p.second, p.first.shape[0] // 4)),
    "with a B-factor": lambda p: p.both(lambda m: gaussian(m, 10.0)),
    "masked": lambda p: p.both(lambda m: m * p.mask),
    "medians of neighbours": lambda p: p.both(lambda m: scipy.ndimage.median_filter(m, 3)),
    "means of neighbours": lambda p: p.both(lambda m: scipy.ndimage.uniform_filter(m, 3)),
    "cubic symmetry": lambda p: p.both(cubic),
    "cubic symmetry, low-passed": lambda p: p.both(lambda m: lowpass(cubic(m), m.shape[0] // 5)),
    "noise": lambda p: tuple(p.noises),
    "in different places": lambda p: (p.first, np.roll(p.second, (3, -5, 9), (0, 1, 2))),
    "in places that differ by parts of a voxel": lambda p: (p.first, moved(p.second, (0.6, -0.3, 4.5))),
}
DEPENDENT = {
    "the same": lambda p: (p.first, p.first),
    "scaled copy": lambda p: (p.first, 3.0 * p.first + 2.0),
    "negative copy": lambda p: (p.first, -p.first),
    "rounded copy": lambda p: (p.first, p.first.astype(np.float16).astype(float)),
    "low-passed copy": lambda p: (p.first, lowpass(p.first, p.first.shape[0] // 4)),
    "blurred copy": lambda p: (p.first, gaussian(p.first, 20.0)),
    "copy with a fifth of the noise": lambda p: (p.first, p.first + 0.2 * p.other_noise),
    "copy with half of the noise": lambda p: (p.first, p.first + 0.5 * p.other_noise),
    "copy with as much noise": lambda p: (p.first, p.first + p.other_noise),
    "half the mean in both": lambda p: p.both(lambda m: 0.5 * m + 0.5 * p.mean),
    "mostly the mean": lambda p: p.both(lambda m: 0.2 * m + 0.8 * p.mean),
    "the mean and a half": lambda p: (p.first, p.mean),
    "noise twice": lambda p: (p.noises[0], p.noises[0]),
    "joined, and a copy beyond": lambda p: (lambda a, b: (a, a + 0.1 * p.other_noise))(*joined(p.first, p.second, 4)),
    "mean of three voxels, periodic": lambda p: (p.first, scipy.ndimage.uniform_filter(p.first, 3, mode="wrap")),
    "copy whose details are negative": lambda p: (p.first, gaussian(p.first, 40.0) - 0.5 * gaussian(p.first, 2.0)),
    "second differences": lambda p: (p.first, scipy.ndimage.laplace(p.first)),
    "sharpened copy": lambda p: (p.first, filtered(p.first, np.exp(6.0 * (radius(p.first.shape[0]) / p.first.shape[0]) ** 2))),
    "shifted copy": lambda p: (p.first, np.roll(p.first, 1, 0)),
    "far shifted copy": lambda p: (p.first, np.roll(p.first, (3, -5, 9), (0, 1, 2))),
    "negative, shifted and blurred copy": lambda p: (p.first, -np.roll(gaussian(p.first, 20.0), 2, 1)),
    "copy between voxels": lambda p: (p.first, moved(p.first, (0.5, 0.5, 0.5))),
    "copy half a voxel away": lambda p: (p.first, moved(p.first, (0.0, 0.5, 0.0))),
    "copy a third of a voxel away, blurred": lambda p: (p.first, gaussian(moved(p.first, (0.3, -0.2, 0.35)), 10.0)),
    "interpolated copy": lambda p: (p.first, scipy.ndimage.shift(p.first, (0.5, 0.5, 0.5), order=1, mode="wrap")),
    "far copy between voxels": lambda p: (p.first, moved(p.first, (4.5, -7.5, 0.5))),
    "noise, low-passed and shifted": lambda p: (p.noises[0], lowpass(moved(p.noises[0], (0.5, 0.5, 0.5)), p.first.shape[0] // 5)),
    "noise, low-passed": lambda p: (p.noises[0], lowpass(p.noises[0], p.first.shape[0] // 5)),
    "shifted copy with half of the noise": lambda p: (p.first, np.roll(p.first, 1, 2) + 0.5 * p.other_noise),
    "masked copy": lambda p: (p.first * p.mask, p.first * p.mask),
    "masked copy with a fifth of the noise": lambda p: (p.first * p.mask, (p.first + 0.2 * p.other_noise) * p.mask),
}


@pytest.mark.parametrize("name", HONEST)
def test_honest_half_maps_pass(pair, name):
    first, second = HONEST[name](pair)
    check_independent(np.stack([first, second]))


@pytest.mark.parametrize("name", DEPENDENT)
def test_half_maps_that_are_not_independent_are_refused_with_a_number(pair, name):
    first, second = DEPENDENT[name](pair)
    with pytest.raises(InputError, match=r"not independent: (.*they are the same|.*\d\.\d\d)"):
        check_independent(np.stack([first, second]))


simulated = functools.lru_cache(maxsize=64)(Pair)


def faults(change, n, noises, seeds=2):
    """Share of simulated pairs that are refused."""
    found = []
    for noise in noises:
        for seed in range(seeds):
            first, second = change(simulated(n, noise, 100 + seed))
            found.append(bool(independence(torch.from_numpy(first.copy()), torch.from_numpy(second.copy())).fault))
    return float(np.mean(found))


@pytest.mark.parametrize("n", [16, 24, 32])
@pytest.mark.parametrize("shell", [3, 4, 5, 6, 8])
def test_honest_maps_of_few_shells_pass(n, shell):
    """Low-passed, their molecule fills the solvent: its correlation there was 0.8 to 0.99, and 40 to 100 % of them were refused."""
    assert faults(lambda p: p.both(lambda m: lowpass(m, shell)), n, (0.1, 0.4, 1.0)) == 0.0


@pytest.mark.parametrize("n", [16, 20, 24, 32])
def test_copies_with_as_much_noise_are_refused_in_small_boxes(n):
    """Correlation 0.71, of which the standard error in boxes of 16 voxels is 0.3."""
    assert faults(lambda p: (p.first, p.first + p.other_noise), n, (0.4, 1.0, 3.0)) == 1.0


@pytest.mark.parametrize("shift", [(0, 0, 0), (2, -1, 3)])
def test_a_copy_with_three_times_the_noise_is_marked_wherever_it_is(shift):
    """Correlation 1 / sqrt(1 + 9) = 0.316."""
    for n, seed in ((32, 5), (48, 6)):
        pair = Pair(n, 1.0, seed)
        found = independence(torch.from_numpy(pair.first), torch.from_numpy(np.roll(pair.first, shift, (0, 1, 2)) + 3.0 * pair.other_noise))
        assert found.noise_correlation == pytest.approx(0.316, abs=0.06)
        assert found.shift_voxels == pytest.approx([-s for s in shift], abs=0.1)
        assert "may be overestimated" in doubt(found.noise_correlation)


def test_honest_whole_maps_are_not_marked():
    for n, noise, seed in ((48, 0.5, 1), (48, 3.0, 3)):
        pair = simulated(n, noise, seed)
        assert doubt(independence(torch.from_numpy(pair.first), torch.from_numpy(pair.second)).noise_correlation) == ""


def test_the_correlation_of_noise_is_what_the_mixture_makes_it():
    # halves (1 + m) a + m b and m a + (1 + m) b of independent noise correlate by 2 m (1 + m) / ((1 + m)^2 + m^2)
    pair = Pair(64, 1.0, 9)
    for share, expected in ((0.0, 0.0), (0.5, 0.6), (0.8, 0.923)):
        found = independence(*(torch.from_numpy((1 - share) * m + share * pair.mean) for m in (pair.first, pair.second)))
        assert found.noise_correlation == pytest.approx(expected, abs=0.05)


def test_maps_that_are_joined_up_to_where_they_agree_have_no_resolution():
    pair = Pair(48, 3.0, 2)
    noise = np.stack(joined(*pair.noises, 12))
    check_independent(noise)
    with pytest.raises(InputError, match=r"the same up to 13\.1 A"):
        check_independent(noise, resolution_angstrom=48 * 3.0 / 12.5, pixel_size_angstrom=3.0)
    check_independent(np.stack(joined(pair.first, pair.second, 3)), resolution_angstrom=12.0, pixel_size_angstrom=3.0)


def test_no_stage_gives_a_resolution_of_copies(tmp_path):
    pair, stages = Pair(48, 0.5, 1), load_stages()
    for name, volume in (("a", pair.first), ("b", pair.second), ("c", 2.0 * pair.first)):
        write_mrc(tmp_path / f"{name}.mrc", volume.astype(np.float32), 3.0)
    read, process = stages["import_map"], stages["postprocess"]
    halves = read.process(read.params(half_maps=(str(tmp_path / "a.mrc"), str(tmp_path / "b.mrc"))))
    with pytest.raises(InputError, match="not independent"):
        read.process(read.params(half_maps=(str(tmp_path / "a.mrc"), str(tmp_path / "c.mrc"))))
    common = {"solvent_mask": np.ones((48, 48, 48), np.float32), "map_pixel_size_angstrom": 3.0}
    # a signal-to-noise ratio of 4 per voxel, in shells up to Nyquist
    assert 6.0 <= process.process(process.params(), half_map=halves["half_map"], **common)["resolution_angstrom"] < 7.0
    copies = np.stack([pair.first, 2.0 * pair.first]).astype(np.float32)
    with pytest.raises(InputError, match="not independent"):
        process.process(process.params(), half_map=copies, **common)
    told = process.process(process.params(), half_map=copies, succeeded=False, **common)
    assert np.isnan(told["resolution_angstrom"])


def test_a_resolution_that_may_be_too_fine_says_so():
    pair, process = Pair(48, 0.5, 1), load_stages()["postprocess"]
    halves = np.stack(pair.both(lambda m: 0.65 * m + 0.35 * pair.mean)).astype(np.float32)
    told = process.process(
        process.params(), half_map=halves, solvent_mask=np.ones(halves.shape[1:], np.float32), map_pixel_size_angstrom=3.0
    )
    # 2 m (1 + m) / ((1 + m)^2 + m^2) with m = 0.35 / 2 / 0.65
    assert told["noise_correlation"] == pytest.approx(0.41, abs=0.05)
    assert "may be overestimated" in says(told)


@pytest.mark.parametrize("value", [0.0, 2.5])
@pytest.mark.parametrize("both", [True, False])
def test_a_map_of_one_value_is_called_that(value, both):
    flat = torch.full((16, 16, 16), value)
    other = flat if both else torch.randn(16, 16, 16, generator=torch.Generator().manual_seed(1))
    assert independence(other, flat).fault == "all voxels of one of them are equal"
