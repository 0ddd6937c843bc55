"""Epochs of a project: each acquisition of its lock has a number, and whatever an overtaken driver writes later is void.

::

    <project>/epochs/000008            created once (O_EXCL) by the driver that took the lock as the eighth: its name is the proof
    <project>/epochs/000008.released   that driver ended normally
    <project>/epochs/000008.closed     it was overtaken: the length of each of its journals at that moment

A journal belongs to one process and one epoch, whose number starts its name. Lines of a closed epoch beyond the recorded length
are ignored, and so are journals that were created later. So it does not matter when a suspended driver, or one of its
workers, finds out: what it still commits is recomputed, and what it quarantines or invalidates has no effect.
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
"""Number of released epochs whose files are kept: no driver reads an epoch and claims the next one that many epochs later."""


def journal_name(epoch: int, rest: str) -> str:
    """Name of a journal file; without a number for a process that has no epoch."""
    return f"{epoch:06d}-{rest}.jsonl" if epoch else f"{rest}.jsonl"


class Epochs:
    """The epochs of a project, as drivers claim and end them."""

    def __init__(self, project: Path) -> None:
        self.project, self.folder = project, project / "epochs"

    def _path(self, epoch: int, ending: str = "") -> Path:
        return self.folder / f"{epoch:06d}{ending}"

    def _entries(self) -> dict[int, set[str]]:
        """Existing files of each epoch: the claim (empty suffix), ``.released``, ``.closed``."""
        found: dict[int, set[str]] = {}
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(self.folder):
                if match := _ENTRY.match(name):
                    found.setdefault(int(match[1]), set()).add(match[2] or "")
        return found

    def highest(self) -> int:
        """The last claimed epoch, 0 if there is none."""
        return max(self._entries(), default=0)

    def claim(self, epoch: int, who: str) -> bool:
        """Claim an epoch; False if another driver has claimed it. Exactly one of several attempts succeeds. Needs no hard links."""
        self.folder.mkdir(exist_ok=True)
        try:
            fd = os.open(self._path(epoch), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        try:
            write_all(fd, who.encode())
            os.fsync(fd)
        except OSError:
            self.release(epoch)  # an epoch without an owner would block everybody
            raise
        finally:
            os.close(fd)
        fsync_folder(self.folder)
        return True

    def claimed_by(self, epoch: int) -> str:
        """What :meth:`claim` recorded; empty if it is not written yet."""
        try:
            return self._path(epoch).read_text()
        except (OSError, ValueError):
            return ""

    def release(self, epoch: int) -> None:
        """Record that the driver of an epoch has ended normally."""
        os.close(os.open(self._path(epoch, ".released"), os.O_WRONLY | os.O_CREAT, 0o644))

    def is_released(self, epoch: int) -> bool:
        """Whether the driver of an epoch has ended normally."""
        return self._path(epoch, ".released").exists()

    def close_before(self, epoch: int) -> bool:
        """Close every earlier epoch that was not released, fixing the length of its journals. True if there was one."""
        left = [n for n, endings in self._entries().items() if n < epoch and not endings & {".released", ".closed"}]
        for overtaken in left:
            write_atomically(self._path(overtaken, ".closed"), json.dumps(self._lengths(overtaken)))
        return bool(left)

    def _lengths(self, epoch: int) -> dict[str, dict[str, int]]:
        """Length in bytes of each journal of an epoch, by the place of its generation."""
        found: dict[str, dict[str, int]] = {}
        for folder in ("stages", "tiers"):
            for path in self.project.glob(f"{folder}/*/*/journal/{epoch:06d}-*.jsonl"):
                with open(path, "rb") as file:  # a network file system is accurate about an open file; for others it may be cached
                    found.setdefault(place_of_journal(path.parent), {})[path.name] = file.seek(0, os.SEEK_END)
        return found

    def trim(self) -> None:
        """Remove files of epochs released long ago; closed ones are needed as long as their journals exist."""
        entries = self._entries()
        for epoch in sorted(entries)[:-_KEPT]:
            if ".released" in entries[epoch] and ".closed" not in entries[epoch]:
                for ending in ("", ".released"):
                    with contextlib.suppress(OSError):
                        self._path(epoch, ending).unlink()


def place_of_journal(folder: Path) -> str:
    """``STAGE/KEY`` of the generation whose journals are in a folder."""
    return "/".join(folder.absolute().parts[-3:-1])


class Ends:
    """Up to which byte the journals of a generation count."""

    def __init__(self, journals: Path) -> None:
        parts = journals.absolute().parents
        self._folder = parts[3] / "epochs" if len(parts) > 3 else None
        self._place = place_of_journal(journals)
        self._closed: dict[int, dict[str, int]] = {}

    def is_closed(self, epoch: int) -> bool:
        """Whether the driver of an epoch was overtaken."""
        return bool(epoch) and self._folder is not None and (epoch in self._closed or (self._folder / f"{epoch:06d}.closed").exists())

    def look(self) -> None:
        """Refresh the list of closed epochs."""
        if self._folder is None:
            return
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(self._folder):
                match = _ENTRY.match(name)
                if match and match[2] == ".closed" and int(match[1]) not in self._closed:
                    self._closed[int(match[1])] = json.loads((self._folder / name).read_text()).get(self._place, {})

    def end(self, name: str) -> int | None:
        """Byte at which a journal ends, as of the last refresh; None if all of it counts."""
        match = _JOURNAL.match(name)
        if match is None or int(match[1]) not in self._closed:
            return None
        return self._closed[int(match[1])].get(name, 0)
