"""The fused task of the map runner: one exposure through consecutive per-exposure stages, each committed as soon as it is done."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cryodask.errors import InputError, MicrographError
from cryodask.programs import Program
from cryodask.run.devices import on_device
from cryodask.run.due import FactSource, due, facts_digest, joined
from cryodask.run.events.reports import report_of
from cryodask.run.grids import brings_movies, mark
from cryodask.run.imports import Import
from cryodask.run.item_values import ItemValues, generation_at, inputs_at, keep_for_stage, refuse_nan_pixels
from cryodask.run.refs import PARTICLES
from cryodask.run.slices import Slices, slice_digest
from cryodask.run.whole import Stored
from cryodask.stage import Params, Stage, find_stage
from cryodask.store.birthbook import BirthBook
from cryodask.store.births import KNOWN, Birth, known_of, with_ids
from cryodask.store.generation import Generation
from cryodask.store.journal import Record
from cryodask.store.layouts import Grid
from cryodask.store.made import Made, settled
from cryodask.store.project import Item


@dataclass(frozen=True)
class Link:
    """One stage of the chain: where its needs come from and where its results go.

    ``source`` maps each variable to ``inputs``, ``particles``, or the label of the step that gives it. ``whole``: variables of maps and
    masks, the same for every exposure. ``within``: the step of this chain in which the particles of the stage are born (empty: they are
    sent along), ``threshold``: what decides which of them are accepted. ``birth``: particles are born here. ``recipes``: how each data set
    is processed. ``programs``: those that the stage runs, with the versions in its key. ``images``: results with the images of its
    particles, if it takes images.
    """

    label: str
    stage_name: str
    params: Params
    source: dict[str, str]
    folder: Path
    whole: dict[str, Stored] = field(default_factory=dict)
    within: str = ""
    threshold: Any = None
    birth: Birth | None = None
    recipes: dict[str, str] = field(default_factory=dict)
    programs: dict[Program, str] = field(default_factory=dict)
    images: tuple[Generation, ...] = ()

    @property
    def stage(self) -> Stage:
        """The registered stage."""
        return find_stage(self.stage_name)

    @property
    def takes_particles(self) -> bool:
        """Whether the stage takes the particles of the exposure."""
        return PARTICLES in self.source.values()

    @property
    def particle_columns(self) -> list[str]:
        """Names of the particle columns that it takes."""
        return [name for name, source in self.source.items() if source == PARTICLES]


@dataclass(frozen=True)
class Brief:
    """What is sent along with an exposure.

    Its records in the stages that have it, the particles for each stage that takes some, all birth tables that it ever had, and its
    imported values with their digest.
    """

    records: dict[str, Record]
    slices: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    births: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)


@dataclass
class Chain:
    """A job of the map runner.

    ``constants``: what the exposures of a data set share (optics). ``gains``: its gain reference, memory-mapped. ``grids``: size and type
    of its movies, if the chain reads movies. Paths of inputs are relative to ``home``. ``earlier``: steps before the chain from which it
    reads. ``slices``: the particles of each link that takes some from outside the chain. ``expected``: the digests of all slices in the
    current state of the project. ``book``: all birth tables that exposures ever had. ``imports``: values of the exposures from other
    programs. ``origins``: values from other projects that a link reads. These five stay in the driver. ``epoch`` is the driver's: commits
    of its workers are void once another driver took the project over. ``topic``: see reports.py.
    """

    links: tuple[Link, ...]
    constants: dict[str, dict[str, Any]]
    home: Path = Path()
    gains: dict[str, Path] = field(default_factory=dict)
    earlier: dict[str, Link] = field(default_factory=dict)
    slices: dict[str, Slices] = field(default_factory=dict)
    expected: dict[str, Slices] = field(default_factory=dict)
    book: BirthBook | None = None
    imports: dict[str, Import] = field(default_factory=dict)
    epoch: int = 0
    topic: str = ""
    origins: dict[str, FactSource] = field(default_factory=dict)
    grids: dict[str, Grid] = field(default_factory=dict)
    _read: dict[str, Generation] = field(default_factory=dict)
    _fresh: dict[str, dict[int, Record]] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        here = ("_read", "_fresh", "slices", "expected", "imports", "origins")
        return {**self.__dict__, **{name: {} for name in here}, "book": None}

    # --- in the driver ----------------------------------------------------------------------------------------------------------
    def unfinished(self, items: list[Item], *, retry_quarantined: bool = False) -> list[Item]:
        """Items that are not committed in every stage and not quarantined in the first stage that lacks them (unless retried)."""
        lacking, failed = self._lacking(items)
        return [item for item in items if item.row in lacking and (retry_quarantined or item.row not in failed)]

    def quarantined(self, items: list[Item]) -> int:
        """How many of the items are quarantined in one of the stages."""
        return len(self._lacking(items)[1])

    def _lacking(self, items: list[Item]) -> tuple[set[int], set[int]]:
        """Rows that lack a current result in some stage; of these, the rows that failed in the first such stage.

        A failure in a later stage does not count while an earlier one is pending, because its input will change.
        """
        lacking: set[int] = set()
        failed: set[int] = set()
        rows = {item.row for item in items}
        for link in self.links:
            here, bad = self._settled(link, items)
            failed |= bad - lacking
            lacking |= rows - here
        return lacking, failed

    def lacking_by_step(self, items: list[Item]) -> dict[str, set[int]]:
        """Rows that each stage has to process."""
        rows = {item.row for item in items}
        return {link.label: rows - self._settled(link, items)[0] for link in self.links}

    def _settled(self, link: Link, items: list[Item]) -> tuple[set[int], set[int]]:
        records = self._journals(link).records()
        return settled(records, self.due(link, [item for item in items if item.row in records]))

    def link_of(self, label: str) -> Link:
        """The link of a step of the chain, or before it."""
        return next((link for link in self.links if link.label == label), None) or self.earlier[label]

    def generation_of(self, label: str) -> Generation:
        """The results of such a step, read incrementally."""
        return self._journals(self.link_of(label))

    def record_of(self, label: str, row: int) -> Record | None:
        """Record of a committed item in such a step."""
        record = self.generation_of(label).records().get(row)
        return record if record is not None and record["ok"] else None

    def due(self, link: Link, items: Iterable[Item]) -> dict[int, Made]:
        """What the result of each item in a link must be made from, in the current state of the project."""
        return due(items, link.recipes, self.expected[link.label] if link.takes_particles else None, *self._fact_sources(link.label))

    def _fact_sources(self, label: str) -> tuple[FactSource | None, FactSource | None]:
        return self.imports.get(label), self.origins.get(label)

    def quarantine(self, item: Item, error: str, message: str, tries: int) -> None:
        """Record the failure with the first stage that lacks the item; a result from other particles is invalidated.

        Raises
        ------
        InputError
            When the whole folder of the item is missing: that is no fault of the movie, and stops the run.
        """
        _stop_if_the_folder_is_gone(item, inputs_at(self.home, item), message)
        for link in self.links:
            generation = self._journals(link)
            made = self._due_now(link, item)
            if settled(generation.records(), {item.row: made})[0]:
                continue
            lines = generation.journal.read().lines.get(item.row, [])
            outdated = [crc for crc, old in lines if old["ok"] and old.get("revision", 0) == item.revision and Made.of(old) != made]
            if outdated:
                generation.journal.undo(item.row, item.name, outdated, "made from other particles, another import, or in another data set")
            grid = self._grid(link, item)
            info = {**made.entries(), **({"grid": mark(grid)} if grid is not None else {})}
            generation.commit_failure(item.row, item.name, error, message, tries, **info, revision=item.revision)
            generation.journal.close()
            self._undo_what_rests_on(link, item)
            return

    def _undo_what_rests_on(self, failed: Link, item: Item) -> None:
        """Invalidate results of later stages that were made from an earlier result of the failed one."""
        without = {failed.label}
        for link in self.links[self.links.index(failed) + 1 :]:
            taken = {label for source in link.source.values() for label in source.split("|")}
            if not without & {*taken, link.within}:
                continue
            without.add(link.label)
            journal = self._journals(link).journal
            crcs = [crc for crc, old in journal.read().lines.get(item.row, []) if old["ok"]]
            if crcs:
                journal.undo(item.row, item.name, crcs, f"step {failed.label}, on which it depends, failed")
                journal.close()

    def _due_now(self, link: Link, item: Item) -> Made:
        """What the result of an item must be made from, including what this run has computed so far."""
        if not link.within:
            return self.due(link, [item])[item.row]
        made = Made(item.fingerprint, link.recipes.get(item.data_set))
        try:
            particles = ItemValues(self, item, Brief(self.brief(item, True).records)).particles(link)
        except MicrographError:  # the birth itself is pending
            return made
        said = facts_digest(item, *self._fact_sources(link.label))
        return made._replace(slice=joined(slice_digest(particles), said)) if particles is not None else made

    def brief(self, item: Item, again: bool) -> Brief:
        """What is sent along with an item, so that a worker reads no journals."""
        if again:
            self._fresh = {}
        for link in (*self.links, *self.earlier.values()):
            if link.label not in self._fresh:
                self._fresh[link.label] = self._journals(link).committed()
        found = {label: records[item.row] for label, records in self._fresh.items() if item.row in records}
        records = {label: record for label, record in found.items() if self._is_of_now(self.link_of(label), item, record)}
        slices: dict[str, dict[str, np.ndarray]] = {}
        births: dict[str, dict[str, np.ndarray]] = {}
        for link in self.links:
            if link.label in self.slices:
                slices[link.label] = self.slices[link.label].at(item.row)
            if link.birth is not None and self.book is not None:
                # particles are born again, for whatever reason: an existing record may be outdated
                claimed = self.imports[link.label].claims() if link.label in self.imports else frozenset[int]()
                births[link.label] = self.book.at(item.row, link.birth.number, claimed, again=again or item.revision > 0)
        values = {label: given.values(item) for label, given in self.imports.items()}
        said = {link.label: facts_digest(item, *self._fact_sources(link.label)) for link in self.links}
        digests = {label: digest for label, digest in said.items() if digest is not None}
        return Brief(records, slices, births, values, digests)

    @staticmethod
    def _is_of_now(link: Link, item: Item, record: Record) -> bool:
        """Whether a record was made from the current exposure by the current recipe; an earlier result (no recipes) always counts."""
        recipe = link.recipes.get(item.data_set) if link.recipes else record.get("recipe")
        # slices are compared where they are used
        return Made.of(record)._replace(slice=None) == Made(item.fingerprint, recipe)

    def _journals(self, link: Link) -> Generation:
        # kept, because its journals are read incrementally
        return self._read.setdefault(link.label, Generation(link.folder))

    @contextmanager
    def together(self) -> Iterator[None]:
        """Context manager in which this process commits items together, stage by stage (see :func:`~cryodask.run.here.process_here`)."""
        with ExitStack() as stack:
            # left in reverse order: what an early stage made is safe before what was made from it
            for link in reversed(self.links):
                stack.enter_context(self._generation(link.label).together())
            yield

    # --- in a worker --------------------------------------------------------------------------------------------------------------
    def run(self, item: Item, brief: Brief, device: str, attempt: int) -> None:
        """Process and commit one item. Stages that have it already are read, not repeated."""
        given_to = ItemValues(self, item, brief)
        fresh: list[tuple[dict[str, Any], bool]] = []
        for link in self.links:
            generation = self._generation(link.label)
            particles = given_to.particles(link)
            imported = brief.digests.get(link.label)
            digest = joined(slice_digest(particles), imported) if particles is not None else imported
            if link.label in given_to.records and given_to.records[link.label].get("slice") == digest:
                continue
            given_to.records.pop(link.label, None)
            taken = given_to.taken(link, particles)
            started, started_cpu = time.time(), time.process_time()
            log = f"logs/{item.name}-{item.row}.log"
            report = report_of(self.topic, link.label, item.row, item.name)
            with on_device(device, log=generation.path / log, programs=link.programs, report=report) as context:
                context.keep = functools.partial(keep_for_stage, link.folder)
                given = link.stage.process(link.params, context=context, **taken)
            refuse_nan_pixels(link, item, given)
            told: dict[str, Any] = {}
            if link.birth is not None:
                before = [(brief.births[link.label], True)] if link.label in brief.births else []
                given, told = with_ids(link.birth, item.row, given, known_of([*before, *fresh]))
                fresh.append(({n: given[n] for n in KNOWN if n in given}, False))
            seconds = {"seconds": round(time.time() - started, 4), "cpu_seconds": round(time.process_time() - started_cpu, 4)}
            made = Made(item.fingerprint, link.recipes.get(item.data_set), digest).entries()
            if link.programs and (generation.path / log).exists():
                told = {**told, "log": log}
            info = {**made, **told, **seconds, "revision": item.revision, "attempt": attempt, "epoch": self.epoch}
            given_to.add(link, generation.commit(item.row, item.name, given, grid=self._grid(link, item), **info), given)

    def _grid(self, link: Link, item: Item) -> Grid | None:
        """Size and type that the movie of an item must have, those of most of its data set; None if it is not a movie."""
        return self.grids.get(item.data_set) if brings_movies(link.stage) else None

    def _generation(self, label: str) -> Generation:
        return generation_at(self.link_of(label).folder)


def _stop_if_the_folder_is_gone(item: Item, inputs: dict[str, Any], message: str) -> None:
    """Raise if the folder of an item's input is missing or empty: an unmounted disk must not quarantine a whole session.

    A row of a table whose file was never there, while files of other rows were, is a fault of that row.
    """
    if "micrograph_path" in inputs and "stat" not in item.inputs:
        return
    for name, value in inputs.items():
        # an archived movie leaves its folder behind
        if not name.endswith("_path") or os.path.exists(str(value)) or Path(str(value)).name not in message:
            continue
        folder = Path(str(value)).parent
        try:
            gone = not any(os.scandir(folder))
        except OSError:
            gone = True
        if gone:
            raise InputError(
                f"The input folder {folder} is missing, empty or unreadable; {item.name} was to be read from it.",
                "the disk is no longer mounted, or the folder was moved or renamed",
                "restore the folder and rerun the same command: it resumes where it stopped, and nothing was quarantined",
            )
