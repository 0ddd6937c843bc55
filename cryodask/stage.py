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
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, runtime_checkable

import numpy as np
from pydantic import BaseModel, ConfigDict

from cryodask.errors import MicrographError
from cryodask.products import COLLECTIONS, PARTS, Product, part_of
from cryodask.vocabulary import SLOTS, VARIABLES, Var

if TYPE_CHECKING:
    import xarray as xr

Shape = Literal["map", "blocks", "tournament", "whole"]
Sizes = dict[str, int]


class InputFileMark:
    """Marks a parameter that names a file: its content, not its name, enters the key of a generation."""


InputFile = Annotated[str, InputFileMark()]


class SourceFileMark:
    """Marks a parameter that names a file or folder of which the plan makes exposures or particles: its name enters the key."""


SourceFile = Annotated[str, SourceFileMark()]


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


@dataclass(frozen=True)
class Port:
    """An input of a stage: one product of a type, with the parts it must have.

    ``also``: parts that are used where they are there, and count in the key. ``default``: "related" (found by the rules of run/graph.py),
    "explicit" (only by ``from``) or "none" (stays empty unless ``from`` fills it). ``many``: takes a list. ``copies``: whether the copies
    of a symmetry expansion are taken; ``subtracted``: whether images are from which signal was subtracted. ``whole``: classes are taken
    all together without being asked which. ``unless``: parameter that takes the place of this input. ``also_if``: parameter without which
    the parts ``also`` are not used, or such a parameter for some of them.
    """

    name: str
    type: str
    parts: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    optional: bool = False
    default: Literal["related", "explicit", "none"] = "related"
    many: bool = False
    copies: bool = False
    subtracted: bool = False
    whole: bool = False
    unless: str | None = None
    also_if: str | Mapping[str, str] | None = None


@dataclass(frozen=True)
class Output:
    """A product that a stage gives.

    ``on``: port whose product it extends or takes from (None: it is new, for particles: they are born here). ``subset``: some of the
    particles or exposures of ``on``. ``partition``: all of them, in classes: a step after it must say which. ``copies``: "expand" or
    "contract". ``frame``: "same" (as port ``map``, else as the poses), "new", "unknown", "flipped", "to" (that of port ``to``), or
    "as:STEP". ``drops``: parts that no longer hold.
    """

    name: str
    type: str
    parts: tuple[str, ...] = ()
    on: str | None = None
    subset: bool = False
    partition: bool = False
    births: bool = False
    copies: Literal["", "expand", "contract"] = ""
    subtracted: bool = False
    frame: str = ""
    drops: tuple[str, ...] = ()


Outputs = Callable[[Any], tuple[Output, ...]]
Check = Callable[[Any, dict[str, list[Product]]], Iterator[str]]


def port(spec: str, **options: Any) -> Port:
    """A port from its short form: ``name:type[part, part?]``; the name may be left out where it is the type's.

    After the name ``?`` means optional, ``*`` a list, ``!`` only by ``from``; after a part ``?`` means used where it is there.
    """
    name, _, rest = spec.replace(" ", "").partition(":") if ":" in spec else (spec.replace(" ", "").partition("[")[0], "", "")
    rest = rest or spec.replace(" ", "")
    kind, _, inner = rest.partition("[")
    flags = {c for c in name if c in "?*!"}
    name, kind = name.rstrip("?*!"), kind.rstrip("?*!")
    named = [p for p in inner.rstrip("]").split(",") if p]
    unknown = [p for p in named if p.rstrip("?") not in PARTS.get(kind, {})]
    if unknown or kind not in PARTS:
        raise ValueError(f"port {spec!r}: unknown type or parts {unknown or kind}")
    optional = "?" in flags
    default = "explicit" if flags & {"!", "*"} else "none" if optional and kind not in (*COLLECTIONS, "classes") else "related"
    made = Port(
        name,
        kind,
        tuple(p for p in named if p[-1] != "?"),
        tuple(p[:-1] for p in named if p[-1] == "?"),
        optional=optional,
        default=default,  # type: ignore[arg-type]
        many="*" in flags,
    )
    return replace(made, **options)


def _derived_ports(needs: Sequence[str], optional: Sequence[str]) -> tuple[Port, ...]:
    """One port per type of product that the variables belong to."""
    parts: dict[str, dict[str, bool]] = {}
    for name in (*needs, *optional):
        place = part_of(name)
        if place is not None and name != "gain":
            product, part = place
            parts.setdefault(product, {})
            parts[product][part] = parts[product].get(part, False) or name in needs
    return tuple(
        Port(
            product,
            product,
            tuple(p for p, needed in found.items() if needed),
            tuple(p for p, needed in found.items() if not needed),
            optional=not any(found.values()),
        )
        for product, found in sorted(parts.items(), key=lambda item: list(PARTS).index(item[0]))
    )


