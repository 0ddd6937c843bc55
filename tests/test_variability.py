"""Variability at known poses: a moving part is found, its coordinates are the true ones, and noise is said to be noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _states import inputs_of, two_states, write_project

from cryodask.errors import InputError
from cryodask.formats.mrc import read_map
from cryodask.interop import ExportWarning, export
from cryodask.kernels import components as pc
from cryodask.run.blocks import ParticlesInMemory, iterate_here
from cryodask.run.recipe import make_plan
from cryodask.run.session import run_plan
from cryodask.stages._variability import agreement_of_components
from cryodask.stages.variability import LEAST_AGREEMENT, VariabilityParams, draw, says, variability

pytestmark = pytest.mark.heavy

FAST = {"components": 2, "resolution_angstrom": 20.0, "iterations": 4, "mask_diameter_angstrom": 170.0}


def of(some, mask=None, **params):
    given = VariabilityParams(**{**FAST, **params})
    return iterate_here(variability.functions, given, ParticlesInMemory(some.particles, some.images), inputs_of(some, mask=mask))


@pytest.fixture(scope="module")
def some():
    return two_states(500)


@pytest.fixture(scope="module")
def found(some):
    return of(some, some.mask)


def test_the_coordinate_of_the_first_component_tells_the_states_apart(some, found):
    z = found["component1"]
    assert abs(np.corrcoef(z, some.labels)[0, 1]) > 0.9
    assert 0.7 < z.std() < 1.3
    assert abs(np.corrcoef(found["component2"], some.labels)[0, 1]) < 0.3


def test_the_component_is_the_difference_of_the_states(some, found):
    truth = ((some.maps[1] - some.maps[0]).numpy() * some.mask).ravel()
    component = (found["component_map"][0] * some.mask).ravel()
    assert abs(np.corrcoef(truth, component)[0, 1]) > 0.85
    ends = found["component_series"][0, -1] - found["component_series"][0, 0]
    assert np.allclose(ends, 4 * found["component_map"][0], atol=1e-4)


def test_both_half_sets_find_it_and_the_sentence_says_so(found):
    assert found["component_agreement"][0] > 0.7
    assert found["component_agreement"][1] < LEAST_AGREEMENT
    assert says(found).startswith("1 component found by both half-sets")
    assert "1 of 2 are noise" in says(found)


def test_one_state_has_components_of_noise():
    alone = two_states(300, share=0.0)
    result = of(alone, alone.mask, iterations=1)
    assert says(result).startswith("the components are noise")


def test_the_report_shows_series_and_coordinates(found):
    import xarray as xr

    dims = {"component_series": "jkzyx", "component_strength": "j", "component_agreement": "j", "component1": "p", "component2": "p"}
    ds = xr.Dataset({name: (tuple(d), np.asarray(found[name])) for name, d in dims.items()})
    assert [picture.title for picture in draw(ds)] == ["Variability", "Coordinates of the particles"]


def test_a_selection_by_coordinates_is_a_set(some, found, tmp_path, client):
    step = {"variability": {**FAST, "from": {"mask": "import_mask"}}}
    project = run_plan(make_plan(write_project(tmp_path, some, [step, {"select": {"where": "component1 > 0.5"}}])), client)
    chosen = project.particles("select")
    assert np.allclose(project.particles("variability")["component1"].values, found["component1"], atol=0.02)
    assert abs(chosen.sizes["particle"] - int((found["component1"] > 0.5).sum())) < 4
    assert (chosen["component1"].values > 0.5).all()
    # series of maps: the mean map plus a component times coordinates from the 5 % to the 95 % quantile
    with pytest.warns(ExportWarning, match="Component 2 of variability is noise"):
        paths = export(project, "components", tmp_path / "series")
    assert [path.name for path in paths[:2]] == ["variability_component1_01.mrc", "variability_component1_02.mrc"]
    assert len(paths) == 2 * 10 + 1
    ends = [read_map(paths[k]) for k in (0, 9)]
    low, high = np.quantile(found["component1"], [0.05, 0.95])
    assert ends[0][1] == 6.0
    assert np.allclose(ends[1][0] - ends[0][0], (high - low) * found["component_map"][0], atol=0.02)
    middle = found["component_series"][0, 2]
    assert np.allclose(ends[0][0], middle + low * found["component_map"][0], atol=0.02)
    assert paths[-1].read_text().splitlines()[0] == "file,component,coordinate"


def test_few_particles_are_refused(some):
    few = two_states(60)
    with pytest.raises(InputError, match="60 particles are too few for an analysis of variability"):
        of(few)


def test_orthogonal_components_have_coordinates_of_unit_variance():
    """Two maps along one axis with correlated coordinates: variances and directions follow from the covariance."""
    maps = torch.zeros(2, 2, 2, 2)
    maps[0, 0, 0, 0], maps[1, 0, 0, 1] = 1.0, 1.0
    found, strength = pc.orthogonal(maps, torch.tensor([[5.0, 4.0], [4.0, 5.0]]))
    assert np.allclose(strength.numpy(), [3.0, 1.0], atol=1e-6)  # eigenvalues 9 and 1
    assert np.allclose(np.abs(found[0].flatten()[:2].numpy()), 3.0 / np.sqrt(2.0), atol=1e-5)
    assert abs(float((found[0] * found[1]).sum())) < 1e-5


def test_canonical_correlations_of_equal_and_of_random_spaces():
    rng = np.random.default_rng(0)
    maps = rng.normal(size=(2, 12, 12, 12))
    assert np.allclose(agreement_of_components(maps, maps[::-1] * 2.0 + maps), 1.0, atol=1e-6)
    assert agreement_of_components(maps, rng.normal(size=maps.shape)).max() < 0.15
