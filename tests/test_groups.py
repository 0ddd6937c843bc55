"""Particles of several data sets and micrographs: noise power and contrast are those of their own group."""

import mrcfile
import numpy as np
import pytest
from _particles import blob_map, simulate

from cryodask.run.blocks import ParticlesInMemory, iterate_here
from cryodask.run.inputs import _data_sets
from cryodask.stages import _groups as gr
from cryodask.stages.refine3d import Refine3DParams, refine3d
from cryodask.store.project import Item

BOX, PIXEL, COUNT = 48, 4.0, 240


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """240 particles of 16 micrographs whose contrast is 0.6 to 1.5; those of data set 7 have twice the noise. Refined: the last state."""
    volume = blob_map(BOX, "D2", blobs=20, width_px=1.2)
    images, particles, _, _ = simulate(volume, COUNT, pixel=PIXEL, snr=0.2)
    noise = simulate(volume, COUNT, pixel=PIXEL, snr=0.0)[0]
    micrograph = np.arange(COUNT) // 15
    contrast = np.random.default_rng(5).permutation(np.geomspace(0.6, 1.5, 16))
    second = micrograph % 2 == 1
    images = (images - noise) * contrast[micrograph, None, None] + noise * np.where(second, 2.0, 1.0)[:, None, None]
    particles.columns.update(micrograph=micrograph + 100, data_set=np.where(second, 7, 3))
    start = tmp_path_factory.mktemp("groups") / "start.mrc"
    with mrcfile.new(start) as f:
        f.set_data(volume.numpy())
        f.voxel_size = PIXEL
    params = Refine3DParams(reference=str(start), mask_diameter_angstrom=140.0, symmetry="D2", shift_range_angstrom=12.0, iterations=3)
    states = []
    iterate_here(
        refine3d.functions, params, ParticlesInMemory(particles, images.astype(np.float32)),
        on_iteration=lambda state, metrics, columns: states.append(state),
    )  # fmt: skip
    return states[-1], contrast


@pytest.mark.heavy
def test_each_data_set_has_the_power_of_its_own_noise(mixed):
    state, _ = mixed
    assert list(state["noise_groups"][:, 0]) == [3, 7]
    # beyond the molecule's detail there is noise only, of power 1 and 4
    beyond = state["noise_power"][:, 18:23].mean(1)
    assert np.allclose(beyond, [1.0, 4.0], rtol=0.04)


def test_the_contrast_of_a_micrograph_is_found(mixed):
    state, contrast = mixed
    assert list(state["micrographs"]) == list(range(100, 116))
    error = state["contrast"] / contrast * np.exp(np.log(contrast / state["contrast"]).mean()) - 1.0
    # 15 particles each, at twice the noise in every other micrograph
    assert np.abs(error).max() < 0.15
    assert np.sqrt(np.mean(error**2)) < 0.06


def test_a_micrograph_without_evidence_keeps_a_contrast_of_1():
    found = gr.updated_contrast(np.array([0.0, 300.0, 500.0]), np.array([0.0, 400.0, 400.0]))
    assert found[0] == pytest.approx(1.0, abs=0.03)
    assert found[2] / found[1] == pytest.approx(5 / 3, rel=0.05)
    assert (found * [0.0, 400.0, 400.0]).sum() / 800.0 == pytest.approx(1.0)
    assert list(gr.updated_contrast(np.zeros(2), np.zeros(2))) == [1.0, 1.0]
    assert list(gr.updated_contrast(np.array([-3.0, 5.0]), np.array([40.0, 40.0]))) == [1.0, 1.0]


def test_data_sets_are_told_apart_by_their_first_exposure_and_not_by_their_name():
    class Exposures:  # what of a project is needed
        def __init__(self, names):
            places = [(4, "early"), (1, "late"), (2, "early"), (3, "other")]
            self._items = [
                Item(row, f"m{row}", f"c{row}", {"data_set": names[name], "source": name if name == "other" else ""})
                for row, name in places
            ]

        def items(self):
            return self._items

    for names in ({"early": "a", "late": "b", "other": "a"}, {"early": "z", "late": "y", "other": "z"}):
        assert list(_data_sets(Exposures(names), np.array([1, 2, 3, 4, 4]))) == [1, 2, 3, 2, 2]
