"""Inputs and outputs of stages: the products that a stage takes, their parts, and what it gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from cryodask.products import COLLECTIONS, PARTS, Product, part_of


@dataclass(frozen=True)
class Port:
    """An input of a stage: one product of a type, with the parts it must have.

    ``also``: parts that are used if present, and then count in the key. ``default``: "related" (found by the rules of run/graph/rules.py),
    "explicit" (only by ``from``) or "none" (stays empty unless ``from`` fills it). ``many``: takes a list. ``copies``: whether the copies
    of a symmetry expansion are accepted; ``subtracted``: whether images after signal subtraction are. ``whole``: all classes are taken
    together, none need be chosen. ``unless``: parameter that replaces this input. ``also_if``: parameter without which
    the parts ``also`` are not used, or such a parameter for some of them. ``also_with``: for some of them the ports without any of which
    they are not used. ``parts_without``: part -> parameter that makes a required part unnecessary. ``instead``: a list port that replaces
    this input where ``from`` fills it.
    """

    name: str
    type: str
    parts: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    optional: bool = False
    default: Literal["related", "explicit", "none"] = "related"
    many: bool = False
    copies: bool = False
    subtracted: bool = False
    whole: bool = False
    unless: str | None = None
    also_if: str | Mapping[str, str] | None = None
    also_with: Mapping[str, tuple[str, ...]] | None = None
    parts_without: Mapping[str, str] | None = None
    instead: str | None = None


@dataclass(frozen=True)
class Output:
    """A product that a stage gives.

    ``on``: port whose product it extends or takes from (None: it is new; particles are born here). ``subset``: some of the
    particles or exposures of ``on``. ``partition``: all of them, in classes; a later step must say which. ``copies``: "expand" or
    "contract". ``frame``: "same" (as port ``map``, else as the poses), "new", "unknown", "flipped", "to" (that of port ``to``), or
    "as:STEP". ``drops``: parts that no longer hold. What files say before they are imported: ``pixel_sizes`` of the micrographs,
    Angstrom, and the ``image`` of all particles (edge in pixels, pixel size in Angstrom).
    """

    name: str
    type: str
    parts: tuple[str, ...] = ()
    on: str | None = None
    subset: bool = False
    partition: bool = False
    births: bool = False
    copies: Literal["", "expand", "contract"] = ""
    subtracted: bool = False
    frame: str = ""
    drops: tuple[str, ...] = ()
    pixel_sizes: frozenset[float] = frozenset()
    image: tuple[int, float] | None = None


Outputs = Callable[[Any], tuple[Output, ...]]
Check = Callable[[Any, dict[str, list[Product]]], Iterator[str]]


def port(spec: str, **options: Any) -> Port:
    """Parse the short form of a port, ``name:type[part, part?]``; the name may be omitted if it equals the type.

    After the name, ``?`` means optional, ``*`` a list, ``!`` only by ``from``; after a part, ``?`` means used if present.
    """
    name, _, rest = spec.replace(" ", "").partition(":") if ":" in spec else (spec.replace(" ", "").partition("[")[0], "", "")
    rest = rest or spec.replace(" ", "")
    kind, _, inner = rest.partition("[")
    flags = {c for c in name if c in "?*!"}
    name, kind = name.rstrip("?*!"), kind.rstrip("?*!")
    named = [p for p in inner.rstrip("]").split(",") if p]
    unknown = [p for p in named if p.rstrip("?") not in PARTS.get(kind, {})]
    if unknown or kind not in PARTS:
        raise ValueError(f"port {spec!r}: unknown type or parts {unknown or kind}")
    optional = "?" in flags
    default = "explicit" if flags & {"!", "*"} else "none" if optional and kind not in (*COLLECTIONS, "classes") else "related"
    made = Port(
        name,
        kind,
        tuple(p for p in named if p[-1] != "?"),
        tuple(p[:-1] for p in named if p[-1] == "?"),
        optional=optional,
        default=default,  # type: ignore[arg-type]
        many="*" in flags,
    )
    return replace(made, **options)


def derived_ports(needs: Sequence[str], optional: Sequence[str]) -> tuple[Port, ...]:
    """One port per product type of the variables."""
    parts: dict[str, dict[str, bool]] = {}
    for name in (*needs, *optional):
        place = part_of(name)
        if place is not None and name != "gain":
            product, part = place
            parts.setdefault(product, {})
            parts[product][part] = parts[product].get(part, False) or name in needs
    return tuple(
        Port(
            product,
            product,
            tuple(p for p, needed in found.items() if needed),
            tuple(p for p, needed in found.items() if not needed),
            optional=not any(found.values()),
        )
        for product, found in sorted(parts.items(), key=lambda item: list(PARTS).index(item[0]))
    )


def derived_outputs(gives: Sequence[str], ports: Sequence[Port]) -> tuple[Output, ...]:
    """One output per product type: collections extend what the stage takes; particles without a port are born here."""
    parts: dict[str, dict[str, None]] = {}
    for name in gives:
        place = part_of(name)
        if place is not None:
            parts.setdefault(place[0], {})[place[1]] = None
    taken = {p.type: p.name for p in ports}
    out = []
    for product, found in sorted(parts.items(), key=lambda item: list(PARTS).index(item[0])):
        on = taken.get(product) if product in COLLECTIONS else None
        births = product == "particles" and on is None
        frame = "same" if product in ("map", "mask") or "pose" in found else ""
        out.append(Output(product, product, tuple(found), on=on, births=births, frame=frame))
    return tuple(out)
