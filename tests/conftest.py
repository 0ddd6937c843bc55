"""Fixtures shared by the tests."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from cryodask.testing.slurm import slurm_for_tests

os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"


# a test that fails on a busy machine is of no use
settings.register_profile("tests", deadline=None)
settings.load_profile("tests")


# thousands of tests and the modules that they import are kept to the end: looking through them for garbage again and again, while they are
# imported and later, took a tenth of the CPU time of a process
gc.disable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    gc.freeze()
    gc.enable()


def pytest_configure() -> None:
    # where tests run in the background Ctrl-C is ignored, and the programs that they start would inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # minutes: begun late they would run on alone when all else is done
    items.sort(key=lambda item: item.path.stem != "test_notebooks")
    if shutil.which("relion_project") is None:
        warnings.warn("RELION is not on the PATH: the tests marked relion are SKIPPED", stacklevel=1)
        for item in items:
            if "relion" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs RELION on the PATH"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data beside the repository."""
    path = Path(__file__).resolve().parents[2] / "shared"
    if not (path / "data").is_dir():
        warnings.warn(f"{path}/data is absent: tests on real data are SKIPPED", stacklevel=1)
        pytest.skip("real test data are not beside the repository")
    return path


@pytest.fixture(scope="session")
def client() -> Iterator[Any]:
    """A real local cluster of two workers, shared by the tests that do not harm it."""
    import dask

    from cryodask.cluster.connect import close, connect

    # it lies idle for most of a run, when half of what it costs is ten looks per second at the memory of each worker
    with dask.config.set({"distributed.worker.memory.monitor-interval": "2s"}):
        made = connect("local", workers=2)
    yield made
    close(made)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A browser for the tests of pages."""
    from _served import browser, need_browser

    need_browser()
    with browser() as started:
        yield started


@pytest.fixture(autouse=True)
def _no_client_of_a_closed_loop() -> Iterator[None]:
    """Tasks of workers in this process that ask for a client leave it behind as the default one of whoever computes next."""
    yield
    import dask
    from distributed.client import _global_clients

    for number, left in list(_global_clients.items()):
        if left.loop.asyncio_loop.is_closed():  # type: ignore[attr-defined]
            del _global_clients[number]
    if not _global_clients and dask.config.get("scheduler", None) == "dask.distributed":
        dask.config.config.pop("scheduler")


@pytest.fixture(autouse=True)
def _one_thread_is_left() -> Iterator[None]:
    """Threads of torch that share cores with other processes spin while they wait: every later test would take ten times the CPU time."""
    yield
    torch = sys.modules.get("torch")
    if torch is None:  # half of the test modules do without it
        return
    left = torch.get_num_threads()
    torch.set_num_threads(1)
    assert left == 1, f"this test leaves torch with {left} threads"


slurm = pytest.fixture(scope="session")(slurm_for_tests)
