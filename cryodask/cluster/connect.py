"""A client on workers from ``local``, a cluster file, or the address of a running scheduler."""

from __future__ import annotations

import getpass
import json
import os
import re
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import dask
from distributed import Client
from distributed.comm import parse_host_port
from distributed.deploy.cluster import Cluster

from cryodask.cluster.access.tls import Authority, connection_errors
from cryodask.cluster.access.versions import RELEASE
from cryodask.cluster.environment import SETTINGS
from cryodask.cluster.local import PlainHeartbeats, local_cluster, local_environment
from cryodask.cluster.settings import AddressSettings, LocalSettings, PluginSettings, SlurmSettings, read_cluster_file
from cryodask.cluster.slurm.slurm import new_cluster_id, owner_is_dead
from cryodask.errors import ClusterError

# clusters in this process, each with the folder of its certificates
_OWN_CLUSTERS: dict[int, tuple[Cluster, Path | None]] = {}

_REACH_SECONDS = 5.0
# Dask writes a scheduler file in place, so it may be read half-written
_FILE_LOOKS = 10


def connect(where: str | os.PathLike[str] = "local", *, workers: int | None = None, lane: str = "batch", project: str = "") -> Client:
    """Connect a plain ``distributed.Client`` to the workers that ``where`` describes.

    Parameters
    ----------
    where : str or path
        ``local`` (one worker process per core); a cluster file (YAML, see ``configs/clusters``: local workers, pools of Slurm jobs, or a
        running scheduler), which connects to the service started from it, if there is one; the name of a service (``cryodask
        cluster start``) of this account, or to which it is invited (``~/.config/cryodask/NAME.invite``); an invitation file
        (``.invite``), a scheduler file (``.json``), or an address ``tcp://...``.
    workers : int, optional
        Number of local workers; overrides the file.
    lane, project : str
        What the tasks of this client are charged to, together with the user: the client is named ``lane/user/project``.

    Raises
    ------
    ClusterError, ProjectFileError
    """
    where = os.fspath(where)
    name = "/".join(part for part in (lane, os.environ.get("USER", "user"), project) if part)
    if where == "local":
        return _local(name, LocalSettings(workers=workers))
    if re.match(r"^(tcp|tls)://", where):
        return _running(name, where)
    if where.endswith(".json"):
        return _of_scheduler_file(name, where)
    from cryodask.cluster.service import service

    if where.endswith(".invite") or service.is_name(where):
        shared = service.find(where)
        return _existing(name, address=shared.address, security=shared.security)
    settings = read_cluster_file(where)
    if isinstance(settings, AddressSettings):
        return _of_address(name, settings)
    if isinstance(settings, PluginSettings):
        return _of_plugin(name, settings)
    found = service.of_file(settings, where)
    if found is not None:
        return _existing(name, address=found.address, security=found.security)
    if isinstance(settings, LocalSettings):
        return _local(name, settings.model_copy(update={"workers": workers}) if workers else settings)
    return _of_pools(name, settings)


def _of_address(name: str, settings: AddressSettings) -> Client:
    from cryodask.cluster.service import service

    if settings.address:
        return _running(name, settings.address)
    if settings.scheduler_file:
        return _of_scheduler_file(name, settings.scheduler_file)
    shared = service.find(settings.invitation or "")
    return _existing(name, address=shared.address, security=shared.security)


def _of_plugin(name: str, settings: PluginSettings) -> Client:
    cluster = settings.open()
    try:
        client = Client(cluster, name=name)
    except BaseException:
        cluster.close()
        raise
    _OWN_CLUSTERS[id(client)] = (cluster, None)
    return client


def _of_scheduler_file(name: str, file: str) -> Client:
    path = Path(file)
    _reach(_address_in(path), f", which {path} names")
    return _existing(name, scheduler_file=str(path))


def _running(name: str, address: str) -> Client:
    _reach(address)
    return _existing(name, address=address)


def _address_in(path: Path) -> str:
    """The address in a scheduler file; a Client itself would wait forever for a missing file."""
    said: object = ""
    for _ in range(_FILE_LOOKS):
        try:
            return str(json.loads(path.read_text(encoding="utf-8"))["address"])
        except FileNotFoundError:
            raise ClusterError(
                f"There is no scheduler file {path}.",
                "its scheduler has not started, or has ended",
                f"start it with  dask scheduler --scheduler-file {path}, then connect",
            ) from None
        except (OSError, ValueError, TypeError, KeyError) as error:
            said = error
        time.sleep(0.05)
    raise ClusterError(
        f"{path} is not a scheduler file: {said}",
        "it is another kind of file",
        "give the file that  dask scheduler --scheduler-file  wrote",
    )


