"""Leaves of particles: how a set is split, the tree in which sums are added, the worker of each leaf, and the traffic.

Split and tree depend on the particles alone, so results are bit-identical for any workers. Placement depends on the workers: neighbours
in the tree share a worker, so that it adds up its own sums first and sends only one of them on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle

import numpy as np

from cryodask.stage import ParticleSet

_LEAVES = 8
_SMALLEST_LEAF, _LARGEST_LEAF = 50, 2000


@dataclass(frozen=True)
class Leaf:
    """A fixed run of particles of one half-set."""

    number: int
    half: int
    index: np.ndarray


@dataclass(frozen=True)
class Merge:
    """One addition of the tree: the partial sum at leaf ``right`` is added to the one at leaf ``left``."""

    left: int
    right: int


def cut_leaves(particles: ParticleSet, halves: int) -> list[Leaf]:
    """Split a set into leaves, independently of the workers: four per half-set, fewer if less than 50 particles each were left, more
    if more than 2000 were. The number is a power of two, so that the branches of the tree fit 2, 4, 8 ... workers.
    """
    half_of = particles.columns["half_set"] if halves == 2 else np.zeros(particles.count, np.int8)
    leaves: list[Leaf] = []
    for half in range(halves):
        index = np.nonzero(half_of == half)[0]
        count = _LEAVES // halves
        while len(index) > count * _LARGEST_LEAF:
            count *= 2
        while count > 1 and len(index) < count * _SMALLEST_LEAF:
            count //= 2
        size = -(-len(index) // count)
        for start in range(0, len(index), max(size, 1)):
            leaves.append(Leaf(len(leaves), half, index[start : start + size]))
    return leaves


def merges(leaves: Sequence[Leaf], half: int) -> Iterator[Merge]:
    """The additions of a half-set in order: neighbours in pairs, then pairs of pairs; the total ends at the first leaf."""
    level = [leaf.number for leaf in leaves if leaf.half == half]
    while len(level) > 1:
        yield from (Merge(*level[j : j + 2]) for j in range(0, len(level) - 1, 2))
        level = level[::2]


def settle(places: Sequence[str], alive: Sequence[str]) -> list[str]:
    """Names of workers in the order of their runs of leaves, carried over from ``places`` of the previous iteration.

    A lost worker keeps its place, because it may come back; a new worker takes the place of a lost one. When there are more
    workers than places, all places are reassigned.
    """
    new = [name for name in alive if name not in places]
    kept = [new.pop(0) if name not in alive and new else name for name in places]
    return list(alive) if new else kept


def home_of_leaves(leaves: int, places: Sequence[str], alive: Sequence[str]) -> list[str]:
    """Name of the worker of each leaf: runs of neighbours; leaves of workers that are not ``alive`` go to the others."""
    others = cycle(alive)
    homes = (places[number * len(places) // leaves] for number in range(leaves))
    return [home if home in alive else next(others) for home in homes]


@dataclass(frozen=True)
class Traffic:
    """Bytes of one iteration.

    ``state_read``: the state, which workers read from the checkpoint file. ``between_workers``: sums, with their
    columns. ``down``: columns of the last iteration, to the workers. ``up``: state and columns, to the driver.
    """

    state_read: int
    between_workers: int
    down: int
    up: int


def traffic(
    leaves: Sequence[Leaf], homes: Sequence[str], *, sums_bytes: int, state_bytes: int, up_bytes: int, down_bytes: int | None = None
) -> Traffic:
    """The cost model of an iteration, exact for a given placement.

    Parameters
    ----------
    leaves : sequence of Leaf
    homes : sequence of str
        Worker of each leaf.
    sums_bytes : int
        Size of the sums of one leaf; every partial sum has the same size.
    state_bytes : int
        Size of the state, read once by each worker.
    up_bytes, down_bytes : int
        Columns per particle that an iteration returns, and that it gets together with the index in the set (``up_bytes + 8`` if None).

    Notes
    -----
    An addition runs on the worker with its left operand; a right operand on another worker is sent with its columns. When W workers hold
    whole branches, W - 1 sums move, in log2(W) steps. The last sums of a second half-set are sent to the worker of the first, which
    maximises.
    """
    share = {leaf.number: len(leaf.index) for leaf in leaves}
    particles = sum(share.values())
    at = dict(enumerate(homes))
    moved = 0
    halves = sorted({leaf.half for leaf in leaves})
    roots = [next(leaf.number for leaf in leaves if leaf.half == half) for half in halves]
    steps = [merge for half in halves for merge in merges(leaves, half)] + [Merge(roots[0], root) for root in roots[1:]]
    for merge in steps:
        if at[merge.left] != at[merge.right]:
            moved += sums_bytes + share[merge.right] * up_bytes
        share[merge.left] += share[merge.right]
    down = up_bytes + 8 if down_bytes is None else down_bytes
    return Traffic(len(set(homes)) * state_bytes, moved, particles * down, state_bytes + particles * up_bytes)
