"""The project folder: what was processed, how, and where the results are.

::

    <project>/project.yaml     the project file as given
    <project>/project.json     name, optics, births, and the current generation of every step (see state.py)
    <project>/driver.lock      the current driver (see lock.py); epochs/ has traces of earlier drivers (see epochs.py)
    <project>/items.jsonl      registry: row <-> exposure, its content and input values (see registry.py)
    <project>/stages/<stage>/<key>/   one generation (see generation.py); steps point to them
"""

from __future__ import annotations

import html
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cryodask.errors import StoreError
from cryodask.store import garbage, history
from cryodask.store.files import disk_errors
from cryodask.store.generation import Generation
from cryodask.store.lines import Record
from cryodask.store.lock import ProjectLock
from cryodask.store.made import RowsWithResults, shown
from cryodask.store.registry import Arrival, Item, Registry, Update
from cryodask.store.sets import SetReader
from cryodask.store.state import ProductRef, ProjectState, StepState, parted
from cryodask.store.table import Table

__all__ = ["Arrival", "Item", "Project"]

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr


_WORTH_COMPACTING = 500
"""Number of records beyond the compaction that can be read in about 0.1 s."""


class UnknownStep(StoreError, KeyError):
    """The project has no step of this name."""

    __str__ = StoreError.__str__


_OWN = frozenset(
    ("environments", "epochs", "events", "gains", "edits", "items.jsonl", "logs", "project.yaml", "report.html", "stages", "status.json")
)
"""What a project's folder may have before its ``project.json`` is there."""


def _refuse_among_other_files(folder: Path) -> None:
    """Refuse to begin a project in a folder that has files of something else and nothing of a project."""
    there = sorted(entry.name for entry in os.scandir(folder) if not entry.name.startswith("."))
    if there and not _OWN & set(there):
        raise StoreError(
            f"The results would be written into {folder}, among other files ({', '.join(there[:3])}{', ...' if len(there) > 3 else ''}).",
            "a folder has the name of the project",
            "set another name, or a separate folder:  folder: results",
        )


