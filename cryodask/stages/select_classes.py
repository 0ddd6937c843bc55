"""Stage ``select_classes``: manual selection of 2D classes."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from pydantic import Field

from cryodask.errors import InputError
from cryodask.stage import ChoiceMark, Context, Output, Params, port, stage

REASONS = {1: "its class was not chosen", 2: "it was never classified"}
"""Meaning of the numbers in ``removal_reason``."""


class SelectClassesParams(Params):
    """Parameters of ``select_classes``."""

    keep: Annotated[tuple[Annotated[int, Field(ge=1)], ...], ChoiceMark] = Field(
        (), description="numbers of the classes to keep, from 1; without any the step waits"
    )


@stage(
    version=2,
    shape="whole",
    needs=["class_number", "class_average", "class_share"],
    optional=["class_pixel_size_angstrom", "class_resolution_angstrom", "class_score"],
    gives=["class_average", "class_share", "class_pixel_size_angstrom", "class_resolution_angstrom", "class_score"],
    ports=[port("particles[class2d]", copies=True, whole=True), "classes[averages, scores?]"],
    outputs=[
        Output("particles", "particles", on="particles", subset=True),
        Output("classes", "classes", ("averages", "scores"), on="classes"),
    ],
    person=True,
    reasons=REASONS,
)
def select_classes(
    params: SelectClassesParams,
    *,
    class_number: np.ndarray,
    class_average: np.ndarray,
    class_share: np.ndarray,
    class_pixel_size_angstrom: float | None = None,
    class_resolution_angstrom: np.ndarray | None = None,
    class_score: np.ndarray | None = None,
    context: Context,
) -> dict[str, Any]:
    """Keep the particles of manually chosen classes. Without a choice the step waits, and other branches of the run continue.

    Numbers belong to one classification: when it is recomputed, the step stops until the choice is confirmed or changed.
    """
    count = len(class_share)
    unknown = [k for k in params.keep if not 1 <= k <= count]
    if unknown:
        raise InputError(f"There are no classes {unknown}: numbers run from 1 to {count}.", "", "check the classes in the report")
    number = np.asarray(class_number)
    kept = np.isin(number, params.keep)
    chosen = np.isin(np.arange(1, count + 1), params.keep)
    values: dict[str, np.ndarray | None] = {"class_average": class_average, "class_share": class_share}
    values |= {"class_resolution_angstrom": class_resolution_angstrom, "class_score": class_score}
    classes: dict[str, Any] = {name: np.asarray(v)[chosen] for name, v in values.items() if v is not None}
    if class_pixel_size_angstrom is not None:
        classes["class_pixel_size_angstrom"] = float(class_pixel_size_angstrom)
    return {"particle_kept": kept, "removal_reason": np.where(kept, 0, np.where(number > 0, 1, 2)).astype(np.int8), **classes}
