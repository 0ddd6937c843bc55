"""Refinement: finds poses it should find, finds nothing in noise, and does not depend on how particles are divided."""

import mrcfile
import numpy as np
import pytest
import torch
from _particles import blob_map, ctf_columns, project, simulate
from pydantic import ValidationError

from cryodask.errors import InputError
from cryodask.kernels.fourier import soft_sphere
from cryodask.kernels.fsc import fsc
from cryodask.kernels.maximisation import HalfMaps, next_rings
from cryodask.kernels.orientations import angular_error_deg, euler_to_matrix, random_rotations
from cryodask.kernels.projection import cut_map
from cryodask.kernels.symmetry import symmetry_operators
from cryodask.run.blocks import ParticlesInMemory, iterate_here
from cryodask.stage import Context, ParticleBlock, ParticleSet
from cryodask.stages import _refinement as rf
from cryodask.stages.refine3d import Refine3DParams, refine3d

pytestmark = pytest.mark.heavy

BOX, PIXEL = 48, 4.0
functions = refine3d.functions


def write_map(path, volume, pixel=PIXEL):
    with mrcfile.new(path, overwrite=True) as f:
        f.set_data(np.asarray(volume, np.float32))
        f.voxel_size = pixel
    return str(path)


def refine(tmp_path, images, particles, volume, **params):
    defaults = {
        "reference": write_map(tmp_path / "start.mrc", volume * 23.0),
        "mask_diameter_angstrom": 140.0,
        "symmetry": "D2",
        "shift_range_angstrom": 12.0,
    }
    history = []
    result = iterate_here(
        functions,
        Refine3DParams(**{**defaults, **params}),
        ParticlesInMemory(particles, images),
        on_iteration=lambda state, metrics, columns: history.append(metrics),
    )
    return result, history


def test_refinement_finds_the_poses_the_scale_and_the_spread_of_shifts(tmp_path):
    volume = blob_map(BOX, "D2", blobs=20, width_px=1.2)
    images, particles, rotations, origins = simulate(volume, 240, pixel=PIXEL, snr=0.2, shift_px=1.0)
    result, history = refine(tmp_path, images, particles, volume, iterations=6)
    found = euler_to_matrix(*(torch.deg2rad(torch.from_numpy(result[k]).double()) for k in ("rot_deg", "tilt_deg", "psi_deg")))
    errors = angular_error_deg(found, rotations, symmetry_operators("D2")).numpy()
    assert np.median(errors) < 3.5
    assert np.mean(errors < 8) > 0.95
    shifts = np.hypot(
        result["origin_y_angstrom"] - origins[:, 0].numpy() * PIXEL, result["origin_x_angstrom"] - origins[:, 1].numpy() * PIXEL
    )
    assert np.median(shifts) < 0.53  # 0.44 A; 0.62 A without interpolation between grid points
    assert 3.0 < history[-2]["shift_sigma_angstrom"] < 5.0  # drawn with 4 A
    assert result["succeeded"]
    mask = soft_sphere(BOX, PIXEL, 65.0, 10.0)
    assert float(fsc(torch.from_numpy(result["final_map"]) * mask, volume * mask)[2:13].min()) > 0.9
    assert result["resolution_angstrom"] < 14.0
    assert result["half_map"].shape == (2, BOX, BOX, BOX)
    assert {len(result[name]) for name in ("rot_deg", "tilt_deg", "psi_deg", "origin_y_angstrom", "log_likelihood")} == {240}


def test_clean_particles_pass_from_drawn_poses_to_local_ones_and_only_false_picks_are_against_their_map(tmp_path):
    volume = blob_map(BOX, "D2", blobs=20, width_px=1.2)
    images, particles, _, _ = simulate(volume, 120, pixel=PIXEL, snr=0.3)
    images[[17, 80]] = np.random.default_rng(5).standard_normal((2, BOX, BOX))
    result, history = refine(tmp_path, images, particles, volume, iterations=6)
    phases = [metrics["phase"] for metrics in history]
    assert list(dict.fromkeys(phases))[:5] == ["noise power", "grey scale", "draw", "global", "local"]
    assert phases[-1] == "verdict"
    assert sum(phase in ("global", "local") for phase in phases) <= 6
    assert "sort" not in phases
    assert np.flatnonzero(~result["in_map"]).tolist() == [17, 80]
    assert result["succeeded"]
    assert 0.95 < result["explained_share"] < 1.15
    assert result["view_coverage"] > 0.9
    assert abs(result["cut_share"]) < 0.02


