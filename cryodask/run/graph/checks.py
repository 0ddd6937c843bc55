"""Checks beyond types and columns: whether the sources of a step are consistent; and warnings of a plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations

from cryodask.products import COLLECTIONS, PARTS, Product
from cryodask.run.graph.chain import (
    FIRST_CHOICE,
    Chain,
    Draft,
    Step,
    WrongStep,
    as_now,
    is_pinned,
    label_of,
    listed,
    main_port,
    map_ports,
    needed_parts,
    stages_that_give,
    uses_poses,
)
from cryodask.run.graph.choices import chosen_classes
from cryodask.run.graph.rules import is_unknown, wrong_purpose
from cryodask.stage import Output, Port

# --- one input -------------------------------------------------------------------------------------------------------------------


def lacking(draft: Draft, port: Port, product: Product) -> str | None:
    """The first part that a port needs and a product lacks. A part of the particles can stand in for that of their exposures."""
    particles = draft.main("particles")
    for part in needed_parts(port, draft.params):
        of_particles = product.type == "exposures" and particles is not None and part in PARTS["particles"] and part in particles.parts
        if part not in product.parts and not of_particles:
            return part
    return None


def of_another_table(draft: Draft, port: Port, product: Product) -> bool:
    """Whether the exposures come from the table of another import, so that the imported particles do not belong to them."""
    born_here = draft.stage.port("particles") is None and draft.stage.gives_birth(draft.params)
    return born_here and port.type == "exposures" and not {"frames", "micrograph"} & set(product.parts)


def check_input(chain: Chain, draft: Draft, port: Port, product: Product) -> None:
    """Refuse a product that lacks a part or is of a kind that the port does not take."""
    part = lacking(draft, port, product)
    if part is not None:
        raise _without_part(chain, draft, port, product, part)
    if product.type == "particles" and product.copies > 1 and not port.copies:
        raise WrongStep(
            f"{draft.label} takes each particle once, but {product.ref} holds {product.copies} symmetry copies of each. "
            "Add  - contract  before it, or take the set before the expansion."
        )
    if product.type == "particles" and product.subtracted and "image" in port.parts and not port.subtracted:
        raise WrongStep(
            f"{draft.label} needs unsubtracted images, but signal was subtracted from those of {product.ref}. "
            f"Take the particles from before {product.subtracted}, or extract them again."
        )
    if product.type == "particles" and len(product.pose_frames) > 1 and "pose" in needed_parts(port, draft.params):
        align = "Bring them into one frame with align_maps before they are merged, or refine" if "align_maps" in chain.stages else "Refine"
        frames = listed(sorted(product.pose_frames))
        raise WrongStep(f"{draft.label}: the poses of {product.ref} refer to {frames}, which do not overlay. {align} the set first.")
    if product.type == "weights" and None not in (draft.stage.purpose, product.purpose) and product.purpose != draft.stage.purpose:
        raise wrong_purpose(chain, draft, product)


def _without_part(chain: Chain, draft: Draft, port: Port, product: Product, part: str) -> WrongStep:
    """``classify2d needs ctf (CTF of the micrograph), which no earlier step gives. Add ctf before it.``"""
    what = f"({PARTS[product.type].get(part, part)})"
    stages = [name for name in stages_that_give(chain.stages, product.type, part) if name != draft.stage.name]
    if product.type == "map":
        if part in ("half_maps", "fsc"):
            way = f" {listed(stages[:3])} give them." if len(stages) > 1 else f" {stages[0]} gives them." if stages else ""
        else:
            way = " Use the map before it."
        return WrongStep(f"{draft.label} needs the {part.replace('_', '-')} of a map {what}; {product.ref} has none.{way}")
    givers = [s.label for s in chain.steps if any(part in p.parts and p.parts[part] == p.ref for p in s.given(product.type))]
    if givers:
        return WrongStep(
            f"{draft.label} needs {part} {what}; the {product.type} of {product.ref} do not have it. {listed(givers)} "
            f"{'gives' if len(givers) == 1 else 'give'} it on another branch or too late: write from: {{{port.name}: {givers[-1]}}}, "
            f"or move it before {product.ref}."
        )
    first = FIRST_CHOICE.get(f"{product.type}.{part}")
    advised = first if first in chain.stages and first != draft.stage.name else stages[0] if stages else None
    add = f" Add {advised} before it." if advised else ""
    return WrongStep(f"{draft.label} needs {part} {what}, which no earlier step gives.{add}")


# --- the inputs of a step together ---------------------------------------------------------------------------------------------------


def check_step(chain: Chain, draft: Draft, outputs: Sequence[Output]) -> None:
    """Refuse inconsistent sources, then call the stage's own check."""
    _check_movies_come_once(chain, draft)
    _check_frames_of_poses(chain, draft)
    _check_frame_of_mask(chain, draft)
    _check_frame_of_model(draft, outputs)
    _check_exposures_of_particles(draft)
    _check_chosen_classes(chain, draft)
    if draft.stage.check is not None:
        inputs = {name: list(products) for name, products in draft.inputs.items()}
        for sentence in draft.stage.check(draft.params, inputs):
            raise WrongStep(f"{draft.label}: {sentence}")
    _check_union(chain, draft, outputs)


