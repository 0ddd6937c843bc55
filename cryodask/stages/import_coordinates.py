"""Stage ``import_coordinates``: picks of another program."""

from __future__ import annotations

from typing import Any

import numpy as np

from cryodask.errors import MicrographError, StarError
from cryodask.formats.star import read_coordinates
from cryodask.stage import Params, stage


class ImportCoordinatesParams(Params):
    """No parameters."""


@stage(version=1, needs=["coordinates_path"], gives=["pick_y", "pick_x", "pick_score", "pick_accepted", "pick_count"])
def import_coordinates(params: ImportCoordinatesParams, *, coordinates_path: str, device: str = "cpu") -> dict[str, Any]:
    """Read the picks of a micrograph from a RELION coordinate STAR file; all of them count as accepted."""
    try:
        columns = read_coordinates(coordinates_path)
    except StarError as error:
        raise MicrographError(error.what, error.usual_reason, error.way_out) from error
    y, x = (np.asarray(columns[k], np.float32) for k in ("particle_y", "particle_x"))
    score = np.asarray(columns.get("pick_score", np.zeros(len(y))), np.float32)
    return {"pick_y": y, "pick_x": x, "pick_score": score, "pick_accepted": np.ones(len(y), np.int8), "pick_count": len(y)}
