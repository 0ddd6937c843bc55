"""Edits by eye: whatever the order, the number of servers and the torn lines, everyone sees the same, and nothing is lost."""

from __future__ import annotations

import json
import random
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cryodask.edits.board import Board
from cryodask.edits.choices import current
from cryodask.edits.frozen import freeze, frozen, state_of
from cryodask.edits.log import OperationLog
from cryodask.edits.operations import MOST_AT_ONCE, new_id, read_operations
from cryodask.edits.picks import Pick, edited, edits_of
from cryodask.errors import InputError, StoreError
from cryodask.store.project import Project
from cryodask.store.state import StepState

STORED = [Pick(f"1.0.{k}", 10.0 * k, 5.0, 2.0 - 0.1 * k, accepted=k < 4) for k in range(5)]
IDS = [f"{k:032x}" for k in range(8)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "project.json").write_text("{}")
    return tmp_path


@st.composite
def operations(draw: Any) -> list[dict[str, Any]]:
    """Operations as several people make them: contradictory, with equal counters, before and after what they refer to."""
    out: list[dict[str, Any]] = []
    for k in range(draw(st.integers(0, 14))):
        do = draw(st.sampled_from(["add", "remove", "restore", "move"]))
        one: dict[str, Any] = {"id": f"{k:032x}", "n": draw(st.integers(0, 5)), "do": do, "row": 0, "who": draw(st.sampled_from("ab"))}
        if do != "add":
            one["pick"] = draw(st.sampled_from([*(p.pick for p in STORED), *IDS]))
        if do != "restore":
            one |= {"y": float(draw(st.integers(0, 99))), "x": float(draw(st.integers(0, 99)))}
        out.append(one)
    return out


@given(operations(), st.randoms(use_true_random=False))
@settings(max_examples=300, deadline=None)
def test_order_and_repetition_do_not_matter(made: list[dict[str, Any]], rng: random.Random) -> None:
    again = [*made, *(rng.sample(made, len(made) // 2))]
    rng.shuffle(again)
    assert list(map(repr, edited(STORED, again))) == list(map(repr, edited(STORED, made)))  # the score of an added pick is NaN
    assert edits_of(again) == edits_of(made)
    # an added pick is never lost, and only a removal hides one
    names = {p.pick for p in edited(STORED, made)}
    assert names == {p.pick for p in STORED} | {o["id"] for o in made if o["do"] == "add"}
    removed = {o["pick"] for o in made if o["do"] == "remove"}
    assert {p.pick for p in edited(STORED, made) if p.removed} <= removed


@given(operations())
@settings(max_examples=200, deadline=None)
def test_what_a_step_gets_is_what_people_saw(made: list[dict[str, Any]]) -> None:
    shown = {p.pick: p for p in edited(STORED, made)}
    edits = edits_of(made)
    assert {e["name"]: e["place"] for e in edits if e["action"] == "add"} == {
        p.pick: (p.y, p.x) for p in shown.values() if p.added and not p.removed
    }
    assert sum(e["action"] == "remove" for e in edits) == sum(p.removed for p in shown.values() if not p.added)
    moved = {p.pick: (p.y, p.x) for p, old in zip(shown.values(), STORED) if (p.y, p.x) != (old.y, old.x) and not p.removed}
    assert set(moved.values()) <= {e["place"] for e in edits if e["action"] == "move"}


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), st.booleans(), st.integers(0, 3)), max_size=12), st.randoms())
@settings(max_examples=200, deadline=None)
def test_choices_do_not_depend_on_their_order(made: list[tuple[int, int, bool, int]], rng: random.Random) -> None:
    ops = [
        {"id": f"{k:032x}", "n": n, "do": "set" if on else "unset", "row": row, "name": "rating", "value": str(v), "who": "a"}
        for k, (n, row, on, v) in enumerate(made)
    ]
    again = ops * 2
    rng.shuffle(again)
    assert current(again) == current(ops)


