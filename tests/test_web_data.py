"""The page of the data: sizes and dates are those of the store, and nothing is removed without the size that was shown."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from _web import serving, wait_for

from cryodask.store.away import Ledger as Files
from cryodask.store.project import Project
from cryodask.testing.archives import MOVIES, local, lost, make, truth
from cryodask.tiers import policy
from cryodask.tiers.archive import archive
from cryodask.tiers.policy import DAY, Rule, Storage
from cryodask.web.ledger import Ledger
from cryodask.web.sessions import Sessions


@pytest.fixture
def project(tmp_path) -> Path:
    return make(tmp_path / "s")


def server(project: Path, rules: Storage):
    """A server that shows one project."""
    folder = project.parent.parent
    return serving(Sessions({"": [project]}, Ledger(folder / "audit")), cache=folder / "cache", storage=rules)


def post(site, path: str, body: dict[str, str]) -> tuple[int, dict[str, str]]:
    status, _, answer = site.ask(path, "POST", sent=body, headers={"Origin": site.address, "Accept": "application/json"})
    return status, json.loads(answer)


def rules_of(tmp_path: Path) -> Storage:
    return Storage(archive=str(tmp_path / "a"), originals=Rule(then="archive", after_days=0), micrographs=Rule())


def test_what_lies_where_and_what_goes_when(project, tmp_path):
    rules = rules_of(tmp_path)
    archive(project, rules.archive, rows=[0])
    with server(project, rules) as site:
        told = site.json("/s/p/data.json")
        assert {(one["category"], one["where"]): one["bytes"] for one in told["held"]}["originals", rules.archive] == 3000
        assert told["going"][0]["why"] == "the hand-over is not acknowledged"
        assert post(site, "/s/p/data/acknowledge", {"who": "<b>A. Lovelace</b>"})[0] == 200
        text = site.ask("/s/p/data", headers={"Accept": "text/html"})[2].decode()
        assert "&lt;b&gt;A. Lovelace" in text
        assert "<b>A. Lovelace" not in text
        assert "6 kB" in text  # what is left here
        assert rules.archive in text
        assert site.json("/s/p/data.json")["going"][0]["due"] is not None


def test_a_removal_needs_the_size_that_is_shown(project, tmp_path):
    rules, wanted = rules_of(tmp_path), truth(project)
    with server(project, rules) as site:
        status, told = post(site, "/s/p/data/remove", {"size": "9.0 kB"})
        assert (status, told["what"]) == (409, "Nothing is due.")
        policy.acknowledge(project, "somebody")
        due = policy.forecast(Project(project), rules)[0].due
        assert due is not None
        policy.announce(project, rules, due - 1.5 * DAY)  # as a timer did
        wait_for(lambda: time.time() > due, "the date to come")
        status, told = post(site, "/s/p/data/remove", {"size": "1 kB"})
        assert (status, "is not the size" in told["what"]) == (409, True)
        assert len(local(project)) == 2 * MOVIES
        assert "type the size" in site.ask("/s/p/data", headers={"Accept": "text/html"})[2].decode()
        assert post(site, "/s/p/data/remove", {"size": "9.0 kB"}) == (202, {"size": "9.0 kB"})
        wait_for(lambda: len(Files(project).absent()) == MOVIES and len(local(project)) == MOVIES, "the removal")
        log = project / "tiers" / "last-removal.log"
        wait_for(lambda: "3 files, 9.0 kB; 0 problems" in log.read_text(), "its end")
        assert "3 files, 9.0 kB" in site.ask("/s/p/data", headers={"Accept": "text/html"})[2].decode()
    assert not lost(project, wanted)
    assert [line["action"] for line in Ledger(tmp_path / "audit").records()] == ["remove data"]


def test_the_page_needs_no_heavy_package(project):
    """The server stays small: what the page asks imports neither torch nor xarray, dask, matplotlib or the client of object stores."""
    code = """if True:
        import sys, time, cryodask.web.routes.data as data
        from cryodask.store.project import Project
        project, rules = Project(sys.argv[1]), data.policy.Storage(archive="/a")
        data.as_dict(project, rules), data.policy.due_now(project, rules, time.time())
        print([name for name in ("torch", "xarray", "dask", "matplotlib", "obstore") if name in sys.modules])
    """
    done = subprocess.run([sys.executable, "-c", code, str(project)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