def _check_chosen_classes(chain: Chain, draft: Draft) -> None:
    """Chosen class numbers must exist, and belong to one classification."""
    particles = draft.main("particles")
    for part, numbers in chosen_classes(draft.params, particles.parts if particles is not None else ()).items():
        classes = draft.main("classes") or _classes_behind(chain, draft, particles, part)
        wrong = [n for n in numbers if classes is not None and classes.count and not 1 <= n <= classes.count]
        if classes is not None and wrong:
            raise WrongStep(
                f"{draft.label}: there is no class {', '.join(map(str, wrong))}: {classes.ref} has {classes.count}, numbered from 1. "
                "Choose among those."
            )


def _classes_behind(chain: Chain, draft: Draft, particles: Product | None, part: str) -> Product | None:
    """The classes to which the class numbers of particles belong, if the plan knows them."""
    giver = particles.parts.get(part, "") if particles is not None else ""
    step = chain.by_label.get(label_of(giver)) if giver and not is_pinned(giver) else None
    if step is None:
        return None
    sets = [p for products in step.inputs.values() for p in products if p.type == "particles"]
    merged = list(dict.fromkeys(p.parts[part] for p in sets if part in p.parts))
    if len(merged) > 1:
        raise WrongStep(
            f"{draft.label}: the classes of {giver} come from {listed(merged)}, so a number means several classes. "
            f"Choose classes before {step.label}."
        )
    return next((p for p in step.outputs.values() if p.type == "classes"), None)


def _check_movies_come_once(chain: Chain, draft: Draft) -> None:
    """Only one step may read the movies of `inputs`."""
    first = next((s for s in chain.steps if s.stage is draft.stage), None)
    if first is not None and not draft.stage.ports and "movie" in draft.stage.gives:
        raise WrongStep(f"{draft.label}: {first.label} already reads all movies of inputs. Remove this step.")


def _check_frames_of_poses(chain: Chain, draft: Draft) -> None:
    """Poses and map, and the poses of two compared sets, must refer to one frame."""
    particles = draft.main("particles")
    if particles is None or not uses_poses(draft.stage, draft.params, particles) or not particles.pose_frames:
        return
    maps = [m for port in map_ports(draft.stage) for m in draft.inputs.get(port.name, ()) if m.frame is not None]
    for m in maps:
        frames = listed(sorted(particles.pose_frames))
        text = f"{draft.label}: the poses of {particles.ref} refer to {frames}, the map of {m.ref} to {m.frame}"
        if particles.pose_frames == {m.frame}:
            continue
        if not any(map(is_unknown, (str(m.frame), *particles.pose_frames))):
            raise WrongStep(
                f"{text}, which do not overlay. Take both from one refinement, or refine {particles.ref} against {m.ref} first."
            )
        chain.warnings.append(
            f"{text}: whether they overlay is checked on the first particles. "
            f"Give import_map: {{frame_of: {particles.parts.get('pose', particles.ref)}}} where they come from one refinement."
        )
    for other in _other_posed_sets(draft):
        text = (
            f"{draft.label}: the poses of {particles.ref} refer to {listed(sorted(particles.pose_frames))}, "
            f"those of {other.ref} to {listed(sorted(other.pose_frames))}"
        )
        if other.pose_frames == particles.pose_frames:
            continue
        if not any(map(is_unknown, particles.pose_frames | other.pose_frames)):
            refine = "Refine one of them against the map of the other first."
            align = "Bring one of them into the frame of the other with align_maps." if "align_maps" in chain.stages else refine
            raise WrongStep(f"{text}: they cannot be compared. {align}")
        chain.warnings.append(f"{text}: whether they can be compared is checked on the first particles.")


