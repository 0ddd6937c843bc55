"""Sessions that were submitted to Slurm: the job of each, and whether it still waits in the queue. Imports nothing of Dask."""

from __future__ import annotations

import re
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from cryodask.errors import ClusterError

_JOB = re.compile(r"^Slurm job (\d+)\.$", re.MULTILINE)
_FOLLOW = re.compile(r"^  follow:  tail -F (.+)$", re.MULTILINE)
_ASK_AGAIN_SECONDS, _ANSWER_SECONDS = 5.0, 20.0
_WAITS = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"}
_BEGINS = {"RUNNING", "SUSPENDED", "STOPPED", "COMPLETING", "RESIZING", "SIGNALING"}


@dataclass(frozen=True)
class Submitted:
    """The job of a session as ``cryodask submit`` printed it. ``begun``: a run of the session has begun since."""

    job: str
    log: Path
    begun: bool

    @classmethod
    def read(cls, said: Path, started: Path) -> Submitted | None:
        """From what the command printed; None if it submitted nothing. ``started``: the file that each run writes when it begins."""
        try:
            text, when = said.read_text(errors="replace"), said.stat().st_mtime_ns
            begun = started.stat().st_mtime_ns > when
        except OSError:
            return None
        job, log = _JOB.search(text), _FOLLOW.search(text)
        return cls(job[1], Path(log[1]), begun) if job and log else None


class Queue:
    """The queue of this account, asked at most once in five seconds."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asked, self._jobs = -_ASK_AGAIN_SECONDS, dict[str, tuple[str, str]]()
        self._answers = False

    def of(self, job: str) -> tuple[str, str]:
        """What a job does and why: ``waits`` with Slurm's reason, ``runs``, ``ended``, or ``unknown`` if Slurm does not answer."""
        with self._lock:
            if time.monotonic() - self._asked >= _ASK_AGAIN_SECONDS:
                self._ask()
            if not self._answers:
                return "unknown", ""
            state, reason = self._jobs.get(job, ("", ""))
        return ("waits", reason) if state in _WAITS else ("runs", "") if state in _BEGINS else ("ended", "")

    def forget(self) -> None:
        """Ask again at the next question: a job was submitted or cancelled."""
        self._asked = -_ASK_AGAIN_SECONDS

    def _ask(self) -> None:
        done = _slurm("squeue", "-h", "--me", "-o", "%i|%T|%r")
        self._asked, self._answers = time.monotonic(), done is not None and done.returncode == 0
        if done is not None and self._answers:
            lines = [line.split("|", 2) for line in done.stdout.splitlines()]
            self._jobs = {words[0]: (words[1], words[2]) for words in lines if len(words) == 3}

    def cancel(self, job: str) -> None:
        """Take a job off the queue.

        Raises
        ------
        ClusterError
            If Slurm does not answer.
        """
        done = _slurm("scancel", job)
        self.forget()
        if done is None or done.returncode:
            raise ClusterError(f"Slurm did not cancel job {job}.", "it does not answer now", f"try again, or run  scancel {job}")


def _slurm(*words: str) -> subprocess.CompletedProcess[str] | None:
    try:
        return subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_ANSWER_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
