"""A pattern that stands still in a movie while the specimen moves: a missing or wrong gain, a defect of the camera.

It correlates at shift zero in every pair of frames, and would hold the alignment there. The gains of pixels differ from each other
independently, so their pattern is white, as the noise is, but the same in every frame. Its power is therefore measured at
fine detail, where hardly any specimen is left, and what it is expected to add to a correlation is subtracted from it: for frames
shifted by a track that is the power times the correlation of the track's phase factors alone. The pattern itself need not be known.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cryodask.kernels.motion_frames import MovieTransform

LOWEST_ANGSTROM = 30.0
"""Coarsest resolution used where there is such a pattern.

Gains also differ smoothly over the camera, with a power unknown here. Without coarser detail the error rises from 0.16 to 0.17 pixels.
"""
_POSSIBLE, _SEPARATED = 5.0, 2.5
_FINE = (0.65, 0.95)
"""Part of the frequencies, relative to the finest, at which the power is measured."""
_LEAST_SEPARABLE = 0.1


@dataclass(frozen=True)
class StillPattern:
    """White ``power`` of a still pattern in one coefficient of one frame, its standard deviation, and the power of the frame's noise."""

    power: float
    deviation: float
    noise: float

    @property
    def possible(self) -> bool:
        """Whether unaligned frames share so much that it cannot be noise."""
        return self.power > _POSSIBLE * self.deviation

    @property
    def found(self) -> bool:
        """Whether it was found beside the specimen; to allow for a weak one that is noise does little harm."""
        return self.power > _SEPARATED * self.deviation

    @property
    def separable(self) -> bool:
        """Whether there was enough motion to tell it from the specimen."""
        return math.isfinite(self.deviation)

    @property
    def share(self) -> float:
        """Power of the pattern over that of the noise of one frame."""
        return self.power / self.noise if self.noise > 0.0 else 0.0


def phase_factors(shift: Tensor, transform: MovieTransform) -> tuple[Tensor, Tensor]:
    """Phase factors `(frame, row, 1)` and `(frame, 1, column)` that undo ``shift`` `(frame, 2)`."""
    one = torch.ones((), device=shift.device)
    along_y = torch.polar(one, 2.0 * math.pi * shift[:, :1] * transform.fy[:, 0][None])
    along_x = torch.polar(one, 2.0 * math.pi * shift[:, 1:] * transform.fx[0][None])
    return along_y[:, :, None], along_x[:, None, :]


def sum_of_factors(shift: Tensor, transform: MovieTransform) -> Tensor:
    """Sum over the frames of their phase factors, `(row, column)`: what a pattern of power 1 at rest becomes in the aligned sum."""
    along_y, along_x = phase_factors(shift, transform)
    return torch.einsum("fy,fx->yx", along_y[:, :, 0], along_x[:, 0])


def still_pattern(transform: MovieTransform, shift: Tensor | None = None) -> StillPattern:
    """Power at fine detail of what is the same in all frames, unaligned.

    Parameters
    ----------
    shift : `(frame, 2)`, optional
        Track of the specimen, pixels. With it the pattern is separated from the specimen by least squares, coefficient by
        coefficient: frame f is specimen times its phase factor, plus pattern. Coefficients count by how well the two can be told
        apart; where the track is too short for that the power is 0 and its deviation infinite. Without a track, specimen that
        moves little counts as pattern.
    """
    frames = transform.values.shape[0]
    finest = float(transform.k[:, 0].max())
    # a quarter of the numbers is enough to see whether there can be a pattern at all
    scale = finest / float(transform.fy.abs().max())
    first = 0 if shift is not None else int((transform.fx[0] * scale < _FINE[0] * finest).sum())
    part = MovieTransform(
        transform.values[:, :, first:], transform.fy, transform.fx[:, first:], transform.k[:, first:], transform.extent, transform.size
    )
    use = (part.k > _FINE[0] * finest) & (part.k < _FINE[1] * finest)
    if frames < 3 or int(use.sum()) < 50:
        return StillPattern(0.0, math.inf, 0.0)
    plain, power = torch.zeros_like(part.values[0]), torch.zeros_like(part.k)
    for f in range(frames):
        plain += part.values[f]
        power += part.values[f].real ** 2 + part.values[f].imag ** 2
    noise = power / frames
    level = float(noise[use].mean(dtype=torch.float64))
    if shift is None:
        still = (plain.abs() ** 2 - power) / (frames * (frames - 1))
        return StillPattern(float(still[use].mean(dtype=torch.float64)), level / (frames * math.sqrt(int(use.sum()))), level)
    along_y, along_x = phase_factors(shift, part)
    aligned = torch.zeros_like(plain)
    for f in range(frames):
        aligned += part.values[f] * along_y[f] * along_x[f]
    factors = sum_of_factors(shift, part)
    # normal equations [n, A*; A, n] of (pattern, specimen): the pattern is (n plain - A* aligned) / determinant, its noise n / determinant
    determinant = (frames**2 - factors.abs() ** 2)[use]
    pattern = (frames * plain - torch.conj(factors) * aligned)[use]
    apart = determinant / frames**2
    if float(apart.mean(dtype=torch.float64)) < _LEAST_SEPARABLE:
        return StillPattern(0.0, math.inf, level)
    excess = pattern.abs() ** 2 / frames**4 - apart * noise[use] / frames
    total = float((apart**2).sum(dtype=torch.float64))
    return StillPattern(float(excess.sum(dtype=torch.float64)) / total, level / (frames * math.sqrt(total)), level)
