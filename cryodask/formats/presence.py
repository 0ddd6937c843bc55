"""Whether a path is a file that can be read at all, in the same words for each format."""

from __future__ import annotations

import os
import re
import stat

from cryodask.errors import CryodaskError

_ESCAPED = re.compile(r"\\x[89a-f][0-9a-f]")


def check_file(path: str, error: type[CryodaskError], kind: str) -> None:
    """Raise unless the path is a regular file with content; ``kind`` is its format.

    A name with bytes that are not UTF-8 is known by an escaped form (`show_name`), which no file has.
    """
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        if _ESCAPED.search(path):
            raise error(f"The name of {path} is not UTF-8.", "it comes from a computer with another encoding", "rename it") from None
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
    """A path in which bytes that are not UTF-8 are escaped with a backslash; other paths are unchanged."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
