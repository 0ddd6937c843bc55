"""Shared by the rules of the graph: steps with their sources, the chain of steps so far, and phrases of the messages."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from cryodask.errors import CryodaskError
from cryodask.products import Product, part_of
from cryodask.stage import Output, Port, Stage

Inputs = dict[str, tuple[Product, ...]]

_ONE = {"map": "a map", "mask": "a mask", "model": "a model"}
_SEVERAL = {"map": "maps", "mask": "masks", "model": "models"}

FIRST_CHOICE = {
    "exposures.frames": "ingest",
    "exposures.optics": "ingest",
    "exposures.dose": "ingest",
    "exposures.micrograph": "motion",
    "exposures.halves": "motion",
    "exposures.field": "motion",
    "exposures.ctf": "ctf",
    "exposures.ctf_quality": "ctf",
    "exposures.denoised": "denoise",
    "particles.position": "pick",
    "particles.image": "extract",
    "particles.alignment2d": "classify2d",
    "particles.class2d": "classify2d",
    "particles.class3d": "classify3d",
    "particles.pose": "refine3d",
    "particles.note": "annotate",
    "map.half_maps": "refine3d",
    "map.fsc": "refine3d",
}
"""Part -> the stage to suggest first if several give it; stages that are not installed are never suggested."""


class WrongStep(Exception):
    """A problem of a step."""


@dataclass(frozen=True)
class Step:
    """A step of the pipeline with its sources.

    ``inputs``: products by port. ``implicit``: ports filled by a rule rather than ``from``. ``outputs``: products by (name, type).
    ``pins``: for each port of ``inputs`` the keys given as ``STEP@KEY``, one per source; "" if none was given.
    """

    label: str
    stage: Stage
    params: Any
    inputs: Inputs
    implicit: frozenset[str]
    outputs: dict[tuple[str, str], Product]
    pins: dict[str, tuple[str, ...]]

    def given(self, type_: str) -> list[Product]:
        """Its products of a type; first the one named after the type, which represents the step."""
        found = [p for (_, kind), p in self.outputs.items() if kind == type_]
        return sorted(found, key=lambda p: p.output != type_)


@dataclass
class Draft:
    """A step whose sources are being found."""

    label: str
    stage: Stage
    params: Any
    inputs: Inputs = field(default_factory=dict)
    implicit: set[str] = field(default_factory=set)
    pins: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def main(self, type_: str) -> Product | None:
        """The product of a type that the step works on."""
        port = main_port(self.stage, type_)
        found = self.inputs.get(port.name, ()) if port else ()
        return found[0] if found else None


Pinned = Callable[[Step, Product, str], Product]
"""(step, its current product, key or place of an earlier result) -> that product as it was; raises WrongStep."""


@dataclass
class Chain:
    """The products of the steps so far, in the order of the list.

    ``beside``: maps that a warning has named already. ``pinned`` looks up earlier results; without it current results are used.
    """

    stages: Mapping[str, Stage]
    steps: list[Step] = field(default_factory=list)
    by_label: dict[str, Step] = field(default_factory=dict)
    products: dict[tuple[str, str], Product] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    beside: set[str] = field(default_factory=set)
    pinned: Pinned | None = None

    def add(self, step: Step) -> None:
        """Append a step whose sources are known."""
        self.steps.append(step)
        self.by_label[step.label] = step
        self.products |= {(p.type, p.ref): p for p in step.outputs.values()}

    def given(self, type_: str) -> list[Product]:
        """Products of a type, nearest step first."""
        return [p for step in reversed(self.steps) for p in step.given(type_)]

    def giver(self, product: Product) -> Step:
        """The step that gave a product."""
        return self.by_label[product.step]

    def as_it_was(self, product: Product, key: str) -> Product:
        """The product of an earlier result of its step.

        Raises
        ------
        WrongStep
            If there is none, or something that it depends on is gone.
        """
        return product if self.pinned is None else self.pinned(self.giver(product), product, key)

    def beside_pinned(self, product: Product, at: Mapping[str, str]) -> Product:
        """The product that belongs to a pinned one: that of the same time, if its step is in ``at``."""
        return product if product.pinned or product.step not in at else self.as_it_was(product, at[product.step])


def label_of(ref: str) -> str:
    """Label of the step of a reference ``STEP``, ``STEP.OUTPUT``, or either with ``@PLACE``."""
    return ref.partition("@")[0].partition(".")[0]


def is_pinned(ref: str) -> bool:
    """Whether a reference is an exact place (``LABEL@STAGE/KEY``) that does not follow the step."""
    return "@" in ref


def of_the_same_time(product: Product, at: Mapping[str, str]) -> bool:
    """Whether a product was made from the results in ``at``, as far as it depends on these steps at all."""
    return all(product.at.get(label) == at[label] for label in labels_of(product.behind) | {product.step} if label in at)


def as_now(products: Iterable[Product]) -> list[Product]:
    """Drop earlier results of products whose current result is present as well."""
    found = list(products)
    now = {p.ref for p in found if not p.pinned}
    return [p for p in found if not p.pinned or p.ref not in now]


def labels_of(refs: Iterable[str]) -> set[str]:
    """Labels of the steps of references."""
    return {label_of(ref) for ref in refs}


def main_port(stage: Stage, type_: str) -> Port | None:
    """The port for the product of a type that the stage works on: the one named after the type, else the one with a default."""
    named = stage.port(type_)
    if named is not None and named.type == type_ and not named.many:
        return named
    return next((p for p in stage.ports if p.type == type_ and not p.many and p.default == "related"), None)


def replaced(port: Port, params: Any) -> bool:
    """Whether a parameter replaces an input (``refine3d: {reference: FILE}``)."""
    return port.unless is not None and _is_set(params, port.unless)


def used_parts(port: Port, params: Any, filled: Collection[str] = ()) -> tuple[str, ...]:
    """Parts that a port reads: the required ones, and those that are read if present.

    ``also_if`` names the parameter without which the latter are not read: one for all, or part -> parameter; ``also_with`` names ports,
    of which one must be ``filled``.
    """
    needed: Any = port.also_if
    condition = needed if isinstance(needed, Mapping) else dict.fromkeys(port.also, needed) if needed is not None else {}
    beside = port.also_with or {}
    read = (
        part
        for part in port.also
        if (part not in condition or _is_set(params, condition[part])) and (part not in beside or set(beside[part]) & set(filled))
    )
    return (*needed_parts(port, params), *read)


def needed_parts(port: Port, params: Any) -> tuple[str, ...]:
    """Parts that a port requires: all but those that a parameter makes unnecessary."""
    without = port.parts_without or {}
    return tuple(part for part in port.parts if part not in without or not _is_set(params, without[part]))


def _is_set(params: Any, name: str) -> bool:
    value = getattr(params, name, None)
    return value is not None and value is not False and value != "" and value != []


def uses_poses(stage: Stage, params: Any, particles: Product) -> bool:
    """Whether a step uses the poses of its particles relative to a map; selecting by a column or extracting does not."""
    port = main_port(stage, "particles")
    if port is None:
        return False
    if_there = "pose" in used_parts(port, params) and "pose" in particles.parts and bool(map_ports(stage))
    return "pose" in needed_parts(port, params) or if_there


def map_ports(stage: Stage) -> list[Port]:
    """Ports whose maps are in the frame of the poses: all but ``to``, the map into whose frame a step transforms."""
    return [p for p in stage.ports if p.type == "map" and p.name != "to"]


def default_outputs(stage: Stage) -> tuple[Output, ...]:
    """Outputs of a stage with default parameters; empty if they depend on a required parameter."""
    try:
        return tuple(stage.outputs(stage.params.model_construct()))
    except (CryodaskError, AttributeError, KeyError, OSError, TypeError, ValueError):
        return ()


def stages_that_give(stages: Mapping[str, Stage], type_: str, part: str = "") -> list[str]:
    """Names of the stages that give a part of a product, or a new product; external and third-party ones last."""
    found = []
    for name, stage in stages.items():
        outputs = [o for o in default_outputs(stage) if o.type == type_]
        if part:
            gives = any(part in o.parts for o in outputs) or (type_, part) in _parts_of(stage.gives)
        else:
            gives = any(not _extends(stage, o) for o in outputs)
        if gives:
            found.append(name)
    found.sort(key=lambda name: ("." in name, name != FIRST_CHOICE.get(f"{type_}.{part}")))
    return found


def _extends(stage: Stage, out: Output) -> bool:
    """Whether an output extends a product that the stage takes."""
    port = stage.port(out.on) if out.on is not None else None
    return port is not None and port.type == out.type


def _parts_of(variables: Iterable[str]) -> Iterator[tuple[str, str]]:
    for variable in variables:
        place = part_of(variable)
        if place is not None:
            yield place


def one(type_: str) -> str:
    """``a map``; collections as they are."""
    return _ONE.get(type_, type_)


def several(type_: str) -> str:
    """``maps``; collections as they are."""
    return _SEVERAL.get(type_, type_)


def listed(words: Iterable[Any]) -> str:
    """``a, b and c``."""
    texts = [str(w) for w in words]
    return " and ".join(filter(None, (", ".join(texts[:-1]), texts[-1]))) if texts else "none"


def near(word: Any, words: Iterable[str]) -> str:
    """`` Did you mean 'ctf'?``, or nothing."""
    known = list(words)
    exact = [w for w in known if w.rpartition(".")[2] == str(word)]
    begun = sorted((w for w in known if len(w) > 2 and str(word).startswith(w)), key=len, reverse=True)  # ctffind, extraction
    found = exact or begun or difflib.get_close_matches(str(word), known, 1, 0.5)
    return f" Did you mean {found[0]!r}?" if found else ""


def shown(value: Any) -> str:
    """A value from the project file, abbreviated."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def written(value: Any) -> str:
    """A source as written in the project file."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(written(v) for v in value)}]" if len(value) < 20 else shown(value)
    return value if isinstance(value, str) and len(value) < 60 else shown(value)


def who_gives(chain: Chain, draft: Draft, type_: str) -> str:
    """`` Maps come from refine3d.``, or the stages that could give one."""
    givers = [s.label for s in chain.steps if s.given(type_)]
    if givers:
        return f" {several(type_).capitalize()} come from {listed(givers[-6:])}."
    stages = [name for name in stages_that_give(chain.stages, type_) if name != draft.stage.name]
    return f" Stages that give {one(type_)}: {', '.join(stages[:5])}." if stages else ""
