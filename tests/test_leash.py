"""Processes that a driver has started end with it, even if it is killed: workers, what they have started, and those of a simulation.

The kernel kills them at that moment, whatever they do: how soon they are gone is a matter of the machine, by what they ended is not.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from cryodask.cluster.connect import close, connect

PRELUDE = """
import ctypes, os, sys, time
from pathlib import Path
here = Path(sys.argv[1])

def begun(name):
    (here / f"{name}-{os.getpid()}").touch()
"""

DRIVER = (
    PRELUDE
    + """
from cryodask.cluster.connect import connect
from cryodask.run.isolation import in_child
from cryodask.run.residents import Run

class Freezing:
    \"\"\"A job that holds the interpreter forever.\"\"\"

    def run(self, item, brief, device, attempt):
        begun("isolated")
        ctypes.PyDLL(None).pause()

def freeze():
    begun("frozen")
    ctypes.PyDLL(None).pause()

def isolate():
    import cloudpickle
    return in_child((Run("", "here"), cloudpickle.dumps(Freezing()), None, None, "cpu", 1), None)

def sleep():
    begun("sleeping")
    time.sleep(600)

if __name__ == "__main__":
    client = connect("local", workers=3)
    futures = [client.submit(function, pure=False) for function in (freeze, isolate, sleep)]
    time.sleep(600)
"""
)

SIMULATION = (
    PRELUDE
    + """
from cryodask.simulate import SessionParams, simulate_session

if __name__ == "__main__":
    small = SessionParams(movies=40, height=256, width=256, frames=2, particles=1, truth_maps=())
    simulate_session(here / "session", small, processes=2, progress=lambda done, of: begun("simulated"))
"""
)


def started(script: str, folder: Path) -> subprocess.Popen[bytes]:
    path = folder / "driver.py"
    path.write_text(textwrap.dedent(script))
    return subprocess.Popen([sys.executable, str(path), str(folder)], start_new_session=True)


def wait_for(driver: subprocess.Popen[bytes], condition) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert driver.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that are not dead; who collects the dead that have lost their parent is not this program's concern."""
    left = []
    for process in processes:
        try:
            if process.status() != psutil.STATUS_ZOMBIE:
                left.append(process)
        except psutil.NoSuchProcess:
            pass
    return left


def killed(driver: subprocess.Popen[bytes]) -> set[int]:
    """Kill a driver; process ids of those below it that a SIGKILL ended, too. Nobody of them may stay."""
    below = psutil.Process(driver.pid).children(recursive=True)
    found = set()
    with orphans_come_here():
        try:
            driver.kill()
            driver.wait()
            until = time.monotonic() + 120
            while alive(below):
                assert time.monotonic() < until, below
                time.sleep(0.02)
            for process in below:
                with suppress(ChildProcessError):  # its own parent has taken notice
                    if os.WTERMSIG(os.waitpid(process.pid, 0)[1]) == signal.SIGKILL:
                        found.add(process.pid)
            return found
        finally:
            for process in alive(below):
                process.kill()


@contextmanager
def orphans_come_here() -> Iterator[None]:
    """Who has lost its parent becomes a child of this process, which is told how it ends (PR_SET_CHILD_SUBREAPER)."""
    ctypes.CDLL(None).prctl(36, 1)
    try:
        yield
    finally:
        ctypes.CDLL(None).prctl(36, 0)


def test_all_that_a_killed_driver_started_are_killed_with_it(tmp_path):
    """Whether they hold the interpreter, run below a worker, or are stopped."""
    driver = started(DRIVER, tmp_path)
    try:
        wait_for(driver, lambda: {p.name.partition("-")[0] for p in tmp_path.glob("*-*")} == {"frozen", "isolated", "sleeping"})
        (sleeping,) = tmp_path.glob("sleeping-*")
        os.kill(int(sleeping.name.partition("-")[2]), signal.SIGSTOP)
        assert len(psutil.Process(driver.pid).children(recursive=True)) >= 4
        assert {int(path.name.partition("-")[2]) for path in tmp_path.glob("*-*")} <= killed(driver)
    finally:
        driver.kill()


@pytest.mark.heavy
def test_a_killed_simulation_leaves_no_process(tmp_path):
    driver = started(SIMULATION, tmp_path)
    try:
        # two that simulate, and the tracker of their semaphores, which ends by itself
        wait_for(driver, lambda: list(tmp_path.glob("simulated-*")) and len(psutil.Process(driver.pid).children(recursive=True)) >= 3)
        assert len(killed(driver)) >= 2
    finally:
        driver.kill()


def test_workers_outlive_the_thread_that_asked_for_them_and_are_replaced():
    made: list = []
    thread = threading.Thread(target=lambda: made.append(connect("local", workers=1)))
    thread.start()
    thread.join()
    (client,) = made
    try:
        first = client.submit(os.getpid, pure=False).result(60)
        time.sleep(1)
        assert client.submit(os.getpid, pure=False).result(60) == first
        os.kill(first, signal.SIGKILL)
        assert client.submit(os.getpid, pure=False).result(60) != first
    finally:
        close(client)
