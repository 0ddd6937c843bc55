"""What is asked of a run: which steps, what anew, and with which workers. The same on the command line, in Python and in a dry run."""

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
    """What is asked of a run, beyond what the project file says.

    Parameters
    ----------
    until : str, optional
        Stop after this step.
    start_again_from : str, optional
        Compute this step and all that follow anew.
    only : str, optional
        Compute this step and nothing else; what it takes must be there.
    update : tuple of str
        Steps whose results of an older version are computed again with this program's.
    watch : Until, optional
        Take the movies as they arrive, until the session is over; then the steps after them follow.
    force : bool
        Break the lock of another driver.
    retry_quarantined : bool
        Try quarantined exposures again.
    strict : bool
        Raise at the end where exposures are quarantined.
    same_environment : bool
        Raise before results are added to a generation that was begun under other versions of the programs; said only, if not given.
    cluster, workers, lane : optional
        Instead of what the project file says; ``lane`` is "live" for a watch and "batch" else, if not given.
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
    def asked(self) -> Asked:
        """What is said of cluster, workers and lane."""
        return Asked(self.cluster, self.workers, self.lane)

    def check(self, plan: Plan) -> None:
        """Refuse names that are no step's, and what contradicts itself.

        Raises
        ------
        ProjectFileError
        """
        for label in (self.until, self.start_again_from, self.only, *self.update):
            if label:
                position(plan, label)
        if self.only and (self.until or self.start_again_from):
            raise ProjectFileError(
                "--only names the one step to compute; --from and --until name a range.", "they were given together", "give one of them"
            )
        if self.until and self.start_again_from and position(plan, self.until) < position(plan, self.start_again_from):
            raise ProjectFileError(
                f"--until {self.until} comes before --from {self.start_again_from}: nothing would be computed.",
                "the two were mixed up",
                f"the order is: {', '.join(s.label for s in plan.steps)}",
            )

    def steps(self, plan: Plan) -> list[Step]:
        """The steps of the pipeline that are to be carried out, in order."""
        if self.only:
            return [plan.graph.step(self.only)]
        return list(plan.steps[: position(plan, self.until) + 1]) if self.until else list(plan.steps)

    def count_anew(self, plan: Plan, again: dict[str, int]) -> None:
        """Raise the count of the steps that are to be computed anew: it is part of their keys."""
        if self.start_again_from:
            for step in plan.steps[position(plan, self.start_again_from) :]:
                again[step.label] = again.get(step.label, 0) + 1

    def check_sources(self, plan: Plan, state: ProjectState) -> None:
        """With ``only``: refuse the step where something that it takes is not there.

        Raises
        ------
        StoreError
        """
        for step in self.steps(plan) if self.only else ():
            missing = [label for label in _needed(step) if label not in state.steps]
            if missing:
                raise StoreError(
                    f"{step.label} takes what {', '.join(missing)} gives, and there is no result of it.",
                    "the steps before it have not been run",
                    f"cryodask run --until {step.label}  computes them as well",
                )


def _needed(step: Step) -> Iterator[str]:
    """Labels of the steps of the pipeline whose results a step takes."""
    taken = [p for products in step.inputs.values() for p in products if not p.pinned]
    yield from dict.fromkeys(p.step for p in taken)
