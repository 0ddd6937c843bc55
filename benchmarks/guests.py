"""What guests of a shared cluster can do to it: times, and the cost of the guard.

``python benchmarks/guests.py [--quick] [--pairs 3]``

A guarded scheduler and its workers in this process, over TLS on loopback, with certificates of an owner and of several people:

1. seconds from a revocation until the person's connection is closed;
2. the longest callback of the scheduler's loop, in CPU seconds, while one person cancels, drops and leaves behind 20,000 tasks;
3. people who run one notebook at the same time: how many keys were met, and how many refused;
4. 200 tasks that a worker cannot unpickle: workers lost;
5. CPU of the guarded scheduler against plain Dask, both over TLS (``scheduler_cost.py``).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
from _lanes import KINDS, OUT, OWNER, Workers, secure
from distributed import Client
from scheduler_cost import guarded as cost

from cryodask.cluster.access.tls import Authority
from cryodask.cluster.access.whose import OwningScheduler
from cryodask.cluster.guard import GuardedScheduler, GuardedWorker


@asynccontextmanager
async def cluster(folder: Path, workers: int = 2) -> AsyncIterator[GuardedScheduler]:
    """A guarded scheduler and workers with the certificates in a folder."""
    options = {"owner": OWNER, "users": folder / "people.json", "host": "127.0.0.1", "port": 0, "protocol": "tls"}
    with dask.config.set({"distributed.admin.tick.limit": "120s", "distributed.worker.memory.terminate": False}):
        async with GuardedScheduler(**options, **secure(str(folder), "scheduler")) as scheduler:
            made = [
                await GuardedWorker(scheduler.address, nthreads=2, host="127.0.0.1", **secure(str(folder), "worker"))
                for _ in range(workers)
            ]
            try:
                yield scheduler
            finally:
                for worker in made:
                    await worker.close(nanny=False)


def person(scheduler: GuardedScheduler, folder: Path, name: str) -> Client:
    """A client of a person."""
    return Client(scheduler.address, asynchronous=True, set_as_default=False, **secure(str(folder), name))


def authority(folder: Path, *people: str) -> Authority:
    """An authority that has invited people."""
    made = Authority.create(folder, owner=OWNER, cluster="benchmark")
    for name in people:
        made.invite(name, [], address="tls://127.0.0.1:1")
    return made


async def revocations(folder: Path, count: int) -> list[float]:
    """Seconds until the client of somebody revoked is gone."""
    made, found = authority(folder, *(f"p{n}" for n in range(count))), []
    async with cluster(folder, workers=0) as scheduler:
        for number in range(count):
            async with person(scheduler, folder, f"p{number}") as client:
                await asyncio.sleep(0.1 * (number % 5))
                made.revoke(f"p{number}")
                started = time.perf_counter()
                while client.id in scheduler.clients:
                    await asyncio.sleep(0.005)
                found.append(time.perf_counter() - started)
    return found


@contextmanager
def longest_callback() -> Iterator[dict[str, float]]:
    """CPU seconds of the longest callback of this thread's loop meanwhile, as ``seconds``."""
    found, run, here = {"seconds": 0.0}, asyncio.events.Handle._run, threading.get_ident()

    def timed(handle: Any) -> Any:
        if threading.get_ident() != here:  # the loop of a client
            return run(handle)
        before = time.thread_time()
        try:
            return run(handle)
        finally:
            found["seconds"] = max(found["seconds"], time.thread_time() - before)

    asyncio.events.Handle._run = timed  # type: ignore[method-assign]
    try:
        yield found
    finally:
        asyncio.events.Handle._run = run  # type: ignore[method-assign]


async def long_orders(folder: Path, tasks: int) -> dict[str, float]:
    """CPU seconds of the longest callback, by order; the client runs in another thread."""
    authority(folder, "anna")
    found = {}
    async with cluster(folder, workers=0) as scheduler:
        for order in ("cancel", "drop", "leave"):

            def submit() -> Client:
                client = Client(scheduler.address, set_as_default=False, **secure(str(folder), "anna"))
                client.kept = client.map(noop, range(tasks), pure=False)  # type: ignore[attr-defined]
                return client

            client = await asyncio.to_thread(submit)
            while len(scheduler.tasks) < tasks:
                await asyncio.sleep(0.05)

            def give(client: Client, order: str) -> None:
                if order == "cancel":
                    client.cancel(client.kept)  # type: ignore[attr-defined]
                elif order == "drop":
                    client.kept.clear()  # type: ignore[attr-defined]
                else:
                    client.close()

            with longest_callback() as longest:
                await asyncio.to_thread(give, client, order)
                while scheduler.tasks:
                    await asyncio.sleep(0.05)
            found[order] = longest["seconds"]
            await asyncio.to_thread(client.close)
    return found


def noop(value: Any) -> Any:
    return value


