"""Items processed in the driver's process are committed together: reported only when safe, and nothing is lost or half there."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from cryodask.errors import DiskFullError
from cryodask.run import here
from cryodask.run.here import process_here
from cryodask.store.generation import Generation
from cryodask.store.layouts import Grid
from cryodask.store.project import Item
from cryodask.testing.crash import crash

META: dict[str, Any] = {"stage": "numbers", "version": 1, "params": {}, "recipes": {}, "inputs": {}}


def items(rows: Any) -> Iterator[Item]:
    return (Item(row, f"m{row}", f"content {row}") for row in rows)


@dataclass
class Numbers:
    """Commits a number per item. ``bad``: items that raise an error of a stage, or one that stops the run."""

    folder: Path
    bad: dict[int, Exception] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.generation = Generation(self.folder)

    def together(self) -> AbstractContextManager[None]:
        return self.generation.together()

    def brief(self, item: Item, again: bool) -> None:
        pass

    def run(self, item: Item, brief: None, device: str, attempt: int) -> None:
        if item.row in self.bad:
            raise self.bad[item.row]
        self.generation.commit(item.row, item.name, {"mean_count": item.row / 7}, attempt=attempt)

    def quarantine(self, item: Item, error: str, message: str, tries: int) -> None:
        Generation(self.folder).commit_failure(item.row, item.name, error, message, tries)


def created(folder: Path) -> Path:
    return Generation.create(folder, meta=META, gives=("mean_count",), per_item=True, grids={"": Grid({}, {})}).path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return created(tmp_path / "numbers")


def there(folder: Path) -> dict[int, float]:
    return {row: record["columns"]["mean_count"] for row, record in Generation(folder).committed().items()}


def test_items_are_reported_when_they_are_safe_and_share_a_sync(folder, monkeypatch):
    monkeypatch.setattr(here, "_TOGETHER_SECONDS", 1000.0)
    syncs: list[int] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (syncs.append(fd), fsync(fd)))
    reported = []

    def event(kind: str, item: Item | None, text: str) -> None:
        assert item is not None
        assert item.row in there(folder)
        reported.append((kind, item.row))

    process_here(Numbers(folder), items(range(200)), event=event)
    assert reported == [("done", row) for row in range(200)]
    assert there(folder) == {row: row / 7 for row in range(200)}
    assert len(syncs) < 10


def test_a_failing_item_is_recorded_after_the_others_of_its_batch(folder):
    told = []
    job = Numbers(folder, {2: ValueError("odd")})
    process_here(job, items(range(5)), event=lambda kind, item, text: told.append((kind, item.row, text)))
    assert told == [("done", 0, ""), ("done", 1, ""), ("quarantined", 2, "ValueError: odd"), ("done", 3, ""), ("done", 4, "")]
    assert sorted(there(folder)) == [0, 1, 3, 4]
    assert [row for row, record in Generation(folder).records().items() if not record["ok"]] == [2]


def test_an_error_that_stops_the_run_leaves_what_was_done_before_it(folder):
    told = []
    job = Numbers(folder, {2: DiskFullError("full", "", "free some")})
    with pytest.raises(DiskFullError):
        process_here(job, items(range(5)), event=lambda kind, item, text: told.append(item.row))
    assert told == sorted(there(folder)) == [0, 1]


def test_a_run_that_is_stopped_starts_no_further_batch(folder, monkeypatch):
    monkeypatch.setattr(here, "_TOGETHER_SECONDS", 0.0)
    process_here(Numbers(folder), items(range(5)), stopped=lambda: True)
    assert sorted(there(folder)) == [0]


@pytest.mark.parametrize("split", [False, True])
def test_killed_before_any_of_its_system_calls_it_has_lost_nothing_that_was_reported(tmp_path, split):
    lost = set()
    for before in itertools.count(1):
        folder = created(tmp_path / str(before))
        outcome = crash(lambda folder=folder: in_two_batches(folder), before=before, split=split)
        assert set(outcome.done) <= set(there(folder))
        assert all(value == row / 7 for row, value in there(folder).items())
        assert [p for p in Generation(folder).damaged() if "harmless" not in p] == []
        lost.add(5 - len(there(folder)))
        process_here(Numbers(folder), items(row for row in range(5) if row not in there(folder)))
        assert sorted(there(folder)) == list(range(5))
        if not outcome.killed:
            break
    assert {0, 2, 5} <= lost


def in_two_batches(folder: Path) -> Iterator[int]:
    for batch in ([0, 1, 2], [3, 4]):
        told: list[int] = []
        process_here(Numbers(folder), items(batch), event=lambda kind, item, text, told=told: told.append(item.row))
        yield from told
