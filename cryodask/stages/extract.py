"""Stage ``extract``: boxes of the accepted picks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import xarray as xr
from pydantic import Field, model_validator

from cryodask.errors import MicrographError
from cryodask.kernels.extraction import extract_particles
from cryodask.stage import Params, Picture, Sizes, stage
from cryodask.stages.ctf import check_micrograph

_EDGE = 0.4
"""Least distance of a particle from the border, background diameters: that of the picker."""


class ExtractParams(Params):
    """Parameters of stage ``extract``."""

    box: int = Field(description="edge of the box in the micrograph, pixels, even", ge=8)
    scale_to: int | None = Field(None, description="edge of the images, pixels, even; the box is reduced to it in Fourier space", ge=8)
    background_diameter_angstrom: float | None = Field(
        None, description="diameter outside which the background is measured, Angstrom; 3/4 of the box if left out", gt=0
    )
    invert: bool = Field(True, description="turn the contrast: micrographs show protein dark, particles are protein white")
    ramp: bool = Field(True, description="take away the plane through the background")

    @model_validator(mode="after")
    def _even(self) -> ExtractParams:
        for name, value in (("box", self.box), ("scale_to", self.scale_to)):
            if value is not None and value % 2:
                raise ValueError(f"{name} must be even, {value} is odd (RELION and this package put the origin of odd boxes apart)")
        if self.scale_to is not None and self.scale_to > self.box:
            raise ValueError(f"scale_to ({self.scale_to}) must not exceed box ({self.box}): boxes are reduced, not enlarged")
        return self

    @property
    def size(self) -> int:
        """Edge of the images, pixels."""
        return self.scale_to or self.box


def _sizes(params: ExtractParams, sizes: Sizes) -> Sizes:
    return {**sizes, "y": params.size, "x": params.size}


def _memory(params: ExtractParams, sizes: Sizes) -> float:
    batch = 64 * 40.0 * params.box**2
    return 8.0 * sizes["y"] * sizes["x"] + batch + 4.0 * sizes.get("slot", 1000) * params.size**2


@stage(
    version=1,
    needs=["micrograph_dw", "pixel_size_angstrom", "pick_y", "pick_x", "pick_accepted"],
    gives=["particle_image", "particle_y", "particle_x", "particle_count", "particle_pixel_size_angstrom"],
    sizes=_sizes,
    memory=_memory,
)
def extract(
    params: ExtractParams,
    *,
    micrograph_dw: np.ndarray,
    pixel_size_angstrom: float,
    pick_y: np.ndarray,
    pick_x: np.ndarray,
    pick_accepted: np.ndarray,
    device: str = "cpu",
) -> dict[str, Any]:
    """Cut the accepted picks from the dose-weighted micrograph, as RELION does.

    The pixel of a pick, fractions cut off, lands at index n // 2 of the box; ``particle_y`` and ``particle_x`` are that pixel. A
    particle nearer to the border than 0.4 background diameters is left out; what else of a box lies beyond it is filled with the
    mirrored micrograph. Boxes are inverted to white protein, reduced in Fourier space, freed of a plane, and given mean 0 and
    standard deviation 1 outside ``background_diameter_angstrom``.
    """
    image = np.asarray(micrograph_dw, np.float32)
    check_micrograph(image)
    pixel = float(pixel_size_angstrom)
    if params.box > min(image.shape):
        raise MicrographError(
            f"a box of {params.box} pixels is larger than the micrograph, {image.shape[0]} x {image.shape[1]}",
            "extract.box was given in Angstrom, or the micrograph is binned",
            "make extract.box smaller",
        )
    diameter = params.background_diameter_angstrom or 0.75 * params.box * pixel
    if diameter > params.box * pixel:
        raise MicrographError(
            f"a background diameter of {diameter:g} A leaves no background in a box of {params.box * pixel:g} A",
            "the pixel size is not what was expected",
            "make extract.box larger or extract.background_diameter_angstrom smaller",
        )
    accepted = np.asarray(pick_accepted) > 0
    # fractions are cut off, not rounded, as relion_preprocess does
    rows, columns = (np.asarray(p, np.float64)[accepted].astype(np.int64) for p in (pick_y, pick_x))
    reach = _EDGE * diameter / pixel
    whole = (rows >= reach) & (rows <= image.shape[0] - 1 - reach) & (columns >= reach) & (columns <= image.shape[1] - 1 - reach)
    rows, columns = rows[whole], columns[whole]
    particles = extract_particles(
        torch.from_numpy(image).to(device),
        torch.from_numpy(rows).to(device),
        torch.from_numpy(columns).to(device),
        box=params.box,
        size=params.size,
        background_radius_px=0.5 * diameter / pixel * params.size / params.box,
        invert=params.invert,
        ramp=params.ramp,
    )
    return {
        "particle_image": particles.cpu().numpy(),
        "particle_y": rows.astype(np.float32),
        "particle_x": columns.astype(np.float32),
        "particle_count": len(rows),
        "particle_pixel_size_angstrom": pixel * params.box / params.size,
    }


@extract.figures
def draw(ds: xr.Dataset) -> Iterator[Picture]:
    """The first particles of a few micrographs, and their number."""
    from matplotlib.figure import Figure

    counts = ds["particle_count"].values
    total = int(counts.sum())
    if not total:
        return
    chosen = np.flatnonzero(counts > 0)
    chosen = chosen[np.linspace(0, len(chosen) - 1, min(6, len(chosen))).astype(int)]
    columns = 8
    figure = Figure(figsize=(9, 1.15 * len(chosen)), layout="constrained")
    panels = figure.subplots(len(chosen), columns, squeeze=False)
    for line, i in zip(panels, chosen):
        images = ds["particle_image"].isel(micrograph=int(i), slot=slice(0, min(columns, int(counts[i])))).values
        for axes in line:
            axes.set_axis_off()
        for axes, image in zip(line, images):
            axes.imshow(image, cmap="gray", vmin=-3, vmax=4, origin="lower")
    pixel = float(ds["particle_pixel_size_angstrom"].values[0])
    size = ds.sizes["x"]
    caption = (
        f"{total} particles of {size} x {size} pixels of {pixel:.3f} Å from {len(counts)} micrographs "
        f"(median {int(np.median(counts))} each); "
        "the first ones of some micrographs, a line each, protein white."
    )
    yield Picture("Particles", caption, figure)
