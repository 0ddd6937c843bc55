"""Definition of a stage: ONE definition drives the store, the runners, lazy evaluation, the command line, the docs and the report.

A stage is a frozen parameter model, the variables it needs and gives, and pure functions. Its ports and outputs (what it takes from other
steps and gives to them, see products.py) follow from these variables unless they are declared. Its shape determines the functions:

``map``
    ``process(params, *, context, needs ...) -> dict`` : one exposure in, its products out. A stage that takes particles gets
    those of the exposure, and with ``particle_image`` among its needs a :class:`ParticleBlock` with their images as they are stored; maps
    are passed as a whole.
``blocks``
    a class of static functions for iterations over particle blocks (such as expectation maximisation), see :class:`BlockFunctions`.
``tournament``
    a class of static functions for independent restarts of one algorithm, see :class:`TournamentFunctions`.
``whole``
    ``process(params, *, context, needs ...) -> dict`` : complete outputs of earlier stages in, one result out.
``set``
    ``process(params, inputs) -> dict`` : sets of particles or exposures in (:class:`SetView`, :class:`ExposureView`, by port), a set out.
    It works on columns only and runs in the driver.

``context`` (see :class:`cryodask.context.Context`) is the device, threads, scratch folder, random numbers and programs of a call.
A module that declares a stage is imported wherever stages are listed. What only the computation needs, torch first of all, is imported
inside the function, or by the module that ``functions`` names.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from cryodask.context import Context
from cryodask.errors import PluginError, ProgramMissingError
from cryodask.parameters import (
    AddedMark,
    ChoiceMark,
    EffortMark,
    InputFile,
    InputFileMark,
    MapFile,
    MapFileMark,
    Params,
    SourceFile,
    SourceFileMark,
    ThresholdMark,
)
from cryodask.plugins import Plugins
from cryodask.ports import Check, Output, Outputs, Port, derived_outputs, derived_ports, port
from cryodask.programs import Program
from cryodask.signatures import problems
from cryodask.stage_functions import (
    BlockFunctions,
    Columns,
    ExposureView,
    Frames,
    Metrics,
    ParticleBlock,
    ParticleSet,
    Picture,
    SetView,
    State,
    Sums,
    TournamentFunctions,
)
from cryodask.vocabulary import VARIABLES, Var

__all__ = [
    "AddedMark", "BlockFunctions", "ChoiceMark", "Columns", "Context", "EffortMark", "ExposureView", "Frames", "InputFile", "InputFileMark",
    "MapFile", "MapFileMark", "Metrics", "Output", "Params", "ParticleBlock", "ParticleSet", "Picture", "Port", "Program", "Resources",
    "SetView", "SourceFile", "SourceFileMark", "Stage", "State", "Sums", "ThresholdMark", "TournamentFunctions", "port", "stage",
]  # fmt: skip

if TYPE_CHECKING:
    import xarray as xr

Shape = Literal["map", "blocks", "tournament", "whole", "set"]
Sizes = dict[str, int]
Version = int | str
"""Version of a stage; a string if it includes versions of programs."""


@dataclass(frozen=True)
class Resources:
    """Resources of one call of a stage.

    Parameters
    ----------
    memory : callable ``(params, sizes of the needs) -> bytes``, optional
        Peak memory. A run whose workers have less is refused before any work.
    gpus : 0 or 1
        1: a call (of a map or whole stage) needs a GPU to itself, and sees no other; a run is refused before any work if no worker has one.
        0: it uses a GPU if one is free, and else a CPU.
    licences : tuple of str
        Names of licences; a call (of a map or whole stage) holds one of each. Cluster files say which workers have them, and a run is
        refused before any work if none has.
    """

    memory: Callable[[Any, Sizes], float] | None = None
    gpus: Literal[0, 1] = 0
    licences: tuple[str, ...] = ()


@dataclass(repr=False)
class Stage:
    """A registered stage; map stages can be called on a Dataset, lazily."""

    name: str
    version: int
    shape: Shape
    needs: tuple[str, ...]
    optional: tuple[str, ...]
    gives: tuple[str, ...]
    params: type[Params]
    target: Any
    doc: str
    functions_in: str | None = None
    sizes: Callable[[Any, Sizes], Sizes] = field(default=lambda params, sizes: sizes)
    resources: Resources = Resources()
    programs: tuple[Program, ...] = ()
    reasons: dict[int, str] = field(default_factory=dict)
    draw: Callable[[xr.Dataset], Iterator[Picture]] | None = None
    says: Callable[[Mapping[str, Any]], str] | None = None
    ports: tuple[Port, ...] = ()
    outputs: Outputs = field(default=lambda params: ())
    check: Check | None = None
    person: bool = False
    purpose: str | None = None
    exposures_named: Callable[[Any], Sequence[str]] = field(default=lambda params: ())
    light: Callable[[Any], bool] = field(default=lambda params: False)

    @functools.cached_property
    def functions(self) -> Any:
        """The function, or the class or module with the functions; a separate module is imported now.

        Raises
        ------
        PluginError
            If the runners cannot call them.
        """
        if self.functions_in is None:
            return self.target
        module = importlib.import_module(self.functions_in)
        self._refuse_if_it_cannot_be_called(module)
        return module

    @property
    def home(self) -> str:
        """Name of the declaring module."""
        return str(self.target.__module__)

    def _refuse_if_it_cannot_be_called(self, functions: Any) -> None:
        found = list(problems(self.shape, functions, self.needs, self.optional))
        if found:
            raise PluginError(
                f"Stage {self.name} of {functions.__name__ if self.functions_in else self.home} cannot be called: {'; '.join(found)}.",
                "",
                f"change its signature; {__name__} describes the arguments of the functions of a {self.shape} stage",
            )

    def process(self, params: Any, *, context: Context | None = None, **needs: Any) -> dict[str, Any]:
        """Call a map or whole stage once; without a ``context``, on the CPU with a temporary scratch folder."""
        if context is not None:
            return dict(self.functions(params, context=context, **needs))
        with Context(programs=self.program_versions()) as own:
            return dict(self.functions(params, context=own, **needs))

    def program_versions(self) -> dict[Program, str]:
        """Versions on this machine of the programs that it runs.

        Raises
        ------
        ProgramMissingError
        """
        return {program: program.version() for program in self.programs}

    @property
    def threshold(self) -> str | None:
        """Name of the parameter that decides which peaks are accepted (see :class:`ThresholdMark`)."""
        marked = (
            n for n, f in self.params.model_fields.items() if any(m is ThresholdMark or isinstance(m, ThresholdMark) for m in f.metadata)
        )
        return next(marked, None)

    def version_here(self) -> Version:
        """Version in the keys of results computed here: its own, with those of the programs that it runs.

        Raises
        ------
        ProgramMissingError
        """
        programs = ", ".join(f"{program.name} {version}" for program, version in self.program_versions().items())
        return f"{self.version} with {programs}" if programs else self.version

    def newer(self, version: Version) -> Version | None:
        """Version that would be computed here instead of a given one; None if it is the same, or cannot be computed here."""
        try:
            here = self.version_here()
        except ProgramMissingError:
            return None
        return here if here != version else None

    def gives_birth(self, params: Any) -> bool:
        """Whether particles are born in this stage."""
        return any(output.births for output in self.outputs(params))

    def port(self, name: str) -> Port | None:
        """The port of that name."""
        return next((p for p in self.ports if p.name == name), None)

    def gives_variables(self) -> list[Var]:
        """Vocabulary entries of the stage's outputs."""
        return [VARIABLES[name] for name in self.gives]

    def __repr__(self) -> str:
        return f"<stage {self.name}: {', '.join(self.needs)} -> {', '.join(self.gives)}>"

    def figures(self, draw: Callable[[xr.Dataset], Iterator[Picture]]) -> Callable[[xr.Dataset], Iterator[Picture]]:
        """Decorator: draws the stage's section of the report from its stored Dataset."""
        self.draw = draw
        return draw

    def sentence(self, says: Callable[[Mapping[str, Any]], str]) -> Callable[[Mapping[str, Any]], str]:
        """Decorator: a few words about the result of a finished step."""
        self.says = says
        return says

    def __call__(self, dataset: xr.Dataset, **params: Any) -> xr.Dataset:
        """Apply the stage lazily to a Dataset, bit-identical to the runner (map stages only)."""
        from cryodask.lazy import apply_lazily

        return apply_lazily(self, dataset, self.params(**params))


