"""Inputs of a step over a set: its particles, its other inputs, and the particles that cannot be used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cryodask.errors import InputError
from cryodask.products import COLLECTIONS, columns_of, part_of
from cryodask.run.particles import StoredParticles
from cryodask.run.recipe import Plan, Step
from cryodask.run.refs import IMAGES_OF_PARTICLES, Refer, parts_used, port_of
from cryodask.run.whole import Stored
from cryodask.stage import ExposureView, ParticleSet, SetView
from cryodask.store.birthbook import BirthBook
from cryodask.store.identity import aligned, birth_of, parent_of, place_of, row_of, rows_in
from cryodask.store.particles import image_places, particle_columns
from cryodask.store.project import Project
from cryodask.store.sets import class_of, kept_rows, place_of_row
from cryodask.store.state import ProductRef, parted
from cryodask.vocabulary import VARIABLES

EXPOSURE_LACKS = 101
"""``removal_reason`` of particles whose exposure is not in the step's input, or lacks something that the step needs."""
SHARED_REASONS = {EXPOSURE_LACKS: "its exposure is missing, or lacks data that the step needs"}

_OF_CLASSES = {"final_map": "class_map", "half_map": "class_half_map"}
"""Variables of a map, and those that hold them for all classes of a step."""


@dataclass(frozen=True)
class StepInputs:
    """Inputs of a step over sets.

    ``sets``: for each port that takes particles the sets, as references and sorted ids. ``ids``: the particles of the main port that the
    step processes (None: it takes none); ``left_out``: those that it cannot use; ``ref``: their reference, with the exposures that the step
    takes. ``rows``: exposures of these particles, or those that the step processes.
    """

    step: Step
    sets: dict[str, list[tuple[ProductRef, np.ndarray]]]
    ids: np.ndarray | None
    left_out: np.ndarray
    ref: ProductRef | None
    rows: np.ndarray

    def only(self, ids: np.ndarray) -> StepInputs:
        """A copy with other particles."""
        return replace(self, ids=ids, left_out=self.left_out[:0], rows=rows_in(ids))


def step_inputs(plan: Plan, project: Project, step: Step) -> StepInputs:
    """The current inputs of a step; its particles are those whose exposure has all that the step needs."""
    refer = Refer(plan, project.state)
    sets: dict[str, list[tuple[ProductRef, np.ndarray]]] = {}
    for port in step.stage.ports:
        if port.type == "particles":
            refs = [refer.product(p) for p in step.inputs.get(port.name, ())]
            sets[port.name] = [(ref, project.sets.ids(ref)) for ref in refs]
    exposures = step.inputs.get("exposures", ())
    nobody = np.zeros(0, np.int64)
    main = step.stage.port("particles")
    if main is None or main.many or not sets.get("particles"):
        rows = exposure_rows(project, refer.product(exposures[0]), exposures[0].sources) if exposures else nobody
        return StepInputs(step, sets, None, nobody, None, rows)
    ref, ids = sets["particles"][0]
    if exposures:
        taken = refer.product(exposures[0])
        ref = ref.model_copy(update={"exposures": taken.parts, "exposure_ids": taken.ids, "optics": taken.optics})
    rows = rows_in(ids)
    usable = np.isin(rows, selected_rows(project, ref))
    needed = step.stage.port("exposures")
    for part in needed.parts if needed is not None and exposures else ():
        usable &= _has(project, ref, part, rows)
    if usable.all():
        return StepInputs(step, sets, ids, ids[:0], ref, rows)
    there = usable[place_of_row(row_of(ids), rows)]
    return StepInputs(step, sets, ids[there], ids[~there], ref, rows[usable])


def selected_rows(project: Project, ref: ProductRef) -> np.ndarray:
    """Rows of the exposures of a set that are present and kept by the last exposure selection."""
    rows = np.array([item.row for item in project.items()], np.int64)
    return _kept_rows(project, ref.exposure_ids, rows)


