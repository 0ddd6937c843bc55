"""Keys: hashes of everything a result depends on, and of nothing else.

The *recipe* of a per-exposure step says how the exposures of a data set are processed: stage, version, parameters, content of parameter
files, optics and gain, recipes of earlier steps, whole products. The name of the data set is a label and not part of it, nor is the set
of exposures or particles. The *key* of the step, which names the generation, combines the recipes of all data sets with the
generations that its particles come from. The record of an item has the recipe of its data set. An item is recognised by its recipe, its
content and the digest of its particles (see due.py), so it is linked from another generation instead of being recomputed.

The key of a step over a set combines stage, version and parameters with the digest of the ids and, for each part that the stage declares,
the digest of what gave it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

from cryodask.parameters import marked_fields
from cryodask.products import COLLECTIONS
from cryodask.run.graph.chain import is_pinned, label_of
from cryodask.run.inputs import StepInputs
from cryodask.run.recipe import Plan, Step
from cryodask.run.refs import INPUTS, Refer, givers_of, parts_used, pinned_place, united_parts, variable_sources
from cryodask.run.sources import source_name
from cryodask.stage import AddedMark, EffortMark, SourceFileMark, Version
from cryodask.store.generation import generation_key
from cryodask.store.identity import rows_in
from cryodask.store.places import line_of
from cryodask.store.project import Project
from cryodask.store.state import StepState, parted
from cryodask.vocabulary import VARIABLES

_KEPT: dict[tuple[str, int, int], str] = {}


def content_hash(path: str | Path) -> str:
    """Hash of a file's content; reread only when its size or time has changed."""
    from cryodask.run.sources import read_content_hash

    stat = Path(path).stat()
    key = (str(path), stat.st_size, stat.st_mtime_ns)
    if key not in _KEPT:
        _KEPT[key] = read_content_hash(path)
    return _KEPT[key]


