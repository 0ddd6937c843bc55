"""Stage ``import_particles``: particles from another program."""

from __future__ import annotations

import functools
import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, field_validator

from cryodask.errors import InputError
from cryodask.formats.star import ParticleTable, read_labels, read_optics, read_particle_table
from cryodask.stage import Context, Output, Params, SourceFile, stage
from cryodask.stages._particle_images import imported_images
from cryodask.stages._particle_tables import check_table, common_size, kinds_of_images, one_optics, pixel_of_positions
from cryodask.vocabulary import CTF_COLUMNS, OPTICS

_ANGLES = ("rot_deg", "tilt_deg", "psi_deg")
_ORIGINS = ("origin_y_angstrom", "origin_x_angstrom")
_NEEDED = (
    *(*CTF_COLUMNS, *OPTICS, *_ANGLES, *_ORIGINS, "particle_y", "particle_x", "half_set", "class_number", "log_likelihood"),
    *("particle_pixel_size_angstrom", "pixel_size_angstrom", "particle_id", "birth_y", "birth_x"),
    *("box", "phase_flipped", "ctf_b_factor_angstrom2", "ctf_scale_factor", "cryosparc_uid"),
)


_ANY = frozenset(
    {"rlnCoordinateX", "rlnCoordinateY", "rlnImageName", "rlnDefocusU", "rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi", "rlnClassNumber"}
)
"""Columns that a table may have, for a plan that is made before its files exist."""


class ImportParticlesParams(Params):
    """Parameters of ``import_particles``."""

    star: SourceFile = Field(description="RELION STAR file of particles")
    images: bool = Field(True, description="import the images from the stacks as well; without them the particles must be extracted")
    pixel_size_angstrom: float | None = Field(
        None,
        gt=0,
        description="pixel size to which the images are scaled in Fourier space, for a file with several pixel sizes or boxes, Angstrom; "
        "at least the largest of them. The box is the shortest of them in Angstrom",
    )
    box: int | None = Field(
        None,
        ge=8,
        description="box size of the images, pixels, even: after scaling they are cropped to it, or padded with their mirrored edges, so "
        "that they can be merged with others",
    )

    micrograph_pixel_size_angstrom: float | None = Field(
        None,
        gt=0,
        description="pixel size of the micrographs in whose pixels the file gives positions, Angstrom; only for a file that does not say "
        "it and whose images were scaled",
    )
    invert: bool = Field(False, description="invert the contrast of the images: in the file protein is dark")

    @field_validator("box")
    @classmethod
    def _even(cls, box: int | None) -> int | None:
        if box is not None and box % 2:
            raise ValueError(f"must be even, {box} is odd (RELION and cryodask define the origin of odd boxes differently)")
        return box


def _outputs(params: ImportParticlesParams) -> tuple[Output, ...]:
    there = Path(getattr(params, "star", "")).is_file()
    labels, groups = (read_labels(params.star, "particles", "images", ""), read_optics(params.star)) if there else (_ANY, [])
    has = {
        "position": {"rlnCoordinateX", "rlnCoordinateY"} <= labels,
        "score": True,
        "image": params.images and "rlnImageName" in labels,
        "ctf": "rlnDefocusU" in labels,
        "pose": {"rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"} <= labels,
        "class2d": "rlnClassNumber" in labels,
    }
    parts = tuple(part for part, there in has.items() if there)
    sizes = frozenset(g["pixel_size_angstrom"] for g in groups if "pixel_size_angstrom" in g)
    images = {(int(g["box"]), g["particle_pixel_size_angstrom"]) for g in groups if g.keys() >= {"box", "particle_pixel_size_angstrom"}}
    wanted, box = getattr(params, "pixel_size_angstrom", None), getattr(params, "box", None)
    if images and all(g.keys() >= {"box", "particle_pixel_size_angstrom"} for g in groups):
        images = {(common_size(images, wanted), wanted)} if wanted else images
        images = {(box, pixel) for _, pixel in images} if box else images
    image = images.pop() if len(images) == 1 and has["image"] else None
    return (
        Output("exposures", "exposures", ("optics",), pixel_sizes=sizes),
        Output("particles", "particles", parts, births=True, frame="unknown" if has["pose"] else "", image=image),
    )


class _NoImages:
    """Placeholder for images of particles that are to be extracted: nothing is stored."""

    stored, shape, dtype = False, (0, 8, 8), np.dtype(np.float32)

    def __len__(self) -> int:
        return 0


@functools.lru_cache(maxsize=2)
def _table(path: str, mtime: float) -> ParticleTable:
    return read_particle_table(path)


def read_table(path: str) -> ParticleTable:
    """The table of a STAR file, cached."""
    return _table(path, os.path.getmtime(path))


def rows_of(table: ParticleTable, rows: np.ndarray) -> dict[str, Any]:
    """Some particles of a table as columns, with the names of their stacks, to be sent along with an item."""
    columns = {name: table.columns[name][rows] for name in _NEEDED if name in table.columns}
    used, codes = np.unique(table.stack[rows], return_inverse=True)
    names = [table.stacks[int(i)] for i in used]
    kept = table.kept_optics
    texts = [kept.names[int(i)] for i in np.unique(kept.codes[rows])] if kept is not None else []
    return {**columns, "stacks": names, "stack": codes, "image_index": table.image_index[rows], "relion_optics": texts}


def checked(table: ParticleTable, params: ImportParticlesParams) -> int | None:
    """Refuse a table that the stage cannot use; the box of its images in pixels, if they are scaled, cropped or padded.

    Raises
    ------
    InputError
    """
    check_table(params.star, table, images=params.images)
    return kinds_of_images(params.star, table, params.pixel_size_angstrom, params.box) if params.images else None


