"""A shared scheduler that one notebook cannot harm: each harmful call, tried by a guest, by the owner, and straight at a worker."""

from __future__ import annotations

import asyncio
import pickle
import time
import warnings
from contextlib import nullcontext, suppress

import dask
import dask.array as da
import numpy as np
import pytest
from _lanes import attempt, until
from _secure import OWNER, authority, guarded, person, warned
from distributed import Worker, fire_and_forget
from distributed.comm import CommClosedError
from distributed.core import rpc
from distributed.diagnostics.plugin import NannyPlugin, SchedulerPlugin, WorkerPlugin
from distributed.versions import get_versions

import cryodask
from cryodask.cluster.access import tls
from cryodask.cluster.access.gate import FORWARDED, OWNER_OPS, USER_ON_WORKER, USER_OPS, WORKER_OPS
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


CALLS = {
    "run on workers": lambda c, f, w: c.run(one),
    "run on the scheduler": lambda c, f, w: c.run_on_scheduler(one),
    "scheduler plugin": lambda c, f, w: c.register_plugin(Harmless()),
    "unregister a scheduler plugin": lambda c, f, w: c.unregister_scheduler_plugin("lane-memory"),
    "worker plugin": lambda c, f, w: c.register_plugin(OnWorkers()),
    "unregister a worker plugin": lambda c, f, w: c.unregister_worker_plugin("shuffle"),
    "nanny plugin": lambda c, f, w: c.register_plugin(OnNannies()),
    "upload of a file": lambda c, f, w: c.upload_file(__file__, load=False),
    "rebalance": lambda c, f, w: c.rebalance(),
    "replicate": lambda c, f, w: c.replicate([f]),
    "restrictions": lambda c, f, w: c.scheduler.set_restrictions(worker={}),
    "resources": lambda c, f, w: c.scheduler.set_resources(worker=w, resources={"GPU": 4}),
    "memory manager": lambda c, f, w: c.amm.running(),
    "dump of everything": lambda c, f, w: c.scheduler.get_cluster_state(exclude=()),
    "check for idleness": lambda c, f, w: c.scheduler.check_idle(),
    "retire": lambda c, f, w: c.retire_workers([w]),
    "retire without closing": lambda c, f, w: c.scheduler.retire_workers(workers=[w], close_workers=False, stimulus_id="x"),
    "unregister a worker": lambda c, f, w: c.scheduler.unregister(address=w, stimulus_id="x"),
    "restart": lambda c, f, w: c.restart(wait_for_workers=False),
    "shutdown": lambda c, f, w: c.scheduler.terminate(),
}
"""Harmful requests: each is refused to a guest, and done for the owner."""

FORGED = {
    "unregister a nanny plugin": lambda c, f, w: c.unregister_worker_plugin("on-nannies", nanny=True),
    "order to a worker through the scheduler": lambda c, f, w: c.scheduler.proxy(msg={"op": "terminate"}, worker=w),
    "broadcast to nannies": lambda c, f, w: c.scheduler.broadcast(msg={"op": "kill"}, nanny=True),
    "restart of workers": lambda c, f, w: c.scheduler.restart_workers(workers=[w]),
    "code for a feed": lambda c, f, w: c.scheduler.feed(function=pickle.dumps(one)),
    "a stream of orders": lambda c, f, w: c.scheduler.connection_stream(),
    "a worker's report": lambda c, f, w: c.scheduler.add_keys(worker=w, keys=["x"]),
    "a worker's heartbeat": lambda c, f, w: c.scheduler.heartbeat_worker(address=w, now=0, metrics={}),
    "a worker's registration": lambda c, f, w: c.scheduler.register_worker(address="tls://127.0.0.1:5"),
    "an unknown request": lambda c, f, w: c.scheduler.something_new(),
}
"""Requests that no program of a guest's makes by mistake, or for which these workers lack a nanny."""


