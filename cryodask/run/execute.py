"""A plan, carried out: exposures registered, generations made, runners called, results committed; resumed wherever it was left."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from distributed import Client

from cryodask.errors import InputError, ProjectFileError
from cryodask.run import sources
from cryodask.run.blocks import iterate_on_workers
from cryodask.run.chain import Chain
from cryodask.run.chains import ChainMaker, Target, chains_of
from cryodask.run.checks import Asked, look_ahead
from cryodask.run.data_sets import data_sets, keep_former
from cryodask.run.health import scheduler_needed
from cryodask.run.imports import left_out_text, nothing_fits, rows_told
from cryodask.run.inputs import SHARED_REASONS, StepInputs, particle_set, step_inputs, whole_values
from cryodask.run.keys import Keys
from cryodask.run.map import PREFIX, MapRunner, process_here
from cryodask.run.people import check_choice, waiting
from cryodask.run.progress import Progress, short, summary
from cryodask.run.recipe import Plan, Step, position
from cryodask.run.record import note_line
from cryodask.run.refs import Refer
from cryodask.run.results import freeze, frozen_ids, image_givers, run_set, settle_result, stored_variables
from cryodask.run.watch import Arrivals, Until
from cryodask.run.whole import loaded, run_tournament, run_whole
from cryodask.stage import Version
from cryodask.store.files import disk_errors, write_atomically
from cryodask.store.generation import Generation
from cryodask.store.places import finish
from cryodask.store.project import Arrival, Item, Project


@dataclass
class Execution:
    """One run of a plan on the workers of a client; holds the project's lock (see :func:`run_plan`)."""

    plan: Plan
    project: Project
    client: Client
    progress: Progress
    retry_quarantined: bool = False
    until: Until | None = None
    update: frozenset[str] = frozenset()
    items: list[Item] = field(default_factory=list)

    # --- the whole run --------------------------------------------------------------------------------------------------------
    def run(self, until: str | None, start_again_from: str | None) -> None:
        """Carry out all steps up to ``until``; ``start_again_from`` computes that step and all that follow anew."""
        steps = self.plan.steps
        end = position(self.plan, until) + 1 if until else len(steps)
        state = self.project.state
        if start_again_from:
            for step in steps[position(self.plan, start_again_from) :]:
                state.again[step.label] = state.again.get(step.label, 0) + 1
        state.home = os.path.relpath(self.plan.path.parent.resolve(), self.project.path.resolve())
        state.runs += 1
        state.reorder([s.label for s in steps])
        self.arrivals: Arrivals | None = None
        if self.until is None:
            listing = sources.list_exposures(self.plan, self.project)
            keep_former(self.plan, self.project, listing)
            self._look(listing, complete=True)
        else:
            keep_former(self.plan, self.project, None)
            self.arrivals = Arrivals(self.plan, self.project, self.until, self.progress.say)
            self.items = self.project.items()
            self._register(self.arrivals.in_other_sets())
            self._register(self.arrivals.first())
        self._settle_data_sets()
        waits = waiting(self.plan)
        for label, why in waits.items():
            self.progress.say(f"{label}: {why}")
        state.forget(waits)
        for group in chains_of(self.plan, [s for s in steps[:end] if s.label not in waits]):
            if group[0].stage.shape == "map":
                self._run_map(group)
            else:
                self._run_single(group[0])
        self.project.save()

    def _settle_data_sets(self) -> None:
        """Optics and gains, and the keys that follow from them."""
        stored = sources.store_gains(self.plan, self.project.path)
        found = data_sets(self.plan, self.project, {name: str(path.relative_to(self.project.path)) for name, path in stored.items()})
        state = self.project.state
        state.constants, state.gain = found.constants, found.gains
        for sentence in found.said:
            self.progress.say(sentence)
        self.gains = {name: self.project.path / path for name, path in found.gains.items()}
        self.keys = Keys(self.plan, self.project, {name: path.stem for name, path in self.gains.items()})

    def _look(self, listing: list[Arrival], *, complete: bool) -> list[Item]:
        """Take a listing into the registry and say what has happened to exposures; returns those that are new or changed."""
        update = self.project.update_exposures(listing, complete=complete)
        for sentence in update.said:
            self.progress.say(sentence)
        self.items[:] = self.project.items()
        return update.new

    def _register(self, arrived: list[Arrival]) -> list[Item]:
        """Take movies that have arrived into the registry."""
        return self._look(arrived, complete=False) if arrived else []

    def _adopt(self, step: Step, key: str, recipes: dict[str, str] | None = None) -> None:
        """Make ``key`` the current generation of a step; what was computed from another one is no longer current."""
        again = self.project.state.adopt(step.label, Refer(self.plan, self.project.state).state_of(step, key, recipes))
        note_line(self.plan, self.project, step, key, again=again, origin=self.keys.origin(step))
        if again:
            self._drop_dependents([step.label])
        self.project.state.reorder([s.label for s in self.plan.steps])
        self.project.save()

    def _finish(self, *steps: Step) -> None:
        for step in steps:
            finish(self._generation(step.label).path, step.label)

    def _drop_dependents(self, labels: list[str]) -> None:
        """Steps over sets that rest on others which change now are not current any more; their generations stay."""
        changed = set(labels)
        for step in self.plan.steps:
            if self.plan.graph.rests_on(step) & changed and step.label not in changed:
                changed.add(step.label)
                if step.stage.shape != "map":
                    self.project.state.forget([step.label])

    # --- per exposure ---------------------------------------------------------------------------------------------------------
    def _run_map(self, steps: list[Step]) -> None:
        def adopt(step: Step, target: Target) -> None:
            self._adopt(step, target.key, target.recipes)

        maker = ChainMaker(self.plan, self.project, self.keys, self.items, self.gains, self.update, adopt)
        chain = maker.chain(steps)
        if self.arrivals is not None:
            self.arrivals.expected_frames = {
                g.sizes["frame"] for g in self._generation(steps[0].label).grids.values() if "frame" in g.sizes
            }
        for step in steps:
            self._take_back_what_changed(step)
        items = maker.concerned(steps, self.items)
        if self.arrivals is None:
            self._say_what_is_left_out(chain, items)
        maker.take_over(chain, steps, items)
        todo = chain.unfinished(items, retry_quarantined=self.retry_quarantined)
        rows = {item.row for item in todo}
        names = " > ".join(s.label for s in steps)
        self.progress.begin(names if len(names) < 40 else f"{steps[0].label} > ... > {steps[-1].label}", len(todo))
        before = len(items) - len(todo)
        if self.arrivals is not None and "movie" in steps[0].stage.gives:
            self._map_items(chain, self._live(maker, steps, chain, todo, self.arrivals), self.items)
            items = self.items
            todo = chain.unfinished(self._register(self.arrivals.changed()))  # files that were written again meanwhile
        if todo:
            self._drop_dependents([s.label for s in steps])
            self.project.save()
            self._map_items(chain, iter(todo), items)
        self.project.compact()
        records = [self.project.records(s.label) for s in steps]
        if self.arrivals is not None:
            rows = {item.row for item in items}
            self._say_what_is_left_out(chain, items)
        for step, known in zip(steps, records):
            for sentence in rows_told(step.label, [r for row, r in known.items() if row in rows]):
                self.progress.say(sentence)
        bad = {row for r in records for row, record in r.items() if not record["ok"]}
        done = len(items) - len(bad)
        kept = f", {before} of them from before" if before else ""
        self.progress.end(f"{done} micrographs done{kept}" + (f", {len(bad)} quarantined (see cryodask info)" if bad else ""))
        if not done:
            failures = self.project.failures()
            first = str(failures[0]["message"]).splitlines()[0] if failures else "none is recorded"
            raise InputError(
                f"Not one of {len(items)} micrographs could be processed. The first failure: {first}",
                "an option does not fit the data (pixel size, diameter, box), or the files are of another kind",
                "fix it and run again",
            )
        if all(item.row in bad or all(item.row in r for r in records) for item in items):
            self._finish(*steps)

    def _say_what_is_left_out(self, chain: Chain, items: list[Item]) -> None:
        """Rows of imported files whose exposures are not here; refused where that is all of them, unless they may still arrive."""
        for label, said in chain.imports.items():
            missing, whole = said.left_out(items)
            self.project.state.steps[label].left_out = missing
            if whole and self.arrivals is None:
                raise nothing_fits(label, missing)
            if missing:
                self.progress.say(left_out_text(label, missing))

    def _map_items(self, chain: Chain, source: Iterator[Item | None], items: list[Item]) -> None:
        bad = chain.quarantined(items) if not self.retry_quarantined else 0
        known = len(items) - len(chain.unfinished(items, retry_quarantined=self.retry_quarantined))

        runner: MapRunner | None = None

        def on_event(kind: str, item: Item | None, text: str) -> None:
            if kind == "done":
                self.progress.advance()
            elif kind == "quarantined" and item is not None:
                self.progress.say(f"quarantined {item.name}: {text}")
                self.progress.advance()
            elif kind == "stalled":
                self.progress.say(text)
            elif kind == "looked" and self.arrivals is not None:
                self.project.compact()
            if runner is None:
                return
            counts = runner.counts()
            done, quarantined = known - bad + counts["done"], bad + counts["quarantined"]
            waiting = len(items) - done - quarantined - counts["running"]
            if kind == "looked":
                runner.watch.announce(PREFIX, waiting)
            arriving = {"arriving": len(self.arrivals.pending)} if self.arrivals is not None else {}
            self.progress.account(
                seen=len(items),
                done=done,
                quarantined=quarantined,
                running=counts["running"],
                waiting=waiting,
                workers=len(runner.watch.workers),
                stall=runner.watch.stall,
                **arriving,
            )

        if all(link.stage.light(link.params) for link in chain.links):
            process_here(chain, source, event=on_event, first_attempt=self.project.state.runs * 1_000_000)
            return
        runner = MapRunner(
            self.client,
            chain,
            event=on_event,
            limit_seconds=self.plan.file.item_limit_seconds,
            first_attempt=self.project.state.runs * 1_000_000,
            needs_gpu=any(link.stage.resources.gpus for link in chain.links),
        )
        runner.run(source)

    def _live(self, maker: ChainMaker, steps: list[Step], chain: Chain, todo: list[Item], arrivals: Arrivals) -> Iterator[Item | None]:
        """Items of a session as their files become complete, first come first served; None while there is nothing new."""
        waiting = deque(todo)
        data_sets = {item.data_set for item in self.items}
        while True:
            if arrivals.due:
                new = chain.unfinished(self._register(arrivals.poll()))
                if new:
                    self._drop_dependents([link.label for link in chain.links])
                    self.project.save()
                if fresh := {item.data_set for item in new} - data_sets:
                    maker.chain(steps)  # its images may have a size of their own
                    data_sets |= fresh
                waiting.extend(new)
                self.progress.expect(len(new))
            if waiting:
                yield waiting.popleft()
            elif arrivals.over:
                return
            else:
                yield None

    def _take_back_what_changed(self, step: Step) -> None:
        for problem in self._generation(step.label).check_files():
            self.progress.say(f"{step.label}: {problem}; it is recomputed")

    def _generation(self, label: str) -> Generation:
        return self.project.generation(label)

    # --- over a set -------------------------------------------------------------------------------------------------------------
    def _run_single(self, step: Step) -> None:
        """A step over a set; an unfinished one whose set has grown meanwhile is finished first."""
        check_choice(self.plan, self.project, step, confirmed=step.label in self.update)
        inputs = step_inputs(self.plan, self.project, step)
        version = self.keys.version_of_set(step, inputs, self.project.state.steps.get(step.label), self.update)
        key = self.keys.of_set(version, inputs)
        frame = self.keys.frame_of_set(step, version)
        old = frozen_ids(self.project, step, frame, key)
        if old is not None and inputs.ids is not None:
            before, ids = old
            self.progress.say(f"{step.label}: goes on with the {len(ids)} particles with which it was started; the larger set comes after")
            self._compute_single(step, inputs.only(ids), before, frame, version)
        self._compute_single(step, inputs, key, frame, version)

    def _compute_single(self, step: Step, inputs: StepInputs, key: str, frame: str, version: Version) -> None:
        path = self.project.path / "stages" / step.stage.name / key
        meta = {
            "stage": step.stage.name,
            "version": version,
            "params": step.params.model_dump(mode="json"),
            "recipe": frame,
            "inputs": {name: [p.ref for p in products] for name, products in step.inputs.items()},
            "reasons": {**SHARED_REASONS, **step.stage.reasons},
            "image_givers": image_givers(self.plan, self.project, step),
        }
        gives = stored_variables(step)
        generation = Generation.create(path, meta=meta, gives=gives, per_item=False)
        self._adopt(step, key)
        self._take_back_what_changed(step)
        self.progress.begin(step.label, None)
        if generation.committed():
            newer = step.stage.newer(version)
            older = f" (version {version}; --update {step.label} computes it with version {newer})" if newer is not None else ""
            self._finish(step)
            self.progress.end(f"done before{older}")
            return
        if inputs.ids is not None:
            freeze(generation, inputs.ids)
        started = time.time()
        with scheduler_needed(self.client):
            result = self._compute(step, inputs, generation)
        result = settle_result(self.project, step, inputs, result)
        generation.commit_result(result, seconds=round(time.time() - started, 3))
        self._finish(step)
        self.progress.end(summary(result))

    def _compute(self, step: Step, inputs: StepInputs, generation: Generation) -> dict[str, Any]:
        stage = step.stage
        if stage.shape == "set":
            return run_set(self.plan, self.project, inputs, generation)
        values = whole_values(self.plan, self.project, inputs)
        if stage.shape == "blocks":

            def on_iteration(state: dict[str, Any], metrics: dict[str, Any]) -> None:
                self.progress.advance(short(metrics))

            return iterate_on_workers(
                self.client,
                step.label,
                stage.functions,
                step.params,
                particle_set(self.project, inputs),
                loaded(values),
                generation.path / "checkpoints",
                on_iteration=on_iteration,
                tell=self.progress.say,
            )
        if stage.shape == "tournament":
            particles = particle_set(self.project, inputs)
            return run_tournament(self.client, stage.functions, step.params, particles, self.progress.advance, self.progress.say)
        return run_whole(self.client, stage.name, step.params, values, self.progress.say, generation.path / "logs" / "result.log")


