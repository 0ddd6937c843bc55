"""Initial maps of a mixture: classes get equal totals, two molecules are told apart, and what cannot work is refused."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from _particles import blob_map, simulate
from _states import two_states

from cryodask.errors import InputError
from cryodask.kernels.ab_initio_classes import balanced
from cryodask.stage import Context, ParticleBlock, ParticleSet
from cryodask.stages.ab_initio import AbInitioParams, ab_initio, outputs


def test_every_class_gets_its_share_and_the_order_of_particles_is_kept():
    logits = torch.randn(200, 3, generator=torch.Generator().manual_seed(0)) + torch.tensor([5.0, 0.0, -3.0])
    posterior = balanced(logits)
    assert torch.allclose(posterior.mean(0), torch.full((3,), 1 / 3), atol=0.01)
    assert torch.allclose(posterior.sum(1), torch.ones(200), atol=1e-5)
    # a bias per class changes no order between particles
    assert torch.equal((posterior[:, 0] / posterior[:, 1]).argsort(), (logits[:, 0] - logits[:, 1]).argsort())


@pytest.fixture(scope="module")
def mixture() -> SimpleNamespace:
    """A compact molecule and a ring of six blobs."""
    body = blob_map(32, blobs=6, reach=0.12, width_px=3.0)
    ring = blob_map(32, "C6", blobs=1, seed=4, reach=0.4, width_px=2.0)
    ring *= float(body.norm() / ring.norm())
    made = [simulate(volume, 150, pixel=7.0, snr=1.0, shift_px=0.5, seed=k) for k, volume in enumerate((body, ring))]
    columns = {name: np.concatenate([m[1].columns[name] for m in made]) for name in made[0][1].columns}
    return SimpleNamespace(
        images=np.concatenate([m[0] for m in made]), particles=ParticleSet(300, 32, 7.0, columns), labels=np.repeat([0, 1], 150)
    )


@pytest.mark.heavy
def test_two_molecules_are_told_apart_from_nothing(mixture):
    params = AbInitioParams(classes=2, steps=14, restarts=1, mask_diameter_angstrom=200)
    index = ab_initio.functions.select(params, mixture.particles)
    assert len(index) == 300
    block = ParticleBlock(index, mixture.images, mixture.particles.columns, 7.0)
    chains = [ab_initio.functions.chain(params, block, seed, Context()) for seed in ab_initio.functions.seeds(params)]
    result = ab_initio.functions.finish(params, block, chains, Context())
    number = result["class3d_number"] - 1
    assert sum(np.bincount(mixture.labels[number == k], minlength=2).max() for k in (0, 1)) / 300 > 0.9
    assert result["class_map"].shape == (2, 32, 32, 32)
    assert result["class3d_share"][0] >= result["class3d_share"][1]
    assert np.allclose(result["iteration_class_share"].sum(1), 1.0, atol=1e-4)


def test_classes_are_outputs_of_their_own():
    names = [(o.name, o.type) for o in outputs(AbInitioParams(classes=2))]
    assert names == [("particles", "particles"), ("class1", "particles"), ("class1", "map"), ("class2", "particles"), ("class2", "map")]
    assert [(o.name, o.type) for o in outputs(AbInitioParams())] == [("map", "map")]


def test_more_maps_than_particles_allow_are_refused():
    with pytest.raises(InputError, match="100 particles are too few for 4 initial maps"):
        ab_initio.functions.select(AbInitioParams(classes=4), two_states(100).particles)
