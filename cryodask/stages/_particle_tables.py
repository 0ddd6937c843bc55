"""What a table of particles from another program says about its images, and what of it an import can use."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from cryodask.errors import InputError, MicrographError
from cryodask.formats.mrc import open_mrc
from cryodask.formats.star import COLUMNS, ParticleTable, in_micrometres
from cryodask.stages._particle_images import SAME_PIXEL_SIZE, stack_beside
from cryodask.vocabulary import CTF_COLUMNS, OPTICS

_SAME_SIZE = 1.005
"""Ratio of two pixel sizes of micrographs up to which they count as one, as for imported picks."""
_OF_A_MICROGRAPH = (*OPTICS, "pixel_size_angstrom")
_NEEDED = (
    *(*CTF_COLUMNS, "particle_y", "particle_x", "rot_deg", "tilt_deg", "psi_deg"),
    *("origin_y_angstrom", "origin_x_angstrom", "birth_y", "birth_x"),
)
_RELION = {c.name: c.relion for c in COLUMNS}


def check_table(star: str, table: ParticleTable, *, images: bool) -> None:
    """Refuse a table of images that no stage can use.

    Raises
    ------
    InputError
        Of subtomograms; if the images are used, of images that were multiplied by their CTF.
    """

    def unlike(name: str, value: int) -> int:
        return int((table.columns.get(name, np.zeros(0)) != value).sum())

    if count := unlike("image_dimensions", 2):
        raise InputError(
            f"{count:,} rows of {star} are not images but have another rlnImageDimensionality, such as subtomograms.",
            "",
            "give a table of images",
        )
    count = unlike("ctf_premultiplied", 0)
    if images and count:
        raise InputError(
            f"{count:,} images of {star} were multiplied by their CTF (rlnCtfDataAreCtfPremultiplied), and no stage can use these.",
            "",
            "extract them again without that option, or take only their positions, import_particles: {images: false}, and extract here",
        )


def kinds_of_images(star: str, table: ParticleTable, pixel_size_angstrom: float | None, wanted_box: int | None = None) -> int | None:
    """The common box in pixels for images that are to be scaled, cropped or padded, else None.

    Raises
    ------
    InputError
        If the table says that boxes or pixel sizes differ and nothing else is asked for, or the scale is finer than an image.
    """
    pixel = table.columns.get("particle_pixel_size_angstrom", np.ones(len(table)))
    box = table.columns.get("box")
    if box is None and pixel_size_angstrom is not None and wanted_box is None:
        box = np.array([_box(star, name) for name in table.stacks], np.int64)[table.stack]
    pairs = np.unique(np.stack([box if box is not None else np.zeros(len(table)), pixel], 1)[table.order], axis=0)
    kinds = {(int(edge), float(one)) for edge, one in pairs}
    if not kinds:
        return None
    finest, coarsest = min(p for _, p in kinds), max(p for _, p in kinds)
    if pixel_size_angstrom is not None:
        if pixel_size_angstrom * SAME_PIXEL_SIZE < coarsest:
            raise InputError(
                f"pixel_size_angstrom is {pixel_size_angstrom:g}, but {star} has images of {coarsest:g} A.",
                "",
                f"images are downscaled, not enlarged: set {coarsest:g} or more",
            )
        return wanted_box or common_size(kinds, pixel_size_angstrom)
    if (len({edge for edge, _ in kinds}) > 1 and wanted_box is None) or coarsest > SAME_PIXEL_SIZE * finest:
        text = " and ".join(f"{f'{edge} pixels of ' if edge else ''}{one:g} A" for edge, one in sorted(kinds))
        raise InputError(
            f"{star} has images of {text}.",
            "its optics groups have other magnifications or boxes",
            f"set import_particles: {{pixel_size_angstrom: {coarsest:g}}} to scale all to the coarsest, or import each group by itself",
        )
    return wanted_box


def common_size(kinds: Iterable[tuple[int, float]], pixel_size_angstrom: float) -> int:
    """The even box, pixels, that all images can fill at a pixel size: the shortest of their boxes (pixels, Angstrom per pixel)."""
    return max(2, 2 * math.floor(min(box * pixel for box, pixel in kinds) / pixel_size_angstrom / 2 + 1e-3))


def _box(star: str, stack: str) -> int:
    return int(open_mrc(stack_beside(stack, star), MicrographError).shape[-1])


def one_optics(star: str, micrograph: str, rows: Mapping[str, Any]) -> dict[str, Any]:
    """Voltage, Cs, amplitude contrast, and what is only kept, of the one optics group that all rows of a micrograph must belong to.

    Raises
    ------
    MicrographError
        If they differ, or a number that is needed is missing in some rows.
    """
    for name in _NEEDED:
        missing = int(np.isnan(rows[name]).sum()) if name in rows else 0
        if missing:
            raise MicrographError(
                f"{_RELION[name]} of {missing} of {len(rows[name])} particles of {micrograph} is not a number in {star}.",
                "the program that wrote it failed for these rows",
                "remove them from the STAR file",
            )
    for name in ("defocus_u_angstrom", "defocus_v_angstrom"):
        if name in rows and (small := in_micrometres(rows[name])).any():
            raise MicrographError(
                f"{_RELION[name]} of {small.sum()} of {len(small)} particles of {micrograph} is at most "
                f"{np.abs(rows[name])[small].max():g} A in {star}.",
                "it is in micrometres",
                "write it in Angstrom",
            )
    out: dict[str, Any] = dict.fromkeys(OPTICS, np.nan)
    for name in _OF_A_MICROGRAPH:
        values = np.unique(np.asarray(rows[name], np.float64)) if name in rows else np.zeros(0)
        if len(values) > 1:
            raise MicrographError(
                f"The particles of {micrograph} have a {name} of {' and '.join(f'{v:g}' for v in values)} in {star}.",
                "rows of two sessions have the same micrograph name, or the optics groups were mixed up",
                "give the micrographs of each session their own names",
            )
        if len(values) and name in out:
            out[name] = float(values[0])
    kept = rows.get("relion_optics", [])
    if len(kept) > 1:
        raise MicrographError(
            f"The particles of {micrograph} have different beam tilts, aberrations, magnifications or MTFs in {star}.",
            "rows of two sessions have the same micrograph name",
            "give the micrographs of each session their own names",
        )
    return {**out, "relion_optics": kept[0] if kept else ""}


def pixel_of_positions(star: str, told: float, given: float | None, exposure: float | None) -> float | None:
    """Pixel size of a micrograph by its table (NaN if that does not say it), the parameters, or the exposure; None if none knows it.

    Raises
    ------
    MicrographError
        If two of them differ by more than 0.5%: positions would be read in wrong pixels.
    """
    sizes = {f"by {star}": told, "by micrograph_pixel_size_angstrom": given or math.nan, "in the exposures": exposure or math.nan}
    known = {where: size for where, size in sizes.items() if math.isfinite(size)}
    if known and max(known.values()) > _SAME_SIZE * min(known.values()):
        raise MicrographError(
            f"The micrographs have pixels of {' and '.join(f'{size:g} A {where}' for where, size in known.items())}.",
            "the positions were found in binned micrographs, or in those of another magnification",
            "correct the pixel size, or give the micrographs in which they were found",
        )
    return next(iter(known.values()), None)


def unknown_pixel(table: ParticleTable, given: float | None, *, exposures: bool) -> list[str]:
    """A sentence if nothing says in which pixels a table counts positions, so that those of its images are taken."""
    sizes = table.columns.get("particle_pixel_size_angstrom", np.zeros(0))
    if exposures or given or "pixel_size_angstrom" in table.columns or "particle_x" not in table.columns or not len(sizes):
        return []
    return [
        f"the file does not say the pixel size of its micrographs, so its positions are taken to be in pixels of {sizes[0]:g} A, as its "
        "images. If these were scaled at extraction, set micrograph_pixel_size_angstrom"
    ]


def uncorrected(table: ParticleTable) -> list[str]:
    """What the table says about optical aberrations that no stage corrects, as sentences with figures."""
    groups = [json.loads(text) for text in table.kept_optics.names] if table.kept_optics is not None else []
    out = []
    tilt = max((math.hypot(_number(g.get("rlnBeamTiltX")), _number(g.get("rlnBeamTiltY"))) for g in groups), default=0.0)
    if tilt > 0:
        out.append(f"beam tilt of up to {tilt:.2g} mrad is kept for the export, but not corrected here")
    if any(_is_set(g.get(name)) for g in groups for name in ("rlnOddZernike", "rlnEvenZernike", "cryosparcTrefoil", "cryosparcTetrafoil")):
        out.append("higher-order aberrations (trefoil, tetrafoil and others) are kept for the export, but not corrected here")
    stretch = max((_stretch(g) for g in groups), default=0.0)
    if stretch > 0:
        out.append(
            f"a magnification that differs from the pixel size by up to {100 * stretch:.2g} % in a direction is kept for the "
            "export, but not corrected here"
        )
    return out


def _number(text: str | None) -> float:
    try:
        value = float(text or 0)
    except ValueError:
        return 0.0
    return value if math.isfinite(value) else 0.0


def _is_set(text: str | None) -> bool:
    return any(_number(one) for one in (text or "").strip("[]").split(","))


def _stretch(group: Mapping[str, str]) -> float:
    """Largest deviation of a magnification matrix from the identity, which cryoSPARC leaves out."""
    labels = ("rlnMagMat00", "rlnMagMat01", "rlnMagMat10", "rlnMagMat11")
    deviations = [np.array([_number(one) for one in group.get("cryosparcAnisomag", "0,0,0,0").strip("[]").split(",")])]
    if all(label in group for label in labels):
        deviations.append(np.array([_number(group[label]) for label in labels]) - np.eye(2).ravel())
    return max(float(np.linalg.norm(one.reshape(2, 2), 2)) for one in deviations if one.size == 4)
