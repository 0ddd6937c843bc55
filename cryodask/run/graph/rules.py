"""Rules 2 to 6: where an input comes from without ``from``. One function per product type.

A step works on the nearest particles above it; everything else that it needs is what belongs to those particles.
"""

from __future__ import annotations

from collections.abc import Callable

from cryodask.products import Product
from cryodask.run.graph.chain import (
    Chain,
    Draft,
    WrongStep,
    label_of,
    labels_of,
    listed,
    main_port,
    map_ports,
    of_the_same_time,
    one,
    several,
    uses_poses,
    who_gives,
)
from cryodask.stage import Port

FILLED_FIRST = ("particles", "exposures", "map")
"""Order in which ports are filled, because later rules depend on the earlier ports."""


def take(chain: Chain, draft: Draft, port: Port) -> Product | None:
    """The product that a port takes by default; None if there is none, or if the port has no default."""
    if port.many or port.default != "related":
        return None
    return _RULES.get(port.type, nearest)(chain, draft, port)


def nearest(chain: Chain, draft: Draft, port: Port) -> Product | None:
    """The product of the nearest step above."""
    given = chain.given(port.type)
    return given[0] if given else None


def nearest_particles(chain: Chain, draft: Draft, port: Port) -> Product | None:
    """Rule 2: the particles of the nearest step above; if that step gives classes, ``from`` must choose."""
    given = chain.given("particles")
    if not given:
        return None
    giver = chain.giver(given[0])
    sets = giver.given("particles")
    whole = next((p for p in sets if p.output == "particles"), sets[0] if len(sets) == 1 else None)
    if whole is not None and (port.whole or not whole.partition):
        _warn_of_classes_passed_on(chain, draft, port, whole)
        return whole
    names = [p.ref for p in sets if p is not whole]
    all_of_them = f"{giver.label} for all" if whole is not None else ""
    if not names:
        raise WrongStep(
            f"{draft.label}: which particles? {giver.label} gives classes. Write from: {{{port.name}: {giver.label}}} for all of them."
        )
    raise WrongStep(
        f"{draft.label}: which particles? {giver.label} gives {'all of them and ' if all_of_them else ''}{listed(names)}. "
        f"Write from: {{{port.name}: {names[0]}}}{f', or {all_of_them}' if all_of_them else ''}."
    )


def _warn_of_classes_passed_on(chain: Chain, draft: Draft, port: Port, particles: Product) -> None:
    """Warn if a step (``annotate``, ``variability``) passed on all classes by default, and this step takes them."""
    if port.whole:
        return
    product = particles
    while product.ids != product.ref:
        giver = chain.giver(product)
        passes_on = main_port(giver.stage, "particles")
        if passes_on is None or passes_on.name not in giver.implicit or not passes_on.whole:
            return
        product = giver.inputs[passes_on.name][0]
        if product.partition:
            chain.warnings.append(
                f"{draft.label}: takes the particles of {particles.ref}, which are all classes of {product.ref}. "
                f"Write from: {{{port.name}: ...}} if you meant one class."
            )
            return


def exposures_of_particles(chain: Chain, draft: Draft, port: Port) -> Product | None:
    """Rule 3: the exposures of the particles, with what later steps added to exactly these without using particles or maps."""
    particles = draft.main("particles")
    if particles is None:
        return nearest(chain, draft, port)
    base = latest = particles.exposures
    if base is None:
        return None
    for step in chain.steps:
        for own in step.given("exposures"):
            if own.index > base.index and of_the_same_time(own, base.at) and _adds_to(chain, own, base):
                latest = own
    return latest


def _adds_to(chain: Chain, product: Product, base: Product) -> bool:
    """Whether exposures are ``base`` plus additions of steps that read exposures (and networks) only."""
    while product.ref != base.ref:
        giver = chain.giver(product)
        taken = [p for products in giver.inputs.values() for p in products]
        exposures = [p for p in taken if p.type == "exposures"]
        if len(exposures) != 1 or any(p.type not in ("exposures", "weights") for p in taken):
            return False
        product = exposures[0]
    return True


def classes_of_particles(chain: Chain, draft: Draft, port: Port) -> Product | None:
    """Rule 4: the classes of the step that gave the particles their class numbers."""
    particles = draft.main("particles")
    if particles is None:
        return nearest(chain, draft, port)
    numbered = particles.parts.get("class2d")
    found = [c for c in chain.given("classes") if numbered is not None and c.step == label_of(numbered)]
    if not found and numbered is not None and not port.optional:
        raise WrongStep(
            f"{draft.label}: the 2D class numbers of {particles.ref} come from {numbered}, which gives no class averages. "
            "Classify the particles first, or write from: {" + port.name + ": ...}."
        )
    return found[0] if found else None


