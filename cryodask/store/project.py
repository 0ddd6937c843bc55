"""A project folder: what was processed, by what, and where it is.

::

    <project>/project.yaml     the project file as given
    <project>/project.json     name, optics, and the current generation of every stage (written by the driver only)
    <project>/items.jsonl      registry: row <-> micrograph, its input and what the input said about it (see registry.py)
    <project>/stages/<stage>/<key>/   one generation (see generation.py)
"""

from __future__ import annotations

import html
import json
import shutil
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cryodask.errors import StoreError
from cryodask.store.files import disk_errors, write_atomically
from cryodask.store.generation import Generation
from cryodask.store.lines import Record
from cryodask.store.lock import ProjectLock
from cryodask.store.registry import Item, Registry
from cryodask.store.table import Table
from cryodask.vocabulary import VARIABLES

__all__ = ["Item", "Project"]

if TYPE_CHECKING:
    import xarray as xr


_WORTH_COMPACTING = 500
"""Records beyond the compaction that are read in some 0.1 s."""


class Project:
    """A project: ``project["ctf"]`` is a lazy Dataset, ``project.joined()`` all stages by micrograph, ``project.particles()`` a table.

    All of them show the micrographs whose input is there, as it was processed in its present state; a removed input keeps its row and
    its results, which come back with it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        file = self.path / "project.json"
        if not file.is_file():
            raise StoreError(
                f"{self.path} is not a cryodask project: it has no project.json.",
                "the folder is another one, or the first run has not started yet",
                "give the folder that `cryodask run` printed as the project",
            )
        self.state: dict[str, Any] = self._read_state()
        self._registry = Registry(self.path)
        self._generations: dict[str, Generation] = {}

    def _read_state(self) -> dict[str, Any]:
        file = self.path / "project.json"
        try:
            state = json.loads(file.read_text())
            if not {"name", "constants", "generations", "order"} <= set(state):
                raise ValueError("keys are missing")
        except ValueError as error:
            raise StoreError(
                f"{file} is damaged: {error}.",
                "it was edited by hand, or the disk lost bytes",
                "remove this one file and run the project again: results are found by their keys and kept",
            ) from error
        return state

    # --- written by the driver --------------------------------------------------------------------------------------------
    @classmethod
    def create(cls, path: str | Path, name: str) -> Project:
        """Open the project at ``path``, or make an empty one."""
        folder = Path(path)
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / "project.json").exists():
                write_atomically(folder / "project.json", json.dumps({"name": name, "constants": {}, "generations": {}, "order": []}))
        return cls(folder)

    def lock(self, *, force: bool = False) -> ProjectLock:
        """The driver's lock."""
        return ProjectLock(self.path, force=force)

    def save(self) -> None:
        """Write project.json (tmp + rename)."""
        with disk_errors(self.path):
            write_atomically(self.path / "project.json", json.dumps(self.state, indent=1))

    def add_items(self, new: Iterable[tuple[str, dict[str, Any]]]) -> list[Item]:
        """Register micrographs by name; returns the items named, in order (driver only).

        A known name keeps its row and takes the new inputs, which raises its revision; one that was gone is there again.
        """
        with disk_errors(self.path):
            if self._registry.unreadable:
                self._registry.mend(self._seen())
            return self._registry.add(new)

    def keep_items(self, names: Iterable[str]) -> list[Item]:
        """Mark every item as gone that is not named: its input was removed. Returns those that went (driver only)."""
        with disk_errors(self.path):
            if self._registry.unreadable:
                self._registry.mend(self._seen())
            return self._registry.keep(names)

    def compact(self) -> None:
        """Compact every map stage whose journals have grown enough to slow readers down (driver only)."""
        for label in self.stages:
            generation = self.generation(label)
            if generation.meta["per_item"]:
                tail = generation.tail_length()
                # a share of the whole, so that a long session writes each item a few times and not once a call
                if tail >= _WORTH_COMPACTING and tail >= len(generation.table(())) // 8:
                    generation.compact()

    def _seen(self) -> dict[int, tuple[str, int]]:
        """Name and latest revision of every row that has a commit record."""
        out: dict[int, tuple[str, int]] = {}
        for label in self.stages:
            if self.generation(label).meta["per_item"]:
                for row, record in self.generation(label).records().items():
                    out[row] = (record["name"], max(int(record.get("revision", 0)), out.get(row, ("", 0))[1]))
        return out

    # --- reading ------------------------------------------------------------------------------------------------------------
    @property
    def name(self) -> str:
        """Its name."""
        return self.state["name"]

    @property
    def stages(self) -> list[str]:
        """Labels of the stages in the order of the pipeline."""
        return list(self.state["order"])

    def items(self) -> list[Item]:
        """Micrographs whose input is there, in row order."""
        return list(self._registry.present().values())

    def generation(self, label: str) -> Generation:
        """Current generation of a stage; the same object while its key is the same, for it remembers what it has read."""
        key = self.state["generations"].get(label)
        if key is None:
            known = ", ".join(self.stages) or "none yet"
            raise StoreError(
                f"Project {self.name} has no results of a stage {label!r} (it has: {known}).",
                "a typing error, or the run has not come so far",
                "run the project first",
            )
        generation = self._generations.get(label)
        if generation is None or generation.key != key:
            generation = self._generations[label] = Generation(self.path / "stages" / label / key)
        return generation

    def __contains__(self, label: str) -> bool:
        return label in self.state["generations"]

    def __getitem__(self, label: str) -> xr.Dataset:
        from cryodask.store.datasets import generation_dataset

        generation = self.generation(label)
        if not generation.meta["per_item"]:
            return generation.dataset().assign_attrs(quarantined=0)
        table = self.table(label)
        return generation_dataset(generation, table).assign_attrs(quarantined=len(table.failures))

    def table(self, label: str, names: Iterable[str] | None = None) -> Table:
        """Present items of a map stage as columns, with all of its small variables or those named; failures as records."""
        table = self.generation(label).table(names)
        items = self._registry.present()
        rows, inputs = table.row.tolist(), table.input
        shown = np.array([i for i, row in enumerate(rows) if row in items and _current(items[row], inputs[i])], dtype=np.int64)
        failures = {r: f for r, f in table.failures.items() if r in items and _current(items[r], f.get("input"))}
        return replace(table.take(shown), failures=failures)

    def records(self, label: str) -> dict[int, Record]:
        """Records of a stage that count, failures included: of a map stage those of present items, by row."""
        generation = self.generation(label)
        records = generation.records()
        if not generation.meta["per_item"]:
            return records
        items = self._registry.present()
        return {row: r for row, r in records.items() if row in items and _current(items[row], r.get("input"))}

    def micrographs(self) -> xr.Dataset:
        """The registry, the optics and the gain as a Dataset by micrograph."""
        import xarray as xr

        from cryodask.store.datasets import describe

        items = self.items()
        names = {n for item in items for n in item.inputs if n in VARIABLES}
        constants = {k: v for k, v in self.state["constants"].items() if k in VARIABLES and k not in names}
        data: dict[str, Any] = {}
        for name in sorted(names):
            var = VARIABLES[name]
            if not var.dims:
                values = [item.inputs.get(name, np.nan if var.dtype != "U" else "") for item in items]
                data[name] = ("micrograph", np.array(values, dtype=object if var.dtype == "U" else var.dtype), describe(var))
        for name, value in constants.items():
            data[name] = ("micrograph", np.full(len(items), value), describe(VARIABLES[name]))
        if self.state.get("gain"):
            data["gain"] = (VARIABLES["gain"].dims, np.load(self.path / self.state["gain"]), describe(VARIABLES["gain"]))
        coords = {"micrograph": np.array([i.name for i in items], dtype=object), "row": ("micrograph", [i.row for i in items])}
        return xr.Dataset(data, coords)

    def joined(self) -> xr.Dataset:
        """All map stages joined by micrograph: a correlation between stages is one expression.

        Micrographs that every stage has; the particle images of ``extract`` have their own ``box_y, box_x``.
        """
        import xarray as xr

        from cryodask.store.datasets import generation_dataset

        tables = {label: self.table(label) for label in self.stages if self.generation(label).meta["per_item"]}
        registry = self.micrographs()
        rows = registry["row"].values
        for table in tables.values():
            rows = np.intersect1d(rows, table.row)
        parts = [registry.isel(micrograph=np.searchsorted(registry["row"].values, rows))]
        for label, table in tables.items():
            dataset = generation_dataset(self.generation(label), table.take(np.searchsorted(table.row, rows)))
            if "particle_image" in dataset:
                dataset = dataset.rename({"y": "box_y", "x": "box_x"})
            dataset = dataset.drop_vars([v for p in parts for v in p.data_vars if v in dataset.data_vars])
            if "slot" in dataset.dims and any("slot" in p.dims for p in parts):
                dataset = dataset.rename({"slot": f"{label}_slot"})
            parts.append(dataset)
        return xr.merge(parts, join="inner", compat="override", combine_attrs="drop")

    def particles(self, label: str | None = None) -> xr.Dataset:
        """Every extracted particle in one Dataset with dimension ``particle``: its image (lazy), CTF, and what each stage found of it.

        ``label`` names the extraction where there are several; the last one by default. NaN (or -1) stands where a stage did not see
        the particle.
        """
        from cryodask.store.particles import particle_dataset

        return particle_dataset(self, label)

    def failures(self) -> list[dict[str, Any]]:
        """Quarantined items of the current generations: stage, name, error, message."""
        out = []
        for label in self.stages:
            if self.generation(label).meta["per_item"]:
                for _, record in sorted(self.table(label, ()).failures.items()):
                    out.append({"stage": label, **{k: record.get(k) for k in ("row", "name", "error", "message")}})
        return out

    # --- housekeeping -------------------------------------------------------------------------------------------------------
    def verify(self) -> list[str]:
        """Read everything again and compare checksums; returns a sentence a problem, and one an orphan file."""
        problems = Registry(self.path).damaged(self._seen())
        for label in self.stages:
            generation = self.generation(label)
            problems += [f"{label}: {p}" for p in generation.damaged()]
        problems += [f"left over from a killed process, harmless: {p}" for p in sorted(self.path.glob("stages/**/*.part"))]
        problems += [f"left over from a killed process, harmless: {p}" for p in sorted(self.path.glob("*.part"))]
        return problems

    def repair(self) -> list[str]:
        """Take the commits of damaged items back (driver only); the next run makes them again. Returns ``stage: item`` of each."""
        return [f"{label}: {name}" for label in self.stages for name in self.generation(label).repair()]

    def superseded(self) -> list[Path]:
        """Folders of generations that no stage of the project uses any more."""
        keep = set(self.state["generations"].items())
        folders = sorted(p for p in self.path.glob("stages/*/*") if p.is_dir())
        return [p for p in folders if (p.parent.name, p.name) not in keep]

    def collect_garbage(self) -> int:
        """Remove superseded generations; returns the bytes freed."""
        freed = 0
        for folder in self.superseded():
            freed += sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
            with disk_errors(folder):
                if folder.suffix != ".part":  # half a generation must never stand under its key
                    folder = folder.rename(folder.with_name(f"{folder.name}.{time.time_ns()}.part"))
                shutil.rmtree(folder)
        return freed

    # --- faces --------------------------------------------------------------------------------------------------------------
    def overview(self) -> list[tuple[str, str, str, str]]:
        """One row a stage: label, done, quarantined, what it gives."""
        rows = []
        total = len(self.items())
        for label in self.stages:
            generation = self.generation(label)
            if generation.meta["per_item"]:
                table = self.table(label, ())
                counted, bad = f"{len(table)}/{total}", len(table.failures)
            else:
                counted, bad = "done" if generation.committed() else "not finished", 0
            rows.append((label, counted, str(bad) if bad else "", ", ".join(generation.meta["gives"])))
        return rows

    def __repr__(self) -> str:
        lines = [f"<cryodask project {self.name!r}: {len(self.items())} micrographs, {self.path}>"]
        for label, done, bad, gives in self.overview():
            shown = gives if len(gives) < 70 else gives[:67] + "..."
            lines.append(f"  {label:<14} {done:>12} {('(' + bad + ' quarantined)') if bad else '':<18} {shown}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        head = "<tr><th>stage</th><th>done</th><th>quarantined</th><th>gives</th></tr>"
        body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in self.overview())
        title = f"<b>{html.escape(self.name)}</b>: {len(self.items())} micrographs in <code>{html.escape(str(self.path))}</code>"
        return f"{title}<table>{head}{body}</table>"


def _current(item: Item, made_from: str | None) -> bool:
    """Whether a record was made from the present input of an item; one whose input never changed need not be asked."""
    return item.revision == 0 or made_from is None or made_from == item.fingerprint
