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


FSC_CURVES = {
    "fsc_unmasked": ("unmasked", "#888888"),
    "fsc_masked": ("masked", "#1f77b4"),
    "fsc_randomised": ("masked, random phases", "#d62728"),
    "fsc_corrected": ("corrected", "black"),
}
"""Name and colour of each curve of half-maps, the same in all figures."""


def resolution_axis(axes: Any, last: float) -> None:
    """Spatial frequencies from 0 to ``last``, 1/Angstrom, labelled by the resolutions that people think in: 1/10, 1/5."""
    axes.set(xlabel="spatial frequency, 1/Å", xlim=(0.0, last))
    ticks = [tick for tick in axes.get_xticks() if 0 < tick <= last]
    axes.set_xticks(ticks, [f"1/{1 / tick:.1f}" for tick in ticks])


def resolution_colours(best_angstrom: float, worst_angstrom: float) -> Any:
    """Colours of resolutions, a matplotlib ``ScalarMappable``: blue where it is best, red where it is worst."""
    import matplotlib
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    # the ends of the colour map are too dark to be told apart on a shaded surface
    colours = ListedColormap(matplotlib.colormaps["turbo"](np.linspace(0.1, 0.92, 256)))
    return ScalarMappable(Normalize(best_angstrom, max(worst_angstrom, best_angstrom + 0.1)), colours)


def surface_level(volume: np.ndarray) -> float:
    """Density at which the surface of a map is drawn: a quarter of the 99.9th percentile."""
    return 0.25 * float(np.percentile(volume, 99.9))


def without_specks(volume: np.ndarray) -> np.ndarray:
    """A map without what lies above :func:`surface_level` around the largest connected part."""
    from scipy.ndimage import label

    parts, _ = label(volume > surface_level(volume))
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    return np.where((parts == 0) | (parts == sizes.argmax()), volume, 0.0)


def surface_seen(volume: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Surface of a map at :func:`surface_level`, for ``imshow(..., origin="lower")``, lit from the viewer.

    Along z (axis 0) x points right and y up, along y x and z, along x y and z; it is seen from the side that makes this right-handed, so
    that the picture has the hand of the map.

    Returns
    -------
    brightness : `(row, column)`
        0 (background) to 1.
    place : `(row, column)`
        Index along the axis of the voxel that is seen; -1 where there is none.
    """
    towards = -1 if axis in (0, 2) else 1
    seen = np.moveaxis(volume, axis, 0)[::towards]
    threshold = surface_level(seen)
    inside = seen > threshold
    hit = inside.any(0)
    first = inside.argmax(0)
    rows, columns = np.indices(first.shape)
    before = np.maximum(first - 1, 0)
    here, there = seen[first, rows, columns], seen[before, rows, columns]
    depth = first - np.clip((here - threshold) / np.maximum(here - there, 1e-12), 0.0, 1.0)
    gradient = np.stack(np.gradient(seen), 0)[:, first, rows, columns]
    facing = np.abs(gradient[0]) / np.maximum(np.linalg.norm(gradient, axis=0), 1e-12)
    far = np.where(hit, depth, np.nan)
    span = max(float(np.nanmax(far) - np.nanmin(far)), 1.0) if hit.any() else 1.0
    nearness = 1.0 - 0.4 * (depth - (float(np.nanmin(far)) if hit.any() else 0.0)) / span
    brightness = np.where(hit, (0.25 + 0.75 * facing) * nearness, 0.0)
    return brightness, np.where(hit, first if towards == 1 else len(seen) - 1 - first, -1)


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
