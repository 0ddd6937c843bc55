"""Which steps an exposure goes through in one task: consecutive ones, as long as what they need of it is known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cryodask.run.graph_chain import is_pinned, label_of
from cryodask.run.recipe import Plan, Step
from cryodask.run.refs import parts_used


def chains_of(plan: Plan, steps: Sequence[Step]) -> Iterator[list[Step]]:
    """Consecutive per-exposure steps as one chain, others alone.

    A step that is given particles of which a step of the chain has cut or selected some begins a new chain: which these are is known
    only when that step is done. So does a step on exposures of other sources.
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
    """Where the exposures of a step come from."""
    exposures = next(iter(step.inputs.get("exposures", ())), None) or step.outputs.get(("exposures", "exposures"))
    return exposures.sources if exposures is not None else frozenset()


def _waits_for(plan: Plan, step: Step, chain: list[Step]) -> bool:
    here = {s.label for s in chain}
    for product in step.inputs.get("particles", ()):
        given = (product.ids, *(product.parts[p] for p in product.parts if p in _used(step)))
        refs = {label_of(ref) for ref in given if not is_pinned(ref)}
        if any(label in here and not _is_pure_birth(plan.graph.step(label)) for label in refs):
            return True
        if len(refs & here) and not refs <= here:
            return True
    return False


def _is_pure_birth(step: Step) -> bool:
    """Whether the particles of a step are all born in it: then a worker knows them as soon as it has the exposure."""
    return step.stage.gives_birth(step.params) and not step.inputs.get("particles")


def _used(step: Step) -> tuple[str, ...]:
    port = step.stage.port("particles")
    return parts_used(step, port) if port is not None else ()
