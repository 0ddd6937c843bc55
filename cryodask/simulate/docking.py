"""Where a molecule lies in a refined map, from the poses that its particles were given and their true ones.

A map that was refined without a reference has a frame and a hand of its own. With true poses B and found ones A, the rotation R = A^T B is
the same for all particles whose pose is right, provided that the hand is right, too. The mirror image of a map, z to -z, explains the
same images with the poses M A M, M = diag(1, 1, -1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cryodask.kernels.symmetry import symmetry_operators

NEAR_DEG = 12.0
"""Poses within this angle of the common rotation count as right."""
_CANDIDATES, _ROUNDS = 600, 4
_MIRROR = torch.diag(torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64))


@dataclass(frozen=True)
class Docking:
    """A place in a map: a molecule's point p lies at H R p + t, H the mirror M if ``mirrored``.

    ``rotation`` is R `(3, 3)`, ``shift_angstrom`` t `(3,)` (x, y, z), and ``degrees`` `(particle,)` are the errors of the found poses.
    """

    rotation: Tensor
    shift_angstrom: Tensor
    mirrored: bool
    degrees: np.ndarray

    @property
    def turn(self) -> np.ndarray:
        """H R `(3, 3)`."""
        return (_MIRROR @ self.rotation if self.mirrored else self.rotation).numpy()

    def poses(self, true: Tensor) -> tuple[Tensor, Tensor]:
        """True poses `(n, 3, 3)` as poses of the map, and where they place its centre: `(n, 2)` (y, x), Angstrom, from the true one."""
        turned = true.double() @ self.rotation.T
        turned = _MIRROR @ turned @ _MIRROR if self.mirrored else turned
        return turned, -(turned @ self.shift_angstrom)[:, [1, 0]]


def dock(found: Tensor, true: Tensor, displacement_angstrom: np.ndarray, symmetry: str) -> Docking:
    """Place a molecule in a map of either hand.

    Parameters
    ----------
    found, true : Tensor, `(particle, 3, 3)`
        Poses of the same particles, map to image.
    displacement_angstrom : array, `(particle, 2)`
        (y, x) from where a particle was found to where it is.
    symmetry : str
        Point group of the map, about its own axes.
    """
    operators = torch.from_numpy(np.array(symmetry_operators(symmetry)))
    hands = [_common(_MIRROR @ found.double() @ _MIRROR if mirrored else found.double(), true, operators) for mirrored in (False, True)]
    near = [int((degrees < NEAR_DEG).sum()) for _, degrees in hands]
    mirrored = near[1] > near[0]
    rotation, degrees = hands[mirrored]
    right = torch.from_numpy(np.nonzero(degrees < NEAR_DEG)[0])
    equations = found.double()[right][:, [1, 0]].reshape(-1, 3)
    shift = torch.linalg.lstsq(equations, torch.from_numpy(np.asarray(displacement_angstrom, float))[right].reshape(-1, 1)).solution
    return Docking(rotation, shift[:, 0], mirrored, degrees)


def _common(found: Tensor, true: Tensor, operators: Tensor) -> tuple[Tensor, np.ndarray]:
    """The rotation that most particles share, and how far each is from it, degrees."""
    relative = found.mT @ true.double()
    mates = torch.stack([g.T @ relative for g in operators])
    some = torch.randperm(len(relative), generator=torch.Generator().manual_seed(0))[:_CANDIDATES]
    limit = math.cos(math.radians(NEAR_DEG))
    rotation = relative[some][int((_cosines(relative[some], mates) > limit).sum(1).argmax())]
    for _ in range(_ROUNDS):
        cosines = (torch.einsum("ij,gnij->gn", rotation, mates) - 1.0) / 2.0
        cosine, mate = cosines.max(0)
        u, _, v = torch.linalg.svd(mates[mate, torch.arange(len(relative))][cosine > limit].sum(0))
        rotation = u @ torch.diag(torch.tensor([1.0, 1.0, float(torch.det(u @ v))], dtype=torch.float64)) @ v
    return rotation, np.degrees(np.arccos(_cosines(rotation[None], mates)[0].clamp(-1.0, 1.0).numpy()))


def _cosines(rotations: Tensor, mates: Tensor) -> Tensor:
    """Cosine `(c, n)` of the angle from rotations `(c, 3, 3)` to the nearest of each particle's `(g, n, 3, 3)`."""
    traces = [rotations.reshape(-1, 9) @ some.reshape(-1, 9).T for some in mates]
    return (torch.stack(traces).amax(0) - 1.0) / 2.0
