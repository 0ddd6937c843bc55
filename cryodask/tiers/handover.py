"""Hand-over: a verified copy of a session for its owner, described as an RO-Crate, with a manifest that ``sha256sum -c`` checks."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cryodask.errors import ArchiveError, ProjectFileError
from cryodask.interop.about import read_about
from cryodask.run.content import IMAGES
from cryodask.store.away import Ledger, away_sentences
from cryodask.store.files import disk_errors, fsync_folder, write_atomically, write_pieces
from cryodask.store.lock import ProjectLock
from cryodask.store.project import Project
from cryodask.tiers import crate
from cryodask.tiers.checksums import Checksums, checksums, of_file, pieces
from cryodask.tiers.inventory import TRASH
from cryodask.tiers.marks import MARKS, identity

MANIFEST, ABOUT = "manifest.sha256", "README.txt"
_LEFT_OUT = {TRASH, "driver.lock", "epochs"}


@dataclass(frozen=True)
class HandedOver:
    """What was copied, and a sentence for everything that was not here to be copied."""

    files: int
    bytes: int
    manifest: Path
    away: tuple[str, ...]


def hand_over(folder: str | Path, to: str | Path) -> HandedOver:
    """Copy a project and its originals into a folder, read every copy back, and write the manifest.

    A repeated call copies only what differs; the manifest is written last, when everything is right.

    Parameters
    ----------
    folder : path
        Folder of the project.
    to : path
        Folder of the hand-over; new, or that of an earlier hand-over of this project.

    Raises
    ------
    ArchiveError
        A copy cannot be made to agree with its original.
    """
    target = Path(to).expanduser().absolute()
    with ProjectLock(Path(folder)):
        project = Project(folder)
        root = project.path.absolute()
        if target.is_relative_to(root) or root.is_relative_to(target):
            raise ProjectFileError(f"{to} and the project folder lie in one another.", "", "hand over to another folder")
        about = read_about(project)
        own, mark = identity(project.path), target / "handover-of.txt"
        if target.exists() and any(target.iterdir()) and (not mark.is_file() or mark.read_text() != f"{own}\n"):
            raise ProjectFileError(f"{to} is not empty, and not an earlier hand-over of this project.", "", "give a new folder")
        with disk_errors(target):
            target.mkdir(parents=True, exist_ok=True)
            write_atomically(mark, f"{own}\n")
            copied = [(relative, _copied(source, target / relative)) for source, relative in _files(project)]
            away = tuple(away_sentences(project.path))
            write_atomically(target / ABOUT, _about(project, away))
            copied.append((ABOUT, of_file(target / ABOUT)))
            write_atomically(target / crate.NAME, crate.crate(project, about, [(n, c.size, c.sha256) for n, c in copied]))
            copied.append((crate.NAME, of_file(target / crate.NAME)))
            write_atomically(target / MANIFEST, b"".join(manifest_line(c.sha256, name) for name, c in copied))
            size = sum(c.size for _, c in copied)
        Ledger(project.path, MARKS).note(f"handed over to {target}", files=len(copied), bytes=size)
    return HandedOver(len(copied), size, target / MANIFEST, away)


def _files(project: Project) -> Iterator[tuple[Path, str]]:
    """Files and their places in the copy, which are those that they have to one another; what lies elsewhere goes below ``inputs/``."""
    root = project.path.absolute()
    results = _project_folder(project)
    for parent, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - _LEFT_OUT)
        for name in sorted(set(names) - _LEFT_OUT):
            path = Path(parent, name)
            if path.suffix != ".part" and path.is_file():
                yield path, f"{results}/{path.relative_to(root).as_posix()}"
    for item in project.items():
        for relative in (str(item.inputs[variable]) for variable in IMAGES if variable in item.inputs):
            path = project.home / relative
            inside = not os.path.isabs(relative) and not os.path.normpath(relative).startswith("..")
            if path.is_file():
                yield path, os.path.normpath(relative) if inside else f"inputs/{item.row}-{path.name}"


def _project_folder(project: Project) -> str:
    root = project.path.resolve()
    inside = root.is_relative_to(project.home) and root != project.home
    return root.relative_to(project.home).as_posix() if inside else "project"


def _copied(source: Path, target: Path) -> Checksums:
    """Copy a file unless the right copy is there, and read it back."""
    wanted = of_file(source)
    if not (target.is_file() and of_file(target) == wanted):
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"{target.name}.{os.getpid()}.part")
        write_pieces(part, pieces(source))
        shutil.copystat(source, part)
        os.replace(part, target)
        fsync_folder(target.parent)
        if checksums(pieces(target)) != wanted:
            raise ArchiveError(
                f"{target} does not match {source} after it was copied.",
                "the file is being written, or the disk of the hand-over is faulty",
                "repeat the command; there is no manifest until every copy is right",
            )
    return wanted


def manifest_line(sha256: str, name: str) -> bytes:
    """A line that ``sha256sum -c`` reads, also for names with line ends or backslashes."""
    raw = os.fsencode(name)
    escaped = raw.replace(b"\\", b"\\\\").replace(b"\n", b"\\n").replace(b"\r", b"\\r")
    return (b"\\" if escaped != raw else b"") + sha256.encode() + b"  " + escaped + b"\n"


def _about(project: Project, away: tuple[str, ...]) -> str:
    text = (
        f"{project.name}: movies and results of a cryo-EM session.\n\n"
        f"The results are in {_project_folder(project)}; open them with  cryodask info {_project_folder(project)}\n"
        "Movies or micrographs are as the microscope wrote them.\n\n"
        f"Check that every file is complete:  sha256sum -c {MANIFEST}\n"
    )
    return text + "".join(f"\n{sentence}" for sentence in away) + ("\n" if away else "")
