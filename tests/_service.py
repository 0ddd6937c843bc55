"""Running services, shared by their tests."""

from __future__ import annotations

import ipaddress
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from _command import command

from cryodask.cluster.service.whereabouts import Whereabouts, folder_of

COMMAND = [sys.executable, "-m", "cryodask.cli"]


def wait(condition: Callable[[], Any], what: str, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.05)


def cryodask(*words: str, code: int = 0) -> str:
    """What a command says, run in this process; it must end with this status."""
    return ended(command(*words), code)


def cryodask_process(*words: str, code: int = 0) -> str:
    """The same in a process of its own, which has ended then."""
    return ended(subprocess.run([*COMMAND, *words], capture_output=True, text=True, timeout=300), code)


def ended(done: subprocess.CompletedProcess[str], code: int) -> str:
    said = done.stdout + done.stderr
    assert done.returncode == code, said
    return said


def holder(name: str) -> psutil.Process:
    """The process that holds the scheduler of a service."""
    found = Whereabouts.read(folder_of(name) / "scheduler.json")
    assert found is not None
    return psutil.Process(found.pid)


def running(pids: list[int], *kinds: str) -> list[psutil.Process]:
    """Those of these processes whose command holds one of the words."""
    found = []
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            if any(kind in " ".join(process.cmdline()) for kind in kinds):
                found.append(process)
    return found


def open_to_others(processes: list[psutil.Process]) -> set[tuple[str, int]]:
    """What these processes listen on beyond the loopback address; at least one socket each is expected of one of them."""
    listening = set()
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            listening |= {(c.laddr.ip, c.laddr.port) for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    assert listening, "nothing listens: the wrong processes were looked at"
    return {(host, port) for host, port in listening if not ipaddress.ip_address(host.removeprefix("::ffff:")).is_loopback}


def journal(folder: Path) -> list[dict[str, Any]]:
    """All records of a run of ``PROGRAM``."""
    return [json.loads(line.split(" ", 1)[1]) for file in sorted(folder.glob("journal/*.jsonl")) for line in file.read_text().splitlines()]


PROGRAM = """
import sys
from pathlib import Path
from cryodask.cluster import connect
from cryodask.errors import CryodaskError
from cryodask.run.map import MapRunner
from cryodask.store.journal import Journal
from cryodask.store.project import Item
from cryodask.testing.faults import FaultyJob

folder, cluster, count, seconds = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
done = {row for row, record in Journal(folder / "journal").read().records.items() if record["ok"]}
try:
    client = connect(cluster, lane="batch")
    items = [Item(row, f"item{row}", f"content {row}") for row in range(count) if row not in done]
    print(f"{len(done)} were done before", flush=True)
    print(MapRunner(client, FaultyJob(folder, seconds=seconds), first_attempt=1000 * len(done)).run(iter(items)), flush=True)
except CryodaskError as error:
    sys.exit(str(error))
"""
"""Map work that commits and resumes, as ``cryodask run`` does: folder, cluster, items, seconds an item."""


def program(folder: Path, cluster: str, items: int, seconds: float) -> list[str]:
    folder.mkdir(exist_ok=True)
    (folder / "program.py").write_text(PROGRAM)
    return [sys.executable, str(folder / "program.py"), str(folder), cluster, str(items), str(seconds)]


def begun(folder: Path, command: list[str]) -> subprocess.Popen[bytes]:
    with open(folder / "said.txt", "ab") as said:
        return subprocess.Popen(command, stdout=said, stderr=said, start_new_session=True)


def environment_of_tests(patch: Any, folder: Path) -> None:
    patch.setenv("XDG_STATE_HOME", str(folder / "state"))
    patch.setenv("XDG_CONFIG_HOME", str(folder / "config"))
    patch.setenv("USER", os.environ.get("USER", "tester"))
