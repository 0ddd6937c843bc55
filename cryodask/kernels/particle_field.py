"""A motion field from the displacements of particles: a Gaussian process in position and exposure, with a constant per particle.

The displacement of particle p in frame f covaries as ``drift(f, g) + jitter^2 [f = g] + exp(-r_pq / length) local(f, g)`` (the form of
Zivanov, Nakane & Scheres 2019, IUCrJ 6, 5-17, with jitter of the whole frame). Every particle has an unknown constant besides, the
error of its centre, which is projected out. The process is written in the eigenvectors of its covariances, in place and in exposure,
as coefficients of unit variance: their number, not that of the measurements, sets the cost, and the system is always well conditioned.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg

from cryodask.kernels.motion_model import velocity_covariance

_MOST_MODES = 80
"""Spatial eigenvectors: with 300 particles in a frame of 3500 A they hold 97 % of the variance; up to 80 particles are exact."""
_LEAST_SHARE, _LEAST_LOCAL_SHARE = 1e-6, 3e-4
"""Eigenvectors in exposure with a smaller share of the variance than this are left out: of the drift, and of local motion."""


@dataclass(frozen=True)
class MotionPrior:
    """Covariances `(frame, frame)`, A^2: ``drift`` (with jitter) of the whole frame, ``local`` at a distance of 0; ``length_angstrom``."""

    drift: np.ndarray
    local: np.ndarray
    length_angstrom: float

    def scaled(self, drift: float, local: float) -> MotionPrior:
        """The same with other variances."""
        return MotionPrior(self.drift * drift, self.local * local, self.length_angstrom)


def absolute_prior(exposure: np.ndarray) -> MotionPrior:
    """Prior on the displacement itself; ``exposure`` `(frame,)` at mid-frame, e/A^2.

    The constants have the greatest marginal likelihood over three movies of a simulated session; within a factor of two of them, results
    differ by 0.01 to 0.03 A.
    """
    count = len(exposure)
    drift = 0.38**2 * velocity_covariance(exposure, 57.0, 1.0) + 0.068**2 * np.eye(count)
    return MotionPrior(drift, 0.062**2 * velocity_covariance(exposure, 4.7, 3.3), 1914.0)


def residual_prior(exposure: np.ndarray) -> MotionPrior:
    """Prior on what a measured field has left over, for exposures with few particles."""
    distance = np.abs(exposure[:, None] - exposure[None])
    drift = 0.2**2 * np.exp(-distance / 3.0) + 0.1**2 * np.eye(len(exposure))
    return MotionPrior(drift, 0.03**2 * velocity_covariance(exposure, 8.0, 3.0), 1000.0)


@dataclass(frozen=True)
class ParticleField:
    """Posterior of a field, Angstrom.

    ``particles`` `(n, frame, 2)`: at the particles, without their constants; ``constant`` `(n, 2)`; ``nodes`` `(m, frame, 2)`: at the
    requested places; ``deviation`` `(n, frame, 2)`: posterior standard deviation at the particles, the mean over frames removed;
    ``evidence``: log marginal likelihood.
    """

    particles: np.ndarray
    constant: np.ndarray
    nodes: np.ndarray
    deviation: np.ndarray
    evidence: float


def fit_particle_field(
    prior: MotionPrior,
    places: np.ndarray,
    observed: np.ndarray,
    information: np.ndarray,
    nodes: np.ndarray,
    modes: int = _MOST_MODES,
    *,
    errors: bool = True,
) -> ParticleField:
    """Posterior mean of the field under a prior.

    Parameters
    ----------
    places : `(n, 2)`, nodes : `(m, 2)`
        Positions, Angstrom.
    observed : `(n, frame, 2)`
        Displacements, Angstrom, each particle with its own unknown constant.
    information : `(n, frame, 2)`
        One over the variance of each, 1 / A^2.
    modes : int
        Largest number of spatial eigenvectors; with at least as many as particles the result is exact.
    errors : bool
        Whether to compute ``deviation``, a third of the work; it is NaN otherwise.
    """
    n, frames = observed.shape[:2]
    space, at_nodes = _spatial_modes(places, nodes, prior.length_angstrom, modes)
    drift, local = _time_modes(prior.drift), _time_modes(prior.local, _LEAST_LOCAL_SHARE)
    basis, at = _basis(drift, space, local), _basis(drift, at_nodes, local)
    particles, deviation, on_nodes = np.zeros_like(observed), np.full(observed.shape, np.nan), np.zeros((len(nodes), frames, 2))
    constant, evidence = np.zeros((n, 2)), 0.0
    for axis in (0, 1):
        weight, values = information[..., axis], observed[..., axis]
        factor, solution, own = _solved(basis, space, drift, local, weight, values)
        evidence += own
        particles[..., axis], on_nodes[..., axis] = basis @ solution, at @ solution
        constant[:, axis] = (weight * (values - particles[..., axis])).sum(1) / weight.sum(1)
        if not errors:
            continue
        centred = (basis - basis.mean(1, keepdims=True)).reshape(n * frames, -1)
        root = scipy.linalg.solve_triangular(factor, centred.T, lower=True, check_finite=False)
        deviation[..., axis] = np.sqrt((root**2).sum(0)).reshape(n, frames)
    return ParticleField(particles, constant, on_nodes, deviation, evidence)


def _solved(
    basis: np.ndarray, space: np.ndarray, drift: np.ndarray, local: np.ndarray, weight: np.ndarray, values: np.ndarray
) -> tuple[np.ndarray, np.ndarray, float]:
    """Lower Cholesky factor, coefficients and log marginal likelihood (without what no prior changes) of one axis."""
    system, right = _normal_equations(basis, space, drift, local, weight, values)
    factor = scipy.linalg.cholesky(system, lower=True, check_finite=False)
    solution = scipy.linalg.cho_solve((factor, True), right, check_finite=False)
    centred = values - ((weight * values).sum(1) / weight.sum(1))[:, None]
    misfit = float((weight * centred**2).sum() - right @ solution)
    return factor, solution, -0.5 * misfit - float(np.log(np.diag(factor)).sum())


def _spatial_modes(places: np.ndarray, nodes: np.ndarray, length: float, modes: int) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvectors of the covariance in place, times their root, at the places `(n, mode)` and the nodes `(m, mode)`."""
    values, vectors = np.linalg.eigh(_decay(places, places, length))
    kept = np.argsort(-values, kind="stable")[:modes]
    kept = kept[values[kept] > 1e-9 * max(values.max(initial=0.0), 1e-30)]
    root = np.sqrt(values[kept])
    return vectors[:, kept] * root, _decay(nodes, places, length) @ vectors[:, kept] / root


