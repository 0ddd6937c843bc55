"""The prior on motion and its consequences: a Gaussian process in position and exposure.

Velocity at two exposures t, t' covaries as v(t) v(t') exp(-|t - t'| / tau), v decaying from an early burst; at two places as
exp(-r / s) (the form of Zivanov, Nakane & Scheres 2019, IUCrJ 6, 5-17). All its constants are chosen for each movie by marginal
likelihood, including "no motion", so a movie without information on local motion gets none. Everything is small: numpy, float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

BURST_EXPOSURE = 3.0
"""Exposure in which the early burst decays, e/A^2."""


def velocity_covariance(exposure: np.ndarray, tau: float, burst: float) -> np.ndarray:
    """Covariance `(frame, frame)` of the displacement, A^2, for a velocity of 1 A per e/A^2; ``exposure`` `(frame,)` at mid-frame."""
    steps = np.gradient(exposure) if len(exposure) > 1 else np.ones(1)
    speed = steps * (1.0 + burst * np.exp(-(exposure - exposure[0]) / BURST_EXPOSURE))
    velocity = speed[:, None] * speed[None] * np.exp(-np.abs(exposure[:, None] - exposure[None]) / tau)
    path = np.tril(np.ones((len(exposure),) * 2)) - 0.5 * np.eye(len(exposure))
    return path @ velocity @ path.T


def drift_priors(exposure: np.ndarray) -> list[np.ndarray]:
    """Covariances for the motion of the whole frame: velocity and, frame by frame, jitter."""
    out = []
    for tau, burst in product((3.0, 15.0), (0.0, 4.0)):
        smooth = velocity_covariance(exposure, tau, burst)
        for speed, jitter in product((0.03, 0.1, 0.3, 1.0, 3.0), (0.0, 0.05, 0.1, 0.2, 0.5, 2.0)):
            out.append(speed**2 * smooth + jitter**2 * np.eye(len(exposure)))
    return out


def local_priors(exposure: np.ndarray) -> list[np.ndarray]:
    """Covariances for local motion; the weakest stands for none."""
    out: list[np.ndarray] = []
    for tau, burst in product((3.0, 8.0, 25.0), (0.0, 2.0, 6.0)):
        smooth = velocity_covariance(exposure, tau, burst)
        out.extend(speed**2 * smooth for speed in (0.001, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4))
    return out


@dataclass(frozen=True)
class FittedField:
    """Posterior mean of a motion field: anywhere it is ``exp(-r / length) @ weights @ time_covariance``.

    ``positions`` `(place, 2)` and ``length`` in the same unit; ``weights`` `(axis, place, frame)`.
    """

    positions: np.ndarray
    length: float
    weights: np.ndarray
    time_covariance: np.ndarray

    def at(self, positions: np.ndarray) -> np.ndarray:
        """Displacement `(m, frame, 2)` at ``positions`` `(m, 2)`; the mean over frames is zero."""
        space = np.exp(-_distances(positions, self.positions) / self.length)
        field = np.einsum("mp,apf->mfa", space, self.weights @ self.time_covariance)
        return field - field.mean(1, keepdims=True)


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.linalg.norm(a[:, None] - b[None], axis=2)


def fit_field(
    observed: np.ndarray,
    variance: tuple[float, float],
    place_factor: np.ndarray,
    frame_factor: np.ndarray,
    positions: np.ndarray,
    lengths: Sequence[float],
    time_covariances: Sequence[np.ndarray],
) -> FittedField:
    """Posterior mean of a displacement field under the prior with the greatest marginal likelihood.

    Parameters
    ----------
    observed : `(place, frame, 2)`
        Measured displacements, each position with its own unknown constant.
    variance : (y, x)
        Variance of a measurement is ``variance[axis] * place_factor[place] * frame_factor[frame]``.
    positions : `(place, 2)`
    lengths : candidates for the correlation length, unit of ``positions``
    time_covariances : candidates `(frame, frame)`, unit of ``observed`` squared

    Notes
    -----
    The noise factorises, and so does the prior: in the eigenvectors of both, whitened, every candidate costs one division per number.
    The unknown constants are projected out (restricted likelihood).
    """
    places = len(observed)
    place_root, frame_root = 1.0 / np.sqrt(place_factor), 1.0 / np.sqrt(frame_factor)
    no_constant = np.linalg.svd(frame_root[None], full_matrices=True)[2][1:].T  # (frame, frame - 1)
    whiten_time = frame_root[:, None] * no_constant
    white = np.einsum("pfa,p,fg->apg", observed, place_root, whiten_time)
    time_parts = []
    # many candidates differ only by a factor and share their eigenvectors
    shapes: dict[bytes, tuple[np.ndarray, np.ndarray]] = {}
    for covariance in time_covariances:
        size = float(np.trace(covariance))
        key = (covariance / size).round(10).tobytes()
        if key not in shapes:
            shapes[key] = np.linalg.eigh(whiten_time.T @ (covariance / size) @ whiten_time)
        values, vectors = shapes[key]
        time_parts.append((size * values.clip(0.0), vectors))
    distance = _distances(positions, positions)
    best_score, best = -np.inf, None
    for length in lengths:
        space = place_root[:, None] * np.exp(-distance / length) * place_root
        space_values, space_vectors = np.linalg.eigh(space)
        space_values = space_values.clip(0.0)
        rotated = space_vectors.T @ white
        for number, (time_values, time_vectors) in enumerate(time_parts):
            power = (rotated @ time_vectors) ** 2
            prior = space_values[:, None] * time_values
            score = 0.0
            for axis in (0, 1):
                total = prior + variance[axis]
                score -= 0.5 * float((np.log(total) + power[axis] / total).sum())
            if score > best_score:
                best_score, best = score, (length, number, space_values, space_vectors)
        if places == 1:
            break
    assert best is not None
    length, number, space_values, space_vectors = best
    time_values, time_vectors = time_parts[number]
    coefficients = space_vectors.T @ white @ time_vectors
    for axis in (0, 1):
        coefficients[axis] /= space_values[:, None] * time_values + variance[axis]
    weights = np.einsum("p,pq,aqg,fg->apf", place_root, space_vectors, coefficients, whiten_time @ time_vectors)
    return FittedField(positions, length, weights, time_covariances[number])


def relion_polynomial(
    patch_position: np.ndarray, patch_shift: np.ndarray, frame_shift: np.ndarray, shape: tuple[int, int], pixel_size_angstrom: float
) -> np.ndarray:
    """RELION's 2 x 18 coefficients of the local motion, in pixels, X first; least squares of the field.

    Parameters
    ----------
    patch_position : `(patch, 2)` pixels; patch_shift : `(patch, frame, 2)`, frame_shift : `(frame, 2)` Angstrom
        Displacement of the SPECIMEN.

    Returns
    -------
    ndarray, `(36,)`
        For each of (1, x, x^2, y, y^2, xy) the factors of (t, t^2, t^3), t = frame from 0, x and y = position / size - 0.5. The sign is
        that of a correction (minus the specimen's motion), and frame 0 has none, as RELION writes them.
    """
    frames = frame_shift.shape[0]
    local = patch_shift - frame_shift[None]
    local = -(local - local[:, :1]) / pixel_size_angstrom
    y = patch_position[:, 0] / shape[0] - 0.5
    x = patch_position[:, 1] / shape[1] - 0.5
    t = np.arange(frames, dtype=float)
    scale = max(frames - 1, 1)
    space = np.stack([np.ones_like(x), x, x * x, y, y * y, x * y], 1)
    time = np.stack([(t / scale) ** p for p in (1, 2, 3)], 1)
    design = np.einsum("ps,ft->pfst", space, time).reshape(-1, 18)
    solution = np.linalg.lstsq(design, local.reshape(-1, 2).astype(float), rcond=None)[0]  # (18, axis)
    solution = solution.reshape(6, 3, 2) / np.array([scale, scale**2, scale**3])[None, :, None]
    return solution.reshape(18, 2).T[::-1].ravel().copy()


def evaluate_relion_polynomial(coefficients: np.ndarray, position: np.ndarray, frames: int, shape: tuple[int, int]) -> np.ndarray:
    """Local correction `(place, frame, 2)` (y, x), pixels, of RELION's 36 coefficients at ``position`` `(place, 2)` pixels."""
    y, x = position[:, 0] / shape[0] - 0.5, position[:, 1] / shape[1] - 0.5
    t = np.arange(frames, dtype=float)
    space = np.stack([np.ones_like(x), x, x * x, y, y * y, x * y])
    time = np.stack([t, t**2, t**3])
    return np.einsum("dst,sp,tf->pfd", coefficients.reshape(2, 6, 3), space, time)[..., ::-1]


def relion_global_shift(frame_shift: np.ndarray, pixel_size_angstrom: float) -> np.ndarray:
    """rlnMicrographShiftX, rlnMicrographShiftY `(frame, 2)`, pixels (X FIRST), from the specimen's displacement in Angstrom.

    RELION's shifts are corrections, so the sign turns, and the first frame has zero.
    """
    return -(frame_shift - frame_shift[:1])[:, ::-1] / pixel_size_angstrom
