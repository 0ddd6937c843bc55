"""What a project has computed so far: every generation, listed, opened, compared, named, and removed when nobody needs it."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cryodask.errors import StoreError
from cryodask.store.files import disk_errors
from cryodask.store.generation import Generation
from cryodask.store.identity import id_text, parent_of, parse_id, row_of
from cryodask.vocabulary import VARIABLES

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

    from cryodask.store.project import Project


@dataclass(frozen=True)
class Made:
    """One generation. ``steps`` are the steps whose current result it is, ``inputs`` the generations that it was made from."""

    stage: str
    key: str
    steps: tuple[str, ...]
    finished: bool
    items: int
    created: float
    version: int
    params: dict[str, Any]
    inputs: dict[str, Any]
    figures: dict[str, float] = field(default_factory=dict)
    name: str = ""

    @property
    def place(self) -> str:
        """``STAGE/KEY``."""
        return f"{self.stage}/{self.key}"


def generation_folders(project: Path) -> list[Path]:
    """Folders of all generations, whole ones only."""
    return sorted(p for p in project.glob("stages/*/*") if p.suffix != ".part" and (p / "zarr.json").is_file())


def births_on_disk(project: Path) -> dict[str, int]:
    """Numbers of births by identity key, as the generations themselves know them."""
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
    """Generations of the stage of a step (of all if None), the newest last."""
    stage = project.step(label).stage if label is not None and label in project else label
    current: dict[str, list[str]] = {}
    for step in project.stages:
        current.setdefault(project.step(step).place, []).append(step)
    out = []
    for folder in generation_folders(project.path):
        if stage is None or folder.parent.name == stage:
            place = f"{folder.parent.name}/{folder.name}"
            out.append(_made(project, place, tuple(current.get(place, ()))))
    if label is not None and not out:
        project.step(label)
    return sorted(out, key=lambda m: m.created)


def _made(project: Project, place: str, steps: tuple[str, ...]) -> Made:
    generation = project.generation_at(place)
    meta = generation.meta
    committed = generation.committed()
    figures: dict[str, float] = {}
    if not meta["per_item"] and 0 in committed:
        columns = committed[0]["columns"]
        figures = {n: float(v) for n, v in columns.items() if n in VARIABLES and not VARIABLES[n].dims and isinstance(v, int | float)}
    stage, _, key = place.partition("/")
    return Made(
        stage,
        key,
        steps=steps,
        finished=bool(committed) if not meta["per_item"] else bool(len(committed)),
        items=len(committed),
        created=float(meta["created"]),
        version=int(meta["version"]),
        params=meta["params"],
        inputs=meta.get("inputs", {}),
        figures=figures,
        name=project.state.kept.get(place, ""),
    )


def place_named(project: Project, which: str) -> str:
    """``STAGE/KEY`` of ``STEP``, ``STEP@KEY`` (the beginning of a key is enough), or a name that was given."""
    named = [place for place, name in project.state.kept.items() if name == which]
    if named:
        return named[0]
    label, _, key = which.partition("@")
    if not key:
        return project.step(label).place
    found = [m for m in made(project, label) if m.key.startswith(key)]
    if len(found) != 1:
        known = ", ".join(m.key for m in made(project, label)) or "none"
        what = "is not one" if not found else f"begins {len(found)} of them"
        raise StoreError(f"Step {label} has the generations {known}; {key!r} {what}.", "", "cryodask history lists them")
    return found[0].place


def open_generation(project: Project, label: str, key: str) -> xr.Dataset:
    """Dataset of an older generation of a step."""
    return project.dataset_at(place_named(project, f"{label}@{key}"), label)


def keep(project: Project, which: str, name: str) -> None:
    """Name a generation, so that it is kept; an empty name takes it back."""
    place = place_named(project, which)
    if name:
        project.state.kept[place] = name
    else:
        project.state.kept.pop(place, None)
    project.save()


def compare(project: Project, first: str, second: str) -> pd.DataFrame:
    """Parameters, inputs and figures of two generations that differ: a table with a column each."""
    import pandas as pd

    rows: dict[str, list[Any]] = {}
    both = [_made(project, place_named(project, which), ()) for which in (first, second)]
    for kind in ("params", "inputs", "figures"):
        tables = [getattr(one, kind) for one in both]
        for name in sorted({*tables[0], *tables[1]}):
            values = [table.get(name) for table in tables]
            if values[0] != values[1]:
                rows[f"{kind.rstrip('s')} {name}"] = values
    if both[0].version != both[1].version:
        rows["version"] = [one.version for one in both]
    return pd.DataFrame.from_dict(rows, orient="index", columns=[first, second])


def curves(project: Project, *which: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """FSC curves of generations that have one: spatial frequency (1/angstrom) and corrected FSC."""
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
    """What became of one particle, step by step."""
    wanted = parse_id(particle)
    items = {item.row: item.name for item in project.items()}
    row = int(row_of(wanted))
    out = [("", f"particle {id_text(wanted)} ({wanted}) of exposure {items.get(row, f'in row {row}, which is not in the project')}")]
    for label in project.stages:
        for ref in project.step(label).products.values():
            if ref.type == "particles":
                name = label if ref.output == "particles" else f"{label}.{ref.output}"
                out.append((name, _found(project, label, ref, wanted)))
    return out


def _found(project: Project, label: str, ref: Any, wanted: int) -> str:
    if not project.generation(label).committed():
        return "not finished"
    ids = project.sets.ids(ref)
    if wanted in ids:
        return "there"
    if int(parent_of(wanted)) in ids:
        return "there, as its parent"
    reason = _reason(project, project.step(label).place, wanted)
    return f"left out: {reason}" if reason else "not there"


def _reason(project: Project, place: str, wanted: int) -> str:
    """Why a step left a particle out, in words; empty where it does not say."""
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


# --- removal -----------------------------------------------------------------------------------------------------------------
def superseded(project: Project, *, last_results: bool = False) -> list[Path]:
    """Folders that nothing needs: not the current result of a step nor read by one, not named, not a stage's last finished result."""
    needed = set(project.state.kept)
    for step in project.state.steps.values():
        needed.add(step.place)
        for ref in (*step.products.values(), *(r for refs in step.inputs.values() for r in refs)):
            needed |= ref.places()
    if not last_results:
        needed |= _last_finished(project)
    folders = sorted(p for p in project.path.glob("stages/*/*") if p.is_dir())
    return [p for p in folders if p.suffix == ".part" or f"{p.parent.name}/{p.name}" not in needed]


