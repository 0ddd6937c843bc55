"""Identity of input files by content."""

from __future__ import annotations

import os
import re
from pathlib import Path

from cryodask.errors import MicrographError, MovieError
from cryodask.store.listing import Item

_WHOLE_BYTES = 1 << 22
_PIECES, _PIECE_BYTES = 8, 1 << 16
_OF_A_FILE = re.compile(r"\d+-[0-9a-f]{8}")

IMAGES = {"movie_path": MovieError, "micrograph_path": MicrographError}
"""Inputs of an exposure that are read after they were registered, and the error of each."""


def content_id(path: Path, size: int) -> str:
    """Identity of a file's content: its size and a checksum of the whole file up to 4 MiB, or of 8 pieces of a larger one."""
    import google_crc32c

    whole = size <= _WHOLE_BYTES
    starts = [0] if whole else [i * (size - _PIECE_BYTES) // (_PIECES - 1) for i in range(_PIECES)]
    crc = 0
    try:
        with open(path, "rb") as file:
            for start in starts:
                file.seek(start)
                crc = google_crc32c.extend(crc, file.read(_WHOLE_BYTES if whole else _PIECE_BYTES))
    except OSError:
        return f"unreadable:{path.name}"
    return f"{size}-{crc:08x}"


def stamp(stat: os.stat_result) -> list[int]:
    """Times and inode of a file: with equal ones and an equal size its content is assumed unchanged.

    The ctime is included because a rename or ``cp -p`` over a file keeps its other times.
    """
    return [stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def refuse_changed(item: Item, name: str, path: str) -> None:
    """Refuse a movie or micrograph whose content changed since it was registered: its results would be those of another exposure.

    Costs one ``stat``; the content is only read if that differs.

    Raises
    ------
    MovieError, MicrographError
    """
    try:
        stat = os.stat(path)
    except (OSError, ValueError):  # its stage reports that
        return
    if item.inputs.get("size") == stat.st_size and list(item.inputs.get("stat", ())) == stamp(stat):
        return
    if is_of_a_file(item.content) and content_id(Path(path), stat.st_size) != item.content:
        raise IMAGES[name](
            f"{path} has changed since it was registered.",
            "it was overwritten, truncated, or recorded again under the same name",
            "restore the file, or rerun: if it is a new recording, it becomes a new exposure",
        )


def is_of_a_file(content: str) -> bool:
    """Whether an identity is that of the bytes of a file, as :func:`content_id` gives it."""
    return _OF_A_FILE.fullmatch(content) is not None
