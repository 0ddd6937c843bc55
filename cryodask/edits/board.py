"""What people edit: exposures, picks, classes, masks and regions, and whether an operation fits a project. Knows nothing of the web."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from cryodask.edits.log import OperationLog
from cryodask.edits.masks import drawn, standing
from cryodask.edits.operations import read_operations
from cryodask.edits.picks import Pick, edited
from cryodask.edits.regions import MOST_REGIONS
from cryodask.errors import InputError, StoreError
from cryodask.store.generation import Generation
from cryodask.store.identity import id_text
from cryodask.store.lines import Record
from cryodask.store.project import Project
from cryodask.store.state import parted

_PICTURES = ("micrograph_dw", "micrograph_sum")
_SELECTIONS = ("select_classes", "curate")
"""Stages that give some of the classes of another step, numbered anew."""
_DECIDED_BY = {"select_classes": "keep", "edit_picks": "file", "select_region": "regions"}
"""Parameters with which the project file decides, whatever was frozen."""


@dataclass(frozen=True)
class Exposure:
    """An exposure that can be looked at: its `shape` (y, x) in pixels, and where its micrograph is."""

    row: int
    name: str
    shape: tuple[int, int]
    pixel_size_angstrom: float
    generation: Generation
    record: Record
    variable: str

    def picture(self) -> np.ndarray:
        """The micrograph, `(y, x)` float32, row 0 at the bottom."""
        return np.asarray(self.generation.read(self.record, self.variable), np.float32)

    @property
    def crc(self) -> int:
        """Checksum of the micrograph; another one is another picture."""
        return int(self.record["shards"][self.variable])


class Board:
    """The edits of one project, for all who look at it.

    Parameters
    ----------
    folder : path
        Folder of the project.
    opened : callable, optional
        Gives the project, where somebody follows it already.
    """

    def __init__(self, folder: str | Path, opened: Callable[[], Project] | None = None) -> None:
        self.folder, self._opened = Path(folder), opened
        self.picks = OperationLog(self.folder, "picks")
        self.classes = OperationLog(self.folder, "classes")
        self.exposures = OperationLog(self.folder, "exposures")
        self.masks = OperationLog(self.folder, "masks")
        self.regions = OperationLog(self.folder, "regions")
        self._lock = threading.RLock()
        self._project: Project | None = None

    def log(self, kind: str) -> OperationLog:
        """The operations of a kind.

        Raises
        ------
        InputError
        """
        logs = (self.picks, self.classes, self.exposures, self.masks, self.regions)
        found = next((log for log in logs if log.kind == kind), None)
        if found is None:
            raise InputError(f"{kind!r} cannot be edited.", "", f"the kinds are {', '.join(log.kind for log in logs)}")
        return found

    def project(self) -> Project:
        """The project as it is now.

        Raises
        ------
        StoreError
            If it is gone, or has another format.
        """
        if self._opened is not None:
            return self._opened()
        with self._lock:
            if self._project is None:
                self._project = Project(self.folder)
            return self._project.refresh()

    # --- exposures and picks --------------------------------------------------------------------------------------------------
    def rows(self) -> list[int]:
        """Rows of the exposures that have a micrograph, in order."""
        with self._lock:
            project = self.project()
            generation, _ = self._pictured(project)
            known = {item.row for item in project.items()}
            return [row for row in generation.table(()).row.tolist() if row in known] if generation is not None else []

    def exposure(self, row: int) -> Exposure:
        """An exposure by its row.

        Raises
        ------
        InputError
            If there is none, or it has no micrograph yet.
        """
        with self._lock:
            project = self.project()
            item = next((item for item in project.items() if item.row == row), None)
            if item is None:
                raise InputError(f"There is no exposure with row {row} in {project.name}.", "", "go back to the list of exposures")
            generation, variable = self._pictured(project)
            record = self._record(generation, row) if generation is not None else None
            if generation is None or record is None:
                raise InputError(f"{item.name} has no micrograph yet.", "it was not processed yet, or is quarantined", "look again later")
            height, width = generation.bulk_reader(record, variable).shape
            pixel = project.value_of(item, "pixel_size_angstrom")
            return Exposure(row, item.name, (height, width), float(pixel or 1.0), generation, record, variable)

    @staticmethod
    def _pictured(project: Project) -> tuple[Generation | None, str]:
        for label in project.stages:
            generation = project.generation(label)
            variable = next((name for name in _PICTURES if name in generation.meta["gives"]), "")
            if generation.meta["per_item"] and variable:
                return generation, variable
        return None, ""

    @staticmethod
    def _record(generation: Generation, row: int) -> Record | None:
        record = generation.journal.record_of(row)
        return record if record is not None and record["ok"] else None

    def stored(self, row: int) -> list[Pick]:
        """What the picker found in an exposure: all scored peaks, ``accepted`` or not."""
        with self._lock:
            project = self.project()
            label = self._picker(project)
            if label is None:
                return []
            generation = project.generation(label)
            record = self._record(generation, row)
            if record is None:
                return []
            ids, y, x, score = (np.asarray(generation.read(record, n)) for n in ("particle_id", "pick_y", "pick_x", "pick_score"))
            limit = self._threshold(project, label, record)
            found = []
            for i in np.flatnonzero(np.isfinite(score)):  # the others are no longer found
                found.append(Pick(id_text(int(ids[i])), float(y[i]), float(x[i]), float(score[i]), bool(score[i] >= limit)))
            return found

    @staticmethod
    def _picker(project: Project) -> str | None:
        """The step whose picks are edited: that before ``edit_picks``, else the last birth with positions."""
        births = [s for s in project.stages if project.generation(s).meta.get("birth") and project.step(s).stage != "edit_picks"]
        for step in project.state.steps.values():
            if step.stage == "edit_picks":
                places = {ref.ids for ref in step.inputs.get("particles", ())}
                births = [s for s in births if project.step(s).place in places] or births
        return births[-1] if births else None

    @staticmethod
    def _threshold(project: Project, label: str, record: Record) -> float:
        wanted = project.step(label).params.get("threshold", -math.inf)
        if isinstance(wanted, str):
            wanted = record["columns"].get("pick_threshold", -math.inf)
        return float(wanted)

    def edited(self, row: int) -> list[Pick]:
        """Picks of an exposure as people have edited them; see :func:`~cryodask.edits.picks.edited`."""
        self.picks.look()
        return edited(self.stored(row), self.picks.of_row(row))

    def diameter_angstrom(self) -> float | None:
        """Diameter that the picker was given; None if it takes none."""
        project = self.project()
        label = self._picker(project)
        given = project.step(label).params.get("diameter_angstrom") if label is not None else None
        return float(given) if given is not None else None

    def classifications(self) -> dict[str, str]:
        """Steps with classes that people can choose from, the last one first, and the place of their current result."""
        project = self.project()
        found = {}
        for label in reversed(project.stages):
            generation = project.generation(label)
            gives_all = generation.meta["stage"] not in _SELECTIONS and {"class_average", "class_share"} <= set(generation.meta["gives"])
            if gives_all and generation.committed():
                found[label] = project.step(label).place
        return found

    def classification(self, of: str = "") -> tuple[str, Generation | None]:
        """Place and result of a classification, by the name of its step or its place; by default of the last one.

        Empty if there is no such classification, or it was computed again since.
        """
        known = self.classifications()
        place = known.get(of, of) if of else next(iter(known.values()), "")
        return (place, self.project().generation_at(place)) if place in known.values() else ("", None)

    def maps(self) -> dict[str, str]:
        """Maps on which people can choose a mask, ``STEP`` or ``STEP.class2``, those of the last step first, and their current places."""
        project, found = self.project(), {}
        for label in reversed(project.stages):
            for end in _maps(project.generation(label)):
                found[f"{label}{end}"] = f"{project.step(label).place}{end}"
        return found

    def analyses(self) -> dict[str, str]:
        """Steps with components of which people can choose regions, the last one first, and the place of their current result."""
        project = self.project()
        return {label: project.step(label).place for label in reversed(project.stages) if _components(project.generation(label))}

    def is_used(self, stage: str = "edit_picks") -> bool:
        """Whether the pipeline, as it was last run, has a step that applies edits of a kind: not one that the project file decides."""
        try:
            pipeline = yaml.safe_load((self.folder / "project.yaml").read_text(errors="replace"))["pipeline"]
            steps = [next(iter(one.items())) if isinstance(one, dict) else (one, None) for one in pipeline]
        except (OSError, yaml.YAMLError, KeyError, TypeError, StopIteration):
            return stage in {step.stage for step in self.project().state.steps.values()}
        by_file = _DECIDED_BY.get(stage, "")
        return any(
            str(head).partition(" as ")[0].strip() == stage and not (isinstance(params, dict) and params.get(by_file))
            for head, params in steps
        )

    # --- operations -----------------------------------------------------------------------------------------------------------
    def take(self, kind: str, given: Any, who: str) -> list[Record]:
        """Check operations against the project and store them; all or none.

        Returns
        -------
        list of dict
            Those that were not known before.

        Raises
        ------
        InputError
            If one of them does not fit the project.
        StoreError
            If they could not be stored.
        """
        log = self.log(kind)
        operations = read_operations(kind, given)
        log.look()
        if kind == "picks":
            self._check_picks(operations)
        elif kind == "classes":
            self._check_classes(operations)
        elif kind == "masks":
            self._check_masks(operations)
        elif kind == "regions":
            self._check_regions(operations)
        else:
            known = {item.row for item in self.project().items()}
            for one in operations:
                if one["row"] >= 0 and one["row"] not in known:
                    raise InputError(f"There is no exposure with row {one['row']}.", "it belongs to another project", "reload the page")
        return log.append(operations, who)

    def _check_picks(self, operations: Sequence[Record]) -> None:
        for row in {one["row"] for one in operations}:
            exposure = self.exposure(row)
            stored = self.stored(row)
            below = {pick.pick for pick in stored if not pick.accepted}
            known = {pick.pick for pick in stored} | {one["id"] for one in self.picks.of_row(row) if one["do"] == "add"}
            known |= {one["id"] for one in operations if one["do"] == "add" and one["row"] == row}
            for one in (o for o in operations if o["row"] == row):
                if "pick" in one and one["pick"] not in known:
                    raise InputError(
                        f"{exposure.name} has no pick {one['pick']}.",
                        "the exposure was picked again meanwhile, or the pick belongs to another project",
                        "reload the page and repeat the edit",
                    )
                if one["do"] in ("restore", "move") and one["pick"] in below:
                    raise InputError(
                        f"Pick {one['pick']} of {exposure.name} is below the threshold of its step.",
                        "",
                        "add a pick at its position instead",
                    )
                if "y" in one and not (one["y"] < exposure.shape[0] and one.get("x", 0.0) < exposure.shape[1]):
                    raise InputError(
                        f"y {one['y']:g}, x {one.get('x', 0.0):g} is outside {exposure.name}, which has "
                        f"{exposure.shape[0]} x {exposure.shape[1]} pixels.",
                        "",
                        "place the pick on the micrograph",
                    )

    def _check_masks(self, operations: Sequence[Record]) -> None:
        project = self.project()
        for of in {one["of"] for one in operations}:
            try:
                there = of.removeprefix(parted(of)[0]) in _maps(project.generation_at(of))
            except (KeyError, StoreError):
                there = False
            if not there:
                raise InputError(f"{project.name} has no map {of}.", "it was removed, or belongs to another project", "reload the page")
            self._check_drawn(self.masks, operations, of)

    @staticmethod
    def _check_drawn(log: OperationLog, operations: Sequence[Record], of: str) -> None:
        known = drawn(log.of_row(0), of) | drawn(operations, of)
        for one in operations:
            if one["of"] == of and one.get("drawn") is not None and one["drawn"] not in known:
                raise InputError(f"Nothing was drawn as {one['drawn']} on {of}.", "it was drawn on another result", "reload the page")

    def _check_regions(self, operations: Sequence[Record]) -> None:
        project = self.project()
        for of in {one["of"] for one in operations}:
            try:
                count = _components(project.generation_at(of))
            except (KeyError, StoreError):
                count = 0
            if not count:
                raise InputError(
                    f"{project.name} has no analysis {of}.", "it was removed, or belongs to another project", "reload the page"
                )
            self._check_drawn(self.regions, operations, of)
            new = [one for one in operations if one["of"] == of and one["do"] == "draw"]
            highest = max((max(one["region"]["components"]) for one in new), default=0)
            if highest > count:
                raise InputError(f"There is no component {highest}: {of} has {count}.", "", "reload the page")
            if len(standing(self.regions.of_row(0), of, "region")) + len(new) > MOST_REGIONS:
                raise InputError(f"More than {MOST_REGIONS} regions were chosen.", "", "remove some of them first")

    def _check_classes(self, operations: Sequence[Record]) -> None:
        project = self.project()
        for of in {one["of"] for one in operations}:
            try:
                generation = project.generation_at(of)
                record = generation.committed()[0]
                count = len(np.asarray(generation.read(record, "class_share")))
            except (KeyError, OSError):
                raise InputError(
                    f"{project.name} has no classification {of}.", "it was removed, or belongs to another project", "reload the page"
                ) from None
            for one in operations:
                if one["of"] == of and one["row"] > count:
                    raise InputError(f"There is no class {one['row']}: {of} has {count}.", "", "reload the page")


def _maps(generation: Generation) -> list[str]:
    """Maps of a known voxel size in a result, as the end of their place: an empty text for its only one, ``.class1`` ... for classes."""
    gives = set(generation.meta["gives"])
    if generation.meta["per_item"] or "map_pixel_size_angstrom" not in gives or not {"final_map", "class_map"} & gives:
        return []
    record = generation.committed().get(0)
    shards = record["shards"] if record is not None else {}
    if "final_map" in shards:
        return [""]
    return [f".class{k + 1}" for k in range(len(generation.result_reader("class_map")))] if "class_map" in shards else []


def _components(generation: Generation) -> int:
    """Number of components of a finished analysis of variability; 0 for any other result."""
    gives = set(generation.meta["gives"])
    if generation.meta["per_item"] or not {"component_map", "component1", "map_pixel_size_angstrom"} <= gives:
        return 0
    record = generation.committed().get(0)
    return generation.result_reader("component_map").shape[0] if record is not None and "component_map" in record["shards"] else 0
