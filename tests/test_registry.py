"""A row belongs to a content forever, and a name is a label that may move."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from cryodask.errors import InputError, StoreError
from cryodask.store.registry import Arrival, Item, Registry, Update

EVERY = range(1000)


def listing(text: str) -> list[Arrival]:
    """``a:A b:B``: files a and b with contents A and B."""
    return [Arrival(name, content, {"movie_path": f"/data/{name}.tif"}) for name, content in (word.split(":") for word in text.split())]


def written(items: dict[int, Item]) -> str:
    """``0:a:A 1:b:B?``: rows, names and contents; ``?`` for one whose file left."""
    return " ".join(f"{row}:{i.name}:{i.content}{'' if i.there else '?'}" for row, i in items.items())


def state(registry: Registry) -> Any:
    return registry.present(), registry.all(), registry._rows.entries, registry._rows.of_content, registry._rows.holder


class Step(NamedTuple):
    """One update, and what it must lead to; ``new`` as names."""

    listing: str
    present: str
    said: tuple[str, ...] = ()
    new: str = ""
    complete: bool = True
    keep: Any = EVERY
    least_row: int = 0


FIRST = Step("a:A b:B", "0:a:A 1:b:B", new="a b")
AGAIN = "{0} was recorded again: it is a new exposure; the results of the former one are kept as {0}~{1}".format
COPY = "{} is a copy of {} and is skipped".format
LEFT = "1 exposure is no longer where it was ({}): the results stay".format
LOST = "1 exposure is no longer where it was ({}): the results of 0 stay, 1 no longer count".format
BACK = "1 exposure is back ({})".format

SCENARIOS: dict[str, list[Step]] = {
    "the order of the listing is the order of new rows": [Step("b:B a:A", "0:b:B 1:a:A", new="b a"), Step("a:A b:B", "0:b:B 1:a:A")],
    "new ones get the next row": [FIRST, Step("a:A c:C b:B", "0:a:A 1:b:B 2:c:C", new="c")],
    "renamed": [FIRST, Step("a:A c:B", "0:a:A 1:c:B", ("b is now called c",))],
    "renamed before others in the listing": [FIRST, Step("c:B a:A", "0:a:A 1:c:B", ("b is now called c",))],
    "renamed when its file had left": [
        FIRST,
        Step("a:A", "0:a:A 1:b:B?", (LEFT("b"),)),
        Step("a:A c:B", "0:a:A 1:c:B", ("b is back as c",), new="c"),
    ],
    "a copy of a registered one is left out, wherever it stands": [
        FIRST,
        Step("0:A a:A b:B", "0:a:A 1:b:B", (COPY("0", "a"),)),
        Step("a:A b:B 0:A c:B", "0:a:A 1:b:B", (COPY("c", "b"),)),
    ],
    "of two new ones the first stays": [Step("b:A a:A", "0:b:A", (COPY("a", "b"),), new="b"), Step("a:A b:A", "0:b:A")],
    "a copy takes over when its original was removed": [
        Step("a:A b:A c:A", "0:a:A", (COPY("b", "a"), COPY("c", "a")), new="a"),
        Step("c:A b:A", "0:c:A", ("a is now called c",)),
    ],
    "a copy that came, went and came is news again": [
        FIRST,
        Step("a:A b:B c:A", "0:a:A 1:b:B", (COPY("c", "a"),)),
        FIRST._replace(new=""),
        Step("a:A b:B c:A", "0:a:A 1:b:B", (COPY("c", "a"),)),
    ],
    "overwritten by a copy of another": [FIRST, Step("a:B b:B", "0:a:A? 1:b:B", (COPY("a", "b"), LEFT("a")))],
    "collected again": [
        FIRST,
        Step("a:C b:B", "1:b:B 2:a:C", (AGAIN("a", 0),), new="a"),
        Step("a:D b:B", "1:b:B 3:a:D", (AGAIN("a", 2),), new="a"),
        Step("a:A b:B", "0:a:A 1:b:B", ("a~0 is back as a; the results of the former a are kept as a~3",), new="a"),
        Step("a:A b:B c:C", "0:a:A 1:b:B 2:c:C", ("a~2 is back as c",), new="c"),
    ],
    "collected again in a live session": [FIRST, Step("a:C", "1:b:B 2:a:C", (AGAIN("a", 0),), new="a", complete=False)],
    "collected again after it left without results": [
        FIRST,
        Step("a:A", "0:a:A", (LOST("b"),), keep=()),
        Step("a:A b:C", "0:a:A 2:b:C", ("b was recorded again: it is a new exposure",), new="b", keep=()),
    ],
    "collected again, and the former one kept under another name": [
        FIRST,
        Step("a:C b:B old:A", "0:old:A 1:b:B 2:a:C", ("a is now called old",), new="a"),
    ],
    "the same in a live session": [FIRST, Step("a:C old:A", "0:old:A 1:b:B 2:a:C", ("a is now called old",), new="a", complete=False)],
    "a former one does not come back when its name becomes free": [
        FIRST,
        Step("a:C b:B", "1:b:B 2:a:C", (AGAIN("a", 0),), new="a"),
        Step("x:C b:B", "1:b:B 2:x:C", ("a is now called x",)),
        Step("x:C b:B a:D", "1:b:B 2:x:C 3:a:D", new="a"),
    ],
    "renamed over another": [FIRST, Step("a:B", "1:a:B", ("b is now called a; the results of the former a are kept as a~0",))],
    "a name that became free is given to a new one while its former holder is away": [
        Step("a:A", "0:a:A", new="a"),
        Step("x:A", "0:x:A", ("a is now called x",)),
        Step("a:B", "0:x:A? 1:a:B", (LEFT("x"),), new="a"),
    ],
    "swapped": [FIRST, Step("a:B b:A", "0:b:A 1:a:B", ("b is now called a", "a is now called b"))],
    "three names in a circle": [
        Step("a:A b:B c:C", "0:a:A 1:b:B 2:c:C", new="a b c"),
        Step("a:C b:A c:B", "0:b:A 1:c:B 2:a:C", ("c is now called a", "a is now called b", "b is now called c")),
    ],
    "many left, with results": [
        Step("a:A b:B c:C d:D", "0:a:A 1:b:B 2:c:C 3:d:D", new="a b c d"),
        Step("", "0:a:A? 1:b:B? 2:c:C? 3:d:D?", ("4 exposures are no longer where they were (a, b, c, ...): the results stay",)),
        Step("a:A b:B c:C d:D", "0:a:A 1:b:B 2:c:C 3:d:D", ("4 exposures are back (a, b, c, ...)",), new="a b c d"),
    ],
    "left, one without results, and back with its row": [
        FIRST,
        Step(
            "",
            "0:a:A?",
            ("2 exposures are no longer where they were (a, b): the results of 1 stay, 1 no longer count",),
            keep=[0],
        ),
        Step("c:C", "0:a:A? 2:c:C", new="c", keep=[0]),
        Step("c:C b:B", "0:a:A? 1:b:B 2:c:C", (BACK("b"),), new="b", keep=[0]),
    ],
    "results that are lost later": [FIRST, Step("a:A", "0:a:A 1:b:B?", (LEFT("b"),)), Step("a:A", "0:a:A", (LOST("b"),), keep=())],
    "nothing leaves in a live session": [
        FIRST,
        Step("c:C", "0:a:A 1:b:B 2:c:C", new="c", complete=False, keep=()),
        Step("d:A", "0:a:A 1:b:B 2:c:C", (COPY("d", "a"),), complete=False, keep=()),
        Step("e:A", "0:a:A 1:b:B 2:c:C", (COPY("e", "a"),), complete=False, keep=()),
        Step("d:A e:A", "0:a:A 1:b:B 2:c:C", complete=False, keep=()),
        Step("d:A b:B c:C", "0:d:A 1:b:B 2:c:C", ("a is now called d",)),
    ],
    "back in a live session": [
        FIRST,
        Step("a:A", "0:a:A 1:b:B?", (LEFT("b"),)),
        Step("z:B", "0:a:A 1:z:B", ("b is back as z",), new="z", complete=False),
    ],
    "rows that others know of are not given": [
        FIRST._replace(least_row=5, present="5:a:A 6:b:B"),
        Step("a:A b:B c:C", "5:a:A 6:b:B 7:c:C", new="c", least_row=3),
        Step("a:A b:B c:C d:D", "5:a:A 6:b:B 7:c:C 20:d:D", new="d", least_row=20),
    ],
}


def checked_update(folder: Path, arrivals: list[Arrival], **how: Any) -> Update:
    """One update by a registry just opened; it is the same from disk, and once more it changes nothing."""
    registry = Registry(folder)
    update = registry.update(arrivals, **how)
    assert state(Registry(folder)) == state(registry)
    assert [item for item in update.items if item.row not in registry.present()] == []
    size = registry.path.stat().st_size if registry.path.exists() else 0
    again = Registry(folder).update(arrivals, **how)
    assert (again.items, again.new, again.said) == (update.items, [], [])
    assert (registry.path.stat().st_size if registry.path.exists() else 0) == size
    return update


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario(name, tmp_path):
    for step in SCENARIOS[name]:
        arrivals = listing(step.listing)
        update = checked_update(tmp_path, arrivals, complete=step.complete, keep=step.keep, least_row=step.least_row)
        assert written(Registry(tmp_path).present()) == step.present
        assert tuple(update.said) == step.said
        assert " ".join(item.name for item in update.new) == step.new
        by_name = {item.name: item for item in update.items}
        assert list(by_name) == [a.name for a in arrivals if a.name in by_name]
        copies = {line.split()[0] for line in step.said if "is a copy of" in line}
        assert copies.isdisjoint(by_name)
        assert {a.name: a.content for a in arrivals if a.name in by_name} == {n: i.content for n, i in by_name.items()}
        assert {a.content for a in arrivals} >= {i.content for i in update.items}


@pytest.mark.parametrize("name", SCENARIOS)
def test_an_update_cut_short_by_a_crash_is_completed_by_the_same_listing(name, tmp_path):
    for number, step in enumerate(SCENARIOS[name]):
        how = {"complete": step.complete, "keep": step.keep, "least_row": step.least_row}
        path = tmp_path / "items.jsonl"
        before = path.read_bytes() if path.exists() else b""
        Registry(tmp_path).update(listing(step.listing), **how)
        after = path.read_bytes() if path.exists() else b""
        whole = state(Registry(tmp_path))[:2]
        ends = [at for at in range(len(before), len(after)) if after[at - 1 : at] == b"\n" or not at]
        for cut in [*ends, *(at + 20 for at in ends)]:
            folder = tmp_path / f"{number}-{cut}"
            folder.mkdir()
            (folder / "items.jsonl").write_bytes(after[:cut])
            registry = Registry(folder)
            if registry.unreadable:
                with pytest.raises(StoreError, match="cannot be read"):
                    registry.update(listing("new:NEW"), complete=False)
                registry.repair({})
            registry.update(listing(step.listing), **how)
            assert state(Registry(folder))[:2] == whole


def test_former_ones_are_all_listed_by_name_and_row(tmp_path):
    for text in ("a:A", "a:B", "a:C", "b:B a:C"):
        Registry(tmp_path).update(listing(text), complete=True, keep=EVERY)
    assert written(Registry(tmp_path).all()) == "0:a~0:A? 1:b:B 2:a:C"


def test_two_files_of_one_name_are_refused_and_nothing_is_written(tmp_path):
    both = [Arrival("a", "A", {"movie_path": "/x/a.tif"}), Arrival("b", "B"), Arrival("a", "A", {"movie_path": "/y/a.tif"})]
    with pytest.raises(InputError, match=r"Two exposures have the same name a: /x/a.tif and /y/a.tif\.") as error:
        Registry(tmp_path).update(both, complete=True)
    assert error.value.usual_reason
    assert error.value.way_out
    assert Registry(tmp_path).all() == {}


def test_an_open_registry_follows_what_another_writes_and_mends(tmp_path):
    reader, writer = Registry(tmp_path), Registry(tmp_path)
    assert reader.present() == {}
    writer.update(listing("a:A b:B"), complete=True)
    assert written(reader.present()) == "0:a:A 1:b:B"
    writer.update(listing("b:A a:B c:C"), complete=True)
    assert written(reader.present()) == "0:b:A 1:a:B 2:c:C"
    lines = writer.path.read_bytes().split(b"\n")
    other = writer.path.with_name("other")
    other.write_bytes(b"\n".join([*lines[:2], b""]))
    other.rename(writer.path)
    assert written(reader.present()) == "0:a:A 1:b:B"
    writer.path.unlink()
    assert reader.present() == reader.all() == {}


def test_a_content_that_becomes_known_keeps_the_row_of_its_name(tmp_path):
    Registry(tmp_path).update([Arrival("a", "name:a")], complete=True)
    update = checked_update(tmp_path, [Arrival("a", "A")], complete=True)
    assert [(i.row, i.content, i.revision) for i in update.new] == [(0, "A", 1)]


def test_a_name_that_is_given_to_a_missing_file_is_not_called_a_new_recording(tmp_path):
    Registry(tmp_path).update(listing("a:A"), complete=True)
    lost = Arrival("a", "name:a", {"micrograph_path": "elsewhere/a.mrc"})
    update = checked_update(tmp_path, [lost], complete=True, keep=EVERY)
    what = "a is now elsewhere/a.mrc, which does not exist: it is a new exposure; the results of the former one are kept as a~0"
    assert update.said == [what]


# --- what is known from outside ---------------------------------------------------------------------------------------------


def one(folder: Path, **inputs: Any) -> tuple[Item, bool]:
    """The item after an update with these inputs, and whether it is new."""
    update = checked_update(folder, [Arrival("a", "A", inputs)], complete=True, keep=EVERY)
    return update.items[0], bool(update.new)


def test_a_changed_value_raises_the_revision_and_a_moved_file_does_not(tmp_path):
    first, new = one(tmp_path, movie_path="/x/a", size=1, mtime=1.5, stat=[1, 2], defocus_u_angstrom=1e4)
    assert (first.revision, new) == (0, True)
    moved, new = one(tmp_path, movie_path="/y/a", size=1, mtime=9.5, stat=[3, 4], defocus_u_angstrom=1e4)
    assert (moved.revision, new, moved.fingerprint) == (0, False, first.fingerprint)
    assert moved.inputs["movie_path"] == Registry(tmp_path).present()[0].inputs["movie_path"] == "/y/a"
    changed, new = one(tmp_path, movie_path="/y/a", defocus_u_angstrom=2e4)
    assert (changed.revision, new, changed.row) == (1, True, 0)
    assert changed.fingerprint != first.fingerprint
    back, new = one(tmp_path, movie_path="/y/a", defocus_u_angstrom=1e4)
    assert (back.revision, new, back.fingerprint) == (2, True, first.fingerprint)


def test_a_value_changed_while_the_file_was_away_raises_the_revision(tmp_path):
    one(tmp_path, defocus_u_angstrom=1e4)
    Registry(tmp_path).update([], complete=True, keep=EVERY)
    assert Registry(tmp_path).present()[0].revision == 0
    assert one(tmp_path, defocus_u_angstrom=2e4)[0].revision == 1


def test_values_that_json_writes_alike_are_no_change(tmp_path):
    one(tmp_path, a=float("nan"), b=(1, 2))
    size = (tmp_path / "items.jsonl").stat().st_size
    update = Registry(tmp_path).update([Arrival("a", "A", {"a": float("nan"), "b": [1, 2]})], complete=True)
    assert (update.new, (tmp_path / "items.jsonl").stat().st_size) == ([], size)


def test_the_content_is_in_the_fingerprint():
    item = Item(0, "a", "A", {"x": 1.0})
    assert item.fingerprint != replace(item, content="B").fingerprint
    assert item.fingerprint == replace(item, name="b", row=3, revision=4, there=False).fingerprint
    assert item.fingerprint != replace(item, inputs={"x": 1.0, "pathology": 2}).fingerprint


# --- on purpose ---------------------------------------------------------------------------------------------------------------


def test_a_forgotten_one_stays_out_until_it_is_remembered(tmp_path):
    checked_update(tmp_path, listing("a:A b:B"), complete=True)
    assert [i.row for i in Registry(tmp_path).forget(["a", "a"])] == [0]
    assert Registry(tmp_path).forget(["a"]) == []
    assert written(Registry(tmp_path).present()) == "1:b:B"
    for complete, text in ((True, "a:A b:B"), (False, "a:A"), (True, "b:B"), (True, "a:A b:B")):
        update = checked_update(tmp_path, listing(text), complete=complete, keep=[1])
        assert ("a" in [i.name for i in update.items], update.said, update.new) == (False, [], [])
        assert written(Registry(tmp_path).present()) == "1:b:B"
    update = checked_update(tmp_path, listing("c:A b:B"), complete=True)
    assert (update.said, written(Registry(tmp_path).present())) == (["a is now called c"], "1:b:B")
    assert [i.row for i in Registry(tmp_path).remember(["c", "b"])] == [0]
    assert Registry(tmp_path).remember(["c"]) == []
    assert written(Registry(tmp_path).present()) == "0:c:A 1:b:B"


def test_a_forgotten_one_that_left_is_remembered_as_one_whose_file_is_away(tmp_path):
    Registry(tmp_path).update(listing("a:A"), complete=True)
    Registry(tmp_path).forget(["a"])
    Registry(tmp_path).update([], complete=True)
    Registry(tmp_path).remember(["a"])
    assert written(Registry(tmp_path).present()) == "0:a:A?"


def test_one_that_left_without_results_can_be_forgotten_and_remembered(tmp_path):
    Registry(tmp_path).update(listing("a:A"), complete=True)
    Registry(tmp_path).update([], complete=True)
    Registry(tmp_path).forget(["a"])
    assert [i.row for i in Registry(tmp_path).remember(["a"])] == [0]
    assert written(Registry(tmp_path).present()) == "0:a:A?"
    checked_update(tmp_path, [], complete=True)
    assert written(Registry(tmp_path).present()) == ""


def test_the_name_of_a_forgotten_one_can_be_taken_by_another(tmp_path):
    Registry(tmp_path).update(listing("a:A"), complete=True)
    Registry(tmp_path).forget(["a"])
    assert checked_update(tmp_path, listing("a:B"), complete=True).said == [AGAIN("a", 0)]
    Registry(tmp_path).remember(["a~0"])
    assert written(Registry(tmp_path).present()) == "1:a:B"
    assert checked_update(tmp_path, listing("a:B b:A"), complete=True).said == ["a~0 is back as b"]
    assert written(Registry(tmp_path).present()) == "0:b:A 1:a:B"


@pytest.mark.parametrize("what", ["forget", "remember"])
def test_an_unknown_name_is_answered_with_the_nearest(what, tmp_path):
    with pytest.raises(InputError, match="run the project first"):
        getattr(Registry(tmp_path), what)(["x"])
    Registry(tmp_path).update(listing("grid1_0001:A grid2_0007:B"), complete=True)
    with pytest.raises(InputError, match=r"no exposure called 'grid2_007'\..*\n.*\n.*closest is grid2_0007"):
        getattr(Registry(tmp_path), what)(["grid1_0001", "grid2_007"])
    assert written(Registry(tmp_path).present()) == "0:grid1_0001:A 1:grid2_0007:B"


# --- lines that cannot be read ------------------------------------------------------------------------------------------------


def flip_line(folder: Path, number: int) -> None:
    lines = (folder / "items.jsonl").read_bytes().split(b"\n")
    lines[number] = lines[number][:12] + bytes([lines[number][12] ^ 1]) + lines[number][13:]
    (folder / "items.jsonl").write_bytes(b"\n".join(lines))


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_damaged_row_is_restored_and_taken_by_its_file(number, tmp_path):
    Registry(tmp_path).update(listing("a:A b:B c:C"), complete=True)
    flip_line(tmp_path, number)
    seen = {0: ("a", 3), 1: ("b", 3), 2: ("c", 3)}
    registry = Registry(tmp_path)
    assert registry.unreadable
    assert registry.damaged(seen) == [f"items.jsonl: the line of row {number} is damaged; the next run rewrites it"]
    registry.repair(seen)
    assert not registry.unreadable
    assert number not in registry.present()
    assert {i.revision for i in registry.all().values()} == {3}
    assert registry.update(listing("new:NEW"), complete=False).items[0].row == 3
    update = checked_update(tmp_path, listing("a:A b:B c:C new:NEW"), complete=True)
    assert written(Registry(tmp_path).present()) == "0:a:A 1:b:B 2:c:C 3:new:NEW"
    assert [(i.row, i.revision) for i in update.new] == [(number, 4)]
    assert update.said == [BACK("abc"[number])]


def test_a_damaged_row_with_results_and_without_its_file_stays(tmp_path):
    Registry(tmp_path).update(listing("a:A b:B"), complete=True)
    flip_line(tmp_path, 1)
    Registry(tmp_path).repair({1: ("b", 0)})
    checked_update(tmp_path, listing("a:A"), complete=True, keep=[1])
    assert written(Registry(tmp_path).present()) == "0:a:A 1:b:name:b?"


@pytest.mark.parametrize("number", [0, 1])
def test_a_damaged_row_of_a_name_collected_again_is_not_mistaken_for_the_other(number, tmp_path):
    for text in ("a:A", "a:B"):
        Registry(tmp_path).update(listing(text), complete=True, keep=EVERY)
    flip_line(tmp_path, number)
    registry = Registry(tmp_path)
    registry.repair({0: ("a", 0), 1: ("a", 0)})
    registry.update(listing("a:B"), complete=True, keep=EVERY)
    assert written(registry.present()) == "1:a:B"
    update = registry.update(listing("a:C"), complete=True, keep=EVERY)
    assert update.items[0].row == 2


def test_mending_keeps_who_has_which_name(tmp_path):
    for text in ("a:A b:B", "a:C b:B c:A", "a:C", "x:C"):
        Registry(tmp_path).update(listing(text), complete=True, keep=EVERY)
    Registry(tmp_path).update(listing("x:D a:C"), complete=True, keep=[])
    Registry(tmp_path).forget(["x"])
    registry = Registry(tmp_path)
    before = registry.present(), {row: replace(i, revision=5) for row, i in registry.all().items()}
    with open(registry.path, "ab") as file:
        file.write(b"0123")
    assert registry.damaged({}) == ["items.jsonl: line 13 is incomplete, harmless: it is ignored"]
    registry.repair({row: (i.name, 5) for row, i in registry.all().items()})
    after = Registry(tmp_path)
    assert (list(after.present()), after.all()) == (list(before[0]), before[1])


# --- any sequence --------------------------------------------------------------------------------------------------------------

NAMES, CONTENTS = "abcde", "ABCDEF"
files = st.dictionaries(st.sampled_from(NAMES), st.tuples(st.sampled_from(CONTENTS), st.integers(0, 1), st.integers(0, 1)), max_size=5)
kept = st.sets(st.integers(0, 8))
some_names = st.sets(st.sampled_from(NAMES), max_size=3)


class AnySequence(RuleBasedStateMachine):
    """Whatever is listed, forgotten and remembered: ``row_of`` is what every content had at first."""

    @initialize()
    def make(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="registry-machine-"))
        self.row_of: dict[str, int] = {}
        self.revision: dict[int, int] = {}

    def teardown(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    @rule(found=files, complete=st.booleans(), keep=kept, order=st.randoms(use_true_random=False))
    def list(self, found, complete, keep, order):
        """Files are listed."""
        arrivals = [Arrival(n, c, {"x_path": place, "value": value}) for n, (c, place, value) in found.items()]
        order.shuffle(arrivals)
        before, all_before = Registry(self.folder).present(), Registry(self.folder).all()
        update = checked_update(self.folder, arrivals, complete=complete, keep=keep)
        after, every = Registry(self.folder).present(), Registry(self.folder).all()
        forgotten = self._forgotten()
        listed = {a.content for a in arrivals} - forgotten
        there = {i.content for i in after.values() if i.there}
        assert listed <= there
        if complete:
            assert there == listed
            assert {row for row in before if row not in after} <= {
                row for row in before if row not in keep or any(i.name == before[row].name for i in update.items)
            } | {row for row in before if any(every[r].name == before[row].name and r != row for r in every)}
        by_name = {a.name: a for a in arrivals}
        for item in update.items:
            assert (item.content, item.inputs["x_path"]) == (by_name[item.name].content, by_name[item.name].inputs["x_path"])
            was = all_before.get(item.row)
            changed = was is not None and was.inputs["value"] != item.inputs["value"]
            assert item.revision == (0 if was is None else was.revision + changed)
            came = item.row not in before or not before[item.row].there
            assert (item in update.new) == (changed or came)
        for row, item in before.items():  # a registered name that still has its content stays
            if item.name in by_name and by_name[item.name].content == item.content:
                assert after[row].name == item.name

    def _forgotten(self) -> set[str]:
        registry = Registry(self.folder)
        return {item.content for row, item in registry.all().items() if registry._rows.entries[row].forgotten}

    def _known(self, names: set[str]) -> list[str]:
        return sorted(names & {i.name for i in Registry(self.folder).all().values()})

    @rule(names=some_names)
    def forget(self, names):
        """A person excludes exposures."""
        known = self._known(names)
        Registry(self.folder).forget(known)
        assert not {i.name for i in Registry(self.folder).present().values()} & set(known)

    @rule(names=some_names)
    def remember(self, names):
        """A person includes them again."""
        known = self._known(names)
        items = Registry(self.folder).remember(known)
        present = Registry(self.folder).present()
        assert [i for i in items if present[i.row].content != i.content] == []

    @invariant()
    def row_and_content_belong_together_for_ever(self):
        every = Registry(self.folder).all()
        for row, item in every.items():
            assert self.row_of.setdefault(item.content, row) == row
            assert item.revision >= self.revision.get(row, 0)
            self.revision[row] = item.revision
        assert sorted(every) == sorted(self.row_of.values())
        assert len(set(self.row_of.values())) == len(self.row_of)

    @invariant()
    def one_present_per_name_and_content(self):
        registry = Registry(self.folder)
        present, every = registry.present(), registry.all()
        for what in ("name", "content"):
            assert len({getattr(i, what) for i in present.values()}) == len(present)
        assert len({i.name for i in every.values()}) == len(every)
        assert {row: every[row] for row in present} == present


def test_any_sequence_of_listings_keeps_rows_and_contents_together():
    run_state_machine_as_test(AnySequence, settings=settings(max_examples=60, stateful_step_count=12, deadline=None))
