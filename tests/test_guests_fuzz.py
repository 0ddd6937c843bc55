"""Every live operation: who may use it, and that no message of a person's harms another's things, whatever it contains."""

from __future__ import annotations

import asyncio
import inspect
import operator
import random
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import dask
import numpy as np
import pytest
from _lanes import until
from _secure import authority, guarded, person
from distributed import Client, Event, Lock, Queue, Variable, Worker
from distributed.comm.core import CommClosedError, connect
from distributed.protocol import to_serialize
from distributed.versions import get_versions

from cryodask.cluster.access import tls
from cryodask.cluster.access.gate import USER_OPS, USER_STREAM, VIEWER_OPS, VIEWER_STREAM, WORKER_OPS
from cryodask.cluster.guard import GuardedNanny, GuardedScheduler

VERSIONS = get_versions()


# --- each operation by role --------------------------------------------------------------------------------------------------------
async def said(folder: Path, address: str, who: str, op: str) -> str:
    """The error that a bare request meets, if any; a request that waits for more is let in."""
    comm = await connect(address, **tls.security(folder, who).get_connection_args("client"))
    try:
        await comm.write({"op": op, "reply": True})
        with suppress(TimeoutError):
            answer = await asyncio.wait_for(comm.read(), 5)
            return str(answer)
    except CommClosedError:
        return ""
    finally:
        comm.abort()
    return ""


def test_every_operation_of_the_live_servers_is_open_to_the_roles_that_it_is_for(tmp_path):
    made = authority(tmp_path / "a", anna=["hpda"])
    made.invite("vera", [], address="tls://127.0.0.1:1", role="viewer")

    async def scenario() -> None:
        async with guarded(made.folder, workers=1) as scheduler:
            operations = sorted(set(scheduler.handlers) - {"echo"})
            for who, allowed in (("anna", USER_OPS), ("vera", VIEWER_OPS)):
                for op in operations:
                    if op in ("register-client", "event_wait", "versions", "subscribe_worker_status"):
                        continue
                    text = await said(made.folder, scheduler.address, who, op)
                    is_refused = f" is refused to {who}: on a shared cluster it is reserved for its owner" in text
                    if op in ("broadcast", "proxy") and who == "anna":
                        assert "reserved for its owner" in text
                    else:
                        assert is_refused == (op not in allowed), (who, op, text)
            assert len(VIEWER_OPS) == 8
            assert VIEWER_OPS <= USER_OPS
            assert VIEWER_STREAM <= USER_STREAM
            for who, stream in (("anna", USER_STREAM), ("vera", VIEWER_STREAM)):
                gate = _Gate(scheduler, made.folder, who)
                for op in scheduler.stream_handlers:
                    if not gate.admits(op):
                        continue
                    assert op in stream, (who, op)
            (worker,) = scheduler.workers
            for who in ("anna", "vera"):
                assert "may not connect to a worker" in await said(made.folder, worker, who, "identity")
            assert not WORKER_OPS & USER_OPS
            assert len(scheduler.workers) == 1

    asyncio.run(asyncio.wait_for(scenario(), 120))


class _Gate:
    """Stands for the connection of somebody who has a client's stream."""

    size = 100

    def __init__(self, scheduler: GuardedScheduler, folder: Path, who: str) -> None:
        from cryodask.cluster.access.peers import Peer

        number = tls.Authority.open(folder).people()[who]["serial"]
        self.scheduler, self.peer, self.client = scheduler, Peer(who, "user", int(number, 16)), f"Client-{uuid4()}"

    def admits(self, op: str) -> bool:
        return self.scheduler.admit_to_stream(self, {"op": op})  # type: ignore[arg-type]


# --- anything at all -----------------------------------------------------------------------------------------------------------------
def load() -> int:
    return 1


GATE = threading.Event()


def held() -> int:
    """Runs to the end of the test (workers are in this process)."""
    GATE.wait(300)
    return 1


