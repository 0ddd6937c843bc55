"""Identifies the peer of a connection and filters every message before distributed sees it.

Distributed calls the handler that a message names, for anybody who is connected. A gate wraps the connection's ``read``: it
answers a refused request itself with a PermissionError, and drops refused messages from a client's stream. Requests that are not listed
here as harmless are reserved for the owner, so that new requests of later versions of distributed are closed until reviewed.
"""

from __future__ import annotations

import ipaddress
import logging
from dataclasses import dataclass
from time import time
from typing import Any, Protocol, TypeVar

from distributed import Nanny, Worker
from distributed.comm import Comm
from distributed.core import Server, error_message

from cryodask.cluster.access.versions import RELEASE
from cryodask.errors import ClusterError

logger = logging.getLogger(__name__)

REPORTS = "cryodask-reports-"
"""Topics under which workers report to the driver of a run."""

USER_OPS = frozenset({
    # connecting
    "register-client", "identity", "versions", "echo",
    # data
    "scatter", "gather", "update_data", "retry", "who_has", "has_what", "nbytes", "get_runspec", "get_error_cause",
    # inspection
    "ncores", "ncores_running", "processing", "call_stack", "profile", "performance_report", "get_logs", "logs", "worker_logs", "events",
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
    "cluster_scale", "cluster_stop", "cluster_hand_over",
})  # fmt: skip
"""Known requests to the scheduler that are reserved for the owner, as are all unknown ones."""

USER_STREAM = frozenset({
    "update-graph", "update-data", "client-desires-keys", "client-releases-keys", "cancel-keys", "report-key", "heartbeat-client",
    "close-client", "close-stream", "subscribe-topic", "unsubscribe-topic", "publish_flush_batched_send", "queue-future-release",
    "queue_release", "variable-future-release", "variable-future-received-confirm", "variable_delete",
})  # fmt: skip
"""Messages allowed in a client's stream; distributed would also accept those of a worker's stream."""

USER_ON_WORKER = frozenset({"identity", "echo", "ping", "versions", "keys", "get_data", "update_data", "actor_execute", "actor_attribute"})
"""Requests that anybody may make to a worker: moving results, and actors."""

FORWARDED = frozenset({"identity", "versions", "ping", "keys", "get_logs", "actor_execute", "actor_attribute"})
"""Requests that the scheduler forwards to workers for anybody."""


@dataclass(frozen=True)
class Peer:
    """The other end of a connection, from its certificate; all None without one."""

    name: str | None = None
    role: str | None = None
    serial: int | None = None

    @classmethod
    def of(cls, comm: Comm) -> Peer:
        """From a connection."""
        certificate = (comm.extra_info or {}).get("peercert")
        if not certificate:
            return cls()
        subject = {kind: value for part in certificate.get("subject", ()) for kind, value in part}
        serial = int(certificate.get("serialNumber", "0"), 16)
        return cls(subject.get("commonName", ""), subject.get("organizationalUnitName", "user"), serial)

    def __str__(self) -> str:
        return "nobody (no certificate)" if self.name is None else self.name


class Doorkeeper(Protocol):
    """A server behind gates."""

    def admit(self, gate: Gate, message: dict[str, Any]) -> None:
        """Raise PermissionError if this peer may not make this request."""

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
            except PermissionError as error:
                logger.warning("Refused to %s at %s: %s", self.peer, self.comm.peer_address, str(error).partition("\n")[0])
                if message.get("reply", True):
                    await self.comm.write(error_message(error, status="uncaught-error"))

    def _sifted(self, messages: Any) -> Any:
        if not isinstance(messages, list | tuple):
            messages = (messages,)
        return [m for m in messages if not isinstance(m, dict) or "op" not in m or self.server.admit_to_stream(self, m)]

    def step_aside(self) -> None:
        """Stop filtering this connection."""
        self.comm.read = self._read  # type: ignore[method-assign]


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
    """The reply to a worker's registration that makes it end."""
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

    async def start_unsafe(self: Any) -> Any:
        """Like distributed's, but raises ClusterError if other machines could reach it without TLS."""
        await base.start_unsafe(self)
        check_sockets(self)
        return self

    kind.handle_comm, kind.start_unsafe = handle_comm, start_unsafe  # type: ignore[method-assign]
    return kind


def _admit(server: Any, gate: Gate, message: dict[str, Any]) -> None:
    """Raise PermissionError if this peer may not make this request to a worker or a nanny."""
    op, peer = message["op"], gate.peer
    outside = peer.role is None and server.security.require_encryption
    if (outside or peer.role not in (None, "scheduler", "worker", "owner")) and op not in USER_ON_WORKER:
        raise refused(f"{op} sent directly to a {type(server).__name__.lower()}", peer, None)


def _admit_to_stream(server: Any, gate: Gate, message: dict[str, Any]) -> bool:
    """Always False: clients have no stream to a worker or a nanny."""
    return True


@behind_gates
class GuardedWorker(Worker):
    """A worker that takes requests only from the scheduler, workers and the owner; its pages are on loopback by default."""

    admit, admit_to_stream = _admit, _admit_to_stream

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if not kwargs.get("dashboard_address"):
            kwargs["dashboard_address"] = "127.0.0.1:0"
        super().__init__(*args, **kwargs)

    async def get_startup_information(self) -> dict[str, Any]:
        """Like distributed's, but includes the cryodask release, which the scheduler compares with its own."""
        return {**await super().get_startup_information(), "cryodask": RELEASE}


@behind_gates
class GuardedNanny(Nanny):
    """A nanny of :class:`GuardedWorker`, guarded in the same way."""

    admit, admit_to_stream = _admit, _admit_to_stream

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("worker_class", GuardedWorker)
        super().__init__(*args, **kwargs)
