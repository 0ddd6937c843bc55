"""A shared scheduler that one notebook cannot harm: each harmful call, tried by a guest, by the owner, and straight at a worker."""

from __future__ import annotations

import asyncio
import pickle
import time
import warnings

import dask
import dask.array as da
import numpy as np
import pytest
from _secure import OWNER, authority, guarded, person
from distributed import Future, Scheduler, Variable, Worker, fire_and_forget, get_client, wait
from distributed.core import rpc
from distributed.diagnostics.plugin import NannyPlugin, SchedulerPlugin, WorkerPlugin
from distributed.versions import get_versions

from cryodask.cluster import tls
from cryodask.cluster.gate import FORWARDED, OWNER_OPS, USER_ON_WORKER, USER_OPS, WORKER_OPS
from cryodask.cluster.guard import GuardedScheduler, GuardedWorker
from cryodask.errors import ClusterError


def one() -> int:
    return 1


class Harmless(SchedulerPlugin):
    name = "harmless"


class OnWorkers(WorkerPlugin):
    name = "on-workers"


class OnNannies(NannyPlugin):
    name = "on-nannies"


def first_worker(client) -> str:
    return next(iter(client.scheduler_info()["workers"]))


CALLS = {
    "run on workers": lambda c: c.run(one),
    "run on the scheduler": lambda c: c.run_on_scheduler(one),
    "scheduler plugin": lambda c: c.register_plugin(Harmless()),
    "unregister a scheduler plugin": lambda c: c.unregister_scheduler_plugin("harmless"),
    "worker plugin": lambda c: c.register_plugin(OnWorkers()),
    "unregister a worker plugin": lambda c: c.unregister_worker_plugin("on-workers"),
    "nanny plugin": lambda c: c.register_plugin(OnNannies()),
    "unregister a nanny plugin": lambda c: c.unregister_worker_plugin("on-nannies", nanny=True),
    "rebalance": lambda c: c.rebalance(),
    "replicate": lambda c: c.replicate(c.futures_of_test),
    "restrictions": lambda c: c.scheduler.set_restrictions(worker={}),
    "resources": lambda c: c.scheduler.set_resources(worker=first_worker(c), resources={"GPU": 4}),
    "a worker told to stop through the scheduler": lambda c: c.scheduler.proxy(msg={"op": "keys"} if c.is_owner_test else {"op": "terminate"}, worker=first_worker(c)),
    "memory manager": lambda c: c.amm.running(),
    "benchmark": lambda c: c.scheduler.get_cluster_state(exclude=()),
    "code run in the scheduler for a feed": lambda c: c.scheduler.versions() if c.is_owner_test else c.scheduler.feed(function=pickle.dumps(one)),
    "a stream of orders": lambda c: c.scheduler.versions() if c.is_owner_test else c.scheduler.connection_stream(),
    "an unknown request": lambda c: c.scheduler.versions() if c.is_owner_test else c.scheduler.something_new(),
    "retire": lambda c: c.retire_workers([first_worker(c)]),
    "unregister a worker": lambda c: c.scheduler.versions() if c.is_owner_test else c.scheduler.unregister(address=first_worker(c)),
    "restart": lambda c: c.restart(wait_for_workers=False),
    "restart workers": lambda c: c.restart_workers([first_worker(c)], raise_for_error=False),
    "shutdown": lambda c: c.scheduler.terminate(),
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_harmful_call_is_refused_to_a_guest_and_open_to_the_owner(tmp_path, call):
    async def run():
        folder = authority(tmp_path / "a", anna=["hpda"], bert=["hpda"]).folder
        async with guarded(folder) as scheduler, person(scheduler, folder, "anna") as anna, person(scheduler, folder, "bert") as bert:
            kept = bert.submit(sum, [1, 2], key="kept")
            await kept
            async with person(scheduler, folder, OWNER) as owner:
                for client, is_owner in ((anna, False), (owner, True)):
                    client.is_owner_test = is_owner
                    client.futures_of_test = [client.submit(one, key=f"mine-{is_owner}")]
                    await wait(client.futures_of_test)
                with pytest.raises(PermissionError) as refused:
                    await CALLS[call](anna)
                assert "anna" in str(refused.value)
                assert f"its owner ({OWNER})" in str(refused.value)
                assert scheduler.status.name == "running"
                assert [ws.status.name for ws in scheduler.workers.values()] == ["running"] * 2
                assert await bert.submit(sum, [3, 4]) == 7
                assert await kept == 3
                if call in ("restart workers", "nanny plugin"):  # these workers have no nannies: distributed's own answer comes through
                    with warnings.catch_warnings(), pytest.raises(Exception) as answer:  # noqa: PT011
                        warnings.simplefilter("ignore")
                        await CALLS[call](owner)
                        raise RuntimeError("done")
                    assert not isinstance(answer.value, PermissionError)
                elif call == "shutdown":
                    await CALLS[call](owner)
                    await asyncio.wait_for(scheduler.finished(), 20)
                else:
                    await CALLS[call](owner)

    asyncio.run(run())