def test_noise_is_not_refined_to_anything_better_than_its_start(tmp_path):
    images = np.random.default_rng(0).standard_normal((200, BOX, BOX), dtype=np.float32)
    _, particles, _, _ = simulate(torch.zeros(BOX, BOX, BOX) + 1e-6, 200, pixel=PIXEL, snr=0.0)
    result, _ = refine(tmp_path, images, particles, blob_map(BOX, "D2", blobs=8), iterations=3)
    # start at 40 A; shell 5 of 192 A is 38.4 A
    assert min(result["iteration_resolution_angstrom"]) > 35.0
    assert not result["succeeded"]
    assert result["resolution_angstrom"] == 192.0 / 4


def test_scores_do_not_depend_on_how_particles_are_divided(tmp_path):
    volume = blob_map(BOX, "D2", blobs=8)
    images, particles, _, _ = simulate(volume, 96, pixel=PIXEL, snr=0.2)
    params = Refine3DParams(reference=write_map(tmp_path / "start.mrc", volume), mask_diameter_angstrom=140.0, symmetry="D2")
    state = functions.start(params, particles, {})
    state |= rf.beginning(state | {"start_maps": state["maps"]}, 96)
    state |= {"phase": "global", "rings": 8, "noise_power": np.full((1, BOX // 2), 1.0)}
    shared = functions.prepare(params, state, 0, Context())

    def expect(index):
        columns = {k: v[index] for k, v in particles.columns.items()}
        block = functions.load(params, state, ParticleBlock(index, images[index], columns, PIXEL, 0), Context())
        return functions.expect(params, state, shared, block, {}, Context())

    whole_sums, whole = expect(np.arange(96))
    parts = [expect(some) for some in (np.arange(37), np.arange(37, 96))]
    for name in ("mode_rotation", "mode_origin_angstrom", "certainty"):
        assert np.allclose(
            whole[name][:, 0] if whole[name].ndim > 1 else whole[name],
            np.concatenate([p[1][name][:, 0] if p[1][name].ndim > 1 else p[1][name] for p in parts]),
            atol=1e-3,
        )
    joined = parts[0][0]["grid"] + parts[1][0]["grid"]
    assert np.allclose(joined, whole_sums["grid"], atol=1e-4 * np.abs(joined).max())


def test_the_same_seed_gives_the_same_bits_and_another_one_does_not(tmp_path):
    volume = blob_map(32, "D2", blobs=8)
    images, particles, _, _ = simulate(volume, 64, pixel=6.0, snr=0.2)
    start = write_map(tmp_path / "coarse.mrc", volume, 6.0)
    runs = [refine(tmp_path, images, particles, volume, reference=start, iterations=1, seed=s)[0]["final_map"] for s in (1, 1, 2)]
    assert np.array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0], runs[2])


def test_a_start_map_of_another_pixel_size_is_resampled(tmp_path):
    volume = blob_map(64, "D2", blobs=8, reach=0.25, width_px=2.0)
    _, particles, _, _ = simulate(torch.ones(BOX, BOX, BOX), 20, pixel=PIXEL, snr=0.0)
    same = functions.start(Refine3DParams(reference=write_map(tmp_path / "a.mrc", volume, 3.0), lowpass_angstrom=30.0), particles, {})
    from cryodask.kernels.resampling import resample_map

    direct = resample_map(volume, 3.0, BOX, PIXEL, cut_angstrom=15.0)
    other = functions.start(Refine3DParams(reference=write_map(tmp_path / "b.mrc", direct), lowpass_angstrom=30.0), particles, {})
    a, b = (torch.from_numpy(s["maps"][0]) for s in (same, other))
    assert float((a * b).sum() / (a.norm() * b.norm())) > 0.999


def test_the_start_map_holds_nothing_beyond_the_low_pass(tmp_path):
    _, particles, _, _ = simulate(torch.ones(BOX, BOX, BOX), 20, pixel=PIXEL, snr=0.0)
    state = functions.start(Refine3DParams(reference=write_map(tmp_path / "a.mrc", blob_map(BOX))), particles, {})
    start = torch.from_numpy(state["maps"][0])
    assert state["rings"] == 4  # 192 A / 40 A
    assert float((start - cut_map(start, 4)).abs().max()) < 1e-4 * float(start.abs().max())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reference": None}, "no map to start from"),
        ({"lowpass_angstrom": 150.0}, "low-pass is too strong"),
    ],
)
def test_bad_parameters_are_refused_before_any_work(tmp_path, change, message):
    _, particles, _, _ = simulate(torch.ones(BOX, BOX, BOX), 20, pixel=PIXEL, snr=0.0)
    params = Refine3DParams(**{"reference": write_map(tmp_path / "a.mrc", blob_map(BOX)), **change})
    with pytest.raises(InputError, match=message):
        functions.start(params, particles, {})