def related_map(chain: Chain, draft: Draft, port: Port) -> Product | None:
    """Rule 5: the map that belongs to the particles; without particles the nearest one."""
    particles = draft.main("particles")
    at = particles.at if particles is not None else {}
    maps = [m for m in chain.given("map") if {"final", "half_maps"} & m.parts.keys() and (m.step in at or of_the_same_time(m, at))]
    line = particles.line | {particles.ref} if particles is not None else frozenset()
    of_a_class = [m for m in maps if _is_of_a_class(chain, m) and m.ref not in line]
    plain = [m for m in maps if all(m is not c for c in of_a_class)]
    if particles is None:
        if of_a_class and (not plain or of_a_class[0].index > plain[0].index):
            raise _which_class(draft, port, of_a_class, plain)
        return plain[0] if plain else None
    with_poses = uses_poses(draft.stage, draft.params, particles)
    related = [m for m in plain if _belongs_to(chain, m, particles)]
    if with_poses and particles.pose_frames:
        related = _in_frame_of_poses(chain, plain, related, particles)
    if not related:
        if of_a_class:
            raise _which_class(draft, port, of_a_class, [])
        if plain:
            where = " in the frame of their poses" if with_poses else ""
            raise WrongStep(
                f"{draft.label}: no map was made from the particles of {particles.ref} or their ancestors{where}. "
                f"Choose one: from: {{{port.name}: ...}}; there are {listed(m.ref for m in plain)}."
            )
        return None
    _refuse_several(chain, draft, port, related, particles)
    _warn_of_twins(chain, draft, port, related, particles)
    return related[0]


def _which_class(draft: Draft, port: Port, of_a_class: list[Product], plain: list[Product]) -> WrongStep:
    giver = of_a_class[0].step
    names = [m.ref for m in of_a_class if m.step == giver]
    return WrongStep(
        f"{draft.label}: which map? {giver} gives {listed(names)}. Write from: {{{port.name}: {names[-1]}}}"
        + (f", or {plain[0].ref}." if plain else ".")
    )


def _is_of_a_class(chain: Chain, product: Product) -> bool:
    """Whether a map is one of several of its step and does not represent the step."""
    return product.output != "map" and sum("final" in m.parts for m in chain.giver(product).given("map")) > 1


def _belongs_to(chain: Chain, product: Product, particles: Product) -> bool:
    """Whether a map is an ancestor of the particles, was made from them or their ancestors, or was imported."""
    line = particles.line | {particles.ref}
    while product.ref not in particles.behind:
        giver = chain.giver(product)
        taken = [p for products in giver.inputs.values() for p in products]
        sets = [p for p in taken if p.type == "particles"]
        if sets:
            return any(p.ref in line for p in sets)
        maps = [p for p in taken if p.type == "map"]
        if not maps:
            return True
        product = maps[0]
    return True


def _in_frame_of_poses(chain: Chain, plain: list[Product], related: list[Product], particles: Product) -> list[Product]:
    """Of the related maps: the one that the poses refer to, those made from it without particles, those reconstructed with these poses."""
    anchor = _map_of_poses(chain, particles)
    if anchor is not None:
        candidates = [m for m in plain if m.ref == anchor.ref or any(m is r for r in related)]
        found = [m for m in candidates if m.frame in particles.pose_frames and _with_these_poses(chain, m, anchor, particles)]
        if found:
            return found
    overlaid = [m for m in related if m.frame in particles.pose_frames]
    if overlaid or anchor is not None or not all(is_unknown(f) for f in particles.pose_frames):
        return overlaid
    # imported poses with imported maps: the data show later whether they overlay
    return [m for m in related if m.frame is not None and is_unknown(m.frame)]


def is_unknown(frame: str) -> bool:
    """Whether a frame is that of an import, and therefore unknown."""
    return "(unknown)" in frame


def _map_of_poses(chain: Chain, particles: Product) -> Product | None:
    """The map that the poses refer to: that of the step that gave them, or the one that this step took."""
    giver = chain.by_label.get(label_of(particles.parts.get("pose", "")))
    if giver is None:
        return None
    own = giver.outputs.get(("map", "map"))
    if own is not None and "final" in own.parts:
        return own
    taken = [m for port in map_ports(giver.stage) if not port.many for m in giver.inputs.get(port.name, ())]
    return taken[0] if taken else None


def _with_these_poses(chain: Chain, product: Product, anchor: Product, particles: Product) -> bool:
    """Whether a map is ``anchor``, was made from it without particles, or was reconstructed with exactly these poses."""
    while product.ref != anchor.ref:
        giver = chain.giver(product)
        sets = giver.inputs.get("particles", ())
        if sets:
            poses = particles.parts["pose"]
            given = giver.given("particles")
            return sets[0].parts.get("pose") == poses and all(p.parts.get("pose") == poses for p in given)
        maps = giver.inputs.get("map", ())
        if not maps:
            return False
        product = maps[0]
    return True


def _refuse_several(chain: Chain, draft: Draft, port: Port, related: list[Product], particles: Product) -> None:
    """Refuse several unrelated maps behind one (merged) set: the step must choose."""
    before = particles.behind | {particles.ref}
    if related[0].ref not in before:
        return
    behind = [m for m in related if m.ref in before]
    passed = _made_from(chain, behind[0])
    beside = [m for m in behind[1:] if m.ref not in passed]
    rivals = [behind[0]]
    if beside:
        passed = passed.union(*(_made_from(chain, m) for m in beside))
        rivals = [m for m in behind if m.ref not in passed]
    if len(rivals) > 1:
        names = sorted(m.ref for m in rivals)
        raise WrongStep(
            f"{draft.label}: which map? The particles of {particles.ref} come from {listed(names)}. "
            f"Write from: {{{port.name}: {rivals[0].ref}}}."
        )