def exposure_rows(project: Project, ref: ProductRef, sources: frozenset[str]) -> np.ndarray:
    """Rows of an exposures product: from its sources, and kept by the last selection."""
    items = project.items()
    several = len({str(i.inputs.get("source", "")) for i in items}) > 1
    rows = np.array([i.row for i in items if not several or sources & set(str(i.inputs.get("source", "")).split("|"))], np.int64)
    return _kept_rows(project, ref.ids, rows)


def _kept_rows(project: Project, place: str, rows: np.ndarray) -> np.ndarray:
    kept = kept_rows(project, place)
    return rows if kept is None else np.intersect1d(rows, kept)


def _has(project: Project, ref: ProductRef, part: str, rows: np.ndarray) -> np.ndarray:
    """Mask of the rows whose exposure has a part."""
    place = ref.exposures.get(part)
    if place is None or part in ref.parts:  # the particles have it themselves
        return np.ones(len(rows), bool)
    has = np.zeros(len(rows), bool)
    for one in place.split("|"):
        generation = project.generation_at(one)
        if not set(columns_of("exposures", part)) & set(generation.meta["gives"]):
            return np.ones(len(rows), bool)
        has |= place_of_row(rows, project.table_at(one, ()).row) >= 0
    return has


def particle_set(project: Project, inputs: StepInputs) -> StoredParticles:
    """The particle set of a step that reads images.

    Raises
    ------
    InputError
        If there are none, or their CTF or optics are missing.
    """
    label = inputs.step.label
    assert inputs.ids is not None
    assert inputs.ref is not None
    if not len(inputs.ids):
        raise InputError(
            f"Step {label} has no particles.",
            "nothing was picked (wrong diameter or threshold), or curation removed everything",
            "check the picks in the report, change pick or curate, and run again",
        )
    port = inputs.step.stage.port("particles")
    used = parts_used(inputs.step, port) if port is not None else ()
    columns = particle_columns(project, inputs.ref, inputs.ids, {"position", "image", *used})
    lacking = [n for n, values in columns.items() if n.startswith("defocus") and np.isnan(values).any()]
    if lacking:
        raise InputError(
            f"Step {label} needs {lacking[0]}, which {int(np.isnan(columns[lacking[0]]).sum())} particles lack.",
            "their micrographs have no CTF",
            "add a ctf step, or give the CTF in the STAR file",
        )
    images = image_places(project, inputs.ref, inputs.ids)
    pixels = np.unique(columns["particle_pixel_size_angstrom"])
    if len(pixels) > 1 and pixels[-1] > 1.0005 * pixels[0]:
        raise InputError(
            f"The particles of step {label} have images of {' and '.join(f'{p:g}' for p in pixels)} A per pixel.",
            "the exposures have several pixel sizes and the box of extract is in pixels; or a table has several optics groups",
            "set box_angstrom and pixel_size_angstrom in extract; import each pixel size from a separate table",
        )
    columns["micrograph"] = row_of(inputs.ids)
    columns["data_set"] = _data_sets(project, columns["micrograph"])
    if "half_set" not in columns:  # tables without coordinates give no positions, with which the halves are stored
        columns["half_set"] = _halves_at_birth(project, inputs.ids)
    found = ParticleSet(len(inputs.ids), images.shape[-1], float(pixels[0]), columns)
    return StoredParticles(found, inputs.ids, images)


def _halves_at_birth(project: Project, ids: np.ndarray) -> np.ndarray:
    """Half-set of each particle `(n,)` int8 as its birth table has it; by the parity of its place where it has none."""
    own, book = parent_of(ids), BirthBook(project)
    out = (np.arange(len(ids)) % 2).astype(np.int8)
    for birth, row in sorted(set(zip(birth_of(own).tolist(), row_of(own).tolist()))):
        known = book.at(row, birth)
        here = np.flatnonzero((birth_of(own) == birth) & (row_of(own) == row))
        at = place_of(own[here], np.sort(known["particle_id"]))
        halves = known["particle_half"][np.argsort(known["particle_id"])]
        out[here[at >= 0]] = halves[at[at >= 0]]
    return out


