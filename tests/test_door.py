"""Nobody's bytes are interpreted before their certificate was looked at; of people's messages nothing but a graph is unpickled."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import struct
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import dask
import pytest
from _lanes import until
from _secure import OWNER, authority, guarded, person, warned
from distributed import Client, Worker
from distributed.comm.core import CommClosedError, connect
from distributed.comm.tcp import TLSConnector
from distributed.protocol import to_serialize
from distributed.protocol.serialize import ToPickle

from cryodask.cluster.access import door, tls
from cryodask.cluster.access.gate import GuardedNanny
from cryodask.cluster.access.peers import Peer
from cryodask.cluster.access.people import People
from cryodask.cluster.guard import GuardedScheduler

GREETING = {"compression": None, "python": (3, 11, 0), "pickle-protocol": 5}


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def messages(folder: Path) -> dict[str, tuple[Any, Any]]:
    """By place of the payload: the greeting, and the message after it."""
    pickled, serialised = ToPickle(Payload(folder)), to_serialize(Payload(folder))
    return {
        "greeting": ({**GREETING, "more": pickled}, {"op": "identity", "reply": True}),
        "request": (GREETING, {"op": "identity", "more": pickled, "reply": True}),
        "serialized": (GREETING, {"op": "update_data", "data": {"x": serialised}, "who_has": {}, "nbytes": {}, "reply": True}),
        "unknown": (GREETING, {"op": "no such request", "more": pickled, "reply": True}),
    }


async def sent(address: str, arguments: dict[str, Any], greeting: Any, message: Any) -> str:
    """Send a greeting and a message over a new connection; returns what came back."""
    comm = await TLSConnector().connect(address.removeprefix("tls://"), deserialize=True, **arguments)
    said = []
    try:
        await comm.write(greeting)
        await comm.write(message)
        for _ in range(2):
            said.append(str(await asyncio.wait_for(comm.read(), 10)))
    except (CommClosedError, OSError):
        pass
    finally:
        comm.abort()
    return " ".join(said)


def arguments(folder: Path, name: str) -> dict[str, Any]:
    return dict(tls.security(folder, name).get_connection_args("client"))


@pytest.mark.parametrize("where", ["greeting", "request", "serialized", "unknown"])
@pytest.mark.parametrize("who", ["invited", "revoked", "never invited", "replaced"])
def test_a_payload_never_runs_on_scheduler_worker_or_nanny(tmp_path, who, where):
    made = authority(tmp_path / "a", anna=["hpda"])
    credentials = arguments(made.folder, "anna")
    if who == "revoked":
        made.revoke("anna")
    elif who == "never invited":
        (made.folder / "people.json").write_text("{}")
    elif who == "replaced":
        made.invite("anna", ["hpda"], address="tls://127.0.0.1:1")

    async def run() -> None:
        async with guarded(made.folder, workers=1) as scheduler:
            nanny = GuardedNanny(scheduler.address, nthreads=1, host="127.0.0.1", security=tls.security(made.folder, "worker"))
            nanny.auto_restart = False
            with suppress(Exception):
                await nanny.listen("tls://127.0.0.1:0", **nanny.security.get_listen_args("worker"))
            (worker,) = scheduler.workers
            for number, address in enumerate((scheduler.address, worker, nanny.listeners[-1].contact_address)):
                folder = tmp_path / f"ran-{number}"
                said = await sent(address, credentials, *messages(folder)[where])
                assert not folder.exists(), address
                if number or who != "invited":
                    assert "may not connect" in said or "is not invited" in said, said
            nanny._stop_listeners()
            async with Client(
                scheduler.address, security=tls.security(made.folder, OWNER), asynchronous=True, set_as_default=False
            ) as owner:
                assert await owner.submit(sum, [1, 2]) == 3

    asyncio.run(asyncio.wait_for(run(), 60))


def test_a_certificate_of_another_authority_does_not_get_as_far_as_that(tmp_path):
    made, other = authority(tmp_path / "a", anna=["hpda"]), authority(tmp_path / "b", anna=["hpda"])
    foreign = dict(arguments(other.folder, "anna"))

    async def run() -> None:
        async with guarded(made.folder, workers=0) as scheduler:
            context = foreign["ssl_context"]
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            for where, (greeting, message) in messages(tmp_path / "ran").items():
                with suppress(OSError, CommClosedError):
                    await sent(scheduler.address, foreign, greeting, message)
                assert not (tmp_path / "ran").exists(), where

    asyncio.run(asyncio.wait_for(run(), 60))


def frame(message: bytes) -> bytes:
    """A message of distributed with one frame."""
    return struct.pack("<QQQ", 16 + len(message), 1, len(message)) + message


def test_an_expired_certificate_is_refused_with_a_resumed_session_as_well(tmp_path):
    """OpenSSL does not verify again when a session is resumed."""
    made = authority(tmp_path / "a")
    made.invite("anna", ["hpda"], address="tls://127.0.0.1:1", days=4 / 86400)
    context = arguments(made.folder, "anna")["ssl_context"]
    ends = Peer.of_certificate(_certificate(made.folder / "anna.pem")).expires

    def first(address: tuple[str, int]) -> Any:
        with socket.create_connection(address, 10) as plain, context.wrap_socket(plain, server_hostname=address[0]) as secure:
            secure.recv(1 << 16)
            return secure.session

    def again(address: tuple[str, int], session: Any) -> tuple[bool, bytes]:
        with socket.create_connection(address, 10) as plain:
            with context.wrap_socket(plain, server_hostname=address[0], session=session) as secure:
                said = b""
                with suppress(OSError):
                    secure.sendall(frame(b"\x80"))
                    while part := secure.recv(1 << 16):
                        said += part
                return bool(secure.session_reused), said

    async def run() -> None:
        async with guarded(made.folder, workers=0) as scheduler:
            host, port = scheduler.address.removeprefix("tls://").split(":")
            session = await asyncio.to_thread(first, (host, int(port)))
            await until(lambda: time.time() > ends + 0.1)
            reused, said = await asyncio.to_thread(again, (host, int(port)), session)
            assert reused
            assert b"has expired" in said

    asyncio.run(asyncio.wait_for(run(), 60))


def _certificate(path: Path) -> dict[str, Any]:
    return ssl._ssl._test_decode_cert(str(path))  # type: ignore[attr-defined, no-any-return]


def test_a_connection_ends_with_its_certificate(tmp_path):
    made = authority(tmp_path / "a")
    made.invite("anna", ["hpda"], address="tls://127.0.0.1:1", days=5 / 86400)

    async def run() -> None:
        async with guarded(made.folder, workers=0) as scheduler:
            with warned("has expired"):
                async with person(scheduler, made.folder, "anna") as anna:
                    assert anna.id in scheduler.clients
                    await until(lambda: anna.id not in scheduler.clients)

    asyncio.run(asyncio.wait_for(run(), 60))


def test_a_revocation_closes_connections_to_scheduler_and_to_workers_that_admit_people(tmp_path):
    made = authority(tmp_path / "a", anna=["hpda"], bert=["hpda"])

    async def run() -> None:
        async with guarded(made.folder, workers=1, people_on_workers=True) as scheduler:
            (worker,) = scheduler.workers
            async with person(scheduler, made.folder, "bert") as bert:
                with warned("anna is not invited"):
                    async with person(scheduler, made.folder, "anna") as anna:
                        stays = anna.submit(time.sleep, 0.1, key="anna's")
                        await stays
                        straight = await connect(worker, **arguments(made.folder, "anna"))
                        made.revoke("anna")
                        await until(lambda: anna.id not in scheduler.clients and "anna's" not in scheduler.tasks)
                        with pytest.raises(CommClosedError):
                            await straight.read()
                assert await bert.submit(sum, [1, 2]) == 3
                said = await sent(worker, arguments(made.folder, "anna"), GREETING, {"op": "identity", "reply": True})
                assert "is not invited" in said

    asyncio.run(asyncio.wait_for(run(), 60))


def test_a_message_beyond_the_limit_is_refused_without_being_kept(tmp_path):
    made = authority(tmp_path / "a", anna=["hpda"])

    async def run() -> None:
        async with guarded(made.folder, workers=1, max_graph_bytes="1 MiB") as scheduler:
            async with person(scheduler, made.folder, "anna") as anna:
                held: list[int] = []
                read = door.read_bytes_rw

                async def note(stream: Any, count: int) -> Any:
                    held.append(count)
                    return await read(stream, count)

                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(door, "read_bytes_rw", note)
                    with pytest.raises(ValueError, match="is refused: this scheduler accepts at most"):
                        await anna.submit(len, b"x" * (64 << 20))
                    assert max(held) <= 3 << 20
                assert await anna.submit(sum, [1, 2]) == 3
                # the outermost layer itself
                request = {"op": "identity", "more": "x" * (8 << 20), "reply": True}
                said = await sent(scheduler.address, arguments(made.folder, "anna"), GREETING, request)
                assert "A message is refused" in said

    with dask.config.set({"distributed.comm.offload": False}):
        asyncio.run(asyncio.wait_for(run(), 60))


def test_one_person_has_a_bounded_number_of_connections(tmp_path):
    made = authority(tmp_path / "a", anna=["hpda"], bert=["hpda"])

    async def run() -> None:
        async with guarded(made.folder, workers=1, limits={"connections": 5}) as scheduler:
            credentials = arguments(made.folder, "anna")
            open_ones = [await connect(scheduler.address, **credentials) for _ in range(5)]
            assert "5 connections open" in await sent(scheduler.address, credentials, GREETING, {"op": "identity", "reply": True})
            async with person(scheduler, made.folder, "bert") as bert:
                assert await bert.submit(sum, [1, 2]) == 3
            for comm in open_ones:
                comm.abort()
            await until(lambda: len(scheduler._comms) < 5)
            async with person(scheduler, made.folder, "anna") as anna:
                assert await anna.submit(sum, [1, 2]) == 3

    asyncio.run(asyncio.wait_for(run(), 60))


@pytest.mark.parametrize(
    "raw", [b"\x00" * 64, b"GET / HTTP/1.1\r\n\r\n" + b"x" * 64, struct.pack("<QQ", 1 << 60, 1 << 60), frame(b"\xc1"), frame(b"\x01")]
)
def test_bytes_that_are_no_message_end_their_connection_and_nothing_else(tmp_path, raw):
    made = authority(tmp_path / "a", anna=["hpda"])
    context = arguments(made.folder, "anna")["ssl_context"]

    def throw(address: tuple[str, int]) -> None:
        with socket.create_connection(address, 10) as plain, context.wrap_socket(plain, server_hostname=address[0]) as secure:
            secure.sendall(raw)
            with suppress(OSError):
                while secure.recv(1 << 16):
                    pass

    async def run() -> None:
        async with guarded(made.folder, workers=1) as scheduler, person(scheduler, made.folder, "anna") as anna:
            host, port = scheduler.address.removeprefix("tls://").split(":")
            await asyncio.to_thread(throw, (host, int(port)))
            assert await anna.submit(sum, [1, 2]) == 3

    asyncio.run(asyncio.wait_for(run(), 60))


def test_a_list_of_people_that_cannot_be_read_holds_for_a_while_and_then_admits_nobody(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("cryodask.cluster.access.people.monotonic", lambda: clock[0])
    file = tmp_path / "people.json"
    file.write_text('{"anna": {"serial": "1F"}}')
    people, anna = People(file), Peer("anna", "user", 0x1F)
    assert people.invites(anna)
    for text in ('{"anna": ', "[]", '{"anna": 1}', '{"anna": {"serial": "no number"}}'):
        file.write_text(text)
        clock[0] += 2.0
        assert people.invites(anna)
    clock[0] += 9.0
    assert not people.invites(anna)
    file.write_text('{"anna": {"serial": "1F"}, "bert": {"serial": "20"}}')
    assert people.invites(anna)
    file.unlink()
    clock[0] += 2.0
    assert not people.invites(anna)


def test_a_guard_that_is_put_around_a_running_scheduler_has_its_door(tmp_path):
    """``--preload cryodask.cluster.guard``: its listeners are there already."""
    from distributed import Scheduler

    from cryodask.cluster.guard import dask_setup

    made = authority(tmp_path / "a", anna=["hpda"])
    settings = {"cryodask.guard": {"owner": OWNER, "users": str(made.folder / "people.json")}}

    async def run() -> None:
        security = tls.security(made.folder, "scheduler")
        pages = {"dashboard_address": "127.0.0.1:0"}
        async with Scheduler(host="127.0.0.1", port=0, protocol="tls", security=security, **pages) as scheduler:
            with dask.config.set(settings):
                await dask_setup(scheduler)
            assert isinstance(scheduler, GuardedScheduler)
            for where, (greeting, message) in messages(tmp_path / "ran").items():
                await sent(scheduler.address, arguments(made.folder, "anna"), greeting, message)
                assert not (tmp_path / "ran").exists(), where
            worker = {"nthreads": 1, "host": "127.0.0.1", "dashboard": False, "security": tls.security(made.folder, "worker")}
            async with Worker(scheduler.address, **worker), person(scheduler, made.folder, "anna") as anna:
                assert await anna.submit(sum, [1, 2]) == 3

    asyncio.run(asyncio.wait_for(run(), 60))
