"""Manual decisions: steps that wait for one, decisions made in the browser, and class numbers, which belong to one classification."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np

from cryodask.edits.frozen import Frozen, frozen
from cryodask.edits.masks import Stroke
from cryodask.edits.regions import Region
from cryodask.errors import ProjectFileError
from cryodask.run.graph.chain import is_pinned, label_of
from cryodask.run.graph.choices import chosen_classes
from cryodask.run.recipe import Plan, Step
from cryodask.run.refs import Refer
from cryodask.store.identity import place_of
from cryodask.store.project import Project
from cryodask.store.sets import class_of
from cryodask.store.state import Choice

FOR_A_PERSON = "waits for a person"
_ON_A_RESULT = {"draw_mask": ("masks", "map", "final"), "select_region": ("regions", "particles", "components")}
"""Stages whose decision belongs to one result: kind of the edits, and the port and part by which the stage takes that result."""


def decided(step: Step) -> bool:
    """Whether the manual decision of a step has been made: any parameter is given, and it does not wait for edits."""
    return (not step.stage.person or step.params != type(step.params)()) and not getattr(step.params, "wait", False)


def with_decisions(plan: Plan, project: Project) -> tuple[Plan, list[str]]:
    """The plan with the decisions that people have frozen by eye, and a sentence about each.

    ``select_classes`` without numbers keeps the classes that were chosen from its current classification, every ``select_exposures``
    leaves out excluded exposures, ``edit_picks`` without a file no longer waits, ``draw_mask`` without parameters makes
    the mask that was chosen on its current map, and ``select_region`` without regions keeps those chosen of the current components.
    """
    said: list[str] = []
    picks, excluded = frozen(project.path, "picks"), frozen(project.path, "exposures")
    steps: list[Step] = []
    for step in plan.steps:
        update: dict[str, object] = {}
        if step.stage.name == "edit_picks" and picks is not None and step.params.file is None:
            update["wait"] = False
            said.append(f"{step.label}: {_several(sum(map(len, picks.picks.values())), 'edit')}{_by(picks)}")
        elif step.stage.name == "select_exposures" and excluded is not None:
            update["rows_excluded"] = tuple(sorted({*step.params.rows_excluded, *excluded.numbers}))
            said.append(f"{step.label}: {_several(len(excluded.numbers), 'exposure')} excluded by eye{_by(excluded)}")
        elif step.stage.name == "select_classes" and not step.params.keep and (chosen := _chosen(plan, project, step)) is not None:
            update["keep"] = tuple(sorted(chosen.numbers))
            said.append(f"{step.label}: keeps classes {', '.join(map(str, sorted(chosen.numbers)))}{_by(chosen)}")
        elif step.stage.name in _ON_A_RESULT and not decided(step) and (drawn := _drawn(plan, project, step)) is not None:
            if drawn.kind == "masks":
                update |= {**drawn.content, "strokes": tuple(Stroke.model_validate(one) for one in drawn.content["strokes"])}
                what = _several(len(drawn.content["strokes"]), "drawn stroke")
            else:
                update["regions"] = tuple(Region.model_validate(one) for one in drawn.content["regions"])
                what = f"{_several(len(drawn.content['regions']), 'region')}{_because(drawn.content['reasons'])}"
            said.append(f"{step.label}: {what}{_by(drawn)}")
        steps.append(replace(step, params=step.params.model_copy(update=update)) if update else step)
    return replace(plan, graph=replace(plan.graph, steps=tuple(steps))), said


def _chosen(plan: Plan, project: Project, step: Step) -> Frozen | None:
    """The classes that were frozen for the current classification of a step; they are recorded as chosen from exactly that result."""
    ref = step.inputs["particles"][0].parts["class2d"]
    label = label_of(ref)
    if not is_pinned(ref) and label not in project.state.steps:
        return None
    place = Refer(plan, project.state).place(ref)
    chosen = frozen(project.path, "classes", place)
    if chosen is None or not chosen.numbers:
        return None
    if not is_pinned(ref):
        choice = Choice(values=sorted(chosen.numbers), place=place, stage="select_classes", part="class2d", label=label)
        project.state.choices[choice.subject] = choice
    return chosen


def still_decided(undecided: Plan, project: Project, step: Step) -> bool:
    """Whether the mask or regions of a step were chosen on the result that is current now: it may have been recomputed since the plan."""
    before = undecided.graph.step(step.label)
    if step.stage.name not in _ON_A_RESULT or decided(before):
        return True
    now, _ = with_decisions(replace(undecided, graph=replace(undecided.graph, steps=(before,))), project)
    return bool(now.steps[0].params == step.params)


def _drawn(plan: Plan, project: Project, step: Step) -> Frozen | None:
    """The mask that was frozen for the current map of a step, or the regions for its current components."""
    kind, port, part = _ON_A_RESULT[step.stage.name]
    ref = step.inputs[port][0].parts[part]
    if not is_pinned(ref) and label_of(ref) not in project.state.steps:
        return None
    return frozen(project.path, kind, Refer(plan, project.state).place(ref))


def _because(reasons: Sequence[str]) -> str:
    given = list(dict.fromkeys(reason for reason in reasons if reason))
    return f" ({', '.join(given)})" if given else ""


def _by(decision: Frozen) -> str:
    when = datetime.fromtimestamp(decision.time, UTC).strftime("%Y-%m-%d %H:%M UTC")
    return f", frozen by {decision.who} on {when}"


def _several(count: int, what: str) -> str:
    return f"{count} {what}" + ("s" if count != 1 else "")


def waiting(plan: Plan) -> dict[str, str]:
    """Steps that cannot run without a manual decision, and why: manual steps, and those that depend on them."""
    out: dict[str, str] = {}
    for step in plan.steps:
        taken = [p for products in step.inputs.values() for p in products]
        behind = {label for p in taken for label in map(label_of, (*p.behind, p.ref)) if label not in p.at}
        if not decided(step):
            out[step.label] = FOR_A_PERSON
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
    """Choices of a step in the classifications behind its particles: by its parameters, or by taking a class (``classify3d.class2``)."""
    particles = step.inputs.get("particles", ())
    parts = particles[0].parts if particles else {}
    refer = Refer(plan, project.state)
    taken: dict[str, set[int]] = {}
    for product in (p for products in step.inputs.values() for p in products):
        if (number := class_of(product.output)) and not product.pinned:
            taken.setdefault(product.step, set()).add(number)
    return [
        Choice(values=sorted(values), place=refer.place(label), stage=step.stage.name, part="class3d", label=label)
        for label, values in taken.items()
    ] + [
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
            column = next(n for n in ("class_number", "class3d_number") if n in generation.meta["gives"])
            numbers.append((np.asarray(generation.read(record, "particle_id")), np.asarray(generation.read(record, column))))
    except (KeyError, OSError, StopIteration):
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
