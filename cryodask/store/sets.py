"""Sets of particles in a project: ids and columns, each part read from the step that gave it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from cryodask.errors import StoreError
from cryodask.products import ORIGINS
from cryodask.store.births import accepted
from cryodask.store.identity import aligned, births_text, checked, place_of, row_runs, same_ids
from cryodask.store.places import line_of
from cryodask.store.state import parted
from cryodask.store.table import Table
from cryodask.vocabulary import CTF_COLUMNS, OPTICS, VARIABLES

if TYPE_CHECKING:
    from cryodask.store.generation import Generation
    from cryodask.store.project import Item, Project
    from cryodask.store.state import ProductRef

_AS_SET = {f"particle_{name}": name for name in CTF_COLUMNS} | {"particle_half": "half_set"}
"""Names of exposure columns in a set."""
_IMAGE_PLACES = ("image_giver", "image_row", "image_slot")
_NOT_ASKED = np.zeros(0, np.int32)
_OF_IMAGES = ("particle_y", "particle_x")
_NOT_NUMBERS = ("i8", "U", "?")
"""Ids and hashes, which are numbers in name only, texts, and marks."""
_PLACES = {"pick_y": "position_y_angstrom", "pick_x": "position_x_angstrom"}


@dataclass(frozen=True)
class Given:
    """Values of one generation for its particles: sorted ids, columns in their order, and (for images) their locations.

    For images from several extractions, ``givers`` lists these and ``giver`` says which holds which.
    """

    ids: np.ndarray
    columns: dict[str, np.ndarray]
    row: np.ndarray
    slot: np.ndarray
    givers: tuple[str, ...] = ()
    giver: np.ndarray | None = None


@dataclass
class SetReader:
    """Reads the sets of a project, caching what it has read of each generation."""

    project: Project
    _kept: dict[Any, tuple[Any, Given]] = field(default_factory=dict)
    _ids: dict[str, tuple[int | None, np.ndarray]] = field(default_factory=dict)
    """Ids of single-result generations, by the checksum in the record; shared by the columns of all parts."""

    # --- which particles ----------------------------------------------------------------------------------------------------
    def ids(self, ref: ProductRef) -> np.ndarray:
        """Sorted ids `(n,)` int64 of a set, limited to exposures kept by the last selection before it."""
        if not ref.ids:
            raise StoreError(f"{ref.step} gives no particles.", "", "choose a step that does; cryodask info lists them")
        threshold = ref.threshold if self.project.generation_at(ref.ids).meta.get("birth") else None
        ids = checked(self._of(ref.ids, (), threshold, alive=True).ids)
        # the generation may contain exposures that were excluded later: results stay, their particles do not count
        kept = kept_rows(self.project, ref.exposure_ids)
        if kept is None:
            return ids
        rows, counts = row_runs(ids)
        there = np.isin(rows, kept)
        return ids if there.all() else ids[np.repeat(there, counts)]

    # --- columns ------------------------------------------------------------------------------------------------------------
    def known(self, ref: ProductRef) -> dict[str, tuple[str, ...]]:
        """Numeric columns that a set has one value per particle of, with the parts that each is read or derived from; reads no values."""
        out: dict[str, tuple[str, ...]] = {}
        for part, place in ref.parts.items():
            for name in self._names(place, part):
                if VARIABLES[name].dims in (("slot",), ("particle",)) and VARIABLES[name].dtype not in _NOT_NUMBERS:
                    out[_PLACES.get(name, _AS_SET.get(name, name))] = (part,)
        for axis in ("y", "x"):
            if f"particle_{axis}" in out:
                out[f"box_{axis}_angstrom"] = out.pop(f"particle_{axis}")
        for origin, centre in ORIGINS.items():
            box = f"box_{origin[-10]}_angstrom"
            if centre in out and box in out:
                out[origin] = (*out[centre], *out[box])
        for name in (*CTF_COLUMNS, *OPTICS):
            if VARIABLES[name].part.partition(".")[2] in ref.exposures:
                out.setdefault(name, ())
        return out

    def columns(self, ref: ProductRef, ids: np.ndarray, parts: Iterable[str] | None = None) -> dict[str, np.ndarray]:
        """Columns of some parts (all if None) for ``ids``; NaN or -1 for particles that a step did not process.

        Raises
        ------
        StoreError
            If the step that gave a part has none of the particles: that is another set, not a missing value.
        """
        out: dict[str, np.ndarray] = {}
        wanted = [p for p in ref.parts if parts is None or p in set(parts)]
        for part in wanted:
            place = ref.parts[part]
            names = self._names(place, part)
            given = self._of(place, names, None)
            same = same_ids(given.ids, ids)
            at = np.zeros(0, np.int64) if same else place_of(ids, given.ids)
            if len(at) and len(given.ids) and (at < 0).all():
                raise StoreError(
                    f"{place} holds none of the particles of {ref.step}: they come from {births_text(ids)}, its own from "
                    f"{births_text(given.ids)}.",
                    "the two sets come from different picking runs",
                    "transfer values between them by coordinates with the stage match",
                )
            for name in names:
                if name in given.columns:
                    out[_AS_SET.get(name, name)] = given.columns[name] if same else aligned(given.columns[name], at)
        self._complete(ref, ids, out)
        return out

    def _complete(self, ref: ProductRef, ids: np.ndarray, out: dict[str, np.ndarray]) -> None:
        """Add positions in angstrom, and origins relative to the box, derived from the parts."""
        needs_pixel = (*_PLACES, *_OF_IMAGES)
        if not any(name in out for name in needs_pixel):
            return
        pixel: np.ndarray | None = self.of_runs(ref, *row_runs(ids), ["pixel_size_angstrom"]).get("pixel_size_angstrom")
        if pixel is None:
            pixel = out.get("particle_pixel_size_angstrom", np.ones(len(ids)))
        for name, angstrom in _PLACES.items():
            if name in out:
                out[angstrom] = np.multiply(out.pop(name), pixel, dtype=np.float64)
        for axis in ("y", "x"):
            if f"particle_{axis}" in out:
                out[f"box_{axis}_angstrom"] = np.multiply(out[f"particle_{axis}"], pixel, dtype=np.float64)
        for origin, centre in ORIGINS.items():
            box = f"box_{origin[-10]}_angstrom"
            if centre in out and box in out:
                out[origin] = np.subtract(out[box], out[centre], out=np.empty(len(ids), np.float32), dtype=np.float64, casting="same_kind")

    def of_exposures(self, ref: ProductRef, rows: np.ndarray, names: Iterable[str]) -> dict[str, np.ndarray]:
        """Values of a set's exposures for ``rows`` (which may repeat); names that nothing gives are left out."""
        starts, counts = runs(rows)
        return self.of_runs(ref, rows[starts], counts, names)

    def of_runs(self, ref: ProductRef, rows: np.ndarray, counts: np.ndarray, names: Iterable[str]) -> dict[str, np.ndarray]:
        """Like :meth:`of_exposures`, for runs of particles of one exposure from ``identity.row_runs``."""
        out = {}
        for name in names:
            part = VARIABLES[name].part.partition(".")[2]
            place = ref.exposures.get(part)
            if place is None:
                continue
            known = self.exposure_values(place, name, ref.optics)
            if known is not None:
                out[name] = np.repeat(aligned(known[1], place_of_row(rows, known[0])), counts)
        return out

    def exposure_values(self, place: str, name: str, optics: str = "") -> tuple[np.ndarray, np.ndarray] | None:
        """Rows and values of a scalar of exposures: from the generation that gave it, else from the registry.

        ``optics``: the earlier result whose optics to use; empty: the current ones.
        """
        if "|" in place:
            return _first_of([self.exposure_values(one, name, optics) for one in place.split("|")])
        generation = self.project.generation_at(place)
        if name in generation.meta["gives"]:
            table = self.project.table_at(place, [name])
            return table.row, table[name]
        items = self.project.items()
        values = self.known_outside(items, name, optics)
        if all(v is None for v in values):
            return None
        return np.array([i.row for i in items], np.int64), np.array([np.nan if v is None else float(v) for v in values])

    def known_outside(self, items: list[Item], name: str, optics: str) -> list[Any]:
        """Values of exposures from the registry and the data sets; optics as in an earlier result, if one is named."""
        values = self.project.values_of(items, name)
        if not optics or name not in OPTICS:
            return values
        then = self._optics_then(optics)
        return [v if name in i.inputs else then.get(i.row, {}).get(name, v) for i, v in zip(items, values)]

    def _optics_then(self, result: str) -> dict[int, dict[str, float | None]]:
        """Optics by row as recorded with an earlier result, ``STEP@STAGE/KEY``."""
        label, _, place = result.partition("@")
        line = line_of(self.project.path / "stages" / place, label)
        given = line.optics if line is not None else []
        return {row: one.values for one in given for first, last in one.rows for row in range(first, last + 1)}

    # --- one generation -----------------------------------------------------------------------------------------------------
    def _names(self, place: str, part: str) -> tuple[str, ...]:
        """Small columns of a part that a generation contains."""
        gives = self.project.generation_at(place).meta["gives"]
        columns = [VARIABLES[n] for n in gives if n in VARIABLES]
        extra = ("particle_pixel_size_angstrom",) if part == "image" else ()
        skipped = ("particle_id", "natural_key", *_IMAGE_PLACES, *extra)
        chosen = [v.name for v in columns if v.part == f"particles.{part}" and v.ragged and v.kind != "bulk" and v.name not in skipped]
        return tuple(n for n in (*chosen, *extra) if n in gives)

    def _of(self, place: str, names: tuple[str, ...], threshold: float | str | None, *, alive: bool = False, placed: bool = False) -> Given:
        generation = self.project.generation_at(place)
        key, stamp = (place, names, threshold, alive, placed), self._stamp(generation)
        kept = self._kept.get(key)
        if kept is None or kept[0] != stamp:
            made = self._per_item(place, names, threshold, alive, placed) if generation.meta["per_item"] else self._single(place, names)
            made.ids.flags.writeable = False  # shared with all later callers
            kept = self._kept[key] = stamp, made
        return kept[1]

    def _stamp(self, generation: Generation) -> Any:
        if not generation.meta["per_item"]:
            return generation.stamp()
        recipes = self.project.state.recipes_at(f"{generation.path.parent.name}/{generation.key}")
        return generation.stamp(), self.project.registry_stamp(), tuple(sorted(recipes.items()))

    def _per_item(self, place: str, names: tuple[str, ...], threshold: float | str | None, alive: bool, placed: bool) -> Given:
        birth = bool(self.project.generation_at(place).meta.get("birth"))
        gives = self.project.generation_at(place).meta["gives"]
        extra = [n for n in ("particle_id", "particle_count", "pick_score", "pick_threshold") if n in gives]
        table = self.project.table_at(place, [*extra, *names])
        ids, counts = table.columns["particle_id"].flat, lengths(table, "particle_id")
        row, slot = (np.repeat(table.row.astype(np.int32), counts), within(counts)) if placed else (_NOT_ASKED, _NOT_ASKED)
        columns = {n: _per_particle(table, n, counts) for n in names}
        if birth and alive:
            score = table.columns["pick_score"].flat
            limit = np.repeat(table["pick_threshold"], counts) if threshold == "auto" and "pick_threshold" in gives else threshold
            mask = accepted(score, None if isinstance(limit, str) else limit)
            ids = ids[mask]
            columns = {n: v[mask] for n, v in columns.items()}
        order = np.argsort(ids, kind="stable") if len(ids) > 1 and not (ids[1:] > ids[:-1]).all() else slice(None)
        return Given(ids[order], {n: v[order] for n, v in columns.items()}, *((row[order], slot[order]) if placed else (row, slot)))

    def _single(self, place: str, names: tuple[str, ...]) -> Given:
        """Values of a single-result generation."""
        generation = self.project.generation_at(place)
        record = generation.committed().get(0)
        if record is None:
            raise StoreError(f"{place} is not finished.", "its run was stopped", "run the project again: it resumes where it stopped")
        crc = record["shards"].get("particle_id")
        kept = self._ids.get(place)
        if kept is None or kept[0] != crc:
            kept = self._ids[place] = crc, np.asarray(generation.read(record, "particle_id"), np.int64)
        ids = kept[1]
        columns = {n: generation.read(record, n) for n in names if n in record["shards"]}
        columns |= {n: np.full(len(ids), record["columns"][n]) for n in names if n in record["columns"] and not VARIABLES[n].dims}
        if number := class_of(parted(place)[1]):
            here = np.asarray(generation.read(record, "class3d_number")) == number
            ids, columns = ids[here], {n: values[here] for n, values in columns.items()}
        return Given(ids, columns, _NOT_ASKED, _NOT_ASKED)

    def images(self, place: str) -> Given:
        """Row and slot of every image of a generation, by id."""
        generation = self.project.generation_at(place)
        if not generation.meta["per_item"]:  # a union of several extractions
            united = self._of(place, _IMAGE_PLACES, None)
            giver, row, slot = (united.columns[n] for n in _IMAGE_PLACES)
            return Given(united.ids, {}, row, slot, tuple(generation.meta["image_givers"]), giver)
        given = self._of(place, (), None, placed=True)
        if generation.meta.get("birth"):  # particles no longer found are at the end of a birth table and have no image
            table = self.project.table_at(place, ["particle_count"])
            count = dict(zip(table.row.tolist(), table["particle_count"].tolist()))
            there = given.slot < np.array([count[r] for r in given.row.tolist()], np.int64)
            if not there.all():
                return Given(given.ids[there], {}, given.row[there], given.slot[there])
        return given


