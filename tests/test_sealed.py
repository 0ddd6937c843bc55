"""A task that a worker cannot unpickle fails with its reason; no worker ends, and others are served."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from typing import Any

import dask
import numpy as np
import pytest
from _lanes import client, cluster
from _secure import authority, guarded, person
from dask._task_spec import Task
from distributed import Client, get_client
from distributed.protocol import core as messages
from distributed.protocol.pickle import dumps, loads

from cryodask.cluster import LaneCluster
from cryodask.cluster.sharing.sealed import Sealed, sealed

OPENED: set[int] = set()


class Closed:
    """An argument that only the first who unpickles it can read: the scheduler can, and a worker in the same process cannot."""

    count = 0

    def __init__(
        self, kind: type[BaseException] = ModuleNotFoundError, said: Any = "No module named 'only_there'", number: int = 0
    ) -> None:
        Closed.count += not number
        self.number, self.kind, self.said = number or Closed.count, kind, said

    def __reduce__(self) -> Any:
        return opened_once, (self.kind, self.said, self.number)


def opened_once(kind: type[BaseException], said: Any, number: int) -> Closed:
    if number in OPENED:
        raise kind(said)
    OPENED.add(number)
    return Closed(kind, said, number)


class Unspeakable:
    def __str__(self) -> str:
        raise ValueError("not even its text can be read")


def increment(value: Any) -> Any:
    return value + 1


async def is_served(one: Client) -> bool:
    return bool(await one.submit(increment, 1, pure=False) == 2)


@pytest.mark.parametrize("threads", [1, 4])
def test_two_hundred_of_them_end_no_worker_and_hold_up_nobody(threads):
    async def scenario() -> None:
        async with cluster(2, threads, resources={"box": 4}, lanes={"hpda": 1, "live": 1}) as scheduler:
            before = {address: ws.server_id for address, ws in scheduler.workers.items()}
            async with client(scheduler, "hpda/ben") as ben, client(scheduler, "live/anna") as anna:
                kept = anna.submit(increment, 41, key="kept")
                await kept
                plain = ben.map(increment, [Closed() for _ in range(150)], pure=False)
                boxed = ben.map(increment, [Closed() for _ in range(50)], pure=False, resources={"box": 1})
                assert await is_served(anna)
                for future in [*plain, *boxed]:
                    with pytest.raises(ModuleNotFoundError, match=r"^Worker \S+ on \S+ cannot read task .*only_there"):
                        await future
                dependent = ben.submit(increment, plain[0])
                with pytest.raises(ModuleNotFoundError, match="only_there"):
                    await dependent
                assert await kept == 42
                assert await is_served(ben)
                assert {address: ws.server_id for address, ws in scheduler.workers.items()} == before

    asyncio.run(asyncio.wait_for(scenario(), 120))


@pytest.mark.parametrize(
    ("kind", "said", "seen"),
    [
        (AttributeError, "module 'there' has no attribute 'f'", "AttributeError: module 'there' has no attribute 'f'"),
        (SystemExit, 1, "SystemExit: 1"),
        (KeyboardInterrupt, "", "KeyboardInterrupt"),
        (ValueError, Unspeakable(), "ValueError"),
    ],
)
def test_whatever_unpickling_raises_is_the_error_of_its_task(kind, said, seen):
    async def scenario() -> None:
        async with cluster(1) as scheduler, client(scheduler, "hpda/ben") as ben:
            with pytest.raises(RuntimeError, match=rf"cannot read task .*{seen}"):
                await ben.submit(increment, Closed(kind, said), pure=False)
            assert await is_served(ben)

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_on_a_guarded_cluster_and_from_within_a_task(tmp_path):
    async def within(value: int) -> str:
        async with get_client() as mine:
            try:
                return str(await mine.submit(increment, Closed(), pure=False))
            except ModuleNotFoundError as error:
                return str(error)

    async def scenario() -> None:
        folder = authority(tmp_path, anna=["hpda"]).folder
        async with guarded(folder) as scheduler, person(scheduler, folder, "anna") as anna:
            before = set(scheduler.workers)
            with pytest.raises(ModuleNotFoundError, match="cannot read task"):
                await anna.submit(increment, Closed(), pure=False)
            assert "only_there" in await anna.submit(within, 1)
            assert await is_served(anna)
            assert set(scheduler.workers) == before

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_a_graph_that_the_scheduler_cannot_read_is_the_error_of_its_sender_alone(tmp_path):
    """distributed told everybody who had a future of one of its keys, and their clients unpickled the sender's exception."""

    async def scenario() -> None:
        folder = authority(tmp_path, anna=["hpda"], ben=["hpda"]).folder
        async with guarded(folder) as scheduler, person(scheduler, folder, "anna") as anna, person(scheduler, folder, "ben") as ben:
            kept = anna.submit(increment, 1, key="load")
            assert await kept == 2
            unreadable = Closed(ValueError, "unreadable")
            OPENED.add(unreadable.number)
            with pytest.raises(Exception, match="deserialization of the task graph"):
                await ben.submit(increment, unreadable, key="load")
            assert kept.status == "finished"
            assert await anna.submit(increment, kept) == 3

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_a_module_that_only_the_driver_has_is_named(tmp_path, monkeypatch):
    """The case as it was met: worker processes without a module that driver and scheduler have."""
    (tmp_path / "only_here_.py").write_text("def f(x):\n    return x + 1\n")
    with LaneCluster(n_workers=1, threads_per_worker=1, dashboard_address="127.0.0.1:0") as made, Client(made, name="hpda/ben") as ben:
        process = ben.submit(os.getpid).result(60)
        monkeypatch.syspath_prepend(str(tmp_path))
        import only_here_

        with pytest.raises(ModuleNotFoundError, match=r"(?s)cannot read task .*No module named 'only_here_'.*install the module"):
            ben.submit(only_here_.f, 1).result(60)
        assert ben.submit(os.getpid, pure=False).result(60) == process