def _decay(a: np.ndarray, b: np.ndarray, length: float) -> np.ndarray:
    return np.exp(-np.linalg.norm(a[:, None] - b[None], axis=2) / length)


def _time_modes(covariance: np.ndarray, least_share: float = _LEAST_SHARE) -> np.ndarray:
    """Eigenvectors of a covariance in exposure times their root, `(frame, mode)`."""
    values, vectors = np.linalg.eigh(covariance)
    kept = values > least_share * max(float(values.sum()), 1e-30)
    return vectors[:, kept] * np.sqrt(values[kept])


def _basis(drift: np.ndarray, space: np.ndarray, local: np.ndarray) -> np.ndarray:
    """Functions `(place, frame, coefficient)` of the coefficients: those of the whole frame, then place times exposure."""
    products = np.einsum("pm,ft->pfmt", space, local).reshape(len(space), len(local), space.shape[1] * local.shape[1])
    return np.concatenate([np.broadcast_to(drift, (len(space), *drift.shape)), products], -1)


def _normal_equations(
    basis: np.ndarray, space: np.ndarray, drift: np.ndarray, local: np.ndarray, weight: np.ndarray, values: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """System and right-hand side of the coefficients, the constants projected out."""
    modes, times, first = space.shape[1], local.shape[1], drift.shape[1]
    system = np.eye(basis.shape[2])
    system[:first, :first] += drift.T @ (weight.sum(0)[:, None] * drift)
    mixed = np.einsum("fj,fm,ft->jmt", drift, weight.T @ space, local, optimize=True).reshape(first, -1)
    system[:first, first:] += mixed
    system[first:, :first] += mixed.T
    spatial = np.einsum("pf,pm,pq->fmq", weight, space, space, optimize=True).reshape(len(local), -1)
    temporal = np.einsum("ft,fs->fts", local, local).reshape(len(local), -1)
    both = (spatial.T @ temporal).reshape(modes, modes, times, times)
    system[first:, first:] += both.transpose(0, 2, 1, 3).reshape(modes * times, modes * times)
    total = weight.sum(1)
    means = np.einsum("pf,pfu->pu", weight, basis)
    system -= (means / total[:, None]).T @ means
    right = np.einsum("pf,pfu->u", weight * values, basis) - ((weight * values).sum(1) / total) @ means
    return system, right


_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
_MODES_OF_AMPLITUDES = 20
_NATS_PER_DOUBLING = 2.0
"""One movie says little about amplitudes: another one must be this much likelier, per factor of two."""


def likeliest_amplitudes(prior: MotionPrior, places: np.ndarray, observed: np.ndarray, information: np.ndarray) -> MotionPrior:
    """The prior with the likeliest amplitude of the drift, then of local motion: marginal likelihood, and a preference for the given one.

    Arguments as in :func:`fit_particle_field`.
    """
    space = _spatial_modes(places, places[:0], prior.length_angstrom, _MODES_OF_AMPLITUDES)[0]

    def evidence(one: MotionPrior) -> float:
        drift, local = _time_modes(one.drift), _time_modes(one.local, _LEAST_LOCAL_SHARE)
        basis = _basis(drift, space, local)
        return sum(_solved(basis, space, drift, local, information[..., a], observed[..., a])[2] for a in (0, 1))

    for drift in (True, False):
        candidates = [prior.scaled(f**2 if drift else 1.0, 1.0 if drift else f**2) for f in _FACTORS]
        scores = [evidence(one) - _NATS_PER_DOUBLING * abs(np.log2(f)) for one, f in zip(candidates, _FACTORS)]
        prior = candidates[int(np.argmax(scores))]
    return prior
