"""The history of a project: listing, opening, comparing and naming its generations."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cryodask.errors import InputError, StoreError
from cryodask.store.identity import birth_of, id_text, parent_of, parse_id, row_of
from cryodask.store.places import Line, read_lines
from cryodask.vocabulary import VARIABLES

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

    from cryodask.store.project import Project
    from cryodask.store.state import ProductRef


@dataclass(frozen=True)
class Made:
    """One generation.

    ``steps``: steps whose current result it is. ``finished``: it is complete; for a per-exposure step, for all exposures at that time.
    ``inputs``: results that it was made from, ``STEP@KEY`` by input; ``parts``: places of their parts, by input and part.
    """

    stage: str
    key: str
    steps: tuple[str, ...]
    finished: bool
    items: int
    created: float
    version: int | str
    per_exposure: bool
    params: dict[str, Any]
    inputs: dict[str, list[str]]
    parts: dict[str, str] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)
    name: str = ""

    @property
    def place(self) -> str:
        """``STAGE/KEY``."""
        return f"{self.stage}/{self.key}"


def generation_folders(project: Path) -> list[Path]:
    """Folders of all complete generations."""
    return sorted(p for p in project.glob("stages/*/*") if p.suffix != ".part" and (p / "zarr.json").is_file())


def births_on_disk(project: Path) -> dict[str, int]:
    """Numbers of births by identity key, as recorded in the generations."""
    out: dict[str, int] = {}
    for folder in generation_folders(project):
        try:
            birth = json.loads((folder / "zarr.json").read_bytes())["attributes"]["cryodask"].get("birth")
        except (ValueError, KeyError):
            continue
        if birth:
            out[birth["identity"]] = birth["number"]
    return out


def made(project: Project, label: str | None = None) -> list[Made]:
    """Generations of a step's stage (of all stages if None), newest last. ``label`` may be a former step or a stage.

    Raises
    ------
    StoreError
        If there are none; the message says whether gc removed them.
    """
    folders = generation_folders(project.path)
    if label is not None:
        stages = _stages_of(project, label, folders)
        folders = [f for f in folders if f.parent.name in stages]
        if not folders:
            gone = [place for place in project.state.removed if place.partition("/")[0] in stages]
            if gone:
                raise StoreError(f"No result of {label} is left: {_removed(project, gone)}.", "", "run the project to recompute it")
            project.step(label)
    current: dict[str, list[str]] = {}
    for step in project.stages:
        current.setdefault(project.step(step).place, []).append(step)
    places = [f"{folder.parent.name}/{folder.name}" for folder in folders]
    return sorted((_made(project, place, tuple(current.get(place, ())), label) for place in places), key=lambda m: m.created)


def _stages_of(project: Project, label: str, folders: list[Path]) -> set[str]:
    """The stage of a current or former step, or the stage of that name."""
    if label in project:
        return {project.step(label).stage}
    return {f.parent.name for f in folders if label in read_lines(f)} or {label}


def _removed(project: Project, places: list[str]) -> str:
    """``gc removed extract@3f2a on 2026-01-02``."""
    days = {datetime.fromtimestamp(project.state.removed[place]).strftime("%Y-%m-%d") for place in places}
    return f"gc removed {', '.join(p.replace('/', '@') for p in places[-5:])} on {max(days)}"


def _made(project: Project, place: str, steps: tuple[str, ...], label: str | None = None) -> Made:
    generation = project.generation_at(place)
    meta = generation.meta
    items = len(generation.table(())) if meta["per_item"] else len(generation.committed())
    figures: dict[str, float] = {}
    if not meta["per_item"] and items:
        columns = generation.committed()[0]["columns"]
        figures = {n: float(v) for n, v in columns.items() if n in VARIABLES and not VARIABLES[n].dims and isinstance(v, int | float)}
    stage, _, key = place.partition("/")
    lines = read_lines(generation.path)
    line = next((lines[name] for name in (label, *steps) if name in lines), None) or _latest(lines)
    return Made(
        stage,
        key,
        steps=steps,
        finished=any(one.finished for one in lines.values()) if meta["per_item"] and lines else bool(items),
        items=items,
        created=float(meta["created"]),
        version=meta["version"],
        per_exposure=bool(meta["per_item"]),
        params=meta["params"],
        inputs={port: _names(refs) for port, refs in line.inputs.items()} if line is not None else meta.get("inputs", {}),
        parts=_parts(line) if line is not None else {},
        figures=figures,
        name=project.state.kept.get(place, ""),
    )


def _latest(lines: dict[str, Line]) -> Line | None:
    return max(lines.values(), key=lambda line: line.since, default=None)


def _names(refs: list[ProductRef]) -> list[str]:
    """``STEP@KEY``, or ``STEP.OUTPUT@KEY`` where the step gives several of the type."""
    names = [r.step if r.output == r.type else f"{r.step}.{r.output}" for r in refs]
    return [f"{name}@{r.place.partition('/')[2]}" if r.place else name for name, r in zip(names, refs)]


def _parts(line: Line) -> dict[str, str]:
    """Places of the ids and parts of a step's inputs: two results may differ only in earlier ancestors."""
    out: dict[str, str] = {}
    for port, refs in line.inputs.items():
        for number, ref in enumerate(refs):
            name = port if len(refs) == 1 else f"{port} {number + 1}"
            found = {
                "ids": ref.ids,
                **ref.parts,
                "exposures": ref.exposure_ids,
                **{f"exposures.{p}": at for p, at in ref.exposures.items()},
            }
            out |= {f"{name}.{part}": place.replace("/", "@") for part, place in found.items() if place}
    return out


