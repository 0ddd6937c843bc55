"""State of a pool: how many jobs it should have, when it may request the next, why it has given up."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from cryodask.cluster.settings import PoolSettings

FAILED_STARTS = 3
"""Number of consecutive jobs that end before a worker connects, after which a pool gives up."""

_FULL_SECONDS = 15.0, 600.0


@dataclass(frozen=True)
class PoolStatus:
    """What a pool has, and what it is waiting for.

    ``waiting``: pending jobs by Slurm's own reason (``Resources``, ``PartitionConfig``). ``problem``: why the pool has given up,
    in Slurm's words or from the log of its last job; empty if it has not. ``lost``: number of jobs that were cancelled, killed,
    preempted or on a failed node since the start. ``full``: Slurm's words if it accepts no more jobs for now.
    """

    target: int
    running: int
    pending: int
    workers: int
    waiting: dict[str, int]
    problem: str
    lost: int
    full: str = ""


@dataclass
class PoolState:
    """State of a pool between two queries of the queue. Times are ``time.monotonic()``, in seconds."""

    target: int = 0
    serial: int = 0
    failed_starts: int = 0
    not_before: float = 0.0
    problem: str = ""
    full: str = ""
    full_pause: float = 0.0
    lost: int = 0
    replaced: deque[float] = field(default_factory=deque)

    def aim(self, target: int) -> None:
        """Set the target and forget old failures, because it was requested by hand."""
        self.target, self.problem, self.failed_starts, self.not_before = target, "", 0, 0.0
        self.full, self.full_pause = "", 0.0

    def count_full(self, now: float, said: str) -> None:
        """Record that Slurm accepts no more jobs of this user, and retry with increasing delay."""
        self.full_pause = min(2 * self.full_pause, _FULL_SECONDS[1]) if self.full else _FULL_SECONDS[0]
        self.full, self.not_before = said, now + self.full_pause

    def count_loss(self, now: float, *, came: bool, per_hour: int) -> bool:
        """Record a lost job and decide when the next may be requested; False if the pool should give up.

        ``came``: whether any worker of the job had connected. After failed starts the pool waits longer and longer, and
        never requests more than ``per_hour`` replacements.
        """
        self.lost += 1
        if not came:
            self.failed_starts += 1
            self.not_before = now + 2.0**self.failed_starts
        while self.replaced and self.replaced[0] <= now - 3600:
            self.replaced.popleft()
        if len(self.replaced) >= per_hour:
            self.not_before = (self.replaced[0] if self.replaced else now) + 3600
        self.replaced.append(now)
        return self.failed_starts < FAILED_STARTS


def missing(statuses: Mapping[str, PoolStatus], settings: Mapping[str, PoolSettings], *, slurm_answers: bool) -> str:
    """One sentence about missing workers; empty when all are connected."""
    parts = []
    for name, now in statuses.items():
        reasons = ", ".join(f"{count} {_words(reason)}" for reason, count in sorted(now.waiting.items()))
        if now.full:
            parts.append(f"pool {name}: Slurm accepts no more jobs for now ({now.full})")
        if now.problem:
            parts.append(f"pool {name}: {now.problem}")
        elif reasons:
            parts.append(f"pool {name}: jobs are pending ({reasons})")
        elif not now.full and now.workers < now.target * settings[name].workers_per_job:
            parts.append(f"pool {name}: {now.workers} workers of {now.running} running jobs have connected")
    return "; ".join(parts + ([] if slurm_answers else ["Slurm does not answer"]))


def _words(reason: str) -> str:
    # Slurm has not considered a job that was submitted a moment ago
    return "just submitted" if reason == "None" else reason
