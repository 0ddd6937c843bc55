"""What other programs say of an exposure: rows of a particle table, a file of picks. The driver reads them; items carry their own part."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from cryodask.errors import InputError
from cryodask.products import columns_of
from cryodask.run.recipe import Step
from cryodask.store.birthbook import BirthBook
from cryodask.store.generation import Generation
from cryodask.store.identity import birth_of, copy_of, make_ids, number_of, parent_of, row_of
from cryodask.store.lines import Record
from cryodask.store.project import Item, Project
from cryodask.store.shards import Layout
from cryodask.vocabulary import VARIABLES

_WHOLE_BYTES = 1 << 22
_PIECES, _PIECE_BYTES = 8, 1 << 16


def content_id(path: Path, size: int) -> str:
    """Identity of the bytes of a file: its size, and the checksum of all of it up to 4 MiB, of 8 pieces spread over a larger one."""
    import google_crc32c

    whole = size <= _WHOLE_BYTES
    starts = [0] if whole else [i * (size - _PIECE_BYTES) // (_PIECES - 1) for i in range(_PIECES)]
    crc = 0
    try:
        with open(path, "rb") as file:
            for start in starts:
                file.seek(start)
                crc = google_crc32c.extend(crc, file.read(_WHOLE_BYTES if whole else _PIECE_BYTES))
    except OSError:
        return f"unreadable:{path.name}"
    return f"{size}-{crc:08x}"


class Import(Protocol):
    """What a step that imports gives each exposure."""

    def values(self, item: Item) -> dict[str, Any]:
        """Values that the stage needs of this exposure; they travel with it and are not stored."""
        ...

    def digest(self, item: Item) -> str:
        """Changes when what is said of this exposure changes."""
        ...

    def claims(self) -> frozenset[int]:
        """Births of this project whose particles may come back with it."""
        ...

    def left_out(self, items: Iterable[Item]) -> tuple[dict[str, int], bool]:
        """Rows of exposures that are not among `items`, by the name that the file gives them; and whether these are all of its rows."""
        ...


def imports_of(project: Project, steps: Iterable[Step]) -> dict[str, Import]:
    """The imports among some steps, by label."""
    out: dict[str, Import] = {}
    former = Former(project)
    for step in steps:
        if step.stage.name == "import_project":
            out[step.label] = ProjectImport(step, project)
        if step.stage.name == "import_particles":
            out[step.label] = TableImport(step, former)
        elif step.stage.name == "import_picks":
            out[step.label] = PicksImport(Path(step.params.folder), former)
        elif step.stage.name == "edit_picks" and step.params.file:
            out[step.label] = EditsImport(Path(step.params.file), former)
    return out


class Former:
    """What exposures were called before: a file that was written then speaks of them by these names."""

    def __init__(self, project: Project | None = None) -> None:
        self._names: dict[int, list[str]] = {}
        for name, row in project.former_names().items() if project is not None else ():
            self._names.setdefault(row, []).append(name)

    def names(self, item: Item) -> list[str]:
        """All names of an exposure, the present one first, then the latest."""
        return [item.name, *reversed(self._names.get(item.row, ()))]

    def all(self) -> set[str]:
        """All names that an exposure had before."""
        return {name for names in self._names.values() for name in names}


class TableImport:
    """Rows of a particle table, by micrograph; each travels with its exposure, so that no worker reads the table."""

    def __init__(self, step: Step, former: Former | None = None) -> None:
        from cryodask.formats.star import find_beside
        from cryodask.stages.import_particles import read_table

        self._former = former or Former()
        self.path = str(step.params.star)
        self.table = read_table(self.path)
        self._images = bool(step.params.images)
        self._codes = {name: code for code, name in enumerate(self.table.micrographs)}
        self._stems = {Path(name).stem: code for name, code in self._codes.items()}
        self._digests = row_digests(self.table)
        self._stacks: list[Path | None] = []
        if self._images:
            self._stacks = [find_beside(stack, Path(self.path)) for stack in self.table.stacks]
            self._contents = [content_id(p, p.stat().st_size) if p else n for p, n in zip(self._stacks, self.table.stacks)]

    def stack_of(self, code: int) -> Path | None:
        """A stack that holds images of a micrograph, where one was found."""
        used = np.unique(self.table.stack[self.table.rows_of(code)]).tolist() if self._stacks else []
        return next((self._stacks[i] for i in used if self._stacks[i] is not None), None)

    def _code(self, item: Item) -> int | None:
        named = self._codes.get(str(item.inputs.get("micrograph_name")))
        return named if named is not None else next((self._stems[n] for n in self._former.names(item) if n in self._stems), None)

    def _rows(self, item: Item) -> np.ndarray:
        code = self._code(item)
        return self.table.rows_of(code) if code is not None else np.zeros(0, np.int64)

    def claims(self) -> frozenset[int]:
        """Births that the ids of the table name."""
        ids = self.table.particle_id
        return frozenset(np.unique(birth_of(ids[ids > 0])).tolist()) if ids is not None else frozenset()

    def left_out(self, items: Iterable[Item]) -> tuple[dict[str, int], bool]:
        """Rows of micrographs that are none of these exposures."""
        used = {self._code(item) for item in items}
        counts = np.diff(self.table.start)
        unknown = [code for code in range(len(counts)) if counts[code] and code not in used]
        return {self.table.micrographs[code]: int(counts[code]) for code in unknown}, int(counts[unknown].sum()) == len(self.table)

    def values(self, item: Item) -> dict[str, Any]:
        """Rows of the exposure's particles, the table's path, and the micrograph's name there."""
        from cryodask.stages.import_particles import rows_of

        name = str(item.inputs.get("micrograph_name", item.name))
        return {"particles_path": self.path, "micrograph_name": name, "particle_rows": rows_of(self.table, self._rows(item))}

    def digest(self, item: Item) -> str:
        """Of the rows, whatever their order, and of the stacks that hold their images."""
        rows = self._rows(item)
        digest = hashlib.blake2b(np.sort(self._digests[rows]).tobytes(), digest_size=8)
        if self._images:
            digest.update("".join(self._contents[i] for i in np.unique(self.table.stack[rows]).tolist()).encode())
        return digest.hexdigest()


