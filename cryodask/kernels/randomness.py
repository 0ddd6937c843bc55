"""Random numbers that depend on (seed, iteration, particle) only, however particles are divided among workers."""

from __future__ import annotations

import numpy as np

_GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def _mix(values: np.ndarray) -> np.ndarray:
    """Finaliser of splitmix64 (Steele, Lea & Flood 2014): a bijection that scrambles 64 bits."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def uniforms(seed: int, iteration: int, index: np.ndarray, count: int) -> np.ndarray:
    """``count`` numbers in [0, 1) for each particle, `(n, count)` float64.

    Parameters
    ----------
    index : `(n,)` int
        Index of the particle in its set.
    """
    with np.errstate(over="ignore"):
        stream = _mix(np.array([seed], np.uint64) * _GOLDEN_GAMMA + np.uint64(iteration + 1))
        particle = _mix(stream + (np.asarray(index).astype(np.uint64) + np.uint64(1)) * _GOLDEN_GAMMA)
        draws = _mix(particle[:, None] + (np.arange(count, dtype=np.uint64) + np.uint64(1)) * _GOLDEN_GAMMA)
    return (draws >> np.uint64(11)).astype(np.float64) * 2.0**-53
