"""Epochs of a project: every taking of its lock has a number of its own, and what an overtaken driver writes afterwards is void.

::

    <project>/epochs/000008            made once (O_EXCL) by whoever took the lock as the eighth: its name is the proof
    <project>/epochs/000008.released   that driver ended in order
    <project>/epochs/000008.closed     it was overtaken: how long each of its journals was then

A journal belongs to one process and one epoch, whose number begins its name. Lines of a closed epoch beyond the length that was noted
count for nothing, and neither does a journal that came later. So it does not matter when a driver that was stopped, or one of its
workers, finds out: what it still commits is computed again, and what it blames or takes back is not heard.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from pathlib import Path

from cryodask.store.files import fsync_folder, write_all, write_atomically

_ENTRY = re.compile(r"^(\d{6,})(\.released|\.closed)?$")
_JOURNAL = re.compile(r"^(\d{6,})-.*\.jsonl$")
_KEPT = 64
"""Released epochs whose files are kept: nobody looks at an epoch, and claims the next one that many epochs later."""


def journal_name(epoch: int, rest: str) -> str:
    """Name of a journal file; that of a process which knows of no epoch has no number."""
    return f"{epoch:06d}-{rest}.jsonl" if epoch else f"{rest}.jsonl"


class Epochs:
    """The epochs of a project, as drivers take and end them."""

    def __init__(self, project: Path) -> None:
        self.project, self.folder = project, project / "epochs"

    def _path(self, epoch: int, ending: str = "") -> Path:
        return self.folder / f"{epoch:06d}{ending}"

    def _entries(self) -> dict[int, set[str]]:
        """What there is of each epoch: the claim (empty), ``.released``, ``.closed``."""
        found: dict[int, set[str]] = {}
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(self.folder):
                if match := _ENTRY.match(name):
                    found.setdefault(int(match[1]), set()).add(match[2] or "")
        return found

    def highest(self) -> int:
        """The last epoch that was claimed, 0 if none was."""
        return max(self._entries(), default=0)

    def claim(self, epoch: int, who: str) -> bool:
        """Begin an epoch; False if another driver has, so that of all who try one succeeds. Needs no hard links."""
        self.folder.mkdir(exist_ok=True)
        try:
            fd = os.open(self._path(epoch), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        try:
            write_all(fd, who.encode())
            os.fsync(fd)
        except OSError:
            self.release(epoch)  # an epoch that does not say whose it is would keep everybody waiting
            raise
        finally:
            os.close(fd)
        fsync_folder(self.folder)
        return True

    def claimed_by(self, epoch: int) -> str:
        """What :meth:`claim` noted; empty where it does not stand there yet."""
        try:
            return self._path(epoch).read_text()
        except (OSError, ValueError):
            return ""

    def release(self, epoch: int) -> None:
        """The driver of an epoch ends in order."""
        os.close(os.open(self._path(epoch, ".released"), os.O_WRONLY | os.O_CREAT, 0o644))

    def is_released(self, epoch: int) -> bool:
        """Whether the driver of an epoch has ended in order."""
        return self._path(epoch, ".released").exists()

    def close_before(self, epoch: int) -> bool:
        """Close every earlier epoch that was not released: from now on their journals end where they end. True if there was one."""
        left = [n for n, endings in self._entries().items() if n < epoch and not endings & {".released", ".closed"}]
        for overtaken in left:
            write_atomically(self._path(overtaken, ".closed"), json.dumps(self._lengths(overtaken)))
        return bool(left)

    def _lengths(self, epoch: int) -> dict[str, dict[str, int]]:
        """Bytes of each journal of an epoch, by the place of its generation."""
        found: dict[str, dict[str, int]] = {}
        for path in self.project.glob(f"stages/*/*/journal/{epoch:06d}-*.jsonl"):
            with open(path, "rb") as file:  # a network file system answers for an open file what is true, for others what it remembers
                found.setdefault(place_of_journal(path.parent), {})[path.name] = file.seek(0, os.SEEK_END)
        return found

    def trim(self) -> None:
        """Remove what nobody needs any more of epochs long released; those that were closed are needed as long as their journals."""
        entries = self._entries()
        for epoch in sorted(entries)[:-_KEPT]:
            if ".released" in entries[epoch] and ".closed" not in entries[epoch]:
                for ending in ("", ".released"):
                    with contextlib.suppress(OSError):
                        self._path(epoch, ending).unlink()


def place_of_journal(folder: Path) -> str:
    """``STAGE/KEY`` of the generation whose journals lie in a folder."""
    return "/".join(folder.absolute().parts[-3:-1])


class Ends:
    """How far the journals of one generation count."""

    def __init__(self, journals: Path) -> None:
        parts = journals.absolute().parents
        self._folder = parts[3] / "epochs" if len(parts) > 3 else None
        self._place = place_of_journal(journals)
        self._closed: dict[int, dict[str, int]] = {}

    def is_closed(self, epoch: int) -> bool:
        """Whether the driver of an epoch was overtaken."""
        return bool(epoch) and self._folder is not None and (epoch in self._closed or (self._folder / f"{epoch:06d}.closed").exists())

    def look(self) -> None:
        """Learn which epochs were closed since."""
        if self._folder is None:
            return
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(self._folder):
                match = _ENTRY.match(name)
                if match and match[2] == ".closed" and int(match[1]) not in self._closed:
                    self._closed[int(match[1])] = json.loads((self._folder / name).read_text()).get(self._place, {})

    def end(self, name: str) -> int | None:
        """Byte at which a journal ends as of the last look; None where all of it counts."""
        match = _JOURNAL.match(name)
        if match is None or int(match[1]) not in self._closed:
            return None
        return self._closed[int(match[1])].get(name, 0)
