"""The picture pyramid of a micrograph: the same picture, averaged over more and more pixels, in 8 bits."""

from __future__ import annotations

import numpy as np

from cryodask.edits.board import Exposure
from cryodask.kernels.preview import LONGEST_SIDE_PX, preview

_SIGMAS = 4.0


def steps_of(shape: tuple[int, int]) -> list[int]:
    """Numbers of pixels that the levels average over, along each side; the last level is the smallest, and that of the preview."""
    last = -(-max(shape) // LONGEST_SIDE_PX)
    return [*(step for step in (1, 2, 4, 8, 16, 32) if step < last), last]


def level(exposure: Exposure, step: int) -> np.ndarray:
    """One level.

    Parameters
    ----------
    exposure : Exposure
    step : int
        One of :func:`steps_of`. Rows and columns that do not fill a block are left out.

    Returns
    -------
    ndarray, `(y // step, x // step)`, uint8
        From 4 standard deviations below the mean of the level (0) to 4 above (255); row 0 is the lowest.
    """
    if step == steps_of(exposure.shape)[-1]:
        if "micrograph_preview" in exposure.record["shards"]:
            return np.asarray(exposure.generation.read(exposure.record, "micrograph_preview")[0])
        return np.asarray(preview(exposure.picture())[0])
    picture = exposure.picture()
    height, width = (n // step for n in exposure.shape)
    if step > 1:
        rows = picture[: height * step, : width * step].reshape(height, step, width * step).sum(1)
        picture = rows.reshape(height, width, step).sum(2)
    mean, deviation = float(picture.mean(dtype=np.float64)), max(float(picture.std(dtype=np.float64)), 1e-20)
    picture = (picture - np.float32(mean - _SIGMAS * deviation)) * np.float32(255 / (2 * _SIGMAS * deviation))
    return np.clip(picture, 0, 255, out=picture).astype(np.uint8)
