"""A Dask cluster of separate processes on this machine, connected only by the network, as in a batch system."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType

import psutil
from distributed import Client

from cryodask.cluster.environment import ALLOCATOR, ONE_THREAD, SETTINGS

_START_SECONDS = 120.0
# bokeh, which draws the dashboard, would double what starting a process costs
_PAGES = ("--dashboard-address", "127.0.0.1:0", "--no-dashboard")


class ProcessCluster:
    """One ``dask scheduler`` and some ``dask worker`` with a nanny each; a context manager that cleans up.

    Parameters
    ----------
    workers : int
    memory : str
        Memory limit of each worker, as for ``dask worker --memory-limit`` (``auto``, ``700MB``).

    Notes
    -----
    Linux only. A killed process stays dead until :meth:`replace`; a killed worker is restarted by its nanny. When the scheduler dies,
    workers and nannies leave, as in any Dask cluster.
    """

    def __init__(self, workers: int = 2, *, memory: str = "auto", threads: int = 1) -> None:
        self._count, self._memory, self._threads = workers, memory, threads
        self._folder = tempfile.TemporaryDirectory(prefix="cryodask-cluster-")
        self._scheduler_file = Path(self._folder.name) / "scheduler.json"
        self._scheduler: subprocess.Popen[bytes] | None = None
        self._nannies: list[subprocess.Popen[bytes]] = []
        self._port, self._started = 0, 0
        self.address = ""

    def __enter__(self) -> ProcessCluster:
        try:
            self.replace()
            with Client(self.address, timeout=f"{_START_SECONDS}s") as client:
                client.wait_for_workers(self._count, timeout=_START_SECONDS)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        started = [*self._nannies, *([self._scheduler] if self._scheduler else [])]
        family = [child for process in started for child in _below(process.pid)]
        for process in started:
            _kill_group(process)
        self._nannies, self._scheduler = [], None
        psutil.wait_procs(family, timeout=10)
        self._folder.cleanup()

    # --- who is there ---------------------------------------------------------------------------------------------------------
    @property
    def scheduler(self) -> int | None:
        """Process id of the scheduler, None if it is dead."""
        return self._scheduler.pid if self._scheduler is not None and self._scheduler.poll() is None else None

    def nannies(self) -> list[int]:
        """Process ids of the live nannies."""
        return [n.pid for n in self._nannies if n.poll() is None]

    def workers(self) -> list[int]:
        """Process ids of the workers below them."""
        found = []
        for child in (c for nanny in self.nannies() for c in _below(nanny, recursive=False)):
            with contextlib.suppress(psutil.Error):
                if "multiprocessing.spawn" in " ".join(child.cmdline()):
                    found.append(child.pid)
        return found

    def log(self) -> str:
        """What scheduler and workers have printed."""
        return "\n".join(path.read_text(errors="replace") for path in sorted(Path(self._folder.name).glob("*.log")))

    # --- what a batch system does ---------------------------------------------------------------------------------------------
    def replace(self) -> None:
        """Restart dead parts: the scheduler on its old port, nannies as new ones. Returns when the scheduler listens."""
        if self.scheduler is None:
            self._scheduler_file.unlink(missing_ok=True)
            where = ["--host", "127.0.0.1", "--port", str(self._port), *_PAGES]
            self._scheduler = self._start("scheduler", *where, "--scheduler-file", str(self._scheduler_file))
            self.address = self._wait_for_address(self._scheduler)
            self._port = int(self.address.rsplit(":", 1)[1])
        alive = []
        for nanny in self._nannies:
            if nanny.poll() is None:
                alive.append(nanny)
            else:
                _kill_group(nanny)  # a worker may outlive its nanny for a moment, a hung one forever
        self._nannies = alive
        for _ in range(self._count - len(alive)):
            scratch = tempfile.mkdtemp(dir=self._folder.name)
            own = ["--nanny", "--nthreads", str(self._threads), "--memory-limit", self._memory, "--local-directory", scratch]
            self._nannies.append(self._start("worker", self.address, *own, "--host", "127.0.0.1", *_PAGES))

    def _wait_for_address(self, scheduler: subprocess.Popen[bytes]) -> str:
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline and scheduler.poll() is None:
            with contextlib.suppress(OSError, ValueError, KeyError):
                return str(json.loads(self._scheduler_file.read_text())["address"])
            time.sleep(0.05)
        raise RuntimeError(f"the scheduler does not start:\n{self.log()[-2000:]}")

    def _start(self, *words: str) -> subprocess.Popen[bytes]:
        # Dask's own scheduler does not read the allowed failures of a task
        given = SETTINGS | {"distributed.scheduler.allowed-failures": 0}
        settings = {"DASK_" + k.upper().replace(".", "__").replace("-", "_"): str(v) for k, v in given.items()}
        kept = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        self._started += 1
        with open(Path(self._folder.name) / f"{self._started:04d}-{words[0]}.log", "wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "dask", *words],
                env={**kept, **ONE_THREAD, **ALLOCATOR, **settings},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a separate process group, so that one signal ends a nanny with all its children
                preexec_fn=_die_with_parent,
            )


_LIBC = ctypes.CDLL(None)


def _die_with_parent() -> None:
    _LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _below(pid: int, *, recursive: bool = True) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return list(psutil.Process(pid).children(recursive=recursive))
    return []


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
