"""Whether folders are readable and writable, and their file systems and clocks keep the promises that the store builds on."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from cryodask.store.files import fsync_folder, write_all
from cryodask.tiers.places import FolderArchive, open_archive
from cryodask.web.checking.finding import Finding, note, ok, problem
from cryodask.web.pages import size_text
from cryodask.web.sessions import projects_in

_APART_SECONDS = 2.0
"""Some file systems keep whole seconds only."""
_FULL = 0.95
_LEAST_BYTES = 1 << 30
_PREFIX = ".cryodask-check-"
_OF_THE_SYSTEM = ("lost+found",)
_WRITTEN = ("edits", "tiers")
"""Folders of a project that the server writes."""


class Broken(Exception):
    """A file system did something else than the store needs."""


# --- folders ---------------------------------------------------------------------------------------------------------------------
def check_projects(microscope: str, folder: Path) -> Iterator[Finding]:
    """A folder with projects: whether they can be read and edited, and what its file system does.

    Parameters
    ----------
    microscope : str
        Empty if of no particular one.
    folder : Path
    """
    point = f"projects of {microscope}" if microscope else "projects"
    if not folder.is_dir() or not os.access(folder, os.R_OK | os.X_OK):
        what = "cannot be read" if folder.is_dir() else "is not a folder"
        yield problem(point, f"{folder} {what}.", "correct the path, mount it, or let the account of the server read it")
        return
    found = projects_in(folder)
    unreadable = [p / "project.json" for p in found if not os.access(p / "project.json", os.R_OK)] + list(_closed(folder))
    closed = [place for p in found for place in (_written_at(p, name) for name in _WRITTEN) if not os.access(place, os.W_OK | os.X_OK)]
    if unreadable:
        yield problem(point, f"{_some(unreadable)} cannot be read.", "let the account of the server read them, by group or ACL")
    if closed:
        yield problem(
            point,
            f"{_some(closed)} cannot be written, so ranges, picks and archives of people cannot be saved.",
            "create edits/ and tiers/ in the project and let the account of the server write them, by group or ACL",
        )
    if not unreadable and not closed:
        yield ok(point, f"{folder}: {len(found)} projects, readable, with edits/ and tiers/ that can be written.")
    place = next((p for p in (*(_written_at(p, n) for p in found for n in _WRITTEN), folder) if os.access(p, os.W_OK | os.X_OK)), None)
    if place is None:
        yield note(point, f"The file system of {folder} could not be tested, because this account can write nowhere in it.")
    else:
        yield from _file_system(f"file system of {folder}", place, _OF_A_PROJECT)
    yield _space(folder)


def check_state(folder: Path) -> Iterator[Finding]:
    """The folder of people, tokens and audit, or where it will be created."""
    place = _existing(folder)
    if not os.access(place, os.W_OK | os.X_OK):
        yield problem("state", f"{folder} cannot be written.", "set state: in the facility file, or StateDirectory= in the unit")
        return
    yield from _file_system("file system of the state", place, _OF_THE_STATE)
    yield _space(place)


def check_scratch() -> Iterator[Finding]:
    """The folder for temporary files on this host; that of jobs is on their nodes."""
    import dask.config  # not in the server: this runs in a process of its own

    place = Path(dask.config.get("temporary-directory", None) or tempfile.gettempdir())
    if not os.access(place, os.W_OK | os.X_OK):
        yield problem("scratch", f"{place} cannot be written.", "set TMPDIR, or temporary-directory in Dask's settings, to a local folder")
        return
    yield from _file_system("file system of the scratch folder", place, _OF_SCRATCH)
    yield _space(place)


def check_archive(url: str) -> Iterator[Finding]:
    """The archive of ``storage.archive``: a folder is tested, an object store only asked for."""
    archive = open_archive(url)
    if not isinstance(archive, FolderArchive):
        yield note(
            "archive", f"{url} is an object store, which is not written to here.", f"cryodask archive PROJECT --to {url} --keep  tests it"
        )
        return
    place = archive.folder
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        yield problem("archive", f"{place} is not a folder that this account can write.", "create or mount it, or correct storage.archive")
        return
    yield from _file_system("file system of the archive", place, _OF_THE_ARCHIVE)
    yield _space(place)


def _closed(folder: Path, depth: int = 2) -> Iterator[Path]:
    """Folders that cannot be searched for projects: the server shows none of what is in them, and cannot know."""
    if not os.access(folder, os.R_OK | os.X_OK):
        yield folder
    elif depth and not (folder / "project.json").is_file():
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if not entry.name.startswith(".") and entry.name not in _OF_THE_SYSTEM and entry.is_dir():
                yield from _closed(Path(entry.path), depth - 1)


def _written_at(project: Path, name: str) -> Path:
    """A folder of a project that the server writes, or the one in which it would create it."""
    place = project / name
    return place if os.path.lexists(place) else project


def _existing(folder: Path) -> Path:
    return next(p for p in (folder, *folder.absolute().parents) if p.is_dir())


def _some(paths: list[Path]) -> str:
    return f"{paths[0]}{f' and {len(paths) - 1} others' if len(paths) > 1 else ''}"


def _space(folder: Path) -> Finding:
    usage = shutil.disk_usage(folder)
    said = f"{size_text(usage.free)} of {size_text(usage.total)} are free at {folder}."
    if usage.free < _LEAST_BYTES or usage.free < (1 - _FULL) * usage.total:
        return problem("free space", said, "free some: cryodask storage shows what goes when, cryodask gc removes superseded results")
    return ok("free space", said)


# --- file systems ----------------------------------------------------------------------------------------------------------------
def _file_system(point: str, place: Path, tests: Mapping[str, Callable[[Path], None]]) -> Iterator[Finding]:
    """Try what the store does, in a temporary folder that is removed again."""
    try:
        with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=place) as made:
            yield _clock(point, Path(made))
            failed = False
            for name, test in tests.items():
                try:
                    test(Path(made))
                except (OSError, Broken) as error:
                    failed = True
                    why = error.strerror or error if isinstance(error, OSError) else error
                    yield problem(point, f"{name} does not work: {why}.", _WAYS_OUT.get(name, _ELSEWHERE))
            if not failed:
                yield ok(point, f"{', '.join(tests)}: all work.")
    except OSError as error:
        yield problem(point, f"Nothing can be written in {place}: {error.strerror}.", "check permissions, quota and free space")


def _clock(point: str, folder: Path) -> Finding:
    before = time.time()
    (folder / "clock").write_bytes(b"x")
    written, after = os.stat(folder / "clock").st_mtime, time.time()
    apart = max(before - written, written - after, 0.0)
    if apart > _APART_SECONDS:
        return problem(
            point, f"Its clock differs from this host's by {apart:.0f} s.", "synchronise both with the same time servers (chrony, NTP)"
        )
    return ok(point, "Its clock agrees with this host's.")


def _exclusive(folder: Path) -> None:
    os.close(os.open(folder / "exclusive", os.O_WRONLY | os.O_CREAT | os.O_EXCL))
    with contextlib.suppress(FileExistsError):
        os.close(os.open(folder / "exclusive", os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        raise Broken("a file can be created twice, so two drivers could take one project")


def _rename(folder: Path) -> None:
    (folder / "old").write_bytes(b"old")
    (folder / "new").write_bytes(b"new")
    os.rename(folder / "new", folder / "old")
    if (folder / "old").read_bytes() != b"new" or (folder / "new").exists():
        raise Broken("a renamed file did not replace the former one")


def _sync(folder: Path) -> None:
    fd = os.open(folder / "sync", os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        write_all(fd, b"x")
        os.fsync(fd)
    finally:
        os.close(fd)
    fsync_folder(folder)


def _append(folder: Path) -> None:
    path = folder / "append"
    one, other = (os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600) for _ in range(2))
    try:
        for fd, data in ((one, b"a"), (other, b"b"), (one, b"c")):
            write_all(fd, data)
    finally:
        os.close(one)
        os.close(other)
    if path.read_bytes() != b"abc":
        raise Broken("appended bytes overwrote others")


def _link(folder: Path) -> None:
    (folder / "one").write_bytes(b"x")
    os.link(folder / "one", folder / "two")
    with contextlib.suppress(FileExistsError):
        os.link(folder / "one", folder / "two")
        raise Broken("a link replaced a file")


def _lock(folder: Path) -> None:
    one, other = (os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600) for _ in range(2))
    try:
        fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            raise Broken("two processes can hold one lock")
    finally:
        os.close(one)
        os.close(other)


# what each place needs: the project lock is made of O_EXCL and renames and does without flock; hard links are replaced by copies there
_OF_A_PROJECT = {"O_EXCL": _exclusive, "atomic rename": _rename, "fsync": _sync, "O_APPEND": _append}
_OF_THE_STATE = {"atomic rename": _rename, "fsync": _sync, "O_APPEND": _append, "flock": _lock}
_OF_SCRATCH = {"flock": _lock}
_OF_THE_ARCHIVE = {"fsync": _sync, "hard links": _link}
_ELSEWHERE = "use another file system, or other mount options; docs/reliability.md says what is needed"
_WAYS_OUT = {
    "flock": "use a local folder, or mount the file system with locks (Lustre: -o flock)",
    "hard links": "use a file system with hard links, or an object store, in storage.archive",
}
