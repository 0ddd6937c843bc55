"""Chains of per-exposure steps: their generations, their particles, and results reused from other generations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryodask.errors import CryodaskError, MovieError, ProgramMissingError, StoreError
from cryodask.products import COLLECTIONS, part_of
from cryodask.programs import Program
from cryodask.run import gains, sources
from cryodask.run.chain import Chain, Link
from cryodask.run.due import Known, due, known
from cryodask.run.graph.chain import is_pinned, label_of
from cryodask.run.grids import brings_movies, known_grids, misplaced
from cryodask.run.imports import Import, PicksImport, imports_of
from cryodask.run.inputs import exposure_rows, stored_at
from cryodask.run.keys import Keys
from cryodask.run.origins import Origins, origins_of
from cryodask.run.project_import import ProjectImport
from cryodask.run.recipe import Plan, Step
from cryodask.run.refs import IMAGES_OF_PARTICLES, INPUTS, PARTICLES, Refer, parts_used, pinned_place, port_of, stage_of, variable_sources
from cryodask.run.slices import Slices
from cryodask.run.whole import Stored
from cryodask.stage import Version
from cryodask.store.birthbook import BirthBook
from cryodask.store.births import TABLE, Birth
from cryodask.store.files import holder_of
from cryodask.store.generation import Generation
from cryodask.store.history import births_on_disk, generation_folders
from cryodask.store.layouts import Grid
from cryodask.store.particles import image_givers, image_slots, particle_columns
from cryodask.store.project import Item, Project
from cryodask.vocabulary import SLOTS, VARIABLES


@dataclass(frozen=True)
class Target:
    """Where the results of a per-exposure step belong: key and version of the generation, and the recipe of each data set."""

    key: str
    version: Version
    recipes: dict[str, str]


@dataclass
class ChainMaker:
    """Builds the chain of consecutive steps: opens or creates their generations in order, and adopts each."""

    plan: Plan
    project: Project
    keys: Keys
    items: list[Item]
    gains: dict[str, Path]
    update: frozenset[str]
    adopt: Callable[[Step, Target], None]
    _projects: dict[str, ProjectImport] = field(default_factory=dict)

    def chain(self, steps: list[Step]) -> Chain:
        """The chain, ready to be sent."""
        links: list[Link] = []
        grids: dict[str, dict[str, Grid]] = {}
        for step in steps:
            links.append(self._link(step, {link.label for link in links}, grids))
        labels = {link.label for link in links}
        movies = next((grids[step.label] for step in steps if brings_movies(step.stage)), {})
        before = _labels(links) - labels
        earlier = {label: self._bare_link(label) for label in before}
        reopened = _labels(earlier.values()) - labels - set(earlier)
        earlier |= {label: self._bare_link(label) for label in reopened}
        holder = holder_of(self.project.path)
        given = {s.label: self.slices(s) for s in steps if any(link.label == s.label and link.takes_particles for link in links)}
        return Chain(
            tuple(links),
            self.project.state.constants,
            self.project.home,
            self.gains,
            earlier,
            slices={link.label: given[link.label] for link in links if link.takes_particles and not link.within},
            expected=given,
            book=BirthBook(self.project),
            imports=self.imports(steps),
            epoch=holder.epoch if holder is not None else 0,
            origins={step.label: found for step in steps if (found := self.origins(step)) is not None},
            grids=movies,
        )

    def concerned(self, steps: list[Step], items: list[Item]) -> list[Item]:
        """The items that a chain processes: those of its sources, and those that a selection keeps."""
        exposures = next((s.outputs[key] for s in steps for key in (("exposures", "exposures"),) if key in s.outputs), None)
        exposures = exposures or next((p for s in steps for p in s.inputs.get("exposures", ())), None)
        if exposures is None:
            return items
        taken = next((p for s in steps for p in s.inputs.get("exposures", ())), None)
        ref = Refer(self.plan, self.project.state).product(taken or exposures)
        rows = set(exposure_rows(self.project, ref, exposures.sources).tolist())
        for step in (s for s in steps if not s.inputs and s.stage.gives_birth(s.params)):
            # an exposure that its file no longer lists must be recorded as empty
            rows |= set(self.project.generation(step.label).committed())
        return [i for i in items if i.row in rows]

    # --- links ----------------------------------------------------------------------------------------------------------------
    def _link(self, step: Step, here: set[str], grids: dict[str, dict[str, Grid]]) -> Link:
        source = variable_sources(self.plan, step)
        generation = self._generation(step, source, grids)
        birth = generation.meta.get("birth")
        particles = step.inputs.get("particles", ())
        ids = particles[0].ids if particles and PARTICLES in source.values() else ""
        birthplace = "" if is_pinned(ids) else label_of(ids)
        refer = Refer(self.plan, self.project.state)
        return Link(
            step.label,
            step.stage.name,
            step.params,
            source,
            generation.path,
            whole=self._whole(step),
            within=birthplace if birthplace in here else "",
            threshold=refer.threshold(particles[0]) if birthplace in here else None,
            birth=Birth(birth["number"], self.project.state.seed) if birth else None,
            recipes=self.project.state.steps[step.label].recipes,
            programs=self._programs(step),
            images=self._image_givers(step, source),
        )

    @staticmethod
    def _programs(step: Step) -> dict[Program, str]:
        # if a program is missing, nothing is left to compute: target() refuses anything else
        with suppress(ProgramMissingError):
            return step.stage.program_versions()
        return {}

    def _bare_link(self, source: str) -> Link:
        """A step before the chain, or an earlier result, from which it reads."""
        generation = self._source_generation(source)
        if not is_pinned(source):
            step = self.plan.graph.step(source)
            recipes = self.project.state.steps[source].recipes
            return Link(source, step.stage.name, step.params, variable_sources(self.plan, step), generation.path, recipes=recipes)
        stage = stage_of(self.plan, source)
        # a source that reads movies in place is read with its own inputs; all others have stored their outputs
        given = {} if stage.ports else dict.fromkeys((*stage.needs, *stage.optional), INPUTS)
        return Link(source, stage.name, stage.params.model_validate(generation.meta["params"]), given, generation.path)

    def _source_generation(self, source: str) -> Generation:
        return self.project.generation_at(pinned_place(source)) if is_pinned(source) else self.project.generation(source)

    def _whole(self, step: Step) -> dict[str, Stored]:
        """Variables of maps, masks and classes that every exposure gets."""
        refer = Refer(self.plan, self.project.state)
        out = {}
        for name in (*step.stage.needs, *step.stage.optional):
            port, name_there = port_of(step, name)
            place = part_of(name_there)
            if place is None or place[0] in COLLECTIONS or port is None or place[1] not in parts_used(step, port):
                continue
            found = stored_at(self.project, refer.place(step.inputs[port.name][0].parts[place[1]]), name_there)
            if found is not None:
                out[name] = found
        return out

    def _generation(self, step: Step, source: dict[str, str], grids: dict[str, dict[str, Grid]]) -> Generation:
        """Open or create the generation of a step, and adopt it; ``grids`` are those of the steps before, and gain the step's own."""
        stage = step.stage
        target = self.target(step)
        key = target.key
        path = self.project.path / "stages" / stage.name / key
        needed = self._needed_sizes(source, grids, self._image_givers(step, source))
        bulk = [v for v in stage.gives_variables() if v.kind == "bulk"]
        if needed or not bulk:
            needed = needed or {"": {}}
            found = {name: Grid({"slot": SLOTS, **sizes, **stage.sizes(step.params, sizes)}, {}) for name, sizes in needed.items()}
        else:
            there = (path / "zarr.json").exists()
            known = (
                self.project.generation_at(f"{stage.name}/{key}").grids if there and not brings_movies(stage) else self._grids(step, key)
            )
            found = self._probed(step, known)
        grids[step.label] = found
        named = {d for v in bulk for dim in v.dims for d in (dim, f"{v.name}.{dim}")}
        own = {name: Grid({d: n for d, n in grid.sizes.items() if d in named}, grid.dtypes) for name, grid in found.items()}
        generation = Generation.create(path, meta=self.meta(step, target), gives=stored_per_item(step), per_item=True, grids=own)
        self.adopt(step, target)
        return generation

    def _needed_sizes(
        self, source: dict[str, str], grids: dict[str, dict[str, Grid]], images: Iterable[Generation]
    ) -> dict[str, dict[str, int]]:
        """Lengths of the dimensions of a step's inputs, by data set; ``images``: results with the particle images that it takes."""
        given: dict[str, list[tuple[str, dict[str, Grid]]]] = {}
        for name, labels in source.items():
            for label in labels.split("|"):
                if label in (INPUTS, PARTICLES) or not VARIABLES[name].dims or stage_of(self.plan, label).shape != "map":
                    continue
                given.setdefault(name, []).append((label, grids.get(label) or self._source_generation(label).grids))
        for generation in images:
            given.setdefault(IMAGES_OF_PARTICLES, []).append((generation.key, generation.grids))
        out: dict[str, dict[str, int]] = {}
        for name, givers in given.items():
            for number, (label, sizes_there) in enumerate(givers):
                for data_set, grid in sizes_there.items():
                    sizes = {d: grid.sizes.get(f"{name}.{d}", grid.sizes[d]) for d in VARIABLES[name].dims if d in grid.sizes}
                    # pooled sources may each have a data set of that name
                    place = f"{label}/{data_set}" if number else data_set
                    if sizes:
                        out.setdefault(place, {}).update(sizes)
        return out

    def _image_givers(self, step: Step, source: dict[str, str]) -> tuple[Generation, ...]:
        """Results that hold the images of a step's particles; empty if it takes no images."""
        if source.get(IMAGES_OF_PARTICLES) != PARTICLES:
            return ()
        return image_givers(self.project, Refer(self.plan, self.project.state).product(step.inputs["particles"][0]))

    def _grids(self, step: Step, key: str) -> dict[str, Grid]:
        """Sizes and types of the movies by data set, from movies stored in this generation, else in others of the stage."""
        if not brings_movies(step.stage):
            return {}
        own = self.project.path / "stages" / step.stage.name / key
        folders = [f for f in generation_folders(self.project.path) if f.parent.name == step.stage.name]
        found = sorted(folders, key=lambda folder: folder != own)
        return known_grids((self.project.generation_at(f"{f.parent.name}/{f.name}") for f in found), self.items)

    def _misplaced(self, step: Step, generation: Generation) -> set[int]:
        """Rows whose movie differs in size from its current data set, and rows that failed in a data set of another size."""
        if not brings_movies(step.stage):
            return set()

        def look(items: list[Item]) -> Grid | None:
            try:
                return sources.probe(step, self._source_values(items, None))
            except CryodaskError:  # none of them can be read
                return None

        return misplaced(generation, self.items, lambda: self._grids(step, generation.key), look)

    def _probed(self, step: Step, known: dict[str, Grid]) -> dict[str, Grid]:
        """Sizes and types of the outputs of a source, by data set: known ones, else from the first readable inputs."""
        found = dict(known)
        failure: CryodaskError | None = None
        imported = self.imports([step]).get(step.label)
        alike: dict[str, list[Item]] = {}
        for item in self.items:
            if step.inputs or step.label in str(item.inputs.get("source", step.label)).split("|"):
                kind = imported.images_of(item) if isinstance(imported, ProjectImport) else ""
                alike.setdefault(kind or item.data_set, []).append(item)
        for name in (n for n in alike if n not in known):
            try:
                found[name] = sources.probe(step, self._source_values(alike[name], imported))
            except CryodaskError as error:
                failure = error  # its items are quarantined, each with its reason
                continue
            self._check_gain(step, name, found[name].sizes, self._source_values(alike[name], imported))
        if not found:
            raise failure or MovieError("There is nothing to process.", "the input folder is empty", "check inputs in the project file")
        return found

    def meta(self, step: Step, target: Target) -> dict[str, Any]:
        """Metadata of a new generation of a step."""
        stage = step.stage
        meta: dict[str, Any] = {
            "stage": stage.name,
            "version": target.version,
            "params": step.params.model_dump(mode="json"),
            "recipes": target.recipes,
            "inputs": {name: [p.ref for p in products] for name, products in step.inputs.items()},
            "reasons": stage.reasons,
        }
        if stage.gives_birth(step.params):
            identity = self.keys.identity(step)
            taken = births_on_disk(self.project.path)
            number = taken.get(identity) or self.project.state.birth_number(identity, taken.values())
            self.project.state.births[identity] = number
            meta["birth"] = {"number": number, "identity": identity}
        return meta

    def target(self, step: Step) -> Target:
        """Target of a step. An older version is kept if its results are current and complete and no update was requested."""
        key, version = self._key(step)
        return Target(key, version, self.keys.recipes(step, version))

    def _key(self, step: Step) -> tuple[str, Version]:
        current = self.project.state.steps.get(step.label)
        if current is None or current.stage != step.stage.name or step.label in self.update:
            return self._key_here(step)
        generation = self.project.generation_at(current.place)
        if not (generation.path / "zarr.json").exists():  # the folder was removed, so it is recomputed
            return self._key_here(step)
        version: Version = generation.meta["version"]
        if version == step.stage.version or self.keys.of_exposures(step, version) != current.key:
            return self._key_here(step)
        done = set(generation.table(()).row.tolist()) | set(generation.records())
        missing = [item for item in self.items if item.row not in done]
        if missing and (here := step.stage.version_here()) != version:
            raise StoreError(
                f"Step {step.label} was computed with version {version} of {step.stage.name}, this program has version "
                f"{here}: {len(missing)} new exposures would have another version than the {len(done)} old ones.",
                "cryodask was upgraded during the session",
                f"recompute all {len(self.items)} with --update {step.label}, or go back to the earlier version of cryodask",
            )
        return current.key, version

    def _key_here(self, step: Step) -> tuple[str, Version]:
        here = step.stage.version_here()
        return self.keys.of_exposures(step, here), here

    def imports(self, steps: list[Step]) -> dict[str, Import]:
        """The imports among some steps."""
        found = imports_of(self.project, steps)
        for one in found.values():
            if isinstance(one, PicksImport):
                one.settle(item.name for item in self.items)
            elif isinstance(one, ProjectImport):
                one.claims()  # number its births now, so that the numbers are saved before work begins
        return found

    def origins(self, step: Step) -> Origins | None:
        """Values from other projects that a step reads; None if it reads none."""
        found = origins_of(self.plan, step)
        labels = {label for _, some in found for label in some}
        if not labels:
            return None
        for one in (self.plan.graph.step(label) for label in labels - self._projects.keys()):
            self._projects[one.label] = ProjectImport(one, self.project)
        return Origins([(part, tuple(self._projects[label] for label in some)) for part, some in found])

    def _source_values(self, items: list[Item], imported: Import | None) -> Iterator[dict[str, Any]]:
        for item in items:
            constants = self.project.state.constants.get(item.data_set, {})
            yield {**constants, **sources.absolute(self.plan, item.inputs), **(imported.values(item) if imported else {})}

    def _check_gain(self, step: Step, data_set: str, sizes: dict[str, int], values: Iterator[dict[str, Any]]) -> None:
        """Refuse a gain of the wrong shape or orientation before the first movie is corrected with it."""
        if "movie" not in step.stage.gives or data_set not in self.gains:
            return
        gains.check_orientation(self.plan, step, data_set, self.gains[data_set], (sizes["y"], sizes["x"]), values)

    # --- particles ------------------------------------------------------------------------------------------------------------
    def slices(self, step: Step) -> Slices:
        """The particles of a step, exposure by exposure, in the current state of the project."""
        refer = Refer(self.plan, self.project.state)
        ref = refer.product(step.inputs["particles"][0])
        exposures = step.inputs.get("exposures", ())
        if exposures:
            taken = refer.product(exposures[0])
            ref = ref.model_copy(update={"exposures": taken.parts, "optics": taken.optics})
        ids = self.project.sets.ids(ref)
        port = step.stage.port("particles")
        parts = parts_used(step, port) if port is not None else ()
        wanted = {n for n, source in variable_sources(self.plan, step).items() if source == PARTICLES}
        if IMAGES_OF_PARTICLES in wanted:
            columns = particle_columns(self.project, ref, ids, {"position", *parts})
            return Slices.of(ids, {**columns, IMAGES_OF_PARTICLES: image_slots(self.project, ref, ids)})
        columns = self.project.sets.columns(ref, ids, parts)
        return Slices.of(ids, {n: v for n, v in columns.items() if n in wanted})

    def take_over(self, chain: Chain, steps: list[Step], items: list[Item]) -> None:
        """Link results of other generations that were made by the same recipe from the same exposure and particles.

        Steps are linked in order, because later steps take the linked particles of a birth.
        """
        lacking: dict[str, set[int]] = {}
        for link, step in zip(chain.links, steps):
            generation = self.project.generation_at(f"{link.stage_name}/{link.folder.name}")
            for row in self._misplaced(step, generation):
                lines = generation.journal.read().lines.get(row, [])
                name = str(lines[-1][1]["name"]) if lines else ""
                generation.journal.undo(row, name, [crc for crc, _ in lines], "its data set has movies of another size")
            found = self.known(step, link.recipes, generation, items, lacking)
            for other, records in found.linked:
                generation.link(other, records)
            if link.takes_particles:
                chain.expected[link.label] = self.slices(step)

    def known(self, step: Step, recipes: dict[str, str], generation: Generation, items: list[Item], lacking: dict[str, set[int]]) -> Known:
        """What a step has already, as a run would link it.

        ``lacking``: rows that earlier steps have not done yet, so that their particles are unknown; the step's own are added.
        """
        given = self.slices(step) if PARTICLES in variable_sources(self.plan, step).values() else None
        asked = due(items, recipes, given, self.imports([step]).get(step.label), self.origins(step))
        if given is not None:
            before = {label_of(ref) for p in step.inputs.get("particles", ()) for ref in (p.ids, *p.parts.values())}
            unsettled = {row for label in before for row in lacking.get(label, ())}
            asked |= {row: asked[row]._replace(slice="not known yet") for row in unsettled & asked.keys()}
        found = known(self.project, generation, items, asked)
        if odd := self._misplaced(step, generation):
            found = Known(found.done - odd, found.failed - odd, found.linked)
        lacking[step.label] = asked.keys() - found.done - found.failed - found.records.keys()
        return found


def _labels(links: Iterable[Link]) -> set[str]:
    """Labels of the steps that some links read."""
    return {label for link in links for source in link.source.values() for label in source.split("|")} - {INPUTS, PARTICLES}


def stored_per_item(step: Step) -> tuple[str, ...]:
    """Variables that a generation of a step stores."""
    gives = step.stage.gives
    return (*gives, *(n for n in TABLE if n not in gives)) if step.stage.gives_birth(step.params) else gives
