"""What the driver records with a generation: the places of the step's inputs and outputs, and that it is finished."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from cryodask.products import Product
from cryodask.run.graph.chain import labels_of
from cryodask.run.graph.pins import FACTS
from cryodask.run.recipe import Plan, Step
from cryodask.run.refs import Refer
from cryodask.store import places
from cryodask.store.places import Line, Optics
from cryodask.store.project import Project
from cryodask.vocabulary import OPTICS


def note_line(plan: Plan, project: Project, step: Step, key: str, *, again: bool, origin: Any) -> None:
    """Record in a generation the step's inputs and outputs with exact places. ``again``: it was not current before."""
    place = f"{step.stage.name}/{key}"
    state = Refer(plan, project.state).state_of(step, key)
    line = Line(
        inputs=state.inputs,
        products=state.products,
        facts={f"{name}:{kind}": _facts(product) for (name, kind), product in step.outputs.items()},
        steps={**_steps_behind(project, step), step.label: place},
        origin=origin,
        optics=_optics(project),
    )
    pinned = {p.at[p.step] for s in plan.steps for products in s.inputs.values() for p in products if p.pinned and p.step in p.at}
    fixed = place in project.state.kept or place in pinned
    places.note(project.path / "stages" / place, step.label, line, again=again, fixed=fixed)


def _steps_behind(project: Project, step: Step) -> dict[str, str]:
    """Place of every ancestor of a step; where two inputs differ, those of the particles count."""
    out: dict[str, str] = {}
    taken = [p for name in sorted(step.inputs, key=lambda n: n == "particles") for p in step.inputs[name]]
    for product in taken:
        labels = labels_of(product.behind) | {product.step}
        now = {label: project.state.steps[label].place for label in sorted(labels) if label in project.state.steps}
        out |= {**now, **product.at}
    return out


def _optics(project: Project) -> list[Optics]:
    """Current optics of all exposures, from their data sets."""
    out: dict[tuple[float | None, ...], list[tuple[int, int]]] = {}
    constants = {name: tuple(values.get(one) for one in OPTICS) for name, values in project.state.constants.items()}
    for item in project.items():
        if item.data_set in constants:
            runs = out.setdefault(constants[item.data_set], [])
            if runs and runs[-1][1] == item.row - 1:
                runs[-1] = runs[-1][0], item.row
            else:
                runs.append((item.row, item.row))
    return [Optics(values=dict(zip(OPTICS, values)), rows=runs) for values, runs in out.items()]


def _facts(product: Product) -> dict[str, Any]:
    found = {name: getattr(product, name) for name in FACTS}
    image = asdict(product.image) if product.image is not None else None
    return {**found, "pose_frames": sorted(product.pose_frames), "image": image}
