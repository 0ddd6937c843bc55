"""What a stage is: ONE definition that drives the store, the runners, the lazy face, the command line, the docs and the report.

A stage is a frozen parameter model, the variables it needs and gives, and pure functions. Its ports and outputs (what it takes from other
steps and gives to them, see products.py) follow from these variables unless they are stated. Its shape says which functions:

``map``
    ``process(params, *, device="cpu", **needs) -> dict`` : one exposure in, its products out. A stage that takes particles is given
    those of the exposure, and maps whole.
``blocks``
    a class of static functions for iterations over particle blocks (expectation maximisation and its kin), see :class:`BlockFunctions`.
``tournament``
    a class of static functions for independent restarts of one algorithm, see :class:`TournamentFunctions`.
``whole``
    ``process(params, *, device="cpu", **needs) -> dict`` : all of what earlier stages gave in, one result out.
``set``
    ``process(params, inputs) -> dict`` : sets of particles or exposures in (:class:`SetView`, :class:`ExposureView`, by port), a set out.
    It works on columns only and runs in the driver.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, runtime_checkable

import numpy as np
from pydantic import BaseModel, ConfigDict

from cryodask.ports import Check, Output, Outputs, Port, derived_outputs, derived_ports, port
from cryodask.vocabulary import VARIABLES, Var

__all__ = ["Output", "Params", "Port", "Stage", "port", "stage"]

if TYPE_CHECKING:
    import xarray as xr

Shape = Literal["map", "blocks", "tournament", "whole", "set"]
Sizes = dict[str, int]


class InputFileMark:
    """Marks a parameter that names a file: its content, not its name, enters the key of a generation."""


InputFile = Annotated[str, InputFileMark()]


class SourceFileMark:
    """Marks a parameter that names a file or folder of which the plan makes exposures or particles: its name enters the key."""


SourceFile = Annotated[str, SourceFileMark()]


@dataclass(frozen=True)
class ChoiceMark:
    """Marks a parameter with numbers of classes that a person has chosen: they belong to one classification.

    ``numbers`` finds them in a value that is no list: part of the particles (``class2d``, ``class3d``) -> numbers.
    """

    numbers: Callable[[Any], Mapping[str, Sequence[int]]] | None = None


class ThresholdMark:
    """Marks the parameter of a picker that settles which peaks are accepted: a score, or "auto" for ``pick_threshold`` of the exposure.

    Peaks are stored with their scores whatever it is, so it moves no identity and is no part of the key.
    """


class Params(BaseModel):
    """Base of the parameters of every stage: frozen, and unknown names are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@runtime_checkable
class Frames(Protocol):
    """A movie, frame by frame: met by file readers, by the shard reader and (through numpy) by arrays."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(frame, y, x)."""
        ...

    @property
    def dtype(self) -> np.dtype:
        """Type of the counts."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> np.ndarray:
        """Frame ``index``, `(y, x)`."""
        ...


@dataclass(frozen=True)
class ParticleSet:
    """What the start of an iteration sees: every column of the set, no images.

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
    """A set of particles as a ``set`` stage sees it: sorted ``ids`` `(n,)` int64; columns of a part are read when they are asked for.

    ``read(parts)`` gives the columns of some parts (all if None) in the order of the ids, under the names of particle sets, with
    ``position_y_angstrom``, ``position_x_angstrom`` and ``half_set`` in part ``position``.
    """

    name: str
    ids: np.ndarray
    parts: tuple[str, ...]
    read: Callable[[Sequence[str] | None], dict[str, np.ndarray]]


@dataclass(frozen=True)
class ExposureView:
    """Exposures as a ``set`` stage sees them.

    ``rows`` `(n,)` and ``names`` of the exposures; ``read(variable)`` gives one value each, NaN where there is none.
    """

    name: str
    rows: np.ndarray
    names: tuple[str, ...]
    read: Callable[[str], np.ndarray]


@dataclass(frozen=True)
class ParticleBlock:
    """Some particles of a set, with their images.

    ``index`` `(n,)` int64 is the place in the set, ``images`` `(n, y, x)` float32, ``columns`` as in :class:`ParticleSet`.
    ``half``: the half-set to which ALL particles of the block belong (0 where a stage has no halves).
    """

    index: np.ndarray
    images: np.ndarray
    columns: dict[str, np.ndarray]
    pixel_size_angstrom: float
    half: int = 0


State = dict[str, Any]
"""Of arrays and scalars (numpy or Python): travels to the workers and into the checkpoint."""
Sums = dict[str, Any]
"""Of numpy arrays or numbers of fixed shape: added pairwise in a fixed tree."""
Columns = dict[str, np.ndarray]
"""One value a particle of the block, first axis = particle."""
Metrics = dict[str, Any]


