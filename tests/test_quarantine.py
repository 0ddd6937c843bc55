"""Bad items of every sort among two hundred good ones: each is listed with its reason, no other is blamed, all good ones are done."""

from __future__ import annotations

import pytest
from distributed import Client

from cryodask.run.map import MapRunner
from cryodask.store.journal import Journal
from cryodask.store.project import Item
from cryodask.testing.clusters import ProcessCluster
from cryodask.testing.faults import FaultyJob

GOOD = 200
FAULTS = {
    7: "raise", 31: "exit", 60: "segfault", 90: "fails-twice", 111: "hang", 140: "freeze", 170: "memory", 195: "unpicklable",
}  # fmt: skip
GUILTY = set(FAULTS) - {90}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """Counts, events and journal of one run over all of them, on two workers of 700 MB."""
    folder = tmp_path_factory.mktemp("faults")
    events = []
    items = [Item(row, f"item{row}", f"content {row}") for row in range(GOOD + len(GUILTY))]
    with ProcessCluster(2, memory="700MB") as cluster, Client(cluster.address) as client:
        told = lambda kind, item, text: events.append((kind, item.name if item else None, text))  # noqa: E731
        runner = MapRunner(client, FaultyJob(folder, FAULTS), limit_seconds=8, backoff_seconds=0.2, event=told)
        counts = runner.run(iter(items))
    records = Journal(folder / "journal").read().records
    return counts, events, records


@pytest.mark.heavy
def test_the_run_ends_with_every_item_done_or_listed(outcome):
    counts, _, records = outcome
    assert counts == {"seen": 207, "done": GOOD, "quarantined": len(GUILTY), "running": 0, "waiting": 0}
    assert len(records) == 207


def test_no_innocent_item_is_blamed(outcome):
    _, _, records = outcome
    assert {row for row, r in records.items() if not r["ok"]} == GUILTY


def test_an_item_that_fails_twice_and_then_succeeds_is_done(outcome):
    _, events, records = outcome
    assert records[90]["ok"]
    assert sum(kind == "again" and "the disk was busy" in text for kind, name, text in events if name == "item90") == 2


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (7, "item7 is bad"),
        (31, "exit code 3"),
        (60, "SIGSEGV"),
        (111, "took longer than 8 s"),
        (140, "took longer than 8 s"),
        (170, "needs more memory than a worker has"),
        (195, "_Unpicklable"),
    ],
)
def test_the_reason_is_one_that_a_user_understands(outcome, row, words):
    _, _, records = outcome
    assert words in f"{records[row]['error']}: {records[row]['message']}"
