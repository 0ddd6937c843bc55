"""How the store touches the disk: through system calls of ``os`` alone, in an order that survives the death of the process."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from cryodask.errors import DiskError, DiskFullError, StoreError


class Holder(Protocol):
    """The lock of a project that this process drives."""

    epoch: int
    thread: int

    def check(self) -> None:
        """Raise TakenOverError if another driver has the project now."""
        ...


_HOLDERS: dict[str, Holder] = {}


def register_holder(folder: Path, holder: Holder) -> None:
    """From now on nothing is written below a project's folder without asking its lock first."""
    _HOLDERS[os.path.abspath(folder)] = holder


def unregister_holder(folder: Path, holder: Holder) -> None:
    """The lock is given back."""
    if _HOLDERS.get(os.path.abspath(folder)) is holder:
        del _HOLDERS[os.path.abspath(folder)]


def holder_of(path: str | Path) -> Holder | None:
    """The lock under which this process may write at a path; None where it drives no project there (a worker, a reader)."""
    if not _HOLDERS:
        return None
    place = os.path.abspath(path)
    return next((holder for folder, holder in list(_HOLDERS.items()) if place == folder or place.startswith(folder + os.sep)), None)


def check_writable(path: str | Path) -> None:
    """Refuse a write to a project that another driver has taken over from this process.

    Raises
    ------
    TakenOverError
    """
    holder = holder_of(path)
    if holder is not None:
        holder.check()


def check_still_driving() -> None:
    """Raise TakenOverError if this thread has lost a project that it drives: for loops that wait long before they write again."""
    for holder in list(_HOLDERS.values()):
        if holder.thread == threading.get_ident():
            holder.check()


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk and a missing permission into errors that say what to do; they stop a run, whoever meets them."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DiskFullError(
                f"No space is left for {path} ({error.strerror}).",
                "the disk, your quota or a limit on the size of files is used up; everything committed so far is safe",
                "free some space (cryodask gc removes superseded results) and run the same command again: it resumes",
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
            kind = DiskError if error.errno == errno.EROFS else StoreError
            raise kind(
                f"{error.filename or path} cannot be written: {error.strerror}.",
                "the folder belongs to somebody else, a file of that name is in the way, or the file system is mounted read-only",
                "choose another folder for the project, or ask for write permission",
            ) from error
        raise


def fsync_folder(folder: str | Path) -> None:
    """Make a rename or a new file in ``folder`` survive a crash of the machine."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write all of ``data``: one call may write less."""
    view = memoryview(data)
    while len(view):
        view = view[os.write(fd, view) :]


def write_atomically(path: Path, data: str | bytes | memoryview) -> None:
    """Put a file in place as a whole: what stood under its name stays until the new one is safe on the disk.

    Whoever takes a project over removes the ``.part`` files first. So the lock is asked when the part is there: a driver that is stopped
    between the answer and the rename no longer has anything to rename when it wakes.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident():x}.part")
    try:
        fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            write_all(fd, data.encode() if isinstance(data, str) else data)
            os.fsync(fd)
        finally:
            os.close(fd)
        check_writable(path)
        os.rename(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise
    fsync_folder(path.parent)


def append(path: Path, data: bytes) -> None:
    """Add lines to a file that has one writer, and wait until they are on the disk.

    Whoever takes a project over replaces such files by copies. So the lock is asked when the file is open: what a driver still writes that
    was stopped after the answer goes into the file that was replaced.
    """
    new = not path.exists()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        check_writable(path)
        write_all(fd, data)
        os.fsync(fd)
    finally:
        os.close(fd)
    if new:
        fsync_folder(path.parent)
