"""Report figures shared by the map-making stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cryodask.stage import Picture


def _axes(width: float = 5.0, height: float = 3.2) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def draw_slices(volume: np.ndarray, pixel_angstrom: float, title: str, caption: str) -> Picture:
    """Projections and central sections along the three axes."""
    from matplotlib.figure import Figure

    n = volume.shape[0]
    figure = Figure(figsize=(7.5, 5.2), layout="constrained")
    panels = figure.subplots(2, 3)
    limits = np.percentile(volume, (1.0, 99.9))
    for axis, name in enumerate("zyx"):
        for row, (picture, scale) in enumerate(((volume.sum(axis), None), (np.take(volume, n // 2, axis), limits))):
            panel = panels[row, axis]
            panel.imshow(
                picture, cmap="gray", origin="lower", vmin=None if scale is None else scale[0], vmax=None if scale is None else scale[1]
            )
            panel.set(xticks=[], yticks=[], title=f"{'projection' if row == 0 else 'section'} along {name}")
    bar = 50.0 / pixel_angstrom
    panels[1, 0].plot([2, 2 + bar], [2, 2], color="white", linewidth=3)
    panels[1, 0].text(2, 4, "50 Å", color="white", fontsize=8)
    return Picture(title, caption, figure)


def montage(
    images: Sequence[np.ndarray | None], across: int, gap_y: int = 2, gap_x: int = 2
) -> tuple[np.ndarray, list[tuple[float, float]]]:
    """Square images of one size in rows of ``across``, the first at the top left, for ``imshow(..., origin="lower")``.

    One image is drawn much faster than an axes for each. Gaps, and places given as None, are NaN.

    Returns
    -------
    picture : `(y, x)`
    corners : list of (x, y)
        Top left corner of each place.
    """
    n = next(len(image) for image in images if image is not None)
    down = -(-len(images) // across)
    picture = np.full((down * (n + gap_y), across * (n + gap_x) - gap_x), np.nan, np.float32)
    corners = []
    for place, image in enumerate(images):
        y, x = (down - 1 - place // across) * (n + gap_y), place % across * (n + gap_x)
        corners.append((float(x), float(y + n)))
        if image is not None:
            picture[y : y + n, x : x + n] = image
    return picture, corners


def draw_montage(axes: Any, picture: np.ndarray, *, vmin: float | None = None, vmax: float | None = None) -> None:
    """Show a montage, protein white, without ticks."""
    axes.imshow(picture, cmap="gray", origin="lower", vmin=vmin, vmax=vmax, interpolation="nearest" if max(picture.shape) < 600 else None)
    axes.set_axis_off()


def draw_classes(averages: np.ndarray, scores: np.ndarray, shares: np.ndarray, resolutions: np.ndarray) -> Picture:
    """Montage of class averages, best score first, each with its own grey scale."""
    order = np.argsort(-np.asarray(scores), kind="stable")
    across = min(10, len(order))
    down = -(-len(order) // across)
    figure, axes = _axes(1.1 * across, 1.35 * down)
    low, high = (f(averages[order], axis=(1, 2), keepdims=True) for f in (np.min, np.max))
    grey = (averages[order] - low) / np.maximum(high - low, np.finfo(np.float32).tiny)
    n = averages.shape[-1]
    picture, corners = montage(list(grey), across, gap_y=round(0.25 * n))
    draw_montage(axes, picture)
    for (x, y), k in zip(corners, order):
        text = f"{k + 1}: {scores[k]:.2f}\n{100 * shares[k]:.0f} %, {resolutions[k]:.0f} Å"
        axes.text(x + n / 2, y, text, fontsize=6, ha="center", va="bottom")
    caption = "Class averages, best first. Above each: its number, its score (0 junk to 1), its share of the particles, its resolution."
    return Picture("Classes", caption, figure)
