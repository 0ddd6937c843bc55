"""A project folder: what was processed, by what, and where it is.

::

    <project>/project.yaml     the project file as given
    <project>/project.json     name, optics, and the current generation of every stage (written by the driver only)
    <project>/items.jsonl      registry: row <-> micrograph, its input and what the input said about it
    <project>/stages/<stage>/<key>/   one generation (see generation.py)
"""

from __future__ import annotations

import hashlib
import html
import json
import os
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cryodask.errors import StoreError
from cryodask.store.datasets import describe, stack_columns
from cryodask.store.generation import Generation, disk_errors
from cryodask.store.journal import fsync_folder
from cryodask.store.lock import ProjectLock
from cryodask.vocabulary import VARIABLES

if TYPE_CHECKING:
    import xarray as xr


@dataclass(frozen=True)
class Item:
    """One micrograph of the registry: its row for ever, its name, and what is known of it from outside."""

    row: int
    name: str
    inputs: dict[str, Any] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """Changes when the input changes (another size, another time, another value in the STAR file)."""
        return hashlib.blake2b(json.dumps(self.inputs, sort_keys=True).encode(), digest_size=6).hexdigest()


class Project:
    """A project: ``project["ctf"]`` is a lazy Dataset, ``project.joined()`` all stages by micrograph, ``project.particles()`` a table."""

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
                _write_atomically(folder / "project.json", json.dumps({"name": name, "constants": {}, "generations": {}, "order": []}))
        return cls(folder)

    def lock(self, *, force: bool = False) -> ProjectLock:
        """The driver's lock."""
        return ProjectLock(self.path, force=force)

    def save(self) -> None:
        """Write project.json (tmp + rename)."""
        with disk_errors(self.path):
            _write_atomically(self.path / "project.json", json.dumps(self.state, indent=1))

    def add_items(self, new: Iterable[tuple[str, dict[str, Any]]]) -> list[Item]:
        """Register micrographs by name; a known name keeps its row and takes the new inputs. Returns the items named, in order."""
        known = {item.name: item for item in self.items()}
        lost = self._lost_rows(known.values())
        free = max((item.row for item in known.values()), default=-1) + 1
        out: list[Item] = []
        lines: list[str] = []
        for name, inputs in new:
            old = known.get(name)
            row = old.row if old is not None else lost.get(name, free)
            free += row == free
            item = Item(row, name, inputs)
            if old is None or old.inputs != inputs:
                lines.append(json.dumps({"row": item.row, "name": name, "inputs": inputs}, sort_keys=True) + "\n")
                known[name] = item
            out.append(item)
        if lines:
            with disk_errors(self.path), open(self.path / "items.jsonl", "a+b") as file:
                file.seek(0, os.SEEK_END)
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                    if file.read(1) != b"\n":
                        file.write(b"\n")  # a line torn by a crash stays a line of its own
                file.write("".join(lines).encode())
                file.flush()
                os.fsync(file.fileno())
        return out

    def _lost_rows(self, known: Iterable[Item]) -> dict[str, int]:
        """Rows whose line of the registry is damaged, by name, from the commit records."""
        rows = {item.row for item in known}
        gaps = set(range(max(rows, default=-1))) - rows
        labels = [label for label in self.stages if gaps and self.generation(label).meta["per_item"]]
        return {r["name"]: row for label in labels for row, r in self.generation(label).records().items() if row in gaps}

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
        """The registry, in row order; the latest line of a name counts."""
        found: dict[int, Item] = {}
        file = self.path / "items.jsonl"
        if file.exists():
            for line in file.read_bytes().split(b"\n"):
                try:
                    entry = json.loads(line)
                    found[entry["row"]] = Item(entry["row"], entry["name"], entry["inputs"])
                except (ValueError, KeyError):
                    continue
        return [found[row] for row in sorted(found)]

    def generation(self, label: str) -> Generation:
        """Current generation of a stage."""
        key = self.state["generations"].get(label)
        if key is None:
            known = ", ".join(self.stages) or "none yet"
            raise StoreError(
                f"Project {self.name} has no results of a stage {label!r} (it has: {known}).",
                "a typing error, or the run has not come so far",
                "run the project first",
            )
        return Generation(self.path / "stages" / label / key)

    def __contains__(self, label: str) -> bool:
        return label in self.state["generations"]

    def __getitem__(self, label: str) -> xr.Dataset:
        dataset = self.generation(label).dataset()
        failed = [r for r in self.generation(label).records().values() if not r["ok"]]
        return dataset.assign_attrs(quarantined=len(failed))

    def micrographs(self) -> xr.Dataset:
        """The registry, the optics and the gain as a Dataset by micrograph."""
        import xarray as xr

        items = self.items()
        names = {n for item in items for n in item.inputs if n in VARIABLES}
        constants = {k: v for k, v in self.state["constants"].items() if k in VARIABLES and k not in names}
        data: dict[str, Any] = {}
        for name in sorted(names):
            var = VARIABLES[name]
            if not var.dims:
                values = [item.inputs.get(name, np.nan if var.dtype != "U" else "") for item in items]
                data[name] = ("micrograph", stack_columns(var, values), describe(var))
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

        parts = [self.micrographs()]
        for label in self.stages:
            generation = self.generation(label)
            if not generation.meta["per_item"]:
                continue
            dataset = generation.dataset()
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
            for record in self.generation(label).records().values():
                if not record["ok"]:
                    out.append({"stage": label, **{k: record.get(k) for k in ("row", "name", "error", "message")}})
        return out

    # --- housekeeping -------------------------------------------------------------------------------------------------------
    def verify(self) -> list[str]:
        """Read everything again and compare checksums; returns a sentence a problem, and one an orphan file."""
        rows = {item.row for item in self.items()}
        gaps = sorted(set(range(max(rows, default=-1))) - rows)
        problems = [f"items.jsonl: the line of row {row} is damaged; the next run writes it again" for row in gaps]
        for label in self.stages:
            generation = self.generation(label)
            problems += [f"{label}: {p}" for p in generation.damaged()]
        problems += [f"left over from a killed process, harmless: {p}" for p in sorted(self.path.glob("stages/**/*.part"))]
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
            records = generation.records().values()
            done, bad = sum(r["ok"] for r in records), sum(not r["ok"] for r in records)
            counted = f"{done}/{total}" if generation.meta["per_item"] else ("done" if done else "not finished")
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


def _write_atomically(path: Path, text: str) -> None:
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with open(part, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.rename(part, path)
    fsync_folder(path.parent)
