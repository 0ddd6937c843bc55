"""Imported data of exposures: rows of a particle table, picks files, edits. The driver reads them; each item carries its own part."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from cryodask.edits.frozen import frozen
from cryodask.errors import InputError
from cryodask.formats.star import bare, stem
from cryodask.run.content import content_id
from cryodask.run.project_import import ProjectImport
from cryodask.run.recipe import Step
from cryodask.store.identity import birth_of
from cryodask.store.lines import Record
from cryodask.store.project import Item, Project


class Import(Protocol):
    """What an import step gives each exposure."""

    def values(self, item: Item) -> dict[str, Any]:
        """Values of this exposure for the stage; they are sent with it and not stored."""
        ...

    def digest(self, item: Item) -> str:
        """Digest of the imported data of this exposure."""
        ...

    def claims(self) -> frozenset[int]:
        """Births of this project whose particles may be reimported."""
        ...

    def left_out(self, items: Iterable[Item]) -> tuple[dict[str, int], bool]:
        """Rows of exposures that are not among `items`, by their name in the file; and whether these are all of its rows."""
        ...

    def remarks(self) -> list[str]:
        """What the run should report about the source as a whole."""
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
        elif step.stage.name == "edit_picks":
            out[step.label] = EditsImport(Path(step.params.file), former) if step.params.file else FrozenEdits(project)
    return out


class Former:
    """Former names of exposures, which older files may use."""

    def __init__(self, project: Project | None = None) -> None:
        self._names: dict[int, list[str]] = {}
        for name, row in project.former_names().items() if project is not None else ():
            self._names.setdefault(row, []).append(name)

    def names(self, item: Item) -> list[str]:
        """All names of an exposure, the current one first, then the latest."""
        return [item.name, *reversed(self._names.get(item.row, ()))]

    def all(self) -> set[str]:
        """All former names of exposures."""
        return {name for names in self._names.values() for name in names}


class Names:
    """Names of exposures, without folder and extension; cryoSPARC puts a number of 6 to 21 digits before them."""

    def __init__(self, names: Iterable[str]) -> None:
        self._bare: dict[str, list[str]] = {}
        for name in names:
            self._bare.setdefault(bare(name), []).append(name)

    def of(self, name: str) -> str | None:
        """The one that a name means: itself, or the only one that is the same without such a number."""
        alike = self._bare.get(bare(name), [])
        return name if name in alike else alike[0] if len(alike) == 1 else None


class TableImport:
    """Rows of a particle table by micrograph; they are sent with the exposure, so that no worker reads the table."""

    def __init__(self, step: Step, former: Former | None = None) -> None:
        from cryodask.formats.star import find_beside
        from cryodask.stages.import_particles import checked, read_table

        self._former = former or Former()
        self.path = str(step.params.star)
        self.table = read_table(self.path)
        self._size = checked(self.table, step.params)
        self._images = bool(step.params.images)
        self._micrograph_pixel, self._of_exposures = step.params.micrograph_pixel_size_angstrom, bool(step.inputs.get("exposures"))
        self._codes = {name: code for code, name in enumerate(self.table.micrographs)}
        self._stems = Names(stem(name) for name in self._codes)
        self._code_of = {stem(name): code for name, code in self._codes.items()}
        self._digests = self.table.digests
        self._stacks: list[Path | None] = []
        if self._images:
            self._stacks = [find_beside(stack, Path(self.path)) for stack in self.table.stacks]
            self._contents = [content_id(p, p.stat().st_size) if p else n for p, n in zip(self._stacks, self.table.stacks)]
            self.table = self.table.with_stacks(self._contents)

    def stack_of(self, code: int) -> Path | None:
        """A stack with images of a micrograph, if one was found."""
        used = np.unique(self.table.stack[self.table.rows_of(code)]).tolist() if self._stacks else []
        return next((self._stacks[i] for i in used if self._stacks[i] is not None), None)

    def _code(self, item: Item) -> int | None:
        named = self._codes.get(str(item.inputs.get("micrograph_name")))
        if named is not None:
            return named
        found = next((known for n in self._former.names(item) if (known := self._stems.of(n)) is not None), None)
        return self._code_of[found] if found is not None else None

    def _rows(self, item: Item) -> np.ndarray:
        code = self._code(item)
        return self.table.rows_of(code) if code is not None else np.zeros(0, np.int64)

    def claims(self) -> frozenset[int]:
        """Births named by the ids in the table."""
        ids = self.table.particle_id
        return frozenset(np.unique(birth_of(ids[ids > 0])).tolist()) if ids is not None else frozenset()

    def left_out(self, items: Iterable[Item]) -> tuple[dict[str, int], bool]:
        """Rows of micrographs that are not among these exposures."""
        used = {self._code(item) for item in items}
        counts = np.diff(self.table.start)
        unknown = [code for code in range(len(counts)) if counts[code] and code not in used]
        return {self.table.micrographs[code]: int(counts[code]) for code in unknown}, int(counts[unknown].sum()) == int(counts.sum())

    def remarks(self) -> list[str]:
        """Rows whose image occurs twice, and what no stage corrects."""
        from cryodask.stages._particle_tables import uncorrected, unknown_pixel

        codes, counts = np.unique(self.table.micrograph[self.table.repeated], return_counts=True)
        twice = {self.table.micrographs[code]: count for code, count in zip(codes.tolist(), counts.tolist())}
        text = f"{_several(len(self.table.repeated), 'row')} left out, because an earlier row has the same image: {_named(twice)}"
        pixel = unknown_pixel(self.table, self._micrograph_pixel, exposures=self._of_exposures)
        return [*([text] if twice else []), *pixel, *uncorrected(self.table)]

    def values(self, item: Item) -> dict[str, Any]:
        """Rows of the exposure's particles, the table's path, and the micrograph's name there."""
        from cryodask.stages.import_particles import rows_of

        name = str(item.inputs.get("micrograph_name", item.name))
        return {
            "particles_path": self.path,
            "micrograph_name": name,
            "particle_rows": rows_of(self.table, self._rows(item)) | {"size": self._size},
        }

    def digest(self, item: Item) -> str:
        """Digest of the rows in any order, and of the stacks with their images."""
        rows = self._rows(item)
        digest = hashlib.blake2b(np.sort(self._digests[rows]).tobytes(), digest_size=8)
        if self._images:
            digest.update("".join(self._contents[i] for i in np.unique(self.table.stack[rows]).tolist()).encode())
        if self._size is not None:
            digest.update(str(self._size).encode())
        if self.table.kept_optics is not None:
            kept = self.table.kept_optics
            digest.update("".join(kept.names[i] for i in np.unique(kept.codes[rows]).tolist()).encode())
        return digest.hexdigest()


