"""Decisions of people: steps that wait for one, and numbers of classes that belong to the classification they were chosen from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cryodask.errors import ProjectFileError
from cryodask.run.graph_chain import label_of
from cryodask.run.recipe import Plan, Step, marked_fields
from cryodask.run.refs import Refer
from cryodask.stage import ChoiceMark
from cryodask.store.identity import place_of
from cryodask.store.project import Project
from cryodask.store.state import Choice


def decided(step: Step) -> bool:
    """Whether the decision that a step waits for is there: any parameter is given."""
    return not step.stage.person or step.params != type(step.params)()


def waiting(plan: Plan) -> dict[str, str]:
    """Steps that cannot run for want of a decision, and why: those of a person, and what is made from them."""
    out: dict[str, str] = {}
    for step in plan.steps:
        taken = [p for products in step.inputs.values() for p in products]
        behind = {label for p in taken for label in map(label_of, (*p.behind, p.ref)) if label not in p.at}
        if not decided(step):
            out[step.label] = "waits for a person"
        elif blocked := sorted(behind & set(out)):
            out[step.label] = f"waits for {blocked[0]}"
    return out


def check_choice(plan: Plan, project: Project, step: Step, *, confirmed: bool) -> None:
    """Numbers of classes that a person chose must be those of the classification of now.

    Raises
    ------
    ProjectFileError
        When it was computed again since, naming the classes that hold most of the particles of those that were chosen.
    """
    names = marked_fields(type(step.params), ChoiceMark)
    values = next((list(v) for n in names if isinstance(v := getattr(step.params, n), list | tuple) and v), None)
    particles = step.inputs.get("particles", ())
    part = next((p for p in ("class2d", "class3d") if particles and p in particles[0].parts), None)
    if values is None or part is None:
        project.state.choices.pop(step.label, None)
        return
    place = Refer(plan, project.state).place(particles[0].parts[part])
    before = project.state.choices.get(step.label)
    if before is None or before.values != values or before.place == place or confirmed:
        project.state.choices[step.label] = Choice(values=values, place=place)
        return
    label = label_of(particles[0].parts[part])
    raise ProjectFileError(
        f"{step.label}: classes {', '.join(map(str, values))} were chosen from {before.place.replace('/', '@')}; {label} is now "
        f"{place.replace('/', '@')}. {_nearest(project, before.place, place, values)}".strip(),
        "the classification was computed again, and its numbers have other meanings now",
        f"look at the classes and give their numbers anew; if the same numbers are meant:  cryodask run --update {step.label}",
    )


def _nearest(project: Project, old: str, new: str, values: Sequence[int]) -> str:
    """Where the particles of the chosen classes are now, in words."""
    try:
        numbers = []
        for place in (old, new):
            generation = project.generation_at(place)
            record = generation.committed()[0]
            numbers.append((np.asarray(generation.read(record, "particle_id")), np.asarray(generation.read(record, "class_number"))))
    except (KeyError, OSError):
        return ""
    (old_ids, old_number), (new_ids, new_number) = numbers
    said = []
    for value in values:
        at = place_of(old_ids[old_number == value], new_ids)
        now = new_number[at[at >= 0]]
        if len(now):
            counts = np.bincount(np.maximum(now, 0))
            said.append(f"class {value} -> {int(counts.argmax())} ({counts.max() / len(now):.0%} of its particles)")
    return f"Nearest now: {', '.join(said)}." if said else ""
