"""The products of a step with their parts and facts, derived from its inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from cryodask.products import COLLECTIONS, ImageFact, Product, place_named
from cryodask.run.graph.chain import Chain, Draft, WrongStep, as_now, label_of, labels_of, map_ports, near
from cryodask.stage import Output
from cryodask.stages._symmetry import order_of

_ORDER = {"exposures": 0, "map": 1, "particles": 2}
"""Order of derivation: particles after the products that their facts come from."""


def give(
    chain: Chain, draft: Draft, declared: Sequence[Output], pixel_sizes: Mapping[str, frozenset[float]]
) -> dict[tuple[str, str], Product]:
    """Products of a step by (output, type), in the order of declaration."""
    outputs = [o for o in declared if _is_given(draft, o)]
    made: dict[tuple[str, str], Product] = {}
    union = _exposures_of_union(chain, draft, outputs)
    if union is not None and union.step == draft.label:
        made["exposures", "exposures"] = union
    for out in sorted(outputs, key=lambda o: (_ORDER.get(o.type, 3), not o.partition)):
        product = _bare(chain, draft, out, made)
        if out.type == "exposures":
            made[out.name, out.type] = _with_facts_of_exposures(draft, out, product, pixel_sizes)
        elif out.type == "particles":
            made[out.name, out.type] = _with_facts_of_particles(chain, draft, out, product, made, union)
        else:
            made[out.name, out.type] = _with_facts_of_maps(chain, draft, out, product, outputs)
    order = [key for key in made if key not in {(o.name, o.type) for o in outputs}] + [(o.name, o.type) for o in outputs]
    return {key: made[key] for key in order}


def _is_given(draft: Draft, out: Output) -> bool:
    """Whether an output exists: one on an optional input needs that input; exposures of an import only if it was given none."""
    if out.on is not None:
        return bool(draft.inputs.get(out.on))
    return out.type != "exposures" or draft.main("exposures") is None


def _base(draft: Draft, out: Output) -> tuple[Product, ...]:
    return draft.inputs.get(out.on, ()) if out.on is not None else ()


def _partition_of(draft: Draft, out: Output, made: Mapping[tuple[str, str], Product]) -> Product | None:
    """For a single class of particles: the set of all classes from the same step."""
    if out.type != "particles" or not out.subset:
        return None
    return next((p for (_, t), p in made.items() if t == "particles" and p.partition and p.step == draft.label), None)


def _bare(chain: Chain, draft: Draft, out: Output, made: Mapping[tuple[str, str], Product]) -> Product:
    """A product with its parts and its position in the chain."""
    ref = draft.label if out.name == out.type else f"{draft.label}.{out.name}"
    taken = [p for products in draft.inputs.values() for p in products]
    behind = frozenset[str]().union(*(p.behind | {p.ref} for p in taken)) if taken else frozenset()
    base = _base(draft, out)
    whole = _partition_of(draft, out, made)
    parts = dict(whole.parts) if whole is not None else _inherited_parts(chain, base, out, ref)
    parts = {part: giver for part, giver in parts.items() if part not in out.drops} | dict.fromkeys(out.parts, ref)
    line = frozenset[str]().union(*(b.line | {b.ref} for b in base)) if base else frozenset()
    if whole is not None:
        line |= {whole.ref}
    settles = not base or len(base) > 1 or _on_a_list(draft, out) or out.subset or out.births or bool(out.copies)
    ids = "" if out.type not in COLLECTIONS else ref if settles else base[0].ids
    places = _places_of(_by_preference(draft, base)) if len(base) > 1 else _places_of(base or taken)
    at = {label: place for label, place in places.items() if label != draft.label}
    threshold = base[0].threshold if base and ids == base[0].ids else None
    return Product(
        out.type, draft.label, out.name, len(chain.steps), parts, ids, behind, line, partition=out.partition, at=at, threshold=threshold
    )


def _places_of(products: Sequence[Product]) -> dict[str, str]:
    """Places of all pinned ancestors of some products; where two differ, that of the first product.

    Ancestors that the first product uses in their current state are not pinned.
    """
    out: dict[str, str] = {}
    for product in reversed(products):
        now = labels_of(product.behind) | {product.step}
        out = {label: place for label, place in out.items() if label not in now} | product.at
    return out


def _by_preference(draft: Draft, base: Sequence[Product]) -> list[Product]:
    """Merged sets, preferred one first."""
    prefer = getattr(draft.params, "prefer", None)
    first = place_named(prefer, [p.name for p in base]) if prefer is not None else None
    return [base[i] for i in sorted(range(len(base)), key=lambda i: i != first)]


def _on_a_list(draft: Draft, out: Output) -> bool:
    port = draft.stage.port(out.on) if out.on is not None else None
    return port is not None and port.many


def _inherited_parts(chain: Chain, base: Sequence[Product], out: Output, ref: str) -> dict[str, str]:
    """Parts inherited from what an output extends: the common ones of several sets; for copies, those that do not belong to a copy."""
    if out.copies == "contract":
        return _parts_without_copies(chain, base, ref)
    return _common_parts(base, ref)


def _common_parts(base: Sequence[Product], ref: str) -> dict[str, str]:
    """Parts that all sets have; a part given by several steps becomes the union's own."""
    if not base:
        return {}
    common = [part for part in base[0].parts if all(part in b.parts for b in base)]
    return {part: base[0].parts[part] if len({b.parts[part] for b in base}) == 1 else ref for part in common}