async def notebook(client: Client) -> list[Any]:
    """What everybody runs: mapped functions, arrays, something persisted, scattered data, names given by hand."""
    out = await client.gather(client.map(lambda x: x + 1, range(300)))
    out.append(await client.submit(sum, [1, 2], key="sum"))
    out.append(float(await client.compute((da.ones((200, 200), chunks=10) * 2).sum())))
    kept = client.persist(da.random.default_rng(1).normal(size=(100, 100), chunks=10))
    out.append(float(await client.compute(kept.mean(axis=0).max())))
    table = await client.scatter(np.arange(1000))
    return [*out, int(await client.submit(np.sum, table))]


async def workshop(folder: Path, people: int) -> tuple[int, int]:
    """Keys of others that were met, and people whose notebook failed or differed."""
    names = [f"p{n}" for n in range(people)]
    authority(folder, *names)
    met, check = [0], OwningScheduler._check_keys

    def counted(self: Any, *args: Any) -> Any:
        shared = check(self, *args)
        met[0] += len(shared)
        return shared

    OwningScheduler._check_keys = counted  # type: ignore[method-assign]
    try:
        async with cluster(folder) as scheduler:

            async def one(name: str) -> list[Any]:
                async with person(scheduler, folder, name) as client:
                    with client.as_current():
                        return await notebook(client)

            found = await asyncio.gather(*map(one, names), return_exceptions=True)
    finally:
        OwningScheduler._check_keys = check  # type: ignore[method-assign]
    return met[0], sum(isinstance(out, BaseException) or out != found[0] for out in found)


class Unreadable:
    """Can be unpickled once, in the scheduler: there is no worker yet when it is."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> Any:
        return _opened, (self.number,)

    def __call__(self) -> int:
        """What no worker comes to do."""
        return 1


def _opened(number: int) -> Any:
    # kept by a module, because what is defined here is copied with each task; by number, because a worker may try the one before again
    seen = vars(sys.modules["_lanes"]).setdefault("opened", set())
    if number in seen:
        raise ModuleNotFoundError("No module named 'only_on_the_scheduler'")
    seen.add(number)
    return Unreadable(number)


async def unreadable(folder: Path, tasks: int) -> int:
    """Workers lost to tasks that they cannot unpickle, each of which must fail."""
    authority(folder, "anna")
    async with cluster(folder) as scheduler, person(scheduler, folder, "anna") as anna:
        before = set(scheduler.workers)
        for number in range(tasks):
            failed = anna.submit(Unreadable(number), pure=False)
            said = await asyncio.wait_for(failed.exception(), 60)
            if not isinstance(said, ModuleNotFoundError) or "cannot read task" not in str(said):
                raise RuntimeError(f"a task that cannot be read ended with {said!r}")
        return len(before - set(scheduler.workers))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few of everything, as a smoke test")
    parser.add_argument("--pairs", type=int, default=3, help="pairs of clusters for the cost")
    arguments = parser.parse_args()
    people, tasks, bad, pairs, each = (2, 2000, 10, 1, 1000) if arguments.quick else (4, 20_000, 200, arguments.pairs, 20_000)
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    logging.getLogger("cryodask").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as made:
        root = Path(made)
        closing = asyncio.run(revocations(root / "a", 3 if arguments.quick else 10))
        print(f"a revocation closes the connection after {min(closing):.2f} to {max(closing):.2f} s", flush=True)
        orders = asyncio.run(long_orders(root / "b", tasks))
        print(f"longest callback with {tasks} tasks, CPU s: {', '.join(f'{k} {v:.3f}' for k, v in orders.items())}", flush=True)
        met, refused = asyncio.run(workshop(root / "c", people))
        print(f"{people} people run one notebook: {met} keys of others met, {refused} of the people refused something", flush=True)
        lost = asyncio.run(unreadable(root / "d", bad))
        print(f"{bad} tasks that cannot be unpickled: {lost} workers lost", flush=True)
    workers = {kind: Workers(threads=4) for kind in KINDS}
    try:
        ratios = {name: max(r["seconds"]["ratio"] for r in found.values()) for name, found in cost(workers, pairs, each).items()}
    finally:
        for those in workers.values():
            those.close()
    plot(closing, orders, ratios)
    result = {"revocation_closes_s": round(max(closing), 3), "longest_callback_cpu_s": round(max(orders.values()), 3)}
    result |= {"shared_keys_refused": refused, "shared_keys_met": met, "unreadable_tasks_workers_lost": lost}
    print(json.dumps(result | {f"cpu_ratio_guarded_{name}": ratio for name, ratio in ratios.items()}))


def plot(closing: list[float], orders: dict[str, float], ratios: dict[str, float]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3), layout="constrained")
    first, second, third = figure.subplots(1, 3)
    first.hist(closing, bins=10)
    first.set(xlabel="revocation to closed connection / s", ylabel="revocations")
    second.bar(list(orders), list(orders.values()))
    second.set(ylabel="longest callback / CPU s")
    third.bar([name.replace("_", " ") for name in ratios], list(ratios.values()))
    third.axhline(1.0, color="k", linewidth=0.8)
    third.set(ylabel="CPU, guarded / plain Dask, both TLS")
    OUT.mkdir(exist_ok=True)
    figure.savefig(OUT / "guests.png", dpi=90)


if __name__ == "__main__":
    main()
