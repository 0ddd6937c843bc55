"""The molecules of the simulator as sets of atoms, and how strongly these scatter.

The electrostatic potential in a shell of solvent is what a weak phase object shows: scattering factors of the atoms with the
hydrogens bound to them, minus the solvent that they displace (Fraser, MacRae & Suzuki 1978). Phases are in radians, absolute.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import gemmi
import numpy as np
import scipy.fft

from cryodask.kernels.ctf import electron_wavelength_angstrom

POTENTIAL_OF_SCATTERING = 47.877645
"""h^2 / (2 pi m e): the potential in V A^2 of a scattering factor of 1 A."""
BOUND_HYDROGEN = {"C": 1.3, "N": 1.2, "O": 0.35, "S": 0.3}
"""Mean number of hydrogens per heavy atom of a protein."""
_ATOM_VOLUME_A3 = {"C": 16.44, "N": 2.49, "O": 9.13, "S": 19.86}
_HYDROGEN_VOLUME_A3 = 5.15
_WATER_SCATTERING_PER_A3 = 4.53 / POTENTIAL_OF_SCATTERING
"""Mean inner potential of vitreous ice for free atoms (4.53 V at 0.93 g/cm3)."""
_TWO_FOLDS = np.array([[1, 1, 1], [-1, -1, 1], [1, -1, -1], [-1, 1, -1]], float)


MoleculeName = Literal["beta-galactosidase", "clpb"]


@dataclass(frozen=True)
class Molecule:
    """Atoms by element: coordinates `(atom, 3)` as (x, y, z), Angstrom, about the centre of the molecule; its point group."""

    positions: dict[str, np.ndarray]
    symmetry: str = "C1"

    @property
    def diameter_angstrom(self) -> float:
        """Twice the distance of the outermost atom from the centre."""
        return 2.0 * max(float(np.sqrt((p * p).sum(1)).max()) for p in self.positions.values())

    def placed(self, turn: np.ndarray, shift_angstrom: np.ndarray) -> Molecule:
        """The molecule after an orthogonal transform `(3, 3)` about its centre and a shift `(3,)` (x, y, z)."""
        return Molecule({e: p @ turn.T + shift_angstrom for e, p in self.positions.items()}, self.symmetry)


def _stored(name: str) -> dict[str, np.ndarray]:
    with np.load(Path(__file__).parent / "data" / f"{name}.npz") as stored:
        xyz = stored["position_centiangstrom"].astype(float) / 100.0
        element = stored["element"].astype(str)
    return {e: xyz[element == e] for e in sorted(set(element.tolist()))}


@lru_cache(maxsize=1)
def beta_galactosidase() -> Molecule:
    """E. coli beta-galactosidase (PDB 5A1A), a tetramer: the stored protomer and its copies about the two-fold axes x, y and z."""
    return Molecule({e: np.concatenate([xyz * signs for signs in _TWO_FOLDS]) for e, xyz in _stored("betagal_protomer").items()}, "D2")


@lru_cache(maxsize=1)
def clpb() -> Molecule:
    """ClpB with casein (PDB 6RN2): six alike subunits in a spiral, which has no symmetry but looks nearly six-fold."""
    return Molecule(_stored("clpb"))


MOLECULES: dict[MoleculeName, Callable[[], Molecule]] = {"beta-galactosidase": beta_galactosidase, "clpb": clpb}


def interaction_constant(voltage_kv: float) -> float:
    """Phase shift per volt and Angstrom of projected potential, rad / (V A): 0.000653 at 300 kV."""
    rest, volt = 510998.95, 1e3 * voltage_kv
    wavelength = float(electron_wavelength_angstrom(voltage_kv))
    return 2.0 * math.pi / (wavelength * volt) * (rest + volt) / (2.0 * rest + volt)


def scattering_factor(element: str, k: np.ndarray, b_factor_angstrom2: float = 20.0) -> np.ndarray:
    """Scattering of an atom in solvent, Angstrom, at frequencies ``k`` (1/Angstrom).

    Free atoms by the five Gaussians of International Tables C 4.3.2.2, plus bound hydrogen, minus displaced solvent, times
    exp(-B k^2 / 4).
    """
    quarter = 0.25 * np.square(k)

    def free(name: str) -> np.ndarray:
        table = gemmi.Element(name).c4322
        return sum((a * np.exp(-b * quarter) for a, b in zip(table.a, table.b)), np.zeros_like(quarter))

    hydrogens = BOUND_HYDROGEN[element]
    volume = _ATOM_VOLUME_A3[element] + hydrogens * _HYDROGEN_VOLUME_A3
    solvent = _WATER_SCATTERING_PER_A3 * volume * np.exp(-4.0 * math.pi * volume ** (2.0 / 3.0) * quarter)
    return (free(element) + hydrogens * free("H") - solvent) * np.exp(-b_factor_angstrom2 * quarter)


def _splat(points: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Number density on a periodic grid: every point is shared among its 2^d neighbours, float32."""
    base = np.floor(points).astype(np.int64)
    fraction = points - base
    total = np.zeros(int(np.prod(shape)))
    few = len(total) > 64 * len(points)  # then passes over the whole grid would take most of the time
    for corner in np.ndindex(*(2,) * len(shape)):
        place = np.zeros(len(points), np.int64)
        weight = np.ones(len(points))
        for axis, (step, size) in enumerate(zip(corner, shape)):
            place = place * size + (base[:, axis] + step) % size
            weight = weight * (fraction[:, axis] if step else 1.0 - fraction[:, axis])
        if few:
            hit, which = np.unique(place, return_inverse=True)
            total[hit] += np.bincount(which, weight, len(hit))
        else:
            total += np.bincount(place, weight, len(total))
    return total.reshape(shape).astype(np.float32)


