"""Stage ``select_exposures``: exposures within limits."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

import numpy as np
from pydantic import Field, model_validator

from cryodask.errors import InputError
from cryodask.products import Product
from cryodask.stage import ExposureView, Output, Params, port, stage

REASONS = {
    1: "it was named in leave_out",
    2: "its CTF fit failed or is worse than worst_ctf_resolution_angstrom",
    3: "its motion is unknown or larger than largest_motion_angstrom",
    4: "its defocus is unknown or smaller than least_defocus_angstrom",
    5: "its defocus is unknown or larger than largest_defocus_angstrom",
    6: "it was excluded by eye",
}
"""Meaning of the numbers in ``removal_reason``."""

_NEEDS = {
    "worst_ctf_resolution_angstrom": ("ctf_quality", "the quality of the CTF fits", "ctf"),
    "largest_motion_angstrom": ("field", "the motion of the specimen", "motion"),
    "least_defocus_angstrom": ("ctf", "the defocus", "ctf"),
    "largest_defocus_angstrom": ("ctf", "the defocus", "ctf"),
}
"""Limit -> part that it needs, its description, and the stage that gives it."""


class SelectExposuresParams(Params):
    """Parameters of ``select_exposures``."""

    worst_ctf_resolution_angstrom: float | None = Field(
        None, gt=0, description="exposures whose CTF fit is worse than this resolution are left out, Angstrom"
    )
    largest_motion_angstrom: float | None = Field(
        None, gt=0, description="exposures with a larger motion of the specimen are left out, Angstrom"
    )
    least_defocus_angstrom: float | None = Field(
        None, description="exposures with a smaller defocus (mean of u and v) are left out, Angstrom, underfocus positive"
    )
    largest_defocus_angstrom: float | None = Field(
        None, description="exposures with a larger defocus (mean of u and v) are left out, Angstrom, underfocus positive"
    )
    leave_out: list[str] = Field(default_factory=list, description="names of exposures that are left out in any case")
    rows_excluded: tuple[int, ...] = Field(
        (), description="rows of exposures that were excluded by eye; filled in when the choice is frozen in the browser"
    )

    @model_validator(mode="after")
    def _in_order(self) -> SelectExposuresParams:
        least, largest = self.least_defocus_angstrom, self.largest_defocus_angstrom
        if least is not None and largest is not None and least > largest:
            raise ValueError(f"least_defocus_angstrom ({least:g}) must not exceed largest_defocus_angstrom ({largest:g})")
        return self


def _check(params: SelectExposuresParams, inputs: dict[str, list[Product]]) -> Iterator[str]:
    exposures = inputs["exposures"][0]
    for name, (part, words, giver) in _NEEDS.items():
        if getattr(params, name) is not None and part not in exposures.parts:
            yield f"{name} needs {words}, which {exposures.ref} does not give. Add {giver} before it, or leave out the limit."


@stage(
    version=1,
    shape="set",
    needs=[],
    gives=["exposure_row", "dropped_row", "removal_reason"],
    ports=[
        port(
            "exposures[ctf_quality?, field?, ctf?]",
            also_if={"ctf_quality": "worst_ctf_resolution_angstrom", "field": "largest_motion_angstrom"},
        )
    ],
    outputs=[Output("exposures", "exposures", ("kept",), on="exposures", subset=True)],
    check=_check,
    exposures_named=lambda params: params.leave_out,
    reasons=REASONS,
)
def select_exposures(params: SelectExposuresParams, inputs: dict[str, list[ExposureView]]) -> dict[str, Any]:
    """Keep the exposures whose figures are within limits, without those named in ``leave_out``.

    Only the given limits apply; an exposure that lacks the figure for one of them is left out. Exposures that people excluded in the
    browser are left out once that choice is frozen. Nothing is deleted: later steps work on the kept exposures and their particles.
    """
    view = inputs["exposures"][0]
    reason = np.zeros(len(view.rows), np.int8)
    named, known = set(params.leave_out), set(view.names)
    unknown = [name for name in params.leave_out if name not in known]
    if unknown:
        near = difflib.get_close_matches(unknown[0], view.names, 1, 0.5)
        raise InputError(
            f"leave_out names {', '.join(map(repr, unknown))}, but {view.name} has no such exposure.",
            "",
            f"correct the name{f'; did you mean {near[0]!r}?' if near else ''}",
        )
    reason[np.isin(view.rows, params.rows_excluded)] = 6
    reason[np.array([name in named for name in view.names], bool)] = 1
    for number, outside in _outside(params, view):
        reason[(reason == 0) & outside] = number
    kept = reason == 0
    if not kept.any():
        raise InputError(
            f"select_exposures kept none of {len(view.rows)} exposures.",
            "a limit is in the wrong unit, or too strict",
            "check the figures in the report and change the limits",
        )
    rows = np.asarray(view.rows, np.int64)
    order = np.argsort(rows, kind="stable")
    kept, rows, reason = kept[order], rows[order], reason[order]
    return {"exposure_row": rows[kept], "dropped_row": rows[~kept], "removal_reason": reason[~kept]}


def _outside(params: SelectExposuresParams, view: ExposureView) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the number of each reason with the exposures outside its limit, including those without the figure."""
    if params.worst_ctf_resolution_angstrom is not None:
        yield 2, ~(view.read("ctf_resolution_angstrom") <= params.worst_ctf_resolution_angstrom)
    if params.largest_motion_angstrom is not None:
        yield 3, ~(view.read("total_motion") <= params.largest_motion_angstrom)
    if params.least_defocus_angstrom is None and params.largest_defocus_angstrom is None:
        return
    defocus = 0.5 * (view.read("defocus_u_angstrom") + view.read("defocus_v_angstrom"))
    if params.least_defocus_angstrom is not None:
        yield 4, ~(defocus >= params.least_defocus_angstrom)
    if params.largest_defocus_angstrom is not None:
        yield 5, ~(defocus <= params.largest_defocus_angstrom)
