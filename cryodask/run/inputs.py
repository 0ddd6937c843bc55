"""What a step over a set works on: its particles, its other inputs, and which particles cannot be used."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cryodask.errors import InputError
from cryodask.products import COLLECTIONS, columns_of, part_of
from cryodask.run.particles import StoredParticles
from cryodask.run.recipe import Plan, Step
from cryodask.run.refs import Refer, parts_used
from cryodask.run.whole import Stored
from cryodask.stage import ParticleSet
from cryodask.store.identity import row_of
from cryodask.store.particles import image_places, particle_columns
from cryodask.store.project import Project
from cryodask.store.sets import place_of_row
from cryodask.store.state import ProductRef

EXPOSURE_LACKS = 101
"""``removal_reason`` of particles whose exposure is not among the exposures of the step, or lacks what the step needs."""
SHARED_REASONS = {EXPOSURE_LACKS: "its exposure is missing, or lacks what the step needs"}


@dataclass(frozen=True)
class StepInputs:
    """Inputs of a step. ``ids``: the particles that it works on (None: it takes none); ``left_out`` those that it cannot use.

    ``ref`` refers to the set with the exposures that the step takes; ``values`` are the other variables that the stage needs.
    """

    step: Step
    ids: np.ndarray | None
    left_out: np.ndarray
    ref: ProductRef | None
    values: dict[str, Any] = field(default_factory=dict)

    @property
    def rows(self) -> np.ndarray:
        """Rows of the exposures of the particles."""
        return np.unique(row_of(self.ids)) if self.ids is not None else np.zeros(0, np.int64)


def step_inputs(plan: Plan, project: Project, step: Step) -> StepInputs:
    """Which particles a step works on now: of its set those whose exposure has what the step needs."""
    refer = Refer(plan, project.state)
    particles = step.inputs.get("particles", ())
    if not particles or (step.stage.port("particles") or step.stage.ports[0]).many:
        return StepInputs(step, None, np.zeros(0, np.int64), None)
    ref = refer.product(particles[0])
    exposures = step.inputs.get("exposures", ())
    if exposures:
        ref = ref.model_copy(update={"exposures": refer.product(exposures[0]).parts})
    ids = project.sets.ids(ref)
    usable = np.isin(row_of(ids), [item.row for item in project.items()])
    port = step.stage.port("exposures")
    for part in parts_used(step, port) if port is not None and exposures else ():
        if part in port.parts:  # type: ignore[union-attr]
            usable &= _has(project, ref, part, row_of(ids))
    return StepInputs(step, ids[usable], ids[~usable], ref)


def _has(project: Project, ref: ProductRef, part: str, rows: np.ndarray) -> np.ndarray:
    """Mask of the rows whose exposure has a part."""
    place = ref.exposures.get(part)
    if place is None:  # the particles have it themselves
        return np.ones(len(rows), bool)
    generation = project.generation_at(place)
    if not set(columns_of("exposures", part)) & set(generation.meta["gives"]):
        return np.ones(len(rows), bool)
    return place_of_row(rows, project.table_at(place, ()).row) >= 0


def particle_set(project: Project, inputs: StepInputs) -> StoredParticles:
    """The particles of a step that works on their images.

    Raises
    ------
    InputError
        Where there are none, or nothing gives their CTF or optics.
    """
    label = inputs.step.label
    assert inputs.ids is not None
    assert inputs.ref is not None
    if not len(inputs.ids):
        raise InputError(
            f"Step {label} has no particles to work on.",
            "nothing was picked (wrong diameter or threshold), or curation removed everything",
            "look at the picks in the report, change pick or curate, and run again",
        )
    columns = particle_columns(project, inputs.ref, inputs.ids)
    lacking = [n for n, values in columns.items() if n.startswith("defocus") and np.isnan(values).any()]
    if lacking:
        raise InputError(
            f"Step {label} needs {lacking[0]} of the particles, which {int(np.isnan(columns[lacking[0]]).sum())} of them lack.",
            "their micrographs have no CTF",
            "add a ctf step, or give the CTF in the STAR file",
        )
    images = image_places(project, inputs.ref, inputs.ids)
    pixels = np.unique(columns["particle_pixel_size_angstrom"])
    if len(pixels) > 1 and pixels[-1] > 1.0005 * pixels[0]:
        raise InputError(
            f"The particles of step {label} have images of {' and '.join(f'{p:g}' for p in pixels)} A per pixel.",
            "their exposures have several pixel sizes, and extract was given a box in pixels",
            "give extract box_angstrom and pixel_size_angstrom",
        )
    columns["micrograph"] = row_of(inputs.ids)
    columns.setdefault("half_set", np.zeros(len(inputs.ids), np.int8))
    found = ParticleSet(len(inputs.ids), images.shape[-1], float(pixels[0]), columns)
    return StoredParticles(found, inputs.ids, images)


def whole_values(plan: Plan, project: Project, inputs: StepInputs) -> dict[str, Any]:
    """The other variables that a stage needs, by name; what is stored is read where it is used."""
    step, refer = inputs.step, Refer(plan, project.state)
    out: dict[str, Any] = {}
    ports = {port.type: port for port in reversed(step.stage.ports)}
    columns: dict[str, np.ndarray] | None = None
    for name in (*step.stage.needs, *step.stage.optional):
        place = part_of(name)
        if place is None or place[0] not in ports or name == "particle_image":
            continue
        port = ports[place[0]]
        products = step.inputs.get(port.name, ())
        if not products or place[1] not in parts_used(step, port):
            continue
        if place[0] not in COLLECTIONS:
            generation = project.generation_at(refer.place(products[0].parts[place[1]]))
            if name in generation.meta["gives"]:
                out[name] = Stored(generation.path, name)
        elif inputs.ids is not None and inputs.ref is not None:
            if place[0] == "particles":
                columns = columns if columns is not None else project.sets.columns(inputs.ref, inputs.ids)
                out[name] = columns[name]
            else:
                out |= project.sets.of_exposures(inputs.ref, row_of(inputs.ids), [name])
    return out
