"""Shared by the lane benchmarks: a scheduler and workers in separate processes, and usage by the workers' clocks.

Worker processes live on from one scheduler to the next, because starting them takes longer than most measurements. As a script this
module is such a process: ``python benchmarks/_lanes.py scheduler|worker`` (started by the functions below).
"""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dask
from distributed import Client, Future, Scheduler, Worker, wait
from distributed.diagnostics.plugin import SchedulerPlugin

OUT = Path(__file__).parent / "out"
WORKERS, THREADS = 2, 8
PLAIN, FAIR = "plain", "lanes"
KINDS = (PLAIN, FAIR)
OWNER = "service"

# tasks that sleep need no memory manager, and a busy machine no warnings; profiling threads would blur the cost of scheduling
dask.config.set(
    {
        "distributed.admin.tick.limit": "60s",
        "distributed.worker.memory.terminate": False,
        "distributed.worker.memory.pause": False,
        "distributed.worker.memory.spill": False,
        "distributed.worker.memory.target": False,
        "distributed.worker.profile.enabled": False,
    }
)


@dataclass(frozen=True)
class Ran:
    """A task as its worker timed it."""

    name: str
    """of the client that submitted it"""
    start: float
    stop: float
    """seconds since the epoch"""


class Recorder(SchedulerPlugin):
    """Notes the client of every task and the start and stop that its worker measured; knows nothing of lanes."""

    name = "recorder"

    def __init__(self) -> None:
        self.clients: dict[Any, str] = {}
        self.log: list[tuple[str, float, float]] = []

    def update_graph(self, scheduler: Scheduler, *, client: str, tasks: list[Any], **kwargs: Any) -> None:
        """Note whose tasks these are: a client is called ``Client-NAME-UUID``."""
        name = client.split("-", 1)[1][:-37]
        for key in tasks:
            self.clients.setdefault(key, name)

    def transition(self, key: Any, start: str, finish: str, *args: Any, startstops: Any = None, **kwargs: Any) -> None:
        """Note what a worker measured."""
        if startstops and finish in ("memory", "erred"):
            for phase in startstops:
                if phase["action"] == "compute":
                    self.log.append((self.clients.get(key, ""), phase["start"], phase["stop"]))


class Workers:
    """Worker processes of ``THREADS`` threads, joined to one scheduler after the other."""

    def __init__(self, count: int = WORKERS, threads: int = THREADS) -> None:
        self.count, self.threads = count, threads
        self._processes: list[subprocess.Popen[str]] = []

    def join(
        self, address: str, resources: dict[str, float] | None = None, modules: Iterable[str] = (), certificates: str | None = None
    ) -> None:
        """Let all workers join a scheduler; processes that were killed are replaced."""
        self._processes = [p for p in self._processes if p.poll() is None]
        while len(self._processes) < self.count:
            self._processes.append(_start("worker"))
        told = {"address": address, "threads": self.threads, "resources": resources, "modules": list(modules)}
        self._tell({**told, "certificates": certificates})

    def leave(self) -> None:
        """Let them leave the scheduler."""
        self._tell(None)

    def kill(self, index: int) -> None:
        """Kill -9 one of them."""
        self._processes[index].kill()
        self._processes[index].wait()

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.wait()

    def _tell(self, message: Any) -> None:
        alive = [p for p in self._processes if p.poll() is None]
        for process in alive:
            assert process.stdin is not None
            process.stdin.write(json.dumps(message) + "\n")
            process.stdin.flush()
        for process in alive:
            assert process.stdout is not None
            while (line := process.stdout.readline()).strip() != "done":
                if not line:
                    raise RuntimeError("a worker process ended by itself")


@dataclass
class Cluster:
    """A scheduler with workers and one client for every name; ``owner`` asks the scheduler where those may not."""

    clients: dict[str, Client]
    workers: Workers
    owner: Client | None = None

    def ask(self, question: Callable[..., Any], *args: Any) -> Any:
        """Answer of a function that runs in the scheduler process as ``question(*args, dask_scheduler=scheduler)``."""
        return (self.owner or next(iter(self.clients.values()))).run_on_scheduler(question, *args)

    def log(self) -> list[Ran]:
        """All tasks that have ended."""
        return [Ran(*entry) for entry in self.ask(_log)]


@contextmanager
def cluster(
    workers: Workers,
    kind: str,
    names: Iterable[str],
    *,
    resources: dict[str, float] | None = None,
    record: bool = True,
    modules: Iterable[str] = (),
    certificates: str | None = None,
    **options: Any,
) -> Iterator[Cluster]:
    """A fresh scheduler, plain or with lanes (``options`` are those of `FairShareScheduler`), with workers and a client a name.

    With the folder of an authority in ``certificates`` both speak TLS, and the one with lanes is guarded: clients ``LANE/PERSON`` have
    certificates.

    ``modules`` are imported in advance: a scheduler that unpickles its first dataframe stands still for seconds.
    """
    process = _start(
        "scheduler",
        json.dumps({"kind": kind, "record": record, "modules": list(modules), "options": options, "certificates": certificates}),
    )
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        workers.join(address, resources, modules, certificates)
        clients = {name: Client(address, name=name, set_as_default=False, **secure(certificates, name.split("/")[-1])) for name in names}
        owner = Client(address, set_as_default=False, **secure(certificates, OWNER)) if certificates else None
        next(iter(clients.values())).wait_for_workers(workers.count)
        try:
            yield Cluster(clients, workers, owner)
        finally:
            for client in [*clients.values(), *([owner] if owner else [])]:
                client.close(timeout=60)  # twenty thousand futures take their time on a busy machine
            workers.leave()
    finally:
        process.kill()
        process.wait()


