"""Several kinds of Slurm jobs with workers, on one scheduler whose lanes share them all."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import warnings
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import dask
from distributed import Scheduler
from distributed.deploy.cluster import Cluster
from distributed.deploy.spec import SpecCluster

from cryodask.cluster import slurm
from cryodask.cluster.connect import _SETTINGS
from cryodask.cluster.fairshare import FairShareScheduler
from cryodask.cluster.settings import SlurmSettings
from cryodask.errors import ClusterError

logger = logging.getLogger("cryodask.cluster")

_FAST_SECONDS, _FAST_FOR_SECONDS = 1.0, 60.0
_RETIRE_SECONDS = 300.0
_CLOSE_SECONDS = 60.0
_MISSING_SECONDS = 300.0
_FAILED_STARTS = 3


@dataclass(frozen=True)
class PoolStatus:
    """What a pool has and what it waits for. ``waiting`` counts pending jobs by Slurm's own reason (``Resources``, ``PartitionConfig``)."""

    target: int
    running: int
    pending: int
    workers: int
    waiting: dict[str, int]
    problem: str
    """Why the pool has given up, in Slurm's words or from the log of its last job; empty if it has not."""
    lost: int
    """Jobs lost since the start: cancelled, killed, pushed out, on a node that went down."""


@dataclass
class _Pool:
    target: int = 0
    serial: int = 0
    failed_starts: int = 0
    not_before: float = 0.0
    problem: str = ""
    lost: int = 0
    replaced: deque[float] = field(default_factory=deque)


