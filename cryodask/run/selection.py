"""Options of a run: which steps, what to recompute, and which workers; the same for the command line, Python and a dry run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cryodask.errors import ProjectFileError, StoreError
from cryodask.run.checks import Asked
from cryodask.run.recipe import Plan, Step, position
from cryodask.run.watch import Until
from cryodask.store.state import ProjectState


@dataclass(frozen=True)
class Wanted:
    """Options of a run, in addition to the project file.

    Parameters
    ----------
    until : str, optional
        Stop after this step.
    start_again_from : str, optional
        Recompute this step and all later ones.
    only : str, optional
        Run this step and nothing else; its inputs must exist.
    update : tuple of str
        Steps to recompute if their results are of an older stage version.
    watch : Until, optional
        Process movies as they arrive until the session is over, then run the later steps.
    force : bool
        Take the project over from another driver.
    retry_quarantined : bool
        Retry quarantined exposures.
    strict : bool
        Raise at the end if exposures are quarantined.
    same_environment : bool
        Raise before results are added to a generation that was started with other software versions; by default only a warning.
    cluster, workers, lane : optional
        Override the project file; ``lane`` defaults to "live" with ``watch``, else to "batch".
    """

    until: str | None = None
    start_again_from: str | None = None
    only: str | None = None
    update: tuple[str, ...] = ()
    watch: Until | None = None
    force: bool = False
    retry_quarantined: bool = False
    strict: bool = False
    same_environment: bool = False
    cluster: str | None = None
    workers: int | None = None
    lane: str | None = None

    @property
    def words(self) -> tuple[str, ...]:
        """The options of the command line that are given again when the run is started again; without cluster and lane."""
        words: list[str] = ["--watch"] if self.watch is not None else []
        if self.watch is not None and self.watch.idle_seconds is not None:
            words += ["--until-idle", f"{self.watch.idle_seconds / 60:g}"]
        if self.watch is not None and self.watch.movies is not None:
            words += ["--until-movies", str(self.watch.movies)]
        return (*words, *(("--until", self.until) if self.until else ()), *(("--workers", str(self.workers)) if self.workers else ()))

    @property
    def asked(self) -> Asked:
        """The options for cluster, workers and lane."""
        return Asked(self.cluster, self.workers, self.lane)

    def check(self, plan: Plan) -> None:
        """Refuse unknown step names and contradictory options.

        Raises
        ------
        ProjectFileError
        """
        for label in (self.until, self.start_again_from, self.only, *self.update):
            if label:
                position(plan, label)
        if self.only and (self.until or self.start_again_from):
            raise ProjectFileError("--only cannot be combined with --from or --until: it runs a single step.", "", "give one or the other")
        if self.until and self.start_again_from and position(plan, self.until) < position(plan, self.start_again_from):
            raise ProjectFileError(
                f"--until {self.until} comes before --from {self.start_again_from}: nothing would be computed.",
                "the two were swapped",
                f"the order is: {', '.join(s.label for s in plan.steps)}",
            )

    def steps(self, plan: Plan) -> list[Step]:
        """The steps of the pipeline to run, in order."""
        if self.only:
            return [plan.graph.step(self.only)]
        return list(plan.steps[: position(plan, self.until) + 1]) if self.until else list(plan.steps)

    def count_recomputations(self, plan: Plan, again: dict[str, int]) -> None:
        """Increment the count of the steps to recompute; it is part of their keys."""
        if self.start_again_from:
            for step in plan.steps[position(plan, self.start_again_from) :]:
                again[step.label] = again.get(step.label, 0) + 1

    def check_sources(self, plan: Plan, state: ProjectState) -> None:
        """With ``only``: refuse the step if one of its inputs does not exist.

        Raises
        ------
        StoreError
        """
        for step in self.steps(plan) if self.only else ():
            missing = [label for label in _needed(step) if label not in state.steps]
            if missing:
                raise StoreError(
                    f"{step.label} needs the result of {', '.join(missing)}, which does not exist.",
                    "the earlier steps have not been run",
                    f"run them as well with  cryodask run --until {step.label}",
                )


def _needed(step: Step) -> Iterator[str]:
    """Labels of the steps whose results a step takes."""
    taken = [p for products in step.inputs.values() for p in products if not p.pinned]
    yield from dict.fromkeys(p.step for p in taken)
