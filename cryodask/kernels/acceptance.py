"""Which peaks of a picker are particles: a threshold for their scores.

Particles and other peaks make two groups of scores, and the threshold lies between them. A crowded micrograph has no room for
other peaks: its scores are one group, which the usual criterion would part anywhere. Pooling the scores of a session does not help,
because their unit is the spread of the score map, which crowding changes: particles of crowded micrographs score lower than those of
sparse ones, and are cut off if both are in a session.
"""

from __future__ import annotations

import math

import numpy as np

LEAST_GROUP = 3
"""Fewest scores that count as a group."""
_LEAST_SPREAD = 0.15
_LEAST_GAIN = 0.1
_LEAST_SHARE = 0.2
CLEAR_SKEW = 0.25
"""Excess skew of a score map from which a micrograph of full size shows more than noise."""
_CLEAR_PEAKS, _FEWEST_PEAKS = 100, 25


def least_error(score: np.ndarray, least_share: float = 0.0) -> tuple[float, float]:
    """Threshold that separates `(score,)`, in any order, into two normal distributions with minimum error (Kittler & Illingworth 1986).

    Neither group has fewer scores than LEAST_GROUP, or a standard deviation below 0.15. ``least_share``: smallest share of the upper
    group; if the error falls as far as this limit, there is no upper group of its own, and the threshold is minus infinity.

    Returns
    -------
    float, float
        The threshold, and by how much two groups describe the scores better than one, in nats per score: below 0.03 for one group
        (simulated crowded micrographs and noise), above 0.25 for two that are apart (apoferritin and sparse simulated ones).
    """
    s, n = np.sort(np.asarray(score, np.float64)), len(score)
    count = np.arange(1, n, dtype=np.float64)
    first, second = np.cumsum(s), np.cumsum(s * s)

    def spread(number: np.ndarray, total: np.ndarray, squares: np.ndarray) -> np.ndarray:
        variance: np.ndarray = squares / number - (total / number) ** 2
        return np.sqrt(np.maximum(variance, _LEAST_SPREAD**2))

    low = spread(count, first[:-1], second[:-1])
    high = spread(n - count, first[-1] - first[:-1], second[-1] - second[:-1])
    p = count / n
    error = p * np.log(low / p) + (1.0 - p) * np.log(high / (1.0 - p))
    last = n - max(LEAST_GROUP, math.ceil(least_share * n))
    best = int(error[LEAST_GROUP - 1 : last].argmin()) + LEAST_GROUP
    gain = math.log(max(float(s.std()), _LEAST_SPREAD)) - float(error[best - 1])
    if least_share > 0.0 and best == last:
        return -math.inf, gain
    return float(0.5 * (s[best - 1] + s[best])), gain


def is_clear(excess_skew: float, peaks_of_noise: int) -> bool:
    """Whether a score map is so much more skewed than that of noise with its spectrum that it shows more than noise.

    In 1536 x 1536 pixels, the skew of simulated ice exceeds that of its noise by at most 0.06; with particles, by 0.25 to 0.36 at
    6 electrons/A^2 and by at least 0.46 at 12. The skew of noise itself varies more in small micrographs, which have few peaks.
    """
    return excess_skew > CLEAR_SKEW * math.sqrt(max(1.0, _CLEAR_PEAKS / max(peaks_of_noise, _FEWEST_PEAKS)))


def threshold(score: np.ndarray, chance: float, clear: bool) -> float:
    """Score above which the peaks of a micrograph are accepted.

    Parameters
    ----------
    score : ndarray, `(peak,)`
    chance : float
        Highest score of a peak of noise with the power spectrum of the micrograph.
    clear : bool
        Whether the micrograph shows more than such noise.
    """
    if len(score) < 2 * LEAST_GROUP:
        return chance
    parted, gain = least_error(score)
    if not clear:
        return max(parted, chance)
    if gain < _LEAST_GAIN:  # few particles would stand out, so in a single group they are a large share
        parted, _ = least_error(score, _LEAST_SHARE)
    # scores that noise never reaches are accepted in any case
    return min(parted, chance)
