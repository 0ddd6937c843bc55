"""The local search, insertion and half grids: known maps and poses, finite differences, and the two forms of the kernels."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from _particles import blob_map, simulate

from cryodask.kernels import _slices_torch, local_search
from cryodask.kernels import projection as pj
from cryodask.kernels.expectation import ctf_values
from cryodask.kernels.fourier import soft_sphere
from cryodask.kernels.fsc import fsc
from cryodask.kernels.half_grid import empty_half_grid, half_volume, reconstruct_half, resized_half_grid
from cryodask.kernels.orientations import angular_error_deg, random_rotations
from cryodask.kernels.rows import ImageRows, image_rows, independent, shell_counts, shell_power
from cryodask.kernels.symmetry import symmetry_operators

pytestmark = pytest.mark.heavy

BOX, PIXEL, RADIUS = 32, 4.0, 14


@pytest.fixture(scope="module")
def some() -> SimpleNamespace:
    volume = blob_map(BOX)
    images, particles, rotations, origins = simulate(volume, 40, pixel=PIXEL, snr=0.5, shift_px=1.5)
    scale = float(np.sqrt(0.5 / (images.var() - 1.0))) if images.var() > 1 else 1.0
    rows = image_rows(torch.from_numpy(images), particles.columns, RADIUS, PIXEL)
    return SimpleNamespace(
        volume=volume, images=images, columns=particles.columns, rotations=rotations, origins=origins, rows=rows, scale=scale
    )


@pytest.fixture(params=["numba", "torch"])
def kernels(request, monkeypatch) -> str:
    """Which form of the kernels is used."""
    if request.param == "numba":
        pytest.importorskip("numba")
    else:
        monkeypatch.setattr(local_search, "compiled", lambda name, device: None)
    return request.param


def in_rows(plane: pj.HalfPlane) -> tuple[torch.Tensor, torch.Tensor]:
    return plane.ky + plane.radius, plane.kx


def test_rows_are_the_transforms_and_ctf_of_the_images(some):
    plane = pj.half_plane(RADIUS)
    expected = pj.image_transforms(torch.from_numpy(some.images), RADIUS)
    found = some.rows.part(torch.arange(40), RADIUS)[(slice(None), *in_rows(plane))]
    assert float((found - expected).abs().max()) < 1e-3 * float(expected.abs().max())
    contrast = _slices_torch.ctf_at(some.rows.ctf, plane.ky, plane.kx)
    assert torch.allclose(contrast, ctf_values(some.columns, plane.ky, plane.kx, BOX * PIXEL), atol=1e-4)
    smaller = some.rows.part(torch.tensor([3, 5]), 6)
    assert torch.equal(smaller, some.rows.part(torch.arange(40), RADIUS)[[3, 5], RADIUS - 6 : RADIUS + 7, :7])
    power = torch.zeros(RADIUS + 1).double().index_add_(0, plane.shell, expected.abs().square().sum(0).double())
    assert torch.allclose(shell_power(some.rows, RADIUS), power, rtol=2e-3)
    assert torch.equal(shell_counts(RADIUS)[1:], torch.bincount(plane.shell)[1:])
    assert int(independent(RADIUS).sum()) == len(plane.ky)


def rows_of_slices(volume: torch.Tensor, rotations: torch.Tensor, radius: int) -> ImageRows:
    """Rows of noise-free images with a CTF of 1."""
    plane = pj.half_plane(radius)
    values = pj.slices(pj.fourier_volume(volume, radius + 1), rotations, plane.ky, plane.kx)
    parts = torch.zeros(len(rotations), 2 * radius + 1, radius + 1, 2)
    parts[(slice(None), *in_rows(plane))] = torch.view_as_real(values)
    ctf = torch.tensor([[0.0, 0.0, 0.0, 0.0, np.pi / 2, 1.0, 0.0, 0.0]]).double().expand(len(rotations), -1).contiguous()
    scale = torch.full((len(rotations),), float(parts.abs().max()) / 1000.0)
    return ImageRows((parts / scale[0]).half(), scale, ctf, radius, BOX, torch.zeros(len(rotations), dtype=torch.int64))


def test_inserted_slices_give_the_map_back_on_its_scale(kernels):
    volume = pj.cut_map(blob_map(BOX), 12)
    rotations = random_rotations(1200, torch.Generator().manual_seed(0))
    rows = rows_of_slices(volume, rotations, 13)
    grid = local_search.grid_of_poses(
        rows, torch.arange(1200), torch.full((14,), 2.0), rotations, torch.zeros(1200, 2), 13, symmetry_operators("C1")
    )
    back = reconstruct_half(grid, 13, BOX, image_box=BOX)
    mask = soft_sphere(BOX, 1.0, 11.0, 3.0)
    assert float(fsc(back * mask, volume * mask)[1:12].min()) > 0.99
    # zero frequency is never inserted: compare without means
    a, b = back - back.mean(), volume - volume.mean()
    assert abs(float((a * b).sum() / (b * b).sum()) - 1.0) < 0.05


@pytest.mark.parametrize("symmetry", ["D2", "C3"])
def test_the_point_group_fills_in_what_few_views_leave_out(symmetry, kernels):
    operators = symmetry_operators(symmetry)
    volume = pj.cut_map(blob_map(BOX, symmetry), 10)
    rotations = random_rotations(150 if symmetry == "D2" else 60, torch.Generator().manual_seed(0))
    rows = rows_of_slices(volume, rotations, 11)
    mask = soft_sphere(BOX, 1.0, 11.0, 3.0)
    everything = torch.arange(len(rotations))
    curves = []
    for group in (operators[:1], operators):
        grid = local_search.grid_of_poses(rows, everything, torch.ones(12), rotations, torch.zeros(len(rotations), 2), 11, group)
        curves.append(fsc(reconstruct_half(grid, 11, BOX, image_box=BOX) * mask, volume * mask)[8:11].mean())
    assert curves[1] > curves[0]
    assert curves[1] > (0.98 if symmetry == "D2" else 0.95)


def test_shifted_images_are_inserted_where_the_particle_is(some, kernels):
    """A map from many shifted, noisy images correlates with the truth only if their shifts are undone."""
    curves = []
    for origins in (some.origins, torch.zeros_like(some.origins)):
        grid = local_search.grid_of_poses(
            some.rows, torch.arange(40), torch.ones(RADIUS + 1), some.rotations, origins, RADIUS, symmetry_operators("C1")
        )
        curves.append(float(fsc(reconstruct_half(grid, RADIUS, BOX, image_box=BOX), some.volume)[3:8].mean()))
    assert curves[0] > 0.8
    assert curves[0] > curves[1] + 0.1


def test_wiener_filter_shrinks_shells_by_their_signal_to_noise():
    grid = torch.ones_like(empty_half_grid(12))
    grid[..., 1] = 0.0
    plain = reconstruct_half(grid, 12, BOX, image_box=BOX, ssnr=torch.full((13,), 1e9))
    half = reconstruct_half(grid, 12, BOX, image_box=BOX, ssnr=torch.ones(13))
    assert torch.allclose(half, plain / 2, atol=1e-5 * float(plain.abs().max()))


def test_residual_is_the_noise_at_the_true_pose(some, kernels):
    scaled = some.volume * (float(some.images.var() - 1.0) ** 0.5 / float(_clean(some).std()))
    volume = half_volume(scaled, RADIUS + 1, BOX)
    power = local_search.residual_power(some.rows, torch.arange(40), volume, some.rotations, some.origins, RADIUS, RADIUS).mean(0)
    assert torch.allclose(power[2:] / shell_counts(RADIUS)[2:], torch.ones(RADIUS - 1).double(), atol=0.25)
    image = local_search.residual_power(some.rows, torch.arange(40), volume, some.rotations, some.origins, 3, RADIUS).mean(0)
    assert torch.allclose(image[4:] * 40, shell_power(some.rows, RADIUS)[4:], rtol=1e-3)


def _clean(some) -> np.ndarray:
    from _particles import project

    return project(some.volume, some.rotations, some.origins, some.columns, PIXEL)


def test_terms_are_the_derivatives_of_the_likelihood(some):
    """Trilinear slices have kinks, so single differences deviate by some percent; over forty poses they average out."""
    volume = half_volume(some.volume, RADIUS + 1, BOX)
    plane = _slices_torch.plane_within(10, RADIUS, "cpu")
    images = some.rows.part(torch.arange(40), RADIUS).reshape(40, -1)[:, plane.place]
    contrast = _slices_torch.ctf_at(some.rows.ctf, plane.ky, plane.kx)
    weight = torch.ones(len(plane.place))

    def terms(step: torch.Tensor) -> tuple[torch.Tensor, ...]:
        pose = _slices_torch.turned(step[None, :3].expand(40, 3), some.rotations.double())
        return _slices_torch._terms(volume, images, contrast, weight, pose, some.origins.double() + step[3:], BOX, plane)

    slope = terms(torch.zeros(5).double())[2]
    for i in range(5):
        step = torch.zeros(5).double()
        step[i] = 3e-3
        numeric = (terms(step)[0] - terms(-step)[0]) / (2 * 3e-3)
        assert float((2.0 * slope[:, i] - numeric).norm() / numeric.norm()) < 0.1


def test_poses_climb_to_the_truth_and_mates_count_once(kernels):
    """Error predicted by the noise: at the true pose the mean Hessian gives 1.0 degree; start poses are 4 degrees and 1 pixel off."""
    operators = symmetry_operators("D2")
    volume = blob_map(BOX, "D2")
    images, particles, rotations, origins = simulate(volume, 60, pixel=PIXEL, snr=1.0)
    from _particles import project

    clean = project(volume, rotations, origins, particles.columns, PIXEL)
    grey = float(np.sqrt(1.0 / clean.var()))
    rows = image_rows(torch.from_numpy(images), particles.columns, RADIUS, PIXEL)
    g = torch.Generator().manual_seed(5)
    turned = _slices_torch.turned(torch.randn(60, 3, generator=g).double() * np.radians(4.0), rotations.double()).float()
    mate = turned @ torch.tensor(operators[1], dtype=torch.float32)
    starts = torch.stack([turned, mate], 1)
    shifts = (origins + torch.randn(60, 2, generator=g))[:, None].expand(-1, 2, -1).contiguous()
    found = local_search.climb(
        rows, torch.arange(60), half_volume(volume * grey, RADIUS + 1, BOX), torch.ones(RADIUS + 1),
        local_search.Candidates(starts, shifts, torch.full((60,), 2)),
        [local_search.Climb(7, 2, 6), local_search.Climb(RADIUS, 2, 8)], sigma_px=2.0, operators=operators, modes=2,
    )  # fmt: skip
    error = angular_error_deg(found.rotations[:, 0], rotations, operators)
    assert float(error.median()) < 1.5
    assert float((found.shifts_px[:, 0] - origins).norm(dim=1).median()) < 0.2
    assert torch.equal(found.count, torch.ones(60, dtype=torch.int64))
    assert torch.allclose(found.shares[:, 0], torch.ones(60))


def test_both_forms_give_the_same_poses(some, monkeypatch):
    pytest.importorskip("numba")
    volume = half_volume(some.volume, RADIUS + 1, BOX)
    g = torch.Generator().manual_seed(1)
    starts = torch.stack(
        [_slices_torch.turned(torch.randn(40, 3, generator=g).double() * 0.1, some.rotations.double()).float() for _ in range(4)], 1
    )
    shifts = some.origins[:, None].expand(-1, 4, -1).contiguous()
    arguments = (
        some.rows, torch.arange(40), volume, torch.ones(RADIUS + 1), local_search.Candidates(starts, shifts, torch.full((40,), 4)),
        [local_search.Climb(8, 3, 6), local_search.Climb(RADIUS, 2, 8)],
    )  # fmt: skip
    keywords = {"sigma_px": 1.5, "operators": symmetry_operators("C1"), "modes": 2}
    one = local_search.climb(*arguments, **keywords)
    monkeypatch.setattr(local_search, "compiled", lambda name, device: None)
    other = local_search.climb(*arguments, **keywords)
    apart = angular_error_deg(one.rotations[:, 0], other.rotations[:, 0], symmetry_operators("C1"))
    assert float(apart.quantile(0.9)) < 0.1
    assert float((one.total - other.total).abs().median()) < 0.02


def test_poses_are_drawn_with_the_width_and_the_shares_of_their_modes():
    """Two modes with shares of 3 to 1; the covariance of what is drawn about each is the inverse of minus the Hessian."""
    g = torch.Generator().manual_seed(2)
    rotations = random_rotations(2, g).double()
    root = torch.randn(5, 5, generator=g).double()
    hessian = root @ root.T * 400.0 + torch.diag(torch.tensor([900.0, 900.0, 900.0, 4.0, 4.0]).double())
    shifts = torch.tensor([[0.0, 0.0], [50.0, 50.0]])
    modes = local_search.Modes(
        rotations[None].float(), shifts[None], torch.tensor([2]), torch.zeros(1, 2).double(),
        torch.tensor([[np.log(3.0), 0.0]]).double(), torch.linalg.cholesky(hessian).expand(1, 2, 5, 5),
    )  # fmt: skip
    draws = 40_000
    poses, moved = modes.draw(torch.rand(1, draws, 6, generator=g).double())
    first = moved[0, :, 0] < 25.0
    assert abs(float(first.double().mean()) - 0.75) < 0.01
    for mode, own in enumerate((first, ~first)):
        # turned(omega, R) = exp(-[omega]x) R: read omega back from the small rotation between
        small = poses[0, own].double() @ rotations[mode].T
        omega = 0.5 * torch.stack([small[:, 1, 2] - small[:, 2, 1], small[:, 2, 0] - small[:, 0, 2], small[:, 0, 1] - small[:, 1, 0]], 1)
        off = torch.cat([omega, moved[0, own].double() - shifts[mode]], 1)
        scale = torch.linalg.inv(hessian).diagonal().sqrt()
        found = torch.cov((off / scale).T)
        expected = torch.linalg.inv(hessian) / scale[:, None] / scale
        assert float((found - expected).abs().max()) < 0.06


def test_a_grid_keeps_its_slices_when_it_grows_and_shrinks():
    grid = torch.randn(empty_half_grid(6).shape, generator=torch.Generator().manual_seed(0))
    larger = resized_half_grid(grid, 9)
    assert larger.shape == empty_half_grid(9).shape
    assert torch.equal(resized_half_grid(larger, 6), grid)
    assert float(larger.square().sum()) == pytest.approx(float(grid.square().sum()), rel=1e-5)
    assert torch.equal(resized_half_grid(grid, 6), grid)
