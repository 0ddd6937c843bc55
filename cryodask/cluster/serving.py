"""The process of a service: ``python -m cryodask.cluster.serving FOLDER [ID]``, started by ``service.py``.

It owns the scheduler and the workers' jobs, answers what the owner and those invited ask, and hands over to a successor before Slurm ends
it, or when it is sent SIGUSR1. A successor (``ID`` is the cluster that it follows) starts its scheduler beside the old one and takes over
when that one has let its running tasks finish, or has died.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import pickle
import signal
import socket
import sys
import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import dask

from cryodask.cluster import batch, slurm, tls
from cryodask.cluster.connect import local_cluster, local_environment
from cryodask.cluster.pools import PoolCluster
from cryodask.cluster.settings import ServiceSettings, SlurmSettings
from cryodask.cluster.whereabouts import Whereabouts, address_file, encrypted, owner_of, settings_of
from cryodask.errors import ClusterError

logger = logging.getLogger("cryodask.cluster.service")

_LOOK_SECONDS = 0.2
_SAMPLE_SECONDS = 2.0
_SHARE_SECONDS = 300.0
_AGAIN_SECONDS = 60.0
# without a walltime there is no hurry, but no reason to wait for ever either
_PATIENCE_SECONDS = 600.0
_SPARE_SECONDS = 20.0


class Serving:
    """A service from its start to its end."""

    def __init__(self, folder: Path, follows: str = "") -> None:
        self.folder, self.name, self.follows = folder, folder.name, follows
        self.settings, self.owner = settings_of(folder), owner_of(folder)
        self.service = self.settings.service or ServiceSettings()
        self.state, self.since = "running", time.time()
        self.slurm_job = os.environ.get("SLURM_JOB_ID") if self.service.where == "slurm" else None
        self.ends = self._walltime_ends()
        self.events: deque[tuple[float, str]] = deque(maxlen=200)
        self._running: deque[dict[str, int]] = deque(maxlen=int(_SHARE_SECONDS / _SAMPLE_SECONDS))
        self._over = asyncio.Event()
        self._drain_seconds = 0.0
        self._handing: asyncio.Task[None] | None = None
        self._accounting: Any = None
        certificates = folder / "authority" if encrypted(self.settings) else None
        self.cluster: Any
        if isinstance(self.settings, SlurmSettings):
            self.cluster = PoolCluster(
                self.settings, certificates=certificates, owner=self.owner if certificates else None, asynchronous=True
            )
            self.id = self.cluster.cluster_id
        else:
            self.cluster = local_cluster(self.settings, asynchronous=True)
            self.id = slurm.new_cluster_id()

    def _walltime_ends(self) -> float | None:
        if self.slurm_job is None or self.service.walltime is None:
            return None
        return self.since + slurm.walltime_seconds(self.service.walltime)

    # --- start -------------------------------------------------------------------------------------------------------------------
    async def run(self) -> None:
        """From the start to the end; ClusterError if it cannot start."""
        before = Whereabouts.read(self.folder / "scheduler.json")
        if self.follows and before is not None and self._would_collide(before):
            self._whereabouts("").write(self.folder / "successor.json")
            await self._wait_for_port_of(before)
        await self.cluster
        sampling = asyncio.ensure_future(self._sample())
        try:
            self._listen_to_requests()
            await self._first_jobs()
            loop = asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self._over.set)
            loop.add_signal_handler(signal.SIGUSR1, self.hand_over_soon)
            if self.follows and not await self._my_turn():
                return
            await self._take_over(before)
            await self._over.wait()
            await self._leave()
        finally:
            sampling.cancel()
            await self.cluster.close()
            self._say("ended")

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

    def _whereabouts(self, address: str) -> Whereabouts:
        return Whereabouts(
            address=address, cluster=self.name, id=self.id, host=socket.gethostname().split(".")[0], pid=os.getpid(), since=self.since,
            slurm_job=self.slurm_job, owner=self.owner, dashboard=self.cluster.dashboard_link if address else "",
        )  # fmt: skip

    async def _take_over(self, before: Whereabouts | None) -> None:
        """From now on this is the service of that name."""
        if before is not None and before.id != self.id and not await asyncio.to_thread(before.lives):
            for job in await slurm.cancel_of(before.id) if isinstance(self.settings, SlurmSettings) else ():
                self._say(f"job {job}, left by the service that died: cancelled")
        self.state = "running"
        here = self._whereabouts(self.cluster.scheduler.address)
        self._attach_accounting()
        here.write(self.folder / "scheduler.json")
        (self.folder / "successor.json").unlink(missing_ok=True)
        self._publish_address(here.address)
        self._say(f"runs at {here.address}, dashboard {here.dashboard}")

    def _publish_address(self, address: str) -> None:
        target = address_file(self.folder, self.settings)
        part = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            if not target.parent.exists():
                target.parent.mkdir(parents=True)
                target.parent.chmod(0o755)
            part.write_text(json.dumps({"cluster": self.name, "address": address}))
            part.chmod(0o644)
            part.rename(target)
        except OSError as error:
            self._say(f"{target} cannot be written, so those who are invited will not find a new address: {error}")

    def _attach_accounting(self) -> None:
        from cryodask.cluster.accounting import Accounting

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
        """See ``Service.usage``; the guard puts in the ``user`` for those who are invited."""
        by = tuple(by) if user is None or "user" in by else (*by, "user")
        rows = self._accounting.usage(since, by) if self._accounting else []
        return [row for row in rows if user is None or row["user"] == user]

    async def cluster_scale(self, jobs: Mapping[str, int]) -> None:
        """See ``Service.scale``."""
        if isinstance(self.settings, SlurmSettings):
            await self.cluster.scale_pool(**jobs)
        elif set(jobs) != {"workers"} or jobs["workers"] < 0:
            raise ClusterError(f"Cannot scale {dict(jobs)}.", "this cluster has workers on one machine, no pools", "give  workers=4")
        else:
            leaving = list(self.cluster.worker_spec)[jobs["workers"] :]
            # scale() of itself passes names where addresses are expected, and all results there are lost
            await self.cluster.scheduler.retire_workers(names=leaving, close_workers=True, remove=True)
            self.cluster.scale(jobs["workers"])
        self._say(f"scaled: {', '.join(f'{name}={count}' for name, count in jobs.items())}")

    async def cluster_stop(self, drain_seconds: float = 0.0) -> None:
        """See ``Service.stop``."""
        self._drain_seconds = drain_seconds
        self._over.set()

    async def cluster_hand_over(self) -> None:
        """See ``Service.hand_over``."""
        self.hand_over_soon()

    # --- the end -----------------------------------------------------------------------------------------------------------------
    def _say(self, text: str) -> None:
        self.events.append((time.time(), text))
        logger.warning(text)

    def _tell_clients(self, text: str) -> None:
        event = {"message": pickle.dumps(text), "category": pickle.dumps(UserWarning)}
        self.cluster.scheduler.log_event("warn", event)

    async def _drain(self, seconds: float) -> None:
        """Send nothing more to workers, and wait for what they run."""
        scheduler, deadline = self.cluster.scheduler, time.monotonic() + seconds
        self.state = "draining"
        scheduler.drain()
        while any(ws.processing for ws in scheduler.workers.values()) and time.monotonic() < deadline:
            await asyncio.sleep(_LOOK_SECONDS)

    async def _leave(self) -> None:
        """End without a successor."""
        if self._handing is not None and not self._handing.done():
            self._handing.cancel()
            if (launched := batch.Launched.read(self.folder)) is not None:
                await asyncio.to_thread(launched.end)
        if self.state == "handed over":
            return
        self._tell_clients(f"The cluster {self.name} ends. Results that are only in its memory go with it; what is committed stays.")
        await self._drain(self._drain_seconds)
        for file in ("scheduler.json", "successor.json", "launched.json"):
            (self.folder / file).unlink(missing_ok=True)

    def hand_over_soon(self) -> None:
        """Begin to hand over; asked for twice it is begun once."""
        if self._handing is None or self._handing.done():
            self._handing = asyncio.ensure_future(self._hand_over())

    async def _hand_over(self) -> None:
        latest = (self.ends - _SPARE_SECONDS if self.ends else time.time() + 2 * _PATIENCE_SECONDS) - time.time()
        drain_from = time.monotonic() + 2 * latest / 3  # a third of what is left belongs to the tasks that run
        self.state = "handing over"
        tls.write_secret(self.folder / "scaled.json", json.dumps(await self._targets()))
        successor = await self._successor(drain_from)
        if successor is None and self.ends is None:
            self._say("no successor came, so this service goes on")
            self.state = "running"
            return
        following = "is ready" if successor else "waits in the queue"
        self._tell_clients(
            f"The cluster {self.name} ends when the tasks that run now have finished. Its successor {following}: connect again, under the"
            " same name. Results that are only in memory are lost; a run that is started again goes on where it was."
        )
        await self._drain(latest / 3)
        if successor is not None and successor.address:
            os.replace(self.folder / "successor.json", self.folder / "scheduler.json")
            self._publish_address(successor.address)
        self.state = "handed over"
        self._over.set()

    async def _targets(self) -> dict[str, int]:
        """What a successor asks for, if not what the settings say."""
        if isinstance(self.settings, SlurmSettings):
            return {name: now.target for name, now in (await self.cluster.pool_status()).items() if not now.problem}
        return {"workers": len(self.cluster.worker_spec)}

    async def _successor(self, deadline: float) -> Whereabouts | None:
        """The successor, when it is ready to take over; None if it is not by then."""
        path = self.folder / "successor.json"
        path.unlink(missing_ok=True)
        launched: batch.Launched | None = None
        while time.monotonic() < deadline:
            if launched is None:
                try:
                    launched = await asyncio.to_thread(batch.launch, self.folder, self.settings, after=self.id)
                    launched.write(self.folder)
                    self._say(f"hands over to {launched}")
                except ClusterError as refused:
                    self._say(str(refused))
                    if self.ends is None:
                        return None
                    await asyncio.sleep(min(_AGAIN_SECONDS, max(0.0, deadline - time.monotonic())))
                    continue
            found = Whereabouts.read(path)
            if found is not None and found.id != self.id:
                return found
            if await asyncio.to_thread(launched.ended):
                self._say(f"{launched} ended before it could take over: {batch.last_words(launched.log)}")
                if self.ends is None:
                    return None
                launched = None
                await asyncio.sleep(min(_AGAIN_SECONDS, max(0.0, deadline - time.monotonic())))
                continue
            await asyncio.sleep(_LOOK_SECONDS if launched.job is None else 5 * _LOOK_SECONDS)
        return None

    # --- as a successor ----------------------------------------------------------------------------------------------------------
    def _would_collide(self, before: Whereabouts) -> bool:
        port = self.settings.port if isinstance(self.settings, SlurmSettings) else 0
        return bool(port) and before.host == socket.gethostname().split(".")[0]

    async def _wait_for_port_of(self, before: Whereabouts) -> None:
        host, port = before.address.split("://")[1].rsplit(":", 1)
        while await asyncio.to_thread(before.lives) and not _is_free(host, int(port)):
            await asyncio.sleep(_LOOK_SECONDS)

    async def _my_turn(self) -> bool:
        """Stand ready until the one before hands over or dies; False if it was stopped meanwhile."""
        self._whereabouts(self.cluster.scheduler.address).write(self.folder / "successor.json")
        looks = 0
        while not self._over.is_set():
            named = Whereabouts.read(self.folder / "scheduler.json")
            if named is None:
                return False
            if named.id == self.id:
                return True
            looks += 1
            if looks % 10 == 0 and not await asyncio.to_thread(named.lives):
                return True
            await asyncio.sleep(_LOOK_SECONDS)
        return False


def _is_free(host: str, port: int) -> bool:
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((host, port))
        except OSError:
            return False
    return True


def main(arguments: list[str]) -> None:
    """Serve until the end; an error that a user can mend is left in the folder for the command that waits."""
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
    except OSError as error:  # a full disk, say
        logger.error(f"{type(error).__name__}: {error}")
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
