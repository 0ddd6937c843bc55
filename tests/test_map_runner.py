"""The map runner on a real cluster: every item is accounted for, and only the guilty are blamed."""

from __future__ import annotations

import pytest

from cryodask.cluster.connect import close, connect
from cryodask.errors import CryodaskError
from cryodask.run.map import MapRunner
from cryodask.store.journal import Journal
from cryodask.store.project import Item
from cryodask.testing.faults import FaultyJob

pytestmark = pytest.mark.heavy


def _items(count: int) -> list[Item]:
    return [Item(row, f"item{row}", f"content {row}") for row in range(count)]


def _outcome(folder):
    records = Journal(folder / "journal").read().records
    good = {row for row, r in records.items() if r["ok"]}
    return good, {row: r for row, r in records.items() if not r["ok"]}


def test_items_that_raise_are_quarantined_and_passing_troubles_are_retried(client, tmp_path):
    job = FaultyJob(tmp_path, {3: "raise", 7: "os-error-once", 9: "unpicklable"})
    runner = MapRunner(client, job, backoff_seconds=0.1)
    counts = runner.run(iter(_items(20)))
    good, bad = _outcome(tmp_path)
    assert counts == {"seen": 20, "done": 18, "quarantined": 2, "running": 0, "waiting": 0}
    assert good == set(range(20)) - {3, 9}
    assert bad[3]["error"] == "MovieError"
    assert "item3 is bad" in bad[3]["message"]


def test_an_error_of_all_items_stops_the_run(client, tmp_path):
    with pytest.raises(CryodaskError, match="No space is left"):
        MapRunner(client, FaultyJob(tmp_path, {2: "disk-full"})).run(iter(_items(10)))


def test_a_live_source_ends_when_it_closes_and_every_item_is_accounted_for_meanwhile(client, tmp_path):
    seen = []

    def source():
        for item in _items(12):
            yield item
            if item.row % 3 == 2:
                yield None

    def look(kind, item, text):
        seen.append(runner.counts())

    runner = MapRunner(client, FaultyJob(tmp_path), event=look)
    assert runner.run(source())["done"] == 12
    assert all(c["seen"] == c["done"] + c["quarantined"] + c["running"] + c["waiting"] for c in seen)


def test_items_that_kill_their_worker_are_convicted_and_innocent_ones_committed(tmp_path):
    client = connect("local", workers=2)
    try:
        job = FaultyJob(tmp_path, {5: "exit", 11: "segfault"}, seconds=0.02)
        counts = MapRunner(client, job).run(iter(_items(24)))
    finally:
        close(client)
    good, bad = _outcome(tmp_path)
    assert (counts["done"], counts["quarantined"]) == (22, 2)
    assert good == set(range(24)) - {5, 11}
    assert "exit code 3" in bad[5]["message"]
    assert "SIGSEGV" in bad[11]["message"]
