"""Identifies the peer of a connection and filters every message before distributed sees it.

Distributed calls the handler that a message names, for anybody who is connected. A gate wraps the connection's ``read``: it
answers a refused request itself with a PermissionError, and drops refused messages from a client's stream. Requests that are not listed
here as harmless are reserved for the owner, so that new requests of later versions of distributed are closed until reviewed.
"""

from __future__ import annotations

import hmac
import ipaddress
import logging
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from time import time
from typing import Any, Protocol, TypeVar

import dask
from distributed import Nanny, Worker
from distributed.comm import Comm
from distributed.core import Server, error_message
from tornado import web

from cryodask.cluster.access.door import put_door
from cryodask.cluster.access.peers import ASKING, Peer
from cryodask.cluster.access.versions import RELEASE
from cryodask.cluster.environment import as_the_site_says
from cryodask.errors import ClusterError

logger = logging.getLogger(__name__)

_MOST_ON_WORKER = 8

REPORTS = "cryodask-reports-"
"""Topics under which workers report to the driver of a run."""

USER_OPS = frozenset({
    # connecting
    "register-client", "identity", "versions", "echo",
    # data
    "scatter", "gather", "update_data", "retry", "who_has", "has_what", "nbytes", "get_runspec", "get_error_cause",
    # inspection
    "ncores", "ncores_running", "processing", "call_stack", "profile", "events",
    "get_task_status", "get_task_stream", "get_task_stream_index", "get_task_prefix_states", "get_story", "subscribe_worker_status",
    "start_task_metadata", "stop_task_metadata", "memory_sampler_start", "memory_sampler_stop", "adaptive_target", "get_metadata",
    # shared by name
    "event_clear", "event_is_set", "event_set", "event_wait", "multi_lock_acquire", "multi_lock_release", "lock_acquire", "lock_release",
    "lock_locked", "publish_get", "publish_list", "publish_put", "publish_delete", "publish_wait_flush",
    "queue_create", "queue_get", "queue_put", "queue_qsize",
    "semaphore_acquire", "semaphore_close", "semaphore_refresh_leases", "semaphore_register", "semaphore_release", "semaphore_value",
    "variable_get", "variable_set",
    # checked further by the scheduler
    "broadcast", "proxy", "set_metadata", "log_event",
    # of a service
    "cluster_status", "cluster_usage", "announce_work",
})  # fmt: skip
"""Requests to the scheduler that anybody may make."""

WORKER_OPS = frozenset({
    "register-worker", "register_nanny", "unregister", "heartbeat_worker", "add_keys", "set_resources",
    "shuffle_barrier", "shuffle_get", "shuffle_get_or_create", "shuffle_restrict_task",
})  # fmt: skip
"""Additional requests to the scheduler by workers and nannies."""

OWNER_OPS = frozenset({
    "terminate", "restart", "restart_workers", "retire_workers", "workers_to_close", "check_idle", "run_function", "feed",
    "register_scheduler_plugin", "unregister_scheduler_plugin", "register_worker_plugin", "unregister_worker_plugin",
    "register_nanny_plugin", "unregister_nanny_plugin", "amm_handler", "set_restrictions", "rebalance", "replicate",
    "benchmark_hardware", "get_cluster_state", "dump_cluster_state_to_url", "dump_state", "connection_stream",
    "performance_report", "get_logs", "logs", "worker_logs",
    "cluster_scale", "cluster_stop", "cluster_hand_over", "cancel_work",
})  # fmt: skip
"""Known requests to the scheduler that are reserved for the owner, as are all unknown ones."""

USER_STREAM = frozenset({
    "update-graph", "client-desires-keys", "client-releases-keys", "cancel-keys", "report-key", "heartbeat-client",
    "close-client", "close-stream", "subscribe-topic", "unsubscribe-topic", "publish_flush_batched_send", "queue-future-release",
    "queue_release", "variable-future-release", "variable-future-received-confirm", "variable_delete",
})  # fmt: skip
"""Messages allowed in a client's stream; distributed would also accept those of a worker's stream."""

