"""One project has one driver: a lock file that names its holder and beats while the holder lives."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from pathlib import Path
from types import TracebackType

from cryodask.errors import LockedError
from cryodask.store.files import disk_errors

_BEAT_SECONDS = 5.0
_DEAD_AFTER_SECONDS = 60.0


class ProjectLock:
    """Context manager: holds ``driver.lock`` of a project; breaks the lock of a holder that is seen dead."""

    def __init__(self, folder: Path, *, force: bool = False) -> None:
        self.path, self.force = folder / "driver.lock", force
        self._stop = threading.Event()

    def __enter__(self) -> ProjectLock:
        for _ in range(3):
            with disk_errors(self.path):
                try:
                    fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
                except FileExistsError:
                    self._remove_stale()
                    continue
                try:
                    os.write(fd, self._identity().encode())
                except OSError:
                    self.path.unlink()  # a lock that does not say whose it is would keep everybody out
                    raise
                finally:
                    os.close(fd)
            threading.Thread(target=self._beat, daemon=True, name="cryodask-lock").start()
            return self
        raise LockedError(f"{self.path} keeps coming back.", "several drivers start at the same moment", "start only one")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        with contextlib.suppress(OSError):
            if self.path.read_text() == self._identity():
                self.path.unlink()

    @staticmethod
    def _identity() -> str:
        return json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "start": _start_time(os.getpid())})

    def _beat(self) -> None:
        while not self._stop.wait(_BEAT_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(self.path)

    def _judge(self) -> str:
        """Raise if the holder may be alive (and not --force); returns what the lock says, nothing where there is none.

        Raises
        ------
        LockedError
        """
        try:
            text = self.path.read_text()
            age = time.time() - self.path.stat().st_mtime
        except FileNotFoundError:
            return ""
        try:
            holder = json.loads(text or "{}")
        except ValueError:
            holder = {}
        here = holder.get("host") == socket.gethostname()
        dead = (here and _start_time(int(holder.get("pid", 0))) != holder.get("start")) or (not here and age > _DEAD_AFTER_SECONDS)
        if not dead and not self.force:
            raise LockedError(
                f"Process {holder.get('pid')} on {holder.get('host')} is working on {self.path.parent} (seen {age:.0f} s ago).",
                "another cryodask run, or a notebook, drives this project",
                "wait for it or stop it; if you are sure that it is gone, add --force",
            )
        return text

    def _remove_stale(self) -> None:
        """Remove the lock of a dead holder; raise if it may be alive."""
        text = self._judge()
        aside = self.path.with_name(f"{self.path.name}.{os.getpid()}.part")
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.path, aside)
            if aside.read_text() != text:  # another driver was faster, and this lock is its own
                with contextlib.suppress(FileExistsError):
                    os.link(aside, self.path)
            aside.unlink()


def _start_time(pid: int) -> str | None:
    """When a process of this machine started (clock ticks), or None if there is none: pids are re-used, pairs are not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except (OSError, IndexError):
        return None
