"""Polar transforms, angular modes, and scores of all in-plane rotations."""

import math

import pytest
import torch
from _particles import blob_map

from cryodask.kernels import polar
from cryodask.kernels import projection as pj
from cryodask.kernels.fourier import soft_sphere
from cryodask.kernels.orientations import in_plane_rotations, random_rotations


def random_images(box, count=4, share=0.38):
    x = torch.randn(count, box, box, generator=torch.Generator().manual_seed(0))
    return x * soft_sphere(box, 1.0, share * box, 0.06 * box, dims=2)


@pytest.mark.parametrize("box", [32, 48, 50, 64, 96, 200])
def test_polar_samples_are_the_exact_transform(box):
    rings = min(box // 2 - 1, 40)
    grid = polar.polar_grid(box, rings)
    images = random_images(box, 2)
    got = polar.polar_transforms(images, grid)
    c = torch.arange(box).double() - box // 2
    some = torch.arange(0, grid.ky.numel(), max(1, grid.ky.numel() // 60))
    ky, kx = grid.ky.reshape(-1)[some].double(), grid.kx.reshape(-1)[some].double()
    turns = -2 * math.pi / box * (ky[:, None, None] * c[:, None] + kx[:, None, None] * c)
    want = torch.einsum("pyx,nyx->np", torch.polar(torch.ones_like(turns), turns), images.to(torch.complex128)) / box
    error = float((got.reshape(2, -1)[:, some] - want).norm() / want.norm())
    assert error < 2e-4


def test_modes_of_half_circles_are_those_of_whole_circles():
    grid = polar.polar_grid(48, 20)
    half = polar.polar_transforms(random_images(48), grid)
    limit = polar.mode_limit(20)
    whole = torch.fft.fft(polar.whole_circle(half))[..., : limit + 1].transpose(-1, -2) / grid.angle_count
    assert torch.allclose(polar.angular_modes(half, limit), whole, atol=1e-6 * float(whole.abs().max()) * 10)
    squared = half.abs() ** 2
    whole = torch.fft.fft(torch.cat([squared, squared], -1))[..., : limit + 1].transpose(-1, -2) / grid.angle_count
    assert torch.allclose(polar.angular_modes_real(squared, limit), whole, atol=1e-5 * float(whole.abs().max()))


def test_images_survive_the_way_to_polar_samples_and_back():
    images = torch.stack([blob_map(40, seed=s).sum(0) for s in (1, 2)])
    grid = polar.polar_grid(40, 18)
    back = polar.polar_to_images(polar.polar_transforms(images, grid), grid)
    for a, b in zip(images, back):
        a, b = a - a.mean(), b - b.mean()
        assert float((a * b).sum() / (a.norm() * b.norm())) > 0.99
        assert 0.95 < float((a * b).sum() / (a * a).sum()) < 1.05


@pytest.mark.parametrize("box", [48, 64])
def test_the_best_rotation_is_the_one_the_image_was_turned_by(box):
    volume = blob_map(box)
    fourier = pj.fourier_volume(volume, box // 2 - 2)
    grid = polar.polar_grid(box, 14)
    a = random_rotations(3, torch.Generator().manual_seed(1))
    psi = torch.deg2rad(torch.tensor([17.0, -100.0, 161.0]))
    flat = lambda k: k.reshape(-1)  # noqa: E731
    limit = polar.mode_limit(14)
    modes = [
        polar.angular_modes(pj.slices(fourier, r, flat(grid.ky), flat(grid.kx)).reshape(3, 14, -1), limit)
        for r in (in_plane_rotations(psi) @ a, a)
    ]
    weight = polar.ring_weights(torch.ones(14))
    count = polar.fast_even(2 * limit + 2)
    scores = polar.rotation_scores((modes[0] * weight)[:, :, None], modes[1].conj().permute(1, 2, 0).contiguous(), count)
    for i in range(3):
        best = -360.0 * int(scores[i, 0, i].argmax()) / count
        assert abs((best - math.degrees(float(psi[i])) + 180) % 360 - 180) < 360.0 / count


def test_scores_equal_the_sum_over_the_half_plane():
    """The polar cross term is the plain sum over Fourier pixels, to a few percent for images of noise."""
    box = 64
    images = random_images(box, 2)
    image, reference = images[:1], images[1:] + images[:1]
    grid = polar.polar_grid(box, 28)
    limit = polar.mode_limit(28)
    modes = [polar.angular_modes(polar.polar_transforms(x, grid), limit) for x in (image, reference)]
    score = polar.rotation_scores(
        (modes[0] * polar.ring_weights(torch.ones(28)))[:, :, None], modes[1].conj().permute(1, 2, 0).contiguous(), 180
    )
    a, b = (pj.image_transforms(x, 28) for x in (image, reference))
    want = 2 * float((a * b.conj()).real.sum())
    assert abs(float(score[0, 0, 0, 0]) / want - 1) < 0.06


@pytest.mark.parametrize("own_views", [False, True])
def test_matrix_products_give_the_scores_of_the_transforms(own_views):
    """Modes, scores and their order are those of short transforms; references may be the same for all images or some for each."""
    rings, limit, shifts, views, count = 9, polar.mode_limit(9), 5, 7, 60
    grid = polar.polar_grid(48, rings)
    g = torch.Generator().manual_seed(0)
    image, reference = (
        torch.complex(torch.randn(shape, generator=g), torch.randn(shape, generator=g))
        for shape in ((2, shifts, *grid.ky.shape), (2, views, *grid.ky.shape))
    )
    order = polar.even_first(limit)
    modes, theirs = polar.half_circle_modes(image, limit), polar.angular_modes(image, limit)
    found = torch.complex(*modes.unbind(1))[order.argsort()].permute(1, 2, 0, 3)
    assert torch.allclose(found, theirs, atol=1e-6)
    squared = image.abs() ** 2
    even = torch.complex(*polar.half_circle_modes_real(squared, limit).unbind(1)).permute(1, 2, 0, 3)
    assert torch.allclose(even, polar.angular_modes_real(squared, limit)[..., ::2, :], atol=1e-5)

    seen = polar.angular_modes(reference, limit).conj()
    table = torch.cat([seen.real, seen.imag], -1)[:, :, order].permute(0, 2, 3, 1)
    if own_views:
        wanted = polar.rotation_scores(theirs.transpose(1, 2), seen.permute(0, 2, 3, 1), count)
    else:
        table = table[0]
        wanted = polar.rotation_scores(theirs.transpose(1, 2), seen[0].permute(1, 2, 0), count)
    scores = polar.angle_scores(polar.mode_products(modes, table), limit, count)
    assert scores.shape == (2, count, shifts, views)
    assert torch.allclose(scores.permute(0, 2, 3, 1), wanted, atol=2e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize(("count", "want"), [(1, 2), (7, 8), (14, 16), (62, 64), (89, 90), (181, 192)])
def test_fast_even_lengths(count, want):
    assert polar.fast_even(count) == want