def _parts_without_copies(chain: Chain, base: Sequence[Product], ref: str) -> dict[str, str]:
    """Parts from before the expansion: what was computed for copies (subtracted images, classes) does not hold for the parent."""
    return _common_parts(originals(chain, base), ref)


def originals(chain: Chain, base: Sequence[Product]) -> list[Product]:
    """The sets before symmetry expansion; the sets themselves if there are no copies."""
    found: dict[str, Product] = {}
    for product in base:
        for ref in (*sorted(product.line), product.ref):
            on_line = chain.products.get(("particles", ref))
            if on_line is not None and on_line.copies > 1:
                taken = chain.giver(on_line).inputs.values()
                before = [p for products in taken for p in products if p.type == "particles" and p.copies == 1]
                found |= {p.ref: chain.beside_pinned(p, product.at) for p in before}
    return list(found.values()) or list(base)


# --- exposures -----------------------------------------------------------------------------------------------------------------


def _with_facts_of_exposures(draft: Draft, out: Output, product: Product, pixel_sizes: Mapping[str, frozenset[float]]) -> Product:
    base = draft.main("exposures")
    if base is None:
        return replace(product, sources=frozenset({draft.label}), pixel_sizes=pixel_sizes.get(draft.label, out.pixel_sizes))
    return replace(product, sources=base.sources, pixel_sizes=base.pixel_sizes)


def _exposures_of_union(chain: Chain, draft: Draft, outputs: Sequence[Output]) -> Product | None:
    """Exposures of a union of particle sets: those given by ``from``, those that all sets share, or the union of several."""
    out = next((o for o in outputs if o.type == "particles" and _on_a_list(draft, o)), None)
    if out is None:
        return None
    given = draft.main("exposures")
    behind = [p.exposures for p in _base(draft, out) if p.exposures is not None]
    sets = list({(p.ref, *sorted(p.at.items())): p for p in as_now(behind)}.values())
    if given is not None or not sets:
        return given
    latest = max(sets, key=lambda p: p.index)
    if all(p.ids == latest.ids and (p is latest or p.ref in latest.line) for p in sets):
        return latest
    ids = {p.ids for p in sets}
    return Product(
        "exposures",
        draft.label,
        "exposures",
        len(chain.steps),
        _parts_of_united_exposures(chain, sets, draft.label),
        ids.pop() if len(ids) == 1 else draft.label,
        frozenset[str]().union(*(p.behind | {p.ref} for p in sets)),
        frozenset[str]().union(*(p.line | {p.ref} for p in sets)),
        sources=frozenset[str]().union(*(p.sources for p in sets)),
        pixel_sizes=frozenset[float]().union(*(p.pixel_sizes for p in sets)),
        at=_places_of(sets),
    )


