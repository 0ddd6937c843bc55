"""Drivers of a project as processes of their own, also in containers: namespaces of their own, in which pids and host names are alike.

``python _drivers.py FOLDER [--force]`` takes the lock of a project and obeys what it reads, a line each: ``write`` (a record of row 1 with
its process id, the registry and project.json), ``leave``. It says ``held EPOCH``, ``refused``, ``wrote``, ``left`` or ``overtaken``.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from cryodask.errors import LockedError, TakenOverError
from cryodask.store.generation import Generation
from cryodask.store.layouts import Grid
from cryodask.store.project import Arrival, Project
from cryodask.store.state import StepState

PLACE = "motion/key"


def make_project(folder: Path) -> Project:
    """A project with one exposure and one step, of which nothing is done."""
    project = Project.create(folder, "p")
    meta = {"stage": "motion", "version": 1, "params": {}, "recipes": {"": "recipe"}, "inputs": {}}
    grids = {"": Grid({"y": 6, "x": 8}, {})}
    Generation.create(folder / "stages" / PLACE, meta=meta, gives=("micrograph_sum", "total_motion"), per_item=True, grids=grids)
    project.state.adopt("motion", StepState(stage="motion", key="key"))
    project.save()
    project.update_exposures([Arrival("m0", "content 0", {}), Arrival("m1", "content 1", {})], complete=True)
    return project


def write(folder: Path, name: str) -> None:
    """Everything that counts, as a driver writes it: a record, the registry, the state."""
    project = Project(folder)
    project.generation("motion").commit_failure(1, "m1", name, "blamed", 3)
    project.update_exposures([Arrival(f"of {name}", f"content of {name}", {})], complete=False)
    project.state.removed[name] = 1.0
    project.save()


def written(folder: Path) -> tuple[str | None, set[str], set[str]]:
    """Whose record of row 1 counts, and whose exposures and states are there."""
    project = Project(folder)
    record = project.generation("motion").records().get(1)
    exposures = {item.name.removeprefix("of ") for item in project.items() if item.name.startswith("of ")}
    return record and record["error"], exposures, set(project.state.removed)


class Driver:
    """A driver in a process of its own.

    Parameters
    ----------
    folder : Path
    apart : bool
        In a container: a pid namespace, in which it is process 1, and a host called ``node``.
    ahead_seconds : float
        How far the clocks of its container that count since the boot are ahead.
    """

    def __init__(self, folder: Path, *, apart: bool = False, ahead_seconds: float = 0.0, force: bool = False) -> None:
        words = [sys.executable, __file__, str(folder), *(["--force"] if force else [])]
        if apart:
            words = [*container(ahead_seconds), "sh", "-c", 'hostname node; exec "$@"', "sh", *words]
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
        self.apart = apart

    def says(self) -> str:
        """The next line that it says; empty if it has ended."""
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def tell(self, word: str) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended, and said why
            self._process.stdin.write(f"{word}\n")
            self._process.stdin.flush()

    def ask(self, word: str) -> str:
        self.tell(word)
        return self.says()

    def send(self, number: int) -> None:
        """Send a signal to the process that holds the lock."""
        inner = psutil.Process(self._process.pid)
        if self.apart:
            (inner,) = inner.children()
        os.kill(inner.pid, number)

    def ends(self) -> int:
        return self._process.wait(60)

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *error: object) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        with suppress(BrokenPipeError):
            self._process.communicate()


def container(ahead_seconds: float = 0.0, kinds: Sequence[str] = ("--pid", "--kill-child", "--mount-proc", "--uts")) -> list[str]:
    """Words of a command that begin it in a container."""
    shift = ["--time", f"--boottime={ahead_seconds:.0f}", f"--monotonic={ahead_seconds:.0f}"] if ahead_seconds else []
    words = ["unshare", "--fork", *kinds, *shift]
    if shutil.which("unshare") is None or subprocess.run([*words, "true"], capture_output=True, check=False).returncode:
        import pytest  # not in every driver: it would take a quarter of its start

        pytest.skip("NOT TESTED: only root can make namespaces, and not everywhere")
    return words


def main(folder: Path, force: bool) -> int:
    def say(text: str) -> None:
        print(text, flush=True)

    try:
        with Project(folder).lock(force=force) as lock:
            say(f"held {lock.epoch}")
            for line in sys.stdin:
                if line.strip() == "write":
                    write(folder, str(lock.epoch))
                    say("wrote")
                else:
                    break
        say("left")
    except LockedError:
        say("refused")
        return 2
    except TakenOverError as error:
        say("overtaken")
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), "--force" in sys.argv))