def ids_digest(ids: np.ndarray) -> str:
    """Digest of a set of particles."""
    return hashlib.blake2b(np.ascontiguousarray(ids).tobytes(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class Keys:
    """Keys of the steps of a plan, in the current state of the project. ``gains``: digests of the gain references by data set."""

    plan: Plan
    project: Project
    gains: dict[str, str]

    @property
    def _refer(self) -> Refer:
        return Refer(self.plan, self.project.state)

    def params(self, step: Step) -> dict[str, Any]:
        """Parameters as they enter a key: files by content, sources by name, without those that do not affect results."""
        out: dict[str, Any] = step.params.model_dump(mode="json")
        for name, paths in self.plan.input_files(step).items():
            out[name] = [content_hash(p) for p in paths]
        for name in marked_fields(type(step.params), SourceFileMark):
            if out.get(name):
                out[name] = source_name(self.plan, self.project.state, out[name])
        effort = marked_fields(type(step.params), EffortMark)
        for moves_nothing in [*effort, step.stage.threshold] if step.stage.threshold else effort:
            out.pop(moves_nothing, None)
        for added in marked_fields(type(step.params), AddedMark):
            if getattr(step.params, added) == type(step.params).model_fields[added].default:
                out.pop(added, None)
        return out

    def again(self, step: Step) -> dict[str, Any]:
        """How often a recomputation of the step was requested; empty if never."""
        count = self.project.state.again.get(step.label)
        return {"again": count} if count else {}

    # --- per exposure ---------------------------------------------------------------------------------------------------------
    def recipes(self, step: Step, version: Version) -> dict[str, str]:
        """How an exposure is processed by this step, for each data set: their optics and gains differ."""
        shared = {"stage": step.stage.name, "version": version, "params": self.params(step), **self.again(step)}
        used = [(port, p, parts_used(step, port)) for port in step.stage.ports for p in step.inputs.get(port.name, ())]
        whole = {
            port.name: {part: self._refer.place(product.parts[part]) for part in parts}
            for port, product, parts in used
            if port.type not in COLLECTIONS
        }
        out = {}
        for name in sorted({"", *self.project.state.constants}):
            upstream = {
                part: [self._recipe(place, name) for place in self._refer.places_of(product, part)]
                for port, product, parts in used
                if port.type == "exposures"
                for part in parts
            }
            out[name] = generation_key({**shared, "whole": whole, "upstream": upstream, "of data set": self._of_data_set(step, name)})
        return out

    def _of_data_set(self, step: Step, name: str) -> dict[str, Any]:
        """Optics and gain of a data set that the stage reads."""
        values = self.project.state.constants.get(name, {})
        sources = variable_sources(self.plan, step)
        read = {n: values[n] for n, source in sources.items() if source == INPUTS and n in values}
        return {**read, **({"gain": self.gains.get(name)} if "gain" in sources else {})}

    def of_exposures(self, step: Step, version: Version) -> str:
        """Key of a per-exposure step."""
        upstream: dict[str, Any] = {}
        for port in step.stage.ports:
            for product in step.inputs.get(port.name, ()):
                if port.type in COLLECTIONS:
                    upstream[port.name] = {part: self._refer.places_of(product, part) for part in parts_used(step, port)}
                if port.type == "particles":
                    # another threshold gives another generation; when it is changed back, the former one is found complete
                    upstream["ids"] = [self._refer.ids_of(product), self._refer.threshold(product)]
        return generation_key({"recipes": self._used(self.recipes(step, version)), "upstream": upstream})

    def _used(self, recipes: dict[str, str]) -> list[str]:
        """The recipes of the project's data sets, whatever their names."""
        used = [r for n, r in recipes.items() if n in self.project.state.constants]
        return sorted(set(used or recipes.values()))

    def _recipe(self, place: str, name: str) -> Any:
        """How a generation processes a data set; the key of a single result."""
        recipes = self.project.state.recipes_at(place)
        if recipes:
            return recipes.get(name) or recipes[""]
        # for an earlier generation it is in the records, because data sets may have had other names
        generation = self.project.generation_at(place)
        if not generation.meta["per_item"]:
            return generation.key
        table, rows = generation.table(()), {item.row for item in self.project.items() if item.data_set == name}
        found = sorted({str(recipe) for row, recipe in zip(table.row.tolist(), table.recipe) if row in rows})
        return found if len(found) > 1 else found[0] if found else generation.key

    def identity(self, step: Step) -> str:
        """Identity key of a birth: identifies its particles however often and wherever they are computed."""
        return generation_key({"version": step.stage.version, "origin": self._origin(step)})

    def _origin(self, step: Step) -> dict[str, Any]:
        """A step with its parameters and those of the steps it reads from, without versions and repetitions."""
        labels = {
            part: givers_of(self.plan, product.parts[part], part)
            for port in step.stage.ports
            for product in step.inputs.get(port.name, ())
            for part in parts_used(step, port)
        }
        upstream = {part: [self._origin_at(ref) for ref in some] for part, some in labels.items()}
        return {"stage": step.stage.name, "params": self.params(step), "upstream": upstream}

    def _origin_at(self, ref: str) -> Any:
        """Like :meth:`_origin`, for the step that a reference names; for an earlier result as recorded with it."""
        if not is_pinned(ref):
            return self._origin(self.plan.graph.step(label_of(ref)))
        place = pinned_place(ref)
        line = line_of(self.project.path / "stages" / place, label_of(ref))
        return line.origin if line is not None and line.origin is not None else place

    def origin(self, step: Step) -> Any:
        """What identifies a per-exposure step to a birth that reads from it; None for another step."""
        return self._origin(step) if step.stage.shape == "map" else None

    # --- over a set -----------------------------------------------------------------------------------------------------------
    def of_set(self, version: Version, inputs: StepInputs) -> str:
        """Key of a step over sets of particles, over exposures, or over neither."""
        step = inputs.step
        upstream: dict[str, Any] = {"ids": ids_digest(inputs.ids if inputs.ids is not None else inputs.rows)}
        for port in step.stage.ports:
            if port.many and port.type not in COLLECTIONS and not step.inputs.get(port.name):
                continue  # a list that is not used must not change the keys of results without it
            sets = inputs.sets.get(port.name, [])
            used = united_parts(step) if port.many and port.type in COLLECTIONS else parts_used(step, port)
            upstream[port.name] = [
                {
                    part: [self._given(p, part, port.type, rows, product.optics) for p in self._refer.places_of(product, part)]
                    for part in used
                }
                for product, rows in zip(
                    step.inputs.get(port.name, ()),
                    [rows_in(ids) for _, ids in sets] if port.type == "particles" else repeat(inputs.rows),
                )
            ]
            if port.type == "particles" and (port.many or port.name != "particles"):
                upstream[f"{port.name} ids"] = [ids_digest(ids) for _, ids in sets]
        parts = {"stage": step.stage.name, "version": version, "params": self.params(step), "upstream": upstream}
        return generation_key({**parts, **self.again(step)})

    def version_of_set(self, step: Step, inputs: StepInputs, current: StepState | None, update: Container[str]) -> Version:
        """Version whose result counts: that of a finished current one, until an update is requested.

        Raises
        ------
        ProgramMissingError
            A program that the step runs is not installed, and there is no finished result.
        """
        if current is None or step.label in update or current.stage != step.stage.name:
            return step.stage.version_here()
        generation = self.project.generation_at(current.place)
        if not (generation.path / "zarr.json").exists():  # the folder was removed, so it is recomputed
            return step.stage.version_here()
        version: Version = generation.meta["version"]
        older = version != step.stage.version and bool(generation.committed())
        unchanged = older and self.of_set(version, inputs) == current.key
        return version if unchanged else step.stage.version_here()

    def frame_of_set(self, step: Step, version: Version) -> str:
        """The key without ids and items: an unfinished generation with the same value is finished first."""
        upstream: dict[str, Any] = {}
        for port in step.stage.ports:
            for product in step.inputs.get(port.name, ()):
                upstream[port.name] = {
                    part: [self._recipe_at(p) for p in self._refer.places_of(product, part)] for part in parts_used(step, port)
                }
                if product.ids:
                    upstream[f"{port.name} ids"] = self._recipe_at(self._refer.ids_of(product))
        births = [s for s in self.plan.steps if s.label in self.plan.graph.rests_on(step) and s.stage.threshold]
        upstream["thresholds"] = {s.label: getattr(s.params, s.stage.threshold or "") for s in births}
        return generation_key({"stage": step.stage.name, "version": version, "params": self.params(step), "upstream": upstream})

    def _recipe_at(self, place: str) -> str:
        """How a generation was made, regardless of its exposures and particles."""
        recipes = self.project.state.recipes_at(place)
        if recipes:
            return str(self._used(recipes))
        recipe, output = self.project.generation_at(place).meta.get("recipe"), parted(place)[1]
        return f"{recipe}.{output}" if recipe and output else str(recipe or place)

    def _given(self, place: str, part: str, kind: str, rows: np.ndarray, optics: str) -> Any:
        """Digest of what a generation gives some exposures; for a single result its key."""
        generation = self.project.generation_at(place)
        if not generation.meta["per_item"]:
            return place
        known = {v.name for v in VARIABLES.values() if v.part == f"{kind}.{part}"}
        if kind == "exposures" and not known & set(generation.meta["gives"]):
            return self._values(known, rows, optics)
        table = self.project.table_at(place, ())
        here = np.isin(table.row, rows)
        digest = hashlib.blake2b(digest_size=8)
        made_from = zip(table.row[here].tolist(), table.input[here], table.recipe[here], table.slice[here])
        digest.update("".join([f"{row}:{item}:{recipe}:{some};" for row, item, recipe, some in made_from]).encode())
        return digest.hexdigest()

    def _values(self, names: set[str], rows: np.ndarray, optics: str) -> Any:
        """Digest of registry and data-set values of some exposures."""
        wanted = set(rows.tolist())
        items = [i for i in self.project.items() if i.row in wanted]
        values = {n: self.project.sets.known_outside(items, n, optics) for n in sorted(names)}
        return generation_key({n: _once(v) for n, v in values.items()})


def _once(values: list[Any]) -> list[Any]:
    """Collapse a list of equal values to one."""
    first = str(values[0]) if values else ""
    return values[:1] if all(one is values[0] or str(one) == first for one in values) else values
