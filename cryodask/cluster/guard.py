"""A scheduler that a single notebook cannot disrupt, and workers that refuse the same calls sent directly to them.

Identity is the name in the peer's certificate (``tls.py``). Without TLS requests cannot be attributed: requests reserved for the owner
are then refused to everybody, and lanes follow the name that a client gives itself. This protects people who work together from each
other's mistakes. It is not isolation: a task is a program that runs in the workers' account (docs/security.md).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from time import monotonic
from typing import Any

import dask
from dask.utils import format_bytes, parse_bytes
from distributed import Scheduler, Worker
from distributed.core import Server, error_message

from cryodask.cluster import fairshare
from cryodask.cluster.access.gate import (
    FORWARDED,
    REPORTS,
    USER_OPS,
    USER_STREAM,
    WORKER_OPS,
    Gate,
    GuardedNanny,
    GuardedWorker,
    Peer,
    behind_gates,
    check_sockets,
    refused,
    refused_client,
    refused_worker,
    too_large,
)
from cryodask.cluster.fairshare import FairShareScheduler
from cryodask.cluster.sharing.lanes import Owner

__all__ = ["GuardedNanny", "GuardedScheduler", "GuardedWorker"]

ALLOWED_FAILURES = 3
_EVERYBODY_READS = frozenset({"all", "scheduler", "print", "warn"})


@behind_gates
class GuardedScheduler(FairShareScheduler):
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

    Notes
    -----
    ``allowed_failures`` defaults to 3 (``ALLOWED_FAILURES``), whatever the configuration says: on a shared worker a task may die in its
    neighbour's crash, so it is retried on three other workers before it is blamed. Web pages are on loopback by default. All
    other parameters as for FairShareScheduler.
    """

    def __init__(
        self,
        *args: Any,
        owner: str | None = None,
        users: Mapping[str, Any] | str | Path | None = None,
        max_graph_bytes: int | str = "256 MiB",
        max_graph_tasks: int = 2_000_000,
        **kwargs: Any,
    ) -> None:
        kwargs.setdefault("allowed_failures", ALLOWED_FAILURES)
        kwargs.setdefault("dashboard_address", "127.0.0.1:0")
        super().__init__(*args, **kwargs)
        self.guard(owner, users, max_graph_bytes, max_graph_tasks)

    def guard(
        self,
        owner: str | None = None,
        users: Mapping[str, Any] | str | Path | None = None,
        max_graph_bytes: int | str = "256 MiB",
        max_graph_tasks: int = 2_000_000,
    ) -> None:
        """Start guarding; parameters as for the class."""
        self._master, self._users = owner, users
        self._read_users: tuple[float, int, dict[str, Any]] = (-1.0, 0, {})
        self._max_bytes, self._max_tasks = parse_bytes(max_graph_bytes), max_graph_tasks
        self._peers: dict[str, Peer] = {}
        self._named: dict[tuple[str, Any], str | None] = {}

    # --- who is it, and are they (still) invited ---------------------------------------------------------------------------------
    def people(self) -> Mapping[str, Any] | None:
        """Who may connect; None if everybody with a valid certificate may."""
        if self._users is None or isinstance(self._users, Mapping):
            return self._users
        looked, changed, known = self._read_users
        if monotonic() - looked > 1:
            path = Path(self._users)
            found = path.stat().st_mtime_ns if path.exists() else 0  # nobody has been invited yet
            if found != changed:
                known = json.loads(path.read_text(encoding="utf-8")) if found else {}
            self._read_users = monotonic(), found, known
        return known

    def _check_invited(self, peer: Peer) -> None:
        if peer.role is None and self.security.require_encryption:
            raise refused("Every call without a certificate", peer, self._master)
        if peer.role == "user" and not self._is_listed(peer):
            self._read_users = (-1.0, *self._read_users[1:])  # invited less than a second ago?
            if self._is_listed(peer):
                return
            raise PermissionError(
                f"{peer.name} is not invited to this cluster with that certificate.\n"
                "  Usual reason: the invitation was revoked, or replaced by a newer one\n"
                f"  What to do: ask {self._master or 'its owner'} for an invitation"
            )

    def _is_listed(self, peer: Peer) -> bool:
        people = self.people()
        entry = people.get(str(peer.name)) if people is not None else {}
        return entry is not None and ("serial" not in entry or int(entry["serial"], 16) == peer.serial)

    def _is_owner(self, peer: Peer) -> bool:
        return self._master is None or (peer.role == "owner" and peer.name == self._master)

    # --- requests ----------------------------------------------------------------------------------------------------------------
    def admit(self, gate: Gate, message: dict[str, Any]) -> None:
        """Raise PermissionError if this peer may not make this request."""
        op, peer = message["op"], gate.peer
        if op == "register-client":
            try:
                self._check_invited(peer)
            except PermissionError as error:
                raise refused_client(str(error)) from None
        else:
            self._check_invited(peer)
        if not self._is_owner(peer) and op not in USER_OPS and peer.role != "scheduler" and op != "close":
            from_worker = peer.role in ("worker", None) and op in WORKER_OPS
            # a worker leaves by retiring itself and no other
            leaving = peer.role == "worker" and op == "retire_workers" and message.get("close_workers") is False
            if not from_worker and not (leaving and len(message.get("workers") or ()) == 1):
                no = refused(op, peer, self._master)
                raise refused_worker(str(no)) if op == "register-worker" else no
        if op == "register-client":
            self._register(gate, message["client"])
        elif op == "register-worker":
            gate.step_aside()
        elif not self._is_owner(peer):
            self._check_arguments(peer, op, message)

    def _register(self, gate: Gate, client: str) -> None:
        if client in self._peers and client in self.clients and self._peers[client].name != gate.peer.name:
            raise refused(f"The name {client}, which another person's client has,", gate.peer, None)
        for gone in [name for name in self._peers if name not in self.clients]:
            del self._peers[gone]
        self._peers[client] = gate.peer
        gate.client = client

    def _check_arguments(self, peer: Peer, op: str, message: dict[str, Any]) -> None:
        client = message.get("client")
        if peer.name is not None and client is not None and self._peers.get(client, Peer()).name != peer.name:
            raise refused(f"{op} in the name of {client}", peer, None)
        if op in ("broadcast", "proxy"):
            inner = (message.get("msg") or {}).get("op")
            if inner not in FORWARDED:
                raise refused(f"{op} of {inner!r} (client.run and the like)", peer, self._master)
        elif op == "cluster_usage":
            message["user"] = peer.name
        elif op == "log_event":
            topics = message.get("topic") or ()
            topics = [topics] if isinstance(topics, str) else topics
            taken = [t for t in topics if t in _EVERYBODY_READS or t in self.workers or str(t).startswith(REPORTS)]
            # clients unpickle events under print and warn
            if taken and peer.role != "worker":
                raise refused(f"An event under {taken[0]!r}, which every client reads,", peer, self._master)
        elif op == "set_metadata":
            self._check_name("metadata", [(message.get("keys") or [None])[0]], peer, take=True)
        elif op in ("publish_put", "publish_delete"):
            names = message.get("names") or [message.get("name")]
            self._check_name("dataset", names, peer, take=op == "publish_put")

    def _check_name(self, kind: str, names: Any, peer: Peer, *, take: bool) -> None:
        for name in names:
            if self._named.get((kind, name), peer.name) != peer.name:
                raise refused(f"The {kind} {name!r} belongs to {self._named[kind, name]}; changing it", peer, self._master)
        for name in names:
            if take:
                self._named[kind, name] = peer.name
            else:
                self._named.pop((kind, name), None)

    # --- messages of a client's stream -------------------------------------------------------------------------------------------
    def admit_to_stream(self, gate: Gate, message: dict[str, Any]) -> bool:
        """Whether a message is passed on; the client is told if not."""
        op, peer, client = message["op"], gate.peer, str(gate.client)
        try:
            self._check_invited(peer)
            if op == "update-graph":
                return self._admit_graph(gate, message)
            if not self._is_owner(peer):
                if op not in USER_STREAM:
                    raise refused(op, peer, self._master)
                claimed = message.get("client", client)
                if claimed != client and not (op == "client-desires-keys" and claimed == "fire-and-forget"):
                    raise refused(f"{op} in the name of {claimed}", peer, None)
                if op == "cancel-keys" and message.get("force") and (others := self._others_who_want(message.get("keys", ()), peer)):
                    raise refused(f"Cancelling with force what {', '.join(others)} waits for", peer, self._master)
        except PermissionError as error:
            self.tell(client, str(error))
            return False
        return True

    def _others_who_want(self, keys: Any, peer: Peer) -> list[str]:
        found, seen, stack = set(), set(), [self.tasks[key] for key in keys if key in self.tasks]
        while stack:
            ts = stack.pop()
            if ts.key not in seen:
                seen.add(ts.key)
                stack.extend(ts.dependents)
                wanted = {cs.client_key for cs in ts.who_wants or ()}
                found |= {str(self._peers[name].name) for name in wanted if name in self._peers and self._peers[name].name != peer.name}
        return sorted(found)

    def _admit_graph(self, gate: Gate, message: dict[str, Any]) -> bool:
        client = str(gate.client)
        if message.get("client", client) != client:
            raise refused(f"A graph in the name of {message['client']}", gate.peer, None)
        if gate.peer.role not in ("worker", None):
            message["submitting_task"] = None  # only workers run tasks, whose subtasks stay in the same lane
        frames = getattr(message.get("expr_ser"), "frames", ())
        size = sum(memoryview(frame).nbytes for frame in frames)
        if size <= self._max_bytes:
            return True
        refusal = too_large(f"{format_bytes(size)}", f"{format_bytes(self._max_bytes)}")
        error = error_message(refusal)
        for key in message.get("keys", ()):
            report = {"op": "task-erred", "key": key, "exception": error["exception"], "traceback": error["traceback"]}
            self.report(report, client=client)
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
    check_sockets(server)
    for listener in server.listeners:
        listener.comm_handler = server.handle_comm  # type: ignore[union-attr]
    for comm in list(server._comms):
        comm.abort()  # connected before the gate
