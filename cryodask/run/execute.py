"""A plan, carried out: items registered, generations made, runners called, results committed; resumed wherever it was left."""

from __future__ import annotations

import io
import time
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
from cryodask.run.map import MapRunner
from cryodask.run.particles import StoredParticles, collect_particles
from cryodask.run.progress import Progress, short, summary
from cryodask.run.recipe import Plan, Step, position
from cryodask.run.whole import Stored, loaded, run_tournament, run_whole
from cryodask.store.generation import Generation, consumed_key, disk_errors, generation_key
from cryodask.store.particles import CTF_COLUMNS, OPTICS, align, missing_value
from cryodask.store.project import Item, Project, _write_atomically
from cryodask.vocabulary import SLOTS, VARIABLES

_CTF_AND_OPTICS = (*CTF_COLUMNS, *OPTICS)


@dataclass
class Execution:
    """One run of a plan on the workers of a client; holds the project's lock (see :func:`run_plan`)."""

    plan: Plan
    project: Project
    client: Client
    progress: Progress
    retry_quarantined: bool = False

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
        self.items = self.project.add_items(sources.list_items(self.plan))
        self.gain = self._store_gain()
        self.project.state["gain"] = str(self.gain.relative_to(self.project.path)) if self.gain else None
        self._forget_steps_not_in_plan()
        for shape, group in groupby(steps[:end], key=lambda s: s.stage.shape == "map"):
            if shape:
                self._run_map(list(group))
            else:
                for step in group:
                    self._run_single(step)
        self.project.save()

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
            uses = set(step.source.values()) | self._implied_sources(step)
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
        todo = chain.unfinished(self.items, retry_quarantined=self.retry_quarantined)
        names = " > ".join(s.label for s in steps)
        self.progress.begin(names if len(names) < 40 else f"{steps[0].label} > ... > {steps[-1].label}", len(todo))
        if todo:
            self._drop_dependents(steps[0].label)
            self._set_order()
            runner = MapRunner(self.client, chain, event=self._on_item)
            runner.run(iter(todo))
        records = [self._generation(s.label).records() for s in steps]
        bad = {row for r in records for row, record in r.items() if not record["ok"]} & {i.row for i in self.items}
        done = len(self.items) - len(bad)
        kept = f", {len(self.items) - len(todo)} of them from before" if len(todo) < len(self.items) else ""
        self.progress.end(f"{done} micrographs done{kept}" + (f", {len(bad)} quarantined (see cryodask info)" if bad else ""))
        if not done:
            failures = self.project.failures()
            first = str(failures[0]["message"]).splitlines()[0] if failures else "none is recorded"
            raise InputError(
                f"Not one of {len(self.items)} micrographs could be processed. The first failure: {first}",
                "an option does not fit the data (pixel size, diameter, box), or the files are of another kind",
                "mend it and run again",
            )

    def _on_item(self, kind: str, item: Item | None, text: str) -> None:
        if kind == "done":
            self.progress.advance()
        elif kind == "quarantined" and item is not None:
            self.progress.say(f"quarantined {item.name}: {text}")
            self.progress.advance()
        elif kind == "stalled":
            self.progress.say(text)

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
                part = path.with_suffix(".part")
                part.write_bytes(buffer.getvalue())
                part.rename(path)
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
    def _implied_sources(self, step: Step) -> set[str]:
        """Steps that a particle stage depends on without naming them: the CTF, the optics, the curation."""
        if not _needs_particles(step):
            return set()
        names = (*_CTF_AND_OPTICS, "particle_kept")
        labels = {self._latest(step, n) for n in names} | {self._particle_label(step)}
        return {label for label in labels if label is not None and label != "inputs"}

    def _latest(self, step: Step, name: str) -> str | None:
        """Label of the last step before ``step`` that gives a variable, ``inputs`` where the inputs do."""
        found = None
        for other in self.plan.steps:
            if other.label == step.label:
                break
            if name in other.stage.gives:
                found = other.label
        if found is None and (name in self.project.state["constants"] or (self.items and name in self.items[0].inputs)):
            return "inputs"
        return found

    def _particle_label(self, step: Step) -> str:
        label = self._latest(step, "particle_image")
        if label is None:
            raise ProjectFileError(f"Stage {step.label} needs particles, which no step before it gives.", "extract was left out", "add it")
        return label

    def _particles(self, step: Step, *, curated: bool) -> StoredParticles:
        """The particle set of a step: of all micrographs that have particles and a CTF, without those that curation removed."""
        images = self._generation(self._particle_label(step))
        rows = set(images.committed())
        per_micrograph: dict[str, dict[int, float]] = {}
        own = images.meta["gives"]
        for name in _CTF_AND_OPTICS:
            label = self._latest(step, name)
            if f"particle_{name}" in own or name in own:
                continue
            if label == "inputs":
                constants = self.project.state["constants"]
                values = {i.row: i.inputs.get(name, constants.get(name)) for i in self.items}
                per_micrograph[name] = {r: float(v) for r, v in values.items() if v is not None}
            elif label is not None:
                per_micrograph[name] = {r: float(rec["columns"][name]) for r, rec in self._generation(label).committed().items()}
            elif name != "phase_shift_deg":
                raise ProjectFileError(
                    f"Stage {step.label} needs {name} of the particles, which nothing gives.",
                    "the STAR file has no CTF, or the pipeline has no ctf stage, or the microscope section is missing",
                    "add what is missing",
                )
            if name in per_micrograph:
                rows &= set(per_micrograph[name])
        current = {i.row for i in self.items}
        found = collect_particles(images, sorted(rows & current), per_micrograph)
        kept_by = self._latest(step, "particle_kept") if curated else None
        if kept_by is not None:
            folder = self._generation(kept_by).path
            row, slot, values = (Stored(folder, n).load() for n in ("particle_row", "particle_slot", "particle_kept"))
            kept = align(row, slot, values, found.row, found.slot, 0)
            found = found.keep(kept > 0)
        if found.set.count == 0:
            raise InputError(
                f"Stage {step.label} has no particles to work on.",
                "nothing was picked (wrong diameter or threshold), or curation removed everything",
                "look at the picks in the report, change pick or curate, and run again",
            )
        return found

    def _run_single(self, step: Step) -> None:
        particles, inputs, upstream = self._inputs_of(step)
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
        self.progress.begin(step.label, None)
        if generation.committed():
            self.progress.end("done before")
            return
        started = time.time()
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
            )
        if stage.shape == "tournament":
            assert particles is not None
            return run_tournament(self.client, stage.functions, step.params, particles, self.progress.advance)
        return run_whole(self.client, stage.name, step.params, inputs)

    def _inputs_of(self, step: Step) -> tuple[StoredParticles | None, dict[str, Any], dict[str, Any]]:
        """Particle set, other inputs, and what the key must hold of both."""
        upstream: dict[str, Any] = {}
        particles = None
        if _needs_particles(step):
            images = "particle_image" in step.source
            particles = self._particles(step, curated=images)
            label = self._particle_label(step)
            rows = sorted(set(particles.row.tolist()))
            columns = {n: v.tolist() for n, v in particles.set.columns.items()}
            upstream["particles"] = [
                consumed_key(self._generation(label), rows),
                generation_key({"columns": columns, "slot": particles.slot.tolist()}),
            ]
        inputs: dict[str, Any] = {}
        for name, label in step.source.items():
            if name == "particle_image":
                continue
            if label == "inputs":
                inputs[name] = self._input_value(name)
                upstream[name] = [sources.content_hash(p) for p in inputs[name]] if name.endswith("_path") else inputs[name]
                continue
            generation = self._generation(label)
            if generation.meta["per_item"]:
                inputs[name] = self._by_particle(generation, name, particles)
                upstream[name] = [
                    generation.key,
                    consumed_key(generation, sorted(set(particles.row.tolist()) if particles else generation.committed())),
                ]
                continue
            if VARIABLES[name].per_particle and particles is not None:
                row, slot, values = (Stored(generation.path, n).load() for n in ("particle_row", "particle_slot", name))
                inputs[name] = align(row, slot, values, particles.row, particles.slot, missing_value(values.dtype))
            else:
                inputs[name] = Stored(generation.path, name)
            upstream[name] = [generation.key, consumed_key(generation, [0])]
        return particles, inputs, upstream

    def _input_value(self, name: str) -> Any:
        if name == "half_map_path":
            return [self.plan.resolve(p) for p in self.plan.file.inputs.half_maps or ()]
        return self.project.state["constants"].get(name)

    def _by_particle(self, generation: Generation, name: str, particles: StoredParticles | None) -> Any:
        """A micrograph's value, once a particle where the stage works on particles, else once a micrograph."""
        records = generation.committed()
        if particles is None:
            return np.array([generation.read(records[r], name) for r in sorted(records)])
        return np.array([records[int(r)]["columns"][name] if int(r) in records else np.nan for r in particles.row])


def _needs_particles(step: Step) -> bool:
    return "particle_image" in step.source or any(VARIABLES[n].per_particle for n in step.source)


def check_inputs(plan: Plan, *, force: bool = False) -> None:
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
    items = sources.list_items(plan)
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
    progress: Progress | None = None,
) -> Project:
    """Carry out a plan on the workers of ``client``; returns the project.

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
            _write_atomically(project.path / "project.yaml", plan.path.read_text())
        with progress or Progress(quiet=True) as shown:
            Execution(plan, project, client, shown, retry_quarantined).run(until, start_again_from)
    return project
