"""From the plan to the store: the location of a step's products, and the source of each variable that a stage needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cryodask.products import COLLECTIONS, Product, part_of
from cryodask.run.graph import Step
from cryodask.run.graph.chain import is_pinned, label_of, used_parts
from cryodask.run.recipe import Plan
from cryodask.stage import Port, Stage, find_stage
from cryodask.store.state import ProductRef, ProjectState, StepState
from cryodask.vocabulary import VARIABLES

INPUTS = "inputs"
"""Source of registry facts of an exposure, of its data set's optics, and of the gain."""
PARTICLES = "particles"
"""Source of values of the exposure's particles."""
IMAGES_OF_PARTICLES = "particle_image"
"""A per-exposure stage that needs it gets the particles of the exposure as a :class:`~cryodask.stage.ParticleBlock`."""


def stage_of(plan: Plan, ref: str) -> Stage:
    """The stage of the step that a reference names; for a pinned one that of its place."""
    return find_stage(pinned_place(ref).partition("/")[0]) if is_pinned(ref) else plan.graph.step(label_of(ref)).stage


def pinned_place(ref: str) -> str:
    """``STAGE/KEY`` of a pinned reference."""
    return ref.partition("@")[2]


@dataclass(frozen=True)
class Refer:
    """Turns products of a plan into references to generations, in the current state of the project."""

    plan: Plan
    state: ProjectState

    def place(self, ref: str) -> str:
        """Place that ``STEP`` or ``STEP.OUTPUT`` names; for a pinned reference its own."""
        if is_pinned(ref):
            return pinned_place(ref)
        output = ref.partition(".")[2]
        return self.state.steps[label_of(ref)].place + (f".{output}" if output else "")

    def ids_of(self, product: Product) -> str:
        """The generation that determines which particles (or exposures) are in a set.

        It belongs to the step that defined them, or to the last step over the whole set, which may have had to leave some out.
        """
        if product.pinned:
            return self.place(product.ids) if product.ids else ""
        step = self.plan.graph.step(product.step)
        if product.type != "particles" or not product.ids or product.ids == product.ref or step.stage.shape != "map":
            return self.place(product.ref if product.type == "particles" and product.ids else product.ids) if product.ids else ""
        base = next((p for products in step.inputs.values() for p in products if p.type == "particles" and p.ids == product.ids), None)
        return self.ids_of(base) if base is not None else self.place(product.ids)

    def _places(self, product: Product) -> dict[str, str]:
        """Place of each part; for the exposures of a union, the places of all that gave the part, ``A|B``."""
        if product.type != "exposures":
            return {part: self.place(ref) for part, ref in product.parts.items()}
        labels = {part: givers_of(self.plan, ref, part) for part, ref in product.parts.items()}
        return {part: "|".join(map(self.place, some)) for part, some in labels.items()}

    def places_of(self, product: Product, part: str) -> list[str]:
        """Places of all that gave a part."""
        return self._places(product)[part].split("|")

    def product(self, product: Product) -> ProductRef:
        """A product with the places of its parts."""
        exposures = product.exposures
        return ProductRef(
            type=product.type,
            step=product.step,
            output=product.output,
            ids=self.ids_of(product),
            parts=self._places(product),
            exposures=self._places(exposures) if exposures else {},
            exposure_ids=self.ids_of(exposures) if exposures else "",
            threshold=self.threshold(product),
            place=self._giver(product),
            optics=exposures.optics if exposures else product.optics,
        )

    def _giver(self, product: Product) -> str:
        """The generation of the step that gave a product; empty if the step has none yet."""
        if product.pinned:
            return product.at.get(product.step, "")
        step = self.state.steps.get(product.step)
        return step.place if step is not None else ""

    def threshold(self, product: Product) -> Any:
        """Score above which peaks are accepted, if the ids of a set are those of a birth."""
        if product.type != "particles" or not product.ids:
            return None
        if is_pinned(product.ids):
            return product.threshold if self.ids_of(product) == self.place(product.ids) else None
        step = self.plan.graph.step(label_of(product.ids))
        name = step.stage.threshold
        settled = self.ids_of(product) == self.place(product.ids)
        return getattr(step.params, name) if name and settled else None

    def inputs(self, step: Step) -> dict[str, list[ProductRef]]:
        """Inputs of a step, by port."""
        return {name: [self.product(p) for p in products] for name, products in step.inputs.items()}

    def state_of(self, step: Step, key: str, recipes: dict[str, str] | None = None) -> StepState:
        """The state of a step whose generation has this key, with its products."""
        made = StepState(stage=step.stage.name, key=key, params=step.params.model_dump(), inputs=self.inputs(step), recipes=recipes or {})
        there = ProjectState(name="", steps={**self.state.steps, step.label: made})
        refer = Refer(self.plan, there)
        made.products = {f"{name}:{kind}": refer.product(product) for (name, kind), product in step.outputs.items()}
        return made