def _parts_of_united_exposures(chain: Chain, sets: Sequence[Product], ref: str) -> dict[str, str]:
    """Parts that all sets have, or that were given for all exposures of all sets (from the latest giver)."""
    parts: dict[str, str] = {}
    for part in dict.fromkeys(part for p in sets for part in p.parts):
        holders = sorted((p for p in sets if part in p.parts), key=lambda p: p.index)
        giver = holders[-1].parts[part]
        given = chain.products.get(("exposures", giver))
        if given is not None and all(given.ids == p.ids or given.ids in p.line for p in sets):
            parts[part] = giver
        elif len(holders) == len(sets):
            parts[part] = giver if len({p.parts[part] for p in holders}) == 1 else ref
    return parts


# --- particles -----------------------------------------------------------------------------------------------------------------


def _with_facts_of_particles(
    chain: Chain, draft: Draft, out: Output, product: Product, made: Mapping[tuple[str, str], Product], union: Product | None
) -> Product:
    base = _base(draft, out)
    first = base[0] if base else None
    own = next((p for (_, t), p in made.items() if t == "exposures"), None)
    exposures = own or union or draft.main("exposures") or (first.exposures if first else None)
    sources = frozenset[str]().union(*(b.sources for b in base)) if base else exposures.sources if exposures else frozenset({draft.label})
    births = frozenset[str]().union(*(b.births for b in base))
    if out.births or first is None:
        births |= {draft.label}
    before = originals(chain, base) if out.copies == "contract" else list(base)
    copies = 1
    if out.copies == "expand":
        copies = order_of(point_group(draft))
    elif out.copies != "contract":
        copies = max((b.copies for b in base), default=1)
    subtracted = next((b.subtracted for b in before if b.subtracted), None)
    if "image" in out.parts:
        subtracted = draft.label if out.subtracted else None
    posed = "pose" in out.parts or (out.subset and product.parts.get("pose") == draft.label)
    return replace(
        product,
        exposures=exposures,
        sources=sources,
        births=births,
        copies=copies,
        subtracted=subtracted,
        image=_image(draft, out, before, exposures),
        pose_frames=_pose_frames(chain, draft, out, product, before, made),
        point_group=(point_group(draft) if posed else before[0].point_group if before else None),
    )


def _pose_frames(
    chain: Chain, draft: Draft, out: Output, product: Product, before: Sequence[Product], made: Mapping[tuple[str, str], Product]
) -> frozenset[str]:
    """The frames that the poses of a set refer to: one, or several after a union."""
    if "pose" not in product.parts:
        return frozenset()
    whole = _partition_of(draft, out, made)
    if label_of(product.parts["pose"]) == draft.label and not _on_a_list(draft, out):
        own_map = made.get((out.name, "map"))
        if own_map is not None and own_map.frame is not None and (whole is not None or out.frame == "same"):
            return frozenset({own_map.frame})
        if whole is not None:
            return whole.pose_frames
        if out.frame == "same":
            references = _reference_frames(draft)
            if references:
                return references
            if any(p.unless for p in map_ports(draft.stage)):
                return frozenset({draft.label})
            return frozenset[str]().union(*(b.pose_frames for b in before)) or frozenset({draft.label})
        if out.frame.startswith("as:"):
            return frozenset({_frame_as(chain, draft, out.frame[3:])})
        if out.frame:
            return frozenset({_frame_named(draft, out.frame, draft.label)})
    return frozenset[str]().union(*(b.pose_frames for b in before)) or frozenset({draft.label})


def _image(draft: Draft, out: Output, before: Sequence[Product], exposures: Product | None) -> ImageFact | None:
    """Image facts: of this step's extraction, or of the set that it extends."""
    inherited = next((b.image for b in before if b.image is not None), None)
    if "image" not in out.parts or out.subtracted:
        return inherited
    source = exposures.ref if exposures is not None else draft.label
    if out.births:
        return ImageFact(source, None, *(out.image or (None, None)))
    pixels = sorted(exposures.pixel_sizes) if exposures is not None else []
    pixel = pixels[0] if len(pixels) == 1 else None
    size, wanted = _number(draft, "scale_to", "scale_to_px"), _number(draft, "pixel_size_angstrom")
    box, length = _number(draft, "box", "box_px"), _number(draft, "box_angstrom")
    if length is not None:
        box = length / pixel if pixel else length
    if box is None and inherited is not None:
        return replace(inherited, source=source)
    if wanted is None and pixel is not None:
        wanted = pixel * box / size if size and box else pixel
    return ImageFact(source, box, int(size) if size else None, wanted)


