"""A plan, carried out: items registered, generations made, runners called, results committed; resumed wherever it was left."""

from __future__ import annotations

import io
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from distributed import Client

from cryodask.errors import InputError, ProjectFileError
from cryodask.run import sources
from cryodask.run.blocks import iterate_on_workers
from cryodask.run.chain import Chain, Link
from cryodask.run.health import scheduler_needed
from cryodask.run.inputs import StepInputs
from cryodask.run.map import PREFIX, MapRunner
from cryodask.run.particles import StoredParticles
from cryodask.run.progress import Progress, short, summary
from cryodask.run.recipe import Plan, Step, position
from cryodask.run.watch import Arrivals, Until
from cryodask.run.whole import loaded, run_tournament, run_whole
from cryodask.store.files import disk_errors, write_atomically
from cryodask.store.generation import Generation, generation_key
from cryodask.store.project import Item, Project
from cryodask.vocabulary import SLOTS, VARIABLES


@dataclass
class Execution:
    """One run of a plan on the workers of a client; holds the project's lock (see :func:`run_plan`)."""

    plan: Plan
    project: Project
    client: Client
    progress: Progress
    retry_quarantined: bool = False
    until: Until | None = None

    # --- the whole run --------------------------------------------------------------------------------------------------------
    def run(self, until: str | None, start_again_from: str | None) -> None:
        """Carry out all steps up to ``until``; ``start_again_from`` makes that step and all that follow anew."""
        steps = self.plan.steps
        end = position(self.plan, until) + 1 if until else len(steps)
        if start_again_from:
            salt = self.project.state.setdefault("again", {})
            for step in steps[position(self.plan, start_again_from) :]:
                salt[step.label] = salt.get(step.label, 0) + 1
        microscope = self.plan.file.microscope
        self.project.state["constants"] = microscope.model_dump() if microscope else {}
        self.project.state["runs"] = self.project.state.get("runs", 0) + 1
        self.gain = self._store_gain()
        self.project.state["gain"] = str(self.gain.relative_to(self.project.path)) if self.gain else None
        self._forget_steps_not_in_plan()
        self.arrivals: Arrivals | None = None
        if self.until is None:
            listed = sources.list_items(self.plan)
            self.items = self.project.add_items(listed)
            self.project.keep_items([name for name, _ in listed])
        else:
            self.arrivals = Arrivals(self.plan, self.project, self.until, self.progress.say)
            self.items = self.project.items()
            self._register(self.arrivals.first())
        for shape, group in groupby(steps[:end], key=lambda s: s.stage.shape == "map"):
            if shape:
                self._run_map(list(group))
            else:
                for step in group:
                    self._run_single(step)
        self.project.save()

    def _register(self, arrived: list[sources.ItemInputs]) -> list[Item]:
        """Take inputs into the registry; those known already take their new size and time."""
        new = self.project.add_items(arrived)
        by_row = {i.row: i for i in self.items} | {i.row: i for i in new}
        self.items[:] = [by_row[row] for row in sorted(by_row)]
        return new

    @property
    def inputs(self) -> StepInputs:
        """Where steps that are no map find what they need."""
        return StepInputs(self.plan, self.project, self.items)

    def _forget_steps_not_in_plan(self) -> None:
        labels = [s.label for s in self.plan.steps]
        generations = self.project.state["generations"]
        self.project.state["generations"] = {k: v for k, v in generations.items() if k in labels}
        self._set_order()

    def _set_order(self) -> None:
        generations = self.project.state["generations"]
        self.project.state["order"] = [s.label for s in self.plan.steps if s.label in generations]
        self.project.save()

    def _adopt(self, label: str, key: str) -> None:
        """Make ``key`` the current generation of a step; what was computed from another one is no longer current."""
        generations = self.project.state["generations"]
        if generations.get(label) != key:
            generations[label] = key
            self._drop_dependents(label)
        self._set_order()

    def _drop_dependents(self, label: str) -> None:
        generations = self.project.state["generations"]
        dropped = {label}
        for step in self.plan.steps:
            uses = set(step.source.values()) | self.inputs.implied(step)
            if uses & dropped and step.label not in dropped:
                dropped.add(step.label)
                if step.stage.shape != "map":
                    generations.pop(step.label, None)

    # --- keys -----------------------------------------------------------------------------------------------------------------------
    def _key(self, step: Step, upstream: dict[str, Any]) -> str:
        params = step.params.model_dump()
        for name, path in step.input_files().items():
            params[name] = sources.content_hash(path)
        parts = {"stage": step.stage.name, "version": step.stage.version, "params": params, "upstream": upstream}
        again = self.project.state.get("again", {}).get(step.label)
        return generation_key({**parts, "again": again} if again else parts)

    def _upstream_of_map(self, step: Step) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for name, label in sorted(step.source.items()):
            if label != "inputs":
                out[name] = self.project.state["generations"][label]
            elif name == "gain":
                out[name] = self.gain.stem if self.gain else None
            elif name in self.project.state["constants"]:
                out[name] = self.project.state["constants"][name]
            else:
                out[name] = "item"  # in the fingerprint of the item's record
        return out

    # --- map stages -----------------------------------------------------------------------------------------------------------------
    def _run_map(self, steps: list[Step]) -> None:
        chain = self._prepare_chain(steps)
        if self.arrivals is not None:
            self.arrivals.expected_frames = self._generation(steps[0].label).meta["sizes"].get("frame")
        for step in steps:
            self._take_back_what_changed(step)
        todo = chain.unfinished(self.items, retry_quarantined=self.retry_quarantined)
        names = " > ".join(s.label for s in steps)
        self.progress.begin(names if len(names) < 40 else f"{steps[0].label} > ... > {steps[-1].label}", len(todo))
        before = len(self.items) - len(todo)
        if self.arrivals is not None and "movie" in steps[0].stage.gives:
            self._map_items(chain, self._live(chain, todo, self.arrivals))
            todo = chain.unfinished(self._register(self.arrivals.changed()))  # files that were written again meanwhile
        if todo:
            self._drop_dependents(steps[0].label)
            self._set_order()
            self._map_items(chain, iter(todo))
        self.project.compact()
        records = [self.project.records(s.label) for s in steps]
        bad = {row for r in records for row, record in r.items() if not record["ok"]}
        done = len(self.items) - len(bad)
        kept = f", {before} of them from before" if before else ""
        self.progress.end(f"{done} micrographs done{kept}" + (f", {len(bad)} quarantined (see cryodask info)" if bad else ""))
        if not done:
            failures = self.project.failures()
            first = str(failures[0]["message"]).splitlines()[0] if failures else "none is recorded"
            raise InputError(
                f"Not one of {len(self.items)} micrographs could be processed. The first failure: {first}",
                "an option does not fit the data (pixel size, diameter, box), or the files are of another kind",
                "mend it and run again",
            )

    def _map_items(self, chain: Chain, source: Iterator[Item | None]) -> None:
        bad = chain.quarantined(self.items) if not self.retry_quarantined else 0
        known = len(self.items) - len(chain.unfinished(self.items, retry_quarantined=self.retry_quarantined))

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
            counts = runner.counts()
            done, quarantined = known - bad + counts["done"], bad + counts["quarantined"]
            waiting = len(self.items) - done - quarantined - counts["running"]
            if kind == "looked":
                runner.watch.announce(PREFIX, waiting)
            arriving = {"arriving": len(self.arrivals.pending)} if self.arrivals is not None else {}
            self.progress.account(
                seen=len(self.items),
                done=done,
                quarantined=quarantined,
                running=counts["running"],
                waiting=waiting,
                workers=len(runner.watch.workers),
                stall=runner.watch.stall,
                **arriving,
            )

        runner = MapRunner(
            self.client,
            chain,
            event=on_event,
            limit_seconds=self.plan.file.item_limit_seconds,
            first_attempt=self.project.state["runs"] * 1_000_000,
        )
        runner.run(source)

    def _live(self, chain: Chain, todo: list[Item], arrivals: Arrivals) -> Iterator[Item | None]:
        """Items of a session as their files become complete, first come first served; None while there is nothing new."""
        waiting = deque(todo)
        while True:
            if arrivals.due:
                new = chain.unfinished(self._register(arrivals.poll()))
                if new:
                    self._drop_dependents(chain.links[0].label)
                    self._set_order()
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
            self.progress.say(f"{step.label}: {problem}; it is made again")

    def _prepare_chain(self, steps: list[Step]) -> Chain:
        links: list[Link] = []
        sizes_of: dict[str, dict[str, int]] = {}
        dtypes: dict[str, str] = {}
        for step in steps:
            key = self._key(step, self._upstream_of_map(step))
            needed: dict[str, int] = {}
            for name, label in step.source.items():
                known = sizes_of.get(label) or (
                    self._generation(label).meta["sizes"] if label != "inputs" and label not in sizes_of else {}
                )
                needed |= {d: known[d] for d in VARIABLES[name].dims if d in known}
            old = self.project.path / "stages" / step.label / key
            if (old / "zarr.json").exists():
                meta = Generation(old).meta
                sizes, step_dtypes = meta["sizes"], meta["dtypes"]
            elif not needed:
                sizes, step_dtypes = sources.probe(step, self._item_values())
                self._check_gain(step, sizes)
            else:
                sizes, step_dtypes = {"slot": SLOTS, **needed, **step.stage.sizes(step.params, needed)}, {}
            sizes_of[step.label], dtypes = sizes, {**dtypes, **step_dtypes}
            meta = {"label": step.label, "stage": step.stage.name, "version": step.stage.version, "params": step.params.model_dump()}
            bulk = [v for v in step.stage.gives_variables() if v.kind == "bulk"]
            own = {d: sizes[d] for v in bulk for d in v.dims}
            generation = Generation.create(
                old, meta={**meta, "upstream": step.source}, gives=step.stage.gives, per_item=True, sizes=own, dtypes=step_dtypes
            )
            links.append(Link(step.label, step.stage.name, step.params, step.source, generation.path))
            self._adopt(step.label, key)
        here = {link.label for link in links}
        earlier = {label: self._generation(label).path for s in steps for label in s.source.values() if label not in here | {"inputs"}}
        return Chain(tuple(links), dict(self.project.state["constants"]), self.gain, earlier)

    def _item_values(self) -> Iterator[dict[str, Any]]:
        for item in self.items:
            yield {**self.project.state["constants"], **item.inputs}

    def _generation(self, label: str) -> Generation:
        return self.project.generation(label)

    # --- gain -----------------------------------------------------------------------------------------------------------------------
    def _store_gain(self) -> Path | None:
        gain = sources.load_gain(self.plan)
        if gain is None:
            return None
        buffer = io.BytesIO()
        np.save(buffer, np.ascontiguousarray(gain, np.float32))
        folder = self.project.path / "inputs"
        with disk_errors(folder):
            folder.mkdir(exist_ok=True)
            path = folder / f"gain-{generation_key({'gain': buffer.getvalue().hex()})}.npy"
            if not path.exists():
                write_atomically(path, buffer.getvalue())
        return path

    def _check_gain(self, step: Step, sizes: dict[str, int]) -> None:
        """Refuse a gain of another shape or orientation, before the first movie is corrected with it."""
        if self.gain is None or "movie" not in step.stage.gives:
            return
        from cryodask.formats.movies import check_gain

        gain = np.load(self.gain)
        frames_sum = sources.sum_first_movies(step, self._item_values(), (sizes["y"], sizes["x"]))
        check_gain(frames_sum, gain, name=self.plan.file.inputs.gain or "")

    # --- the others -----------------------------------------------------------------------------------------------------------------
    def _run_single(self, step: Step) -> None:
        particles, inputs, upstream = self.inputs.of(step)
        key = self._key(step, upstream)
        path = self.project.path / "stages" / step.label / key
        meta = {"label": step.label, "stage": step.stage.name, "version": step.stage.version, "params": step.params.model_dump()}
        extra = (
            ("particle_row", "particle_slot") if particles is not None and any(v.per_particle for v in step.stage.gives_variables()) else ()
        )
        generation = Generation.create(
            path, meta={**meta, "upstream": step.source}, gives=(*step.stage.gives, *extra), per_item=False, sizes={}, dtypes={}
        )
        self._adopt(step.label, key)
        self._take_back_what_changed(step)
        self.progress.begin(step.label, None)
        if generation.committed():
            self.progress.end("done before")
            return
        started = time.time()
        with scheduler_needed(self.client):
            result = self._compute(step, particles, inputs, generation)
        if extra and particles is not None:
            result |= {"particle_row": particles.row, "particle_slot": particles.slot}
        generation.commit_result(result, seconds=round(time.time() - started, 3))
        self.progress.end(summary(result))

    def _compute(self, step: Step, particles: StoredParticles | None, inputs: dict[str, Any], generation: Generation) -> dict[str, Any]:
        stage = step.stage
        if stage.shape == "blocks":
            assert particles is not None

            def on_iteration(state: dict[str, Any], metrics: dict[str, Any]) -> None:
                self.progress.advance(short(metrics))

            return iterate_on_workers(
                self.client,
                step.label,
                stage.functions,
                step.params,
                particles,
                loaded(inputs),
                generation.path / "checkpoints",
                on_iteration=on_iteration,
                tell=self.progress.say,
            )
        if stage.shape == "tournament":
            assert particles is not None
            return run_tournament(self.client, stage.functions, step.params, particles, self.progress.advance, self.progress.say)
        return run_whole(self.client, stage.name, step.params, inputs, self.progress.say)


