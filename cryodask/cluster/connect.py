"""Workers from a word or a file: ``local``, a cluster file, or the address of a running scheduler."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import dask
import yaml
from distributed import Client, LocalCluster

from cryodask.errors import ClusterError, ProjectFileError

# One thread a task slot: the runners fill the cores with tasks, and the number of threads changes the last bits of sums.
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"), "1")

# Dask's own setting (trim at 64 KiB) hands every temporary of the kernels back to the kernel and faults it in again: more than half of
# the CPU time of a refinement was spent there. 32 MiB is the largest threshold that glibc takes.
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(512 << 20)}

_SETTINGS = {
    # SpecCluster closes a nanny for good when its worker is away for this long (15 s by default): with a slow restart the run hangs
    "distributed.deploy.lost-worker-timeout": "1h",
    # a worker's death convicts nobody here: the map runner tries the suspects in child processes
    "distributed.scheduler.allowed-failures": 0,
    # the statistical profiler costs 2 % of a core for every idle worker
    "distributed.worker.profile.enabled": False,
    # blocks are cached in the workers by us, outside Dask's count of what it could spill
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.target": False,
    "distributed.admin.tick.limit": "30s",
    # every process asks itself 50 times a second how late it is, and looks at the machine twice: with two workers that was 6 of the 8 % of
    # a core that an idle cluster used (memory limits have an interval of their own)
    "distributed.admin.tick.interval": "1s",
    "distributed.admin.system-monitor.interval": "3s",
    "distributed.comm.timeouts.connect": "60s",
}


_OWN_CLUSTERS: dict[int, LocalCluster] = {}


def connect(where: str = "local", *, workers: int | None = None, lane: str = "batch") -> Client:
    """A plain ``distributed.Client`` on the workers that ``where`` describes.

    Parameters
    ----------
    where : str
        ``local`` (one worker process a core), a cluster file (YAML: ``kind: local`` with ``workers`` and ``memory``, or
        ``kind: address`` with ``address``), a scheduler file (JSON), or an address ``tcp://...``.
    workers : int, optional
        Local workers; overrides the file.
    lane : str
        Goes into the client's name, for schedulers that share their workers by lane.

    Raises
    ------
    ClusterError, ProjectFileError
    """
    name = f"{lane}/{os.environ.get('USER', 'user')}"
    if where == "local":
        return _local(name, {"workers": workers})
    if re.match(r"^(tcp|tls)://", where):
        return _existing(name, address=where)
    path = Path(where)
    if not path.is_file():
        raise ProjectFileError(
            f"There is no cluster {where!r}.", "a typing error", "write local, the path of a cluster file, or an address tcp://host:port"
        )
    if path.suffix == ".json":
        return _existing(name, scheduler_file=str(path))
    try:
        settings = yaml.safe_load(path.read_text()) or {}
        kind = settings.pop("kind", "local")
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError, TypeError) as error:
        raise ProjectFileError(
            f"{path} is no cluster file: {error}", "wrong indentation or another kind of file", "write  kind: local  and what belongs to it"
        ) from None
    known = {"local": {"workers", "memory", "scratch"}, "address": {"address"}}
    if kind not in known or set(settings) - known[kind]:
        raise ProjectFileError(
            f"{path}: unknown kind or setting: kind {kind!r}, {sorted(set(settings) - known.get(kind, set()))}.",
            "a typing error",
            "kind: local with workers, memory, scratch; or kind: address with address",
        )
    if kind == "address":
        if "address" not in settings:
            raise ProjectFileError(f"{path} gives no address.", "the line is missing", "add  address: tcp://host:port")
        return _existing(name, address=settings["address"])
    return _local(name, {**settings, **({"workers": workers} if workers else {})})


def _local(name: str, settings: dict[str, Any]) -> Client:
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


def _started(name: str, settings: dict[str, Any]) -> Client:
    count = settings.get("workers") or os.cpu_count() or 1
    environment = {**_ONE_THREAD, **_ALLOCATOR, "PYTHONDONTWRITEBYTECODE": ""}
    with dask.config.set({**_SETTINGS, "distributed.nanny.pre-spawn-environ": environment}):
        cluster = LocalCluster(
            n_workers=count,
            threads_per_worker=1,
            processes=True,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
            worker_dashboard_address="127.0.0.1:0",
            memory_limit=settings.get("memory", "auto"),
            local_directory=settings.get("scratch"),
            silence_logs=40,
        )
        # the settings must outlive this block in this process, where the scheduler lives
    dask.config.set(_SETTINGS)
    client = Client(cluster, name=name)
    _OWN_CLUSTERS[id(client)] = cluster
    return client


def _existing(name: str, **where: str) -> Client:
    try:
        return Client(name=name, timeout="15s", **where)
    except (OSError, ValueError) as error:
        raise ClusterError(
            f"No scheduler answers at {next(iter(where.values()))}: {error}",
            "it has ended, or a firewall stands between",
            "start it again and give its new address",
        ) from error


def close(client: Client) -> None:
    """Close a client and the local cluster that :func:`connect` made for it."""
    cluster = _OWN_CLUSTERS.pop(id(client), None)
    client.close()
    if cluster is not None:
        cluster.close()
