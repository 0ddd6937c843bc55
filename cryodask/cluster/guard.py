"""A scheduler that a single notebook cannot disrupt, and workers that refuse the same calls when they are sent to them directly.

Identity is the name in the peer's certificate (``tls.py``). Without TLS requests cannot be attributed: requests reserved for the owner
are then refused to everybody, and lanes follow the name that a client gives itself. This protects people who work together from each
other's mistakes. It is not isolation: a task is a program that runs in the workers' account (docs/security.md).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import dask
from dask.utils import format_bytes, parse_bytes
from distributed import Scheduler, Worker
from distributed.comm.core import BaseListener
from distributed.core import Server, error_message
from tornado.ioloop import PeriodicCallback

from cryodask.cluster import fairshare
from cryodask.cluster.access import orders
from cryodask.cluster.access.answers import PrivateAnswers
from cryodask.cluster.access.door import TOO_LARGE, Doorkeeper, Unread, put_door, unpickled
from cryodask.cluster.access.gate import (
    USER_OPS,
    USER_STREAM,
    VIEWER_OPS,
    VIEWER_STREAM,
    WORKER_OPS,
    Gate,
    GuardedNanny,
    GuardedWorker,
    behind_gates,
    check_sockets,
    expired,
    hide_pages,
    refused,
    refused_client,
    refused_worker,
    too_large,
    with_secret_pages,
)
from cryodask.cluster.access.limits import LimitReached, Limits
from cryodask.cluster.access.peers import Peer
from cryodask.cluster.access.people import People
from cryodask.cluster.access.whose import FORGETFUL, NAMED_CLIENTS
from cryodask.cluster.sharing.lanes import Owner
from cryodask.cluster.sharing.slices import LEAVING

__all__ = ["GuardedNanny", "GuardedScheduler", "GuardedWorker"]

ALLOWED_FAILURES = 3
_OPENED = ("code", "annotations", "span_metadata")
"""Parts of a graph besides the graph itself that the scheduler reads."""
_BESIDE_A_GRAPH = 1 << 20
_LOOK_MILLISECONDS = 250
_TELL_SECONDS = 0.05
_VIEWER_BYTES = 1 << 16
_LONGEST_NAME = 250
_RESERVED = (FORGETFUL, *NAMED_CLIENTS, "worker-", LEAVING)
_CLIENT = re.compile(r"\w{1,60}-(?:.{1,150}-)?[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", re.DOTALL)
"""``TYPE-[LANE/USER/PROJECT-]UUID``, as Dask makes them."""


@behind_gates
class GuardedScheduler(PrivateAnswers):
    """A scheduler with lanes for several people.

    Parameters
    ----------
    owner : str, optional
        Who may restart, retire, run and register things: the name in a certificate with the role ``owner``. Without an owner everybody
        may.
    users : mapping or path, optional
        ``{"anna": {"lanes": ["hpda"]}}``: who may connect, into which lanes (all if none are named; a request for any other lane
        counts as the first one). A path is an authority's ``people.json``, reread when it changes. Without it every certificate is valid
        for every lane.
    max_graph_bytes : int or str
        Size limit of a graph as sent, enforced before it is unpickled; ``max_graph_tasks`` is enforced before the scheduler adds any task.
    limits : mapping, optional
        Bounds per person, see :class:`~cryodask.cluster.access.limits.Limits`.

    Notes
    -----
    ``allowed_failures`` defaults to 3 (``ALLOWED_FAILURES``), whatever the configuration says: on a shared worker a task may die because
    a neighbour crashed, so it is retried on three other workers before it is blamed. Web pages are on loopback by default. All
    other parameters as for FairShareScheduler.
    """

    pages = "/"
    """Prefix of its web pages: secret if it speaks TLS."""

    def __init__(
        self,
        *args: Any,
        owner: str | None = None,
        users: Mapping[str, Any] | str | Path | None = None,
        max_graph_bytes: int | str = "256 MiB",
        max_graph_tasks: int = 2_000_000,
        limits: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs.setdefault("allowed_failures", ALLOWED_FAILURES)
        kwargs.setdefault("dashboard_address", "127.0.0.1:0")
        super().__init__(*args, **with_secret_pages(kwargs))
        self.pages = kwargs.get("http_prefix", "/")
        hide_pages(self, self.pages)
        self.guard(owner, users, max_graph_bytes, max_graph_tasks, limits)

    def guard(
        self,
        owner: str | None = None,
        users: Mapping[str, Any] | str | Path | None = None,
        max_graph_bytes: int | str = "256 MiB",
        max_graph_tasks: int = 2_000_000,
        limits: Mapping[str, Any] | None = None,
    ) -> None:
        """Start guarding; parameters as for the class."""
        self.keep_owners(Limits.of(limits))
        self._master, self._people = owner, People(users)
        self._workers_know: Mapping[str, Any] | None = None
        self._max_bytes, self._max_tasks = parse_bytes(max_graph_bytes), max_graph_tasks
        self._peers = {}
        self._orders = orders.Orders(self)
        self.answer_privately()
        self.handlers["cancel_work"] = self.cancel_work
        self.periodic_callbacks["people"] = PeriodicCallback(self._look_at_people, _LOOK_MILLISECONDS)

    # --- who is it, and are they (still) invited ---------------------------------------------------------------------------------
    def people(self) -> Mapping[str, Any] | None:
        """Who may connect; None if everybody with a valid certificate may."""
        return self._people.now()

    def why_not(self, peer: Peer) -> str | None:
        """Why a peer may not connect, or stay connected; None if it may."""
        if peer.has_expired():
            return expired(peer)
        try:
            self._check_invited(peer)
        except PermissionError as error:
            return str(error)
        return None

    def message_bytes(self, peer: Peer) -> int:
        """Largest message that is read from a person: a graph with what goes with it."""
        if self._people.is_viewer(peer):
            return _VIEWER_BYTES
        return self._max_bytes + _BESIDE_A_GRAPH

    def _too_long(self, peer: Peer) -> ValueError:
        limit = _VIEWER_BYTES if self._people.is_viewer(peer) else self._max_bytes
        return ValueError(
            f"A message is refused: this scheduler accepts at most {format_bytes(limit)} at a time.\n"
            "  What to do: scatter large data in pieces, or load them in tasks"
        )

    def most_connections(self, peer: Peer) -> int:
        """Connections that one person may have at a time."""
        return self.limits.connections

    def trusts(self, peer: Peer) -> bool:
        """Whether messages of a peer are unpickled."""
        return self._is_owner(peer)

    def refusal(self, why: str) -> Any:
        """The answer to a registration, in a mapping, because clients ask for an identity first and take any mapping for it."""
        return {0: {"op": "stream-start", "error": why}}

    def _check_invited(self, peer: Peer) -> None:
        if peer.role is None and self.security.require_encryption:
            raise refused("Every call without a certificate", peer, self._master)
        if peer.role == "user" and not self._people.invites(peer):
            raise PermissionError(
                f"{peer.name} is not invited to this cluster with that certificate.\n"
                "  Usual reason: the invitation was revoked, or replaced by a newer one\n"
                f"  What to do: ask {self._master or 'its owner'} for an invitation"
            )

    def _look_at_people(self) -> None:
        """Close connections of people whose invitation was revoked or whose certificate has expired; inform workers that admit people."""
        known = self._people.look()
        for comm in list(self._comms):
            peer = getattr(comm, "peer", None)
            if peer is not None and peer.name is not None and (why := self.why_not(peer)) is not None:
                for client in [client for client, its in self._peers.items() if its == peer]:
                    self.tell(client, why)
                self.loop.call_later(_TELL_SECONDS, comm.abort)
        if known is not self._workers_know:
            self._workers_know = known
            for address, stream in self.stream_comms.items():
                if self.workers[address].extra.get("people"):
                    stream.send(self._who_may())

    def _who_may(self) -> dict[str, Any]:
        listed = (self.people() or {}).items()
        people = {name: {"serial": e["serial"]} for name, e in listed if "serial" in e and e.get("role", "user") == "user"}
        return {"op": "people", "people": people, "stimulus_id": "people"}

    async def handle_worker(self, comm: Any, worker: str) -> None:
        """Like FairShareScheduler's; a worker that admits people is told who they are. Other workers would not know the message."""
        if self.workers[worker].extra.get("people"):
            self.stream_comms[worker].send(self._who_may())
        await super().handle_worker(comm, worker)

    def _is_owner(self, peer: Peer) -> bool:
        return self._master is None or (peer.role == "owner" and peer.name == self._master)

    # --- requests ----------------------------------------------------------------------------------------------------------------
    def admit(self, gate: Gate, message: dict[str, Any]) -> None:
        """Raise PermissionError if this peer may not make this request."""
        op, peer = message["op"], gate.peer
        if op == TOO_LARGE or not isinstance(op, str):
            raise self._too_long(peer)
        if op == "register-client":
            try:
                self._check_invited(peer)
            except PermissionError as error:
                raise refused_client(str(error)) from None
        else:
            self._check_invited(peer)
        if self._people.is_viewer(peer):
            if op not in (*VIEWER_OPS, "close"):
                raise refused(f"{op}, with an invitation to look on,", peer, self._master)
            message.pop("packages", None)
        if not self._is_owner(peer) and op not in USER_OPS and peer.role != "scheduler" and op != "close":
            from_worker = peer.role in ("worker", None) and op in WORKER_OPS
            # a worker leaves by retiring itself and no other
            leaving = peer.role == "worker" and op == "retire_workers" and message.get("close_workers") is False
            if not from_worker and not (leaving and len(message.get("workers") or ()) == 1):
                no = refused(op, peer, self._master)
                raise refused_worker(str(no)) if op == "register-worker" else no
        if op == "register-client":
            self._register(gate, message.get("client"))
        elif op == "register-worker":
            gate.step_aside()
        elif not self._is_owner(peer):
            self._check_arguments(gate, op, message)

    def _register(self, gate: Gate, client: Any) -> None:
        peer = gate.peer
        formed = type(client) is str and 0 < len(client) <= _LONGEST_NAME and (peer.role != "user" or _CLIENT.fullmatch(client))
        if not formed or client.startswith(_RESERVED):
            raise refused_client(f"{str(client)[:60]!r} cannot be the name of a client.\n  What to do: use Dask's Client")
        known = self._peers.get(client)
        if known is not None and known.name != peer.name:
            raise refused_client(f"The name {client} is used by another person's client.\n  What to do: use Dask's Client")
        most = self.limits.clients
        if peer.role == "user" and sum(its.name == peer.name for name, its in self._peers.items() if name != client) >= most:
            raise refused_client(str(LimitReached(str(peer), "clients", most, "clients at a time", "close some, or restart their kernels")))
        self._peers[client] = peer
        gate.client = client

    async def add_client(self, comm: Any, client: str, versions: dict[str, Any]) -> None:
        """Like FairShareScheduler's; a client is known as long as its stream is open."""
        try:
            await super().add_client(comm, client, versions)
        finally:
            if client not in self.clients:
                self._peers.pop(client, None)
                for topic in self._broker._topics.values():
                    topic.unsubscribe(client)

    def _check_arguments(self, gate: Gate, op: str, message: dict[str, Any]) -> None:
        peer, client = gate.peer, message.get("client")
        if peer.name is not None and client is not None and self._peers.get(client, Peer()).name != peer.name:
            raise refused(f"{op} in the name of {client}", peer, None)
        if op == "cluster_usage":
            message["user"] = None if self._people.is_viewer(peer) else peer.name
        elif peer.role == "user":
            self._orders.check(str(peer.name), op, message, gate.size)

    def is_bounded(self, client: str) -> bool:
        """Whether limits hold for a client: for those of people."""
        return self._peers.get(client, Peer()).role == "user"

    def is_anothers_client(self, name: str, user: str) -> bool:
        """Whether this is the name of somebody else's client."""
        return name in self.clients and self._peers.get(name, Peer()).name != user

    def own_client(self, user: str, client: Any) -> str:
        """The client of a person that a request names.

        Raises
        ------
        PermissionError
            If the person has no client of that name.
        """
        if type(client) is not str or client not in self.clients or self._peers.get(client, Peer()).name != user:
            raise PermissionError(f"The request names no client of {user}.")
        return client

    # --- messages of a client's stream -------------------------------------------------------------------------------------------
    def admit_to_stream(self, gate: Gate, message: dict[str, Any]) -> bool:
        """Whether a message is passed on; the client is told if not."""
        op, peer, client = message["op"], gate.peer, str(gate.client)
        try:
            if op == TOO_LARGE or (any(isinstance(part, Unread) for part in message.values()) and op != "update-graph"):
                raise self._too_long(peer)
            self._check_invited(peer)
            if self._people.is_viewer(peer) and op not in VIEWER_STREAM:
                if op in ("subscribe-topic", "unsubscribe-topic"):  # every client asks for warnings and prints at its start
                    return False
                no = refused(f"{op}, with an invitation to look on,", peer, self._master)
                self.let_fail(client, message.get("keys"), no)
                raise no
            if op == "update-graph":
                return self._admit_graph(gate, message)
            if not self._is_owner(peer) and op not in USER_STREAM:
                raise refused(op, peer, self._master)
            claimed = message.get("client", client)
            if not self._is_owner(peer) and claimed != client and not (op == "client-desires-keys" and claimed == FORGETFUL):
                raise refused(f"{op} in the name of {claimed}", peer, None)
            if peer.role == "user":
                return self._orders.check_streamed(str(peer.name), client, op, message, gate.size)
        except (PermissionError, ValueError, TypeError) as error:
            self.tell(client, str(error))
            return False
        return True

    def let_fail(self, client: str, keys: Any, why: Exception) -> None:
        """Let a client's futures fail; other clients are not affected."""
        error = error_message(why)
        for key in keys if type(keys) in (list, tuple, set) else ():
            self.report({"op": "task-erred", "key": key, "exception": error["exception"], "traceback": error["traceback"]}, client=client)

    def _admit_graph(self, gate: Gate, message: dict[str, Any]) -> bool:
        client = str(gate.client)
        if message.get("client", client) != client:
            raise refused(f"A graph in the name of {message['client']}", gate.peer, None)
        if gate.peer.role not in ("worker", None):
            message["submitting_task"] = None  # only workers run tasks, whose subtasks stay in the same lane
        graph = message.get("expr_ser")
        size = graph.bytes if isinstance(graph, Unread) else sum(memoryview(frame).nbytes for frame in getattr(graph, "frames", ()))
        if size <= self._max_bytes and not any(isinstance(part, Unread) for part in message.values()):
            try:
                if gate.peer.role == "user":
                    orders.check_graph_message(message)
                for part in _OPENED:
                    if part in message:
                        message[part] = unpickled(message[part])
            except Exception as error:  # what is unpickled there is code of its sender
                self.let_fail(client, message.get("keys"), error)
                return False
            return True
        self.let_fail(client, message.get("keys"), too_large(f"{format_bytes(size)}", f"{format_bytes(self._max_bytes)}"))
        return False

    def _create_taskstate_from_graph(self, *args: Any, **kwargs: Any) -> Any:
        count = len(kwargs["dsk"])
        if count > self._max_tasks:
            raise too_large(f"{count} tasks", f"{self._max_tasks}")
        return super()._create_taskstate_from_graph(*args, **kwargs)

    # --- lanes -------------------------------------------------------------------------------------------------------------------
    def path_of_client(self, client: str) -> tuple[str, str, str]:
        """Lane, user and project from the client's name; user and lanes are those of its certificate."""
        lane, user, project = super().path_of_client(client)
        peer = self._peers.get(client, Peer())
        if peer.role == "worker":
            return lane, user, project
        if client not in self._peers and self.security.require_encryption:  # nobody's: a queue, a client that has gone
            return self._default_lane, "", ""
        user = peer.name if peer.name is not None else user
        lanes = self._lanes_of(client, user)
        return lane if not lanes or lane in lanes else lanes[0], user, project

    def owner_of_client(self, client: str) -> Owner:
        """Like FairShareScheduler's, but warns a client that asked for a lane it may not use."""
        self._permitted(client, self.path_of_client(client)[1], super().path_of_client(client)[0])
        return super().owner_of_client(client)

    def _lanes_of(self, client: str, user: str) -> list[str]:
        """Lanes that a user may use; empty for all."""
        if self._peers.get(client, Peer()).role in ("owner", "worker"):
            return []
        return list((self.people() or {}).get(user, {}).get("lanes") or ())

    def _permitted(self, client: str, user: str, lane: str) -> str:
        lanes = self._lanes_of(client, user)
        if not lanes or lane in lanes:
            return lane
        if lane != self._default_lane:  # no warning for a client that named no lane
            self.tell(
                client, f"{user} may not use the lane {lane!r}: the work is charged to {lanes[0]!r}. Allowed lanes: {', '.join(lanes)}."
            )
        return lanes[0]

    def take_graph(self, client: str, keys: list[Any], lanes: Mapping[Any, str]) -> None:
        """Like FairShareScheduler's, but restricts annotated lanes to those that the user may use."""
        if lanes and client in self._peers and self._peers[client].role != "worker":
            user = self.owner_of_client(client).user
            allowed = {lane: self._permitted(client, user, lane) for lane in set(lanes.values())}
            lanes = {key: allowed[lane] for key, lane in lanes.items()}
        super().take_graph(client, keys, lanes)


