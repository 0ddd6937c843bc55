"""Point groups in RELION's setting, as rotation operators, and the symmetrisation of Fourier grids.

Axes as ``relion_refine --sym G --print_symmetry_ops`` of RELION 3.1.3 shows them: Cn about z; Dn with a two-fold on x; T with a
three-fold on z; O with four-folds on x, y, z; I1 and I2 (= I) with two-folds on x, y, z and a five-fold in the xz plane nearer to x or
to z; I3 and I4 with a five-fold on z. The operators are generated here from their axes.
"""

from __future__ import annotations

import math
import re
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from cryodask.errors import InputError

_GOLDEN = (1.0 + math.sqrt(5.0)) / 2.0
_Z = (0.0, 0.0, 1.0)
_TALL = {
    "T": [(3, _Z), (2, (0.0, math.sqrt(2.0 / 3.0), math.sqrt(1.0 / 3.0)))],
    "O": [(4, _Z), (3, (1.0, 1.0, 1.0))],
    "I1": [(2, _Z), (5, (_GOLDEN, 0.0, 1.0))],
    "I2": [(2, _Z), (5, (1.0, 0.0, _GOLDEN))],
    "I3": [(5, _Z), (5, (-2.0, 0.0, 1.0))],
    "I4": [(5, _Z), (5, (2.0, 0.0, 1.0))],
}


def rotation_about(axis: tuple[float, float, float], angle_rad: float) -> np.ndarray:
    """Matrix `(3, 3)` that rotates vectors (x, y, z) about ``axis`` (Rodrigues)."""
    x, y, z = np.asarray(axis, float) / np.linalg.norm(axis)
    cross = np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
    return np.eye(3) + math.sin(angle_rad) * cross + (1.0 - math.cos(angle_rad)) * cross @ cross


@lru_cache(maxsize=32)
def symmetry_operators(name: str) -> np.ndarray:
    """All rotations of a point group, `(operator, 3, 3)` float64, the identity first.

    Parameters
    ----------
    name : str
        C1, C2 ..., D2 ..., T, O, I (= I2), I1, I2, I3 or I4; upper or lower case.

    Raises
    ------
    InputError
        For any other name.
    """
    key = name.strip().upper()
    match = re.fullmatch(r"([CD])([1-9]\d{0,2})", key)
    if match:
        fold = int(match[2])
        generators = [rotation_about(_Z, 2.0 * math.pi / fold)]
        if match[1] == "D":
            generators.append(rotation_about((1.0, 0.0, 0.0), math.pi))
    elif key in _TALL or key == "I":
        generators = [rotation_about(axis, 2.0 * math.pi / n) for n, axis in _TALL["I2" if key == "I" else key]]
    else:
        raise InputError(
            f"{name!r} is not a supported point group",
            "it is a group with mirrors (which proteins do not have) or a helical group",
            "use Cn, Dn (n from 1), T, O, I, I1, I2, I3 or I4, as RELION names them",
        )
    return _closure(generators)


def _closure(generators: list[np.ndarray]) -> np.ndarray:
    found = [np.eye(3)]
    for known in found:  # grows while it is walked: every element is multiplied with every generator once
        for generator in generators:
            product = known @ generator
            if min(np.abs(product - other).max() for other in found) > 1e-6:
                found.append(product)
    out = np.array(found)
    out[np.abs(out) < 1e-12] = 0.0
    out.setflags(write=False)
    return out


def is_signed_permutation(operator: np.ndarray) -> bool:
    """Whether an operator maps a cubic grid onto itself."""
    return bool(np.allclose(np.abs(operator), np.rint(np.abs(operator)), atol=1e-6))


def symmetrise_grid(grid: Tensor, operators: np.ndarray) -> Tensor:
    """Sum over the group of a function on an odd cubic grid: ``out(k) = sum_g grid(g k)``.

    Signed permutations are exact (flips and transpositions); the others are one trilinear interpolation for each coset of the
    subgroup of signed permutations.

    Parameters
    ----------
    grid : Tensor, `(channel, z, y, x)`, float32
        Origin at the middle of the odd axes. Points that an operator takes out of the grid count as zero.
    operators : `(operator, 3, 3)`
        A whole group, acting on (x, y, z).
    """
    exact = [g for g in operators if is_signed_permutation(g)]
    folded = torch.zeros_like(grid)
    for g in coset_representatives(operators, exact):
        folded += permute_grid(grid, g) if is_signed_permutation(g) else _rotate_grid(grid, g)
    out = torch.zeros_like(grid)
    for g in exact:
        out += permute_grid(folded, g)
    return out


def coset_representatives(operators: np.ndarray, subgroup: list[np.ndarray]) -> list[np.ndarray]:
    """One g of each left coset g H."""
    left = list(operators)
    chosen = []
    while left:
        first = left[0]
        chosen.append(first)
        coset = [first @ h for h in subgroup]
        left = [g for g in left if min(np.abs(g - c).max() for c in coset) > 1e-6]
    return chosen


def permute_grid(grid: Tensor, operator: np.ndarray) -> Tensor:
    """``out(k) = grid(g k)`` for a signed permutation g of (x, y, z); `(channel, z, y, x)`."""
    signs = np.rint(operator).astype(int)
    axes, flips = [0, 0, 0, 0], []
    for i in range(3):  # component i of g k is sign * k[j]
        j = int(np.abs(signs[i]).argmax())
        axes[3 - j] = 3 - i
        if signs[i, j] < 0:
            flips.append(3 - j)
    out = grid.permute(axes)
    return torch.flip(out, flips) if flips else out


def _rotate_grid(grid: Tensor, operator: np.ndarray) -> Tensor:
    """``out(k) = grid(g k)``, trilinear, zero outside."""
    matrix = torch.zeros(1, 3, 4, dtype=grid.dtype, device=grid.device)
    matrix[0, :, :3] = torch.tensor(operator, dtype=grid.dtype)
    points = torch.nn.functional.affine_grid(matrix, [1, 1, *grid.shape[1:]], align_corners=True)
    return torch.nn.functional.grid_sample(grid[None], points, mode="bilinear", padding_mode="zeros", align_corners=True)[0]