class BlockFunctions(Protocol):
    """The functions of a ``blocks`` stage. ``halves`` = 2 keeps the half-sets in separate blocks."""

    halves: int

    @staticmethod
    def start(params: Any, particles: ParticleSet, inputs: dict[str, Any]) -> State:
        """State before the first iteration; ``inputs`` are the other variables that the stage needs."""
        ...

    @staticmethod
    def load(params: Any, state: State, block: ParticleBlock, device: str) -> Any:
        """What a worker keeps of a block; made again when ``cache_key(params, state)`` changes."""
        ...

    @staticmethod
    def cache_key(params: Any, state: State) -> Any:
        """What of the state the loaded block depends on (say, a ring limit); hashable."""
        ...

    @staticmethod
    def prepare(params: Any, state: State, half: int, device: str) -> Any:
        """What all blocks of a half share in an iteration, made once a worker (a bank of projections)."""
        ...

    @staticmethod
    def expect(params: Any, state: State, shared: Any, block: Any, previous: Columns, device: str) -> tuple[Sums, Columns]:
        """Expectation step of one block. ``previous``: its columns of the last iteration (empty in the first)."""
        ...

    @staticmethod
    def maximise(params: Any, state: State, sums: list[Sums], device: str) -> tuple[State, Metrics]:
        """Maximisation step; ``sums`` has one entry a half. The new state counts ``state["iteration"]`` up."""
        ...

    @staticmethod
    def finished(params: Any, state: State) -> bool:
        """Whether the last iteration is done."""
        ...

    @staticmethod
    def result(params: Any, state: State, columns: Columns) -> dict[str, Any]:
        """The variables that the stage gives; ``columns`` of all particles in the order of the set."""
        ...


class TournamentFunctions(Protocol):
    """The functions of a ``tournament`` stage: independent chains, the best one wins."""

    @staticmethod
    def select(params: Any, particles: ParticleSet) -> np.ndarray:
        """Indices of the particles that the chains use."""
        ...

    @staticmethod
    def seeds(params: Any) -> list[int]:
        """One seed a chain."""
        ...

    @staticmethod
    def chain(params: Any, particles: ParticleBlock, seed: int, device: str) -> dict[str, Any]:
        """One restart; returns arrays and numbers."""
        ...

    @staticmethod
    def choose(params: Any, chains: list[dict[str, Any]]) -> dict[str, Any]:
        """The variables that the stage gives."""
        ...


@dataclass(frozen=True)
class Picture:
    """One figure of the report; ``figure`` is a matplotlib figure."""

    title: str
    caption: str
    figure: Any


def _unstated(params: Any, sizes: Sizes) -> float:
    return 0.0


@dataclass(repr=False)
class Stage:
    """A registered stage; calling it on a Dataset is its lazy face (map stages)."""

    name: str
    version: int
    shape: Shape
    needs: tuple[str, ...]
    optional: tuple[str, ...]
    gives: tuple[str, ...]
    params: type[Params]
    functions: Any
    doc: str
    sizes: Callable[[Any, Sizes], Sizes] = field(default=lambda params, sizes: sizes)
    memory: Callable[[Any, Sizes], float] = field(default=_unstated)
    reasons: dict[int, str] = field(default_factory=dict)
    draw: Callable[[xr.Dataset], Iterator[Picture]] | None = None
    ports: tuple[Port, ...] = ()
    outputs: Outputs = field(default=lambda params: ())
    check: Check | None = None
    person: bool = False
    purpose: str | None = None
    exposures_named: Callable[[Any], Sequence[str]] = field(default=lambda params: ())
    light: Callable[[Any], bool] = field(default=lambda params: False)

    @property
    def process(self) -> Callable[..., dict[str, Any]]:
        """The pure function of a map or whole stage."""
        return self.functions

    @property
    def threshold(self) -> str | None:
        """Name of the parameter that settles which peaks are accepted (see :class:`ThresholdMark`)."""
        marked = (
            n for n, f in self.params.model_fields.items() if any(m is ThresholdMark or isinstance(m, ThresholdMark) for m in f.metadata)
        )
        return next(marked, None)

    @property
    def states_memory(self) -> bool:
        """Whether it says what memory one call takes."""
        return self.memory is not _unstated

    def gives_birth(self, params: Any) -> bool:
        """Whether particles are born in this stage."""
        return any(output.births for output in self.outputs(params))

    def port(self, name: str) -> Port | None:
        """The port of that name."""
        return next((p for p in self.ports if p.name == name), None)

    def gives_variables(self) -> list[Var]:
        """Vocabulary entries of what the stage gives."""
        return [VARIABLES[name] for name in self.gives]

    def __repr__(self) -> str:
        return f"<stage {self.name}: {', '.join(self.needs)} -> {', '.join(self.gives)}>"

    def figures(self, draw: Callable[[xr.Dataset], Iterator[Picture]]) -> Callable[[xr.Dataset], Iterator[Picture]]:
        """Decorator: the stage's section of the report, from the Dataset that the store gives back."""
        self.draw = draw
        return draw

    def __call__(self, dataset: xr.Dataset, **params: Any) -> xr.Dataset:
        """Apply the stage lazily to a Dataset: same functions, same bits as the runner (map stages only)."""
        from cryodask.lazy import apply_lazily

        return apply_lazily(self, dataset, self.params(**params))