def test_an_unknown_symmetry_is_refused_when_the_parameters_are_read():
    with pytest.raises(ValidationError, match="'Q7' is not a point group"):
        Refine3DParams(symmetry="Q7")


def test_bad_maps_are_refused(tmp_path):
    particles = ParticleSet(40, BOX, PIXEL, ctf_columns(40))
    for data, pixel, message in (
        (np.ones((BOX, BOX, BOX // 2)), PIXEL, "not a cube"),
        (np.zeros((BOX, BOX, BOX)), PIXEL, "empty or contains NaN"),
        (np.random.default_rng(0).random((BOX + 2,) * 3), 0.0, "no voxel size"),
    ):
        path = write_map(tmp_path / "bad.mrc", data, pixel)
        with pytest.raises(InputError, match=message):
            functions.start(Refine3DParams(reference=path), particles, {})


def test_odd_boxes_are_refused(tmp_path):
    with pytest.raises(InputError, match="47 pixels"):
        functions.start(
            Refine3DParams(reference=write_map(tmp_path / "a.mrc", blob_map(BOX))), ParticleSet(40, 47, PIXEL, ctf_columns(40)), {}
        )


def test_independent_noise_has_no_support_beyond_the_common_shells():
    mask = soft_sphere(BOX, PIXEL, 65.0, 10.0)
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        common = 30.0 * cut_map(torch.randn(BOX, BOX, BOX, generator=g), 4)
        halves = [cut_map(torch.randn(BOX, BOX, BOX, generator=g), 12.5) + common for _ in range(2)]
        support = HalfMaps.of(*halves, inserted=12, common=4, generator=g).support(mask, 4)
        assert support.last <= 5
        assert next_rings(support, inserted=12, limit=23, start=4) == 4


def test_next_rings_keep_a_guard_shell_until_the_end():
    g = torch.Generator().manual_seed(0)
    signal = 100.0 * torch.randn(BOX, BOX, BOX, generator=g)
    for inserted, limit, want in ((12, 23, 11), (23, 23, 22)):
        halves = [cut_map(signal + torch.randn(BOX, BOX, BOX, generator=g), inserted + 0.5) for _ in range(2)]
        support = HalfMaps.of(*halves, inserted=inserted, common=4, generator=g).support(torch.ones(BOX, BOX, BOX), 1)
        assert support.last == inserted
        assert next_rings(support, inserted=inserted, limit=limit, start=4) == want


def test_the_search_may_use_what_solvent_hides():
    """A small molecule in a large sphere of noise: shells that are lost in the sphere are supported within the molecule, noise is not."""
    sphere = soft_sphere(BOX, PIXEL, 85.0, 10.0)
    molecule = cut_map(blob_map(BOX, blobs=12, reach=0.15, width_px=1.0), 20)
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        last = []
        for strength in (10.0, 0.0):
            halves = [cut_map(strength * molecule + torch.randn(BOX, BOX, BOX, generator=g), 20.5) for _ in range(2)]
            maps = HalfMaps.of(*halves, inserted=20, common=3, generator=g)
            support = maps.support(sphere, 1)
            last.append((support.last, maps.solvent_support(sphere, support, PIXEL, 1).last))
        (in_sphere, in_molecule), (_, of_noise) = last
        assert in_molecule >= in_sphere + 3
        assert of_noise <= 5


def with_junk(images, seed):
    """A fifth of the images replaced: a third of these is empty, the others hold smooth blobs, such as ice, of a particle's power."""
    rng = np.random.default_rng(seed)
    junk = np.zeros(len(images), bool)
    junk[rng.permutation(len(images))[: len(images) // 5]] = True
    power = images.var() - 1.0
    c = np.arange(BOX) - BOX // 2
    for number, i in enumerate(np.nonzero(junk)[0]):
        images[i] = rng.standard_normal((BOX, BOX))
        if number % 3:
            places = rng.normal(0, 8, (5, 2))
            blobs = sum(rng.normal() * np.exp(-((c[:, None] - y) ** 2 + (c - x) ** 2) / (2 * rng.uniform(2, 6) ** 2)) for y, x in places)
            images[i] += blobs * np.sqrt(power / blobs.var())
    return junk


def test_junk_is_left_out_and_the_rest_is_refined(tmp_path):
    volume = blob_map(BOX, "D2", blobs=20, width_px=1.2)
    images, particles, rotations, _ = simulate(volume, 200, pixel=PIXEL, snr=0.2, shift_px=1.0)
    junk = with_junk(images, 5)
    result, history = refine(tmp_path, images, particles, volume, iterations=4)
    assert [m["phase"] for m in history].count("sort") == 1
    assert np.mean(result["in_map"][junk]) < 0.15
    assert np.mean(result["in_map"][~junk]) > 0.95
    found = euler_to_matrix(*(torch.deg2rad(torch.from_numpy(result[k]).double()) for k in ("rot_deg", "tilt_deg", "psi_deg")))
    errors = angular_error_deg(found, rotations, symmetry_operators("D2")).numpy()[~junk]
    assert np.mean(errors < 8) > 0.95
    assert result["succeeded"]


@pytest.mark.parametrize("wrong", ["another molecule's particles", "noise"])
def test_no_figure_is_given_where_the_particles_are_not_of_the_map(tmp_path, wrong):
    """40 A is all that the starting map gives; there is no other molecule in 160 particles of signal-to-noise 0.02."""
    volume = blob_map(BOX, "D2", blobs=20, width_px=1.2)
    of = blob_map(BOX, "D2", blobs=20, width_px=1.2, seed=21) if wrong == "another molecule's particles" else volume
    images, particles, _, _ = simulate(of, 160, pixel=PIXEL, snr=0.0 if wrong == "noise" else 0.02)
    result, _ = refine(tmp_path, images, particles, volume, iterations=4)
    assert not result["succeeded"]
    assert result["resolution_angstrom"] == 192.0 / 4
    assert refine3d.says(result).startswith("not solved")


def test_a_block_without_particles_for_the_map_adds_nothing(tmp_path):
    volume = blob_map(BOX, "D2", blobs=8)
    images, particles, _, _ = simulate(volume, 24, pixel=PIXEL, snr=0.2)
    params = Refine3DParams(reference=write_map(tmp_path / "start.mrc", volume), mask_diameter_angstrom=140.0, symmetry="D2")
    state = functions.start(params, particles, {})
    state |= {"start_maps": state["maps"], "noise_power": np.full((1, BOX // 2), 1.0), "iteration": 6}
    state |= rf.beginning(state, 24) | {"rings": 8}
    index = np.arange(24)
    block = functions.load(params, state, ParticleBlock(index, images, particles.columns, PIXEL, 0), Context())
    for phase, below in (("draw", -np.inf), ("global", -np.inf), ("local", 1.0), ("local", -np.inf)):
        state |= {"phase": phase, "stray_below": below, "foreign_below": below}
        shared = functions.prepare(params, state, 0, Context())
        columns = functions._no_poses(24) | {"in_map": np.zeros(24, bool)}
        sums, found = functions.expect(params, state, shared, block, columns, Context())
        assert sums["count"] == 0
        assert not sums["grid"].any()
        assert np.array_equal(found["mode_rotation"], columns["mode_rotation"])


@pytest.fixture(scope="module")
def spread_out(tmp_path_factory):
    """The second search over all views, of particles with shifts over a third of the box; true rotations and origins in pixels."""
    volume = blob_map(BOX, "D2", blobs=20, width_px=1.2, reach=0.2)
    count, g = 48, torch.Generator().manual_seed(0)
    rotations, origins = random_rotations(count, g), (torch.rand(count, 2, generator=g) - 0.5) * BOX / 3
    columns = ctf_columns(count)
    clean = project(volume, rotations, origins, columns, PIXEL)
    scale = float(np.sqrt(0.5 / clean.var()))
    images = (scale * clean + np.random.default_rng(1).standard_normal(clean.shape)).astype(np.float32)
    start = write_map(tmp_path_factory.mktemp("map") / "start.mrc", volume)
    params = Refine3DParams(reference=start, mask_diameter_angstrom=140.0, symmetry="D2")
    state = functions.start(params, ParticleSet(count, BOX, PIXEL, columns), {})
    state |= rf.beginning(state | {"start_maps": state["maps"]}, count) | {
        "rings": 10, "maps": scale * torch.stack([volume, volume]).numpy(), "noise_power": np.ones((1, BOX // 2)), "parts": 1,
        "passes": 1, "phase": "global", "reach_angstrom": 48.0, "shift_sigma_angstrom": 20.0,
    }  # fmt: skip
    block = functions.load(params, state, ParticleBlock(np.arange(count), images, columns, PIXEL, 0), Context())
    return params, state, block, rotations, origins


def share_found(spread_out, last_px, passes=1):
    """Share of the particles with the right pose after some passes from the last shifts `(n, 2)`."""
    params, state, block, rotations, origins = spread_out
    columns = functions._no_poses(len(origins))
    columns["mode_origin_angstrom"][:, 0] = (last_px * PIXEL).numpy()
    shared = functions.prepare(params, state, 0, Context())
    for _ in range(passes):
        _, columns = functions.expect(params, state, shared, block, columns, Context())
    errors = angular_error_deg(torch.from_numpy(columns["mode_rotation"][:, 0]).double(), rotations, symmetry_operators("D2"))
    moved = torch.from_numpy(columns["mode_origin_angstrom"][:, 0]) / PIXEL - origins
    return float(((errors < 12) & (moved.norm(dim=1) < 2)).float().mean())


def test_views_are_searched_over_all_shifts_and_then_about_the_last_ones(spread_out):
    state, origins = spread_out[1], spread_out[-1]
    assert rf.reach_px(state) == pytest.approx(4.5)
    assert rf.reach_px(state | {"passes": 0}) == 12.0
    g = torch.Generator().manual_seed(1)
    off = 2 * (torch.randint(0, 2, origins.shape, generator=g) * 2 - 1)
    nothing = torch.zeros_like(origins)
    assert share_found(spread_out, origins + off) > 0.9
    assert share_found(spread_out, nothing) < 0.6
    params, _, *others = spread_out
    assert share_found((params, state | {"passes": 0}, *others), nothing) > 0.9


def test_particles_move_from_wrong_shifts(spread_out):
    """The last shifts are off by 6 pixels, and a search reaches 4.5: the second one starts nearer."""
    origins = spread_out[-1]
    angle = torch.rand(len(origins), generator=torch.Generator().manual_seed(2)) * 2 * np.pi
    wrong = origins + 6 * torch.stack([angle.sin(), angle.cos()], 1)
    assert share_found(spread_out, wrong, 2) > 0.9


def test_the_first_local_pass_searches_everywhere_for_particles_that_the_map_explains_badly(spread_out):
    """Of 48 particles 24 have a pose of no likelihood at the place of the pick, up to 10 pixels off; the others the right one."""
    params, state, block, rotations, origins = spread_out
    stray = np.arange(48) % 2 == 0
    columns = functions._no_poses(48) | {"log_likelihood": np.where(stray, -5.0, 100.0).astype(np.float32)}
    columns["mode_rotation"][~stray, 0] = rotations[~stray].numpy()
    columns["mode_origin_angstrom"][~stray, 0] = (origins[~stray] * PIXEL).numpy()
    found = {}
    for below in (50.0, -np.inf):
        now = state | {
            "phase": "local", "stray_below": below, "foreign_below": below, "shift_range_angstrom": 48.0, "reach_angstrom": 6.0
        }  # fmt: skip
        shared = functions.prepare(params, now, 0, Context())
        _, after = functions.expect(params, now, shared, block, columns, Context())
        errors = angular_error_deg(torch.from_numpy(after["mode_rotation"][:, 0]).double(), rotations, symmetry_operators("D2"))
        moved = torch.from_numpy(after["mode_origin_angstrom"][:, 0]) / PIXEL - origins
        assert after["in_map"].all()
        found[below] = ((errors < 12) & (moved.norm(dim=1) < 2)).numpy()
    assert found[50.0][stray].mean() > 0.9
    assert found[-np.inf][stray].mean() < 0.2
    assert (found[50.0][~stray] == found[-np.inf][~stray]).all()
    assert found[50.0][~stray].all()