def _reach(address: str, named: str = "") -> None:
    """Refuse an address where nothing listens, with some patience for a starting scheduler; a Client would try for much longer."""
    if not re.match(r"^(tcp|tls)://", address):
        return
    try:
        host, port = parse_host_port(address.partition("://")[2])
    except ValueError as error:
        raise ClusterError(f"{address}{named} is not a valid address: {error}.", "", "write  tcp://host:port") from None
    deadline = time.monotonic() + _REACH_SECONDS
    while True:
        try:
            socket.create_connection((host, port), timeout=_REACH_SECONDS).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"No scheduler answers at {address}{named}: {error}.",
                    "it has ended, or a firewall is in between",
                    "restart it and connect to its new address",
                ) from None
        time.sleep(0.2)


def _of_pools(name: str, settings: SlurmSettings) -> Client:
    from cryodask.cluster.slurm.pools import open_pools

    if settings.single_allocation:
        raise ClusterError(
            "A cluster file with single_allocation describes one batch job with scheduler, workers and driver.",
            "it was given to a program outside that job",
            "leave out single_allocation to get pools of jobs",
        )
    folder: Path | None = None
    owner = getpass.getuser()
    if settings.interface != "lo":  # nothing is unencrypted beyond this machine
        folder = _folder_for_certificates()
        Authority.create(folder, owner=owner)
    try:
        cluster = open_pools(settings, certificates=folder, owner=owner if folder else None)
        try:
            cluster.wait_for_first()
            client = Client(cluster, name=name)
        except BaseException:
            cluster.close()
            raise
    except BaseException:
        if folder:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    _OWN_CLUSTERS[id(client)] = cluster, folder
    return client


def _folder_for_certificates() -> Path:
    """A new folder named after this process; removes those left by killed processes on this machine."""
    home = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "cryodask" / "certificates"
    for left in home.glob("cluster-*"):
        if owner_is_dead(left.name.removeprefix("cluster-")):
            shutil.rmtree(left, ignore_errors=True)
    folder = home / f"cluster-{new_cluster_id()}"
    folder.mkdir(parents=True, mode=0o700)
    return folder


def _local(name: str, settings: LocalSettings) -> Client:
    with _interrupts_held_back() as interrupted:
        client = _started(name, settings)
    if interrupted:
        close(client)
        raise KeyboardInterrupt
    return client


@contextmanager
def _interrupts_held_back() -> Iterator[list[int]]:
    """Context manager: Ctrl-C is only recorded, and child processes ignore it. A terminal sends it to all; only the driver decides."""
    noted: list[int] = []
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, lambda number, frame: noted.append(number)) if in_main_thread else None
    resource_tracker.ensure_running()  # starting it later would lift the mask
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited by threads and processes
    try:
        yield noted
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if in_main_thread:
            signal.signal(signal.SIGINT, handler)


def _started(name: str, settings: LocalSettings) -> Client:
    with dask.config.set(local_environment()):
        cluster = local_cluster(settings)
        # the settings must outlive this block, because the scheduler is in this process
    dask.config.set(SETTINGS)
    client = Client(cluster, name=name)
    client.register_plugin(PlainHeartbeats())
    _OWN_CLUSTERS[id(client)] = cluster, None
    return client


def _existing(name: str, **where: Any) -> Client:
    with connection_errors(str(next(iter(where.values())))):
        client = Client(name=name, timeout="15s", **where)
    release = client.scheduler_info().get("cryodask")
    if release not in (None, RELEASE):
        client.close()
        raise ClusterError(
            f"The scheduler has cryodask {release}, but this process has {RELEASE}.",
            "one was updated while the other was running, or another environment is active",
            "use the same release on both sides; restart the cluster after an update",
        )
    return client


def close(client: Client) -> None:
    """Close a client and the cluster that :func:`connect` made for it."""
    cluster, folder = _OWN_CLUSTERS.pop(id(client), (None, None))
    client.close()
    if cluster is not None:
        cluster.close()
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
