"""The resolver: turns the list of steps in the project file into steps with their sources, products, and problems.

Pure, without Dask or disk (only ``pins`` looks into the project). The rules are those of the documentation: a step works on the nearest
particles above it; everything else that it needs is what belongs to those particles; ``from`` overrides this. A wrong list gives
problems, never an exception.

``sources`` reads ``from`` (rule 1), ``rules`` finds all other sources (rules 2 to 6), ``checks`` compares the sources of a step,
``facts`` derives its products. ``pins`` finds earlier results (``STEP@KEY``), ``choices`` the classes that parameters name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from cryodask.errors import CryodaskError
from cryodask.products import COLLECTIONS, Product
from cryodask.run.graph.chain import (
    Chain,
    Draft,
    Pinned,
    Step,
    WrongStep,
    is_pinned,
    labels_of,
    near,
    replaced,
    shown,
    used_parts,
    written,
)
from cryodask.run.graph.checks import check_input, check_step, lacking, of_another_table, unused
from cryodask.run.graph.facts import give, order_of, point_group
from cryodask.run.graph.rules import FILLED_FIRST, missing, take
from cryodask.run.graph.sources import check_form, read_from, refuse_twice
from cryodask.stage import OTHERS, Output, Port, Stage

__all__ = ["Graph", "Step", "order_of", "point_group", "resolve"]

MakeParams = Callable[[Stage, str, dict[str, Any]], Any]

NOT_PARAMETERS = ("from", "live")
"""Keys of a step that are not parameters of its stage."""

_STEP = re.compile(r"\s*(\S+)(?:\s+as(?:\s+(.*?))?)?\s*", re.DOTALL)
_LABEL = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")


@dataclass(frozen=True)
class Graph:
    """The steps that could be resolved, and the problems of the pipeline. A graph with problems is not run."""

    steps: tuple[Step, ...]
    problems: tuple[str, ...]
    warnings: tuple[str, ...]

    def step(self, label: str) -> Step:
        """The step of that label.

        Raises
        ------
        KeyError
        """
        for step in self.steps:
            if step.label == label:
                return step
        raise KeyError(f"no step is called {label!r}.{near(label, [s.label for s in self.steps])}")

    def rests_on(self, step: Step) -> frozenset[str]:
        """Labels of the steps whose results a step reads and on which its key depends; steps in between do not count.

        These are the givers of the parts that its ports declare, of whole products, and of the set of particles or exposures.
        """
        products = {(p.type, p.ref): p for s in self.steps for p in s.outputs.values()}
        found: set[str] = set()
        filled = [name for name, taken in step.inputs.items() if taken]
        for port in step.stage.ports:
            for product in step.inputs.get(port.name, ()):
                if product.type not in COLLECTIONS:
                    found |= set() if product.pinned else {product.step}
                    continue
                found |= _givers(product.parts[p] for p in used_parts(port, step.params, filled) if p in product.parts)
                found |= _settled_by(products, product)
            if port.many and port.type == "particles" and step.given("particles"):
                sets = step.inputs.get(port.name, ())
                found |= _united_parts(sets)
                exposures = [p.exposures for p in sets if p.exposures is not None]
                if step.given("exposures"):
                    found |= _united_parts(exposures).union(*(_settled_by(products, e) for e in exposures))
        return frozenset(found - {step.label})


def _settled_by(products: Mapping[tuple[str, str], Product], product: Product) -> set[str]:
    """Labels of the steps that determined which particles (or exposures) are in a set: births, subsets, unions, copies."""
    line = (products.get((product.type, ref)) for ref in (*product.line, product.ref))
    return {p.step for p in line if p is not None and p.ids == p.ref and p.step not in product.at}


def _givers(refs: Iterable[str]) -> set[str]:
    """Labels of the steps of all references that are not pinned."""
    return labels_of(ref for ref in refs if not is_pinned(ref))


def _united_parts(sets: Sequence[Product]) -> set[str]:
    """Labels of the givers of the parts that a union takes from several steps and stores itself."""
    shared = set(sets[0].parts).intersection(*(p.parts for p in sets[1:])) if sets else set()
    givers = ({p.parts[part] for p in sets} for part in shared)
    return set().union(*(_givers(g) for g in givers if len(g) > 1))


def resolve(
    entries: Sequence[Any],
    stages: Mapping[str, Stage],
    *,
    make_params: MakeParams,
    pixel_sizes: Mapping[str, frozenset[float]] = MappingProxyType({}),
    pinned: Pinned | None = None,
) -> Graph:
    """Find the sources of every step.

    Parameters
    ----------
    entries : sequence
        The pipeline of the project file: names of stages, or mappings of one name (``STAGE`` or ``STAGE as LABEL``) to parameters.
    stages : mapping
        Stages by name.
    make_params : callable ``(stage, label, values) -> parameters``
        Raises CryodaskError, whose ``what`` becomes the problem.
    pixel_sizes : mapping
        Label of a step that brings exposures -> pixel sizes of its data sets, Angstrom.
    pinned : callable ``(step, product, key) -> product``, optional
        Looks up ``STEP@KEY``; by default the current product is used, with the key in ``pins``.

    Returns
    -------
    Graph
        With one problem per wrong step instead of exceptions. After the first wrong source, later steps are checked for names
        and parameters only, because their sources would be guesses.
    """
    if not isinstance(entries, (list, tuple)):
        return Graph((), (f"The pipeline is {shown(entries)}; write a list of steps, one dash per step.",), ())
    reading = _Reading(Chain(stages, pinned=pinned), make_params, pixel_sizes, _labels(entries))
    problems: list[str] = []
    for entry in entries:
        try:
            reading.add(entry, resolving=not problems)
        except WrongStep as problem:
            problems.append(str(problem))
    chain = reading.chain
    warnings = [] if problems else [*chain.warnings, *unused(chain)]
    return Graph(tuple(chain.steps), tuple(problems), tuple(dict.fromkeys(warnings)))


def _labels(entries: Sequence[Any]) -> frozenset[str]:
    """Labels of all steps that can be parsed."""
    found = set()
    for entry in entries:
        try:
            found.add(read_entry(entry)[1])
        except WrongStep:
            continue
    return frozenset(found)


def read_entry(entry: Any) -> tuple[str, str, dict[str, Any]]:
    """(stage, label, values) of an entry of the pipeline.

    Raises
    ------
    WrongStep
    """
    values: Any = None
    head = entry
    if isinstance(entry, Mapping):
        if len(entry) != 1:
            names = f" ({', '.join(str(name) for name in list(entry)[:5])})" if entry else ""
            raise WrongStep(f"A step has {len(entry)} names{names}: one dash per step.")
        head, values = next(iter(entry.items()))
    if not isinstance(head, str) or not head.strip():
        raise WrongStep(f"{shown(entry)} is not a step. Write  - stage: {{parameter: value}}.")
    if values is not None and not isinstance(values, Mapping):
        raise WrongStep(f"{head.strip()}: {shown(values)} is not a set of parameters. Write  - {head.strip()}: {{parameter: value}}.")
    match = _STEP.fullmatch(head)
    if match is None:
        name, *rest = head.split()
        if not rest:
            raise WrongStep(f"{shown(head)} is not a step. Write  - stage: {{parameter: value}}.")
        raise WrongStep(f"{shown(head)} is not a step. If {' '.join(rest)!r} is its name, write  - {name} as {rest[-1]}: {{...}}.")
    name, label = match[1], match[2]
    if label is None and re.fullmatch(r".*\sas", head.strip(), re.DOTALL):
        raise WrongStep(f"{head.strip()!r}: no name follows `as`.")
    return name, name.rpartition(".")[2] if label is None else label, dict(values or {})


@dataclass
class _Reading:
    """Reads the list from the top, with the products of the steps so far."""

    chain: Chain
    make_params: MakeParams
    pixel_sizes: Mapping[str, frozenset[float]]
    labels: frozenset[str]
    read: set[str] = field(default_factory=set)

    def add(self, entry: Any, *, resolving: bool) -> None:
        """Read a step; find its sources unless an earlier step was wrong."""
        name, label, values = read_entry(entry)
        stage = self._named(name, label)
        wanted = values.get("from")
        params = self._params(stage, label, values)
        check_form(label, stage, wanted)
        outputs = _outputs(stage, label, params)
        if not resolving:
            return
        draft = Draft(label, stage, params)
        self._fill(draft, wanted)
        check_step(self.chain, draft, outputs)
        made = give(self.chain, draft, outputs, self.pixel_sizes)
        self.chain.add(Step(label, stage, params, draft.inputs, frozenset(draft.implicit), made, draft.pins))

    def _named(self, name: str, label: str) -> Stage:
        """The stage of a step; checks that its label is valid and unique."""
        stages = self.chain.stages
        if name not in stages:
            raise WrongStep(
                f"There is no stage {shown(name)}.{near(name, stages)} List them with `cryodask stages`; "
                f"a stage of another package needs that package to be installed.{OTHERS.hint(name)}"
            )
        if not _LABEL.fullmatch(label):
            raise WrongStep(
                f"{shown(label)} cannot be the name of a step: letters, digits, - and _ only (a dot names an output: classify3d.class2)."
            )
        own = name.rpartition(".")[2]
        if label != own and (label == "inputs" or label in stages or label in {s.rpartition(".")[2] for s in stages}):
            taken = "is a reserved word of the project file" if label == "inputs" else "has the name of a stage"
            raise WrongStep(f"Step {label!r} {taken}. Choose another one after `as`.")
        if label in self.read:
            raise WrongStep(f"Two steps are called {label!r}. Name one of them:  - {name} as {label}2: {{...}}")
        self.read.add(label)
        return stages[name]

    def _params(self, stage: Stage, label: str, values: dict[str, Any]) -> Any:
        own = {key: value for key, value in values.items() if key not in NOT_PARAMETERS}
        for key, value in own.items():
            if not isinstance(key, str):
                raise WrongStep(f"{label}: {shown(key)} is not the name of a parameter.")
            if key not in stage.params.model_fields and stage.port(key) is not None:
                raise WrongStep(f"{label}: {key} is an input, not a parameter. Write from: {{{key}: {written(value)}}}.")
        try:
            return self.make_params(stage, label, own)
        except CryodaskError as error:
            raise WrongStep(error.what) from error

    def _fill(self, draft: Draft, wanted: Any) -> None:
        """Fill in the sources named by ``from``, then those that the rules find; particles first, because the others depend on them."""
        explicit = read_from(self.chain, draft, wanted, self.labels)
        ports = sorted(draft.stage.ports, key=lambda p: FILLED_FIRST.index(p.type) if p.type in FILLED_FIRST else len(FILLED_FIRST))
        for port in ports:
            found = explicit.get(port.name, [])
            if replaced(port, draft.params):
                if found:
                    raise WrongStep(f"{draft.label}: the input {port.name} is given twice, by {port.unless} and by from. Keep one of them.")
                continue
            if port.instead in explicit:
                if found:
                    raise WrongStep(f"{draft.label}: the input {port.name} is given twice, by {port.instead} and by {port.name}. Keep one.")
                continue
            if not found:
                taken = take(self.chain, draft, port)
                if taken is None or (port.optional and (lacking(draft, port, taken) or of_another_table(draft, port, taken))):
                    if not port.optional:
                        raise missing(self.chain, draft, port)
                    continue
                found = [(self._beside_pinned(draft, port, taken), "")]
                draft.implicit.add(port.name)
            else:
                found = [(self._as_it_was(draft, port, product, key), key) for product, key in found]
                refuse_twice(f"{draft.label}: from.{port.name}", [product.name if key else product.ref for product, key in found])
            for product, _ in found:
                check_input(self.chain, draft, port, product)
            draft.inputs[port.name] = tuple(product for product, _ in found)
            draft.pins[port.name] = tuple(key or _key_of(product) for product, key in found)

    def _as_it_was(self, draft: Draft, port: Port, product: Product, key: str) -> Product:
        try:
            return self.chain.as_it_was(product, key) if key else product
        except WrongStep as problem:
            raise WrongStep(f"{draft.label}: from.{port.name}: {problem}") from problem

    def _beside_pinned(self, draft: Draft, port: Port, product: Product) -> Product:
        """What a rule found, as it was when the pinned particles (or, without any, the map) of the step were made."""
        main = draft.main("particles") or draft.main("map")
        try:
            return self.chain.beside_pinned(product, main.at) if main is not None else product
        except WrongStep as problem:
            raise WrongStep(f"{draft.label}: {port.name} as it belongs to {main.ref if main else ''}: {problem}") from problem


def _key_of(product: Product) -> str:
    """Key of an earlier result that a rule took; "" for the current result of a step."""
    return product.at.get(product.step, "").partition("/")[2] if product.pinned else ""


def _outputs(stage: Stage, label: str, params: Any) -> tuple[Output, ...]:
    """Outputs of a step; those of an import follow from its file."""
    try:
        return tuple(stage.outputs(params))
    except CryodaskError as error:
        text = error.what if error.what.startswith(label) else f"{label}: {error.what}"
        raise WrongStep(f"{text.rstrip('.')}. {error.way_out[:1].upper()}{error.way_out[1:]}.".strip()) from error
    except Exception as error:  # of a stage of another package
        raise WrongStep(
            f"{label}: {stage.name} cannot say what it gives with these parameters ({type(error).__name__}: {error})."
        ) from error
