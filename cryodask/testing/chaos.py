"""Kill the processes of a computation at random moments, restart them, and check that it still ends correctly."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cryodask.testing.clusters import ProcessCluster

EVERY_KIND = ("worker", "nanny", "scheduler", "driver", "everything")


@dataclass(frozen=True)
class Kill:
    """One killed process: time (``time.time()``), kind, process id, and state of the computation."""

    time: float
    what: str
    pid: int
    place: str


class Chaos:
    """Kill -9 of the parts of a computation: workers, nannies and scheduler of a cluster, and the driver that uses it.

    Parameters
    ----------
    cluster : ProcessCluster
    seed : int
        Determines what is killed and the waiting times, but not how far the computation has come by then.
        Every kind has its turn before one is repeated.
    kinds : sequence of ``worker``, ``nanny``, ``scheduler``, ``driver``, ``everything``

    Attributes
    ----------
    log : list of Kill
        One entry per killed process; ``everything`` gives one for each process that was alive.
    strikes : Counter
        Strikes that killed something, by place.
    """

    def __init__(self, cluster: ProcessCluster, seed: int, kinds: Sequence[str] = EVERY_KIND) -> None:
        unknown = set(kinds) - set(EVERY_KIND)
        if unknown or not kinds:
            raise ValueError(f"kinds must be some of {EVERY_KIND}, not {tuple(kinds)}")
        self.cluster, self.kinds = cluster, tuple(kinds)
        self.log: list[Kill] = []
        self.strikes: Counter[str] = Counter()
        self._random = random.Random(seed)
        self._turns: list[str] = []

    def strike(self, driver: subprocess.Popen[bytes] | None = None, place: str = "") -> str:
        """Kill a random part; returns its kind, empty if no such part is alive."""
        if not self._turns:
            self._turns = self._random.sample(self.kinds, len(self.kinds))
        kind, which = self._turns[-1], self._random.random()
        parts = {
            "worker": self.cluster.workers(),
            "nanny": self.cluster.nannies(),
            "scheduler": [self.cluster.scheduler] if self.cluster.scheduler else [],
            "driver": [driver.pid] if driver is not None and driver.poll() is None else [],
        }
        victims = [(name, pid) for name, pids in parts.items() for pid in pids]
        if kind != "everything":
            victims = [(kind, pid) for pid in parts[kind]]
            victims = [victims[int(which * len(victims))]] if victims else []
        if not victims:
            return ""
        self._turns.pop()
        for what, pid in victims:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                self.log.append(Kill(time.time(), what, pid, place))
        self.strikes[place] += 1
        return kind

    def run(
        self,
        command: Sequence[str],
        folder: Path,
        *,
        strikes: Mapping[str, int],
        pause_seconds: tuple[float, float],
        place: Callable[[], str] = lambda: "",
        may_end_with: Collection[int] = (3,),
        limit_seconds: float = 600.0,
    ) -> int:
        """Run a driver, kill and restart parts at random moments until the driver ends with 0; returns how often it was started.

        Parameters
        ----------
        command : sequence of str
            Starts the driver in ``folder``; its output is appended to ``driver.log`` there.
        strikes : mapping
            Number of strikes by place: ``{"": 5}``, including earlier calls. Then the driver runs to its end; it may end before.
        pause_seconds : (shortest, longest)
            Between two strikes; only time spent at the places named by ``strikes`` counts.
        place : callable
            Where the computation is.
        may_end_with : collection of int
            Exit codes with which a driver may give up when its cluster was killed; any other is an error of the driver.
        limit_seconds : float

        Raises
        ------
        AssertionError
            If a driver ends with another code, or none succeeds in time.
        """
        deadline = time.monotonic() + limit_seconds
        starts, left, looked = 0, self._random.uniform(*pause_seconds), time.monotonic()
        driver: subprocess.Popen[bytes] | None = None
        try:
            while True:
                if driver is None or (driver.poll() is not None and driver.returncode != 0):
                    if driver is not None and driver.returncode not in (-signal.SIGKILL, *may_end_with):
                        said = (folder / "driver.log").read_text(errors="replace")[-3000:]
                        raise AssertionError(f"the driver ended with {driver.returncode}:\n{said}")
                    starts += 1
                    with open(folder / "driver.log", "ab") as log:
                        driver = subprocess.Popen(
                            command, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                        )
                elif driver.returncode == 0:
                    return starts
                time.sleep(0.02)
                now, here = time.monotonic(), place()
                if now > deadline:
                    raise AssertionError(f"not finished after {limit_seconds:.0f} s, {len(self.log)} kills, {starts} starts")
                left -= now - looked if here in strikes else 0.0
                looked = now
                if left <= 0 and self.strikes[here] < strikes.get(here, 0) and self.strike(driver, here):
                    left = self._random.uniform(*pause_seconds)
                self.cluster.replace()
        finally:
            if driver is not None and driver.poll() is None:
                os.killpg(driver.pid, signal.SIGKILL)
                driver.wait()
