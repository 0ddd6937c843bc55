"""Several kinds of Slurm jobs with workers on one scheduler, shared by lanes."""

from __future__ import annotations

import asyncio
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import dask
import psutil

from cryodask.cluster.access import tls
from cryodask.cluster.accounting.accounting import KEYS, Accounting
from cryodask.cluster.environment import SETTINGS
from cryodask.cluster.fairshare import FairShareScheduler
from cryodask.cluster.guard import GuardedScheduler
from cryodask.cluster.settings import SlurmSettings
from cryodask.cluster.slurm import slurm
from cryodask.cluster.slurm.pool_jobs import PoolJobs
from cryodask.cluster.slurm.pool_state import PoolStatus, missing
from cryodask.errors import ClusterError

_ALLOWED_FAILURES = 3
# longer silence looks like a hanging program; a full queue is reported now and then
_FIRST_WORD_SECONDS, _RARELY_SECONDS = 10.0, 600.0


class PoolCluster(PoolJobs):
    """Pools of Slurm jobs with Dask workers, on one ``FairShareScheduler`` in this process.

    Use ``Client(cluster)`` as with any Dask cluster, and :meth:`scale_pool` instead of ``scale``.

    Parameters
    ----------
    settings : SlurmSettings
    certificates : path, optional
        Folder of the cluster's authority (``tls.py``). With it scheduler and workers are guarded; without it nothing listens
        beyond the loopback address.
    owner : str, optional
        Name of the owner's certificate there.
    scheduler_options : mapping, optional
        More options for the scheduler.

    Notes
    -----
    The jobs are compared with Slurm's queue by one ``squeue`` every ``poll_seconds``, and sooner when a worker leaves. A lost job
    is replaced, at most ``replacements_per_hour``; when squeue fails no job counts as lost. A submission that Slurm refuses is
    not repeated. A pool gives up when three jobs in a row end before a worker connects. Every worker has the resource ``pool-NAME``.

    Pools with a ``maximum`` scale automatically (``scaling.py``): to as many jobs as are needed to do the pending work in
    ``catch_up_minutes``, and never below ``minimum`` or the ``floor`` of the lanes that have clients. A job is released when it has not
    been needed for ``idle_minutes``, no task runs on it, and others have taken its results.

    Raises
    ------
    ClusterError
    """

    def __init__(
        self,
        settings: SlurmSettings,
        *,
        certificates: str | Path | None = None,
        owner: str | None = None,
        scheduler_options: Mapping[str, Any] | None = None,
        asynchronous: bool = False,
    ) -> None:
        slurm.refuse_clear_text(settings, certificates and owner)
        if settings.interface not in (None, *(known := psutil.net_if_addrs())):
            raise ClusterError(
                f"This machine has no network interface {settings.interface}.",
                "the cluster file was written for another machine",
                f"use {' or '.join(known)}",
            )
        slurm.pool_job_class()
        folder = Path(certificates).absolute() if certificates else None
        # jobs are often lost for other reasons, so a task is not blamed before several workers have died
        options: dict[str, Any] = {"allowed_failures": _ALLOWED_FAILURES, "dashboard_address": "127.0.0.1:0", "port": settings.port}
        options |= {"interface": settings.interface} if settings.interface else {}
        options |= settings.sharing()
        security = None
        if folder is not None and owner is not None:
            security = tls.security(folder, owner)
            options |= {"protocol": "tls://", "security": tls.security(folder, "scheduler")}
            options |= {"owner": owner, "users": folder / "people.json", **settings.graph_limits()}
        dask.config.set(SETTINGS)
        super().__init__(
            settings,
            folder,
            scheduler={"cls": GuardedScheduler if security else FairShareScheduler, "options": {**options, **(scheduler_options or {})}},
            security=security,
            asynchronous=asynchronous,
        )

    @property
    def dashboard_link(self) -> str:
        """Address of Dask's dashboard; of a guarded scheduler with the secret word below which its pages are."""
        link = str(super().dashboard_link)
        return link.replace("/status", f"{getattr(self.scheduler, 'pages', '/').rstrip('/')}/status")

    # --- what users call ---------------------------------------------------------------------------------------------------------
    def scale_pool(self, **jobs: int) -> Any:
        """Set the number of jobs of the named pools; the others are unchanged. Workers that leave first move their results to others.

        Returns when jobs are submitted; jobs leave once others have taken their results. A job whose results are not taken within five
        minutes stays, with an entry in ``events``, and is retried a minute later, unless all pools are scaled to zero.

        A pool with automatic scaling keeps the number for ``idle_minutes``, and then follows the work again.

        Raises
        ------
        ClusterError
            For unknown pools and invalid numbers before anything is done; for jobs that Slurm refuses, with its words, after all others.
        """
        unknown = set(jobs) - set(self._pools)
        if unknown or min(jobs.values(), default=0) < 0:
            raise ClusterError(f"Cannot scale {jobs}.", f"the pools are {', '.join(self._pools)}", "name one of them, and 0 jobs or more")
        for name in jobs:
            pool = self.settings.pools[name]
            if pool.maximum is not None and not pool.minimum <= jobs[name] <= pool.maximum:
                raise ClusterError(
                    f"Pool {name} cannot have {jobs[name]} jobs.",
                    f"it scales between {pool.minimum} and {pool.maximum}",
                    "stay within these limits, or change minimum and maximum in the cluster file",
                )
        return self.sync(self._scale_pool, jobs)

    def scale(self, n: int = 0, memory: Any = None, cores: Any = None) -> Any:
        """Not supported, except to zero: there are several kinds of workers; use :meth:`scale_pool`."""
        if n or memory is not None or cores is not None:
            raise ClusterError("scale() does not work with pools.", "it assumes a single kind of worker", "use  scale_pool(cpu=4)")
        self._scaler.stopped = True
        for pool in self._pools.values():
            pool.target = 0
        return super().scale(0)

    def adapt(self, *args: Any, **kwargs: Any) -> Any:
        """Not supported: pools with a ``maximum`` scale automatically."""
        raise ClusterError("adapt() does not work with pools.", "it assumes a single kind of worker", "use  scale_pool(cpu=4)")

    def pool_status(self) -> Any:
        """Jobs, workers and pending reasons of every pool, as of the last query: a dict of :class:`PoolStatus`."""
        return self.sync(self._pool_status)

    async def _pool_status(self) -> dict[str, PoolStatus]:
        return self._statuses()

    def _statuses(self) -> dict[str, PoolStatus]:
        out = {}
        for name, pool in self._pools.items():
            states = [self._queue[m] for m in self._members(name) if m in self._queue]
            pending = [job for job in states if job.state == "PENDING"]
            out[name] = PoolStatus(
                target=pool.target,
                running=sum(job.state == "RUNNING" for job in states),
                pending=len(pending),
                workers=sum(len(self._present(m)) for m in self._members(name)),
                waiting=dict(Counter(job.reason for job in pending)),
                problem=pool.problem,
                lost=pool.lost,
                full=pool.full if len(self._members(name)) < pool.target else "",
            )
        return out

    def what_is_missing(self) -> Any:
        """One sentence about missing workers; empty when all are connected."""
        return self.sync(self._what_is_missing)

    async def _what_is_missing(self) -> str:
        return missing(self._statuses(), self.settings.pools, slurm_answers=self.slurm_answers)

    async def _identity(self, **asked: Any) -> dict[str, Any]:
        """The scheduler's identity; for requests about all workers, such as from a waiting run, also what is ``missing``."""
        known: dict[str, Any] = self.scheduler.identity(**asked)
        # every client asks every two seconds without workers: that must be cheap with many jobs
        return known | ({"missing": await self._what_is_missing()} if asked.get("n_workers") == -1 else {})

    def wait_for_first(self, seconds: float = 3600.0) -> Any:
        """Wait for one worker of any pool; returns at once if the first work will bring the first workers.

        After ten seconds, and then less and less often, a warning says what is missing.

        Raises
        ------
        ClusterError
            If none has connected in time or every pool has given up, with what was missing.
        """
        return self.sync(self._wait_for_first, seconds)

    async def _wait_for_first(self, seconds: float) -> None:
        start = time.monotonic()
        pause, tell_at = _FIRST_WORD_SECONDS, start + _FIRST_WORD_SECONDS
        while not self.scheduler.workers:
            asked = any(pool.target for pool in self._pools.values())
            if not asked and any(name in self._scaler and not pool.problem for name, pool in self._pools.items()):
                return
            now = time.monotonic()
            if not asked or now > start + seconds:
                raise ClusterError(
                    f"No worker has connected: {await self._what_is_missing() or 'no pool has any jobs'}.",
                    "the queue is full, or the partition, account or size of the jobs is wrong",
                    "check  squeue --me  and the cluster file",
                )
            if now >= tell_at:
                missing_now = await self._what_is_missing()
                warnings.warn(f"No worker has connected for {now - start:.0f} s, waiting: {missing_now}. Stop with Ctrl-C.", stacklevel=2)
                pause = min(2 * pause, _RARELY_SECONDS)
                tell_at = now + pause
            await asyncio.sleep(0.1)

    # --- who used it -------------------------------------------------------------------------------------------------------------
    def usage(self, since: float | None = None, by: Sequence[str] = KEYS) -> Any:
        """Who used how much of the workers: see :meth:`Accounting.usage`."""
        return self.sync(self._usage, since, by)

    async def _usage(self, since: float | None, by: Sequence[str]) -> list[dict[str, Any]]:
        return Accounting.attach(self.scheduler).usage(since, by)

    async def _start(self) -> None:
        await super()._start()
        Accounting.attach(self.scheduler)
        self.scheduler.handlers["identity"] = self._identity


def open_pools(settings: SlurmSettings, *, certificates: str | Path | None = None, owner: str | None = None) -> PoolCluster:
    """Open pools with their initial jobs. Returns when these are submitted; workers connect as Slurm starts the jobs.

    Raises
    ------
    ClusterError
        If Slurm refuses the jobs of every pool. If it accepts some, the refusals are warnings.
    """
    cluster = PoolCluster(settings, certificates=certificates, owner=owner)
    try:
        cluster.scale_pool(**{name: pool.wanted for name, pool in settings.pools.items()})
    except ClusterError as refused:
        if not cluster.worker_spec:
            cluster.close()
            raise
        warnings.warn(str(refused), stacklevel=2)
    except BaseException:
        cluster.close()
        raise
    return cluster
