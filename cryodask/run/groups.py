"""Groups consecutive per-exposure steps into one task, as long as their inputs are known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cryodask.run.graph.chain import is_pinned, label_of
from cryodask.run.recipe import Plan, Step
from cryodask.run.refs import IMAGES_OF_PARTICLES, parts_used


def chains_of(plan: Plan, steps: Sequence[Step]) -> Iterator[list[Step]]:
    """Yield consecutive per-exposure steps as one chain, and all other steps singly.

    A step whose particles were extracted or selected by a step of the chain starts a new chain, because they are known only
    when that step is done. So does a step on exposures of other sources.
    """
    chain: list[Step] = []
    for step in steps:
        if step.stage.shape != "map" or _waits_for(plan, step, chain) or (chain and _sources_of(step) != _sources_of(chain[0])):
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


def _waits_for(plan: Plan, step: Step, chain: list[Step]) -> bool:
    here = {s.label for s in chain}
    for product in step.inputs.get("particles", ()):
        given = (product.ids, *(product.parts[p] for p in product.parts if p in _used(step)))
        refs = {label_of(ref) for ref in given if not is_pinned(ref)}
        # where images are stored is known only when their step is done
        if IMAGES_OF_PARTICLES in step.stage.needs and refs & here:
            return True
        if any(label in here and not _is_pure_birth(plan.graph.step(label)) for label in refs):
            return True
        if len(refs & here) and not refs <= here:
            return True
    return False


def _is_pure_birth(step: Step) -> bool:
    """Whether all particles of a step are born in it, so that a worker knows them once it has the exposure."""
    return step.stage.gives_birth(step.params) and not step.inputs.get("particles")


def _used(step: Step) -> tuple[str, ...]:
    port = step.stage.port("particles")
    return parts_used(step, port) if port is not None else ()