VIEWER_OPS = frozenset({
    "identity", "versions", "ncores", "ncores_running", "get_task_prefix_states", "cluster_status", "cluster_usage", "register-client",
})  # fmt: skip
"""Requests to the scheduler that a viewer may make."""

VIEWER_STREAM = frozenset({"heartbeat-client", "close-client", "close-stream", "client-releases-keys"})
"""Messages allowed in a viewer's stream."""

USER_ON_WORKER = frozenset({"identity", "echo", "ping", "keys", "get_data"})
"""Requests that a person may make to a worker that admits people: fetching results."""

FORWARDED = frozenset({"identity", "versions", "ping", "keys", "actor_execute", "actor_attribute"})
"""Requests that the scheduler forwards to workers for anybody."""


class Doorkeeper(Protocol):
    """A server behind gates."""

    def admit(self, gate: Gate, message: dict[str, Any]) -> None:
        """Raise PermissionError, ValueError or TypeError if this peer may not make this request."""

    def admit_to_stream(self, gate: Gate, message: dict[str, Any]) -> bool:
        """Whether a message of a client's stream is passed on; it may be changed."""
        ...


class Refusal(Exception):
    """A registration is refused; ``reply`` is in the form that the other side understands."""

    def __init__(self, reply: Any, why: str) -> None:
        super().__init__(why)
        self.reply = reply


class Gate:
    """Reads for a server from one connection."""

    def __init__(self, server: Doorkeeper, comm: Comm) -> None:
        self.server, self.comm, self.peer = server, comm, Peer.of(comm)
        self.client: str | None = None
        self._read = comm.read
        comm.read = self.read  # type: ignore[method-assign]

    async def read(self, *args: Any, **kwargs: Any) -> Any:
        """The next message that is allowed."""
        while True:
            message = await self._read(*args, **kwargs)
            ASKING.set(self.peer)
            if self.client is not None:
                return self._sifted(message)
            if not isinstance(message, dict) or "op" not in message:
                return message
            try:
                self.server.admit(self, message)
                return message
            except Refusal as refusal:
                logger.warning("%s at %s: %s", self.peer, self.comm.peer_address, refusal)
                await self.comm.write(refusal.reply)
            except (PermissionError, ValueError, TypeError) as error:
                logger.warning("Refused to %s at %s: %s", self.peer, self.comm.peer_address, str(error).partition("\n")[0])
                if message.get("reply", True):
                    await self.comm.write(error_message(error, status="uncaught-error"))

    def _sifted(self, messages: Any) -> Any:
        if not isinstance(messages, list | tuple):
            messages = (messages,)
        return _Sifted(messages, lambda m: not isinstance(m, dict) or "op" not in m or self.server.admit_to_stream(self, m))

    @property
    def size(self) -> int:
        """Bytes of the last message of a person."""
        return getattr(self.comm, "size", 0)

    def step_aside(self) -> None:
        """Stop filtering this connection."""
        self.comm.read = self._read  # type: ignore[method-assign]


class _Sifted(list[Any]):
    """Messages of a client's stream, each checked only after those before it have been handled."""

    def __init__(self, messages: Iterable[Any], is_admitted: Callable[[Any], bool]) -> None:
        super().__init__(messages)
        self._is_admitted = is_admitted

    def __iter__(self) -> Iterator[Any]:
        return (message for message in super().__iter__() if self._is_admitted(message))

    def __getitem__(self, which: Any) -> Any:
        return _Sifted(super().__getitem__(which), self._is_admitted)


def refused(what: str, peer: Peer | str, owner: str | None) -> PermissionError:
    """The error for a request that is reserved for others."""
    who = f"its owner ({owner})" if owner else "its owner"
    return PermissionError(
        f"{what} is refused to {peer}: on a shared cluster it is reserved for {who}.\n"
        "  Usual reason: the notebook was written for a private cluster\n"
        f"  What to do: leave out the call, or ask {owner or 'the owner'}; close() ends your own connection"
    )


def refused_client(why: str) -> Refusal:
    """The reply to a client's registration that makes it raise ImportError."""
    return Refusal([{"op": "stream-start", "error": why}], why.partition("\n")[0])


