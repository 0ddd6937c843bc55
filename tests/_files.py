"""Files below a folder in which a run is at work: generations there get their names while they are listed."""

from __future__ import annotations

from pathlib import Path


def written(folder: Path, pattern: str) -> list[bytes]:
    """Of each file that matches, all at one moment: what moves meanwhile is listed again."""
    while True:
        try:
            return [path.read_bytes() for path in folder.glob(pattern)]
        except FileNotFoundError:
            continue
