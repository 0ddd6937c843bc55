"""distributed with our classes in the place of its own, for its own tests: imported as a pytest plugin and by every process they start.

``CRYODASK_SUBSTITUTE`` says what: ``plain`` (nothing), ``lanes`` (FairShareScheduler) or ``guarded`` (GuardedScheduler, its workers and
nannies); ``CRYODASK_LANES`` how many lanes the clients are in by turns.
"""

from __future__ import annotations

import itertools
import os
import sys
from typing import Any

import dask
import distributed
import distributed.deploy.local
import distributed.nanny
import distributed.scheduler
import distributed.shuffle
import distributed.worker

KIND = os.environ.get("CRYODASK_SUBSTITUTE", "plain")
LANES = int(os.environ.get("CRYODASK_LANES", "1"))
FOLDER = os.environ["CRYODASK_TESTS_OF_DISTRIBUTED"]
MARKERS = ("avoid_ci", "ci1", "extra_packages", "flaky", "gpu", "ipython", "leaking", "memray", "slow", "workerstate")


def pytest_configure(config: Any) -> None:
    for name in MARKERS:
        config.addinivalue_line("markers", f"{name}: distributed's")


def under_the_name(original: type, ours: type, **defaults: Any) -> type:
    """A class that is ``ours`` but has the name of the original, by which settings and log lines go."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        for name, value in defaults.items():
            kwargs.setdefault(name, value() if callable(value) else value)
        super(made, self).__init__(*args, **kwargs)

    made = type(original.__name__, (ours,), {"__init__": __init__, "__module__": original.__module__, "__doc__": original.__doc__})
    return made


def substitute(original: type, ours: type, **defaults: Any) -> None:
    made = under_the_name(original, ours, **defaults)
    for name, module in list(sys.modules.items()):
        if not name.startswith("cryodask") and getattr(module, original.__name__, None) is original:
            setattr(module, original.__name__, made)


def lanes_by_turns() -> None:
    """Clients without a name are in one lane after the other."""
    turns = itertools.cycle(f"lane{number}/user/project" for number in range(LANES))
    make = distributed.Client.__init__

    def __init__(self: Any, *args: Any, name: str | None = None, **kwargs: Any) -> None:
        make(self, *args, name=name or next(turns), **kwargs)

    distributed.Client.__init__ = __init__


# tests import modules from beside them by their full names
for _package in (distributed, distributed.shuffle, distributed.deploy):
    _package.__path__.append(os.path.join(FOLDER, *_package.__name__.split(".")))

if KIND != "plain":
    from cryodask.cluster.access import gate
    from cryodask.cluster.fairshare import FairShareScheduler
    from cryodask.cluster.guard import GuardedNanny, GuardedScheduler, GuardedWorker

    if KIND == "guarded":
        gate.check_sockets = lambda server: None  # the tests open their pages to the world
        own = {"allowed_failures": lambda: dask.config.get("distributed.scheduler.allowed-failures")}
        substitute(distributed.worker.Worker, GuardedWorker)
        substitute(distributed.nanny.Nanny, GuardedNanny, worker_class=lambda: distributed.worker.Worker)
        substitute(distributed.scheduler.Scheduler, GuardedScheduler, **own)
    else:
        substitute(distributed.scheduler.Scheduler, FairShareScheduler)
    if LANES > 1:
        lanes_by_turns()
