"""``project.json``: what a project is, and which generation every step has now. Written by the driver only."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from cryodask.errors import StoreError
from cryodask.store.files import disk_errors, holder_of, write_atomically
from cryodask.store.identity import MOST_BIRTHS

FORMAT = 2
_FILE = "project.json"


class ProductRef(BaseModel):
    """A product as it was resolved: where its ids and each of its parts lie.

    A place is ``STAGE/KEY``, the folder of a generation below ``stages/``; several that gave parts of exposures are ``A|B``. ``ids`` is
    the generation that last settled which particles (or exposures) there are. ``exposures`` are the parts of the exposures behind
    particles, ``exposure_ids`` the generation that settled which exposures there are. ``output`` is the name of the output where a
    generation holds several of the type; ``place`` the generation of that step. ``threshold``: score above which the peaks of a birth
    are accepted ("auto": that of each exposure). ``optics``: the result, ``STEP@STAGE/KEY``, with which the optics of its exposures are
    noted; empty: they are those of now.
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
        """All generations that its ids and parts lie in."""
        named = (self.ids, self.exposure_ids, *self.parts.values(), *self.exposures.values())
        return {place for places in named for place in places.split("|") if place}


class StepState(BaseModel):
    """What a step of the pipeline is now: a pointer to a generation, and what it takes and gives.

    ``recipes`` says how a per-exposure step processes each data set now; the record of an exposure has the one by which it was made.
    ``left_out`` counts the rows of an imported file that went nowhere, by the name of their exposure in it.
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
        """Its product of a type; ``output`` where it gives several."""
        return self.products.get(f"{output or kind}:{kind}")


class Choice(BaseModel):
    """Numbers of classes that a person chose, in a stage, from a step that classified, and the very result whose numbers they are.

    ``earlier``: other results for which the same numbers were chosen before.
    """

    values: list[int]
    place: str
    stage: str = ""
    part: str = ""
    label: str = ""
    earlier: list[str] = Field(default_factory=list)

    @property
    def subject(self) -> str:
        """What is chosen, whatever the step that uses it is called."""
        return f"{self.stage}: {', '.join(map(str, self.values))} of {self.label}.{self.part}"


class Source(BaseModel):
    """A file that an import reads: its first path, and what it holds (size and a checksum) as the last run found it."""

    name: str
    content: str


class ProjectState(BaseModel):
    """Everything that ``project.json`` holds.

    ``home`` is the folder of the project file, seen from the project: paths of inputs are relative to it. ``constants`` are optics and
    dose of each data set, by its name; ``gain`` the stored gain references. ``births`` are the numbers of births by identity key, given
    once. ``again`` counts how often a step was asked to be computed anew. ``kept`` are names that people gave to generations,
    ``removed`` when gc took others (seconds since 1970), ``choices`` numbers of classes that people chose. ``sources`` are the files of
    imports by path. ``epoch`` is that of the driver which wrote it (see epochs.py).
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
        """Recipes of the data sets at a generation that is the present one of a step; empty of any other."""
        return next((step.recipes for step in self.steps.values() if step.place == place), {})

    # --- verbs --------------------------------------------------------------------------------------------------------------
    def adopt(self, label: str, step: StepState) -> bool:
        """Make this the current state of a step; whether its generation is another one now."""
        old = self.steps.get(label)
        self.steps[label] = step
        return old is None or old.place != step.place

    def forget(self, labels: Iterable[str]) -> None:
        """Take steps out; their generations stay in the history."""
        for label in labels:
            self.steps.pop(label, None)

    def reorder(self, labels: Iterable[str]) -> None:
        """Put steps in the order of the pipeline, and forget those that are not in it."""
        self.steps = {label: self.steps[label] for label in labels if label in self.steps}

    def birth_number(self, identity: str, taken: Iterable[int] = ()) -> int:
        """Number of the birth with this identity key, given now if it has none; ``taken`` are numbers found on disk."""
        if identity not in self.births:
            number = max([0, *self.births.values(), *taken]) + 1
            if number >= MOST_BIRTHS:
                raise StoreError(
                    f"Project {self.name} has {number} births of particles, the most there may be.",
                    "picking was started again and again with other parameters",
                    "start a new project and import the particles that you keep",
                )
            self.births[identity] = number
        return self.births[identity]

    def source_name(self, path: str, content: str, in_use: set[str]) -> str:
        """The name of a source: that of the path where it was first read; ``in_use`` are the paths that the project file names now."""
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
        """From ``project.json``.

        Raises
        ------
        StoreError
            Not a project, damaged, or of another format.
        """
        file = folder / _FILE
        if not file.is_file():
            raise StoreError(
                f"{folder} is not a cryodask project: it has no {_FILE}.",
                "the folder is another one, or the first run has not started yet",
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
                "remove this one file and run the project again: results are found by their keys and kept",
            ) from error
        if state.format != FORMAT:
            raise _other_format(folder, state.format)
        return state

    def write(self, folder: Path) -> None:
        """To ``project.json``, at once or not at all."""
        holder = holder_of(folder)
        if holder is not None:
            self.epoch = holder.epoch
        with disk_errors(folder):
            write_atomically(folder / _FILE, self.model_dump_json(indent=1))


def _other_format(folder: Path, found: int) -> StoreError:
    return StoreError(
        f"{folder} has the format {found}; this version of cryodask reads format {FORMAT}.",
        "it was made by another version",
        "process it with that version, or give the project file another folder and run it again",
    )
