"""Selection of particles for later stages, with reasons; nothing is deleted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field

from cryodask.errors import InputError
from cryodask.products import Product
from cryodask.stage import ChoiceMark, Context, Output, Params, Picture, port, stage

if TYPE_CHECKING:
    import xarray as xr

REASONS = {
    0: "kept",
    1: "its class is not wanted",
    2: "its class is uncertain",
    3: "the CTF of its micrograph is poor",
    4: "its likelihood is far below that of the others",
    5: "it was never classified",
}
"""Meaning of the numbers in ``removal_reason``."""

AUTO_SHARE_OF_TYPICAL = 0.65
"""``auto`` keeps classes whose score is at least this fraction of a typical good class (weighted by particles)."""
AUTO_LEAST_KEPT = 0.25
"""``auto`` never keeps a smaller fraction of the particles, because then the scores are meaningless."""


ClassNumbers = Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)]


class CurateParams(Params):
    """Parameters of ``curate``."""

    keep: Annotated[Literal["auto", "all"] | ClassNumbers, ChoiceMark] = Field(
        "auto", description="classes to keep: a list of class numbers (from 1), 'all', or 'auto' to judge them by their scores"
    )
    least_class_score: float | None = Field(None, ge=0, le=1, description="classes below this score are removed as well")
    least_class_probability: float = Field(0.0, ge=0, le=1, description="particles less certain of their class are removed")
    worst_ctf_resolution_angstrom: float | None = Field(
        None, gt=0, description="particles of micrographs whose CTF fit is worse than this resolution are removed, Angstrom"
    )
    likelihood_deviations: float | None = Field(
        None, gt=0, description="particles whose log-likelihood is this many robust standard deviations below the median are removed"
    )


def _check(params: CurateParams, inputs: dict[str, list[Product]]) -> Iterator[str]:
    exposures = next(iter(inputs.get("exposures", [])), None)
    if params.worst_ctf_resolution_angstrom is not None and (exposures is None or "ctf_quality" not in exposures.parts):
        where = exposures.ref if exposures else "no step"
        yield (
            f"worst_ctf_resolution_angstrom needs the quality of the CTF fits, which {where} does not give. Add ctf before it, or leave "
            "out the limit."
        )


@stage(
    version=2,
    shape="whole",
    needs=["class_number", "class_probability", "class_score"],
    optional=[
        "ctf_resolution_angstrom", "class_log_likelihood", "class_average", "class_share", "class_pixel_size_angstrom",
        "class_resolution_angstrom",
    ],
    gives=["class_average", "class_share", "class_pixel_size_angstrom", "class_resolution_angstrom", "class_score"],
    ports=[
        port("exposures?:exposures[ctf_quality?]", also_if="worst_ctf_resolution_angstrom"),
        port("particles[class2d, alignment2d?]", also_if="likelihood_deviations"),
        "classes[scores, averages?]",
    ],
    outputs=[
        Output("particles", "particles", on="particles", subset=True),
        Output("classes", "classes", ("averages", "scores"), on="classes"),
    ],
    check=_check,
    reasons={number: text for number, text in REASONS.items() if number},
)  # fmt: skip
def curate(
    params: CurateParams,
    *,
    class_number: np.ndarray,
    class_probability: np.ndarray,
    class_score: np.ndarray,
    ctf_resolution_angstrom: np.ndarray | None = None,
    class_log_likelihood: np.ndarray | None = None,
    class_average: np.ndarray | None = None,
    class_share: np.ndarray | None = None,
    class_pixel_size_angstrom: float | None = None,
    class_resolution_angstrom: np.ndarray | None = None,
    context: Context,
) -> dict[str, Any]:
    """Decide which particles and classes later stages use, by class and by simple limits.

    Nothing is deleted: every particle that is left out is stored with its reason, and this stage can be rerun with another choice.
    Classes are numbered from 1. ``auto`` compares the score of a class with that of a typical good class, so that it keeps everything if
    all classes are good.
    """
    number = np.asarray(class_number) - 1
    score = np.asarray(class_score, float)
    if number.max(initial=-1) >= len(score):
        raise InputError(
            f"class {int(number.max()) + 1} has no score: there are {len(score)} classes",
            "class numbers and scores come from different classifications",
            "rerun classify2d",
        )
    share = np.bincount(number[number >= 0], minlength=len(score)).astype(float)
    if params.keep == "all":
        wanted = np.ones(len(score), bool)
    elif params.keep == "auto":
        wanted = good_classes(score, share)
    else:
        unknown = [k for k in params.keep if not 1 <= k <= len(score)]
        if unknown:
            raise InputError(
                f"there are no classes {unknown}: numbers run from 1 to {len(score)}",
                "the classification was rerun with another number of classes",
                "check the classes in the report and update curate.keep",
            )
        wanted = np.isin(np.arange(1, len(score) + 1), params.keep)
    if params.least_class_score is not None:
        wanted &= score >= params.least_class_score
    reason = np.zeros(len(number), np.int8)
    if params.likelihood_deviations is not None and class_log_likelihood is not None:
        values = np.asarray(class_log_likelihood, float)
        middle = np.nanmedian(values)
        spread = 1.4826 * np.nanmedian(np.abs(values - middle))
        reason[values < middle - params.likelihood_deviations * spread] = 4
    if params.worst_ctf_resolution_angstrom is not None and ctf_resolution_angstrom is not None:
        # a failed fit has no resolution and counts as poor
        reason[~(np.asarray(ctf_resolution_angstrom, float) <= params.worst_ctf_resolution_angstrom)] = 3
    reason[np.asarray(class_probability, float) < params.least_class_probability] = 2
    known = number >= 0
    reason[known & ~wanted[np.where(known, number, 0)]] = 1
    reason[~known] = 5
    kept = {"class_average": class_average, "class_share": class_share, "class_resolution_angstrom": class_resolution_angstrom}
    kept["class_score"] = score
    classes: dict[str, Any] = {name: np.asarray(values)[wanted] for name, values in kept.items() if values is not None}
    if class_pixel_size_angstrom is not None:
        classes["class_pixel_size_angstrom"] = float(class_pixel_size_angstrom)
    return {"particle_kept": reason == 0, "removal_reason": reason, **classes}


def good_classes(score: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Mask `(class,)` of the classes that ``auto`` keeps.

    A junk class agrees with itself far less than a typical good class, whose score is taken as the upper quartile over the particles:
    up to three quarters of the particles may be junk.
    """
    used = share > 0
    order = np.argsort(score)
    cumulated = np.cumsum(share[order])
    typical = score[order][np.searchsorted(cumulated, 0.75 * cumulated[-1])]
    good = used & (score >= AUTO_SHARE_OF_TYPICAL * typical)
    if share[good].sum() < AUTO_LEAST_KEPT * share.sum():
        return used
    return good


@curate.figures
def draw(ds: xr.Dataset) -> Iterator[Picture]:
    """How many particles were left out, and why."""
    from matplotlib.figure import Figure

    if "removal_reason" not in ds:
        return
    reasons = np.concatenate([np.zeros(ds.sizes.get("particle", 0), np.int8), ds["removal_reason"].values])
    counts = {text: int((reasons == number).sum()) for number, text in REASONS.items() if (reasons == number).any()}
    figure = Figure(figsize=(6.0, 0.5 + 0.4 * len(counts)), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(list(counts), list(counts.values()), color="steelblue")
    axes.bar_label(bars)
    axes.invert_yaxis()
    axes.set(xlabel="particles")
    kept = 100.0 * float((reasons == 0).mean())
    yield Picture(
        "Curation", f"{kept:.1f} % of {len(reasons)} particles are kept. The others stay in the project and can be selected again.", figure
    )
