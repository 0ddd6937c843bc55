"""Orders of one client on many tasks: right in the end, and others are served meanwhile."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from _lanes import GATE, client, cluster, held, until, until_clean
from dask._task_spec import Task, TaskRef
from distributed import Scheduler
from distributed.scheduler import ClientState

from cryodask.cluster.sharing import slices
from cryodask.cluster.sharing.slices import LEAVING

MANY = 1_000


def first(value: int) -> int:
    return value


def following(value: int) -> int:
    return value + 1


class Pieces:
    """Counts the keys that are released in one turn of the event loop, and the most of them."""

    def __init__(self, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch) -> None:
        self.most, self._now = 0, 0
        released = scheduler._client_releases_keys

        def count(*, keys: Any, cs: ClientState, recommendations: Any) -> Any:
            if not self._now:
                asyncio.get_running_loop().call_soon(self._next_turn)
            self._now += len(keys)
            self.most = max(self.most, self._now)
            return released(keys=keys, cs=cs, recommendations=recommendations)

        monkeypatch.setattr(scheduler, "_client_releases_keys", count)

    def _next_turn(self) -> None:
        self._now = 0


@pytest.fixture(autouse=True)
def _others_after_each_slice(monkeypatch):
    """However fast this machine is."""
    monkeypatch.setattr(slices, "_MOST_SECONDS", 0.0)


@pytest.mark.parametrize("how", ["cancel", "drop", "leave"])
def test_many_tasks_go_in_slices_and_nothing_is_left(how, monkeypatch):
    async def scenario() -> None:
        async with cluster(1, lanes={"hpda": 1, "live": 1}) as scheduler, client(scheduler, "live/anna") as anna:
            kept = anna.submit(first, 1, key="kept")
            await kept
            ben = await client(scheduler, "hpda/ben")
            futures = [ben.submit(held, -1, pure=False), *ben.map(first, range(MANY), pure=False)]
            await until(lambda: len(scheduler.tasks) == MANY + 2)
            pieces = Pieces(scheduler, monkeypatch)
            if how == "cancel":
                await ben.cancel(futures)
            elif how == "drop":
                futures = None
            else:
                await ben.close()
            await until(lambda: len(scheduler.tasks) == 1)
            assert 0 < pieces.most <= 200
            GATE.set()
            assert await kept == 1
            assert await anna.submit(first, 2, key="later") == 2
            await until(lambda: not any(str(name).startswith(LEAVING) for name in scheduler.clients))
            await ben.close()
            kept.release()
            await until_clean(scheduler)

    asyncio.run(asyncio.wait_for(scenario(), 120))


def chain_of(length: int) -> dict[str, Task]:
    return {f"t{n}": Task(f"t{n}", following, TaskRef(f"t{n - 1}")) if n else Task("t0", held, 0) for n in range(length)}


def test_a_chain_is_cancelled_with_all_that_depends_on_it_and_the_client_lives():
    """distributed recurses: 1,500 links raised RecursionError, and the client was thrown out."""

    async def scenario() -> None:
        async with cluster(1) as scheduler, client(scheduler, "hpda/ben") as ben:
            futures = ben.get(chain_of(1_500), [f"t{n}" for n in range(1_500)], sync=False)
            await until(lambda: len(scheduler.tasks) == 1_500)
            await ben.cancel(futures[:1])
            await until(lambda: all(future.cancelled() for future in futures))
            GATE.set()
            assert await ben.submit(first, 5) == 5

    asyncio.run(asyncio.wait_for(scenario(), 120))


def test_what_nobody_wants_between_two_futures_is_passed_over():
    """distributed raised AssertionError for a dependent that no client wants, and threw the client out."""

    async def scenario() -> None:
        async with cluster(1) as scheduler, client(scheduler, "hpda/ben") as ben:
            first_of, last = ben.get(chain_of(3), ["t0", "t2"], sync=False)
            other = ben.submit(first, 7)
            await until(lambda: len(scheduler.tasks) == 4)
            await ben.cancel([first_of])
            await until(lambda: first_of.cancelled() and last.cancelled())
            assert not other.cancelled()

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_what_another_client_wants_stays_and_only_its_own_client_is_told(monkeypatch):
    async def scenario() -> None:
        async with cluster(1, lanes={"hpda": 1}) as scheduler:
            async with client(scheduler, "hpda/ben") as ben, client(scheduler, "hpda/anna") as anna:
                mine, shared = (ben.submit(held, n, key=f"k{n}") for n in range(2))
                await until(lambda: len(scheduler.tasks) == 2)
                also = anna.submit(held, 1, key="k1")
                await until(lambda: len(scheduler.tasks["k1"].who_wants) == 2)
                told = []
                report = scheduler.report

                def note(msg: dict[str, Any], ts: Any = None, client: str | None = None) -> None:
                    if msg["op"] == "cancelled-keys":
                        told.append((client, msg["keys"]))
                    report(msg, ts=ts, client=client)

                monkeypatch.setattr(scheduler, "report", note)
                await ben.cancel([mine, shared])
                await until(lambda: told)
                assert told == [(ben.id, ["k0"])]
                assert not also.cancelled()
                await anna.cancel([also], force=True)
                await until(lambda: len(told) == 3)
                assert sorted(told[1:]) == sorted([(ben.id, ["k1"]), (anna.id, ["k1"])])

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_a_client_that_comes_again_under_its_name_is_another_one():
    async def scenario() -> None:
        async with cluster(1, lanes={"hpda": 1}) as scheduler:
            ben = await client(scheduler, "hpda/ben")
            futures = ben.map(first, range(MANY), pure=False)
            await until(lambda: len(scheduler.tasks) == MANY)
            scheduler.remove_client(ben.id)
            assert ben.id not in scheduler.clients
            scheduler.client_desires_keys([futures[-1].key], ben.id)
            await until(lambda: len(scheduler.tasks) == 1)
            assert futures[-1].key in scheduler.tasks
            del futures
            await ben.close()
            await until_clean(scheduler)

    asyncio.run(asyncio.wait_for(scenario(), 60))