def refused_worker(why: str) -> Refusal:
    """The reply to a worker's registration that makes it exit."""
    return Refusal({"status": "error", "message": why, "time": time()}, why.partition("\n")[0])


def too_large(size: str, limit: str) -> ValueError:
    """The error of every future of a refused graph."""
    return ValueError(
        f"A graph of {size} is refused: this scheduler accepts at most {limit}.\n"
        "  Usual reason: large arrays are inside the graph, or the chunks are very small\n"
        "  What to do: scatter the arrays or load them in tasks; use larger chunks; submit in several parts"
    )


def check_sockets(server: Any) -> None:
    """Raise if a server can be reached from other machines without TLS, by its own protocol or its web pages."""
    listening = [(listener.listen_address, listener.listen_address.startswith("tls://")) for listener in server.listeners]
    pages = getattr(server, "http_server", None)
    if pages is not None:
        encrypted = pages.ssl_options is not None
        listening += [(f"http://{_bracketed(*s.getsockname()[:2])}", encrypted) for s in pages._sockets.values()]
    for address, encrypted in listening:
        if not encrypted and not address.startswith("inproc://") and not _on_loopback(address):
            raise ClusterError(
                f"{address} would be reachable from other machines without TLS.",
                "no certificates were given, or the dashboard address was left at its default",
                "start it with certificates (cryodask.cluster.access.tls), or with  host: 127.0.0.1  and  dashboard address: 127.0.0.1:0",
            )


def with_secret_pages(options: dict[str, Any]) -> dict[str, Any]:
    """Options of a server; with TLS its pages get a secret prefix, because they have no log-in and other accounts can reach them."""
    security = options.get("security")
    if security is not None and getattr(security, "require_encryption", False):
        options.setdefault("http_prefix", f"/{secrets.token_urlsafe(16)}")
    return options


def hide_pages(server: Any, prefix: str) -> None:
    """Answer no request outside the secret prefix, not even with a redirection to it."""
    application = getattr(server, "http_application", None)
    if application is None or prefix == "/" or hasattr(application, "nothing"):
        return
    application.nothing, find = web.Application([]), application.find_handler

    def find_handler(request: Any, **options: Any) -> Any:
        inside = hmac.compare_digest(request.path[: len(prefix) + 1].encode(), f"{prefix}/".encode())
        return (find if inside else application.nothing.find_handler)(request, **options)

    application.find_handler = find_handler


