"""The service process: ``python -m cryodask.cluster.service.serving FOLDER [ID]``, started by ``service.py``.

It owns the scheduler and the worker jobs, answers requests of the owner and invited users, and hands over to a successor before Slurm ends
it, or on SIGUSR1. A successor (``ID``: the cluster that it follows) starts its scheduler beside the old one and takes over when the
running tasks of the old one have finished, or it has died.
"""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import sys
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import dask

from cryodask.cluster.access import tls
from cryodask.cluster.access.peers import asking
from cryodask.cluster.local import local_cluster, local_environment
from cryodask.cluster.service import batch
from cryodask.cluster.service.handover import HandingOver
from cryodask.cluster.service.leftovers import Leftovers, cancel_leftovers
from cryodask.cluster.service.whereabouts import Whereabouts, encrypted, owner_of, settings_of
from cryodask.cluster.settings import SlurmSettings
from cryodask.cluster.slurm import slurm
from cryodask.cluster.slurm.pools import PoolCluster
from cryodask.errors import ClusterError

logger = logging.getLogger("cryodask.cluster.service.service")

_SAMPLE_SECONDS = 2.0
_SHARE_SECONDS = 300.0


class Serving(HandingOver):
    """A service process from start to end."""

    def __init__(self, folder: Path, follows: str = "") -> None:
        super().__init__(folder, settings_of(folder), owner_of(folder), follows)
        self._running: deque[dict[str, int]] = deque(maxlen=int(_SHARE_SECONDS / _SAMPLE_SECONDS))
        self._drain_seconds = 0.0
        self._stopped = False
        certificates = folder / "authority" if encrypted(self.settings) else None
        if isinstance(self.settings, SlurmSettings):
            self.cluster = PoolCluster(
                self.settings, certificates=certificates, owner=self.owner if certificates else None, asynchronous=True
            )
            self.id = self.cluster.cluster_id
        else:
            self.cluster = local_cluster(self.settings, asynchronous=True)
            self.id = slurm.new_cluster_id()

    # --- start -------------------------------------------------------------------------------------------------------------------
    async def run(self) -> None:
        """Run the service to its end; ClusterError if it cannot start."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGUSR1, self.hand_over_soon)
        self.ends = await self._walltime_ends()
        before = await self._waited_for() if self.follows else Whereabouts.read(self.folder / "scheduler.json")
        try:
            # a successor's job may have been pending for longer than it was needed
            if self.follows and (before is None or not await self._wait_for_port(before)):
                return
            await self._serve(before)
        finally:
            self._forget_own()
            self._say("ended")

    async def _serve(self, before: Whereabouts | None) -> None:
        await self.cluster
        sampling = asyncio.ensure_future(self._sample())
        try:
            self._listen_to_requests()
            for job in await cancel_leftovers(self.folder) if isinstance(self.settings, SlurmSettings) else ():
                self._say(f"job {job}, left when this service ended, was cancelled")
            await self._first_jobs()
            for number in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(number, self._over.set)
            if self.follows and not await self._my_turn():
                return
            self._attach_accounting()
            await self._take_over(before)
            await self._over.wait()
            await self._leave()
        finally:
            sampling.cancel()
            await self.cluster.close()
            if left := getattr(self.cluster, "jobs_left", []):
                Leftovers(self.id, left).write(self.folder)

    async def _first_jobs(self) -> None:
        scaled = json.loads((self.folder / "scaled.json").read_text()) if self.follows else {}
        if not isinstance(self.settings, SlurmSettings):
            if scaled:
                self.cluster.scale(scaled["workers"])
            return
        try:
            await self.cluster.scale_pool(**{name: scaled.get(name, pool.wanted) for name, pool in self.settings.pools.items()})
        except ClusterError as refused:
            if not self.cluster.worker_spec and any(pool.wanted for pool in self.settings.pools.values()):
                raise
            self._say(str(refused))

    def _attach_accounting(self) -> None:
        from cryodask.cluster.accounting.accounting import Accounting

        self._accounting = Accounting.attach(self.cluster.scheduler, self.folder)

    # --- what is asked -----------------------------------------------------------------------------------------------------------
    def _listen_to_requests(self) -> None:
        for function in (self.cluster_status, self.cluster_usage, self.cluster_scale, self.cluster_stop, self.cluster_hand_over):
            self.cluster.scheduler.handlers[function.__name__] = function

    async def cluster_status(self) -> dict[str, Any]:
        """See ``Service.status``."""
        scheduler, slurm_too = self.cluster.scheduler, isinstance(self.settings, SlurmSettings)
        here = self._whereabouts(scheduler.address)
        jobs = [
            {"id": j.job_id, "job": j.name, "state": j.state, "reason": j.reason, "node": j.node, "seconds_left": j.seconds_left}
            for j in (self.cluster._queue.values() if slurm_too else ())
        ]
        pools = {name: asdict(status) for name, status in (await self.cluster.pool_status()).items()} if slurm_too else {}
        events = [*self.events, *((when, text) for when, _, text in (self.cluster.events if slurm_too else ()))]
        return {
            **{key: value for key, value in asdict(here).items() if key != "id"},
            "dashboard": "" if asking() else here.dashboard,  # its address is a secret of the owner
            "state": self.state,
            "hand_over": self.ends - batch.margin_seconds(self.service) if self.ends else None,
            "workers": len(scheduler.workers),
            "threads": sum(ws.nthreads for ws in scheduler.workers.values()),
            "pools": pools,
            "jobs": jobs,
            "lanes": self._lanes(),
            "missing": await self.cluster.what_is_missing() if slurm_too else "",
            "events": [list(event) for event in sorted(events)[-10:]],
        }

    def _lanes(self) -> dict[str, dict[str, Any]]:
        used: Counter[str] = Counter()
        for sample in self._running:
            used.update(sample)
        total = used.total()
        now = self.cluster.scheduler.lanes_now()
        return {lane: {**seen, "share": used[lane] / total if total else 0.0} for lane, seen in now.items()}

    async def _sample(self) -> None:
        while True:
            self._running.append({lane: seen["running"] for lane, seen in self.cluster.scheduler.lanes_now().items() if seen["running"]})
            await asyncio.sleep(_SAMPLE_SECONDS)

    async def cluster_usage(self, since: float | None = None, by: Any = (), user: str | None = None) -> list[dict[str, Any]]:
        """See ``Service.usage``; for invited users the guard sets ``user``."""
        by = tuple(by) if user is None or "user" in by else (*by, "user")
        rows = self._accounting.usage(since, by) if self._accounting else []
        return [row for row in rows if user is None or row["user"] == user]

    async def cluster_scale(self, jobs: Mapping[str, int]) -> None:
        """See ``Service.scale``."""
        if isinstance(self.settings, SlurmSettings):
            await self.cluster.scale_pool(**jobs)
        elif set(jobs) != {"workers"} or jobs["workers"] < 0:
            raise ClusterError(f"Cannot scale {dict(jobs)}.", "this cluster has local workers and no pools", "use  workers=4")
        else:
            leaving = list(self.cluster.worker_spec)[jobs["workers"] :]
            # scale() itself passes names where addresses are expected, which loses all results
            await self.cluster.scheduler.retire_workers(names=leaving, close_workers=True, remove=True)
            self.cluster.scale(jobs["workers"])
        self._say(f"scaled: {', '.join(f'{name}={count}' for name, count in jobs.items())}")

    async def cluster_stop(self, drain_seconds: float = 0.0) -> None:
        """See ``Service.stop``."""
        self._drain_seconds, self._stopped = drain_seconds, True
        self._over.set()

    async def cluster_hand_over(self) -> None:
        """See ``Service.hand_over``."""
        self.hand_over_soon()

    # --- the end -----------------------------------------------------------------------------------------------------------------
    async def _leave(self) -> None:
        """End the service; a starting successor is kept only if Slurm ends this process rather than the owner."""
        if self.state == "handed over":
            return
        if self._handing is not None:
            self._handing.cancel()
        if self._launched is not None and not self._stopped:
            self._say(f"killed before the hand-over was complete; {self._launched.short} takes over by itself")
            return
        await self._end_successors()
        self._tell_clients(f"The cluster {self.name} ends. Results that are only in its memory are lost; committed results stay.")
        await self._drain(self._drain_seconds)
        for file in ("scheduler.json", "successor.json", "launched.json"):
            (self.folder / file).unlink(missing_ok=True)


def main(arguments: list[str]) -> None:
    """Serve until the end; an error that a user can fix is left in the folder for the waiting command."""
    folder = Path(arguments[0])
    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s", level=logging.WARNING)
    dask.config.set(local_environment())

    async def serve() -> None:
        await Serving(folder, *arguments[1:]).run()

    try:
        asyncio.run(serve())
    except ClusterError as error:
        tls.write_secret(folder / "failed.json", json.dumps(error.args))
        logger.error(str(error))
        sys.exit(1)
    except OSError as error:  # for example a full disk
        logger.error(f"{type(error).__name__}: {error}")
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