def class_of(output: str) -> int:
    """Number of the 3D class whose particles and map an output is, ``class2``; 0 for any other."""
    number = output.removeprefix("class")
    return int(number) if output.startswith("class") and number.isdecimal() else 0


def kept_rows(project: Project, place: str) -> np.ndarray | None:
    """Rows of the exposures kept by an exposure selection at a place; None if nothing was selected there (yet)."""
    if not place or "|" in place:
        return None
    generation = project.generation_at(place)
    record = generation.committed().get(0) if not generation.meta["per_item"] else None
    if record is None or "exposure_row" not in {*record["shards"], *record["columns"]}:
        return None
    return np.asarray(generation.read(record, "exposure_row"))


def _first_of(known: list[tuple[np.ndarray, np.ndarray] | None]) -> tuple[np.ndarray, np.ndarray] | None:
    """Rows and values of several givers, sorted by row; for a row in several of them, the first value that is a number."""
    found = [one for one in known if one is not None]
    if not found:
        return None
    rows, values = (np.concatenate([one[i] for one in found]) for i in (0, 1))
    order = np.lexsort((np.arange(len(rows)), np.isnan(values), rows))
    rows, first = np.unique(rows[order], return_index=True)
    return rows, values[order][first]


def lengths(table: Table, name: str) -> np.ndarray:
    """Length of a ragged column for each item."""
    return table.columns[name].shapes[:, 0]


