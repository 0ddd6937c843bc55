"""What the stages of a chain take for one exposure: registry facts, what earlier steps stored, and what this task has made. In a worker."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cryodask.errors import MicrographError
from cryodask.run.content import IMAGES, refuse_changed
from cryodask.run.refs import IMAGES_OF_PARTICLES, INPUTS, PARTICLES
from cryodask.run.residents import keep
from cryodask.run.slices import slice_of_birth
from cryodask.stage import ParticleBlock
from cryodask.store.births import TABLE
from cryodask.store.generation import Generation
from cryodask.store.journal import Record, decode_value
from cryodask.store.particles import images_at
from cryodask.store.project import Item

if TYPE_CHECKING:
    from cryodask.run.chain import Brief, Chain, Link


@dataclass
class ItemValues:
    """Values and records of one item, to which each link of the chain adds its own.

    ``values``: registry facts with absolute paths, constants of the data set, and ``STEP/VARIABLE`` of what was made here; ``records``:
    of the steps that have the item.
    """

    chain: Chain
    item: Item
    brief: Brief
    values: dict[str, Any] = field(init=False)
    records: dict[str, Record] = field(init=False)

    def __post_init__(self) -> None:
        self.values = {**self.chain.constants.get(self.item.data_set, {}), **inputs_at(self.chain.home, self.item)}
        self.records = dict(self.brief.records)

    def add(self, link: Link, record: Record, given: dict[str, Any]) -> None:
        """What a link made of the item."""
        self.records[link.label] = record
        self.values.update({f"{link.label}/{name}": value for name, value in given.items()})
        if "movie" in record["shards"]:
            self.values[f"{link.label}/movie"] = self._generation(link.label).read(record, "movie")  # its codec decodes faster than LZW

    def particles(self, link: Link) -> dict[str, np.ndarray] | None:
        """Particles of the exposure for a stage; None if it takes none."""
        if not link.takes_particles:
            return None
        if not link.within:
            return self.brief.slices[link.label]
        birth = self.chain.link_of(link.within)
        record = self.records.get(link.within)
        if record is None:
            raise self._not_finished("particles", link.within)
        generation = self._generation(link.within)
        names = [n for n in (*TABLE, "pick_threshold", *link.particle_columns) if n in record["columns"]]
        columns = {n: generation.read(record, n) for n in names}
        pixel = birth.source.get("pixel_size_angstrom", link.source.get("pixel_size_angstrom", INPUTS))
        name = "pixel_size_angstrom"
        size = self._known(name, self.values) if pixel == INPUTS else self._stored(pixel, name, self.values)
        return slice_of_birth(columns, float(size), link.threshold, link.particle_columns)

    def taken(self, link: Link, particles: dict[str, np.ndarray] | None) -> dict[str, Any]:
        """All that a stage takes; None for optional variables that no step gives."""
        known = {**self.values, **self.brief.values.get(link.label, {})}
        needs = {n: self._value(n, link, known, particles) for n in link.stage.needs}
        return needs | {n: self._value(n, link, known, particles) if n in link.source else None for n in link.stage.optional}

    def _value(self, name: str, link: Link, known: dict[str, Any], particles: dict[str, np.ndarray] | None) -> Any:
        label = link.source[name]
        if name in link.whole:
            stored = link.whole[name]
            return keep(stored, stored.load)
        if label == PARTICLES and name == IMAGES_OF_PARTICLES:
            return self._block(link, particles or {})
        if label == PARTICLES:
            given = particles or {}
            # a part may come without some of its columns: imported poses have no likelihood
            return given.get(name) if name in link.stage.optional else given[name]
        if label == INPUTS:
            if name == "gain":
                path = self.chain.gains.get(self.item.data_set)
                return _gain_at(path) if path else None
            if name in IMAGES and name in known:
                refuse_changed(self.item, name, known[name])
            return None if name not in known and name in link.stage.optional else self._known(name, known)
        return self._stored(label, name, known)

    def _stored(self, label: str, name: str, known: dict[str, Any]) -> Any:
        """A variable that another step gave, or the first of several (``A|B``) that has the exposure."""
        if "|" in label:
            givers = label.split("|")
            has = [one for one in givers if one in self.records or f"{one}/{name}" in known]
            # a source that forgot an exposure has an empty record of it
            there = [one for one in has if _is_there(known.get(f"{one}/{name}"), name, self.records.get(one))]
            label = (there or has or givers)[0]
        if f"{label}/{name}" in known:
            return known[f"{label}/{name}"]
        record = self.records.get(label)
        if record is None:
            raise self._not_finished(name, label)
        if name in record["columns"] or name in record["shards"]:
            return self._generation(label).read(record, name)
        if name not in self._generation(label).meta["gives"]:
            return None  # results of a version of the stage that did not give it
        # a movie that is read in place was not stored; its stage opens it again
        giver = self.chain.link_of(label)
        needs = {n: self._value(n, giver, known, None) for n in giver.stage.needs}
        needs |= {n: self._value(n, giver, known, None) for n in giver.stage.optional if n in giver.source}
        return giver.stage.process(giver.params, **needs)[name]

    def _generation(self, label: str) -> Generation:
        return generation_at(self.chain.link_of(label).folder)

    def _known(self, name: str, known: dict[str, Any]) -> Any:
        if name not in known and name == "coordinates_path":
            raise MicrographError(
                f"There is no picks file for {self.item.name}.",
                "it was removed or renamed, or nothing was picked in this exposure",
                "put it into the folder of picks as NAME.star or NAME_anything.star; without it the exposure has no particles",
            )
        if name not in known:
            raise MicrographError(
                f"{self.item.name} has no {name}.", "its row of the STAR file is incomplete", "complete or remove the row"
            )
        return known[name]

    def _not_finished(self, name: str, label: str) -> MicrographError:
        return MicrographError(
            f"{self.item.name} has no {name}: step {label} did not finish it.", "it was quarantined there", "see the report"
        )

    def _block(self, link: Link, particles: dict[str, np.ndarray]) -> ParticleBlock:
        """The particles of the exposure with their images as they are stored."""
        columns = {**particles}
        slots = columns.pop(IMAGES_OF_PARTICLES)
        lacking = int((slots < 0).sum())
        if lacking:
            raise MicrographError(
                f"{lacking} of {len(slots)} particles of {self.item.name} have no image.",
                "their extraction did not finish",
                "run the project again",
            )
        pixels = columns.get("particle_pixel_size_angstrom", np.zeros(0))
        pixel = float(pixels[0]) if len(pixels) else 1.0
        return ParticleBlock(np.arange(len(slots)), images_at(link.images, self.item.row, slots), columns, pixel)


def inputs_at(home: Path, item: Item) -> dict[str, Any]:
    """Registry facts of an item, with absolute paths."""
    return {n: str(home / v) if n.endswith("_path") else v for n, v in item.inputs.items()}


def refuse_nan_pixels(link: Link, item: Item, given: dict[str, Any]) -> None:
    """Refuse images with NaN or infinite pixels, before they are stored."""
    for name, value in given.items():
        if isinstance(value, np.ndarray) and value.dtype.kind == "f" and value.ndim >= 2 and not np.isfinite(value).all():
            raise MicrographError(
                f"{name} of {item.name} has {int((~np.isfinite(value)).sum())} pixels that are NaN or infinite after stage {link.label}.",
                "the input holds NaN pixels",
                "check the input; the other micrographs are processed",
            )


def generation_at(folder: Path) -> Generation:
    """The generation in a folder, one per process: each has a journal file of its own."""
    return keep(("generation", folder), lambda: Generation(folder))


def keep_for_stage(folder: Path, key: Hashable, make: Callable[[], Any]) -> Any:
    """What a stage keeps between exposures."""
    return keep(("stage", folder, key), make)


def _gain_at(path: Path) -> np.ndarray:
    return keep(("gain", path), lambda: np.asarray(np.load(path)))


def _is_there(value: Any, name: str, record: Record | None) -> bool:
    """Whether a step gave a variable of an exposure: a number, or a stored image."""
    if value is None and record is not None:
        if name not in record["columns"]:
            return name in record["shards"]
        value = decode_value(record["columns"][name])
    array = value if isinstance(value, np.ndarray) and value.ndim == 0 else None
    number = float(array) if array is not None and array.dtype.kind == "f" else value
    return bool(getattr(value, "stored", True)) and not (isinstance(number, float) and np.isnan(number))
