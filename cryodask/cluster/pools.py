"""Several kinds of Slurm jobs with workers, on one scheduler whose lanes share them all."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import warnings
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import dask
import psutil
from distributed.deploy.cluster import Cluster
from distributed.deploy.spec import ProcessInterface, SpecCluster

from cryodask.cluster import slurm, tls
from cryodask.cluster.environment import SETTINGS
from cryodask.cluster.fairshare import FairShareScheduler
from cryodask.cluster.guard import GuardedScheduler
from cryodask.cluster.pool_state import FAILED_STARTS, PoolState, PoolStatus, missing
from cryodask.cluster.settings import SlurmSettings
from cryodask.errors import ClusterError

logger = logging.getLogger("cryodask.cluster")

_FAST_SECONDS, _FAST_FOR_SECONDS = 2.0, 30.0
_SUBMISSIONS = 20  # at a time: each is a process here and a lock in Slurm's controller
_RETIRE_SECONDS = 300.0
_CLOSE_SECONDS = 60.0
_MISSING_SECONDS = 300.0
_ALLOWED_FAILURES = 3


class PoolCluster(SpecCluster):
    """Pools of Slurm jobs with Dask workers, on one ``FairShareScheduler`` in this process.

    ``Client(cluster)`` as with any Dask cluster; :meth:`scale_pool` instead of ``scale``.

    Parameters
    ----------
    settings : SlurmSettings
    certificates : path, optional
        Folder of the cluster's authority (``tls.py``). With it the scheduler and the workers are guarded; without it nothing listens
        beyond the loopback address.
    owner : str, optional
        Name of the owner's certificate there.
    scheduler_options : mapping, optional
        More options for the scheduler.

    Notes
    -----
    The jobs are compared with Slurm's queue, by one ``squeue`` each ``poll_seconds`` and sooner when a worker leaves. A job that is gone
    is replaced, at most ``replacements_per_hour``; when squeue fails nothing is believed gone. A submission that Slurm refuses is
    not repeated. A pool whose jobs end three times in a row before a worker came gives up. Every worker has the resource ``pool-NAME``.

    Raises
    ------
    ClusterError
    """

    scheduler: Any
    workers: dict[str, Any]

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
                "the cluster file is for others",
                f"use {' or '.join(known)}",
            )
        slurm.pool_job_class()
        self.settings = settings
        self.cluster_id = slurm.new_cluster_id()
        self.events: deque[tuple[float, str, str]] = deque(maxlen=1000)
        """What happened: ``time.time()``, pool, text."""
        self._pools = {name: PoolState() for name in settings.pools}
        self._queue: dict[str, slurm.QueuedJob] = {}
        self.slurm_answers = True
        """Whether the last look at the queue succeeded; if not, the jobs are as they were when it did."""
        self._came: set[str] = set()
        self._silent_since: dict[str, float] = {}
        self._leaving: set[str] = set()
        self._fast_until = 0.0
        self._watching: asyncio.Task[None] | None = None
        self._certificates = Path(certificates).absolute() if certificates else None
        # jobs are lost for reasons of their own here: a task is not to blame before several workers died of it
        options: dict[str, Any] = {"allowed_failures": _ALLOWED_FAILURES, "dashboard_address": "127.0.0.1:0", "port": settings.port}
        options |= {"interface": settings.interface} if settings.interface else {}
        options |= settings.model_dump(include={"lanes", "strict", "reserve", "default_lane"})
        security = None
        if self._certificates is not None and owner is not None:
            security = tls.security(self._certificates, owner)
            options |= {"protocol": "tls://", "security": tls.security(self._certificates, "scheduler")}
            options |= {"owner": owner, "users": self._certificates / "people.json"}
        dask.config.set(SETTINGS)
        super().__init__(
            scheduler={"cls": GuardedScheduler if security else FairShareScheduler, "options": {**options, **(scheduler_options or {})}},
            workers={},
            security=security,
            name="cryodask",
            silence_logs=logging.ERROR,
            asynchronous=asynchronous,
        )

    # --- what users call ---------------------------------------------------------------------------------------------------------
    def scale_pool(self, **jobs: int) -> Any:
        """Ask for that many jobs of each pool named; the others stay as they are. Results on workers that leave go to others first.

        Raises
        ------
        ClusterError
            For unknown pools before anything is done; for jobs that Slurm refuses, with its words, when all else is submitted.
        """
        unknown = set(jobs) - set(self._pools)
        if unknown or min(jobs.values(), default=0) < 0:
            raise ClusterError(f"Cannot scale {jobs}.", f"the pools are {', '.join(self._pools)}", "name one of them, and 0 jobs or more")
        return self.sync(self._scale_pool, jobs)

    def scale(self, n: int = 0, memory: Any = None, cores: Any = None) -> Any:
        """Only to nothing: there are several kinds of workers here."""
        if n or memory is not None or cores is not None:
            raise ClusterError("There are several kinds of workers here.", "scale() knows one kind", "use  scale_pool(cpu=4)")
        for pool in self._pools.values():
            pool.target = 0
        return super().scale(0)

    def adapt(self, *args: Any, **kwargs: Any) -> Any:
        """Not here."""
        raise ClusterError("There are several kinds of workers here.", "adapt() knows one kind", "use  scale_pool(cpu=4)")

    def pool_status(self) -> Any:
        """Jobs, workers and reasons for waiting of every pool, as Slurm said last: a dict of :class:`PoolStatus`."""
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
            )
        return out

    def what_is_missing(self) -> Any:
        """One sentence on what is waited for; empty when every worker is there."""
        return self.sync(self._what_is_missing)

    async def _what_is_missing(self) -> str:
        return missing(self._statuses(), self.settings.pools, slurm_answers=self.slurm_answers)

    def wait_for_first(self, seconds: float = 3600.0) -> Any:
        """Wait for one worker of any pool, and start with what came.

        Raises
        ------
        ClusterError
            If none came in time or every pool has given up, with what was waited for.
        """
        return self.sync(self._wait_for_first, seconds)

    async def _wait_for_first(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not self.scheduler.workers:
            if not any(pool.target for pool in self._pools.values()) or time.monotonic() > deadline:
                raise ClusterError(
                    f"No worker has come: {await self._what_is_missing() or 'no pool was asked for jobs'}.",
                    "the queue is full, or the partition, account or size of the jobs does not fit",
                    "see  squeue --me  and the cluster file",
                )
            await asyncio.sleep(0.1)

    # --- jobs of a pool ----------------------------------------------------------------------------------------------------------
    def _members(self, pool: str) -> list[str]:
        return [name for name, spec in self.worker_spec.items() if spec["options"]["pool"] == pool]

    def _workers_of(self, name: str) -> list[str]:
        return [name + suffix for suffix in self.worker_spec[name].get("group", [""])]

    def _present(self, name: str) -> list[Any]:
        """Workers of a job that the scheduler knows."""
        known = self.scheduler.aliases
        addresses = [known[w] for w in self._workers_of(name) if w in known]
        return [self.scheduler.workers[a] for a in addresses if a in self.scheduler.workers]

    def _leaves_soon(self, shown: slurm.QueuedJob, pool: str) -> bool:
        """Whether a job's walltime ends soon: its replacement is submitted while its workers still work."""
        left = shown.seconds_left
        return shown.state == "RUNNING" and left is not None and left < 2 * slurm.leave_seconds(self.settings.pools[pool])

    def _new_job(self, pool: str) -> None:
        state = self._pools[pool]
        name = f"{pool}-{state.serial}"
        state.serial += 1
        options = {"pool": pool, "settings": self.settings, "cluster_id": self.cluster_id, "certificates": self._certificates}
        self.worker_spec[name] = {"cls": slurm.pool_job_class(), "options": options}
        workers = self.settings.pools[pool].workers_per_job
        if workers > 1:
            self.worker_spec[name]["group"] = [f"-{i}" for i in range(workers)]

    async def _scale_pool(self, jobs: Mapping[str, int]) -> None:
        for name, target in jobs.items():
            self._pools[name].aim(target)
        await self._to_targets()
        refused = {name: self._pools[name].problem for name in jobs if self._pools[name].problem}
        if refused:
            raise ClusterError(
                "; ".join(f"Slurm refuses jobs of pool {name}: {words}" for name, words in refused.items()) + ".",
                "partition, account, memory or GPUs of the pool do not exist on this cluster",
                "compare the cluster file with  sinfo; the other pools go on",
            )

    async def _to_targets(self) -> None:
        async with self._changing:
            room = _SUBMISSIONS
            for name, pool in self._pools.items():
                members = [m for m in self._members(name) if m not in self._leaving or not pool.target]
                await self._retire(sorted(members, key=self._worth)[: max(0, len(members) - pool.target)])
                if time.monotonic() >= pool.not_before:
                    new = min(pool.target - len(members), room)
                    for _ in range(new):
                        self._new_job(name)
                    room -= max(0, new)
            await asyncio.shield(self._correct_state())  # a submission cut in half would leave a job that nobody knows
            self._take_refusals()
        self._hurry()

    def _worth(self, name: str) -> tuple[bool, int, int]:
        """Least worth goes first: without workers yet, idle, with little in memory."""
        workers = self._present(name)
        return bool(workers), sum(len(ws.processing) for ws in workers), sum(ws.nbytes for ws in workers)

    async def _retire(self, names: Iterable[str]) -> None:
        """Let go of jobs; SpecCluster's own way passes names where addresses are expected, and all results there are lost."""
        names = list(names)
        workers = [ws.name for name in names for ws in self._present(name)]
        if workers:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.scheduler.retire_workers(names=workers, close_workers=True, remove=True), _RETIRE_SECONDS)
        for name in names:
            self.worker_spec.pop(name, None)

    def _take_refusals(self) -> None:
        for name, job in list(self.workers.items()):
            if job.refused:
                pool = self._pools[job.pool]
                pool.problem = job.refused
                self._forget(name, f"refused: {job.refused}")
                pool.target = len(self._members(job.pool))  # a refusal does not heal: stop asking

    def _forget(self, name: str, why: str) -> None:
        job = self.workers.pop(name)
        self.worker_spec.pop(name, None)
        self._silent_since.pop(name, None)
        self._came.discard(name)
        self._leaving.discard(name)
        self.events.append((time.time(), job.pool, f"job {name} ({job.job_id or 'no id'}): {why}"))
        logger.warning("pool %s, job %s (%s): %s", job.pool, name, job.job_id or "no id", why)
        closing = asyncio.ensure_future(job.close())
        self._futures.add(closing)
        closing.add_done_callback(self._futures.discard)

    # --- what Slurm says ---------------------------------------------------------------------------------------------------------
    async def _start(self) -> None:
        self._changing = asyncio.Lock()
        self._wake = asyncio.Event()
        await super()._start()
        for name in await slurm.cancel_leftovers():
            self.events.append((time.time(), "", f"job {name}, left by a cluster whose process died: cancelled"))
        self._watching = asyncio.ensure_future(self._watch())

    def _update_worker_status(self, op: str, msg: Any) -> None:
        # SpecCluster cancels a job whose worker is away for lost-worker-timeout, also one whose nanny starts a new worker: Slurm decides
        Cluster._update_worker_status(self, op, msg)
        self._hurry()

    def _hurry(self) -> None:
        """Look at the queue often for a while: something changes."""
        self._fast_until = time.monotonic() + _FAST_FOR_SECONDS
        self._wake.set()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(min(_FAST_SECONDS, self.settings.poll_seconds))
            if time.monotonic() >= self._fast_until:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), self.settings.poll_seconds)
            self._wake.clear()
            try:
                await self._reconcile()
            except Exception:
                logger.exception("the pools could not be compared with Slurm's queue")

    async def _reconcile(self) -> None:
        submitted = {name: job for name, job in self.workers.items() if name in self.worker_spec}
        queue = await slurm.squeue()
        self.slurm_answers = queue is not None
        if queue is None:
            return
        self._queue = {job.name: job for job in queue if job.cluster_id == self.cluster_id}
        now = time.monotonic()
        lost = False
        async with self._changing:
            for name, job in submitted.items():
                if name not in self.worker_spec:
                    continue
                shown = self._queue.get(name)
                if shown is not None:
                    job.job_id, job.unsure = shown.job_id, False  # sbatch may have failed after Slurm took the job
                if shown is not None and self._leaves_soon(shown, job.pool):
                    self._leaving.add(name)
                if self._present(name):
                    self._came.add(name)
                    self._pools[job.pool].failed_starts = 0
                if shown is None or not shown.alive:
                    for ws in self._present(name) if shown is None else ():  # a node that vanished closes no connection
                        await self.scheduler.remove_worker(ws.address, stimulus_id=f"job-gone-{name}")
                    self._lost(name, job, "gone" if shown is None else shown.state.lower())
                    lost = True
                elif shown.state == "RUNNING" and self._silent(name, now):
                    self._lost(name, job, f"runs on {shown.node}, but workers are missing for {_MISSING_SECONDS:.0f} s")
                    lost = True
        short = [
            n for n, pool in self._pools.items() if len(set(self._members(n)) - self._leaving) < pool.target and now >= pool.not_before
        ]
        if lost or short:
            await self._to_targets()

    def _silent(self, name: str, now: float) -> bool:
        """Whether a running job has lacked some of its workers for long."""
        if len(self._present(name)) == len(self._workers_of(name)):
            self._silent_since.pop(name, None)
            return False
        return now - self._silent_since.setdefault(name, now) > _MISSING_SECONDS

    def _lost(self, name: str, job: Any, why: str) -> None:
        pool, now = self._pools[job.pool], time.monotonic()
        ending, unsure, came = name in self._leaving, job.unsure, name in self._came
        self._forget(name, "Slurm never took it" if unsure else why)
        if unsure:  # the controller was away: try again, a little later
            pool.not_before = now + 5.0
            return
        if ending:
            return
        if not pool.count_loss(now, came=came, per_hour=self.settings.replacements_per_hour):
            pool.problem = f"{FAILED_STARTS} jobs in a row ended before a worker came. The last says: {job.last_words()}"
            pool.target = len(self._members(job.pool))

    # --- the end -----------------------------------------------------------------------------------------------------------------
    async def _close(self) -> None:
        watching, self._watching = self._watching, None
        if watching is not None:
            watching.cancel()
            await asyncio.wait([watching])
            await slurm.scancel([job.job_id for job in self.workers.values() if job.job_id])  # one call for all, not one for each
            for job in self.workers.values():
                await ProcessInterface.close(job)
        await super()._close()
        if watching is not None and not await slurm.wait_until_gone(self.cluster_id, _CLOSE_SECONDS):
            logger.warning("Slurm still shows jobs of this cluster, or does not answer. They end when they find no scheduler.")


def open_pools(settings: SlurmSettings, *, certificates: str | Path | None = None, owner: str | None = None) -> PoolCluster:
    """Pools with the jobs that their settings want at the start. Returns when they are submitted; workers come as Slurm lets them.

    Raises
    ------
    ClusterError
        If Slurm refuses the jobs of every pool. If it takes some, the refusals are warnings.
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