async def _only_refused(tmp_path, call, then_for_owner) -> None:
    folder = authority(tmp_path / "a", anna=["hpda"], bert=["hpda"]).folder
    async with guarded(folder, memory_share={"hpda": 1.0}) as scheduler, person(scheduler, folder, "bert") as bert:
        worker = next(iter(scheduler.workers))
        kept = bert.submit(sum, [1, 2], key="kept")
        assert await kept == 3
        async with person(scheduler, folder, "anna") as anna, person(scheduler, folder, OWNER) as owner:
            with pytest.raises(PermissionError) as refused:
                await call(anna, kept, worker)
            assert "anna" in str(refused.value)
            assert "What to do: " in str(refused.value)
            assert scheduler.status.name == "running"
            assert [ws.status.name for ws in scheduler.workers.values()] == ["running"] * 2
            assert await bert.submit(sum, [3, 4]) == 7
            assert await anna.submit(sum, [3, 5]) == 8
            assert await kept == 3
            if then_for_owner:
                mine = owner.submit(one)
                await mine
                with suppress(CommClosedError) if call is CALLS["shutdown"] else nullcontext():
                    await call(owner, mine, worker)
                if call is CALLS["shutdown"]:
                    await asyncio.wait_for(scheduler.finished(), 120)


@pytest.mark.parametrize("call", CALLS)
def test_harmful_call_is_refused_to_a_guest_and_open_to_the_owner(tmp_path, call):
    asyncio.run(_only_refused(tmp_path, CALLS[call], True))


@pytest.mark.parametrize("call", FORGED)
def test_forged_request_is_refused(tmp_path, call):
    asyncio.run(_only_refused(tmp_path, FORGED[call], False))


STRAIGHT = {
    "terminate": {},
    "run": {"function": pickle.dumps(one)},
    "run_coroutine": {"function": pickle.dumps(one)},
    "plugin-add": {"plugin": pickle.dumps(OnWorkers())},
    "plugin-remove": {"name": "shuffle"},
    "free_keys": {"keys": ["kept"], "stimulus_id": "x"},
    "upload_file": {"filename": "x.py", "data": b""},
    "connection_stream": {},
    "shuffle_receive": {},
    "benchmark_memory": {},
}


def test_the_same_calls_sent_straight_to_a_worker_that_admits_people_are_refused_to_a_guest(tmp_path):
    async def run():
        made = authority(tmp_path / "a", anna=["hpda"])
        made.invite("vera", [], address="tls://127.0.0.1:1", role="viewer")
        folder = made.folder
        async with guarded(folder, people_on_workers=True) as scheduler, person(scheduler, folder, "anna") as anna:
            kept = anna.submit(sum, [1, 2], key="kept", workers=["w0"])
            assert await kept == 3
            address = scheduler.workers[scheduler.aliases["w0"]].address
            # whoever looks on gets no results from workers either
            async with rpc(address, connection_args=tls.security(folder, "vera").get_connection_args("client")) as straight:
                with pytest.raises(ImportError, match="vera is not invited"):
                    await straight.get_data(keys=["kept"], who="vera")
            for op, arguments in STRAIGHT.items():
                async with rpc(address, connection_args=tls.security(folder, "anna").get_connection_args("client")) as straight:
                    with pytest.raises(PermissionError, match=f"{op} sent directly to a guardedworker is refused to anna"):
                        await getattr(straight, op)(**arguments)
                    assert (await straight.identity())["type"] == "GuardedWorker"
                    assert list(await straight.keys()) == ["kept"]
            assert [ws.status.name for ws in scheduler.workers.values()] == ["running"] * 2
            async with rpc(address, connection_args=tls.security(folder, OWNER).get_connection_args("client")) as straight:
                with suppress(CommClosedError):
                    await straight.terminate(reason="the owner said so")
            await until(lambda: len(scheduler.workers) == 1)
            assert await anna.submit(sum, [1, 1]) == 2

    asyncio.run(run())


def test_every_request_that_distributed_knows_has_been_looked_at():
    async def run():
        async with guarded(None, owner=None) as scheduler:
            known = USER_OPS | WORKER_OPS | OWNER_OPS
            assert set(scheduler.handlers) - known == set()
            assert not USER_OPS & WORKER_OPS | USER_OPS & OWNER_OPS | WORKER_OPS & OWNER_OPS
            async with Worker(scheduler.address, dashboard_address="127.0.0.1:0", host="127.0.0.1") as worker:
                assert set(worker.handlers) >= USER_ON_WORKER | FORWARDED

    asyncio.run(run())