def slow(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


class Victim:
    """Bert's things, and whether they are as they were."""

    def __init__(self, scheduler: GuardedScheduler, bert: Client) -> None:
        self.scheduler, self.bert = scheduler, bert
        self.servers: list[Any] = []

    async def begin(self) -> None:
        bert, scheduler = self.bert, self.scheduler
        GATE.clear()
        self.kept = bert.submit(load, key="kept")
        await self.kept
        self.running = bert.submit(held, key="running")
        self.waiting = bert.submit(operator.neg, self.running, key="waiting")
        self.data = (await bert.scatter({"data": np.ones(3)}))["data"]
        self.variable, self.event = Variable("v", client=bert), Event("e", client=bert)
        self.queue, self.lock = await Queue("q", client=bert), Lock("l", scheduler_rpc=bert.scheduler, loop=bert.loop)
        await self.variable.set(self.kept)
        await self.event.set()
        await self.queue.put(7)
        await self.lock.acquire()
        await bert.publish_dataset(d=self.kept)
        await bert.set_metadata("m", 1)
        await until(lambda: scheduler.tasks["running"].state == "processing")
        await asyncio.sleep(0.1)
        self.before = self.state()

    def state(self) -> dict[str, Any]:
        s = self.scheduler
        tasks = {key: s.tasks.get(key) for key in ("kept", "running", "waiting", "data")}
        semaphores = s.extensions["semaphores"]
        return {
            **{
                key: ts and (ts.state, ts.run_id, ts.actor, ts.priority, ts.nbytes, str(ts.annotations), s.whose(key), s.owner_of(key).lane)
                for key, ts in tasks.items()
            },
            "wanted": sorted(ts.key for ts in s.clients[self.bert.id].wants_what) if self.bert.id in s.clients else None,
            "strangers": sorted(
                f"{cs.client_key} {ts.key}"
                for ts in tasks.values()
                if ts
                for cs in ts.who_wants or ()
                if self._is_stranger(cs.client_key, ts)
            ),
            "holders": sorted(ws.address for ws in (tasks["kept"].who_has or ())) if tasks["kept"] else None,
            "variable": s.extensions["variables"].variables.get("v"),
            "queue": s.extensions["queues"].queues["q"].qsize() if "q" in s.extensions["queues"].queues else None,
            "event": "e" in s.extensions["events"]._events and s.extensions["events"]._events["e"].is_set(),
            "lock": (semaphores.max_leases.get("l"), sorted(semaphores.leases["l"]) if "l" in semaphores.leases else None),
            "dataset": str(s.extensions["publish"].datasets.get("d", {}).get("keys")),
            "metadata": s.task_metadata.get("m"),
            "plugins": sorted(name for name in s.plugins if "of anna" not in name and name != "task-stream"),
            "extensions": {name: id(extension) for name, extension in s.extensions.items()},
            "handlers": sorted(s.handlers),
            "workers": sorted((ws.address, ws.status.name, ws.server_id) for ws in s.workers.values()),
            "servers": [(server.status.name, sorted(getattr(server, "data", ())), getattr(server, "pid", None)) for server in self.servers],
            "scheduler": s.status.name,
            "draining": s.draining,
        }

    def harm(self, message: dict[str, Any]) -> list[str]:
        """What a message has changed, in words."""
        now, before = self.state(), self.before
        self.before = now
        changed = [(name, before[name], now[name]) for name in now if now[name] != before[name]]
        return [f"{message} changed {changed}"] if changed else []

    def _is_stranger(self, client: str, ts: Any) -> bool:
        # what bert has put into a variable or a dataset others may read, and hold while they do
        return client not in (self.bert.id, "variable-v", "published-d") and ts.key != "kept"


def values(random_: random.Random, name: str, ids: list[str], workers: list[str]) -> Any:
    """An argument of that name, mostly of the kind that it should be, and often another's."""
    keys = ["kept", "running", "waiting", "data", "nothing", "mine"]
    some: dict[str, list[Any]] = {
        "keys": [keys[:1], keys, [], {"kept"}, "kept", 5, None, [["kept"]], ["m"], [["kept"]] * 2],
        "key": [*keys, None, 5, ("kept", 1)],
        "client": [*ids, "fire-and-forget", "variable-v", "published-d", "queue-q", None],
        "name": ["v", "q", "e", "l", "d", "mine", "stealing", "shuffle", "lane-memory", None, 1, "x" * 600],
        "names": [["d"], ["mine"], [], "d", [None]],
        "data": [{"kept": 5}, {"data": 5}, {"kept": to_serialize(5)}, {"running": to_serialize(5)}, [1], None, 5],
        "who_has": [{"kept": workers}, {"running": workers}, {"data": ["tls://127.0.0.1:1"]}, {}, 5],
        "nbytes": [{"kept": 1}, {"kept": -(2**62)}, {}, 5],
        "workers": [workers, ["tls://127.0.0.1:1"], [], None],
        "worker": [*workers, {"kept": workers}, None],
        "address": workers,
        "topic": ["all", "mine", *ids, None, 5, ["mine", "warn"]],
        "msg": [{"op": "terminate"}, {"op": "identity"}, {"op": "actor_execute", "actor": "kept"}, {"op": "free_keys"}, 5],
        "locks": [["l"], ["mine"], 5],
        "lease_ids": [["a"], 5],
        "tasks": [1, "many", -5, 2**62],
        "force": [True, False, "yes"],
        "actors": [["kept"], ["waiting"], True],
        "submitting_task": ["running", None],
        "expr_ser": [to_serialize({"kept": (slow, 1)}), None, 5],
        "internal_priority": [{"kept": 0}, None, 5],
        "op": ["x"],
        "interval": [1, "x", 1e-9],
        "measure": ["process", "_x", "__class__"],
        "state": ["memory"], "status": ["closed", "running"],
        "packages": [["antigravity"], None],
    }  # fmt: skip
    anything: list[Any] = [None, 0, -1, True, "x", "kept", [], {}, float("nan"), 2**63 - 1, b"x", ["kept"], {"kept": 1}]
    return random_.choice(some[name] if name in some and random_.random() < 0.85 else anything)


def messages(random_: random.Random, handlers: dict[str, Any], ids: list[str], workers: list[str]) -> Iterator[dict[str, Any]]:
    """Messages with any operation, and arguments after the names of its parameters."""
    operations = sorted(handlers)
    while True:
        op = random_.choice(operations)
        arguments = {}
        for name, parameter in inspect.signature(handlers[op]).parameters.items():
            by_name = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY) and name not in ("comm", "self")
            if by_name and (parameter.default is parameter.empty or random_.random() < 0.7):
                arguments[name] = values(random_, name, ids, workers)
        if op in ("variable_set", "variable_get", "queue_put"):
            arguments["name"] = values(random_, "name", ids, workers)
        yield {"op": op, **arguments}


