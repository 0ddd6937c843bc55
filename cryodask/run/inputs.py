"""What a step that is no map works on: its particle set, its other inputs, and the part of its key that stands for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cryodask.errors import InputError, ProjectFileError
from cryodask.run import sources
from cryodask.run.particles import StoredParticles, collect_particles
from cryodask.run.recipe import Plan, Step
from cryodask.run.whole import Stored
from cryodask.store.generation import Generation, consumed_key, generation_key
from cryodask.store.journal import Record
from cryodask.store.particles import CTF_COLUMNS, OPTICS, align, missing_value
from cryodask.store.project import Item, Project
from cryodask.vocabulary import VARIABLES

_CTF_AND_OPTICS = (*CTF_COLUMNS, *OPTICS)


@dataclass(frozen=True)
class StepInputs:
    """Finds the inputs of the steps of a plan among what the project holds now."""

    plan: Plan
    project: Project
    items: list[Item]

    def implied(self, step: Step) -> set[str]:
        """Steps that a particle stage depends on without naming them: the CTF, the optics, the curation."""
        if not _needs_particles(step):
            return set()
        names = (*_CTF_AND_OPTICS, "particle_kept")
        labels = {self._latest(step, n) for n in names} | {self.particle_label(step)}
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

    def particle_label(self, step: Step) -> str:
        """Label of the step whose particle images a step works on."""
        label = self._latest(step, "particle_image")
        if label is None:
            raise ProjectFileError(f"Stage {step.label} needs particles, which no step before it gives.", "extract was left out", "add it")
        return label

    def _particles(self, step: Step, *, curated: bool) -> StoredParticles:
        """The particle set of a step: of all micrographs that have particles and a CTF, without those that curation removed."""
        images = self.project.generation(self.particle_label(step))
        rows = set(self._made(self.particle_label(step)))
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
                per_micrograph[name] = {r: float(rec["columns"][name]) for r, rec in self._made(label).items()}
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
            folder = self.project.generation(kept_by).path
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

    def of(self, step: Step) -> tuple[StoredParticles | None, dict[str, Any], dict[str, Any]]:
        """Particle set, other inputs, and what the key must hold of both."""
        upstream: dict[str, Any] = {}
        particles = None
        if _needs_particles(step):
            images = "particle_image" in step.source
            particles = self._particles(step, curated=images)
            label = self.particle_label(step)
            used = sorted(set(particles.row.tolist()))
            columns = {n: v.tolist() for n, v in particles.set.columns.items()}
            upstream["particles"] = [
                [self.project.generation(source).key for source in sorted(self.implied(step))],
                consumed_key(self.project.generation(label), used),
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
            generation = self.project.generation(label)
            if generation.meta["per_item"]:
                inputs[name] = self._by_particle(generation, name, particles)
                rows = sorted(set(particles.row.tolist()) if particles else self._made(label))
                upstream[name] = [generation.key, consumed_key(generation, rows)]
                continue
            if VARIABLES[name].per_particle and particles is not None:
                row, slot, values = (Stored(generation.path, n).load() for n in ("particle_row", "particle_slot", name))
                inputs[name] = align(row, slot, values, particles.row, particles.slot, missing_value(values.dtype))
            else:
                inputs[name] = Stored(generation.path, name)
            upstream[name] = [generation.key, consumed_key(generation, [0])]
        return particles, inputs, upstream

    def _made(self, label: str) -> dict[int, Record]:
        """Records of the present items that a map stage has done."""
        return {row: record for row, record in self.project.records(label).items() if record["ok"]}

    def _input_value(self, name: str) -> Any:
        if name == "half_map_path":
            return [self.plan.resolve(p) for p in self.plan.file.inputs.half_maps or ()]
        return self.project.state["constants"].get(name)

    def _by_particle(self, generation: Generation, name: str, particles: StoredParticles | None) -> Any:
        """A micrograph's value, once a particle where the stage works on particles, else once a micrograph."""
        records = self._made(generation.meta["label"])
        if particles is None:
            return np.array([generation.read(records[r], name) for r in sorted(records)])
        return np.array([records[int(r)]["columns"][name] if int(r) in records else np.nan for r in particles.row])


def _needs_particles(step: Step) -> bool:
    return "particle_image" in step.source or any(VARIABLES[n].per_particle for n in step.source)