def test_what_a_notebook_does_every_day_works_for_a_guest(tmp_path):
    async def run():
        folder = authority(tmp_path / "a", anna=["hpda"]).folder
        async with guarded(folder) as scheduler, person(scheduler, folder, "anna") as anna:
            scattered = await anna.scatter(np.ones(5))
            assert await anna.submit(np.sum, scattered) == 5
            assert await anna.gather(anna.map(str, range(9)), direct=True) == [str(i) for i in range(9)]
            assert await anna.compute(da.ones((100, 100), chunks=20).sum()) == 10_000
            versions = await anna.get_versions(check=True)
            assert len(versions["workers"]) == 2
            assert await anna.who_has()
            await anna.set_metadata("mine", 1)
            assert await anna.get_metadata("mine") == 1
            await anna.publish_dataset(dataset=scattered)
            await anna.unpublish_dataset("dataset")
            future = anna.submit(one, pure=False)
            await future.cancel()
            with anna.as_current():
                assert await (await anna.submit(Counter, actor=True)).add() == 1
            fire_and_forget(anna.submit(one, pure=False))
            anna.log_event("mine", {"a": 1})

    asyncio.run(run())


class Counter:
    count = 0

    def add(self) -> int:
        self.count += 1
        return self.count


def test_nobody_speaks_for_another_client(tmp_path):
    async def run():
        folder = authority(tmp_path / "a", anna=["hpda"], bert=["hpda"]).folder
        async with guarded(folder) as scheduler, person(scheduler, folder, "anna") as anna, person(scheduler, folder, "bert") as bert:
            kept = bert.submit(sum, [1, 2], key="kept")
            slow = bert.submit(time.sleep, 1, key="slow")
            assert await kept == 3
            again = anna.submit(sum, [1, 2], key="kept")
            assert await again == 3
            refusals = (
                f"client-releases-keys in the name of {bert.id}",
                f"close-client in the name of {bert.id}",
                f"A graph in the name of {bert.id}",
                "task-erred is refused to anna",
                "Cancelling with force what bert waits for",
            )
            with warned(*refusals):
                anna._send_to_scheduler({"op": "client-releases-keys", "keys": ["kept"], "client": bert.id})
                anna._send_to_scheduler({"op": "close-client", "client": bert.id})
                anna._send_to_scheduler({"op": "update-graph", "client": bert.id, "keys": {"x"}})
                anna._send_to_scheduler({"op": "task-erred", "key": "slow", "stimulus_id": "x", "worker": next(iter(scheduler.workers))})
                anna._send_to_scheduler({"op": "cancel-keys", "keys": ["kept", "slow"], "force": True, "reason": "", "msg": ""})
                await slow
                await asyncio.sleep(0.1)
            assert kept.status == slow.status == again.status == "finished"
            assert {"kept", "slow"} <= set(scheduler.tasks)
            for request in (
                anna.scheduler.retry(keys=["kept"], client=bert.id),
                anna.scheduler.scatter(data={}, client=bert.id),
                anna.scheduler.update_data(who_has={}, nbytes={}, client=bert.id),
            ):
                with pytest.raises(PermissionError, match="in the name of"):
                    await request
            await again.cancel()  # without force: only her own interest ends
            assert await kept == 3

    asyncio.run(run())


def test_names_of_datasets_and_metadata_stay_with_who_took_them(tmp_path):
    async def run():
        folder = authority(tmp_path / "a", anna=["hpda"], bert=["hpda"]).folder
        async with guarded(folder) as scheduler, person(scheduler, folder, "anna") as anna, person(scheduler, folder, "bert") as bert:
            await bert.publish_dataset(table=1)
            await bert.set_metadata(["bert", "a"], 1)
            with pytest.raises(PermissionError, match="'table' belongs to bert"):
                await anna.unpublish_dataset("table")
            with pytest.raises(PermissionError, match="'table' belongs to bert"):
                await anna.publish_dataset(table=2, override=True)
            with pytest.raises(PermissionError, match="'bert' belongs to bert"):
                await anna.set_metadata(["bert", "a"], 2)
            with pytest.raises(PermissionError, match="every client reads"):
                await anna.log_event("warn", {"message": pickle.dumps("boo")})
            with pytest.raises(PermissionError, match="every client reads"):
                await anna.log_event("cryodask-reports-of-bert", {"fraction": 1.0})
            assert await anna.get_dataset("table") == 1
            await bert.unpublish_dataset("table")
            await anna.publish_dataset(table=2)
            assert await bert.get_dataset("table") == 2

    asyncio.run(run())