def _derived_outputs(gives: Sequence[str], ports: Sequence[Port]) -> tuple[Output, ...]:
    """One output per type of product: collections extend what the stage takes; particles without a port for them are born."""
    parts: dict[str, dict[str, None]] = {}
    for name in gives:
        place = part_of(name)
        if place is not None:
            parts.setdefault(place[0], {})[place[1]] = None
    taken = {p.type: p.name for p in ports}
    out = []
    for product, found in sorted(parts.items(), key=lambda item: list(PARTS).index(item[0])):
        on = taken.get(product) if product in COLLECTIONS else None
        births = product == "particles" and on is None
        frame = "same" if product in ("map", "mask") or "pose" in found else ""
        out.append(Output(product, product, tuple(found), on=on, births=births, frame=frame))
    return tuple(out)


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
    memory: Callable[[Any, Sizes], float] = field(default=lambda params, sizes: 0.0)
    reasons: dict[int, str] = field(default_factory=dict)
    draw: Callable[[xr.Dataset], Iterator[Picture]] | None = None
    ports: tuple[Port, ...] = ()
    outputs: Outputs = field(default=lambda params: ())
    check: Check | None = None
    person: bool = False
    purpose: str | None = None

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
        return _apply_lazily(self, dataset, self.params(**params))


def _apply_lazily(made: Stage, dataset: xr.Dataset, params: Params) -> xr.Dataset:
    import xarray as xr

    if made.shape != "map":
        raise TypeError(f"{made.name} is a {made.shape} stage: it has no lazy face; run it with cryodask.run_project()")
    names = [n for n in (*made.needs, *made.optional) if n in dataset]
    missing = [n for n in made.needs if n not in dataset]
    if missing:
        raise KeyError(f"{made.name} needs {', '.join(missing)}, which the Dataset lacks; project.joined() has what earlier stages gave")
    own = {d: n for name in names for d, n in zip(VARIABLES[name].dims, dataset[name].shape[-len(VARIABLES[name].dims) :])}
    sizes = {**own, **made.sizes(params, own)}
    outs = made.gives_variables()
    # probing one item settles what the definition leaves open: lengths, and the type of what is stored as it comes
    dtypes = {v.name: v.dtype for v in outs}
    if "input" in dtypes.values() or any(d not in sizes for v in outs for d in v.dims):
        first = dataset[names].isel(micrograph=0) if "micrograph" in dataset.dims else dataset[names]
        given = made.process(params, **{n: _plain(first[n].values) for n in names})
        sizes |= {d: SLOTS if d == "slot" else k for v in outs for d, k in zip(v.dims, np.shape(given[v.name]))}
        dtypes |= {name: given[name].dtype.str for name, dtype in dtypes.items() if dtype == "input"}

    def one(*arrays: Any) -> tuple[np.ndarray, ...]:
        given = made.process(params, **dict(zip(names, map(_plain, arrays))))
        return tuple(_filled(v, np.asarray(given[v.name], dtypes[v.name]), tuple(sizes[d] for d in v.dims)) for v in outs)

    inputs = []
    for name in names:
        core = {d: -1 for d in dataset[name].dims if d != "micrograph"}
        array = dataset[name]
        inputs.append(array.chunk({**core, **({"micrograph": 1} if "micrograph" in array.dims else {})}))
    # the core dimensions of the outputs get names of their own, so that a stage may change the size of y and x
    results = xr.apply_ufunc(
        one,
        *inputs,
        input_core_dims=[[d for d in dataset[n].dims if d != "micrograph"] for n in names],
        output_core_dims=[[f"_{d}" for d in v.dims] for v in outs],
        output_dtypes=[np.dtype(dtypes[v.name]) for v in outs],
        dask="parallelized",
        vectorize=True,
        dask_gufunc_kwargs={"output_sizes": {f"_{d}": sizes[d] for v in outs for d in v.dims}},
    )
    results = results if isinstance(results, tuple) else (results,)
    return xr.Dataset(
        {v.name: r.rename({f"_{d}": d for d in v.dims}).assign_attrs(units=v.units, long_name=v.doc) for v, r in zip(outs, results)},
        attrs={"stage": made.name, "version": made.version, "params": params.model_dump_json()},
    )


def _plain(value: Any) -> Any:
    """Numbers and text of a Dataset as Python's own; arrays as kernels may have them, for torch refuses read-only ones."""
    array = np.asarray(value)
    return array.item() if array.ndim == 0 else np.require(array, requirements="W")


def _filled(var: Var, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A ragged output brought to the length of its dimension: NaN, or -1 for integers."""
    if array.shape == shape:
        return array
    if var.dims[:1] != ("slot",) or array.shape[1:] != shape[1:]:
        raise MicrographError(
            f"{var.name} has shape {array.shape} here and {shape} for the first micrograph.",
            "movies of different cameras, binnings or frame numbers in one Dataset",
            "choose those of one kind",
        )
    out = np.full(shape, np.nan if array.dtype.kind == "f" else -1, array.dtype)
    out[tuple(slice(0, n) for n in array.shape)] = array
    return out


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
    reasons: dict[int, str] | None = None,
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
        made.ports = _derived_ports(needs, optional) if ports is None else tuple(port(p) if isinstance(p, str) else p for p in ports)
        if outputs is None:
            derived = _derived_outputs(gives, made.ports)
            made.outputs = lambda params: derived
        elif callable(outputs):
            made.outputs = outputs
        else:
            fixed = tuple(outputs)
            made.outputs = lambda params: fixed
        made.check, made.person, made.purpose, made.reasons = check, person, purpose, dict(reasons or {})
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
