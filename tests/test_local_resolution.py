"""Local resolution of maps whose noise is known, and measures of orientation bias of known views."""

import numpy as np
import pytest
import torch
import xarray as xr
from _particles import blob_map

from cryodask.errors import InputError
from cryodask.kernels import local_resolution as lr
from cryodask.kernels.fourier import soft_sphere
from cryodask.kernels.fsc import half_radius
from cryodask.kernels.orientations import euler_to_matrix, random_rotations
from cryodask.stages._map_pictures import surface_seen, without_specks
from cryodask.stages.local_resolution import LocalResolutionParams, local_resolution
from cryodask.stages.orientation import OrientationParams, orientation, warnings
from cryodask.vocabulary import VARIABLES

BOX, VOXEL = 48, 2.5


@pytest.fixture(scope="module")
def halves():
    """White signal, lost beyond 12 A in one half of the box and beyond 7 A in the other, in weak noise."""
    generator = torch.Generator().manual_seed(0)
    signal, *noise = (torch.randn(BOX, BOX, BOX, generator=generator) for _ in range(3))
    radius, spectrum = half_radius(BOX), torch.fft.rfftn(signal)
    fine, coarse = (torch.fft.irfftn(spectrum * (radius < BOX * VOXEL / d), s=signal.shape) for d in (7.0, 12.0))
    left, inside = (torch.arange(BOX) < BOX // 2)[:, None, None], soft_sphere(BOX, VOXEL, 45.0, 8.0)
    return [torch.where(left, fine, coarse) * inside + 0.3 * n for n in noise]


def test_each_part_of_a_map_has_its_own_resolution(halves):
    resolution, filtered = lr.local_resolution(*halves, VOXEL, window_angstrom=15.0)
    middle = slice(18, 30)
    fine, coarse = resolution[10:15, middle, middle].median(), resolution[33:38, middle, middle].median()
    assert fine == pytest.approx(7.0, abs=0.7)
    # bands are two shells wide, so a sharp cut at 12 A looks a little finer
    assert coarse == pytest.approx(11.0, abs=1.5)
    mean = 0.5 * (halves[0] + halves[1])
    beyond = half_radius(BOX) > BOX * VOXEL / 8.5
    high, before = (torch.fft.irfftn(torch.fft.rfftn(v) * beyond, s=mean.shape) for v in (filtered, mean))
    assert high[33:38, middle, middle].std() < 0.3 * before[33:38, middle, middle].std()
    assert torch.corrcoef(torch.stack([high[9:16, middle, middle].flatten(), before[9:16, middle, middle].flatten()]))[0, 1] > 0.8


def test_stage_reports_percentiles_and_refuses_an_empty_mask(halves):
    stack = torch.stack(halves).numpy()
    given = {"half_map": stack, "map_pixel_size_angstrom": VOXEL}
    result = local_resolution.process(LocalResolutionParams(sharpen=True), solvent_mask=np.ones((BOX,) * 3, np.float32), **given)
    assert (np.diff(result["local_resolution_percentile"]) >= 0).all()
    assert np.isfinite(result["sharpened_map"]).all()
    with pytest.raises(InputError, match="mask is empty"):
        local_resolution.process(LocalResolutionParams(), solvent_mask=np.zeros((BOX,) * 3, np.float32), **given)


def test_local_sharpening_brings_a_map_graded_in_b_factor_to_one_level():
    """White signal with B factors of 50 and 350 A^2 in the two halves of the box: at 8 A amplitudes differ by exp(300 / 4 / 64) = 3.2."""
    spectrum, square = torch.fft.rfftn(torch.randn(BOX, BOX, BOX, generator=torch.Generator().manual_seed(5))), half_radius(BOX) ** 2
    sharp, blunt = (torch.fft.irfftn(spectrum * torch.exp(-b / 4 * square / (BOX * VOXEL) ** 2), s=(BOX,) * 3) for b in (50.0, 350.0))
    graded = torch.where((torch.arange(BOX) < BOX // 2)[:, None, None], sharp, blunt)
    even = lr.locally_sharpened(graded, VOXEL, torch.ones(BOX, BOX, BOX), 15.0)

    def ratio(volume, d):
        near = (half_radius(BOX) - BOX * VOXEL / d).abs() < 1.5
        band = torch.fft.irfftn(torch.fft.rfftn(volume) * near, s=volume.shape)
        return float(band[7:17].std() / band[31:41].std())

    assert ratio(graded, 8.0) > 2.4  # less than 3.2, because a band leaks across the boundary
    for d in (8.0, 10.0, 15.0):
        assert ratio(even, d) == pytest.approx(1.0, abs=0.2)


def test_the_surface_shows_the_hand_of_the_map_and_the_resolution_of_what_is_seen():
    """Four blobs: seen along z the upper ones cover the lower ones, and those at large x are right."""
    z, y, x = np.indices((BOX,) * 3)
    volume = np.zeros((BOX,) * 3, np.float32)
    for place, radius in (((35, 24, 24), 4), ((12, 24, 24), 9), ((24, 24, 40), 4)):
        volume += np.sqrt((z - place[0]) ** 2 + (y - place[1]) ** 2 + (x - place[2]) ** 2) < radius
    for axis, (near, side) in {0: (35 + 3, 24 + 3), 1: (24 - 3, 24 - 3)}.items():
        brightness, place = surface_seen(volume, axis)
        row = 24 if axis == 0 else 35
        assert place[row, 24] == near
        assert place[24, 40] == side
        assert place[2, 2] == -1
        assert brightness[2, 2] == 0.0
        assert brightness[row, 24] > 0.5
    # along x the blob at x = 40 is in front of those at 24
    assert surface_seen(volume, 2)[1][24, 24] == 40 + 3
    assert set(np.unique(without_specks(volume))) == {0.0, 1.0}
    assert without_specks(volume)[24, 24, 40] == 0.0


def test_the_report_colours_surface_and_sections(halves):
    stack = torch.stack(halves).numpy()
    result = local_resolution.process(
        LocalResolutionParams(), half_map=stack, map_pixel_size_angstrom=VOXEL, solvent_mask=np.ones((BOX,) * 3)
    )
    ds = xr.Dataset({name: (VARIABLES[name].dims, np.asarray(value)) for name, value in result.items()})
    (picture,) = local_resolution.draw(ds)
    picture.figure.canvas.draw()
    assert picture.figure.axes[-1].get_ylabel() == "local resolution, Å"
    low, high = sorted(picture.figure.axes[-1].get_ylim())
    assert (low, high) == pytest.approx(tuple(result["local_resolution_percentile"][[0, -1]]))


def test_sampling_of_uniform_side_and_top_views_is_ordered():
    rng = np.random.default_rng(0)

    def views(tilt):
        turns = (torch.from_numpy(rng.uniform(-np.pi, np.pi, len(tilt))) for _ in range(2))
        rot, psi = turns
        return euler_to_matrix(rot, torch.from_numpy(tilt), psi).numpy()

    uniform = random_rotations(1500, torch.Generator().manual_seed(1)).numpy()
    top = views(np.arccos(rng.uniform(np.cos(np.radians(25)), 1.0, 1500)))
    side = views(np.radians(90.0 + 10.0 * rng.standard_normal(1500)))
    mixed = np.concatenate([top[:1050], uniform[:450]])
    found = [lr.sampling(one) for one in (uniform, side, mixed, top)]
    assert [even for even, _ in found] == sorted((even for even, _ in found), reverse=True)
    assert found[0][0] > 0.95
    assert found[3][0] < 0.2
    assert found[3][1] > 0.4
    assert found[0][1] == 0.0


def test_a_cone_without_signal_is_found_and_said():
    """Noise fills a wedge of 45 degrees about z; elsewhere the half-maps agree."""
    volume = blob_map(BOX, blobs=60, width_px=0.8, reach=0.25)
    k = torch.fft.fftfreq(BOX, 1.0 / BOX)
    z, y, x = torch.meshgrid(k, k, torch.arange(BOX // 2 + 1).float(), indexing="ij")
    keep = z.abs() < np.cos(np.radians(45)) * torch.sqrt(x * x + y * y + z * z).clamp(min=1e-6)
    generator = torch.Generator().manual_seed(3)
    signal = torch.fft.irfftn(torch.fft.rfftn(volume) * keep, s=volume.shape)
    stack = np.stack([(signal + 0.05 * volume.std() * torch.randn(BOX, BOX, BOX, generator=generator)).numpy() for _ in range(2)])
    result = orientation.process(OrientationParams(mask_diameter_angstrom=2000.0), half_map=stack, map_pixel_size_angstrom=VOXEL)
    worst = result["cone_axis"][result["cone_fsc"][:, 5:15].mean(1).argmin()]
    assert abs(worst[2]) > 0.9
    assert result["cone_area_ratio"] < 0.5
    assert warnings(result) == [f"half-maps agree far less in some directions ({result['cone_area_ratio']:.2f})"]
