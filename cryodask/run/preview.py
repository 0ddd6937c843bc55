"""What a run would do, without doing any of it: the graph, what is done, what would be computed, why, and how long that takes."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from cryodask.errors import CryodaskError
from cryodask.run import sources
from cryodask.run.chains import ChainMaker
from cryodask.run.checks import Asked, look_ahead
from cryodask.run.estimate import Estimator, Source
from cryodask.run.inputs import step_inputs
from cryodask.run.keys import Keys
from cryodask.run.people import waiting
from cryodask.run.recipe import Plan, Step
from cryodask.run.refs import PARTICLES, Refer, variable_sources
from cryodask.store.generation import Generation
from cryodask.store.project import Arrival, Item, Project


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
        """Put in what it would take; returns itself."""
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
        """As ``cryodask run --dry-run --json`` prints it."""
        steps = [{k: v for k, v in vars(s).items() if not k.startswith("cpu_seconds") or v is not None} for s in self.steps]
        return json.dumps({"steps": steps, "problems": self.problems, "warnings": self.warnings}, indent=1)


def preview(plan: Plan, update: frozenset[str] = frozenset(), asked: Asked | None = None) -> Preview:
    """What a run of a plan would do now. Nothing is written, no stage is called."""
    out = Preview([], list(plan.graph.problems), list(plan.graph.warnings))
    blank = [StepPreview(s.label, s.stage.name, _sources(s), False, None, "new") for s in plan.steps]
    if out.problems:
        out.steps = blank
        return out
    try:
        sources.load_gains(plan)
        sources.check_files(plan)
        project = Project(plan.folder) if (plan.folder / "project.json").exists() else None
        listing = sources.list_exposures(plan, project) if plan.steps else []
        ahead = look_ahead(plan, project, listing, asked)
        out.problems += ahead.problems
        out.warnings += ahead.warnings
    except CryodaskError as error:
        out.problems.append(f"{error.what} {error.way_out}".strip())
        out.steps = blank
        return out
    if project is not None:
        out.steps = _Looking(plan, project, listing, update, ahead.movie).steps()
        return out
    out.steps = blank
    for shown in blank:
        step = plan.graph.step(shown.step)
        shown.todo = len(listing) if step.stage.shape == "map" else None
        shown.why = waiting(plan).get(shown.step, "new")
        shown.estimate(Estimator(plan, None, ahead.movie), step)
    return out


def _sources(step: Step) -> dict[str, str | list[str]]:
    """Where each input comes from, as the project file would name it."""
    out: dict[str, str | list[str]] = {}
    for name, products in step.inputs.items():
        keys = step.pins.get(name, ())
        refs = [f"{p.ref}@{key}" if key else p.ref for p, key in zip(products, keys or [""] * len(products))]
        port = step.stage.port(name)
        out[name] = refs if port is not None and port.many else refs[0]
    return out


class _Looking:
    """Goes through the steps as a run would, on a copy of the project's state that is never written."""

    def __init__(
        self, plan: Plan, project: Project, listing: list[Arrival], update: frozenset[str], movie: tuple[int, int, int] | None
    ) -> None:
        self.plan, self.project, self.update = plan, project, update
        self.before = {label: project.state.steps[label] for label in project.stages}
        self.estimator = Estimator(plan, project, movie, self.before)
        self.items = self._items(listing)
        project.state.constants = plan.constants
        gains = sources.gain_digests(plan)
        self.keys = Keys(plan, project, gains)
        self.maker = ChainMaker(plan, project, self.keys, [i for i in self.items if i is not None], {}, update, lambda step, key: None)
        self.new = sum(i is None for i in self.items)
        self.stale: dict[str, str] = {}
        self.people = waiting(plan)

    def _items(self, listing: list[Arrival]) -> list[Item | None]:
        """Items of the registry that count, and None for each new arrival."""
        known = {item.content: item for item in self.project.items()}
        fresh: list[Item | None] = [None for a in {a.content for a in listing} if a not in known]
        return [*known.values(), *fresh]

    def steps(self) -> list[StepPreview]:
        """All steps."""
        return [self._look(step) for step in self.plan.steps]

    def _look(self, step: Step) -> StepPreview:
        if step.label in self.people:
            return self._stale(step, self.people[step.label], None)
        waits = sorted(self.plan.graph.rests_on(step) & set(self.stale))
        whole = [label for label in waits if self.stale[label] == "unknown" or step.stage.shape != "map"]
        if whole:
            return self._stale(step, f"input {whole[0]} is computed first", None)
        return self._per_exposure(step) if step.stage.shape == "map" else self._over_set(step)

    def _stale(self, step: Step, why: str, todo: int | None, *, known: bool = False) -> StepPreview:
        self.stale[step.label] = "known" if known else "unknown"
        shown = StepPreview(step.label, step.stage.name, _sources(step), False, todo, why)
        return shown if step.label in self.people else shown.estimate(self.estimator, step)

    def _per_exposure(self, step: Step) -> StepPreview:
        key = self.maker.key(step)
        path = self.project.path / "stages" / step.stage.name / key
        count = len(self.items)
        if not (path / "zarr.json").exists():
            return self._stale(step, self._why(step, key), count)
        self.project.state.adopt(step.label, Refer(self.plan, self.project.state).state_of(step, key))
        generation = self.project.generation_at(f"{step.stage.name}/{key}")
        items = [i for i in self.items if i is not None]
        done = self._done(step, generation, items)
        todo = len(items) - done + self.new
        version = int(generation.meta["version"])
        if todo:
            return self._stale(step, "new exposures" if self.new else "unfinished or other particles", todo, known=True)
        why = f"version {step.stage.version} (done with {version})" if version != step.stage.version else ""
        return StepPreview(step.label, step.stage.name, _sources(step), True, 0, why)

    def _done(self, step: Step, generation: Generation, items: list[Item]) -> int:
        """Items that need not be computed: done with their present input and particles, or quarantined."""
        table = generation.table(())
        by_row = dict(zip(table.row.tolist(), zip(table.input, table.slice)))
        failed = {row: r.get("input") for row, r in table.failures.items()}
        digests: dict[int, str] = {}
        if PARTICLES in variable_sources(self.plan, step).values():
            digests = self.maker.slices(step).digests(i.row for i in items)
        elif imported := self.maker.imports([step]).get(step.label):
            digests = {i.row: imported.digest(i) for i in items}
        done = 0
        for item in items:
            made = by_row.get(item.row)
            fresh = made is not None and made[0] in (None, item.fingerprint) and made[1] == digests.get(item.row)
            done += fresh or (made is None and failed.get(item.row) == item.fingerprint)
        return done

    def _over_set(self, step: Step) -> StepPreview:
        inputs = step_inputs(self.plan, self.project, step)
        version = int(step.stage.version)
        key = self.keys.of_set(version, inputs)
        current = self.before.get(step.label)
        if current is not None and current.stage == step.stage.name and step.label not in self.update and key != current.key:
            made = int(self.project.generation_at(current.place).meta["version"])
            if made != version and self.keys.of_set(made, inputs) == current.key:
                version, key = made, current.key
        generation = Generation(self.project.path / "stages" / step.stage.name / key)
        count = len(inputs.ids) if inputs.ids is not None else None
        if not (generation.path / "zarr.json").exists():
            return self._stale(step, self._why(step, key), count)
        if not generation.committed():
            return self._stale(step, "unfinished", count)
        self.project.state.adopt(step.label, Refer(self.plan, self.project.state).state_of(step, key))
        why = f"version {step.stage.version} (done with {version})" if version != step.stage.version else ""
        return StepPreview(step.label, step.stage.name, _sources(step), True, 0, why)

    def _why(self, step: Step, key: str) -> str:
        """Why there is no result under a key: what has changed since the last one of the step."""
        current = self.before.get(step.label)
        if current is None or current.stage != step.stage.name:
            return "new"
        if self.project.state.again.get(step.label):
            return "asked to be computed anew"
        generation = self.project.generation_at(current.place)
        if int(generation.meta["version"]) != step.stage.version:
            return f"version {step.stage.version} (done with {generation.meta['version']})"
        old, new = generation.meta["params"], step.params.model_dump(mode="json")
        changed = [n for n in new if n != step.stage.threshold and old.get(n) != new[n]]
        if changed:
            return f"parameter {', '.join(changed)}"
        return "input changed"


def lines(plan: Plan, shown: Preview) -> list[str]:
    """The preview for people."""
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
    """One line: what all steps together would take, where that comes from, and how many steps are not in it."""
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