class Project:
    """A project: ``project["ctf"]`` is a lazy Dataset, ``project.joined()`` all stages by micrograph, ``project.particles()`` a table.

    Behaves like a mapping of the steps of the pipeline (``in, len, iter, keys, get``). It shows the active exposures as they were
    processed; :meth:`refresh` rereads what a run has changed since.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.state = ProjectState.read(self.path)
        self._registry = Registry(self.path)
        self._generations: dict[str, Generation] = {}

    # --- written by the driver --------------------------------------------------------------------------------------------
    @classmethod
    def create(cls, path: str | Path, name: str) -> Project:
        """Open the project at ``path``, or create an empty one; births found on disk keep their numbers.

        Raises
        ------
        LockedError
            If another driver is creating it at this moment.
        """
        folder = Path(path)
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / "project.json").exists():
                _refuse_among_other_files(folder)
                with ProjectLock(folder):
                    if not (folder / "project.json").exists():
                        state = ProjectState(name=name)
                        state.births = history.births_on_disk(folder)
                        state.write(folder)
        return cls(folder)

    def lock(self, *, force: bool = False) -> ProjectLock:
        """The driver's lock."""
        return ProjectLock(self.path, force=force)

    def save(self) -> None:
        """Write project.json (tmp + rename)."""
        self.state.write(self.path)

    def update_exposures(self, listing: Iterable[Arrival], *, complete: bool) -> Update:
        """Compare a listing of inputs with the registry and register what is new (driver only); see :meth:`Registry.update`."""
        with disk_errors(self.path):
            seen = self._repaired_registry()
            least = max(seen, default=-1) + 1 if not self._registry.all() else 0
            return self._registry.update(listing, complete=complete, keep=RowsWithResults(self), least_row=least)

    def foresee_exposures(self, listing: Iterable[Arrival]) -> Update:
        """Like :meth:`update_exposures` with a complete listing, but only in this object; nothing is written."""
        seen = self._seen() if not self._registry.all() else {}
        return self._registry.foresee(listing, keep=RowsWithResults(self), least_row=max(seen, default=-1) + 1)

    def rename_data_sets(self, names: Mapping[int, str], *, foresee: bool = False) -> None:
        """Assign exposures, by row, to the name of another data set (driver only); with ``foresee`` nothing is written."""
        with disk_errors(self.path):
            if not foresee:
                self._repaired_registry()
            self._registry.rename_data_sets(names, foresee=foresee)

    def foresee_generation(self, generation: Generation) -> None:
        """Show a generation as a run would leave it (this object only)."""
        self._generations[f"{generation.path.parent.name}/{generation.key}"] = generation

    def forget_exposures(self, names: Iterable[str], *, undo: bool = False) -> list[Item]:
        """Exclude exposures on purpose, or include them again (driver only); their results stay."""
        with disk_errors(self.path):
            self._repaired_registry()
            return self._registry.remember(names) if undo else self._registry.forget(names)

    def _repaired_registry(self) -> dict[int, tuple[str, int]]:
        seen = self._seen() if self._registry.unreadable or not self._registry.all() else {}
        if self._registry.unreadable or (seen and not self._registry.all()):
            self._registry.repair(seen)
        return seen

    def compact(self) -> None:
        """Compact every per-exposure step whose journals have grown enough to slow down readers (driver only)."""
        for generation in {g.path: g for g in map(self.generation, self.stages)}.values():
            removed = not (generation.path / "zarr.json").exists()  # its step is recomputed when its turn comes
            if not removed and generation.meta["per_item"]:
                tail = generation.tail_length()
                # a fraction of the whole, so that a long session writes each item a few times rather than once per call
                if tail >= _WORTH_COMPACTING and tail >= len(generation.table(())) // 8:
                    generation.compact()

    def _seen(self) -> dict[int, tuple[str, int]]:
        """Name and latest revision of every row that has a commit record."""
        out: dict[int, tuple[str, int]] = {}
        for folder in history.generation_folders(self.path):
            generation = Generation(folder)
            if generation.meta["per_item"]:
                for row, record in generation.records().items():
                    out[row] = (record["name"], max(int(record.get("revision", 0)), out.get(row, ("", 0))[1]))
        return out

    # --- reading ------------------------------------------------------------------------------------------------------------
    @property
    def name(self) -> str:
        """Its name."""
        return self.state.name

    @property
    def stages(self) -> list[str]:
        """Names of the steps in the order of the pipeline."""
        return list(self.state.steps)

    def refresh(self) -> Project:
        """Reread what a run may have changed; returns the project itself."""
        self.state = ProjectState.read(self.path)
        return self

    def items(self) -> list[Item]:
        """Active exposures in row order."""
        return list(self._registry.present().values())

    def known_data_sets(self) -> set[str]:
        """Data sets of all exposures that were ever registered, including inactive ones."""
        return {item.data_set for item in self._registry.all().values()}

    def registered(self) -> dict[int, Item]:
        """Every exposure that the project ever had, by row; called ``NAME~ROW`` if another one has its name now."""
        return dict(self._registry.all())

    def former_names(self) -> dict[str, int]:
        """Rows by former names that no other exposure ever had; older files still use them."""
        return self._registry.former_names()

    def forgotten(self) -> set[str]:
        """Names of exposures that were forgotten."""
        return self._registry.forgotten()

    def registry_stamp(self) -> Any:
        """A value that changes with the registry."""
        self._registry.present()
        return self._registry.stamp()

    @property
    def home(self) -> Path:
        """Folder of the project file; paths of inputs are relative to it."""
        return (self.path / self.state.home).resolve()

    def value_of(self, item: Item, name: str) -> Any:
        """External value of an exposure: its own, else that of its data set; None if there is none."""
        return self.values_of([item], name)[0]

    def values_of(self, items: Iterable[Item], name: str) -> list[Any]:
        """Like :meth:`value_of`, for many exposures."""
        constants = {data_set: values.get(name) for data_set, values in self.state.constants.items()}
        values = [i.inputs[name] if name in i.inputs else constants.get(i.data_set) for i in items]
        if not name.endswith("_path"):
            return values
        home = self.home
        return [None if v is None else str(home / v) for v in values]

    def step(self, label: str) -> StepState:
        """State of a step.

        Raises
        ------
        UnknownStep
        """
        found = self.state.steps.get(label)
        if found is None:
            import difflib

            known = ", ".join(self.stages) or "none yet"
            near = difflib.get_close_matches(str(label), self.stages, n=1)
            raise UnknownStep(
                f"Project {self.name} has no step {label!r} (it has: {known})." + (f" Did you mean {near[0]!r}?" if near else ""),
                "" if near else "the run has not reached it yet",
                "correct the name" if near else "run the project first",
            )
        return found

    def generation(self, label: str) -> Generation:
        """Current generation of a step."""
        return self.generation_at(self.step(label).place)

    def generation_at(self, place: str) -> Generation:
        """Generation at ``STAGE/KEY``, or ``STAGE/KEY.OUTPUT``; the same object each time, because it caches what it has read."""
        place = parted(place)[0]
        if place not in self._generations:
            self._generations[place] = Generation(self.path / "stages" / place)
        return self._generations[place]

    def __contains__(self, label: object) -> bool:
        return label in self.state.steps

    def __iter__(self) -> Iterator[str]:
        return iter(self.stages)

    def __len__(self) -> int:
        return len(self.state.steps)

    def keys(self) -> list[str]:
        """Names of the steps."""
        return self.stages

    def get(self, label: str, default: Any = None) -> Any:
        """Dataset of a step; ``default`` if the project has no such step."""
        return self.dataset_at(self.state.steps[label].place, label) if label in self.state.steps else default

    def _ipython_key_completions_(self) -> list[str]:
        return self.stages

    def __getitem__(self, label: str | tuple[str, str]) -> xr.Dataset:
        """Dataset of a step; ``project["refine3d", key]`` is that of an older generation."""
        if isinstance(label, tuple):
            return history.open_generation(self, *label)
        return self.dataset_at(self.step(label).place, label)

    def dataset_at(self, place: str, label: str) -> xr.Dataset:
        """Dataset of a generation, as the results of step ``label``."""
        generation = self.generation_at(place)
        if not generation.meta["per_item"]:
            return generation.dataset().assign_attrs(label=label, quarantined=0)
        return self._items_dataset(generation, self.table_at(place), label)

    def _items_dataset(self, generation: Generation, table: Table, label: str) -> xr.Dataset:
        from cryodask.store.datasets import generation_dataset, with_acceptance

        dataset = generation_dataset(generation, table).assign_attrs(label=label, quarantined=len(table.failures))
        step = self.state.steps.get(label)
        product = step.product("particles") if step is not None else None
        return with_acceptance(dataset, product.threshold) if generation.meta.get("birth") and product is not None else dataset

    def by_image_size(self, label: str) -> list[xr.Dataset]:
        """The results of a step as one Dataset per image size and type, for data sets of several cameras.

        With a single size this is ``project[label]``; with several, ``project[label]`` has the numbers of all exposures and no images.
        """
        generation = self.generation(label)
        if not generation.meta["per_item"]:
            return [self[label]]
        table = self.table(label)
        sizes = dict.fromkeys(table.layouts.tolist() or [""])
        return [self._items_dataset(generation, table.take(np.flatnonzero(table.layouts == size)), label) for size in sizes]

    def table(self, label: str, names: Iterable[str] | None = None) -> Table:
        """Active items of a per-exposure step as columns, with all or the named small variables; failures as records."""
        return self.table_at(self.step(label).place, names)

    def table_at(self, place: str, names: Iterable[str] | None = None) -> Table:
        """Like :meth:`table`, for a generation."""
        table = self.generation_at(place).table(names)
        items, recipes = self._registry.present(), self.state.recipes_at(place)
        made = zip(table.row.tolist(), table.input, table.recipe)
        kept = [i for i, (row, *was) in enumerate(made) if row in items and shown(items[row], recipes, *was)]
        return replace(table.take(np.array(kept, np.int64)), failures=self._shown(table.failures, recipes))

    def _shown(self, records: dict[int, Record], recipes: dict[str, str]) -> dict[int, Record]:
        items = self._registry.present()
        return {row: r for row, r in records.items() if row in items and shown(items[row], recipes, r.get("input"), r.get("recipe"))}

    def records(self, label: str) -> dict[int, Record]:
        """Current records of a step, including failures; for a per-exposure step those of active items, by row."""
        generation = self.generation(label)
        records = generation.records()
        if not generation.meta["per_item"]:
            return records
        return self._shown(records, self.step(label).recipes)

    # --- faces --------------------------------------------------------------------------------------------------------------
    def micrographs(self) -> xr.Dataset:
        """The registry, the optics and the gain as a Dataset by micrograph."""
        from cryodask.store.datasets import registry_dataset

        return registry_dataset(self)

    def joined(self) -> xr.Dataset:
        """All per-exposure steps joined by micrograph: a correlation between stages is one expression.

        It has every exposure of any step. For steps that have not processed an exposure (yet), numbers are NaN, integers -1, and strings
        empty. The particle images of ``extract`` have their own dimensions ``box_y, box_x``.
        """
        from cryodask.store.datasets import joined_dataset

        return joined_dataset(self)

    def scalars(self) -> pd.DataFrame:
        """One row per exposure with every number from every step, for pandas and Parquet."""
        from cryodask.store.datasets import scalar_table

        return scalar_table(self)

    def particles(self, label: str | None = None) -> xr.Dataset:
        """The particles of a step with image (lazy), CTF, class and pose, along dimension ``particle``.

        Parameters
        ----------
        label : str, optional
            A step, or ``STEP.OUTPUT``; by default the last step that has finished particles.

        Returns
        -------
        xarray.Dataset
            With coordinates ``particle_id`` (int64), ``half_set`` and ``micrograph``. Values are NaN (or -1) for particles that a step did
            not process.
        """
        from cryodask.store.particles import particle_dataset

        return particle_dataset(self, label)

    @cached_property
    def sets(self) -> SetReader:
        """Reader of the particle sets."""
        return SetReader(self)

    def product(self, name: str, kind: str) -> ProductRef:
        """A product by ``STEP`` or ``STEP.OUTPUT``."""
        label, _, output = name.partition(".") if name not in self.state.steps else (name, "", "")
        found = self.step(label).product(kind, output or None)
        if found is None:
            raise StoreError(f"Step {name} gives no {kind}.", "", "choose a step that does; cryodask info lists what each gives")
        return found

    def latest(self, kind: str, part: str | None = None) -> str | None:
        """The last finished step that gives a product of a type (and the given part of it)."""
        for label in reversed(self.stages):
            step = self.state.steps[label]
            product = step.product(kind)
            if product is None or (part is not None and product.parts.get(part) != step.place):
                continue
            if any(r["ok"] for r in self.records(label).values()):
                return label
        return None

    def failures(self) -> list[dict[str, Any]]:
        """Quarantined items of the current generations: stage, name, error, message."""
        out = []
        for label in self.stages:
            if self.generation(label).meta["per_item"]:
                for _, record in sorted(self.table(label, ()).failures.items()):
                    out.append({"stage": label, **{k: record.get(k) for k in ("row", "name", "error", "message")}})
        return out

    def where(self, particle: int | str) -> list[tuple[str, str]]:
        """What happened to one particle: name and a sentence for each step that gives particles."""
        return history.where(self, particle)

    # --- history ------------------------------------------------------------------------------------------------------------
    def history(self, label: str | None = None) -> list[history.Made]:
        """Every generation of a step's stage (of all if None), newest last: parameters, inputs, time, figures, name."""
        return history.made(self, label)

    def keep(self, which: str, name: str) -> str:
        """Name a generation (``STEP@KEY`` or ``STEP``); ``gc`` keeps it with everything it depends on (driver only)."""
        return history.keep(self, which, name)

    def compare(self, first: str, second: str) -> xr.Dataset | Any:
        """Parameters, inputs and figures that differ between two generations (``STEP@KEY``, ``STEP`` or a name)."""
        return history.compare(self, first, second)

    def superseded(self, *, last_results: bool = False) -> list[Path]:
        """Folders of generations that are unused, unnamed, not the last finished result of a step, and not needed by any such."""
        return garbage.superseded(self, last_results=last_results)

    def collect_garbage(self, *, last_results: bool = False) -> int:
        """Remove superseded generations (driver only); returns the bytes freed."""
        return garbage.collect_garbage(self, last_results=last_results)

    # --- care ---------------------------------------------------------------------------------------------------------------
    def verify(self) -> list[str]:
        """Reread everything and compare checksums; returns one sentence per problem and per orphan file."""
        problems = Registry(self.path).damaged(self._seen())
        for place, label in self._kept_places().items():
            problems += [f"{label}: {p}" for p in self.generation_at(place).damaged()]
        problems += [f"left over from a killed process, harmless: {p}" for p in sorted(self.path.glob("stages/**/*.part"))]
        problems += [f"left over from a killed process, harmless: {p}" for p in sorted(self.path.glob("*.part"))]
        return problems

    def repair(self) -> list[str]:
        """Invalidate damaged items (driver only); the next run recomputes them. Returns ``stage: item`` for each."""
        with disk_errors(self.path):
            if Registry(self.path).damaged(seen := self._seen()):
                Registry(self.path).repair(seen)
        return [f"{label}: {name}" for place, label in self._kept_places().items() for name in self.generation_at(place).repair()]

    def _kept_places(self) -> dict[str, str]:
        """Places of the current results, with a step that has each; a result whose description is lost is computed again."""
        places = {self.step(label).place: label for label in self.stages}
        return {place: label for place, label in places.items() if (self.path / "stages" / place / "zarr.json").exists()}

    # --- shown --------------------------------------------------------------------------------------------------------------
    def overview(self) -> list[tuple[str, str, str, str]]:
        """One row per step: label, done, quarantined, what it gives."""
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
        head = "<tr><th>step</th><th>done</th><th>quarantined</th><th>gives</th></tr>"
        body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in self.overview())
        title = f"<b>{html.escape(self.name)}</b>: {len(self.items())} micrographs in <code>{html.escape(str(self.path))}</code>"
        return f"{title}<table>{head}{body}</table>"