def _data_sets(project: Project, rows: np.ndarray) -> np.ndarray:
    """Number of the data set of each exposure row: the first row of that data set, whatever its name is."""
    first: dict[tuple[str, str], int] = {}
    items = sorted(project.items(), key=lambda item: item.row)
    numbers = [first.setdefault((item.data_set, str(item.inputs.get("source", ""))), item.row) for item in items]
    places = place_of_row(rows, np.array([item.row for item in items]))
    out: np.ndarray = np.array(numbers, np.int64)[places]
    return out


def whole_values(plan: Plan, project: Project, inputs: StepInputs) -> dict[str, Any]:
    """The other variables that a stage needs, by name; stored ones are read where they are used."""
    step, refer = inputs.step, Refer(plan, project.state)
    out: dict[str, Any] = {}
    columns: dict[str, np.ndarray] | None = None
    for name in (*step.stage.needs, *step.stage.optional):
        port, name_there = port_of(step, name)
        place = part_of(name_there)
        if place is None or port is None or name == IMAGES_OF_PARTICLES:
            continue
        products = step.inputs.get(port.name, ())
        if not products or place[1] not in parts_used(step, port):
            continue
        if place[0] not in COLLECTIONS:
            stored = [stored_at(project, refer.place(product.parts[place[1]]), name_there) for product in products]
            if port.many:
                out[name] = stored
            elif stored[0] is not None:
                out[name] = stored[0]
        elif inputs.ids is not None and inputs.ref is not None:
            if name == "particle_id":
                out[name] = inputs.ids
            elif place[0] == "particles":
                columns = columns if columns is not None else project.sets.columns(inputs.ref, inputs.ids)
                if name in columns or name in step.stage.needs:
                    out[name] = columns[name]
            else:
                out |= project.sets.of_exposures(inputs.ref, row_of(inputs.ids), [name])
    return out


def stored_at(project: Project, place: str, name: str) -> Stored | None:
    """Where a result holds a variable of its map (of one class, if the place names it), mask or model; None if it does not give it."""
    generation, number = project.generation_at(place), class_of(parted(place)[1])
    if number and _OF_CLASSES.get(name) in generation.meta["gives"]:
        return Stored(generation.path, _OF_CLASSES[name], number - 1)
    return Stored(generation.path, name) if name in generation.meta["gives"] else None


# --- steps that work on sets alone ---------------------------------------------------------------------------------------------
def set_views(plan: Plan, project: Project, inputs: StepInputs) -> dict[str, list[SetView | ExposureView]]:
    """The inputs of a ``set`` stage, by port."""
    out: dict[str, list[SetView | ExposureView]] = {}
    for name, sets in inputs.sets.items():
        views: list[SetView | ExposureView] = []
        for product, (ref, ids) in zip(inputs.step.inputs.get(name, ()), sets):
            if name == "particles" and inputs.ids is not None and inputs.ref is not None:
                ref, ids = inputs.ref, inputs.ids
            views.append(SetView(product.name, ids, tuple(ref.parts), _reader(project, ref, ids)))
        out[name] = views
    exposures = inputs.step.inputs.get("exposures", ())
    if exposures and inputs.ids is None:
        ref = Refer(plan, project.state).product(exposures[0])
        names = {item.row: item.name for item in project.items()}
        rows = inputs.rows

        def read(variable: str) -> np.ndarray:
            place = ref.parts.get(VARIABLES[variable].part.partition(".")[2])
            known = project.sets.exposure_values(place, variable, ref.optics) if place is not None else None
            return aligned(known[1].astype(np.float64), place_of_row(rows, known[0])) if known is not None else np.full(len(rows), np.nan)

        out["exposures"] = [ExposureView(exposures[0].ref, rows, tuple(names[int(r)] for r in rows), read)]
    return out


def _reader(project: Project, ref: ProductRef, ids: np.ndarray) -> Callable[[Sequence[str] | None], dict[str, np.ndarray]]:
    def read(parts: Sequence[str] | None) -> dict[str, np.ndarray]:
        return particle_columns(project, ref, ids) if parts is None else project.sets.columns(ref, ids, parts)

    return read
