"""What workers offer (memory, GPUs, licences), compared with what the steps of a plan need, before any work."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from distributed import Client

from cryodask.cluster.fields import GPU, licence
from cryodask.cluster.local import local_memory
from cryodask.cluster.settings import LocalSettings, Settings, SlurmSettings
from cryodask.errors import ProjectFileError
from cryodask.run.groups import chains_of
from cryodask.run.health import scheduler_identity
from cryodask.run.known import movie_header, step_sizes
from cryodask.run.recipe import Plan, Step
from cryodask.store.project import Arrival, Item, Project


@dataclass(frozen=True)
class Offers:
    """The kinds of workers of a cluster.

    ``has``: Dask resources of each kind. ``memory``: limit per worker in bytes, by pool; without entries if it is unknown or there is none.
    ``where``: the cluster, ``more_memory`` and ``more_resources``: what to do if no worker has enough.
    """

    where: str
    has: tuple[frozenset[str], ...]
    memory: Mapping[str, float]
    more_memory: str
    more_resources: str


def offers_of(settings: Settings, where: str) -> Offers | None:
    """What the workers of a cluster file have; None if only the scheduler knows."""
    if isinstance(settings, SlurmSettings):
        return Offers(
            where,
            tuple(frozenset(pool.worker_resources) for pool in settings.pools.values()),
            {name: float(pool.worker_bytes) for name, pool in settings.pools.items()},
            f"Give a pool of {where} more memory, or fewer processes.",
            f"Give a pool of {where} {{settings}}.",
        )
    if isinstance(settings, LocalSettings):
        limit = local_memory(settings)
        fewer = "Use fewer workers (workers: N in the project file), or workers with more memory."
        return Offers(
            where,
            (frozenset([*([GPU] if settings.gpus else []), *map(licence, settings.licences)]),),
            {} if limit is None else {"": float(limit)},
            f"Raise memory in {where}." if settings.memory else fewer,
            "Use a cluster file with {settings} (configs/clusters).",
        )
    return None


def refuse_beyond_workers(plan: Plan, project: Project, steps: Sequence[Step], items: Sequence[Item], client: Client) -> None:
    """Refuse steps that need more than any connected worker has.

    Not for a cluster of pools, which starts workers for the work that it gets, nor while there are no workers at all: the run waits for
    them.

    Raises
    ------
    ProjectFileError
    """
    known = scheduler_identity(client) or {}
    workers = known.get("workers", {}).values()
    if not workers or "missing" in known:
        return
    limits = [float(worker["memory_limit"] or 0) for worker in workers]
    where = str(known["address"])
    offers = Offers(
        where,
        tuple(frozenset(name for name, amount in (w.get("resources") or {}).items() if amount >= 1) for w in workers),
        {"": max(limits)} if all(limits) else {},
        "Start workers with more memory.",
        "Start workers that do: dask worker --resources {resources}.",
    )
    header = movie_header(plan, [Arrival(i.name, i.content, i.inputs) for i in items[:1]])
    movie = header[1].shape if header else None
    problems = list(beyond_offers(plan, project, steps, movie, offers))
    if problems:
        raise ProjectFileError("\n".join(problems), "", "or run it on another cluster, with --cluster")


def beyond_offers(
    plan: Plan, project: Project | None, steps: Sequence[Step], movie: tuple[int, int, int] | None, offers: Offers | None
) -> Iterator[str]:
    """Problems of steps that need a GPU, licences or memory that no worker has."""
    if offers is None:
        return
    for chain in chains_of(plan, steps):
        asking = [step for step in chain if step.stage.resources.gpus or step.stage.resources.licences]
        licences = sorted({name for step in asking for name in step.stage.resources.licences})
        needs = {GPU} if any(step.stage.resources.gpus for step in asking) else set()
        words = [*(["a GPU"] if needs else []), *(f"the licence {name}" for name in licences)]
        settings = [*(["gpus: N"] if needs else []), *([f"licences: {{{', '.join(f'{n}: N' for n in licences)}}}"] if licences else [])]
        resources = needs | {licence(name) for name in licences}
        if not any(resources <= has for has in offers.has):
            labels = " and ".join(step.label for step in asking)
            which = "all of them" if len(words) > 1 else "it" if licences else "one"
            yield (
                f"{labels} {'needs' if len(asking) == 1 else 'need'} {' and '.join(words)}, but no worker of {offers.where} has {which}. "
                + offers.more_resources.format(settings=" and ".join(settings), resources=",".join(f"{r}=1" for r in sorted(resources)))
            )
    yield from _too_large(plan, project, steps, movie, offers)


def _too_large(
    plan: Plan, project: Project | None, steps: Sequence[Step], movie: tuple[int, int, int] | None, offers: Offers
) -> Iterator[str]:
    """Steps whose declared memory (per item of a per-exposure stage, or per call) exceeds that of every worker that could run them."""
    if not offers.memory:
        return
    for step in steps:
        if step.stage.resources.memory is None:
            continue
        sizes = step_sizes(plan, project, step, movie)
        if not sizes:
            continue
        try:
            needed = float(step.stage.resources.memory(step.params, sizes))
        except KeyError:  # it depends on sizes that are not known yet
            continue
        if needed > max(offers.memory.values()):
            yield f"{step.label} needs about {_gb(needed)} {_for(step, sizes)}, but {_offered(offers)}"


def _for(step: Step, sizes: dict[str, int]) -> str:
    if step.stage.shape == "map":
        return f"for an exposure of {' x '.join(str(sizes[d]) for d in ('frame', 'y', 'x'))}"
    count = next((f"{sizes[d]} particles of " for d in ("particle", "slot") if d in sizes), "")
    return f"for {count}{sizes['y']} pixels" if "y" in sizes else f"for {count.removesuffix(' of ')}"


def _offered(offers: Offers) -> str:
    if "" in offers.memory:
        return f"each worker has {_gb(offers.memory[''])}. {offers.more_memory}"
    each = ", ".join(f"{name} {_gb(has)}" for name, has in offers.memory.items())
    return f"no pool has workers with that much: {each} per worker. {offers.more_memory}"


def _gb(size: float) -> str:
    return f"{size / 1e9:.{1 if size >= 1e10 else 2}f} GB"
