"""The door of a guarded server: who connects is judged between the TLS handshake and distributed's own handshake.

distributed unpickles parts of the very first message, and of every one after it, whoever sent it. So a connection is judged by its
certificate before a byte is read: authority and signature (OpenSSL), expiry (which OpenSSL does not check again for a resumed session),
serial number, invitation and role. Of messages from people who are admitted only the outermost layer is decoded (:class:`PersonTLS`).
"""

from __future__ import annotations

import asyncio
import logging
import struct
import sys
from collections import Counter
from dataclasses import dataclass
from typing import Any, Protocol

import msgpack
from distributed.comm.core import CommClosedError
from distributed.comm.tcp import TLS, TLSListener, read_bytes_rw
from distributed.protocol import pickle
from distributed.protocol.compression import decompress
from distributed.protocol.serialize import Pickled, Serialized, msgpack_decode_default
from distributed.protocol.utils import msgpack_opts
from tornado.iostream import IOStream

from cryodask.cluster.access.peers import Peer

logger = logging.getLogger(__name__)

TOO_LARGE = "cryodask-message-too-large"
"""Operation that stands for a message whose outermost layer alone was beyond the limit."""
_GREETING_BYTES = 1 << 16
_MOST_FRAMES = 1 << 20
_PIECE_BYTES = 1 << 20
_LINGER_SECONDS = 1.0
_TRUSTED = frozenset({"scheduler", "worker", "owner"})


@dataclass(frozen=True)
class Unread:
    """Stands for a part of a message that was not read, because the message was too large."""

    bytes: int


class Doorkeeper(Protocol):
    """A server with a door."""

    _comms: dict[Any, Any]

    def why_not(self, peer: Peer) -> str | None:
        """Why this peer may not connect; None if it may."""

    def message_bytes(self, peer: Peer) -> int:
        """Largest message that is read from this peer."""
        ...

    def most_connections(self, peer: Peer) -> int:
        """Connections that one person may have at a time."""
        ...

    def trusts(self, peer: Peer) -> bool:
        """Whether messages of this peer are unpickled, although it is neither scheduler nor worker nor owner."""
        ...

    def refusal(self, why: str) -> Any:
        """What is sent to somebody who may not connect: an answer to whatever they ask first."""


class PersonTLS(TLS):
    """A connection whose peer is known. Of a person's messages nothing is unpickled, and at most ``limit`` bytes are kept.

    distributed passes on what it finds as ``Serialized`` or ``Pickled`` unchanged, so results, arguments of actors and the like reach
    those who may open them.
    """

    peer = Peer()
    is_trusted = False
    limit = sys.maxsize
    most_arriving = sys.maxsize
    size = 0
    """Bytes of the last message of a person."""
    arriving: Counter[str | None]
    """Bytes of messages that are arriving, by person, over all connections of a server."""

    def _read_extra(self) -> None:
        super()._read_extra()
        self.peer = Peer.of_certificate(self._extra.get("peercert"))
        self.is_trusted = self.peer.role in _TRUSTED
        self.arriving = Counter()

    async def read(self, deserializers: Any = None) -> Any:
        """Like distributed's; of a message from a person only the outermost layer."""
        if self.is_trusted:
            return await super().read(deserializers)
        if self.stream is None:
            raise CommClosedError
        try:
            return await self._read_closed(self.stream)
        except CommClosedError:
            self.abort()
            raise
        except Exception as error:
            self.abort()
            raise CommClosedError(f"{type(error).__name__}: {error}") from error
        except BaseException:
            self.abort()
            raise

    async def _read_closed(self, stream: IOStream) -> Any:
        (total,) = struct.unpack("Q", await stream.read_bytes(8))
        (count,) = struct.unpack("Q", await stream.read_bytes(8))
        if not 0 < count <= _MOST_FRAMES or total < 8 * (count + 1):
            raise CommClosedError("this is not a valid message of distributed")
        lengths = struct.unpack(f"{count}Q", await stream.read_bytes(8 * count))
        self.size = size = sum(lengths)
        room = min(self.limit, self.most_arriving - self.arriving[self.peer.name])
        if lengths[0] > room:
            await _skip(stream, size)
            return {"op": TOO_LARGE, "reply": True, "bytes": size}
        reserved = min(size, room)
        self.arriving[self.peer.name] += reserved
        try:
            frames: list[Any] = []
            kept = 0
            for length in lengths:
                kept += length
                if kept > room:
                    await _skip(stream, length)
                    frames.append(None)
                else:
                    frames.append(await read_bytes_rw(stream, length))
            return outermost(frames, size)
        finally:
            self.arriving[self.peer.name] -= reserved


