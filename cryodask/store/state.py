"""``project.json``: the project and the current generation of every step. Written by the driver only."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from cryodask.errors import StoreError
from cryodask.store.files import disk_errors, holder_of, write_atomically
from cryodask.store.identity import MOST_BIRTHS

FORMAT = 2
_FILE = "project.json"


def parted(place: str) -> tuple[str, str]:
    """The folder of a generation, ``STAGE/KEY``, and the output that a place names, as in ``STAGE/KEY.class2``; empty for none."""
    stage, _, key = place.rpartition("/")
    key, _, output = key.partition(".")
    return f"{stage}/{key}", output


class ProductRef(BaseModel):
    """A resolved product: the places of its ids and of each of its parts.

    A place is ``STAGE/KEY``, the folder of a generation below ``stages/``, with the name of an output where the generation has several of
    the type (``STAGE/KEY.class2``); several that gave parts of exposures are ``A|B``. ``ids``:
    the generation that last determined which particles (or exposures) there are. ``exposures``: the parts of the particles'
    exposures; ``exposure_ids``: the generation that determined which exposures there are. ``output``: name of the output if a
    generation has several of the type; ``place``: the generation of that step. ``threshold``: score above which the peaks of a birth
    are accepted ("auto": that of each exposure). ``optics``: the result, ``STEP@STAGE/KEY``, with which the optics of its exposures are
    recorded; empty: the current ones.
    """

    type: str
    step: str
    output: str
    ids: str = ""
    parts: dict[str, str] = Field(default_factory=dict)
    exposures: dict[str, str] = Field(default_factory=dict)
    exposure_ids: str = ""
    threshold: float | str | None = None
    place: str = ""
    optics: str = ""

    def places(self) -> set[str]:
        """All generations that contain its ids and parts."""
        named = (self.ids, self.exposure_ids, *self.parts.values(), *self.exposures.values())
        return {parted(place)[0] for places in named for place in places.split("|") if place}


class StepState(BaseModel):
    """Current state of a step: a pointer to a generation, with its inputs and outputs.

    ``recipes``: how a per-exposure step processes each data set now; the record of an exposure has the one it was made with.
    ``left_out``: number of unused rows of an imported file, by the name of their exposure in it.
    """

    stage: str
    key: str
    params: dict[str, Any] = Field(default_factory=dict)
    inputs: dict[str, list[ProductRef]] = Field(default_factory=dict)
    products: dict[str, ProductRef] = Field(default_factory=dict)
    recipes: dict[str, str] = Field(default_factory=dict)
    left_out: dict[str, int] = Field(default_factory=dict)

    @property
    def place(self) -> str:
        """``STAGE/KEY``."""
        return f"{self.stage}/{self.key}"

    def product(self, kind: str, output: str | None = None) -> ProductRef | None:
        """Its product of a type; ``output`` if it gives several."""
        return self.products.get(f"{output or kind}:{kind}")


class Choice(BaseModel):
    """Manually chosen class numbers, the classification step they belong to, and its exact result.

    ``earlier``: other results for which the same numbers were chosen.
    """

    values: list[int]
    place: str
    stage: str = ""
    part: str = ""
    label: str = ""
    earlier: list[str] = Field(default_factory=list)

    @property
    def subject(self) -> str:
        """The choice, independent of the name of the step that uses it."""
        return f"{self.stage}: {', '.join(map(str, self.values))} of {self.label}.{self.part}"


class Source(BaseModel):
    """A file that an import reads: its first path, and its content (size and checksum) in the last run."""

    name: str
    content: str


class ProjectState(BaseModel):
    """Content of ``project.json``.

    ``home``: the folder of the project file, relative to the project; paths of inputs are relative to it. ``constants``: optics and
    dose by data set; ``gain``: the stored gain references. ``births``: numbers of births by identity key, assigned
    once. ``again``: how often a recomputation of a step was requested. ``kept``: names given to generations;
    ``removed``: when gc removed others (seconds since 1970); ``choices``: manually chosen class numbers. ``sources``: the files of
    imports by path. ``epoch``: that of the driver that wrote it (see epochs.py).
    """

    format: int = FORMAT
    name: str
    home: str = ".."
    seed: int = 0
    runs: int = 0
    epoch: int = 0
    constants: dict[str, dict[str, Any]] = Field(default_factory=dict)
    gain: dict[str, str] = Field(default_factory=dict)
    births: dict[str, int] = Field(default_factory=dict)
    again: dict[str, int] = Field(default_factory=dict)
    kept: dict[str, str] = Field(default_factory=dict)
    removed: dict[str, float] = Field(default_factory=dict)
    choices: dict[str, Choice] = Field(default_factory=dict)
    sources: dict[str, Source] = Field(default_factory=dict)
    steps: dict[str, StepState] = Field(default_factory=dict)

    def recipes_at(self, place: str) -> dict[str, str]:
        """Recipes of the data sets at a generation that is current for a step; empty for any other."""
        return next((step.recipes for step in self.steps.values() if step.place == place), {})

    # --- verbs --------------------------------------------------------------------------------------------------------------
    def adopt(self, label: str, step: StepState) -> bool:
        """Make this the current state of a step; returns whether its generation has changed."""
        old = self.steps.get(label)
        self.steps[label] = step
        return old is None or old.place != step.place

    def forget(self, labels: Iterable[str]) -> None:
        """Remove steps; their generations stay in the history."""
        for label in labels:
            self.steps.pop(label, None)

    def reorder(self, labels: Iterable[str]) -> None:
        """Put steps in pipeline order, and remove those that are not in it."""
        self.steps = {label: self.steps[label] for label in labels if label in self.steps}

    def birth_number(self, identity: str, taken: Iterable[int] = ()) -> int:
        """Number of the birth with this identity key, assigned now if it has none; ``taken``: numbers found on disk."""
        if identity not in self.births:
            number = max([0, *self.births.values(), *taken]) + 1
            if number >= MOST_BIRTHS:
                raise StoreError(
                    f"Project {self.name} has reached the maximum of {number} births of particles.",
                    "picking was repeated many times with other parameters",
                    "start a new project and import the particles you want to keep",
                )
            self.births[identity] = number
        return self.births[identity]

    def source_name(self, path: str, content: str, in_use: set[str]) -> str:
        """The name of a source: the path where it was first read; ``in_use``: paths that the project file names now."""
        if path in self.sources:
            if content:
                self.sources[path].content = content
            return self.sources[path].name
        moved = next((p for p, s in self.sources.items() if p not in in_use and s.content == content), None) if content else None
        if moved is not None:
            self.sources[path] = self.sources.pop(moved)
            return self.sources[path].name
        name, taken = path, {s.name for s in self.sources.values()}
        while name in taken:
            name += "'"
        self.sources[path] = Source(name=name, content=content)
        return name

    # --- disk ---------------------------------------------------------------------------------------------------------------
    @classmethod
    def read(cls, folder: Path) -> ProjectState:
        """Read ``project.json``.

        Raises
        ------
        StoreError
            If it is not a project, is damaged, or has another format.
        """
        file = folder / _FILE
        if not file.is_file():
            raise StoreError(
                f"{folder} is not a cryodask project: it has no {_FILE}.",
                "it is the wrong folder, or the first run has not started yet",
                "give the folder that `cryodask run` printed as the project",
            )
        try:
            state = cls.model_validate_json(file.read_bytes())
        except (ValidationError, ValueError) as error:
            text = file.read_text(errors="replace")
            if '"generations"' in text and '"order"' in text:
                raise _other_format(folder, 1) from error
            raise StoreError(
                f"{file} is damaged: {str(error).splitlines()[0]}.",
                "it was edited by hand, or the disk lost bytes",
                "remove this file and rerun the project: results are found by their keys and kept",
            ) from error
        if state.format != FORMAT:
            raise _other_format(folder, state.format)
        return state

    def write(self, folder: Path) -> None:
        """Write ``project.json`` atomically."""
        holder = holder_of(folder)
        if holder is not None:
            self.epoch = holder.epoch
        with disk_errors(folder):
            write_atomically(folder / _FILE, self.model_dump_json(indent=1))


def _other_format(folder: Path, found: int) -> StoreError:
    return StoreError(
        f"{folder} has the format {found}; this version of cryodask reads format {FORMAT}.",
        "another version made it",
        "process it with that version, or set another folder in the project file and rerun",
    )


def is_damaged(folder: Path) -> bool:
    """Whether a project has a ``project.json`` that is not valid in any format."""
    try:
        text = (folder / _FILE).read_bytes()
        return not isinstance(json.loads(text), dict)
    except FileNotFoundError:
        return False
    except ValueError:
        return True