def _made_from(chain: Chain, product: Product) -> set[str]:
    """References of what a product was made from; not of inputs for comparison (filled by name only)."""
    found: set[str] = set()
    waiting = [product]
    while waiting:
        giver = chain.giver(waiting.pop())
        for port in giver.stage.ports:
            if port.default == "explicit" and not port.many:
                continue
            for p in giver.inputs.get(port.name, ()):
                key = f"{p.type} {p.ref}"
                if key not in found:
                    found.add(key)
                    waiting.append(p)
    return {key.partition(" ")[2] for key in found if key.startswith("map ")}


def _warn_of_twins(chain: Chain, draft: Draft, port: Port, related: list[Product], particles: Product) -> None:
    """Warn if another map was made in the same way from the same set as the chosen one."""
    chosen = related[0]
    if chosen.step in labels_of(particles.behind):
        return
    made_from = labels_of(chosen.behind)
    stage, set_ = chain.giver(chosen).stage, _set_of_map(chain, chosen)
    twins = [
        m
        for m in related[1:]
        if m.step != chosen.step and m.step not in made_from and chain.giver(m).stage is stage and _set_of_map(chain, m) == set_
    ]
    if twins:
        chain.beside.update(m.ref for m in twins)
        stand = "stands" if len(twins) == 1 else "stand"
        chain.warnings.append(
            f"{draft.label}: map taken from {chosen.ref}; {listed(m.ref for m in twins)} {stand} beside it. "
            f"Say from: {{{port.name}: {twins[0].ref}}} if that one is meant."
        )


def _set_of_map(chain: Chain, product: Product) -> str:
    """Reference of the particles that a map, or the map it was made from, was computed from; "" for an imported map."""
    while True:
        giver = chain.giver(product)
        sets = giver.inputs.get("particles", ())
        if sets:
            return sets[0].ref
        maps = giver.inputs.get("map", ())
        if not maps:
            return ""
        product = maps[0]


def mask_in_frame(chain: Chain, draft: Draft, port: Port) -> Product | None:
    """Rule 6: the nearest mask in the frame of the step's map."""
    given = chain.given("mask")
    base = draft.main("map")
    fitting = [m for m in given if base is None or m.frame == base.frame]
    if given and not fitting and base is not None and not port.optional:
        raise WrongStep(
            f"{draft.label}: no mask is in the frame of {base.ref}. {given[0].ref} belongs to another map. "
            f"Make one:  - mask: {{from: {{map: {base.ref}}}}}"
        )
    return fitting[0] if fitting else None


def weights_of_purpose(chain: Chain, draft: Draft, port: Port) -> Product | None:
    """Rule 6: the nearest network trained for the purpose of the stage."""
    given = chain.given("weights")
    purpose = draft.stage.purpose
    fitting = [w for w in given if purpose is None or w.purpose == purpose]
    if given and not fitting and not port.optional:
        raise wrong_purpose(chain, draft, given[0])
    return fitting[0] if fitting else None


def wrong_purpose(chain: Chain, draft: Draft, weights: Product) -> WrongStep:
    """Problem of a network trained for another purpose."""
    trainers = [name for name, stage in chain.stages.items() if stage.purpose == draft.stage.purpose and name != draft.stage.name]
    train = f"Add {trainers[0]} before it." if trainers else "Train one first."
    return WrongStep(f"{draft.label}: {weights.ref} was trained to {weights.purpose}, not to {draft.stage.purpose}. {train}")


def missing(chain: Chain, draft: Draft, port: Port) -> WrongStep:
    """Rule 9, no silent fallback: the problem of a required input for which no rule found a source."""
    who = who_gives(chain, draft, port.type)
    if port.default != "related" or port.many:
        example = "[STEP, STEP]" if port.many else "STEP"
        return WrongStep(f"{draft.label}: input {port.name} has no default. Write from: {{{port.name}: {example}}}.{who}")
    particles = draft.main("particles")
    if port.type == "exposures" and particles is not None:
        return WrongStep(
            f"{draft.label} needs exposures, but the particles of {particles.ref} were imported without their micrographs. "
            "Import the micrographs first."
        )
    if chain.given(port.type):
        owner = f" of {particles.ref}" if particles is not None else ""
        kind = several(port.type)
        return WrongStep(f"{draft.label}: no {kind} belong to the particles{owner}. Write from: {{{port.name}: STEP}}.{who}")
    none = "one" if port.type in ("map", "mask", "model") else "any"
    return WrongStep(f"{draft.label} needs {one(port.type)}, but no earlier step gives {none}.{who}")


_RULES: dict[str, Callable[[Chain, Draft, Port], Product | None]] = {
    "particles": nearest_particles,
    "exposures": exposures_of_particles,
    "classes": classes_of_particles,
    "map": related_map,
    "mask": mask_in_frame,
    "weights": weights_of_purpose,
}
