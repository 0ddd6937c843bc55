"""Functions of stage ``classify3d``: at fixed poses or with alignment, as its parameters say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cryodask.stage import Columns, Context, Metrics, ParticleBlock, ParticleSet, State, Sums
from cryodask.stages import _align3d, _classify3d

if TYPE_CHECKING:
    from cryodask.stages.classify3d import Classify3DParams

halves = 2


def _way(params: Classify3DParams) -> Any:
    return _align3d if params.align else _classify3d


def start(params: Classify3DParams, particles: ParticleSet, inputs: dict[str, Any]) -> State:
    """State before the first iteration; refuses invalid parameters and inputs."""
    state: State = _way(params).start(params, particles, inputs)
    return state


def cache_key(params: Classify3DParams, state: State) -> int:
    """Highest frequency that is kept."""
    return int(_way(params).cache_key(params, state))


def load(params: Classify3DParams, state: State, block: ParticleBlock, context: Context) -> Any:
    """Half transforms of a block's images."""
    return _way(params).load(params, state, block, context)


def prepare(params: Classify3DParams, state: State, half: int, context: Context) -> Any:
    """References of this iteration, made once per worker."""
    return _way(params).prepare(params, state, half, context)


def expect(params: Classify3DParams, state: State, shared: Any, block: Any, previous: Columns, context: Context) -> tuple[Sums, Columns]:
    """Sums and columns of one block."""
    out: tuple[Sums, Columns] = _way(params).expect(params, state, shared, block, previous, context)
    return out


def maximise(params: Classify3DParams, state: State, sums: list[Sums], context: Context) -> tuple[State, Metrics]:
    """The next state from the sums of all blocks."""
    out: tuple[State, Metrics] = _way(params).maximise(params, state, sums, context)
    return out


def finished(params: Classify3DParams, state: State) -> bool:
    """Whether the last iteration is done; refuses what only the data show, here because the driver calls it."""
    return bool(_way(params).finished(params, state))


def result(params: Classify3DParams, state: State, columns: Columns) -> dict[str, Any]:
    """The output of the stage."""
    out: dict[str, Any] = _way(params).result(params, state, columns)
    return out
