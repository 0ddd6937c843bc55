"""Stage ``extract``: particle images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field, model_validator

from cryodask.errors import MicrographError
from cryodask.products import Product
from cryodask.stage import Context, Output, Params, Picture, Resources, Sizes, port, stage
from cryodask.stages._sets import too_near
from cryodask.stages.ctf import check_micrograph

if TYPE_CHECKING:
    import xarray as xr

_EDGE = 0.4
"""Smallest distance of a particle from the border, in background diameters, as in the picker."""


class ExtractParams(Params):
    """Parameters of stage ``extract``."""

    box: int | None = Field(None, description="box size in the micrograph, pixels, even", ge=8)
    box_angstrom: float | None = Field(None, description="box size in Angstrom, for exposures of several pixel sizes", gt=0)
    pixel_size_angstrom: float | None = Field(None, description="with box_angstrom: pixel size of the images, Angstrom", gt=0)
    scale_to: int | None = Field(
        None, description="box size of the images, pixels, even; the box is downscaled to it in Fourier space", ge=8
    )
    background_diameter_angstrom: float | None = Field(
        None, description="diameter outside which the background is measured, Angstrom; by default 3/4 of the box", gt=0
    )
    invert: bool = Field(True, description="invert the contrast: protein is dark in micrographs, white in particle images")
    ramp: bool = Field(True, description="subtract a plane fitted to the background")
    recentre: bool = Field(False, description="extract at the centres from a refinement or classification instead of the picks")
    nearer_than_angstrom: float | None = Field(
        None,
        gt=0,
        description="of particles closer to each other than this, only the one with the lowest id is extracted, Angstrom; by default one "
        "pixel of the micrograph, so that no image is extracted twice",
    )

    @model_validator(mode="after")
    def _even(self) -> ExtractParams:
        if (self.box is None) == (self.box_angstrom is None):
            raise ValueError("give either box (pixels) or box_angstrom")
        if (self.box_angstrom is None) != (self.pixel_size_angstrom is None):
            raise ValueError("give box_angstrom and pixel_size_angstrom together, or box alone")
        if self.box is None and self.scale_to is not None:
            raise ValueError("scale_to is only for box; with box_angstrom the scale is set by pixel_size_angstrom")
        for name, value in (("box", self.box), ("scale_to", self.scale_to)):
            if value is not None and value % 2:
                raise ValueError(f"{name} must be even, {value} is odd (RELION and cryodask define the origin of odd boxes differently)")
        if self.scale_to is not None and self.box is not None and self.scale_to > self.box:
            raise ValueError(f"scale_to ({self.scale_to}) must not exceed box ({self.box}): boxes are downscaled, not enlarged")
        return self

    @property
    def size(self) -> int:
        """Box size of the images, pixels."""
        if self.box is None:
            return 2 * round((self.box_angstrom or 0.0) / (self.pixel_size_angstrom or 1.0) / 2)
        return self.scale_to or self.box

    def cut(self, pixel_size_angstrom: float) -> tuple[int, int, float]:
        """Box size in a micrograph of this pixel size, box size after downscaling (pixels), and pixel size of the images (Angstrom)."""
        if self.box is not None:
            return self.box, self.size, pixel_size_angstrom * self.box / self.size
        wanted = float(self.pixel_size_angstrom or 0.0)
        return (*common_scale(pixel_size_angstrom, wanted, self.size), wanted)


def common_scale(pixel_size_angstrom: float, wanted_angstrom: float, size: int) -> tuple[int, int]:
    """Box to extract and box size after downscaling, both even, for a wanted pixel size.

    Fourier cropping scales by a ratio of integers: a slightly larger box is extracted whose ratio is right to 1 part in 10,000, or the best
    available, and the centre of the downscaled image is kept.
    """
    best = (float("inf"), 0, 0)
    for reduced in range(size, size + 130, 2):
        box = 2 * round(reduced * wanted_angstrom / pixel_size_angstrom / 2)
        error = abs(box * pixel_size_angstrom / reduced / wanted_angstrom - 1.0)
        if error < best[0]:
            best = (error, box, reduced)
        if error < 1e-4:
            break
    return best[1], best[2]


def _sizes(params: ExtractParams, sizes: Sizes) -> Sizes:
    return {**sizes, "y": params.size, "x": params.size}


def _memory(params: ExtractParams, sizes: Sizes) -> float:
    batch = 64 * 40.0 * (params.box or 4 * params.size) ** 2
    return 8.0 * sizes["y"] * sizes["x"] + batch + 4.0 * sizes.get("slot", 1000) * params.size**2


REASONS = {
    1: "it is too close to the border of the micrograph",
    2: "its refined centre is unknown",
    3: "it is too close to another particle",
    4: "it is not in the map, which does not explain it",
}
"""Meaning of the numbers in ``left_out_reason``."""

CENTRES = (("centre_y_angstrom", "centre_x_angstrom"), ("class_centre_y_angstrom", "class_centre_x_angstrom"))
"""Refined centres in order of preference: of a 3D refinement, of a 2D classification."""
_ROUNDING_PX = 1e-6
"""Positions are stored in angstrom: rounding must not move a whole pixel to the one before it."""


def _check(params: ExtractParams, inputs: dict[str, list[Product]]) -> Iterator[str]:
    particles, exposures = inputs["particles"][0], inputs["exposures"][0]
    if params.recentre and not {"pose", "alignment2d"} & set(particles.parts):
        yield (
            f"recentre needs refined positions, but {particles.ref} has none. Add classify2d or refine3d before it, or leave out recentre."
        )
    sizes = sorted(exposures.pixel_sizes)
    if len(sizes) > 1 and params.box_angstrom is None:
        yield (
            f"the exposures have pixel sizes of {' and '.join(f'{s:g} A' for s in sizes)}, so a box in pixels has different lengths. "
            "Set box_angstrom and pixel_size_angstrom."
        )
    if params.pixel_size_angstrom is not None and sizes and params.pixel_size_angstrom < sizes[-1]:
        yield (
            f"pixel_size_angstrom is {params.pixel_size_angstrom:g}, finer than the {sizes[-1]:g} A of the exposures: images "
            f"are downscaled, not enlarged. Set {sizes[-1]:g} or more."
        )


@stage(
    version=4,
    needs=["micrograph_dw", "pixel_size_angstrom", "particle_id", "position_y_angstrom", "position_x_angstrom"],
    optional=[*(name for pair in CENTRES for name in pair), "in_map"],
    gives=[
        "particle_id", "particle_image", "particle_y", "particle_x", "particle_count", "particle_pixel_size_angstrom",
        "left_out_id", "left_out_reason",
    ],
    ports=["exposures[micrograph, optics]", port("particles[position, pose?, alignment2d?]", also_if="recentre", subtracted=True)],
    outputs=[Output("particles", "particles", ("image",), on="particles", subset=True)],
    check=_check,
    reasons=REASONS,
    sizes=_sizes,
    resources=Resources(memory=_memory),
)  # fmt: skip
def extract(
    params: ExtractParams,
    *,
    micrograph_dw: np.ndarray,
    pixel_size_angstrom: float,
    particle_id: np.ndarray,
    position_y_angstrom: np.ndarray,
    position_x_angstrom: np.ndarray,
    centre_y_angstrom: np.ndarray | None = None,
    centre_x_angstrom: np.ndarray | None = None,
    class_centre_y_angstrom: np.ndarray | None = None,
    class_centre_x_angstrom: np.ndarray | None = None,
    in_map: np.ndarray | None = None,
    context: Context,
) -> dict[str, Any]:
    """Extract particles from the dose-weighted micrograph, as RELION does.

    The pixel of a pick, rounded down, is at index n // 2 of the box; ``particle_y`` and ``particle_x`` are its position. With
    ``recentre`` it is the refined centre, with subpixel accuracy: that of the last 3D refinement, else of the last 2D classification. A
    particle closer to the border than 0.4 background diameters is left out, with that reason, and so is one that is closer than
    ``nearer_than_angstrom`` to another, as two picks of one particle are after recentring, and, with ``recentre``, one that the refinement
    has left out of its map: its centre means nothing. Other box pixels beyond the border are filled
    with the mirrored micrograph. Boxes are inverted to white protein, downscaled in Fourier space, a background plane is subtracted,
    and they are normalised to mean 0 and standard deviation 1 outside ``background_diameter_angstrom``.
    """
    import torch

    from cryodask.kernels.extraction import extract_particles

    image = np.asarray(micrograph_dw, np.float32)
    check_micrograph(image)
    pixel = float(pixel_size_angstrom)
    box, reduced, image_pixel = params.cut(pixel)
    if box > min(image.shape):
        raise MicrographError(
            f"a box of {box} pixels is larger than the micrograph, {image.shape[0]} x {image.shape[1]}",
            "extract.box was given in Angstrom, or the micrograph is binned",
            "reduce extract.box",
        )
    length = params.size * image_pixel
    diameter = params.background_diameter_angstrom or 0.75 * length
    if diameter > length:
        raise MicrographError(
            f"a background diameter of {diameter:g} A leaves no background in a box of {length:g} A",
            "the pixel size is wrong",
            "increase extract.box or reduce extract.background_diameter_angstrom",
        )
    ids = np.asarray(particle_id, np.int64)
    places = np.stack([np.asarray(p, np.float64) for p in (position_y_angstrom, position_x_angstrom)], -1).reshape(-1, 2) / pixel
    if params.recentre:
        refined = ((centre_y_angstrom, centre_x_angstrom), (class_centre_y_angstrom, class_centre_x_angstrom))
        pair = next(((y, x) for y, x in refined if y is not None and x is not None), None)
        if pair is None:
            raise MicrographError("recentre is set, but there are no refined centres.", "", "leave out recentre")
        places = np.stack([np.asarray(p, np.float64) for p in pair], -1).reshape(-1, 2) / pixel
    known: Any = np.isfinite(places).all(1)
    places = np.where(known[:, None], places, 0.0)
    if not params.recentre:
        # coordinates of picks are rounded down, as in relion_preprocess
        places = np.floor(places + _ROUNDING_PX).astype(np.int64)
    reach, size = _EDGE * diameter / pixel, np.array(image.shape, np.int64)
    outside = int((known & ~((places >= 0) & (places < size)).all(1)).sum())
    if 2 * outside > len(ids):
        raise MicrographError(
            f"{outside} of {len(ids)} particles lie outside the micrograph, {image.shape[0]} x {image.shape[1]} pixels of {pixel:g} A",
            "their coordinates are pixels of another size, or belong to another micrograph",
            "give the coordinates in pixels of this micrograph",
        )
    foreign = np.zeros(len(ids), bool) if in_map is None or not params.recentre else ~np.asarray(in_map, bool)
    whole = known & ~foreign & (places >= reach).all(1) & (places <= size - 1 - reach).all(1)
    limit = params.nearer_than_angstrom or pixel * (1.0 - _ROUNDING_PX)
    near = np.zeros(len(ids), bool)
    near[whole] = too_near(ids[whole], places[whole] * pixel, np.zeros(int(whole.sum())), limit)
    whole &= ~near
    rows, columns = places[whole].T.copy()
    particles = extract_particles(
        torch.from_numpy(image).to(context.device),
        torch.from_numpy(rows).to(context.device),
        torch.from_numpy(columns).to(context.device),
        box=box,
        size=params.size,
        reduced=reduced,
        background_radius_px=0.5 * diameter / image_pixel,
        invert=params.invert,
        ramp=params.ramp,
    )
    return {
        "particle_id": ids[whole],
        "left_out_id": ids[~whole],
        "left_out_reason": np.select([foreign, near, known], [4, 3, 1], 2)[~whole].astype(np.int8),
        "particle_image": particles.cpu().numpy(),
        "particle_y": rows.astype(np.float32),
        "particle_x": columns.astype(np.float32),
        "particle_count": len(rows),
        "particle_pixel_size_angstrom": image_pixel,
    }


@extract.figures
def draw(ds: xr.Dataset) -> Iterator[Picture]:
    """The first particles of some micrographs, and the total number."""
    from matplotlib.figure import Figure

    from cryodask.stages._map_pictures import draw_montage, montage

    counts = ds["particle_count"].values
    total = int(counts.sum())
    if not total:
        return
    chosen = np.flatnonzero(counts > 0)
    chosen = chosen[np.linspace(0, len(chosen) - 1, min(6, len(chosen))).astype(int)]
    columns = 8
    shown: list[np.ndarray | None] = []
    for i in chosen:
        images = ds["particle_image"].isel(micrograph=int(i), slot=slice(0, min(columns, int(counts[i])))).values
        shown += [*images, *[None] * (columns - len(images))]
    figure = Figure(figsize=(9, 1.15 * len(chosen)), layout="constrained")
    draw_montage(figure.subplots(), montage(shown, columns)[0], vmin=-3, vmax=4)
    pixel = float(ds["particle_pixel_size_angstrom"].values[0])
    size = ds.sizes["x"]
    caption = (
        f"{total} particles of {size} x {size} pixels of {pixel:.3f} Å from {len(counts)} micrographs "
        f"(median {int(np.median(counts))} each); "
        "the first ones of some micrographs, one row each, protein white."
    )
    yield Picture("Particles", caption, figure)