def _bracketed(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _on_loopback(address: str) -> bool:
    host = address.split("://", 1)[-1].rsplit(":", 1)[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


# --- servers behind gates --------------------------------------------------------------------------------------------------------
Guarded = TypeVar("Guarded", bound=type[Server])


def behind_gates(kind: Guarded) -> Guarded:
    """Class decorator: a server that reads through gates, and refuses to start if other machines could reach it without TLS.

    Not a mix-in, because the preload changes the class of a running server, which Python does not allow with two bases.
    """
    base: Any = kind.__bases__[0]

    def handle_comm(self: Any, comm: Comm) -> Any:
        """Like distributed's, but behind a gate."""
        Gate(self, comm)
        return base.handle_comm(self, comm)

    async def listen(self: Any, *args: Any, **kwargs: Any) -> None:
        """Like distributed's, but with a door."""
        await base.listen(self, *args, **kwargs)
        put_door(self, self.listeners[-1])  # no connection is taken before the loop runs again

    async def start_unsafe(self: Any) -> Any:
        """Like distributed's, but raises ClusterError if other machines could reach it without TLS."""
        await base.start_unsafe(self)
        check_sockets(self)
        hide_pages(self, self.pages)
        return self

    kind.handle_comm, kind.listen, kind.start_unsafe = handle_comm, listen, start_unsafe  # type: ignore[method-assign]
    return kind


def _why_not(server: Any, peer: Peer) -> str | None:
    """Why a peer may not connect to a worker or a nanny; None if it may. People speak to them through the scheduler."""
    if peer.has_expired():
        return expired(peer)
    if peer.role in ("scheduler", "worker", "owner"):
        return None
    people = getattr(server, "people_here", None)
    if people is None:
        return (
            f"{peer} may not connect to a {type(server).__name__.removeprefix('Guarded').lower()}.\n"
            "  Usual reason: direct=True, or an address of a worker instead of the scheduler's\n"
            "  What to do: leave out direct=True; or have the owner set people_on_workers in the cluster file"
        )
    entry = people.get(peer.name)
    return None if entry is not None and int(str(entry["serial"]), 16) == peer.serial else f"{peer} is not invited with that certificate."


def _most_connections(server: Any, peer: Peer) -> int:
    """Connections that one person may have to a worker, whose transfers to other workers must not wait for people."""
    return _MOST_ON_WORKER


def _message_bytes(server: Any, peer: Peer) -> int:
    """Largest message that a worker or a nanny reads from a person: they only ask for results."""
    return 1 << 20


def _trusts(server: Any, peer: Peer) -> bool:
    """Whether what a person sends is unpickled."""
    return False


def _refusal(server: Any, why: str) -> Any:
    """The answer to any request to a worker or a nanny. A client passes over an OSError, which a PermissionError is."""
    return error_message(ImportError(why), status="uncaught-error")


def expired(peer: Peer) -> str:
    """The message for a certificate that has expired."""
    return f"The certificate of {peer} has expired.\n  What to do: ask for a new invitation"


def _admit(server: Any, gate: Gate, message: dict[str, Any]) -> None:
    """Raise PermissionError if this peer may not make this request to a worker or a nanny."""
    op, peer = message["op"], gate.peer
    outside = peer.role is None and server.security.require_encryption
    if (outside or peer.role not in (None, "scheduler", "worker", "owner")) and op not in USER_ON_WORKER:
        raise refused(f"{op} sent directly to a {type(server).__name__.lower()}", peer, None)


def _admit_to_stream(server: Any, gate: Gate, message: dict[str, Any]) -> bool:
    """Never called: clients have no stream to a worker or a nanny."""
    return False


@behind_gates
class GuardedWorker(Worker):
    """A worker that takes requests only from the scheduler, workers and the owner; its pages are on loopback by default."""

    admit, admit_to_stream, why_not, message_bytes = _admit, _admit_to_stream, _why_not, _message_bytes
    trusts, refusal, most_connections = _trusts, _refusal, _most_connections
    pages = "/"
    """Where its web pages begin."""
    people_here: Mapping[str, Any] | None = None
    """People who may connect, if any: the scheduler sends every change."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if not kwargs.get("dashboard_address"):
            kwargs["dashboard_address"] = "127.0.0.1:0"
        super().__init__(*args, **as_the_site_says("worker", with_secret_pages(kwargs)))
        self.pages = kwargs.get("http_prefix", "/")
        self.admit_people()

    def admit_people(self) -> None:
        """Admit people if ``cryodask.people_on_workers`` is set in Dask's configuration: nobody until the scheduler says who they are."""
        if dask.config.get("cryodask.people_on_workers", False):
            self.people_here = {}
            self.stream_handlers["people"] = self.note_people

    def note_people(self, people: Mapping[str, Any], **_: Any) -> None:
        """Take the list of people from the scheduler, and close connections of those who are not on it any more."""
        self.people_here = people
        for comm in list(self._comms):
            peer = getattr(comm, "peer", None)
            if peer is not None and self.why_not(peer) is not None:
                comm.abort()

    async def get_startup_information(self) -> dict[str, Any]:
        """Like distributed's, but includes the cryodask release, for the scheduler to compare, and whether people may connect."""
        mine = {"cryodask": RELEASE, "people": self.people_here is not None}
        return {**await super().get_startup_information(), **mine}


@behind_gates
class GuardedNanny(Nanny):
    """A nanny of :class:`GuardedWorker`, guarded in the same way."""

    pages = "/"

    admit, admit_to_stream, why_not, message_bytes = _admit, _admit_to_stream, _why_not, _message_bytes
    trusts, refusal, most_connections = _trusts, _refusal, _most_connections

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("worker_class", GuardedWorker)
        super().__init__(*args, **as_the_site_says("nanny", kwargs))
