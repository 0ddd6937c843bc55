"""Disk access of the store: only system calls of ``os``, in an order that survives a crash of the process."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from cryodask.errors import DiskError, DiskFullError, StoreError


class Holder(Protocol):
    """The lock of a project whose driver this process is."""

    epoch: int
    thread: int

    def check(self) -> None:
        """Raise TakenOverError if another driver has taken the project over."""
        ...


_HOLDERS: dict[str, Holder] = {}


def register_holder(folder: Path, holder: Holder) -> None:
    """Have every write below a project's folder check its lock first."""
    _HOLDERS[os.path.abspath(folder)] = holder


def unregister_holder(folder: Path, holder: Holder) -> None:
    """Stop checking a released lock."""
    if _HOLDERS.get(os.path.abspath(folder)) is holder:
        del _HOLDERS[os.path.abspath(folder)]


def holder_of(path: str | Path) -> Holder | None:
    """The lock that covers a path in this process; None if it drives no project there (a worker, a reader)."""
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
    """Raise TakenOverError if this thread has lost its project; for loops that wait long before they write again."""
    for holder in list(_HOLDERS.values()):
        if holder.thread == threading.get_ident():
            holder.check()


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk or a missing permission into errors that say what to do; they always stop the run."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DiskFullError(
                f"No space is left for {path} ({error.strerror}).",
                "the disk is full, or a quota or file size limit is reached; everything committed so far is safe",
                "free some space (cryodask gc removes superseded results) and rerun the same command: it resumes",
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
            kind = DiskError if error.errno == errno.EROFS else StoreError
            raise kind(
                f"{error.filename or path} cannot be written: {error.strerror}.",
                "you have no write permission, a file of that name exists, or the file system is mounted read-only",
                "choose another folder for the project, or get write permission",
            ) from error
        raise


def fsync_folder(folder: str | Path) -> None:
    """Sync ``folder``, so that a rename or a new file in it survives a crash of the machine."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write all of ``data``; a single ``os.write`` may write less."""
    view = memoryview(data)
    while len(view):
        view = view[os.write(fd, view) :]


def write_pieces(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """Write a file from its pieces; when this returns they are on disk."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        for data in pieces:
            write_all(fd, data)
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomically(path: Path, data: str | bytes | memoryview) -> None:
    """Replace a file atomically: the old content stays until the new one is safely on disk.

    A driver that takes a project over removes the ``.part`` files first. So the lock is checked after the part is written: a driver that is
    suspended between check and rename has nothing to rename when it wakes.
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
    """Append lines to a file with a single writer, and wait until they are on disk.

    A driver that takes a project over replaces such files by copies. So the lock is checked after the file is opened: if this driver is
    suspended after the check, it later writes into the replaced file.
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
