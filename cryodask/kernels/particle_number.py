"""Resolution against the number of particles: the B-factor of everything between the molecule and the map."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

_FEWEST_POINTS = 3
_NEAR_NYQUIST = 1.05
"""Resolutions this close to Nyquist are limited by the pixel size, not by the number of particles."""


class NumberFit(NamedTuple):
    """``1 / d^2 = intercept + slope ln N``; NaN without a fit. ``fitted`` `(subset,)`: which subsets took part."""

    b_factor_angstrom2: float
    slope: float
    intercept: float
    fitted: np.ndarray

    def resolution_angstrom(self, count: float) -> float:
        """Resolution that the line gives for a number of particles; NaN where it gives none."""
        square = self.intercept + self.slope * np.log(count)
        return float(square**-0.5) if square > 0 else float("nan")


def fit_particle_number(count: np.ndarray, resolution_angstrom: np.ndarray, nyquist_angstrom: float) -> NumberFit:
    """Line through 1 / d^2 of maps of ``count`` `(subset,)` particles over ln N.

    The number of particles needed for a resolution d grows as exp(B / (2 d^2)), so B = 2 / slope (Rosenthal & Henderson 2003). Subsets
    without a resolution, and those that reach Nyquist, take no part; with fewer than three others there is no fit.
    """
    fitted = np.isfinite(resolution_angstrom) & (resolution_angstrom > _NEAR_NYQUIST * nyquist_angstrom)
    if fitted.sum() >= _FEWEST_POINTS:
        slope, intercept = np.polyfit(np.log(count[fitted]), resolution_angstrom[fitted] ** -2.0, 1)
        if slope > 0:
            return NumberFit(2.0 / float(slope), float(slope), float(intercept), fitted)
    return NumberFit(float("nan"), float("nan"), float("nan"), np.zeros_like(fitted))
