"""Resolution against particle number: the line, the subsets, and the B-factor of a molecule whose own is known."""

from __future__ import annotations

import numpy as np
import pytest
from _particles import blob_map, simulate
from _states import posed

from cryodask.errors import InputError
from cryodask.kernels.particle_number import fit_particle_number
from cryodask.run.blocks import ParticlesInMemory, iterate_here
from cryodask.stages._reslog import smallest_subsets
from cryodask.stages.reslog import ReslogParams, draw, reslog, says

PIXEL, BOX, WIDTH_PX = 3.0, 48, 1.3
# a Gaussian of standard deviation s has a B-factor of 8 pi^2 s^2
TRUE_B = 8 * np.pi**2 * (WIDTH_PX * PIXEL) ** 2


def test_the_line_gives_the_b_factor_it_was_made_of():
    count = np.array([6400, 3200, 1600, 800, 400])
    d = (0.01 + 2 / 300.0 * np.log(count / 400)) ** -0.5
    fit = fit_particle_number(count, d, 3.0)
    assert fit.b_factor_angstrom2 == pytest.approx(300.0)
    assert fit.resolution_angstrom(400) == pytest.approx(10.0)
    # those at Nyquist and without a resolution take no part
    limited = np.concatenate([[d[0]], d, [np.nan]])
    again = fit_particle_number(np.concatenate([[12800], count, [200]]), limited, d[0] / 1.01)
    assert again.fitted.tolist() == [False, False, True, True, True, True, False]
    assert again.b_factor_angstrom2 == pytest.approx(300.0)
    assert np.isnan(fit_particle_number(count[:2], d[:2], 3.0).b_factor_angstrom2)
    assert np.isnan(fit_particle_number(count, d[::-1], 3.0).b_factor_angstrom2)


def test_subsets_are_nested_halves_of_each_half_set():
    half = np.arange(1001) % 2
    level = smallest_subsets(half, 3)
    for subset in range(6):
        for h in (0, 1):
            assert abs(((level >= subset) & (half == h)).sum() - (half == h).sum() / 2**subset) <= 1
    assert (smallest_subsets(half, 4) != level).any()


@pytest.fixture(scope="module")
def found():
    volume = blob_map(BOX, blobs=60, reach=0.3, width_px=WIDTH_PX)
    images, particles, rotations, origins = simulate(volume, 3200, pixel=PIXEL, snr=0.02, seed=1)
    particles = posed(particles, rotations, origins.numpy())
    inputs = {"final_map": volume.numpy(), "map_pixel_size_angstrom": PIXEL}
    return iterate_here(reslog.functions, ReslogParams(), ParticlesInMemory(particles, images), inputs), particles, images


@pytest.mark.heavy
def test_the_b_factor_is_that_of_the_molecule(found):
    result = found[0]
    assert result["subset_count"].tolist() == [3200, 1600, 800, 400, 200, 100]
    resolution = result["subset_resolution_angstrom"]
    assert (np.diff(resolution[np.isfinite(resolution)]) > 0).all()
    # 1100 to 1200 over seeds. 7 % less than the truth is what N growing as exp(B / 2 d^2) / d does to a line over ln N
    assert result["reslog_b_factor_angstrom2"] == pytest.approx(TRUE_B, rel=0.2)
    assert says(result).startswith("B-factor ")


@pytest.mark.heavy
def test_poses_of_another_molecule_and_too_few_particles_are_refused(found):
    _, particles, images = found
    other = {"final_map": blob_map(BOX, blobs=60, reach=0.3, width_px=WIDTH_PX, seed=9).numpy(), "map_pixel_size_angstrom": PIXEL}
    with pytest.raises(InputError, match="do not reproduce the input map"):
        iterate_here(reslog.functions, ReslogParams(fewest=800), ParticlesInMemory(particles, images), other)
    with pytest.raises(InputError, match="too few for a plot of resolution"):
        iterate_here(reslog.functions, ReslogParams(fewest=900), ParticlesInMemory(particles, images), other)


@pytest.mark.heavy
def test_the_report_shows_the_line_and_the_curves(found):
    import xarray as xr

    dims = {"subset_count": "s", "subset_resolution_angstrom": "s", "subset_fsc": "sk"}
    ds = xr.Dataset({name: (tuple(dims.get(name, "")), np.asarray(value)) for name, value in found[0].items()})
    (picture,) = draw(ds)
    assert picture.caption.startswith("B-factor")
    assert len(picture.figure.axes) == 2
