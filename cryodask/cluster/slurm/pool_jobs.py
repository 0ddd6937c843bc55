"""The jobs of pools: submitting them, comparing them with Slurm's queue, replacing lost ones, releasing those not needed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from distributed.active_memory_manager import RetireWorker
from distributed.core import Status
from distributed.deploy.cluster import Cluster
from distributed.deploy.spec import ProcessInterface, SpecCluster

from cryodask.cluster.settings import SlurmSettings
from cryodask.cluster.slurm import slurm
from cryodask.cluster.slurm.pool_state import FAILED_STARTS, PoolState
from cryodask.cluster.slurm.scaling import Scaler
from cryodask.errors import ClusterError

logger = logging.getLogger("cryodask.cluster")

_FAST_SECONDS, _FAST_FOR_SECONDS = 2.0, 30.0
_SUBMISSIONS = 20  # at a time: each costs a process here and a lock in Slurm's controller
_RETIRE_SECONDS, _AGAIN_SECONDS = 300.0, 60.0
_CLOSE_SECONDS = 60.0
_MISSING_SECONDS = 300.0
_NANNY_SECONDS = 15.0


class PoolJobs(SpecCluster):
    """The part of a :class:`~cryodask.cluster.slurm.pools.PoolCluster` that handles Slurm, and workers that come and go."""

    scheduler: Any
    workers: dict[str, Any]

    def __init__(self, settings: SlurmSettings, certificates: Path | None, **options: Any) -> None:
        self.settings = settings
        self.cluster_id = slurm.new_cluster_id()
        self.events: deque[tuple[float, str, str]] = deque(maxlen=1000)
        """Events: ``time.time()``, pool, text."""
        self._pools = {name: PoolState() for name in settings.pools}
        self._scaler = Scaler(settings)
        self._queue: dict[str, slurm.QueuedJob] = {}
        self.slurm_answers = True
        """Whether the last query of the queue succeeded; if not, the jobs are as of the last successful one."""
        self._came: set[str] = set()
        self._nannies: dict[str, str] = {}
        self._silent_since: dict[str, float] = {}
        self._leaving: set[str] = set()
        self._most_left: dict[str, int] = {}
        # jobs whose workers are handing over results, and why they are lost ("" for jobs that are no longer needed)
        self._retiring: dict[str, str] = {}
        self._retirements: set[asyncio.Task[None]] = set()
        self._stays_until: dict[str, float] = {}
        self._fast_until = 0.0
        self._watching: asyncio.Task[None] | None = None
        self.jobs_left: list[str] = []
        """After the end: jobs that Slurm may still have."""
        self._certificates = certificates
        super().__init__(workers={}, name="cryodask", silence_logs=logging.ERROR, **options)

    # --- jobs of a pool ----------------------------------------------------------------------------------------------------------
    def _members(self, pool: str) -> list[str]:
        return [name for name, spec in self.worker_spec.items() if spec["options"]["pool"] == pool]

    def _workers_of(self, name: str) -> list[str]:
        return [name + suffix for suffix in self.worker_spec.get(name, {}).get("group", [""])]

    def _present(self, name: str) -> list[Any]:
        """Workers of a job that are connected to the scheduler."""
        known = self.scheduler.aliases
        addresses = [known[w] for w in self._workers_of(name) if w in known]
        return [self.scheduler.workers[a] for a in addresses if a in self.scheduler.workers]

    def _leaves_soon(self, shown: slurm.QueuedJob, pool: str) -> bool:
        """Whether a job's walltime ends soon, so that its replacement is submitted while its workers are still running."""
        left = shown.seconds_left
        return shown.state == "RUNNING" and left is not None and left < 2 * self._margin_seconds(shown, pool)

    def _margin_seconds(self, shown: slurm.QueuedJob, pool: str) -> int:
        """How long before its end a job is vacated; without a walltime in the cluster file, squeue shows that of the partition."""
        if self.settings.pools[pool].walltime or shown.seconds_left is None:
            return slurm.leave_seconds(self.settings.pools[pool])
        most = self._most_left[shown.name] = max(self._most_left.get(shown.name, 0), shown.seconds_left)
        return slurm.margin_seconds(most)

    def _must_leave(self, now: float) -> list[str]:
        """Jobs near their end whose workers do not know it, because the cluster file has no walltime."""
        leaving = {name: self.workers[name].pool for name in self._leaving - self._retiring.keys() if name in self.worker_spec}
        return [
            name
            for name, pool in leaving.items()
            if not self.settings.pools[pool].walltime
            and (shown := self._queue.get(name)) is not None
            and (shown.seconds_left or 0) < self._margin_seconds(shown, pool)
            and now >= self._stays_until.get(name, 0.0)
        ]

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
        self._stays_until.clear()
        self._scaler.by_hand(jobs, time.monotonic())
        await self._to_targets(by_hand=jobs)
        refused = {name: self._pools[name].problem for name in jobs if self._pools[name].problem}
        if refused:
            raise ClusterError(
                "; ".join(f"Slurm refuses jobs of pool {name}: {words}" for name, words in refused.items()) + ".",
                "the partition, account, memory or GPUs of the pool do not exist on this cluster",
                "compare the cluster file with  sinfo; the other pools continue",
            )

    async def _to_targets(self, by_hand: Collection[str] = ()) -> None:
        async with self._changing:
            room, nobody_stays = _SUBMISSIONS, not any(pool.target for pool in self._pools.values())
            asked = []
            for name, pool in self._pools.items():
                members = [m for m in self._members(name) if m not in self._retiring and (m not in self._leaving or not pool.target)]
                least_worth = self._surplus(members, pool)
                if name in self._scaler and name not in by_hand:
                    self._let_go(dict.fromkeys(self._spare(least_worth), ""))
                else:
                    self._let_go(dict.fromkeys(least_worth, ""), whatever=nobody_stays)
                if time.monotonic() >= pool.not_before:
                    new = min(pool.target - len(members), room, 1 if pool.full else room)  # one job tests whether the limit has lifted
                    for _ in range(new):
                        self._new_job(name)
                    asked += [name] if new > 0 else []
                    room -= max(0, new)
            await asyncio.shield(self._correct_state())  # an interrupted submission would leave an unknown job
            self._take_refusals(asked)
        self._hurry()

    def _surplus(self, members: Collection[str], pool: PoolState) -> list[str]:
        """Jobs beyond a pool's target that can be released now."""
        now = time.monotonic()
        least_worth = sorted(members, key=self._worth)[: max(0, len(members) - pool.target)]
        return [name for name in least_worth if now >= self._stays_until.get(name, 0.0)]

    def _worth(self, name: str) -> tuple[bool, int, int]:
        """Sort key for releasing jobs: first those without workers, then idle ones, then those with little in memory."""
        workers = self._present(name)
        return bool(workers), sum(len(ws.processing) for ws in workers), sum(ws.nbytes for ws in workers)

    def _spare(self, names: Iterable[str]) -> list[str]:
        """Those jobs that are idle and whose results others can take."""
        idle = sorted((n for n in names if not any(ws.processing for ws in self._present(n))), key=self._worth)
        leaving = {ws for name in (*idle, *self._retiring) for ws in self._present(name)}
        if idle and not self.scheduler.running - leaving and any(ws.has_what for ws in leaving):
            idle.pop()
        return idle

    def _let_go(self, jobs: Mapping[str, str], *, whatever: bool = False) -> None:
        """Release jobs, each with the reason if it is lost; those with workers once others have taken their results.

        SpecCluster itself passes names where addresses are expected, which loses all results. A job whose results cannot be taken
        stays, with an entry in ``events``, and is retried later; if it is lost, or with ``whatever``, it is released regardless.
        """
        with_workers = {name: why for name, why in jobs.items() if self._present(name)}
        for name, why in jobs.items():
            if why and name not in with_workers:
                self._lost(name, self.workers[name], why)
            elif name not in with_workers:
                self.worker_spec.pop(name, None)
        if with_workers:
            self._retiring |= with_workers
            task = asyncio.ensure_future(self._retire(with_workers, whatever=whatever))
            self._retirements.add(task)
            task.add_done_callback(self._retirements.discard)

    async def _retire(self, jobs: Mapping[str, str], *, whatever: bool) -> None:
        """Retire the workers of jobs, which may take minutes; it runs in the background, and lost jobs are replaced meanwhile."""
        before = {ws.address: ws.status for name in jobs for ws in self._present(name)}
        names = [ws.name for name in jobs for ws in self._present(name)]
        took = f"others did not take them within {_RETIRE_SECONDS:.0f} s"
        try:
            await asyncio.wait_for(self.scheduler.retire_workers(names=names, close_workers=True, remove=True), _RETIRE_SECONDS)
            took = "no other worker can take them"
        except TimeoutError:
            self._undo_retirement(before)
        except Exception:
            logger.exception("workers could not be retired")
            took = "handing them over failed"
            self._undo_retirement(before)
        async with self._changing:
            for name in jobs:
                why = self._retiring.pop(name, "")
                if name not in self.workers or name not in self.worker_spec:  # it has ended meanwhile
                    continue
                present = set(self._present(name))
                left = len({ts for ws in present for ts in ws.has_what if ts.who_has <= present})
                staying = bool(present) and not why and not whatever
                if left or staying:
                    fate = f"it stays for now, with {left} results" if staying else f"{left} of its results are lost"
                    self._tell(name, f"{fate}: {took}")
                if staying:
                    self._stays_until[name] = time.monotonic() + _AGAIN_SECONDS
                elif why:
                    self._lost(name, self.workers[name], why)
                else:
                    self.worker_spec.pop(name, None)
                    self._stays_until.pop(name, None)
        with _logged("the pools could not be scaled to their targets"):
            await self._to_targets()

    def _undo_retirement(self, before: Mapping[str, Status]) -> None:
        """Restore workers after an interrupted retirement, which in distributed leaves them without tasks forever."""
        amm = self.scheduler.extensions["amm"]
        amm.policies -= {p for p in amm.policies if isinstance(p, RetireWorker) and p.address in before}
        for address, status in before.items():
            if address in self.scheduler.workers and status in (Status.running, Status.paused):
                message = {"op": "worker-status-change", "status": status.name, "stimulus_id": f"stays-{time.monotonic()}"}
                self.scheduler.stream_comms[address].send(message)

    def _tell(self, name: str, text: str) -> None:
        job = self.workers[name]
        self.events.append((time.time(), job.pool, f"job {name} ({job.job_id or 'no id'}): {text}"))
        logger.warning("pool %s, job %s (%s): %s", job.pool, name, job.job_id or "no id", text)

    def _take_refusals(self, asked: Collection[str]) -> None:
        full: dict[str, str] = {}
        for name, job in list(self.workers.items()):
            if job.full:
                self._forget(name, "" if job.pool in full else f"not submitted for now: {job.full}")
                full[job.pool] = job.full
            elif job.refused:
                pool = self._pools[job.pool]
                pool.problem = job.refused
                self._forget(name, f"refused: {job.refused}")
                pool.target = len(set(self._members(job.pool)) - self._retiring.keys())  # a refusal is permanent: stop asking
        for name in asked:
            if name in full:
                self._pools[name].count_full(time.monotonic(), full[name])
            else:
                self._pools[name].full = ""

    def _forget(self, name: str, why: str) -> None:
        if why:
            self._tell(name, why)
        job = self.workers.pop(name)
        self.worker_spec.pop(name, None)
        self._retiring.pop(name, None)
        self._stays_until.pop(name, None)
        self._silent_since.pop(name, None)
        self._came.discard(name)
        self._leaving.discard(name)
        self._most_left.pop(name, None)
        for suffix in ("", *(f"-{i}" for i in range(self.settings.pools[job.pool].workers_per_job))):
            self._nannies.pop(name + suffix, None)
        closing = asyncio.ensure_future(job.close())
        self._futures.add(closing)
        closing.add_done_callback(self._futures.discard)

    # --- what Slurm says ---------------------------------------------------------------------------------------------------------
    async def _start(self) -> None:
        self._changing = asyncio.Lock()
        self._wake = asyncio.Event()
        await super()._start()
        for name in await slurm.cancel_leftovers():
            self.events.append((time.time(), "", f"job {name}, left by a cluster whose process died, was cancelled"))
        self._watching = asyncio.ensure_future(self._watch())

    def _update_worker_status(self, op: str, msg: Any) -> None:
        if op == "add":  # it may be gone again before the next query of the queue
            self._nannies.update({info["name"]: info["nanny"] for info in msg["workers"].values() if info["nanny"]})
        # Slurm decides: SpecCluster would cancel a job whose worker is away for lost-worker-timeout, even if its nanny is restarting it
        Cluster._update_worker_status(self, op, msg)
        self._hurry()

    def _hurry(self) -> None:
        """Query the queue more often for a while, because something changes."""
        self._fast_until = time.monotonic() + _FAST_FOR_SECONDS
        self._wake.set()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(min(_FAST_SECONDS, self.settings.poll_seconds))
            if time.monotonic() >= self._fast_until:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), self.settings.poll_seconds)
            self._wake.clear()
            with _logged("the pools could not be compared with Slurm's queue"):
                await self._reconcile()

    async def _reconcile(self) -> None:
        submitted = {name: job for name, job in self.workers.items() if name in self.worker_spec}
        queue = await slurm.squeue()
        self.slurm_answers = queue is not None
        if queue is None:
            return
        self._queue = {job.name: job for job in queue if job.cluster_id == self.cluster_id}
        now = time.monotonic()
        lost = False
        broken = await self._broken(now)
        async with self._changing:
            for name, job in submitted.items():
                if name not in self.worker_spec:
                    continue
                shown = self._queue.get(name)
                if shown is not None:
                    job.job_id, job.unsure = shown.job_id, False  # sbatch may have failed after Slurm accepted the job
                if shown is not None and self._leaves_soon(shown, job.pool):
                    self._leaving.add(name)
                if self._present(name):
                    self._came.add(name)
                    self._pools[job.pool].failed_starts = 0
                if shown is None or not shown.alive:
                    for ws in self._present(name) if shown is None else ():  # a vanished node closes no connection
                        await self.scheduler.remove_worker(ws.address, stimulus_id=f"job-gone-{name}")
                    self._lost(name, job, "Slurm no longer shows it" if shown is None else f"Slurm says it is {shown.state}")
                    lost = True
            broken = {
                name: f"runs on {self._queue[name].node}, but {why}"
                for name, why in broken.items()
                if name in self.workers.keys() - self._retiring
            }
            self._let_go(broken)  # their remaining workers hand over their results
            self._let_go(dict.fromkeys(self._must_leave(now), ""))
            lost = lost or bool(broken)
        self._follow_the_work(now)
        if lost or any(self._is_off(name, pool, now) for name, pool in self._pools.items()):
            await self._to_targets()

    def _follow_the_work(self, now: float) -> None:
        closed = [name for name, pool in self._pools.items() if pool.problem]
        targets = self._scaler.targets(self.scheduler, {name: pool.target for name, pool in self._pools.items()}, closed, now)
        for name, target in targets.items():
            before, self._pools[name].target = self._pools[name].target, target
            if target != before:
                self.events.append((time.time(), name, f"{target} jobs wanted for the current work, {before} before"))

    def _is_off(self, name: str, pool: PoolState, now: float) -> bool:
        """Whether a pool should submit jobs, or can release some."""
        members = set(self._members(name)) - self._leaving - self._retiring.keys()
        if len(members) < pool.target:
            return now >= pool.not_before
        surplus = self._surplus(members, pool)
        return bool(self._spare(surplus) if name in self._scaler else surplus)

    async def _broken(self, now: float) -> dict[str, str]:
        """Running jobs that have lacked workers for too long, with the reason.

        A live nanny restarts its worker and gets minutes for it, since imports can take that long. A job without a nanny does not.
        """
        broken: dict[str, str] = {}
        suspects: dict[str, str] = {}
        complete = (self.workers.keys() & self.worker_spec.keys()) - self._leaving - self._retiring.keys()
        for name in complete:  # in the others, workers leave by themselves, one after the other
            lacking = set(self._workers_of(name)) - {ws.name for ws in self._present(name)}
            if not lacking or name not in self._queue or self._queue[name].state != "RUNNING":
                self._silent_since.pop(name, None)
                continue
            self._wake.set()  # look again soon
            silent = now - self._silent_since.setdefault(name, now)
            if silent > _MISSING_SECONDS:
                broken[name] = f"workers are missing for {_MISSING_SECONDS:.0f} s"
            elif silent > _NANNY_SECONDS:
                suspects |= dict.fromkeys(lacking & set(self._nannies), name)
        answers = await asyncio.gather(*(_listens(self._nannies[worker]) for worker in suspects))
        gone = {name: worker for (worker, name), alive in zip(suspects.items(), answers) if not alive}
        return broken | {name: f"worker {worker} and its nanny are gone" for name, worker in gone.items()}

    def _lost(self, name: str, job: Any, why: str) -> None:
        pool, now = self._pools[job.pool], time.monotonic()
        ending = name in self._leaving or self._retiring.get(name) == ""
        unsure, came = job.unsure, name in self._came
        if self._retiring.get(name) == "":
            why = "has ended as requested"
        self._forget(name, "Slurm never accepted it" if unsure else why)
        if unsure:  # the controller was down: retry a little later
            pool.not_before = now + 5.0
            return
        if ending:
            return
        if not pool.count_loss(now, came=came, per_hour=self.settings.replacements_per_hour):
            pool.problem = f"{FAILED_STARTS} jobs in a row ended before a worker connected. The last log says: {job.last_words()}"
            pool.target = len(set(self._members(job.pool)) - self._retiring.keys())

    # --- the end -----------------------------------------------------------------------------------------------------------------
    async def _close(self) -> None:
        watching, self._watching = self._watching, None
        known = {job.job_id for job in self.workers.values() if job.job_id}
        if watching is not None:
            await _end({watching, *self._retirements})
            await slurm.scancel(sorted(known))  # one call for all
            for job in self.workers.values():
                await ProcessInterface.close(job)
        await super()._close()
        if watching is not None:
            self.jobs_left = await slurm.cancel_until_gone(self.cluster_id, known, _CLOSE_SECONDS)
        if self.jobs_left:
            jobs = ", ".join(self.jobs_left)
            logger.warning(f"Slurm may still have jobs of this cluster: {jobs}. They end within a minute when they find no scheduler.")


async def _end(tasks: set[asyncio.Task[Any]]) -> None:
    while tasks:  # repeated, since wait_for() in Python 3.11 loses a cancellation that arrives with its result
        for task in tasks:
            task.cancel()
        _, tasks = await asyncio.wait(tasks, timeout=1)


@contextlib.contextmanager
def _logged(what: str) -> Iterator[None]:
    try:
        yield
    except Exception:
        logger.exception(what)


async def _listens(address: str) -> bool:
    """Whether a process listens at an address; no answer in time counts as yes."""
    host, port = address.split("://")[-1].rsplit(":", 1)
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(host.strip("[]"), int(port)), 3)
        writer.close()
    except TimeoutError:
        return True
    except OSError:
        return False
    return True