class PoolCluster(SpecCluster):
    """Pools of Slurm jobs with Dask workers, on one ``FairShareScheduler`` in this process.

    ``Client(cluster)`` as with any Dask cluster; :meth:`scale_pool` instead of ``scale``.

    Parameters
    ----------
    settings : SlurmSettings
    security : distributed.Security, optional
        With the paths of certificate files. Without it nothing listens beyond the loopback address.
    scheduler : type
        Class of the scheduler.
    scheduler_options : mapping, optional
        More options for it.
    asynchronous : bool

    Notes
    -----
    The jobs are compared with Slurm's queue, by one ``squeue`` each ``poll_seconds`` and sooner when a worker leaves. A job that is gone
    is replaced, at most ``replacements_per_hour``; when squeue fails nothing is believed gone. A submission that Slurm refuses is
    not repeated. A pool whose jobs end three times in a row before a worker came gives up. Every worker has the resource ``pool-NAME``.

    Raises
    ------
    ClusterError
    """

    def __init__(
        self,
        settings: SlurmSettings,
        *,
        security: Any = None,
        scheduler: type[Scheduler] = FairShareScheduler,
        scheduler_options: Mapping[str, Any] | None = None,
        asynchronous: bool = False,
    ) -> None:
        if security is None and settings.interface != "lo":
            raise ClusterError(
                "The pools have no certificates, and workers on other machines would talk in clear text.",
                "no security was given",
                "give security=, or set  interface: lo  where all is on one machine",
            )
        slurm.pool_job_class()
        self.settings = settings
        self.cluster_id = slurm.new_cluster_id()
        self.events: deque[tuple[float, str, str]] = deque(maxlen=1000)
        """What happened: ``time.time()``, pool, text."""
        self._pools = {name: _Pool() for name in settings.pools}
        self._queue: dict[str, slurm.QueuedJob] = {}
        self._slurm_answers = True
        self._seen: dict[str, float] = {}
        self._running_since: dict[str, float] = {}
        self._fast_until = 0.0
        self._security = security
        options: dict[str, Any] = {"dashboard_address": "127.0.0.1:0", "port": settings.port, "security": security}
        options |= {"interface": settings.interface} if settings.interface else {}
        options |= {"protocol": "tls://" if security is not None else "tcp://"}
        if issubclass(scheduler, FairShareScheduler):
            options |= {
                "lanes": settings.lanes,
                "strict": settings.strict,
                "reserve": settings.reserve,
                "default_lane": settings.default_lane,
            }
        dask.config.set(_SETTINGS)
        super().__init__(
            scheduler={"cls": scheduler, "options": {**options, **(scheduler_options or {})}},
            workers={},
            security=security,
            name="cryodask",
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

    def pool_status(self) -> dict[str, PoolStatus]:
        """Jobs, workers and reasons for waiting of every pool, as Slurm said last."""
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

    @property
    def slurm_answers(self) -> bool:
        """Whether the last look at the queue succeeded; if not, the jobs are as they were when it did."""
        return self._slurm_answers

    def what_is_missing(self) -> str:
        """One sentence on what is waited for; empty when every worker is there."""
        parts = []
        for name, now in self.pool_status().items():
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(now.waiting.items()))
            if now.problem:
                parts.append(f"pool {name}: {now.problem}")
            elif reasons:
                parts.append(f"pool {name}: jobs wait in the queue ({reasons})")
            elif now.workers < now.target * self.settings.pools[name].workers_per_job:
                parts.append(f"pool {name}: {now.workers} workers of {now.running} running jobs have come")
        return "; ".join(parts + ([] if self._slurm_answers else ["Slurm does not answer"]))

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
            hopeless = all(pool.problem or not pool.target for pool in self._pools.values())
            if hopeless or time.monotonic() > deadline:
                raise ClusterError(
                    f"No worker has come: {self.what_is_missing() or 'no pool was asked for jobs'}.",
                    "the queue is full, or the partition, account or size of the jobs does not fit",
                    "see  squeue --me  and the cluster file",
                )
            await asyncio.sleep(0.1)

    # --- jobs of a pool ----------------------------------------------------------------------------------------------------------
    def _members(self, pool: str) -> list[str]:
        return [name for name, spec in self.worker_spec.items() if spec["options"]["pool"] == pool]

    def _workers_of(self, name: str) -> list[str]:
        spec = self.worker_spec.get(name)
        return [name + suffix for suffix in (spec or {}).get("group", [""])]

    def _present(self, name: str) -> list[Any]:
        """Workers of a job that the scheduler knows."""
        known = self.scheduler.aliases
        addresses = [known[w] for w in self._workers_of(name) if w in known]
        return [self.scheduler.workers[a] for a in addresses if a in self.scheduler.workers]

    def _ending(self, name: str) -> bool:
        """Whether a job's workers will leave soon: its replacement is submitted while they work."""
        margin = slurm.leave_seconds(self.settings.pools[self.worker_spec[name]["options"]["pool"]])
        left = self._queue[name].seconds_left if name in self._queue and self._queue[name].state == "RUNNING" else None
        return left is not None and left < 2 * margin

    def _new_job(self, pool: str) -> None:
        state = self._pools[pool]
        name = f"{pool}-{state.serial}"
        state.serial += 1
        options = {"pool": pool, "settings": self.settings, "cluster_id": self.cluster_id, "security": self._security}
        self.worker_spec[name] = {"cls": slurm.pool_job_class(), "options": options}
        workers = self.settings.pools[pool].workers_per_job
        if workers > 1:
            self.worker_spec[name]["group"] = [f"-{i}" for i in range(workers)]

    async def _scale_pool(self, jobs: Mapping[str, int]) -> None:
        for name, target in jobs.items():
            pool = self._pools[name]
            pool.target, pool.problem, pool.failed_starts, pool.not_before = target, "", 0, 0.0
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
            for name, pool in self._pools.items():
                members = [m for m in self._members(name) if not self._ending(m)]
                await self._retire(sorted(members, key=self._worth)[: max(0, len(members) - pool.target)])
                missing = pool.target - len(members)
                if missing > 0 and time.monotonic() >= pool.not_before:
                    for _ in range(missing):
                        self._new_job(name)
            await self._correct_state()
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
        job = self.workers.pop(name, None)
        self.worker_spec.pop(name, None)
        self._running_since.pop(name, None)
        if job is not None:
            self.events.append((time.time(), job.pool, f"job {name} ({job.job_id or 'no id'}): {why}"))
            logger.warning("pool %s, job %s (%s): %s", job.pool, name, job.job_id or "no id", why)
            self._futures.add(asyncio.ensure_future(job.close()))

    # --- what Slurm says ---------------------------------------------------------------------------------------------------------
    async def _start(self) -> None:
        self._changing = asyncio.Lock()
        self._wake = asyncio.Event()
        await super()._start()
        await self._cancel_leftovers()
        self._watching = asyncio.ensure_future(self._watch())

    async def _cancel_leftovers(self) -> None:
        """Pending jobs outlive a killed owner, and would start only to find no scheduler."""
        left = [job for job in await slurm.squeue() or [] if slurm.owner_is_dead(job.cluster_id)]
        for job in left:
            self.events.append((time.time(), "", f"job {job.name} ({job.job_id}) of a cluster whose process died: cancelled"))
        await slurm.scancel([job.job_id for job in left])

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
            await asyncio.sleep(_FAST_SECONDS if time.monotonic() < self._fast_until else 0)
            with contextlib.suppress(TimeoutError):
                if time.monotonic() >= self._fast_until:
                    await asyncio.wait_for(self._wake.wait(), self.settings.poll_seconds)
            self._wake.clear()
            try:
                await self._reconcile()
            except Exception:
                logger.exception("the pools could not be compared with Slurm's queue")

    async def _reconcile(self) -> None:
        submitted = {name: job for name, job in self.workers.items() if name in self.worker_spec}
        queue = await slurm.squeue()
        self._slurm_answers = queue is not None
        if queue is None:
            return
        self._queue = {job.name: job for job in queue if job.cluster_id == self.cluster_id}
        now = time.monotonic()
        lost = False
        async with self._changing:
            for name, job in submitted.items():
                if self.workers.get(name) is not job:
                    continue
                shown = self._queue.get(name)
                if shown is not None:
                    job.job_id, job.unsure = shown.job_id, False  # sbatch may have failed after Slurm took the job
                if self._present(name):
                    self._seen[name] = now
                    self._pools[job.pool].failed_starts = 0
                if shown is None or not shown.alive:
                    self._lost(name, job, "gone" if shown is None else shown.state.lower())
                    lost = True
                elif shown.state == "RUNNING" and self._silent(name, now):
                    self._lost(name, job, f"runs on {shown.node}, but workers are missing for {_MISSING_SECONDS:.0f} s")
                    lost = True
        if lost or any(self._short(name) for name in self._pools):
            await self._to_targets()

    def _short(self, name: str) -> bool:
        pool = self._pools[name]
        return time.monotonic() >= pool.not_before and sum(not self._ending(m) for m in self._members(name)) < pool.target

    def _silent(self, name: str, now: float) -> bool:
        """Whether a running job has lacked some of its workers for long."""
        if len(self._present(name)) == len(self._workers_of(name)):
            self._running_since.pop(name, None)
            return False
        return now - self._running_since.setdefault(name, now) > _MISSING_SECONDS

    def _lost(self, name: str, job: Any, why: str) -> None:
        pool, now = self._pools[job.pool], time.monotonic()
        ending, unsure, came = self._ending(name), job.unsure, self._seen.pop(name, None) is not None
        self._forget(name, "Slurm never took it" if unsure else why)
        if unsure:  # the controller was away: try again, a little later
            pool.not_before = now + 5.0
            return
        if ending:
            return
        pool.lost += 1
        if not came:
            pool.failed_starts += 1
            pool.not_before = now + 2.0**pool.failed_starts
            if pool.failed_starts >= _FAILED_STARTS:
                pool.problem = f"{_FAILED_STARTS} jobs in a row ended before a worker came. The last says: {self._last_words(job)}"
                pool.target = len(self._members(job.pool))
                return
        while pool.replaced and pool.replaced[0] < now - 3600:
            pool.replaced.popleft()
        if len(pool.replaced) >= self.settings.replacements_per_hour:
            pool.not_before = pool.replaced[0] + 3600 if pool.replaced else now + 3600
        pool.replaced.append(now)

    @staticmethod
    def _last_words(job: Any) -> str:
        with contextlib.suppress(OSError):
            lines = (job.logs / f"{job.job_name}-{job.job_id}.log").read_text(errors="replace").splitlines()
            return " / ".join(line.strip() for line in lines if line.strip())[-300:] or "nothing"
        return "nothing that could be read"

    # --- the end -----------------------------------------------------------------------------------------------------------------
    async def _close(self) -> None:
        if hasattr(self, "_watching"):
            self._watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watching
            del self._watching
            await slurm.scancel([job.job_id for job in self.workers.values() if job.job_id])  # one call for all
            await super()._close()
            await self._wait_until_gone()
        else:
            await super()._close()

    async def _wait_until_gone(self) -> None:
        deadline = time.monotonic() + _CLOSE_SECONDS
        while time.monotonic() < deadline:
            left = [job for job in await slurm.squeue() or [] if job.cluster_id == self.cluster_id]
            if not left:
                return
            await slurm.scancel([job.job_id for job in left if job.state != "COMPLETING"])
            await asyncio.sleep(0.2)


def open_pools(settings: SlurmSettings, *, security: Any = None) -> PoolCluster:
    """Pools with the jobs that their settings want at the start. Returns when they are submitted; workers come as Slurm lets them.

    Raises
    ------
    ClusterError
        If Slurm refuses the jobs of every pool. If it takes some, the refusals are warnings.
    """
    cluster = PoolCluster(settings, security=security)
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


def dry_run(settings: SlurmSettings) -> dict[str, str]:
    """The job script of every pool, as it would be submitted, but for the scheduler's address and the certificates."""
    return {
        name: slurm.job_script(settings, name, scheduler="SCHEDULER", name=f"{name}-0", cluster_id="CLUSTER") for name in settings.pools
    }
