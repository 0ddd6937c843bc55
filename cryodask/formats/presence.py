"""Checks that a path is a readable file, with the same messages for every format."""

from __future__ import annotations

import os
import re
import stat

from cryodask.errors import CryodaskError

_CONTROL = re.compile("[\x00-\x1f\x7f]")
_ESCAPED = re.compile(r"\\x[0-9a-f]{2}")


def check_file(path: str, error: type[CryodaskError], kind: str) -> None:
    """Raise unless the path is a regular file with content; ``kind`` is its format.

    Names that are not valid text are shown in an escaped form (`show_name`), which no file has.
    """
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        if _ESCAPED.search(path):
            raise error(
                f"The name of {path} has bytes that are not UTF-8, or control characters.",
                "it comes from a computer with another encoding",
                "rename it",
            ) from None
        raise error(f"{path} does not exist.", "it was moved or renamed", "check the path") from None
    except (ValueError, OSError) as cause:
        raise error(f"{path!r} cannot be opened ({getattr(cause, 'strerror', None) or cause}).", "", "check the path") from None
    if stat.S_ISDIR(found.st_mode):
        raise error(f"{path} is a folder, not a {kind} file.", "", "give the path of the file")
    if not stat.S_ISREG(found.st_mode):
        raise error(f"{path} is a device or pipe, not a {kind} file.", "", "give the path of the file")
    if found.st_size == 0:
        raise error(f"{path} is empty (0 bytes).", "the transfer has not started, or the disk was full", "copy it again")
    if not os.access(path, os.R_OK):
        raise error(f"{path} cannot be opened (permission denied).", "", "change its permissions")


def show_name(path: str) -> str:
    """A path as text of one line: control characters and bytes that are not UTF-8 are escaped with a backslash."""
    return _CONTROL.sub(lambda c: f"\\x{ord(c[0]):02x}", os.fsencode(path).decode("utf-8", "backslashreplace"))
