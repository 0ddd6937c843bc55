"""Groups consecutive per-exposure steps into one task, as long as their inputs are known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cryodask.run.graph.chain import is_pinned, label_of
from cryodask.run.recipe import Plan, Step
from cryodask.run.refs import IMAGES_OF_PARTICLES, parts_used


def chains_of(plan: Plan, steps: Sequence[Step], *, watching: bool = False) -> Iterator[list[Step]]:
    """Yield consecutive per-exposure steps as one chain, and all other steps singly.

    A step whose particles were extracted or selected by a step of the chain starts a new chain, because they are known only
    when that step is done. So does a step on exposures of other sources. Particles that a step of the chain picks are known to the worker
    that has the exposure, and so are those that it edits: ``watching``, the steps behind them keep up with the session. Else they wait,
    and find what exists already of the particles that remain the same.
    """
    chain: list[Step] = []
    for step in steps:
        if step.stage.shape != "map" or _waits_for(plan, step, chain, watching) or (chain and _sources_of(step) != _sources_of(chain[0])):
            if chain:
                yield chain
            chain = []
        if step.stage.shape != "map":
            yield [step]
        else:
            chain.append(step)
    if chain:
        yield chain


def _sources_of(step: Step) -> frozenset[str]:
    """Sources of the exposures of a step."""
    exposures = next(iter(step.inputs.get("exposures", ())), None) or step.outputs.get(("exposures", "exposures"))
    return exposures.sources if exposures is not None else frozenset()


def _waits_for(plan: Plan, step: Step, chain: list[Step], watching: bool) -> bool:
    here = {s.label for s in chain}
    for product in step.inputs.get("particles", ()):
        given = (product.ids, *(product.parts[p] for p in product.parts if p in _used(step)))
        refs = {label_of(ref) for ref in given if not is_pinned(ref)}
        # where images are stored is known only when their step is done
        if IMAGES_OF_PARTICLES in step.stage.needs and refs & here:
            return True
        # only what a single step has stored of its particles is read back together
        if refs & here and (len(refs) > 1 or not _known_to_the_worker(plan.graph.step(*refs), watching)):
            return True
    return False


def _known_to_the_worker(step: Step, watching: bool) -> bool:
    """Whether a step stores a table of all its particles with each exposure; of those that it takes from others only if ``watching``."""
    return step.stage.gives_birth(step.params) and (watching or not step.inputs.get("particles"))


def _used(step: Step) -> tuple[str, ...]:
    port = step.stage.port("particles")
    return parts_used(step, port) if port is not None else ()