STAGES: dict[str, Stage] = {}


def stage(
    *,
    version: int,
    name: str | None = None,
    needs: Sequence[str],
    gives: Sequence[str],
    shape: Shape = "map",
    optional: Sequence[str] = (),
    params: type[Params] | None = None,
    sizes: Callable[[Any, Sizes], Sizes] | None = None,
    resources: Resources | None = None,
    programs: Sequence[Program] = (),
    functions: str | None = None,
    ports: Sequence[str | Port] | None = None,
    outputs: Sequence[Output] | Outputs | None = None,
    check: Check | None = None,
    person: bool = False,
    purpose: str | None = None,
    exposures_named: Callable[[Any], Sequence[str]] | None = None,
    reasons: dict[int, str] | None = None,
    light: Callable[[Any], bool] | None = None,
) -> Callable[[Any], Stage]:
    """Register a function (map, whole) or a class of static functions (blocks, tournament) as a stage.

    Parameters
    ----------
    version : int
        Raise it when results change; it is part of the key.
    name : str, optional
        By default that of the function; a dot puts it into a group (``external.relion_postprocess``).
    needs, optional, gives : names of the vocabulary
        ``optional`` needs are None if nothing gives them.
    params : type, optional
        The parameter model; by default the annotation of the function's first argument.
    sizes : callable ``(params, sizes of the needs) -> sizes of the gives``
        Required if an output has a dimension that no input has, or one of another length.
    resources : Resources
        Resources of one call.
    programs : sequence of Program
        External programs that it runs (``context.run``). Their versions are part of the key; without them a run is refused before any work.
    functions : str, optional
        Name of the module with the functions of a ``blocks`` or ``tournament`` stage, if they are not in the class. It is imported on first
        use, so that listing stages does not import numerical packages.
    ports : sequence of Port or of the short form of :func:`port`
        What it takes from other steps; by default one port per type of product among the needs.
    outputs : sequence of Output, or callable ``(params) -> tuple of Output``
        What it gives; by default one output per type of product among the gives.
    check : callable ``(params, inputs by port) -> iterator of sentences``
        Problems of the inputs beyond types, parts and frames; the plan refuses the step with the first sentence.
    person : bool
        A manual decision: the step waits until it is made.
    purpose : str, optional
        What the weights it gives are trained for, or the weights it takes must be trained for.
    exposures_named : callable ``(params) -> names``
        Exposures named in the parameters; one that is not among the inputs is refused before any work.
    light : callable ``(params) -> bool``
        For a map stage: whether it only handles a few columns, so that the driver runs it itself instead of sending it to workers.
    reasons : dict, optional
        Meaning of the numbers in ``removal_reason`` or ``left_out_reason``.
    """

    def register(target: Any) -> Stage:
        called = name or target.__name__
        unknown = [v for v in (*needs, *optional, *gives) if v not in VARIABLES]
        if unknown:
            raise PluginError(
                f"Stage {called!r} of {target.__module__} uses variables that are not in the vocabulary: {', '.join(unknown)}.",
                "",
                "register them first (cryodask.vocabulary.register)",
            )
        model = params
        if model is None:
            first = next(iter(inspect.signature(target).parameters))
            model = typing.get_type_hints(target)[first]
        if not inspect.getdoc(target):
            raise PluginError(
                f"Stage {called!r} of {target.__module__} has no docstring.", "", "add one; its first line is shown by cryodask stages"
            )
        before = STAGES.get(called)
        if before is not None and before.home != target.__module__:
            raise PluginError(f"Two stages are called {called!r}: in {before.home} and in {target.__module__}.", "", "rename one of them")
        made = Stage(
            called,
            version,
            shape,
            tuple(needs),
            tuple(optional),
            tuple(gives),
            model,
            target,
            inspect.getdoc(target) or "",
            functions,
        )
        if functions is None:
            made._refuse_if_it_cannot_be_called(target)
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
        made.resources, made.programs = resources or Resources(), tuple(programs)
        asked = made.resources
        if asked.gpus not in (0, 1) or (shape not in ("map", "whole") and (asked.gpus or asked.licences or made.programs)):
            numbers = f"{asked.gpus} GPUs, {len(asked.licences)} licences and {len(made.programs)} programs"
            what = f"Stage {called!r} asks for {numbers}, but one GPU, licences and programs are only for map and whole stages."
            raise PluginError(what, "", "leave them out; blocks and tournaments use the available GPUs")
        STAGES[called] = made
        return made

    return register


_HOME = "cryodask.stages"
"""Package with cryodask's own stages, imported by name so that this module does not depend on it."""


OTHERS = Plugins(_HOME)
"""Stages of other packages; loading one registers it."""


def find_stage(name: str) -> Stage:
    """One stage by name; for cryodask's own stages only its module is imported."""
    if name not in STAGES and name in importlib.import_module(_HOME).NAMES:
        importlib.import_module(f"{_HOME}.{name}")
    return STAGES[name] if name in STAGES else load_stages()[name]


def load_stages() -> dict[str, Stage]:
    """All stages: those of cryodask and of installed packages (entry points of the group ``cryodask.stages``)."""
    for name in importlib.import_module(_HOME).NAMES:
        importlib.import_module(f"{_HOME}.{name}")
    OTHERS.load()
    return STAGES