def place_named(project: Project, which: str) -> str:
    """``STAGE/KEY`` of ``STEP``, ``STEP@KEY`` (a prefix of the key is enough), or a name given by ``keep``.

    Raises
    ------
    StoreError
        If there is none; the message says whether gc removed it.
    """
    place = _place_named(project, which)
    if not (project.path / "stages" / place / "zarr.json").is_file():
        said = _removed(project, [place]) if place in project.state.removed else "its folder was removed"
        raise StoreError(
            f"{which} is {place.replace('/', '@')}, which is gone: {said}.", "", "list the existing results with cryodask history"
        )
    return place


def _place_named(project: Project, which: str) -> str:
    named = [place for place, name in project.state.kept.items() if name == which]
    if which not in project and named:
        return named[0]
    label, at, key = which.partition("@")
    if not at:
        return project.step(label).place
    if not key:
        raise StoreError(f"No key follows the @ in {which!r}.", "", f"write {label} for its current result, or {label}@KEY")
    all_made = made(project, label)
    found = [m for m in all_made if m.key.startswith(key)]
    if len(found) == 1:
        return found[0].place
    stages = _stages_of(project, label, generation_folders(project.path))
    gone = [p for p in project.state.removed if p.partition("/")[0] in stages and p.partition("/")[2].startswith(key)]
    if gone and not found:
        raise StoreError(f"{which} is gone: {_removed(project, gone)}.", "", "list the existing results with cryodask history")
    known = ", ".join(m.key for m in all_made) or "none"
    what = "matches none" if not found else f"matches {len(found)} of them"
    raise StoreError(f"Step {label} has the generations {known}; {key!r} {what}.", "", "list them with cryodask history")


def open_generation(project: Project, label: str, key: str) -> xr.Dataset:
    """Dataset of an older generation of a step."""
    return project.dataset_at(place_named(project, f"{label}@{key}"), label)


def keep(project: Project, which: str, name: str) -> str:
    """Name a generation, so that it is kept with everything it depends on; an empty name removes it. Returns ``STAGE/KEY``.

    Raises
    ------
    StoreError
        If the name is ambiguous, or the generation is not finished.
    """
    name = name.strip()
    if not name:
        named = [place for place, given in project.state.kept.items() if given == which]
        place = named[0] if named else _place_named(project, which)
        project.state.kept.pop(place, None)
        project.save()
        return place
    place = place_named(project, which)
    other = next((p for p, given in project.state.kept.items() if given == name and p != place), None)
    if other is not None:
        raise StoreError(
            f"{other.replace('/', '@')} is called {name!r} already.",
            "two results cannot share a name",
            f"remove the other name with  keep PROJECT {name!r} ''",
        )
    stages = {folder.parent.name for folder in generation_folders(project.path)}
    if "@" in name or name.partition(".")[0] in {*project.stages, *stages}:
        raise StoreError(
            f"{name!r} cannot be the name of a result: it looks like a step or STEP@KEY.", "", 'use another name, for example "best so far"'
        )
    if not project.generation_at(place).committed():
        raise StoreError(
            f"{place.replace('/', '@')} cannot be kept: it is not finished.",
            "its run was stopped",
            "run the project again, then name it",
        )
    project.state.kept[place] = name
    project.save()
    return place