def check_inputs(plan: Plan, *, force: bool = False, watch: bool = False) -> None:
    """Meet what can go wrong with folder, lock, inputs, gain and reference before any worker is started.

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
    if watch and not plan.file.inputs.movies:
        raise ProjectFileError(
            "Only movies can be watched for.", f"{plan.path} starts from what another program made", "run it without --watch"
        )
    items = sources.list_items(plan) if not watch else []
    sources.load_gain(plan)
    sources.check_files(plan)
    with Project.create(plan.folder, plan.file.name).lock(force=force):
        pass  # refused now where another driver works or nothing may be written
    sources.check_readable(plan, items)


def run_plan(
    plan: Plan,
    client: Client,
    *,
    until: str | None = None,
    start_again_from: str | None = None,
    force: bool = False,
    retry_quarantined: bool = False,
    watch: Until | None = None,
    progress: Progress | None = None,
) -> Project:
    """Carry out a plan on the workers of ``client``; returns the project.

    With ``watch`` the movies are taken as they arrive, until the session is over; then the steps after them follow.

    Raises
    ------
    CryodaskError
        What stops a run; everything committed before stays, and the same call goes on from there.
    """
    for label in (until, start_again_from):
        if label:
            position(plan, label)
    with Project.create(plan.folder, plan.file.name).lock(force=force):
        project = Project(plan.folder)  # as the driver before left it
        with disk_errors(project.path):
            write_atomically(project.path / "project.yaml", plan.path.read_text())
        with progress or Progress(quiet=True) as shown, shown.recorded(project.path):
            Execution(plan, project, client, shown, retry_quarantined, watch).run(until, start_again_from)
    return project