def test_arrays_and_graphs_of_every_kind_come_through_unchanged():
    async def scenario() -> None:
        async with cluster(2, lanes={"hpda": 1}) as scheduler, client(scheduler, "hpda/ben") as ben:
            array = np.arange(1_000_000.0)
            assert await ben.submit(np.sum, array) == array.sum()
            assert await ben.gather(ben.map(increment, range(10))) == list(range(1, 11))
            import dask.array as da

            assert await ben.compute((da.from_array(array, chunks=100_000) + 1).sum()) == (array + 1).sum()
            assert await ben.compute(dask.delayed(sum)([dask.delayed(increment)(n) for n in range(5)])) == 15

    asyncio.run(asyncio.wait_for(scenario(), 60))


@pytest.mark.parametrize("known", [True, False])
def test_large_arguments_are_not_copied_into_the_message(known):
    spec = Task("t", np.sum, np.zeros(1_000_000))
    buffers: list[Any] = []
    frame = dumps(Sealed(spec, known), buffer_callback=buffers.append)
    assert len(frame) < 3_500
    assert sum(memoryview(b).nbytes for b in buffers) == 8_000_000
    again = loads(frame, buffers=buffers)
    assert again.key == "t"
    assert again() == 0.0


def test_a_worker_without_cryodask_opens_them_too(tmp_path):
    """The function arrives by value; the environment of the other process cannot import the package."""
    good, bad = tmp_path / "good", tmp_path / "bad"
    good.write_bytes(dumps(Sealed(Task("t", sum, [1, 2]), known=False)))
    (tmp_path / "only_there_.py").write_text("def f():\n    return 1\n")
    sys.path.insert(0, str(tmp_path))
    try:
        import only_there_

        bad.write_bytes(dumps(Sealed(Task("u", only_there_.f), known=False)))
    finally:
        sys.path.remove(str(tmp_path))
    code = (
        "import sys, pickle\n"
        "class Not:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'cryodask': raise ImportError(name)\n"
        "sys.meta_path.insert(0, Not())\n"
        "print(pickle.load(open('good', 'rb'))())\n"
        "try: pickle.load(open('bad', 'rb'))()\n"
        "except ModuleNotFoundError as error: print(error)\n"
    )
    said = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert said.startswith("3\n")
    assert "No module named 'only_there_'" in said


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("key", ["t", ("t", 3), "ключ"])
@pytest.mark.parametrize("argument", [[1, 2], np.arange(3), np.zeros(100_000), b"x" * 100_000], ids=["list", "few", "array", "bytes"])
def test_what_a_worker_reads_of_a_message_is_the_task(known, key, argument):
    """Through distributed's own messages, with and without arrays that travel beside the pickle, and functions without a module."""
    for function in (len, lambda values: len(values)):
        again = messages.loads(messages.dumps({"run_spec": sealed(Task(key, function, argument), known)}))["run_spec"]
        assert isinstance(again, Task)
        assert again.key == key
        assert again() == len(argument)


def test_a_task_that_cannot_be_read_is_one_that_fails_in_its_own_name():
    closed = Closed(ValueError, "not here")
    message = messages.dumps({"run_spec": sealed(Task(("u", 1), increment, closed), True)})
    OPENED.add(closed.number)
    task = messages.loads(message)["run_spec"]
    assert task.key == ("u", 1)
    with pytest.raises(RuntimeError, match=r"cannot read task .'u', 1.\. ValueError: not here"):
        task()


def test_what_is_sealed_is_small():
    spec = Task("t", increment, 1)
    assert len(dumps(Sealed(spec, known=True))) - len(dumps(spec)) < 150
