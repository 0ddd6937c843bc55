"""Removal in two steps: a file is moved into ``.trash`` beside the data, and deleted by a call that comes 24 hours later.

The trash of results is ``.trash`` in the project folder, that of an original ``.trash`` in its own folder: a rename within one file system.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

from cryodask.store.away import REMOVED, Ledger
from cryodask.store.files import check_writable, disk_errors, fsync_folder
from cryodask.store.lines import Record
from cryodask.store.project import Project
from cryodask.tiers.inventory import TRASH, Piece, trash_of

KEPT_SECONDS = 24 * 3600.0


def trash_path(piece: Piece) -> str:
    """Where a file goes, relative to the project folder (a result) or to the folder of the project file (an original)."""
    kind, _, relative = piece.name.partition(":")
    folder, name = os.path.split(relative)
    return f"{TRASH}/{relative}" if kind == "project" else os.path.join(folder, TRASH, name)


def move(project: Project, piece: Piece, trash: str) -> None:
    """Move a file into the trash. The ledger must explain its absence already."""
    target = (project.path if piece.name.startswith("project:") else project.home) / trash
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        check_writable(project.path / "tiers")
        os.replace(piece.path, target)
        fsync_folder(target.parent)
        fsync_folder(piece.path.parent)


@dataclass(frozen=True)
class Emptied:
    """What was deleted, and one sentence for each file that was not."""

    files: int = 0
    bytes: int = 0
    problems: tuple[str, ...] = ()


def empty(project: Project, answers: Callable[[Record], str], now: float | None = None) -> Emptied:
    """Delete files that were removed 24 hours ago, if their copies are still good.

    Parameters
    ----------
    project : Project
        Locked by the caller.
    answers : callable
        Reads the copy of a line of the ledger; returns why it cannot be relied upon, or an empty text.
    now : float, optional
        Time, seconds since 1970.
    """
    before = (time.time() if now is None else now) - KEPT_SECONDS
    files = size = 0
    problems: list[str] = []
    for line in list(Ledger(project.path).records().values()):
        path = trash_of(project, line)
        if path is None or line["state"] != REMOVED or line["time"] > before:
            continue
        if why := answers(line):
            problems.append(f"{path} stays in the trash: {why}")
            continue
        files, size = files + 1, size + path.stat().st_size
        with disk_errors(path):
            check_writable(project.path / "tiers")
            os.unlink(path)
            fsync_folder(path.parent)
    return Emptied(files, size, tuple(problems))
