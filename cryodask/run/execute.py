"""Execution of a plan: registers exposures, makes generations, calls the runners, commits results; resumes wherever it stopped."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from distributed import Client

from cryodask.edits.frozen import Stamps
from cryodask.errors import InputError
from cryodask.run import gains, sources
from cryodask.run.acceptance import messages_of_picks
from cryodask.run.backlog import Backlog
from cryodask.run.blocks import iterate_on_workers
from cryodask.run.chain import Chain
from cryodask.run.chains import ChainMaker, Target
from cryodask.run.data_sets import data_sets, keep_former
from cryodask.run.decisions import FOR_A_PERSON, check_choice, still_decided, waiting, with_decisions
from cryodask.run.events import Events, ExposureArrived, Iteration, Stalled, StepFinished, StepStarted
from cryodask.run.events.reports import Reports
from cryodask.run.events.tally import Tally
from cryodask.run.groups import chains_of
from cryodask.run.health import Watch, scheduler_needed
from cryodask.run.here import process_here
from cryodask.run.imports import left_out_text, nothing_fits, row_messages
from cryodask.run.inputs import SHARED_REASONS, StepInputs, particle_set, step_inputs, whole_values
from cryodask.run.keys import Keys
from cryodask.run.made_in import MadeIn, before_adding
from cryodask.run.map import MapRunner
from cryodask.run.offers import refuse_beyond_workers
from cryodask.run.recipe import Plan, Step
from cryodask.run.record import note_line
from cryodask.run.refs import Refer
from cryodask.run.remake import Needs, bring_back, needs_of_chain, needs_of_set
from cryodask.run.results import freeze, frozen_ids, run_set, scalars, sentence_of, settle_result, stored_variables
from cryodask.run.selection import Wanted
from cryodask.run.still_patterns import messages_of_motion
from cryodask.run.stopping import Stop
from cryodask.run.unions import image_givers
from cryodask.run.watch import Arrivals
from cryodask.run.whole import loaded, run_tournament, run_whole
from cryodask.run.workers import Workers
from cryodask.stage import Version
from cryodask.store.environments import MADE_IN, Environment, counts
from cryodask.store.generation import Generation
from cryodask.store.history import generation_folders
from cryodask.store.places import finish
from cryodask.store.project import Arrival, Item, Project

_GOES_ON = "new decisions were frozen during the run; it goes on with them"
_LIVE_KINDS = ("picks", "exposures")
"""Edits of single exposures, which a watched session applies while it runs."""


@dataclass
class Execution:
    """One run of a plan; the caller holds the project's lock (see session.py)."""

    plan: Plan
    project: Project
    workers: Workers
    events: Events
    wanted: Wanted
    stop: Stop
    reports: Reports
    items: list[Item] = field(default_factory=list)

    # --- the whole run --------------------------------------------------------------------------------------------------------
    def run(self) -> None:
        """Run the requested steps; when people have decided something meanwhile, go on with what follows from it."""
        steps = self.plan.steps
        state = self.project.state
        self.update = frozenset(self.wanted.update)
        self.wanted.count_recomputations(self.plan, state.again)
        state.home = os.path.relpath(self.plan.path.parent.resolve(), self.project.path.resolve())
        state.reorder([s.label for s in steps])
        self.arrivals: Arrivals | None = None
        if self.wanted.watch is None:
            listing = sources.list_exposures(self.plan, self.project)
            keep_former(self.plan, self.project, listing)
            self._look(listing, complete=True)
        else:
            keep_former(self.plan, self.project, None)
            self.arrivals = Arrivals(self.plan, self.project, self.wanted.watch, self.events.say, self.stop)
            self.items = self.project.items()
            self._register(self.arrivals.in_other_sets())
            self._register(self.arrivals.first())
        undecided, self.stamps = self.plan, Stamps(self.project.path)
        while True:
            before = self.stamps.now()
            if not self._run_decided(undecided):
                continue
            if self.stamps.now() == before:
                break
            self.events.say(_GOES_ON)
            self.arrivals = None

    def _run_decided(self, undecided: Plan) -> bool:
        """Run the steps whose decisions are made; False if people have decided something that changes those already planned."""
        self.decided_live, self.redecided = self.stamps.now(_LIVE_KINDS), False
        self.plan, said = with_decisions(undecided, self.project)
        state = self.project.state
        state.runs += 1
        self._settle_data_sets()
        waits = waiting(self.plan)
        self.events.waiting_for = [label for label, why in waits.items() if why == FOR_A_PERSON]
        for label, why in waits.items():
            said.append(f"{label}: {why}")
        for sentence in said:
            self.events.say(sentence)
        state.forget(waits)
        self.wanted.check_sources(self.plan, state)
        self.todo, self._suited = [s for s in self.wanted.steps(self.plan) if s.label not in waits], False
        for group in chains_of(self.plan, self.todo, watching=self.arrivals is not None):
            self.stop.check()
            if group[0].stage.shape == "map":
                self._run_map(group)
            elif still_decided(undecided, self.project, group[0]):
                self._run_single(group[0])
            else:
                self.redecided = True
            if self.redecided:
                break
        self.project.save()
        return not self.redecided

    def _client(self) -> Client:
        """The client of the workers, which are found or started here if no step has needed them before.

        Raises
        ------
        ClusterError, ProjectFileError
            The latter if a step of this run needs more than any worker has.
        """
        if not self.workers.found:
            with self.stop.at_once():
                client = self.workers.client()
            self.events.say(f"Dask dashboard: {client.dashboard_link}")
            self.reports.listen(client)
        client = self.workers.client()
        if not self._suited:
            refuse_beyond_workers(self.plan, self.project, self.todo, self.items, client)
            self._suited = True
        return client

    def _begin(self, name: str, steps: list[Step], total: int | None = None, kept: int = 0) -> None:
        self.step, self._began = name, time.monotonic()
        self.events.emit(StepStarted, step=name, steps=[s.label for s in steps], total=total, kept=kept)

    def _end(self, steps: list[Step], result: str, **counts: int) -> None:
        self.reports.emit()
        seconds = round(time.monotonic() - self._began, 3)
        labels = [s.label for s in steps]
        self.events.emit(StepFinished, step=self.step, steps=labels, result=result, seconds=seconds, **counts)

    def _note_environment(self, step: Step, before: Iterable[Environment | str]) -> None:
        """Report, or refuse, adding to results that were computed with other versions."""
        if said := before_adding(step.label, self.project.path, before, same=self.wanted.same_environment):
            self.events.say(said)

    def _settle_data_sets(self) -> None:
        """Set optics and gains, and the keys that follow from them."""
        stored = gains.store_gains(self.plan, self.project.path)
        found = data_sets(self.plan, self.project, {name: str(path.relative_to(self.project.path)) for name, path in stored.items()})
        state = self.project.state
        state.constants, state.gain = found.constants, found.gains
        for sentence in found.said:
            self.events.say(sentence)
        self.gains = {name: self.project.path / path for name, path in found.gains.items()}
        self.keys = Keys(self.plan, self.project, {name: path.stem for name, path in self.gains.items()})

    def _look(self, listing: list[Arrival], *, complete: bool) -> list[Item]:
        """Register a listing and report what has changed; returns new and changed exposures."""
        update = self.project.update_exposures(listing, complete=complete)
        if not complete:
            for item in update.new:
                self.events.emit(ExposureArrived, name=item.name)
        for sentence in update.said:
            self.events.say(sentence)
        self.items[:] = self.project.items()
        return update.new

    def _register(self, arrived: list[Arrival]) -> list[Item]:
        """Register movies that have arrived."""
        return self._look(arrived, complete=False) if arrived else []

    def _adopt(self, step: Step, key: str, recipes: dict[str, str] | None = None) -> None:
        """Make ``key`` the current generation of a step; results computed from another one are no longer current."""
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
        """Mark steps over sets that depend on changed steps as not current; their generations stay."""
        changed = set(labels)
        for step in self.plan.steps:
            if self.plan.graph.rests_on(step) & changed and step.label not in changed:
                changed.add(step.label)
                if step.stage.shape != "map":
                    self.project.state.forget([step.label])

    # --- per exposure ---------------------------------------------------------------------------------------------------------
    def _run_map(self, steps: list[Step]) -> None:
        maker = self._maker()
        chain = maker.chain(steps)
        if self.arrivals is not None:
            self.arrivals.expected_frames = {
                g.sizes["frame"] for g in self._generation(steps[0].label).grids.values() if "frame" in g.sizes
            }
        for step in steps:
            self._invalidate_changed_files(step)
        items = maker.concerned(steps, self.items)
        if self.arrivals is None:
            self._report_left_out(chain, items)
        maker.take_over(chain, steps, items)
        todo = chain.unfinished(items, retry_quarantined=self.wanted.retry_quarantined)
        rows = {item.row for item in todo}
        for step in steps if todo or self.arrivals is not None else ():
            self._note_environment(step, counts(self.project.records(step.label).values()))
        names = " > ".join(s.label for s in steps)
        before = len(items) - len(todo)
        live = self.arrivals is not None and "movie" in steps[0].stage.gives
        if (todo or live) and not _light(chain):
            self._client()  # what workers lack is said before a step begins
        if todo:
            self._bring_back(needs_of_chain(self.project, chain, todo, chain.lacking_by_step(todo)), maker)
        self._begin(names if len(names) < 40 else f"{steps[0].label} > ... > {steps[-1].label}", steps, len(items), before)
        if live and self.arrivals is not None:
            self._map_items(chain, self._live(maker, steps, chain, todo, self.arrivals), self.items)
            items = self.items
            if self.redecided:
                last = [bool(record["ok"]) for record in self.project.records(steps[-1].label).values()]
                self._end(steps, f"{sum(last)} micrographs done so far", done=sum(last), quarantined=chain.quarantined(items))
                return
            todo = chain.unfinished(self._register(self.arrivals.changed()))  # files that were rewritten meanwhile
        if todo:
            self._drop_dependents([s.label for s in steps])
            self.project.save()
            self._map_items(chain, iter(todo), items)
        self.project.compact()
        records = [self.project.records(s.label) for s in steps]
        if self.arrivals is not None:
            rows = {item.row for item in items}
            self._report_left_out(chain, items)
        for step, known in zip(steps, records):
            new = [r for row, r in known.items() if row in rows]
            of_results = (*messages_of_picks(self.project, step), *messages_of_motion(self.project, step)) if new else ()
            for sentence in (*row_messages(step.label, new), *of_results):
                self.events.say(sentence)
        bad = {row for r in records for row, record in r.items() if not record["ok"]}
        done = len(items) - len(bad)
        kept = f", {before} of them from before" if before else ""
        said = f"{done} micrographs done{kept}" + (f", {len(bad)} quarantined (see cryodask info)" if bad else "")
        self._end(steps, said, done=done, quarantined=len(bad))
        if not done:
            failures = self.project.failures()
            first = str(failures[0]["message"]).splitlines()[0] if failures else "none is recorded"
            raise InputError(
                f"None of {len(items)} micrographs could be processed. The first failure: {first}",
                "a parameter does not match the data (pixel size, diameter, box), or the files are of another kind",
                "fix it and rerun",
            )
        if all(item.row in bad or all(item.row in r for r in records) for item in items):
            self._finish(*steps)

    def _bring_back(self, needs: Needs, maker: ChainMaker) -> None:
        """Recompute thinned arrays that a step needs; refuse if files must be restored first."""

        def send(chain: Chain, items: list[Item]) -> None:
            self._send(chain, iter(items), lambda kind, item, text: None)
            self.stop.check()

        bring_back(needs, self.plan, self.project, maker, self.items, send, self.events.say)

    def _report_left_out(self, chain: Chain, items: list[Item]) -> None:
        """Report rows of imported files without an exposure; refuse if that is all of them, unless exposures may still arrive."""
        for label, said in chain.imports.items():
            missing, whole = said.left_out(items)
            self.project.state.steps[label].left_out = missing
            if whole and self.arrivals is None:
                raise nothing_fits(label, missing)
            if missing:
                self.events.say(left_out_text(label, missing))
            for remark in said.remarks():
                self.events.say(f"{label}: {remark}")

    def _map_items(self, chain: Chain, source: Iterator[Item | None], items: list[Item]) -> None:
        bad = chain.quarantined(items) if not self.wanted.retry_quarantined else 0
        done = len(items) - len(chain.unfinished(items, retry_quarantined=self.wanted.retry_quarantined)) - bad
        tally = Tally(self.events, self.step, items, done, bad, self.arrivals)
        self._send(chain, source, tally)
        self.project.compact()
        self.stop.check()

    def _send(self, chain: Chain, source: Iterator[Item | None], event: Callable[[str, Item | None, str], None]) -> None:
        """Process items on the workers, or here if that costs less."""
        first_attempt = self.project.state.runs * 1_000_000
        if _light(chain):
            process_here(chain, source, event=event, first_attempt=first_attempt, stopped=self._stopped)
            return
        chain.topic = self.reports.topic
        runner = MapRunner(
            self._client(),
            chain,
            event=event,
            limit_seconds=self.plan.file.item_limit_seconds,
            first_attempt=first_attempt,
            live=self.arrivals is not None,
            stopped=self._stopped,
            needs_gpu=any(link.stage.resources.gpus for link in chain.links),
            licences=tuple(sorted({name for link in chain.links for name in link.stage.resources.licences})),
        )
        if isinstance(event, Tally):
            event.runner = runner
        runner.run(source)
        if isinstance(event, Tally):
            event.count()

    def _stopped(self) -> bool:
        self.reports.emit()
        return self.stop.asked

    def _looked(self) -> None:
        self.reports.emit()
        self.stop.check()

    def _live(self, maker: ChainMaker, steps: list[Step], chain: Chain, todo: list[Item], arrivals: Arrivals) -> Iterator[Item | None]:
        """Items of a watched session as their files become complete, newest first; None while there is nothing new.

        It ends early when people freeze edits that some of these steps apply; the session then goes on with them.
        """
        made = self._made_before(steps) if todo else set()
        backlog = Backlog([i for i in todo if i.row not in made], [i for i in todo if i.row in made])
        data_sets = {item.data_set for item in self.items}
        while True:
            if arrivals.due:
                if self.stamps.now(_LIVE_KINDS) != self.decided_live:
                    self.events.say(_GOES_ON)
                    self.redecided = True
                    return
                new = chain.unfinished(self._register(arrivals.poll()))
                if new:
                    self._drop_dependents([link.label for link in chain.links])
                    self.project.save()
                if fresh := {item.data_set for item in new} - data_sets:
                    chain.grids |= maker.chain(steps).grids  # its images may differ in size
                    data_sets |= fresh
                backlog.add(new)
                self.project.compact()
            item = backlog.take()
            if item is None and arrivals.over:
                return
            yield item

    def _made_before(self, steps: list[Step]) -> set[int]:
        """Rows of the exposures that have a result of these steps, with any parameters."""
        stages = {step.stage.name for step in steps} - {"ingest"}
        folders = [path for path in generation_folders(self.project.path) if path.parent.name in stages]
        return {row for path in folders for row in Generation(path).committed()}

    def _invalidate_changed_files(self, step: Step) -> None:
        for problem in self._generation(step.label).check_files():
            self.events.say(f"{step.label}: {problem}; it is recomputed")

    def _generation(self, label: str) -> Generation:
        return self.project.generation(label)

    # --- over a set -------------------------------------------------------------------------------------------------------------
    def _run_single(self, step: Step) -> None:
        """Run a step over a set; an unfinished result whose set has grown meanwhile is finished first."""
        check_choice(self.plan, self.project, step, confirmed=step.label in self.update)
        inputs = step_inputs(self.plan, self.project, step)
        version = self.keys.version_of_set(step, inputs, self.project.state.steps.get(step.label), self.update)
        key = self.keys.of_set(version, inputs)
        frame = self.keys.frame_of_set(step, version)
        old = frozen_ids(self.project, step, frame, key)
        if old is not None and inputs.ids is not None:
            before, ids = old
            self.events.say(f"{step.label}: resumes with the {len(ids)} particles it was started with; the larger set follows")
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
        self._invalidate_changed_files(step)
        if step.stage.shape != "set" and not generation.committed():
            self._client()
        self._begin(step.label, [step])
        if generation.committed():
            newer = step.stage.newer(version)
            older = f" (version {version}; --update {step.label} recomputes it with version {newer})" if newer is not None else ""
            self._finish(step)
            self._end([step], f"done before{older}")
            return
        self._bring_back(needs_of_set(self.plan, self.project, inputs), self._maker())
        if inputs.ids is not None:
            freeze(generation, inputs.ids)
        started = time.time()
        result = self._compute(step, inputs, generation)
        made_in = result.pop(MADE_IN, ())
        result = settle_result(self.project, step, inputs, result)
        generation.commit_result(result, made_in, seconds=round(time.time() - started, 3))
        self._finish(step)
        self._end([step], sentence_of(step, result))

    def _maker(self) -> ChainMaker:
        def adopt(step: Step, target: Target) -> None:
            self._adopt(step, target.key, target.recipes)

        return ChainMaker(self.plan, self.project, self.keys, self.items, self.gains, self.update, adopt)

    def _compute(self, step: Step, inputs: StepInputs, generation: Generation) -> dict[str, Any]:
        stage = step.stage
        if stage.shape == "set":
            return run_set(self.plan, self.project, inputs, generation)
        client = self._client()
        with scheduler_needed(client):
            return self._compute_on(client, step, inputs, generation)

    def _compute_on(self, client: Client, step: Step, inputs: StepInputs, generation: Generation) -> dict[str, Any]:
        stage, values = step.stage, whole_values(self.plan, self.project, inputs)

        def tell(why: str) -> None:
            self.events.emit(Stalled, step=step.label, why=why)

        if stage.shape == "blocks":
            made_in = MadeIn(generation)
            self._note_environment(step, made_in.found)

            def on_iteration(state: dict[str, Any], metrics: dict[str, Any]) -> None:
                made_in.add(metrics[MADE_IN])
                number = int(state["iteration"])
                self.events.emit(Iteration, step=step.label, iteration=number, of=None, figures=scalars(metrics))
                self._looked()

            result = iterate_on_workers(
                client,
                step.label,
                stage.functions,
                step.params,
                particle_set(self.project, inputs),
                loaded(values),
                generation.path / "checkpoints",
                on_iteration=on_iteration,
                tell=tell,
                topic=self.reports.topic,
            )
            return {**result, MADE_IN: made_in.found}
        watch = Watch(client, tell, looked=self._looked)
        report = self.reports.topic, step.label
        if stage.shape == "tournament":

            def on_chain(number: int, of: int) -> None:
                self.events.emit(Iteration, step=step.label, iteration=number, of=of, figures={})

            return run_tournament(stage.functions, step.params, particle_set(self.project, inputs), watch, on_chain, report)
        return run_whole(stage.name, step.params, values, watch, generation.path / "logs" / "result.log", report)


def _light(chain: Chain) -> bool:
    """Whether the items of a chain cost less here than sent to workers."""
    return all(link.stage.light(link.params) for link in chain.links)