async def dask_setup(server: Server) -> None:
    """``--preload cryodask.cluster.guard`` for scheduler and worker, ``--preload-nanny cryodask.cluster.guard`` for the nanny.

    A scheduler's options are in Dask's configuration under ``cryodask.guard`` and ``cryodask.fairshare``.
    """
    try:
        await _guard_running(server)
    except Exception as error:
        # distributed would only log a failing preload and continue without it
        raise SystemExit(f"The guard could not be installed, so this process ends. {type(error).__name__}: {error}") from error


async def _guard_running(server: Server) -> None:
    if isinstance(server, Scheduler):
        await fairshare.dask_setup(server)
        server.__class__ = GuardedScheduler
        assert isinstance(server, GuardedScheduler)
        server.guard(**(dask.config.get("cryodask.guard", {}) or {}))
        server.allowed_failures = ALLOWED_FAILURES
        for name, function in server.handlers.items():
            if getattr(function, "__self__", None) is server:
                server.handlers[name] = getattr(server, function.__name__)
    else:
        server.__class__ = GuardedWorker if isinstance(server, Worker) else GuardedNanny
        if isinstance(server, GuardedWorker):
            server.admit_people()
    check_sockets(server)
    for listener in server.listeners:
        listener.comm_handler = server.handle_comm  # type: ignore[union-attr]
        put_door(cast("Doorkeeper", server), listener)
        cast("BaseListener", listener).abort_handshaking_comms()
    for comm in list(server._comms):
        comm.abort()  # connected before the gate
