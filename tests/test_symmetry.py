"""Point groups and the symmetrisation of grids."""

import numpy as np
import pytest
import torch

from cryodask.errors import InputError
from cryodask.kernels import half_grid
from cryodask.kernels.symmetry import is_signed_permutation, permute_grid, symmetrise_grid, symmetry_operators

GOLDEN = (1 + np.sqrt(5)) / 2
ORDERS = {"C1": 1, "C3": 3, "C7": 7, "D2": 4, "D3": 6, "D7": 14, "T": 12, "O": 24, "I": 60, "I1": 60, "I2": 60, "I3": 60, "I4": 60}
# axes and folds as `relion_refine --sym G --print_symmetry_ops` of RELION 3.1.3 prints them (PEERS.md, section 5)
AXES = {
    "C3": [((0, 0, 1), 3)],
    "D2": [((0, 0, 1), 2), ((1, 0, 0), 2), ((0, 1, 0), 2)],
    "D3": [((0, 0, 1), 3), ((1, 0, 0), 2)],
    "T": [((0, 0, 1), 3), ((0, np.sqrt(2 / 3), np.sqrt(1 / 3)), 2)],
    "O": [((0, 0, 1), 4), ((1, 0, 0), 4), ((1, 1, 1), 3), ((1, 1, 0), 2)],
    "I1": [((0, 0, 1), 2), ((1, 0, 0), 2), ((GOLDEN, 0, 1), 5), ((0.9341723640, 0.3568220765, 0), 3)],
    "I2": [((0, 0, 1), 2), ((1, 0, 0), 2), ((1, 0, GOLDEN), 5), ((0, 0.3568220765, 0.9341723640), 3)],
    "I3": [((0, 0, 1), 5), ((0.894427, 0, -0.447214), 5)],
    "I4": [((0, 0, 1), 5), ((0.894427, 0, 0.447214), 5)],
}


@pytest.mark.parametrize(("name", "order"), ORDERS.items())
def test_groups_close_with_their_order(name, order):
    g = symmetry_operators(name)
    assert len(g) == order
    assert np.allclose(g @ g.transpose(0, 2, 1), np.eye(3), atol=1e-9)
    assert np.allclose(np.linalg.det(g), 1.0)
    products = np.einsum("aij,bjk->abik", g, g).reshape(-1, 3, 3)
    assert all(np.abs(g - p).max((1, 2)).min() < 1e-6 for p in products[:: max(1, len(products) // 200)])


@pytest.mark.parametrize("name", AXES)
def test_axes_are_relions(name):
    g = symmetry_operators(name)
    for axis, fold in AXES[name]:
        v = np.array(axis) / np.linalg.norm(axis)
        assert (np.linalg.norm(g @ v - v, axis=1) < 1e-4).sum() == fold


@pytest.mark.parametrize("name", ["C0", "X2", "D", "I5", "Th", "", "C-2", "C1 D2"])
def test_unknown_groups_are_refused_by_name(name):
    with pytest.raises(InputError, match="point group"):
        symmetry_operators(name)


def test_names_may_be_written_small():
    assert np.array_equal(symmetry_operators("d2"), symmetry_operators("D2"))


def test_signed_permutations_are_moved_exactly():
    grid = torch.randn(1, 9, 9, 9, generator=torch.Generator().manual_seed(0))
    c = np.arange(9) - 4
    for g in symmetry_operators("O"):
        assert is_signed_permutation(g)
        x, y, z = np.rint(np.einsum("ij,jabc->iabc", g, np.stack(np.meshgrid(c, c, c, indexing="ij")[::-1]))).astype(int) + 4
        assert torch.equal(permute_grid(grid, g)[0], grid[0][torch.from_numpy(z), torch.from_numpy(y), torch.from_numpy(x)])


@pytest.mark.parametrize("name", ["D2", "O"])
def test_symmetrised_grid_is_invariant_to_the_last_bit(name):
    grid = torch.randn(2, 9, 9, 9, generator=torch.Generator().manual_seed(0)).double()
    out = symmetrise_grid(grid, symmetry_operators(name))
    for g in symmetry_operators(name):
        assert torch.allclose(permute_grid(out, g), out, atol=1e-12)


@pytest.mark.parametrize("name", ["C3", "D3", "T", "I"])
def test_other_groups_are_symmetrised_by_interpolation(name):
    c = torch.arange(33).float() - 16
    z, y, x = torch.meshgrid(c, c, c, indexing="ij")
    blob = lambda p: torch.exp(-((x - p[0]) ** 2 + (y - p[1]) ** 2 + (z - p[2]) ** 2) / (2 * 2.5**2))  # noqa: E731
    place = np.array([5.0, 3.0, 8.0])
    operators = symmetry_operators(name)
    want = sum(blob(g @ place) for g in operators)
    got = symmetrise_grid(blob(place)[None], operators)[0]
    inside = x**2 + y**2 + z**2 < 15**2
    error = float((got - want)[inside].norm() / want[inside].norm())
    assert error < 0.06


@pytest.mark.parametrize("name", ["C1", "C2", "C7", "D2", "D3", "T", "I"])
def test_compiled_and_torch_forms_of_half_grids_agree(name, monkeypatch):
    """Folded, weighed and reconstructed: noise within the sphere of a grid of radius 8, equal but for rounding."""
    pytest.importorskip("numba")
    radius, half = 8, half_grid.grid_half(8)
    generator = torch.Generator().manual_seed(3)
    grid = torch.randn(2 * half + 1, 2 * half + 1, half + 1, 3, generator=generator)
    grid[..., 2] = grid[..., 2].abs() + 0.5
    k = torch.arange(-half, half + 1).float()
    grid[k[:, None, None] ** 2 + k[:, None] ** 2 + k[half:] ** 2 > (2 * radius) ** 2] = 0.0

    def computed():
        folded = half_grid.fold_half_grid(grid.clone(), symmetry_operators(name))
        ssnr = torch.linspace(5.0, 0.1, radius + 1)
        map_ = half_grid.reconstruct_half(folded, radius, 20, image_box=20, ssnr=ssnr)
        return map_, half_grid.mean_weight(folded, radius), half_grid.own_ssnr(folded, radius)

    compiled = computed()
    monkeypatch.setattr(half_grid, "compiled", lambda name, device: None)
    for one, other in zip(compiled, computed(), strict=True):
        assert float((one - other).abs().max()) < 1e-4 * float(other.abs().max())
