"""Dry run: the graph, what is done, what would be computed and why, and an estimate of the cost."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryodask.errors import CryodaskError
from cryodask.run import gains, sources
from cryodask.run.chains import ChainMaker, Target, stored_per_item
from cryodask.run.checks import look_ahead
from cryodask.run.data_sets import data_sets, keep_former
from cryodask.run.decisions import check_choice, waiting, with_decisions
from cryodask.run.due import Known
from cryodask.run.estimate import Estimator, Source
from cryodask.run.groups import chains_of
from cryodask.run.inputs import step_inputs
from cryodask.run.keys import Keys
from cryodask.run.recipe import Plan, Step
from cryodask.run.refs import Refer, label_of
from cryodask.run.selection import Wanted
from cryodask.run.unions import check_images
from cryodask.stage import Version
from cryodask.store.foreseen import Foreseen
from cryodask.store.generation import Generation
from cryodask.store.project import Arrival, Project
from cryodask.store.state import ProjectState


@dataclass
class StepPreview:
    """A step of the preview. ``todo``: items or particles that would be computed (None: not known yet).

    ``cpu_seconds`` is an estimate, from the project's own ``records`` of the step or from ``stage_costs`` that were measured elsewhere.
    """

    step: str
    stage: str
    inputs: dict[str, str | list[str]]
    done: bool
    todo: int | None
    why: str
    cpu_seconds: float | None = None
    cpu_seconds_from: Source | None = None

    def estimate(self, estimator: Estimator, step: Step) -> StepPreview:
        """Add the estimated cost; returns itself."""
        found = estimator.of(step, self.todo)
        if found is not None:
            self.cpu_seconds, self.cpu_seconds_from = found.seconds, found.source
        return self


@dataclass
class Preview:
    """The preview of a run."""

    steps: list[StepPreview] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def as_json(self) -> str:
        """The output of ``cryodask run --dry-run --json``."""
        steps = [{k: v for k, v in vars(s).items() if not k.startswith("cpu_seconds") or v is not None} for s in self.steps]
        return json.dumps({"steps": steps, "problems": self.problems, "warnings": self.warnings}, indent=1)


def preview(plan: Plan, wanted: Wanted | None = None) -> Preview:
    """Preview what a run of a plan would do now. Nothing is written, no stage is called."""
    wanted = wanted or Wanted()
    out = Preview([], list(plan.graph.problems), list(plan.graph.warnings))
    blank = [StepPreview(s.label, s.stage.name, _sources(s), False, None, "new") for s in plan.steps]
    if out.problems:
        out.steps = blank
        return out
    try:
        wanted.check(plan)
        chosen = {step.label for step in wanted.steps(plan)}
        blank = [shown for shown in blank if shown.step in chosen]
        gains.check_gain_files(plan)
        sources.check_files(plan)
        project = Project(plan.folder) if (plan.folder / "project.json").exists() else None
        wanted.check_sources(plan, project.state if project is not None else ProjectState(name=plan.file.name))
        listing = sources.list_exposures(plan, project) if plan.steps else []
        ahead = look_ahead(plan, project, listing, wanted.asked)
        out.problems += ahead.problems
        out.warnings += ahead.warnings
    except CryodaskError as error:
        out.problems.append(error.problem)
        out.steps = blank
        return out
    if project is not None:
        out.steps = _Looking(with_decisions(plan, project)[0], project, listing, wanted, ahead.movie, out).steps()
        return out
    out.steps = blank
    for shown in blank:
        step = plan.graph.step(shown.step)
        shown.todo = len(listing) if step.stage.shape == "map" else None
        shown.why = waiting(plan).get(shown.step, "new")
        shown.estimate(Estimator(plan, None, ahead.movie), step)
    return out


def _sources(step: Step) -> dict[str, str | list[str]]:
    """Source of each input, in the notation of the project file."""
    out: dict[str, str | list[str]] = {}
    for name, products in step.inputs.items():
        keys = step.pins.get(name, ())
        refs = [f"{p.ref}@{key}" if key else p.ref for p, key in zip(products, keys or [""] * len(products))]
        port = step.stage.port(name)
        out[name] = refs if port is not None and port.many else refs[0]
    return out


@dataclass(frozen=True)
class _Seen:
    """A per-exposure step as a run would find it: its existing results, and whether its generation exists."""

    target: Target
    known: Known
    exists: bool


class _Looking:
    """Goes through the steps like a run, on a copy of the project's state that is never written.

    It uses the same code as a run to find what exists, what would be linked, and what is due for each exposure.
    """

    def __init__(
        self, plan: Plan, project: Project, listing: list[Arrival], wanted: Wanted, movie: tuple[int, int, int] | None, out: Preview
    ) -> None:
        self.plan, self.project, self.wanted, self.out = plan, project, wanted, out
        self.update = frozenset(wanted.update)
        wanted.count_recomputations(plan, project.state.again)
        states = {label: project.state.steps[label] for label in project.stages}
        self.before = {label: s for label, s in states.items() if (project.generation_at(s.place).path / "zarr.json").exists()}
        self.removed = states.keys() - self.before.keys()
        self.estimator = Estimator(plan, project, movie, self.before)
        known_before = {item.row for item in project.items()}
        keep_former(plan, project, listing, foresee=True)
        project.foresee_exposures(listing)
        self.items = project.items()
        self.new = {item.row for item in self.items} - known_before
        found = data_sets(plan, project, {name: f"{name_of}.npy" for name, name_of in gains.gain_names(plan, plan.folder).items()})
        project.state.constants = found.constants
        out.warnings += found.said
        self.keys = Keys(plan, project, {name: Path(path).stem for name, path in found.gains.items()})
        self.maker = ChainMaker(plan, project, self.keys, self.items, {}, self.update, self._adopt)
        self.stale: dict[str, str] = {}
        self.settled: set[str] = set()
        self.lacking: dict[str, set[int]] = {}
        self.people = waiting(plan)

    def _adopt(self, step: Step, target: Target) -> None:
        self.project.state.adopt(step.label, Refer(self.plan, self.project.state).state_of(step, target.key, target.recipes))
        self.settled.add(step.label)

    def steps(self) -> list[StepPreview]:
        """All steps; whatever would refuse a run is a problem."""
        done: list[StepPreview] = []
        chosen = self.wanted.steps(self.plan)
        groups = chains_of(self.plan, [s for s in chosen if s.label not in self.people])
        shown = {one.step: one for group in groups for one in self._group(group)}
        for step in chosen:
            done.append(shown[step.label] if step.label in shown else self._stale(step, self.people[step.label], None))
        return done

    def _group(self, group: list[Step]) -> list[StepPreview]:
        """Preview steps that a run executes together: an exposure quarantined in one of them goes no further."""
        seen: dict[str, _Seen] = {}
        shown = {}
        try:
            for step in group:
                waits = sorted(self.plan.graph.rests_on(step) & set(self.stale))
                whole = [label for label in waits if self.stale[label] == "unknown" or step.stage.shape != "map"]
                self._check_choice(step)
                if whole:
                    shown[step.label] = self._stale(step, f"input {whole[0]} is computed first", None)
                elif step.stage.shape == "map":
                    seen[step.label] = self._there(step, seen, group)
                else:
                    shown[step.label] = self._over_set(step)
        except CryodaskError as error:
            self.out.problems.append(error.problem)
            for step in (s for s in group if s.label not in shown and s.label not in seen):
                shown[step.label] = self._stale(step, "a run would be refused", None)
        failed: set[int] = set()
        before: set[int] = set()
        for label, one in seen.items():  # a failure does not count while an earlier step of the exposure is pending
            failed |= one.known.failed - before
            before |= self.lacking[label]
        shown |= {label: self._per_exposure(self.plan.graph.step(label), one, failed) for label, one in seen.items()}
        return [shown[step.label] for step in group]

    def _stale(self, step: Step, why: str, todo: int | None, *, known: bool = False) -> StepPreview:
        self.stale[step.label] = "known" if known else "unknown"
        shown = StepPreview(step.label, step.stage.name, _sources(step), False, todo, why)
        return shown if step.label in self.people else shown.estimate(self.estimator, step)

    # --- per exposure ---------------------------------------------------------------------------------------------------------
    def _there(self, step: Step, seen: Mapping[str, _Seen], group: list[Step]) -> _Seen:
        """What a run would find of a step; afterwards the project shows the step as it would be after the run."""
        target = self.maker.target(step)
        place = f"{step.stage.name}/{target.key}"
        generation = self.project.generation_at(place)
        exists = (generation.path / "zarr.json").exists()
        self._adopt(step, target)
        if not exists:
            generation = self._foresee(Foreseen(generation.path, self._meta(step, target), {}))
        items = self.maker.concerned([s for s in group if s.label in seen or s is step], self.items)
        found = self.maker.known(step, target.recipes, generation, items, self.lacking)
        if found.linked:
            self._foresee(Foreseen(generation.path, generation.meta, generation.records() | found.records))
        if self.lacking[step.label]:
            self.stale[step.label] = "known"
        return _Seen(target, found, exists)

    def _foresee(self, generation: Foreseen) -> Foreseen:
        self.project.foresee_generation(generation)
        return generation

    def _meta(self, step: Step, target: Target) -> dict[str, Any]:
        before = self.before.get(step.label)
        alike = before is not None and before.stage == step.stage.name
        of_before = self.project.generation_at(before.place).meta if before is not None and alike else {}
        sizes = {name: of_before.get(name, {}) for name in ("sizes", "dtypes", "grids")}
        return {**self.maker.meta(step, target), "gives": list(stored_per_item(step)), "per_item": True, **sizes}

    def _per_exposure(self, step: Step, seen: _Seen, failed: set[int]) -> StepPreview:
        lacking = self.lacking[step.label] - failed
        if not lacking:
            self.stale.pop(step.label, None)
            why = _of_version(step, seen.target.version)
            return StepPreview(step.label, step.stage.name, _sources(step), True, 0, why)
        before = [label for label in sorted(self.plan.graph.rests_on(step)) if self.lacking.get(label)]
        if lacking <= self.new:
            why = "new exposures"
        elif seen.exists and lacking <= set[int]().union(*(self.lacking[label] for label in before)):
            why = f"input {before[0]} is computed first"
        elif not seen.exists:
            why = self._why(step)
        else:
            why = "unfinished, other particles, or another data set"
        return self._stale(step, why, len(lacking), known=True)

    # --- over a set -----------------------------------------------------------------------------------------------------------
    def _check_choice(self, step: Step) -> None:
        """Check that class numbers belong to the current classification, if its key is known."""
        named = {label_of(p.parts[n]) for p in step.inputs.get("particles", ()) for n in ("class2d", "class3d") if n in p.parts}
        if named and named <= self.settled:
            check_choice(self.plan, self.project, step, confirmed=step.label in self.update)

    def _over_set(self, step: Step) -> StepPreview:
        inputs = step_inputs(self.plan, self.project, step)
        version = self.keys.version_of_set(step, inputs, self.before.get(step.label), self.update)
        key = self.keys.of_set(version, inputs)
        generation = Generation(self.project.path / "stages" / step.stage.name / key)
        count = len(inputs.ids) if inputs.ids is not None else None
        exists = (generation.path / "zarr.json").exists()
        why = self._why(step) if not exists else "unfinished"
        self._adopt(step, Target(key, version, {}))
        if not exists or not generation.committed():
            check_images(self.project, inputs)
        if not exists:
            self._foresee(Foreseen(generation.path, {"per_item": False, "gives": [], "version": version}, {}))
        if not exists or not generation.committed():
            return self._stale(step, why, count)
        why = _of_version(step, version)
        return StepPreview(step.label, step.stage.name, _sources(step), True, 0, why)

    def _why(self, step: Step) -> str:
        """Why a step has no current result: what has changed since the last one."""
        current = self.before.get(step.label)
        if step.label in self.removed:
            return "its result was removed"
        if current is None or current.stage != step.stage.name:
            return "new"
        if self.project.state.again.get(step.label):
            return "recomputation requested"
        generation = self.project.generation_at(current.place)
        if why := _of_version(step, generation.meta["version"]):
            return why
        old, new = generation.meta["params"], step.params.model_dump(mode="json")
        changed = [n for n in new if n != step.stage.threshold and old.get(n) != new[n]]
        if changed:
            return f"parameter {', '.join(changed)}"
        computed = sorted(self.plan.graph.rests_on(step) & set(self.stale))
        return f"input {computed[0]} is computed first" if computed else "input changed"


def _of_version(step: Step, version: Version) -> str:
    """Note for a result whose version differs from the one that would be computed here."""
    newer = step.stage.newer(version)
    return f"version {newer} (done with {version})" if newer is not None else ""


def lines(plan: Plan, shown: Preview) -> list[str]:
    """The preview as text."""
    width = max((len(s.step) for s in shown.steps), default=4)
    states = [_state(plan, step) for step in shown.steps]
    wide = max((len(state) for state in states), default=0)
    out = []
    for step, state in zip(shown.steps, states):
        taken = ", ".join(f"{port} of {ref if isinstance(ref, str) else ' + '.join(ref)}" for port, ref in step.inputs.items()) or "-"
        out.append(f"  {step.step:<{width}}  {state:<{max(42, wide)}}  {taken}")
    return [*out, *_total(shown), *(f"warning: {w}" for w in shown.warnings), *(f"problem: {p}" for p in shown.problems)]


def _state(plan: Plan, step: StepPreview) -> str:
    if step.done:
        return "done" + (f" ({step.why})" if step.why else "")
    kind = "exposures" if plan.graph.step(step.step).stage.shape == "map" else "particles"
    count = "" if step.todo is None else f"{step.todo} {kind}, "
    cost = "" if step.cpu_seconds is None else f", about {_seconds(step.cpu_seconds)} CPU s ({step.cpu_seconds_from})"
    return f"{count}{step.why}{cost}"


_SOURCES: dict[Source, str] = {
    "records": "from this project's records",
    "stage_costs": "from stage_costs, measured on another machine (docs/planning.md)",
}


def _total(shown: Preview) -> list[str]:
    """One line: the total cost, its sources, and how many steps have no estimate."""
    sums: dict[Source, float] = {}
    for step in shown.steps:
        if step.cpu_seconds is not None and step.cpu_seconds_from is not None:
            sums[step.cpu_seconds_from] = sums.get(step.cpu_seconds_from, 0.0) + step.cpu_seconds
    if not sums:
        return []
    parts = ", ".join(f"{_seconds(sums[source])} {said}" for source, said in _SOURCES.items() if source in sums)
    without = sum(not s.done and s.cpu_seconds is None for s in shown.steps)
    rest = f"; {without} steps have no estimate" if without > 1 else "; one step has no estimate" if without else ""
    return [f"in all about {_seconds(sum(sums.values()))} CPU s: {parts}{rest}"]


def _seconds(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"
