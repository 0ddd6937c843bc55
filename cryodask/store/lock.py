"""The project lock: one driver per project, across hosts and containers, without comparing clocks.

The driver that created the file of the highest epoch (see epochs.py) holds the lock. ``driver.lock`` shows who that is, and a number that
grows every two seconds, the beat. A driver that wants the lock claims the next epoch

- at once, if the holder has ended normally, or was a process of the same boot, the same namespaces and this very folder,
  and is gone;
- otherwise when the beat has not changed for eight seconds of the observer's own monotonic clock.

A holder whose process is visibly alive is never overtaken, unless it is stopped (SIGSTOP, a suspended job): then its beat decides. It
cannot notice, so every write checks the lock first, and what slips through between check and write is void: a journal line
because its epoch is closed, a file replacement because its ``.part`` is gone, a registry line because the file was replaced
by a copy. If the lock file is removed, its holder restores it, as long as nobody has claimed the next epoch.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from cryodask.errors import LockedError, TakenOverError
from cryodask.store.epochs import Epochs
from cryodask.store.files import disk_errors, fsync_folder, register_holder, unregister_holder, write_all, write_atomically

_BEAT_SECONDS = 2.0
_STILL_SECONDS = 8.0
_LOOK_SECONDS = 0.2
_LARGEST_BEAT = 10**12
_LOOKS = 10
_APPENDED = ("items.jsonl",)
"""Files that a driver appends to."""
_PARTS = ("*.part", "stages/*/*/*.part", "stages/*/*/checkpoints/*.part", "stages/*/*/journal/*.part")


@dataclass(frozen=True)
class _Seen:
    """The lock as an observer sees it. ``text`` changes whenever the holder shows a sign of life."""

    epoch: int
    text: str
    holder: dict[str, Any]
    free: bool


class ProjectLock:
    """Context manager that holds the lock of a project; takes over from a holder that is gone, or whose beat has stopped.

    Parameters
    ----------
    folder : Path
        Folder of the project.
    force : bool
        Take over unconditionally; a live holder ends as soon as it notices, before it writes again.

    Raises
    ------
    LockedError
        On entering, if another driver is alive.
    TakenOverError
        From :meth:`check` and on leaving, if another driver has taken over.
    """

    def __init__(self, folder: Path, *, force: bool = False) -> None:
        self.folder, self.path, self.force = folder, folder / "driver.lock", force
        self.epochs = Epochs(folder)
        self.epoch = self.thread = 0
        self._identity: dict[str, Any] = {}
        self._beat = 0
        self._lost = False
        self._busy = threading.Lock()
        self._stop = threading.Event()
        self._beating = threading.Thread(target=self._keep_beating, daemon=True, name="cryodask-lock")

    def __enter__(self) -> ProjectLock:
        with disk_errors(self.path):
            self._take()
            register_holder(self.folder, self)
            try:
                if self.epochs.close_before(self.epoch):
                    self._shut_out()
                self.epochs.trim()
            except BaseException:
                unregister_holder(self.folder, self)
                self._give_back()
                raise
        self.thread = threading.get_ident()
        self._beating.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._beating.join(_STILL_SECONDS)
        unregister_holder(self.folder, self)
        try:
            self.check()
        except TakenOverError as lost:
            if error is None or not isinstance(error, TakenOverError):
                raise lost from error
        except OSError:  # the folder is unreachable or gone: the owner is unknown, but this epoch has ended
            with contextlib.suppress(OSError):
                self.epochs.release(self.epoch)
        else:
            self._give_back()

    # --- taking it --------------------------------------------------------------------------------------------------------------
    def _take(self) -> None:
        first = seen = self._look()
        since = looked = time.monotonic()
        while True:
            state = _state_of(seen.holder, self.folder)
            free = seen.free or state == "gone" or (self.force and seen.epoch == first.epoch)
            if not free and (state == "alive" or seen.text != first.text):  # the beat changed, or another driver was faster
                raise _locked(seen.holder, self.folder)
            if (free or looked - since > _STILL_SECONDS) and self._claim(seen.epoch + 1):
                return
            if not free:
                time.sleep(_LOOK_SECONDS)
            looked = time.monotonic()  # before looking: an observer that is suspended afterwards has not been watching all that time
            seen = self._look(max(seen.epoch, self.epoch))

    def _look(self, at_least: int = 0) -> _Seen:
        """The current lock; ``at_least``: a known epoch, because a network file system may cache the folder."""
        shown = _read(self.path)
        epoch = max(self.epochs.highest(), at_least, _number(shown.get("epoch")), self._epoch_of_project())
        if _number(shown.get("epoch")) != epoch:  # not shown yet, or removed
            shown = _parsed(self.epochs.claimed_by(epoch))
        return _Seen(epoch, json.dumps([epoch, shown]), shown, not epoch or self.epochs.is_released(epoch))

    def _epoch_of_project(self) -> int:
        """Epoch in project.json, so that no number is reused even if the folder of epochs is lost."""
        return _number(_read(self.folder / "project.json").get("epoch"))

    def _claim(self, epoch: int) -> bool:
        """Claim an epoch; False if another driver has claimed it, or a later one."""
        self.epoch, self._beat = epoch, 0
        self._identity = {"epoch": epoch, "token": uuid.uuid4().hex, **_who(self.folder)}
        if not self.epochs.claim(epoch, json.dumps(self._identity)):
            return False
        # a driver that was suspended on its way here is late: the latest epoch counts
        if self.epochs.highest() > epoch:
            return False
        try:
            with contextlib.suppress(FileNotFoundError):  # a driver that takes over removes the .part file
                self._show()
        except BaseException:
            self._give_back()
            raise
        return self.epochs.highest() <= epoch

    def _shut_out(self) -> None:
        """Make sure that no pending write of the overtaken driver takes effect after this."""
        for pattern in _PARTS:
            for path in self.folder.glob(pattern):
                if not path.is_dir():
                    path.unlink(missing_ok=True)
        for name in _APPENDED:
            with contextlib.suppress(FileNotFoundError):
                write_atomically(self.folder / name, (self.folder / name).read_bytes())

    # --- holding it -------------------------------------------------------------------------------------------------------------
    def check(self) -> None:
        """Make sure that this driver still holds the lock.

        Raises
        ------
        TakenOverError
        """
        with self._busy:
            if not self._lost:
                self._lost = not self._is_mine(beat=False)
            if self._lost:
                raise _taken_over(_read(self.path), self.folder)

    def _is_mine(self, *, beat: bool) -> bool:
        """Read the lock file, and write the next beat if asked; restores a removed file unless a later epoch exists."""
        for _ in range(_LOOKS):
            with contextlib.suppress(FileNotFoundError):
                fd = os.open(self.path, os.O_RDWR if beat else os.O_RDONLY)
                try:
                    # through the open file, so that a file that another driver puts in its place is not touched
                    if _parsed(os.pread(fd, 4096, 0).decode(errors="replace")).get("token") == self._identity["token"]:
                        if beat:
                            self._beat += 1
                            os.pwrite(fd, self._line(), 0)
                        return True
                finally:
                    os.close(fd)
            if self.epochs.highest() > self.epoch:
                return False
            with contextlib.suppress(FileNotFoundError):  # a driver that takes over removes the .part file
                self.epochs.claim(self.epoch, json.dumps(self._identity))
                self._show()
        os.stat(self.folder)
        return False

    def _line(self) -> bytes:
        """The holder and the beat as a line of constant length."""
        longest = len(json.dumps({**self._identity, "beat": _LARGEST_BEAT}))
        return json.dumps({**self._identity, "beat": self._beat}).ljust(longest).encode() + b"\n"

    def _show(self) -> None:
        part = self.path.with_name(f"{self.path.name}.{self._identity['token']}.part")
        try:
            fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            try:
                write_all(fd, self._line())
                os.fsync(fd)
            finally:
                os.close(fd)
            os.rename(part, self.path)
        except BaseException:
            with contextlib.suppress(OSError):
                part.unlink()
            raise
        fsync_folder(self.folder)

    def _keep_beating(self) -> None:
        while not self._stop.wait(_BEAT_SECONDS):
            with contextlib.suppress(OSError), self._busy:
                self._lost = self._lost or not self._is_mine(beat=True)
            if self._lost:
                return

    def _give_back(self) -> None:
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)
            self.epochs.release(self.epoch)


# --- who holds it ---------------------------------------------------------------------------------------------------------------
def _who(folder: Path) -> dict[str, Any]:
    """What another process on this machine needs to decide whether this one is alive."""
    there = os.stat(folder)
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "start": _start_time(os.getpid()),
        "namespaces": _namespaces(),
        "boot": _boot(),
        "folder": f"{there.st_dev}:{there.st_ino}",
    }


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _namespaces() -> str:
    """Namespaces in which pids and start times are valid; empty if /proc belongs to other ones."""
    try:
        if os.readlink("/proc/self") != str(os.getpid()):
            return ""
        return " ".join(os.readlink(f"/proc/self/ns/{kind}") for kind in ("pid", "time") if os.path.lexists(f"/proc/self/ns/{kind}"))
    except OSError:
        return ""


def _stat_of(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on; empty if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return []


def _start_time(pid: int) -> str:
    """Start time of a process (clock ticks since boot): pids are reused, pairs of pid and start time are not."""
    return (_stat_of(pid) or [""] * 20)[19]


def _state_of(holder: dict[str, Any], folder: Path) -> Literal["alive", "stopped", "gone", "unknown"]:
    """State of a holder in this machine's process table; unknown in another container, after a reboot, or for a copied folder."""
    mine, pid = _who(folder), _number(holder.get("pid"))
    if not pid or not all(mine[name] and holder.get(name) == mine[name] for name in ("boot", "namespaces", "folder")):
        return "unknown"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return "gone"
    except PermissionError:
        pass  # a process of another user, possibly hidden in /proc (hidepid)
    found = _stat_of(pid)
    if not found:
        return "unknown"
    if found[19] != holder.get("start") or found[0] in "ZX":
        return "gone"
    return "stopped" if found[0] in "Tt" else "alive"


def _locked(holder: dict[str, Any], folder: Path) -> LockedError:
    return LockedError(
        f"Process {holder.get('pid', '?')} on {holder.get('host', 'another host')} is working on {folder}.",
        "another cryodask run, or a notebook, is driving this project",
        "wait for it, stop it, or take the project over with --force",
    )


def _taken_over(holder: dict[str, Any], folder: Path) -> TakenOverError:
    by = f"Process {holder['pid']} on {holder.get('host')}" if "pid" in holder else "Another driver"
    return TakenOverError(
        f"{by} took over {folder}; this run ends, and anything it still writes is ignored.",
        "this process was suspended or could not reach the disk for some time, or the other was started with --force",
        "nothing is lost: wait for the other driver, or stop it and rerun the same command",
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        return _parsed(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _parsed(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _number(value: Any) -> int:
    return value if isinstance(value, int) else 0