# --- lanes by certificate --------------------------------------------------------------------------------------------------------
def test_lane_and_user_are_those_of_the_certificate_and_the_client_is_told(tmp_path):
    async def run():
        folder = authority(tmp_path / "a", anna=["hpda", "batch"]).folder
        lanes = {"live": 9, "hpda": 1, "batch": 1}
        async with guarded(folder, lanes=lanes) as scheduler:
            secure = {"folder": folder, "name": "anna"}
            async with person(scheduler, lane="live/bert", **secure) as anna, person(scheduler, lane="batch", **secure) as second:
                with warned("may not use the lane 'live': the work is charged to 'hpda'. Allowed lanes: hpda, batch"):
                    first = anna.submit(time.sleep, 0.3, key="first")
                    await until(lambda: "first" in scheduler.tasks)
                    assert scheduler.owner_of("first").path[:2] == ("hpda", "anna")
                    second_task = second.submit(time.sleep, 0.3, key="second")
                    with dask.annotate(lane="live"):
                        third = second.submit(time.sleep, 0.3, key="third")
                    with dask.annotate(lane="batch"):
                        fourth = anna.submit(time.sleep, 0.3, key="fourth")
                    await until(lambda: {"second", "third", "fourth"} <= set(scheduler.tasks))
                    assert scheduler.owner_of("second").path[:2] == ("batch", "anna")
                    assert scheduler.owner_of("third").path[:2] == ("hpda", "anna")
                    assert scheduler.owner_of("fourth").path[:2] == ("batch", "anna")
                    for future in (first, second_task, third, fourth):
                        await future

    asyncio.run(run())


def test_nobody_borrows_a_lane_by_naming_anothers_task_as_the_submitting_one(tmp_path):
    async def run():
        folder = authority(tmp_path / "a", anna=["hpda"], live=["live"]).folder
        async with guarded(folder, lanes={"live": 9, "hpda": 1}) as scheduler:
            async with person(scheduler, folder, "live", "live") as live, person(scheduler, folder, "anna") as anna:
                running = live.submit(time.sleep, 1, key="of-live")
                send = anna._send_to_scheduler
                anna._send_to_scheduler = lambda m: send({**m, "submitting_task": "of-live"} if m["op"] == "update-graph" else m)
                borrowed = anna.submit(time.sleep, 0.5, key="borrowed")
                await until(lambda: "borrowed" in scheduler.tasks)
                assert scheduler.owner_of("borrowed").lane == "hpda"
                await borrowed
                await running

    asyncio.run(run())


# --- graphs ----------------------------------------------------------------------------------------------------------------------
class Unpickled:
    seen = 0

    def __reduce__(self):
        return _note_unpickled, (bytes(200_000),)


def _note_unpickled(ballast: bytes) -> int:
    Unpickled.seen += 1
    return 0


def test_graph_of_too_many_bytes_is_refused_before_it_is_unpickled(tmp_path):
    async def run():
        folder = authority(tmp_path / "a", anna=["hpda"]).folder
        async with guarded(folder, max_graph_bytes="100 kB") as scheduler, person(scheduler, folder, "anna") as anna:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # dask's own about large graphs
                future = anna.submit(str, Unpickled(), key="large")
                with pytest.raises(ValueError, match=r"A graph of 19\d.* kiB is refused: this scheduler accepts at most 97.66 kiB"):
                    await future
            assert Unpickled.seen == 0
            assert "large" not in scheduler.tasks
            assert await anna.submit(sum, [1, 2]) == 3

    asyncio.run(run())