def add(n: int = 1, row: int = 0, **more: Any) -> dict[str, Any]:
    return {"id": new_id(), "n": n, "do": "add", "row": row, "y": 1.0, "x": 2.0, **more}


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_several_servers_torn_lines_and_duplicates(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    folder = tmp_path_factory.mktemp("p")
    (folder / "project.json").write_text("{}")
    servers = [OperationLog(folder, "picks") for _ in range(3)]
    acknowledged: dict[str, dict[str, Any]] = {}
    for _ in range(data.draw(st.integers(1, 12))):
        kind = data.draw(st.sampled_from(["new", "again", "crash"]))
        which = data.draw(st.integers(0, 2))
        if kind == "crash":  # the last line of a file is torn anywhere, and its server starts again
            name = servers[which]._journal._file
            if name.is_file():
                with open(name, "ab") as file:
                    file.write(b'0123abcd {"id": "fff'[: data.draw(st.integers(1, 20))])
            servers[which].close()
            servers[which] = OperationLog(folder, "picks")
        elif kind == "again" and acknowledged:
            assert servers[which].append([data.draw(st.sampled_from(list(acknowledged.values())))], "b") == []
        else:
            ops = [add(data.draw(st.integers(0, 9))) for _ in range(data.draw(st.integers(1, 3)))]
            acknowledged |= {one["id"]: one for one in servers[which].append(ops, "a")}
    found = []
    for log in [*servers, OperationLog(folder, "picks")]:
        log.look()
        found.append(log.of_row(0))
    assert all(one == found[0] for one in found)
    assert {one["id"]: one for one in found[0]} == acknowledged


def test_people_at_once_lose_nothing(folder: Path) -> None:
    logs = [OperationLog(folder, "picks") for _ in range(2)]
    sent: list[str] = []

    def work(log: OperationLog) -> None:
        for _ in range(20):
            sent.extend(one["id"] for one in log.append([add(), add()], "a"))

    threads = [threading.Thread(target=work, args=(log,)) for log in (*logs, *logs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log = OperationLog(folder, "picks")
    log.look()
    assert {one["id"] for one in log.of_row(0)} == set(sent)
    assert len(sent) == len(set(sent)) == 160


def test_nobody_outranks_everyone_for_ever(folder: Path) -> None:
    log = OperationLog(folder, "picks")
    log.append([add(1)], "a")
    (far,) = log.append([add(1 << 50)], "b")
    (after,) = log.append([add(log.highest + 1)], "a")
    assert far["n"] == 2
    assert after["n"] == 3


def test_a_project_that_is_gone_is_not_made_again(folder: Path) -> None:
    log = OperationLog(folder, "picks")
    (folder / "project.json").unlink()
    with pytest.raises(StoreError, match="no longer there"):
        log.append([add()], "a")
    with pytest.raises(StoreError, match="no longer there"):
        freeze(log, "a")
    assert not (folder / "edits").exists()


def test_a_full_disk_is_said_and_the_next_edit_is_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cryodask.store import journal

    log = OperationLog(folder, "picks")
    log.append([add()], "a")

    def full(fd: int, data: bytes) -> None:
        import errno
        import os

        os.write(fd, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(journal, "write_all", full)
        with pytest.raises(StoreError, match="No space is left"):
            log.append([add()], "a")
    log.append([add()], "a")
    again = OperationLog(folder, "picks")
    again.look()
    assert len(again.of_row(0)) == 2


def test_a_frozen_state_stays_while_people_go_on(folder: Path) -> None:
    assert frozen(folder, "picks") is None
    log = OperationLog(folder, "picks")
    (one,) = log.append([add()], "anna")
    first = freeze(log, "anna")
    log.append([{"id": new_id(), "n": 9, "do": "remove", "row": 0, "pick": one["id"]}], "ben")
    now = frozen(folder, "picks")
    assert now == first
    assert now.picks == {0: [{"action": "add", "name": one["id"], "place": (1.0, 2.0)}]}
    assert now.who == "anna"
    assert state_of(log) == {}
    second = freeze(log, "ben")
    assert frozen(folder, "picks") == second
    assert second.digest != first.digest


def test_a_damaged_frozen_state_is_not_used(folder: Path) -> None:
    log = OperationLog(folder, "picks")
    log.append([add()], "anna")
    made = freeze(log, "anna")
    path = folder / "edits" / "picks" / "frozen" / f"{made.digest}.json"
    path.write_text(path.read_text().replace("1.0", "7.0"))
    with pytest.raises(StoreError, match="missing or damaged"):
        frozen(folder, "picks")
    path.unlink()
    with pytest.raises(StoreError, match="missing or damaged"):
        frozen(folder, "picks")


def test_classes_are_frozen_by_classification(folder: Path) -> None:
    log = OperationLog(folder, "classes")

    def choose(row: int, of: str, do: str = "set") -> dict[str, Any]:
        return {"id": new_id(), "n": log.highest + 1, "do": do, "row": row, "of": of, "name": "keep", "value": "sharp"}

    for row, of, do in ((3, "aa", "set"), (5, "bb", "set"), (1, "aa", "set"), (1, "aa", "unset")):
        log.append(read_operations("classes", [choose(row, f"classify2d/{of}", do)]), "anna")
    freeze(log, "anna", "classify2d/aa")
    found = frozen(folder, "classes", "classify2d/aa")
    assert found.numbers == {3: "sharp"}
    assert frozen(folder, "classes", "classify2d/bb") is None
    with pytest.raises(InputError, match="No class of classify2d@cc is chosen"):
        freeze(log, "anna", "classify2d/cc")
    assert frozen(folder, "classes", "classify2d/cc") is None


WRONG: list[tuple[str, Any]] = [
    ("picks", {"id": "x", "n": 1, "do": "add", "row": 0, "y": 1, "x": 1}),
    ("picks", add(y=float("nan"))),
    ("picks", add(y=float("inf"))),
    ("picks", add(y=-1.0)),
    ("picks", add(y="0x7")),
    ("picks", add(n=True)),
    ("picks", add(row=1.5)),
    ("picks", add(row=1 << 24)),
    ("picks", add(pick="1.0.1")),
    ("picks", add(do="explode")),
    ("picks", add(who="somebody else")),
    ("picks", {"id": new_id(), "n": 1, "do": "remove", "row": 0}),
    ("picks", {"id": new_id(), "n": 1, "do": "move", "row": 0, "pick": "1.0.1"}),
    ("picks", {"id": new_id(), "n": 1, "do": "remove", "row": 0, "pick": "../../etc"}),
    ("picks", "a word"),
    ("classes", {"id": new_id(), "n": 1, "do": "set", "row": 0, "of": "classify2d/ab"}),
    ("classes", {"id": new_id(), "n": 1, "do": "set", "row": 1, "of": "../secret/ab"}),
    ("exposures", {"id": new_id(), "n": 1, "do": "set", "row": 1, "name": "rating", "value": "6"}),
    ("exposures", {"id": new_id(), "n": 1, "do": "set", "row": -1, "name": "leave_out"}),
    ("exposures", {"id": new_id(), "n": 1, "do": "set", "row": 1, "name": "tag:"}),
    ("exposures", {"id": new_id(), "n": 1, "do": "set", "row": 1, "name": "note", "value": "x" * 2001}),
]


@pytest.mark.parametrize(("kind", "one"), WRONG)
def test_wrong_operations_are_refused(kind: str, one: Any) -> None:
    with pytest.raises(InputError, match="Edit 1 is not valid"):
        read_operations(kind, [one])


def test_wrong_lists_are_refused() -> None:
    for wrong in ("word", {"ops": []}, None, 7):
        with pytest.raises(InputError, match="not a list"):
            read_operations("picks", wrong)
    with pytest.raises(InputError, match="at most"):
        read_operations("picks", [add() for _ in range(MOST_AT_ONCE + 1)])
    with pytest.raises(InputError, match="cannot be edited"):
        read_operations("maps", [])
    assert json.dumps(read_operations("picks", [add()]))


@pytest.mark.parametrize(
    ("pipeline", "used"),
    [
        (
            ["edit_picks", {"select_classes": None}, {"select_exposures as good": {"leave_out": ["m1"]}}],
            {"edit_picks", "select_classes", "select_exposures"},
        ),
        ([{"edit_picks": {"wait": True}}, {"select_classes as best": {}}], {"edit_picks", "select_classes"}),
        ([{"edit_picks": {"file": "edits.csv"}}, {"select_classes": {"keep": [1]}}], set()),
        ([{"select_classes": {"keep": [1]}}, "select_classes as other"], {"select_classes"}),
        ([{"extract as edit_picks": {}}], set()),
    ],
)
def test_a_page_knows_whether_runs_apply_what_is_frozen(folder: Path, pipeline: list[Any], used: set[str]) -> None:
    (folder / "project.yaml").write_text(json.dumps({"name": "select_classes", "pipeline": pipeline}))
    stages = ("edit_picks", "select_classes", "select_exposures")
    assert {stage for stage in stages if Board(folder).is_used(stage)} == used


def test_a_project_file_that_cannot_be_read_hides_no_step(tmp_path: Path) -> None:
    made = Project.create(tmp_path / "toy", "toy")
    made.state.steps["mine"] = StepState(stage="edit_picks", key="k")
    made.save()
    for text in ("pipeline: [", "name: toy", "pipeline: [{}]", "pipeline: 3", ""):
        (tmp_path / "toy" / "project.yaml").write_text(text)
        assert Board(tmp_path / "toy").is_used("edit_picks")
        assert not Board(tmp_path / "toy").is_used("select_classes")
