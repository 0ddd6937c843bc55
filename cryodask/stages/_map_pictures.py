"""Report figures shared by the map-making stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cryodask.stage import Picture

if TYPE_CHECKING:
    import xarray as xr


def _axes(width: float = 5.0, height: float = 3.2) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def draw_correlation(ds: xr.Dataset) -> Picture:
    """FSC curves."""
    figure, axes = _axes()
    frequency = 1.0 / ds["shell_resolution_angstrom"].values
    for name, label in (
        ("fsc_unmasked", "unmasked"),
        ("fsc_masked", "masked"),
        ("fsc_randomised", "masked, random phases"),
        ("fsc_corrected", "corrected"),
    ):
        if name in ds:
            axes.plot(frequency, ds[name].values, label=label, linewidth=2.0 if name == "fsc_corrected" else 1.0)
    axes.axhline(0.143, color="grey", linewidth=0.8, linestyle=":")
    axes.set(xlabel="spatial frequency, 1/Å", ylabel="Fourier shell correlation", ylim=(-0.1, 1.02), xlim=(0.0, float(frequency.max())))
    axes.legend(fontsize=8)
    caption = "Correlation of the two half-maps. It is high by construction below the low-pass limit of the start map."
    if "resolution_angstrom" in ds:
        caption += f" The corrected curve falls below 0.143 at {float(ds['resolution_angstrom']):.2f} Å."
    return Picture("Resolution", caption, figure)


def draw_iterations(resolutions: np.ndarray) -> Picture:
    """Supported resolution after each search."""
    figure, axes = _axes()
    axes.plot(np.arange(1, len(resolutions) + 1), 1.0 / np.asarray(resolutions), marker="o")
    axes.set(xlabel="iteration", ylabel="supported frequency, 1/Å", ylim=(0.0, None))
    caption = "How far the half-maps agreed after each iteration, by the strict rule that limits the next search."
    return Picture("Iterations", caption, figure)


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


def draw_views(rot_deg: np.ndarray, tilt_deg: np.ndarray) -> Picture:
    """Distribution of views over the sphere, equal-area bins."""
    figure, axes = _axes()
    rot = (np.asarray(rot_deg) + 180.0) % 360.0 - 180.0
    counts, x, y = np.histogram2d(rot, np.cos(np.deg2rad(np.asarray(tilt_deg))), bins=(36, 18), range=((-180.0, 180.0), (-1.0, 1.0)))
    image = axes.pcolormesh(x, y, counts.T, cmap="viridis")
    figure.colorbar(image, ax=axes, label="particles")
    axes.set(xlabel="rot, degrees", ylabel="cos(tilt)")
    caption = "Views of the particles in bins of equal area. With a point group only its asymmetric unit is filled."
    return Picture("Orientations", caption, figure)


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
