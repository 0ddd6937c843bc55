"""Stage ``annotate``: a user-defined number per particle."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from cryodask.errors import InputError
from cryodask.products import Product
from cryodask.stage import InputFile, Output, Params, SetView, port, stage
from cryodask.store.identity import aligned, parse_id, place_of


class AnnotateParams(Params):
    """Parameters of ``annotate``."""

    file: InputFile | None = Field(None, description="CSV with a header and the columns particle_id and value; without it the step waits")


def _check(params: AnnotateParams, inputs: dict[str, list[Product]]) -> Iterator[str]:
    if params.file is not None and Path(params.file).is_file():
        try:
            _read(params.file)
        except InputError as error:
            yield f"{error.what} {error.way_out[:1].upper()}{error.way_out[1:]}."


@stage(
    version=1,
    shape="set",
    needs=[],
    gives=["annotation"],
    ports=[port("particles:particles", copies=True, subtracted=True, whole=True)],
    outputs=[Output("particles", "particles", ("note",), on="particles")],
    check=_check,
    person=True,
)
def annotate(params: AnnotateParams, inputs: dict[str, list[SetView]]) -> dict[str, Any]:
    """Add a number per particle from a user's table; particles that it does not list get NaN.

    Particles are identified by ``particle_id``: the integer, or ``birth.row.number``.
    """
    particles = inputs["particles"][0]
    named, values = _read(str(params.file))
    order = np.argsort(named)
    known = place_of(particles.ids, named[order])
    if len(named) and (known < 0).all():
        raise InputError(
            f"{params.file} lists none of the {len(particles.ids)} particles of {particles.name}.",
            "it was made from another project, or from another step",
            "use the ids in project.particles(STEP)['particle_id']",
        )
    return {"particle_id": particles.ids, "annotation": aligned(values[order], known)}


def _read(path: str) -> tuple[np.ndarray, np.ndarray]:
    """Ids and values of a table.

    Raises
    ------
    InputError
        If columns are missing, a value is not a number or an id, or a particle is listed twice.
    """
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
        columns = [c or "" for c in reader.fieldnames or ()]
    if not {"particle_id", "value"} <= set(columns):
        raise InputError(
            f"{path} has the columns {', '.join(columns) or 'of an empty file'}.", "", "name its columns particle_id and value"
        )
    try:
        ids = np.array([parse_id(row["particle_id"].strip()) for row in rows], np.int64)
        values = np.array([float(row["value"]) for row in rows], np.float64)
    except (ValueError, AttributeError, TypeError) as error:
        raise InputError(f"{path} has a value that is not a number: {error}.", "a row is truncated", "correct the table") from error
    if len(np.unique(ids)) < len(ids):
        raise InputError(f"{path} lists a particle more than once.", "two tables were concatenated", "keep one row per particle")
    return ids, values
