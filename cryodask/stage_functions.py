"""Types that the functions of stages take and return: movies, sets and blocks of particles, states and sums, figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from cryodask.context import Context


@runtime_checkable
class Frames(Protocol):
    """A movie, frame by frame. File readers, the shard reader and numpy arrays satisfy this protocol."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(frame, y, x)."""
        ...

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the counts."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> np.ndarray:
        """Frame ``index``, `(y, x)`."""
        ...


@dataclass(frozen=True)
class ParticleSet:
    """What the start of an iteration gets: all columns of the set, no images.

    ``columns`` hold one value per particle, in the order of their ids: ``defocus_u_angstrom, defocus_v_angstrom, defocus_angle_deg,
    phase_shift_deg, voltage_kv, spherical_aberration_mm, amplitude_contrast, micrograph`` (row), ``half_set`` (0 or 1), and the other
    parts that the stage takes (``rot_deg`` ...).
    """

    count: int
    box: int
    pixel_size_angstrom: float
    columns: dict[str, np.ndarray]


@dataclass(frozen=True)
class SetView:
    """A set of particles as a ``set`` stage sees it: sorted ``ids`` `(n,)` int64; the columns of a part are read on demand.

    ``read(parts)`` returns the columns of some parts (all if None) in the order of the ids, under the names of particle sets, with
    ``position_y_angstrom``, ``position_x_angstrom`` and ``half_set`` in part ``position``.
    """

    name: str
    ids: np.ndarray
    parts: tuple[str, ...]
    read: Callable[[Sequence[str] | None], dict[str, np.ndarray]]


@dataclass(frozen=True)
class ExposureView:
    """Exposures as a ``set`` stage sees them.

    ``rows`` `(n,)` and ``names`` of the exposures; ``read(variable)`` returns one value per exposure, NaN where there is none.
    """

    name: str
    rows: np.ndarray
    names: tuple[str, ...]
    read: Callable[[str], np.ndarray]


@dataclass(frozen=True)
class ParticleBlock:
    """Some particles of a set, with their images.

    ``index`` `(n,)` int64 is the index in the set, ``images`` is `(n, y, x)` float32, ``columns`` as in :class:`ParticleSet`.
    ``half``: the half-set that ALL particles of the block belong to (0 if the stage has no halves).
    """

    index: np.ndarray
    images: np.ndarray
    columns: dict[str, np.ndarray]
    pixel_size_angstrom: float
    half: int = 0


State = dict[str, Any]
"""Arrays and scalars (numpy or Python); sent to the workers and stored in the checkpoint."""
Sums = dict[str, Any]
"""Numpy arrays or numbers of fixed shape; added pairwise in a fixed tree."""
Columns = dict[str, np.ndarray]
"""One value per particle of the block; the first axis is the particle."""
Metrics = dict[str, Any]


class BlockFunctions(Protocol):
    """The functions of a ``blocks`` stage. ``halves`` = 2 keeps the half-sets in separate blocks."""

    halves: int

    @staticmethod
    def start(params: Any, particles: ParticleSet, inputs: dict[str, Any]) -> State:
        """State before the first iteration; ``inputs`` holds the other variables that the stage needs."""
        ...

    @staticmethod
    def load(params: Any, state: State, block: ParticleBlock, context: Context) -> Any:
        """What a worker keeps of a block; recomputed when ``cache_key(params, state)`` changes."""
        ...

    @staticmethod
    def cache_key(params: Any, state: State) -> Any:
        """What the loaded block depends on in the state (such as a ring limit); hashable."""
        ...

    @staticmethod
    def prepare(params: Any, state: State, half: int, context: Context) -> Any:
        """What all blocks of a half share in an iteration, made once per worker (a bank of projections)."""
        ...

    @staticmethod
    def expect(params: Any, state: State, shared: Any, block: Any, previous: Columns, context: Context) -> tuple[Sums, Columns]:
        """Expectation step of one block. ``previous``: its columns of the last iteration (empty in the first)."""
        ...

    @staticmethod
    def maximise(params: Any, state: State, sums: list[Sums], context: Context) -> tuple[State, Metrics]:
        """Maximisation step; ``sums`` has one entry per half. The new state increments ``state["iteration"]``."""
        ...

    @staticmethod
    def finished(params: Any, state: State) -> bool:
        """Whether the last iteration is done."""
        ...

    @staticmethod
    def result(params: Any, state: State, columns: Columns) -> dict[str, Any]:
        """The variables that the stage gives; ``columns`` holds those of all particles in the order of the set."""
        ...


class TournamentFunctions(Protocol):
    """The functions of a ``tournament`` stage: independent chains, of which the best is kept and finished."""

    @staticmethod
    def select(params: Any, particles: ParticleSet) -> np.ndarray:
        """Indices of the particles that the chains use."""
        ...

    @staticmethod
    def seeds(params: Any) -> list[int]:
        """One seed per chain."""
        ...

    @staticmethod
    def chain(params: Any, particles: ParticleBlock, seed: int, context: Context) -> dict[str, Any]:
        """Run one restart; returns arrays and numbers."""
        ...

    @staticmethod
    def finish(params: Any, particles: ParticleBlock, chains: list[dict[str, Any]], context: Context) -> dict[str, Any]:
        """The variables that the stage gives, from the best of the chains."""
        ...


@dataclass(frozen=True)
class Picture:
    """One figure of the report; ``figure`` is a matplotlib figure."""

    title: str
    caption: str
    figure: Any