@asynccontextmanager
async def attacked(folder: Path, **options: Any) -> AsyncIterator[tuple[GuardedScheduler, Victim, dict[str, Any], str]]:
    async with AsyncExitStack() as stack:
        scheduler = await stack.enter_async_context(guarded(folder, workers=2, memory_share={"hpda": 1.0}, **options))
        bert = await stack.enter_async_context(person(scheduler, folder, "bert"))
        victim = Victim(scheduler, bert)
        await victim.begin()
        secrets = tls.security(folder, "anna").get_connection_args("client")
        mine = f"Client-hpda/anna-{uuid4()}"
        yield scheduler, victim, secrets, mine
        GATE.set()


async def _registered(scheduler: GuardedScheduler, secrets: dict[str, Any], client: str) -> Any:
    comm = await connect(scheduler.address, **secrets)
    await comm.write({"op": "register-client", "client": client, "reply": False, "versions": VERSIONS})
    await asyncio.wait_for(comm.read(), 10)
    return comm


async def _fuzz(folder: Path, seed: int, count: int) -> list[str]:
    random_, harms = random.Random(seed), []
    async with attacked(folder) as (scheduler, victim, secrets, mine):
        ids = [victim.bert.id, mine]
        workers = list(scheduler.workers)
        handlers = {op: h for op, h in scheduler.handlers.items() if op not in ("register-worker", "feed")}
        requests = messages(random_, handlers, ids, workers)
        streamed = messages(random_, scheduler.stream_handlers, ids, workers)
        stream = await _registered(scheduler, secrets, mine)
        for _ in range(count):
            in_stream = random_.random() < 0.5
            message = next(streamed if in_stream else requests)
            try:
                if in_stream:
                    if stream.closed() or mine not in scheduler.clients:
                        stream.abort()
                        stream = await _registered(scheduler, secrets, mine)
                    await stream.write([message])
                    await asyncio.sleep(0.003)
                else:
                    comm = await connect(scheduler.address, **secrets)
                    try:
                        await comm.write({**message, "reply": True})
                        with suppress(TimeoutError, CommClosedError):
                            await asyncio.wait_for(comm.read(), 0.05)
                    finally:
                        comm.abort()
            except (CommClosedError, TypeError, OSError):  # closed by the other side, or what cannot be sent at all
                pass
            harms += victim.harm(message)
        stream.abort()
    return harms


async def _fuzz_workers(folder: Path, seed: int, count: int, admitted: bool) -> list[str]:
    """The same to two workers and a nanny, which do or do not speak to people."""
    random_, harms = random.Random(seed), []
    async with attacked(folder, people_on_workers=admitted) as (scheduler, victim, secrets, mine):
        with dask.config.set({"cryodask.people_on_workers": admitted}):
            nanny = GuardedNanny(scheduler.address, nthreads=1, host="127.0.0.1", name="n", security=tls.security(folder, "worker"))
        async with nanny:
            await until(lambda: len(scheduler.workers) == 3)
            servers = [worker for worker in Worker._instances if worker.address in scheduler.workers] + [nanny]
            assert len(servers) == 3
            victim.servers, victim.before = servers, {}
            victim.before = victim.state()
            addresses = [server.address for server in servers]
            streams = [messages(random_, server.handlers, [victim.bert.id, mine], addresses) for server in servers]
            for _ in range(count):
                place = random_.randrange(3)
                message = next(streams[place])
                with suppress(CommClosedError, TypeError, OSError):
                    comm = await connect(addresses[place], **secrets)
                    try:
                        await comm.write({**message, "reply": True})
                        with suppress(TimeoutError):
                            await asyncio.wait_for(comm.read(), 0.05)
                    finally:
                        comm.abort()
                harms += victim.harm(message)
    return harms


@pytest.mark.parametrize("seed", [1, pytest.param(11, marks=pytest.mark.slow)])
def test_no_message_of_a_persons_changes_anothers_things(tmp_path, seed):
    folder = authority(tmp_path / "a", anna=["hpda"], bert=["hpda"]).folder
    count = 2000 if seed == 11 else 400
    harms = asyncio.run(asyncio.wait_for(_fuzz(folder, seed, count), 500))
    assert harms == []


@pytest.mark.parametrize("admitted", [False, pytest.param(True, marks=pytest.mark.heavy)])
def test_no_message_to_workers_and_nannies_changes_anothers_things(tmp_path, admitted):
    folder = authority(tmp_path / "a", anna=["hpda"], bert=["hpda"]).folder
    assert asyncio.run(asyncio.wait_for(_fuzz_workers(folder, 3, 200, admitted), 500)) == []