def _number(draft: Draft, *names: str) -> float | None:
    values = (getattr(draft.params, name, None) for name in names)
    return next((v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool) and v > 0), None)


# --- maps, masks, models, classes, weights -----------------------------------------------------------------------------------------------


def _with_facts_of_maps(chain: Chain, draft: Draft, out: Output, product: Product, outputs: Sequence[Output]) -> Product:
    if out.type == "classes":
        return replace(product, count=getattr(draft.params, "classes", None) if out.on is None else None)
    if out.type == "weights":
        return replace(product, purpose=draft.stage.purpose)
    base = draft.main("map") or next(iter(_base(draft, out)), None)
    particles = draft.main("particles")
    births = particles.births if particles is not None else base.births if base is not None else frozenset()
    return replace(product, frame=_frame(chain, draft, out, outputs), point_group=point_group(draft), births=births)


def _reference_frames(draft: Draft) -> frozenset[str]:
    """Frames of the maps that a step works in."""
    return frozenset(
        m.frame for port in map_ports(draft.stage) if not port.optional for m in draft.inputs.get(port.name, ()) if m.frame is not None
    )


def _frame(chain: Chain, draft: Draft, out: Output, outputs: Sequence[Output]) -> str:
    """The frame of a map, mask or model."""
    ref = draft.label if out.name == out.type else f"{draft.label}.{out.name}"
    if out.frame.startswith("as:"):
        return _frame_as(chain, draft, out.frame[3:])
    if out.frame not in ("", "same"):
        return _frame_named(draft, out.frame, ref)
    references = _reference_frames(draft)
    if len(references) == 1:
        return next(iter(references))
    if references:  # several references: one class each
        maps = [m for port in map_ports(draft.stage) for m in draft.inputs.get(port.name, ())]
        place = [o.name for o in outputs if o.type == out.type].index(out.name)
        return (maps[place].frame if place < len(maps) else None) or ref
    particles = draft.main("particles")
    if particles is not None and particles.pose_frames and not any(p.unless for p in map_ports(draft.stage)):
        return next(iter(sorted(particles.pose_frames)))
    return ref


def _frame_named(draft: Draft, frame: str, ref: str) -> str:
    """A frame that is new (each class has its own), unknown, mirrored, or that of the input ``to``."""
    if frame == "to":
        to = draft.inputs.get("to", ())
        frames = {f for p in to for f in ((p.frame,) if p.frame else p.pose_frames)}
        return sorted(frames)[0] if frames else ref
    return {"unknown": f"{draft.label} (unknown)", "flipped": f"{draft.label} (mirrored)"}.get(frame, ref)


def _frame_as(chain: Chain, draft: Draft, label: str) -> str:
    """``import_map: {frame_of: STEP}``: the frame of the poses, or of the map, of another step."""
    giver = chain.by_label.get(label)
    if giver is None:
        raise WrongStep(f"{draft.label}: frame_of names {label!r}, but no earlier step has that name.{near(label, chain.by_label)}")
    products = list(giver.outputs.values())
    frames = {f for p in products for f in p.pose_frames} or {p.frame for p in products if p.frame}
    if len(frames) != 1:
        what = "has neither poses nor a map" if not frames else "has poses or maps in several frames"
        raise WrongStep(f"{draft.label}: frame_of names {label}, which {what}. Name the step that gave the poses or the map.")
    return next(iter(frames))


def point_group(draft: Draft) -> str | None:
    """Rule 7: ``symmetry`` defaults to the point group of the map, else that of the poses; copies of an expansion have C1."""
    given: Any = getattr(draft.params, "symmetry", None)
    if given:
        return str(given)
    particles, base = draft.main("particles"), draft.main("map")
    if particles is not None and particles.copies > 1:
        return "C1"
    if base is not None:
        return base.point_group
    groups = {m.point_group for port in map_ports(draft.stage) if port.many for m in draft.inputs.get(port.name, ())}
    if groups:
        return groups.pop() if len(groups) == 1 else None
    return particles.point_group if particles is not None else None
