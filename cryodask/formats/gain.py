"""Gain references: their orientation, whether they fit the movies, and an estimate from movies that came without one.

A gain MULTIPLIES the raw counts, and is oriented as in RELION: first rotated by quarter turns, clockwise when row 0 is drawn at the
top, then flipped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from cryodask.errors import GainError

Flip = Literal["none", "up-down", "left-right"]
FLIPS: tuple[Flip, ...] = ("none", "up-down", "left-right")
EIGHT_TURNS: tuple[tuple[int, Flip], ...] = tuple((r, f) for f in ("none", "up-down") for r in (0, 90, 180, 270))

_DEAD = 1e-4
"""Sensitivity of a pixel, relative to the median, up to which it is dead: dividing by it would leave noise or infinity."""
_MOST_DEAD = 0.5
"""Share of pixels without sensitivity from which on a file is no gain. About a thousandth are dead; an aperture may hide more."""
_CLEARLY = 1.02
"""How many times rougher than another form of the gain counts as rougher."""
_LEAST_EXPONENT = 0.6
"""A gain of pattern variance v with noise of variance n is fitted best by its power v / (v + n)."""
_CERTAIN = 5.0
"""Standard errors."""


def orient_gain(gain: np.ndarray, rotate_deg: int = 0, flip: Flip | int = "none") -> np.ndarray:
    """Orient a gain as RELION does: rotate by ``rotate_deg`` (0, 90, 180, 270) clockwise with row 0 at the top, then ``flip``.

    Parameters
    ----------
    gain : `(y, x)`
    flip : "none", "up-down" or "left-right" (RELION's 0, 1, 2)

    Notes
    -----
    RELION's ``--gain_rot 1`` is 90 degrees and ``--gain_flip 1`` up-down (both compared with RELION 3.1.3's sums).
    """
    if rotate_deg % 90:
        raise GainError(f"a gain cannot be rotated by {rotate_deg} degrees", "", "choose 0, 90, 180 or 270")
    name = FLIPS[flip] if isinstance(flip, int) and 0 <= flip < 3 else flip
    if name not in FLIPS:
        raise GainError(f"flip {flip!r} does not exist", "", f"choose one of {', '.join(FLIPS)}")
    turned = np.rot90(gain, -(rotate_deg // 90) % 4)
    if name == "up-down":
        turned = turned[::-1]
    elif name == "left-right":
        turned = turned[:, ::-1]
    return np.ascontiguousarray(turned)


def check_dead_pixels(gain: np.ndarray, name: str) -> None:
    """Refuse a gain `(y, x)` that would remove much of each frame.

    Raises
    ------
    GainError
    """
    dead = float(np.mean(gain <= 0))
    if dead > _MOST_DEAD:
        raise GainError(
            f"{name} is 0 in {100 * dead:.0f} % of the pixels, which would be removed from all movies",
            "it is a mask or a list of defects, a part of the camera, or was rounded to whole numbers",
            "give the whole reference, in floating point",
        )


def reciprocal_gain(gain: np.ndarray) -> np.ndarray:
    """The gain `(y, x)` that multiplies, from one that divides; dead pixels, 0 or next to nothing, are 0."""
    least = _DEAD * float(np.median(gain[gain > 0])) if (gain > 0).any() else 0.0
    return np.divide(1.0, gain, out=np.zeros_like(gain, np.float32), where=gain > least)


def on_frames(gain: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """A gain `(y, x)` for frames of a ``shape``: one of camera pixels is repeated 2 x 2 for super-resolution, any other stays as it is."""
    if (2 * gain.shape[0], 2 * gain.shape[1]) != tuple(shape):
        return gain
    return np.repeat(np.repeat(gain, 2, 0), 2, 1)


@dataclass(frozen=True)
class GainForm:
    """A form in which a gain may be meant, and the roughness of the sum that it corrects (lower is better).

    ``power``: 1 as given, -1 for its reciprocal, 0 for no gain at all.
    """

    rotate_deg: int
    flip: Flip
    power: int
    score: float


def rank_gain_forms(frames_sum: np.ndarray, gain: np.ndarray) -> list[GainForm]:
    """Rank the forms of a gain by how flat they make a sum of frames: eight turns of it and of its reciprocal, and no gain.

    Parameters
    ----------
    frames_sum : `(y, x)`
        Unaligned, uncorrected sum of the frames of one movie or (better) of several.
    gain : `(y, x)` float32
        As given; turns of the wrong shape are left out.

    Returns
    -------
    list of GainForm
        Best first. The score is the variance of the high-passed corrected sum over its squared mean: the right form removes the fixed
        pattern of the detector, a wrong one adds a second pattern.
    """
    raw = _without_hot(frames_sum)
    ranking = [GainForm(0, "none", 0, _roughness(raw, np.ones_like(raw)))]
    for power, form in ((1, gain), (-1, reciprocal_gain(gain))):
        for rotate, flip in EIGHT_TURNS:
            turned = orient_gain(form, rotate, flip)
            if turned.shape == raw.shape:
                ranking.append(GainForm(rotate, flip, power, _roughness(raw, turned)))
    # of equals the first: as given before turned, turned before no gain
    return sorted(ranking, key=lambda form: (form.score, form.power != 1, form.rotate_deg, form.flip != "none"))


def _without_hot(frames_sum: np.ndarray) -> np.ndarray:
    """A sum of frames `(y, x)` float32 in which hot pixels, which would dominate the pattern, are cut."""
    raw = np.asarray(frames_sum, np.float32)
    usual = float(np.minimum(raw, np.percentile(raw, 99.0)).mean())
    return np.minimum(raw, usual + 6.0 * (np.sqrt(max(usual, 0.0)) + 0.3 * abs(usual)))


def _steps(values: np.ndarray, good: np.ndarray, axis: int) -> np.ndarray:
    """Differences of good neighbours, float64: without illumination gradients, but with the gains of pixels."""
    both = np.delete(good, 0, axis) & np.delete(good, -1, axis)
    return np.diff(values, axis=axis)[both].astype(np.float64)


def _roughness(raw: np.ndarray, gain: np.ndarray) -> float:
    corrected = raw * gain
    good = (gain > 0) & (raw > 0)
    steps = [_steps(corrected, good, axis) for axis in (0, 1)]  # two directions against column patterns
    squares, pairs = sum(float(s @ s) for s in steps), sum(s.size for s in steps)
    mean = float(corrected[good].mean(dtype=np.float64)) if good.any() else 0.0
    return squares / (2.0 * max(pairs, 1)) / max(mean, 1e-12) ** 2


def fitted_exponent(frames_sum: np.ndarray, gain: np.ndarray) -> tuple[float, float]:
    """The power of a gain that makes a sum of frames flattest, and its standard error.

    1 for the right gain, 0 for one that has nothing to do with the movies or was applied to them already, 0.5 for the square of the right
    one, if a pattern is weak. Found by regression of what the gain leaves in the sum on the gain, both as differences of neighbours.
    """
    raw = _without_hot(frames_sum)
    corrected = raw * gain
    good = (gain > 0) & (raw > 0)
    if not good.any():
        return 0.0, np.inf
    mean = float(corrected[good].mean(dtype=np.float64))
    relative = gain / float(gain[good].mean(dtype=np.float64))
    cross = squares = left = 0.0
    for axis in (0, 1):
        pattern, rest = _steps(relative, good, axis), _steps(corrected, good, axis) / mean
        cross, squares, left = (
            cross + float(pattern @ rest),
            squares + float(pattern @ pattern),
            left + float((pattern * rest) @ (pattern * rest)),
        )
    if squares <= 0.0:
        return 1.0, np.inf
    # neighbouring differences share a pixel
    return 1.0 - cross / squares, float(np.sqrt(2.0 * left)) / squares


def check_gain(frames_sum: np.ndarray, gain: np.ndarray, name: str = "the gain") -> None:
    """Raise GainError if the gain does not fit the movies in the form given.

    Parameters
    ----------
    frames_sum : `(y, x)`
        Uncorrected sum of the frames of the first movie or movies.
    gain : `(y, x)`
        As used, in its final orientation.

    Raises
    ------
    GainError
        If the shape is wrong, if another form of it fits clearly better (the message names it), or if it does not make the movies
        flatter: a gain of another camera, squared, or applied already.
    """
    ranking = rank_gain_forms(frames_sum, gain)
    best = ranking[0]
    rows, columns = np.shape(frames_sum)
    if gain.shape != (rows, columns):
        turned = [form for form in ranking if form.power == 1]
        raise GainError(
            f"{name} is {gain.shape[0]} x {gain.shape[1]} pixels, the movies are {rows} x {columns}",
            "the gain was saved in the camera's orientation" if turned else "it belongs to another camera mode",
            _advice(turned[0]) if turned else "give the gain of this camera mode",
        )
    given = next(form for form in ranking if (form.power, form.rotate_deg, form.flip) == (1, 0, "none"))
    power, error = fitted_exponent(frames_sum, gain)
    if given.score > _CLEARLY * best.score and best.power:
        form = "its reciprocal" if best.power < 0 else "it"
        where = " in another orientation" if (best.rotate_deg, best.flip) != (0, "none") else ""
        raise GainError(
            f"{name} fits the movies worse than {form}{where} would (roughness {given.score:.3g} against {best.score:.3g})",
            "it divides the counts, as some programs write it"
            if best.power < 0
            else "it was saved in another orientation: TIFF movies are flipped in y against MRC gains",
            _advice(best),
        )
    if given.score > _CLEARLY * best.score or power + _CERTAIN * error < _LEAST_EXPONENT:
        without = next(form.score for form in ranking if form.power == 0)
        raise GainError(
            f"{name} does not make the movies flatter (roughness {given.score:.3g}, without a gain {without:.3g}; its power"
            f" {power:.2f} would fit best, not 1)",
            "it is the gain of another camera or its square, or the movies are corrected already",
            "leave gain out if the movies are corrected, else give the gain of this camera, or set  gain: estimate",
        )


def _advice(form: GainForm) -> str:
    invert = "change gain_divides" if form.power < 0 else ""
    turned = (form.rotate_deg, form.flip) != (0, "none")
    turn = f"in addition to the present setting, rotate the gain by {form.rotate_deg} degrees, then flip: {form.flip}" if turned else ""
    return "; ".join(filter(None, (invert, turn)))


def estimate_gain(halves: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, float, float]:
    """A gain from movies that were recorded without one: what is common to the sums of two halves of them.

    Counts are compared with their surroundings (Gaussian, 16 px), which removes ice and illumination, and the deviations are
    multiplied by their reliability, so that few movies give a gain closer to 1 and never a noisier sum.

    Parameters
    ----------
    halves : two `(y, x)`
        Sums of all frames of every second movie, and of the others.

    Returns
    -------
    gain : `(y, x)` float32, mean 1; 0 at dead and hot pixels
    reliability : float
        Share of the variance of the deviations that both halves have in common, 0 to 1, of all movies together.
    pattern : float
        Standard deviation of the pattern, as a share of the counts.
    """
    total = halves[0] + halves[1]
    usual = float(np.median(total))
    good = (total > 0.3 * usual) & (total < 3.0 * usual)
    first, second = (_deviations(half, good) for half in halves)
    a, b = first[good], second[good]
    common = float(np.mean(a * b, dtype=np.float64))
    half = common / max(float(np.sqrt(np.mean(a * a, dtype=np.float64) * np.mean(b * b, dtype=np.float64))), 1e-30)
    reliability = float(np.clip(2.0 * half / (1.0 + half), 0.0, 1.0)) if half > 0 else 0.0  # Spearman-Brown: of both halves together
    gain = np.where(good, 1.0 / (1.0 + reliability * _deviations(total, good)), 0.0)
    return (gain / gain[good].mean()).astype(np.float32), reliability, float(np.sqrt(max(common, 0.0)))


def _deviations(total: np.ndarray, good: np.ndarray) -> np.ndarray:
    from scipy.ndimage import gaussian_filter

    weight = gaussian_filter(good.astype(np.float32), 16.0)
    around = gaussian_filter(np.where(good, total, 0.0).astype(np.float32), 16.0) / np.maximum(weight, 1e-3)
    return np.where(good, total / np.maximum(around, 1e-6) - 1.0, 0.0)
