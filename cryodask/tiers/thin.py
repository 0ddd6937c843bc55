"""Thinning: arrays of a step that the step can make again are deleted; keys, tables and checksums stay.

Whoever needs them later has them recomputed and compared with the stored checksums (run/remake.py).
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from cryodask.errors import StoreError
from cryodask.run.content import IMAGES
from cryodask.stage import find_stage
from cryodask.store.away import THINNED, Ledger
from cryodask.store.files import check_writable, disk_errors, fsync_folder
from cryodask.store.generation import Generation
from cryodask.store.lines import Record
from cryodask.store.lock import ProjectLock
from cryodask.store.places import behind
from cryodask.store.project import Project
from cryodask.tiers.inventory import category_of
from cryodask.vocabulary import VARIABLES


@dataclass
class Thinned:
    """What a call would free, or has freed. ``kept``: one sentence per kind of array that stays, with the reason."""

    files: int = 0
    bytes: int = 0
    kept: list[str] = field(default_factory=list)


def thin(folder: str | Path, label: str, *, dry_run: bool = False) -> Thinned:
    """Delete the arrays of a step that can be computed again.

    Parameters
    ----------
    folder : path
        Folder of the project.
    label : str
        A per-exposure step.
    dry_run : bool
        Only say what would be freed.

    Raises
    ------
    StoreError
        If nothing of the step can be recomputed.
    """
    if dry_run:
        return _thin(Project(folder), label, dry_run=True)
    with ProjectLock(Path(folder)):
        return _thin(Project(folder), label, dry_run=False)


def _thin(project: Project, label: str, *, dry_run: bool) -> Thinned:
    step = project.step(label)
    generation = project.generation(label)
    _refuse(project, label, generation)
    ledger, out = Ledger(project.path), Thinned()
    sources = _Sources(project, label, ledger)
    no_source = shared = 0
    shown: set[str] = set()
    for row, record in sorted(generation.committed().items()):
        wanted = [name for name in record["shards"] if category_of(name, True) != "pictures"]
        shown |= set(record["shards"]) - set(wanted)
        there = [(name, path) for name in wanted if (path := generation.shard_of(record, name)).exists()]
        if there and not sources.has(row, step.stage):
            no_source += 1
            continue
        facts = {}
        for name, path in there:
            stat = os.stat(path)
            shared += stat.st_nlink > 1
            out.files, out.bytes = out.files + 1, out.bytes + (stat.st_size if stat.st_nlink == 1 else 0)
            facts[ledger.name_of(path)] = {
                "state": THINNED,
                "category": category_of(name, True),
                "exposure": row,
                "size": stat.st_size,
                "crc": record["shards"][name],
                "trash": "",
            }
        if not dry_run:
            ledger.note_all(facts)  # first: a file that is missing without a line is lost
            for _, path in there:
                _delete(project, path)
    if shown:
        out.kept.append(f"kept: {', '.join(sorted(shown))}, because pages and reports show them")
    if no_source:
        out.kept.append(f"kept: the arrays of {no_source} of the exposures, because what they were made from is missing")
    if shared:
        out.kept.append(f"{shared} of the files free nothing here, because other results share them (cryodask gc removes superseded ones)")
    return out


def _refuse(project: Project, label: str, generation: Generation) -> None:
    meta = generation.meta
    place = f"{generation.path.parent.name}/{generation.key}"
    named = behind(project.path, [(one, None) for one in project.state.kept])
    why = ""
    if not meta["per_item"]:
        why = "it is the result of a step over a set: maps and averages are what people look at"
    elif meta.get("birth"):
        why = "particles are born in it"
    elif place in named:
        why = "it is named, or a named result depends on it (cryodask history shows the names)"
    elif (now := find_stage(meta["stage"]).version_here()) != meta["version"]:
        why = f"it was computed with version {meta['version']} of {meta['stage']}, and this program has version {now}"
    if why:
        raise StoreError(f"Step {label} is not thinned: {why}.", "", "thin a step that gives images by exposure, such as motion or extract")


def _delete(project: Project, path: Path) -> None:
    with disk_errors(path):
        check_writable(project.path / "tiers")
        os.unlink(path)
        fsync_folder(path.parent)


class _Sources:
    """Whether the images that a step reads still exist somewhere: here, in an archive, or recomputable themselves."""

    def __init__(self, project: Project, label: str, ledger: Ledger) -> None:
        self.project, self.absent, self.ledger = project, ledger.absent(), ledger
        self.items = {item.row: item for item in project.items()}
        refs = [ref for refs in project.step(label).inputs.values() for ref in refs]
        places = {one for ref in refs for by_part in (ref.parts, ref.exposures) for place in by_part.values() for one in place.split("|")}
        stage = find_stage(project.step(label).stage)
        self.needed = {n for n in (*stage.needs, *stage.optional) if VARIABLES[n].kind == "bulk"}
        self.givers = [g for place in sorted(places) if (g := project.generation_at(place)).meta["per_item"]]
        self.reads_files = bool(set(stage.needs) & set(IMAGES))

    def has(self, row: int, stage: str) -> bool:
        """Whether the images for an exposure exist."""
        if self.reads_files:
            return self._has_original(row)
        for giver in self.givers:
            record = giver.records().get(row)
            if record is None or not record["ok"]:
                continue
            for name in self.needed & set(giver.meta["gives"]):
                if name not in record["shards"] and not self._has_original(row):  # read in place
                    return False
                if name in record["shards"] and not self._has_shard(giver, record, name):
                    return False
        return True

    def _has_shard(self, giver: Generation, record: Record, name: str) -> bool:
        path = giver.shard_of(record, name)
        return path.exists() or self.ledger.name_of(path) in self.absent

    def _has_original(self, row: int) -> bool:
        item = self.items.get(row)
        paths = [str(item.inputs[name]) for name in IMAGES if name in item.inputs] if item is not None else []
        return any((self.project.home / path).exists() or f"inputs:{path}" in self.absent for path in paths)
