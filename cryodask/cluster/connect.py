"""A client on workers from a word or a file: ``local``, a cluster file, or the address of a running scheduler."""

from __future__ import annotations

import getpass
import logging
import os
import re
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import dask
from distributed import Client, LocalCluster, Worker, WorkerPlugin
from distributed.deploy.cluster import Cluster

from cryodask.cluster.environment import ALLOCATOR, ONE_THREAD, SETTINGS
from cryodask.cluster.fairshare import FairShareScheduler
from cryodask.cluster.settings import AddressSettings, LocalSettings, SlurmSettings, read_cluster_file
from cryodask.cluster.tls import Authority, connection_errors
from cryodask.errors import ClusterError

# clusters that live in this process, each with the folder of its certificates
_OWN_CLUSTERS: dict[int, tuple[Cluster, Path | None]] = {}


def connect(where: str = "local", *, workers: int | None = None, lane: str = "batch", project: str = "") -> Client:
    """A plain ``distributed.Client`` on the workers that ``where`` describes.

    Parameters
    ----------
    where : str
        ``local`` (one worker process a core); a cluster file (YAML, see ``configs/clusters``: local workers, pools of Slurm jobs, or a
        scheduler that runs already), which leads to the service that was started from it, if one was; the name of a service (``cryodask
        cluster start``), of this account or that it is invited to (``~/.config/cryodask/NAME.invite``); an invitation's file
        (``.invite``), a scheduler file (``.json``), or an address ``tcp://...``.
    workers : int, optional
        Local workers; overrides the file.
    lane, project : str
        Who pays for the tasks of this client, with the name of the user: they make up the client's name ``lane/user/project``.

    Raises
    ------
    ClusterError, ProjectFileError
    """
    name = "/".join(part for part in (lane, os.environ.get("USER", "user"), project) if part)
    if where == "local":
        return _local(name, LocalSettings(workers=workers))
    if re.match(r"^(tcp|tls)://", where):
        return _existing(name, address=where)
    if where.endswith(".json") and Path(where).is_file():
        return _existing(name, scheduler_file=where)
    from cryodask.cluster import service

    if where.endswith(".invite") or service.is_name(where):
        shared = service.find(where)
        return _existing(name, address=shared.address, security=shared.security)
    settings = read_cluster_file(where)
    if isinstance(settings, AddressSettings):
        return _existing(name, **settings.model_dump(include={"address", "scheduler_file"}, exclude_none=True))
    found = service.of_file(settings, where)
    if found is not None:
        return _existing(name, address=found.address, security=found.security)
    if isinstance(settings, LocalSettings):
        return _local(name, settings.model_copy(update={"workers": workers}) if workers else settings)
    return _of_pools(name, settings)


def _of_pools(name: str, settings: SlurmSettings) -> Client:
    from cryodask.cluster.pools import open_pools

    if settings.single_allocation:
        raise ClusterError(
            "A cluster file with single_allocation describes one batch job, which holds scheduler, workers and driver.",
            "it was given to a program that runs outside of that job",
            "leave single_allocation out to have pools of jobs",
        )
    folder: Path | None = None
    owner = getpass.getuser()
    if settings.interface != "lo":  # beyond this machine nothing is said in clear text
        home = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "cryodask" / "certificates"
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder = Path(tempfile.mkdtemp(prefix="cluster-", dir=home))
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


def _local(name: str, settings: LocalSettings) -> Client:
    with _interrupts_held_back() as interrupted:
        client = _started(name, settings)
    if interrupted:
        close(client)
        raise KeyboardInterrupt
    return client


@contextmanager
def _interrupts_held_back() -> Iterator[list[int]]:
    """Within, Ctrl-C is only noted, and processes started here never see it: a terminal sends it to all of them, the driver decides."""
    noted: list[int] = []
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, lambda number, frame: noted.append(number)) if in_main_thread else None
    resource_tracker.ensure_running()  # its start would lift the mask
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited by threads and processes
    try:
        yield noted
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if in_main_thread:
            signal.signal(signal.SIGINT, handler)


class LaneCluster(LocalCluster):
    """A ``LocalCluster`` whose scheduler has lanes.

    ``lanes``, ``strict``, ``reserve``, ``default_lane`` and ``memory_share`` as of FairShareScheduler, all other arguments as of
    ``LocalCluster``.
    """

    def __init__(
        self,
        *args: Any,
        lanes: Mapping[str, Any] | None = None,
        strict: Iterable[str] = (),
        reserve: Mapping[str, int] | None = None,
        default_lane: str = "default",
        memory_share: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        self._sharing = {
            "lanes": lanes, "strict": tuple(strict), "reserve": reserve, "default_lane": default_lane, "memory_share": memory_share
        }  # fmt: skip
        super().__init__(*args, **kwargs)

    async def _start(self) -> None:
        if self.scheduler_spec["cls"] is not FairShareScheduler:
            self.scheduler_spec["cls"] = FairShareScheduler
            self.scheduler_spec["options"] = {**self.scheduler_spec.get("options", {}), **self._sharing}
        await super()._start()


class _PlainHeartbeats(WorkerPlugin):
    """A worker that ends while it reports itself says so in a line, without the traceback that Dask prints on the user's terminal."""

    name = "cryodask-plain-heartbeats"

    def setup(self, worker: Worker) -> None:
        logging.getLogger("distributed.worker").addFilter(_without_traceback_of_heartbeats)


def _without_traceback_of_heartbeats(record: logging.LogRecord) -> bool:
    if record.exc_info and "communicate with scheduler during heartbeat" in record.getMessage():
        record.exc_info = None
    return True


def local_environment() -> dict[str, Any]:
    """Settings of Dask under which :func:`local_cluster` starts its workers."""
    return {**SETTINGS, "distributed.nanny.pre-spawn-environ": {**ONE_THREAD, **ALLOCATOR, "PYTHONDONTWRITEBYTECODE": ""}}


def local_cluster(settings: LocalSettings, *, asynchronous: bool = False) -> LaneCluster:
    """Worker processes of one thread each on this machine, on a scheduler with lanes in this process."""
    return LaneCluster(
        n_workers=settings.workers or os.cpu_count() or 1,
        threads_per_worker=1,
        processes=True,
        host="127.0.0.1",
        dashboard_address="127.0.0.1:0",
        worker_dashboard_address="127.0.0.1:0",
        memory_limit=settings.memory or "auto",
        local_directory=settings.scratch,
        silence_logs=40,
        **settings.sharing(),
        asynchronous=asynchronous,
    )


def _started(name: str, settings: LocalSettings) -> Client:
    with dask.config.set(local_environment()):
        cluster = local_cluster(settings)
        # the settings must outlive this block in this process, where the scheduler lives
    dask.config.set(SETTINGS)
    client = Client(cluster, name=name)
    client.register_plugin(_PlainHeartbeats())
    _OWN_CLUSTERS[id(client)] = cluster, None
    return client


def _existing(name: str, **where: Any) -> Client:
    with connection_errors(str(next(iter(where.values())))):
        return Client(name=name, timeout="15s", **where)


def close(client: Client) -> None:
    """Close a client and the cluster that :func:`connect` made for it."""
    cluster, folder = _OWN_CLUSTERS.pop(id(client), (None, None))
    client.close()
    if cluster is not None:
        cluster.close()
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