def givers_of(plan: Plan, ref: str, part: str) -> list[str]:
    """References to the steps that gave a part of exposures: one, or those of all sources of a union."""
    if is_pinned(ref):
        return [f"{label_of(ref)}@{place}" for place in pinned_place(ref).split("|")]
    step = plan.graph.step(label_of(ref))
    many = next((port.name for port in step.stage.ports if port.many), None)
    if many is None:
        return [ref]
    found: list[str] = []
    for product in step.inputs.get(many, ()):
        if product.exposures is not None and part in product.exposures.parts:
            found += givers_of(plan, product.exposures.parts[part], part)
    return list(dict.fromkeys(found)) or [ref]


def parts_used(step: Step, port: Port) -> tuple[str, ...]:
    """Parts of a port that a step uses: the required ones, and those optional ones that are present."""
    products = step.inputs.get(port.name, ())
    filled = [name for name, taken in step.inputs.items() if taken]
    return tuple(p for p in used_parts(port, step.params, filled) if products and all(p in product.parts for product in products))


def port_of(step: Step, name: str) -> tuple[Port | None, str]:
    """The port that a variable comes from, and its name there: a second port of a type puts its own name before (``to_final_map``)."""
    for port in step.stage.ports:
        own = name.removeprefix(f"{port.name}_")
        if port.name != port.type and own != name and own in VARIABLES:
            return port, own
    place = part_of(name)
    return next((p for p in step.stage.ports if place is not None and p.type == place[0]), None), name


def variable_sources(plan: Plan, step: Step) -> dict[str, str]:
    """Source of each variable that a stage needs: ``inputs``, ``particles``, or the step (``LABEL``, ``LABEL@PLACE``) of its part.

    Values that a source such as ``ingest`` gives without storing them (optics) come from the registry, and so does all that it needs.

    A variable whose part is missing is left out: it is optional, or the plan would have refused the step.
    """
    out: dict[str, str] = {}
    ports = {port.type: port for port in reversed(step.stage.ports)}
    for name in (*step.stage.needs, *step.stage.optional):
        place = part_of(name)
        if name == "particle_id" or (place is not None and place[0] == "particles"):
            if name == "particle_id" or (place is not None and _has(step, ports.get("particles"), place[1])):
                out[name] = PARTICLES
        elif place is None or name == "gain" or not step.stage.ports:
            out[name] = INPUTS
        elif _has(step, ports.get(place[0]), place[1]):
            ref = step.inputs[ports[place[0]].name][0].parts[place[1]]
            givers = givers_of(plan, ref, place[1]) if place[0] == "exposures" else [ref]
            giving = [r if is_pinned(r) else label_of(r) for r in givers if name in stage_of(plan, r).gives]
            out[name] = "|".join(giving) or INPUTS
    return out


def _has(step: Step, port: Port | None, part: str) -> bool:
    return port is not None and part in parts_used(step, port)


def united_parts(step: Step) -> tuple[str, ...]:
    """Parts that a union takes from several steps and stores itself."""
    if not any(port.many and port.type in COLLECTIONS for port in step.stage.ports):
        return ()
    union = step.outputs.get(("particles", "particles"))
    return tuple(part for part, ref in union.parts.items() if ref == union.ref) if union is not None else ()
