"""Starting, pausing and ending the run of a session. Runs are processes or jobs of their own: this server never runs them itself."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil

from cryodask.errors import InputError, StoreError
from cryodask.run.events.status import is_silent, read_status
from cryodask.run.started import Started
from cryodask.run.stopping import END_FILE, STOP_FILE
from cryodask.store.files import disk_errors
from cryodask.web.queued import Queue, Submitted

LOG = "last-start.log"
_LOG_BYTES, _LOG_LINES = 1 << 13, 6
HERE = "here"

_SAID = {
    "never": "It has not been run yet.",
    "starting": "It is being started.",
    "queued": "It waits in the queue of Slurm.",
    "running": "It is running.",
    "pausing": "It pauses when the exposures in flight are done.",
    "ending": "It takes no further movies, and goes on with the later steps.",
    "silent": "Its run has given no sign of life for more than a minute.",
    "gone": "The process of its run is gone; what was finished is kept.",
    "paused": "It is paused; what was finished is kept.",
    "waits": "It waits for a decision by a person.",
    "finished": "It is finished.",
    "failed": "Its run ended with an error.",
}


class Starter:
    """Starts runs of sessions, and knows those that were started here.

    Parameters
    ----------
    where : str or None
        ``here``: in a process on this machine; the name or file of a cluster: as a job of it; None: not at all.
    strict : bool
        Start only what no other account can have changed.
    """

    def __init__(self, where: str | None, *, strict: bool) -> None:
        self.where, self.strict = where, strict
        self._processes: dict[Path, subprocess.Popen[bytes]] = {}
        self._queue = Queue()
        self._lock = threading.Lock()

    def state(self, folder: Path) -> dict[str, Any]:
        """What the run of a project does (a word, and a sentence), what can be asked of it, and why it cannot be started; JSON."""
        word, process = run_state(folder), self._processes.get(folder)
        said, problem = "", ""
        if process is not None and word not in {"running", "pausing", "ending"}:
            if process.poll() is None:
                word = "starting"
            elif process.returncode not in (0, 130):
                problem = _last_lines(folder / LOG)
        if word != "starting" and (sent := self._submitted(folder)) is not None:
            word, said, problem = self._in_queue(sent, word, problem)
        known = Started.read(folder)
        runs = word in {"starting", "queued", "running", "pausing", "ending"}
        return {
            "state": word,
            "said": said or _SAID[word],
            "problem": problem,
            "start": not runs and not (why := self._why_not(folder, known)),
            "why_not": "" if runs else why,
            "pause": word in {"queued", "running", "ending", "silent"},
            "end": word == "running" and known is not None and known.watch,
        }

    def _submitted(self, folder: Path) -> Submitted | None:
        """The job by which the run of a project was started here last, also by an earlier server."""
        return Submitted.read(folder / LOG, folder / "started.json") if self.where not in (None, HERE) else None

    def _in_queue(self, sent: Submitted, word: str, problem: str) -> tuple[str, str, str]:
        """State, sentence and problem of a project whose run is, or was, a job."""
        if sent.begun and word != "silent":
            return word, "", problem
        does, reason = self._queue.of(sent.job)
        if sent.begun:  # of a job that is gone nothing more will be heard
            return "gone" if does == "ended" else word, "", problem
        if does == "ended":
            return word, "", f"Slurm job {sent.job} ended before its run began.\n{_last_lines(sent.log)}".strip()
        if does == "runs":
            return "starting", "", problem
        why = f", {reason}" if reason and reason != "None" else "; Slurm does not answer now" if does == "unknown" else ""
        return "queued", f"It waits in the queue of Slurm (job {sent.job}{why}).", problem

    def _why_not(self, folder: Path, known: Started | None) -> str:
        if known is None:
            return "It was never run with this version: start it once with  cryodask run  or  cryodask submit."
        command = f"cryodask run {known.file} {' '.join(known.options)}".strip()
        if self.where is None:
            return f"This server starts no sessions. Start it with  {command}"
        try:
            found = [path.stat() for path in (known.file, folder, folder / "started.json")]
        except OSError as error:
            return f"Its project file {known.file} cannot be read: {error.strerror}."
        if any(one.st_uid != os.getuid() or (self.strict and one.st_mode & 0o022) for one in found):
            return f"Other accounts can change its project file, so this server does not start it. Start it with  {command}"
        return ""

    def start(self, folder: Path) -> None:
        """Start the run of a project as it was started last.

        Raises
        ------
        InputError
            If it cannot be started from here.
        StoreError
            If it is running.
        """
        with self._lock:
            now = self.state(folder)
            if not now["start"]:
                if now["why_not"]:
                    raise InputError(f"{folder.name} is not started from here.", "", now["why_not"])
                raise StoreError(f"{folder.name} is {now['state']} already.", "", "reload the page")
            known = Started.read(folder)
            assert known is not None
            assert self.where is not None
            here = self.where == HERE
            where = known.cluster if here else self.where
            words = [sys.executable, "-m", "cryodask.cli", "run" if here else "submit", str(known.file)]
            words += [*(known.options if here else _without_workers(known.options)), *(("--cluster", where) if where else ())]
            words += [*(("--lane", known.lane) if known.lane else ())]
            (folder / LOG).unlink(missing_ok=True)
            with disk_errors(folder), open(folder / LOG, "ab") as log:
                process = subprocess.Popen(
                    words, cwd=known.file.parent, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )
            self._processes[folder] = process
            self._queue.forget()
            threading.Thread(target=process.wait, daemon=True).start()

    def pause(self, folder: Path) -> None:
        """Let the exposures in flight finish, and start nothing else; a run that waits in the queue of Slurm is taken off it.

        Raises
        ------
        StoreError
            If it is not running.
        ClusterError
            If Slurm does not answer.
        """
        sent = self._submitted(folder)
        if sent is not None and self.state(folder)["state"] == "queued":
            self._queue.cancel(sent.job)
            (folder / LOG).unlink(missing_ok=True)
            return
        self._ask(folder, "pause", STOP_FILE)

    def end(self, folder: Path) -> None:
        """Take no further movies, and go on with the later steps.

        Raises
        ------
        StoreError
            If it is not watching for movies.
        """
        self._ask(folder, "end", END_FILE)

    def _ask(self, folder: Path, what: str, name: str) -> None:
        now = self.state(folder)
        if not now[what]:
            watching = now["state"] == "running"
            why = "takes no movies as they arrive" if watching and what == "end" else f"is not running ({now['state']})"
            raise StoreError(f"{folder.name} {why}.", "", "reload the page")
        with disk_errors(folder):
            (folder / name).touch()


def run_state(folder: Path) -> str:
    """What the run of a project does, in a word."""
    status = read_status(folder)
    state = str(status.get("state", ""))
    if not status:
        return "never"
    if state == "running":
        if status.get("host") == socket.gethostname() and not psutil.pid_exists(int(status.get("pid") or 0)):
            return "gone"
        if (folder / STOP_FILE).exists():
            return "pausing"
        if is_silent(folder, status):
            return "silent"
        return "ending" if (folder / END_FILE).exists() else "running"
    if state.startswith("stopped: Stopped by"):
        return "paused"
    return "waits" if state.startswith("waiting for a person") else "finished" if state == "finished" else "failed"


def _without_workers(options: tuple[str, ...]) -> list[str]:
    """Options of ``cryodask submit``: workers are those of the cluster."""
    words = list(options)
    if "--workers" in words:
        at = words.index("--workers")
        del words[at : at + 2]
    return words


def _last_lines(log: Path) -> str:
    try:
        with open(log, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _LOG_BYTES))
            return "\n".join(file.read().decode(errors="replace").splitlines()[-_LOG_LINES:])
    except OSError:
        return ""
