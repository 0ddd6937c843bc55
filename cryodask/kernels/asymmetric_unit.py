"""RELION's asymmetric units of viewing directions, and equivalent poses within them.

RELION's local searches sample only directions of its asymmetric unit. A direction elsewhere is found through the symmetry, but its
in-plane angle is not turned with it, so that a pose outside the unit is lost. Units as in ``run_it001_sampling.star`` of RELION 3.1.3.
"""

from __future__ import annotations

import math
import re

import numpy as np
import torch
from torch import Tensor

from cryodask.kernels.orientations import euler_to_matrix, matrix_to_euler
from cryodask.kernels.symmetry import symmetry_operators

_G = (1.0 + math.sqrt(5.0)) / 2.0
_Z = (0.0, 0.0, 1.0)
_EDGE = 1e-9
_CORNERS = {
    "T": (_Z, (0.0, math.sqrt(8.0), -1.0), (-math.sqrt(6.0), math.sqrt(2.0), -1.0)),
    "O": ((1.0, 1.0, 1.0), (-1.0, 1.0, 1.0), _Z),
    "I1": ((-_G, 0.0, -1.0), (-_G, 0.0, 1.0), (-_G * _G, 1.0, 0.0)),
    "I2": ((-1.0, 0.0, _G), (1.0, 0.0, _G), (0.0, 1.0, _G * _G)),
    "I3": ((-2.0, 0.0, 1.0), _Z, (-_G, math.sqrt(_G + 2.0) / _G, _G * _G)),
    "I4": ((-_G, -math.sqrt(_G + 2.0) / _G, 1.0), (-_G, math.sqrt(_G + 2.0) / _G, 1.0), (-_G * _G * 2.0, 0.0, 1.0)),
}
"""Axes at the corners of the spherical triangles, in anticlockwise order seen from outside."""


def unit_normals(name: str) -> np.ndarray:
    """Normals `(plane, 3)` of the planes that bound a unit: a direction d is within if ``normals @ d >= 0``; none for C1.

    Raises
    ------
    InputError
        For a point group that :func:`~cryodask.kernels.symmetry.symmetry_operators` does not know.
    """
    key = name.strip().upper()
    symmetry_operators(key)
    key = "I2" if key == "I" else key
    if key in _CORNERS:
        corners = np.array(_CORNERS[key])
        corners /= np.linalg.norm(corners, axis=1, keepdims=True)
        normals = np.cross(corners, np.roll(corners, -1, axis=0))
        return normals / np.linalg.norm(normals, axis=1, keepdims=True)
    match = re.fullmatch(r"([CD])(\d+)", key)
    assert match is not None
    half, middle = math.pi / int(match[2]), 0.0 if match[1] == "C" else math.pi / 2.0
    planes = (
        []
        if half > 3.0
        else [(-math.sin(middle - half), math.cos(middle - half), 0.0), (math.sin(middle + half), -math.cos(middle + half), 0.0)]
    )
    return np.array([*planes, *([_Z] if match[1] == "D" else [])]).reshape(-1, 3)


def into_unit(rot_deg: np.ndarray, tilt_deg: np.ndarray, psi_deg: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Equivalent poses whose views lie in RELION's asymmetric unit; shifts do not change.

    Parameters
    ----------
    rot_deg, tilt_deg, psi_deg : `(particle,)`, degrees
    name : str
        Point group of the map.

    Returns
    -------
    tuple of ndarray, `(particle,)` float64
        Poses that are within already are returned as they are. NaN stays NaN.
    """
    given = (np.array(rot_deg, np.float64), np.array(tilt_deg, np.float64), np.array(psi_deg, np.float64))
    normals = torch.from_numpy(unit_normals(name))
    if not len(normals):
        return given
    poses = euler_to_matrix(*(torch.deg2rad(torch.from_numpy(a)) for a in given))
    best, depth = poses, _depth(poses, normals)
    outside = depth < -_EDGE
    depth = torch.where(outside, depth, torch.inf)
    for g in symmetry_operators(name)[1:]:
        mate = poses @ torch.from_numpy(np.array(g))
        deeper = _depth(mate, normals)
        better = deeper > depth
        best, depth = torch.where(better[:, None, None], mate, best), torch.where(better, deeper, depth)
    found = tuple(torch.rad2deg(a).numpy() for a in matrix_to_euler(best))
    rot, tilt, psi = (np.where(outside.numpy(), new, old) for new, old in zip(found, given))
    return rot, tilt, psi


def _depth(poses: Tensor, normals: Tensor) -> Tensor:
    """How deep within the unit the views of poses lie, `(n,)`: the least signed distance from its planes."""
    return (poses[:, 2] @ normals.T).amin(1)
