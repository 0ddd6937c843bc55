"""Particle boxes extracted from a micrograph, downscaled and normalised as in RELION."""

from __future__ import annotations

import torch
from torch import Tensor

from cryodask.kernels.fourier import resize_images, shift_images, smooth_size

_MARGIN_PX = 8
"""Margin cut around a box that is shifted by a fraction of a pixel, because a phase ramp rings at the edges."""


def cut_boxes(image: Tensor, rows: Tensor, columns: Tensor, box: int) -> Tensor:
    """Boxes `(particle, box, box)` of an image `(y, x)` centred on the pixels ``rows, columns`` (int64), which are at index box // 2.

    Pixels beyond the border are mirrored, which preserves the noise statistics.
    """
    offset = torch.arange(box, device=image.device) - box // 2
    y = _mirrored(rows[:, None] + offset, image.shape[0])
    x = _mirrored(columns[:, None] + offset, image.shape[1])
    return image[y[:, :, None], x[:, None, :]]


def cut_boxes_between_pixels(image: Tensor, y: Tensor, x: Tensor, box: int) -> Tensor:
    """Like :func:`cut_boxes`, but the position ``y, x`` (float64, pixels) is at index box // 2 with subpixel accuracy."""
    rows, columns = y.round(), x.round()
    wide = smooth_size(box + 2 * _MARGIN_PX)
    boxes = cut_boxes(image, rows.long(), columns.long(), wide)
    # subtract the mean first: float32 transforms of large counts would lose digits
    mean = boxes.mean(dim=(1, 2), keepdim=True)
    boxes = shift_images(boxes - mean, rows - y, columns - x) + mean
    edge = wide // 2 - box // 2
    return boxes[:, edge : edge + box, edge : edge + box]


def _mirrored(index: Tensor, length: int) -> Tensor:
    """Reflect indices at the first and the last pixel, as often as needed."""
    period = max(1, 2 * (length - 1))
    folded = index.remainder(period)
    return torch.minimum(folded, period - folded)


def normalise_background(images: Tensor, radius_px: float, *, ramp: bool = True) -> Tensor:
    """Normalise the background outside ``radius_px`` of the centre (index n // 2) to mean 0 and standard deviation 1.

    Parameters
    ----------
    images : Tensor, `(particle, y, x)`, float32
    ramp : bool
        First subtract a plane fitted to the background.

    Returns
    -------
    Tensor, the same shape
        From an image with constant background only the mean is subtracted.
    """
    n = images.shape[-1]
    x = torch.arange(n, device=images.device, dtype=torch.float32) - n // 2
    outside = (x[:, None] ** 2 + x[None] ** 2 > radius_px**2).reshape(-1)
    flat = images.reshape(len(images), -1)
    if ramp:
        plane = torch.stack([torch.ones(n * n, device=images.device), x.repeat_interleave(n) / n, x.repeat(n) / n], 1)
        # one design for all images: its pseudo-inverse is small
        background = plane[outside].double()
        solve = torch.linalg.solve(background.T @ background, background.T)
        coefficients = flat[:, outside].double() @ solve.T
        flat = flat - (coefficients @ plane.double().T).float()
    ring = flat[:, outside].double()
    mean, spread = ring.mean(1, keepdim=True), ring.std(1, keepdim=True, correction=0)
    spread = torch.where(spread > 0, spread, 1.0)
    return ((flat - mean) / spread).float().reshape(images.shape)


def extract_particles(
    image: Tensor,
    rows: Tensor,
    columns: Tensor,
    *,
    box: int,
    size: int,
    background_radius_px: float,
    invert: bool,
    ramp: bool,
    reduced: int | None = None,
    batch: int = 64,
) -> Tensor:
    """Cut boxes, invert, downscale to ``size`` pixels in Fourier space (origin stays at n // 2) and normalise, `(particle, size, size)`.

    ``rows, columns`` are pixels (int64), or subpixel positions (float64), which cost a pair of Fourier transforms per box.
    If the scale needs it, boxes are first downscaled to ``reduced`` pixels, of which the central ``size`` are kept.
    ``background_radius_px`` is in pixels of the downscaled image; ``box``, ``size`` and ``reduced`` are even.
    """
    edge = 0 if reduced is None else (reduced - size) // 2
    out = torch.empty(len(rows), size, size, dtype=torch.float32, device=image.device)
    for start in range(0, len(rows), batch):
        part = slice(start, start + batch)
        cut = cut_boxes_between_pixels if rows.is_floating_point() else cut_boxes
        boxes = cut(image, rows[part], columns[part], box)
        # subtract the mean first: float32 transforms of large counts would lose digits
        boxes = boxes - boxes.mean(dim=(1, 2), keepdim=True)
        boxes = resize_images(-boxes if invert else boxes, reduced or size)
        boxes = boxes[:, edge : edge + size, edge : edge + size]
        out[part] = normalise_background(boxes, background_radius_px, ramp=ramp)
    return out