def _last_finished(project: Project) -> set[str]:
    """Of every stage that has no finished current result, its newest finished generation."""
    newest: dict[str, Made] = {}
    safe = set()
    for one in made(project):
        if one.finished:
            newest[one.stage] = one
            if one.steps:
                safe.add(one.stage)
    return {one.place for stage, one in newest.items() if stage not in safe}


def collect_garbage(project: Project, *, last_results: bool = False) -> int:
    """Remove superseded generations; returns the bytes freed."""
    return sum(_remove(folder) for folder in superseded(project, last_results=last_results))


def _remove(folder: Path) -> int:
    freed = size_of(folder)
    with disk_errors(folder):
        if folder.suffix != ".part":  # half a generation must never stand under its key
            folder = folder.rename(folder.with_name(f"{folder.name}.{time.time_ns()}.part"))
        shutil.rmtree(folder)
    return freed


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def listed(folders: list[Path]) -> Iterator[str]:
    """One line per generation that would be removed, with its figures."""
    for folder in folders:
        text = f"{folder.parent.name}@{folder.name}  {size_of(folder) / 1e6:.1f} MB"
        if folder.suffix != ".part":
            generation = Generation(folder)
            record = generation.committed().get(0) if not generation.meta["per_item"] else None
            if record is not None and "resolution_angstrom" in record["columns"]:
                text += f"  resolution {record['columns']['resolution_angstrom']:.2f} A"
        yield text
