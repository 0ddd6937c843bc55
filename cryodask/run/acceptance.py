"""What a run says about peaks of a picker that are not accepted although they may be particles."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cryodask.kernels.acceptance import CLEAR_SKEW
from cryodask.run.recipe import Step
from cryodask.store.births import accepted
from cryodask.store.project import Project
from cryodask.store.table import Table

NEEDED = ("pick_score", "pick_threshold", "pick_chance", "pick_excess_skew")
"""Variables of a picker that are looked at."""
_LEAST_SKEW = 0.1
_FEW, _MANY = 0.1, 20


def messages_of_picks(project: Project, step: Step) -> Iterator[str]:
    """Messages about the picks of a step; none for a step that gives no scores or nothing to compare them with."""
    if step.stage.threshold and set(NEEDED) <= set(project.generation(step.label).meta["gives"]):
        yield from acceptance_messages(step.label, project.table(step.label, NEEDED), getattr(step.params, step.stage.threshold))


def acceptance_messages(label: str, table: Table, threshold: float | str | None) -> Iterator[str]:
    """Messages about micrographs of which hardly any peak is accepted, and about a given threshold that hardly accepts any.

    Parameters
    ----------
    label : str
        The step.
    table : Table
        The micrographs, with NEEDED.
    threshold : float, "auto" or None
        Of the step.
    """
    counts = table.columns["pick_score"].shapes[:, 0]
    score, own = table.columns["pick_score"].flat, table["pick_threshold"]
    by_itself = accepted(score, np.repeat(own, counts))
    if isinstance(threshold, int | float):
        taken, could = int(accepted(score, float(threshold)).sum()), int(by_itself.sum())
        if could >= _MANY and taken < _FEW * could:
            yield (
                f"{label}: the threshold {threshold:g} accepts {taken} peaks, the automatic ones would accept {could:,} (their median is "
                f"{np.median(own):.2f}); check it, or leave it out"
            )
        return
    skew = table["pick_excess_skew"]
    # clear ones are never cut at the level of noise unless their particles are above it
    unclear = (own >= table["pick_chance"]) & (skew > _LEAST_SKEW) & (skew < 2.0 * CLEAR_SKEW) & (counts >= _MANY)
    found = np.repeat(unclear, counts)
    taken, peaks = int(by_itself[found].sum()), int(np.isfinite(score[found]).sum())
    if not unclear.any() or taken > _FEW * peaks:
        return
    names = table.name[unclear].tolist()
    rest = own[~unclear & (skew >= CLEAR_SKEW)]
    hint = f", for example {np.median(rest):.2f}, the median of the others" if len(rest) else ""
    yield (
        f"{label}: in {len(names)} of {len(counts)} micrographs hardly any of the peaks are accepted ({taken} of {peaks:,}), because they "
        f"differ little from noise: the excess skew of their score maps is {skew[unclear].min():.2f} to {skew[unclear].max():.2f}, that of "
        f"ice alone below 0.06 ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}). If they show particles, give threshold{hint}"
    )
