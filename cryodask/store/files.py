"""How the store touches the disk: through system calls of ``os`` alone, in an order that survives the death of the process."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cryodask.errors import DiskError, DiskFullError, StoreError


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
    """Put a file in place as a whole: what stood under its name stays until the new one is safe on the disk."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            write_all(fd, data.encode() if isinstance(data, str) else data)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise
    fsync_folder(path.parent)


def append(path: Path, data: bytes) -> None:
    """Add lines to a file that has one writer, and wait until they are on the disk."""
    new = not path.exists()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        write_all(fd, data)
        os.fsync(fd)
    finally:
        os.close(fd)
    if new:
        fsync_folder(path.parent)
