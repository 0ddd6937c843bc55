"""Manual decisions: steps that wait for one, and class numbers, which belong to the classification they were chosen from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cryodask.errors import ProjectFileError
from cryodask.run.graph.chain import is_pinned, label_of
from cryodask.run.graph.choices import chosen_classes
from cryodask.run.recipe import Plan, Step
from cryodask.run.refs import Refer
from cryodask.store.identity import place_of
from cryodask.store.project import Project
from cryodask.store.state import Choice


def decided(step: Step) -> bool:
    """Whether the manual decision of a step has been made: any parameter is given."""
    return not step.stage.person or step.params != type(step.params)()


def waiting(plan: Plan) -> dict[str, str]:
    """Steps that cannot run without a manual decision, and why: manual steps, and those that depend on them."""
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
    """Check that manually chosen class numbers belong to the current classification.

    Raises
    ------
    ProjectFileError
        If it was recomputed since; the message names the classes that now hold most particles of the chosen ones.
    """
    for choice in _choices(plan, project, step):
        before = _before(plan, project, choice)
        if before is None or choice.place in {before.place, *before.earlier} or confirmed:
            if before is not None:
                # when a classification is changed back, the numbers were chosen for it before
                choice.earlier = [p for p in dict.fromkeys([*before.earlier, before.place]) if p != choice.place]
                project.state.choices.pop(before.subject, None)
            project.state.choices[choice.subject] = choice
            continue
        raise ProjectFileError(
            f"{step.label}: classes {', '.join(map(str, choice.values))} were chosen from {before.place.replace('/', '@')}; {choice.label} "
            f"is now {choice.place.replace('/', '@')}. {_nearest(project, before.place, choice.place, choice.values)}".strip(),
            "the classification was recomputed, and the numbers now mean other classes",
            f"check the classes and give the new numbers; to keep the same numbers:  cryodask run --update {step.label}",
        )


def _choices(plan: Plan, project: Project, step: Step) -> list[Choice]:
    """Choices that the parameters of a step make in the classifications behind its particles."""
    particles = step.inputs.get("particles", ())
    parts = particles[0].parts if particles else {}
    refer = Refer(plan, project.state)
    return [
        Choice(values=sorted(set(values)), place=refer.place(parts[part]), stage=step.stage.name, part=part, label=label_of(parts[part]))
        for part, values in chosen_classes(step.params, parts).items()
        if part in parts and not is_pinned(parts[part])  # for an earlier result its key identifies the classification
    ]


def _before(plan: Plan, project: Project, choice: Choice) -> Choice | None:
    """The choice as it was made originally, even if the classification step has been renamed since."""
    known = project.state.choices
    if choice.subject in known:
        return known[choice.subject]
    labels = {step.label for step in plan.steps}
    stage = choice.place.partition("/")[0]
    renamed = [
        other
        for other in known.values()
        if (other.stage, other.part, other.values) == (choice.stage, choice.part, choice.values)
        and other.label not in labels
        and other.place.partition("/")[0] == stage
    ]
    return renamed[-1] if renamed else None


def _nearest(project: Project, old: str, new: str, values: Sequence[int]) -> str:
    """A sentence about where the particles of the chosen classes are now."""
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
