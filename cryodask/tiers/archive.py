"""Archive: files go to another place, and are removed here only once that place has given their bytes back.

Each file passes through the states present > copied > verified > removed (> restored), each with one durable line of the ledger (see
store/away.py). A kill at any moment leaves every byte here, or verified elsewhere:

1. The file is copied under a key that nothing had; a copy from before a kill is taken as it is, because it is read in step 2 anyway.
2. The copy is read back: length, crc32c and sha256 must be those of the file. What the store says about it is not believed.
3. Before removal the file and the copy are read once more, and must both still agree with the line of step 2.
4. The line ``removed`` is written, then the file is moved into the trash; 24 hours later the copy is read again, and the file is deleted.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from cryodask.errors import ArchiveError, CryodaskError, ProjectFileError
from cryodask.run.content import content_id, is_of_a_file
from cryodask.store.away import REMOVED, THINNED, Ledger
from cryodask.store.files import check_writable, disk_errors, fsync_folder, write_pieces
from cryodask.store.lines import Record
from cryodask.store.lock import ProjectLock
from cryodask.store.project import Project
from cryodask.tiers import trash
from cryodask.tiers.checksums import Checksums, checksums, of_file
from cryodask.tiers.inventory import Piece, pieces, trash_of
from cryodask.tiers.marks import identity
from cryodask.tiers.places import Archive, FolderArchive, open_archive, safe_key

DEFAULT = ("originals",)
"""What is archived unless the user says otherwise: the camera's files. Shards can be made from them again."""


class _Refused(Exception):
    """Why one file is not removed; the others go on."""


@dataclass
class Archived:
    """What a call did. ``problems``: one sentence per file that stays because of it."""

    removed: int = 0
    bytes: int = 0
    kept: int = 0
    deleted: int = 0
    problems: list[str] = field(default_factory=list)


def archive(
    folder: str | Path,
    to: str,
    categories: Collection[str] = DEFAULT,
    *,
    remove: bool = True,
    rows: Collection[int] | None = None,
    say: Callable[[str], None] = lambda text: None,
    now: float | None = None,
) -> Archived:
    """Move files of a project into an archive; the same call also goes on where one was interrupted.

    Parameters
    ----------
    folder : path
        Folder of the project.
    to : str
        A folder, or the address of an object store (see places.py).
    categories : collection of str
        See ``inventory.CATEGORIES``.
    remove : bool
        Without, files are copied and verified, and stay here.
    rows : collection of int, optional
        Only files of these exposures.
    say : callable
        Called with a sentence per problem, as it is found.
    now : float, optional
        Time, seconds since 1970.

    Raises
    ------
    ArchiveError
        The archive cannot be used. Files that were removed before are verified there; the others stay.
    """
    place = open_archive(to)
    if isinstance(place, FolderArchive) and place.folder.is_relative_to(Path(folder).absolute()):
        raise ProjectFileError(f"{to} lies in the project folder.", "", "archive to another disk")
    done = Archived()
    with ProjectLock(Path(folder)):
        project = Project(folder)
        emptied = trash.empty(project, answer_of_copy, now)
        done.deleted = emptied.files
        done.problems += emptied.problems
        mover = _Mover(project, place, remove)
        for piece in pieces(project, categories):
            if rows is not None and piece.row not in rows:
                continue
            try:
                moved = mover.move(piece)
            except _Refused as refused:
                done.problems.append(f"{piece.path}: {refused}; it stays")
                say(done.problems[-1])
                continue
            if moved is None:
                continue
            done.removed += remove
            done.kept += not remove
            done.bytes += moved
    return done


