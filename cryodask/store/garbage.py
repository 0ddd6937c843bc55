"""What can be removed from a project: generations that nothing needs, and on which no kept one depends."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cryodask.store.files import check_writable, disk_errors
from cryodask.store.generation import Generation
from cryodask.store.history import generation_folders
from cryodask.store.places import behind, read_lines

if TYPE_CHECKING:
    from cryodask.store.project import Project


@dataclass(frozen=True)
class _Result:
    """A generation as the result of a step."""

    place: str
    label: str | None
    finished: bool
    since: float


def superseded(project: Project, *, last_results: bool = False) -> list[Path]:
    """Folders that are not needed.

    Needed are the current results of steps, named results, and the last finished result of every step that the project ever had (unless
    ``last_results``), each with everything that it depends on.
    """
    needed: set[str] = set()
    starts: list[tuple[str, str | None]] = [(place, None) for place in project.state.kept]
    for label, step in project.state.steps.items():
        starts.append((step.place, label))
        for ref in (*step.products.values(), *(r for refs in step.inputs.values() for r in refs)):
            needed |= ref.places()
    if not last_results:
        starts += _last_results(project)
    needed |= behind(project.path, starts)
    folders = sorted(p for p in project.path.glob("stages/*/*") if p.is_dir())
    return [p for p in folders if p.suffix == ".part" or f"{p.parent.name}/{p.name}" not in needed]


def _last_results(project: Project) -> list[tuple[str, str | None]]:
    """The last finished result of every step that the project ever had; if it never finished, the result with most items."""
    of_step: dict[str, list[_Result]] = {}
    for folder in generation_folders(project.path):
        place = f"{folder.parent.name}/{folder.name}"
        lines = read_lines(folder)
        for label, line in lines.items():
            of_step.setdefault(label, []).append(_Result(place, label, line.finished, line.since))
        if not lines:  # its step is unknown, so it counts for its stage
            generation = project.generation_at(place)
            one = _Result(place, None, bool(generation.committed()), float(generation.meta["created"]))
            of_step.setdefault(f"{folder.parent.name}/", []).append(one)
    out = []
    for results in of_step.values():
        finished = [r for r in results if r.finished]
        best = max(finished, key=lambda r: r.since) if finished else max(results, key=lambda r: (_items(project, r.place), r.since))
        out.append((best.place, best.label))
    return out


def _items(project: Project, place: str) -> int:
    return len(project.generation_at(place).committed())


def collect_garbage(project: Project, *, last_results: bool = False) -> int:
    """Remove superseded generations (driver only); returns the bytes freed."""
    freed = 0
    for folder in superseded(project, last_results=last_results):
        if folder.suffix != ".part":
            # recorded first, so that later requests are told about it even if this is interrupted
            project.state.removed[f"{folder.parent.name}/{folder.name}"] = round(time.time(), 3)
            project.save()
        freed += _remove(folder)
    return freed


def _remove(folder: Path) -> int:
    freed = size_of(folder)
    with disk_errors(folder):
        check_writable(folder)
        if folder.suffix != ".part":  # a partial generation must never exist under its key
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
            committed = generation.committed()
            if generation.meta["per_item"]:
                text += f"  {len(committed)} items"
            record = committed.get(0) if not generation.meta["per_item"] else None
            if record is not None and "resolution_angstrom" in record["columns"]:
                text += f"  resolution {record['columns']['resolution_angstrom']:.2f} A"
        yield text