async def _skip(stream: IOStream, count: int) -> None:
    while count:
        part = min(count, _PIECE_BYTES)
        await stream.read_bytes(part)
        count -= part


def outermost(frames: list[Any], size: int) -> Any:
    """The outermost layer of a message; what is pickled or serialised in it stays so, and what was not read is :class:`Unread`."""

    def made(part: dict[Any, Any]) -> Any:
        for word, kind in (("__Serialized__", Serialized), ("__Pickled__", Pickled)):
            offset = part.get(word, 0)
            if offset > 0:
                if frames[offset] is None:
                    return Unread(size)
                header = msgpack.loads(frames[offset], object_hook=msgpack_decode_default, use_list=False, **msgpack_opts)
                inside = frames[offset + 1 : offset + 1 + header["num-sub-frames"]]
                return Unread(size) if any(frame is None for frame in inside) else kind(header, inside)
        return msgpack_decode_default(part)

    return msgpack.loads(frames[0], object_hook=made, use_list=False, **msgpack_opts)


def unpickled(part: Any) -> Any:
    """The content of a part that was left pickled; anything else unchanged."""
    if not isinstance(part, Pickled):
        return part
    header, frames = part.header, part.frames
    if "compression" in header:
        frames = decompress(header, frames)
    return pickle.loads(header["pickled-obj"], buffers=frames)


def put_door(server: Doorkeeper, listener: Any) -> None:
    """Have a listener ask ``server.why_not(peer)`` before it reads anything. Listeners without TLS cannot know who connects."""
    if not isinstance(listener, TLSListener):
        return
    arriving: Counter[str | None] = Counter()
    prepare, greet = listener._prepare_stream, listener.on_connection

    async def prepare_stream(stream: Any, address: str) -> Any:
        stream = await prepare(stream, address)
        if stream is None:
            return None
        peer = Peer.of_certificate(stream.socket.getpeercert())
        why = server.why_not(peer) or _too_many(server, peer)
        if why is None:
            return stream
        logger.warning("%s at %s is not admitted: %s", peer, address, why.partition("\n")[0])
        await _tell_blindly(PersonTLS(stream, "tls://", address, False), server.refusal(why))
        return None

    async def on_connection(comm: Any, *args: Any, **kwargs: Any) -> None:
        comm.arriving, comm.most_arriving, comm.limit = arriving, 2 * server.message_bytes(comm.peer), _GREETING_BYTES
        try:
            await greet(comm, *args, **kwargs)
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            comm.abort()
            raise CommClosedError("this is not a valid greeting of distributed") from error
        comm.limit = server.message_bytes(comm.peer)
        comm.is_trusted = comm.is_trusted or server.trusts(comm.peer)

    # on the listener itself: a class of listeners for all of TLS would catch those of clients in this process as well
    listener._prepare_stream, listener.on_connection, listener.comm_class = prepare_stream, on_connection, PersonTLS  # type: ignore[method-assign]


def _too_many(server: Doorkeeper, peer: Peer) -> str | None:
    if peer.role in _TRUSTED:
        return None
    most = server.most_connections(peer)
    if sum(getattr(comm, "peer", Peer()).name == peer.name for comm in server._comms) < most:
        return None
    return f"{peer} has {most} connections open, the most that one person may have (limits: connections)."


async def _tell_blindly(comm: PersonTLS, refusal: Any) -> None:
    """Send a greeting and a refusal without reading; the connection stays open for a moment, because a reset would overtake them."""
    greeting = {"compression": None, "python": tuple(sys.version_info)[:3], "pickle-protocol": 4}
    try:
        await comm.write(greeting)
        await comm.write(refusal)
        asyncio.get_running_loop().call_later(_LINGER_SECONDS, comm.abort)
    except (CommClosedError, OSError):
        comm.abort()