def row_digests(table: Any) -> np.ndarray:
    """A number per row of a particle table: changes with any of its values, whatever its place in the file."""
    total = np.zeros(len(table), np.uint64)
    with np.errstate(over="ignore"):
        columns = [*(v for _, v in sorted(table.columns.items())), table.image_index.astype(np.float64)]
        for i, values in enumerate(columns):
            exact = np.asarray(values, np.int64 if values.dtype == np.int64 else np.float64)  # an id is more than a float holds
            z = np.ascontiguousarray(exact).view(np.uint64) + np.uint64(0x9E3779B97F4A7C15) * np.uint64(2 * i + 1)
            z = (z ^ (z >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9)
            total += z ^ (z >> np.uint64(29))
    return total


class PicksImport:
    """STAR files of picks: ``NAME.star`` or ``NAME_anything.star`` of each micrograph, never that of a longer name."""

    def __init__(self, folder: Path, former: Former | None = None) -> None:
        self._former = former or Former()
        self._files = sorted(folder.glob("*.star"), reverse=True)
        if not self._files:
            raise InputError(f"There is no STAR file in {folder}.", "a typo in the path", "give the folder with the picks")
        self._known: dict[frozenset[str], dict[str, Path]] = {}
        self._names: frozenset[str] = frozenset()

    def among(self, names: Iterable[str]) -> dict[str, Path]:
        """File of each of some micrographs."""
        known = frozenset(names)
        if known not in self._known:
            out: dict[str, Path] = {}
            for path in self._files:
                stem = path.stem
                ends = (n for n in range(len(stem), 0, -1) if stem[:n] in known and not stem[n : n + 1].isalnum())
                end = next(ends, None)
                if end is not None:
                    out[stem[:end]] = path
            self._known = {known: out}
        return self._known[known]

    def settle(self, names: Iterable[str]) -> None:
        """Names of all micrographs of the project: a file belongs to the longest that fits."""
        self._names = frozenset(names) | self._former.all()

    def _file(self, item: Item) -> Path | None:
        found = self.among(self._names if item.name in self._names else self._names | {item.name})
        return next((found[name] for name in self._former.names(item) if name in found), None)

    def values(self, item: Item) -> dict[str, Any]:
        """Path of the exposure's file of picks, where it has one."""
        path = self._file(item)
        return {"coordinates_path": str(path)} if path is not None else {}

    def claims(self) -> frozenset[int]:
        """None: files of picks carry no ids."""
        return frozenset()

    def left_out(self, items: Iterable[Item]) -> tuple[dict[str, int], bool]:
        """Files of micrographs that are none of these exposures."""
        known = {self._file(item) for item in items}
        unknown = [path for path in self._files if path not in known]
        return {path.name: 1 for path in unknown}, len(unknown) == len(self._files)

    def digest(self, item: Item) -> str:
        """Of the file's content."""
        path = self._file(item)
        return content_id(path, path.stat().st_size) if path is not None else "none"


class EditsImport:
    """Edits of picks by a person, by micrograph."""

    def __init__(self, path: Path, former: Former) -> None:
        from cryodask.stages.edit_picks import read_edits

        self._edits, self._former = read_edits(path), former

    def _of(self, item: Item) -> list[dict[str, Any]]:
        return next((self._edits[name] for name in self._former.names(item) if name in self._edits), [])

    def values(self, item: Item) -> dict[str, Any]:
        """Edits of the exposure, in the order of the table."""
        return {"pick_edits": self._of(item)}

    def claims(self) -> frozenset[int]:
        """None: the picks that pass are given with their ids."""
        return frozenset()

    def left_out(self, items: Iterable[Item]) -> tuple[dict[str, int], bool]:
        """Edits of micrographs that are none of these exposures."""
        names = {name for item in items for name in self._former.names(item)}
        unknown = {name: len(edits) for name, edits in self._edits.items() if name not in names}
        return unknown, bool(unknown) and len(unknown) == len(self._edits)

    def digest(self, item: Item) -> str:
        """Of these edits."""
        edits = self._of(item)
        return hashlib.blake2b(repr(edits).encode(), digest_size=8).hexdigest() if edits else "none"


class ProjectImport:
    """Exposures and particles of another project; a particle is named by the content of its exposure, its birth's identity and number."""

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
        """Number here of each birth there, by the identity of the birth."""
        there = {number: identity for identity, number in self.other.state.births.items()}
        found = sorted(set(birth_of(self.ids).tolist()))
        assert self._here is not None
        return {number: self._here.state.birth_number(there[number]) for number in found}

    def claims(self) -> frozenset[int]:
        """Births of the set, as they are numbered here."""
        return frozenset(self._births().values())

    def left_out(self, items: Iterable[Item]) -> tuple[dict[str, int], bool]:
        """Nothing: its exposures are those of the other project."""
        return {}, False

    def values(self, item: Item) -> dict[str, Any]:
        """Columns of the exposure and of its particles, and where their images lie."""
        from cryodask.store.particles import image_places

        other = self._rows.get(item.content)
        here = np.flatnonzero(self._row == other.row) if other is not None else np.zeros(0, np.int64)
        births, ids = self._births(), self.ids[here]
        own = np.array([births[int(b)] for b in birth_of(ids)], np.int64)
        out: dict[str, Any] = {"claimed_id": make_ids(own, item.row, number_of(ids), copy_of(ids)), "bulk": {}}
        stored = {**{f"particle_{n}": n for n in ("defocus_u_angstrom", "defocus_v_angstrom", "defocus_angle_deg", "phase_shift_deg")}}
        for name in (*self._particle_names, "half_set"):
            column = self._columns.get(stored.get(name, name))
            if column is not None:
                out[name] = column[here]
        if other is not None:
            for name in (n for n in self._names if not _is_bulk(n)):
                known = self.other.sets.of_exposures(self.ref, np.array([other.row]), [name])
                if name in known:
                    out[name] = float(known[name][0])
        # one number of the exposure, also where the other project has none of its particles now
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
        """Generations that gave a part of exposures there; several where sets were united: the first that has an exposure counts."""
        return [self.other.generation_at(place) for place in self.ref.exposures.get(part, "").split("|") if place]

    def _born_at(self, row: int, ids: np.ndarray, y: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where particles were born there, pixels: a person may have moved them since; where they are, if no table says it."""
        born: dict[int, tuple[float, float]] = {}
        for birth in np.unique(birth_of(ids)).tolist():
            known = self._book.at(row, birth)
            columns = (known[n][known["own"]].tolist() for n in ("particle_id", "pick_y", "pick_x"))
            born.update((one, (b, a)) for one, b, a in zip(*columns))
        at = [born.get(one, (b, a)) for one, b, a in zip(parent_of(ids).tolist(), y.tolist(), x.tolist())]
        places = np.array(at, np.float64).reshape(-1, 2)
        return places[:, 0], places[:, 1]

    def images_of(self, item: Item) -> str:
        """Which sizes and types the images of the exposure have there: empty for those of the other project's first data set."""
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
        """Of the particles of the exposure, and of what gave their parts."""
        other = self._rows.get(item.content)
        ids = self.ids[self._row == other.row] if other is not None else self.ids[:0]
        digest = hashlib.blake2b(ids.tobytes(), digest_size=8)
        optics = [self.other.value_of(other, name) for name in columns_of("exposures", "optics")] if other is not None else []
        digest.update(repr((sorted(self.ref.parts.items()), sorted(self.ref.exposures.items()), optics)).encode())
        if other is not None:
            digest.update("".join(f"{place}:{self._made(place).get(other.row)};" for place in self._places).encode())
        return digest.hexdigest()

    def has(self, item: Item) -> bool:
        """Whether the exposure counts there."""
        return item.content in self._rows

    def digest_of(self, part: str, item: Item) -> str:
        """Of a part of an exposure as it is there, whatever particles it has."""
        other = self._rows[item.content]
        values = [self.other.value_of(other, name) for name in columns_of("exposures", part)]
        places = [place for place in self.ref.exposures.get(part, "").split("|") if place]
        made = [self._made(place).get(other.row) for place in places if self.other.generation_at(place).meta["per_item"]]
        return repr((places, values, made))

    @functools.cached_property
    def _places(self) -> list[str]:
        """Generations there in which exposures have results of their own."""
        given = {place for places in (*self.ref.parts.values(), *self.ref.exposures.values()) for place in places.split("|")}
        given |= set(self._images.givers if self._images is not None else ())
        return sorted(place for place in given if self.other.generation_at(place).meta["per_item"])

    def _made(self, place: str) -> dict[int, tuple[str, ...]]:
        """What the result of each exposure was made from there: it may be another one in the same generation, after a move or a repair."""
        if place not in self._made_from:
            table = self.other.table_at(place, ())
            made = zip(*(getattr(table, name).astype(str).tolist() for name in ("input", "recipe", "slice")))
            self._made_from[place] = dict(zip(table.row.tolist(), made))
        return self._made_from[place]


def _is_bulk(name: str) -> bool:
    return VARIABLES[name].kind == "bulk"


# --- what goes nowhere -------------------------------------------------------------------------------------------------------
def left_out_text(label: str, missing: dict[str, int]) -> str:
    """A line for the run: rows of exposures that the step does not have."""
    return (
        f"{label}: {_several(sum(missing.values()), 'row')} of {_several(len(missing), 'micrograph')} left out, not among the exposures "
        f"of this step: {_named(missing)}"
    )


def nothing_fits(label: str, missing: dict[str, int]) -> InputError:
    """The refusal where all rows are of exposures that the step does not have."""
    return InputError(
        f"{left_out_text(label, missing)}. These are all rows of its file.",
        "the file belongs to another session, or its micrographs were renamed",
        "give the file of this session; a micrograph is known by its name without folder and ending",
    )


_TOLD = {
    "twice": "left out, for the particle is there already",
    "unmatched": "without effect, for the particle is not there (another picking, or it is not accepted)",
    "unproven": "with an id that is not of this project, or names another particle here: born again with an id of this step",
    "none_left": "no longer in its source: these exposures have no particles of it now",
}


def rows_told(label: str, records: Sequence[Record]) -> list[str]:
    """Lines for the run: what became of rows in some records of a step."""
    out = []
    for kind, text in _TOLD.items():
        counts = {str(r["name"]): int(r[kind]) for r in records if r.get(kind)}
        if counts:
            out.append(f"{label}: {_several(sum(counts.values()), 'row')} {text}: {_named(counts)}")
    return out


def _several(count: int, what: str) -> str:
    return f"{count:,} {what}" + ("s" if count != 1 else "")


def _named(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in list(counts.items())[:3]) + (", ..." if len(counts) > 3 else "")
