"""Stage ``import_picks``: picks from another program."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from cryodask.errors import MicrographError, StarError
from cryodask.formats.star import read_coordinates
from cryodask.products import Product
from cryodask.stage import Context, Output, Params, SourceFile, stage


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
    ports=["exposures[micrograph]"],
    outputs=[Output("particles", "particles", ("position", "score"), births=True)],
    gives=["pick_y", "pick_x", "pick_score"],
    check=_check,
    light=lambda params: True,
)
def import_picks(params: ImportPicksParams, *, coordinates_path: str, context: Context) -> dict[str, Any]:
    """Read the picks of a micrograph from a RELION coordinate STAR file; all of them count as accepted.

    A pick is recognised by its position, within 1 pixel. One that is listed twice counts once.
    """
    try:
        columns = read_coordinates(coordinates_path)
    except StarError as error:
        raise MicrographError(error.what, error.usual_reason, error.way_out) from error
    y, x = (np.asarray(columns[k], np.float32) for k in ("particle_y", "particle_x"))
    score = np.nan_to_num(np.asarray(columns.get("pick_score", np.zeros(len(y))), np.float32))
    return {"pick_y": y, "pick_x": x, "pick_score": score}