def _transform(
    molecule: Molecule, points: dict[str, np.ndarray], shape: tuple[int, ...], pixel_size_angstrom: float, b_factor_angstrom2: float
) -> np.ndarray:
    """Rfftn of the potential / `POTENTIAL_OF_SCATTERING`, in A per pixel^d; ``points`` in pixels of the periodic grid.

    Splatting blurs by the transform of a triangle, which is divided out: exact but for aliasing. Pixels above 1.2 A would alias:
    a finer grid is used and the transform cropped.
    """
    fine = 2 if pixel_size_angstrom > 1.2 else 1
    big = tuple(fine * n for n in shape)
    pixel = pixel_size_angstrom / fine
    cut: list[np.ndarray] = []
    for axis, n in enumerate(shape):
        last = axis == len(shape) - 1
        cut.append(np.arange(n // 2 + 1) if last else np.concatenate([np.arange((n + 1) // 2), np.arange(-(n // 2), 0)]))
    frequency = [(c / (n * pixel_size_angstrom)).astype(np.float32) for c, n in zip(cut, shape)]
    squared = np.zeros((1,) * len(shape), np.float32)
    triangle = np.ones((1,) * len(shape), np.float32)
    for axis, f in enumerate(frequency):
        f = f.reshape([-1 if a == axis else 1 for a in range(len(shape))])
        squared = squared + f * f
        triangle = triangle * np.sinc(f * pixel) ** 2
    k = np.sqrt(squared)
    table_k = np.linspace(0.0, float(k.max()) + 1e-6, 4096)
    out = np.zeros(k.shape, np.complex64)
    for element in molecule.positions:
        spectrum = scipy.fft.rfftn(_splat(points[element] * fine, big))
        curve = scattering_factor(element, table_k, b_factor_angstrom2)
        out += spectrum[np.ix_(*cut)] * np.interp(k, table_k, curve).astype(np.float32)
    out /= triangle
    return out


def phase_transform(
    molecule: Molecule,
    rotations: np.ndarray,
    centres_px: np.ndarray,
    shape: tuple[int, int],
    pixel_size_angstrom: float,
    voltage_kv: float,
    b_factor_angstrom2: float = 20.0,
) -> np.ndarray:
    """Transform (rfft2) of the phase shift, in radians, of copies of a molecule in a thin layer.

    Parameters
    ----------
    rotations : `(particle, 3, 3)`
        Map to image, RELION's convention: the first two rows give x and y of an atom.
    centres_px : `(particle, 2)`
        (y, x) of the centres, pixels.
    shape : (y, x)
        Periodic image.

    Returns
    -------
    ndarray, `(y, x // 2 + 1)` complex64

    Notes
    -----
    The projection is exact for any orientation and sub-pixel position: atoms are projected, never a map.
    """
    points = {}
    for element, xyz in molecule.positions.items():
        projected = np.einsum("pij,aj->pai", rotations[:, 1::-1], xyz) / pixel_size_angstrom  # rows y, x
        points[element] = (projected + centres_px[:, None]).reshape(-1, 2)
    transform = _transform(molecule, points, shape, pixel_size_angstrom, b_factor_angstrom2)
    return transform * np.float32(interaction_constant(voltage_kv) * POTENTIAL_OF_SCATTERING / pixel_size_angstrom**2)


def density_map(molecule: Molecule, box: int, pixel_size_angstrom: float, b_factor_angstrom2: float = 20.0) -> np.ndarray:
    """Potential of the molecule in solvent, volts, `(z, y, x)` float32, its centre at voxel ``box // 2``; the truth of an FSC."""
    points = {e: xyz[:, ::-1] / pixel_size_angstrom + box // 2 for e, xyz in molecule.positions.items()}
    transform = _transform(molecule, points, (box, box, box), pixel_size_angstrom, b_factor_angstrom2)
    # the lone Nyquist planes have no partner of opposite sign
    if box % 2 == 0:
        transform[box // 2] = 0.0
        transform[:, box // 2] = 0.0
        transform[:, :, -1] = 0.0
    density = scipy.fft.irfftn(transform, s=(box, box, box))
    return (density * (POTENTIAL_OF_SCATTERING / pixel_size_angstrom**3)).astype(np.float32)