def runs(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Starts and lengths of the runs of equal values."""
    if not len(values):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    starts = np.concatenate([[0], np.flatnonzero(values[1:] != values[:-1]) + 1])
    return starts, np.diff(np.append(starts, len(values)))


def within(counts: np.ndarray) -> np.ndarray:
    """0, 1, ... within each item."""
    places = np.arange(int(counts.sum()), dtype=np.int32)
    places -= np.repeat((np.cumsum(counts) - counts).astype(np.int32), counts)
    return places


def place_of_row(rows: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Index of each row among known ones (sorted), -1 if missing."""
    if not len(known):
        return np.full(len(rows), -1)
    at = np.minimum(np.searchsorted(known, rows), len(known) - 1)
    return np.where(known[at] == rows, at, -1)


def _per_particle(table: Table, name: str, counts: np.ndarray) -> np.ndarray:
    """Flatten a ragged column, or repeat a scalar; columns shorter than the ids are padded."""
    if not VARIABLES[name].ragged:
        return np.repeat(table[name], counts)
    own = lengths(table, name)
    flat = table.columns[name].flat
    if (own == counts).all():
        return flat
    out = np.full(int(counts.sum()), np.nan if flat.dtype.kind == "f" else -1, flat.dtype)
    out[within(counts) < np.repeat(own, counts)] = flat
    return out