def in_turn(number: int) -> tuple[str, ...]:
    """Both kinds, the other one first each time: a place in the order may be worth something."""
    return KINDS if number % 2 == 0 else KINDS[::-1]


def shares(log: list[Ran], begin: float, end: float, names: Iterable[str]) -> dict[str, float]:
    """Percent of the workers' time from ``begin`` to ``end`` that each name had."""
    used = dict.fromkeys(names, 0.0)
    for ran in log:
        if ran.name in used:
            used[ran.name] += max(0.0, min(ran.stop, end) - max(ran.start, begin))
    total = sum(used.values()) or 1.0
    return {name: 100 * seconds / total for name, seconds in used.items()}


def work(seconds: float, *inputs: Any) -> None:
    """Occupy a slot."""
    time.sleep(seconds)


def roots(client: Client, count: int, seconds: float, **options: Any) -> list[Future]:
    """Tasks without inputs, on the scheduler when this returns."""
    futures = client.map(work, [seconds] * count, pure=False, **options)
    until_there(client, futures[-1])
    return futures


def in_memory(client: Client, count: int, seconds: float) -> list[Future]:
    """Tasks with an input each that lies on a worker already, on the scheduler when this returns."""
    inputs = client.scatter(list(range(count)), hash=False)
    futures = client.map(work, [seconds] * count, inputs, pure=False)
    until_there(client, futures[-1])
    return futures


def finish(client: Client, futures: list[Future], timeout: float | None = None) -> None:
    """Wait for tasks; TimeoutError after ``timeout`` seconds."""
    with client.as_current():  # none of several clients is the default one, and wait() asks for it
        wait(futures, timeout=timeout)


def until_there(client: Client, future: Future) -> None:
    """Wait until the scheduler knows a task: graphs are sent behind the caller's back."""
    while not client.run_on_scheduler(_knows, future.key):
        time.sleep(0.05)


def _knows(key: Any, dask_scheduler: Scheduler) -> bool:
    return key in dask_scheduler.tasks


def _log(dask_scheduler: Scheduler) -> list[tuple[str, float, float]]:
    recorder = dask_scheduler.plugins["recorder"]
    return list(recorder.log)


@contextmanager
def counted(pid: int) -> Iterator[dict[str, float]]:
    """``instructions`` of a process meanwhile, there afterwards; nothing where they cannot be counted."""
    found: dict[str, float] = {}
    if shutil.which("perf") is None:
        yield found
        return
    # "-x,": one line of comma-separated values, the count first
    perf = subprocess.Popen(["perf", "stat", "-x,", "-e", "instructions", "-p", str(pid)], stderr=subprocess.PIPE, text=True)
    try:
        time.sleep(0.5)
        yield found
    finally:
        perf.send_signal(signal.SIGINT)
        first = perf.communicate()[1].split(",")[0]
        if first.isdigit():
            found["instructions"] = float(first)


def _start(*arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", __file__, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )


def secure(certificates: str | None, name: str) -> dict[str, Any]:
    """The certificate of a name, if there is an authority."""
    if certificates is None:
        return {}
    from cryodask.cluster.access import tls

    return {"security": tls.security(certificates, name)}


async def _be_a_scheduler(kind: str, record: bool, modules: list[str], options: dict[str, Any], certificates: str | None) -> None:
    for module in modules:
        importlib.import_module(module)
    where = {"dashboard": False, "host": "127.0.0.1", "port": 0, **secure(certificates, "scheduler")}
    where |= {"protocol": "tls"} if certificates else {}
    if kind == PLAIN:
        scheduler = Scheduler(**where)
    elif certificates:
        from cryodask.cluster.guard import GuardedScheduler

        scheduler = GuardedScheduler(**where, owner=OWNER, users=f"{certificates}/people.json", **options)
    else:
        from cryodask.cluster.fairshare import FairShareScheduler

        scheduler = FairShareScheduler(**where, **options)
    await scheduler
    if record:
        from _lanes import Recorder as Imported  # as clients name it, not as __main__

        scheduler.add_plugin(Imported())
    print(scheduler.address, flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)  # ends with the process that started us


async def _be_a_worker() -> None:
    from cryodask.cluster.access.versions import RELEASE

    loop, worker = asyncio.get_running_loop(), None
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        if worker is not None:
            await worker.close(nanny=False)
            worker = None
        message = json.loads(line)
        if message is not None:
            for module in message["modules"]:
                importlib.import_module(module)
            worker = Worker(
                message["address"], nthreads=message["threads"], resources=message["resources"], dashboard=False, host="127.0.0.1",
                memory_limit="4GB", **secure(message["certificates"], "worker"),
            )  # fmt: skip
            # as cryodask's own workers do; to others every task carries the function that opens it, 3 kB
            worker.startup_information = {**worker.startup_information, "cryodask": lambda _: RELEASE}
            await worker
        print("done", flush=True)


if __name__ == "__main__":
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    if sys.argv[1] == "worker":
        asyncio.run(_be_a_worker())
    else:
        asyncio.run(_be_a_scheduler(**json.loads(sys.argv[2])))
