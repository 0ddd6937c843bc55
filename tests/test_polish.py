"""Movie refinement: kernels against analytic truth, the stage against simulated movies, and input that must change nothing."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from cryodask.errors import InputError, MicrographError
from cryodask.kernels import particle_motion as pm
from cryodask.kernels.damage import b_factors, fit_damage
from cryodask.kernels.dose import critical_exposure
from cryodask.kernels.motion_model import velocity_covariance
from cryodask.kernels.particle_field import MotionPrior, absolute_prior, fit_particle_field, likeliest_amplitudes
from cryodask.simulate import SessionParams, simulate_movie
from cryodask.simulate.model import beta_galactosidase, density_map
from cryodask.simulate.session import session_detector
from cryodask.stages.motion import MotionParams, motion
from cryodask.stages.polish import PolishParams, polish

pytestmark = pytest.mark.heavy

PIXEL, VOXEL, MAP_BOX = 1.77, 2.95, 96
PARAMS = SessionParams(movies=2, seed=11, height=704, width=704, frames=12, particles=16, dose_per_frame=40.0 / 12.0)


def centred(track: np.ndarray) -> np.ndarray:
    return track - track.mean(1, keepdims=True)


def rms(values: np.ndarray) -> float:
    return float(np.sqrt((values**2).sum(-1).mean()))


# --- kernels ---------------------------------------------------------------------------------------------------------------------------


def measured(binning: int = 1, noise: float = 1.0, count: int = 40, seed: int = 0) -> tuple[pm.Measurement, np.ndarray]:
    """Particles of a smooth spot pattern in one frame of white noise, each at its own displacement (pixels, returned)."""
    rng = np.random.default_rng(seed)
    box, radius = 32 // binning, 10 // binning
    sampling = pm.Sampling(box, binning, radius, 2.0)
    edge = 48 * int(np.ceil(np.sqrt(count)))
    y, x = np.mgrid[:edge, :edge].astype(np.float32)
    places = np.stack(np.divmod(np.arange(count), edge // 48), -1) * 48.0 + 24.0
    shift = rng.normal(0.0, 0.7, (count, 1, 2))
    frame = np.zeros((edge, edge), np.float32)
    spots = ((0.0, 0.0, 1.0), (4.0, 2.0, -0.8), (-3.0, 4.0, 0.6))

    def pattern(dy: np.ndarray, dx: np.ndarray) -> np.ndarray:
        return sum(a * np.exp(-((dy - py) ** 2 + (dx - px) ** 2) / (2 * 2.2**2)) for py, px, a in spots)  # type: ignore[return-value]

    for (py, px), (dy, dx) in zip(places.astype(int), shift[:, 0]):
        cell = slice(py - 24, py + 24), slice(px - 24, px + 24)
        frame[cell] = pattern(y[cell] - py - dy, x[cell] - px - dx)
    frame += noise * rng.standard_normal(frame.shape).astype(np.float32)
    fine = np.mgrid[:32, :32].astype(np.float32) - 16.0
    image = torch.from_numpy(pattern(*fine)).double()
    k = torch.arange(-radius, radius + 1)
    # the definition: a sum over pixels, for bins about the pixel at which they are centred
    wave = torch.exp(-2j * torch.pi * k[:, None].double() * torch.arange(-16.0, 16.0, dtype=torch.float64) / (box * binning))
    full = (wave @ image.to(torch.complex128) @ wave.T)[:, radius:] / box / binning**2
    response = pm._bin_response(k.double(), sampling)
    expected = (full * response[:, None] * response[None, radius:] * pm.independent(radius)).to(torch.complex64).repeat(count, 1, 1)
    found = pm.measure(
        lambda f: torch.from_numpy(frame), 1, None, expected, sampling, places, 0.0 * shift, np.ones((1, radius + 1)), invert=False
    )  # fmt: skip
    return found, shift


@pytest.mark.parametrize("binning", [1, 2])
def test_steps_find_displacements_and_know_their_variance(binning):
    found, true = measured(binning, noise=0.4, count=100)
    change = np.zeros_like(true)
    for _ in range(4):
        steps = pm.fisher_steps(found, change)
        change = change + steps.step
    z = (change - true) * np.sqrt(steps.information)
    # 200 numbers of variance 1 have a mean square of 1 +- 0.1; the noise also holds the particles themselves
    assert steps.counts.all()
    assert 0.6 < (z**2).mean() < 1.3
    assert abs(z.mean()) < 0.25
    assert rms(change - true) < 0.5 * rms(true)


def test_grey_scale_ignores_junk_and_noise_has_none():
    signal = np.full(20, 30.0)
    good = np.full(20, 60.0)
    good[12:] = 2.0
    scale, counts = pm.grey_scale(good, signal)
    assert scale == pytest.approx(2.0)
    assert counts.sum() == 12
    rng = np.random.default_rng(1)
    scale, counts = pm.grey_scale(rng.normal(0.0, np.sqrt(0.5 * 30.0), 20), signal)
    assert scale == 0.0
    assert not counts.any()


def dense(prior: MotionPrior, places: np.ndarray, y: np.ndarray, weight: np.ndarray, nodes: np.ndarray) -> np.ndarray:
    """The definition of the posterior mean at nodes: one large covariance matrix, constants of 1000 A."""
    frames = y.shape[1]

    def covariance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        decay = np.exp(-np.linalg.norm(a[:, None] - b[None], axis=2) / prior.length_angstrom)
        return np.kron(np.ones_like(decay), prior.drift) + np.kron(decay, prior.local)

    out = np.zeros((len(nodes), frames, 2))
    own = covariance(places, places) + np.kron(np.eye(len(places)), np.full((frames, frames), 1e6))
    for axis in (0, 1):
        total = own + np.diag(1.0 / weight[..., axis].ravel())
        out[..., axis] = (covariance(nodes, places) @ np.linalg.solve(total, y[..., axis].ravel())).reshape(-1, frames)
    return out


def field_case(count: int, seed: int = 3) -> tuple[Any, ...]:
    rng = np.random.default_rng(seed)
    places, nodes = rng.uniform(0, 1800, (count, 2)), rng.uniform(0, 1800, (9, 2))
    exposure = (np.arange(8) + 0.5) * 5.0
    weight = rng.uniform(0.2, 1.0, (count, 8, 1)) * np.ones(2)
    return absolute_prior(exposure), places, rng.normal(0, 2.0, (count, 8, 2)), weight, nodes


def test_field_is_the_posterior_mean_of_the_gaussian_process():
    case = field_case(9)
    found = fit_particle_field(*case).nodes
    assert centred(found - dense(*case)) == pytest.approx(0.0, abs=2e-2 * np.abs(found).max())


def test_reduced_field_is_the_exact_one():
    prior, places, observed, weight, nodes = field_case(60)
    exact = fit_particle_field(prior, places, observed, weight, nodes, modes=60)
    reduced = fit_particle_field(prior, places, observed, weight, nodes, modes=40)
    assert rms(exact.nodes - reduced.nodes) < 0.2 * float(np.sqrt((exact.deviation**2).mean()))


def test_a_silent_particle_changes_nothing_and_the_constant_is_found():
    prior, places, observed, weight, nodes = field_case(12)
    observed[-1] += 1000.0
    weight[-1] *= 1e-9
    with_it = fit_particle_field(prior, places, observed, weight, nodes)
    without = fit_particle_field(prior, places[:-1], observed[:-1], weight[:-1], nodes)
    assert with_it.nodes == pytest.approx(without.nodes, abs=1e-3)
    moved = fit_particle_field(prior, places[:-1], observed[:-1] + 3.0, weight[:-1], nodes)
    assert moved.constant - without.constant == pytest.approx(3.0)


def test_likeliest_amplitude_follows_the_motion():
    prior, places, _, weight, _ = field_case(30)
    rng = np.random.default_rng(5)
    exposure = (np.arange(8) + 0.5) * 5.0
    drift = np.linalg.cholesky(0.38**2 * 16.0 * velocity_covariance(exposure, 57.0, 1.0) + 1e-6 * np.eye(8)) @ rng.standard_normal((8, 2))
    observed = drift[None] + rng.standard_normal((30, 8, 2)) / np.sqrt(weight)
    chosen = likeliest_amplitudes(prior, places, observed, weight)
    assert chosen.drift[0, 0] > 3.0 * prior.drift[0, 0]


@pytest.mark.parametrize("scale", [0.6, 1.0, 1.25])
def test_damage_is_found_whatever_the_fall_off_of_the_reference(scale):
    rng = np.random.default_rng(2)
    k = np.arange(47) / 283.0
    exposure = (np.arange(24) + 0.5) * 40.0 / 24.0
    decay = 0.5 * exposure[:, None] / critical_exposure(k, 300.0)[None]
    power = 1e4 * np.exp(-k * 30.0)
    cross = rng.uniform(0.3, 2.0, 47) * power * np.exp(-scale * decay)
    cross += rng.normal(0, 0.02, cross.shape) * np.sqrt(power * power[0])
    found = fit_damage(cross, power, decay)
    assert found.scale == pytest.approx(scale, abs=max(3.0 * found.deviation, 0.01))
    assert found.deviation < 0.1


def test_b_factors_of_gaussian_frames_come_back():
    k = np.arange(47) / 283.0
    true, power = np.linspace(0.0, -200.0, 12), np.ones(47)
    cross = np.exp(0.25 * true[:, None] * k**2)
    damage = fit_damage(cross, power, 0.5 * np.arange(1.0, 13.0)[:, None] / critical_exposure(k, 300.0)[None])
    found, _ = b_factors(damage, power, k)
    assert found[-1] - found[0] == pytest.approx(-200.0, rel=0.15)


def test_no_signal_gives_no_scale():
    assert np.isnan(fit_damage(np.zeros((5, 20)), np.zeros(20), np.ones((5, 20))).scale)


# --- the stage -------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def movies() -> list[SimpleNamespace]:
    """Two small movies with their truth, corrected by ``motion``, and what ``polish`` needs; centres are 0.8 A off."""
    truth = torch.from_numpy(density_map(beta_galactosidase(), MAP_BOX, VOXEL))
    fsc = 1.0 / (1.0 + (np.arange(MAP_BOX // 2 + 1) / 42.0) ** 12)
    gain = session_detector(PARAMS).gain
    out = []
    for i in range(2):
        frames, true = simulate_movie(PARAMS, i)
        optics = {"pixel_size_angstrom": PIXEL, "dose_per_frame": PARAMS.dose_per_frame, "pre_exposure": 0.0, "voltage_kv": 300.0}
        before = motion.process(MotionParams(), movie=frames, gain=gain, **optics)
        rng = np.random.default_rng(i)
        place = np.stack([true["particle_y"], true["particle_x"]], -1).astype(float)
        count = len(place)
        centre = place * PIXEL + rng.normal(0, 0.8, (count, 2))
        needs = {
            **optics, "movie": frames, "gain": gain, "spherical_aberration_mm": 2.7, "amplitude_contrast": 0.1, "phase_shift_deg": 0.0,
            **{n: float(true[n]) for n in ("defocus_u_angstrom", "defocus_v_angstrom", "defocus_angle_deg")},
            **{n: before[n] for n in ("patch_position", "patch_shift", "hot_pixel")},
            **{n: np.asarray(true[n], float) + rng.normal(0, 1.0, count) for n in ("rot_deg", "tilt_deg", "psi_deg")},
            "particle_id": np.arange(count), "half_set": np.arange(count) % 2,
            **{f"{n}_{a}_angstrom": centre[:, j] for n in ("position", "centre") for j, a in enumerate("yx")},
            "half_map": torch.stack([truth, truth]).numpy(), "final_map": truth.numpy(), "map_pixel_size_angstrom": VOXEL,
            "fsc_corrected": fsc,
        }  # fmt: skip
        out.append(SimpleNamespace(needs=needs, before=before, place=place, nodes=true["patch_shift"], shape=PARAMS.shape))
    return out


def run(one: SimpleNamespace, **changed: Any) -> dict[str, Any]:
    return polish.process(PolishParams(box=128), **{**one.needs, **changed})


def some(movie: SimpleNamespace, rows: Any) -> dict[str, Any]:
    """Only some particles."""
    names = (
        "particle_id",
        "half_set",
        "rot_deg",
        "tilt_deg",
        "psi_deg",
        *(f"{n}_{a}_angstrom" for n in ("position", "centre") for a in "yx"),
    )
    return {n: movie.needs[n][rows] for n in names}


def error(movie: SimpleNamespace, nodes: np.ndarray) -> float:
    at = [centred(pm.field_at(n, movie.place, movie.shape)) for n in (nodes, movie.nodes)]
    return rms(at[0] - at[1])


@pytest.fixture(scope="module")
def polished(movies):
    return [run(movie) for movie in movies]


def test_motion_at_the_particles_is_better(movies, polished):
    """The error falls to 0.73 in the demo session (benchmarks/polish.py); 16 particles per movie and 12 frames give less information."""
    before = [error(m, m.before["patch_shift"]) for m in movies]
    after = [error(m, out["patch_shift"]) for m, out in zip(movies, polished)]
    assert np.sqrt(np.mean(np.square(after))) < 0.92 * np.sqrt(np.mean(np.square(before)))
    assert all(out["polish_prior"] == "absolute" for out in polished)
    for value, out in zip(after, polished):
        assert 0.6 < value / out["motion_deviation_angstrom"] < 1.7


def test_centres_are_found_and_particles_keep_their_names(movies, polished):
    for movie, out in zip(movies, polished):
        ids = out["particle_id"]
        found = np.stack([out["centre_y_angstrom"], out["centre_x_angstrom"]], -1)
        off = rms(found - movie.place[ids] * PIXEL)
        assert off < 0.7 * rms(np.stack([movie.needs[f"centre_{a}_angstrom"] for a in "yx"], -1)[ids] - movie.place[ids] * PIXEL)
        assert sorted([*ids, *out["left_out_id"]]) == list(range(len(movie.place)))
        assert out["particle_image"].shape == (len(ids), 128, 128)
        assert out["rot_deg"] == pytest.approx(movie.needs["rot_deg"][ids].astype(np.float32))
        assert (out["signal_amount"] > 0.4).all()


def test_sums_follow_the_new_motion(movies, polished):
    """The signal of particles in their frames grows, also with motion found by the other half-set."""
    before, blind, after = (sum(out[f"signal_{n}"][20:] for out in polished).sum() for n in ("recentred", "blind", "after"))
    assert after > before
    assert blind > 0.97 * before
    assert all(np.isfinite(out["micrograph_dw"]).all() for out in polished)


def test_same_result_in_four_threads_at_once(movies, polished):
    """As in a worker with four threads; torch has one thread in each, for its transforms of large maps depend on their number."""
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(run, [movies[0]] * 4))
    for again in results:
        for name, value in polished[0].items():
            assert np.array_equal(np.asarray(value), np.asarray(again[name]), equal_nan=not isinstance(value, str)), name


def kept(movie: SimpleNamespace, out: dict[str, Any]) -> bool:
    return out["polish_prior"] == "that of motion" and np.array_equal(out["patch_shift"], movie.before["patch_shift"].astype(np.float32))


def test_without_particles_the_motion_is_kept(movies):
    out = run(movies[0], **some(movies[0], slice(0)))
    assert kept(movies[0], out)
    assert len(out["particle_id"]) == 0
    assert out["particle_image"].shape == (0, 128, 128)
    before = movies[0].before["micrograph_dw"]
    # the nodes are stored in float32, which moves some pixels over the edge of a step of the rounded micrograph: 3e-4
    assert np.sqrt(((out["micrograph_dw"] - before) ** 2).mean()) < 1e-3 * before.std()


def test_two_particles_change_it_little_and_not_for_the_worse(movies):
    worse = 0.0
    for movie in movies:
        out = run(movie, **some(movie, slice(2)))
        assert out["polish_prior"] == "residual"
        worse = max(worse, error(movie, out["patch_shift"]) / error(movie, movie.before["patch_shift"]))
    assert worse < 1.1


def far(movie: SimpleNamespace, rows: slice) -> dict[str, np.ndarray]:
    """Centres of some particles moved to empty ice."""
    out = {}
    for axis in "yx":
        values = movie.needs[f"centre_{axis}_angstrom"].copy()
        values[rows] = np.where(values[rows] > 620.0, values[rows] - 62.0, values[rows] + 62.0)
        out[f"centre_{axis}_angstrom"] = values
    return out


def test_particles_on_empty_ice_have_no_say(movies):
    out = run(movies[0], **far(movies[0], slice(None)))
    assert out["polish_particles"] <= 2
    assert error(movies[0], out["patch_shift"]) < 1.05 * error(movies[0], movies[0].before["patch_shift"])
    few = run(movies[0], **far(movies[0], slice(5)))
    without = run(movies[0], **some(movies[0], slice(5, None)))
    assert rms(centred(few["patch_shift"] - without["patch_shift"])) < 0.05
    assert (few["signal_amount"][np.isin(few["particle_id"], range(5))] < 0.4).all()


@pytest.mark.parametrize("fault", ["another map", "poses of another session", "noise for a map", "another voxel size"])
def test_what_does_not_belong_together_changes_nothing(movies, fault):
    movie, rng = movies[0], np.random.default_rng(4)
    turned = Rotation.random(len(movie.place), random_state=4).as_euler("zyz", degrees=True)
    changed = {
        "another map": {"half_map": np.roll(movie.needs["half_map"], 30, 1)},
        "poses of another session": dict(zip(("rot_deg", "tilt_deg", "psi_deg"), turned.T), **far(movie, slice(None))),
        "noise for a map": {"half_map": rng.standard_normal(movie.needs["half_map"].shape).astype(np.float32)},
        "another voxel size": {"map_pixel_size_angstrom": 1.6 * VOXEL},
    }[fault]
    out = run(movie, **changed)
    assert error(movie, out["patch_shift"]) < 1.1 * error(movie, movie.before["patch_shift"])
    assert out["polish_particles"] < 0.7 * len(movie.place)


def test_unknown_poses_and_halves_have_no_say(movies):
    movie = movies[0]
    angles, half = movie.needs["rot_deg"].copy(), movie.needs["half_set"].copy()
    angles[0], half[1] = np.nan, -1
    out = run(movie, rot_deg=angles, half_set=half)
    assert out["polish_particles"] <= len(movie.place) - 2
    assert (out["signal_amount"][np.isin(out["particle_id"], (0, 1))] == 0).all()


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"half_map": np.zeros((1, MAP_BOX, MAP_BOX, MAP_BOX), np.float32)}, "not two equal cubes"),
        ({"half_map": np.zeros((2, MAP_BOX, MAP_BOX, MAP_BOX), np.float32)}, "zero everywhere"),
        ({"solvent_mask": np.ones((8, 8, 8), np.float32)}, "the mask has 8 x 8 x 8 voxels"),
        ({"fsc_corrected": np.ones(20)}, "the FSC has 20 shells"),
        ({"map_pixel_size_angstrom": 0.1}, "Fourier shells"),
    ],
)
def test_maps_that_cannot_be_used_are_refused(movies, changed, told):
    with pytest.raises(InputError, match=told):
        run(movies[0], **changed)


def test_a_movie_that_was_replaced_is_refused(movies):
    with pytest.raises(MicrographError, match="known for 12 frames"):
        run(movies[0], movie=movies[0].needs["movie"][:8])
    with pytest.raises(MicrographError, match="the gain is 8 x 8"):
        run(movies[0], gain=np.ones((8, 8), np.float32))


def test_parameters_are_checked_as_those_of_extract():
    with pytest.raises(ValueError, match="must be even"):
        PolishParams(box=127)
