"""Data of another project for an exposure: particles, their images and the CTF, as ``import_project`` takes them."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from cryodask.products import columns_of
from cryodask.run.recipe import Step
from cryodask.store.birthbook import BirthBook
from cryodask.store.generation import Generation
from cryodask.store.identity import birth_of, copy_of, make_ids, number_of, parent_of, row_of
from cryodask.store.project import Item, Project
from cryodask.store.shards import Layout
from cryodask.vocabulary import CTF_COLUMNS, VARIABLES


class ProjectImport:
    """Exposures and particles of another project; a particle is named by the content of its exposure, its birth's identity, and number."""

    def __init__(self, step: Step, project: Project | None) -> None:
        from cryodask.stages.import_project import EXPOSURE_PARTS, OF_EXPOSURES, OF_PARTICLES, PARTICLE_PARTS, opened

        self._here = project
        self.other, self.ref = opened(step.params)
        self.ids = self.other.sets.ids(self.ref)
        self._book = BirthBook(self.other)
        self._rows = {item.content: item for item in self.other.items()}
        self._names = OF_EXPOSURES
        parts = [p for p in PARTICLE_PARTS if p in self.ref.parts]
        self._columns = self.other.sets.columns(self.ref, self.ids, parts)
        self._particle_names = OF_PARTICLES
        self._exposure_parts = [p for p in EXPOSURE_PARTS if p in self.ref.exposures]
        self._row = row_of(self.ids)
        self._images = self.other.sets.images(self.ref.parts["image"]) if "image" in self.ref.parts else None
        self._made_from: dict[str, dict[int, tuple[str, ...]]] = {}

    def exposures(self) -> list[Item]:
        """Exposures of the other project that have particles in the set."""
        wanted = set(self._row.tolist())
        return [item for item in self.other.items() if item.row in wanted]

    def _births(self) -> dict[int, int]:
        """Number in this project of each birth of the other project, matched by identity."""
        there = {number: identity for identity, number in self.other.state.births.items()}
        found = sorted(set(birth_of(self.ids).tolist()))
        assert self._here is not None
        return {number: self._here.state.birth_number(there[number]) for number in found}

    def claims(self) -> frozenset[int]:
        """Births of the set, with their numbers in this project."""
        return frozenset(self._births().values())

    def left_out(self, items: Iterable[Item]) -> tuple[dict[str, int], bool]:
        """Empty: its exposures are those of the other project."""
        return {}, False

    def remarks(self) -> list[str]:
        """Nothing."""
        return []

    def values(self, item: Item) -> dict[str, Any]:
        """Columns of the exposure and of its particles, and the location of their images."""
        from cryodask.store.particles import image_places

        other = self._rows.get(item.content)
        here = np.flatnonzero(self._row == other.row) if other is not None else np.zeros(0, np.int64)
        births, ids = self._births(), self.ids[here]
        own = np.array([births[int(b)] for b in birth_of(ids)], np.int64)
        out: dict[str, Any] = {"claimed_id": make_ids(own, item.row, number_of(ids), copy_of(ids)), "bulk": {}}
        stored = {f"particle_{name}": name for name in CTF_COLUMNS}
        for name in (*self._particle_names, "half_set"):
            column = self._columns.get(stored.get(name, name))
            if column is not None:
                out[name] = column[here]
        if other is not None:
            for name in (n for n in self._names if not _is_bulk(n)):
                known = self.other.sets.of_exposures(self.ref, np.array([other.row]), [name])
                if name in known:
                    out[name] = float(known[name][0])
        # one value per exposure, even if the other project has no particles of it now
        image_pixel = out.pop("particle_pixel_size_angstrom", here[:0])
        out["particle_pixel_size_angstrom"] = float(image_pixel[0]) if len(image_pixel) else np.nan
        pixel = float(out.get("pixel_size_angstrom", 1.0))
        out["placed"] = "position_y_angstrom" in self._columns
        for axis in ("y", "x"):
            place = self._columns.get(f"position_{axis}_angstrom")
            out[f"pick_{axis}"] = place[here] / pixel if place is not None else np.zeros(len(here))
        if other is None:
            return {"foreign_values": out}
        if out["placed"]:
            out["claimed_y"], out["claimed_x"] = self._born_at(other.row, ids, out["pick_y"], out["pick_x"])
        if self._images is not None and len(here):
            out["bulk"]["particle_image"] = image_places(self.other, self.ref, ids)
        for generation in self._givers("micrograph"):
            record = generation.records().get(other.row)
            if record is None or not record["ok"]:
                continue
            for name in (n for n in record["shards"] if n in self._names):
                out["bulk"][name] = (str(generation.path), other.row, generation.layout(VARIABLES[name], record))
            break
        return {"foreign_values": out}

    def _givers(self, part: str) -> list[Generation]:
        """Generations that gave a part of exposures there; several after a merge: the first that has an exposure counts."""
        return [self.other.generation_at(place) for place in self.ref.exposures.get(part, "").split("|") if place]

    def _born_at(self, row: int, ids: np.ndarray, y: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions at birth in the other project, pixels (picks may have been moved since); current positions if not recorded."""
        born: dict[int, tuple[float, float]] = {}
        for birth in np.unique(birth_of(ids)).tolist():
            known = self._book.at(row, birth)
            columns = (known[n][known["own"]].tolist() for n in ("particle_id", "pick_y", "pick_x"))
            born.update((one, (b, a)) for one, b, a in zip(*columns))
        at = [born.get(one, (b, a)) for one, b, a in zip(parent_of(ids).tolist(), y.tolist(), x.tolist())]
        places = np.array(at, np.float64).reshape(-1, 2)
        return places[:, 0], places[:, 1]

    def images_of(self, item: Item) -> str:
        """Sizes and types of the exposure's images in the other project; empty for its first data set."""
        other = self._rows.get(item.content)
        usual: dict[str, Layout] = {}
        for generation in self._givers("micrograph") if other is not None else ():
            usual = usual or {v.name: generation.layout(v) for v in generation.gives if v.name in self._names and v.kind == "bulk"}
            record = generation.records().get(other.row if other is not None else -1)
            if record is not None and record["ok"]:
                own = {n: generation.layout(VARIABLES[n], record) for n in record["shards"] if n in usual}
                return (
                    ""
                    if all(layout == usual[n] for n, layout in own.items())
                    else str(sorted((n, i.shape, i.dtype) for n, i in own.items()))
                )
        return ""

    def digest(self, item: Item) -> str:
        """Digest of the particles of the exposure, and of what gave their parts."""
        other = self._rows.get(item.content)
        ids = self.ids[self._row == other.row] if other is not None else self.ids[:0]
        digest = hashlib.blake2b(ids.tobytes(), digest_size=8)
        optics = [self.other.value_of(other, name) for name in columns_of("exposures", "optics")] if other is not None else []
        digest.update(repr((sorted(self.ref.parts.items()), sorted(self.ref.exposures.items()), optics)).encode())
        if other is not None:
            digest.update("".join(f"{place}:{self._made(place).get(other.row)};" for place in self._places).encode())
        return digest.hexdigest()

    def has(self, item: Item) -> bool:
        """Whether the exposure is active in the other project."""
        return item.content in self._rows

    def digest_of(self, part: str, item: Item) -> str:
        """Digest of a part of an exposure in the other project, whatever its particles."""
        other = self._rows[item.content]
        values = [self.other.value_of(other, name) for name in columns_of("exposures", part)]
        places = [place for place in self.ref.exposures.get(part, "").split("|") if place]
        made = [self._made(place).get(other.row) for place in places if self.other.generation_at(place).meta["per_item"]]
        return repr((places, values, made))

    @functools.cached_property
    def _places(self) -> list[str]:
        """Generations of the other project with per-exposure results."""
        given = {place for places in (*self.ref.parts.values(), *self.ref.exposures.values()) for place in places.split("|")}
        given |= set(self._images.givers if self._images is not None else ())
        return sorted(place for place in given if self.other.generation_at(place).meta["per_item"])

    def _made(self, place: str) -> dict[int, tuple[str, ...]]:
        """What the result of each exposure was made from there; it may change within a generation, after a move or a repair."""
        if place not in self._made_from:
            table = self.other.table_at(place, ())
            made = zip(*(getattr(table, name).astype(str).tolist() for name in ("input", "recipe", "slice")))
            self._made_from[place] = dict(zip(table.row.tolist(), made))
        return self._made_from[place]


def _is_bulk(name: str) -> bool:
    return VARIABLES[name].kind == "bulk"