def differences(project: Project, first: str, second: str) -> dict[str, list[Any]]:
    """Parameters, inputs and figures in which two generations differ: both values of each; empty if none differ."""
    rows: dict[str, list[Any]] = {}
    both = [_made(project, place_named(project, which), (), which.partition("@")[0]) for which in (first, second)]
    inputs = [{**{port: " + ".join(refs) for port, refs in one.inputs.items()}, **one.parts} for one in both]
    for kind, tables in (("param", [m.params for m in both]), ("input", inputs), ("figure", [m.figures for m in both])):
        for name in sorted({*tables[0], *tables[1]}):
            values = [table.get(name) for table in tables]
            if values[0] != values[1]:
                rows[f"{kind} {name}"] = values
    if both[0].version != both[1].version:
        rows["version"] = [one.version for one in both]
    return rows


def compare(project: Project, first: str, second: str) -> pd.DataFrame:
    """:func:`differences` as a table with one column for each generation; no rows if none differ."""
    import pandas as pd

    return pd.DataFrame.from_dict(differences(project, first, second), orient="index", columns=[first, second])


def curves(project: Project, *which: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """FSC curves of the generations that have one: spatial frequency (1/angstrom) and corrected FSC."""
    out = {}
    for name in which:
        generation = project.generation_at(place_named(project, name))
        record = generation.committed().get(0)
        if record is not None and "fsc_corrected" in record["columns"]:
            resolution = np.asarray(generation.read(record, "shell_resolution_angstrom"))
            out[name] = 1.0 / resolution, np.asarray(generation.read(record, "fsc_corrected"))
    return out


# --- one particle ------------------------------------------------------------------------------------------------------------
def where(project: Project, particle: int | str) -> list[tuple[str, str]]:
    """What happened to one particle, step by step."""
    wanted = parse_id(particle)
    if wanted <= 0 or wanted >= 2**63 or not int(birth_of(wanted)):
        raise InputError(
            f"{particle} is not the id of a particle.", "births are numbered from 1", "write birth.row.number, for example 1.12.7"
        )
    row = int(row_of(wanted))
    out = [("", f"particle {id_text(wanted)} ({wanted}) of {_exposure(project, row)}")]
    for label in project.stages:
        for ref in project.step(label).products.values():
            if ref.type == "particles":
                name = label if ref.output == "particles" else f"{label}.{ref.output}"
                out.append((name, _found(project, label, ref, wanted)))
    return out


def _exposure(project: Project, row: int) -> str:
    present = {item.row: item.name for item in project.items()}
    if row in present:
        return f"exposure {present[row]}"
    former = project.registered().get(row)
    if former is None:
        return f"an exposure in row {row}, which the project never had"
    return f"exposure {former.name}, which is not active now"


def _found(project: Project, label: str, ref: Any, wanted: int) -> str:
    if not project.generation(label).committed():
        return "not finished"
    ids = project.sets.ids(ref)
    if wanted in ids:
        return "there"
    if int(parent_of(wanted)) in ids:
        return "present, as its parent"
    reason = _reason(project, project.step(label).place, wanted)
    return f"left out: {reason}" if reason else "not present"


def _reason(project: Project, place: str, wanted: int) -> str:
    """Why a step left a particle out; empty if it gives no reason."""
    generation = project.generation_at(place)
    texts = {int(k): v for k, v in generation.meta.get("reasons", {}).items()}
    row = int(row_of(wanted)) if generation.meta["per_item"] else 0
    names = ("left_out_id", "left_out_reason") if generation.meta["per_item"] else ("dropped_id", "removal_reason")
    record = generation.committed().get(row)
    if record is None or names[0] not in {*record["columns"], *record["shards"]}:
        return ""
    ids, reasons = (np.asarray(generation.read(record, name)) for name in names)
    here = np.flatnonzero(ids == wanted)
    return texts.get(int(reasons[here[0]]), f"reason {int(reasons[here[0]])}") if len(here) else ""
