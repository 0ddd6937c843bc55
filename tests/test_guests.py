"""What one person does on a guarded cluster never touches another's tasks, results and names: one test for each known hole."""

from __future__ import annotations

import asyncio
import operator
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import dask
import dask.array as da
import numpy as np
import pytest
from _lanes import until
from _secure import OWNER, authority, guarded, person
from distributed import Client, Event, Future, Lock, Queue, Semaphore, Variable, fire_and_forget, get_client, worker_client
from distributed.comm.core import connect
from distributed.versions import get_versions

from cryodask.cluster.access import tls
from cryodask.cluster.guard import GuardedScheduler


@asynccontextmanager
async def two(folder: Path, **options: Any) -> AsyncIterator[tuple[GuardedScheduler, Client, Client]]:
    """A cluster with anna, who attacks, and bert, whose things must stay."""
    made = authority(folder, anna=["hpda"], bert=["hpda"]).folder
    async with guarded(made, **options) as scheduler:
        async with person(scheduler, made, "anna") as anna, person(scheduler, made, "bert") as bert:
            yield scheduler, anna, bert


def run(scenario: Callable[[], Any]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 120))


def load() -> int:
    return 1


def other_load() -> int:
    return 2


def boom() -> None:
    raise RuntimeError("boom")


def slow(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


class Counter:
    count = 0

    def add(self) -> int:
        self.count += 1
        return self.count


# --- whose key -------------------------------------------------------------------------------------------------------------------
def test_one_key_is_one_task_for_two_people_who_compute_the_same_and_refused_to_the_second_otherwise(tmp_path):
    async def scenario() -> None:
        async with two(tmp_path / "a") as (scheduler, anna, bert):
            mine = bert.submit(load, key="load")
            assert await mine == 1
            shared = anna.submit(load, key="load")
            assert await shared == 1
            assert scheduler.whose("load") == "bert"
            del shared
            await until(lambda: "load" not in anna.futures)
            with pytest.raises(ValueError, match=r"The key 'load' is that of a task of bert, and yours does something else"):
                await anna.submit(other_load, key="load")
            # the same through a refused future, through an input, and with values that only look alike
            refused = anna.submit(other_load, key="load")
            with pytest.raises(ValueError, match="'load' is that of a task of bert"):
                await anna.submit(operator.neg, refused, key="uses-a-refused-one")
            below = bert.submit(operator.add, mine, 1, key="below")
            assert await below == 2
            graph = {"load": (other_load,), "below": (operator.add, "load", 1)}
            with pytest.raises(ValueError, match=r"'(load|below)' is that of a task of bert"):
                await anna.gather(anna.get(graph, ["below"], sync=False))
            assert await bert.submit(str, 1, key="text") == "1"
            kept = bert.submit(str, 1, key="text")
            with pytest.raises(ValueError, match="'text' is that of a task of bert"):
                await anna.submit(str, True, key="text")
            assert [await mine, await below, await kept] == [1, 2, "1"]
            assert await anna.submit(load, key="another") == 1

    run(scenario)


def test_an_owner_keeps_a_key_that_others_share_or_annotate(tmp_path):
    async def scenario() -> None:
        async with two(tmp_path / "a", lanes={"hpda": 1, "live": 1}) as (scheduler, anna, bert):
            first = bert.submit(slow, 0.3, key="first")
            last = bert.submit(operator.neg, first, key="last")
            await until(lambda: "last" in scheduler.tasks)
            with dask.annotate(lane="live", priority=10, allowed_failures=0):
                shared = anna.submit(slow, 0.3, key="first")
            assert await shared == 0.3
            assert [scheduler.whose(key) for key in ("first", "last")] == ["bert", "bert"]
            assert scheduler.owner_of("first").lane == "hpda"
            assert await last == -0.3
            del first  # kept for "last" alone, without a result
            del shared
            await until(lambda: scheduler.tasks["first"].state == "released")
            again = anna.submit(slow, 0.3, key="first")
            assert await again == 0.3
            assert scheduler.whose("first") == "bert"
            del again
            await until(lambda: "first" not in anna.futures)
            with pytest.raises(ValueError, match="cannot become an actor"):
                await anna.submit(slow, 0.3, key="first", actor=True)

    run(scenario)


NOTEBOOK = """
def shift(x): return x + 1
out = await client.gather(client.map(shift, range(20)))
out += [await client.submit(lambda: 5, key="lambda")]
out += [float(await client.compute(da.ones((40, 40), chunks=10).sum()))]
out += [float(await client.compute((da.arange(100, chunks=10) * 2).map_blocks(np.sqrt).sum()))]
kept = await client.persist(da.random.default_rng(1).normal(size=(60, 60), chunks=20))
out += [round(float(await client.compute(kept.mean())), 6)]
table = await client.scatter(np.arange(1000))
out += [int(await client.submit(np.sum, table))]
"""


def test_several_people_who_run_one_notebook_at_once_are_refused_nothing(tmp_path):
    async def scenario() -> None:
        people = {f"person{number}": ["hpda"] for number in range(3)}
        made = authority(tmp_path / "a", **people).folder
        async with guarded(made) as scheduler:

            async def notebook(name: str) -> list[Any]:
                async with person(scheduler, made, name) as client:
                    with client.as_current():
                        return await cells(client)

            async def cells(client: Client) -> list[Any]:
                names: dict[str, Any] = {"client": client, "da": da, "np": np}
                lines = "".join(f"    {line}\n" for line in NOTEBOOK.strip().splitlines())
                exec(f"async def cells(client, da, np):\n{lines}    return out\n", names)
                return list(await names["cells"](client, da, np))

            outs = await asyncio.gather(*map(notebook, people))
            assert outs[0] == outs[1] == outs[2]
            assert outs[0][:3] == [1, 2, 3]
            assert outs[0][20:23] == [5, 1600.0, float(np.sqrt(np.arange(100) * 2).sum())]
            assert outs[0][24] == 499_500

    run(scenario)


def test_scattered_data_are_shared_if_they_are_equal_and_refused_otherwise(tmp_path):
    async def scenario() -> None:
        async with two(tmp_path / "a") as (scheduler, anna, bert):
            both = await asyncio.gather(anna.scatter(np.arange(9)), bert.scatter(np.arange(9)))
            assert both[0].key == both[1].key
            assert (await anna.submit(np.sum, both[0]), await bert.submit(np.sum, both[1])) == (36, 36)
            kept = bert.submit(load, key="load")
            assert await kept == 1
            data = (await bert.scatter({"data": np.ones(3)}))["data"]
            for key in ("load", "data"):
                with pytest.raises(ValueError, match=f"The key '{key}' is that of .* of bert"):
                    await anna.scatter({key: np.zeros(3)})
                with pytest.raises(PermissionError, match="are not taken"):
                    await anna.scheduler.update_data(who_has={key: list(scheduler.workers)}, nbytes={key: 8}, client=anna.id)
            with pytest.raises(ValueError, match="'data' is that of data of bert"):
                await anna.submit(load, key="data")
            with pytest.raises(ValueError, match="is that of a task of bert"):
                await bert.scatter({"load": 5})  # it would end the worker
            anna._send_to_scheduler({"op": "update-data", "who_has": {"load": ["tls://x:1"]}, "nbytes": {"load": 1}})
            assert (await anna.scatter({"data": np.ones(3)}))["data"].key == "data"
            assert scheduler.whose("data") == "bert"
            assert await bert.submit(np.sum, data) == 3
            assert await kept == 1

    run(scenario)


def test_nobody_retries_pins_cancels_or_reads_what_is_anothers(tmp_path):
    async def scenario() -> None:
        async with two(tmp_path / "a") as (scheduler, anna, bert):
            failed, done = bert.submit(boom, key="failed"), bert.submit(load, key="done")
            running = bert.submit(slow, 2.0, key="running")
            with suppress(RuntimeError):
                await failed
            assert await done == 1
            with pytest.raises(PermissionError, match="Retrying 'failed' is refused to anna: it belongs to bert"):
                await anna.scheduler.retry(keys=["failed"], client=anna.id)
            runs = {key: scheduler.tasks[key].run_id for key in ("failed", "done")}
            assert await anna.scheduler.retry(keys=["done", "running"], client=anna.id) == ()
            for claimed in ("fire-and-forget", anna.id):
                anna._send_to_scheduler({"op": "client-desires-keys", "keys": ["done", "running"], "client": claimed})
            anna._send_to_scheduler({"op": "report-key", "key": "failed"})
            anna._send_to_scheduler({"op": "cancel-keys", "keys": ["done", "running"], "force": True, "reason": "", "msg": ""})
            for key in ("done", "failed"):
                by_name = Future(key, anna)
                anna._send_to_scheduler({"op": "client-desires-keys", "keys": [key]})
                with pytest.raises(PermissionError, match=f"'{key}' is refused to anna"):
                    await by_name
                with pytest.raises(PermissionError, match=f"'{key}' is refused to anna"):
                    await anna.scheduler.gather(keys=[key])
            wanting = {key: {cs.client_key for cs in scheduler.tasks[key].who_wants or ()} for key in ("done", "running")}
            assert wanting == {"done": {bert.id}, "running": {bert.id}}
            assert {key: scheduler.tasks[key].run_id for key in ("failed", "done")} == runs
            assert await running == 2.0

    run(scenario)


def test_results_are_given_through_datasets_variables_and_shared_queues(tmp_path):
    async def scenario() -> None:
        async with two(tmp_path / "a") as (_scheduler, anna, bert):
            future = bert.submit(load, key="given")
            await future
            with bert.as_current():
                await bert.publish_dataset(table=future)
                await Variable("given", client=bert).set(future)
                await Queue("shared/given", client=bert)
                await Queue("shared/given", client=bert).put(future)
            with anna.as_current():
                assert await (await anna.get_dataset("table")) == 1
                assert await (await Variable("given", client=anna).get()) == 1
                queue = await Queue("shared/given", client=anna)
                assert await (await queue.get()) == 1
                got = await anna.get_dataset("table")
                assert await anna.submit(operator.add, got, 1) == 2

    run(scenario)


def test_names_belong_to_the_first_person_who_writes_them(tmp_path):
    async def scenario() -> None:
        async with two(tmp_path / "a") as (_scheduler, anna, bert):
            variable, event = Variable("v", client=bert), Event("e", client=bert)
            await variable.set(1)
            await event.set()
            queue = await Queue("q", client=bert)
            await queue.put(1)
            lock = Lock("l", scheduler_rpc=bert.scheduler, loop=bert.loop)
            semaphore = await Semaphore(2, name="s", scheduler_rpc=bert.scheduler, loop=bert.loop)
            assert await lock.acquire()
            assert await semaphore.acquire()
            rpc = anna.scheduler
            refused = {
                "variable 'v'": [rpc.variable_set(name="v", data=2)],
                "queue 'q'": [rpc.queue_get(name="q"), rpc.queue_put(name="q", data=2), rpc.queue_create(name="q")],
                "event 'e'": [rpc.event_clear(name="e")],
                "semaphore 'l'": [rpc.semaphore_close(name="l")],
                "semaphore 's'": [rpc.semaphore_acquire(name="s", lease_id="x"), rpc.semaphore_close(name="s")],
            }
            for what, requests in refused.items():
                for request in requests:
                    with pytest.raises(PermissionError, match=f"The (lock or )?{what} belongs to bert"):
                        await request
            anna._send_to_scheduler({"op": "variable_delete", "name": "v"})
            anna._send_to_scheduler({"op": "queue_release", "name": "q"})
            assert await Variable("v", client=anna).get() == 1
            assert await rpc.event_is_set(name="e")
            assert await rpc.queue_qsize(name="q") == 1
            await rpc.variable_set(name="shared/v", data=1)
            await bert.scheduler.variable_set(name="shared/v", data=2)
            variable.delete()
            await until(lambda: "v" not in _scheduler.extensions["variables"].variables)
            await Variable("v", client=anna).set(3)  # free again
            with pytest.raises(ValueError, match="is a string"):
                await rpc.variable_set(name=1, data=1)

    run(scenario)


def fill(name: str) -> int:
    with Lock("in-tasks"):
        Queue(name, client=get_client()).put(load())
    with worker_client() as client:
        return client.submit(operator.add, 1, 1, pure=False).result()


def raised(counter: Any) -> int:
    return counter.add().result()


def test_what_tasks_do_with_names_and_nested_clients_works_as_before(tmp_path):
    async def scenario() -> None:
        async with two(tmp_path / "a") as (_scheduler, anna, _bert):
            queue = await Queue("filled", client=anna)
            await anna.get_task_stream()
            assert await anna.gather(anna.map(fill, ["filled"] * 4, pure=False)) == [2] * 4
            assert await queue.qsize() == 4
            assert await queue.get(batch=4) == [1] * 4
            fire_and_forget(anna.submit(load, key="forgotten"))
            with anna.as_current():
                actor = await anna.submit(Counter, actor=True)
                assert await actor.add() == 1
                inner = dask.delayed(Counter)()  # an actor within a graph
                assert await anna.compute(dask.delayed(raised)(inner), actors=inner) == 1
            retried = anna.submit(boom)
            with suppress(RuntimeError):
                await retried
            await retried.retry()
            with pytest.raises(RuntimeError, match="boom"):
                await retried
            async with _metadata(anna) as recorded:
                assert await anna.submit(slow, 0.01, key="recorded") == 0.01
            assert recorded["state"] == {"recorded": "memory"}
            assert isinstance(await anna.profile(), dict)
            assert await anna.call_stack() == {}
            assert await anna.get_task_stream()

    run(scenario)


@asynccontextmanager
async def _metadata(client: Client) -> AsyncIterator[dict[str, Any]]:
    found: dict[str, Any] = {}
    await client.scheduler.start_task_metadata(name="mine")
    yield found
    found |= await client.scheduler.stop_task_metadata(name="mine")


def test_what_each_sees_of_others(tmp_path):
    async def scenario() -> None:
        async with two(tmp_path / "a") as (scheduler, anna, bert):
            running = bert.submit(slow, 1.0, key="secret")
            await until(lambda: "secret" in scheduler.tasks and scheduler.tasks["secret"].state == "processing")
            with anna.as_current(), bert.as_current():
                actor = await bert.submit(Counter, actor=True, key="actor")
            rpc, worker = anna.scheduler, next(iter(scheduler.workers))
            for request in (
                rpc.get_runspec(key="secret"), rpc.call_stack(keys=["secret"]), rpc.profile(key="slow"), rpc.profile(scheduler=True),
                rpc.profile(key="secret"), rpc.worker_logs(), rpc.get_logs(), rpc.performance_report(start=0, last_count=0),
                rpc.events(topic=None), rpc.events(topic=bert.id), rpc.broadcast(msg={"op": "get_logs"}),
                rpc.proxy(msg={"op": "actor_execute", "actor": "actor", "function": "add", "args": (), "kwargs": {}}, worker=worker),
            ):  # fmt: skip
                with pytest.raises(PermissionError):
                    await request
            assert (await anna.call_stack()) == {}
            assert (await anna.processing()).keys() == scheduler.workers.keys()  # names are for all
            assert await anna.scheduler.get_task_prefix_states()
            assert await running == 1.0
            stream = await rpc.get_task_stream()
            assert all("exception" not in record for record in stream)
            with bert.as_current():
                assert await actor.add() == 1
            async with Client(
                scheduler.address, security=tls.security(tmp_path / "a", OWNER), asynchronous=True, set_as_default=False
            ) as owner:
                assert await owner.get_scheduler_logs() is not None

    run(scenario)


# --- clients, plug-ins, numbers ------------------------------------------------------------------------------------------------------
async def registered(scheduler: GuardedScheduler, folder: Path, client: Any) -> Any:
    """Register a client of anna's under any name; the connection, or what was said against it."""
    comm = await connect(scheduler.address, **tls.security(folder, "anna").get_connection_args("client"))
    await comm.write({"op": "register-client", "client": client, "reply": False, "versions": get_versions()})
    said = await asyncio.wait_for(comm.read(), 10)
    said = said[0] if isinstance(said, list | tuple) else said
    return comm if said.get("op") == "stream-start" and not said.get("error") else str(said)


def test_names_of_clients_that_the_scheduler_uses_or_others_have_are_refused(tmp_path):
    async def scenario() -> None:
        async with two(tmp_path / "a") as (scheduler, anna, bert):
            id_ = str(uuid4())
            names: list[Any] = [
                "fire-and-forget",
                "variable-v",
                "queue-q",
                f"published-{id_}",
                f"leaving-{id_}",
                "all",
                bert.id,
                "x" * 5000,
            ]
            names += [f"Client-{'x' * 200}-{id_}", 5, None, ("Client", id_)]
            for name in names:
                assert isinstance(await registered(scheduler, tmp_path / "a", name), str), name
            assert bert.id in scheduler.clients
            comm = await registered(scheduler, tmp_path / "a", f"Client-live/bert-{id_}")
            assert scheduler.path_of_client(f"Client-live/bert-{id_}")[1] == "anna"
            assert not isinstance(comm, str), comm
            await comm.close()
            await until(lambda: f"Client-live/bert-{id_}" not in scheduler._peers)
            assert await anna.submit(load) == await bert.submit(load) == 1

    run(scenario)


def test_recorders_replace_no_plugin_and_announcements_are_numbers(tmp_path):
    async def scenario() -> None:
        async with two(tmp_path / "a", memory_share={"hpda": 1.0}) as (scheduler, anna, _bert):
            before = dict(scheduler.plugins)
            for name in ("stealing", "shuffle", "lane-memory", "cryodask-accounting"):
                await anna.scheduler.start_task_metadata(name=name)
                assert {name: scheduler.plugins[name] for name in before} == before
                await anna.scheduler.stop_task_metadata(name=name)
                with pytest.raises(ValueError, match="no recording of that name"):
                    await anna.scheduler.stop_task_metadata(name=name)
            assert dict(scheduler.plugins) == before
            for tasks in ("many", -1, 1.5, True, float("nan"), 2**63 - 1):
                with pytest.raises(TypeError):
                    await anna.scheduler.announce_work(client=anna.id, prefix="x", tasks=tasks)
            await anna.scheduler.announce_work(client=anna.id, prefix="x", tasks=3)
            assert [work["tasks"] for work in scheduler.announced_work()] == [3]
            for interval in (-1, "x", float("nan")):
                with pytest.raises(TypeError):
                    await anna.scheduler.memory_sampler_start(client=anna.id, measure="process", interval=interval)

    run(scenario)


@pytest.mark.parametrize(
    "wrong",
    [
        {"internal_priority": {}}, {"internal_priority": {"x": "first"}}, {"user_priority": "high"}, {"user_priority": float("nan")},
        {"fifo_timeout": "soon"}, {"actors": ["kept"]}, {"actors": 5}, {"keys": 5}, {"expr_ser": None}, {"annotations": {"priority": "x"}},
        {"annotations": {"resources": 5}}, {"annotations": {"retries": "x"}}, {"code": 5}, {"span_metadata": 5},
    ],
    ids=str,
)  # fmt: skip
def test_a_graph_that_cannot_be_taken_leaves_nothing_behind(tmp_path, wrong):
    async def scenario() -> None:
        async with two(tmp_path / "a") as (scheduler, anna, bert):
            kept = bert.submit(load, key="kept")
            waits = bert.submit(operator.add, bert.submit(slow, 0.5, key="slow"), 1, key="waits")
            assert await kept == 1
            await until(lambda: "waits" in scheduler.tasks)
            send = anna._send_to_scheduler
            anna._send_to_scheduler = lambda m: send({**m, **wrong} if m["op"] == "update-graph" else m)
            future = anna.submit(load, key="x")
            with suppress(Exception):
                await asyncio.wait_for(future.result(), 1)
            anna._send_to_scheduler = send
            assert {key: ts.actor for key, ts in scheduler.tasks.items() if key != "x"} == {"kept": False, "slow": False, "waits": False}
            assert await waits == 1.5
            future.release()
            await until(lambda: "x" not in scheduler.tasks)
            assert await kept == await bert.submit(load) == 1

    run(scenario)


# --- bounds --------------------------------------------------------------------------------------------------------------------------
LIMITS = {"bytes": 2 << 20, "names": 20, "topics": 5, "clients": 3, "recorders": 2, "connections": 60, "graph_tasks": 100}
BLOB = np.random.default_rng(0).bytes(500_000)


async def _variables(c: Client, n: int) -> None:
    await c.scheduler.variable_set(name=f"v{n}", data=BLOB)


async def _queue(c: Client, n: int) -> None:
    if n == 0:
        await c.scheduler.queue_create(name="q")
    await c.scheduler.queue_put(name="q", data=BLOB)


async def _metadata_of(c: Client, n: int) -> None:
    await c.scheduler.set_metadata(keys=["m", n], value=BLOB)


async def _datasets(c: Client, n: int) -> None:
    await c.publish_dataset(**{f"d{n}": BLOB})


async def _events(c: Client, n: int) -> None:
    await c.scheduler.event_set(name=f"e{n}")


async def _locks(c: Client, n: int) -> None:
    await c.scheduler.semaphore_register(name=f"l{n}", max_leases=1, lease_timeout=None)


async def _topics(c: Client, n: int) -> None:
    await c.scheduler.log_event(topic=f"t{n}", msg=n)


async def _large_events(c: Client, n: int) -> None:
    await c.scheduler.log_event(topic="t", msg=BLOB[:60_000])


async def _recorders(c: Client, n: int) -> None:
    await c.scheduler.start_task_metadata(name=f"r{n}")


async def _samplers(c: Client, n: int) -> None:
    await c.scheduler.memory_sampler_start(client=c.id, measure="process", interval=10)


BOUNDS: dict[Callable[[Client, int], Any], tuple[int, str]] = {
    _variables: (4, "bytes"), _queue: (4, "bytes"), _metadata_of: (4, "bytes"), _datasets: (4, "bytes"), _events: (20, "names"),
    _locks: (20, "names"), _topics: (5, "topics"), _large_events: (34, "bytes"), _recorders: (2, "recorders"), _samplers: (2, "recorders"),
}  # fmt: skip


@pytest.mark.parametrize("put", BOUNDS, ids=lambda put: put.__name__)
def test_what_a_person_keeps_is_bounded_and_the_refusal_names_the_bound(tmp_path, put):
    most, name = BOUNDS[put]

    async def scenario() -> None:
        async with two(tmp_path / "a", limits=LIMITS, workers=0) as (_scheduler, anna, bert):
            for number in range(most):
                await put(anna, number)
            with pytest.raises(PermissionError, match=rf"anna has reached a limit .*\(limits: {name}\)"):
                await put(anna, most)
            if put not in (_queue, _large_events):
                with suppress(PermissionError):  # a name of anna's
                    await put(bert, 10_000)

    run(scenario)


def test_what_is_deleted_does_not_count(tmp_path):
    async def scenario() -> None:
        async with two(tmp_path / "a", limits=LIMITS, workers=0) as (scheduler, anna, _bert):
            rpc = anna.scheduler
            await rpc.queue_create(name="q")
            for number in range(40):
                await rpc.queue_put(name="q", data=BLOB)
                await rpc.queue_get(name="q")
                await rpc.variable_set(name="same", data=BLOB)
                name = f"v{number}"
                await rpc.variable_set(name=name, data=number)
                anna._send_to_scheduler({"op": "variable_delete", "name": name})
                await until(lambda name=name: name not in scheduler.extensions["variables"].variables)

    run(scenario)


def test_graphs_gathers_clients_and_subscriptions_are_bounded(tmp_path):
    async def scenario() -> None:
        async with two(tmp_path / "a", limits=LIMITS) as (scheduler, anna, bert):
            with pytest.raises(ValueError, match=r"A graph of 101 tasks is refused.*\(limits: graph_tasks\)"):
                await anna.gather(anna.map(operator.neg, range(101)))
            kept = [anna.submit(len, BLOB[n:], pure=False) for n in range(4)]
            await anna.gather(kept)
            with pytest.raises(PermissionError, match=r"in graphs with tasks that are here \(limits: bytes\)"):
                await anna.submit(len, BLOB)
            del kept
            await until(lambda: not scheduler._graph_bytes["anna"])
            large = anna.submit(bytes, 3 << 20)
            await until(lambda: large.status == "finished")
            with pytest.raises(PermissionError, match=r"on their way through it.*\(limits: bytes\)"):
                await anna.gather(large)
            assert await anna.submit(len, large) == 3 << 20
            more = [person(scheduler, tmp_path / "a", "anna") for _ in range(3)]
            with pytest.raises(ImportError, match=r"clients at a time \(limits: clients\)"):
                async with more[0], more[1], more[2]:
                    pass
            with suppress(Exception):
                await more[2].close()
            await until(lambda: sum(peer.name == "anna" for peer in scheduler._peers.values()) == 1)
            anna._send_to_scheduler({"op": "subscribe-topic", "topic": "mine"})
            await until(lambda: "mine" in scheduler._broker._topics)
            gone = anna.id
            await anna.close()
            await until(lambda: all(gone not in topic.subscribers for topic in scheduler._broker._topics.values()))
            assert await bert.submit(load) == 1

    run(scenario)


# --- viewers, cancelled work ---------------------------------------------------------------------------------------------------------
def test_a_viewer_looks_on(tmp_path):
    made = authority(tmp_path / "a", bert=["hpda"])
    made.invite("vera", [], address="tls://127.0.0.1:1", role="viewer")

    async def scenario() -> None:
        async with guarded(made.folder) as scheduler, person(scheduler, made.folder, "bert") as bert:
            async with person(scheduler, made.folder, "vera") as vera:
                done = bert.submit(load, key="done")
                await done
                with pytest.raises(PermissionError, match="with an invitation to look on"):
                    await vera.submit(load)
                with pytest.raises(PermissionError, match="with an invitation to look on"):
                    await vera.scatter([1])
                # nor fetches what others have made, by any of the ways there are
                await bert.publish_dataset(shown=done)
                wanted = Future("done", client=vera)
                vera._send_to_scheduler({"op": "client-desires-keys", "keys": ["done"]})
                with pytest.raises(PermissionError, match="with an invitation to look on"):
                    await wanted
                with pytest.raises(PermissionError, match="with an invitation to look on"):
                    await vera.get_dataset("shown")
                for ask in ("gather", "who_has", "get_runspec", "publish_get", "variable_get", "queue_get", "proxy", "broadcast"):
                    with pytest.raises(PermissionError, match=f"{ask}, with an invitation to look on"):
                        await getattr(vera.scheduler, ask)()
                assert (await vera.scheduler.get_task_prefix_states())["done"]["memory"] == 1
                assert (await vera.scheduler.identity())["type"] == "GuardedScheduler"
            made.invite("vera", [], address="tls://nowhere:1", role="user")
            await asyncio.sleep(1.1)
            async with person(scheduler, made.folder, "vera") as vera:
                assert await vera.submit(load, key="hers") == 1

    run(scenario)


def test_the_work_of_somebody_revoked_is_cancelled_if_the_owner_says_so(tmp_path):
    made = authority(tmp_path / "a", anna=["hpda"], bert=["hpda"])

    async def scenario() -> None:
        async with guarded(made.folder) as scheduler, person(scheduler, made.folder, "bert") as bert:
            async with person(scheduler, made.folder, "anna") as anna:
                shared = anna.submit(slow, 0.1, key="shared")
                await shared
                kept = bert.submit(slow, 0.1, key="shared")
                await kept
                fire_and_forget(anna.map(slow, [2.0 + n / 10 for n in range(4)]))
                await until(lambda: len(scheduler.tasks) == 5)
                made.revoke("anna")
                await until(lambda: anna.id not in scheduler.clients)
            assert len(scheduler.tasks) == 5
            secure = {"security": tls.security(made.folder, OWNER), "asynchronous": True, "set_as_default": False}
            async with Client(scheduler.address, **secure) as owner:
                assert await owner.scheduler.cancel_work(user="anna") == 4
            await until(lambda: set(scheduler.tasks) == {"shared"})
            assert await kept == 0.1

    run(scenario)


def test_a_person_may_not_cancel_the_work_of_another(tmp_path):
    async def scenario() -> None:
        async with two(tmp_path / "a", workers=0) as (_scheduler, anna, _bert):
            with pytest.raises(PermissionError, match="cancel_work is refused to anna"):
                await anna.scheduler.cancel_work(user="bert")

    run(scenario)


def test_requests_that_the_site_has_blocked_are_blocked(tmp_path):
    async def scenario() -> None:
        with dask.config.set({"distributed.scheduler.blocked-handlers": ["feed"], "distributed.worker.blocked-handlers": ["run"]}):
            async with two(tmp_path / "a", workers=1) as (scheduler, _anna, _bert):
                assert scheduler.blocked_handlers == ["feed"]
                secure = {"security": tls.security(tmp_path / "a", OWNER), "asynchronous": True, "set_as_default": False}
                async with Client(scheduler.address, **secure) as owner:
                    with pytest.raises(Exception, match="explicitly disallowed"):
                        await owner.run(load)

    run(scenario)


def test_web_pages_are_below_a_secret_word(tmp_path):
    def status(port: int, path: str) -> int:
        with suppress(urllib.error.HTTPError), urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=60) as answer:
            return int(answer.status)
        return 404

    async def scenario() -> None:
        async with two(tmp_path / "a", workers=0) as (scheduler, anna, _bert):
            port = scheduler.http_server.port
            assert len(scheduler.pages) > 20
            for path in (
                "/",
                "/health",
                "/info/main/workers.html",
                "/status",
                "/metrics",
                "/x/cryodask/metrics",
                f"{scheduler.pages}x/health",
            ):
                assert await asyncio.to_thread(status, port, path) == 404, path
            assert await asyncio.to_thread(status, port, f"{scheduler.pages}/health") == 200
            assert scheduler.pages not in str(await anna.scheduler.identity())

    run(scenario)


def test_roles_and_limits_are_checked_where_they_are_written(tmp_path):
    from typer.testing import CliRunner

    from cryodask.cli import app
    from cryodask.cluster.access.limits import Limits
    from cryodask.cluster.access.people import People

    made = authority(tmp_path / "a")
    made.invite("vera", [], address="tls://127.0.0.1:1", role="viewer")
    assert made.people()["vera"]["role"] == "viewer"
    for options, said in ((["--role", "boss"], "no role"), (["--cancel-work"], "--revoke")):
        answer = CliRunner().invoke(app, ["cluster", "invite", "mixed", "anna", *options])
        assert answer.exit_code != 0
        assert said in answer.output + str(answer.exception)
    for wrong in ({"byte": 5}, {"names": 0}, {"clients": "many"}, {"recorders": True}):
        with pytest.raises(ValueError, match="limits has"):
            Limits.of(wrong)
    assert Limits.of({"bytes": "8 MiB"}).bytes == 8 << 20
    file = tmp_path / "people.json"
    file.write_text('{"vera": {"role": "boss"}}')
    assert People(file).look() == {}