class PicksImport:
    """STAR files of picks: ``NAME.star`` or ``NAME_anything.star`` for each micrograph, unless it belongs to a longer name."""

    def __init__(self, folder: Path, former: Former | None = None) -> None:
        self._folder, self._former = folder, former or Former()
        self._files = sorted(folder.glob("*.star"))
        if not self._files:
            raise InputError(f"There is no STAR file in {folder}.", "", "give the folder with the picks")
        self._known: dict[frozenset[str], dict[str, Path]] = {}
        self._names: frozenset[str] = frozenset()

    def among(self, names: Iterable[str]) -> dict[str, Path]:
        """Picks files of some micrographs.

        Raises
        ------
        InputError
            If a micrograph has several.
        """
        known = frozenset(names)
        if known not in self._known:
            fitting: dict[str, list[Path]] = {}
            all_names = Names(known)
            for path in self._files:
                stem = path.stem
                starts = (stem[:n] for n in range(len(stem), 0, -1) if not stem[n : n + 1].isalnum())
                name = next((found for start in starts if (found := all_names.of(start)) is not None), None)
                if name is not None:
                    fitting.setdefault(name, []).append(path)
            for name, paths in fitting.items():
                if len(paths) > 1:
                    raise InputError(
                        f"{name} has {len(paths)} picks files in {self._folder}: {', '.join(p.name for p in paths)}.",
                        "several pickers wrote into one folder",
                        "keep one of them there",
                    )
            self._known = {known: {name: paths[0] for name, paths in fitting.items()}}
        return self._known[known]

    def settle(self, names: Iterable[str]) -> None:
        """Set the names of all micrographs of the project: a file belongs to the longest one that matches."""
        self._names = frozenset(names) | self._former.all()

    def _named(self, item: Item) -> tuple[str, Path] | None:
        """The exposure's picks file, and the name of the exposure that it fits."""
        found = self.among(self._names if item.name in self._names else self._names | {item.name})
        return next(((name, found[name]) for name in self._former.names(item) if name in found), None)

    def _file(self, item: Item) -> Path | None:
        named = self._named(item)
        return named[1] if named is not None else None

    def values(self, item: Item) -> dict[str, Any]:
        """Path of the exposure's picks file, if it has one, and the name by which its rows may call the exposure."""
        named = self._named(item)
        return {"coordinates_path": str(named[1]), "micrograph_name": named[0]} if named is not None else {}

    def claims(self) -> frozenset[int]:
        """Empty: picks files carry no ids."""
        return frozenset()

    def left_out(self, items: Iterable[Item]) -> tuple[dict[str, int], bool]:
        """Files of micrographs that are not among these exposures."""
        known = {self._file(item) for item in items}
        unknown = [path for path in self._files if path not in known]
        return {path.name: 1 for path in unknown}, len(unknown) == len(self._files)

    def remarks(self) -> list[str]:
        """Nothing."""
        return []

    def digest(self, item: Item) -> str:
        """Digest of the file's content."""
        path = self._file(item)
        try:
            return content_id(path, path.stat().st_size) if path is not None else "none"
        except OSError:  # a link that leads nowhere: reading it says so
            return f"unreadable:{path.name if path else ''}"