@stage(
    version=3,
    needs=["particles_path", "micrograph_name"],
    optional=["particle_rows", "pixel_size_angstrom"],
    ports=["exposures?:exposures[optics]"],
    outputs=_outputs,
    light=lambda params: not params.images,
    gives=[
        "particle_image", "particle_y", "particle_x", "particle_count", "particle_pixel_size_angstrom", "pick_y", "pick_x", "pick_score",
        "natural_key", "particle_defocus_u_angstrom", "particle_defocus_v_angstrom", "particle_defocus_angle_deg",
        "particle_phase_shift_deg", "rot_deg", "tilt_deg", "psi_deg", "centre_y_angstrom", "centre_x_angstrom", "log_likelihood",
        "class_number", "class_probability", "voltage_kv", "spherical_aberration_mm", "amplitude_contrast",
        "pixel_size_angstrom", "relion_optics", "ctf_b_factor_angstrom2", "ctf_scale_factor", "cryosparc_uid",
    ],
)  # fmt: skip
def import_particles(
    params: ImportParticlesParams,
    *,
    particles_path: str,
    micrograph_name: str,
    particle_rows: dict[str, Any] | None = None,
    pixel_size_angstrom: float | None = None,
    context: Context,
) -> dict[str, Any]:
    """Read the particles of one micrograph from a RELION STAR file and its stacks, each with its own defocus, pose and half-set.

    Images are taken as RELION extracts them: protein white, background mean 0 and standard deviation 1. Images with another background
    are normalised, phase-flipped ones are flipped back, and those that were multiplied by their CTF are refused. The optics of a
    micrograph are those of its own rows, which must agree. Beam tilt, higher aberrations, magnification, MTF, B factors and scale factors
    are kept for the export; no stage uses them. A particle is recognised by the name of its image, or by its position within 1 pixel,
    whatever the order of the file. One that was exported from this project is recognised by its id, if its position at birth in the file
    confirms it; ids of another project are ignored. Of several rows with the same image or position, the first in the file is used; the
    run reports the others, and rows whose particle already exists. Origins become positions in the exposure.
    """
    rows = particle_rows
    if rows is None:
        table = read_table(particles_path)
        size = checked(table, params.model_copy(update={"star": particles_path}))
        known = micrograph_name in table.micrographs
        rows = rows_of(table, table.rows_of(table.micrographs.index(micrograph_name)) if known else np.zeros(0, np.int64)) | {"size": size}
    count = len(rows["image_index"])
    if "defocus_u_angstrom" not in rows and params.images:
        raise InputError(f"{particles_path} has no rlnDefocusU.", "the CTF was not estimated before extraction", "estimate the CTF first")

    optics = one_optics(particles_path, micrograph_name, rows)

    def column(name: str, fill: float = np.nan) -> np.ndarray:
        return np.asarray(rows[name], np.float64) if name in rows else np.full(count, fill)

    own_pixel = float(column("particle_pixel_size_angstrom", 1.0)[0]) if count else 1.0
    image_pixel = params.pixel_size_angstrom if params.pixel_size_angstrom and params.images else own_pixel
    placed = "particle_y" in rows and "particle_x" in rows
    told = float(column("pixel_size_angstrom")[0]) if count else np.nan
    pixel = pixel_of_positions(particles_path, told, params.micrograph_pixel_size_angstrom, pixel_size_angstrom) or own_pixel
    y, x = (column(n, 0.0) for n in ("particle_y", "particle_x"))
    box = [np.floor(v + 1e-6) if placed else v for v in (y, x)]
    centre = [b * pixel - column(n, 0.0) for b, n in zip(box, _ORIGINS)]
    u = column("defocus_u_angstrom")
    ctf = {"defocus_v_angstrom": column("defocus_v_angstrom") if "defocus_v_angstrom" in rows else u, "defocus_u_angstrom": u}
    ctf |= {name: column(name, 0.0) for name in ("defocus_angle_deg", "phase_shift_deg")}
    # a reimported table may no longer have rows of an exposure
    images: Any = _NoImages()
    if params.images and count:
        images = imported_images(particles_path, micrograph_name, rows, params.pixel_size_angstrom, invert=params.invert)
    return {
        "particle_image": images,
        "particle_y": box[0],
        "particle_x": box[1],
        "particle_count": len(images),
        "particle_pixel_size_angstrom": image_pixel,
        "pick_y": y,
        "pick_x": x,
        "pick_score": np.zeros(count, np.float32),
        "natural_key": _natural_keys(rows),
        "half_set": np.asarray(rows.get("half_set", np.full(count, -1)), np.int8),
        "claimed_id": np.asarray(rows.get("particle_id", np.zeros(count)), np.int64),
        **{f"claimed_{axis}": column(f"birth_{axis}") for axis in "yx" if f"birth_{axis}" in rows},
        "placed": placed,
        **{f"particle_{name}": values for name, values in ctf.items()},
        **{name: column(name) for name in (*_ANGLES, "log_likelihood", "ctf_b_factor_angstrom2", "ctf_scale_factor")},
        "centre_y_angstrom": centre[0],
        "centre_x_angstrom": centre[1],
        "class_number": np.asarray(rows.get("class_number", np.zeros(count)), np.int32),
        "class_probability": np.ones(count, np.float32),
        "cryosparc_uid": np.asarray(rows.get("cryosparc_uid", np.zeros(count)), np.int64),
        "pixel_size_angstrom": pixel,
        **optics,
    }


def _natural_keys(rows: dict[str, Any]) -> np.ndarray:
    """One number per particle: a 63-bit hash of its stack's name and its index there."""
    stems = [int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") for name in rows["stacks"]]
    with np.errstate(over="ignore"):
        z = np.array(stems, np.uint64)[rows["stack"]] ^ (rows["image_index"].astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(1)).astype(np.int64)
