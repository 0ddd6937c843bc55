"""Estimated CPU seconds of a step: from the project's own records, else from costs measured on other data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from cryodask.costs import Load, measured_costs
from cryodask.errors import CryodaskError
from cryodask.run.known import image_edge
from cryodask.run.recipe import Plan, Step
from cryodask.run.refs import Refer
from cryodask.run.results import started_with
from cryodask.store.identity import rows_in
from cryodask.store.project import Project
from cryodask.store.state import StepState

Source = Literal["records", "stage_costs"]

_RECORDS = 200
"""Number of records that are averaged."""


@dataclass(frozen=True)
class Estimate:
    """CPU seconds of one thread, and their source."""

    seconds: float
    source: Source


@dataclass(frozen=True)
class Estimator:
    """Estimates for the steps of a plan. ``before``: the current state of the steps; ``movie``: shape (frame, y, x) of the first movie."""

    plan: Plan
    project: Project | None
    movie: tuple[int, int, int] | None
    before: Mapping[str, StepState] = field(default_factory=dict)

    def of(self, step: Step, todo: int | None) -> Estimate | None:
        """Estimate for a number of exposures or particles; None if neither records nor costs are available.

        Notes
        -----
        A step over a set records its wall time, for whatever number of workers it had.
        """
        recorded = self._recorded(step, todo)
        if recorded is not None:
            return Estimate(recorded, "records")
        measured = None if todo is None else self._of_exposures(step, todo) if step.stage.shape == "map" else self._of_particles(step, todo)
        return None if measured is None else Estimate(measured, "stage_costs")

    def _recorded(self, step: Step, todo: int | None) -> float | None:
        current = self.before.get(step.label)
        if self.project is None or current is None or current.stage != step.stage.name:
            return None
        generation = self.project.generation_at(current.place)
        records = [r for r in generation.committed().values() if "seconds" in r][:_RECORDS]
        if not records:
            return None
        if step.stage.shape == "map":
            return None if todo is None else float(np.mean([r.get("cpu_seconds", r["seconds"]) for r in records]) * todo)
        count = started_with(generation)
        if not count:  # it takes no particles
            return float(records[0]["seconds"])
        return None if todo is None else float(records[0]["seconds"]) * todo / count

    def _of_exposures(self, step: Step, todo: int) -> float | None:
        costs = measured_costs()
        later = costs.later_stages.get(step.stage.name)
        cost = later or costs.map_stages.get(step.stage.name)
        if cost is None or self.movie is None:
            return None
        frames, y, x = self.movie
        load = Load(megapixels=y * x / 1e6, frames=frames)
        if cost.unit == "particle megapixel":
            particles, box = self._particles_an_exposure(step), _box(step)
            if particles is None or box is None:
                return None
            load = Load(megapixels=y * x / 1e6, frames=frames, particles=particles, box=box)
        if later is not None:
            return (later.fixed + later.per_unit * load.frame_megapixels) * todo
        each = costs.movie_seconds(load)
        # decoding, compressing and writing scale with the movie, so they are counted in the step that reads movies
        stored = each["store"] if "movie" in step.stage.gives else 0.0
        return (each[step.stage.name] + stored) * todo

    def _of_particles(self, step: Step, todo: int) -> float | None:
        edge = image_edge(self.plan, self.project, step)
        if edge is None or step.stage.name not in measured_costs().particle_stages:
            return None
        return measured_costs().particle_seconds(step.stage.name, edge, todo)

    def _particles_an_exposure(self, step: Step) -> int | None:
        """Mean number of particles per exposure that has any."""
        if self.project is None or not step.inputs.get("particles"):
            return None
        try:
            ids = self.project.sets.ids(Refer(self.plan, self.project.state).product(step.inputs["particles"][0]))
        except (KeyError, CryodaskError):  # nothing is picked yet
            return None
        return round(len(ids) / len(rows_in(ids))) if len(ids) else None


def _box(step: Step) -> int | None:
    """Box size of a step that extracts, in pixels of the exposure."""
    image = next((p.image for p in step.outputs.values() if p.image is not None), None)
    exposures = step.inputs.get("exposures", ())
    # a box in angstrom has one size in pixels only if all exposures have the same pixel size
    if image is None or image.box is None or not exposures or len(exposures[0].pixel_sizes) != 1:
        return None
    return round(image.box)
