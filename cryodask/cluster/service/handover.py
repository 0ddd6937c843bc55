"""The hand-over between service processes: a successor starts beside the old one, and takes over when that has finished or died."""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import os
import pickle
import socket
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

from cryodask.cluster.access import tls
from cryodask.cluster.service import batch
from cryodask.cluster.service.whereabouts import Whereabouts, address_file, make_passable
from cryodask.cluster.settings import LocalSettings, ServiceSettings, SlurmSettings
from cryodask.cluster.slurm import slurm
from cryodask.errors import ClusterError

logger = logging.getLogger("cryodask.cluster.service.service")

_LOOK_SECONDS = 0.2
_LIFE_LOOKS = 25
# on a network file system a file that is being replaced may briefly appear missing
_ABSENT_LOOKS = 10
_AGAIN_SECONDS = 60.0
# without a walltime there is no hurry, but also no reason to wait forever
_PATIENCE_SECONDS = 600.0
_SPARE_SECONDS = 20.0


class HandingOver:
    """The part of a ``Serving`` that deals with its predecessor and its successor."""

    cluster: Any

    def __init__(self, folder: Path, settings: LocalSettings | SlurmSettings, owner: str, follows: str) -> None:
        self.folder, self.name, self.settings, self.owner, self.follows = folder, folder.name, settings, owner, follows
        self.service = settings.service or ServiceSettings()
        self.slurm_job = os.environ.get("SLURM_JOB_ID") if self.service.where == "slurm" else None
        self.id = ""
        self.state, self.since = "stands ready" if follows else "starting", time.time()
        self.ends: float | None = None
        self.events: deque[tuple[float, str]] = deque(maxlen=200)
        self._over = asyncio.Event()
        self._handing: asyncio.Task[None] | None = None
        self._launched: batch.Launched | None = None
        self._accounting: Any = None

    def _say(self, text: str) -> None:
        self.events.append((time.time(), text))
        logger.warning(text)

    def _tell_clients(self, text: str) -> None:
        event = {"message": pickle.dumps(text), "category": pickle.dumps(UserWarning)}
        self.cluster.scheduler.log_event("warn", event)

    def _whereabouts(self, address: str) -> Whereabouts:
        return Whereabouts(
            address=address, cluster=self.name, id=self.id, host=socket.gethostname().split(".")[0], pid=os.getpid(), since=self.since,
            slurm_job=self.slurm_job, owner=self.owner, dashboard=self.cluster.dashboard_link if address else "",
        )  # fmt: skip

    async def _walltime_ends(self) -> float | None:
        """When Slurm ends this process: from its queue, because the limit may have changed, else as of the start of the job."""
        if self.slurm_job is None:
            return None
        shown = next((job for job in await slurm.squeue() or [] if job.job_id == self.slurm_job), None)
        if shown is not None:
            return None if shown.seconds_left is None else time.time() + shown.seconds_left
        if said := os.environ.get("SLURM_JOB_END_TIME"):
            return float(said)
        return self.ends or (self.since + slurm.walltime_seconds(self.service.walltime) if self.service.walltime else None)

    async def _drain(self, seconds: float, successor: Whereabouts | None = None) -> None:
        """Send nothing more to workers, and wait for running tasks, as long as the successor is alive."""
        scheduler, deadline = self.cluster.scheduler, time.monotonic() + seconds
        self.state = "draining"
        scheduler.drain()
        looks = 0
        while any(ws.processing for ws in scheduler.workers.values()) and time.monotonic() < deadline:
            await asyncio.sleep(_LOOK_SECONDS)
            looks += 1
            if successor is not None and looks % _LIFE_LOOKS == 0 and await _is_dead(successor):
                return

    # --- to a successor ----------------------------------------------------------------------------------------------------------
    def hand_over_soon(self) -> None:
        """Start the hand-over, once; a process that has not taken over yet has nothing to hand over."""
        if self.state not in ("starting", "stands ready") and (self._handing is None or self._handing.done()):
            self._handing = asyncio.ensure_future(self._hand_over())

    async def _hand_over(self) -> None:
        """Retry until a successor has taken over or no time is left; without a walltime, try once."""
        self.ends = await self._walltime_ends()
        latest = self.ends - _SPARE_SECONDS if self.ends else time.time() + 2 * _PATIENCE_SECONDS
        while True:
            try:
                if await self._handed_over(latest):
                    return
            except Exception as error:  # this task is never awaited, so an error that is not reported here is lost
                logger.exception("the hand-over failed")
                self._say(f"the hand-over failed: {type(error).__name__}: {error}")
            self.state = "running"
            self.cluster.scheduler.resume_dispatch()
            if self.ends is None:
                await self._end_successors()
                self._say("no successor was ready, so this service continues")
                return
            if time.time() + _AGAIN_SECONDS > latest:
                self._say("no successor is ready, and there is no time left to start one")
                return
            await asyncio.sleep(_AGAIN_SECONDS)

    async def _handed_over(self, latest: float) -> bool:
        """One attempt, until ``latest`` in seconds since 1970; False if there was no successor, or it died before it took over."""
        self.state = "handing over"
        tls.write_secret(self.folder / "scaled.json", json.dumps(await self._targets()))
        # a third of the remaining time is for running tasks
        successor = await self._successor(time.time() + 2 * (latest - time.time()) / 3)
        if successor is None and (self.ends is None or self._launched is None):
            return False
        following = "is ready" if successor else "is pending"
        self._tell_clients(
            f"The cluster {self.name} ends when the running tasks have finished. Its successor {following}: reconnect under the"
            " same name. Results that are only in memory are lost; a restarted run resumes where it was."
        )
        await self._drain(latest - time.time(), successor)
        if successor is not None and await _is_dead(successor):
            self._say("the successor ended before it took over")
            return False
        if self._accounting is not None:
            self._accounting.write()  # the successor reads the journal once, when it takes over
        self._name_as_successor(successor)
        self.state = "handed over"
        self._over.set()
        return True

    def _name_as_successor(self, successor: Whereabouts | None) -> None:
        here, path = self.folder / "scheduler.json", self.folder / "successor.json"
        ready, named = Whereabouts.read(path), Whereabouts.read(here)
        # a late successor, or one that waits for the port, takes over by itself when it sees that this process is gone
        if successor is None or not successor.address or ready is None or ready.id != successor.id:
            return
        if named is not None and named.id == self.id:
            os.replace(path, here)
            self._publish_address(successor.address)

    async def _targets(self) -> dict[str, int]:
        """Numbers of jobs for the successor, if not those in the settings."""
        if isinstance(self.settings, SlurmSettings):
            return {name: now.target for name, now in (await self.cluster.pool_status()).items() if not now.problem}
        return {"workers": len(self.cluster.worker_spec)}

    async def _successor(self, deadline: float) -> Whereabouts | None:
        """The successor once it is ready to take over; None if it is not in time."""
        path = self.folder / "successor.json"
        while True:
            again = _LOOK_SECONDS if self.service.where == "process" else 5 * _LOOK_SECONDS
            if self._launched is None:
                try:
                    await self._launch(path)
                except ClusterError as refused:
                    self._say(str(refused))
                    if self.ends is None:
                        return None
                    again = _AGAIN_SECONDS
            else:
                found = Whereabouts.read(path)
                if found is not None and found.id != self.id and not await _is_dead(found):
                    return found
                if await asyncio.to_thread(self._launched.ended):
                    log = self._launched.log
                    self._say(f"{self._launched.short} ended before it could take over: {batch.last_words(log)}")
                    self._launched = None
                    if self.ends is None:
                        return None
                    again = _AGAIN_SECONDS
            if time.time() >= deadline:
                return None
            await asyncio.sleep(min(again, max(0.0, deadline - time.time())))

    async def _launch(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        self._launched = await asyncio.to_thread(batch.launch, self.folder, self.settings, after=self.id)
        self._launched.write(self.folder)
        self._say(f"hands over to {await asyncio.to_thread(str, self._launched)}")

    async def _end_successors(self) -> None:
        """End every successor that was started, including a job that Slurm accepted without reporting it."""
        if self._launched is not None:
            await asyncio.to_thread(self._launched.end)
            self._launched = None
        if self.slurm_job is not None:
            await slurm.cancel_of(batch.follower_mark(self.id))
        with suppress(OSError):
            (self.folder / "successor.json").unlink()

    # --- as a successor ----------------------------------------------------------------------------------------------------------
    async def _named(self) -> Whereabouts | None:
        """The current process of the service; None if the service was stopped."""
        absent = 0
        while absent < _ABSENT_LOOKS and not self._over.is_set():
            try:
                if (found := Whereabouts.read(self.folder / "scheduler.json")) is not None:
                    return found
                absent += 1
            except ClusterError:  # the file cannot be read now, which says nothing about the service
                absent = 0
            await asyncio.sleep(_LOOK_SECONDS)
        return None

    async def _waited_for(self) -> Whereabouts | None:
        """The current process of the service, if this one is still its successor."""
        named = await self._named()
        if named is not None and named.id in (self.id, self.follows):
            return named
        self._say("the service was stopped meanwhile" if named is None else "another successor has taken over")
        return None

    async def _wait_for_port(self, before: Whereabouts) -> bool:
        """Wait until the predecessor has released the common port; False if this process is no longer its successor."""
        port = self.settings.port if isinstance(self.settings, SlurmSettings) else 0
        if not port or before.host != socket.gethostname().split(".")[0]:
            return True
        self._whereabouts("").write(self.folder / "successor.json")
        host = before.address.split("://")[1].rsplit(":", 1)[0]
        while not await _is_dead(before) and not _is_free(host, port):
            if await self._waited_for() is None:
                return False
            await asyncio.sleep(_LOOK_SECONDS)
        return True

    async def _my_turn(self) -> bool:
        """Wait until the predecessor hands over or dies; False if this process is no longer needed."""
        self._whereabouts(self.cluster.scheduler.address).write(self.folder / "successor.json")
        looks = 0
        while not self._over.is_set():
            named = await self._waited_for()
            if named is None or named.id == self.id:
                return named is not None
            looks += 1
            if looks % 10 == 0 and await _is_dead(named):
                return await asyncio.to_thread(self._succeed_the_dead)
            await asyncio.sleep(_LOOK_SECONDS)
        return False

    def _succeed_the_dead(self) -> bool:
        """Replace a dead predecessor; False if another process was faster: a start by hand, or a second successor."""
        with open(os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600), encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            named = Whereabouts.read(self.folder / "scheduler.json")
            if named is None or named.id != self.follows:
                return False
            self._whereabouts(self.cluster.scheduler.address).write(self.folder / "scheduler.json")
        return True

    async def _take_over(self, before: Whereabouts | None) -> None:
        """Become the process of the service."""
        if before is not None and before.id != self.id and await _is_dead(before):
            for job in await slurm.cancel_of(before.id) if isinstance(self.settings, SlurmSettings) else ():
                self._say(f"job {job}, left by the service that died, was cancelled")
        self.state = "running"
        here = self._whereabouts(self.cluster.scheduler.address)
        here.write(self.folder / "scheduler.json")
        (self.folder / "successor.json").unlink(missing_ok=True)
        self._publish_address(here.address)
        self._say(f"runs at {here.address}")
        if self.ends is not None and self.ends - time.time() < min(batch.margin_seconds(self.service), (self.ends - self.since) / 4):
            self.hand_over_soon()  # Slurm sent its signal while this process was waiting, and does not repeat it

    def _forget_own(self) -> None:
        """Stop being ready as a successor."""
        path = self.folder / "successor.json"
        with suppress(OSError, ClusterError):
            if (found := Whereabouts.read(path)) is not None and found.id == self.id:
                path.unlink()

    def _publish_address(self, address: str) -> None:
        target = address_file(self.folder, self.settings)
        part = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            make_passable(target.parent)
            part.write_text(json.dumps({"cluster": self.name, "address": address}))
            part.chmod(0o644)
            part.rename(target)
        except OSError as error:
            self._say(f"{target} cannot be written, so invited users will not find a new address: {error}")


async def _is_dead(one: Whereabouts) -> bool:
    return await asyncio.to_thread(one.life) == "dead"


def _is_free(host: str, port: int) -> bool:
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((host, port))
        except OSError:
            return False
    return True
