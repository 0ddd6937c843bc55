"""Stage ``import_picks``: picks from another program."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from cryodask.errors import MicrographError, StarError
from cryodask.formats.star import bare, read_coordinates, stem
from cryodask.products import Product
from cryodask.stage import Context, Output, Params, SourceFile, stage

_SAME = 0.01
"""Relative difference of pixel sizes up to which coordinates are in the same pixels: a pixel size may be calibrated later."""


class ImportPicksParams(Params):
    """Parameters of ``import_picks``."""

    folder: SourceFile = Field(description="folder of STAR files with picks, one per micrograph: NAME.star or NAME_anything.star")


def _check(params: ImportPicksParams, inputs: dict[str, list[Product]]) -> Iterator[str]:
    folder = Path(params.folder)
    if folder.is_file():
        yield f"{folder} is a file. Give the folder with one STAR file of picks per micrograph."
    elif folder.is_dir() and not any(folder.glob("*.star")):
        yield f"There is no STAR file in {folder}. Give the folder with the picks: NAME.star or NAME_anything.star."


@stage(
    version=1,
    needs=["coordinates_path"],
    optional=["micrograph_name", "pixel_size_angstrom"],
    ports=["exposures[micrograph, optics?]"],
    outputs=[Output("particles", "particles", ("position", "score"), births=True)],
    gives=["pick_y", "pick_x", "pick_score"],
    check=_check,
    light=lambda params: True,
)
def import_picks(
    params: ImportPicksParams,
    *,
    coordinates_path: str,
    micrograph_name: str | None = None,
    pixel_size_angstrom: float | None = None,
    context: Context,
) -> dict[str, Any]:
    """Read the picks of a micrograph from a RELION coordinate STAR file; all of them count as accepted.

    Coordinates are pixels of the micrograph; a file that gives another pixel size is refused. Rows that name another micrograph
    are ignored. A pick is recognised by its position, within 1 pixel; of several at one position, the best is used.
    """
    try:
        columns = read_coordinates(coordinates_path)
    except StarError as error:
        raise MicrographError(error.what, error.usual_reason, error.way_out) from error
    told = columns.get("pixel_size_angstrom", np.zeros(0))
    other = [size for size in np.unique(told).tolist() if pixel_size_angstrom and abs(size / pixel_size_angstrom - 1) > _SAME]
    if other:
        raise MicrographError(
            f"{coordinates_path} has coordinates in pixels of {other[0]:g} A, the micrograph has pixels of {pixel_size_angstrom:g} A.",
            "they were picked in binned micrographs",
            "convert them to pixels of this micrograph, and remove or correct rlnMicrographPixelSize",
        )
    mine = np.ones(len(columns["particle_y"]), bool)
    if micrograph_name and "micrograph_name" in columns:
        mine = _of(coordinates_path, columns["micrograph_name"], micrograph_name)
    y, x = (np.asarray(columns[k], np.float32)[mine] for k in ("particle_y", "particle_x"))
    score = np.nan_to_num(np.asarray(columns.get("pick_score", np.zeros(len(mine))), np.float32)[mine])
    return {"pick_y": y, "pick_x": x, "pick_score": score}


def _of(path: str, named: np.ndarray, micrograph: str) -> np.ndarray:
    """Mask of the rows that are picks of a micrograph: those of its name, or of the only name that begins with it."""
    stems = [bare(stem(str(name))) for name in named]
    own = bare(micrograph)
    names = set(stems)
    longer = sorted(n for n in names if n.startswith(own) and not n[len(own) : len(own) + 1].isalnum())
    name = own if own in names or not names else longer[0] if len(longer) == 1 else None
    if name is None:
        raise MicrographError(
            f"No row of {path} is of {micrograph}: they name {', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''}.",
            "the file belongs to another micrograph",
            "name the file as the micrograph of its rows",
        )
    return np.array([one == name for one in stems], bool)