def check_inputs(plan: Plan, *, force: bool = False, watch: bool = False, asked: Asked | None = None) -> list[str]:
    """Meet what can go wrong with folder, lock, inputs, gain, reference and cluster before any worker is started; returns warnings.

    ``asked`` is what a command line says of cluster, workers and lane. Movies that are watched for are not looked at yet.

    Raises
    ------
    CryodaskError
    """
    if plan.folder == plan.path.resolve().parent:
        raise ProjectFileError(
            f"The results of {plan.path} would go into the folder where it lies, among your own files.",
            f"its name or folder is {plan.file.folder or plan.file.name!r}",
            "give a folder of its own:  folder: results",
        )
    if watch and not plan.has_movies:
        raise ProjectFileError(
            "Only movies can be watched for.", f"{plan.path} starts from what another program made", "run it without --watch"
        )
    sources.load_gains(plan)
    sources.check_files(plan)
    project = Project.create(plan.folder, plan.file.name)
    with project.lock(force=force):
        pass  # refused now where another driver works or nothing may be written
    listing = [] if watch else sources.list_exposures(plan, project)
    sources.check_readable(plan, listing)
    ahead = look_ahead(plan, project, listing, asked)
    if ahead.problems:
        raise ProjectFileError(f"{plan.path}: " + "\n".join(ahead.problems), "", "cryodask run --dry-run  shows the rest")
    return ahead.warnings


def run_plan(
    plan: Plan,
    client: Client,
    *,
    until: str | None = None,
    start_again_from: str | None = None,
    force: bool = False,
    retry_quarantined: bool = False,
    watch: Until | None = None,
    update: Iterable[str] = (),
    progress: Progress | None = None,
) -> Project:
    """Carry out a plan on the workers of ``client``; returns the project.

    With ``watch`` the movies are taken as they arrive, until the session is over; then the steps after them follow. ``update`` names
    steps whose results of an older version are computed again with this program's.

    Raises
    ------
    CryodaskError
        What stops a run; everything committed before stays, and the same call goes on from there.
    """
    for label in (until, start_again_from, *update):
        if label:
            position(plan, label)
    with Project.create(plan.folder, plan.file.name).lock(force=force):
        project = Project(plan.folder)  # as the driver before left it
        with disk_errors(project.path):
            write_atomically(project.path / "project.yaml", plan.path.read_text())
        with progress or Progress(quiet=True) as shown, shown.recorded(project.path):
            Execution(plan, project, client, shown, retry_quarantined, watch, frozenset(update)).run(until, start_again_from)
    return project
