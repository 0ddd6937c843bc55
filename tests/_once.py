"""What is made once per pytest run, by whichever xdist worker comes first, and shared or copied from then on."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cryodask.simulate import SessionParams, prepare_session, simulate_one


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The folder ``name`` of the run, filled by ``make`` when it is asked for first. Nobody changes what lies there."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "once" / name
    folder.parent.mkdir(exist_ok=True)
    with open(folder.with_name(f"{name}.lock"), "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.with_name(f"{name}.made").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            folder.with_name(f"{name}.made").touch()
    return folder


def simulated(factory: pytest.TempPathFactory, folder: Path, params: SessionParams) -> Path:
    """``simulate_session(folder, params)``; movies that another test has simulated in this run are copied, for they are the same bits."""
    prepare_session(folder, params)
    recipe = hashlib.sha256(repr({**params.model_dump(), "movies": None, "truth_maps": None}).encode()).hexdigest()[:12]

    def make(index: int) -> Callable[[Path], None]:
        def one(store: Path) -> None:
            for name in ("movies", "truth"):
                (store / name).mkdir()
            simulate_one(store, params, index)

        return one

    for index in range(params.movies):
        shutil.copytree(once(factory, f"movie-{recipe}-{index}", make(index)), folder, dirs_exist_ok=True)
    return folder