class _Mover:
    def __init__(self, project: Project, place: Archive, remove: bool) -> None:
        self.project, self.place, self.remove = project, place, remove
        self.ledger, self.root = Ledger(project.path), f"{project.name}-{identity(project.path)}"

    def move(self, piece: Piece) -> int | None:
        """Take one file through all states; returns its bytes, None if it is not here (any more)."""
        if not os.path.lexists(piece.path):
            return None
        here = self._whole(piece)
        line = self.ledger.records().get(piece.name)
        key = self._key(piece)
        same = line is not None and (line.get("archive"), line.get("key")) == (self.place.url, key) and _sums(line) == here
        if line is None or not same or line["state"] not in ("copied", "verified", REMOVED):
            self.place.put(key, piece.path)
            where = {"archive": self.place.url, "key": key, "category": piece.category, "exposure": piece.row}
            self.ledger.note(piece.name, state="copied", **where, **here._asdict(), mtime_ns=piece.path.stat().st_mtime_ns)
            state = "copied"
        else:
            state = line["state"]
        if state == "copied":
            self._check_copy(key, here)
            self.ledger.note(piece.name, state="verified")
        if self.remove:
            self._remove(piece, key, here)
        return here.size

    def _whole(self, piece: Piece) -> Checksums:
        """Checksums of a file that is what the project says it is."""
        if piece.path.is_symlink() or not piece.path.is_file():
            raise _Refused("it is a link or no regular file, and cryodask removes nothing that lies elsewhere")
        if is_of_a_file(piece.content) and content_id(piece.path, piece.path.stat().st_size) != piece.content:
            raise _Refused("it has changed since it was registered")
        here = of_file(piece.path)
        if piece.crc is not None and here.crc != piece.crc:
            raise _Refused("it is damaged: its bytes do not match its commit record (cryodask verify)")
        return here

    def _check_copy(self, key: str, here: Checksums) -> None:
        copy = checksums(self.place.read(key))
        if copy != here:
            what = f"{copy.size} instead of {here.size} bytes" if copy.size != here.size else "other bytes"
            raise _Refused(
                f"the copy {key} in {self.place.url} has {what} (damaged on the way, or there before); look at it there, and remove it "
                "or choose another archive"
            )

    def _remove(self, piece: Piece, key: str, here: Checksums) -> None:
        if of_file(piece.path) != here:
            raise _Refused("it was changed while it was archived")
        self._check_copy(key, here)
        path = trash.trash_path(piece)
        self.ledger.note(piece.name, state=REMOVED, trash=path)
        trash.move(self.project, piece, path)

    def _key(self, piece: Piece) -> str:
        kind, _, path = piece.name.partition(":")
        path = posixpath.normpath(path)
        outside = path.startswith(("/", "../"))
        inner = f"elsewhere/{path.replace('../', '').lstrip('/')}" if outside else path
        return safe_key(f"{self.root}/{'inputs' if kind == 'inputs' else 'results'}/{inner}")


def _sums(line: Record) -> Checksums:
    return Checksums(line["size"], line["crc"], line.get("sha256", ""))


def answer_of_copy(line: Record) -> str:
    """Read the copy of a removed file; why it cannot be relied upon, or an empty text."""
    try:
        copy = checksums(open_archive(str(line["archive"])).read(str(line["key"])))
    except CryodaskError as error:
        return error.what
    return "" if copy == _sums(line) else f"its copy {line['key']} in {line['archive']} has changed"


# --- back again ------------------------------------------------------------------------------------------------------------------
@dataclass
class Restored:
    """What a call brought back. ``problems``: one sentence per file that it did not."""

    files: int = 0
    bytes: int = 0
    problems: list[str] = field(default_factory=list)


def restore(
    folder: str | Path,
    categories: Collection[str] | None = None,
    *,
    rows: Collection[int] | None = None,
    source: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Restored:
    """Bring archived files back, with the same bytes and times.

    Parameters
    ----------
    folder : path
        Folder of the project.
    categories : collection of str, optional
        By default all.
    rows : collection of int, optional
        Only files of these exposures.
    source : str, optional
        Where the archive is now, if it has moved.
    say : callable
        Called with a sentence per problem.

    Raises
    ------
    ArchiveError
        The archive cannot be used; what was restored before stays.
    """
    out = Restored()
    with ProjectLock(Path(folder)):
        project = Project(folder)
        ledger = Ledger(project.path)
        for name, line in ledger.absent().items():
            if line["state"] == THINNED or (rows is not None and line["exposure"] not in rows):
                continue
            if categories is not None and line["category"] not in categories:
                continue
            try:
                _bring_back(project, line, source)
            except (_Refused, ArchiveError) as error:
                reason = error.what if isinstance(error, ArchiveError) else str(error)
                out.problems.append(f"{name.partition(':')[2]} is not restored: {reason}")
                say(out.problems[-1])
                continue
            ledger.note(name, state="restored", trash="")
            out.files, out.bytes = out.files + 1, out.bytes + int(line["size"])
    return out


def _bring_back(project: Project, line: Record, source: str | None) -> None:
    kind, _, relative = str(line["name"]).partition(":")
    target = (project.path if kind == "project" else project.home) / relative
    if target.exists():
        if of_file(target) != _sums(line):
            raise _Refused(f"another file is at {target}; move it away first")
        return
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        check_writable(project.path / "tiers")
        trashed = trash_of(project, line)
        if trashed is not None and of_file(trashed) == _sums(line):
            os.rename(trashed, target)
            fsync_folder(target.parent)
            return
        part = target.with_name(f"{target.name}.{os.getpid()}.part")
        try:
            write_pieces(part, open_archive(source or str(line["archive"])).read(str(line["key"])))
            if of_file(part) != _sums(line):
                raise _Refused(f"its copy {line['key']} in {line['archive']} does not match its checksums; the copy stays as it is")
            os.utime(part, ns=(line["mtime_ns"], line["mtime_ns"]))
            os.rename(part, target)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(part)
        fsync_folder(target.parent)