def _other_posed_sets(draft: Draft) -> Iterator[Product]:
    main = main_port(draft.stage, "particles")
    for port in draft.stage.ports:
        if port is not main and port.type == "particles" and "pose" in port.parts:
            yield from (p for p in draft.inputs.get(port.name, ()) if p.pose_frames)


def _check_frame_of_mask(chain: Chain, draft: Draft) -> None:
    """A mask must be in the frame of the step's map."""
    base = draft.main("map")
    for port in draft.stage.ports:
        for mask in draft.inputs.get(port.name, ()) if port.type == "mask" and base is not None else ():
            if base is None or mask.frame == base.frame or mask.frame is None or base.frame is None:
                continue
            made_on = f"was made on the map of {mask.frame}"
            text = f"{draft.label}: the mask of {mask.ref} {made_on}, but {base.ref} is in the frame of {base.frame}."
            if not is_unknown(mask.frame) and not is_unknown(base.frame):
                raise WrongStep(f"{text} Make a mask from {base.ref}.")
            chain.warnings.append(f"{text} Whether they overlay is checked when the step starts.")


def _check_frame_of_model(draft: Draft, outputs: Sequence[Output]) -> None:
    """A model must be in the frame of the step's map, except in a step that docks it."""
    base = draft.main("map")
    if base is None or any(o.type == "model" for o in outputs):
        return
    for port in draft.stage.ports:
        for model in draft.inputs.get(port.name, ()) if port.type == "model" else ():
            if model.frame != base.frame:
                raise WrongStep(
                    f"{draft.label}: the model of {model.ref} is not in the frame of the map of {base.ref}. Add  - dock  before it."
                )


def _check_exposures_of_particles(draft: Draft) -> None:
    """Particles must come from the exposures in which they were picked."""
    exposures, particles = draft.main("exposures"), draft.main("particles")
    if exposures is not None and particles is not None and not exposures.sources & particles.sources:
        raise WrongStep(
            f"{draft.label}: the particles of {particles.ref} were picked in the exposures of {listed(sorted(particles.sources))}, "
            f"not in those of {exposures.ref}."
        )


def _check_union(chain: Chain, draft: Draft, outputs: Sequence[Output]) -> None:
    """Merged sets must agree in copies, images, and the values of shared exposures."""
    lists = [p.name for p in draft.stage.ports if p.many and p.type == "particles" and any(o.on == p.name for o in outputs)]
    for name in lists:
        sets = draft.inputs.get(name, ())
        refs = listed(p.ref for p in sets)
        if len({p.copies for p in sets}) > 1:
            raise WrongStep(f"{draft.label}: {refs} cannot be merged: one holds symmetry copies, the other does not. Contract first.")
        if len({p.subtracted for p in sets}) > 1:
            raise WrongStep(
                f"{draft.label}: {refs} cannot be merged, because signal was subtracted from the images of some only. "
                "Take the sets from before the subtraction, or subtract from the merged set."
            )
        if any(a.image and b.image and not a.image.is_like(b.image) for a, b in combinations(sets, 2)):
            known = listed(_images(p) for p in sets if p.image is not None)
            raise WrongStep(
                f"{draft.label}: the images differ: {known}. Merge before extraction, or extract both with the same parameters."
            )
        apart = values_apart(as_now([p.exposures for p in sets if p.exposures is not None]))
        if apart and draft.main("exposures") is None:
            where = sorted({p.exposures.ref for p in sets if p.exposures is not None})
            values = listed(f"{part} by {listed(sorted(givers))}" for part, givers in sorted(apart.items()))
            raise WrongStep(
                f"{draft.label}: the sources hold different values for the same exposures ({values}). "
                f"Choose one: from: {{exposures: {where[0]}}}."
            )
        _check_images(chain, draft, sets)
        frames = sorted(frozenset[str]().union(*(p.pose_frames for p in sets)))
        if len(frames) > 1:
            chain.warnings.append(
                f"{draft.label}: poses refer to {listed(frames)}. Steps that need one frame will refuse this set until it is refined again."
            )