def test_graph_of_too_many_tasks_is_refused_and_nothing_of_it_is_taken_up(tmp_path):
    async def run():
        folder = authority(tmp_path / "a", anna=["hpda"]).folder
        async with guarded(folder, max_graph_tasks=1000) as scheduler, person(scheduler, folder, "anna") as anna:
            with pytest.raises(ValueError, match=r"A graph of \d+ tasks is refused: this scheduler accepts at most 1000"):
                await anna.compute(da.ones((64, 64), chunks=1).sum())
            assert not scheduler.tasks
            assert await anna.submit(sum, [1, 2]) == 3

    asyncio.run(run())


# --- versions --------------------------------------------------------------------------------------------------------------------
OTHER = {
    "dask": ("packages", "dask", "2024.1.0"),
    "distributed": ("packages", "distributed", "2024.1.0"),
    "msgpack": ("packages", "msgpack", "0.1"),
    "cloudpickle": ("packages", "cloudpickle", None),
    "python": ("host", "python", "3.8.9.final.0"),
}


def _with(versions: dict, kind: str, name: str, value: object) -> dict:
    return {**versions, kind: {**versions[kind], name: value}}


@pytest.mark.parametrize("package", OTHER)
def test_client_and_worker_of_another_version_are_refused_with_both_versions_named(tmp_path, monkeypatch, package):
    other = _with(get_versions(), *OTHER[package])

    async def run():
        folder = authority(tmp_path / "a", anna=["hpda"]).folder
        async with guarded(folder) as scheduler:
            monkeypatch.setattr("distributed.client.version_module.get_versions", lambda: other)
            monkeypatch.setattr("distributed.worker.get_versions", lambda: other)
            with pytest.raises(ClusterError, match=rf"The versions of this client differ from the scheduler's: {package} .* \(here"):
                with tls.connection_errors(scheduler.address):
                    await attempt(person(scheduler, folder, "anna", timeout="1h"))  # it is not tried again for as long
            with pytest.raises(RuntimeError) as refused:
                await GuardedWorker(scheduler.address, host="127.0.0.1", security=tls.security(folder, "worker"))
            assert f"The versions of this worker differ from the scheduler's: {package}" in str(refused.value.__cause__)
            assert len(scheduler.workers) == 2
            monkeypatch.undo()
            async with person(scheduler, folder, "anna") as anna:
                assert await anna.submit(sum, [1, 2]) == 3

    asyncio.run(run())


def test_a_worker_with_another_release_of_cryodask_is_refused_and_a_client_without_it_is_not(tmp_path, monkeypatch):
    async def run():
        folder = authority(tmp_path / "a", anna=["hpda"]).folder
        async with guarded(folder) as scheduler, person(scheduler, folder, "anna") as anna:
            monkeypatch.setattr("cryodask.cluster.access.gate.RELEASE", "0.0.9")
            with pytest.raises(RuntimeError) as refused:
                await GuardedWorker(scheduler.address, host="127.0.0.1", security=tls.security(folder, "worker"))
            assert f"cryodask 0.0.9 (here {cryodask.__version__})" in str(refused.value.__cause__)
            assert len(scheduler.workers) == 2
            assert await anna.submit(sum, [1, 2]) == 3  # a plain Client tells no release

    asyncio.run(run())


def test_another_patch_level_of_python_is_let_in(tmp_path, monkeypatch):
    ours = get_versions()
    major, minor, *_ = ours["host"]["python"].split(".")

    async def run():
        folder = authority(tmp_path / "a", anna=["hpda"]).folder
        async with guarded(folder) as scheduler:
            monkeypatch.setattr(
                "distributed.client.version_module.get_versions", lambda: _with(ours, "host", "python", f"{major}.{minor}.99.final.0")
            )
            async with person(scheduler, folder, "anna") as anna:
                assert await anna.submit(sum, [1, 2]) == 3

    asyncio.run(run())


# --- memory ----------------------------------------------------------------------------------------------------------------------
def _block(number: int) -> np.ndarray:
    return np.ones(1 << 17)  # 1 MiB


