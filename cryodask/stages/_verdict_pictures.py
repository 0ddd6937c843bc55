"""Report figures of a refinement: the evidence for its map, and its halves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from cryodask.kernels.verdict import CERTAIN
from cryodask.stage import Picture
from cryodask.stages._map_pictures import FSC_CURVES, resolution_axis, surface_seen, without_specks

if TYPE_CHECKING:
    import xarray as xr


def draw_evidence(ds: xr.Dataset, sentence: str) -> Picture:
    """FSC curves, likelihood and pose certainty by iteration, and the sphere of views; ``sentence`` is the verdict."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 6.4), layout="constrained")
    _correlation(figure.add_subplot(2, 2, 1), ds)
    if "rot_deg" in ds:
        _sphere(figure.add_subplot(2, 2, 2, projection="mollweide"), ds["rot_deg"].values, ds["tilt_deg"].values)
    likelihood, certainty = (ds[name].values for name in ("iteration_log_likelihood", "iteration_certainty"))
    iteration = np.arange(1, len(likelihood) + 1)
    axes = figure.add_subplot(2, 2, 3)
    axes.plot(iteration, likelihood, marker="o", markersize=3)
    axes.set(xlabel="iteration", ylabel="log-likelihood per particle")
    axes = figure.add_subplot(2, 2, 4)
    axes.plot(iteration, certainty, marker="o", markersize=3)
    axes.axhline(CERTAIN, color="grey", linewidth=0.8, linestyle=":")
    axes.set(xlabel="iteration", ylabel="share of the likeliest pose", ylim=(0.0, 1.02), xlim=(0.5, len(iteration) + 0.5))
    for axes in figure.axes[-2:]:
        axes.locator_params(axis="x", integer=True)
    caption = (
        f"{sentence[:1].upper()}{sentence[1:]}. Correlation of the half-maps (high by construction below the low-pass of the starting map; "
        "it does not show errors that both halves inherited); views of the particles; likelihood, which rises wherever finer rings are "
        "scored (on one scale while poses are drawn, on another afterwards); mean share of a particle’s likeliest pose in its "
        "posterior, which must exceed the dotted line when the rings first decide the orientations."
    )
    return Picture("Evidence", caption, figure)


def _correlation(axes: Any, ds: xr.Dataset) -> None:
    frequency = 1.0 / ds["shell_resolution_angstrom"].values
    for name, (label, colour) in FSC_CURVES.items():
        axes.plot(frequency, ds[name].values, label=label, color=colour, linewidth=1.8 if name == "fsc_corrected" else 1.0)
    axes.axhline(0.143, color="grey", linewidth=0.8, linestyle=":")
    axes.set(ylabel="Fourier shell correlation", ylim=(-0.1, 1.02))
    resolution_axis(axes, float(frequency.max()))
    axes.legend(fontsize=7)


def _sphere(axes: Any, rot_deg: np.ndarray, tilt_deg: np.ndarray) -> None:
    """Views in bins of equal area on the whole sphere."""
    longitude = np.deg2rad((np.asarray(rot_deg, float) + 180.0) % 360.0 - 180.0)
    latitude = np.pi / 2.0 - np.deg2rad(np.asarray(tilt_deg, float))
    edges = np.linspace(-np.pi, np.pi, 37), np.arcsin(np.linspace(-1.0, 1.0, 19))
    counts, _, _ = np.histogram2d(longitude, latitude, bins=edges)
    image = axes.pcolormesh(*edges, counts.T, cmap="viridis")
    axes.figure.colorbar(image, ax=axes, label="particles", shrink=0.7)
    axes.set_xticklabels([])
    axes.set_yticklabels([])
    axes.set_title("views (with a point group, its asymmetric unit)", fontsize=8)


def draw_halves(halves: np.ndarray, pixel_angstrom: float, resolution_angstrom: float) -> Picture:
    """Central sections and surfaces of the half-maps `(2, z, y, x)`, low-passed at the resolution."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 4.4), layout="constrained")
    panels = figure.subplots(2, 4)
    for row, half in enumerate(halves):
        smooth, molecule = _low_passed(half, pixel_angstrom, resolution_angstrom)
        for column, axis in enumerate((0, 2)):
            section = np.take(smooth, smooth.shape[axis] // 2, axis)
            panels[row, column].imshow(
                section, cmap="gray", origin="lower", vmin=np.percentile(section, 1), vmax=np.percentile(section, 99.8)
            )
            panels[row, column].set_title(f"half {row + 1}, section across {'zyx'[axis]}", fontsize=8)
        for column, axis in ((2, 0), (3, 2)):
            panels[row, column].imshow(surface_seen(molecule, axis)[0], cmap="gray", origin="lower", vmin=0.0, vmax=1.0)
            panels[row, column].set_title(f"surface along {'zyx'[axis]}", fontsize=8)
    for panel in panels.flat:
        panel.set_axis_off()
    caption = (
        f"The two half-maps, low-passed at {resolution_angstrom:.1f} \u00c5. Where they differ there is noise. The surface, "
        "without the solvent, encloses the densest voxels: those above a quarter of the 99.9th percentile."
    )
    return Picture("Half-maps", caption, figure)


def _low_passed(volume: np.ndarray, pixel_angstrom: float, resolution_angstrom: float) -> tuple[np.ndarray, np.ndarray]:
    """A half-map low-passed at the resolution, and the same without the specks around its largest connected part.

    Without torch, which a driver does not import otherwise.
    """
    from scipy.fft import irfftn, rfftn

    n = volume.shape[-1]
    full, half = np.fft.fftfreq(n, 1.0 / n), np.fft.rfftfreq(n, 1.0 / n)
    radius = np.sqrt(full[:, None, None] ** 2 + full[None, :, None] ** 2 + half**2)
    spectrum = rfftn(np.asarray(volume, np.float32))
    spectrum[radius > n * pixel_angstrom / resolution_angstrom] = 0.0
    smooth = irfftn(spectrum, volume.shape).astype(np.float32)
    return smooth, without_specks(smooth)
