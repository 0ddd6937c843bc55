"""Radiation damage from the correlation of particles with their references, frame by frame.

Summed over particles, frame f has the amplitude ``a_f(k) = num_f(k) / den(k)`` of the reference. The reference has its own fall-off
rho(k), so only ratios between frames mean anything: rho is left free in every shell. What remains, exp(-s N / (2 Ne(k))), has one
number for a session, the scale s on the exposure (1: damage as measured by Grant & Grigorieff 2015).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_FROM_SHELL = 7
"""Lower shells hold ice and contrast, and hardly any damage."""
_LEAST_SCALE, _MOST_SCALE = 0.1, 5.0


@dataclass(frozen=True)
class Damage:
    """``scale`` on the exposure with its standard deviation, both NaN if there is no signal.

    ``falloff`` rho `(shell,)`; ``amplitude`` a_f(k) / rho(k) and ``model`` of it `(frame, shell)`; NaN in shells that are not used.
    """

    scale: float
    deviation: float
    falloff: np.ndarray
    amplitude: np.ndarray
    model: np.ndarray


def fit_damage(cross: np.ndarray, reference_power: np.ndarray, decay: np.ndarray, first: int = _FROM_SHELL) -> Damage:
    """Scale of the damage from sums over particles.

    Parameters
    ----------
    cross : `(frame, shell)`
        Sum of Re conj(V) X.
    reference_power : `(shell,)`
        Sum of |V|^2.
    decay : `(frame, shell)`
        Loss of log amplitude as published, N / (2 Ne), N at mid-frame.
    first : int
        First shell used.
    """
    shells = np.arange(cross.shape[1])
    used = (reference_power > 0) & (shells >= min(first, max(1, len(shells) // 4)))
    amplitude = np.divide(cross, reference_power, out=np.zeros_like(cross), where=reference_power > 0)
    falloff, model = np.full(len(shells), np.nan), np.full(cross.shape, np.nan)
    if used.sum() < 3 or len(cross) < 3 or not (amplitude[:, used] * reference_power[used]).sum() > 0:
        return Damage(float("nan"), float("nan"), falloff, model, model)
    rate = decay[:, used]

    def residual(scale: float) -> tuple[float, np.ndarray]:
        left = np.exp(-scale * rate)
        rho = (amplitude[:, used] * left).sum(0) / (left**2).sum(0)
        return float((reference_power[used] * (amplitude[:, used] - rho * left) ** 2).sum()), rho

    grid = np.geomspace(_LEAST_SCALE, _MOST_SCALE, 60)
    at = int(np.argmin([residual(s)[0] for s in grid]))
    low, high = grid[max(at - 1, 0)], grid[min(at + 1, len(grid) - 1)]
    for _ in range(30):
        third = (high - low) / 3.0
        low, high = (low, high - third) if residual(low + third)[0] < residual(high - third)[0] else (low + third, high)
    scale = 0.5 * (low + high)
    least, rho = residual(scale)
    step = 0.02 * scale
    bend = (residual(scale + step)[0] - 2.0 * least + residual(scale - step)[0]) / step**2
    noise = least / max(amplitude[:, used].size - int(used.sum()) - 1, 1)
    falloff[used], model[:, used] = rho, np.exp(-scale * rate)
    with np.errstate(invalid="ignore", divide="ignore"):
        relative = amplitude / falloff
    return Damage(scale, float(np.sqrt(2.0 * noise / bend)) if bend > 0 else float("nan"), falloff, relative, model)


def b_factors(damage: Damage, reference_power: np.ndarray, k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """B factor, A^2 (negative: signal lost), and log amplitude of each frame, both relative to the mean over frames.

    The form of RELION's polishing, ``exp(C + B k^2 / 4)``. To be looked at only: damage is not a Gaussian in k, and weights from B factors
    lose signal beyond the shells that they were fitted to.
    """
    used = np.isfinite(damage.falloff) & (damage.falloff > 0)
    frames = len(damage.amplitude)
    if used.sum() < 3:
        return np.full(frames, np.nan), np.full(frames, np.nan)
    out = np.zeros((frames, 2))
    basis = np.stack([np.ones(int(used.sum())), 0.25 * k[used] ** 2], 1)
    weight = reference_power[used] * damage.falloff[used] ** 2
    for f in range(frames):
        # a logarithm of noise has no mean: an exponential is fitted instead
        x = np.zeros(2)
        for _ in range(50):
            model = np.exp(np.clip(basis @ x, -20.0, 20.0))
            jacobian = basis * model[:, None]
            normal = (jacobian.T * weight) @ jacobian
            normal += 1e-9 * np.trace(normal) * np.diag([1.0, 1e-3])
            change = np.linalg.solve(normal, (jacobian.T * weight) @ (damage.amplitude[f, used] - model))
            x = x + np.clip(change, [-1.0, -200.0], [1.0, 200.0])
        out[f] = x
    return out[:, 1] - out[:, 1].mean(), out[:, 0] - out[:, 0].mean()
