"""What a run says about movies in which a pattern stands still while the specimen moves."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cryodask.run.recipe import Step
from cryodask.store.project import Project
from cryodask.store.table import Table

NEEDED = ("still_pattern_share",)
"""Variables of motion correction that are looked at."""
_CHANCE = 0.02
"""Share of movies in which noise may look like a pattern."""


def messages_of_motion(project: Project, step: Step) -> Iterator[str]:
    """Messages about the movies of a step; none for a step that does not look for still patterns."""
    if set(NEEDED) <= set(project.generation(step.label).meta["gives"]):
        yield from still_messages(step.label, project.table(step.label, NEEDED))


def still_messages(label: str, table: Table) -> Iterator[str]:
    """A message if more movies than by chance have a still pattern, with its strength.

    Parameters
    ----------
    label : str
        The step.
    table : Table
        The micrographs, with NEEDED.
    """
    share = table["still_pattern_share"]
    found = share > 0.0
    if int(found.sum()) <= _CHANCE * len(share):
        return
    names = table.name[found].tolist()
    percent = 100.0 * share[found]
    yield (
        f"{label}: in {len(names)} of {len(share)} movies a pattern stands still while the specimen moves ({', '.join(names[:3])}"
        f"{', ...' if len(names) > 3 else ''}), with {percent.min():.2g} to {percent.max():.2g} % of the power of a frame's noise, median "
        f"{np.median(percent):.2g} %. The gain is missing or wrong; the motion allows for it, but the micrographs show it: check the gain"
    )