class EditsImport:
    """Manual edits of picks, by micrograph."""

    def __init__(self, path: Path, former: Former) -> None:
        from cryodask.stages.edit_picks import read_edits

        self._edits, self._former = read_edits(path), former

    def _of(self, item: Item) -> list[dict[str, Any]]:
        return next((self._edits[name] for name in self._former.names(item) if name in self._edits), [])

    def values(self, item: Item) -> dict[str, Any]:
        """Edits of the exposure, in the order of the table."""
        return {"pick_edits": self._of(item)}

    def claims(self) -> frozenset[int]:
        """Empty: accepted picks keep their own ids."""
        return frozenset()

    def left_out(self, items: Iterable[Item]) -> tuple[dict[str, int], bool]:
        """Edits of micrographs that are not among these exposures."""
        names = {name for item in items for name in self._former.names(item)}
        unknown = {name: len(edits) for name, edits in self._edits.items() if name not in names}
        return unknown, bool(unknown) and len(unknown) == len(self._edits)

    def remarks(self) -> list[str]:
        """Nothing."""
        return []

    def digest(self, item: Item) -> str:
        """Digest of these edits."""
        edits = self._of(item)
        return hashlib.blake2b(repr(edits).encode(), digest_size=8).hexdigest() if edits else "none"


class FrozenEdits:
    """Edits of picks that people made in the browser and said to use."""

    def __init__(self, project: Project) -> None:
        found = frozen(project.path, "picks")
        self._edits = found.picks if found is not None else {}

    def values(self, item: Item) -> dict[str, Any]:
        """Edits of the exposure."""
        return {"pick_edits": self._edits.get(item.row, [])}

    def claims(self) -> frozenset[int]:
        """Empty: accepted picks keep their own ids."""
        return frozenset()

    def left_out(self, items: Iterable[Item]) -> tuple[dict[str, int], bool]:
        """Nothing: the edits stay, for an exposure that comes back."""
        return {}, False

    def remarks(self) -> list[str]:
        """Nothing."""
        return []

    def digest(self, item: Item) -> str:
        """Digest of these edits; empty without edits, as before anybody edited anything."""
        edits = self._edits.get(item.row)
        return hashlib.blake2b(repr(edits).encode(), digest_size=8).hexdigest() if edits else ""


# --- what goes nowhere -------------------------------------------------------------------------------------------------------
def left_out_text(label: str, missing: dict[str, int]) -> str:
    """Message about rows of exposures that the step does not have."""
    return (
        f"{label}: {_several(sum(missing.values()), 'row')} of {_several(len(missing), 'micrograph')} left out, because they "
        f"are not among the exposures of this step: {_named(missing)}"
    )


def nothing_fits(label: str, missing: dict[str, int]) -> InputError:
    """Error for a file whose rows all belong to exposures that the step does not have."""
    return InputError(
        f"{left_out_text(label, missing)}. These are all the rows of its file.",
        "the file belongs to another session, or its micrographs were renamed",
        "give the file of this session; micrographs are matched by name, without folder and extension",
    )


_TOLD = {
    "twice": "left out, because the particle is present already",
    "unmatched": "without effect, because the particle does not exist (another picking run, or not accepted)",
    "unproven": "with an id from another project, or of another particle here: imported as new particles of this step",
    "none_left": "no longer in the source: these exposures have no particles from it now",
}


def row_messages(label: str, records: Sequence[Record]) -> list[str]:
    """Messages about what happened to the rows in some records of a step."""
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
