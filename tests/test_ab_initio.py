"""First maps: the schedule, the score, and a chain that finds a simulated molecule."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from _particles import blob_map, ctf_columns, simulate

from cryodask.errors import InputError
from cryodask.kernels.ab_initio import Schedule, working_box
from cryodask.kernels.fourier import soft_sphere
from cryodask.kernels.projection import cut_map
from cryodask.kernels.symmetry import permute_grid, symmetry_operators
from cryodask.stage import Context, ParticleBlock, ParticleSet
from cryodask.stages.ab_initio import AbInitioParams, ab_initio

functions = ab_initio.functions


def best_correlation(volume, truth, radius):
    """Over both hands and the axis permutations that a D2 map leaves open; volumes `(z, y, x)`, even box."""
    box = truth.shape[0]
    mask = soft_sphere(box, 1.0, radius, 2.0)[1:, 1:, 1:]
    want = (cut_map(truth, 6)[1:, 1:, 1:] * mask).double()
    best = -1.0
    for hand in (volume, torch.flip(volume, (0, 1, 2)).roll((1, 1, 1), (0, 1, 2))):
        centred = cut_map(hand, 6)[1:, 1:, 1:][None]
        for g in symmetry_operators("O"):
            got = (permute_grid(centred, g)[0] * mask).double()
            best = max(best, float((got * want).sum() / (got.norm() * want.norm())))
    return best


@pytest.mark.heavy
def test_a_tournament_finds_the_molecule_and_knows_it():
    """Of 30 steps, seed 2 finds the molecule (correlation 0.997) and seed 1 does not (0.52); the likelihood tells them apart."""
    pixel = 7.0
    truth = blob_map(32, "D2", blobs=5, seed=11, reach=0.33, width_px=1.6)
    images, particles, _, _ = simulate(truth, 100, pixel=pixel, snr=0.6, shift_px=0.7)
    params = AbInitioParams(
        symmetry="D2", mask_diameter_angstrom=190.0, restarts=2, seed=1, shift_range_angstrom=8.0, steps=30, resolution_angstrom=23.0
    )
    index = functions.select(params, particles)
    block = ParticleBlock(index, images[index], {k: v[index] for k, v in particles.columns.items()}, pixel)
    chains = [functions.chain(params, block, seed, Context()) for seed in functions.seeds(params)]
    right = [best_correlation(torch.from_numpy(c["map"]), truth, 13.0) for c in chains]
    assert sorted(x > 0.9 for x in right) == [False, True]
    result = functions.finish(params, block, chains, Context())
    assert best_correlation(torch.from_numpy(result["final_map"]), truth, 13.0) > 0.9, right
    assert result["chain_score"].shape == (2,)
    assert result["map_pixel_size_angstrom"] == pixel


def test_maps_come_back_at_the_box_of_the_particles():
    small = np.random.default_rng(0).random((32, 32, 32)).astype(np.float32)
    chains = [{"map": small * k, "score": float(k), "trace": np.zeros(3), "seed": k} for k in (1, 3, 2)]
    block = ParticleBlock(np.zeros(0, np.int64), np.zeros((0, 48, 48), np.float32), {}, 3.0)
    result = functions.finish(AbInitioParams(resolution_angstrom=28.0), block, chains, Context())
    assert result["final_map"].shape == (48, 48, 48)
    assert np.isclose(result["final_map"].mean(), 3 * small.mean(), rtol=1e-3)
    assert result["chain_score"].tolist() == [1.0, 3.0, 2.0]


def test_chains_have_seeds_of_their_own_and_use_particles_evenly():
    params = AbInitioParams(restarts=5, particles=100, seed=40)
    assert functions.seeds(params) == [40, 41, 42, 43, 44]
    assert [len(functions.seeds(AbInitioParams(symmetry=g))) for g in ("C1", "C3", "C4", "D2", "O")] == [1, 1, 4, 4, 4]
    chosen = functions.select(params, ParticleSet(1000, 64, 3.0, ctf_columns(1000)))
    assert len(chosen) == 100
    assert set(np.diff(chosen)) <= {10, 11}


def test_too_few_particles_are_refused():
    with pytest.raises(InputError, match="12 particles are too few"):
        functions.select(AbInitioParams(), ParticleSet(12, 64, 3.0, {}))


def test_schedules_grow_to_their_end():
    s = Schedule(steps=50)
    rings = [s.rings(i, 226.0) for i in range(50)]
    assert rings[0] == 5
    assert rings[-1] == 8
    assert all(a <= b for a, b in pairwise(rings))
    assert s.inverse_temperature(20) == 1.0
    assert working_box(226.0, 28.0, 64) == 32
    assert working_box(226.0, 28.0, 24) == 24
