"""A session that its page starts as a job of Slurm: it waits in the queue, is taken off it, runs, and is ended. Real Slurm."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from _service import environment_of_tests, wait
from _web import Site, serving
from test_web_control import session

from cryodask.run.started import Started
from cryodask.store.project import Project
from cryodask.web.control import Starter
from cryodask.web.ledger import Ledger
from cryodask.web.sessions import Sessions

pytestmark = [pytest.mark.slurm, pytest.mark.heavy]

CLUSTER = {
    "kind": "slurm",
    "interface": "lo",
    "poll_seconds": 0.5,
    "driver": {"partition": "cpu", "memory": "500MiB", "walltime": "0:20:00"},
    "pools": {"cpu": {"memory": "800MiB", "partition": "cpu", "count": 1}},
}


@pytest.fixture
def site(slurm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Site, Path]]:
    environment_of_tests(monkeypatch, tmp_path)
    monkeypatch.setenv("SLURM_CONF", slurm.environ["SLURM_CONF"])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")])))
    monkeypatch.setattr("cryodask.web.queued._ASK_AGAIN_SECONDS", 0.2)
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump({**CLUSTER, "logs": str(tmp_path / "logs")}))
    folder = session(tmp_path)
    (folder / "project.json").unlink()
    Project.create(folder, "live").save()
    # it was run with workers of its own before, which a cluster does not need
    Started(tmp_path / "live.yaml", ("--watch", "--workers", "1"), True).write(folder)
    starter = Starter(str(tmp_path / "cluster.yaml"), strict=False)
    with serving(Sessions({"": [folder]}, Ledger(tmp_path / "audit")), cache=tmp_path / "cache", starter=starter) as on:
        yield on, folder
    slurm.reset()


def test_a_session_is_started_queued_cancelled_started_again_and_ended(slurm: Any, site: tuple[Site, Path]) -> None:
    running, folder = site

    def ask(what: str, body: dict[str, str], status: int = 202) -> None:
        assert running.ask(f"/s/live/{what}", "POST", sent=body)[0] == status

    def now() -> dict[str, Any]:
        found: dict[str, Any] = running.json("/s/live/control")
        return found

    def until(state: str) -> dict[str, Any]:
        wait(lambda: now()["state"] == state, f"{state}, not {now()}", 120)
        return now()

    for node in ("c0", "c1"):
        slurm.drain(node)
    ask("start", {})
    queued = until("queued")
    (job,) = slurm.jobs()
    assert re.search(rf"It waits in the queue of Slurm \(job {job}, \w+", queued["said"])
    assert (queued["start"], queued["pause"], queued["end"]) == (False, True, False)
    ask("start", {}, 409)
    assert list(slurm.jobs()) == [job], "one run, however often it is asked for"
    ask("pause", {})
    assert (until("never")["problem"], slurm.jobs()) == ("", {})

    ask("start", {})
    until("queued")
    (job,) = slurm.jobs()
    slurm.run("scancel", job)
    wait(lambda: now()["problem"], "the end of a job that never began")
    assert now()["problem"].startswith(f"Slurm job {job} ended before its run began.")
    assert now()["start"]

    for node in ("c0", "c1"):
        slurm.resume(node)
    ask("start", {})
    until("running")
    ask("start", {}, 409)
    wait(lambda: running.json("/api/v1/sessions/live")["done"] == 3, "three movies", 120)
    ask("end", {"name": "live"})
    until("finished")
    assert (folder / "report.html").exists(), "the later steps ran"
    again = Started.read(folder)
    assert again is not None
    assert (again.options, again.watch, again.cluster) == (("--watch",), True, str(folder.parent / "cluster.yaml"))
    assert [line["action"] for line in Ledger(folder.parent / "audit").records()] == ["start", "pause", "start", "start", "end"]
