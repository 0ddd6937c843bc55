"""A guarded cluster with certificates in this process, shared by the tests of certificates and of the guard."""

from __future__ import annotations

import warnings
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import dask
from distributed import Client, Worker

from cryodask.cluster.access import tls
from cryodask.cluster.guard import GuardedScheduler, GuardedWorker

OWNER = "service"


def authority(folder: Path, **people: list[str]) -> tls.Authority:
    made = tls.Authority.create(folder, owner=OWNER, cluster="testing")
    for name, lanes in people.items():
        made.invite(name, lanes, address="tls://127.0.0.1:1")
    return made


@asynccontextmanager
async def guarded(folder: Path | None, *, workers: int = 2, memory_limit: Any = "2 GiB", **options: Any) -> AsyncIterator[GuardedScheduler]:
    """A scheduler and workers; with the certificates in ``folder``, or on plain TCP."""
    secure = (lambda name: {"security": tls.security(folder, name)}) if folder else (lambda name: {})
    settings = {
        "distributed.worker.memory.terminate": False,
        "distributed.worker.memory.pause": False,
        "distributed.admin.tick.limit": "60s",
    }
    settings["cryodask.people_on_workers"] = options.pop("people_on_workers", False)
    options = {"owner": OWNER, "users": folder / "people.json" if folder else None, **options}
    protocol = "tls" if folder else "tcp"
    with dask.config.set(settings):
        async with GuardedScheduler(
            host="127.0.0.1", port=0, protocol=protocol, validate=True, **secure("scheduler"), **options
        ) as scheduler:
            made: list[Worker] = []
            try:
                for number in range(workers):
                    worker = GuardedWorker(
                        scheduler.address, nthreads=1, host="127.0.0.1", name=f"w{number}", memory_limit=memory_limit, **secure("worker")
                    )
                    made.append(await worker)
                yield scheduler
            finally:
                for worker in made:
                    await worker.close(nanny=False)


def person(scheduler: GuardedScheduler, folder: Path | None, name: str, lane: str = "hpda", **options: Any) -> Client:
    """A client with the certificate of a person; to be entered with ``async with``."""
    security = {"security": tls.security(folder, name)} if folder else {}
    return Client(scheduler.address, asynchronous=True, name=f"{lane}/{name}", set_as_default=False, **security, **options)


@contextmanager
def warned(*all_of: str) -> Iterator[list[warnings.WarningMessage]]:
    """Within, a client is shown warnings that hold each of these words; gives those that it has been shown so far."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        yield seen
    said = [str(w.message) for w in seen]
    for words in all_of:
        assert any(words in one for one in said), f"{words!r} is not in {said}"