def test_lane_above_its_share_of_memory_waits_while_others_go_on_and_goes_on_when_it_releases(tmp_path):
    async def run():
        folder = authority(tmp_path / "a", anna=["hpda"], bert=["batch"]).folder
        options = {"lanes": {"hpda": 1, "batch": 1}, "memory_share": {"hpda": 0.01}}
        async with guarded(folder, memory_limit=1 << 30, **options) as scheduler:
            async with person(scheduler, folder, "anna") as anna, person(scheduler, folder, "bert", "batch") as bert:
                with warned("Lane 'hpda' has more than its 20.48 MiB of results in memory"):
                    hog = anna.map(_block, range(60))
                    await until(
                        lambda hog=hog: sum(f.done() for f in hog) > 20 and not any(ws.processing for ws in scheduler.workers.values())
                    )
                    await asyncio.sleep(0.5)
                done = [f for f in hog if f.done()]
                assert 21 <= len(done) <= 25  # one above the cap, and what was on its way
                assert scheduler.memory_by_lane()["hpda"] == pytest.approx(len(done) << 20, rel=0.01)
                assert await bert.gather(bert.map(_block, range(100, 130))) is not None
                assert await anna.submit(np.sum, done[0], key="frees") == 1 << 17  # its input is there: it may run
                assert sum(f.done() for f in hog) == len(done)
                rest = hog[len(done) :]
                for future in done:
                    future.release()
                del future, done, hog
                await until(lambda rest=rest: sum(f.done() for f in rest) > 15)
                del rest
                await until(lambda: scheduler.memory_by_lane()["hpda"] == 0)

    asyncio.run(run())


def test_scattered_data_counts_for_the_lane_of_who_scattered_it(tmp_path):
    async def run():
        folder = authority(tmp_path / "a", anna=["hpda"]).folder
        lanes = {"hpda": 1, "batch": 1}
        async with guarded(folder, lanes=lanes, memory_share={"hpda": 0.5}, people_on_workers=True) as scheduler:
            async with person(scheduler, folder, "anna") as anna:
                data = await anna.scatter(np.ones(1 << 17))
                with pytest.raises(PermissionError, match="update_data sent directly to a guardedworker is refused to anna"):
                    await anna.scatter(np.zeros(1 << 17), direct=True)
                assert scheduler.memory_by_lane()["hpda"] == pytest.approx(1 << 20, rel=0.01)
                del data
                await until(lambda: scheduler.memory_by_lane()["hpda"] == 0)

    asyncio.run(run())


def test_task_is_not_blamed_for_three_workers_that_died_under_it(tmp_path):
    async def run():
        with dask.config.set({"distributed.scheduler.allowed-failures": 0}):
            async with guarded(None, owner=None, workers=1) as scheduler:
                assert scheduler.allowed_failures == 3

    asyncio.run(run())


# --- without certificates --------------------------------------------------------------------------------------------------------
def test_without_certificates_what_is_the_owners_is_refused_to_all_and_lanes_follow_claimed_names():
    async def run():
        users = {"anna": {"lanes": ["hpda"]}}
        async with guarded(None, users=users, lanes={"live": 1, "hpda": 1}) as scheduler, person(scheduler, None, OWNER) as claims:
            with pytest.raises(PermissionError, match="restart is refused to nobody"):
                await claims.restart()
            async with person(scheduler, None, "anna", "live") as anna:
                with warned("may not use the lane 'live'"):
                    future = anna.submit(time.sleep, 0.2, key="x")
                    await until(lambda: "x" in scheduler.tasks)
                    assert scheduler.owner_of("x").path[:2] == ("hpda", "anna")
                    await future

    asyncio.run(run())


def test_guarded_scheduler_does_not_open_to_other_machines_without_certificates():
    async def run(**options):
        with pytest.raises(RuntimeError) as refused:
            async with GuardedScheduler(port=0, **options):
                pass
        assert isinstance(refused.value.__cause__, ClusterError)
        assert "reachable from other machines without TLS" in str(refused.value.__cause__)

    asyncio.run(run(host="0.0.0.0"))
    asyncio.run(run(host="127.0.0.1", dashboard_address=":0"))
