"""What is appended to the journals of a folder from now on, for readers that know the rest."""

from __future__ import annotations

import os
from pathlib import Path

from cryodask.store.epochs import Ends
from cryodask.store.lines import Record, parse_line


class Tail:
    """New records of a folder's journals.

    Nothing is ranked or undone here: a reader that gets a second record of a row, or one that undoes others, reads the journals again.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ends = Ends(folder)
        self._read = {name: (there.st_ino, there.st_size) for name, there in self._files().items()}

    def _files(self) -> dict[str, os.stat_result]:
        try:
            with os.scandir(self.folder) as entries:
                return {entry.name: entry.stat() for entry in entries if entry.name.endswith(".jsonl")}
        except FileNotFoundError:
            return {}

    def grown(self) -> list[Record] | None:
        """Records that were appended since the last call; None if the journals must be read again, because a file was replaced."""
        files = self._files()
        if any(
            name not in files or files[name].st_ino != inode or files[name].st_size < size for name, (inode, size) in self._read.items()
        ):
            return None
        self._ends.look()
        out: list[Record] = []
        for name, there in files.items():
            _, begin = self._read.get(name, (there.st_ino, 0))
            if there.st_size == begin:
                continue
            if self._ends.end(name) is not None:
                return None
            with open(self.folder / name, "rb") as file:
                file.seek(begin)
                data = file.read(there.st_size - begin)
            whole = data[: data.rfind(b"\n") + 1]
            self._read[name] = there.st_ino, begin + len(whole)
            out += [record for record in map(parse_line, whole.split(b"\n")) if record is not None]
        return out