def _check_images(chain: Chain, draft: Draft, sets: Sequence[Product]) -> None:
    """Two extractions of the same particles give two images of each. After selections, only a run knows whether particles are shared."""
    if getattr(draft.params, "prefer", "") is not None:
        return
    for a, b in combinations(sets, 2):
        x, y = (p.parts.get("image", "") for p in (a, b))
        if x == y or not x or not y or is_pinned(x) or is_pinned(y) or not _share_particles(chain, a, b):
            continue
        first, second = (chain.by_label[label_of(ref)] for ref in (x, y))
        if (first.stage, first.params) != (second.stage, second.params):
            raise WrongStep(
                f"{draft.label}: {a.ref} and {b.ref} have different images of the same particles, extracted by {x} and by {y}. "
                f"Choose one: {draft.stage.name}: {{prefer: {a.name}}} or {{prefer: {b.name}}}."
            )


def _share_particles(chain: Chain, a: Product, b: Product) -> bool:
    """Whether one set was extracted from an ancestor of the other; extraction only drops particles at the border."""
    return any(_before(chain, one, cuts=True)[-1] in _before(chain, other, cuts=False) for one, other in ((a, b), (b, a)))


def _before(chain: Chain, product: Product, *, cuts: bool) -> list[str]:
    """References of a set and its single-parent ancestors; with ``cuts``, only as far as it was extracted and not selected."""
    found = [product.ref]
    while not product.pinned:
        giver = chain.by_label[product.step]
        before = giver.inputs.get("particles", ())
        selects = product.ids == product.ref and product.parts.get("image") != product.ref
        if len(before) != 1 or (selects and cuts):
            break
        product = before[0]
        found.append(product.ref)
    return found


def _images(product: Product) -> str:
    fact = product.image
    if fact is None:
        return product.ref
    figures = {"box": fact.box, "scaled to": fact.size, "pixel size in A": fact.pixel_size_angstrom}
    return f"{product.ref} ({', '.join(f'{name} {value:g}' for name, value in figures.items() if value is not None)})"


def values_apart(sets: Sequence[Product]) -> dict[str, set[str]]:
    """Parts for which two branches have different values of the same exposures, with their givers."""
    apart: dict[str, set[str]] = {}
    for a, b in combinations(sets, 2):
        in_line = (a.ref in b.line | {b.ref} or b.ref in a.line) and a.at == b.at
        if not a.sources & b.sources or in_line:
            continue
        for part in a.parts.keys() & b.parts.keys():
            if a.parts[part] != b.parts[part]:
                apart.setdefault(part, set()).update((a.parts[part], b.parts[part]))
    return apart


# --- warnings ------------------------------------------------------------------------------------------------------------------------


def unused(chain: Chain) -> Iterator[str]:
    """Rule 9: a birth, selection, exposures, mask or first map that nothing uses although a later step takes another of its type."""
    for place, step in enumerate(chain.steps):
        later = chain.steps[place + 1 :]
        taken = {(p.type, p.ref) for t in later for products in t.inputs.values() for p in products}
        for (name, type_), product in step.outputs.items():
            told = type_ == "map" and product.ref in chain.beside
            if name != type_ or told or (type_, product.ref) in taken or not _worth_a_warning(step, product):
                continue
            others = ((t, port, p) for t in later for port in sorted(t.implicit) for p in t.inputs[port] if p.type == type_)
            found = next(((t, port, p) for t, port, p in others if product.ref not in p.behind and p.step != step.label), None)
            if found is not None:
                t, port, p = found
                yield (
                    f"Nothing uses the {type_} of {step.label}: {t.label} uses {'those' if type_ in COLLECTIONS else 'that'} of {p.ref}. "
                    f"Write from: {{{port}: {step.label}}} if you meant {'these' if type_ in COLLECTIONS else 'this one'}."
                )


def _worth_a_warning(step: Step, product: Product) -> bool:
    taken = {p.type for products in step.inputs.values() for p in products}
    if product.type == "particles":
        return product.ids == product.ref
    if product.type == "exposures":
        return "particles" not in taken
    first_map = product.type == "map" and "map" not in taken and not step.given("particles") and not _reads_poses(step)
    return product.type == "mask" or first_map


def _reads_poses(step: Step) -> bool:
    """Whether a step needs poses, as a reconstruction does."""
    return any("pose" in needed_parts(port, step.params) for port in step.stage.ports)
