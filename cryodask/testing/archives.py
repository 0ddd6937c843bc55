"""A project of files only, fast to archive, the check that no byte of it is ever lost, and an archive run that is killed at random."""

from __future__ import annotations

import hashlib
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cryodask.errors import ArchiveError
from cryodask.run.content import content_id
from cryodask.store.away import Ledger
from cryodask.store.generation import Generation
from cryodask.store.layouts import Grid
from cryodask.store.project import Arrival, Project
from cryodask.store.state import StepState
from cryodask.testing.crash import crash
from cryodask.tiers.archive import archive, restore
from cryodask.tiers.inventory import pieces
from cryodask.tiers.places import Archive, open_archive
from cryodask.tiers.trash import KEPT_SECONDS

MOVIES = 3
ALL = ("originals", "micrographs")


def make(folder: Path, movies: int = MOVIES, size: int = 3000) -> Path:
    """A project with originals and micrographs; returns the project folder."""
    (folder / "movies").mkdir(parents=True)
    project = Project.create(folder / "p", "p")
    project.state.home = ".."
    meta = {"stage": "motion", "version": 1, "params": {}, "recipes": {}, "inputs": {}}
    grids = {"": Grid({"y": 16, "x": 16}, {})}
    gives = ("micrograph_sum", "total_motion")
    generation = Generation.create(folder / "p" / "stages" / "motion" / "key", meta=meta, gives=gives, per_item=True, grids=grids)
    project.state.adopt("motion", StepState(stage="motion", key="key"))
    project.save()
    arrivals = []
    for number in range(movies):
        path = folder / "movies" / f"m {number}.tif"  # names have blanks, and worse
        path.write_bytes(np.random.default_rng(number).bytes(size + number))
        arrivals.append(Arrival(path.stem, content_id(path, size + number), {"movie_path": f"movies/{path.name}"}))
        image = np.random.default_rng(100 + number).normal(size=(16, 16)).astype(np.float32)
        generation.commit(number, path.stem, {"micrograph_sum": image, "total_motion": 1.0})
    generation.journal.close()
    project.update_exposures(arrivals, complete=True)
    return folder / "p"


def truth(project: Path) -> dict[str, str]:
    """sha256 of every file that may be archived, by its name in the ledger."""
    return {p.name: hashlib.sha256(p.path.read_bytes()).hexdigest() for p in pieces(Project(project), ALL)}


def lost(project: Path, wanted: dict[str, str], place: Any = None) -> list[str]:
    """Files of which not every byte is here, in the trash, or verified elsewhere; this check uses none of the code that archives."""
    lines = Ledger(project).records()
    out = []
    for name, sha in wanted.items():
        kind, _, relative = name.partition(":")
        base = project if kind == "project" else project.parent
        line = lines.get(name, {})
        local = [base / relative, *([base / line["trash"]] if line.get("trash") else [])]
        if any(path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == sha for path in local):
            continue
        verified = line.get("state") == "removed" and line.get("sha256") == sha
        where = place or (open_archive(line["archive"]) if verified else None)
        if not (verified and where and hashlib.sha256(b"".join(where.read(line["key"]))).hexdigest() == sha):
            out.append(name)
    return out


def local(project: Path) -> list[str]:
    """Names of the files that are in their places."""
    return [p.name for p in pieces(Project(project), ALL) if os.path.exists(p.path)]


@dataclass
class Killed:
    """What was seen in a series of kills: their number by the system call that came next, the states of files, the bytes lost."""

    kills: Counter[str] = field(default_factory=Counter)
    states: Counter[str] = field(default_factory=Counter)
    bytes_lost: int = 0


def kill_at_random(folder: Path, to: str, kills: int, *, seed: int = 1, place: Any = None) -> Killed:
    """Archive and restore a project again and again, killed at random between any two system calls that change the disk.

    Parameters
    ----------
    folder : path
        New folder for the project.
    to : str
        The archive.
    kills : int
        After so many, the project is restored.
    seed : int
        Of the places of the kills.
    place : optional
        Reads the copies for the check, where ``to`` cannot be opened in this process.
    """
    project = make(folder)
    wanted, sizes = truth(project), {p.name: os.path.getsize(p.path) for p in pieces(Project(project), ALL)}
    dice, out = random.Random(seed), Killed()

    def archive_all(now: float) -> None:
        archive(project, to, ALL, now=now)

    for turn in range(40 * kills):
        if out.kills.total() >= kills:
            break
        later = time.time() + dice.choice([0.0, KEPT_SECONDS + 10])
        work = partial(archive_all, later) if turn % 3 else partial(_restore_all, project)
        ended = crash(work, before=int(dice.expovariate(1 / 60)) + 1, split=dice.random() < 0.3)
        if ended.killed:
            out.kills[ended.calls[-1] if ended.calls else "start"] += 1
        out.states.update(line["state"] for line in Ledger(project).records().values())
        out.bytes_lost += sum(sizes[name] for name in lost(project, wanted, place))
    restore(project)
    out.bytes_lost += sum(sizes[name] for name, sha in truth(project).items() if sha != wanted[name])
    return out


def _restore_all(project: Path) -> None:
    restore(project)


class Faulty:
    """An archive in a folder whose copies or answers go wrong."""

    def __init__(self, inner: Archive, fault: str) -> None:
        self.inner, self.fault, self.url, self.reads = inner, fault, inner.url, 0

    def put(self, key: str, path: Path) -> bool:
        """Copy a file, if the fault is another."""
        if self.fault == "unreachable":
            raise ArchiveError("the archive cannot be reached")
        return self.inner.put(key, path)

    def read(self, key: str) -> Iterator[bytes]:
        """Bytes of a copy, with the fault."""
        data = b"".join(self.inner.read(key))
        self.reads += 1
        if self.fault == "flipped":
            data = data[:100] + bytes([data[100] ^ 4]) + data[101:]
        elif self.fault == "truncated":
            data = data[:-1]
        elif self.fault == "empty":
            data = b""
        elif self.fault == "forgets" and self.reads % 2 == 0:  # the first answer was right
            data = b"x" * len(data)
        yield data