STAGES: dict[str, Stage] = {}


def stage(
    *,
    version: int,
    needs: Sequence[str],
    gives: Sequence[str],
    shape: Shape = "map",
    optional: Sequence[str] = (),
    params: type[Params] | None = None,
    sizes: Callable[[Any, Sizes], Sizes] | None = None,
    memory: Callable[[Any, Sizes], float] | None = None,
    ports: Sequence[str | Port] | None = None,
    outputs: Sequence[Output] | Outputs | None = None,
    check: Check | None = None,
    person: bool = False,
    purpose: str | None = None,
    exposures_named: Callable[[Any], Sequence[str]] | None = None,
    reasons: dict[int, str] | None = None,
    light: Callable[[Any], bool] | None = None,
) -> Callable[[Any], Stage]:
    """Register a function (map, whole) or a class of static functions (blocks, tournament) as a stage of the same name.

    Parameters
    ----------
    version : int
        Raise it when results change: it is part of the key of a generation.
    needs, optional, gives : names of the vocabulary
        ``optional`` needs are passed as None where nothing gives them.
    params : type, optional
        The parameter model; by default the annotation of the function's first argument.
    sizes : callable ``(params, sizes of the needs) -> sizes of the gives``
        Needed where an output has a dimension that no input has, or of another length.
    memory : callable ``(params, sizes of the needs) -> bytes``
        Peak memory of one call.
    ports : sequence of Port or of the short form of :func:`port`
        What it takes from other steps; by default one port per type of product among the needs.
    outputs : sequence of Output, or callable ``(params) -> tuple of Output``
        What it gives; by default one output per type of product among the gives.
    check : callable ``(params, inputs by port) -> iterator of sentences``
        What is wrong with these inputs, beyond types, parts and frames; the plan refuses the step with the first sentence.
    person : bool
        A decision that a person makes: the step waits until it is there.
    purpose : str, optional
        What the weights that it gives were trained for, or must have been trained for.
    exposures_named : callable ``(params) -> names``
        Exposures that the parameters name: one that the inputs do not have is refused before work.
    light : callable ``(params) -> bool``
        Of a map stage: whether it only moves a few columns, so that the driver does it itself instead of sending it to workers.
    reasons : dict, optional
        Meaning of the numbers in ``removal_reason`` or ``left_out_reason``.
    """

    def register(target: Any) -> Stage:
        name = target.__name__
        unknown = [v for v in (*needs, *optional, *gives) if v not in VARIABLES]
        if unknown:
            raise ValueError(f"stage {name!r} speaks of variables that the vocabulary lacks: {unknown}")
        model = params
        if model is None:
            first = next(iter(inspect.signature(target).parameters))
            model = typing.get_type_hints(target)[first]
        if not inspect.getdoc(target):
            raise ValueError(f"stage {name!r} has no docstring")
        made = Stage(
            name,
            version,
            shape,
            tuple(needs),
            tuple(optional),
            tuple(gives),
            model,
            target,
            inspect.getdoc(target) or "",
        )
        made.ports = derived_ports(needs, optional) if ports is None else tuple(port(p) if isinstance(p, str) else p for p in ports)
        if outputs is None:
            derived = derived_outputs(gives, made.ports)
            made.outputs = lambda params: derived
        elif callable(outputs):
            made.outputs = outputs
        else:
            fixed = tuple(outputs)
            made.outputs = lambda params: fixed
        made.check, made.person, made.purpose, made.reasons = check, person, purpose, dict(reasons or {})
        if light:
            made.light = light
        if exposures_named:
            made.exposures_named = exposures_named
        if sizes:
            made.sizes = sizes
        if memory:
            made.memory = memory
        if name in STAGES and STAGES[name].functions.__module__ != target.__module__:
            raise ValueError(f"two stages are called {name!r}: {STAGES[name].functions.__module__} and {target.__module__}")
        STAGES[name] = made
        return made

    return register


_HOME = "cryodask.stages"
"""Package whose modules are the stages of cryodask; found by name like those of others, so that this module stays below it."""


def find_stage(name: str) -> Stage:
    """One stage by name; of cryodask's own only its module is imported."""
    if name not in STAGES and name in importlib.import_module(_HOME).NAMES:
        importlib.import_module(f"{_HOME}.{name}")
    return STAGES[name] if name in STAGES else load_stages()[name]


def load_stages() -> dict[str, Stage]:
    """All stages: the ones of cryodask and those of installed packages (entry points of the group ``cryodask.stages``)."""
    for name in importlib.import_module(_HOME).NAMES:
        importlib.import_module(f"{_HOME}.{name}")
    for entry in importlib.metadata.entry_points(group=_HOME):
        entry.load()
    return STAGES
