"""Length, crc32c and sha256 of files and copies, in one pass."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import google_crc32c

_PIECE = 1 << 20


class Checksums(NamedTuple):
    """What identifies the bytes of a file."""

    size: int
    crc: int
    sha256: str


def pieces(path: Path) -> Iterator[bytes]:
    """Bytes of a file, piece by piece, read from the disk rather than from memory where the system allows it."""
    with open(path, "rb") as file:
        if hasattr(os, "posix_fadvise"):  # a copy that was just written would otherwise be compared with itself
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while data := file.read(_PIECE):
            yield data


def checksums(data: Iterable[bytes]) -> Checksums:
    """Checksums of bytes that arrive in pieces."""
    size, crc, sha = 0, 0, hashlib.sha256()
    for piece in data:
        size += len(piece)
        crc = google_crc32c.extend(crc, piece)
        sha.update(piece)
    return Checksums(size, crc, sha.hexdigest())


def of_file(path: Path) -> Checksums:
    """Checksums of a file."""
    return checksums(pieces(path))
